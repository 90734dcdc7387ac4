// Text of tokens as it comes: a token may end in the middle of a character.
#pragma once

#include <string>

namespace pq::runner {

class Utf8Stream {
public:
    // Adds bytes; returns the whole characters that are there now. A byte that cannot belong to a character becomes
    // U+FFFD, one for each maximal part of a character, as Unicode recommends and Python's errors="replace" does.
    std::string push(const std::string& bytes);
    // What is left at the end, an unfinished character as U+FFFD.
    std::string finish();

private:
    std::string pending_;
};

}  // namespace pq::runner
