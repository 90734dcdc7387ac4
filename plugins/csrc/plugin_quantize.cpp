// pq::RMSNormQuantize and pq::SiluMulHadamardQuantize: what comes before a quantized linear, fused with its static
// quantizer. The codes go to every pq::QLinear that reads them; the floating result never reaches memory.
//
//     RMSNormQuantize           x [..., K], gain fp32 [K] [, residual [..., K]] -> codes [, sum = x + residual]
//     SiluMulHadamardQuantize   gate [..., K], up [..., K] [, left fp32 [L, L]] -> codes
//
// Codes are int8 [..., K], whatever their bits, or int4 (codes_type) for linears of layout s4. gain and left must be
// constants of the network: nothing in flight on the stream may write them (pq_kernels.h).
#include <cmath>
#include <cstring>

#include "plugin.h"

namespace pq::trt {
namespace {

constexpr int kMaxInputs = 3;
constexpr int kMinRight = 4, kMaxRight = 16384, kMaxOrder = 32768;  // of the Hadamard, as silu_hadamard.cu has them

// The quantizer's part of both plugins.
struct QuantizerAttributes {
    char layer[kNameLength] = "";
    char codes_type[8] = "int8";
    int32_t activation_bits = 0;
    float scale = 0;

    template <typename Self, typename Visit>
    static void each(Self& self, Visit& visit) {
        visit("layer", self.layer, Presence::kInternal);
        visit("codes_type", self.codes_type, Presence::kOptional);
        visit("activation_bits", self.activation_bits, Presence::kRequired);
        visit("scale", self.scale, Presence::kRequired);
    }
    DataType type() const { return strcmp(codes_type, "int4") == 0 ? DataType::kINT4 : DataType::kINT8; }
};

bool check_quantizer(Where where, const QuantizerAttributes& a) {
    if (a.activation_bits != 4 && a.activation_bits != 8)
        return !fail(where, "activation_bits is %d, but codes have 4 or 8.", a.activation_bits);
    if (strcmp(a.codes_type, "int8") != 0 && strcmp(a.codes_type, "int4") != 0)
        return !fail(where, "codes_type '%s' is unknown: int8 or int4.", a.codes_type);
    if (a.type() == DataType::kINT4 && a.activation_bits != 4)
        return !fail(where, "codes of 8 bits do not fit codes_type int4.");
    if (!(a.scale > 0) || !std::isfinite(a.scale))
        return !fail(where, "scale is %g, but must be positive and finite.", a.scale);
    return true;
}

// An input, and whether it has the type of the first one, which is floating, or is fp32.
struct Input {
    const char* name;
    bool floating;
};

bool check_codes_shape(Where where, const Input& first, const DimsExprs& dims) {
    if (dims.nbDims < 1) return !fail(where, "%s is a scalar.", first.name);
    const auto* last = dims.d[dims.nbDims - 1];
    if (!last->isConstant())
        return !fail(where, "the last dimension of %s must be known when the network is built.", first.name);
    if (last->getConstantValue() % 32 == 0) return true;
    return !fail(where, "the last dimension of %s is %lld, but must be a multiple of 32.", first.name,
                 static_cast<long long>(last->getConstantValue()));
}

// Output 0 is codes; a second one has the type of the first input.
int32_t quantizer_types(Where where, DataType codes, DataType* outputs, int32_t output_count, const DataType* types,
                        int32_t input_count, const Input (&inputs)[kMaxInputs]) {
    if (!is_floating(types[0]))
        return fail(where, "%s is %s, but must be float16, bfloat16 or float32.", inputs[0].name, type_name(types[0]));
    for (int32_t i = 1; i < input_count; ++i)
        if (!check_type(where, inputs[i].name, types[i], inputs[i].floating ? types[0] : DataType::kFLOAT)) return 1;
    outputs[0] = codes;
    for (int32_t i = 1; i < output_count; ++i) outputs[i] = types[0];
    return 0;
}

bool quantizer_format(DataType codes, int32_t position, const DynamicPluginTensorDesc* tensors, int32_t input_count,
                      const Input (&inputs)[kMaxInputs]) {
    const PluginTensorDesc& tensor = tensors[position].desc;
    const DataType x = tensors[0].desc.type;
    if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
    if (position == 0) return is_floating(tensor.type);
    if (position < input_count) return tensor.type == (inputs[position].floating ? x : DataType::kFLOAT);
    return tensor.type == (position == input_count ? codes : x);
}

// ---- RMSNormQuantize ------------------------------------------------------------------------------------------------

struct RmsNormAttributes : QuantizerAttributes {
    float epsilon = 0;
    int32_t residual = 0;  // 1: a third input, and a second output

