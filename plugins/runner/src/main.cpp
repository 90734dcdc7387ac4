// pq-run: a bundle's TensorRT engine from the command line. Exit codes: 0 done, 1 error, 2 usage.
#include <algorithm>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "arguments.h"
#include "bench.h"
#include "bundle.h"
#include "chat.h"
#include "engine.h"
#include "error.h"
#include "tensorrt_library.h"
#include "tokenizer.h"
#include "utf8.h"

namespace pq::runner {

namespace {

std::string joined(const std::vector<int64_t>& ids) {
    std::string text;
    for (const int64_t id : ids) text += (text.empty() ? "" : ",") + std::to_string(id);
    return text;
}

std::unique_ptr<Tokenizer> checked_tokenizer(const Bundle& bundle) {
    auto tokenizer = load_tokenizer(bundle.directory);
    const std::string checks = bundle.path("deploy/tokenizer_checks.json");
    if (is_file(checks)) check_tokenizer(*tokenizer, read_json(checks), checks);
    return tokenizer;
}

// The text that is encoded: the prompt, in the chat template where there is one, or as --chat and --raw say.
std::string prompt_text(const Arguments& arguments, const Bundle& bundle) {
    const std::string text = arguments.prompt_file.empty() ? arguments.prompt : read_file(arguments.prompt_file);
    const std::string path = bundle.path("deploy/chat.json");
    if (arguments.chat == Chat::kNever || (arguments.chat == Chat::kWherePresent && !is_file(path))) return text;
    if (!is_file(path)) throw Error("the bundle has no chat template", path, "Use --raw.");
    std::vector<Message> messages;
    if (!arguments.system.empty()) messages.push_back({"system", arguments.system});
    messages.push_back({"user", text});
    return ChatTemplate(read_json(path), path).format(messages);
}

EngineDecoder load_engine(const Arguments& arguments, const Bundle& bundle) {
    EngineOptions options;
    options.engine = engine_path(bundle, arguments.engine, current_sm());
    options.plugin = plugin_path(bundle, options.engine, arguments.plugin);
    options.tensorrt_library = arguments.tensorrt_library;
    options.max_seq_len = arguments.max_seq_len;
    options.force = arguments.force;
    return EngineDecoder(bundle, options);
}

void bench(const Arguments& arguments, const Bundle& bundle) {
    EngineDecoder decoder = load_engine(arguments, bundle);
    const BenchPlan plan = {arguments.batch, arguments.prompt_length, arguments.max_new_tokens, arguments.repeats,
                            arguments.sampling.seed};
    BenchFigures figures = run_bench(decoder, plan, [&] { return decoder.clocks(); });
    const std::vector<std::string> clocks = figures.device.clocks;
    figures.device = decoder.facts();
    figures.device.clocks = clocks;
    figures.cache_bytes = decoder.cache().bytes();
    figures.cache_bytes_per_token = decoder.cache().bytes_per_token();
    if (arguments.json != "-") std::cout << figures.table() << std::flush;
    if (arguments.json == "-") {
        std::cout << figures.json().dump(1) << std::endl;
    } else if (!arguments.json.empty()) {
        std::ofstream file(arguments.json);
        if (!(file << figures.json().dump(1) << std::endl)) throw Error("the file cannot be written", arguments.json);
    }
}

void print_stats(const Generated& result) {
    const auto& steps = result.step_ms;
    double sum = 0;
    for (const double ms : steps) sum += ms;
    fprintf(stderr, "prompt of %lld tokens, first token after %.1f ms", static_cast<long long>(result.prompt_tokens),
            result.first_ms);
    if (!steps.empty())
        fprintf(stderr, "; %zu steps, %.1f tokens/s (p50 %.2f ms, p95 %.2f ms)", steps.size(),
                1000.0 * static_cast<double>(steps.size()) / sum, percentile(steps, 50), percentile(steps, 95));
    fprintf(stderr, "\n");
}

void answer(const Arguments& arguments, const Bundle& bundle) {
    const bool text = arguments.prompt_ids.empty();
    const auto tokenizer = text ? checked_tokenizer(bundle) : nullptr;
    const std::vector<int64_t> ids =
        prompt_ids(bundle, text ? tokenizer->encode(prompt_text(arguments, bundle)) : arguments.prompt_ids);
    if (arguments.dry_run) {
        std::cout << joined(ids) << std::endl;
        return;
    }
    EngineDecoder decoder = load_engine(arguments, bundle);
    Utf8Stream stream;
    bool first = true;
    const auto show = [&](int64_t token) {
        if (!text)
            std::cout << (first ? "" : ",") << token << std::flush;
        else if (!bundle.special.count(token))
            std::cout << stream.push(tokenizer->decode(token)) << std::flush;
        first = false;
    };
    const Generated result =
        generate(decoder, ids, arguments.max_new_tokens, bundle.stop, arguments.sampling, show);
    std::cout << stream.finish() << std::endl;
    if (result.ending == Ending::kContextFull)
        std::cerr << "pq-run: the text ends here as the cache is full (" << decoder.capacity() << " tokens)\n";
    if (arguments.stats) print_stats(result);
}

int run(const std::vector<std::string>& words) {
    const Arguments arguments = parse_arguments(words);
    if (arguments.help) {
        std::cout << usage();
        return 0;
    }
    const Bundle bundle = open_bundle(arguments.bundle);
    arguments.bench ? bench(arguments, bundle) : answer(arguments, bundle);
    return 0;
}

}  // namespace

}  // namespace pq::runner

int main(int count, char** words) {
    const auto fail = [](std::string line, int code) {
        std::replace(line.begin(), line.end(), '\n', ' ');  // others' messages in ours
        std::cout << std::flush;
        std::cerr << "pq-run: " << line << std::endl;
        return code;
    };
    try {
        return pq::runner::run({words + 1, words + count});
    } catch (const pq::runner::UsageError& error) {
        return fail(error.what(), 2);
    } catch (const std::exception& error) {
        return fail(error.what(), 1);
    }
}
