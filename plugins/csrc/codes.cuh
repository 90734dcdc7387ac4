// What the quantizers share: eight values in, eight codes out, and a kernel for what works element by element.
#pragma once

#include <algorithm>

#include "common.cuh"
#include "overlap.cuh"

namespace pq {

inline constexpr int kUnitValues = 8;  // 16 bytes of fp16; rows are whole units, as K is a multiple of 32

// v / divisor, correctly rounded (Markstein: `reciprocal` is, the first correction makes the quotient faithful, the
// second exact), without the check for extremes and the call that __fdiv_rn brings: 2^-100..2^100, or what rounds to
// nothing.
__device__ __forceinline__ float divide(float v, float divisor, float reciprocal) {
    float q = __fmul_rn(v, reciprocal);
    q = __fmaf_rn(__fmaf_rn(-q, divisor, v), reciprocal, q);
    return __fmaf_rn(__fmaf_rn(-q, divisor, v), reciprocal, q);
}

// quantize_value without its slow instructions: the same code for every v and every scale in 2^-100..2^100.
struct Coder {
    float scale, reciprocal;  // 1 / scale, correctly rounded
    float low, high;          // values beyond which codes are clamped

    __host__ __device__ static Coder of(float scale, int bits) {
        const float steps = static_cast<float>(1 << (bits - 1));
        return {scale, 1.0f / scale, -steps * scale, (steps - 1.0f) * scale};
    }

    // The code in the low byte, above it what a shift or a byte permutation drops.
    __device__ __forceinline__ uint32_t operator()(float v) const {
        // Clamping first is clamping last: what lies at a bound, even rounded, is rounded to the bound's code.
        v = fminf(fmaxf(v, low), high);
        // The ulp is 1 there: the sum rounds half to even and its last bits are the integer. rintf and the conversion
        // would go through the unit that does 16 lanes a clock.
        return __float_as_uint(__fadd_rn(divide(v, scale, reciprocal), 12582912.0f));
    }
};

// Low bytes of four words -> one word.
__device__ __forceinline__ uint32_t pack_bytes(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
    return __byte_perm(__byte_perm(c0, c1, 0x0040), __byte_perm(c2, c3, 0x0040), 0x5410);
}
// Four bytes with a code each -> two bytes with two, the first in the low nibble, in bytes 0 and 2.
__device__ __forceinline__ uint32_t pair_nibbles(uint32_t bytes) {
    const uint32_t nibbles = bytes & 0x0F0F0F0Fu;
    return nibbles | nibbles >> 4;
}

// Where codes go: [M, K] bytes, or [M, K / 2] with two to a byte.
struct Codes {
    void* data;
    bool packed;

    __device__ __forceinline__ void store(size_t at, const uint32_t (&c)[kUnitValues]) const {
        const uint32_t first = pack_bytes(c[0], c[1], c[2], c[3]), second = pack_bytes(c[4], c[5], c[6], c[7]);
        if (packed) {
            *reinterpret_cast<uint32_t*>(static_cast<char*>(data) + at / 2) =
                __byte_perm(pair_nibbles(first), pair_nibbles(second), 0x6420);
        } else {
            *reinterpret_cast<uint2*>(static_cast<char*>(data) + at) = make_uint2(first, second);
        }
    }
    __device__ __forceinline__ void store(size_t at, const uint32_t (&c)[kUnitValues / 2]) const {
        store_four(at, pack_bytes(c[0], c[1], c[2], c[3]));
    }
    // Four codes, a byte each.
    __device__ __forceinline__ void store_four(size_t at, uint32_t bytes) const {
        if (packed) {
            *reinterpret_cast<uint16_t*>(static_cast<char*>(data) + at / 2) =
                static_cast<uint16_t>(__byte_perm(pair_nibbles(bytes), 0, 0x0020));
        } else {
            *reinterpret_cast<uint32_t*>(static_cast<char*>(data) + at) = bytes;
        }
    }
};

// Eight values as they lie in memory. Activations are read once: kept out of L1, where gains and shifts stay.
template <typename T>
struct Unit {
    static constexpr int kWords = kUnitValues * static_cast<int>(sizeof(T)) / 16;
    union {
        uint4 words[kWords];
        T v[kUnitValues];
    };

