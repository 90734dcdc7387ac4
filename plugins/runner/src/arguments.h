// The command line of pq-run.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "sampling.h"

namespace pq::runner {

// Whether the prompt goes into the model's chat template.
enum class Chat { kWherePresent, kAlways, kNever };

struct Arguments {
    std::string bundle;
    std::string engine;            // empty: what pq_config.json names, else deploy/model.engine
    std::string plugin;            // empty: what pq_config.json names, else deploy/libpq.so where it is there
    std::string tensorrt_library;  // empty: libnvinfer.so of the version that this program was compiled with
    std::string prompt;
    std::string prompt_file;
    std::string system;
    std::vector<int64_t> prompt_ids;  // instead of a text; output is ids too
    Chat chat = Chat::kWherePresent;
    bool dry_run = false;
    bool bench = false;
    bool force = false;
    bool help = false;
    bool stats = false;
    Sampling sampling;
    int64_t max_new_tokens = 128;
    int64_t max_seq_len = 0;  // 0: what the engine holds
    int64_t prompt_length = 512;
    int64_t batch = 1;
    int64_t repeats = 5;
    std::string json;  // where --bench writes its figures, "-" is standard output
};

// argv[1..]; UsageError names the option and the reason.
Arguments parse_arguments(const std::vector<std::string>& words);
// What --help prints.
std::string usage();

}  // namespace pq::runner
