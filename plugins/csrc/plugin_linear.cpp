// pq::QLinear, the quantized linear: x, packed weights, scale [, bias] -> y.
//
//     x        [..., K]  fp16, bf16 or fp32: quantized here with input_scale, into the workspace; or codes, int8 (int4
//                        for layout s4), which a QuantizeLinear or a fused producer made once for several linears
//     weights  int8 [N16/16, K64/64, 512], or [.., K64/32, 512] in layout w8: bytes as in pq_kernels.h, a constant.
//              Typed int4 the same bytes are [.., .., 1024]
//     scale    fp32 [N]  input scale * weight scale
//     bias     fp32 [N]
//     y        [..., N]  of x's type, or of output_type where x holds codes
//
// weights, scale and bias must be constants of the network: nothing in flight on the stream may write them
// (pq_kernels.h). All leading dimensions are rows. Tactics are the kernels' tile variants, timed for the rows of a
// profile's optimum.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "plugin.h"

namespace pq::trt {
namespace {

constexpr int kMaxVariants = 320;  // more than there are
constexpr int kMaxTactics = 32;    // of the best guesses: TensorRT times each of them in every layer
constexpr int kMaxK = 131072;
constexpr int kTileChannels = 16, kTileK = 64, kTileBytes = 512;

size_t round_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// What the kernels may use beside the codes: int32 partial sums of tiles with K in eight parts, as far as 32 MiB go,
// and counters. enqueue() is not told what was reserved, and an engine can be built where there is no GPU to ask for
// its variants: so this depends on the problem alone, never shrinks as rows grow, and a variant that needs more is
// not used. TensorRT lets layers that run one after the other share the memory.
size_t gemm_budget(int rows, int N) {
    const size_t partials = size_t{8} * 4 * round_up(rows > 0 ? rows : 1, 64) * round_up(N, 128);
    return std::min(partials, size_t{32} << 20) + (size_t{64} << 10);
}

struct LinearAttributes {
    char layer[kNameLength] = "";
    char layout[8] = "";
    char output_type[12] = "same";
    int32_t weight_bits = 0, activation_bits = 0, K = 0, N = 0;
    float input_scale = 0;

    template <typename Self, typename Visit>
    static void each(Self& self, Visit& visit) {
        visit("layer", self.layer, Presence::kInternal);
        visit("weight_bits", self.weight_bits, Presence::kRequired);
        visit("activation_bits", self.activation_bits, Presence::kRequired);
        visit("layout", self.layout, Presence::kRequired);
        visit("K", self.K, Presence::kRequired);
        visit("N", self.N, Presence::kRequired);
        visit("input_scale", self.input_scale, Presence::kRequired);
        visit("output_type", self.output_type, Presence::kOptional);
    }
};

int layout_of(const char* name) {
    if (strcmp(name, "s4") == 0) return PQ_LAYOUT_S4;
    if (strcmp(name, "s8") == 0) return PQ_LAYOUT_S8;
    return strcmp(name, "w8") == 0 ? PQ_LAYOUT_W8 : -1;
}

// "same" is where x is floating: y has its type.
bool output_type_of(const char* name, bool& same, DataType& type) {
    same = strcmp(name, "same") == 0;
    for (const DataType known : {DataType::kHALF, DataType::kBF16, DataType::kFLOAT}) {
        if (strcmp(name, type_name(known)) != 0) continue;
        type = known;
        return true;
    }
    return same;
}

// Tactics are timed at one number of rows and then used for all of a profile. Another number wants another variant (a
// decode kernel cannot do prefill), so a tactic carries the power of two that its rows round up to: for other rows
// the kernels' own guess runs.
int rows_bucket(int rows) {
    int bucket = 0;
    while ((int64_t{1} << bucket) < rows) ++bucket;
    return bucket;
}
int32_t tactic_of(int variant, int rows) { return (rows_bucket(rows) + 1) << 16 | variant; }
bool tactic_fits(int32_t tactic, int rows) { return tactic >> 16 == rows_bucket(rows) + 1; }
int variant_of(int32_t tactic) { return tactic & 0xFFFF; }

class QLinear final : public Plugin<QLinear, LinearAttributes> {
public:
    static constexpr char kName[] = "QLinear";

    static bool check(Where where, const LinearAttributes& a);

    explicit QLinear(const LinearAttributes& attributes) : Plugin(attributes), layout_(layout_of(attributes.layout)) {
        output_type_of(attributes.output_type, floating_input_, output_type_);
    }

