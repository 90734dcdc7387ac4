#include "error.h"

#include <nlohmann/json.hpp>

#include "tokenizer.h"

namespace pq::runner {

void check_tokenizer(const Tokenizer& tokenizer, const Json& checks, const std::string& where) {
    try {
        for (const Json& check : checks) {
            const auto text = check.at("text").get<std::string>();
            const auto ids = tokenizer.encode(text);
            if (ids != check.at("ids").get<std::vector<int64_t>>())
                throw Error("the tokenizer library gives other ids than Hugging Face's for " + Json(text).dump() +
                                ": " + Json(ids).dump(),
                            where, "Encode prompts elsewhere and give --prompt-ids.");
        }
    } catch (const Json::exception& error) {
        throw Error(std::string("the tokenizer's checks cannot be read (") + error.what() + ")", where,
                    "Build the bundle again.");
    }
}

}  // namespace pq::runner
