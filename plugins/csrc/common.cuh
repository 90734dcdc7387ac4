// Pieces that all kernels share: what a problem is, the epilogue's arithmetic, unpacking, tensor-core instructions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "pq_kernels.h"

namespace pq {

// One GEMM as every kernel receives it. See pq_kernels.h for the definition and the layouts.
struct Gemm {
    const void* x;
    const void* w;
    const float* scale;      // [N]
    const float* row_scale;  // [M] or null
    const float* bias;       // [N] or null
    const void* residual;    // [M, N] of y's type, or null
    void* y;                 // [M, N]
    void* workspace;
    float y_scale;
    int y_type, y_bits;
    int M, N, K;
};

// Codes of int4 weights are unpacked as 16 w (see unpack_s8x16): what an accumulator counts in.
template <int kLayout>
inline constexpr int kUnit = kLayout == PQ_LAYOUT_S8 ? 16 : 1;

// acc in units of kUnit -> fp32 result. A power of two: the rounding is the same as without it.
template <int kUnitOf>
__device__ __forceinline__ float dequantize(int acc, float scale) {
    return __fmul_rn(static_cast<float>(acc), __fmul_rn(scale, 1.0f / kUnitOf));
}

// Half to even, clamped: the one rounding of the project (pq_export/quantizer.py).
__device__ __forceinline__ int quantize_value(float v, float scale, int bits) {
    const float high = static_cast<float>((1 << (bits - 1)) - 1), low = -high - 1.0f;
    return static_cast<int>(fminf(fmaxf(rintf(__fdiv_rn(v, scale)), low), high));
}

template <typename T>
__device__ __forceinline__ float to_float(T v);
template <>
__device__ __forceinline__ float to_float(float v) { return v; }
template <>
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
template <>
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float(float v) { return v; }
template <>
__device__ __forceinline__ __half from_float(float v) { return __float2half_rn(v); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float(float v) { return __float2bfloat16_rn(v); }

// The fp32 result of one accumulator: products and sums in this order and never contracted, as the NumPy reference. A
// caller that knows the channel early loads its scale and bias early; no bias is -0, which changes no float.
template <int kUnitOf, typename T>
__device__ __forceinline__ float result(const Gemm& p, int acc, int m, int n, float scale, float bias) {
    float v = dequantize<kUnitOf>(acc, scale);
    if (p.row_scale) v = __fmul_rn(v, p.row_scale[m]);  // no __ldg: see overlap.cuh
    v = __fadd_rn(v, bias);
    if (p.residual) v = __fadd_rn(v, to_float(static_cast<const T*>(p.residual)[static_cast<size_t>(m) * p.N + n]));
    return v;
}
template <int kUnitOf, typename T>
__device__ __forceinline__ float result(const Gemm& p, int acc, int m, int n) {
    return result<kUnitOf, T>(p, acc, m, n, __ldg(p.scale + n), p.bias ? __ldg(p.bias + n) : -0.0f);
}

// Eight packed nibbles -> 16 times the signed values, low nibbles in `low`, high ones in `high`, four bytes each.
__device__ __forceinline__ void unpack_s8x16(uint32_t packed, uint32_t& low, uint32_t& high) {
    low = (packed << 4) & 0xF0F0F0F0u;
    high = packed & 0xF0F0F0F0u;
}

// D[16, 8] += A[16, 32] B[32, 8], int8. Native on sm_80 and later.
__device__ __forceinline__ void mma_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// D[16, 8] += A[16, 64] B[64, 8], int4. Native on sm_80..89; later GPUs emulate it, slowly.
__device__ __forceinline__ void mma_s4(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 16 byte matrices, one row address a lane: lane 4 r + c gets bytes 4 c..4 c + 3 of row r of each, which is
// how an int8 or int4 B operand lies in the lanes when its columns are the rows of a K-major tensor.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&d)[4], const void* shared) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    const int bytes = valid ? 16 : 0;  // what is not copied becomes zero
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(global), "r"(bytes));
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::); }
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending));
}

// A runtime call's result as the caller sees it: that the library was built for other GPUs is a mistake of its own.
inline pq_status status_of(cudaError_t error) {
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) return PQ_NOT_BUILT;
    return error == cudaSuccess ? PQ_OK : PQ_CUDA_ERROR;
}

// The thread's index, read anew: what is computed from it late does not occupy registers through the loops before.
__device__ __forceinline__ int thread_index() {
    int index;
    asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(index));
    return index;
}

// ---- What a family of kernels offers to the dispatcher (dispatch.cu). Ids are ranges of 100 a family. -----------
struct Guess {
    int id;
    double us;  // that a call should take, fitted to an H100: ranks variants, of several families where all were fitted
};
struct Family {
    const char* name;
    int first_id;
    // Variants for a problem on compute capability `sm` (e.g. 86), best first; returns how many.
    int (*variants)(int sm, int layout, int x_type, int M, int N, int K, Guess* guesses, int capacity);
    const char* (*variant_name)(int id);
    size_t (*workspace)(int id, int layout, int M, int N, int K);
    pq_status (*launch)(int id, const Gemm& problem, int layout, int x_type, cudaStream_t stream);
};
const Family& decode_family();   // 100..199, decode.cu:      M <= 16, every GPU
const Family& mma_family();      // 200..299, gemm_mma.cu:    mma.sync, every GPU (s4 on sm_80..89, s8 elsewhere)
const Family& wgmma_family();    // 300..399, gemm_sm90.cu:   wgmma, sm_90a

}  // namespace pq
