// The Hopper prefill GEMM, host side: its variants, which of them suits a problem, and how to launch one.
#include <algorithm>
#include <atomic>

#include "gemm_sm90.cuh"

namespace pq {
namespace sm90 {
namespace {

constexpr int kFirstId = 300;

struct Variant {
    int tokens, x_share, w_share, k_split;
    const char* name;
    int cluster() const { return x_share * w_share * k_split; }
};

#define PQ_VARIANT(tokens, x, w, k) \
    {tokens, x, w, k, "sm90 wgmma 128x" #tokens "x128, cluster of " #x " x " #w ", k split " #k}
constexpr Variant kVariants[] = {
    PQ_VARIANT(256, 2, 1, 1), PQ_VARIANT(256, 1, 1, 1), PQ_VARIANT(128, 1, 1, 1), PQ_VARIANT(128, 2, 1, 1),
    PQ_VARIANT(128, 1, 2, 1), PQ_VARIANT(128, 2, 2, 1), PQ_VARIANT(128, 4, 1, 1), PQ_VARIANT(128, 1, 1, 2),
    PQ_VARIANT(128, 1, 1, 3), PQ_VARIANT(128, 1, 1, 4), PQ_VARIANT(64, 1, 1, 1),  PQ_VARIANT(64, 2, 1, 1),
    PQ_VARIANT(64, 1, 2, 1),  PQ_VARIANT(64, 4, 1, 1),  PQ_VARIANT(64, 1, 1, 2),  PQ_VARIANT(64, 1, 1, 3),
    PQ_VARIANT(64, 1, 1, 4),  PQ_VARIANT(64, 2, 1, 2),  PQ_VARIANT(32, 1, 1, 1),  PQ_VARIANT(32, 2, 1, 1),
    PQ_VARIANT(32, 1, 1, 2),  PQ_VARIANT(32, 1, 1, 3),  PQ_VARIANT(32, 1, 1, 4),  PQ_VARIANT(32, 1, 1, 8),
    PQ_VARIANT(16, 1, 1, 1),  PQ_VARIANT(16, 1, 1, 2),  PQ_VARIANT(16, 1, 1, 3),  PQ_VARIANT(16, 1, 1, 4),
    PQ_VARIANT(16, 1, 1, 8),
};
#undef PQ_VARIANT
constexpr int kCount = sizeof(kVariants) / sizeof(kVariants[0]);
static_assert(kCount <= 100);

constexpr bool sums_fit() {
    for (const Variant& v : kVariants) {
        if (v.k_split > kMaxSplit || receive_bytes(v.tokens, v.k_split) > receive_capacity(v.tokens)) return false;
    }
    return true;
}
static_assert(sums_fit());

struct Kernel {
    const void* function;
    int shared_bytes;
};

template <int kLayout, int kTokens>
Kernel kernel() {
    return {reinterpret_cast<const void*>(gemm_kernel<kLayout, kTokens>), Tile<kLayout, kTokens>::kSharedBytes};
}

template <int kLayout>
Kernel kernel(int tokens) {
    switch (tokens) {
        case 16: return kernel<kLayout, 16>();
        case 32: return kernel<kLayout, 32>();
        case 64: return kernel<kLayout, 64>();
        case 128: return kernel<kLayout, 128>();
        default: return kernel<kLayout, 256>();
    }
}

Kernel kernel(int layout, int tokens) {
    return layout == PQ_LAYOUT_S8 ? kernel<PQ_LAYOUT_S8>(tokens) : kernel<PQ_LAYOUT_W8>(tokens);
}

int round_up(int a, int b) { return (a + b - 1) / b * b; }
int ceil_div(int a, int b) { return (a + b - 1) / b; }

bool fits(const Variant& v, int K) { return v.k_split <= ceil_div(K, kDepth); }

// The attributes live with the configuration that points to them.
struct LaunchConfig {
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config = {};

    LaunchConfig(const Variant& v, const Kernel& k, int clusters) {
        attributes[0].id = cudaLaunchAttributeClusterDimension;
        attributes[0].val.clusterDim = {static_cast<unsigned>(v.x_share), static_cast<unsigned>(v.w_share),
                                        static_cast<unsigned>(v.k_split)};
        attributes[1] = start_early_attribute();
        config.gridDim = dim3(v.x_share * clusters, v.w_share, v.k_split);
        config.blockDim = dim3(kThreads);
        config.dynamicSmemBytes = k.shared_bytes;
        config.attrs = attributes;
        config.numAttrs = 2;
    }
};

// How many clusters of a variant the current device holds at a time: 0 if the library has no code of this kernel for
// it. A first call makes the kernel ready (code loaded, shared memory allowed); later ones only look it up.
int resident_clusters(int index, int layout) {
    constexpr int kDevices = 16;
    static std::atomic<int> known[kDevices][2][kCount];  // 1 + the number; 0: not asked yet
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    std::atomic<int>* slot = device < kDevices ? &known[device][layout == PQ_LAYOUT_W8][index] : nullptr;
    if (slot && slot->load()) return slot->load() - 1;
    const Variant& v = kVariants[index];
    const Kernel k = kernel(layout, v.tokens);
    // Builds for other GPUs hold an empty kernel under the same name; a real one needs many registers.
    constexpr int kRegistersOfEmpty = 32;
    cudaFuncAttributes attributes;
    int clusters = 0;
    if (cudaFuncGetAttributes(&attributes, k.function) == cudaSuccess && attributes.numRegs > kRegistersOfEmpty &&
        cudaFuncSetAttribute(k.function, cudaFuncAttributeMaxDynamicSharedMemorySize, k.shared_bytes) == cudaSuccess) {
        LaunchConfig query(v, k, 1);
        query.config.numAttrs = 1;  // the cluster alone
        if (cudaOccupancyMaxActiveClusters(&clusters, k.function, &query.config) != cudaSuccess) clusters = 0;
    }
    if (clusters == 0) cudaGetLastError();  // not an error of the caller
    if (slot) slot->store(clusters + 1);
    return clusters;
}

// Steps of a CTA whose weights do not wait for the kernels before: all that its stages hold, a few or none. The
// tokens' copies queue behind these, so that with many bytes of tokens a stage a few are better. Measured on an H100:
// all stages instead of four save 0.1-1.8 us with 16 tokens; with 32, they save up to 1.1 us from 12 MB of weights on
// and cost 0.3 us with 8 MB; with 64, they save 0.1 us at most and cost up to 0.5. With more tokens weights are not
// what a call waits for.
int early_steps(const Variant& v, int layout, int N, int K) {
    const double megabytes = 1e-6 * N * K / (layout == PQ_LAYOUT_S8 ? 2 : 1);
    if (v.tokens > 64) return 0;
    return v.tokens == 16 || (v.tokens == 32 && megabytes > 10) ? INT32_MAX : 4;
}

// Microseconds that a call takes, fitted to timings of all variants on an H100: what is first takes 2 % more than the
// best at most up to 64 tokens, 7 % beyond.
double predicted_us(const Variant& v, int resident, int layout, int M, int N, int K) {
    constexpr double kMemory = 3.0, kFromL2 = 0.0617;  // TB/s: of the weights, of what one multiprocessor loads
    constexpr double kChain = 3.25;                    // as decode's: small problems were not timed
    const double steps = ceil_div(ceil_div(K, kDepth), v.k_split);
    const double waves = ceil_div(ceil_div(M, v.tokens * v.w_share) * ceil_div(N, kChannels * v.x_share), resident);
    const double w_bytes = kChannels * kDepth / (layout == PQ_LAYOUT_S8 ? 2 : 1), x_bytes = v.tokens * kDepth;
    const double loads = 1e-6 * (w_bytes / v.w_share + x_bytes / v.x_share) / kFromL2;
    const double step = std::max({0.002 * v.tokens, 0.178, loads}) + (v.x_share * v.w_share > 1 ? 0.043 : 0.0);
    const double split = v.k_split > 1 ? 1.9 + 0.008 * v.tokens : 0.0;
    const double main = waves * (steps * step + 0.002 * v.tokens + split);
    const double weights = w_bytes / (kChannels * kDepth) * N * K * 1e-6 / kMemory;
    // Weights that are loaded early overlap with the call before.
    const bool early = early_steps(v, layout, N, K) > 0;
    return (early ? 0.7 : 1.0) + std::max({main, weights, kChain}) + (early ? 0.11 : 0.25) * std::min(main, weights);
}

int variants(int sm, int layout, int x_type, int M, int N, int K, Guess* guesses, int capacity) {
    if (sm != 90 || x_type != PQ_S8 || (layout != PQ_LAYOUT_S8 && layout != PQ_LAYOUT_W8)) return 0;
    Guess ranked[kCount];
    int count = 0;
    for (int i = 0; i < kCount; ++i) {
        const int resident = fits(kVariants[i], K) ? resident_clusters(i, layout) : 0;
        if (resident == 0) continue;
        ranked[count++] = {kFirstId + i, predicted_us(kVariants[i], resident, layout, M, N, K)};
    }
    std::stable_sort(ranked, ranked + count, [](const Guess& a, const Guess& b) { return a.us < b.us; });
    std::copy_n(ranked, std::min(count, capacity), guesses);
    return count;
}

bool known_id(int id) { return id >= kFirstId && id < kFirstId + kCount; }

const char* variant_name(int id) { return known_id(id) ? kVariants[id - kFirstId].name : nullptr; }

size_t workspace(int, int, int, int, int) { return 0; }  // split sums meet in distributed shared memory

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// From the driver at run time: the library does not link to libcuda, so that it loads where there is no GPU.
EncodeTiled find_encode_tiled() {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result) !=
            cudaSuccess ||
        result != cudaDriverEntryPointSuccess) {
        return nullptr;
    }
    return reinterpret_cast<EncodeTiled>(function);
}

// A row-major 2-d tensor, read in boxes.
bool encode(CUtensorMap* map, CUtensorMapDataType type, CUtensorMapSwizzle swizzle, const void* data,
            cuuint64_t columns, cuuint64_t rows, cuuint64_t row_bytes, cuuint32_t box_columns, cuuint32_t box_rows) {
    static const EncodeTiled encode_tiled = find_encode_tiled();
    const cuuint64_t size[2] = {columns, rows}, stride[1] = {row_bytes};
    const cuuint32_t box[2] = {box_columns, box_rows}, step[2] = {1, 1};
    return encode_tiled && encode_tiled(map, type, 2, const_cast<void*>(data), size, stride, box, step,
                                        CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

pq_status launch(int id, const Gemm& problem, int layout, int x_type, cudaStream_t stream) {
    if (!known_id(id)) return PQ_BAD_VARIANT;
    if (x_type != PQ_S8 || (layout != PQ_LAYOUT_S8 && layout != PQ_LAYOUT_W8)) return PQ_BAD_TYPE;
    const int M = problem.M, N = problem.N, K = problem.K;
    if (M < 1 || N < 1 || K < 32 || K % 32 || K >= 131072) return PQ_BAD_SHAPE;  // sums fit int32 below that K
    const Variant& v = kVariants[id - kFirstId];
    if (!fits(v, K)) return PQ_BAD_VARIANT;
    const int resident = resident_clusters(id - kFirstId, layout);
    if (resident == 0) return PQ_NOT_BUILT;

    CUtensorMap x_map, w_map;
    // Weights: a row is a row of tiles, 16 channels over the whole K, in words of 8 bytes since a box is 256 words at
    // most.
    const int row_tile_bytes = layout == PQ_LAYOUT_S8 ? 1024 : 2048;
    const cuuint64_t w_row_bytes = static_cast<cuuint64_t>(round_up(K, 64)) * row_tile_bytes / kDepth;
    if (!encode(&x_map, CU_TENSOR_MAP_DATA_TYPE_UINT8, CU_TENSOR_MAP_SWIZZLE_128B, problem.x, K, M, K, kDepth,
                v.tokens / v.x_share) ||
        !encode(&w_map, CU_TENSOR_MAP_DATA_TYPE_INT64, CU_TENSOR_MAP_SWIZZLE_NONE, problem.w, w_row_bytes / 8,
                ceil_div(N, 16), w_row_bytes, row_tile_bytes / 8, kChannels / 16 / v.w_share)) {
        return PQ_CUDA_ERROR;
    }

    Launch args = {problem, 1.0f / problem.y_scale, v.x_share, v.w_share, v.k_split};
    args.early_steps = early_steps(v, layout, N, K);
    args.tiles_m = ceil_div(M, v.tokens * v.w_share);
    args.tiles_n = ceil_div(N, kChannels * v.x_share);
    for (int i = 0; i <= v.k_split; ++i) {
        args.first_step[i] = i * ceil_div(K, kDepth) / v.k_split;
        args.first_block[i] = first_block(v.tokens, v.k_split, i);
    }
    const int64_t tiles = static_cast<int64_t>(args.tiles_m) * args.tiles_n;
    if (tiles * v.cluster() > INT32_MAX) return PQ_BAD_SHAPE;
    // A CTA that divides k can receive the others' sums of one tile only.
    const int clusters = static_cast<int>(v.k_split > 1 ? tiles : std::min<int64_t>(tiles, resident));
    const Kernel k = kernel(layout, v.tokens);
    LaunchConfig launch_config(v, k, clusters);
    launch_config.config.stream = stream;
    void* arguments[] = {&x_map, &w_map, &args};
    return cudaLaunchKernelExC(&launch_config.config, k.function, arguments) == cudaSuccess ? PQ_OK : PQ_CUDA_ERROR;
}

}  // namespace
}  // namespace sm90

const Family& wgmma_family() {
    static const Family family = {"wgmma",       sm90::kFirstId,  sm90::variants, sm90::variant_name,
                                  sm90::workspace, sm90::launch};
    return family;
}

}  // namespace pq
