// SPDX-License-Identifier: Apache-2.0
// A reward head that corrects the LM head: the operands of its products, computed from D h.
//
//   embedding  the rows that the LM head multiplies: h and sum_k w_k (U_k D_k h + c_k)
//   low rank   w_k D_k h, which multiplies U_k's row of each vocabulary entry
#pragma once

#include "projection.cuh"

namespace dualhead {
namespace cuda {

__device__ __forceinline__ float objective_weight(const DecodeParams& p, int64_t b, int64_t k) {
  return p.objective_weights ? p.objective_weights[b * p.K + k] : 1.0f / static_cast<float>(p.K);
}

// The row of request b's h among the rows that the LM head multiplies. Its M h + c is four rows
// further down, so that one lane of a tensor core tile holds the sums of both (row_of_place).
__device__ __forceinline__ int64_t row_of_request(int64_t b) { return b / 4 * 8 + b % 4; }

// sum_k w_k (U_k D_k h + c_k) for request b and this lane's input i; 0 if i >= d. The whole warp
// calls.
__device__ __forceinline__ float changed_input(const DecodeParams& p, const Workspace& ws,
                                               DType dtype, int64_t b, int64_t i) {
  const bool there = i < p.d;
  const Numbers up{p.reward_up, dtype}, bias{p.reward_bias, dtype};
  float total = 0.0f;
  for (int64_t k = 0; k < p.K; ++k) {
    float dot = 0.0f;
    for (int64_t j0 = 0; j0 < p.r; j0 += kWarp) {
      const int64_t j = j0 + lane_index();
      const float own = j < p.r ? projected(p, ws, b, inner_row(p) + k * p.r + j) : 0.0f;
#pragma unroll 8
      for (int n = 0; n < kWarp; ++n) {
        const float weight = there && j0 + n < p.r ? up((k * p.d + i) * p.r + j0 + n) : 0.0f;
        dot = fmaf(exchange_from(own, n), weight, dot);
      }
    }
    if (there) total = fmaf(objective_weight(p, b, k), dot + bias(k * p.d + i), total);
  }
  return total;
}

// Computes the rows that the LM head multiplies, or `change`: one warp per request and 32 inputs.
// Rows that only pad the last group of eight are zeros.
__device__ __forceinline__ void change_hidden(const DecodeParams& p, const Workspace& ws, Team team,
                                              DType dtype) {
  const int64_t requests = ws.rows ? product_rows(p) / 2 : p.B, parts = ceil_div(p.d, kWarp);
  for (int64_t item = team.first; item < requests * parts; item += team.stride) {
    const int64_t b = item / parts, i = item % parts * kWarp + lane_index();
    const float change = b < p.B ? changed_input(p, ws, dtype, b, i) : 0.0f;
    if (i >= p.d) continue;
    if (!ws.rows) {
      ws.change[b * p.d + i] = change;
      continue;
    }
    const float hidden = b < p.B ? Numbers{p.hidden, dtype}(b * p.hidden_stride + i) : 0.0f;
    store_number(ws.rows, dtype, row_of_request(b) * p.d + i, hidden);
    store_number(ws.rows, dtype, (row_of_request(b) + 4) * p.d + i, change);
  }
}

// Computes w_k D_k h of every request: one warp per request and 32 values.
__device__ __forceinline__ void weigh_inner(const DecodeParams& p, const Workspace& ws, Team team) {
  const int64_t count = p.K * p.r, parts = ceil_div(count, kWarp);
  for (int64_t item = team.first; item < p.B * parts; item += team.stride) {
    const int64_t b = item / parts, j = item % parts * kWarp + lane_index();
    if (j >= count) continue;
    const float weight = objective_weight(p, b, j / p.r);
    ws.inner[b * count + j] = weight * projected(p, ws, b, inner_row(p) + j);
  }
}

// Runs beside the phase that computes alpha, or before the products, once D h is complete. Not
// inlined, so that its loads can use all registers.
static __device__ __noinline__ void prepare_correction(const DecodeParams& p, const Workspace& ws,
                                                       Team team, DType dtype) {
  if (p.reward_head == RewardHead::kEmbedding) change_hidden(p, ws, team, dtype);
  if (p.reward_head == RewardHead::kLowRank) weigh_inner(p, ws, team);
}

// sum_k w_k c_k of vocabulary entry v for request b, for a low-rank head.
__device__ __forceinline__ float low_rank_bias(const DecodeParams& p, DType dtype, int64_t v,
                                               int64_t b) {
  const Numbers bias{p.reward_bias, dtype};
  float sum = 0.0f;
  for (int64_t k = 0; k < p.K; ++k) sum = fmaf(objective_weight(p, b, k), bias(k * p.V + v), sum);
  return sum;
}

// delta of vocabulary entry v for request b under a low-rank head, computed by a warp.
__device__ __forceinline__ float low_rank_delta(const DecodeParams& p, const Workspace& ws,
                                                DType dtype, int64_t v, int64_t b) {
  const Numbers up{p.reward_up, dtype};
  const float* inner = ws.inner + b * p.K * p.r;
  float dot = 0.0f;
  for (int64_t k = 0; k < p.K; ++k) {
    for (int64_t j = lane_index(); j < p.r; j += kWarp) {
      dot = fmaf(up((k * p.V + v) * p.r + j), inner[k * p.r + j], dot);
    }
  }
  return warp_sum(dot) + low_rank_bias(p, dtype, v, b);
}

// The same, computed by the four lanes that share entry v, for the eight requests from b0 on. Each
// lane gets two of them: places 2 t and 2 t + 1, rows t and t + 4. All lanes call.
__device__ __forceinline__ void low_rank_deltas(const DecodeParams& p, const Workspace& ws,
                                                int64_t v, int64_t b0, bool there,
                                                float (&delta)[2]) {
  const Numbers up{p.reward_up, p.dtype};
  const int64_t count = p.K * p.r, t = lane_index() % 4;
  const float* inner = ws.inner + b0 * count;
  const int rows = static_cast<int>(p.B - b0 < 8 ? p.B - b0 : 8);
  float dot[8] = {};
  for (int64_t k = 0; k < p.K && there; ++k) {
    for (int64_t j = t; j < p.r; j += 4) {
      const float weight = up((k * p.V + v) * p.r + j);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        if (n < rows) dot[n] = fmaf(weight, inner[n * count + k * p.r + j], dot[n]);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    dot[n] += exchange_xor(dot[n], 1);
    dot[n] += exchange_xor(dot[n], 2);
  }
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    if (n % 4 == t) delta[n / 4] = dot[n];
  }
#pragma unroll
  for (int column = 0; column < 2; ++column) {
    const int64_t b = b0 + t + 4 * column;
    if (there && b < p.B) delta[column] += low_rank_bias(p, p.dtype, v, b);
  }
}

}  // namespace cuda
}  // namespace dualhead
