#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "error.h"

namespace pq::runner {

namespace {

[[noreturn]] void not_a_number() {
    throw Error("the logits are not numbers", "logits", "Build the engine again: deploy/build_engine.sh.");
}

}  // namespace

int64_t argmax(const float* logits, int64_t count) {
    int64_t best = -1;
    for (int64_t i = 0; i < count; ++i)
        if (!std::isnan(logits[i]) && (best < 0 || logits[i] > logits[best])) best = i;
    if (best < 0) not_a_number();
    return best;
}

std::vector<Candidate> nucleus(const float* logits, int64_t count, double temperature, double top_p) {
    const double largest = logits[argmax(logits, count)];
    std::vector<Candidate> all(static_cast<size_t>(count));
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) {
        if (std::isnan(logits[i])) not_a_number();
        sum += (all[i] = {i, std::exp((logits[i] - largest) / temperature)}).probability;
    }
    for (Candidate& candidate : all) candidate.probability /= sum;
    const auto before = [](const Candidate& a, const Candidate& b) {
        return a.probability != b.probability ? a.probability > b.probability : a.token < b.token;
    };
    // Mostly a few dozen tokens hold the probability: sort only as many as are needed, not the whole vocabulary.
    size_t sorted = 0, kept = 0;
    double cumulated = 0;
    while (kept < all.size() && (kept == 0 || cumulated < top_p)) {
        if (kept == sorted) {
            const size_t more = std::min(all.size(), std::max<size_t>(64, sorted * 8));
            std::partial_sort(all.begin() + sorted, all.begin() + more, all.end(), before);
            sorted = more;
        }
        cumulated += all[kept++].probability;
    }
    all.resize(kept);
    for (Candidate& candidate : all) candidate.probability /= cumulated;
    return all;
}

int64_t Sampler::next(const float* logits, int64_t count) {
    if (sampling_.temperature == 0.0) return argmax(logits, count);
    const std::vector<Candidate> candidates = nucleus(logits, count, sampling_.temperature, sampling_.top_p);
    double left = static_cast<double>(generator_() >> 11) * 0x1.0p-53;  // uniform in [0, 1)
    for (const Candidate& candidate : candidates) {
        left -= candidate.probability;
        if (left < 0) return candidate.token;
    }
    return candidates.back().token;  // probabilities that add up to a little less than 1
}

}  // namespace pq::runner
