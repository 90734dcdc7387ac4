// The portable prefill kernel: Y^T = W X^T on mma.sync. The weights are the A operand, 16 channels a tile, and lie in
// memory as the lanes hold it: a tile is one conflict-free 16-byte load a lane out of shared memory, without ldmatrix.
// Tokens are the columns. X is K-major, rows of 32 bytes a k-step whether they hold 32 int8 or 64 int4, so the three
// layouts share everything but the unpacking and the instruction.
#pragma once

#include "store.cuh"

namespace pq {

// A CTA's tile of channels x tokens over a grid of warps. A pipeline stage holds kRowBytes bytes of each of its tokens.
// kResident: CTAs that are meant to share an SM, so that one's epilogue overlaps another's main loop.
template <int kChannelsOf, int kTokensOf, int kWarpsC, int kWarpsT, int kRowBytesOf, int kStagesOf, int kResidentOf>
struct Tile {
    static constexpr int kChannels = kChannelsOf, kTokens = kTokensOf, kRowBytes = kRowBytesOf, kStages = kStagesOf;
    static constexpr int kResident = kResidentOf, kChannelWarps = kWarpsC;
    static constexpr int kThreads = 32 * kWarpsC * kWarpsT;
    static constexpr int kWarpChannels = kChannels / kWarpsC, kWarpTokens = kTokens / kWarpsT;
    static constexpr int kA = kWarpChannels / 16, kB = kWarpTokens / 8;  // mma tiles of a warp
    static constexpr int kSteps = kRowBytes / 32;                        // mma k-steps of a stage
    static_assert(kWarpChannels % 16 == 0 && kWarpTokens % 16 == 0 && (kRowBytes == 64 || kRowBytes == 128));
};

// Bytes of a tile in shared memory for a weight layout.
template <int kLayout, class T>
struct Stage {
    static constexpr int kWeightRow = T::kRowBytes * (kLayout == PQ_LAYOUT_S8 ? 8 : 16);  // of 16 channels
    static constexpr int kWeights = T::kChannels / 16 * kWeightRow;
    static constexpr int kBytes = kWeights + T::kTokens * T::kRowBytes;
    static constexpr int kShared = T::kStages * kBytes;
    // The epilogue stages int32 results over the same memory, in as many passes as that takes. The pitch makes the
    // fragments' stores (channel g, token 2 t) hit 32 different banks.
    static constexpr int kPitch = T::kChannels + 4;
    static constexpr int passes(int tried = 1) {
        return T::kTokens / tried * kPitch * 4 <= kShared ? tried : passes(2 * tried);
    }
    static constexpr int kPasses = passes();
    static_assert(kShared <= 99 * 1024 && T::kWarpTokens / kPasses % 8 == 0);
};

// How a problem is cut into CTAs: blockIdx.x is a tile, blockIdx.y a part of K.
struct Plan {
    int channel_tiles, token_tiles, split;
    int group;           // channel tiles that go through all tokens together: a wave's W and X both stay in L2
    int* partials;       // [tile][part][fragment][thread][4], with split > 1
    unsigned* arrivals;  // [tile], zero at launch
    float y_reciprocal;  // 1 / y_scale
};

// What one thread copies of each stage: 16-byte chunks of one column of W's and X's tiles, in rows a fixed step apart.
// Rows and columns outside the tensors become zeros and are not read.
template <int kLayout, class T>
struct Copier {
    using S = Stage<kLayout, T>;
    static constexpr int kColumnsX = T::kRowBytes / 16, kColumnsW = S::kWeightRow / 16;
    static constexpr int kStepX = T::kThreads / kColumnsX, kStepW = T::kThreads / kColumnsW;  // rows
    static constexpr int kCountX = T::kTokens / kStepX, kCountW = T::kChannels / 16 / kStepW;
    static_assert(T::kTokens % kStepX == 0 && kStepX % 8 == 0 && T::kThreads % kColumnsW == 0 && kCountW > 0);

    const char *x, *w;              // the first chunk in the next stage
    int x_row, w_row;               // bytes of a row
    int x_left, w_left;             // bytes from that chunk to the row's end
    int x_count, w_count;           // how many of the rows exist
    uint32_t x_shared, w_shared;    // where it goes in a stage

