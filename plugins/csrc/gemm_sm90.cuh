// The Hopper prefill GEMM, device side: Y^T = W X^T on wgmma, with the weights as the operand in registers.
//
// A CTA computes tiles of 128 output channels x kTokens tokens, 128 deep a step. One warp feeds a ring of shared-memory
// stages with tensor copies; two warpgroups of 64 channels each multiply. Why so:
//   * Unpacked weights need never go back to memory: wgmma takes its A operand from registers, and the packed layout is
//     the order in which it wants them, so a stage costs a warp two 16-byte loads a lane and 24 integer instructions.
//   * Weights still pass through shared memory, not straight into registers: the copy engine then hides the latency of
//     HBM without registers, and a copy can serve several CTAs. 8 KB a stage is little beside the tokens' 32 KB.
//   * At 128 x 256 a CTA at full speed wants 40 bytes a clock from L2, more than the chip gives to every SM at once.
//     CTAs of a cluster therefore share: `x_share` neighbours along the channels load each a part of one token tile and
//     multicast it, `w_share` neighbours along the tokens do so with one weight tile.
//   * The grid is persistent and the producer runs ahead into the next tile. The first warpgroup is kept kLead steps in
//     front of the second: while one stores its results, the other has the tensor cores for itself.
//   * For few tokens `k_split` CTAs of a cluster divide k, and send each other their int32 sums through distributed
//     shared memory: exact in any order, no workspace, nothing to clear.
//   * The next kernel of the stream is let in early (overlap.cuh): if it is one of these, its barriers are set up, its
//     CTAs in place and perhaps its first weights on their way when this one ends.
#pragma once

#include "common.cuh"
#include "gemm_sm90_store.cuh"
#include "overlap.cuh"
#include "sm90.cuh"

