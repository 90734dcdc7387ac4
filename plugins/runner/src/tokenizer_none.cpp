// The tokenizer of a program that was built without one.
#include "error.h"
#include "tokenizer.h"

namespace pq::runner {

bool has_tokenizer() { return false; }

std::unique_ptr<Tokenizer> load_tokenizer(const std::string& directory) {
    throw Error("pq-run was built without a tokenizer", directory,
                "Give --prompt-ids, or build it with -DPQ_RUNNER_TOKENIZER=ON.");
}

}  // namespace pq::runner
