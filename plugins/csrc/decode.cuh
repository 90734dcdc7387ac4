// The decode kernel: up to 16 tokens, bound by the bytes of the weights, which are read once, straight into registers.
//
// Weights are the 16-row A operand, tokens the n = 8 columns. A CTA owns a slice of K and walks over groups of kRows x
// 16 output channels; its slice of x stays in shared memory. A warp takes one row of tiles and every kAlongK-th step of
// K; the warps' int32 sums meet in shared memory, those of the slices in the shared memory of a cluster's CTAs: integer
// sums are exact in any order, so there is no workspace, no atomic, and one result.
//
// What decides the speed is how many bytes are on their way at every moment. Each lane keeps eight 16-byte loads in a
// ring of registers, 64 KB a multiprocessor, and refills a slot as soon as it is used, with the next group's weights at
// the end of a group: the loads run through the sums, the barriers and the stores.
//
// Next comes x: small, but every CTA reads it, and with 16 tokens that is as much as the weights of a small matrix
// (measured on an H100: 0.24 us for each MB that all CTAs together copy out of L2). So on sm_90 and later there are
// shapes whose CTAs share what they copy in a cluster, each some rows, multicast to all; the copy engine then reports x
// piece by piece to the slots that multiply it.
//
// There, too, the next kernel is let in early (overlap.cuh). Where it is another of these, its rings are full when x
// comes: the weights of one call stream through the sums and the stores of the one before.
#pragma once

#include "codes.cuh"
#include "overlap.cuh"
#include "sm90.cuh"

namespace pq {

inline constexpr int kStepBytes = 64;  // of a row of x: what one ldmatrix.x4 takes of 8 tokens
inline constexpr int kTileBytes = 512;
inline constexpr int kRowPad = 16;     // between rows of x: the 8 rows of an ldmatrix fall into different banks
inline constexpr int kSumStride = 20;  // ints between tokens of a warp's 16 sums: lanes write to 32 different banks

template <int kLayout_, int kTokens_, int kRows_, int kWarps_>
struct DecodeShape {
    static constexpr int kLayout = kLayout_;
    static constexpr int kTokens = kTokens_;  // 8 or 16: columns of the products
    static constexpr int kRows = kRows_;      // rows of 16 channels in a group
    static constexpr int kWarps = kWarps_;
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kCtas = 16 / kWarps;  // of a multiprocessor
    static constexpr int kChannels = 16 * kRows;
    static constexpr int kAlongK = kWarps / kRows;
    // int4 tiles for int8 products hold 64 columns, which are 64 bytes of x; the other layouts' tiles are 32 bytes of
    // x.
    static constexpr int kStepTiles = kLayout == PQ_LAYOUT_S8 ? 1 : 2;
    static constexpr int kDepth = 8 / kStepTiles;         // slots of the ring: steps of a warp on their way
    static constexpr int kBatchSteps = kAlongK * kDepth;  // steps that all warps' rings cover
    static constexpr int kPieceSlots = 2;                 // whose x is waited for at once
    static constexpr int kPieces = kDepth / kPieceSlots;  // of a batch
    static constexpr int kPieceBytes = kPieceSlots * kAlongK * kStepBytes;  // of a row of x
    static constexpr int kSumBytes = kWarps * kTokens * kSumStride * 4;
};

// How a launch divides a problem.
struct DecodePlan {
    int tiles;         // weight tiles along K in a row of 16 channels
    int row_tiles;     // rows of 16 channels
    int groups;        // of kRows of them
    int log_splits;    // 2^log_splits slices of K, and
    int sharers;       // groups that share x: a cluster is slices x sharers CTAs, powers of two
    int share_mask;    // the CTAs of a cluster with slice 0, one bit each; 0 without sharers
    int log_channels;  // of a group, finished by one of the slices
    int slice_steps;
    int batches;        // of a slice, the last one perhaps in part
    int chunk_batches;  // whose x is in shared memory at a time: all, or some in one of two buffers
    int chunks;
    int pieces;   // of x that the copy engine brings, all of x; 0: the threads copy a chunk at a time
    int x_bytes;  // of a row of x
    Coder coder;  // of results that are quantized again
};

// Shared memory: x, the warps' sums, two buffers for the slices' sums, the barriers of x's pieces.
template <typename Shape>
__host__ __device__ constexpr int x_stride(int chunk_batches) {
    return chunk_batches * Shape::kBatchSteps * kStepBytes + kRowPad;
}
template <typename Shape>
__host__ __device__ constexpr int gather_bytes(int M, int splits) {
    return splits > 1 ? M * Shape::kChannels * 4 : 0;
}
template <typename Shape>
__host__ __device__ constexpr int decode_shared_bytes(int M, int splits, int batches, int chunk_batches, int pieces) {
    return (chunk_batches < batches ? 2 : 1) * M * x_stride<Shape>(chunk_batches) + Shape::kSumBytes +
           2 * gather_bytes<Shape>(M, splits) + pieces * 8;
}

namespace decode {

// A lane's 16 bytes of a tile, or zeros. Not kept in L1: nothing reads them again.
__device__ __forceinline__ void load_tile(uint32_t (&d)[4], const char* at, bool valid) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %5, 0;\n"
        "mov.b32 %0, 0;\n"
        "mov.b32 %1, 0;\n"
        "mov.b32 %2, 0;\n"
        "mov.b32 %3, 0;\n"
        "@p ld.global.nc.L1::no_allocate.v4.b32 {%0,%1,%2,%3}, [%4];\n"
        "}\n"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "l"(at), "r"(static_cast<int>(valid)));
}