    template <typename Self, typename Visit>
    static void each(Self& self, Visit& visit) {
        QuantizerAttributes::each(self, visit);
        visit("epsilon", self.epsilon, Presence::kRequired);
        visit("residual", self.residual, Presence::kOptional);
    }
};

class RmsNormQuantize final : public Plugin<RmsNormQuantize, RmsNormAttributes> {
public:
    static constexpr char kName[] = "RMSNormQuantize";
    static constexpr Input kInputs[kMaxInputs] = {{"x", true}, {"gain", false}, {"residual", true}};

    static bool check(Where where, const RmsNormAttributes& a) {
        if (!(a.epsilon >= 0) || !std::isfinite(a.epsilon))
            return !fail(where, "epsilon is %g, but must be finite and not negative.", a.epsilon);
        if (a.residual != 0 && a.residual != 1) return !fail(where, "residual is %d, but is 0 or 1.", a.residual);
        return check_quantizer(where, a);
    }

    using Plugin::Plugin;

    int32_t getNbOutputs() const noexcept override { return 1 + attributes_.residual; }
    int32_t getOutputDataTypes(DataType* outputs, int32_t output_count, const DataType* inputs,
                               int32_t input_count) const noexcept override {
        if (input_count != 2 + attributes_.residual)
            return fail(where(), "%d inputs, but with residual = %d it takes x, gain%s.", input_count,
                        attributes_.residual, attributes_.residual ? " and residual" : "");
        return quantizer_types(where(), attributes_.type(), outputs, output_count, inputs, input_count, kInputs);
    }
    int32_t getOutputShapes(const DimsExprs* inputs, int32_t, const DimsExprs*, int32_t, DimsExprs* outputs,
                            int32_t output_count, nvinfer1::IExprBuilder&) noexcept override {
        if (!check_codes_shape(where(), kInputs[0], inputs[0])) return 1;
        const int64_t K = inputs[0].d[inputs[0].nbDims - 1]->getConstantValue();
        if (!check_shape(where(), "gain", inputs[1], {K})) return 1;
        if (attributes_.residual && !check_columns(where(), "residual", inputs[2], K)) return 1;
        for (int32_t i = 0; i < output_count; ++i) outputs[i] = inputs[0];
        return 0;
    }
    bool supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors, int32_t input_count,
                                   int32_t) noexcept override {
        return quantizer_format(attributes_.type(), position, tensors, input_count, kInputs);
    }
    int32_t enqueue(const PluginTensorDesc* input_descs, const PluginTensorDesc*, const void* const* inputs,
                    void* const* outputs, void*, cudaStream_t stream) noexcept override {
        const RmsNormAttributes& a = attributes_;
        const PluginTensorDesc& x = input_descs[0];
        const int rows = rows_of(x.dims);
        if (rows == 0) return 0;
        const int status = pq_rmsnorm_quantize(
            inputs[0], kernel_type(x.type), a.residual ? inputs[2] : nullptr, a.residual ? outputs[1] : nullptr,
            static_cast<const float*>(inputs[1]), a.epsilon, nullptr, a.scale, outputs[0], kernel_type(a.type()),
            a.activation_bits, rows, static_cast<int>(columns_of(x.dims)), stream);
        return report(where(), "pq_rmsnorm_quantize", status);
    }
};

// ---- SiluMulHadamardQuantize ----------------------------------------------------------------------------------------

struct SiluMulAttributes : QuantizerAttributes {
    int32_t left_order = 0, right_order = 0;  // of the Hadamard over K = left_order * right_order, 0: none