    __device__ __forceinline__ Copier(const Gemm& p, int n0, int m0, int stage) {
        const int thread = threadIdx.x;
        {
            const int row = thread / kColumnsX, column = thread % kColumnsX;
            x_row = kLayout == PQ_LAYOUT_S4 ? p.K / 2 : p.K;
            const int offset = stage * T::kRowBytes + column * 16;
            x = static_cast<const char*>(p.x) + static_cast<size_t>(m0 + row) * x_row + offset;
            x_left = x_row - offset;
            x_count = (p.M - m0 - row + kStepX - 1) / kStepX;
            x_shared = S::kWeights + row * T::kRowBytes + swizzle(row, column) * 16;
        }
        {
            const int row = thread / kColumnsW, column = thread % kColumnsW;
            w_row = (p.K + 63) / 64 * (kLayout == PQ_LAYOUT_W8 ? 1024 : 512);
            const int offset = stage * S::kWeightRow + column * 16, first = n0 / 16 + row;
            w = static_cast<const char*>(p.w) + static_cast<size_t>(first) * w_row + offset;
            w_left = w_row - offset;
            w_count = ((p.N + 15) / 16 - first + kStepW - 1) / kStepW;
            w_shared = thread * 16;
        }
    }

    // The chunk of X's row in which a column is kept: eight rows of one column lie in 32 different banks.
    static __device__ __forceinline__ int swizzle(int row, int column) {
        return column ^ (T::kRowBytes == 64 ? (row >> 1) & 3 : row & 7);
    }

    __device__ __forceinline__ void operator()(char* stage) {
#pragma unroll
        for (int i = 0; i < kCountW; ++i)
            cp_async_16(stage + w_shared + i * kStepW * S::kWeightRow, w + i * kStepW * w_row,
                        i < w_count && w_left > 0);
#pragma unroll
        for (int i = 0; i < kCountX; ++i)
            cp_async_16(stage + x_shared + i * kStepX * T::kRowBytes, x + i * kStepX * x_row,
                        i < x_count && x_left > 0);
        w += S::kWeightRow, w_left -= S::kWeightRow;
        x += T::kRowBytes, x_left -= T::kRowBytes;
    }
};

// A warp's operands of two k-steps: while one is multiplied the next is loaded.
template <int kLayout, class T>
struct Operands {
    using S = Stage<kLayout, T>;
    uint32_t a[2][T::kA][4], b[2][T::kB][2];
    uint32_t a_offset, b_row, b_swizzle;

    __device__ __forceinline__ Operands(int warp_channel, int warp_token) {
        const int lane = threadIdx.x % 32;
        a_offset = warp_channel / 16 * S::kWeightRow + lane * 16;
        // ldmatrix takes 16 tokens x 32 bytes: lanes 0..7 address tokens 0..7, the next 8 the same tokens' upper 16
        // bytes, the other 16 do so for tokens 8..15.
        const int token = lane / 16 * 8 + lane % 8;
        b_row = S::kWeights + (warp_token + token) * T::kRowBytes;
        b_swizzle = Copier<kLayout, T>::swizzle(token, lane / 8 % 2) * 16;
    }

    template <int kStep>
    __device__ __forceinline__ void load(const char* stage) {
        constexpr int kBuffer = kStep % 2;
#pragma unroll
        for (int i = 0; i < T::kA; ++i) {
            if constexpr (kLayout == PQ_LAYOUT_S8 && kBuffer == 1) {
                // One tile of packed nibbles is two steps: the even one's operand makes place for both.
#pragma unroll
                for (int r = 0; r < 4; ++r) unpack_s8x16(a[0][i][r], a[0][i][r], a[1][i][r]);
            } else {
                constexpr int kTile = (kLayout == PQ_LAYOUT_S8 ? kStep / 2 : kStep) * 512;
                const uint4 v = *reinterpret_cast<const uint4*>(stage + a_offset + i * S::kWeightRow + kTile);
                a[kBuffer][i][0] = v.x, a[kBuffer][i][1] = v.y, a[kBuffer][i][2] = v.z, a[kBuffer][i][3] = v.w;
            }
        }
#pragma unroll
        for (int j = 0; j < T::kB; j += 2) {
            uint32_t v[4];
            ldmatrix_x4(v, stage + b_row + j * 8 * T::kRowBytes + (b_swizzle ^ (kStep * 32)));
            b[kBuffer][j][0] = v[0], b[kBuffer][j][1] = v[1];
            b[kBuffer][j + 1][0] = v[2], b[kBuffer][j + 1][1] = v[3];
        }
    }