// A load that stays where it is written, long before its use: scales come from DRAM as the weights do.
__device__ __forceinline__ float load_early(const float* at) {
    float v;
    asm volatile("ld.global.nc.f32 %0, [%1];\n" : "=f"(v) : "l"(at));
    return v;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
// Not .aligned: the lanes of a warp may come here apart.
__device__ __forceinline__ void cluster_started() { asm volatile("barrier.cluster.arrive.relaxed;\n" ::: "memory"); }
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;\n" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;\n" ::: "memory"); }

__device__ __forceinline__ void prefetch(const float* at) { asm volatile("prefetch.global.L2 [%0];\n" ::"l"(at)); }

// `remote`: from address_in.
__device__ __forceinline__ void store_remote(uint32_t remote, const int4& v) {
    asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(remote), "r"(v.x), "r"(v.y), "r"(v.z),
                 "r"(v.w)
                 : "memory");
}

#endif

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
inline constexpr bool kCanShare = true;
// Starts a copy to the same place in the shared memory of those CTAs of the cluster that `mask` names; each one's
// barrier counts the bytes.
__device__ __forceinline__ void start_copy(uint32_t shared, const char* from, int bytes, uint32_t barrier, int mask) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
        "\n" ::"r"(shared),
        "l"(from), "r"(bytes), "r"(barrier), "h"(static_cast<uint16_t>(mask))
        : "memory");
}
__device__ __forceinline__ void wait_for_piece(uint32_t barriers, int piece) {
    sm90::barrier_wait(barriers + 8 * piece, 0);
}
#else  // other GPUs are never given a shape that shares
inline constexpr bool kCanShare = false;
__device__ __forceinline__ void wait_for_piece(uint32_t, int) {}
#endif

