// What the TensorRT plugins share: messages in TensorRT's log, attributes, one base class, one creator.
//
// The interface is IPluginV3 of TensorRT 10.0, which 10.3 (JetPack 6.2), 11 and TensorRT for RTX still have. Nothing
// links to libnvinfer: the headers' classes are pure interfaces, and the library reaches us through getCreators().
#pragma once

#include <NvInferRuntime.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <new>

#include "pq_kernels.h"

namespace pq::trt {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

inline constexpr char kNamespace[] = "pq";  // of the plugins, and the domain of their ONNX nodes
inline constexpr char kVersion[] = "1";

// ---- Messages ---------------------------------------------------------------------------------------------------

// Which node a message is about.
struct Where {
    const char* op;
    const char* layer;
};
void set_logger_finder(void* finder);
// An error in TensorRT's log, "pq::OP LAYER: ...". Returns 1, what IPluginV3 calls a failure.
int32_t fail(Where where, const char* format, ...) __attribute__((format(printf, 2, 3)));
void warn(Where where, const char* format, ...) __attribute__((format(printf, 2, 3)));
// What a kernel's pq_status means for enqueue(): 0, or 1 and an error in the log.
int32_t report(Where where, const char* function, int status);

// ---- Tensors ----------------------------------------------------------------------------------------------------

const char* type_name(DataType type);
bool is_floating(DataType type);
// The kernels' type of a floating or code tensor, -1 for the others.
int kernel_type(DataType type);
// Product of all dimensions but the last, 1 for a vector; -1 where one is unknown or the product is no int32.
int32_t rows_of(const Dims& dims);
// The last dimension, -1 if there is none or it is unknown.
int64_t columns_of(const Dims& dims);
// Checks one tensor's dimensions as far as they are known while the network is built.
bool check_shape(Where where, const char* tensor, const DimsExprs& dims, std::initializer_list<int64_t> expected);
bool check_columns(Where where, const char* tensor, const DimsExprs& dims, int64_t expected);
bool check_type(Where where, const char* tensor, DataType type, DataType expected);

// ---- Attributes -------------------------------------------------------------------------------------------------
// An attribute struct lists its members once, in each(): the reader, the writer and the creator's list of names are
// visitors of it. The same fields come from an ONNX node and from a serialized engine.

enum class Presence {
    kRequired,
    kOptional,
    kInternal  // only in engines: a parser would warn about an attribute that no node has
};

inline constexpr int kMaxFields = 16;
inline constexpr size_t kNameLength = 160;

class FieldReader {
public:
    FieldReader(Where where, const PluginFieldCollection& fields) : where_(where), fields_(fields) {}
    void operator()(const char* name, int32_t& value, Presence presence);
    void operator()(const char* name, float& value, Presence presence);
    template <size_t kLength>
    void operator()(const char* name, char (&value)[kLength], Presence presence) {
        text(name, value, kLength, presence);
    }
    bool ok() const { return ok_; }

private:
    const PluginField* find(const char* name, Presence presence);
    void text(const char* name, char* value, size_t capacity, Presence presence);
    void wrong(const char* name, const char* expected);

    Where where_;
    const PluginFieldCollection& fields_;
    bool ok_ = true;
};

class FieldWriter {
public:
    explicit FieldWriter(bool with_internal) : with_internal_(with_internal) {}
    void operator()(const char* name, const int32_t& value, Presence presence);
    void operator()(const char* name, const float& value, Presence presence);
    template <size_t kLength>
    void operator()(const char* name, const char (&value)[kLength], Presence presence) {
        text(name, value, presence);
    }
    const PluginFieldCollection* collection();

private:
    void text(const char* name, const char* value, Presence presence);
    void add(const char* name, const void* value, PluginFieldType type, int32_t length, Presence presence);

    bool with_internal_;
    PluginField fields_[kMaxFields];
    PluginFieldCollection collection_{0, fields_};
};

void copy_text(char* to, size_t capacity, const char* from, size_t length);

// ---- The base class ---------------------------------------------------------------------------------------------

// `Derived` has a name kName and bool check(Where, const Attributes&), and overrides what concerns its tensors.
// `Attributes` has a text `layer`, for messages at run time, and each().
template <typename Derived, typename AttributesOf>
class Plugin : public nvinfer1::IPluginV3,
               public nvinfer1::IPluginV3OneCore,
               public nvinfer1::IPluginV3OneBuild,
               public nvinfer1::IPluginV3OneRuntime {
public:
    using Attributes = AttributesOf;

    explicit Plugin(const Attributes& attributes) : attributes_(attributes) {}

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
        switch (type) {
            case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
            case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
            case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }
    nvinfer1::IPluginV3* clone() noexcept override {
        return new (std::nothrow) Derived(static_cast<const Derived&>(*this));
    }
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }

    const char* getPluginName() const noexcept override { return Derived::kName; }
    const char* getPluginVersion() const noexcept override { return kVersion; }
    const char* getPluginNamespace() const noexcept override { return kNamespace; }

    int32_t configurePlugin(const DynamicPluginTensorDesc*, int32_t, const DynamicPluginTensorDesc*,
                            int32_t) noexcept override {
        return 0;
    }
    int32_t onShapeChange(const PluginTensorDesc*, int32_t, const PluginTensorDesc*, int32_t) noexcept override {
        return 0;
    }
    const PluginFieldCollection* getFieldsToSerialize() noexcept override {
        fields_ = FieldWriter(true);
        Attributes::each(attributes_, fields_);
        return fields_.collection();
    }

protected:
    Where where() const { return {Derived::kName, attributes_.layer}; }

    Attributes attributes_;

private:
    FieldWriter fields_{true};  // its pointers are this object's: filled when asked for, never copied to a clone
};

template <typename PluginOf>
class Creator final : public nvinfer1::IPluginCreatorV3One {
public:
    nvinfer1::IPluginV3* createPlugin(const char* name, const PluginFieldCollection* fields,
                                      nvinfer1::TensorRTPhase) noexcept override {
        typename PluginOf::Attributes attributes;
        copy_text(attributes.layer, sizeof(attributes.layer), name, kNameLength);
        const Where where{PluginOf::kName, name};
        FieldReader reader(where, *fields);
        PluginOf::Attributes::each(attributes, reader);
        if (!reader.ok() || !PluginOf::check(where, attributes)) return nullptr;
        return new (std::nothrow) PluginOf(attributes);
    }
    const PluginFieldCollection* getFieldNames() noexcept override {
        names_ = FieldWriter(false);
        PluginOf::Attributes::each(defaults_, names_);
        return names_.collection();
    }
    const char* getPluginName() const noexcept override { return PluginOf::kName; }
    const char* getPluginVersion() const noexcept override { return kVersion; }
    const char* getPluginNamespace() const noexcept override { return kNamespace; }

private:
    typename PluginOf::Attributes defaults_;
    FieldWriter names_{false};
};

// One creator of each plugin, for getCreators().
nvinfer1::IPluginCreatorInterface* linear_creator();
nvinfer1::IPluginCreatorInterface* rmsnorm_quantize_creator();
nvinfer1::IPluginCreatorInterface* silu_mul_quantize_creator();

}  // namespace pq::trt
