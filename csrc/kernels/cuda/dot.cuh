// SPDX-License-Identifier: Apache-2.0
// The one inner product of the decode step: a weight row against a tile of hidden rows, by a warp.
#pragma once

#include "primitives.cuh"
#include "workspace.h"

namespace dualhead {
namespace cuda {

// dots[t] = sum_k row[k] * hidden[t][k] for t < count, the same bits in every lane. fp32
// accumulation in one order for every batch: lane l takes k = l, l + 32, ..., then the lanes meet.
// row (d,), hidden (count, d) with `stride` elements between rows.
template <typename R, typename W>
__device__ __forceinline__ void dot_tile(const R* row, const W* hidden, int64_t stride, int64_t d,
                                         int count, float (&dots)[kTile]) {
#pragma unroll
  for (int t = 0; t < kTile; ++t) dots[t] = 0.0f;
#pragma unroll 2
  for (int64_t k = lane_index(); k < d; k += kWarp) {
    const float w = to_float(row[k]);
#pragma unroll
    for (int t = 0; t < kTile; ++t) {
      if (t < count) dots[t] = fmaf(w, to_float(hidden[t * stride + k]), dots[t]);
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
