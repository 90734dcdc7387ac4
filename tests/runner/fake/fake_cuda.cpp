// A GPU of 1 GiB in the host's memory. FAKE_GPU=none: there is no GPU.
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include "cuda_runtime_api.h"

namespace {

constexpr size_t kTotal = size_t{1} << 30;
size_t used = 0;
std::map<void*, size_t>& sizes() {
    static std::map<void*, size_t> all;
    return all;
}

bool present() {
    const char* const gpu = getenv("FAKE_GPU");
    return !gpu || std::string(gpu) != "none";
}

}  // namespace

extern "C" {

const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "out of memory" : error ? "no CUDA-capable device is detected" : "";
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned int) {
    *stream = reinterpret_cast<cudaStream_t>(0x5ee);
    return present() ? cudaSuccess : cudaErrorNoDevice;
}
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaMalloc(void** data, size_t bytes) {
    if (used + bytes > kTotal) return cudaErrorMemoryAllocation;
    *data = malloc(bytes);
    memset(*data, 0xEE, bytes);  // what was never written shows
    sizes()[*data] = bytes;
    used += bytes;
    return cudaSuccess;
}
cudaError_t cudaFree(void* data) {
    used -= sizes()[data];
    sizes().erase(data);
    free(data);
    return cudaSuccess;
}
cudaError_t cudaMallocHost(void** data, size_t bytes) {
    *data = malloc(bytes);
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void* data) {
    free(data);
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
    memcpy(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
    memcpy(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind, cudaStream_t) {
    for (size_t row = 0; row < height; ++row)
        memcpy(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch, width);
    return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    *total = kTotal;
    *free = kTotal - used;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
    strcpy(properties->name, "Fake GPU");
    properties->major = 8;
    properties->minor = 7;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int) {
    strncpy(text, "0000:00:00.0", static_cast<size_t>(length));
    return cudaSuccess;
}

}  // extern "C"