__device__ __forceinline__ int4 add_parts(const int4* part, int count, int stride) {
    int4 sum = {};
    for (int i = 0; i < count; ++i) {
        const int4 v = part[i * stride / 4];
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    return sum;
}
__device__ __forceinline__ int add_parts(const int* part, int count, int stride) {
    int sum = 0;
#pragma unroll 4
    for (int i = 0; i < count; ++i) sum += part[i * stride];
    return sum;
}

struct Channel {
    int n;
    float scale, bias;
};

template <typename T, int kUnitOf>
__device__ __forceinline__ void store_as(const Gemm& p, const Channel& c, int acc, int m) {
    static_cast<T*>(p.y)[static_cast<size_t>(m) * p.N + c.n] =
        from_float<T>(result<kUnitOf, T>(p, acc, m, c.n, c.scale, c.bias));
}

// One result. All lanes of a warp come here, even lanes with even channels: a byte of packed int4 takes two lanes'
// codes.
template <int kUnitOf>
__device__ __forceinline__ void finish(const Gemm& p, const Coder& coder, const Channel& c, int acc, int m,
                                       bool inside) {
    const size_t at = static_cast<size_t>(m) * p.N + c.n;
    if (p.y_type == PQ_S8 || p.y_type == PQ_S4) {
        uint32_t code = 0;
        if (inside) code = coder(result<kUnitOf, float>(p, acc, m, c.n, c.scale, c.bias));
        const uint32_t next = __shfl_xor_sync(0xffffffffu, code, 1);
        if (!inside) return;
        if (p.y_type == PQ_S8) {
            static_cast<uint8_t*>(p.y)[at] = static_cast<uint8_t>(code);
        } else if (c.n % 2 == 0) {
            static_cast<uint8_t*>(p.y)[at / 2] = static_cast<uint8_t>((code & 15) | next << 4);
        }
        return;
    }
    if (!inside) return;
    switch (p.y_type) {
        case PQ_F16: return store_as<__half, kUnitOf>(p, c, acc, m);
        case PQ_BF16: return store_as<__nv_bfloat16, kUnitOf>(p, c, acc, m);
        case PQ_F32: return store_as<float, kUnitOf>(p, c, acc, m);
        default: static_cast<int*>(p.y)[at] = acc / kUnitOf;
    }
}

}  // namespace decode

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kCtas)
    decode_kernel(const __grid_constant__ Gemm p, const __grid_constant__ DecodePlan plan) {
    using namespace decode;
    constexpr int kRows = Shape::kRows, kTokens = Shape::kTokens, kStepTiles = Shape::kStepTiles;
    constexpr int kChannels = Shape::kChannels;
    constexpr int kUnitOf = kUnit<Shape::kLayout>;
    extern __shared__ __align__(16) unsigned char shared[];

    let_next_kernel_start();
    const int splits = 1 << plan.log_splits, slice = blockIdx.x & (splits - 1), sharer = blockIdx.x >> plan.log_splits;
    const int first_group = blockIdx.y * plan.sharers + sharer, group_step = gridDim.y * plan.sharers;
    const int row = threadIdx.x / 32 % kRows, along_k = threadIdx.x / 32 / kRows;
    const int first_step = slice * plan.slice_steps;
    const int slice_tiles = min(plan.slice_steps * kStepTiles, plan.tiles - first_step * kStepTiles);  // or negative

    const int stride = x_stride<Shape>(plan.chunk_batches), x_buffer = p.M * stride;
    const bool chunked = plan.chunks > 1;
    int* const sums = reinterpret_cast<int*>(shared + (chunked ? 2 : 1) * x_buffer);
    int* const gather = sums + Shape::kSumBytes / 4;
    const int gather_buffer = gather_bytes<Shape>(p.M, splits) / 4;
    const uint32_t x_barriers = sm90::shared_address(gather + 2 * gather_buffer);

    // Where the ring reads next: this warp's first tile of a batch, counted in the slice, and the count's limit.
    const char* weights_at;
    int tile, tile_limit;
    const auto open_group = [&](int group) {
        const int row_tile = group * kRows + row;
        tile = along_k * kStepTiles;
        tile_limit = row_tile < plan.row_tiles ? slice_tiles : 0;
        weights_at = static_cast<const char*>(p.w) + threadIdx.x % 32 * 16 +
                     (static_cast<size_t>(row_tile) * plan.tiles + first_step * kStepTiles + tile) * kTileBytes;
    };
    uint32_t ring[Shape::kDepth][kStepTiles][4];
    const auto fill = [&](int slot) {
#pragma unroll
        for (int i = 0; i < kStepTiles; ++i) {
            const int offset = slot * Shape::kAlongK * kStepTiles + i;
            load_tile(ring[slot][i], weights_at + offset * kTileBytes, tile + offset < tile_limit);
        }
    };
    open_group(first_group);
#pragma unroll
    for (int slot = 0; slot < Shape::kDepth; ++slot) fill(slot);

    // The channel of a group that this thread finishes.
    const auto channel_of = [&](int group) {
        return group * kChannels + (slice << plan.log_channels) + (thread_index() & ((1 << plan.log_channels) - 1));
    };
    const int pieces = kCanShare ? plan.pieces : 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
    if (pieces) {
        if (threadIdx.x % 32 == 0)  // a few barriers for each warp
            for (int i = threadIdx.x / 32; i < pieces; i += Shape::kWarps) sm90::barrier_init(x_barriers + 8 * i, 1);
        sm90::barrier_init_fence();
        __syncthreads();
    }
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (gridDim.x > 1) cluster_started();  // waited for before the first access to another CTA
    if (const int n = channel_of(first_group); n < p.N && p.y_type != PQ_S32) {
        prefetch(p.scale + n);  // loads would occupy registers that the ring needs
        if (p.bias) prefetch(p.bias + n);
    }
#endif
    wait_for_previous_kernels();  // weights and scales are constants; x, row scales, residual and y are not
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
    if (pieces) {
        cluster_wait();
        // Lane m copies row m, or another sharer's lane m does. Behind the rows' ends nothing is copied: what lies
        // there is multiplied by weights that are zero.
        const int m = threadIdx.x;
        for (int i = 0; i < pieces && m < p.M; ++i) {
            const int begin = first_step * kStepBytes + i * Shape::kPieceBytes;
            const int bytes = min(Shape::kPieceBytes, max(0, plan.x_bytes - begin));
            if (m == 0) sm90::barrier_arrive_expect(x_barriers + 8 * i, p.M * bytes);
            if ((m & (plan.sharers - 1)) == sharer && bytes > 0)
                start_copy(sm90::shared_address(shared) + m * stride + i * Shape::kPieceBytes,
                           static_cast<const char*>(p.x) + static_cast<size_t>(m) * plan.x_bytes + begin, bytes,
                           x_barriers + 8 * i, plan.share_mask << slice);
        }
    }
#endif

    // A chunk of this slice of x, zeros behind the rows' ends. A batch at a time: its words are a constant power of
    // two.
    const auto copy_chunk = [&](int chunk, int buffer) {
        constexpr int kBatchBytes = Shape::kBatchSteps * kStepBytes, kWords = kBatchBytes / 16;
#pragma unroll 1
        for (int batch = 0; batch < plan.chunk_batches; ++batch) {
            const int begin = first_step * kStepBytes + (chunk * plan.chunk_batches + batch) * kBatchBytes;
            unsigned char* const to = shared + buffer * x_buffer + batch * kBatchBytes;
#pragma unroll 1
            for (int i = threadIdx.x; i < p.M * kWords; i += Shape::kThreads) {
                const int m = i / kWords, at = i % kWords * 16;
                const bool inside = begin + at < plan.x_bytes;
                const char* row_of_x = static_cast<const char*>(p.x) + static_cast<size_t>(m) * plan.x_bytes;
                cp_async_16(to + m * stride + at, row_of_x + (inside ? begin + at : 0), inside);
            }
        }
        cp_async_commit();
    };
    if (!pieces) copy_chunk(0, 0);

    // Lanes 8 i..8 i + 7 address the tokens' bytes 16 i..16 i + 15 of a step; tokens that do not exist repeat the last.
    int x_lane[kTokens / 8];
#pragma unroll
    for (int i = 0; i < kTokens / 8; ++i)
        x_lane[i] = min(8 * i + static_cast<int>(threadIdx.x) % 8, p.M - 1) * stride +
                    static_cast<int>(threadIdx.x) % 32 / 8 * 16 + along_k * kStepBytes;

    int next_chunk = 1, buffer = chunked ? 1 : 0;
    [[maybe_unused]] int turn = 0;  // of the slices' buffers
    // All CTAs of a cluster take as many turns, if some only for company: they meet at every one.
    for (int group = first_group; group - sharer < plan.groups; group += group_step) {
        Channel channel = {channel_of(group), 0.0f, -0.0f};
        if (channel.n < p.N && p.y_type != PQ_S32) {
            channel.scale = load_early(p.scale + channel.n);
            if (p.bias) channel.bias = load_early(p.bias + channel.n);
        }
        const bool x_is_new = group == first_group, wait_for_pieces = x_is_new && pieces > 0;

        int acc[kTokens / 8][2][4] = {};  // two sets: a product waits for the one before the last
        for (int batch = 0, in_chunk = 0; batch < plan.batches; ++batch, ++in_chunk) {
            if (in_chunk == plan.chunk_batches) in_chunk = 0;
            if (!pieces && in_chunk == 0 && (chunked || x_is_new)) {
                cp_async_wait<0>();
                __syncthreads();
                if (chunked) {  // the other buffer has been read
                    copy_chunk(next_chunk, buffer);
                    next_chunk = next_chunk + 1 < plan.chunks ? next_chunk + 1 : 0;
                    buffer ^= 1;
                }
            }
            if (batch + 1 < plan.batches) {
                tile += Shape::kBatchSteps * kStepTiles;
                weights_at += Shape::kBatchSteps * kStepTiles * kTileBytes;
            } else {
                open_group(group + group_step);
            }
            const int x_offset = buffer * x_buffer + in_chunk * (Shape::kBatchSteps * kStepBytes);
#pragma unroll
            for (int slot = 0; slot < Shape::kDepth; ++slot) {
                if (slot % Shape::kPieceSlots == 0 && wait_for_pieces)
                    wait_for_piece(x_barriers, batch * Shape::kPieces + slot / Shape::kPieceSlots);
                uint32_t a[2][4];
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    if constexpr (Shape::kLayout == PQ_LAYOUT_S8) {
                        unpack_s8x16(ring[slot][0][r], a[0][r], a[1][r]);
                    } else {
                        a[0][r] = ring[slot][0][r], a[1][r] = ring[slot][1][r];
                    }
                }
#pragma unroll
                for (int i = 0; i < kTokens / 8; ++i) {
                    uint32_t b[4];
                    ldmatrix_x4(b, shared + x_lane[i] + x_offset + slot * Shape::kAlongK * kStepBytes);
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        if constexpr (Shape::kLayout == PQ_LAYOUT_S4) {
                            mma_s4(acc[i][half], a[half], b[2 * half], b[2 * half + 1]);
                        } else {
                            mma_s8(acc[i][half], a[half], b[2 * half], b[2 * half + 1]);
                        }
                    }
                }
                fill(slot);
            }
        }

        if (group != first_group) __syncthreads();  // the group before has read its sums
        const int thread = thread_index(), warp = thread / 32, lane = thread % 32;
