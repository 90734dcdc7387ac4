/* The kernels' C interface: what the TensorRT plugin, the Python binding and the tests call.
 *
 * Pointers are device pointers. Nothing allocates, nothing synchronizes, everything runs on `stream`, and every
 * function returns a pq_status: PQ_OK, or what was wrong before anything was launched, or PQ_CUDA_ERROR.
 *
 * From sm_90 on, kernels start before those ahead of them on the stream have ended (programmatic dependent launch) and
 * read weights, scale, bias, gain, shift and left at once: nothing still in flight on the stream may write these. The
 * rest, x, row_scale, residual, y and the workspace, keeps the stream's order.
 *
 * Definition of the quantized linear (pq::QLinear), x [M, K], w [N, K], in integers exact:
 *
 *     acc[m, n] = sum_k x[m, k] * w[n, k]                                                 int32
 *     y[m, n]   = float(acc) * scale[n] [* row_scale[m]] [+ bias[n]] [+ residual[m, n]]   fp32, in this order
 *
 * then rounded once to y's type: fp16, bf16, fp32 as it is, or quantized again: clamp(rint(y / y_scale)) to int8, or
 * to int4 in [-8, 7], in int8 containers or packed. `scale` is s_x * s_w, multiplied in fp32 by the caller. Type
 * PQ_S32 stores acc itself and reads neither scale nor bias: it is what tests compare with ==.
 *
 * Codes. 8-bit activations: int8 [M, K]. 4-bit activations: int8 containers holding -8..7 (PQ_S8), or packed
 * [M, K/2], the lower k in the low nibble (PQ_S4), which is what the int4 tensor cores of sm_80..89 read. K is a
 * multiple of 32; rows are dense (row stride K or K/2 bytes) and 16-byte aligned.
 *
 * Weights. Tiles of 16 output channels, in the order in which a warp's lanes hold the A operand of the tensor-core
 * instruction, so that one 16-byte load a lane is a tile, in prefill and in decode alike. N is padded to a multiple
 * of 16 and K to one of 64 with zeros by the packer; scale and bias need N entries only. With g = lane / 4,
 * t = lane % 4 and r = 0..3, tile (n0, k0) at byte offset ((n0/16) * (K64/64) + k0/64) * 512, K64 = K rounded up to
 * 64, lane's 16 bytes at lane * 16, 32-bit word r, row = n0 + g + 8 * (r % 2):
 *
 *     PQ_LAYOUT_S4   m16n8k64.s4     nibble i of word r: column k0 + 8 t + 32 (r / 2) + i, i = 0..7
 *     PQ_LAYOUT_S8   2 x m16n8k32.s8 byte b of word r: low nibble column k0 + 4 t + 16 (r / 2) + b, high nibble the
 *                                    same + 32. (x << 4) & 0xF0F0F0F0 and x & 0xF0F0F0F0 are 16 times the int8
 *                                    operands of the two k-steps; 1/16 goes into the epilogue (exact).
 *     PQ_LAYOUT_W8   m16n8k32.s8     8-bit weights, K padded to 64, tiles of 16 x 32 at offset
 *                                    ((n0/16) * (K64/32) + k0/32) * 512: byte b of word r: column k0 + 4 t + 16 (r / 2) + b
 */
#ifndef PQ_KERNELS_H_
#define PQ_KERNELS_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PQ_ABI_VERSION 1

typedef enum {
    PQ_OK = 0,
    PQ_BAD_SHAPE = 1,       /* M, N or K not positive, K not a multiple of 32, too large */
    PQ_BAD_TYPE = 2,        /* a type, layout, number of bits or y_scale that this function does not take */
    PQ_BAD_POINTER = 3,     /* null where one is needed, or not 16-byte aligned */
    PQ_BAD_VARIANT = 4,     /* no such tile variant for this problem */
    PQ_SMALL_WORKSPACE = 5, /* less than the _workspace function asks for */
    PQ_NOT_BUILT = 6,       /* the library holds no kernel for this GPU */
    PQ_CUDA_ERROR = 7       /* pq_status_string tells which, in the thread that got it */
} pq_status;

typedef enum { PQ_F16 = 0, PQ_BF16 = 1, PQ_F32 = 2, PQ_S8 = 3, PQ_S4 = 4, PQ_S32 = 5 } pq_type;
typedef enum { PQ_LAYOUT_S4 = 0, PQ_LAYOUT_S8 = 1, PQ_LAYOUT_W8 = 2 } pq_layout;

