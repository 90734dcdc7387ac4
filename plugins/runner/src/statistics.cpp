#include "statistics.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <numeric>
#include <set>
#include <utility>

#include "error.h"

namespace pq::runner {

namespace {

double sum(const std::vector<double>& values) { return std::accumulate(values.begin(), values.end(), 0.0); }

std::string number(const char* format, double value) {
    char text[64];
    snprintf(text, sizeof(text), format, value);
    return text;
}

std::string mib(int64_t bytes) {
    return bytes < 0 ? "unknown" : number("%.1f MiB", static_cast<double>(bytes) / (1 << 20));
}

std::string unique_of(const std::vector<std::string>& samples) {
    std::string text;
    for (const std::string& sample : std::set<std::string>(samples.begin(), samples.end()))
        text += (text.empty() ? "" : "; ") + sample;
    return text.empty() ? "unknown" : text;
}

Json bytes_or_null(int64_t bytes) { return bytes < 0 ? Json() : Json(bytes); }

}  // namespace

double percentile(std::vector<double> values, double percent) {
    if (values.empty()) throw Error("there is nothing to take a percentile of", "--bench");
    std::sort(values.begin(), values.end());
    const double rank = percent / 100 * static_cast<double>(values.size() - 1);
    const auto below = static_cast<size_t>(rank);
    const size_t above = std::min(below + 1, values.size() - 1);
    return values[below] + (rank - static_cast<double>(below)) * (values[above] - values[below]);
}

Json BenchFigures::json() const {
    Json result = {
        {"batch", batch},
        {"prompt_length", prompt_length},
        {"new_tokens", new_tokens},
        {"repeats", first_ms.size()},
        {"first_token_ms", {{"p50", percentile(first_ms, 50)}, {"p95", percentile(first_ms, 95)}}},
        {"prefill_tokens_per_s", 1000.0 * static_cast<double>(batch * prompt_length) / percentile(first_ms, 50)},
        {"cache_bytes", cache_bytes},
        {"cache_bytes_per_token", cache_bytes_per_token},
        {"device",
         {{"name", device.name},
          {"sm", device.sm ? Json(device.sm) : Json()},
          {"memory_bytes", bytes_or_null(device.memory_bytes)},
          {"memory_used_bytes", bytes_or_null(device.memory_used_bytes)},
          {"clocks", device.clocks},
          {"tensorrt", device.tensorrt}}},
    };
    if (!step_ms.empty()) {
        result["step_ms"] = {{"p50", percentile(step_ms, 50)}, {"p95", percentile(step_ms, 95)}};
        result["decode_tokens_per_s"] = 1000.0 * static_cast<double>(batch * step_ms.size()) / sum(step_ms);
    }
    return result;
}

std::string BenchFigures::table() const {
    const Json figures = json();
    std::vector<std::pair<std::string, std::string>> rows = {
        {"device", device.name + (device.sm ? " (sm_" + std::to_string(device.sm) + ")" : "")},
        {"TensorRT", device.tensorrt},
        {"clocks", unique_of(device.clocks)},
        {"batch x prompt + new tokens", std::to_string(batch) + " x " + std::to_string(prompt_length) + " + " +
                                            std::to_string(new_tokens) + ", " + std::to_string(first_ms.size()) +
                                            " repeats"},
        {"time to first token, p50", number("%.2f ms", figures["first_token_ms"]["p50"])},
        {"time to first token, p95", number("%.2f ms", figures["first_token_ms"]["p95"])},
        {"prefill", number("%.0f tokens/s", figures["prefill_tokens_per_s"])},
    };
    if (figures.contains("step_ms")) {
        rows.emplace_back("one decode step, p50", number("%.2f ms", figures["step_ms"]["p50"]));
        rows.emplace_back("one decode step, p95", number("%.2f ms", figures["step_ms"]["p95"]));
        rows.emplace_back("decode", number("%.1f tokens/s", figures["decode_tokens_per_s"]));
    }
    rows.emplace_back("device memory used", mib(device.memory_used_bytes) + " of " + mib(device.memory_bytes));
    rows.emplace_back("KV cache", mib(cache_bytes) + ", " + std::to_string(cache_bytes_per_token) + " bytes a token");
    std::string text;
    for (const auto& [name, value] : rows) {
        std::string left = name;
        left.resize(30, ' ');
        text += left + value + "\n";
    }
    return text;
}

}  // namespace pq::runner
