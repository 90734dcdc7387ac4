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
//   * For few tokens `k_split` CTAs of a cluster divide k, and add their int32 sums through distributed shared memory:
//     exact in any order, no workspace, nothing to clear.
#pragma once

#include "common.cuh"
#include "gemm_sm90_store.cuh"
#include "sm90.cuh"

namespace pq {
namespace sm90 {

constexpr int kChannels = 128;                       // output channels a CTA tile
constexpr int kDepth = 128;                          // k a stage: one swizzled row of 128 bytes a token
constexpr int kConsumers = 256;                      // threads that multiply: two warpgroups
constexpr int kThreads = kConsumers + 128;           // and the producer: one thread, but registers move by warpgroups
// A CTA of three warpgroups starts with 168 registers a thread and gets no more: asking for more would wait forever.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 3 * 168);
constexpr int kBand = 8;                             // token tiles that are walked together, see locate()
constexpr int kLead = 3;                             // k steps, odd
enum { kConsumerBarrier = 1, kLeadBarrier = 2, kGroupBarrier = 3 };  // ids of named barriers; 0 is __syncthreads

struct Launch {
    Gemm gemm;
    int x_share, w_share, k_split;  // the cluster: x_share * w_share * k_split CTAs
    int tiles_m, tiles_n;           // in tiles of a cluster: w_share * kTokens tokens, x_share * 128 channels
    int k_steps;                    // of kDepth
};

template <int kLayout, int kTokens>
struct Tile {
    static constexpr int kRowTileBytes = kLayout == PQ_LAYOUT_S8 ? 1024 : 2048;  // 16 channels, 128 deep
    static constexpr int kXBytes = kTokens * kDepth;
    static constexpr int kWBytes = kChannels / 16 * kRowTileBytes;
    static constexpr int kStageBytes = kXBytes + kWBytes;
    // Results are turned around through shared memory, kRound tokens x 64 channels a time and warpgroup. The pitch puts
    // the lanes of a store (8 channels, every second token) into 32 different banks, and those of a 16-byte load too.
    static constexpr int kRound = kTokens >= 32 ? 32 : 16;
    static constexpr int kPitch = 68;
    static constexpr int kStagingBytes = 2 * kRound * kPitch * 4;
    static constexpr int kBudget = 227 * 1024;
    static constexpr int kStages = (kBudget - kStagingBytes - 256) / kStageBytes;
    static constexpr int kWOffset = kStages * kXBytes;
    static constexpr int kStagingOffset = kStages * kStageBytes;
    static constexpr int kBarrierOffset = kStagingOffset + kStagingBytes;
    static constexpr int kSharedBytes = kBarrierOffset + 2 * kStages * 8;
    // k_split: the sums of a whole tile, in the memory of the stages. Same bank argument as kPitch.
    static constexpr int kSumPitch = kChannels + 4;
    static_assert(kStages > kLead && kTokens * kSumPitch * 4 <= kStagingOffset && kSharedBytes <= kBudget);
};

// A CTA's place in its cluster.
struct Seat {
    int n, m, k, first;  // `first`: rank of the first CTA with the same k
    __device__ explicit Seat(const Launch& launch) {
        const int rank = static_cast<int>(cluster_rank()), plane = launch.x_share * launch.w_share;
        k = rank / plane;
        first = k * plane;
        m = (rank - first) / launch.x_share;
        n = (rank - first) % launch.x_share;
    }
    __device__ int rank_of(const Launch& launch, int m_of, int n_of) const {
        return first + m_of * launch.x_share + n_of;
    }
};

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
    const int band = index / (kBand * launch.tiles_n), first = band * kBand;
    const int height = min(kBand, launch.tiles_m - first), inside = index - first * launch.tiles_n;
    tile_m = first + inside % height;
    tile_n = inside / height;
}

// ---- Producer: one thread -----------------------------------------------------------------------------------------

template <typename T>
__device__ __forceinline__ void produce(const Launch& launch, const Seat& seat, const CUtensorMap* x_map,
                                        const CUtensorMap* w_map, uint32_t shared, int tokens) {
    const int cluster = launch.x_share * launch.w_share * launch.k_split;
    const int x_rows = tokens / launch.x_share, w_rows = kChannels / 16 / launch.w_share;  // this CTA's part of a tile
    uint32_t x_mask = 0, w_mask = 0;
    for (int i = 0; i < launch.x_share; ++i) x_mask |= 1u << seat.rank_of(launch, seat.m, i);
    for (int i = 0; i < launch.w_share; ++i) w_mask |= 1u << seat.rank_of(launch, i, seat.n);
    const int begin = seat.k * launch.k_steps / launch.k_split, end = (seat.k + 1) * launch.k_steps / launch.k_split;
    const uint32_t full = shared + T::kBarrierOffset, empty = full + 8 * T::kStages;
    const uint32_t x_part = shared + seat.n * x_rows * kDepth;
    const uint32_t w_part = shared + T::kWOffset + seat.m * w_rows * T::kRowTileBytes;
    Ring<T::kStages> ring;
    for (int index = blockIdx.x / cluster; index < launch.tiles_m * launch.tiles_n; index += gridDim.x / cluster) {
        int tile_m, tile_n;
        locate(launch, index, tile_m, tile_n);
        const int x_row = (tile_m * launch.w_share + seat.m) * tokens + seat.n * x_rows;
        const int w_row = (tile_n * launch.x_share + seat.n) * (kChannels / 16) + seat.m * w_rows;
        for (int step = begin; step < end; ++step, ring.advance()) {
            const uint32_t ready = full + 8 * ring.stage;
            const uint32_t x_to = x_part + ring.stage * T::kXBytes, w_to = w_part + ring.stage * T::kWBytes;
            barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);  // the first round finds all stages free
            barrier_arrive_expect(ready, T::kStageBytes);
            const int x_column = step * kDepth, w_column = step * (T::kRowTileBytes / 8);  // w_map counts 8-byte words
            if (launch.w_share > 1) {
                load_box_multicast(w_to, w_map, w_column, w_row, ready, static_cast<uint16_t>(w_mask));
            } else {
                load_box(w_to, w_map, w_column, w_row, ready);
            }
            if (launch.x_share > 1) {
                load_box_multicast(x_to, x_map, x_column, x_row, ready, static_cast<uint16_t>(x_mask));
            } else {
                load_box(x_to, x_map, x_column, x_row, ready);
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

// A warpgroup's 64 channels x kTokens from its registers to y.
template <int kLayout, int kTokens>
__device__ __forceinline__ void store_tile(const Gemm& p, const Channels& c, int (&acc)[kTokens / 2], int* staging,
                                           int m0) {
    using T = Tile<kLayout, kTokens>;
    constexpr int kPasses = T::kRound / 16;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, group = threadIdx.x / 128;
    int* write = staging + lane % 4 * 2 * T::kPitch + warp * 16 + lane / 4;
    const int row = lane / 4 % 4 + 4 * warp;
    const int* read = staging + row * T::kPitch + (c.n % 64);
    uint4 residual[kPasses];
#pragma unroll
    for (int i = 0; i < kPasses; ++i) residual[i] = load_residual(p, c, m0 + row + 16 * i);
#pragma unroll 1
    for (int round = 0; round < kTokens / T::kRound && m0 + round * T::kRound < p.M; ++round) {
#pragma unroll
        for (int i = 0; i < kTokens / T::kRound; ++i) {  // registers have no run-time index
            if (i != round) continue;
#pragma unroll
            for (int j = 0; j < T::kRound / 2; ++j) {
                write[(j / 4 * 8 + (j & 1)) * T::kPitch + (j & 2) * 4] = acc[i * T::kRound / 2 + j];
            }
        }
        named_barrier_sync(kGroupBarrier + group, 128);
        int sums[kPasses][8];
#pragma unroll
        for (int i = 0; i < kPasses; ++i) {
            const int4 low = *reinterpret_cast<const int4*>(read + 16 * i * T::kPitch);
            const int4 high = *reinterpret_cast<const int4*>(read + 16 * i * T::kPitch + 4);
            sums[i][0] = low.x, sums[i][1] = low.y, sums[i][2] = low.z, sums[i][3] = low.w;
            sums[i][4] = high.x, sums[i][5] = high.y, sums[i][6] = high.z, sums[i][7] = high.w;
        }
        named_barrier_sync(kGroupBarrier + group, 128);
#pragma unroll
        for (int i = 0; i < kPasses; ++i) {
            const int m = m0 + round * T::kRound + row + 16 * i;
            store8<kUnit<kLayout>>(p, c, sums[i], residual[i], m);
            residual[i] = load_residual(p, c, m + T::kRound);
        }
        __syncwarp();
    }
}

// The CTAs of a cluster that divided k add their tiles: each finishes its share of the tokens.
template <int kLayout, int kTokens>
__device__ __forceinline__ void store_split(const Launch& launch, const Seat& seat, int (&acc)[kTokens / 2], int* sums,
                                            int m0, int n0) {
    using T = Tile<kLayout, kTokens>;
    const Gemm& p = launch.gemm;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int chunk = lane % 4 + lane / 16 * 4 + warp % 2 * 8, row = lane / 4 % 4 + warp / 2 * 4;
    const Channels c = load_channels<kUnit<kLayout>>(p, n0 + 8 * chunk);
    named_barrier_sync(kConsumerBarrier, kConsumers);  // both warpgroups are done with the stages
    int* write = sums + lane % 4 * 2 * T::kSumPitch + warp * 16 + lane / 4;
#pragma unroll
    for (int j = 0; j < kTokens / 2; ++j) {
        write[(j / 4 * 8 + (j & 1)) * T::kSumPitch + (j & 2) * 4] = acc[j];
    }
    cluster_sync_memory();
    if (c.count <= 0) return;
    const int share = kTokens / launch.k_split, end = min((seat.k + 1) * share, p.M - m0);
    const int first = seat.rank_of(launch, seat.m, seat.n) - seat.first, plane = launch.x_share * launch.w_share;
    for (int token = seat.k * share + row; token < end; token += 16) {
        const uint32_t address = shared_address(sums + token * T::kSumPitch + 8 * chunk);
        const uint4 residual = load_residual(p, c, m0 + token);
        int total[8] = {};
#pragma unroll 2
        for (int k = 0; k < launch.k_split; ++k) {
            const uint32_t remote = address_in(address, first + k * plane);
            const int4 low = cluster_load(remote), high = cluster_load(remote + 16);
            total[0] += low.x, total[1] += low.y, total[2] += low.z, total[3] += low.w;
            total[4] += high.x, total[5] += high.y, total[6] += high.z, total[7] += high.w;
        }
        store8<kUnit<kLayout>>(p, c, total, residual, m0 + token);
    }
}

template <int kLayout, int kTokens>
__device__ __forceinline__ void consume(const Launch& launch, const Seat& seat, uint8_t* shared) {
    using T = Tile<kLayout, kTokens>;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp / 4;
    const int cluster = launch.x_share * launch.w_share * launch.k_split;
    // A stage is free when all who get this CTA's copies have read theirs: so tell all CTAs whose copies we get.
    const int peers = launch.x_share + launch.w_share - 1, along_m = lane - launch.x_share;
    const int peer = lane < launch.x_share ? seat.rank_of(launch, seat.m, lane)
                                           : seat.rank_of(launch, along_m + (along_m >= seat.m), seat.n);
    const uint32_t full = shared_address(shared) + T::kBarrierOffset;
    const uint32_t peer_empty = address_in(full + 8 * T::kStages, peer);
    const uint8_t* weights = shared + T::kWOffset + warp * T::kRowTileBytes + lane * 16;
    const uint64_t tokens = tile_descriptor(shared_address(shared));
    int* staging = reinterpret_cast<int*>(shared + T::kStagingOffset) + group * T::kRound * T::kPitch;
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

    const int steps = (seat.k + 1) * launch.k_steps / launch.k_split - seat.k * launch.k_steps / launch.k_split;
    // With fewer steps than stages the first warpgroup could get a whole tile ahead and arrive twice.
    const bool staggered = kTokens >= 64 && launch.k_split == 1 && steps >= T::kStages;
    for (int index = blockIdx.x / cluster; index < launch.tiles_m * launch.tiles_n; index += gridDim.x / cluster) {
        int tile_m, tile_n;
        locate(launch, index, tile_m, tile_n);
        const int m0 = (tile_m * launch.w_share + seat.m) * kTokens;
        const int n0 = (tile_n * launch.x_share + seat.n) * kChannels;
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
        if (launch.k_split == 1) {
            const int chunk = lane % 4 + lane / 16 * 4;
            const Channels c = load_channels<kUnit<kLayout>>(launch.gemm, n0 + group * 64 + 8 * chunk);
            wgmma_wait<0>();
            pin(acc);
            release();
            store_tile<kLayout, kTokens>(launch.gemm, c, acc, staging, m0);
        } else {
            wgmma_wait<0>();
            pin(acc);
            release();
            store_split<kLayout, kTokens>(launch, seat, acc, reinterpret_cast<int*>(shared), m0, n0);
        }
    }
}

template <int kLayout, int kTokens>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
                const __grid_constant__ Launch launch) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using T = Tile<kLayout, kTokens>;
    extern __shared__ __align__(1024) uint8_t shared[];
    if (threadIdx.x == 0) {
        const uint32_t barriers = shared_address(shared) + T::kBarrierOffset;
        const int readers = kConsumers / 32 * (launch.x_share + launch.w_share - 1);
        for (int i = 0; i < T::kStages; ++i) {
            barrier_init(barriers + 8 * i, 1);
            barrier_init(barriers + 8 * (T::kStages + i), readers);
        }
        barrier_init_fence();
        prefetch_map(&x_map);
        prefetch_map(&w_map);
    }
    cluster_sync();
    if (threadIdx.x >= kConsumers) {
        drop_registers<kProducerRegisters>();
        if (threadIdx.x == kConsumers) {
            produce<T>(launch, Seat(launch), &x_map, &w_map, shared_address(shared), kTokens);
        }
        __syncwarp();
        if (launch.k_split > 1) cluster_sync_memory();  // the one in store_split
    } else {
        take_registers<kConsumerRegisters>();
        consume<kLayout, kTokens>(launch, Seat(launch), shared);
        __syncwarp();
    }
    if (launch.k_split > 1) cluster_sync();  // others may still read this CTA's sums
#endif
}

}  // namespace sm90
}  // namespace pq
