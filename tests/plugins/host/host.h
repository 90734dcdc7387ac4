// As much of TensorRT as a plugin meets: a logger, fields, tensor descriptions, and the order of calls.
#pragma once

#include <NvInferRuntime.h>

#include <deque>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "recorder.h"

extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count);
extern "C" void setLoggerFinder(nvinfer1::ILoggerFinder* finder);

namespace host {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

// The messages that the plugin has logged.
std::vector<std::string>& messages();

// Attributes of a node, or what an engine keeps of them.
class Fields {
public:
    Fields() = default;
    Fields(Fields&&) = default;  // a copy would point to the original's values
    Fields& set(const char* name, int32_t value);
    Fields& set(const char* name, float value);
    Fields& set(const char* name, const char* value);
    static Fields copy_of(const nvinfer1::PluginFieldCollection& fields);
    const nvinfer1::PluginFieldCollection* collection();

private:
    void add(const char* name, nvinfer1::PluginFieldType type, int32_t length, const void* value, size_t bytes);

    std::deque<std::string> kept_;  // a deque: what fields point to must not move
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_{};
};

// A plugin object and its three faces.
struct Node {
    std::unique_ptr<nvinfer1::IPluginV3> plugin;
    nvinfer1::IPluginV3OneBuild* build = nullptr;
    nvinfer1::IPluginV3OneRuntime* runtime = nullptr;

    Node() = default;
    explicit Node(nvinfer1::IPluginV3* made);
    // As an engine does: fields out, a new plugin in.
    Node reloaded(const char* op) const;
};
Node create(const char* op, const char* layer, Fields& fields,
            nvinfer1::TensorRTPhase phase = nvinfer1::TensorRTPhase::kBUILD);

Dims dims(std::initializer_list<int64_t> sizes);
PluginTensorDesc tensor(DataType type, std::initializer_list<int64_t> sizes);
// `rows` are the minimum, optimum and maximum of a dynamic first dimension.
DynamicPluginTensorDesc dynamic(DataType type, std::initializer_list<int64_t> rows, int64_t columns);

}  // namespace host
