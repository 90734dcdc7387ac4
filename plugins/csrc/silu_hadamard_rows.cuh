// silu_hadamard for many tokens: one CTA a token at a time, the left factor on tensor cores, the power of two in
// registers, and one pass through shared memory. The two factors commute: left comes first here, since a warp's loads
// are then its B operand as they arrive.
//
//   1. A warp has 64 columns of the tile. Lane 4 g + q loads eight values of columns 8 g.. in rows q, q + 4, ...:
//      128-byte segments, all of a token's loads on their way at once. Value i of each row is B's column g of product
//      i. An fp32 number is two bf16, within 2^-17 of it; products with +-1 are exact and sums are fp32.
//   2. A lane's results are 16 neighbouring columns of four rows (g, g + 8, ...): four stages in registers.
//   3. Through shared memory: a lane gets every 16th column of a row. The last stages, in registers.
//   4. Codes; four lanes exchange bytes, so that each stores neighbouring columns.
#pragma once

#include "codes.cuh"

namespace pq {
namespace many_rows {

constexpr int kWarp = 32, kColumns = 64, kNeighbours = 16;  // columns: of a warp; of a lane, in the first stages

// Of two CTAs an SM, as registers go: shared memory holds one tile where an SM has 100 KB of it.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kMostCtas = 1;
#else
constexpr int kMostCtas = 2;
#endif

// A token's tile is [4 kQuads, 2^kLog]. kSplits: bf16 parts of a number; 3 are all of its 24 bits. kAhead: a CTA takes
// several tokens, and brings the next one into L2 while it has this one.
template <int kQuads_, int kLog_, int kSplits_, bool kAhead_>
struct Shape {
    static constexpr int kQuads = kQuads_, kLog = kLog_, kSplits = kSplits_;
    static constexpr bool kAhead = kAhead_;
    static constexpr int kRows = 4 * kQuads, kRight = 1 << kLog, kK = kRows * kRight;
    static constexpr int kWarps = kRight / kColumns, kThreads = kWarp * kWarps;
    static constexpr int kBytes = kK * static_cast<int>(sizeof(float));
    static constexpr int kCtas = kThreads <= 256 ? 2 : 1;  // 128 registers a thread
    static constexpr int kTiles = (kRows + 15) / 16;       // of 16 rows, also along k
    static_assert(kRows <= 32 && kLog >= 6);
};

__device__ __forceinline__ float exp2_approximate(float v) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(v));
    return result;
}
__device__ __forceinline__ float reciprocal_approximate(float v) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(v));
    return result;
}
// v / (1 + exp(-v)): 0 where the exponential is infinite.
__device__ __forceinline__ float silu(float v) {
    return __fmul_rn(v, reciprocal_approximate(__fadd_rn(1.0f, exp2_approximate(__fmul_rn(v, -1.4426950408889634f)))));
}

__device__ __forceinline__ void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];\n" ::"l"(at)); }

// d = a b + c, m16n8k16 in bf16: registers as PTX has them.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint4& a, uint32_t b0, uint32_t b1, float c0,
                                         float c1, float c2, float c3) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%10,%11,%12,%13};\n"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(c2), "f"(c3));
}

__device__ __forceinline__ float upper_half(float v) { return __uint_as_float(__float_as_uint(v) & 0xFFFF0000u); }
// The upper halves of two fp32: their leading eight bits each, as bf16.
__device__ __forceinline__ uint32_t cut_bf16(float v0, float v1) {
    return __byte_perm(__float_as_uint(v0), __float_as_uint(v1), 0x7632);
}
__device__ __forceinline__ uint32_t round_bf16(float v0, float v1) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(v0, v1);
    return *reinterpret_cast<const uint32_t*>(&both);
}

// Where a group of four columns lies in its row: permuted so that lanes of phase 2's stores (rows g, columns 16 q on)
// and of phase 3's loads (rows r and r + 1, 16 columns) use different banks.
__device__ __forceinline__ int swizzled_four(int four, int row) { return four ^ ((four >> 3) & 1) ^ (row & 1) * 6; }

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

template <typename T, typename S>
struct Loaded {
    Unit<T> gate[S::kQuads], up[S::kQuads];

    // gate and up: at this lane's first row and column.
    __device__ __forceinline__ void load(const T* gate_at, const T* up_at) {
#pragma unroll
        for (int r = 0; r < S::kQuads; ++r) {
            gate[r].load(gate_at + (r * 4 << S::kLog));
            up[r].load(up_at + (r * 4 << S::kLog));
        }
    }
    __device__ __forceinline__ float value(int r, int i) const {
        return __fmul_rn(silu(to_float(gate[r].v[i])), to_float(up[r].v[i]));
    }
};

