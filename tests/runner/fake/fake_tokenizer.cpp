// A tokenizer in the library's place: a byte is a token, and <s> is token 256.
#include "tokenizer.h"

namespace pq::runner {

namespace {

class Bytes : public Tokenizer {
public:
    std::vector<int64_t> encode(const std::string& text) const override {
        std::vector<int64_t> ids;
        for (size_t i = 0; i < text.size(); ++i) {
            const bool bos = text.compare(i, 3, "<s>") == 0;
            ids.push_back(bos ? 256 : static_cast<unsigned char>(text[i]));
            i += bos ? 2 : 0;
        }
        return ids;
    }
    std::string decode(int64_t id) const override {
        return id < 256 ? std::string(1, static_cast<char>(id)) : "<s>";
    }
};

}  // namespace

bool has_tokenizer() { return true; }
std::unique_ptr<Tokenizer> load_tokenizer(const std::string&) { return std::make_unique<Bytes>(); }

}  // namespace pq::runner
