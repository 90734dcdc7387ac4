// 16-bit floating-point logits on the host, without CUDA's types.
#pragma once

#include <cstdint>
#include <cstring>

namespace pq::runner {

// IEEE binary16, subnormals, infinities and NaNs included.
inline float half_to_float(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
    const uint32_t exponent = (bits >> 10) & 31, mantissa = bits & 0x3FFu;
    if (exponent == 0) {  // zero, or mantissa * 2^-24
        const float value = static_cast<float>(mantissa) * 0x1p-24f;
        return sign ? -value : value;
    }
    const uint32_t wide = sign | ((exponent == 31 ? 255u : exponent + 112u) << 23) | (mantissa << 13);
    float value;
    memcpy(&value, &wide, sizeof(value));
    return value;
}

inline float bfloat16_to_float(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    memcpy(&value, &wide, sizeof(value));
    return value;
}

}  // namespace pq::runner
