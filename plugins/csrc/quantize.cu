// pq_quantize, and the quantizers that need a whole row first: pq_rmsnorm_quantize, pq_quantize_dynamic.
//
// All are bound by memory: every value is read once, 16 bytes a lane, and stays in registers between the row's sum or
// maximum and its codes. A row belongs to one CTA, short rows share one.
#include <cfloat>

#include "codes.cuh"

namespace pq {
namespace {

constexpr int kMaxRow = 32768;  // 1024 threads, four units each
constexpr int kWarp = 32, kMaxWarps = 32;

template <typename T>
struct Plain {
    const T* x;
    int K;

    using Loaded = Unit<T>;
    __device__ __forceinline__ void load(Loaded& unit, int m, int k) const {
        unit.load(x + static_cast<size_t>(m) * K + k);
    }
    __device__ __forceinline__ void values(float (&v)[kUnitValues], const Loaded& unit) const {
#pragma unroll
        for (int i = 0; i < kUnitValues; ++i) v[i] = to_float(unit.v[i]);
    }
};

// One value a thread -> one value for all threads of the row (blockDim.x of them, whole warps), combined in an order
// that depends on K only.
template <typename F>
__device__ __forceinline__ float reduce_row(float v, const F& combine) {
    __shared__ float partial[kMaxWarps];
    const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
    for (int i = kWarp / 2; i > 0; i /= 2) v = combine(v, __shfl_xor_sync(0xffffffffu, v, i));
    if (warps == 1) return v;  // the same for all threads of the CTA
    if (threadIdx.x % kWarp == 0) partial[threadIdx.y * warps + warp] = v;
    __syncthreads();
    v = partial[threadIdx.y * warps];
    for (int i = 1; i < warps; ++i) v = combine(v, partial[threadIdx.y * warps + i]);
    return v;
}

// blockDim.x threads a row, kUnits units a thread; blockDim.y rows a CTA.
template <typename T, int kUnits>
__global__ void __launch_bounds__(1024)
    rmsnorm_kernel(const T* x, const T* residual, T* sum, const float* gain, float eps, const float* shift,
                   const Coder coder, const Codes codes, int M, int K) {
    take_turn();
    const int m = blockIdx.x * blockDim.y + threadIdx.y, step = blockDim.x * kUnitValues;
    const int first = threadIdx.x * kUnitValues, end = m < M ? K : 0;
    const size_t row = static_cast<size_t>(m) * K;

    // The first units' gains are on their way while the row is summed; all of them would not fit into the registers.
    constexpr int kEarly = kUnits < 4 ? kUnits : sizeof(T) == 2 ? 2 : 0, kGains = kEarly ? kEarly : 1;
    Unit<T> h[kUnits];
    float g[kGains][kUnitValues];
#pragma unroll
    for (int i = 0; i < kUnits; ++i)
        if (first + i * step < end) h[i].load(x + row + first + i * step);
#pragma unroll
    for (int i = 0; i < kEarly; ++i)
        if (gain && first + i * step < end) load_constants(g[i], gain + first + i * step);
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
        const int k = first + i * step;
        if (k >= end) continue;
        if (residual) {
            Unit<T> added;
            added.load(residual + row + k);
#pragma unroll
            for (int j = 0; j < kUnitValues; ++j)
                h[i].v[j] = from_float<T>(__fadd_rn(to_float(h[i].v[j]), to_float(added.v[j])));
        }
        if (sum) h[i].store(sum + row + k);
    }

    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
        if (first + i * step >= end) continue;
#pragma unroll
        for (int j = 0; j < kUnitValues; ++j) squares = __fmaf_rn(to_float(h[i].v[j]), to_float(h[i].v[j]), squares);
    }
    squares = reduce_row(squares, [](float a, float b) { return __fadd_rn(a, b); });
    const float mean = __fdiv_rn(squares, static_cast<float>(K));
    const float norm = fminf(__fsqrt_rn(__fadd_rn(mean, eps)), FLT_MAX), reciprocal = __frcp_rn(norm);

#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
        const int k = first + i * step;
        if (k >= end) continue;
        if (gain && i >= kEarly) load_constants(g[i % kGains], gain + k);
        float v[kUnitValues];
#pragma unroll
        for (int j = 0; j < kUnitValues; ++j) {
            v[j] = divide(to_float(h[i].v[j]), norm, reciprocal);
            if (gain) v[j] = __fmul_rn(v[j], g[i % kGains][j]);
        }
        encode(v, shift, coder, codes, row + k, k);
    }
}

// Scales below this are scaled up with their row, exactly, as Coder's arithmetic would underflow.
constexpr float kSmallScale = 7.888609e-31f, kLift = 1.8446744e19f;  // 2^-100, 2^64

