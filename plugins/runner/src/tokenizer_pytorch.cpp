// pytorch/tokenizers (BSD-3-Clause), a C++ reader of tokenizer.json: https://github.com/meta-pytorch/tokenizers
#include <pytorch/tokenizers/hf_tokenizer.h>

#include "error.h"
#include "tokenizer.h"

namespace pq::runner {

namespace {

class PytorchTokenizer : public Tokenizer {
public:
    explicit PytorchTokenizer(const std::string& path) : path_(path) {
        const tokenizers::Error error = library_.load(path);
        if (error != tokenizers::Error::Ok)
            throw Error("the tokenizer library cannot read the file, error " + std::to_string(static_cast<int>(error)),
                        path, "Encode prompts elsewhere and give --prompt-ids.");
    }

    std::vector<int64_t> encode(const std::string& text) const override {
        const auto ids = library_.encode(text, 0, 0);
        if (!ids.ok()) throw Error("the tokenizer cannot encode the text", path_);
        return {ids.get().begin(), ids.get().end()};
    }

    std::string decode(int64_t id) const override {
        // The library's rule for the first token of a text is not asked for: what comes goes on behind a prompt.
        const auto text = library_.decode(0, static_cast<uint64_t>(id));
        if (!text.ok()) throw Error("the tokenizer has no token " + std::to_string(id), path_);
        return text.get();
    }

private:
    std::string path_;
    tokenizers::HFTokenizer library_;
};

}  // namespace

bool has_tokenizer() { return true; }

std::unique_ptr<Tokenizer> load_tokenizer(const std::string& directory) {
    return std::make_unique<PytorchTokenizer>(join(directory, "tokenizer.json"));
}

}  // namespace pq::runner
