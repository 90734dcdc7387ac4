// CUDA's memory and stream as objects, and its errors as Error.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "error.h"

namespace pq::runner {

inline void check_cuda(cudaError_t status, const char* doing) {
    if (status != cudaSuccess) throw Error(std::string(doing) + " failed (" + cudaGetErrorString(status) + ")", "CUDA");
}

class Stream {
public:
    // The first thing that is asked of the GPU: Error if there is none.
    Stream() {
        const cudaError_t status = cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking);
        if (status != cudaSuccess)
            throw Error("there is no GPU to run on", cudaGetErrorString(status), "--dry-run needs none.");
    }
    ~Stream() { cudaStreamDestroy(stream_); }
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;
    cudaStream_t get() const { return stream_; }
    void synchronize() const { check_cuda(cudaStreamSynchronize(stream_), "running the engine"); }

private:
    cudaStream_t stream_ = nullptr;
};

// Memory of the GPU, or page-locked memory of the host, which copies run alongside. It grows and never shrinks; what
// was in it is lost when it grows.
template <bool kOnDevice>
class Buffer {
public:
    Buffer() = default;
    Buffer(Buffer&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
    Buffer& operator=(Buffer&&) = delete;
    ~Buffer() { release(); }

    // At least `bytes`, and never none: TensorRT wants an address for an empty tensor too.
    void reserve(size_t bytes, const std::string& what) {
        if (data_ && bytes <= size_) return;
        release();
        const size_t wanted = bytes ? bytes : 1;
        const cudaError_t status = kOnDevice ? cudaMalloc(&data_, wanted) : cudaMallocHost(&data_, wanted);
        if (status != cudaSuccess) {
            data_ = nullptr;
            throw Error("not enough memory: " + std::to_string(wanted >> 20) + " MiB for " + what +
                            " cannot be had (" + cudaGetErrorString(status) + ")",
                        kOnDevice ? "GPU" : "host", "Lower --max-seq-len or --batch.");
        }
        size_ = wanted;
    }
    void* data() const { return data_; }
    size_t size() const { return size_; }

private:
    void release() {
        if (data_) kOnDevice ? cudaFree(data_) : cudaFreeHost(data_);
        data_ = nullptr;
        size_ = 0;
    }

    void* data_ = nullptr;
    size_t size_ = 0;
};
using DeviceBuffer = Buffer<true>;
using HostBuffer = Buffer<false>;

}  // namespace pq::runner
