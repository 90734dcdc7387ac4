// The epilogue of tiles staged in shared memory as [token][channel]: threads read them along the channels, so that
// global stores are wide and coalesced though tensor-core fragments hold the channels in their rows.
#pragma once

#include <type_traits>

#include "common.cuh"

namespace pq {

// Channels of one token that a thread finishes at once: 16 bytes of fp16, and whole sectors for a warp in every type.
inline constexpr int kSegment = 8;

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Pack {
    T v[kCount];
};

// quantize_value with the division done by hand: 1 / scale comes correctly rounded from the host, and two Newton steps
// on the quotient make it the correctly rounded one. __fdiv_rn would bring a check and a call for quotients near
// overflow; clamping v first keeps clear of those and changes nothing, as 256 is beyond every code. For scales within
// 2^-64..2^64, which pq_gemm checks.
struct Requantizer {
    float scale, reciprocal, low, high;

    __device__ __forceinline__ int operator()(float v) const {
        const float limit = 256.0f * scale;
        v = fminf(fmaxf(v, -limit), limit);
        float q = __fmul_rn(v, reciprocal);
        q = __fmaf_rn(__fmaf_rn(-q, scale, v), reciprocal, q);
        q = __fmaf_rn(__fmaf_rn(-q, scale, v), reciprocal, q);
        return static_cast<int>(fminf(fmaxf(rintf(q), low), high));
    }
};

// Writes segments of y that all start at one channel: what depends on the channel only is read once.
template <int kUnitOf>
struct SegmentWriter {
    int n, count;  // first channel; how many of the segment are inside the tensor, 0 or less if none
    bool wide;     // every segment is whole and aligned
    float scale[kSegment], bias[kSegment];
    Requantizer requantize;

    __device__ __forceinline__ SegmentWriter(const Gemm& p, int channel, float y_reciprocal)
        : n(channel), count(min(kSegment, p.N - channel)), wide(p.N % kSegment == 0) {
        const float high = p.y_bits == 4 ? 7.0f : 127.0f;
        requantize = {p.y_scale, y_reciprocal, -high - 1.0f, high};
#pragma unroll
        for (int i = 0; i < kSegment; ++i) {
            const bool inside = i < count && p.y_type != PQ_S32;
            scale[i] = inside ? __ldg(p.scale + n + i) : 0.0f;
            bias[i] = inside && p.bias ? __ldg(p.bias + n + i) : -0.0f;  // adding -0 changes no float
        }
    }

    // acc of channels n..n + 7 of token m.
    template <int kType>
    __device__ __forceinline__ void write(const Gemm& p, const int (&acc)[kSegment], int m) const {
        const size_t at = static_cast<size_t>(m) * p.N + n;
        if constexpr (kType == PQ_S32) {
            Pack<int, kSegment> out;
#pragma unroll
            for (int i = 0; i < kSegment; ++i) out.v[i] = acc[i] / kUnitOf;
            put(static_cast<int*>(p.y) + at, out, count);
        } else {
            const float row_scale = p.row_scale ? p.row_scale[m] : 1.0f;  // no __ldg: see overlap.cuh
            float v[kSegment];
#pragma unroll
            for (int i = 0; i < kSegment; ++i)
                v[i] = __fadd_rn(__fmul_rn(dequantize<kUnitOf>(acc[i], scale[i]), row_scale), bias[i]);
            if constexpr (kType == PQ_F16) add_and_put<__half>(p, v, at);
            if constexpr (kType == PQ_BF16) add_and_put<__nv_bfloat16>(p, v, at);
            if constexpr (kType == PQ_F32) add_and_put<float>(p, v, at);
            if constexpr (kType == PQ_S8) put_s8(p, v, at);
            if constexpr (kType == PQ_S4) put_s4(p, v, at);
        }
    }

private:
    template <typename T, int kCount>
    __device__ __forceinline__ void put(T* y, const Pack<T, kCount>& out, int inside) const {
        if (wide) {
            *reinterpret_cast<Pack<T, kCount>*>(y) = out;
        } else {
#pragma unroll
            for (int i = 0; i < kCount; ++i)
                if (i < inside) y[i] = out.v[i];
        }
    }

    template <typename T>
    __device__ __forceinline__ void add_and_put(const Gemm& p, float (&v)[kSegment], size_t at) const {
        if (p.residual) {
            const T* residual = static_cast<const T*>(p.residual) + at;
            Pack<T, kSegment> r;
            if (wide) {
                r = *reinterpret_cast<const Pack<T, kSegment>*>(residual);
            } else {
#pragma unroll
                for (int i = 0; i < kSegment; ++i) r.v[i] = i < count ? residual[i] : from_float<T>(0.0f);
            }
#pragma unroll
            for (int i = 0; i < kSegment; ++i) v[i] = __fadd_rn(v[i], to_float(r.v[i]));
        }
        Pack<T, kSegment> out;
#pragma unroll
        for (int i = 0; i < kSegment; ++i) out.v[i] = from_float<T>(v[i]);
        put(static_cast<T*>(p.y) + at, out, count);
    }

    __device__ __forceinline__ void put_s8(const Gemm& p, const float (&v)[kSegment], size_t at) const {
        Pack<int8_t, kSegment> out;
#pragma unroll
        for (int i = 0; i < kSegment; ++i) out.v[i] = static_cast<int8_t>(requantize(v[i]));
        put(static_cast<int8_t*>(p.y) + at, out, count);
    }

    // N is even, so that a byte belongs to one segment.
    __device__ __forceinline__ void put_s4(const Gemm& p, const float (&v)[kSegment], size_t at) const {
        Pack<uint8_t, kSegment / 2> out;
#pragma unroll
        for (int i = 0; i < kSegment / 2; ++i)
            out.v[i] = static_cast<uint8_t>((requantize(v[2 * i]) & 15) | (requantize(v[2 * i + 1]) << 4));
        put(static_cast<uint8_t*>(p.y) + at / 2, out, count / 2);
    }
};

// Calls f with y's type as a constant: one switch in front of a loop instead of one in it.
template <typename F>
__device__ __forceinline__ void with_type(int y_type, F f) {
    switch (y_type) {
        case PQ_F16: return f(std::integral_constant<int, PQ_F16>());
        case PQ_BF16: return f(std::integral_constant<int, PQ_BF16>());
        case PQ_F32: return f(std::integral_constant<int, PQ_F32>());
        case PQ_S8: return f(std::integral_constant<int, PQ_S8>());
        case PQ_S4: return f(std::integral_constant<int, PQ_S4>());
        default: return f(std::integral_constant<int, PQ_S32>());
    }
}

}  // namespace pq
