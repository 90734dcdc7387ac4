// The Hopper GEMM's results, from a warpgroup's int32 sums to y. wgmma leaves channels in the rows of its fragments and
// tokens in the columns; y wants channels together. Types of up to 16 bits are finished where they lie, unrolled and
// without branches (four warps have no other work to hide latency with), turned around by transposing matrix stores on
// their way through shared memory, and leave as segments of eight channels. What is rare, 32-bit types and an N that
// leaves rows unaligned, goes through shared memory as int32 and the writer that all kernels share.
#pragma once

#include "sm90.cuh"
#include "store.cuh"

namespace pq {
namespace sm90 {

constexpr int kGroup = 128, kGroupChannels = 64;  // threads and output channels of a warpgroup
constexpr int kGroupBarrier = 1;                  // and kGroupBarrier + 1: ids of the warpgroups' own barriers
constexpr int kStagingRow = 128;                  // bytes of a token's 64 values of 16 bits
constexpr int kSumPitch = kGroupChannels + 4;     // words of a token's int32 values: no conflicts of stores and loads
constexpr int kRareRound = 16;                    // tokens

// A warpgroup's own shared memory.
template <int kTokens>
struct Staging {
    static constexpr int kRound = kTokens < 64 ? kTokens : 64;  // tokens that are turned around at a time
    static constexpr int kValueBytes = kRound * kStagingRow, kSumBytes = kRareRound * kSumPitch * 4;
    alignas(128) uint8_t values[kValueBytes > kSumBytes ? kValueBytes : kSumBytes];
    float row_scales[kTokens];
};

// What a warpgroup stores: its channels from n0, and of the tokens from m0 those in [first, last).
struct Target {
    int n0, m0, first, last;
};

// What a thread needs besides sums: scales and biases of its two channels, and row scales that it passes on.
template <int kTokens>
struct Factors {
    static constexpr int kRows = (kTokens + kGroup - 1) / kGroup;
    float scale[2], bias[2], row_scale[kRows];
};

// Called before a tile's multiplications, which hide the latency.
template <int kTokens>
__device__ __forceinline__ Factors<kTokens> load_factors(const Gemm& p, const Target& target) {
    const int thread = threadIdx.x % kGroup, channel = target.n0 + thread / 32 * 16 + thread % 32 / 4;
    Factors<kTokens> f;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const bool inside = channel + 8 * i < p.N && p.y_type != PQ_S32;
        f.scale[i] = 0.0f, f.bias[i] = -0.0f;  // adding -0 changes no float
        if (inside) f.scale[i] = load_now(p.scale + channel + 8 * i);
        if (inside && p.bias) f.bias[i] = load_now(p.bias + channel + 8 * i);
    }
#pragma unroll
    for (int i = 0; i < Factors<kTokens>::kRows; ++i) {
        const int m = target.m0 + thread + i * kGroup;
        f.row_scale[i] = 1.0f;
        if (p.row_scale && m < p.M) f.row_scale[i] = load_now(p.row_scale + m);
    }
    return f;
}

__device__ __forceinline__ float2 unpack2(uint32_t v, __half) {
    return __half22float2(*reinterpret_cast<const __half2*>(&v));
}
__device__ __forceinline__ float2 unpack2(uint32_t v, __nv_bfloat16) {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&v));
}
__device__ __forceinline__ uint32_t pack2(float a, float b, __half) {
    const __half2 v = __floats2half2_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&v);
}
__device__ __forceinline__ uint32_t pack2(float a, float b, __nv_bfloat16) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&v);
}

// A thread's residuals of a round: eight channels of every 16th token.
template <int kCount>
__device__ __forceinline__ void load_residual(uint4 (&residual)[kCount], const Gemm& p, const Target& target, int m,
                                              int n) {
#pragma unroll
    for (int i = 0; i < kCount; ++i, m += 16) {
        residual[i] = make_uint4(0, 0, 0, 0);
        if (m < target.first || m >= target.last || n >= p.N) continue;
        const uint16_t* from = static_cast<const uint16_t*>(p.residual) + static_cast<size_t>(m) * p.N + n;
        residual[i] = *reinterpret_cast<const uint4*>(from);
    }
}

