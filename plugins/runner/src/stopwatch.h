#pragma once

#include <chrono>

namespace pq::runner {

class Stopwatch {
public:
    // Milliseconds since it was made or since the last lap.
    double lap_ms() {
        const auto now = std::chrono::steady_clock::now();
        const double ms = std::chrono::duration<double, std::milli>(now - last_).count();
        last_ = now;
        return ms;
    }

private:
    std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

}  // namespace pq::runner