namespace pq {
namespace sm90 {

constexpr int kChannels = 128;                       // output channels a CTA tile
constexpr int kDepth = 128;                          // k a stage: one swizzled row of 128 bytes a token
constexpr int kConsumers = 256;                      // threads that multiply: two warpgroups
constexpr int kThreads = kConsumers + 128;           // and the producer: one thread, but registers move by warpgroups
// A CTA of three warpgroups starts with 168 registers a thread, and gets no more: asking for more would wait forever.
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 3 * 168);
constexpr int kBand = 8;                             // token tiles that are walked together, see locate()
constexpr int kLead = 3;                             // k steps, odd
constexpr int kLeadBarrier = 3;                      // id of the named barrier that keeps the lead
constexpr int kMaxSplit = 8;                         // CTAs that divide k

struct Launch {
    Gemm gemm;
    float y_reciprocal;             // 1 / y_scale
    int x_share, w_share, k_split;  // the cluster: x_share * w_share * k_split CTAs
    int tiles_m, tiles_n;           // in tiles of a cluster: w_share * kTokens tokens, x_share * 128 channels
    int early_steps;                // of a CTA's first, whose weights do not wait for the kernels before
    // What the CTAs that divide k do: each its steps of kDepth, and in the end each its blocks of eight tokens. As
    // tables, since divisions at a kernel's start take as long as some of its steps.
    int first_step[kMaxSplit + 1];
    int first_block[kMaxSplit + 1];
};

// ---- Division of k: blocks of eight tokens are shared out among the CTAs, each gets the others' sums of its own. ----

constexpr int kBlockBytes = kConsumers * 16;  // a block's sums, four a thread
constexpr int first_block(int tokens, int k_split, int k) { return (k * (tokens / 8) + k_split - 1) / k_split; }
constexpr int receive_bytes(int tokens, int k_split) {
    return (k_split - 1) * ((tokens / 8 + k_split - 1) / k_split) * kBlockBytes;
}
constexpr int receive_capacity(int tokens) {
    return tokens == 256 ? 0 : tokens == 128 ? receive_bytes(128, 4) : receive_bytes(64, 8);
}

template <int kLayout, int kTokens>
struct Tile {
    static constexpr int kRowTileBytes = kLayout == PQ_LAYOUT_S8 ? 1024 : 2048;  // 16 channels, 128 deep
    static constexpr int kXBytes = kTokens * kDepth;
    static constexpr int kWBytes = kChannels / 16 * kRowTileBytes;
    static constexpr int kStageBytes = kXBytes + kWBytes;
    static constexpr int kStagingBytes = 2 * sizeof(Staging<kTokens>);
    static constexpr int kReceiveBytes = receive_capacity(kTokens);
    static constexpr int kBudget = 227 * 1024;
    static constexpr int kStages = (kBudget - kStagingBytes - kReceiveBytes - 512) / kStageBytes;
    static constexpr int kWOffset = kStages * kXBytes;
    static constexpr int kStagingOffset = kStages * kStageBytes;
    static constexpr int kReceiveOffset = kStagingOffset + kStagingBytes;
    static constexpr int kBarrierOffset = kReceiveOffset + kReceiveBytes;  // kStages full, kStages empty, one received
    static constexpr int kSharedBytes = kBarrierOffset + (2 * kStages + 1) * 8;
    static_assert(kStages > kLead && kSharedBytes <= kBudget);
};

// A CTA's place in its cluster.
struct Seat {
    int n, m, k;
    __device__ Seat() {
        const int3 v = cta_in_cluster();
        n = v.x, m = v.y, k = v.z;
    }
};
__device__ __forceinline__ int rank_of(const Launch& launch, int n, int m, int k) {
    return (k * launch.w_share + m) * launch.x_share + n;
}

template <int kStages>
struct Ring {
    int stage = 0;
    uint32_t parity = 0;
    __device__ void advance() {
        if (++stage == kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// Order of tiles: bands of kBand token tiles, in a band the channels outside, so that what runs at one time is roughly
// square and its tokens and weights are read from L2 rather than from HBM.
__device__ __forceinline__ void locate(const Launch& launch, int index, int& tile_m, int& tile_n) {
    if (launch.tiles_m == 1) {
        tile_m = 0, tile_n = index;
        return;
    }
    const int first = index / (kBand * launch.tiles_n) * kBand;
    const int height = min(kBand, launch.tiles_m - first), inside = index - first * launch.tiles_n;
    tile_m = first + inside % height, tile_n = inside / height;
}

// ---- Producer: one thread -----------------------------------------------------------------------------------------

template <typename T>
__device__ __forceinline__ void produce(const Launch& launch, const Seat& seat, const CUtensorMap* x_map,
                                        const CUtensorMap* w_map, uint32_t shared, int tokens) {
    const int x_rows = tokens / launch.x_share, w_rows = kChannels / 16 / launch.w_share;  // this CTA's part of a tile
    uint32_t x_mask = 0, w_mask = 0;
    for (int i = 0; i < launch.x_share; ++i) x_mask |= 1u << rank_of(launch, i, seat.m, seat.k);
    for (int i = 0; i < launch.w_share; ++i) w_mask |= 1u << rank_of(launch, seat.n, i, seat.k);
    const int begin = launch.first_step[seat.k], end = launch.first_step[seat.k + 1];
    const uint32_t full = shared + T::kBarrierOffset, empty = full + 8 * T::kStages;
    const uint32_t x_part = shared + seat.n * x_rows * kDepth;
    const uint32_t w_part = shared + T::kWOffset + seat.m * w_rows * T::kRowTileBytes;
    const auto load_w = [&](int step, int stage, int row) {
        const uint32_t to = w_part + stage * T::kWBytes, ready = full + 8 * stage;
        const int column = step * (T::kRowTileBytes / 8);  // w_map counts words of 8 bytes
        if (launch.w_share > 1) {
            load_box_multicast(to, w_map, column, row, ready, static_cast<uint16_t>(w_mask));
        } else {
            load_box(to, w_map, column, row, ready);
        }
    };
    Ring<T::kStages> ring;
    int early = min(min(launch.early_steps, T::kStages), end - begin);
    if (early == 0) wait_for_previous_kernels();
    for (int index = cluster_index(); index < launch.tiles_m * launch.tiles_n; index += cluster_count()) {
        int tile_m, tile_n;
        locate(launch, index, tile_m, tile_n);
        const int x_row = (tile_m * launch.w_share + seat.m) * tokens + seat.n * x_rows;
        const int w_row = (tile_n * launch.x_share + seat.n) * (kChannels / 16) + seat.m * w_rows;
        if (early > 0) {
            for (int i = 0; i < early; ++i) {
                barrier_arrive_expect(full + 8 * i, T::kStageBytes);
                load_w(begin + i, i, w_row);
            }
            wait_for_previous_kernels();
        }
        for (int step = begin; step < end; ++step, ring.advance()) {
            const uint32_t to = x_part + ring.stage * T::kXBytes, ready = full + 8 * ring.stage;
            if (--early < 0) {
                barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);  // the first round finds all stages free
                barrier_arrive_expect(ready, T::kStageBytes);
                load_w(step, ring.stage, w_row);
            }
            if (launch.x_share > 1) {
                load_box_multicast(to, x_map, step * kDepth, x_row, ready, static_cast<uint16_t>(x_mask));
            } else {
                load_box(to, x_map, step * kDepth, x_row, ready);
            }
        }
    }
    // Stay until every copy has been read everywhere: then nobody will arrive at this CTA's barriers any more.
    for (int i = 0; i < T::kStages; ++i, ring.advance()) barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
}

// ---- Consumers: two warpgroups ------------------------------------------------------------------------------------

// A warp's weights of one stage, 16 channels x 128: the A operands of four k steps of 32.
template <int kLayout>
__device__ __forceinline__ void load_weights(uint32_t (&a)[16], const uint8_t* shared) {
    constexpr int kLoads = kLayout == PQ_LAYOUT_S8 ? 2 : 4;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
        const uint4 v = *reinterpret_cast<const uint4*>(shared + i * 512);
        const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            if (kLayout == PQ_LAYOUT_S8) {
                unpack_s8x16(words[r], a[8 * i + r], a[8 * i + 4 + r]);
            } else {
                a[4 * i + r] = words[r];
            }
        }
    }
}

// The CTAs of a cluster that divided k swap sums, after which each has the whole sums of its share of the tokens.
template <int kTokens>
__device__ __forceinline__ void swap_sums(const Launch& launch, const Seat& seat, int (&acc)[kTokens / 2],
                                          const uint8_t* received, uint32_t received_barrier) {
    const int others = launch.k_split - 1;
    const uint32_t mailbox = shared_address(received) + threadIdx.x * 16;
#pragma unroll
    for (int block = 0; block < kTokens / 8; ++block) {
        const int owner = block * launch.k_split / (kTokens / 8);
        if (owner == seat.k) continue;
        const int size = launch.first_block[owner + 1] - launch.first_block[owner];
        const int slot = (seat.k - (seat.k > owner)) * size + block - launch.first_block[owner];
        const int rank = rank_of(launch, seat.n, seat.m, owner);
        send(address_in(mailbox + slot * kBlockBytes, rank), acc + 4 * block, address_in(received_barrier, rank));
    }
    barrier_wait_cluster(received_barrier, 0);
    const int begin = launch.first_block[seat.k], size = launch.first_block[seat.k + 1] - begin;
#pragma unroll
    for (int block = 0; block < kTokens / 8; ++block) {
        if (block < begin || block >= begin + size) continue;
        for (int i = 0; i < others; ++i) {
            const int4 v = *reinterpret_cast<const int4*>(received + threadIdx.x * 16 +
                                                          (i * size + block - begin) * kBlockBytes);
            acc[4 * block] += v.x, acc[4 * block + 1] += v.y, acc[4 * block + 2] += v.z, acc[4 * block + 3] += v.w;
        }
    }
}

template <int kLayout, int kTokens>
__device__ __forceinline__ void consume(const Launch& launch, const Seat& seat, uint8_t* shared) {
    using T = Tile<kLayout, kTokens>;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp / 4;
    // A stage is free when all who get this CTA's copies have read theirs: so tell all CTAs whose copies we get.
    const int peers = launch.x_share + launch.w_share - 1, along_m = lane - launch.x_share;
    const int peer = lane < launch.x_share ? rank_of(launch, lane, seat.m, seat.k)
                                           : rank_of(launch, seat.n, along_m + (along_m >= seat.m), seat.k);
    const uint32_t full = shared_address(shared) + T::kBarrierOffset;
    const uint32_t peer_empty = address_in(full + 8 * T::kStages, peer);
    const uint8_t* weights = shared + T::kWOffset + warp * T::kRowTileBytes + lane * 16;
    const uint64_t tokens = tile_descriptor(shared_address(shared));
    Staging<kTokens>& staging = reinterpret_cast<Staging<kTokens>*>(shared + T::kStagingOffset)[group];
    Ring<T::kStages> next, used;
    int acc[kTokens / 2];

    auto multiply = [&](uint32_t (&a)[16], int accumulate) {
        barrier_wait(full + 8 * next.stage, next.parity);
        load_weights<kLayout>(a, weights + next.stage * T::kWBytes);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            wgmma_s8(acc, a + 4 * i, tokens + next.stage * (T::kXBytes / 16) + 2 * i, accumulate | (i > 0));
        }
        wgmma_commit();
        next.advance();
    };
    auto release = [&] {
        if (lane < peers) barrier_arrive_at(peer_empty + 8 * used.stage);
        used.advance();
    };

