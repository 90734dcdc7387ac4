// Kernels that compute nothing and write down how they were called: what the plugin is linked with in its tests.
#pragma once

#include <cstddef>
#include <functional>
#include <vector>

struct QuantizeCall {
    const void* x;
    int x_type;
    const float* shift;
    float scale;
    void* codes;
    int codes_type, bits, M, K;
    void* stream;
};

struct GemmCall {
    int variant;
    const void* x;
    int x_type;
    const void* w;
    int layout;
    const float *scale, *row_scale, *bias;
    const void* residual;
    void* y;
    int y_type, M, N, K;
    void* workspace;
    size_t workspace_bytes;
    void* stream;
};

struct NormCall {
    const void *x, *residual;
    void* sum;
    const float* gain;
    float epsilon, scale;
    void* codes;
    int x_type, codes_type, bits, M, K;
};

struct SiluCall {
    const void *gate, *up;
    int ldg, x_type, left_order, right_order;
    const float* left;
    float scale;
    void* codes;
    int codes_type, bits, M, K;
};

struct Recorder {
    std::vector<QuantizeCall> quantize;
    std::vector<GemmCall> gemm;
    std::vector<NormCall> norm;
    std::vector<SiluCall> silu;
    // How the kernels answer.
    std::function<std::vector<int>(int M)> variants = [](int) { return std::vector<int>{}; };
    std::function<size_t(int variant, int M)> workspace = [](int, int) { return size_t{0}; };
    int preferred_layout = -1;
    int status = 0;
};
extern Recorder recorder;
