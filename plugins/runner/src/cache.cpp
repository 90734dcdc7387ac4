#include "cache.h"

#include "error.h"

namespace pq::runner {

int64_t CacheTensor::bytes(int64_t batch, int64_t tokens) const {
    return (batch * heads * tokens * width * bits + 7) / 8;
}

Cache::Cache(std::vector<CacheTensor> tensors, int64_t batch, int64_t capacity)
    : tensors_(std::move(tensors)), batch_(batch), capacity_(capacity) {
    if (capacity < 2)
        throw Error("the cache holds " + std::to_string(capacity) + " tokens; it takes 2 to generate", "--max-seq-len");
}

int64_t Cache::bytes() const {
    int64_t sum = 0;
    for (const CacheTensor& tensor : tensors_) sum += 2 * tensor.bytes(batch_, capacity_);
    return sum;
}

int64_t Cache::bytes_per_token() const {
    int64_t sum = 0;
    for (const CacheTensor& tensor : tensors_) sum += tensor.bytes(1, 1);
    return sum;
}

void Cache::expect_room(int64_t tokens) const {
    if (length_ + tokens > capacity_)
        throw Error("the cache holds " + std::to_string(capacity_) + " tokens; " + std::to_string(length_ + tokens) +
                        " are needed",
                    "", "Shorten the prompt, or build the engine with a larger --max-seq-len.");
}

void Cache::advance(int64_t tokens) {
    expect_room(tokens);
    length_ += tokens;
    set_ = 1 - set_;
}

void Cache::reset() {
    length_ = 0;
    set_ = 0;
}

std::vector<int64_t> Cache::positions(int64_t tokens) const {
    std::vector<int64_t> ids;
    ids.reserve(static_cast<size_t>(batch_ * tokens));
    for (int64_t row = 0; row < batch_; ++row)
        for (int64_t i = 0; i < tokens; ++i) ids.push_back(length_ + i);
    return ids;
}

}  // namespace pq::runner