    // Build
    int32_t getNbOutputs() const noexcept override { return 1; }
    int32_t getOutputDataTypes(DataType* outputs, int32_t output_count, const DataType* inputs,
                               int32_t input_count) const noexcept override;
    int32_t getOutputShapes(const DimsExprs* inputs, int32_t input_count, const DimsExprs*, int32_t,
                            DimsExprs* outputs, int32_t output_count,
                            nvinfer1::IExprBuilder& expressions) noexcept override;
    bool supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors, int32_t input_count,
                                   int32_t output_count) noexcept override;
    int32_t configurePlugin(const DynamicPluginTensorDesc* inputs, int32_t input_count,
                            const DynamicPluginTensorDesc* outputs, int32_t output_count) noexcept override;
    size_t getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t input_count,
                            const DynamicPluginTensorDesc* outputs, int32_t output_count) const noexcept override;
    int32_t getNbTactics() noexcept override;
    int32_t getValidTactics(int32_t* tactics, int32_t count) noexcept override;
    const char* getTimingCacheID() noexcept override { return getMetadataString(); }
    const char* getMetadataString() noexcept override;

    // Run time
    int32_t setTactic(int32_t tactic) noexcept override;
    int32_t onShapeChange(const PluginTensorDesc* inputs, int32_t input_count, const PluginTensorDesc* outputs,
                          int32_t output_count) noexcept override;
    int32_t enqueue(const PluginTensorDesc* input_descs, const PluginTensorDesc* output_descs,
                    const void* const* inputs, void* const* outputs, void* workspace,
                    cudaStream_t stream) noexcept override;

private:
    int codes_type() const { return layout_ == PQ_LAYOUT_S4 ? PQ_S4 : PQ_S8; }
    size_t codes_bytes(int rows) const;
    bool weight_type_known(DataType type) const;
    int variants(int rows, int* ids) const;
    int choose_variant(int rows) const;

    int layout_;
    bool floating_input_ = true;
    DataType output_type_ = DataType::kFLOAT;  // where x holds codes

    int tuned_rows_ = -1;  // of the profile that is being tuned
    bool layout_warned_ = false;
    int32_t tactic_ = 0;
    bool has_bias_ = false, ready_ = false;
    int rows_ = -1, variant_ = -1;  // the current shape and what runs it, -1: nothing does
    char description_[160] = "";
};

bool QLinear::check(Where where, const LinearAttributes& a) {
    const int layout = layout_of(a.layout);
    bool same;
    DataType type;
    if (a.activation_bits == 16)
        return !fail(where, "activation_bits is 16: weight-only linears have no kernel. Write them in the qdq form, "
                            "which TensorRT multiplies itself.");
    if ((a.weight_bits != 4 && a.weight_bits != 8) || (a.activation_bits != 4 && a.activation_bits != 8))
        return !fail(where, "weight_bits %d and activation_bits %d: the kernels multiply 4- and 8-bit codes only.",
                     a.weight_bits, a.activation_bits);
    if (layout < 0)
        return !fail(where, "layout '%s' is unknown. Pack the weights as s4, s8 (4-bit weights) or w8.", a.layout);
    if ((layout == PQ_LAYOUT_W8) != (a.weight_bits == 8))
        return !fail(where, "layout %s does not hold %d-bit weights. Pack them as %s.", a.layout, a.weight_bits,
                     a.weight_bits == 8 ? "w8" : "s8 or s4");
    if (layout == PQ_LAYOUT_S4 && a.activation_bits != 4)
        return !fail(where, "layout s4 is multiplied by 4-bit activations, but activation_bits is %d. Pack the "
                            "weights as s8.", a.activation_bits);
    if (a.K <= 0 || a.K % 32 != 0 || a.K >= kMaxK || a.N <= 0)
        return !fail(where, "K = %d, N = %d: K must be a multiple of 32 below %d, and N positive.", a.K, a.N, kMaxK);
    if (!(a.input_scale > 0) || !std::isfinite(a.input_scale))
        return !fail(where, "input_scale is %g, but must be positive and finite.", a.input_scale);
    if (!output_type_of(a.output_type, same, type))
        return !fail(where, "output_type '%s' is unknown: same, float16, bfloat16 or float32.", a.output_type);
    return true;
}

// ---- Build --------------------------------------------------------------------------------------------------------

bool QLinear::weight_type_known(DataType type) const {
    return type == DataType::kINT8 || (type == DataType::kINT4 && attributes_.weight_bits == 4);
}

