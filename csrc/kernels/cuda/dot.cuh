// SPDX-License-Identifier: Apache-2.0
// The one inner product of the decode step: a weight row against a tile of hidden rows, by a warp.
#pragma once

#include "primitives.cuh"
#include "workspace.h"

namespace dualhead {
namespace cuda {

// dots[t] = sum_k row[k] * hidden[t][k] for t < count, the same bits in every lane. fp32
// accumulation in one order for every batch: lane l takes k = l, l + 32, ..., then the lanes meet;
// kWide, which needs d and stride to be multiples of 8 and addresses of 16: eights of them.
// row (d,), hidden (count, d) with `stride` elements between rows.
template <bool kWide, typename R, typename W>
__device__ __forceinline__ void dot_tile(const R* row, const W* hidden, int64_t stride, int64_t d,
                                         int count, float (&dots)[kTile]) {
#pragma unroll
  for (int t = 0; t < kTile; ++t) dots[t] = 0.0f;
  if constexpr (kWide) {
    constexpr int kEight = 8;
#pragma unroll 2
    for (int64_t k = kEight * lane_index(); k < d; k += kEight * kWarp) {
      float w[kEight], h[kEight];
      load_eight(row + k, w);
#pragma unroll
      for (int t = 0; t < kTile; ++t) {
        if (t >= count) continue;
        load_eight(hidden + t * stride + k, h);
#pragma unroll
        for (int i = 0; i < kEight; ++i) dots[t] = fmaf(w[i], h[i], dots[t]);
      }
    }
  } else {
#pragma unroll 2
    for (int64_t k = lane_index(); k < d; k += kWarp) {
      const float w = to_float(row[k]);
#pragma unroll
      for (int t = 0; t < kTile; ++t) {
        if (t < count) dots[t] = fmaf(w, to_float(hidden[t * stride + k]), dots[t]);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kTile; ++t) {
    if (t < count) dots[t] = warp_sum(dots[t]);
  }
}

// Lane t's own element of an array that lives in registers.
__device__ __forceinline__ float pick_own(const float (&values)[kTile]) {
  float own = 0.0f;
#pragma unroll
  for (int t = 0; t < kTile; ++t) {
    if (lane_index() == t) own = values[t];
  }
  return own;
}

}  // namespace cuda
}  // namespace dualhead
