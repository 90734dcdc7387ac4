#include "arguments.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <functional>

#include "error.h"

namespace pq::runner {

namespace {

const char kCure[] = "pq-run --help lists the options.";

int64_t whole(const std::string& option, const std::string& text, int64_t least) {
    errno = 0;
    char* end = nullptr;
    const long long value = strtoll(text.c_str(), &end, 10);
    if (text.empty() || *end || errno) throw UsageError("a whole number is needed, not '" + text + "'", option, kCure);
    if (value < least) throw UsageError("the number must be at least " + std::to_string(least), option, kCure);
    return value;
}

double real(const std::string& option, const std::string& text, double least, double most) {
    errno = 0;
    char* end = nullptr;
    const double value = strtod(text.c_str(), &end);
    if (text.empty() || *end || errno) throw UsageError("a number is needed, not '" + text + "'", option, kCure);
    if (!(value >= least && value <= most)) throw UsageError("the number " + text + " is out of range", option, kCure);
    return value;
}

std::vector<int64_t> id_list(const std::string& option, const std::string& text) {
    std::vector<int64_t> ids;
    size_t start = 0;
    while (start <= text.size()) {
        const size_t comma = std::min(text.find(',', start), text.size());
        ids.push_back(whole(option, text.substr(start, comma - start), 0));
        start = comma + 1;
    }
    return ids;
}

// One option: a flag where `take` is empty, else what is done with the word behind it.
struct Option {
    const char* name;
    const char* short_name;
    const char* value;  // its name in the help; null: a flag
    const char* help;
    std::function<void(Arguments&, const std::string&)> take;
};

const std::vector<Option>& options() {
    static const std::vector<Option> table = {
        {"--prompt", "-p", "TEXT", "what to answer or to go on with",
         [](Arguments& a, const std::string& v) { a.prompt = v; }},
        {"--prompt-file", nullptr, "FILE", "the same from a UTF-8 file",
         [](Arguments& a, const std::string& v) { a.prompt_file = v; }},
        {"--prompt-ids", nullptr, "1,2,3", "token ids in place of a text: needs no tokenizer, prints ids",
         [](Arguments& a, const std::string& v) { a.prompt_ids = id_list("--prompt-ids", v); }},
        {"--chat", nullptr, nullptr, "put the prompt into the chat template (what is done where the model has one)",
         [](Arguments& a, const std::string&) { a.chat = Chat::kAlways; }},
        {"--raw", nullptr, nullptr, "take the prompt as it is",
         [](Arguments& a, const std::string&) { a.chat = Chat::kNever; }},
        {"--system", nullptr, "TEXT", "system message, in front of the prompt; implies --chat",
         [](Arguments& a, const std::string& v) { a.system = v, a.chat = Chat::kAlways; }},
        {"--max-new-tokens", "-n", "N", "tokens to generate at most (128)",
         [](Arguments& a, const std::string& v) { a.max_new_tokens = whole("--max-new-tokens", v, 1); }},
        {"--temperature", nullptr, "T", "0 takes the most probable token (0)",
         [](Arguments& a, const std::string& v) { a.sampling.temperature = real("--temperature", v, 0, 100); }},
        {"--top-p", nullptr, "P", "sample from the smallest set of tokens with this probability (1)",
         [](Arguments& a, const std::string& v) { a.sampling.top_p = real("--top-p", v, 0, 1); }},
        {"--seed", nullptr, "N", "of the sampling (0)",
         [](Arguments& a, const std::string& v) { a.sampling.seed = static_cast<uint64_t>(whole("--seed", v, 0)); }},
        {"--engine", nullptr, "FILE", "TensorRT engine (deploy/model.engine, or what pq_config.json has for this GPU)",
         [](Arguments& a, const std::string& v) { a.engine = v; }},
        {"--plugin", nullptr, "FILE", "plugin library (what pq_config.json names for the engine, or deploy/libpq.so)",
         [](Arguments& a, const std::string& v) { a.plugin = v; }},
        {"--tensorrt-library", nullptr, "FILE", "libnvinfer.so or libtensorrt_rtx.so, where the loader does not find it",
         [](Arguments& a, const std::string& v) { a.tensorrt_library = v; }},
        {"--max-seq-len", nullptr, "N", "tokens that the cache holds (as many as the engine allows)",
         [](Arguments& a, const std::string& v) { a.max_seq_len = whole("--max-seq-len", v, 2); }},
        {"--force", nullptr, nullptr, "load an engine whose checksum is unknown or wrong",
         [](Arguments& a, const std::string&) { a.force = true; }},
        {"--stats", nullptr, nullptr, "time and speed on standard error, behind the text",
         [](Arguments& a, const std::string&) { a.stats = true; }},
        {"--dry-run", nullptr, nullptr, "read the bundle and print the prompt's token ids; no GPU, no TensorRT",
         [](Arguments& a, const std::string&) { a.dry_run = true; }},
        {"--bench", nullptr, nullptr, "measure time to first token, speed, memory; -n tokens of random prompts",
         [](Arguments& a, const std::string&) { a.bench = true; }},
        {"--prompt-length", nullptr, "N", "tokens of a prompt of --bench (512)",
         [](Arguments& a, const std::string& v) { a.prompt_length = whole("--prompt-length", v, 1); }},
        {"--batch", nullptr, "N", "sequences at once in --bench (1)",
         [](Arguments& a, const std::string& v) { a.batch = whole("--batch", v, 1); }},
        {"--repeats", nullptr, "N", "runs of --bench, after one that is not counted (5)",
         [](Arguments& a, const std::string& v) { a.repeats = whole("--repeats", v, 1); }},
        {"--json", nullptr, "FILE", "write the figures of --bench there; '-' is standard output, without the table",
         [](Arguments& a, const std::string& v) { a.json = v; }},
        {"--help", "-h", nullptr, "print this", [](Arguments& a, const std::string&) { a.help = true; }},
    };
    return table;
}

const Option& find(const std::string& word) {
    for (const Option& option : options())
        if (word == option.name || (option.short_name && word == option.short_name)) return option;
    throw UsageError("there is no such option", word, kCure);
}

void check(const Arguments& a) {
    const int prompts = !a.prompt.empty() + !a.prompt_file.empty() + !a.prompt_ids.empty();
    if (a.bundle.empty()) throw UsageError("the bundle's directory is missing", "", kCure);
    if (a.bench && a.dry_run) throw UsageError("--dry-run measures nothing", "--bench", kCure);
    if (a.bench && prompts) throw UsageError("the benchmark makes its own prompts", "--bench", "Give --prompt-length.");
    if (!a.bench && prompts != 1)
        throw UsageError(prompts ? "there is more than one prompt" : "there is no prompt", "",
                         "Give one of -p, --prompt-file, --prompt-ids.");
    if (!a.prompt_ids.empty() && a.chat == Chat::kAlways)
        throw UsageError("a text is needed", "--chat", "Give the prompt with -p.");
    if (!a.bench && a.batch != 1) throw UsageError("the option is for --bench", "--batch", kCure);
    if (!a.bench && !a.json.empty()) throw UsageError("the option is for --bench", "--json", kCure);
}

}  // namespace

Arguments parse_arguments(const std::vector<std::string>& words) {
    Arguments arguments;
    bool only_positional = false;
    for (size_t i = 0; i < words.size(); ++i) {
        const std::string& word = words[i];
        if (word == "--" && !only_positional) {
            only_positional = true;
        } else if (only_positional || word.size() < 2 || word[0] != '-') {
            if (!arguments.bundle.empty()) throw UsageError("there is one bundle too many", word, kCure);
            arguments.bundle = word;
        } else {
            const bool is_long = word[1] == '-';
            const size_t equals = is_long ? word.find('=') : std::string::npos;
            const Option& option = find(word.substr(0, equals));
            if (!option.value && equals != std::string::npos)
                throw UsageError("the option takes no value", option.name, kCure);
            if (option.value && equals == std::string::npos && i + 1 == words.size())
                throw UsageError("the option needs a value", option.name, kCure);
            if (!option.value)
                option.take(arguments, "");
            else
                option.take(arguments, equals == std::string::npos ? words[++i] : word.substr(equals + 1));
        }
    }
    if (!arguments.help) check(arguments);
    return arguments;
}

std::string usage() {
    std::string text =
        "pq-run BUNDLE [options]: run a pq-export bundle's TensorRT engine\n\n"
        "BUNDLE is the directory of pq_config.json.\n\n";
    for (const Option& option : options()) {
        std::string left = option.short_name ? std::string(option.short_name) + ", " : "";
        left += option.name;
        if (option.value) left += std::string(" ") + option.value;
        left.resize(std::max<size_t>(left.size() + 1, 26), ' ');
        text += "  " + left + option.help + "\n";
    }
    return text + "\nExit codes: 0 done, 1 error, 2 usage.\n";
}

}  // namespace pq::runner
