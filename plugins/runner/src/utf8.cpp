#include "utf8.h"

namespace pq::runner {

namespace {

const char kReplacement[] = "\xEF\xBF\xBD";

// Well-formed sequences by their first byte (Unicode, table 3-7): length, and the range of the second byte.
struct Lead {
    size_t length;  // 0: no character starts with it
    unsigned char low, high;
};

Lead lead_of(unsigned char byte) {
    if (byte < 0x80) return {1, 0, 0};
    if (byte < 0xC2) return {0, 0, 0};
    if (byte < 0xE0) return {2, 0x80, 0xBF};
    if (byte == 0xE0) return {3, 0xA0, 0xBF};
    if (byte == 0xED) return {3, 0x80, 0x9F};  // no surrogates
    if (byte < 0xF0) return {3, 0x80, 0xBF};
    if (byte == 0xF0) return {4, 0x90, 0xBF};
    if (byte < 0xF4) return {4, 0x80, 0xBF};
    if (byte == 0xF4) return {4, 0x80, 0x8F};
    return {0, 0, 0};
}

}  // namespace

std::string Utf8Stream::push(const std::string& bytes) {
    pending_ += bytes;
    std::string text;
    size_t at = 0;
    while (at < pending_.size()) {
        const Lead lead = lead_of(static_cast<unsigned char>(pending_[at]));
        size_t valid = 1;
        for (; valid < lead.length && at + valid < pending_.size(); ++valid) {
            const auto byte = static_cast<unsigned char>(pending_[at + valid]);
            const bool second = valid == 1;
            if (byte < (second ? lead.low : 0x80) || byte > (second ? lead.high : 0xBF)) break;
        }
        if (valid < lead.length && at + valid == pending_.size()) break;  // the rest may still come
        if (lead.length && valid == lead.length)
            text.append(pending_, at, valid);
        else
            text += kReplacement;
        at += valid;
    }
    pending_.erase(0, at);
    return text;
}

std::string Utf8Stream::finish() {
    const bool unfinished = !pending_.empty();
    pending_.clear();
    return unfinished ? kReplacement : "";
}

}  // namespace pq::runner
