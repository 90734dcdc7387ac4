// What the runner needs of a bundle: pq_config.json, generation_config.json, the tokenizer's special tokens, and the
// checks that engine and plugin library are the ones that belong to it.
#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "files.h"

namespace pq::runner {

// An engine that pq_config.json lists under "engines".
struct EngineRecord {
    std::string file;      // relative to the bundle
    std::string sha256;    // empty: unknown
    std::string tensorrt;  // version that built it, empty: unknown
    std::string plugin;    // the library that it needs, relative to the bundle; empty: none, or not named
    int sm = 0;            // of the GPU that it was built for; 0: unknown
};

struct Bundle {
    std::string directory;
    std::string target;                    // "trt", "trt-rtx"
    std::string precision;                 // "w4a4kv4"
    std::vector<int64_t> prefix_ids;       // baked into the graph; positions and mask never count it
    int64_t bos = -1;                      // -1: the model has none
    int64_t max_position_embeddings = 0;   // prefix included
    std::set<int64_t> stop;                // end of sequence
    std::set<int64_t> special;             // not printed
    std::vector<EngineRecord> engines;
    std::string plugin;                    // of engines that name none; relative to the bundle; empty: not named

    // Tokens that fit behind the prefix.
    int64_t context() const { return max_position_embeddings - static_cast<int64_t>(prefix_ids.size()); }
    std::string path(const std::string& name) const { return join(directory, name); }
    // How to get another engine, as the end of an error's line.
    std::string rebuild() const;
};

// Reads the bundle. Error: not a bundle, of a later schema, or a file that the runner reads was altered.
Bundle open_bundle(const std::string& directory);

// The engine's file: `given`, else deploy/model.engine, which is built on the device, else the one that the bundle lists
// for a GPU of compute capability `sm` (87 for 8.7; 0: unknown), or its only one.
std::string engine_path(const Bundle& bundle, const std::string& given, int sm);
// The plugin library of the engine `engine`: `given`, else what the engine's record names, else what the bundle names,
// else deploy/libpq.so; empty where that is not there.
std::string plugin_path(const Bundle& bundle, const std::string& engine, const std::string& given);

// What is known of an engine: from pq_config.json, else from what deploy/build_engine.sh writes on the device, its checksum
// in ENGINE.sha256 (sha256sum's format) and TensorRT's version in ENGINE.tensorrt; both are empty where nothing is known.
EngineRecord engine_record(const Bundle& bundle, const std::string& path);
// Error unless `found`, the engine's checksum, is the recorded one. `force` lets everything pass.
void check_engine(const Bundle& bundle, const EngineRecord& record, const std::string& path, const std::string& found,
                  bool force);

// The ids that the graph gets of a prompt's `ids`: a BOS in front goes where the prefix holds it, unless it occurs
// again (then it is a role marker of the chat template). Error: nothing left, or more than the context holds.
std::vector<int64_t> prompt_ids(const Bundle& bundle, std::vector<int64_t> ids);

}  // namespace pq::runner
