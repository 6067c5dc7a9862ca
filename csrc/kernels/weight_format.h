// SPDX-License-Identifier: Apache-2.0
// How numbers of the heads are stored: one trait per format, host and device. A new format adds a
// storage type, its conversion, and its trait; the kernels take the trait as a template argument.
#pragma once

#include <cstdint>

#include "params.h"
#include "sampling.h"  // DUALHEAD_HD, float_bits, bits_float

namespace dualhead {

// The upper half of a float.
struct BFloat16 {
  uint16_t bits;
};

DUALHEAD_HD float to_float(float x) { return x; }

DUALHEAD_HD float to_float(BFloat16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }

// Round to nearest, ties to even; NaN stays NaN (its payload could round to infinity).
DUALHEAD_HD BFloat16 to_bfloat16(float x) {
  const uint32_t bits = float_bits(x);
  if (x != x) return BFloat16{static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return BFloat16{static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16)};
}

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
