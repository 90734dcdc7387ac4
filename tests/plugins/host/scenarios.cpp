// One scenario a run, named on the command line: what the plugin asks of the kernels when TensorRT builds and runs it.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>

#include "host.h"
#include "pq_kernels.h"

using namespace host;

namespace {

int failures = 0;
#define CHECK(condition)                                                      \
    do {                                                                      \
        if (!(condition)) {                                                   \
            ++failures;                                                       \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);   \
        }                                                                     \
    } while (0)

constexpr int K = 96, N = 40;
char x[64], w[64], y[64];  // never read: only their addresses travel
float scale[1], bias[1];
cudaStream_t const stream = reinterpret_cast<cudaStream_t>(0x5ee);

Fields linear_fields(const char* layout, int weight_bits, int activation_bits, const char* output_type = "same") {
    Fields fields;
    fields.set("weight_bits", weight_bits).set("activation_bits", activation_bits).set("layout", layout);
    fields.set("K", K).set("N", N).set("input_scale", 0.25f).set("output_type", output_type);
    return fields;
}

Node linear(const char* layout, int weight_bits, int activation_bits, const char* output_type = "same") {
    Fields fields = linear_fields(layout, weight_bits, activation_bits, output_type);
    return create("QLinear", "layer 7", fields);
}

struct Shapes {
    DataType x = DataType::kHALF, y = DataType::kHALF;
    bool biased = false;

    std::vector<PluginTensorDesc> inputs(int rows) const {
        std::vector<PluginTensorDesc> all{tensor(x, {rows, K}), tensor(DataType::kINT8, {3, 2, 512}),
                                          tensor(DataType::kFLOAT, {N}), tensor(DataType::kFLOAT, {N})};
        all.resize(biased ? 4 : 3);
        return all;
    }
    PluginTensorDesc output(int rows) const { return tensor(y, {rows, N}); }
};

int configure(Node& node, const Shapes& shapes, int opt, int max, DataType weights = DataType::kINT8) {
    DynamicPluginTensorDesc in[4] = {dynamic(shapes.x, {1, opt, max}, K)};
    const std::vector<PluginTensorDesc> constants = shapes.inputs(opt);
    for (size_t i = 1; i < constants.size(); ++i) in[i].desc = constants[i];
    in[1].desc.type = weights;
    const DynamicPluginTensorDesc out = dynamic(shapes.y, {1, opt, max}, N);
    return node.build->configurePlugin(in, static_cast<int>(constants.size()), &out, 1);
}

size_t reserved(const Node& node, const Shapes& shapes, int max) {
    const DynamicPluginTensorDesc in = dynamic(shapes.x, {1, 1, max}, K), out = dynamic(shapes.y, {1, 1, max}, N);
    return node.build->getWorkspaceSize(&in, shapes.biased ? 4 : 3, &out, 1);
}

// onShapeChange and enqueue, with addresses inside a made-up workspace.
char* const kWorkspace = reinterpret_cast<char*>(0x10000000);
int run(Node& node, const Shapes& shapes, int rows, bool shape_changes = true) {
    const std::vector<PluginTensorDesc> in = shapes.inputs(rows);
    const PluginTensorDesc out = shapes.output(rows);
    if (shape_changes) CHECK(node.runtime->onShapeChange(in.data(), static_cast<int>(in.size()), &out, 1) == 0);
    const void* inputs[] = {x, w, scale, bias};
    void* outputs[] = {y};
    return node.runtime->enqueue(in.data(), &out, inputs, outputs, kWorkspace, stream);
}

std::vector<int> tactics_of(Node& node) {
    std::vector<int> tactics(node.build->getNbTactics());
    CHECK(node.build->getValidTactics(tactics.data(), static_cast<int>(tactics.size())) == 0);
    return tactics;
}

// Few rows want decode kernels, many want others.
std::vector<int> by_rows(int M) { return M <= 16 ? std::vector<int>{101, 102} : std::vector<int>{203, 301, 202}; }

void quantizes_floats() {
    recorder.variants = by_rows;
    const std::map<DataType, int> types{
        {DataType::kHALF, PQ_F16}, {DataType::kBF16, PQ_BF16}, {DataType::kFLOAT, PQ_F32}};
    for (const auto& [type, kernel_type] : types) {
        recorder.quantize.clear(), recorder.gemm.clear();
        Node node = linear("s8", 4, 4);
        CHECK(run(node, {type, type}, 33) == 0);
        CHECK(recorder.quantize.size() == 1 && recorder.gemm.size() == 1);
        const QuantizeCall& q = recorder.quantize[0];
        CHECK(q.x == x && q.x_type == kernel_type && q.shift == nullptr && q.scale == 0.25f);
        CHECK(q.codes == kWorkspace && q.codes_type == PQ_S8 && q.bits == 4 && q.M == 33 && q.K == K);
        const GemmCall& g = recorder.gemm[0];
        CHECK(g.variant == 203 && g.x == kWorkspace && g.x_type == PQ_S8 && g.w == w && g.layout == PQ_LAYOUT_S8);
        CHECK(g.scale == scale && !g.row_scale && !g.bias && !g.residual && g.y == y && g.y_type == kernel_type);
        CHECK(g.M == 33 && g.N == N && g.K == K && q.stream == stream && g.stream == stream);
    }
}