    template <int kStep>
    __device__ __forceinline__ void multiply(int (&acc)[T::kA][T::kB][4]) const {
#pragma unroll
        for (int i = 0; i < T::kA; ++i)
#pragma unroll
            for (int j = 0; j < T::kB; ++j) {
                if constexpr (kLayout == PQ_LAYOUT_S4)
                    mma_s4(acc[i][j], a[kStep % 2][i], b[kStep % 2][j][0], b[kStep % 2][j][1]);
                else
                    mma_s8(acc[i][j], a[kStep % 2][i], b[kStep % 2][j][0], b[kStep % 2][j][1]);
            }
    }
};

// One stage of the main loop, step by step. Before the last step the next stage has arrived (its first operands are
// loaded under that step's products) and no warp reads this one any more, so the copy that the next call starts into
// the oldest stage overwrites nothing.
template <int kStep, int kLayout, class T>
__device__ __forceinline__ void run_steps(Operands<kLayout, T>& operands, Copier<kLayout, T>& copy, bool more,
                                          const char* stage, const char* next, char* oldest,
                                          int (&acc)[T::kA][T::kB][4]) {
    if constexpr (kStep + 1 < T::kSteps) {
        operands.template load<kStep + 1>(stage);
    } else {
        cp_async_wait<T::kStages - 2>();
        __syncthreads();
        operands.template load<0>(next);  // after the last stage: stale bytes that nothing uses
    }
    if constexpr (kStep == 0) {
        if (more) copy(oldest);
        cp_async_commit();  // an empty group too, so that the count of groups tells which stage has arrived
    }
    operands.template multiply<kStep>(acc);
    if constexpr (kStep + 1 < T::kSteps)
        run_steps<kStep + 1>(operands, copy, more, stage, next, oldest, acc);
}

// Adds up the parts of K: every CTA leaves its accumulators as its threads hold them, the last to arrive at a tile adds
// the others' to its own and goes on, alone. Integer sums are exact, so the order of arrival does not matter.
template <class T>
__device__ __forceinline__ bool reduce_parts(const Plan& plan, int tokens, int (&acc)[T::kA][T::kB][4]) {
    constexpr int kTileInts = T::kChannels * T::kTokens, kFragments = T::kA * T::kB;
    int* const first_part = plan.partials + static_cast<size_t>(blockIdx.x) * plan.split * kTileInts;
    int4* const tile = reinterpret_cast<int4*>(first_part) + threadIdx.x;
    int4* const mine = tile + blockIdx.y * (kTileInts / 4);
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
        const int (&d)[4] = acc[f / T::kB][f % T::kB];
        if (f % T::kB * 8 < tokens)  // the rest of the tile has no tokens
            mine[f * T::kThreads] = make_int4(d[0], d[1], d[2], d[3]);
    }
    __threadfence();
    __syncthreads();
    const bool last = threadIdx.x == 0 && atomicAdd(plan.arrivals + blockIdx.x, 1u) == gridDim.y - 1;
    if (!__syncthreads_or(last)) return false;
    __threadfence();
    constexpr int kFlight = 16;  // loads in flight: more would not fit beside the accumulators
#pragma unroll
    for (int begin = 0; begin < kFragments; begin += kFlight) {
#pragma unroll 1
        for (int part = 0; part < plan.split; ++part) {
            if (part == static_cast<int>(blockIdx.y)) continue;
            const int4* const other = tile + part * (kTileInts / 4);
#pragma unroll
            for (int f = begin; f < begin + kFlight && f < kFragments; ++f) {
                int (&d)[4] = acc[f / T::kB][f % T::kB];
                if (f % T::kB * 8 >= tokens) continue;
                const int4 v = __ldcg(other + f * T::kThreads);
                d[0] += v.x, d[1] += v.y, d[2] += v.z, d[3] += v.w;
            }
        }
    }
    return true;
}