// The A operand: left in tiles of 16 x 16. Index 2 q (+ 1, + 8, + 9) of k-tile s is row 16 s + q (+ 4, + 8, + 12).
template <typename S>
__device__ __forceinline__ void load_left(uint4 (&operand)[S::kTiles * S::kTiles][kWarp], const float* left, int lane) {
    const auto pair = [&](int row, int column) {
        const auto at = [&](int j) {
            return row < S::kRows && j < S::kRows ? __ldg(left + row * S::kRows + j) : 0.0f;
        };
        return round_bf16(at(column), at(column + 4));
    };
#pragma unroll 1
    for (int tile = 0; tile < S::kTiles * S::kTiles; ++tile) {
        const int row = tile / S::kTiles * 16 + lane / 4, column = tile % S::kTiles * 16 + lane % 4;
        operand[tile][lane] = {pair(row, column), pair(row + 8, column), pair(row, column + 8),
                               pair(row + 8, column + 8)};
    }
}

// left * silu(gate) * up of this lane's columns -> acc[t][c / 2][8 (c % 2) + i], then four stages.
template <typename T, typename S>
__device__ __forceinline__ void multiply_left(float (&acc)[S::kTiles][2][kNeighbours], const Loaded<T, S>& loaded,
                                              const uint4 (&operand)[S::kTiles * S::kTiles][kWarp], int lane) {
    uint4 a[S::kTiles][S::kTiles];
#pragma unroll
    for (int i = 0; i < S::kTiles * S::kTiles; ++i) a[i / S::kTiles][i % S::kTiles] = operand[i][lane];
#pragma unroll
    for (int i = 0; i < kUnitValues; ++i) {
        float v[16 * S::kTiles / 4];
#pragma unroll
        for (int r = 0; r < 4 * S::kTiles; ++r) v[r] = r < S::kQuads ? loaded.value(r, i) : 0.0f;
        float d[S::kTiles][4];
#pragma unroll
        for (int split = 0; split < S::kSplits; ++split) {
            uint32_t b[S::kTiles][2];
#pragma unroll
            for (int r = 0; r < 4 * S::kTiles; r += 2)
                b[r / 4][r / 2 % 2] =
                    split > 0 && split == S::kSplits - 1 ? round_bf16(v[r], v[r + 1]) : cut_bf16(v[r], v[r + 1]);
#pragma unroll
            for (int r = 0; r < S::kQuads; ++r) v[r] = __fsub_rn(v[r], upper_half(v[r]));
#pragma unroll
            for (int s = 0; s < S::kTiles; ++s)
#pragma unroll
                for (int t = 0; t < S::kTiles; ++t) {
                    if (split == 0 && s == 0) {
                        mma_bf16(d[t], a[t][s], b[s][0], b[s][1], 0.0f, 0.0f, 0.0f, 0.0f);
                    } else {
                        mma_bf16(d[t], a[t][s], b[s][0], b[s][1], d[t][0], d[t][1], d[t][2], d[t][3]);
                    }
                }
        }
#pragma unroll
        for (int t = 0; t < S::kTiles; ++t)
#pragma unroll
            for (int c = 0; c < 4; ++c) acc[t][c / 2][c % 2 * kUnitValues + i] = d[t][c];
    }
#pragma unroll
    for (int t = 0; t < S::kTiles; ++t)
#pragma unroll
        for (int h = 0; h < 2; ++h) butterflies<4>(acc[t][h]);
}

// Byte b of lane a -> byte a of lane b, of four lanes each.
__device__ __forceinline__ uint32_t transpose_bytes(uint32_t word, int lane) {
    uint32_t other = __shfl_xor_sync(0xffffffffu, word, 2);
    word = __byte_perm(word, other, lane & 2 ? 0x3276 : 0x5410);
    other = __shfl_xor_sync(0xffffffffu, word, 1);
    return __byte_perm(word, other, lane & 1 ? 0x3715 : 0x6240);
}

// The code of sum * norm: rint(sum * (norm / scale)) in one rounding, clamped.
struct Encoder {
    float factor, low, high;  // norm / scale; bounds where codes are a float's last bits

    // The ulp is 1 from 2^23 on: the sum with this rounds half to even, its last bits are the integer, and what is far
    // outside stays so until it is clamped.
    static constexpr float kOnes = 12582912.0f;

    static Encoder of(float scale, int bits, double norm) {
        const float steps = static_cast<float>(1 << (bits - 1));
        return {static_cast<float>(norm / scale), kOnes - steps, kOnes + steps - 1.0f};
    }
    __device__ __forceinline__ uint32_t operator()(float sum) const {
        return __float_as_uint(fminf(fmaxf(__fmaf_rn(sum, factor, kOnes), low), high));
    }
};

