// SPDX-License-Identifier: Apache-2.0
// Dot products of a weight row with a tile of hidden rows, computed by a warp.
//
// dots[t] = sum_k row(k) * hidden(t * stride + k) for t < count, with the same bits in every lane.
// fp32 accumulation in one order for every batch: each lane sums its own inputs, then the lanes are
// reduced.
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

// Lane l takes groups of four inputs, starting at 4 l and 128 apart. It issues kAhead loads before
// it uses the first. kFours: see Numbers::four; the bits are the same without it.
template <bool kFours, typename Row>
__device__ __forceinline__ void dot_tile(Row row, Numbers hidden, int64_t stride, int64_t d,
                                         int count, float (&dots)[kTile]) {
  constexpr int kAhead = 8, kStep = 4 * kWarp;
#pragma unroll
  for (int t = 0; t < kTile; ++t) dots[t] = 0.0f;
#pragma unroll 1
  for (int64_t k0 = 4 * lane_index(); k0 < d; k0 += kAhead * kStep) {
    Four w[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t k = k0 + i * kStep;
      w[i] = row.template four<kFours>(k, d - k);
    }
#pragma unroll
    for (int t = 0; t < kTile; ++t) {
      if (t >= count) continue;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int64_t k = k0 + i * kStep;
        const Four h = hidden.template four<kFours>(t * stride + k, d - k);
#pragma unroll
        for (int j = 0; j < 4; ++j) dots[t] = fmaf(w[i].x[j], h.x[j], dots[t]);
      }
    }
  }
  meet_dots(count, dots);
}

// Element t, in lane t, of an array that is in registers.
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