template <int kLayout, class T>
__global__ void __launch_bounds__(T::kThreads, T::kResident) gemm_mma(const __grid_constant__ Gemm p,
                                                                      const __grid_constant__ Plan plan) {
    using S = Stage<kLayout, T>;
    extern __shared__ __align__(128) char shared[];

    const int group = blockIdx.x / (plan.group * plan.token_tiles);
    const int within = blockIdx.x - group * plan.group * plan.token_tiles;
    const int width = min(plan.group, plan.channel_tiles - group * plan.group);
    const int n0 = (group * plan.group + within % width) * T::kChannels, m0 = within / width * T::kTokens;

    const int stages = ((kLayout == PQ_LAYOUT_S4 ? p.K / 2 : p.K) + T::kRowBytes - 1) / T::kRowBytes;
    const int part = blockIdx.y, first = stages * part / plan.split, last = stages * (part + 1) / plan.split;

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_channel = warp % T::kChannelWarps * T::kWarpChannels;
    const int warp_token = warp / T::kChannelWarps * T::kWarpTokens;

    Copier<kLayout, T> copy(p, n0, m0, first);
#pragma unroll
    for (int i = 0; i < T::kStages - 1; ++i) {
        if (first + i < last) copy(shared + i * S::kBytes);
        cp_async_commit();
    }
    int acc[T::kA][T::kB][4] = {};
    Operands<kLayout, T> operands(warp_channel, warp_token);
    cp_async_wait<T::kStages - 2>();
    __syncthreads();
    operands.template load<0>(shared);
    int now = 0;  // the stage in shared memory
    for (int stage = first; stage < last; ++stage) {
        const int next = now + 1 == T::kStages ? 0 : now + 1, oldest = now == 0 ? T::kStages - 1 : now - 1;
        run_steps<0>(operands, copy, stage + T::kStages - 1 < last, shared + now * S::kBytes, shared + next * S::kBytes,
                     shared + oldest * S::kBytes, acc);
        now = next;
    }
    if (plan.split > 1 && !reduce_parts<T>(plan, p.M - m0 - warp_token, acc)) return;

    // Pass by pass, every warp stages kChunk of its tokens; all threads then write the staged rows.
    constexpr int kChunk = T::kWarpTokens / S::kPasses, kRows = T::kTokens / S::kPasses;
    constexpr int kSegments = T::kChannels / kSegment, kRowStep = T::kThreads / kSegments;
    static_assert(T::kThreads % kSegments == 0 && kRows % kRowStep == 0);
    const SegmentWriter<kUnit<kLayout>> segments(p, n0 + threadIdx.x % kSegments * kSegment, plan.y_reciprocal);
    int* const staged = reinterpret_cast<int*>(shared);
    int* const mine = staged + (warp_token / S::kPasses + lane % 4 * 2) * S::kPitch + warp_channel + lane / 4;
#pragma unroll
    for (int pass = 0; pass < S::kPasses; ++pass) {
        __syncthreads();  // the main loop, or the pass before, has read what this overwrites
#pragma unroll
        for (int j = 0; j < T::kB; ++j) {
            if (j * 8 / kChunk != pass) continue;
#pragma unroll
            for (int i = 0; i < T::kA; ++i)
#pragma unroll
                for (int r = 0; r < 4; ++r)
                    mine[(j * 8 % kChunk + r % 2) * S::kPitch + i * 16 + r / 2 * 8] = acc[i][j][r];
        }
        __syncthreads();
        if (segments.count <= 0) continue;
        with_type(p.y_type, [&](auto type) {
#pragma unroll 1
            for (int i = 0; i < kRows; i += kRowStep) {
                const int row = i + threadIdx.x / kSegments;
                const int m = m0 + row / kChunk * T::kWarpTokens + pass * kChunk + row % kChunk;
                if (m >= p.M) continue;
                const auto acc_of = *reinterpret_cast<const Pack<int, kSegment>*>(
                    staged + row * S::kPitch + threadIdx.x % kSegments * kSegment);
                segments.template write<type.value>(p, acc_of.v, m);
            }
        });
    }
}

}  // namespace pq