    const int steps = launch.first_step[seat.k + 1] - launch.first_step[seat.k];
    // With fewer steps than stages the first warpgroup could get a whole tile ahead and arrive twice.
    const bool staggered = kTokens >= 64 && launch.k_split == 1 && steps >= T::kStages;
    for (int index = cluster_index(); index < launch.tiles_m * launch.tiles_n; index += cluster_count()) {
        int tile_m, tile_n;
        locate(launch, index, tile_m, tile_n);
        const int m0 = (tile_m * launch.w_share + seat.m) * kTokens;
        const int n0 = (tile_n * launch.x_share + seat.n) * kChannels + group * kGroupChannels;
        Target target = {n0, m0, m0, min(launch.gemm.M, m0 + kTokens)};
        const Factors<kTokens> factors = load_factors<kTokens>(launch.gemm, target);
        // Two sets of registers: while the multiplications of one step read theirs, the next step's are unpacked.
        uint32_t even[16], odd[16];
        if (staggered && group == 1) named_barrier_sync(kLeadBarrier, kConsumers);
        for (int step = 0; step < steps; step += 2) {
            multiply(even, step > 0);
            wgmma_wait<1>();
            if (step > 0) release();
            if (staggered && group == 0 && step == kLead - 1) named_barrier_arrive(kLeadBarrier, kConsumers);
            if (step + 1 == steps) break;
            multiply(odd, 1);
            wgmma_wait<1>();
            release();
        }
        wgmma_wait<0>();
        pin(acc);
        release();
        if constexpr (T::kReceiveBytes > 0) {
            if (launch.k_split > 1) {
                swap_sums<kTokens>(launch, seat, acc, shared + T::kReceiveOffset, full + 16 * T::kStages);
                target.first = m0 + 8 * launch.first_block[seat.k];
                target.last = min(target.last, m0 + 8 * launch.first_block[seat.k + 1]);
            }
        }
        store_tile<kUnit<kLayout>>(launch.gemm, launch.y_reciprocal, factors, acc, staging, target);
    }
}

