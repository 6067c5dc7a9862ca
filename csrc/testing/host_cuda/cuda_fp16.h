// SPDX-License-Identifier: Apache-2.0
// Half-precision conversions of the host backend, written out because not every host compiler has
// the type.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline __half __ushort_as_half(uint16_t bits) { return __half{bits}; }

inline uint16_t __half_as_ushort(__half x) { return x.bits; }

inline float __half2float(__half x) {
  const uint32_t exponent = x.bits >> 10 & 31, fraction = x.bits & 1023, sign = x.bits >> 15;
  float value = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2^-24: subnormal
  if (exponent > 0) {  // the exponent's bias changes from 15 to 127
    const uint32_t wide = (exponent == 31 ? 255u : exponent + 112u) << 23 | fraction << 13;
    std::memcpy(&value, &wide, sizeof(value));
  }
  return sign ? -value : value;
}

// Round to nearest, ties to even.
inline __half __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (magnitude != magnitude) return __half{0x7FFF};
  if (magnitude == 0.0f) return __half{sign};
  if (magnitude >= 65520.0f) return __half{static_cast<uint16_t>(sign | 0x7C00)};  // rounds to inf
  int exponent;
  std::frexp(magnitude, &exponent);                       // magnitude < 2^exponent
  const int unit = exponent < -13 ? -24 : exponent - 11;  // exponent of the last place
  const float places = std::nearbyint(std::ldexp(magnitude, -unit));
  // `places` counts units. If its leading 1 is at bit 10, adding it carries into the exponent.
  const int biased = unit == -24 ? 0 : unit + 24;
  return __half{static_cast<uint16_t>(sign | ((biased << 10) + static_cast<int>(places)))};
}
