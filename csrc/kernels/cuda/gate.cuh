// SPDX-License-Identifier: Apache-2.0
// The folded gate of the decode step (docs/paper.md): projects the new position, appends it to the
// cache, attends over the cache in splits, and turns the gate's logit into alpha. Each function is
// one phase of the launch, executed by a team of warps, with barriers between the phases.
//
// The gate reads few bytes (6.4 MB at d = 4096 and g = 384), so its time is mostly the latency of
// its loads. Every phase therefore issues all the loads that it can before it uses the first.
#pragma once

#include "../head_math.h"
#include "projection.cuh"

namespace dualhead {
namespace cuda {

// The cache column of row b's new position, or -1 if its cache is full. A negative length, found
// only in a corrupted cache, counts as full, so nothing is written out of bounds.
__device__ __forceinline__ int64_t new_column(const DecodeParams& p, int64_t b) {
  const int64_t length = p.cache_length[b];
  return length >= 0 && length < p.S ? length : -1;
}

__device__ __forceinline__ bool new_is_valid(const DecodeParams& p, int64_t b) {
  return !p.new_valid || p.new_valid[b];
}

// A warp writes the new position's key, folded value and valid flag to the cache, for head h of row
// b.
__device__ __forceinline__ void append(const DecodeParams& p, const Workspace& ws, DType dtype,
                                       int64_t b, int64_t h, int64_t column) {
  const int64_t g = p.H * p.d_k, at = (b * p.H + h) * p.S + column;
  for (int64_t j = lane_index(); j < p.d_k; j += kWarp) {
    store_number(p.cache_k, dtype, at * p.d_k + j, projected(p, ws, b, g + h * p.d_k + j));
  }
  if (lane_index() == 0) {
    p.cache_u[at] = projected(p, ws, b, key_rows(p) + h);
    if (h == 0) p.cache_valid[b * p.S + column] = new_is_valid(p, b);
  }
  warp_barrier();  // now every lane may read the column
}

constexpr int kColumns = kSplit / kWarp;  // of one split, per lane

// dot[i] = q . k for each of the lane's columns. All lanes call. first_row: the first projection
// row of q for this head. key_of(i): the key of column i, or null. The inputs are processed in
// order, kEights groups of eight at once for all columns, so that kAhead loads of 16 bytes are in
// flight. kWide: d_k is a multiple of 8 and the keys are aligned to 16 bytes.
template <DType kDType, bool kWide, int kAhead, typename KeyOf>
__device__ __forceinline__ void attention_dots(const DecodeParams& p, const Workspace& ws,
                                               int64_t b, int64_t first_row, KeyOf key_of,
                                               float (&dot)[kColumns]) {
  constexpr int kEights = !kWide ? 1 : kDType == DType::kFloat32 ? kAhead / 8 : kAhead / 4;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) dot[i] = 0.0f;
  for (int64_t j0 = 0; j0 < p.d_k; j0 += 8 * kEights) {
    Eight<kDType> k[kEights][kColumns];
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const void* key = key_of(i);
        const int64_t left = key ? p.d_k - j0 - 8 * e : 0;
        k[e][i].template load<kWide>(key, j0 + 8 * e, left);
      }
    }
    const int64_t j = j0 + lane_index();
    const bool own = lane_index() < 8 * kEights && j < p.d_k;
    const float q = own ? projected(p, ws, b, first_row + j) : 0.0f;
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float q_n = exchange_from(q, 8 * e + n);
#pragma unroll
        for (int i = 0; i < kColumns; ++i) dot[i] = fmaf(q_n, k[e][i].number(n), dot[i]);
      }
    }
  }
}