template <typename T, typename S>
__global__ void __launch_bounds__(S::kThreads, S::kCtas < kMostCtas ? S::kCtas : kMostCtas)
    silu_hadamard_rows_kernel(const T* gate, const T* up, int ldg, const float* left, const Encoder encoder,
                              const Codes codes, int M) {
    extern __shared__ __align__(16) float rows_tile[];
    // left as A: a token reads it again, between its products there is no room for it in the registers.
    __shared__ uint4 operand[S::kTiles * S::kTiles][kWarp];
    let_next_kernel_start();
    if (threadIdx.x < kWarp) load_left<S>(operand, left, threadIdx.x);
    wait_for_previous_kernels();
    __syncthreads();
    // Each phase reads the thread's index anew: what follows from it would not fit into the registers between them.
#pragma unroll 1
    for (int m = blockIdx.x; m < M; m += gridDim.x) {
        {
            Loaded<T, S> loaded;
            const int thread = thread_index();
            const size_t at = static_cast<size_t>(m) * ldg + (thread % 4 << S::kLog) + thread / 4 * kUnitValues;
            loaded.load(gate + at, up + at);
            if (S::kAhead && m + static_cast<int>(gridDim.x) < M) {
                constexpr int kLine = 128 / static_cast<int>(sizeof(T));
                const size_t next = static_cast<size_t>(m + gridDim.x) * ldg;
                for (int i = thread; i < S::kK / kLine; i += S::kThreads) {
                    prefetch(gate + next + i * kLine);
                    prefetch(up + next + i * kLine);
                }
            }
            float acc[S::kTiles][2][kNeighbours];
            multiply_left<T, S>(acc, loaded, operand, thread % kWarp);
            __syncthreads();  // the token before has been read
            const int again = thread_index(), g = again % kWarp / 4;
            const int column = again / kWarp * kColumns + again % 4 * kNeighbours;
#pragma unroll
            for (int t = 0; t < S::kTiles; ++t)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int row = 16 * t + 8 * h + g;
                    if (16 * t + 8 * h + 8 > S::kRows && row >= S::kRows) continue;
                    float* const to = rows_tile + (row << S::kLog);
#pragma unroll
                    for (int i = 0; i < kNeighbours; i += 4) {
                        const int four = (column + i) / 4;
                        *reinterpret_cast<float4*>(to + swizzled_four(four, row) * 4) =
                            make_float4(acc[t][h][i], acc[t][h][i + 1], acc[t][h][i + 2], acc[t][h][i + 3]);
                    }
                }
        }
        __syncthreads();
        const int thread = thread_index(), lane = thread % kWarp;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
        // Lane 0's: there shuffles in a loop that lanes might leave one by one would be function calls.
        const int warp = __shfl_sync(0xffffffffu, thread / kWarp, 0);
#else
        const int warp = thread / kWarp;
#endif
#pragma unroll 1
        for (int item = warp; item < S::kRows / 2; item += S::kWarps) {
            constexpr int kBits = S::kLog - 4, kSteps = 1 << kBits;
            const int row = 2 * item + lane / kNeighbours, c = lane % kNeighbours;
            const float* from[4];  // of steps 0 to 3; every four steps the permutation repeats
#pragma unroll
            for (int i = 0; i < 4; ++i)
                from[i] = rows_tile + (row << S::kLog) + swizzled_four(4 * i + c / 4, row) * 4 + c % 4;
            float v[kSteps];
#pragma unroll
            for (int i = 0; i < kSteps; ++i) v[i] = from[i % 4][i / 4 * 4 * kNeighbours];
            butterflies<kBits>(v);

            const int k = (row << S::kLog) + c % 4 * kNeighbours + c / 4 * 4;  // where this lane stores
            const size_t at = static_cast<size_t>(m) * S::kK + k;
#pragma unroll
            for (int i = 0; i < kSteps; i += 4) {
                uint32_t code[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) code[j] = encoder(v[i + j]);
                const uint32_t bytes = pack_bytes(code[0], code[1], code[2], code[3]);
                codes.store_four(at + i * kNeighbours, transpose_bytes(bytes, lane));
            }
        }
    }
}

template <typename S, typename T>
pq_status launch(const T* gate, const T* up, int ldg, const float* left, const Encoder& encoder, const Codes& codes,
                 int M, void* stream) {
    const auto kernel = silu_hadamard_rows_kernel<T, S>;
    const pq_status allowed =
        status_of(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes));
    if (allowed != PQ_OK) return allowed;
    const int sms = device_attribute(cudaDevAttrMultiProcessorCount);
    const int ctas = S::kAhead ? std::min(M, std::max(1, sms * S::kCtas)) : M;
    return launch_kernel(kernel, dim3(ctas), dim3(S::kThreads), S::kBytes, stream, gate, up, ldg, left, encoder, codes,
                         M);
}

}  // namespace many_rows
}  // namespace pq
