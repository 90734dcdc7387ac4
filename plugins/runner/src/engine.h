// A TensorRT engine as a Decoder. Level of the interface: TensorRT 10.3 (JetPack 6.2).
#pragma once

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "bundle.h"
#include "cache.h"
#include "cuda.h"
#include "generate.h"
#include "statistics.h"
#include "tensorrt_library.h"

namespace pq::runner {

struct EngineOptions {
    std::string engine;            // file
    std::string plugin;            // libpq.so; empty: none
    std::string tensorrt_library;  // empty: as installed
    int64_t max_seq_len = 0;       // 0: as many as the engine allows
    bool force = false;            // load an engine with a wrong checksum, or from another TensorRT
};

// Inputs and outputs are those of pq-export's graphs, any number of optimization profiles: what each step needs is
// looked for in them, among those for one token in the last first (prefill is 0, decode is 1).
class EngineDecoder : public Decoder {
public:
    // Error: no GPU, no TensorRT, a plugin library or an engine that does not belong here.
    EngineDecoder(const Bundle& bundle, const EngineOptions& options);

    int64_t vocabulary() const override { return vocabulary_; }
    int64_t capacity() const override { return capacity_; }
    int64_t max_input() const override { return max_input_; }
    void reset(int64_t batch) override;
    const float* step(const std::vector<int64_t>& ids) override;

    const Cache& cache() const { return *cache_; }  // after the first reset()
    DeviceFacts facts() const;
    std::string clocks() const;

private:
    // Shapes that a profile allows: [minimum, maximum] of each of our dimensions.
    struct Profile {
        std::array<int64_t, 2> batch, tokens, past, all;
        bool fits(int64_t batch_size, int64_t new_tokens, int64_t past_tokens) const;
    };

    void load(const Bundle& bundle, const EngineOptions& options);
    void read_tensors();
    void read_profiles(const Bundle& bundle, const EngineOptions& options);
    void use_profile(int64_t tokens);
    void set_input(const char* name, std::initializer_list<int64_t> shape, const void* address);
    void bind(int64_t tokens);
    const float* copy_logits();

    std::string where_;    // the engine's file, for messages
    std::string rebuild_;  // and how to get another one
    size_t free_before_ = 0;
    std::unique_ptr<TensorRT> tensorrt_;
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
    std::unique_ptr<nvinfer1::IExecutionContext> context_;
    Stream stream_;

    std::vector<CacheTensor> tensors_;
    std::vector<Profile> profiles_;
    nvinfer1::DataType logits_type_ = nvinfer1::DataType::kFLOAT;
    bool limits_logits_ = false;          // it has the input num_logits_to_keep
    bool limits_logits_on_host_ = false;  // which TensorRT reads on the host, as it makes a shape
    int64_t vocabulary_ = 0, capacity_ = 0, max_input_ = 0;

    std::unique_ptr<Cache> cache_;
    int current_profile_ = -1;
    std::vector<DeviceBuffer> sets_[2];
    // Masks have no padding, so that all of them are the front of one buffer of ones.
    DeviceBuffer ones_, ids_, positions_, logits_;
    HostBuffer staging_, host_one_, host_logits_;
    std::vector<float> wide_logits_;  // where the engine's have 16 bits
};

}  // namespace pq::runner
