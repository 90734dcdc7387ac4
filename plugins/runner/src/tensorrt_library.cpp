#include "tensorrt_library.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstdio>

#include "error.h"
#include "pq_kernels.h"

namespace pq::runner {

namespace {

void* open_library(const std::string& path, const std::string& cure) {
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);
    if (!library) throw Error(std::string("the library cannot be loaded (") + dlerror() + ")", path, cure);
    return library;
}

template <typename Function>
Function* symbol(void* library, const char* name, const std::string& path) {
    auto* function = reinterpret_cast<Function*>(dlsym(library, name));
    if (!function) throw Error(std::string("the library has no ") + name, path);
    return function;
}

// TensorRT for RTX counts its own versions, from 1 on; TensorRT that this program compiles for begins at 10.
constexpr bool kForRtx = NV_TENSORRT_MAJOR < 10;

bool current_properties(cudaDeviceProp& properties) {
    int device = 0;
    return cudaGetDevice(&device) == cudaSuccess && cudaGetDeviceProperties(&properties, device) == cudaSuccess;
}

std::string current_gpu() {
    cudaDeviceProp properties{};
    if (!current_properties(properties)) return "this GPU";
    return std::string(properties.name) + ", sm_" + std::to_string(properties.major * 10 + properties.minor);
}

}  // namespace

void Logger::log(Severity severity, const char* line) noexcept {
    try {
        if (severity <= Severity::kERROR)
            error_ = line;
        else if (severity == Severity::kWARNING)
            fprintf(stderr, "TensorRT: %s\n", line);
    } catch (...) {  // no memory for a message: nothing may leave this function
    }
}

std::string Logger::take_error() {
    std::string text;
    for (const char c : error_) text += c == '\n' ? ' ' : c;
    error_.clear();
    return text.empty() ? "" : " (" + text + ")";
}

TensorRT::TensorRT(const std::string& library) {
    const std::string usual = kForRtx ? "libtensorrt_rtx.so." : "libnvinfer.so.";
    const std::string path = library.empty() ? usual + std::to_string(NV_TENSORRT_MAJOR) : library;
    void* const opened = open_library(path, "Install TensorRT, or name the library with --tensorrt-library.");
    const int found = symbol<int32_t()>(opened, "getInferLibVersion", path)();
    version_ = std::to_string(found / 10000) + "." + std::to_string(found / 100 % 100) + "." +
               std::to_string(found % 100);
    if (found / 10000 != NV_TENSORRT_MAJOR)
        throw Error("TensorRT is version " + version_ + ", but pq-run was built for " +
                        std::to_string(NV_TENSORRT_MAJOR) + ".x",
                    path, "Build pq-run with this version's headers.");
    void* const made = symbol<void*(void*, int32_t)>(opened, "createInferRuntime_INTERNAL", path)(
        static_cast<nvinfer1::ILogger*>(&logger_), NV_TENSORRT_VERSION);
    if (!made) throw Error("TensorRT does not start" + logger_.take_error(), path);
    runtime_.reset(static_cast<nvinfer1::IRuntime*>(made));
}

void TensorRT::load_plugins(const std::string& path) {
    check_plugin_library(path);
    // A path without a slash would be looked for in the system's directories.
    const std::string full = path.find('/') == std::string::npos ? "./" + path : path;
    if (!runtime_->getPluginRegistry().loadLibrary(full.c_str()))
        throw Error("TensorRT does not take the plugin library" + logger_.take_error(), path,
                    "Build it with TensorRT's headers: pq-export plugin build --sm SM --tensorrt-include DIR.");
}

int current_sm() {
    cudaDeviceProp properties{};
    return current_properties(properties) ? properties.major * 10 + properties.minor : 0;
}

void check_plugin_library(const std::string& path) {
    const std::string full = path.find('/') == std::string::npos ? "./" + path : path;
    void* const library = open_library(full, "Build it on this machine: pq-export plugin build --sm SM.");
    const int version = symbol<decltype(pq_abi_version)>(library, "pq_abi_version", path)();
    if (version != PQ_ABI_VERSION)
        throw Error("the plugin library has interface version " + std::to_string(version) + ", pq-run " +
                        std::to_string(PQ_ABI_VERSION),
                    path, "Build both from one version of pq-export.");
    const auto variants = symbol<decltype(pq_gemm_variants)>(library, "pq_gemm_variants", path);
    if (variants(PQ_LAYOUT_W8, PQ_S8, 1, 64, 64, nullptr, 0) == 0)
        throw Error("the plugin library holds no kernel for " + current_gpu(), path,
                    "Build it for this GPU: pq-export plugin build --sm SM.");
}

}  // namespace pq::runner
