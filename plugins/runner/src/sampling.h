// From logits to the next token: the rules of pq_export/runtime.py.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

namespace pq::runner {

// `temperature` 0 is greedy. `top_p` keeps the smallest set of tokens with that probability.
struct Sampling {
    double temperature = 0.0;
    double top_p = 1.0;
    uint64_t seed = 0;
};

// Index of the largest of `count` logits, the first of equals; a NaN is never chosen. Error if all are NaN.
int64_t argmax(const float* logits, int64_t count);

// A candidate and its probability, which over all candidates of a nucleus() adds up to 1.
struct Candidate {
    int64_t token;
    double probability;
};
// The candidates of top-p sampling, most probable first, equals in the order of their ids. Error on NaN.
std::vector<Candidate> nucleus(const float* logits, int64_t count, double temperature, double top_p);

class Sampler {
public:
    explicit Sampler(const Sampling& sampling) : sampling_(sampling), generator_(sampling.seed) {}
    // One token of logits [count].
    int64_t next(const float* logits, int64_t count);

private:
    Sampling sampling_;
    std::mt19937_64 generator_;  // its numbers are the same with every compiler; distributions' are not
};

}  // namespace pq::runner
