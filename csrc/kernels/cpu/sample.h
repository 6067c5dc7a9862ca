// SPDX-License-Identifier: Apache-2.0
// Samples a row's token by the exponential race, after temperature, top-k, top-p and min-p.
#pragma once

#include <cstdint>

namespace dualhead::cpu {

// One row's distribution and filters. Logits are finite or -inf; the largest is finite and at
// `top`.
struct SampleRow {
  const float* logits;  // (V,)
  int64_t V;
  int64_t top;        // first index of the largest logit
  float temperature;  // > 0
  int64_t top_k;      // <= 0 or >= V: off
  float top_p;        // >= 1: off
  float min_p;        // <= 0: off
  uint64_t seed, draw;
};

int64_t sample_token(const SampleRow& row);

}  // namespace dualhead::cpu