int32_t QLinear::getOutputDataTypes(DataType* outputs, int32_t, const DataType* inputs,
                                    int32_t input_count) const noexcept {
    if (input_count != 3 && input_count != 4)
        return fail(where(), "%d inputs, but it takes x, weights, scale and perhaps bias.", input_count);
    const DataType x = inputs[0];
    const DataType codes = layout_ == PQ_LAYOUT_S4 ? DataType::kINT4 : DataType::kINT8;
    if (!is_floating(x) && x != codes)
        return fail(where(), "x is %s, but must be float16, bfloat16, float32 or, in layout %s, %s codes.",
                    type_name(x), attributes_.layout, type_name(codes));
    if (is_floating(x) && !floating_input_)
        return fail(where(), "x is %s, so that y is too, but output_type is %s. Leave output_type out.", type_name(x),
                    attributes_.output_type);
    if (!is_floating(x) && floating_input_)
        return fail(where(), "x holds codes (%s), which leaves y's type open. Set output_type to float16, bfloat16 or "
                             "float32.", type_name(x));
    if (!weight_type_known(inputs[1]))
        return fail(where(), "the weights are %s, but must be packed bytes, int8.", type_name(inputs[1]));
    if (!check_type(where(), "scale", inputs[2], DataType::kFLOAT)) return 1;
    if (input_count == 4 && !check_type(where(), "bias", inputs[3], DataType::kFLOAT)) return 1;
    outputs[0] = floating_input_ ? x : output_type_;
    return 0;
}

int32_t QLinear::getOutputShapes(const DimsExprs* inputs, int32_t input_count, const DimsExprs*, int32_t,
                                 DimsExprs* outputs, int32_t, nvinfer1::IExprBuilder& expressions) noexcept {
    const int64_t K = attributes_.K, N = attributes_.N;
    const int64_t row_tiles = (N + kTileChannels - 1) / kTileChannels;
    const int64_t k_tiles = (K + kTileK - 1) / kTileK * (layout_ == PQ_LAYOUT_W8 ? 2 : 1);
    // Typed int4 the last dimension counts nibbles; configurePlugin() sees whether the type is that one.
    const auto* last = inputs[1].nbDims == 3 ? inputs[1].d[2] : nullptr;
    const bool nibbles = attributes_.weight_bits == 4 && last && last->isConstant() &&
                         last->getConstantValue() == 2 * kTileBytes;
    if (!check_columns(where(), "x", inputs[0], K) ||
        !check_shape(where(), "the packed weights", inputs[1], {row_tiles, k_tiles, kTileBytes * (nibbles ? 2 : 1)}) ||
        !check_shape(where(), "scale", inputs[2], {N}) ||
        (input_count == 4 && !check_shape(where(), "bias", inputs[3], {N})))
        return 1;
    outputs[0] = inputs[0];
    outputs[0].d[inputs[0].nbDims - 1] = expressions.constant(N);
    return 0;
}

bool QLinear::supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors, int32_t input_count,
                                        int32_t) noexcept {
    const PluginTensorDesc& tensor = tensors[position].desc;
    if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
    if (position == 0)
        return floating_input_ ? is_floating(tensor.type) : kernel_type(tensor.type) == codes_type();
    if (position == 1) return weight_type_known(tensor.type);
    if (position < input_count) return tensor.type == DataType::kFLOAT;
    return tensor.type == (floating_input_ ? tensors[0].desc.type : output_type_);
}

int32_t QLinear::configurePlugin(const DynamicPluginTensorDesc* inputs, int32_t, const DynamicPluginTensorDesc*,
                                 int32_t) noexcept {
    if (rows_of(inputs[0].max) < 0)
        return fail(where(), "the optimization profile does not bound x's rows below 2^31, so that no workspace can be "
                             "reserved. Set its maximum shapes.");
    const int64_t tile = kTileBytes * (inputs[1].desc.type == DataType::kINT4 ? 2 : 1);
    if (columns_of(inputs[1].desc.dims) != tile)
        return fail(where(), "the last dimension of the packed weights is %lld, but typed %s it must be %lld.",
                    static_cast<long long>(columns_of(inputs[1].desc.dims)), type_name(inputs[1].desc.type),
                    static_cast<long long>(tile));
    tuned_rows_ = rows_of(inputs[0].opt);
    const int preferred = pq_preferred_layout(attributes_.weight_bits, attributes_.activation_bits);
    if (preferred >= 0 && preferred != layout_ && !layout_warned_) {  // -1: there is no GPU here to ask
        warn(where(), "layout %s is not the one that this GPU multiplies fastest. Pack the weights as %s for it.",
             attributes_.layout, preferred == PQ_LAYOUT_S4 ? "s4" : preferred == PQ_LAYOUT_S8 ? "s8" : "w8");
        layout_warned_ = true;
    }
    return 0;
}

size_t QLinear::codes_bytes(int rows) const {
    if (!floating_input_ || rows <= 0) return 0;
    const size_t codes = static_cast<size_t>(rows) * attributes_.K;
    return round_up(codes_type() == PQ_S4 ? codes / 2 : codes, 256);
}

