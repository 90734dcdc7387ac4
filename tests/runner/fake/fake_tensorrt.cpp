// A TensorRT whose engines are JSON and whose model is a sum: a token's code is its id plus a constant of tensor, head
// and column, modulo 2^(bits-1), the cache holds codes, and the most probable next token is
// (sum of the codes of all tokens + their number) modulo the vocabulary, read from the cache. So a cache that is
// mixed up, a wrong mask, position or address gives another text or an error.
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "NvInferRuntime.h"

using namespace nvinfer1;
using Json = nlohmann::json;

namespace {

ILogger* logger = nullptr;

bool fail(const std::string& line) {
    logger->log(ILogger::Severity::kERROR, line.c_str());
    return false;
}

struct Tensor {
    DataType type;
    std::vector<int64_t> shape;
};

Dims dims_of(const std::vector<int64_t>& shape) {
    Dims dims{};
    for (const int64_t size : shape) dims.d[dims.nbDims++] = size;
    return dims;
}

// Elements of 4 or 8 bits.
struct Codes {
    unsigned char* bytes;
    int bits;
    int get(int64_t i) const { return bits == 8 ? bytes[i] : (bytes[i / 2] >> (i % 2 * 4)) & 15; }
    void set(int64_t i, int value) const {
        if (bits == 8)
            bytes[i] = static_cast<unsigned char>(value);
        else
            bytes[i / 2] = static_cast<unsigned char>((bytes[i / 2] & (i % 2 ? 0x0F : 0xF0)) | value << (i % 2 * 4));
    }
};

struct Engine;

struct Context : IExecutionContext {
    explicit Context(const Engine& engine) : engine_(engine) {}
    bool setInputShape(const char* name, const Dims& dims) noexcept override;
    bool setTensorAddress(const char* name, void* data) noexcept override {
        addresses_[name] = data;
        return data || fail(std::string("no address for ") + name);
    }
    bool setOptimizationProfileAsync(int32_t profile, cudaStream_t) noexcept override {
        profile_ = profile;
        shapes_.clear();  // as TensorRT does
        return true;
    }
    Dims getTensorShape(const char* name) const noexcept override { return dims_of(shapes_.at(name)); }
    bool enqueueV3(cudaStream_t) noexcept override;

private:
    bool run();
    bool update_cache(int64_t batch, int64_t past, int64_t tokens, std::vector<int64_t>& sums);

    const Engine& engine_;
    int32_t profile_ = 0;
    std::map<std::string, std::vector<int64_t>> shapes_;
    std::map<std::string, void*> addresses_;
};

struct Engine : ICudaEngine {
    explicit Engine(const Json& spec) : spec(spec), bits(spec["bits"]), heads(spec["heads"]), width(spec["width"]) {
        for (const char* name : {"input_ids", "attention_mask", "position_ids"}) add(name, DataType::kINT64, {-1, -1});
        const std::string limit = spec["num_logits"];
        if (limit != "none") add("num_logits_to_keep", DataType::kINT64, {1});
        for (int i = 0; i < 2 * spec["layers"].get<int>(); ++i)
            for (const char* side : {"past_key_values.", "present."})
                add(side + std::to_string(i / 2) + (i % 2 ? ".value" : ".key"),
                    bits == 4 ? DataType::kINT4 : DataType::kINT8, {-1, heads, -1, width});
        add("logits", spec["logits"] == "half" ? DataType::kHALF : DataType::kFLOAT, {-1, -1, spec["vocabulary"]});
        const Json extra = spec.value("extra", Json::object());
        for (const auto& [name, shape] : extra.items())
            add(name, DataType::kFLOAT, shape.get<std::vector<int64_t>>());
    }
    void add(const std::string& name, DataType type, std::vector<int64_t> shape) {
        names.push_back(name);
        tensors[name] = {type, std::move(shape)};
    }
    IExecutionContext* createExecutionContext() noexcept override { return new Context(*this); }
    int32_t getNbIOTensors() const noexcept override { return static_cast<int32_t>(names.size()); }
    const char* getIOTensorName(int32_t index) const noexcept override { return names[index].c_str(); }
    DataType getTensorDataType(const char* name) const noexcept override { return tensors.at(name).type; }
    Dims getTensorShape(const char* name) const noexcept override { return dims_of(tensors.at(name).shape); }
    TensorLocation getTensorLocation(const char* name) const noexcept override {
        const bool host = spec["num_logits"] == "host" && std::string(name) == "num_logits_to_keep";
        return host ? TensorLocation::kHOST : TensorLocation::kDEVICE;
    }
    int32_t getNbOptimizationProfiles() const noexcept override {
        return static_cast<int32_t>(spec["profiles"].size());
    }
    Dims getProfileShape(const char* name, int32_t profile, OptProfileSelector select) const noexcept override {
        const Json& p = spec["profiles"][profile];
        const int end = select == OptProfileSelector::kMIN ? 0 : 1;
        const int64_t batch = p["batch"][end], tokens = p["tokens"][end], past = p["past"][end];
        std::vector<int64_t> shape = tensors.at(name).shape;
        if (shape.size() == 4) return dims_of({batch, heads, past, width});
        if (shape.size() == 1) return dims_of(shape);
        return dims_of({batch, std::string(name) == "attention_mask" ? past + tokens : tokens});
    }

