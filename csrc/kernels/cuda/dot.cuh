// SPDX-License-Identifier: Apache-2.0
// Inner products of a weight row with a tile of hidden rows, by a warp.
//
// Both functions: dots[t] = sum_k row(k) * hidden(t * stride + k) for t < count, the same bits in
// every lane. fp32 accumulation in one order for every batch: each lane has its inputs, then the
// lanes meet.
#pragma once

#include "numbers.cuh"
#include "workspace.h"

namespace dualhead {
namespace cuda {

__device__ __forceinline__ void meet_dots(int count, float (&dots)[kTile]) {
#pragma unroll
  for (int t = 0; t < kTile; ++t) {
    if (t < count) dots[t] = warp_sum(dots[t]);
  }
}

// Lane l takes k = l, l + 32, ...
template <typename Row>
__device__ __forceinline__ void dot_tile(Row row, Numbers hidden, int64_t stride, int64_t d,
                                         int count, float (&dots)[kTile]) {
#pragma unroll
  for (int t = 0; t < kTile; ++t) dots[t] = 0.0f;
#pragma unroll 2
  for (int64_t k = lane_index(); k < d; k += kWarp) {
    const float w = row(k);
#pragma unroll
    for (int t = 0; t < kTile; ++t) {
      if (t < count) dots[t] = fmaf(w, hidden(t * stride + k), dots[t]);
    }
  }
  meet_dots(count, dots);
}

// Lane l takes eights of inputs: d and stride are multiples of 8, and 16 divides all addresses. The
// next eight weights are asked for before this one is used, for they come from memory.
__device__ __forceinline__ void dot_tile_wide(Numbers row, Numbers hidden, int64_t stride,
                                              int64_t d, int count, float (&dots)[kTile]) {
  constexpr int64_t kStride = 8 * kWarp;
#pragma unroll
  for (int t = 0; t < kTile; ++t) dots[t] = 0.0f;
  float next[8] = {};
  if (8 * lane_index() < d) row.eight(8 * lane_index(), next);
  for (int64_t k = 8 * lane_index(); k < d; k += kStride) {
    float w[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) w[i] = next[i];
    if (k + kStride < d) row.eight(k + kStride, next);
#pragma unroll
    for (int t = 0; t < kTile; ++t) {
      if (t >= count) continue;
      float h[8];
      hidden.eight(t * stride + k, h);
#pragma unroll
      for (int i = 0; i < 8; ++i) dots[t] = fmaf(w[i], h[i], dots[t]);
    }
  }
  meet_dots(count, dots);
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
