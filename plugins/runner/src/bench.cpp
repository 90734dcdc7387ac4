#include "bench.h"

#include <random>
#include <vector>

#include "error.h"
#include "stopwatch.h"

namespace pq::runner {

namespace {

std::vector<int64_t> chosen(const Decoder& decoder, const float* logits, int64_t batch) {
    std::vector<int64_t> tokens;
    for (int64_t row = 0; row < batch; ++row)
        tokens.push_back(argmax(logits + row * decoder.vocabulary(), decoder.vocabulary()));
    return tokens;
}

}  // namespace

BenchFigures run_bench(Decoder& decoder, const BenchPlan& plan, const std::function<std::string()>& clocks) {
    const int64_t needed = plan.prompt_length + plan.new_tokens - 1;  // the last token is not run
    if (needed > decoder.capacity())
        throw Error("the prompt and the new tokens take " + std::to_string(needed) + " places; the cache holds " +
                        std::to_string(decoder.capacity()),
                    "--bench", "Lower --prompt-length or -n, or build the engine with a larger --max-seq-len.");
    std::mt19937_64 random(plan.seed);
    std::vector<int64_t> prompt;
    for (int64_t i = 0; i < plan.batch * plan.prompt_length; ++i)
        prompt.push_back(static_cast<int64_t>(random() % static_cast<uint64_t>(decoder.vocabulary())));

    BenchFigures figures;
    figures.batch = plan.batch;
    figures.prompt_length = plan.prompt_length;
    figures.new_tokens = plan.new_tokens;
    for (int64_t repeat = -1; repeat < plan.repeats; ++repeat) {  // -1 warms up
        decoder.reset(plan.batch);
        Stopwatch watch;
        std::vector<int64_t> tokens = chosen(decoder, prefill(decoder, prompt, plan.batch), plan.batch);
        const double first = watch.lap_ms();
        std::vector<double> steps;
        for (int64_t made = 1; made < plan.new_tokens; ++made) {
            tokens = chosen(decoder, decoder.step(tokens), plan.batch);
            steps.push_back(watch.lap_ms());
        }
        if (repeat < 0) continue;
        figures.first_ms.push_back(first);
        figures.step_ms.insert(figures.step_ms.end(), steps.begin(), steps.end());
        figures.device.clocks.push_back(clocks());
    }
    return figures;
}

}  // namespace pq::runner
