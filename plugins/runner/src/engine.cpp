#include "engine.h"

#include <algorithm>
#include <limits>

#include "checksum.h"
#include "clocks.h"
#include "half.h"

namespace pq::runner {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::OptProfileSelector;

namespace {

const char kNumLogits[] = "num_logits_to_keep";

int64_t bits_of(DataType type) {
    switch (type) {
        case DataType::kFLOAT:
        case DataType::kINT32: return 32;
        case DataType::kHALF:
        case DataType::kBF16: return 16;
        case DataType::kINT8:
        case DataType::kUINT8:
        case DataType::kFP8: return 8;
        case DataType::kINT4: return 4;
        default: return 0;
    }
}

Dims dims_of(std::initializer_list<int64_t> sizes) {
    Dims dims{};
    for (const int64_t size : sizes) dims.d[dims.nbDims++] = size;
    return dims;
}

bool begins_with(const std::string& text, const char* with) { return text.rfind(with, 0) == 0; }

}  // namespace

EngineDecoder::EngineDecoder(const Bundle& bundle, const EngineOptions& options)
    : where_(options.engine), rebuild_(bundle.rebuild()) {
    size_t total = 0;
    check_cuda(cudaMemGetInfo(&free_before_, &total), "asking for the GPU's memory");
    load(bundle, options);
    read_tensors();
    read_profiles(bundle, options);
}

void EngineDecoder::load(const Bundle& bundle, const EngineOptions& options) {
    const MappedFile file(where_);
    const EngineRecord record = engine_record(bundle, where_);
    check_engine(bundle, record, where_, sha256(file.data(), file.size()), options.force);
    tensorrt_ = std::make_unique<TensorRT>(options.tensorrt_library);
    const std::string& version = tensorrt_->version();
    if (!record.tensorrt.empty() && !begins_with(record.tensorrt + ".", (version + ".").c_str()) && !options.force)
        throw Error("the engine was built by TensorRT " + record.tensorrt + ", this is " + version, where_, rebuild_);
    if (!options.plugin.empty()) tensorrt_->load_plugins(options.plugin);
    engine_.reset(tensorrt_->runtime().deserializeCudaEngine(file.data(), file.size()));
    if (!engine_)
        throw Error("TensorRT " + version + " cannot load the engine, which another version or GPU may have built" +
                        tensorrt_->logger().take_error(),
                    where_, rebuild_);
    context_.reset(engine_->createExecutionContext());
    if (!context_)
        throw Error("TensorRT cannot make room to run the engine" + tensorrt_->logger().take_error(), where_,
                    "Free memory on the GPU, or build the engine with a smaller --max-input-len.");
}

void EngineDecoder::read_tensors() {
    int whole = 0;  // of the three inputs that every graph has
    for (int32_t i = 0; i < engine_->getNbIOTensors(); ++i) {
        const std::string name = engine_->getIOTensorName(i);
        const DataType type = engine_->getTensorDataType(name.c_str());
        const Dims dims = engine_->getTensorShape(name.c_str());
        if (name == "input_ids" || name == "attention_mask" || name == "position_ids" || name == kNumLogits) {
            if (type != DataType::kINT64) throw Error("input " + name + " is not int64", where_, rebuild_);
            if (name != kNumLogits) {
                ++whole;
                continue;
            }
            limits_logits_ = true;
            limits_logits_on_host_ = engine_->getTensorLocation(kNumLogits) == nvinfer1::TensorLocation::kHOST;
        } else if (name == "logits") {
            logits_type_ = type;
            vocabulary_ = dims.d[dims.nbDims - 1];
        } else if (begins_with(name, "past_key_values.")) {
            const std::string present = "present." + name.substr(16);
            const bool as_expected = dims.nbDims == 4 && dims.d[1] > 0 && dims.d[2] == -1 && dims.d[3] > 0;
            if (!as_expected || bits_of(type) == 0 || engine_->getTensorDataType(present.c_str()) != type)
                throw Error("input " + name + " is not a cache [batch, heads, past, width] with the output " + present,
                            where_, rebuild_);
            tensors_.push_back({name, present, dims.d[1], dims.d[3], bits_of(type)});
        } else if (!begins_with(name, "present.")) {
            throw Error("pq-run does not know the engine's tensor " + name, where_,
                        "Build it from this bundle's model.onnx.");
        }
    }
    const bool floating =
        logits_type_ == DataType::kFLOAT || logits_type_ == DataType::kHALF || logits_type_ == DataType::kBF16;
    if (whole != 3 || !floating || vocabulary_ <= 0 || tensors_.empty())
        throw Error("the engine has not the inputs and outputs of a pq-export graph", where_,
                    "Build it from this bundle's model.onnx.");
}

void EngineDecoder::read_profiles(const Bundle& bundle, const EngineOptions& options) {
    const auto range = [&](const char* name, int32_t profile, int dimension) {
        return std::array<int64_t, 2>{
            engine_->getProfileShape(name, profile, OptProfileSelector::kMIN).d[dimension],
            engine_->getProfileShape(name, profile, OptProfileSelector::kMAX).d[dimension]};
    };
    int64_t most = 0;
    for (int32_t i = 0; i < engine_->getNbOptimizationProfiles(); ++i) {
        const Profile profile = {range("input_ids", i, 0), range("input_ids", i, 1),
                                 range(tensors_[0].past.c_str(), i, 2), range("attention_mask", i, 1)};
        // What a prefill can fill further is of no use: nothing could be generated behind it.
        if (profile.tokens[0] <= 1) most = std::max(most, std::min(profile.past[1] + 1, profile.all[1]));
        max_input_ = std::max(max_input_, std::min(profile.tokens[1], profile.all[1]));
        profiles_.push_back(profile);
    }
    if (most < 2) throw Error("no profile of the engine allows one token behind a prompt", where_, rebuild_);
    if (options.max_seq_len > most)
        throw Error("--max-seq-len is " + std::to_string(options.max_seq_len) + ", but the engine holds " +
                        std::to_string(most) + " tokens",
                    where_, "Lower it, or build the engine with a larger --max-seq-len.");
    capacity_ = std::min(options.max_seq_len ? options.max_seq_len : most, bundle.context());
}

bool EngineDecoder::Profile::fits(int64_t batch_size, int64_t new_tokens, int64_t past_tokens) const {
    const auto in = [](const std::array<int64_t, 2>& range, int64_t value) {
        return value >= range[0] && value <= range[1];
    };
    return in(batch, batch_size) && in(tokens, new_tokens) && in(past, past_tokens) &&
           in(all, past_tokens + new_tokens);
}

void EngineDecoder::reset(int64_t batch) {
    if (cache_ && cache_->batch() == batch) return cache_->reset();
    cache_ = std::make_unique<Cache>(tensors_, batch, capacity_);
    for (auto& set : sets_) {
        set.resize(tensors_.size());
        for (size_t i = 0; i < tensors_.size(); ++i)
            set[i].reserve(static_cast<size_t>(tensors_[i].bytes(batch, capacity_)), "the KV cache");
    }
    host_one_.reserve(sizeof(int64_t), "an input");
    *static_cast<int64_t*>(host_one_.data()) = 1;
    const std::vector<int64_t> ones(static_cast<size_t>(batch * capacity_), 1);
    ones_.reserve(ones.size() * sizeof(int64_t), "the attention mask");
    check_cuda(cudaMemcpy(ones_.data(), ones.data(), ones.size() * sizeof(int64_t), cudaMemcpyHostToDevice),
               "copying the attention mask");
}

void EngineDecoder::use_profile(int64_t tokens) {
    const int count = static_cast<int>(profiles_.size());
    for (int i = 0; i < count; ++i) {
        const int candidate = tokens == 1 ? count - 1 - i : i;
        if (!profiles_[candidate].fits(cache_->batch(), tokens, cache_->length())) continue;
        if (candidate != current_profile_ && !context_->setOptimizationProfileAsync(candidate, stream_.get()))
            throw Error("TensorRT refuses the profile" + tensorrt_->logger().take_error(), where_, rebuild_);
        current_profile_ = candidate;
        return;
    }
    throw Error("no profile of the engine allows " + std::to_string(cache_->batch()) + " x " +
                    std::to_string(tokens) + " tokens behind " + std::to_string(cache_->length()),
                where_, "Build it with a larger --max-batch-size, --max-input-len or --max-seq-len.");
}

void EngineDecoder::set_input(const char* name, std::initializer_list<int64_t> shape, const void* address) {
    if (!context_->setInputShape(name, dims_of(shape)) ||
        !context_->setTensorAddress(name, const_cast<void*>(address)))
        throw Error(std::string("TensorRT refuses the input ") + name + tensorrt_->logger().take_error(), where_,
                    rebuild_);
}

void EngineDecoder::bind(int64_t tokens) {
    const int64_t batch = cache_->batch(), past = cache_->length();
    set_input("input_ids", {batch, tokens}, ids_.data());
    set_input("position_ids", {batch, tokens}, positions_.data());
    set_input("attention_mask", {batch, past + tokens}, ones_.data());
    if (limits_logits_) set_input(kNumLogits, {1}, limits_logits_on_host_ ? host_one_.data() : ones_.data());
    for (size_t i = 0; i < tensors_.size(); ++i) {
        const CacheTensor& tensor = tensors_[i];
        set_input(tensor.past.c_str(), {batch, tensor.heads, past, tensor.width},
                  sets_[cache_->past_set()][i].data());
        if (!context_->setTensorAddress(tensor.present.c_str(), sets_[cache_->present_set()][i].data()))
            throw Error("TensorRT refuses the output " + tensor.present + tensorrt_->logger().take_error(), where_,
                        rebuild_);
    }
    // Without num_logits_to_keep the engine writes the logits of every token.
    const int64_t rows = limits_logits_ ? 1 : tokens;
    logits_.reserve(static_cast<size_t>(batch * rows * vocabulary_ * bits_of(logits_type_) / 8), "the logits");
    if (!context_->setTensorAddress("logits", logits_.data()))
        throw Error("TensorRT refuses the output logits" + tensorrt_->logger().take_error(), where_, rebuild_);
}

const float* EngineDecoder::step(const std::vector<int64_t>& ids) {
    const int64_t tokens = static_cast<int64_t>(ids.size()) / cache_->batch();
    cache_->expect_room(tokens);
    use_profile(tokens);

    const size_t bytes = ids.size() * sizeof(int64_t);
    ids_.reserve(bytes, "token ids");
    positions_.reserve(bytes, "position ids");
    staging_.reserve(2 * bytes, "token ids");
    const std::vector<int64_t> positions = cache_->positions(tokens);
    auto* const staged = static_cast<int64_t*>(staging_.data());
    std::copy(ids.begin(), ids.end(), staged);
    std::copy(positions.begin(), positions.end(), staged + ids.size());
    check_cuda(cudaMemcpyAsync(ids_.data(), staged, bytes, cudaMemcpyHostToDevice, stream_.get()), "copying the ids");
    check_cuda(cudaMemcpyAsync(positions_.data(), staged + ids.size(), bytes, cudaMemcpyHostToDevice, stream_.get()),
               "copying the position ids");

    bind(tokens);
    if (!context_->enqueueV3(stream_.get()))
        throw Error("the engine does not run" + tensorrt_->logger().take_error(), where_, rebuild_);
    const float* const logits = copy_logits();
    cache_->advance(tokens);
    return logits;
}

const float* EngineDecoder::copy_logits() {
    const int64_t batch = cache_->batch();
    const Dims shape = context_->getTensorShape("logits");
    const int64_t rows = shape.nbDims == 3 ? shape.d[1] : 0;
    const size_t row = static_cast<size_t>(vocabulary_ * bits_of(logits_type_) / 8);
    if (rows < 1 || static_cast<size_t>(batch * rows) * row > logits_.size())
        throw Error("the logits have not the expected shape", where_, rebuild_);
    host_logits_.reserve(static_cast<size_t>(batch) * row, "the logits");
    const auto* const last = static_cast<const char*>(logits_.data()) + static_cast<size_t>(rows - 1) * row;
    check_cuda(cudaMemcpy2DAsync(host_logits_.data(), row, last, static_cast<size_t>(rows) * row, row,
                                 static_cast<size_t>(batch), cudaMemcpyDeviceToHost, stream_.get()),
               "copying the logits");
    stream_.synchronize();
    if (logits_type_ == DataType::kFLOAT) return static_cast<const float*>(host_logits_.data());
    wide_logits_.resize(static_cast<size_t>(batch * vocabulary_));
    const auto* const values = static_cast<const uint16_t*>(host_logits_.data());
    const auto convert = logits_type_ == DataType::kHALF ? half_to_float : bfloat16_to_float;
    std::transform(values, values + wide_logits_.size(), wide_logits_.begin(), convert);
    return wide_logits_.data();
}

DeviceFacts EngineDecoder::facts() const {
    DeviceFacts facts;
    facts.tensorrt = tensorrt_->version();
    int device = 0;
    cudaDeviceProp properties{};
    if (cudaGetDevice(&device) == cudaSuccess && cudaGetDeviceProperties(&properties, device) == cudaSuccess) {
        facts.name = properties.name;
        facts.sm = properties.major * 10 + properties.minor;
    }
    size_t free = 0, total = 0;
    if (cudaMemGetInfo(&free, &total) == cudaSuccess) {
        facts.memory_bytes = static_cast<int64_t>(total);
        facts.memory_used_bytes = static_cast<int64_t>(free_before_) - static_cast<int64_t>(free);
    }
    return facts;
}

std::string EngineDecoder::clocks() const {
    int device = 0;
    char bus_id[32] = "";
    if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetPCIBusId(bus_id, sizeof(bus_id), device) != cudaSuccess)
        bus_id[0] = 0;
    return gpu_clocks(bus_id);
}

}  // namespace pq::runner