/* One line for a status, never null. */
const char* pq_status_string(int status);
int pq_abi_version(void);

/* The layout that the current device's kernels read for these bits of weights and activations (4 or 8), or -1. */
int pq_preferred_layout(int weight_bits, int activation_bits);
/* Bytes of packed weights. */
size_t pq_packed_bytes(int layout, int N, int K);

/* ---- GEMM ------------------------------------------------------------------------------------------------- */

/* Tile variants (tactics) for a problem on the current device, best guess first; at most `capacity` ids are written.
 * Returns how many there are, 0 if there is no kernel. x_type: PQ_S8 or PQ_S4. */
int pq_gemm_variants(int layout, int x_type, int M, int N, int K, int* ids, int capacity);
/* Name of a variant for logs and benchmarks, e.g. "sm90 wgmma 128x256x128"; null if unknown. */
const char* pq_gemm_variant_name(int id);
/* Bytes of workspace that a variant needs for a problem. The workspace need not be cleared. */
size_t pq_gemm_workspace(int variant, int layout, int M, int N, int K);

/* y [M, N] (row stride N). variant -1: the first of pq_gemm_variants that the workspace holds. row_scale fp32 [M], bias fp32 [N] and
 * residual [M, N] of y's type may be null; residual only with PQ_F16, PQ_BF16, PQ_F32. y_type PQ_S8 or PQ_S4
 * quantizes with y_scale to y_bits (PQ_S8: 4 or 8; PQ_S4: 4, N even, packed). x_type and layout must fit:
 * PQ_S4 goes with PQ_LAYOUT_S4, PQ_S8 with the others. */
int pq_gemm(int variant, const void* x, int x_type, const void* w, int layout, const float* scale,
            const float* row_scale, const float* bias, const void* residual, void* y, int y_type, int y_bits,
            float y_scale, int M, int N, int K, void* workspace, size_t workspace_bytes, void* stream);

/* ---- Quantizers: one constant scale, clamp(rint((v - shift) / scale)), a true fp32 division, half to even --- */
/* x_type: PQ_F16, PQ_BF16 or PQ_F32, [M, K] dense. codes: PQ_S8 (bits 4 or 8) or PQ_S4 (bits 4). `shift` fp32 [K]
 * is what centering subtracts, or null. */

int pq_quantize(const void* x, int x_type, const float* shift, float scale, void* codes, int codes_type, int bits,
                int M, int K, void* stream);

/* v = h / sqrt(mean(h^2) + eps) * gain with h = x [+ residual], h written to sum if sum is not null (of x's type,
 * and what v is computed from is the rounded h). gain fp32 [K] or null (ones). */
int pq_rmsnorm_quantize(const void* x, int x_type, const void* residual, void* sum, const float* gain, float eps,
                        const float* shift, float scale, void* codes, int codes_type, int bits, int M, int K,
                        void* stream);

/* v = silu(gate) * up, then, if left_order > 0, the online Hadamard R4 over K = left_order * right_order: reshape
 * to [left_order, right_order], fast Hadamard over right_order (a power of two) times 1/sqrt(K), then the matrix
 * `left` fp32 [left_order, left_order] from the left: result[i, :] = sum_j left[i, j] * tile[j, :]. Its entries are
 * +-1, or, where no Hadamard matrix of that order is known, blocks of +-sqrt(left_order / block). gate and
 * up have row stride ldg elements (both halves of one [M, 2K] product can be given). With many rows and left_order
 * 28, left must be +-1, sums are of values rounded to two bf16 (2^-17), and codes are rint(sum * (norm / scale)). */
int pq_silu_mul_quantize(const void* gate, const void* up, int ldg, int x_type, int left_order, int right_order,
                         const float* left, const float* shift, float scale, void* codes, int codes_type, int bits,
                         int M, int K, void* stream);

/* Limits: RMSNorm and dynamic K <= 32768; R4 with right_order 4 to 16384 and K <= 32768, of which 4 K bytes must fit the
 * GPU's shared memory (K <= 25344 on sm_86, 89 and 120); ldg rows aligned to 16 bytes; scales 2^-100 to 2^100. */

/* What static scales save: row_scale[m] = max |x[m, :]| / (2^(bits-1) - 1), or 1 for a row of zeros, and codes with it.
 * For the benchmark. */
int pq_quantize_dynamic(const void* x, int x_type, float* row_scale, void* codes, int codes_type, int bits, int M,
                        int K, void* stream);

#ifdef __cplusplus
}
#endif

#endif /* PQ_KERNELS_H_ */