    template <typename Self, typename Visit>
    static void each(Self& self, Visit& visit) {
        QuantizerAttributes::each(self, visit);
        visit("left_order", self.left_order, Presence::kOptional);
        visit("right_order", self.right_order, Presence::kOptional);
    }
};

class SiluMulQuantize final : public Plugin<SiluMulQuantize, SiluMulAttributes> {
public:
    static constexpr char kName[] = "SiluMulHadamardQuantize";
    static constexpr Input kInputs[kMaxInputs] = {{"gate", true}, {"up", true}, {"left", false}};

    static bool check(Where where, const SiluMulAttributes& a) {
        const bool none = a.left_order == 0 && a.right_order == 0;
        const bool power = a.right_order >= kMinRight && a.right_order <= kMaxRight &&
                           (a.right_order & (a.right_order - 1)) == 0;
        const int64_t order = static_cast<int64_t>(a.left_order) * a.right_order;
        if (!none && (a.left_order <= 0 || !power || order > kMaxOrder))
            return !fail(where, "left_order %d, right_order %d: right_order must be a power of two from %d to %d and "
                                "left_order positive, their product at most %d, or both 0 for no Hadamard.",
                         a.left_order, a.right_order, kMinRight, kMaxRight, kMaxOrder);
        return check_quantizer(where, a);
    }

    using Plugin::Plugin;

    int32_t getNbOutputs() const noexcept override { return 1; }
    int32_t getOutputDataTypes(DataType* outputs, int32_t output_count, const DataType* inputs,
                               int32_t input_count) const noexcept override {
        const bool rotated = attributes_.left_order > 0;
        if (input_count != 2 + rotated)
            return fail(where(), "%d inputs, but with left_order = %d it takes gate, up%s.", input_count,
                        attributes_.left_order, rotated ? " and left" : "");
        return quantizer_types(where(), attributes_.type(), outputs, output_count, inputs, input_count, kInputs);
    }
    int32_t getOutputShapes(const DimsExprs* inputs, int32_t, const DimsExprs*, int32_t, DimsExprs* outputs, int32_t,
                            nvinfer1::IExprBuilder&) noexcept override {
        const SiluMulAttributes& a = attributes_;
        if (!check_codes_shape(where(), kInputs[0], inputs[0])) return 1;
        const int64_t K = inputs[0].d[inputs[0].nbDims - 1]->getConstantValue();
        if (!check_columns(where(), "up", inputs[1], K)) return 1;
        if (a.left_order > 0) {
            if (static_cast<int64_t>(a.left_order) * a.right_order != K)
                return fail(where(), "left_order %d * right_order %d is not the last dimension of gate, %lld.",
                            a.left_order, a.right_order, static_cast<long long>(K));
            if (!check_shape(where(), "left", inputs[2], {a.left_order, a.left_order})) return 1;
        }
        outputs[0] = inputs[0];
        return 0;
    }
    bool supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors, int32_t input_count,
                                   int32_t) noexcept override {
        return quantizer_format(attributes_.type(), position, tensors, input_count, kInputs);
    }
    int32_t enqueue(const PluginTensorDesc* input_descs, const PluginTensorDesc*, const void* const* inputs,
                    void* const* outputs, void*, cudaStream_t stream) noexcept override {
        const SiluMulAttributes& a = attributes_;
        const PluginTensorDesc& gate = input_descs[0];
        const int rows = rows_of(gate.dims), K = static_cast<int>(columns_of(gate.dims));
        if (rows == 0) return 0;
        const int status = pq_silu_mul_quantize(
            inputs[0], inputs[1], K, kernel_type(gate.type), a.left_order, a.right_order,
            a.left_order > 0 ? static_cast<const float*>(inputs[2]) : nullptr, nullptr, a.scale, outputs[0],
            kernel_type(a.type()), a.activation_bits, rows, K, stream);
        return report(where(), "pq_silu_mul_quantize", status);
    }
};

}  // namespace

nvinfer1::IPluginCreatorInterface* rmsnorm_quantize_creator() {
    static Creator<RmsNormQuantize> creator;
    return &creator;
}

nvinfer1::IPluginCreatorInterface* silu_mul_quantize_creator() {
    static Creator<SiluMulQuantize> creator;
    return &creator;
}

}  // namespace pq::trt