// Phase 2: a warp per split of kSplit columns appends the new position to the cache and computes
// the split's attention part. With out_attention it also stores the raw scores there, -inf for
// invisible columns.
template <DType kDType, bool kWide, int kAhead>
__device__ __forceinline__ void attend_splits(const DecodeParams& p, const Workspace& ws,
                                              Team team) {
  const int64_t splits = ceil_div(p.S, kSplit);
  for (int64_t item = team.first; item < p.B * p.H * splits; item += team.stride) {
    const int64_t bh = item / splits, s0 = item % splits * kSplit, b = bh / p.H, h = bh % p.H;
    const int64_t column = new_column(p, b);  // the last filled one, or -1
    if (s0 > column && !p.out_attention) continue;
    if (s0 <= column && column < s0 + kSplit) append(p, ws, kDType, b, h, column);
    // All filled columns are loaded. Invisible ones may contain anything, even NaN, so they are
    // skipped, not multiplied by 0.
    uint8_t valid[kColumns];
    float u[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int64_t s = s0 + i * kWarp + lane_index();
      valid[i] = s < column ? p.cache_valid[b * p.S + s] : 0;
      u[i] = s <= column ? p.cache_u[bh * p.S + s] : 0.0f;
    }
    // Not read from the cache, where head 0's warp may be writing it.
    const bool new_valid = new_is_valid(p, b);
    float dot[kColumns];
    const auto key_of = [&](int i) -> const void* {
      const int64_t s = s0 + i * kWarp + lane_index();
      return s <= column ? Numbers{p.cache_k, kDType}.from((bh * p.S + s) * p.d_k).data : nullptr;
    };
    attention_dots<kDType, kWide, kAhead>(p, ws, b, h * p.d_k, key_of, dot);
    bool visible[kColumns];
    float max = -INFINITY;
    int seen = 0;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int64_t s = s0 + i * kWarp + lane_index();
      visible[i] = s == column ? new_valid : valid[i] != 0;
      dot[i] = visible[i] ? dot[i] / sqrtf(static_cast<float>(p.d_k)) : -INFINITY;
      max = fmaxf(max, dot[i]);
      seen += visible[i];
      if (p.out_attention && s < p.S) p.out_attention[bh * p.S + s] = dot[i];
    }
    max = warp_max(max);
    float sum = 0.0f, value = 0.0f;
    // A part whose visible scores are all -inf has no mass. `seen` distinguishes it from an empty
    // part.
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (!visible[i] || dot[i] == -INFINITY) continue;
      const float e = expf(dot[i] - max);
      sum += e;
      value = fmaf(e, u[i], value);
    }
    const AttentionPart part{max, warp_sum(sum), warp_sum(value), warp_sum(seen)};
    if (lane_index() == 0) ws.attention[item] = part;
  }
}

template <DType kDType, int kAhead>
__device__ __forceinline__ void attend_in(const DecodeParams& p, const Workspace& ws, Team team) {
  if (p.d_k % 8 == 0 && sixteen_divides(p.cache_k)) {
    attend_splits<kDType, true, kAhead>(p, ws, team);
  } else {
    attend_splits<kDType, false, kAhead>(p, ws, team);
  }
}

// kAhead: loads of sixteen bytes that a lane has in flight, 8 or 16.
template <int kAhead>
__device__ __forceinline__ void attend(const DecodeParams& p, const Workspace& ws, Team team) {
  switch (p.dtype) {
    case DType::kFloat32:
      return attend_in<DType::kFloat32, kAhead>(p, ws, team);
    case DType::kBFloat16:
      return attend_in<DType::kBFloat16, kAhead>(p, ws, team);
    default:
      return attend_in<DType::kFloat16, kAhead>(p, ws, team);
  }
}

