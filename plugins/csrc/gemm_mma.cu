// The mma.sync family: its tiles, which of them suits a problem, and the launch. The kernel is in gemm_mma.cuh.
#include <algorithm>
#include <cmath>

#include "gemm_mma.cuh"

namespace pq {
namespace {

constexpr int kFirstId = 200, kSplits = 4;  // id = kFirstId + tile * kSplits + log2(parts of K)

struct Kernel {
    const void* function;
    int shared;
};

struct Variant {
    int channels, tokens, channel_warps, token_warps, row_bytes, stages, resident;
    const char* names[kSplits];
    Kernel kernels[3];  // by layout

    int threads() const { return 32 * channel_warps * token_warps; }
    size_t tile_bytes() const { return sizeof(int) * channels * tokens; }
};

template <int kLayout, class T>
Kernel kernel_of() {
    return {reinterpret_cast<const void*>(&gemm_mma<kLayout, T>), Stage<kLayout, T>::kShared};
}

// Channels, tokens, warps along each, bytes of a token's row a stage, stages, CTAs on an SM. All fit the 99 KB of the
// smallest GPUs, and `resident` of them the SM's 100 KB. Warps of 64 x 64 read least shared memory for a product; the
// small tiles are for few tokens, where weights stream from memory and the longer rows keep more of them in flight.
#define PQ_TILES(F)               \
    F(128, 256, 2, 4, 64, 4, 1)   \
    F(128, 128, 2, 2, 64, 3, 2)   \
    F(128, 64, 2, 2, 64, 4, 2)    \
    F(64, 128, 1, 4, 64, 4, 2)    \
    F(64, 64, 2, 2, 128, 3, 2)    \
    F(128, 32, 4, 1, 64, 4, 2)    \
    F(64, 32, 2, 2, 128, 4, 2)    \
    F(64, 16, 4, 1, 128, 4, 2)

#define PQ_NAME(c, t, row) "mma " #c "x" #t "x" #row "B"
#define PQ_VARIANT(c, t, wc, wt, row, stages, resident)                                            \
    {c, t, wc, wt, row, stages, resident,                                                          \
     {PQ_NAME(c, t, row), PQ_NAME(c, t, row) " split 2", PQ_NAME(c, t, row) " split 4",            \
      PQ_NAME(c, t, row) " split 8"},                                                              \
     {kernel_of<PQ_LAYOUT_S4, Tile<c, t, wc, wt, row, stages, resident>>(),                        \
      kernel_of<PQ_LAYOUT_S8, Tile<c, t, wc, wt, row, stages, resident>>(),                        \
      kernel_of<PQ_LAYOUT_W8, Tile<c, t, wc, wt, row, stages, resident>>()}},
const Variant kVariants[] = {PQ_TILES(PQ_VARIANT)};
#undef PQ_VARIANT
#undef PQ_NAME
#undef PQ_TILES

constexpr int kTiles = sizeof(kVariants) / sizeof(kVariants[0]);

int ceil_div(int a, int b) { return (a - 1) / b + 1; }

int row_bytes_of(int layout, int K) { return layout == PQ_LAYOUT_S4 ? K / 2 : K; }

// Partial sums are for problems that leave SMs idle: a bounded workspace holds those of every such problem, and past
// the bound K stays whole.
constexpr size_t kMaxPartials = size_t{32} << 20;

// Token tiles up to which K is split in `parts`.
int split_token_tiles(const Variant& v, int parts, int N) {
    return static_cast<int>(std::min<size_t>(
        kMaxPartials / (static_cast<size_t>(ceil_div(N, v.channels)) * parts * v.tile_bytes()), 1 << 30));
}

// Parts of K that an id stands for in a problem: no more than there are stages to share out.
int parts_of(int id, int layout, int K) {
    const Variant& v = kVariants[(id - kFirstId) / kSplits];
    return std::min(1 << (id - kFirstId) % kSplits, ceil_div(row_bytes_of(layout, K), v.row_bytes));
}

bool known(int id) { return id >= kFirstId && id < kFirstId + kTiles * kSplits; }

constexpr double kClocksPerUs = 1700;

// Clocks that a problem takes, as far as that ranks variants.
double cost(const Variant& v, int parts, int sm, int sms, int layout, int M, int N, int K) {
    // What an SM does in a clock: int8 m16n8k32 and int4 m16n8k64 occupy a quarter's tensor cores for 8 clocks, on
    // sm_86, 89 and 120 for 16 (int4 is emulated from sm_90 on); bytes that arrive from L2.
    const bool small_cores = sm == 86 || sm == 89 || sm >= 120;
    double mma = small_cores ? 16 : sm == 90 ? 6.5 : 8;
    if (layout == PQ_LAYOUT_S4 && sm >= 90) mma = 200;
    const double l2 = small_cores ? 16 : sm >= 90 ? 24 : 32;
    // Clocks for a k-step of 32 bytes. The three overlap, though never wholly.
    const double weight_bytes = layout == PQ_LAYOUT_S8 ? 16 : 32;  // of a channel in a step
    const double tensor = v.channels / 16.0 * (v.tokens / 8.0) / 4 * mma;
    const double shared = (v.token_warps * v.channels * weight_bytes + v.channel_warps * v.tokens * 32) / 128;
    const double filled = (v.channels * weight_bytes + v.tokens * 32) / l2;
    const double step = 0.85 * std::max({tensor, shared, filled}) + 0.15 * (tensor + shared + filled);

    const double ctas = static_cast<double>(ceil_div(N, v.channels)) * ceil_div(M, v.tokens) * parts;
    const double each = std::ceil(ctas / sms);  // CTAs that the busiest SM runs
    const double resident = std::min<double>(each, v.resident);
    const int stages = ceil_div(ceil_div(row_bytes_of(layout, K), v.row_bytes), parts);
    // A stage cannot take less than its copies' latency spread over those in flight, and it has a barrier.
    const double latency = 800.0 / ((v.stages - 1) * resident);
    const double main = each * stages * (std::max(step * v.row_bytes / 32, latency) + 40 / resident);
    const double epilogue = each * v.channels * v.tokens * (resident > 1 ? 0.06 : 0.12);
    const double reduction = parts > 1 ? 4000 + each * v.tile_bytes() * 2 / l2 : 0;
    return main + epilogue + reduction;
}

int variants(int sm, int layout, int x_type, int M, int N, int K, Guess* guesses, int capacity) {
    if (sm < 80 || (x_type == PQ_S4) != (layout == PQ_LAYOUT_S4)) return 0;
    int device = 0, sms = 1;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
    Guess ranked[kTiles * kSplits];
    int count = 0;
    for (int id = kFirstId; known(id); ++id) {
        const Variant& v = kVariants[(id - kFirstId) / kSplits];
        const int wanted = 1 << (id - kFirstId) % kSplits, parts = parts_of(id, layout, K);
        const int token_tiles = ceil_div(M, v.tokens);
        const bool idle = static_cast<double>(token_tiles) * ceil_div(N, v.channels) < 2.0 * sms;
        if (wanted > 1 && (parts != wanted || !idle || token_tiles > split_token_tiles(v, parts, N))) continue;
        ranked[count++] = {id, cost(v, parts, sm, sms, layout, M, N, K) / kClocksPerUs};
    }
    std::stable_sort(ranked, ranked + count, [](const Guess& a, const Guess& b) { return a.us < b.us; });
    std::copy_n(ranked, std::min(count, capacity), guesses);
    return count;
}

const char* variant_name(int id) {
    return known(id) ? kVariants[(id - kFirstId) / kSplits].names[(id - kFirstId) % kSplits] : nullptr;
}

// Partial sums, then a counter a tile. It never shrinks as M grows, though K stays whole for large M: what is asked for
// the largest M serves all.
size_t workspace(int id, int layout, int M, int N, int K) {
    if (!known(id)) return 0;
    const Variant& v = kVariants[(id - kFirstId) / kSplits];
    const int parts = parts_of(id, layout, K);
    if (parts == 1) return 0;
    const size_t tiles = static_cast<size_t>(ceil_div(N, v.channels)) *
                         std::min(ceil_div(M, v.tokens), split_token_tiles(v, parts, N));
    return tiles * (parts * v.tile_bytes() + sizeof(unsigned));
}

pq_status launch(int id, const Gemm& problem, int layout, int x_type, cudaStream_t stream) {
    if (!known(id)) return PQ_BAD_VARIANT;
    if ((x_type == PQ_S4) != (layout == PQ_LAYOUT_S4)) return PQ_BAD_TYPE;
    const Variant& v = kVariants[(id - kFirstId) / kSplits];
    const Kernel& kernel = v.kernels[layout];
    int device = 0, sms = 1;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);