    __device__ __forceinline__ Unit() {}
    __device__ __forceinline__ void load(const T* at) {
#pragma unroll
        for (int i = 0; i < kWords; ++i)
            asm volatile("ld.global.L1::no_allocate.v4.b32 {%0,%1,%2,%3}, [%4];\n"
                         : "=r"(words[i].x), "=r"(words[i].y), "=r"(words[i].z), "=r"(words[i].w)
                         : "l"(reinterpret_cast<const uint4*>(at) + i));
    }
    __device__ __forceinline__ void store(T* at) const {
#pragma unroll
        for (int i = 0; i < kWords; ++i) reinterpret_cast<uint4*>(at)[i] = words[i];
    }
};

// fp32 constants along K, which every row reads.
__device__ __forceinline__ void load_constants(float (&v)[kUnitValues], const float* at) {
#pragma unroll
    for (int i = 0; i < kUnitValues; i += 4) {
        const float4 four = __ldg(reinterpret_cast<const float4*>(at + i));
        v[i] = four.x, v[i + 1] = four.y, v[i + 2] = four.z, v[i + 3] = four.w;
    }
}

// v - shift -> codes of one unit.
__device__ __forceinline__ void encode(float (&v)[kUnitValues], const float* shift, const Coder& coder,
                                       const Codes& codes, size_t at, int k) {
    if (shift) {
        float subtracted[kUnitValues];
        load_constants(subtracted, shift + k);
#pragma unroll
        for (int i = 0; i < kUnitValues; ++i) v[i] = __fsub_rn(v[i], subtracted[i]);
    }
    uint32_t c[kUnitValues];
#pragma unroll
    for (int i = 0; i < kUnitValues; ++i) c[i] = coder(v[i]);
    codes.store(at, c);
}

// How a quantizer's kernel begins: it is on its SMs when the kernel before it ends, and lets the next one, which may
// have weights to load, do the same.
__device__ __forceinline__ void take_turn() {
    let_next_kernel_start();
    wait_for_previous_kernels();
}

// Codes of Source's values: a thread takes every so-many-th unit of the whole tensor. Source::Loaded is what is loaded
// for a unit, Source::values makes eight fp32 of it.
template <typename Source>
__global__ void __launch_bounds__(256)
    elementwise_kernel(const Source source, const float* shift, const Coder coder, const Codes codes, int M, int K) {
    take_turn();
    const int units = K / kUnitValues, threads = gridDim.x * blockDim.x;
    const int first = blockIdx.x * blockDim.x + threadIdx.x;
    const int row_step = threads / units, unit_step = threads % units;
    int m = first / units, unit = first % units;
    while (m < M) {
        typename Source::Loaded loaded;
        source.load(loaded, m, unit * kUnitValues);
        float v[kUnitValues];
        source.values(v, loaded);
        encode(v, shift, coder, codes, static_cast<size_t>(m) * K + unit * kUnitValues, unit * kUnitValues);
        m += row_step, unit += unit_step;
        if (unit >= units) unit -= units, ++m;
    }
}

__device__ __forceinline__ void cp_async_4(void* shared, const void* global) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;\n" ::"r"(address), "l"(global));
}

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }
inline bool usable(const void* pointer) { return pointer && aligned(pointer); }

// What every quantizer checks of its codes and its shape.
inline pq_status check_codes(const void* codes, int codes_type, int bits, int M, int K) {
    if (M < 1 || K < 32 || K % 32 != 0) return PQ_BAD_SHAPE;
    if (!(codes_type == PQ_S8 && (bits == 4 || bits == 8)) && !(codes_type == PQ_S4 && bits == 4)) return PQ_BAD_TYPE;
    return usable(codes) ? PQ_OK : PQ_BAD_POINTER;
}

template <typename... Parameters, typename... Arguments>
pq_status launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes, void* stream,
                        Arguments... arguments) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    cudaLaunchAttribute attribute = start_early_attribute();
    config.attrs = &attribute;
    config.numAttrs = may_start_early(reinterpret_cast<const void*>(kernel)) ? 1 : 0;
    return status_of(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

// Of the current device; 0 without one.
inline int device_attribute(cudaDeviceAttr attribute) {
    int device = 0, value = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : 0;
}

template <typename Source>
pq_status launch_elementwise(const Source& source, const float* shift, float scale, void* codes, int codes_type,
                             int bits, int M, int K, void* stream) {
    constexpr int kThreads = 256, kCtasPerSm = 8;
    const int sms = device_attribute(cudaDevAttrMultiProcessorCount);
    const long long wanted = (static_cast<long long>(M) * (K / kUnitValues) + kThreads - 1) / kThreads;
    const int ctas = static_cast<int>(std::min<long long>(wanted, std::max(1, sms) * kCtasPerSm));
    return launch_kernel(elementwise_kernel<Source>, dim3(ctas), dim3(kThreads), 0, stream, source, shift,
                         Coder::of(scale, bits), Codes{codes, codes_type == PQ_S4}, M, K);
}

// Calls f with a value of the type that x_type names.
template <typename F>
pq_status with_type(int x_type, const F& f) {
    switch (x_type) {
        case PQ_F16: return f(__half{});
        case PQ_BF16: return f(__nv_bfloat16{});
        case PQ_F32: return f(float{});
        default: return PQ_BAD_TYPE;
    }
}

}  // namespace pq
