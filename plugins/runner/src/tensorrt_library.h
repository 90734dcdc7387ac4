// libnvinfer, opened when the program starts: it can be built and tested where TensorRT is not installed.
#pragma once

#include <NvInferRuntime.h>

#include <memory>
#include <string>

namespace pq::runner {

// TensorRT's messages: warnings go to standard error, the last error is kept for the line that the user sees.
class Logger : public nvinfer1::ILogger {
public:
    void log(Severity severity, const char* line) noexcept override;
    // " (the last error)", or nothing; forgets it.
    std::string take_error();

private:
    std::string error_;
};

class TensorRT {
public:
    // `library`: a path, or empty for the library of the headers: libnvinfer.so.10, or libtensorrt_rtx.so.1 where they are
    // those of TensorRT for RTX. Error: it cannot be loaded, or is another one's.
    explicit TensorRT(const std::string& library);

    nvinfer1::IRuntime& runtime() { return *runtime_; }
    Logger& logger() { return logger_; }
    const std::string& version() const { return version_; }  // "10.3.0"
    // Hands libpq.so to TensorRT's registry. Error: it is for another GPU or interface, or TensorRT refuses it.
    void load_plugins(const std::string& path);

private:
    Logger logger_;  // outlives the runtime
    std::unique_ptr<nvinfer1::IRuntime> runtime_;
    std::string version_ = "unknown";
};

// Compute capability of the current GPU, 87 for 8.7; 0 where there is none.
int current_sm();

// Error unless libpq.so has this program's interface and kernels for the current GPU.
void check_plugin_library(const std::string& path);

}  // namespace pq::runner
