// Programmatic dependent launch: from sm_90 on, a kernel may start while those before it on the stream still run, and
// waits for them itself. What makes that safe, for every kernel that is launched so:
//   * Before the wait it reads only constants (weights, scales, biases, gains, shifts, R4's matrix) and writes nothing
//     outside its own shared memory. Kernels before the last one may still run then.
//   * Some thread of it waits, whatever the problem. So it ends after the kernels before it, and who waits for its end
//     has waited for theirs.
//   * What earlier kernels may have written it reads by ordinary loads. The compiler may move read-only ones (__ldg),
//     and so may take them out before the wait.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

namespace pq {

// The next kernel may start when all CTAs of this one have come here: so it takes no place that one of them needs.
__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// Until the kernels before this one have ended and what they wrote can be read.
__device__ __forceinline__ void wait_for_previous_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// Whether the current device's code of a kernel has these instructions. All files are built for the same GPUs: the
// first kernel's answer stands for the others.
inline bool may_start_early(const void* kernel) {
    constexpr int kDevices = 16;
    static std::atomic<int> known[kDevices];  // 0: not asked yet, 1: no, 2: yes
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return false;
    std::atomic<int>* const slot = device < kDevices ? &known[device] : nullptr;
    if (slot && slot->load(std::memory_order_relaxed)) return slot->load(std::memory_order_relaxed) == 2;
    cudaFuncAttributes attributes;
    if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) return false;  // the launch will say why
    const bool yes = attributes.ptxVersion >= 90;
    if (slot) slot->store(yes ? 2 : 1, std::memory_order_relaxed);
    return yes;
}

inline cudaLaunchAttribute start_early_attribute() {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    return attribute;
}

}  // namespace pq