    Json spec;
    int bits;
    int64_t heads, width;
    std::vector<std::string> names;
    std::map<std::string, Tensor> tensors;
};

bool Context::setInputShape(const char* name, const Dims& dims) noexcept {
    const Dims least = engine_.getProfileShape(name, profile_, OptProfileSelector::kMIN);
    const Dims most = engine_.getProfileShape(name, profile_, OptProfileSelector::kMAX);
    for (int i = 0; i < dims.nbDims; ++i)
        if (dims.nbDims != least.nbDims || dims.d[i] < least.d[i] || dims.d[i] > most.d[i])
            return fail(std::string(name) + " is outside of profile " + std::to_string(profile_));
    shapes_[name].assign(dims.d, dims.d + dims.nbDims);
    return true;
}

bool Context::enqueueV3(cudaStream_t) noexcept {
    try {
        return run();
    } catch (const std::exception& error) {  // a shape or an address that was not set
        return fail(error.what());
    }
}

bool Context::update_cache(int64_t batch, int64_t past, int64_t tokens, std::vector<int64_t>& sums) {
    const int modulus = 1 << (engine_.bits - 1);
    const auto* const ids = static_cast<const int64_t*>(addresses_.at("input_ids"));
    int64_t number = 0;
    for (const auto& [name, tensor] : engine_.tensors) {
        if (name.rfind("past_key_values.", 0) != 0) continue;
        const std::string present = "present." + name.substr(16);
        const Codes from{static_cast<unsigned char*>(addresses_.at(name)), engine_.bits};
        const Codes to{static_cast<unsigned char*>(addresses_.at(present)), engine_.bits};
        if (from.bytes == to.bytes) return fail(name + " and " + present + " are one buffer");
        if (shapes_.at(name) != std::vector<int64_t>{batch, engine_.heads, past, engine_.width})
            return fail(name + " has another shape than the rest");
        for (int64_t b = 0; b < batch; ++b)
            for (int64_t h = 0; h < engine_.heads; ++h)
                for (int64_t t = 0; t < past + tokens; ++t)
                    for (int64_t w = 0; w < engine_.width; ++w) {
                        const int64_t row = b * engine_.heads + h, constant = number * 5 + h * 3 + w;
                        const int code =
                            t < past ? from.get((row * past + t) * engine_.width + w)
                                     : static_cast<int>((ids[b * tokens + t - past] + constant) % modulus);
                        to.set((row * (past + tokens) + t) * engine_.width + w, code);
                        const int64_t value = ((code - constant) % modulus + modulus) % modulus;
                        if (number + h + w == 0)
                            sums[b] += value;  // others must tell the same
                        else
                            sums[batch + b] += value;
                    }
        ++number;
        memset(from.bytes, 0xDD, static_cast<size_t>(batch * engine_.heads * past * engine_.width * engine_.bits / 8));
    }
    for (int64_t b = 0; b < batch; ++b)
        if (sums[batch + b] != sums[b] * (number * engine_.heads * engine_.width - 1))
            return fail("the tensors of the cache disagree");
    return true;
}

bool Context::run() {
    const auto& ids = shapes_.at("input_ids");
    const int64_t batch = ids[0], tokens = ids[1], past = shapes_.at("past_key_values.0.key")[2];
    if (shapes_.at("position_ids") != ids || shapes_.at("attention_mask") != std::vector<int64_t>{batch, past + tokens})
        return fail("mask or positions have another shape than the ids");
    const auto* const mask = static_cast<const int64_t*>(addresses_.at("attention_mask"));
    const auto* const positions = static_cast<const int64_t*>(addresses_.at("position_ids"));
    for (int64_t i = 0; i < batch * (past + tokens); ++i)
        if (mask[i] != 1) return fail("the mask is not all ones");
    for (int64_t i = 0; i < batch * tokens; ++i)
        if (positions[i] != past + i % tokens) return fail("the positions do not go on behind the cache");
    std::vector<int64_t> sums(static_cast<size_t>(2 * batch), 0);
    if (!update_cache(batch, past, tokens, sums)) return false;

    const bool limited = engine_.spec["num_logits"] != "none";
    if (limited && *static_cast<const int64_t*>(addresses_.at("num_logits_to_keep")) != 1)
        return fail("num_logits_to_keep is not 1");
    const int64_t vocabulary = engine_.spec["vocabulary"], rows = limited ? 1 : tokens;
    shapes_["logits"] = {batch, rows, vocabulary};
    const bool half = engine_.spec["logits"] == "half";
    void* const logits = addresses_.at("logits");
    for (int64_t i = 0; i < batch * rows * vocabulary; ++i) {
        const int64_t b = i / (rows * vocabulary), row = i / vocabulary % rows, v = i % vocabulary;
        const bool next = row + 1 == rows && v == (sums[b] + past + tokens) % vocabulary;
        if (half)
            static_cast<uint16_t*>(logits)[i] = next ? 0x4200 : 0xC200;  // 3 and -3
        else
            static_cast<float*>(logits)[i] = next ? 3.0f : -3.0f;
    }
    if (const char* const log = getenv("FAKE_LOG"))
        std::ofstream(log, std::ios::app) << profile_ << " " << batch << " " << tokens << " " << past << "\n";
    return getenv("FAKE_ENQUEUE_FAILS") ? fail("an illegal memory access was encountered") : true;
}

struct Registry : IPluginRegistry {
    void* loadLibrary(const char* path) noexcept override {
        if (getenv("FAKE_REGISTRY_FAILS")) {
            fail("Unable to load library");
            return nullptr;
        }
        return const_cast<char*>(path);
    }
};

struct Runtime : IRuntime {
    IPluginRegistry& getPluginRegistry() noexcept override { return registry; }
    ICudaEngine* deserializeCudaEngine(const void* blob, std::size_t size) noexcept override {
        const char* const text = static_cast<const char*>(blob);
        const Json spec = Json::parse(text, text + size, nullptr, false);
        if (!spec.is_discarded()) return new Engine(spec);
        fail("Version tag does not match.\nNote: Current Version: 239, Serialized Engine Version: 240");
        return nullptr;
    }
    Registry registry;
};

}  // namespace

extern "C" int32_t getInferLibVersion() noexcept {
    const char* const version = getenv("FAKE_TENSORRT");
    return version ? atoi(version) : 100300;
}

extern "C" void* createInferRuntime_INTERNAL(void* given, int32_t) noexcept {
    logger = static_cast<ILogger*>(given);
    return static_cast<IRuntime*>(new Runtime);
}