template <typename T, int kUnits>
__global__ void __launch_bounds__(1024)
    dynamic_kernel(const T* x, float* row_scale, const Codes codes, int bits, int M, int K) {
    take_turn();
    const int m = blockIdx.x * blockDim.y + threadIdx.y, step = blockDim.x * kUnitValues;
    const int first = threadIdx.x * kUnitValues, end = m < M ? K : 0;
    const size_t row = static_cast<size_t>(m) * K;

    Unit<T> h[kUnits];
#pragma unroll
    for (int i = 0; i < kUnits; ++i)
        if (first + i * step < end) h[i].load(x + row + first + i * step);
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
        if (first + i * step >= end) continue;
#pragma unroll
        for (int j = 0; j < kUnitValues; ++j) largest = fmaxf(largest, fabsf(to_float(h[i].v[j])));
    }
    largest = reduce_row(largest, [](float a, float b) { return fmaxf(a, b); });

    float scale = __fdiv_rn(largest, static_cast<float>((1 << (bits - 1)) - 1));
    if (!(scale > 0.0f)) scale = 1.0f;  // a row of zeros
    if (threadIdx.x == 0 && m < M) row_scale[m] = scale;
    const float lift = scale < kSmallScale ? kLift : 1.0f;
    const Coder coder = Coder::of(__fmul_rn(scale, lift), bits);
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
        const int k = first + i * step;
        if (k >= end) continue;
        float v[kUnitValues];
#pragma unroll
        for (int j = 0; j < kUnitValues; ++j) v[j] = __fmul_rn(to_float(h[i].v[j]), lift);
        encode(v, nullptr, coder, codes, row + k, k);
    }
}

// Threads a row, units a thread, rows a CTA: two units a thread where that still makes a few warps.
struct RowShape {
    int units;
    dim3 grid, block;

    RowShape(int M, int K) {
        const int total = K / kUnitValues;
        units = total <= 256 ? 1 : total <= 1024 ? 2 : 4;
        const int threads = ((total + units - 1) / units + kWarp - 1) / kWarp * kWarp;
        const int rows = std::max(1, std::min(128 / threads, M));
        block = dim3(threads, rows);
        grid = dim3((M + rows - 1) / rows);
    }
};

// Calls f with the units a thread as a compile-time constant.
template <typename F>
pq_status with_units(int units, const F& f) {
    if (units == 1) return f(std::integral_constant<int, 1>{});
    if (units == 2) return f(std::integral_constant<int, 2>{});
    return f(std::integral_constant<int, 4>{});
}

}  // namespace
}  // namespace pq

using namespace pq;

int pq_quantize(const void* x, int x_type, const float* shift, float scale, void* codes, int codes_type, int bits,
                int M, int K, void* stream) {
    const pq_status checked = check_codes(codes, codes_type, bits, M, K);
    if (checked != PQ_OK) return checked;
    return with_type(x_type, [&](auto type) {
        using T = decltype(type);
        if (!usable(x) || !aligned(shift)) return PQ_BAD_POINTER;
        return launch_elementwise(Plain<T>{static_cast<const T*>(x), K}, shift, scale, codes, codes_type, bits, M, K,
                                  stream);
    });
}

int pq_rmsnorm_quantize(const void* x, int x_type, const void* residual, void* sum, const float* gain, float eps,
                        const float* shift, float scale, void* codes, int codes_type, int bits, int M, int K,
                        void* stream) {
    const pq_status checked = check_codes(codes, codes_type, bits, M, K);
    if (checked != PQ_OK) return checked;
    if (K > kMaxRow) return PQ_BAD_SHAPE;
    return with_type(x_type, [&](auto type) {
        using T = decltype(type);
        if (!usable(x) || !aligned(residual) || !aligned(sum) || !aligned(gain) || !aligned(shift))
            return PQ_BAD_POINTER;
        const RowShape shape(M, K);
        return with_units(shape.units, [&](auto units) {
            return launch_kernel(rmsnorm_kernel<T, decltype(units)::value>, shape.grid, shape.block, 0, stream,
                                 static_cast<const T*>(x), static_cast<const T*>(residual), static_cast<T*>(sum), gain,
                                 eps, shift, Coder::of(scale, bits), Codes{codes, codes_type == PQ_S4}, M, K);
        });
    });
}

int pq_quantize_dynamic(const void* x, int x_type, float* row_scale, void* codes, int codes_type, int bits, int M,
                        int K, void* stream) {
    const pq_status checked = check_codes(codes, codes_type, bits, M, K);
    if (checked != PQ_OK) return checked;
    if (K > kMaxRow) return PQ_BAD_SHAPE;
    return with_type(x_type, [&](auto type) {
        using T = decltype(type);
        if (!usable(x) || !row_scale) return PQ_BAD_POINTER;
        const RowShape shape(M, K);
        return with_units(shape.units, [&](auto units) {
            return launch_kernel(dynamic_kernel<T, decltype(units)::value>, shape.grid, shape.block, 0, stream,
                                 static_cast<const T*>(x), row_scale, Codes{codes, codes_type == PQ_S4}, bits, M, K);
        });
    });
}
