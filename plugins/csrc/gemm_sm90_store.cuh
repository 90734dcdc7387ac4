// The Hopper GEMM's results, from int32 sums to y: eight neighbouring channels of one token at a time (16 bytes of
// fp16), in every output type. A thread keeps its channels, so their scales and biases stay in registers.
#pragma once

#include "common.cuh"

namespace pq {
namespace sm90 {

struct Channels {
    int n, count;  // first channel, and how many of the eight exist (none or less: 0 or below)
    float scale[8], bias[8];
};

template <int kUnitOf>
__device__ __forceinline__ Channels load_channels(const Gemm& p, int n) {
    Channels c;
    c.n = n;
    c.count = p.N - n;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const bool valid = i < c.count && p.y_type != PQ_S32;
        c.scale[i] = valid ? __fmul_rn(__ldg(p.scale + n + i), 1.0f / kUnitOf) : 0.0f;
        c.bias[i] = valid && p.bias ? __ldg(p.bias + n + i) : -0.0f;  // adding -0 changes no float
    }
    return c;
}

// Rows are 16-byte aligned in every type only then; other N are stored element by element.
__device__ __forceinline__ bool is_wide(const Gemm& p) { return p.N % 8 == 0; }

// Residual of 16-bit types, loaded ahead of its use.
__device__ __forceinline__ uint4 load_residual(const Gemm& p, const Channels& c, int m) {
    const bool ahead = p.residual && is_wide(p) && (p.y_type == PQ_F16 || p.y_type == PQ_BF16);
    if (!ahead || m >= p.M || c.count <= 0) return make_uint4(0, 0, 0, 0);
    const size_t at = static_cast<size_t>(m) * p.N + c.n;
    return __ldg(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p.residual) + at));
}

__device__ __forceinline__ float2 unpack2(uint32_t v, __half) {
    return __half22float2(*reinterpret_cast<const __half2*>(&v));
}
__device__ __forceinline__ float2 unpack2(uint32_t v, __nv_bfloat16) {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&v));
}
__device__ __forceinline__ uint32_t pack2(float a, float b, __half) {
    const __half2 v = __floats2half2_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&v);
}
__device__ __forceinline__ uint32_t pack2(float a, float b, __nv_bfloat16) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&v);
}

template <typename T>
__device__ __forceinline__ void store_16bit(const Gemm& p, float (&v)[8], int count, const uint4& residual, size_t at) {
    T* y = static_cast<T*>(p.y) + at;
    if (is_wide(p)) {
        if (p.residual) {
            const uint32_t words[4] = {residual.x, residual.y, residual.z, residual.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 r = unpack2(words[i], T());
                v[2 * i] = __fadd_rn(v[2 * i], r.x);
                v[2 * i + 1] = __fadd_rn(v[2 * i + 1], r.y);
            }
        }
        *reinterpret_cast<uint4*>(y) = make_uint4(pack2(v[0], v[1], T()), pack2(v[2], v[3], T()),
                                                  pack2(v[4], v[5], T()), pack2(v[6], v[7], T()));
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (i >= count) break;
        if (p.residual) v[i] = __fadd_rn(v[i], to_float(static_cast<const T*>(p.residual)[at + i]));
        y[i] = from_float<T>(v[i]);
    }
}

template <typename T, typename Vector>
__device__ __forceinline__ void store_32bit(const Gemm& p, const T (&v)[8], int count, size_t at) {
    T* y = static_cast<T*>(p.y) + at;
    if (is_wide(p)) {
        *reinterpret_cast<Vector*>(y) = Vector{v[0], v[1], v[2], v[3]};
        *reinterpret_cast<Vector*>(y + 4) = Vector{v[4], v[5], v[6], v[7]};
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (i < count) y[i] = v[i];
    }
}

__device__ __forceinline__ void store_codes(const Gemm& p, const float (&v)[8], int count, size_t at) {
    uint32_t codes[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) codes[i] = static_cast<uint32_t>(quantize_value(v[i], p.y_scale, p.y_bits));
    if (p.y_type == PQ_S8) {
        uint8_t* y = static_cast<uint8_t*>(p.y) + at;
        if (is_wide(p)) {
            uint32_t words[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint32_t low = __byte_perm(codes[4 * i], codes[4 * i + 1], 0x0040);
                words[i] = __byte_perm(low, __byte_perm(codes[4 * i + 2], codes[4 * i + 3], 0x0040), 0x5410);
            }
            *reinterpret_cast<uint2*>(y) = make_uint2(words[0], words[1]);
            return;
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (i < count) y[i] = static_cast<uint8_t>(codes[i]);
        }
        return;
    }
    uint8_t* y = static_cast<uint8_t*>(p.y) + at / 2;  // PQ_S4: N and so `at` and `count` are even
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) word |= (codes[i] & 15u) << (4 * i);
    if (is_wide(p)) {
        *reinterpret_cast<uint32_t*>(y) = word;
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (2 * i < count) y[i] = static_cast<uint8_t>(word >> (8 * i));
    }
}

// Results of token m for the channels of c, in every output type.
template <int kUnitOf>
__device__ __forceinline__ void store8(const Gemm& p, const Channels& c, const int (&acc)[8], const uint4& residual,
                                       int m) {
    if (m >= p.M || c.count <= 0) return;
    const size_t at = static_cast<size_t>(m) * p.N + c.n;
    if (p.y_type == PQ_S32) {
        int exact[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) exact[i] = acc[i] >> (kUnitOf == 16 ? 4 : 0);
        store_32bit<int, int4>(p, exact, c.count, at);
        return;
    }
    const float row_scale = p.row_scale ? __ldg(p.row_scale + m) : 1.0f;
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        v[i] = __fmul_rn(__fmul_rn(static_cast<float>(acc[i]), c.scale[i]), row_scale);
        v[i] = __fadd_rn(v[i], c.bias[i]);
    }
    switch (p.y_type) {
        case PQ_F16: return store_16bit<__half>(p, v, c.count, residual, at);
        case PQ_BF16: return store_16bit<__nv_bfloat16>(p, v, c.count, residual, at);
        case PQ_F32:
            if (p.residual) {
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    if (i < c.count) v[i] = __fadd_rn(v[i], __ldg(static_cast<const float*>(p.residual) + at + i));
                }
            }
            return store_32bit<float, float4>(p, v, c.count, at);
        default: return store_codes(p, v, c.count, at);
    }
}

}  // namespace sm90
}  // namespace pq
