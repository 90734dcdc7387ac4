#include "host.h"

#include <cstring>

namespace host {
namespace {

struct Logger : nvinfer1::ILogger {
    std::vector<std::string> lines;
    void log(Severity, const char* line) noexcept override { lines.emplace_back(line); }
} logger;

struct Finder final : nvinfer1::ILoggerFinder {
    nvinfer1::ILogger* findLogger() override { return &logger; }
} finder;

}  // namespace

std::vector<std::string>& messages() { return logger.lines; }

void Fields::add(const char* name, nvinfer1::PluginFieldType type, int32_t length, const void* value, size_t bytes) {
    const std::string& kept_name = kept_.emplace_back(name);
    const std::string& kept_value = kept_.emplace_back(static_cast<const char*>(value), bytes);
    fields_.emplace_back(kept_name.c_str(), kept_value.data(), type, length);
}
Fields& Fields::set(const char* name, int32_t value) {
    add(name, nvinfer1::PluginFieldType::kINT32, 1, &value, sizeof(value));
    return *this;
}
Fields& Fields::set(const char* name, float value) {
    add(name, nvinfer1::PluginFieldType::kFLOAT32, 1, &value, sizeof(value));
    return *this;
}
Fields& Fields::set(const char* name, const char* value) {
    add(name, nvinfer1::PluginFieldType::kCHAR, static_cast<int32_t>(strlen(value)), value, strlen(value));
    return *this;
}
Fields Fields::copy_of(const nvinfer1::PluginFieldCollection& fields) {
    Fields copy;
    for (int32_t i = 0; i < fields.nbFields; ++i) {
        const nvinfer1::PluginField& field = fields.fields[i];
        const size_t size = field.type == nvinfer1::PluginFieldType::kCHAR ? 1 : 4;
        copy.add(field.name, field.type, field.length, field.data, size * field.length);
    }
    return copy;
}
const nvinfer1::PluginFieldCollection* Fields::collection() {
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    return &collection_;
}

Node::Node(nvinfer1::IPluginV3* made) : plugin(made) {
    if (!made) return;
    using Type = nvinfer1::PluginCapabilityType;
    build = static_cast<nvinfer1::IPluginV3OneBuild*>(made->getCapabilityInterface(Type::kBUILD));
    runtime = static_cast<nvinfer1::IPluginV3OneRuntime*>(made->getCapabilityInterface(Type::kRUNTIME));
}

Node Node::reloaded(const char* op) const {
    Fields kept = Fields::copy_of(*runtime->getFieldsToSerialize());
    return create(op, op, kept, nvinfer1::TensorRTPhase::kRUNTIME);
}

Node create(const char* op, const char* layer, Fields& fields, nvinfer1::TensorRTPhase phase) {
    setLoggerFinder(&finder);
    int32_t count = 0;
    nvinfer1::IPluginCreatorInterface* const* creators = getCreators(count);
    for (int32_t i = 0; i < count; ++i) {
        auto* creator = static_cast<nvinfer1::IPluginCreatorV3One*>(creators[i]);
        if (strcmp(creator->getPluginName(), op) == 0 && strcmp(creator->getPluginNamespace(), "pq") == 0)
            return Node(creator->createPlugin(layer, fields.collection(), phase));
    }
    return {};
}

Dims dims(std::initializer_list<int64_t> sizes) {
    Dims made{};
    for (const int64_t size : sizes) made.d[made.nbDims++] = size;
    return made;
}

PluginTensorDesc tensor(DataType type, std::initializer_list<int64_t> sizes) {
    return {dims(sizes), type, nvinfer1::TensorFormat::kLINEAR, 1.0f};
}

DynamicPluginTensorDesc dynamic(DataType type, std::initializer_list<int64_t> rows, int64_t columns) {
    const int64_t* r = rows.begin();
    return {tensor(type, {-1, columns}), dims({r[0], columns}), dims({r[2], columns}), dims({r[1], columns})};
}

}  // namespace host
