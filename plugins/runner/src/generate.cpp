#include "generate.h"

#include "error.h"
#include "stopwatch.h"

namespace pq::runner {

const float* prefill(Decoder& decoder, const std::vector<int64_t>& ids, int64_t batch) {
    const int64_t length = static_cast<int64_t>(ids.size()) / batch;
    const float* logits = nullptr;
    // A full piece may stand behind as many tokens as the cache holds without it, and a shorter one behind no more:
    // the prefill profile ends there. So the short piece comes first.
    int64_t count = (length - 1) % decoder.max_input() + 1;
    for (int64_t start = 0; start < length; start += count, count = decoder.max_input()) {
        std::vector<int64_t> piece;
        piece.reserve(static_cast<size_t>(batch * count));
        for (int64_t row = 0; row < batch; ++row) {
            const auto first = ids.begin() + row * length + start;
            piece.insert(piece.end(), first, first + count);
        }
        logits = decoder.step(piece);
    }
    return logits;
}

Generated generate(Decoder& decoder, const std::vector<int64_t>& prompt, int64_t max_new_tokens,
                   const std::set<int64_t>& stop, const Sampling& sampling,
                   const std::function<void(int64_t)>& on_token) {
    Generated result;
    result.prompt_tokens = static_cast<int64_t>(prompt.size());
    if (result.prompt_tokens > decoder.capacity())
        throw Error("the prompt has " + std::to_string(prompt.size()) + " tokens; the cache holds " +
                        std::to_string(decoder.capacity()),
                    "", "Shorten it, or build the engine with a larger --max-seq-len.");
    Sampler sampler(sampling);
    decoder.reset(1);
    Stopwatch watch;
    const float* logits = prefill(decoder, prompt, 1);
    for (int64_t made = 0;; ++made) {
        const int64_t token = sampler.next(logits, decoder.vocabulary());
        if (made)
            result.step_ms.push_back(watch.lap_ms());
        else
            result.first_ms = watch.lap_ms();
        if (stop.count(token)) {
            result.ending = Ending::kStopToken;
            return result;
        }
        on_token(token);
        if (made + 1 == max_new_tokens) return result;
        if (result.prompt_tokens + made + 1 > decoder.capacity()) {
            result.ending = Ending::kContextFull;
            return result;
        }
        logits = decoder.step({token});
    }
}

}  // namespace pq::runner
