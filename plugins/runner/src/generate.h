// The token loop: prefill, then one token after the other.
#pragma once

#include <cstdint>
#include <functional>
#include <set>
#include <vector>

#include "sampling.h"

namespace pq::runner {

// A model with a KV cache. The engine is one; tests have another.
class Decoder {
public:
    virtual ~Decoder() = default;
    virtual int64_t vocabulary() const = 0;  // logits of one token
    virtual int64_t capacity() const = 0;    // tokens that the cache holds
    virtual int64_t max_input() const = 0;   // tokens of one step
    // An empty cache for `batch` sequences.
    virtual void reset(int64_t batch) = 0;
    // Runs ids [batch, S] behind what is in the cache: logits [batch, vocabulary] of the last token, valid until the
    // next call.
    virtual const float* step(const std::vector<int64_t>& ids) = 0;
};

// Runs ids [batch, S] in pieces of max_input() tokens, the first of them shorter; what the last piece's step returns.
const float* prefill(Decoder& decoder, const std::vector<int64_t>& ids, int64_t batch);

enum class Ending { kStopToken, kMaxNewTokens, kContextFull };

struct Generated {
    Ending ending = Ending::kMaxNewTokens;
    int64_t prompt_tokens = 0;
    double first_ms = 0;           // until the first token was chosen
    std::vector<double> step_ms;   // of each further token
};

// Generates behind `prompt`; `on_token` gets each token but a stop token as soon as it is there.
Generated generate(Decoder& decoder, const std::vector<int64_t>& prompt, int64_t max_new_tokens,
                   const std::set<int64_t>& stop, const Sampling& sampling,
                   const std::function<void(int64_t)>& on_token);

}  // namespace pq::runner
