// The TensorRT side of libpq.so: its two entry points, and the tensors and attributes of plugin.h.
#include "plugin.h"

#include <climits>
#include <cstdio>
#include <cstring>

namespace pq::trt {

const char* type_name(DataType type) {
    switch (type) {
        case DataType::kFLOAT: return "float32";
        case DataType::kHALF: return "float16";
        case DataType::kBF16: return "bfloat16";
        case DataType::kINT8: return "int8";
        case DataType::kINT4: return "int4";
        case DataType::kINT32: return "int32";
        case DataType::kINT64: return "int64";
        case DataType::kBOOL: return "bool";
        case DataType::kUINT8: return "uint8";
        case DataType::kFP8: return "float8";
        default: return "a type that the plugin does not know";
    }
}

bool is_floating(DataType type) {
    return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
}

int kernel_type(DataType type) {
    switch (type) {
        case DataType::kFLOAT: return PQ_F32;
        case DataType::kHALF: return PQ_F16;
        case DataType::kBF16: return PQ_BF16;
        case DataType::kINT8: return PQ_S8;
        case DataType::kINT4: return PQ_S4;
        default: return -1;
    }
}

int32_t rows_of(const Dims& dims) {
    int64_t rows = 1;
    for (int32_t i = 0; i + 1 < dims.nbDims; ++i) {
        if (dims.d[i] < 0 || dims.d[i] > INT_MAX) return -1;
        rows *= dims.d[i];
        if (rows > INT_MAX) return -1;
    }
    return static_cast<int32_t>(rows);
}

int64_t columns_of(const Dims& dims) { return dims.nbDims > 0 ? dims.d[dims.nbDims - 1] : -1; }

bool check_shape(Where where, const char* tensor, const DimsExprs& dims, std::initializer_list<int64_t> expected) {
    bool same = dims.nbDims == static_cast<int32_t>(expected.size());
    char wanted[96] = "", found[192] = "";
    size_t at_wanted = 0, at_found = 0;
    for (const int64_t size : expected)
        at_wanted += snprintf(wanted + at_wanted, sizeof(wanted) - at_wanted, at_wanted ? ", %lld" : "%lld",
                              static_cast<long long>(size));
    for (int32_t i = 0; i < dims.nbDims; ++i) {
        const bool known = dims.d[i]->isConstant();
        const int64_t size = known ? dims.d[i]->getConstantValue() : -1;
        if (same && known && size != expected.begin()[i]) same = false;
        at_found += snprintf(found + at_found, sizeof(found) - at_found, at_found ? ", %lld" : "%lld",
                             static_cast<long long>(size));
    }
    if (!same) fail(where, "%s is [%s], but the attributes say [%s]. Write the model again.", tensor, found, wanted);
    return same;
}

bool check_columns(Where where, const char* tensor, const DimsExprs& dims, int64_t expected) {
    if (dims.nbDims < 1) {
        fail(where, "%s is a scalar, but its last dimension must be %lld.", tensor, static_cast<long long>(expected));
        return false;
    }
    const auto* last = dims.d[dims.nbDims - 1];
    if (!last->isConstant() || last->getConstantValue() == expected) return true;
    fail(where, "the last dimension of %s is %lld, but must be %lld.", tensor,
         static_cast<long long>(last->getConstantValue()), static_cast<long long>(expected));
    return false;
}

bool check_type(Where where, const char* tensor, DataType type, DataType expected) {
    if (type == expected) return true;
    fail(where, "%s is %s, but must be %s. Cast it in the model.", tensor, type_name(type), type_name(expected));
    return false;
}

void copy_text(char* to, size_t capacity, const char* from, size_t length) {
    const size_t count = from ? strnlen(from, length < capacity - 1 ? length : capacity - 1) : 0;
    memcpy(to, from ? from : "", count);
    to[count] = 0;
}

const PluginField* FieldReader::find(const char* name, Presence presence) {
    for (int32_t i = 0; i < fields_.nbFields; ++i) {
        const PluginField& field = fields_.fields[i];
        if (field.data && strcmp(field.name, name) == 0) return &field;
    }
    if (presence == Presence::kRequired) {
        fail(where_, "attribute %s is missing. Write the model with pq-export's plugin form.", name);
        ok_ = false;
    }
    return nullptr;
}

void FieldReader::wrong(const char* name, const char* expected) {
    fail(where_, "attribute %s must be one %s.", name, expected);
    ok_ = false;
}

void FieldReader::operator()(const char* name, int32_t& value, Presence presence) {
    const PluginField* field = find(name, presence);
    if (!field) return;
    if (field->type == PluginFieldType::kINT32 && field->length == 1) {
        memcpy(&value, field->data, sizeof(value));
        return;
    }
    int64_t wide = INT64_MAX;  // some parsers hand ONNX's int over as it is
    if (field->type == PluginFieldType::kINT64 && field->length == 1) memcpy(&wide, field->data, sizeof(wide));
    if (wide < INT_MIN || wide > INT_MAX) return wrong(name, "32-bit int");
    value = static_cast<int32_t>(wide);
}

void FieldReader::operator()(const char* name, float& value, Presence presence) {
    const PluginField* field = find(name, presence);
    if (!field) return;
    if (field->type != PluginFieldType::kFLOAT32 || field->length != 1) return wrong(name, "float");
    memcpy(&value, field->data, sizeof(value));
}

void FieldReader::text(const char* name, char* value, size_t capacity, Presence presence) {
    const PluginField* field = find(name, presence);
    if (!field) return;
    if (field->type != PluginFieldType::kCHAR) return wrong(name, "string");
    copy_text(value, capacity, static_cast<const char*>(field->data), field->length);
}

void FieldWriter::add(const char* name, const void* value, PluginFieldType type, int32_t length, Presence presence) {
    if (presence == Presence::kInternal && !with_internal_) return;
    fields_[collection_.nbFields++] = PluginField(name, value, type, length);
}

void FieldWriter::operator()(const char* name, const int32_t& value, Presence presence) {
    add(name, &value, PluginFieldType::kINT32, 1, presence);
}

void FieldWriter::operator()(const char* name, const float& value, Presence presence) {
    add(name, &value, PluginFieldType::kFLOAT32, 1, presence);
}

void FieldWriter::text(const char* name, const char* value, Presence presence) {
    add(name, value, PluginFieldType::kCHAR, static_cast<int32_t>(strlen(value)) + 1, presence);
}

const PluginFieldCollection* FieldWriter::collection() {
    collection_.fields = fields_;  // this object may be a copy
    return &collection_;
}

}  // namespace pq::trt

#define PQ_PUBLIC extern "C" __attribute__((visibility("default")))

// TensorRT calls both when the library is loaded (IPluginRegistry::loadLibrary, trtexec --dynamicPlugins=libpq.so).
PQ_PUBLIC void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { pq::trt::set_logger_finder(finder); }

PQ_PUBLIC nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static nvinfer1::IPluginCreatorInterface* const creators[] = {
        pq::trt::linear_creator(), pq::trt::rmsnorm_quantize_creator(), pq::trt::silu_mul_quantize_creator()};
    count = sizeof(creators) / sizeof(creators[0]);
    return creators;
}
