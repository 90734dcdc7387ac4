// The runner's functions for tests in Python: a JSON request on standard input, the answer on standard output.
#include <cmath>
#include <cstring>
#include <iostream>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <string>

#include "arguments.h"
#include "bench.h"
#include "bundle.h"
#include "cache.h"
#include "chat.h"
#include "checksum.h"
#include "clocks.h"
#include "error.h"
#include "generate.h"
#include "half.h"
#include "statistics.h"
#include "tokenizer.h"
#include "utf8.h"

using namespace pq::runner;

namespace {

// The next token is the last one plus 1; every step is written down.
class Counting : public Decoder {
public:
    explicit Counting(const Json& size)
        : vocabulary_(size["vocabulary"]), capacity_(size["capacity"]), max_input_(size["max_input"]) {}
    int64_t vocabulary() const override { return vocabulary_; }
    int64_t capacity() const override { return capacity_; }
    int64_t max_input() const override { return max_input_; }
    void reset(int64_t batch) override {
        batch_ = batch;
        length_ = 0;
        steps.push_back("reset");
    }
    const float* step(const std::vector<int64_t>& ids) override {
        const int64_t tokens = static_cast<int64_t>(ids.size()) / batch_;
        if ((length_ += tokens) > capacity_) throw Error("too many tokens");
        steps.push_back(ids);
        logits_.assign(static_cast<size_t>(batch_ * vocabulary_), 0.0f);
        for (int64_t row = 0; row < batch_; ++row)
            logits_[row * vocabulary_ + (ids[row * tokens + tokens - 1] + 1) % vocabulary_] = 1.0f;
        return logits_.data();
    }
    Json steps = Json::array();

private:
    int64_t vocabulary_, capacity_, max_input_, batch_ = 1, length_ = 0;
    std::vector<float> logits_;
};

class Bytes : public Tokenizer {
public:
    std::vector<int64_t> encode(const std::string& text) const override {
        return std::vector<int64_t>(text.begin(), text.end());
    }
    std::string decode(int64_t id) const override { return std::string(1, static_cast<char>(id)); }
};

Json arguments(const Json& request) {
    const Arguments a = parse_arguments(request["words"]);
    return {{"bundle", a.bundle}, {"engine", a.engine}, {"plugin", a.plugin}, {"prompt", a.prompt},
            {"prompt_file", a.prompt_file}, {"prompt_ids", a.prompt_ids}, {"system", a.system},
            {"chat", static_cast<int>(a.chat)}, {"temperature", a.sampling.temperature}, {"top_p", a.sampling.top_p},
            {"seed", a.sampling.seed}, {"max_new_tokens", a.max_new_tokens}, {"max_seq_len", a.max_seq_len},
            {"bench", a.bench}, {"dry_run", a.dry_run}, {"force", a.force}, {"help", a.help}, {"batch", a.batch},
            {"prompt_length", a.prompt_length}, {"repeats", a.repeats}, {"json", a.json}, {"usage", usage()}};
}

Json bundle(const Json& request) {
    const Bundle b = open_bundle(request["directory"]);
    Json answer = {{"prefix_ids", b.prefix_ids}, {"bos", b.bos}, {"context", b.context()}, {"stop", b.stop},
                   {"special", b.special}, {"precision", b.precision}, {"plugin", b.plugin}};
    if (request.contains("ids")) answer["ids"] = prompt_ids(b, request["ids"]);
    if (request.contains("find")) answer["found"] = engine_path(b, request["find"], request.value("sm", 0));
    if (request.contains("find_plugin"))
        answer["found_plugin"] = plugin_path(b, request.value("engine", ""), request["find_plugin"]);
    if (request.contains("check")) {
        const std::string path = request["check"];
        const MappedFile file(path);
        const EngineRecord record = engine_record(b, path);
        check_engine(b, record, path, sha256(file.data(), file.size()), request.value("force", false));
        answer["record"] = {{"sha256", record.sha256}, {"tensorrt", record.tensorrt}};
    }
    return answer;
}

Json sampled(const Json& request) {
    const std::vector<float> logits = request["logits"];
    const auto count = static_cast<int64_t>(logits.size());
    if (request.contains("draws")) {
        Sampler sampler({request["temperature"], request["top_p"], request["seed"]});
        std::vector<int64_t> tokens;
        for (int i = 0; i < request["draws"].get<int>(); ++i) tokens.push_back(sampler.next(logits.data(), count));
        return tokens;
    }
    Json answer = Json::array();
    for (const Candidate& c : nucleus(logits.data(), count, request["temperature"], request["top_p"]))
        answer.push_back({c.token, c.probability});
    return answer;
}

Json broken_logits(const Json&) {
    const float logits[] = {NAN, 1.0f, NAN, 2.0f, 2.0f};
    Json answer = {{"argmax", argmax(logits, 5)}};
    for (const int count : {1, 5}) {
        try {
            count == 1 ? argmax(logits, 1) : static_cast<int64_t>(nucleus(logits, 5, 1, 1).size());
        } catch (const Error& error) {
            answer["errors"].push_back(error.what());
        }
    }
    return answer;
}

// Bytes travel as lists of numbers: a JSON string would have to be whole characters.
Json utf8(const Json& request) {
    Utf8Stream stream;
    Json pieces = Json::array();
    for (const Json& chunk : request["chunks"]) {
        const std::vector<int> numbers = chunk;
        pieces.push_back(stream.push(std::string(numbers.begin(), numbers.end())));
    }
    pieces.push_back(stream.finish());
    return pieces;
}

Json halves(const Json&) {
    Json bits = Json::array();  // NaN has no JSON
    for (int i = 0; i < 65536; ++i)
        for (const auto convert : {half_to_float, bfloat16_to_float}) {
            const float value = convert(static_cast<uint16_t>(i));
            uint32_t word;
            memcpy(&word, &value, sizeof(word));
            bits.push_back(word);
        }
    return bits;
}

Json cache(const Json& request) {
    std::vector<CacheTensor> tensors;
    for (const Json& t : request["tensors"]) tensors.push_back({"past", "present", t[0], t[1], t[2]});
    Cache cache(tensors, request["batch"], request["capacity"]);
    Json answer = {{"bytes", cache.bytes()}, {"bytes_per_token", cache.bytes_per_token()}};
    for (const int64_t tokens : request["steps"]) {
        if (tokens < 0) {
            cache.reset();
            continue;
        }
        answer["steps"].push_back({cache.past_set(), cache.present_set(), cache.length(), cache.positions(tokens)});
        cache.advance(tokens);
    }
    answer["length"] = cache.length();
    return answer;
}

Json chat(const Json& request) {
    std::vector<Message> messages;
    for (const Json& m : request["messages"]) messages.push_back({m["role"], m["content"]});
    return ChatTemplate(request["pieces"], "deploy/chat.json").format(messages);
}

Json generated(const Json& request) {
    Counting decoder(request["decoder"]);
    std::vector<int64_t> tokens;
    const Generated result = generate(decoder, request["prompt"], request["max_new_tokens"], request["stop"], {},
                                      [&](int64_t token) { tokens.push_back(token); });
    return {{"tokens", tokens}, {"ending", static_cast<int>(result.ending)}, {"steps", decoder.steps},
            {"timed", result.step_ms.size()}};
}

Json benched(const Json& request) {
    Counting decoder(request["decoder"]);
    const BenchPlan plan = {request["batch"], request["prompt_length"], request["new_tokens"], request["repeats"], 0};
    BenchFigures figures = run_bench(decoder, plan, [] { return std::string("GPU 1 MHz"); });
    return {{"steps", decoder.steps}, {"json", figures.json()}, {"timed", figures.step_ms.size()}};
}

Json figures(const Json& request) {
    BenchFigures f;
    f.batch = 2, f.prompt_length = 100, f.new_tokens = 3;
    f.first_ms = request["first_ms"].get<std::vector<double>>();
    f.step_ms = request["step_ms"].get<std::vector<double>>();
    f.cache_bytes = 1 << 20, f.cache_bytes_per_token = 64;
    if (request.value("device", true))
        f.device = {"Orin", 87, int64_t{8} << 30, int64_t{1} << 30, {"a", "b", "a"}, "10.3.0"};
    return {{"json", f.json()}, {"table", f.table()}};
}

Json checked_tokenizer(const Json& request) {
    check_tokenizer(Bytes(), request["checks"], "deploy/tokenizer_checks.json");
    return "ok";
}

Json file_sha256(const Json& request) {
    const MappedFile file(request["file"].get<std::string>());
    return sha256(file.data(), file.size());
}

const std::map<std::string, Json (*)(const Json&)> functions = {
    {"arguments", arguments},
    {"bundle", bundle},
    {"sample", sampled},
    {"broken logits", broken_logits},
    {"utf8", utf8},
    {"halves", halves},
    {"cache", cache},
    {"chat", chat},
    {"generate", generated},
    {"bench", benched},
    {"figures", figures},
    {"tokenizer", checked_tokenizer},
    {"sha256", file_sha256},
    {"json", [](const Json& r) -> Json { return read_json(r["file"]); }},
    {"percentile", [](const Json& r) -> Json { return percentile(r["values"], r["percent"]); }},
    {"devfreq", [](const Json& r) -> Json { return devfreq_clocks(r["sysfs"], r["power"]); }},
    {"load tokenizer", [](const Json& r) -> Json { return load_tokenizer(r["directory"]) != nullptr; }},
};

}  // namespace

int main() {
    const Json request = Json::parse(std::string(std::istreambuf_iterator<char>(std::cin), {}));
    Json answer;
    try {
        answer = functions.at(request["do"])(request);
    } catch (const UsageError& error) {
        answer = {{"usage_error", error.what()}};
    } catch (const Error& error) {
        answer = {{"error", error.what()}};
    }
    std::cout << answer.dump() << std::endl;
}