// Eight values of 16 bits to y, codes narrowed on the way.
template <int kType>
__device__ __forceinline__ void store_segment(const Gemm& p, const uint4& v, size_t at) {
    if constexpr (kType == PQ_F16 || kType == PQ_BF16) {
        *reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.y) + at) = v;
    } else {
        const uint32_t low = __byte_perm(v.x, v.y, 0x6420), high = __byte_perm(v.z, v.w, 0x6420);
        if (kType == PQ_S8) {
            *reinterpret_cast<uint2*>(static_cast<uint8_t*>(p.y) + at) = make_uint2(low, high);
        } else {  // a byte's low nibble and the next byte's make one byte
            const uint32_t low_pairs = (low & 0x000F000Fu) | (low >> 4 & 0x00F000F0u);
            const uint32_t high_pairs = (high & 0x000F000Fu) | (high >> 4 & 0x00F000F0u);
            *reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(p.y) + at / 2) =
                __byte_perm(low_pairs, high_pairs, 0x6420);
        }
    }
}

template <int kType, bool kAdd, int kTokens>
__device__ __forceinline__ void store_values(const Gemm& p, float y_reciprocal, const Factors<kTokens>& f,
                                             const int (&acc)[kTokens / 2], Staging<kTokens>& staging,
                                             const Target& target) {
    using T = std::conditional_t<kType == PQ_BF16, __nv_bfloat16, __half>;
    constexpr int kRound = Staging<kTokens>::kRound, kCount = kRound / 16, kStep = 16 * kStagingRow;
    const int thread = threadIdx.x % kGroup, lane = thread % 32, warp = thread / 32;
    const int barrier = kGroupBarrier + threadIdx.x / kGroup;
    const float high = p.y_bits == 4 ? 7.0f : 127.0f;
    const Requantizer requantize = {p.y_scale, y_reciprocal, -high - 1.0f, high};
    // A matrix store takes four 8 x 8 matrices: two blocks of eight tokens by the warp's two blocks of channels. A lane
    // names one row of one of them, a token; XOR with the token's number keeps eight rows out of each other's banks.
    const uint32_t matrices = shared_address(staging.values) + (lane % 8 + lane / 16 * 8) * kStagingRow +
                              ((2 * warp + lane / 8 % 2) ^ (lane % 8)) * 16;
    const int row = thread / 8, n = target.n0 + thread % 8 * 8;
    uint8_t* segments = staging.values + row * kStagingRow + ((thread % 8) ^ (row % 8)) * 16;
    uint4 residual[kCount];
    if (kAdd) load_residual(residual, p, target, target.m0 + row, n);
#pragma unroll
    for (int i = 0; i < Factors<kTokens>::kRows; ++i) {
        if (thread + i * kGroup < kTokens) staging.row_scales[thread + i * kGroup] = f.row_scale[i];
    }
    if (!kAdd) named_barrier_sync(barrier, kGroup);  // else the one for the residuals
#pragma unroll
    for (int round = 0; round < kTokens / kRound; ++round) {
        const int m0 = target.m0 + round * kRound;
        if (m0 >= target.last) break;
        if (kAdd) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) *reinterpret_cast<uint4*>(segments + i * kStep) = residual[i];
            load_residual(residual, p, target, m0 + kRound + row, n);  // the next round's, early
            named_barrier_sync(barrier, kGroup);
        }
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            uint32_t words[4], added[4];
            if (kAdd) load_matrices_transposed(added, matrices + i * kStep);
#pragma unroll
            for (int j = 0; j < 4; ++j) {  // matrix j: tokens' block j / 2, channels' block j % 2
                const int block = round * (kRound / 8) + 2 * i + j / 2;
                const int* sums = acc + 4 * block + j % 2 * 2;
                const float2 rows = *reinterpret_cast<const float2*>(staging.row_scales + 8 * block + lane % 4 * 2);
                float v[2];
                v[0] = __fmul_rn(__fmul_rn(static_cast<float>(sums[0]), f.scale[j % 2]), rows.x);
                v[1] = __fmul_rn(__fmul_rn(static_cast<float>(sums[1]), f.scale[j % 2]), rows.y);
                v[0] = __fadd_rn(v[0], f.bias[j % 2]);
                v[1] = __fadd_rn(v[1], f.bias[j % 2]);
                if (kAdd) {
                    const float2 r = unpack2(added[j], T());
                    v[0] = __fadd_rn(v[0], r.x);
                    v[1] = __fadd_rn(v[1], r.y);
                }
                if constexpr (kType == PQ_F16 || kType == PQ_BF16) {
                    words[j] = pack2(v[0], v[1], T());
                } else {
                    words[j] = __byte_perm(requantize(v[0]), requantize(v[1]), 0x5410);
                }
            }
            store_matrices_transposed(matrices + i * kStep, words);
        }
        named_barrier_sync(barrier, kGroup);
        uint4 done[kCount];