void packs_codes_of_layout_s4() {
    recorder.variants = by_rows;
    Node node = linear("s4", 4, 4);
    CHECK(run(node, {}, 8) == 0);
    CHECK(recorder.quantize[0].codes_type == PQ_S4 && recorder.quantize[0].bits == 4);
    CHECK(recorder.gemm[0].x_type == PQ_S4 && recorder.gemm[0].layout == PQ_LAYOUT_S4);
    CHECK(reserved(node, {}, 8) < reserved(linear("s8", 4, 4), {}, 8));
}

void takes_codes_as_they_are() {
    recorder.variants = by_rows;
    const Shapes shapes{DataType::kINT8, DataType::kBF16, true};
    Node node = linear("w8", 8, 8, "bfloat16");
    CHECK(run(node, shapes, 5) == 0);
    CHECK(recorder.quantize.empty());
    const GemmCall& g = recorder.gemm.at(0);
    CHECK(g.x == x && g.x_type == PQ_S8 && g.bias == bias && g.layout == PQ_LAYOUT_W8 && g.y_type == PQ_BF16);
    CHECK(g.workspace == kWorkspace && g.workspace_bytes <= reserved(node, shapes, 5));
    DataType types[] = {DataType::kINT8, DataType::kINT8, DataType::kFLOAT, DataType::kFLOAT}, result;
    CHECK(node.build->getOutputDataTypes(&result, 1, types, 4) == 0 && result == DataType::kBF16);
}

void workspace_holds_every_smaller_problem() {
    recorder.variants = by_rows;
    for (const char* layout : {"s4", "s8"}) {
        Node node = linear(layout, 4, 4);
        for (const int max : {1, 15, 64, 300, 5000})
            for (int rows = 1; rows <= max; rows += 1 + rows / 7) {
                recorder.gemm.clear();
                CHECK(run(node, {}, rows) == 0);
                const GemmCall& g = recorder.gemm.at(0);
                const size_t before = static_cast<char*>(g.workspace) - kWorkspace;
                CHECK(before % 256 == 0 && before >= static_cast<size_t>(rows) * K / (g.x_type == PQ_S4 ? 2 : 1));
                CHECK(before + g.workspace_bytes <= reserved(node, {}, max));
            }
        const size_t rows = 1 << 20;  // beside the codes it stays within bounds
        CHECK(reserved(node, {}, rows) <= rows * K + (33 << 20));
    }
}

void tactics_are_the_variants_of_the_optimum() {
    recorder.variants = by_rows;
    Node node = linear("s8", 4, 8);
    CHECK(tactics_of(node).empty());  // not configured yet
    CHECK(configure(node, {}, 2048, 8192) == 0);
    const std::vector<int> tactics = tactics_of(node);
    CHECK(tactics.size() == 3 && std::count(tactics.begin(), tactics.end(), 0) == 0);
    std::map<int, int> ran;  // rows -> variant
    for (const int tactic : tactics) {
        CHECK(node.runtime->setTactic(tactic) == 0);
        CHECK(run(node, {}, 2048) == 0);
        ran[recorder.gemm.back().variant] = tactic;
    }
    CHECK(ran.size() == 3 && ran.count(203) && ran.count(301) && ran.count(202));
    // The tuned one where rows are about those; elsewhere what the kernels think best.
    node.runtime->setTactic(ran[301]);
    const std::map<int, int> expected{{2048, 301}, {1025, 301}, {1024, 203}, {2049, 203}, {1, 101}, {16, 101}};
    for (const auto& [rows, variant] : expected) {
        CHECK(run(node, {}, rows) == 0);
        CHECK(recorder.gemm.back().variant == variant);
    }
}

void variants_that_need_too_much_are_left_out() {
    recorder.variants = by_rows;
    recorder.workspace = [](int variant, int) { return variant == 203 ? size_t{1} << 40 : size_t{0}; };
    Node node = linear("s8", 4, 8);
    CHECK(configure(node, {}, 64, 64) == 0);
    CHECK(tactics_of(node).size() == 2);
    CHECK(run(node, {}, 64) == 0);
    CHECK(recorder.gemm.at(0).variant == 301);
}

