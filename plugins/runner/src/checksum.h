// SHA-256 by OpenSSL's libcrypto: every Jetson and Ubuntu has it, and it uses the CPU's own SHA instructions, so that
// an engine of gigabytes takes seconds.
#pragma once

#include <cstddef>
#include <string>

namespace pq::runner {

// 64 lower-case hexadecimal digits.
std::string sha256(const void* data, size_t size);

}  // namespace pq::runner
