// The GEMM's entry points: arguments are checked here, once, then a family of kernels is chosen.
#include <algorithm>

#include "common.cuh"

namespace pq {
namespace {

constexpr int kFamilyIds = 100;
constexpr int kMaxK = 1 << 17;                // 16 * 8 * 128 * K and 128 * 128 * K stay below 2^31
constexpr int kMaxRows = 1 << 30;             // a row's index may run past the last tile's end
constexpr long long kMaxResults = 1LL << 40;  // tiles are counted in 32 bits

// Compute capability of the current device, e.g. 86; 0 without one.
int current_sm() {
    int device = 0, major = 0, minor = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess)
        return 0;
    return major * 10 + minor;
}

// All files are built for the same GPUs, so that this kernel stands for the others.
__global__ void probe() {}

bool built_for_current_device() {
    cudaFuncAttributes attributes;
    if (cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&probe)) == cudaSuccess) return true;
    cudaGetLastError();  // an answer, not an error to leave behind
    return false;
}

const Family* family_of(int id) {
    for (const Family* family : {&decode_family(), &wgmma_family(), &mma_family()})
        if (id >= family->first_id && id < family->first_id + kFamilyIds && family->variant_name(id)) return family;
    return nullptr;
}

constexpr int kMaxVariants = 3 * kFamilyIds;

// Ids of all variants for a problem, best first; returns how many. Decode's streaming kernels are for a few tokens,
// Hopper's own for more; between the two the predicted times decide, and the portable kernels come last.
int ranked_variants(int sm, int layout, int x_type, int M, int N, int K, int (&ids)[kMaxVariants]) {
    Guess guesses[kMaxVariants];
    int count = 0;
    const auto add = [&](const Family& family) {
        count += family.variants(sm, layout, x_type, M, N, K, guesses + count, kFamilyIds);
    };
    if (M <= 16) add(decode_family());
    if (sm == 90) add(wgmma_family());
    std::stable_sort(guesses, guesses + count, [](const Guess& a, const Guess& b) { return a.us < b.us; });
    add(mma_family());
    for (int i = 0; i < count; ++i) ids[i] = guesses[i].id;
    return count;
}

pq_status check_problem(int layout, int x_type, int M, int N, int K) {
    if (layout != PQ_LAYOUT_S4 && layout != PQ_LAYOUT_S8 && layout != PQ_LAYOUT_W8) return PQ_BAD_TYPE;
    if (x_type != (layout == PQ_LAYOUT_S4 ? PQ_S4 : PQ_S8)) return PQ_BAD_TYPE;
    if (M <= 0 || N <= 0 || K <= 0 || K % 32 != 0 || K >= kMaxK) return PQ_BAD_SHAPE;
    if (M > kMaxRows || N > kMaxRows) return PQ_BAD_SHAPE;
    return static_cast<long long>(M) * N < kMaxResults ? PQ_OK : PQ_BAD_SHAPE;
}

bool aligned(const void* pointer, size_t bytes) { return reinterpret_cast<size_t>(pointer) % bytes == 0; }

bool is_float(int type) { return type == PQ_F16 || type == PQ_BF16 || type == PQ_F32; }

pq_status check_output(const Gemm& p) {
    const bool codes = p.y_type == PQ_S8 || p.y_type == PQ_S4;
    if (!is_float(p.y_type) && !codes && p.y_type != PQ_S32) return PQ_BAD_TYPE;
    if (p.residual && !is_float(p.y_type)) return PQ_BAD_TYPE;
    if (codes) {
        if (p.y_bits != 4 && !(p.y_bits == 8 && p.y_type == PQ_S8)) return PQ_BAD_TYPE;
        // Beyond these bounds the division by y_scale could round twice; no tensor has such a scale.
        if (!(p.y_scale >= 0x1p-64f && p.y_scale <= 0x1p64f)) return PQ_BAD_TYPE;
        if (p.y_type == PQ_S4 && p.N % 2 != 0) return PQ_BAD_SHAPE;
    }
    return PQ_OK;
}

pq_status check_pointers(const Gemm& p) {
    for (const void* needed : {p.x, p.w, static_cast<const void*>(p.y)})
        if (!needed || !aligned(needed, 16)) return PQ_BAD_POINTER;
    if (!p.scale && p.y_type != PQ_S32) return PQ_BAD_POINTER;
    for (const float* optional : {p.scale, p.row_scale, p.bias})
        if (!aligned(optional, sizeof(float))) return PQ_BAD_POINTER;
    return aligned(p.residual, 16) ? PQ_OK : PQ_BAD_POINTER;
}

pq_status launch(int id, const Gemm& p, int layout, int x_type, size_t workspace_bytes, cudaStream_t stream) {
    const Family* family = family_of(id);
    if (!family) return PQ_BAD_VARIANT;
    const size_t needed = family->workspace(id, layout, p.M, p.N, p.K);
    if (needed > workspace_bytes) return PQ_SMALL_WORKSPACE;
    if (needed && (!p.workspace || !aligned(p.workspace, 16))) return PQ_BAD_POINTER;
    return family->launch(id, p, layout, x_type, stream);
}

}  // namespace
}  // namespace pq

