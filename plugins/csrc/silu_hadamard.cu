// pq_silu_mul_quantize: SiLU(gate) * up, the online Hadamard R4 if there is one, codes.
//
// One CTA has a token's K values in shared memory, fp32, from the first load to the codes. The power of two is a fast
// transform: three stages on the eight values that a thread loads, then passes of up to four stages, sixteen values a
// thread. What is left is a small dense product, 8 x 4 results a thread. With few tokens several CTAs share one: each
// transforms all of it, which is short, and multiplies its own rows, which is not.
//
// Prefill has a kernel of its own where R4 is 28 x 512 or 28 x 1024: silu_hadamard_rows.cuh.
//
// Limits: K up to 32768, and 4 K bytes of shared memory a block must exist (K <= 25344 on sm_86, 89 and 120);
// right_order from 4 to 16384.
#include <cmath>

#include "codes.cuh"
#include "silu_hadamard_rows.cuh"

namespace pq {
namespace {

constexpr int kThreads = 512;
constexpr int kMinRight = 4, kMaxRight = 16384, kMaxOrder = 32768;
constexpr int kMaxStaged = 64;  // orders of `left` that are copied to shared memory

__device__ __forceinline__ float silu(float v) { return __fdividef(v, 1.0f + __expf(-v)); }

template <typename T>
struct SiluMul {
    const T *gate, *up;
    int ldg;

    struct Loaded {
        Unit<T> gate, up;
    };
    __device__ __forceinline__ void load(Loaded& unit, int m, int k) const {
        const size_t at = static_cast<size_t>(m) * ldg + k;
        unit.gate.load(gate + at);
        unit.up.load(up + at);
    }
    __device__ __forceinline__ void values(float (&v)[kUnitValues], const Loaded& unit) const {
#pragma unroll
        for (int i = 0; i < kUnitValues; ++i) v[i] = __fmul_rn(silu(to_float(unit.gate.v[i])), to_float(unit.up.v[i]));
    }
};

struct Hadamard {
    const float* left;  // [left_order, left_order]
    int left_order, log_right;
    int staged_rows;  // of left's transpose in shared memory: left_order rounded up, or 0 if it stays in global memory
    int rows_a_thread;
    float norm;  // 1 / sqrt(K)
};

// Where value i lies: the four groups of eight in 32 are permuted by the bits above, so that threads whose values are
// 64 or 128 apart use different banks. Linear over bits: swizzled(a ^ b) = swizzled(a) ^ swizzled(b).
__device__ __forceinline__ int swizzled(int i) { return i ^ (((i >> 6) ^ (i >> 7)) & 3) << 3; }

// The transform of order 2^kBits over v.
template <int kBits>
__device__ __forceinline__ void butterflies(float (&v)[1 << kBits]) {
#pragma unroll
    for (int bit = 0; bit < kBits; ++bit)
#pragma unroll
        for (int i = 0; i < 1 << kBits; ++i) {
            if (i & 1 << bit) continue;
            const float a = v[i], b = v[i | 1 << bit];
            v[i] = a + b, v[i | 1 << bit] = a - b;
        }
}

// Stages `bit`..`bit + kBits - 1` of the transform of the whole tile, in place.
template <int kBits>
__device__ __forceinline__ void transform_pass(float* tile, int K, int bit) {
    int offset[kBits];
#pragma unroll
    for (int b = 0; b < kBits; ++b) offset[b] = swizzled(1 << (bit + b));
#pragma unroll 1
    for (int item = thread_index(); item < K >> kBits; item += kThreads) {
        const int low = item & ((1 << bit) - 1);
        const int base = swizzled((item - low) << kBits | low);
        // Hides that these never change: all sums of them, kept for the next item, would not fit into the registers.
#pragma unroll
        for (int b = 0; b < kBits; ++b) asm volatile("" : "+r"(offset[b]));
        const auto at = [&](int i) -> float& {
            int index = base;
#pragma unroll
            for (int b = 0; b < kBits; ++b)
                if (i & 1 << b) index ^= offset[b];
            return tile[index];
        };
        float v[1 << kBits];
#pragma unroll
        for (int i = 0; i < 1 << kBits; ++i) v[i] = at(i);
        butterflies<kBits>(v);
#pragma unroll
        for (int i = 0; i < 1 << kBits; ++i) at(i) = v[i];
    }
    __syncthreads();
}

// v[r, 0..3] += factor[r] * four
template <int kRows>
__device__ __forceinline__ void multiply(float (&v)[kRows][4], const float (&factor)[kRows], const float4& four) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        v[r][0] = __fmaf_rn(factor[r], four.x, v[r][0]);
        v[r][1] = __fmaf_rn(factor[r], four.y, v[r][1]);
        v[r][2] = __fmaf_rn(factor[r], four.z, v[r][2]);
        v[r][3] = __fmaf_rn(factor[r], four.w, v[r][3]);
    }
}