size_t QLinear::getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t, const DynamicPluginTensorDesc*,
                                 int32_t) const noexcept {
    const int rows = rows_of(inputs[0].max);
    return codes_bytes(rows) + gemm_budget(rows, attributes_.N);
}

int QLinear::variants(int rows, int* ids) const {
    if (rows <= 0) return 0;
    const int K = attributes_.K, N = attributes_.N;
    const int found = pq_gemm_variants(layout_, codes_type(), rows, N, K, ids, kMaxVariants);
    const auto too_large = [&](int id) { return pq_gemm_workspace(id, layout_, rows, N, K) > gemm_budget(rows, N); };
    return static_cast<int>(std::remove_if(ids, ids + std::clamp(found, 0, kMaxVariants), too_large) - ids);
}

int32_t QLinear::getNbTactics() noexcept {
    int ids[kMaxVariants];
    return std::min(variants(tuned_rows_, ids), kMaxTactics);
}

int32_t QLinear::getValidTactics(int32_t* tactics, int32_t count) noexcept {
    int ids[kMaxVariants];
    if (variants(tuned_rows_, ids) < count)
        return fail(where(), "another device became current between getNbTactics and getValidTactics.");
    std::transform(ids, ids + count, tactics, [&](int id) { return tactic_of(id, tuned_rows_); });
    return 0;
}

const char* QLinear::getMetadataString() noexcept {
    const LinearAttributes& a = attributes_;
    snprintf(description_, sizeof(description_),
             "weight_bits=%d activation_bits=%d layout=%s K=%d N=%d output_type=%s abi=%d", a.weight_bits,
             a.activation_bits, a.layout, a.K, a.N, a.output_type, PQ_ABI_VERSION);
    return description_;
}

// ---- Run time -----------------------------------------------------------------------------------------------------

int32_t QLinear::setTactic(int32_t tactic) noexcept {
    tactic_ = tactic;
    if (rows_ > 0) variant_ = choose_variant(rows_);
    return 0;
}

// An engine's tactic may be of an older library or another GPU: only a variant that the kernels list is run.
int QLinear::choose_variant(int rows) const {
    int ids[kMaxVariants];
    const int count = variants(rows, ids);
    if (count == 0) return -1;
    const bool tuned = tactic_fits(tactic_, rows) && std::find(ids, ids + count, variant_of(tactic_)) != ids + count;
    return tuned ? variant_of(tactic_) : ids[0];
}

int32_t QLinear::onShapeChange(const PluginTensorDesc* inputs, int32_t input_count, const PluginTensorDesc*,
                               int32_t) noexcept {
    has_bias_ = input_count == 4;
    rows_ = rows_of(inputs[0].dims);
    variant_ = choose_variant(rows_);  // none is no error yet: an engine is also built where there is no GPU
    ready_ = true;
    return 0;
}

int32_t QLinear::enqueue(const PluginTensorDesc* input_descs, const PluginTensorDesc* output_descs,
                         const void* const* inputs, void* const* outputs, void* workspace,
                         cudaStream_t stream) noexcept {
    const int rows = rows_of(input_descs[0].dims), K = attributes_.K, N = attributes_.N;
    if (rows == 0) return 0;
    if (!ready_ || rows < 0) return fail(where(), "enqueue of %d rows before onShapeChange.", rows);
    if (rows != rows_) variant_ = choose_variant(rows_ = rows);
    if (variant_ < 0)
        return fail(where(), "libpq.so has no kernel for layout %s on this GPU. Build it for this GPU "
                             "(pq-export plugin build --sm ...).", attributes_.layout);
    const void* codes = inputs[0];
    char* free_space = static_cast<char*>(workspace);
    if (floating_input_) {
        const int status = pq_quantize(inputs[0], kernel_type(input_descs[0].type), nullptr, attributes_.input_scale,
                                       workspace, codes_type(), attributes_.activation_bits, rows, K, stream);
        if (status != PQ_OK) return report(where(), "pq_quantize", status);
        codes = workspace;
        free_space += codes_bytes(rows);
    }
    const int status = pq_gemm(variant_, codes, codes_type(), inputs[1], layout_, static_cast<const float*>(inputs[2]),
                               nullptr, has_bias_ ? static_cast<const float*>(inputs[3]) : nullptr, nullptr,
                               outputs[0], kernel_type(output_descs[0].type), 0, 1.0f, rows, N, K, free_space,
                               gemm_budget(rows, N), stream);
    return report(where(), "pq_gemm", status);
}

}  // namespace

nvinfer1::IPluginCreatorInterface* linear_creator() {
    static Creator<QLinear> creator;
    return &creator;
}

}  // namespace pq::trt
