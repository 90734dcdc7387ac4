// Hopper's own instructions, one short wrapper each: mbarriers, tensor copies, clusters, warpgroup matrix multiply.
// Shared memory is named by 32-bit addresses in the shared window, as these instructions want it.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace pq {
namespace sm90 {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// A load that stays where it is written: the compiler moves others to their use, however long they take. An ordinary
// one, as an earlier kernel of the stream may have written the value.
__device__ __forceinline__ float load_now(const float* from) {
    float v;
    asm volatile("ld.global.f32 %0, [%1];\n" : "=f"(v) : "l"(from));
    return v;
}

// ---- mbarriers: a phase ends when all arrivals are in and all expected bytes have landed. ------------------------

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialized barriers visible to the other CTAs of the cluster and to the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}

// The address of what lies at `shared` in the memory of CTA `rank` of the cluster. Volatile, so that it is computed
// once.
__device__ __forceinline__ uint32_t address_in(uint32_t shared, uint32_t rank) {
    uint32_t remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(remote) : "r"(shared), "r"(rank));
    return remote;
}

// `remote`: from address_in. No cluster scope here nor in barrier_wait: these barriers order reads before copies and
// copies before reads, never ordinary writes, for which the compiler would flush and invalidate caches at every step.
__device__ __forceinline__ void barrier_arrive_at(uint32_t remote) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];\n" ::"r"(remote) : "memory");
}

#define PQ_BARRIER_WAIT(semantics)                                               \
    uint32_t done;                                                               \
    do {                                                                         \
        asm volatile(                                                            \
            "{\n"                                                                \
            ".reg .pred p;\n"                                                    \
            "mbarrier.try_wait.parity" semantics ".shared::cta.b64 p, [%1], %2;\n" \
            "selp.u32 %0, 1, 0, p;\n"                                            \
            "}\n"                                                                \
            : "=r"(done)                                                         \
            : "r"(barrier), "r"(parity)                                          \
            : "memory");                                                         \
    } while (!done)
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) { PQ_BARRIER_WAIT(""); }
// For what other CTAs have sent().
__device__ __forceinline__ void barrier_wait_cluster(uint32_t barrier, uint32_t parity) {
    PQ_BARRIER_WAIT(".acquire.cluster");
}
#undef PQ_BARRIER_WAIT

// ---- Barriers among some warps of a CTA; arrive does not wait. ----------------------------------------------------

__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

// ---- Registers move between the warpgroups of a CTA; all threads of a warpgroup call. -----------------------------

template <int kRegisters>
__device__ __forceinline__ void drop_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// ---- Clusters -----------------------------------------------------------------------------------------------------

// A CTA's coordinates in its cluster; its rank there is (z * size of y + y) * size of x + x.
__device__ __forceinline__ int3 cta_in_cluster() {
    int3 v;
    asm volatile("mov.u32 %0, %%cluster_ctaid.x;\n" : "=r"(v.x));
    asm volatile("mov.u32 %0, %%cluster_ctaid.y;\n" : "=r"(v.y));
    asm volatile("mov.u32 %0, %%cluster_ctaid.z;\n" : "=r"(v.z));
    return v;
}
__device__ __forceinline__ int cluster_index() {
    int v;
    asm volatile("mov.u32 %0, %%clusterid.x;\n" : "=r"(v));
    return v;
}
__device__ __forceinline__ int cluster_count() {
    int v;
    asm volatile("mov.u32 %0, %%nclusterid.x;\n" : "=r"(v));
    return v;
}

// All threads of all CTAs of the cluster meet.
__device__ __forceinline__ void cluster_sync() {
    asm volatile(
        "barrier.cluster.arrive.relaxed.aligned;\n"
        "barrier.cluster.wait.aligned;\n" ::
            : "memory");
}

// Four words to another CTA's shared memory, which its barrier counts as 16 bytes landed. Both addresses from
// address_in.
__device__ __forceinline__ void send(uint32_t remote, const int* v, uint32_t remote_barrier) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];\n" ::"r"(remote),
        "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]), "r"(remote_barrier)
        : "memory");
}