#pragma unroll
        for (int i = 0; i < kCount; ++i) done[i] = *reinterpret_cast<const uint4*>(segments + i * kStep);
        named_barrier_sync(barrier, kGroup);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const int m = m0 + row + 16 * i;
            if (m < target.first || m >= target.last || n >= p.N) continue;
            const size_t at = static_cast<size_t>(m) * p.N + n;
            if (kType == PQ_S8 && p.y_type == PQ_S4) {
                store_segment<PQ_S4>(p, done[i], at);
            } else {
                store_segment<kType>(p, done[i], at);
            }
        }
    }
}

template <int kUnitOf, int kTokens>
__device__ __forceinline__ void store_rare(const Gemm& p, float y_reciprocal, const int (&acc)[kTokens / 2],
                                           Staging<kTokens>& staging, const Target& target) {
    const int thread = threadIdx.x % kGroup, lane = thread % 32, warp = thread / 32;
    const int barrier = kGroupBarrier + threadIdx.x / kGroup;
    int* sums = reinterpret_cast<int*>(staging.values);
    int* column = sums + lane % 4 * 2 * kSumPitch + warp * 16 + lane / 4;
    const SegmentWriter<kUnitOf> segments(p, target.n0 + thread % 8 * 8, y_reciprocal);
#pragma unroll 1
    for (int round = 0; round < kTokens / kRareRound; ++round) {
#pragma unroll
        for (int i = 0; i < kTokens / kRareRound; ++i) {  // registers have no run-time index
            if (i != round) continue;
#pragma unroll
            for (int j = 0; j < 8; ++j) column[(j / 4 * 8 + j % 2) * kSumPitch + j / 2 % 2 * 8] = acc[8 * i + j];
        }
        named_barrier_sync(barrier, kGroup);
        const int m = target.m0 + round * kRareRound + thread / 8;
        if (m >= target.first && m < target.last && segments.count > 0) {
            int segment[kSegment];
#pragma unroll
            for (int i = 0; i < kSegment; ++i) segment[i] = sums[thread / 8 * kSumPitch + thread % 8 * 8 + i];
            with_type(p.y_type, [&](auto type) { segments.template write<decltype(type)::value>(p, segment, m); });
        }
        named_barrier_sync(barrier, kGroup);
    }
}

template <int kUnitOf, int kTokens>
__device__ __forceinline__ void store_tile(const Gemm& p, float y_reciprocal, Factors<kTokens> f,
                                           const int (&acc)[kTokens / 2], Staging<kTokens>& staging,
                                           const Target& target) {
    f.scale[0] = __fmul_rn(f.scale[0], 1.0f / kUnitOf);
    f.scale[1] = __fmul_rn(f.scale[1], 1.0f / kUnitOf);
    if (p.N % 8 != 0 || p.y_type == PQ_F32 || p.y_type == PQ_S32) {
        store_rare<kUnitOf>(p, y_reciprocal, acc, staging, target);
    } else if (p.y_type == PQ_F16) {
        p.residual ? store_values<PQ_F16, true>(p, y_reciprocal, f, acc, staging, target)
                   : store_values<PQ_F16, false>(p, y_reciprocal, f, acc, staging, target);
    } else if (p.y_type == PQ_BF16) {
        p.residual ? store_values<PQ_BF16, true>(p, y_reciprocal, f, acc, staging, target)
                   : store_values<PQ_BF16, false>(p, y_reciprocal, f, acc, staging, target);
    } else {
        store_values<PQ_S8, false>(p, y_reciprocal, f, acc, staging, target);  // and PQ_S4, narrowed last
    }
    __syncwarp();
}

}  // namespace sm90
}  // namespace pq