// left * tile -> codes, kRows x 4 results a thread; lanes take neighbouring columns, so that left's values are
// broadcast. Staged, a column of left is read from shared memory, [left_order, staged_rows]; else rows of it through
// L1.
template <int kRows, bool kStaged>
__device__ __forceinline__ void multiply_left(const Hadamard& hadamard, const float* tile, const float* staged,
                                              const float* shift, const Coder& coder, const Codes& codes, size_t at) {
    const int order = hadamard.left_order, log_right = hadamard.log_right, log_columns = log_right - 2;
    const int row_blocks = (order + kRows - 1) / kRows;
    const auto load_tile = [&](int column, int j) {
        return *reinterpret_cast<const float4*>(tile + (swizzled(column) ^ swizzled(j << log_right)));
    };
#pragma unroll 1
    for (int item = thread_index();; item += kThreads) {
        const int row_block = (item >> log_columns) * gridDim.y + blockIdx.y;
        if (row_block >= row_blocks) break;
        const int first = row_block * kRows, column = (item & ((1 << log_columns) - 1)) * 4;
        float v[kRows][4] = {};
        if constexpr (kStaged) {
#pragma unroll 2
            for (int j = 0; j < order; ++j) {
                float factor[kRows];
#pragma unroll
                for (int r = 0; r < kRows; r += 4)
                    *reinterpret_cast<float4*>(factor + r) =
                        *reinterpret_cast<const float4*>(staged + j * hadamard.staged_rows + first + r);
                multiply<kRows>(v, factor, load_tile(column, j));
            }
        } else {
            const bool quads = order % 4 == 0;
#pragma unroll 1
            for (int j = 0; j < order; j += 4) {
                float factor[4][kRows];
#pragma unroll
                for (int r = 0; r < kRows; ++r) {
                    const float* from = hadamard.left + min(first + r, order - 1) * order + j;
                    if (quads) {
                        const float4 four = __ldg(reinterpret_cast<const float4*>(from));
                        factor[0][r] = four.x, factor[1][r] = four.y, factor[2][r] = four.z, factor[3][r] = four.w;
                    } else {
#pragma unroll
                        for (int i = 0; i < 4; ++i) factor[i][r] = j + i < order ? __ldg(from + i) : 0.0f;
                    }
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) multiply<kRows>(v, factor[i], load_tile(column, min(j + i, order - 1)));
            }
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            if (first + r >= order) break;
            const int k = ((first + r) << log_right) + column;
            const float4 subtracted = shift ? __ldg(reinterpret_cast<const float4*>(shift + k)) : float4{};
            const float four[4] = {subtracted.x, subtracted.y, subtracted.z, subtracted.w};
            uint32_t c[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) c[i] = coder(__fsub_rn(__fmul_rn(v[r][i], hadamard.norm), four[i]));
            codes.store(at + k, c);
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    silu_hadamard_kernel(const SiluMul<T> source, const Hadamard hadamard, const float* shift, const Coder coder,
                         const Codes codes, int K) {
    extern __shared__ __align__(16) float tile[];
    let_next_kernel_start();
    float* const staged = tile + K;
    const int m = blockIdx.x, log_right = hadamard.log_right;

    if (hadamard.staged_rows)
        for (int i = threadIdx.x; i < hadamard.left_order * hadamard.left_order; i += kThreads)
            cp_async_4(staged + i % hadamard.left_order * hadamard.staged_rows + i / hadamard.left_order,
                       hadamard.left + i);
    cp_async_commit();
    wait_for_previous_kernels();

    // Several units a thread are on their way at once: with one token, their latency is most of the kernel's time.
    constexpr int kAhead = sizeof(T) == 2 ? 4 : 2;
    for (int first = threadIdx.x; first < K / kUnitValues; first += kAhead * kThreads) {
        typename SiluMul<T>::Loaded loaded[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int k = (first + i * kThreads) * kUnitValues;
            if (k < K) source.load(loaded[i], m, k);
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int k = (first + i * kThreads) * kUnitValues;
            if (k >= K) continue;
            float v[kUnitValues];
            source.values(v, loaded[i]);
            if (log_right >= 3) {
                butterflies<3>(v);
            } else {  // an order of 4
                float (&halves)[2][4] = reinterpret_cast<float (&)[2][4]>(v);
                butterflies<2>(halves[0]);
                butterflies<2>(halves[1]);
            }
            float4* to = reinterpret_cast<float4*>(tile + swizzled(k));
            to[0] = make_float4(v[0], v[1], v[2], v[3]);
            to[1] = make_float4(v[4], v[5], v[6], v[7]);
        }
    }
    cp_async_wait<0>();
    __syncthreads();

    for (int bit = 3; bit < log_right;) {
        const int remaining = log_right - bit, passes = (remaining + 3) / 4, bits = (remaining + passes - 1) / passes;
        switch (bits) {
            case 1: transform_pass<1>(tile, K, bit); break;
            case 2: transform_pass<2>(tile, K, bit); break;
            case 3: transform_pass<3>(tile, K, bit); break;
            default: transform_pass<4>(tile, K, bit);
        }
        bit += bits;
    }

    const size_t at = static_cast<size_t>(m) * K;
    if (!hadamard.staged_rows) {
        multiply_left<4, false>(hadamard, tile, staged, shift, coder, codes, at);
    } else if (hadamard.rows_a_thread == 4) {
        multiply_left<4, true>(hadamard, tile, staged, shift, coder, codes, at);
    } else {
        multiply_left<8, true>(hadamard, tile, staged, shift, coder, codes, at);
    }
}

// Whether the kernel for many tokens takes this problem, and if so with what status. Its left factor must be +-1, as
// that of order 28 is.
template <typename T>
bool launch_many_rows(const SiluMul<T>& source, const float* left, int left_order, int right_order, float scale,
                      void* codes, int codes_type, int bits, int M, int K, void* stream,
                      pq_status& status) {
    if constexpr (sizeof(T) == 2) {
        const int sms = device_attribute(cudaDevAttrMultiProcessorCount);
        if (M < sms / 2 || left_order != 28 || (right_order != 512 && right_order != 1024)) return false;
        if (K > device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) / static_cast<int>(sizeof(float)))
            return false;
        const auto encoder = many_rows::Encoder::of(scale, bits, 1.0 / std::sqrt(static_cast<double>(K)));
        const auto launch = [&](auto shape) {
            status = many_rows::launch<decltype(shape)>(source.gate, source.up, source.ldg, left, encoder,
                                                        Codes{codes, codes_type == PQ_S4}, M, stream);
            return true;
        };
        if (right_order == 512) return launch(many_rows::Shape<7, 9, 2, true>{});
        return launch(many_rows::Shape<7, 10, 2, false>{});
    }
    return false;
}

template <typename T>
pq_status launch_hadamard(const SiluMul<T>& source, const float* left, int left_order, int right_order,
                          const float* shift, float scale, void* codes, int codes_type, int bits, int M, int K,
                          void* stream) {
    pq_status status;
    if (!shift &&
        launch_many_rows(source, left, left_order, right_order, scale, codes, codes_type, bits, M, K, stream, status))
        return status;
    // Four rows a thread where tokens are few: more CTAs can share one.
    const int sms = device_attribute(cudaDevAttrMultiProcessorCount), rows_a_thread = M >= sms / 2 ? 8 : 4;
    const int row_blocks = (left_order + rows_a_thread - 1) / rows_a_thread;
    const int limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) / static_cast<int>(sizeof(float));
    int staged_rows = left_order <= kMaxStaged ? row_blocks * rows_a_thread : 0;
    if (K + left_order * staged_rows > limit) staged_rows = 0;
    if (K > limit) return PQ_BAD_SHAPE;
    const int bytes = (K + left_order * staged_rows) * static_cast<int>(sizeof(float));
    const pq_status allowed =
        status_of(cudaFuncSetAttribute(silu_hadamard_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    if (allowed != PQ_OK) return allowed;

    int log_right = 0;
    while (1 << log_right < right_order) ++log_right;
    const dim3 grid(M, std::max(1, std::min(row_blocks, sms / M)));
    const float norm = static_cast<float>(1.0 / std::sqrt(static_cast<double>(K)));
    const Hadamard hadamard = {left, left_order, log_right, staged_rows, rows_a_thread, norm};
    return launch_kernel(silu_hadamard_kernel<T>, grid, dim3(kThreads), bytes, stream, source, hadamard, shift,
                         Coder::of(scale, bits), Codes{codes, codes_type == PQ_S4}, K);
}

}  // namespace
}  // namespace pq

using namespace pq;

int pq_silu_mul_quantize(const void* gate, const void* up, int ldg, int x_type, int left_order, int right_order,
                         const float* left, const float* shift, float scale, void* codes, int codes_type, int bits,
                         int M, int K, void* stream) {
    const pq_status checked = check_codes(codes, codes_type, bits, M, K);
    if (checked != PQ_OK) return checked;
    if (ldg < K || left_order < 0) return PQ_BAD_SHAPE;
    if (left_order > 0) {
        const bool power =
            right_order >= kMinRight && right_order <= kMaxRight && (right_order & (right_order - 1)) == 0;
        if (!power || K > kMaxOrder || left_order > K || left_order * right_order != K) return PQ_BAD_SHAPE;
    }
    return with_type(x_type, [&](auto type) {
        using T = decltype(type);
        if (ldg * sizeof(T) % 16 != 0) return PQ_BAD_SHAPE;
        if (!usable(gate) || !usable(up) || !aligned(shift)) return PQ_BAD_POINTER;
        const SiluMul<T> source = {static_cast<const T*>(gate), static_cast<const T*>(up), ldg};
        if (left_order == 0) return launch_elementwise(source, shift, scale, codes, codes_type, bits, M, K, stream);
        if (!usable(left)) return PQ_BAD_POINTER;
        return launch_hadamard(source, left, left_order, right_order, shift, scale, codes, codes_type, bits, M, K,
                               stream);
    });
}