    Plan plan = {};
    plan.channel_tiles = ceil_div(problem.N, v.channels);
    plan.token_tiles = ceil_div(problem.M, v.tokens);
    plan.split = parts_of(id, layout, problem.K);
    if (plan.token_tiles > split_token_tiles(v, plan.split, problem.N)) plan.split = 1;
    plan.group = sms < 32 ? 8 : 16;  // about as many bytes of W as of X for the CTAs that run together
    plan.y_reciprocal = 1.0f / problem.y_scale;
    const size_t tiles = static_cast<size_t>(plan.channel_tiles) * plan.token_tiles;
    if (plan.split > 1) {
        plan.partials = static_cast<int*>(problem.workspace);
        plan.arrivals = reinterpret_cast<unsigned*>(static_cast<char*>(problem.workspace) +
                                                    tiles * plan.split * v.tile_bytes());
        if (cudaMemsetAsync(plan.arrivals, 0, tiles * sizeof(unsigned), stream) != cudaSuccess) return PQ_CUDA_ERROR;
    }
    cudaError_t error =
        cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared);
    if (error == cudaSuccess) {
        Gemm p = problem;
        void* arguments[] = {&p, &plan};
        error = cudaLaunchKernel(kernel.function, dim3(static_cast<unsigned>(tiles), plan.split), dim3(v.threads()),
                                 arguments, kernel.shared, stream);
    }
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
        cudaGetLastError();  // the caller may have another kernel: no error to leave behind
        return PQ_NOT_BUILT;
    }
    return error == cudaSuccess ? PQ_OK : PQ_CUDA_ERROR;
}

}  // namespace

const Family& mma_family() {
    static const Family family = {"mma", kFirstId, variants, variant_name, workspace, launch};
    return family;
}

}  // namespace pq
