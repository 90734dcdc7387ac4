// Bookkeeping of the KV cache: which of two buffer sets is read and which is written, how large they are, and what
// mask and positions go with a step. No memory is held here.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace pq::runner {

// One past_key_values.N.key or .value and the present.N that a step writes: [batch, heads, tokens, width].
struct CacheTensor {
    std::string past, present;
    int64_t heads = 0;
    int64_t width = 0;  // elements of one token and head, as the engine has them (packed codes count as packed)
    int64_t bits = 0;   // of one element

    // Bytes of `tokens` tokens of `batch` sequences.
    int64_t bytes(int64_t batch, int64_t tokens) const;
};

// The graph reads past and writes past and new tokens into present, so that there are two sets of buffers: what one
// step wrote, the next reads.
class Cache {
public:
    // `capacity`: tokens that a buffer holds, without the prefix. Error if below 2.
    Cache(std::vector<CacheTensor> tensors, int64_t batch, int64_t capacity);

    const std::vector<CacheTensor>& tensors() const { return tensors_; }
    int64_t batch() const { return batch_; }
    int64_t capacity() const { return capacity_; }
    int64_t length() const { return length_; }  // tokens in the cache
    int past_set() const { return set_; }       // 0 or 1: the set that the next step reads
    int present_set() const { return 1 - set_; }
    int64_t bytes() const;            // of both sets
    int64_t bytes_per_token() const;  // of one sequence in one set

    // Error unless `tokens` more fit. Called before a step.
    void expect_room(int64_t tokens) const;
    // After a step of `tokens`: the sets change places.
    void advance(int64_t tokens);
    // Forgets everything.
    void reset();
    // Position ids of the next `tokens` tokens, [batch, tokens]: they count real tokens from 0.
    std::vector<int64_t> positions(int64_t tokens) const;

private:
    std::vector<CacheTensor> tensors_;
    int64_t batch_, capacity_;
    int64_t length_ = 0;
    int set_ = 0;
};

}  // namespace pq::runner
