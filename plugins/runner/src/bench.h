// --bench: the same work several times over, timed.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "generate.h"
#include "statistics.h"

namespace pq::runner {

struct BenchPlan {
    int64_t batch = 1, prompt_length = 512, new_tokens = 128, repeats = 5;
    uint64_t seed = 0;
};

// Prefills random tokens and decodes greedily, never stopping early: once to warm up, then `repeats` times. `clocks` is
// asked after each repeat, while the GPU is still at work's clocks. Error if the cache cannot hold it.
BenchFigures run_bench(Decoder& decoder, const BenchPlan& plan, const std::function<std::string()>& clocks);

}  // namespace pq::runner