#pragma unroll
        for (int i = 0; i < kTokens / 8; ++i)
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const int token = 8 * i + 2 * (lane % 4) + c % 2, of_row = lane / 4 + 8 * (c / 2);
                sums[(warp * kTokens + token) * kSumStride + of_row] = acc[i][0][c] + acc[i][1][c];
            }
        __syncthreads();

        const int own = (slice << plan.log_channels) + (thread & ((1 << plan.log_channels) - 1));
        // Where a token's sums lie, their parts apart by part_stride: this CTA's warps' sums, or the slices'.
        const int* parts = sums + own / 16 * (kTokens * kSumStride) + own % 16;
        int part_count = Shape::kAlongK, part_stride = kRows * kTokens * kSumStride, token_stride = kSumStride;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        if (splits > 1) {
            // Each slice finishes some of the channels, and gets the others' sums four at a time. Two buffers: who has
            // met the others at this turn knows that they have read the buffer of the turn before, not this one's.
            if (group == first_group && !pieces) cluster_wait();
            const int own_channels = 1 << plan.log_channels;
            int* const buffer_now = gather + (turn & 1) * gather_buffer;
            constexpr int kQuads = kChannels / 4;
            for (int i = thread; i < p.M * kQuads; i += Shape::kThreads) {
                const int at = i % kQuads * 4, m = i / kQuads, owner = sharer * splits + (at >> plan.log_channels);
                const int* from = sums + at / 16 * (kTokens * kSumStride) + at % 16 + m * kSumStride;
                const int* to = buffer_now + (slice * p.M + m) * own_channels + (at & (own_channels - 1));
                store_remote(sm90::address_in(sm90::shared_address(to), owner),
                             add_parts(reinterpret_cast<const int4*>(from), part_count, part_stride));
            }
            cluster_arrive();
            cluster_wait();
            parts = buffer_now + (own & (own_channels - 1));
            part_count = splits, part_stride = p.M * own_channels, token_stride = own_channels;
            ++turn;
        }
#endif
        const int token_step = Shape::kThreads >> plan.log_channels;
        for (int first = 0; first < p.M; first += token_step) {
            const int m = first + (thread >> plan.log_channels);
            const bool inside = m < p.M && channel.n < p.N;
            const int acc_sum = inside ? add_parts(parts + m * token_stride, part_count, part_stride) : 0;
            finish<kUnitOf>(p, plan.coder, channel, acc_sum, m, inside);
        }
    }
}

}  // namespace pq
