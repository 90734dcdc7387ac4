// Family 100: M <= 16 tokens on every GPU, and which of its variants suits a problem. The kernel is in decode.cuh.
#include <algorithm>
#include <atomic>

#include "decode.cuh"

namespace pq {
namespace {

constexpr int kFirstId = 100;
constexpr int kMaxTokens = 16;
constexpr int kMaxK = 131072;  // 16 * 8 * 128 * K and 128 * 128 * K stay below 2^31

struct Variant {
    int rows, warps;      // of 16 channels in a CTA's group, of the CTA
    int splits, sharers;  // slices of K and groups that share x: the CTAs of a cluster
    const char* name;
};
constexpr Variant kVariants[] = {
    {1, 8, 1, 1, "decode 16 rows 8 warps"},
    {2, 8, 1, 1, "decode 32 rows 8 warps"},
    {4, 8, 1, 1, "decode 64 rows 8 warps"},
    {2, 16, 1, 1, "decode 32 rows 16 warps"},
    {4, 16, 1, 1, "decode 64 rows 16 warps"},
    {4, 8, 2, 1, "decode 64 rows 8 warps split 2"},
    {4, 8, 4, 1, "decode 64 rows 8 warps split 4"},
    {4, 8, 8, 1, "decode 64 rows 8 warps split 8"},
    {4, 16, 2, 1, "decode 64 rows 16 warps split 2"},
    {4, 16, 4, 1, "decode 64 rows 16 warps split 4"},
    {2, 16, 1, 2, "decode 32 rows 16 warps share 2"},
    {2, 16, 1, 4, "decode 32 rows 16 warps share 4"},
    {4, 16, 1, 2, "decode 64 rows 16 warps share 2"},
    {4, 16, 1, 4, "decode 64 rows 16 warps share 4"},
};
constexpr int kVariantCount = sizeof(kVariants) / sizeof(kVariants[0]);

const Variant* find(int id) {
    return id >= kFirstId && id < kFirstId + kVariantCount ? &kVariants[id - kFirstId] : nullptr;
}

// Clusters came with sm_90; copies to all CTAs of a cluster are quick on Hopper and the data center GPUs after it only.
bool runs_on(const Variant& v, int major) { return v.sharers > 1 ? major == 9 : v.splits == 1 || major >= 9; }

struct Device {
    int id, major, sms, shared_per_block, shared_per_sm;
};

bool current_device(Device& d) {
    const auto get = [&](int& value, cudaDeviceAttr attribute) {
        return cudaDeviceGetAttribute(&value, attribute, d.id) == cudaSuccess;
    };
    return cudaGetDevice(&d.id) == cudaSuccess && get(d.major, cudaDevAttrComputeCapabilityMajor) &&
           get(d.sms, cudaDevAttrMultiProcessorCount) &&
           get(d.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin) &&
           get(d.shared_per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
}

int log2(int power) {
    int result = 0;
    while (1 << result < power) ++result;
    return result;
}

struct Launch {
    DecodePlan plan;
    int shared_bytes, threads;
    int clusters, resident;  // launched, and how many run at once
};

// How a variant divides a problem; false if x does not fit into shared memory however it is cut.
template <typename Shape>
bool make_plan(const Device& device, const Variant& v, int M, int N, int K, Launch& launch) {
    DecodePlan& plan = launch.plan;
    const int padded = (K + 63) / 64;
    plan.tiles = Shape::kLayout == PQ_LAYOUT_W8 ? 2 * padded : padded;
    plan.row_tiles = (N + 15) / 16;
    plan.groups = (plan.row_tiles + Shape::kRows - 1) / Shape::kRows;
    plan.log_splits = log2(v.splits);
    plan.log_channels = log2(Shape::kChannels) - plan.log_splits;
    plan.sharers = v.sharers;
    plan.share_mask = v.sharers > 1 ? (1 << v.sharers) - 1 : 0;  // no variant has both slices and sharers
    const int steps = (plan.tiles + Shape::kStepTiles - 1) / Shape::kStepTiles;
    plan.slice_steps = (steps + v.splits - 1) / v.splits;
    plan.batches = (plan.slice_steps + Shape::kBatchSteps - 1) / Shape::kBatchSteps;
    plan.pieces = v.sharers > 1 ? plan.batches * Shape::kPieces : 0;
    plan.x_bytes = Shape::kLayout == PQ_LAYOUT_S4 ? K / 2 : K;

    // All of the slice's x, else two buffers as large as fit beside a second CTA, else as large as fit at all.
    const auto bytes = [&](int chunk) {
        return decode_shared_bytes<Shape>(M, v.splits, plan.batches, chunk, plan.pieces);
    };
    const int reserved = 1024;  // what the system takes of a multiprocessor's shared memory for each CTA
    for (int ctas = Shape::kCtas; ctas > 0; --ctas) {
        const int limit = std::min(device.shared_per_block, device.shared_per_sm / ctas - reserved);
        plan.chunk_batches = plan.batches;
        if (bytes(plan.batches) > limit) {
            if (plan.pieces) continue;  // the copy engine brings x once, and whole
            plan.chunk_batches = std::max(0, limit - bytes(0)) / (2 * M * Shape::kBatchSteps * kStepBytes);
        }
        if (plan.chunk_batches == 0) continue;
        plan.chunks = (plan.batches + plan.chunk_batches - 1) / plan.chunk_batches;
        launch.shared_bytes = bytes(plan.chunk_batches);
        launch.threads = Shape::kThreads;
        launch.resident = device.sms * ctas;
        return true;
    }
    return false;
}

template <typename Shape>
cudaError_t allow_shared(size_t bytes) {
    return cudaFuncSetAttribute(decode_kernel<Shape>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(bytes));
}

// How many clusters run at once: fewer than their CTAs would suggest, as a cluster lives in one GPC. The runtime takes
// its time to answer, so that answers are kept: the shapes of a model's layers take turns.
template <typename Shape>
int resident_clusters(const Device& device, const cudaLaunchConfig_t& config) {
    constexpr int kKept = 16;
    static std::atomic<uint64_t> memo[kKept];
    const uint64_t key = static_cast<uint64_t>(device.id & 0xff) << 40 | static_cast<uint64_t>(config.gridDim.x) << 32 |
                         static_cast<uint32_t>(config.dynamicSmemBytes);
    std::atomic<uint64_t>& slot = memo[(config.dynamicSmemBytes / 16 + config.gridDim.x) % kKept];
    const uint64_t kept = slot.load(std::memory_order_relaxed);
    if (kept >> 16 == key) return static_cast<int>(kept & 0xffff);
    int clusters = 0;
    if (allow_shared<Shape>(config.dynamicSmemBytes) != cudaSuccess ||
        cudaOccupancyMaxActiveClusters(&clusters, decode_kernel<Shape>, &config) != cudaSuccess)
        cudaGetLastError();  // the launch will say so
    clusters = std::max(clusters, 1);
    slot.store(key << 16 | static_cast<uint64_t>(clusters), std::memory_order_relaxed);
    return clusters;
}

// The plan and the launch's configuration, which points to `attributes`; false as make_plan.
template <typename Shape>
bool configure(const Device& device, const Variant& v, int M, int N, int K, Launch& launch, cudaLaunchConfig_t& config,
               cudaLaunchAttribute (&attributes)[2]) {
    if (!make_plan<Shape>(device, v, M, N, K, launch)) return false;
    config.blockDim = dim3(launch.threads);
    config.dynamicSmemBytes = launch.shared_bytes;
    const int ctas = v.splits * v.sharers;
    config.attrs = attributes;
    if (ctas > 1) {
        attributes[0].id = cudaLaunchAttributeClusterDimension;
        attributes[0].val.clusterDim.x = ctas, attributes[0].val.clusterDim.y = 1, attributes[0].val.clusterDim.z = 1;
        config.numAttrs = 1;
        config.gridDim = dim3(ctas);
        launch.resident = resident_clusters<Shape>(device, config);
    }
    launch.clusters = std::min((launch.plan.groups + v.sharers - 1) / v.sharers, launch.resident);
    config.gridDim = dim3(ctas, launch.clusters);
    return true;
}

// Microseconds that a call takes, fitted to 380 timings on an H100 of calls that follow each other and start early
// (overlap.cuh), which makes two things cheaper than they look: CTAs that end before the busiest ones leave room for
// the next call's, and weights of a small matrix fit into the rings, so that a call is bound by what cannot overlap.
double predicted_us(const Device& device, const Variant& v, const Launch& launch, int M) {
    constexpr double kStart = 0.27, kChain = 3.25;            // the latter: from x's being there to y's
    constexpr double kMemory = 3.3, kMultiprocessor = 0.037;  // TB/s of the weights: of all, of one multiprocessor
    constexpr double kUneven = 0.78;   // of the time that the busiest CTA has more to do than the average
    constexpr double kOverlap = 0.09;  // of what is not the bottleneck
    const DecodePlan& plan = launch.plan;
    const int at_once = launch.clusters * v.sharers, turns = (plan.groups + at_once - 1) / at_once;
    const int each = (at_once * v.splits + device.sms - 1) / device.sms;  // CTAs of the busiest multiprocessor
    const double tile_megabytes = 1e-6 * plan.tiles * kTileBytes, megabytes = tile_megabytes * plan.row_tiles;
    // Clusters of four leave multiprocessors out.
    const double all = megabytes / kMemory * (v.sharers == 4 ? 1.055 : 1.0);
    const double average = megabytes / device.sms / kMultiprocessor;
    const double busiest = tile_megabytes * v.rows / v.splits * turns * each / kMultiprocessor;
    const double one = average + kUneven * (busiest - average);
    const double most = std::max({all, one, kChain});
    const double stream = most + kOverlap * (all + one + kChain - most);

    // Each cluster reads all of x's columns out of L2, once or, if they do not fit into shared memory, for every group.
    const double copies = plan.chunks > 1 ? static_cast<double>(plan.groups) / at_once : 1.0;
    const double copy_x = 0.155e-6 * copies * launch.clusters * M * plan.x_bytes;
    const double copying_threads = v.sharers > 1 ? 0.0 : v.warps == 16 ? 0.22 : 0.35;  // which the copy engine spares
    const double results = 16.0 * v.rows * M;
    const double finish = 0.06 * turns * results / (launch.threads * v.splits);
    const double meet = v.splits > 1 ? 0.43 + turns * (0.086 * v.splits + 0.00032 * results) : 0.0;
    const double two_products = M > 8 ? 0.68 : 0.0;
    return kStart + stream + copy_x + copying_threads + finish + meet + two_products + (v.rows == 4 ? 0.47 : 0.0);
}

// Calls f with the shape of a variant's kernel.
template <int kLayout, int kTokens, typename F>
auto with_rows(const Variant& v, const F& f) {
    if (v.warps == 16 && v.rows == 2) return f(DecodeShape<kLayout, kTokens, 2, 16>{});
    if (v.warps == 16) return f(DecodeShape<kLayout, kTokens, 4, 16>{});
    if constexpr (kTokens == 8) {
        if (v.rows == 1) return f(DecodeShape<kLayout, 8, 1, 8>{});
    }
    if (v.rows == 2) return f(DecodeShape<kLayout, kTokens, 2, 8>{});
    return f(DecodeShape<kLayout, kTokens, 4, 8>{});
}
template <int kLayout, typename F>
auto with_tokens(const Variant& v, int M, const F& f) {
    return M <= 8 ? with_rows<kLayout, 8>(v, f) : with_rows<kLayout, 16>(v, f);
}
template <typename F>
auto with_shape(const Variant& v, int layout, int M, const F& f) {
    if (layout == PQ_LAYOUT_S4) return with_tokens<PQ_LAYOUT_S4>(v, M, f);
    if (layout == PQ_LAYOUT_S8) return with_tokens<PQ_LAYOUT_S8>(v, M, f);
    return with_tokens<PQ_LAYOUT_W8>(v, M, f);
}

// One row of 16 channels a group is for few tokens: with more, every CTA would copy x for little work.
bool serves(const Variant& v, int M, int major) { return runs_on(v, major) && (v.rows > 1 || M <= 8); }

bool takes(int layout, int x_type) {
    if (layout == PQ_LAYOUT_S4) return x_type == PQ_S4;
    return (layout == PQ_LAYOUT_S8 || layout == PQ_LAYOUT_W8) && x_type == PQ_S8;
}
bool good_shape(int M, int N, int K) {
    return M >= 1 && M <= kMaxTokens && N >= 1 && K >= 32 && K % 32 == 0 && K < kMaxK;
}

int variants(int sm, int layout, int x_type, int M, int N, int K, Guess* guesses, int capacity) {
    Device device;
    if (!takes(layout, x_type) || !good_shape(M, N, K) || !current_device(device)) return 0;
    Guess ranked[kVariantCount];
    int count = 0;
    for (int i = 0; i < kVariantCount; ++i) {
        const Variant& v = kVariants[i];
        if (!serves(v, M, sm / 10)) continue;
        Launch launch{};
        const bool fits = with_shape(v, layout, M, [&](auto shape) {
            cudaLaunchConfig_t config{};
            cudaLaunchAttribute attributes[2] = {};
            return configure<decltype(shape)>(device, v, M, N, K, launch, config, attributes);
        });
        if (fits) ranked[count++] = {kFirstId + i, predicted_us(device, v, launch, M)};
    }
    std::stable_sort(ranked, ranked + count, [](const Guess& a, const Guess& b) { return a.us < b.us; });
    std::copy_n(ranked, std::min(count, capacity), guesses);
    return count;
}

const char* variant_name(int id) {
    const Variant* v = find(id);
    return v ? v->name : nullptr;
}

size_t workspace(int, int, int, int, int) { return 0; }

pq_status launch(int id, const Gemm& problem, int layout, int x_type, cudaStream_t stream) {
    const Variant* v = find(id);
    if (!v) return PQ_BAD_VARIANT;
    if (!takes(layout, x_type)) return PQ_BAD_TYPE;
    if (!good_shape(problem.M, problem.N, problem.K)) return PQ_BAD_SHAPE;
    Device device;
    if (!current_device(device)) return PQ_CUDA_ERROR;
    if (!serves(*v, problem.M, device.major)) return PQ_BAD_VARIANT;
    return with_shape(*v, layout, problem.M, [&](auto shape) {
        Launch launch{};
        cudaLaunchConfig_t config{};
        cudaLaunchAttribute attributes[2] = {};
        using Shape = decltype(shape);
        if (!configure<Shape>(device, *v, problem.M, problem.N, problem.K, launch, config, attributes))
            return PQ_BAD_VARIANT;
        const cudaError_t allowed = allow_shared<Shape>(config.dynamicSmemBytes);
        if (allowed != cudaSuccess) return status_of(allowed);
        config.stream = stream;
        if (may_start_early(reinterpret_cast<const void*>(decode_kernel<Shape>)))
            attributes[config.numAttrs++] = start_early_attribute();
        if (problem.y_type == PQ_S8 || problem.y_type == PQ_S4)  // y_bits says nothing of other types
            launch.plan.coder = Coder::of(problem.y_scale, problem.y_bits);
        return status_of(cudaLaunchKernelEx(&config, decode_kernel<Shape>, problem, launch.plan));
    });
}

}  // namespace

const Family& decode_family() {
    static const Family family = {"decode", kFirstId, variants, variant_name, workspace, launch};
    return family;
}

}  // namespace pq
