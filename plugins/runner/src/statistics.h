// Percentiles, and the report of --bench.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "files.h"

namespace pq::runner {

// The `percent`th percentile, 0 to 100, between two values by linear interpolation (NumPy's default); Error if empty.
double percentile(std::vector<double> values, double percent);

struct DeviceFacts {
    std::string name = "unknown";
    int sm = 0;                                     // 87 for compute capability 8.7
    int64_t memory_bytes = -1;                      // -1: unknown
    int64_t memory_used_bytes = -1;                 // by this run: free before loading less free at the end
    std::vector<std::string> clocks;                // one sample after each repeat, "unknown" where none can be read
    std::string tensorrt = "unknown";
};

struct BenchFigures {
    int64_t batch = 1, prompt_length = 0, new_tokens = 0;
    std::vector<double> first_ms;        // of each repeat: time to the first token
    std::vector<double> step_ms;         // of each further token, all repeats together
    int64_t cache_bytes = 0, cache_bytes_per_token = 0;
    DeviceFacts device;

    Json json() const;
    std::string table() const;
};

}  // namespace pq::runner