void a_foreign_tactic_is_not_run() {
    recorder.variants = by_rows;
    Node node = linear("s8", 4, 8);
    CHECK(configure(node, {}, 8, 8) == 0);
    const int tactic = tactics_of(node).at(1);
    recorder.variants = [](int) { return std::vector<int>{150}; };  // another GPU or another library
    node.runtime->setTactic(tactic);
    CHECK(run(node, {}, 8) == 0);
    CHECK(recorder.gemm.at(0).variant == 150);
}

void copies_go_on_where_they_were() {
    recorder.variants = by_rows;
    const Shapes shapes{DataType::kHALF, DataType::kHALF, true};
    Node node = linear("s8", 4, 8);
    CHECK(configure(node, shapes, 32, 64) == 0);
    const std::vector<int> tactics = tactics_of(node);
    node.runtime->setTactic(tactics.at(1));
    CHECK(run(node, shapes, 32) == 0);
    Node copies[] = {Node(node.plugin->clone()), Node(node.runtime->attachToContext(nullptr))};
    for (Node& copy : copies) {
        recorder.gemm.clear();
        CHECK(run(copy, shapes, 32, false) == 0);
        CHECK(recorder.gemm.at(0).variant == 301 && recorder.gemm.at(0).bias == bias);
        CHECK(tactics_of(copy) == tactics);
    }
}

void engines_keep_the_attributes() {
    recorder.variants = by_rows;
    Node node = linear("w8", 8, 4, "float32").reloaded("QLinear");
    CHECK(node.plugin != nullptr && messages().empty());
    const Shapes codes{DataType::kINT8, DataType::kFLOAT, false};
    CHECK(run(node, codes, 3) == 0);
    CHECK(recorder.gemm.at(0).layout == PQ_LAYOUT_W8 && recorder.gemm.at(0).y_type == PQ_F32);
    CHECK(recorder.gemm.at(0).K == K && recorder.gemm.at(0).N == N);
    recorder.status = PQ_SMALL_WORKSPACE;
    CHECK(run(node, codes, 3) != 0);
    CHECK(messages().size() == 1 && messages()[0] == "pq::QLinear layer 7: pq_gemm: too small a workspace");
    Node floats = linear("s8", 4, 8).reloaded("QLinear").reloaded("QLinear");
    recorder.status = PQ_OK;
    CHECK(run(floats, {}, 3) == 0);
    CHECK(recorder.quantize.at(0).scale == 0.25f && recorder.quantize.at(0).bits == 8);
    CHECK(strcmp(floats.build->getTimingCacheID(), linear("s8", 4, 8).build->getTimingCacheID()) == 0);
    CHECK(strcmp(floats.build->getTimingCacheID(), linear("s8", 4, 4).build->getTimingCacheID()) != 0);
}

void without_a_gpu_engines_build_and_do_not_run() {
    Node node = linear("s8", 4, 8);
    CHECK(configure(node, {}, 64, 64) == 0);
    CHECK(tactics_of(node).empty());
    CHECK(messages().empty());
    CHECK(run(node, {}, 64) != 0 && recorder.gemm.empty());
    CHECK(messages().size() == 1 && strstr(messages()[0].c_str(), "no kernel for layout s8 on this GPU"));
}

void no_rows_is_nothing_to_do() {
    Node node = linear("s8", 4, 8);
    CHECK(run(node, {}, 0) == 0);
    CHECK(recorder.quantize.empty() && recorder.gemm.empty() && messages().empty());
}

void another_layout_than_the_gpus_is_mentioned_once() {
    recorder.preferred_layout = PQ_LAYOUT_S4;
    Node node = linear("s8", 4, 4);
    CHECK(configure(node, {}, 1, 1) == 0);
    CHECK(configure(node, {}, 64, 64) == 0);
    CHECK(messages().size() == 1 && strstr(messages()[0].c_str(), "Pack the weights as s4"));
}

void refuses_what_the_parser_could_not_see() {
    Node node = linear("s8", 4, 4);
    CHECK(configure(node, {}, 64, -1) != 0);
    CHECK(configure(node, {}, 64, 64, DataType::kINT4) != 0);  // [.., 512] of nibbles is half of the bytes
    CHECK(messages().size() == 2 && strstr(messages()[0].c_str(), "does not bound x's rows"));
    CHECK(strstr(messages()[1].c_str(), "512, but typed int4 it must be 1024"));
}