template <int kLayout, int kTokens>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
                const __grid_constant__ Launch launch) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using T = Tile<kLayout, kTokens>;
    extern __shared__ __align__(1024) uint8_t shared[];
    const Seat seat;
    if (threadIdx.x == 0) {
        const uint32_t barriers = shared_address(shared) + T::kBarrierOffset;
        const int readers = kConsumers / 32 * (launch.x_share + launch.w_share - 1);
        for (int i = 0; i < T::kStages; ++i) {
            barrier_init(barriers + 8 * i, 1);
            barrier_init(barriers + 8 * (T::kStages + i), readers);
        }
        barrier_init(barriers + 16 * T::kStages, 1);
        barrier_init_fence();
        const int blocks = launch.first_block[seat.k + 1] - launch.first_block[seat.k];
        barrier_arrive_expect(barriers + 16 * T::kStages, (launch.k_split - 1) * blocks * kBlockBytes);
    } else if (threadIdx.x == kConsumers) {
        prefetch_map(&w_map);
        prefetch_map(&x_map);
    }
    __syncwarp();
    cluster_sync();
    let_next_kernel_start();
    if (threadIdx.x >= kConsumers) {
        drop_registers<kProducerRegisters>();
        if (threadIdx.x == kConsumers) produce<T>(launch, seat, &x_map, &w_map, shared_address(shared), kTokens);
    } else {
        take_registers<kConsumerRegisters>();
        wait_for_previous_kernels();  // they may have written row scales and residual, and read or written y
        consume<kLayout, kTokens>(launch, seat, shared);
    }
#endif
}

}  // namespace sm90
}  // namespace pq
