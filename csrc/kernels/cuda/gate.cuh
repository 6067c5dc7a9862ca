// SPDX-License-Identifier: Apache-2.0
// The gate of the decode step, folded (docs/paper.md): project the new position, append it to the
// cache, attend over the cache by splits, and turn the gate's logit into alpha. Each function is
// one phase of the launch, done by a team of warps; barriers stand between them.
#pragma once

#include "dot.cuh"
#include "primitives.cuh"
#include "workspace.h"

namespace dualhead {
namespace cuda {

// Where row b's new position goes, or -1 if its cache is full. A negative length, which only a
// damaged cache has, counts as full: nothing is written out of bounds.
__device__ __forceinline__ int64_t new_column(const DecodeParams& p, int64_t b) {
  const int64_t length = p.cache_length[b];
  return length >= 0 && length < p.S ? length : -1;
}

// Warps that share a phase: each takes item first, first + stride, ...
struct Team {
  int64_t first, stride;
};

__device__ __forceinline__ Team whole_grid() { return Team{warp_in_grid(), warps_in_grid()}; }

// Phase 1: q to the workspace; k, u and the valid flag to the cache, at column length[b].
// A warp per projection row and batch tile; rows are W_Q's g, W_K's g, then the H folded ones.
// dtype: p.dtype, where the caller knows it. kWide: by dot_tile_wide.
template <bool kWide>
__device__ __forceinline__ void project(const DecodeParams& p, const Workspace& ws, Team team,
                                        DType dtype) {
  const int64_t g = p.H * p.d_k, tiles = ceil_div(p.B, kTile);
  for (int64_t item = team.first; item < (2 * g + p.H) * tiles; item += team.stride) {
    const int64_t row = item / tiles, b0 = item % tiles * kTile;
    const int count = static_cast<int>(p.B - b0 < kTile ? p.B - b0 : kTile);
    const Numbers hidden = Numbers{p.hidden, dtype}.from(b0 * p.hidden_stride);
    const Numbers weight =
        row < 2 * g ? Numbers{row < g ? p.q_weight : p.k_weight, dtype}.from(row % g * p.d)
                    : Numbers{p.u_weight, DType::kFloat32}.from((row - 2 * g) * p.d);
    float dots[kTile];
    if constexpr (kWide) {
      dot_tile_wide(weight, hidden, p.hidden_stride, p.d, count, dots);
    } else {
      dot_tile(weight, hidden, p.hidden_stride, p.d, count, dots);
    }
    if (lane_index() >= count) continue;  // lane t stores batch row b0 + t; no exchange follows
    const float own = pick_own(dots);
    const int64_t b = b0 + lane_index(), column = new_column(p, b);
    if (row < g) {
      ws.q[b * g + row] = own;
    } else if (column >= 0 && row < 2 * g) {
      const int64_t h = (row - g) / p.d_k, j = (row - g) % p.d_k;
      store_number(p.cache_k, dtype, ((b * p.H + h) * p.S + column) * p.d_k + j, own);
    } else if (column >= 0) {
      const int64_t h = row - 2 * g;
      p.cache_u[(b * p.H + h) * p.S + column] = own;
      if (h == 0) p.cache_valid[b * p.S + column] = p.new_valid ? p.new_valid[b] : 1;
    }
  }
}

// q . k / sqrt(d_k) of one column, by one lane; in eights where `wide` (d_k a multiple of 8, the
// addresses of 16), to the same bits.
__device__ __forceinline__ float attention_score(const float* q, Numbers k, int64_t d_k,
                                                 bool wide) {
  float dot = 0.0f;
  if (wide) {
    for (int64_t j = 0; j < d_k; j += 8) {
      float eight_q[8], eight_k[8];
      load_eight(q + j, eight_q);
      k.eight(j, eight_k);
#pragma unroll
      for (int i = 0; i < 8; ++i) dot = fmaf(eight_q[i], eight_k[i], dot);
    }
  } else {
    for (int64_t j = 0; j < d_k; ++j) dot = fmaf(q[j], k(j), dot);
  }
  return dot / sqrtf(static_cast<float>(d_k));
}

// Phase 2: the attention part of each split of kSplit columns, by a warp; with out_attention, the
// raw scores go there for now, -inf where nothing is visible.
__device__ __forceinline__ void attend(const DecodeParams& p, const Workspace& ws, Team team,
                                       DType dtype) {
  const int64_t splits = ceil_div(p.S, kSplit);
  const bool wide = p.d_k % 8 == 0 && sixteen_divides(p.cache_k) && sixteen_divides(ws.q);
  for (int64_t item = team.first; item < p.B * p.H * splits; item += team.stride) {
    const int64_t bh = item / splits, s0 = item % splits * kSplit, b = bh / p.H;
    const int64_t column = new_column(p, b);  // the last filled one, or -1
    if (s0 > column && !p.out_attention) continue;
    const float* q = ws.q + bh * p.d_k;
    float score[kSplit / kWarp];
    float max = -INFINITY;
    int seen = 0;
#pragma unroll
    for (int i = 0; i < kSplit / kWarp; ++i) {
      const int64_t s = s0 + i * kWarp + lane_index();
      // Columns that are not visible may hold anything, NaN too: they are skipped, not weighed by
      // 0.
      const bool visible = s <= column && p.cache_valid[b * p.S + s];
      score[i] = -INFINITY;
      if (visible) {
        const Numbers k = Numbers{p.cache_k, dtype}.from((bh * p.S + s) * p.d_k);
        score[i] = attention_score(q, k, p.d_k, wide);
        max = fmaxf(max, score[i]);
        seen |= 1 << i;
      }
      if (p.out_attention && s < p.S) p.out_attention[bh * p.S + s] = score[i];
    }
    max = warp_max(max);
    float sum = 0.0f, value = 0.0f;
    // A part whose visible scores are all -inf has no mass; weigh() tells it from an empty one.
#pragma unroll
    for (int i = 0; i < kSplit / kWarp; ++i) {
      if (!(seen >> i & 1) || score[i] == -INFINITY) continue;
      const float e = expf(score[i] - max);
      sum += e;
      value = fmaf(e, p.cache_u[bh * p.S + s0 + i * kWarp + lane_index()], value);
    }
    int visible_columns = 0;
#pragma unroll
    for (int i = 0; i < kSplit / kWarp; ++i) visible_columns += seen >> i & 1;
    const AttentionPart part{max, warp_sum(sum), warp_sum(value), warp_sum(visible_columns)};
    if (lane_index() == 0) ws.attention[item] = part;
  }
}

// Head bh's share of the gate logit, sum_s softmax_s(score) u_s, from `splits` parts; every lane
// calls and gets it. The whole row's softmax goes to the workspace.
__device__ __forceinline__ float head_share(const Workspace& ws, int64_t bh, int64_t splits,
                                            int64_t stride) {
  const AttentionPart* parts = ws.attention + bh * stride;
  float max = -INFINITY, sum = 0.0f, value = 0.0f;
  int seen = 0;
  for (int64_t i = lane_index(); i < splits; i += kWarp) max = fmaxf(max, parts[i].max);
  max = warp_max(max);
  for (int64_t i = lane_index(); i < splits; i += kWarp) {
    seen |= parts[i].seen > 0;
    // A NaN score leaves max at -inf and sum at NaN: pass it on. Only -inf with sum 0 is empty.
    const float scale = parts[i].max == -INFINITY ? 1.0f : expf(parts[i].max - max);
    sum = fmaf(parts[i].sum, scale, sum);
    value = fmaf(parts[i].value, scale, value);
  }
  sum = warp_sum(sum), value = warp_sum(value), seen = warp_sum(seen);
  if (lane_index() == 0) ws.attention_row[bh] = SoftmaxPart{max, sum};
  if (seen == 0) return 0.0f;  // no valid column: the gate's logit is b_g
  return value / sum;          // 0 / 0 = NaN where every visible score is -inf, as a softmax has it
}

// alpha from the gate's logit and the row's controls, before its rounding to a head.
__device__ __forceinline__ float controlled_weight(const DecodeParams& p, int64_t b,
                                                   float gate_logit) {
  const float a = p.alpha ? p.alpha[b] : 1.0f / (1.0f + expf(-gate_logit));
  if (!p.strength) return a;
  if (p.strength[b] == 0.0f) return 0.0f;  // whatever alpha is, NaN too
  const float weighed = p.strength[b] * a;
  return weighed < 0.0f ? 0.0f : weighed > 1.0f ? 1.0f : weighed;  // a NaN passes
}

__device__ __forceinline__ float mixing_weight(const DecodeParams& p, int64_t b, float gate_logit) {
  const float a = controlled_weight(p, b, gate_logit);
  if (!p.skip_threshold) return a;
  const float threshold = p.skip_threshold[b];
  return a < threshold ? 0.0f : 1.0f - a < threshold ? 1.0f : a;
}

// Which heads a row's mixture depends on: alpha 0 and 1 select one, and NaN is NaN with any.
struct Needs {
  bool lm, reward;
};

__device__ __forceinline__ Needs needs_of(float a) {
  return Needs{a == a && a != 1.0f, a == a && a != 0.0f};
}

// Phase 3: gate logit, alpha and first status of each batch row, by a warp; the cache grows by one.
// `counted`: whether each row, and which heads it needs, is reported to the counters.
__device__ __forceinline__ void weigh(const DecodeParams& p, const Workspace& ws, Team team,
                                      bool counted) {
  const int64_t stride = ceil_div(p.S, kSplit);
  for (int64_t b = team.first; b < p.B; b += team.stride) {
    const int64_t column = p.gate_logit_in ? 0 : new_column(p, b);
    float gate_logit = p.gate_logit_in ? p.gate_logit_in[b] : 0.0f;
    if (!p.gate_logit_in && column >= 0) {
      for (int64_t h = 0; h < p.H; ++h) {
        gate_logit += head_share(ws, b * p.H + h, column / kSplit + 1, stride);
      }
      gate_logit += p.gate_bias[0];
    }
    if (lane_index() != 0) continue;  // no exchange follows
    if (p.gate_offset) gate_logit += p.gate_offset[b];
    const bool full = column < 0;
    p.out_gate_logit[b] = full ? NAN : gate_logit;
    p.out_alpha[b] = full ? NAN : mixing_weight(p, b, gate_logit);
    p.out_status[b] = full ? kCacheFull : kOk;
    if (!p.gate_logit_in && !full) p.cache_length[b] = static_cast<int32_t>(column + 1);
    if (!counted) continue;
    const Needs needs = needs_of(p.out_alpha[b]);
    if (needs.lm) signal(ws.counter + kNeedLm, 1);
    if (needs.reward) signal(ws.counter + kNeedReward, 1);
    signal(ws.counter + kWeighedRows, 1);
  }
}

// Beside phase 4, with out_attention: raw scores become probabilities; rows that saw nothing, and
// full ones, become 0.
__device__ __forceinline__ void normalize_attention(const DecodeParams& p, const Workspace& ws,
                                                    Team team) {
  const int64_t stride = team.stride * kWarp;
  for (int64_t i = team.first * kWarp + lane_index(); i < p.B * p.H * p.S; i += stride) {
    const SoftmaxPart row = ws.attention_row[i / p.S];
    const bool full = p.out_status[i / (p.S * p.H)] == kCacheFull;
    const float score = p.out_attention[i];
    p.out_attention[i] = full || score == -INFINITY ? 0.0f : expf(score - row.max) / row.sum;
  }
}

}  // namespace cuda
}  // namespace dualhead