void only_linear_formats_of_known_types() {
    Node node = linear("s8", 4, 8);
    DynamicPluginTensorDesc all[4] = {};
    const auto set = [&](int i, DataType type) { all[i].desc = tensor(type, {1}); };
    const auto supports = [&](int i) { return node.build->supportsFormatCombination(i, all, 3, 1); };
    set(0, DataType::kHALF), set(1, DataType::kINT8), set(2, DataType::kFLOAT), set(3, DataType::kHALF);
    CHECK(supports(0) && supports(1) && supports(2) && supports(3));
    set(1, DataType::kINT4);
    CHECK(supports(1));
    set(1, DataType::kFLOAT), set(2, DataType::kHALF), set(3, DataType::kFLOAT);
    CHECK(!supports(1) && !supports(2) && !supports(3));
    set(0, DataType::kINT8);
    CHECK(!supports(0));  // this one quantizes: an implicit INT8 tensor would be quantized twice
    set(0, DataType::kHALF);
    all[0].desc.format = nvinfer1::TensorFormat::kCHW32;
    CHECK(!supports(0));
}

void norm_passes_everything_on() {
    Fields fields;
    fields.set("activation_bits", 4).set("scale", 0.5f).set("epsilon", 1e-6f).set("residual", 1);
    Node made = create("RMSNormQuantize", "norm", fields);
    CHECK(made.build->getNbOutputs() == 2);
    Node node = made.reloaded("RMSNormQuantize");
    const PluginTensorDesc in[] = {tensor(DataType::kBF16, {2, 3, K}), tensor(DataType::kFLOAT, {K}),
                                   tensor(DataType::kBF16, {2, 3, K})};
    const PluginTensorDesc out[] = {tensor(DataType::kINT8, {2, 3, K}), tensor(DataType::kBF16, {2, 3, K})};
    char residual[1], sum[1];
    const void* inputs[] = {x, scale, residual};
    void* outputs[] = {y, sum};
    CHECK(node.runtime->enqueue(in, out, inputs, outputs, nullptr, stream) == 0);
    const NormCall& c = recorder.norm.at(0);
    CHECK(c.x == x && c.residual == residual && c.sum == sum && c.gain == scale && c.codes == y);
    CHECK(c.epsilon == 1e-6f && c.scale == 0.5f && c.x_type == PQ_BF16 && c.codes_type == PQ_S8 && c.bits == 4);
    CHECK(c.M == 6 && c.K == K);
}

void silu_passes_everything_on() {
    Fields fields;
    fields.set("activation_bits", 4).set("scale", 0.5f).set("codes_type", "int4");
    fields.set("left_order", 3).set("right_order", 32);
    Node node = create("SiluMulHadamardQuantize", "silu", fields).reloaded("SiluMulHadamardQuantize");
    const PluginTensorDesc in[] = {tensor(DataType::kHALF, {7, K}), tensor(DataType::kHALF, {7, K}),
                                   tensor(DataType::kFLOAT, {3, 3})};
    const PluginTensorDesc out = tensor(DataType::kINT4, {7, K});
    const void* inputs[] = {x, w, scale};
    void* outputs[] = {y};
    CHECK(node.runtime->enqueue(in, &out, inputs, outputs, nullptr, stream) == 0);
    const SiluCall& c = recorder.silu.at(0);
    CHECK(c.gate == x && c.up == w && c.ldg == K && c.x_type == PQ_F16 && c.left == scale && c.codes == y);
    CHECK(c.left_order == 3 && c.right_order == 32 && c.scale == 0.5f && c.codes_type == PQ_S4 && c.bits == 4);
    CHECK(c.M == 7 && c.K == K);
}

const std::map<std::string, std::function<void()>> scenarios{
    {"quantizes floats", quantizes_floats},
    {"packs codes of layout s4", packs_codes_of_layout_s4},
    {"takes codes as they are", takes_codes_as_they_are},
    {"workspace holds every smaller problem", workspace_holds_every_smaller_problem},
    {"tactics are the variants of the optimum", tactics_are_the_variants_of_the_optimum},
    {"variants that need too much are left out", variants_that_need_too_much_are_left_out},
    {"a foreign tactic is not run", a_foreign_tactic_is_not_run},
    {"copies go on where they were", copies_go_on_where_they_were},
    {"engines keep the attributes", engines_keep_the_attributes},
    {"without a GPU engines build and do not run", without_a_gpu_engines_build_and_do_not_run},
    {"no rows is nothing to do", no_rows_is_nothing_to_do},
    {"another layout than the GPU's is mentioned once", another_layout_than_the_gpus_is_mentioned_once},
    {"refuses what the parser could not see", refuses_what_the_parser_could_not_see},
    {"only linear formats of known types", only_linear_formats_of_known_types},
    {"norm passes everything on", norm_passes_everything_on},
    {"silu passes everything on", silu_passes_everything_on},
};

}  // namespace

int main(int argc, char** argv) {
    const auto found = argc == 2 ? scenarios.find(argv[1]) : scenarios.end();
    if (found == scenarios.end()) {
        for (const auto& scenario : scenarios) puts(scenario.first.c_str());
        return 2;
    }
    found->second();
    for (const std::string& line : messages()) fprintf(stderr, "log: %s\n", line.c_str());
    return failures != 0;
}
