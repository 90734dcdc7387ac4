#include "bundle.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <sstream>

#include "checksum.h"
#include "error.h"

namespace pq::runner {

namespace {

constexpr int kSchemaVersion = 1;
const char kRtx[] = "trt-rtx";

// A file that pq_config.json lists must be the listed one; one that it does not list need not be there.
void check_listed(const Bundle& bundle, const Json& files, const std::string& name) {
    if (!files.contains(name)) return;
    const std::string path = bundle.path(name);
    const MappedFile file(path);
    if (sha256(file.data(), file.size()) != files.at(name).at("sha256").get<std::string>())
        throw Error("the file was altered, it does not match pq_config.json", path, "Copy the bundle again.");
}

std::string token_text(const Json& value) {  // "x", or {"content": "x", ...}
    if (value.is_string()) return value.get<std::string>();
    return value.is_object() ? value.value("content", "") : "";
}

void add_ids(std::set<int64_t>& ids, const Json& value) {
    if (value.is_number_integer()) ids.insert(value.get<int64_t>());
    if (value.is_array())
        for (const Json& id : value) add_ids(ids, id);
}

void read_special_tokens(Bundle& bundle) {
    if (is_file(bundle.path("generation_config.json")))
        add_ids(bundle.stop, read_json(bundle.path("generation_config.json")).value("eos_token_id", Json()));
    if (!is_file(bundle.path("tokenizer.json"))) return;
    std::string eos;
    if (is_file(bundle.path("tokenizer_config.json")))
        eos = token_text(read_json(bundle.path("tokenizer_config.json")).value("eos_token", Json()));
    const Json tokenizer = read_json(bundle.path("tokenizer.json"));
    for (const Json& token : tokenizer.value("added_tokens", Json::array())) {
        const int64_t id = token.at("id").get<int64_t>();
        if (token.value("special", false)) bundle.special.insert(id);
        if (!eos.empty() && token.at("content") == eos) bundle.stop.insert(id);
    }
    const Json model = tokenizer.value("model", Json::object());
    if (eos.empty() || !model.contains("vocab")) return;
    if (model.at("vocab").is_object() && model.at("vocab").contains(eos))
        bundle.stop.insert(model.at("vocab").at(eos).get<int64_t>());
}

// A path has a folder; pq-export 0.5 wrote the library's checksum there.
std::string library_of(const Json& engine) {
    const Json named = engine.value("plugin", Json());
    const std::string path = named.is_string() ? named.get<std::string>() : "";
    return path.find('/') == std::string::npos ? "" : path;
}

std::string listed(const std::vector<EngineRecord>& engines) {
    std::string text;
    for (const EngineRecord& engine : engines) text += (text.empty() ? "" : ", ") + engine.file;
    return text;
}

void read_config(Bundle& bundle, const Json& config) {
    bundle.target = config.value("target", "");
    bundle.precision = config.at("precision").get<std::string>();
    bundle.prefix_ids = config.at("prefix").at("token_ids").get<std::vector<int64_t>>();
    if (config.contains("bos_token_id") && !config.at("bos_token_id").is_null())
        bundle.bos = config.at("bos_token_id").get<int64_t>();
    bundle.max_position_embeddings = config.at("max_position_embeddings").get<int64_t>();
    for (const Json& engine : config.value("engines", Json::array()))
        bundle.engines.push_back({engine.at("file").get<std::string>(), engine.value("sha256", ""),
                                  engine.value("tensorrt", ""), library_of(engine), engine.value("sm", 0)});
    bundle.plugin = config.value("plugin", "");
}

}  // namespace

Bundle open_bundle(const std::string& directory) {
    Bundle bundle;
    bundle.directory = directory;
    const std::string path = bundle.path("pq_config.json");
    if (!is_file(path))
        throw Error("not a bundle, it has no pq_config.json", directory,
                    "Give the directory that 'pq-export ... -o' wrote.");
    const Json config = read_json(path);
    if (!config.is_object() || config.value("format", Json()) != "pq-export/bundle")
        throw Error("not a pq-export bundle", path);
    const Json version = config.value("schema_version", Json());
    if (!version.is_number_integer() || version.get<int64_t>() > kSchemaVersion)
        throw Error("the bundle has schema version " + version.dump() + "; this pq-run reads up to " +
                        std::to_string(kSchemaVersion),
                    path, "Build pq-run from the bundle's version of pq-export.");
    try {
        read_config(bundle, config);
        for (const char* name : {"generation_config.json", "tokenizer.json", "tokenizer_config.json",
                                 "deploy/chat.json", "deploy/tokenizer_checks.json"})
            check_listed(bundle, config.value("files", Json::object()), name);
        read_special_tokens(bundle);
    } catch (const Json::exception& error) {
        throw Error(std::string("the bundle has not the expected contents (") + error.what() + ")", path,
                    "Build the bundle again.");
    }
    return bundle;
}

std::string Bundle::rebuild() const {
    if (target == kRtx) return "Build it for this version: pq-export build CALIBRATION --target trt-rtx.";
    return "Build it again on this machine: deploy/build_engine.sh.";
}

std::string engine_path(const Bundle& bundle, const std::string& given, int sm) {
    const auto& engines = bundle.engines;
    std::string path = given.empty() ? bundle.path("deploy/model.engine") : given;
    if (given.empty() && !is_file(path) && !engines.empty()) {
        const auto fits = [&](const EngineRecord& engine) { return sm != 0 && engine.sm == sm; };
        auto found = std::find_if(engines.begin(), engines.end(), fits);
        if (found == engines.end() && engines.size() == 1 && (sm == 0 || engines[0].sm == 0)) found = engines.begin();
        if (found == engines.end())
            throw Error("none of the bundle's engines (" + listed(engines) + ") is for " +
                            (sm ? "this GPU, SM " + std::to_string(sm) : "an unknown GPU"),
                        bundle.directory, bundle.rebuild() + " Or name one with --engine.");
        path = bundle.path(found->file);
    }
    if (!is_file(path)) throw Error("there is no engine", path, bundle.rebuild());
    return path;
}

std::string plugin_path(const Bundle& bundle, const std::string& engine, const std::string& given) {
    std::string path = given;
    if (path.empty()) {
        const std::string named = engine_record(bundle, engine).plugin;
        if (!named.empty() || !bundle.plugin.empty()) path = bundle.path(named.empty() ? bundle.plugin : named);
    }
    if (path.empty()) {
        path = bundle.path("deploy/libpq.so");
        return is_file(path) ? path : "";
    }
    if (!is_file(path)) throw Error("there is no plugin library", path, "Build it: pq-export plugin build --sm SM.");
    return path;
}

EngineRecord engine_record(const Bundle& bundle, const std::string& path) {
    for (const EngineRecord& record : bundle.engines)
        if (same_file(bundle.path(record.file), path)) return record;
    EngineRecord record;
    record.file = path;
    if (is_file(path + ".sha256")) std::istringstream(read_file(path + ".sha256")) >> record.sha256;
    if (is_file(path + ".tensorrt")) std::istringstream(read_file(path + ".tensorrt")) >> record.tensorrt;
    return record;
}

void check_engine(const Bundle& bundle, const EngineRecord& record, const std::string& path, const std::string& found,
                  bool force) {
    if (force || record.sha256 == found) return;
    const std::string cure = bundle.rebuild() + " --force loads it all the same.";
    if (record.sha256.empty())
        throw Error("the engine has no recorded checksum, neither in pq_config.json nor in a .sha256 file", path, cure);
    throw Error("the engine was altered, its SHA-256 begins with " + found.substr(0, 12) + ", recorded is " +
                    record.sha256.substr(0, 12),
                path, cure);
}

std::vector<int64_t> prompt_ids(const Bundle& bundle, std::vector<int64_t> ids) {
    const auto& prefix = bundle.prefix_ids;
    const bool in_prefix = std::find(prefix.begin(), prefix.end(), bundle.bos) != prefix.end();
    if (in_prefix && !ids.empty() && ids[0] == bundle.bos && std::count(ids.begin(), ids.end(), bundle.bos) == 1)
        ids.erase(ids.begin());
    if (ids.empty()) throw Error("the prompt is empty", "", "Give some text with -p.");
    if (static_cast<int64_t>(ids.size()) >= bundle.context())
        throw Error("the prompt has " + std::to_string(ids.size()) + " tokens; the context holds " +
                        std::to_string(bundle.context()),
                    "", "Shorten it.");
    return ids;
}

}  // namespace pq::runner
