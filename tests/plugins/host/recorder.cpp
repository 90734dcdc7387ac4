#include "recorder.h"

#include <algorithm>

#include "pq_kernels.h"

Recorder recorder;

const char* pq_status_string(int status) { return status == PQ_SMALL_WORKSPACE ? "too small a workspace" : "fine"; }

int pq_preferred_layout(int, int) { return recorder.preferred_layout; }

int pq_gemm_variants(int, int, int M, int, int, int* ids, int capacity) {
    const std::vector<int> found = recorder.variants(M);
    std::copy_n(found.begin(), std::min<int>(capacity, found.size()), ids);
    return static_cast<int>(found.size());
}

size_t pq_gemm_workspace(int variant, int, int M, int, int) { return recorder.workspace(variant, M); }

int pq_gemm(int variant, const void* x, int x_type, const void* w, int layout, const float* scale,
            const float* row_scale, const float* bias, const void* residual, void* y, int y_type, int, float, int M,
            int N, int K, void* workspace, size_t workspace_bytes, void* stream) {
    recorder.gemm.push_back({variant, x, x_type, w, layout, scale, row_scale, bias, residual, y, y_type, M, N, K,
                             workspace, workspace_bytes, stream});
    return recorder.status;
}

int pq_quantize(const void* x, int x_type, const float* shift, float scale, void* codes, int codes_type, int bits,
                int M, int K, void* stream) {
    recorder.quantize.push_back({x, x_type, shift, scale, codes, codes_type, bits, M, K, stream});
    return PQ_OK;
}

int pq_rmsnorm_quantize(const void* x, int x_type, const void* residual, void* sum, const float* gain, float eps,
                        const float*, float scale, void* codes, int codes_type, int bits, int M, int K, void*) {
    recorder.norm.push_back({x, residual, sum, gain, eps, scale, codes, x_type, codes_type, bits, M, K});
    return recorder.status;
}

int pq_silu_mul_quantize(const void* gate, const void* up, int ldg, int x_type, int left_order, int right_order,
                         const float* left, const float*, float scale, void* codes, int codes_type, int bits, int M,
                         int K, void*) {
    recorder.silu.push_back(
        {gate, up, ldg, x_type, left_order, right_order, left, scale, codes, codes_type, bits, M, K});
    return recorder.status;
}