// ---- 8 x 8 matrices of 16-bit values, transposed: a register holds two values of one column of shared memory. -------

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&v)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(row)
                 : "memory");
}
__device__ __forceinline__ void store_matrices_transposed(uint32_t row, const uint32_t (&v)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(row), "r"(v[0]),
                 "r"(v[1]), "r"(v[2]), "r"(v[3])
                 : "memory");
}

// ---- Tensor copies: one thread starts the copy of a box of a 2-d tensor; what lies outside the tensor arrives as
// zero, and counts like the rest. `mask` says which CTAs of the cluster get the box, each at the same offset.

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
    asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

__device__ __forceinline__ void load_box(uint32_t shared, const CUtensorMap* map, int column, int row,
                                         uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];\n"
        ::"r"(shared), "l"(map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}

__device__ __forceinline__ void load_box_multicast(uint32_t shared, const CUtensorMap* map, int column, int row,
                                                   uint32_t barrier, uint16_t mask) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3}], [%4], %5;\n" ::"r"(shared),
        "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(mask)
        : "memory");
}

// ---- wgmma: D[64, tokens] += A[64, 32] B[32, tokens], asynchronous --------------------------------------------------

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// Pins accumulators here: the compiler knows nothing of the asynchrony and could move arithmetic on them before the
// wait.
template <int kCount>
__device__ __forceinline__ void pin(int (&d)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

// Descriptor of a K-major B tile: rows (tokens) of 128 bytes with the 128-byte swizzle, groups of 8 rows 1,024 bytes
// apart. Adding 2 to it moves 32 bytes along k, inside the swizzled row.
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t shared) {
    constexpr uint64_t kSwizzle128 = 1ull << 62, kGroupStride = (1024ull >> 4) << 32, kUnusedStride = 1ull << 16;
    return kSwizzle128 | kGroupStride | kUnusedStride | (shared >> 4);
}

#define PQ_REGISTERS_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define PQ_REGISTERS_16 PQ_REGISTERS_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define PQ_REGISTERS_32 PQ_REGISTERS_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define PQ_REGISTERS_64 PQ_REGISTERS_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47" \
    ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define PQ_REGISTERS_128 PQ_REGISTERS_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79" \
    ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95" \
    ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111" \
    ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define PQ_IN_8(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), "+r"(d[i + 4]), "+r"(d[i + 5]), \
    "+r"(d[i + 6]), "+r"(d[i + 7])
#define PQ_IN_16(i) PQ_IN_8(i), PQ_IN_8(i + 8)
#define PQ_IN_32(i) PQ_IN_16(i), PQ_IN_16(i + 16)
#define PQ_IN_64(i) PQ_IN_32(i), PQ_IN_32(i + 32)
#define PQ_IN_128(i) PQ_IN_64(i), PQ_IN_64(i + 64)

// The operands after the `count` accumulators: four registers of A, B's descriptor, whether to add to D or to replace
// it.
#define PQ_DEFINE_WGMMA(tokens, count, a0, a1, a2, a3, b, add)                                                      \
    __device__ __forceinline__ void wgmma_s8(int (&d)[count], const uint32_t* a, uint64_t descriptor, int add_to) { \
        asm volatile(                                                                                               \
            "{\n"                                                                                                   \
            ".reg .pred p;\n"                                                                                       \
            "setp.ne.b32 p, %" #add ", 0;\n"                                                                        \
            "wgmma.mma_async.sync.aligned.m64n" #tokens "k32.s32.s8.s8 {" PQ_REGISTERS_##count "}, "                \
            "{%" #a0 ",%" #a1 ",%" #a2 ",%" #a3 "}, %" #b ", p;\n"                                                  \
            "}\n"                                                                                                   \
            : PQ_IN_##count(0)                                                                                      \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor), "r"(add_to));                            \
    }
PQ_DEFINE_WGMMA(16, 8, 8, 9, 10, 11, 12, 13)
PQ_DEFINE_WGMMA(32, 16, 16, 17, 18, 19, 20, 21)
PQ_DEFINE_WGMMA(64, 32, 32, 33, 34, 35, 36, 37)
PQ_DEFINE_WGMMA(128, 64, 64, 65, 66, 67, 68, 69)
PQ_DEFINE_WGMMA(256, 128, 128, 129, 130, 131, 132, 133)

}  // namespace sm90
}  // namespace pq
