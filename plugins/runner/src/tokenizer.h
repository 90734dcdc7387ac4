// Text to token ids and back. The library behind it is pytorch/tokenizers (tokenizer_pytorch.cpp); a program built
// without it runs on ids (--prompt-ids).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "files.h"

namespace pq::runner {

class Tokenizer {
public:
    virtual ~Tokenizer() = default;
    // Ids of UTF-8 text; special tokens in it are found, none is added. Error where the library refuses the text.
    virtual std::vector<int64_t> encode(const std::string& text) const = 0;
    // Bytes of one token: not always whole characters (Utf8Stream).
    virtual std::string decode(int64_t id) const = 0;
};

// Whether this program was built with a tokenizer library.
bool has_tokenizer();
// The tokenizer of `directory`/tokenizer.json. Error: no library, or it cannot read the file.
std::unique_ptr<Tokenizer> load_tokenizer(const std::string& directory);

// Compares with what Hugging Face's tokenizer made of some texts at export:
// `checks` is [{"text": "...", "ids": [...]}, ...]. Error names the first text with other ids.
void check_tokenizer(const Tokenizer& tokenizer, const Json& checks, const std::string& where);

}  // namespace pq::runner