// sum_s softmax_s(score) u_s, the contributions to the gate logit, for row b's heads h0 ... h0 + 7,
// each from `splits` parts. Four lanes share a head and all get its value; beyond the last head it
// is 0. The softmax of each head is also stored in the workspace.
__device__ __forceinline__ float head_shares(const DecodeParams& p, const Workspace& ws, int64_t b,
                                             int64_t h0, int64_t splits) {
  constexpr int kAhead = 8;
  const int64_t h = h0 + lane_index() / 4, bh = b * p.H + h;
  const AttentionPart* parts = ws.attention + bh * ceil_div(p.S, kSplit);
  float max = -INFINITY, sum = 0.0f, value = 0.0f;
  int seen = 0;
  // A NaN score leaves max at -inf and makes sum NaN, which must be passed on. Only max = -inf with
  // sum = 0 is empty.
  const auto add = [&](float part_max, float part_sum, float part_value, float largest) {
    const float scale = part_max == -INFINITY ? 1.0f : expf(part_max - largest);
    sum = fmaf(part_sum, scale, sum);
    value = fmaf(part_value, scale, value);
  };
  const auto rescale = [&](float largest) {
    const float scale = max == -INFINITY ? 1.0f : expf(max - largest);
    sum *= scale, value *= scale, max = largest;
  };
  for (int64_t first = lane_index() % 4; h < p.H && first < splits; first += 4 * kAhead) {
    AttentionPart part[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      part[i] = AttentionPart{-INFINITY, 0.0f, 0.0f, 0};
      if (first + 4 * i < splits) part[i] = parts[first + 4 * i];
    }
    float largest = max;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) largest = fmaxf(largest, part[i].max);
    rescale(largest);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      seen |= part[i].seen > 0;
      add(part[i].max, part[i].sum, part[i].value, largest);
    }
  }
  float largest = fmaxf(max, exchange_xor(max, 1));
  largest = fmaxf(largest, exchange_xor(largest, 2));
  rescale(largest);
#pragma unroll
  for (int offset = 1; offset < 4; offset *= 2) {
    sum += exchange_xor(sum, offset), value += exchange_xor(value, offset);
    seen |= exchange_xor(seen, offset);
  }
  if (lane_index() % 4 == 0 && h < p.H) ws.attention_row[bh] = SoftmaxPart{largest, sum};
  if (h >= p.H || seen == 0) return 0.0f;  // no valid column: the gate's logit is b_g
  return value / sum;  // 0 / 0 = NaN if all visible scores are -inf, as in a softmax
}

// Which heads a row's mixture depends on: alpha 0 and 1 select one; with alpha NaN the result is
// NaN for any heads, so neither is needed.
struct Needs {
  bool lm, reward;
};

__device__ __forceinline__ Needs needs_of(float a) {
  return Needs{a == a && a != 1.0f, a == a && a != 0.0f};
}

// Phase 3: a warp per batch row computes its gate logit, alpha and initial status, and increments
// the cache length. `counted`: each row, and the heads that it needs, are reported to the counters.
__device__ __forceinline__ void weigh(const DecodeParams& p, const Workspace& ws, Team team,
                                      bool counted) {
  for (int64_t b = team.first; b < p.B; b += team.stride) {
    const int64_t column = p.gate_logit ? 0 : new_column(p, b);
    float gate_logit = p.gate_logit ? p.gate_logit[b] : 0.0f;
    if (!p.gate_logit && column >= 0) {
      for (int64_t h0 = 0; h0 < p.H; h0 += kWarp / 4) {
        const float share = head_shares(p, ws, b, h0, column / kSplit + 1);
#pragma unroll
        for (int h = 0; h < kWarp / 4; ++h) gate_logit += exchange_from(share, 4 * h);
      }
      gate_logit += p.gate_bias[0];
    }
    if (lane_index() != 0) continue;  // no warp exchange follows
    if (p.gate_offset) gate_logit += p.gate_offset[b];
    const bool full = column < 0;
    p.out_gate_logit[b] = full ? NAN : gate_logit;
    p.out_alpha[b] = full ? NAN : mixing_weight(p, b, gate_logit);
    p.out_status[b] = full ? kCacheFull : kOk;
    if (!p.gate_logit && !full) p.cache_length[b] = static_cast<int32_t>(column + 1);
    if (!counted) continue;
    const Needs needs = needs_of(p.out_alpha[b]);
    if (needs.lm) raise(ws.counter + kNeedLm, 1);
    if (needs.reward) raise(ws.counter + kNeedReward, 1);
    signal(ws.counter + kWeighedRows, 1);
  }
}

// Runs beside phase 4, with out_attention: turns raw scores into probabilities. Rows without
// visible columns and rows with a full cache become 0.
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