extern "C" {

const char* pq_status_string(int status) {
    switch (status) {
        case PQ_OK: return "no error";
        case PQ_BAD_SHAPE: return "a size is not positive, too large, or not the multiple that the kernels need";
        case PQ_BAD_TYPE: return "a type, layout, bit width or output scale that the function does not take";
        case PQ_BAD_POINTER: return "a pointer is null where one is needed, or not aligned";
        case PQ_BAD_VARIANT: return "no such variant for this problem";
        case PQ_SMALL_WORKSPACE: return "the workspace is smaller than pq_gemm_workspace asks for";
        case PQ_NOT_BUILT: return "the library holds no kernel for this GPU";
        case PQ_CUDA_ERROR: {
            // The runtime is linked statically: its last error is out of the caller's reach, so it is told here.
            const cudaError_t error = cudaPeekAtLastError();
            return error == cudaSuccess ? "a CUDA call failed" : cudaGetErrorString(error);
        }
        default: return "unknown status";
    }
}

int pq_abi_version(void) { return PQ_ABI_VERSION; }

int pq_preferred_layout(int weight_bits, int activation_bits) {
    const int sm = pq::current_sm();
    if (sm < 80 || (activation_bits != 4 && activation_bits != 8)) return -1;
    if (weight_bits == 8) return PQ_LAYOUT_W8;
    if (weight_bits != 4) return -1;
    // int4 tensor cores end with sm_89; later GPUs would emulate them, many times slower than int8 with unpacking.
    return activation_bits == 4 && sm < 90 ? PQ_LAYOUT_S4 : PQ_LAYOUT_S8;
}

size_t pq_packed_bytes(int layout, int N, int K) {
    if (layout < PQ_LAYOUT_S4 || layout > PQ_LAYOUT_W8 || N <= 0 || K <= 0) return 0;
    const size_t values = ((static_cast<size_t>(N) + 15) / 16 * 16) * ((static_cast<size_t>(K) + 63) / 64 * 64);
    return layout == PQ_LAYOUT_W8 ? values : values / 2;
}

int pq_gemm_variants(int layout, int x_type, int M, int N, int K, int* ids, int capacity) {
    if (pq::check_problem(layout, x_type, M, N, K) != PQ_OK) return 0;
    const int sm = pq::current_sm();
    if (sm == 0 || !pq::built_for_current_device()) return 0;
    int found[pq::kMaxVariants];
    const int count = pq::ranked_variants(sm, layout, x_type, M, N, K, found);
    if (ids) std::copy_n(found, std::min(count, std::max(capacity, 0)), ids);
    return count;
}

const char* pq_gemm_variant_name(int id) {
    const pq::Family* family = pq::family_of(id);
    return family ? family->variant_name(id) : nullptr;
}

size_t pq_gemm_workspace(int variant, int layout, int M, int N, int K) {
    if (pq::check_problem(layout, layout == PQ_LAYOUT_S4 ? PQ_S4 : PQ_S8, M, N, K) != PQ_OK) return 0;
    if (variant == -1 && pq_gemm_variants(layout, layout == PQ_LAYOUT_S4 ? PQ_S4 : PQ_S8, M, N, K, &variant, 1) == 0)
        return 0;
    const pq::Family* family = pq::family_of(variant);
    return family ? family->workspace(variant, layout, M, N, K) : 0;
}

int pq_gemm(int variant, const void* x, int x_type, const void* w, int layout, const float* scale,
            const float* row_scale, const float* bias, const void* residual, void* y, int y_type, int y_bits,
            float y_scale, int M, int N, int K, void* workspace, size_t workspace_bytes, void* stream) {
    const pq::Gemm p = {x, w, scale, row_scale, bias, residual, y, workspace, y_scale, y_type, y_bits, M, N, K};
    for (const pq_status checked :
         {pq::check_problem(layout, x_type, M, N, K), pq::check_output(p), pq::check_pointers(p)})
        if (checked != PQ_OK) return checked;
    const cudaStream_t on = static_cast<cudaStream_t>(stream);
    if (variant != -1) return pq::launch(variant, p, layout, x_type, workspace_bytes, on);

    // The first that this workspace and this build allow: every family has variants that need no workspace.
    int ids[pq::kMaxVariants];
    const int count = pq::ranked_variants(pq::current_sm(), layout, x_type, M, N, K, ids);
    pq_status status = PQ_NOT_BUILT;
    for (int i = 0; i < count; ++i) {
        status = pq::launch(ids[i], p, layout, x_type, workspace_bytes, on);
        if (status != PQ_SMALL_WORKSPACE && status != PQ_NOT_BUILT) return status;
    }
    return status;
}

}  // extern "C"
