// SPDX-License-Identifier: Apache-2.0
// Storage formats of the heads' weights: one trait per format, for host and device. A new format
// adds a storage type, its conversion and its trait; the kernels take the trait as a template
// argument.
#pragma once

#include <cstdint>

#include "params.h"
#include "sampling.h"  // DUALHEAD_HD, float_bits, bits_float

namespace dualhead {

// bfloat16: the upper half of a float.
struct BFloat16 {
  uint16_t bits;
};

DUALHEAD_HD float to_float(float x) { return x; }

DUALHEAD_HD float to_float(BFloat16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }

// Round to nearest, ties to even. NaN stays NaN; rounding its payload could give infinity.
DUALHEAD_HD BFloat16 to_bfloat16(float x) {
  const uint32_t bits = float_bits(x);
  if (x != x) return BFloat16{static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return BFloat16{static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16)};
}

// fp8 e4m3, without infinities. Its bits, moved to the positions of float16's fields, are the value
// times 2^-8, subnormals included; here the conversion is plain arithmetic. Quantised rows contain
// no NaN: a NaN row has a NaN scale.
struct Fp8 {
  uint8_t bits;
};
DUALHEAD_HD float to_float(Fp8 x) {
  const uint32_t exponent = x.bits >> 3 & 15u, fraction = x.bits & 7u;
  const float magnitude = exponent ? bits_float((exponent + 120u) << 23 | fraction << 20)
                                   : static_cast<float>(fraction) * 0.001953125f;
  return x.bits & 0x80u ? -magnitude : magnitude;
}

// Two int4 values, each stored plus 8. dualhead_ext/quantization defines which two inputs they
// belong to.
struct Int4Pair {
  uint8_t bits;
};

template <DType>
struct WeightFormat;

template <>
struct WeightFormat<DType::kFloat32> {
  using Storage = float;
  static constexpr int64_t row_bytes(int64_t d) { return d * 4; }
  static DUALHEAD_HD float load(const Storage* row, int64_t i) { return row[i]; }
  static DUALHEAD_HD Storage store(float x) { return x; }
};

template <>
struct WeightFormat<DType::kBFloat16> {
  using Storage = BFloat16;
  static constexpr int64_t row_bytes(int64_t d) { return d * 2; }
  static DUALHEAD_HD float load(const Storage* row, int64_t i) { return to_float(row[i]); }
  static DUALHEAD_HD Storage store(float x) { return to_bfloat16(x); }
};

}  // namespace dualhead
