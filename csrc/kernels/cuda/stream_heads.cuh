// SPDX-License-Identifier: Apache-2.0
// The consumer warps of the streaming path. They multiply both heads of a tile of units from the
// ring. When a tile ends, they compute the mixture, the logits, and each unit's softmax part and
// best token. They wait for alpha only after the products.
#pragma once

#include "fragments.cuh"
#include "heads.cuh"
#include "operand.cuh"
#include "ring.cuh"

namespace dualhead {
namespace cuda {

// Barrier groups of group_barrier; 0 is the whole block.
constexpr int kConsumerGroup = 1, kGateGroup = 2, kPrepareGroup = 3, kStartGroup = 4;

// In the head of shared memory, after the ring's barriers: the scales of at most kMaxBatchTile rows
// of resident hidden states, then one float per warp for prepare_batch.
__device__ __forceinline__ float* resident_scales() {
  return reinterpret_cast<float*>(shared_memory() + kHeadBytes / 2);
}

__device__ __forceinline__ float* prepare_slots() { return resident_scales() + kMaxBatchTile; }

// This lane's vocabulary entry of a unit.
struct Entry {
  int unit;
  int64_t v;
  bool there;
};

// The scale of a whole row. int4 applies its scales inside the sums.
template <Format kFormat>
__device__ __forceinline__ float row_scale(const DecodeParams& p, int64_t matrix, int64_t v) {
  if constexpr (kFormat != Format::kInt8 && kFormat != Format::kFp8) return 1.0f;
  const float scale = matrix == 0 ? p.lm_scale[v] : p.reward_scale[(matrix - 1) * p.V + v];
  return scale * unpacked_unit<kFormat>();
}

// Reduces over the eight lanes that hold one column of a tile, one entry each. The order is that of
// unit_reduce: lanes 8, 16 and 4 apart have rows 1, 2 and 4 apart (row_of_place).
template <typename Combine, typename T>
__device__ __forceinline__ T column_reduce(T value, Combine combine) {
#pragma unroll
  for (int offset : {8, 16, 4}) value = combine(value, exchange_xor(value, offset));
  return value;
}

__device__ __forceinline__ SoftmaxPart column_part(float z) {
  const float max = column_reduce(z, [](float a, float b) { return fmaxf(a, b); });
  const float e = z == -INFINITY ? 0.0f : expf(z - max);  // as warp_softmax_part
  return SoftmaxPart{max, column_reduce(e, [](float a, float b) { return a + b; })};
}

// Stores one entry's logits for batch row b and, together with the column's other lanes, the unit's
// summary. `real`: whether the entry and the row exist.
__device__ __forceinline__ void finish_entry(const DecodeParams& p, const Workspace& ws,
                                             const Entry& entry, int64_t b, bool real, float lm,
                                             float reward) {
  const int64_t at = b * p.V + entry.v, slot = b * ceil_div(p.V, kUnit) + entry.unit;
  const bool reports = lane_index() / 4 == 0 && b < p.B;  // the lane of the column's first entry
  if (p.mix_probs) {
    const float f_lm = real ? postprocess(p, lm) : -INFINITY;
    const float f_reward = real ? postprocess(p, reward) : -INFINITY;
    if (real) p.out_logits[at] = f_lm, ws.reward_logits[at] = f_reward;
    const SoftmaxPart part_lm = column_part(f_lm), part_reward = column_part(f_reward);
    if (reports) ws.part[0][slot] = part_lm, ws.part[1][slot] = part_reward;
    return;
  }
  const float z = real ? mix_logits(p, p.out_alpha[b], lm, reward) : -INFINITY;
  if (real) p.out_logits[at] = z;
  const SoftmaxPart part = column_part(z);
  unsigned long long own = 0;
  // A greedy row avoids the call of score_key.
  if (real) own = is_sampled(p, b) ? score_key(p, b, entry.v, z) : rank_key(z, entry.v);
  const unsigned long long key =
      column_reduce(own, [](unsigned long long x, unsigned long long y) { return x > y ? x : y; });
  if (reports) ws.part[0][slot] = part, ws.best_key[slot] = key;
}

// Turns the sums of one tile of a correction into logits. low0 and low1 are the two columns of this
// lane's entry, high0 and high1 those of the entry in the second half of the vocabulary. Under an
// embedding head the two columns are z_LM and delta of one request.
template <Format kFormat>
__device__ __forceinline__ void finish_correction(const DecodeParams& p, const Workspace& ws,
                                                  const float* operand_scale, int unit, int row0,
                                                  float low0, float low1, float high0,
                                                  float high1) {
  const bool embeds = p.reward_head == RewardHead::kEmbedding;
  const int first = row0 + lane_index() % 4;  // row_of_place(2 t); the other is four further
#pragma unroll 1
  for (int side = 0; side < 2; ++side) {
    Entry entry;
    entry.unit = unit + side * half_units(p);
    if (entry.unit >= ceil_div(p.V, kUnit)) return;  // the second half may have one unit less
    entry.v = static_cast<int64_t>(entry.unit) * kUnit + row_of_place(lane_index() / 4);
    entry.there = entry.v < p.V;
    const float bias = entry.there ? bias_of(p, p.dtype, 0, entry.v) : 0.0f;
    const float scale = entry.there ? row_scale<kFormat>(p, 0, entry.v) : 1.0f;
    float sum[2] = {side == 0 ? low0 : high0, side == 0 ? low1 : high1};
    if (steps_of(kFormat) > 1) {
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const int row = first + 4 * column;
        sum[column] *= scale * (row < product_rows(p) ? operand_scale[row] : 1.0f);
      }
    }
    float delta[2] = {};
    if (!embeds) low_rank_deltas(p, ws, entry.v, row0, entry.there, delta);
    // One copy of the code for both kinds of head. With an embedding head a lane has one request,
    // whose delta is the other sum.
#pragma unroll 1
    for (int column = 0; column < (embeds ? 1 : 2); ++column) {
      const int64_t b = embeds ? row0 / 2 + lane_index() % 4 : first + 4 * column;
      const float lm = (column == 0 ? sum[0] : sum[1]) + bias;
      const float change = embeds ? sum[1] : column == 0 ? delta[0] : delta[1];
      finish_entry(p, ws, entry, b, entry.there && b < p.B, lm, lm + change);
    }
  }
}

// How a warp turns the sums of a unit into logits: the sums move through shared memory from the
// lanes of the tensor core, each with one entry of several rows, to lanes that each have several
// entries of one row. So a row's alpha is loaded once, the logits are stored side by side, and
// little is exchanged between lanes. All 32 lanes share the unit's eight entries of 8, 16 or 32
// rows; 64 rows take two turns.
template <int kTiles>
struct Turn {
  static constexpr int kTurns = kTiles > 4 ? kTiles / 4 : 1;
  static constexpr int kTurnTiles = kTiles / kTurns;
  static constexpr int kRows = 8 * kTurnTiles;
  static constexpr int kRowLanes = kWarp / kRows;  // lanes that share a row
  static constexpr int kEntries = kUnit / kRowLanes;

  static __device__ __forceinline__ int row() { return lane_index() / kRowLanes; }
  static __device__ __forceinline__ int first_entry() {
    return lane_index() % kRowLanes * kEntries;
  }
};

// Reduces over kLanes neighbouring lanes; all get the same.
template <int kLanes, typename Combine, typename T>
__device__ __forceinline__ T lane_reduce(T value, Combine combine) {
#pragma unroll
  for (int offset = 1; offset < kLanes; offset *= 2) {
    value = combine(value, exchange_xor(value, offset));
  }
  return value;
}

// Reduces over a unit's entries, `kEntries` of them in each lane. The order is the same for any
// number of entries in a lane.
template <int kEntries, typename Combine, typename T>
__device__ __forceinline__ T unit_reduce(const T (&values)[kEntries], Combine combine) {
  T own[kEntries];
#pragma unroll
  for (int i = 0; i < kEntries; ++i) own[i] = values[i];
#pragma unroll
  for (int width = 1; width < kEntries; width *= 2) {
#pragma unroll
    for (int i = 0; i < kEntries; i += 2 * width) own[i] = combine(own[i], own[i + width]);
  }
  return lane_reduce<kUnit / kEntries>(own[0], combine);
}

template <int kEntries>
__device__ __forceinline__ SoftmaxPart unit_part(const float (&z)[kEntries]) {
  const float max = unit_reduce(z, [](float a, float b) { return fmaxf(a, b); });
  // Without mass the sum is 0, or NaN if a logit is NaN, as in warp_softmax_part.
  const float least = max == -INFINITY ? 0.0f : max;
  float e[kEntries];
#pragma unroll
  for (int i = 0; i < kEntries; ++i) e[i] = expf(z[i] - least);
  return SoftmaxPart{max, unit_reduce(e, [](float a, float b) { return a + b; })};
}

// The largest key of entries v ... v + count - 1 of row b; 0 if there are none.
template <int kEntries>
__device__ __forceinline__ unsigned long long best_key(const DecodeParams& p, int64_t b, int64_t v,
                                                       int count, const float (&z)[kEntries]) {
  if (count <= 0) return 0;
  if (is_sampled(p, b)) {
    unsigned long long best = 0;
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
      const unsigned long long key = i < count ? score_key(p, b, v + i, z[i]) : 0;
      best = key > best ? key : best;
    }
    return best;
  }
  // The largest of the greedy keys, without computing each: of equal logits the first one. Entries
  // that do not exist are -inf and follow those that do.
  float largest = z[0];
  int at = 0;
#pragma unroll
  for (int i = 1; i < kEntries; ++i) {
    const bool larger = ordered_bits(z[i]) > ordered_bits(largest);
    largest = larger ? z[i] : largest, at = larger ? i : at;
  }
  return rank_key(largest, v + at);
}

// Neighbours in shared memory; four or eight are aligned to sixteen bytes.
template <int kEntries>
__device__ __forceinline__ void load_sums(const float* from, float (&sums)[kEntries]) {
  if constexpr (kEntries % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kEntries; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + i);
      sums[i] = four.x, sums[i + 1] = four.y, sums[i + 2] = four.z, sums[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kEntries; ++i) sums[i] = from[i];
  }
}

// Stores the first `count` of the neighbours.
template <int kEntries>
__device__ __forceinline__ void store_entries(float* to, const float (&z)[kEntries], int count) {
  if constexpr (kEntries % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kEntries; i += 4) {
      const int left = count - i < 4 ? count - i : 4;
      store_four(to + i, Four{{z[i], z[i + 1], z[i + 2], z[i + 3]}}, left);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
      if (i < count) to[i] = z[i];
    }
  }
}

// Not inlined: a cap takes a hyperbolic tangent per entry, which would be most of the code.
static __device__ __noinline__ float capped(const DecodeParams& p, float z) {
  return postprocess(p, z);
}

// f of the logits that exist; the others become -inf.
template <int kEntries>
__device__ __forceinline__ void postprocess_entries(const DecodeParams& p, int count,
                                                    float (&z)[kEntries]) {
  if (p.logit_softcap > 0.0f) {
#pragma unroll
    for (int i = 0; i < kEntries; ++i) z[i] = capped(p, z[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kEntries; ++i) z[i] *= p.logit_scale;
  }
#pragma unroll
  for (int i = 0; i < kEntries; ++i) z[i] = i < count ? z[i] : -INFINITY;
}

// Stores the logits of row b for `count` entries from v on and, together with the row's other
// lanes, the unit's summary.
template <int kEntries>
__device__ __forceinline__ void finish_entries(const DecodeParams& p, const Workspace& ws, int unit,
                                               int64_t v, int64_t b, int count,
                                               float (&lm)[kEntries], float (&reward)[kEntries]) {
  const int64_t at = b * p.V + v, slot = b * ceil_div(p.V, kUnit) + unit;
  const bool reports = b < p.B && v % kUnit == 0;  // the lane of the unit's first entry
  if (p.mix_probs) {
    postprocess_entries(p, count, lm);
    postprocess_entries(p, count, reward);
    store_entries(p.out_logits + at, lm, count);
    store_entries(ws.reward_logits + at, reward, count);
    const SoftmaxPart part_lm = unit_part(lm), part_reward = unit_part(reward);
    if (reports) ws.part[0][slot] = part_lm, ws.part[1][slot] = part_reward;
    return;
  }
  const float a = b < p.B ? p.out_alpha[b] : 0.0f;
  float z[kEntries];
#pragma unroll
  for (int i = 0; i < kEntries; ++i) z[i] = mixture(a, lm[i], reward[i]);
  postprocess_entries(p, count, z);
  store_entries(p.out_logits + at, z, count);
  const SoftmaxPart part = unit_part(z);
  const unsigned long long key = lane_reduce<kUnit / kEntries>(
      best_key(p, b, v, count, z),
      [](unsigned long long x, unsigned long long y) { return x > y ? x : y; });
  if (reports) ws.part[0][slot] = part, ws.best_key[slot] = key;
}

// Turns a tile's sums into logits. If more objectives follow, the sums so far are kept in memory,
// and the same lanes read them in the next pass.
template <Format kFormat, int kTiles, int kUnits>
__device__ __forceinline__ void finish_pass(const Stream<false>& s, int unit0, int b0, int pass,
                                            const float (&z)[kUnits][kTiles][4]) {
  using Own = Turn<kTiles>;
  constexpr int kEntries = Own::kEntries, kTurnTiles = Own::kTurnTiles;
  const DecodeParams& p = s.p;
  const int64_t m = 2 * pass;  // the pass's matrices are m and m + 1
  const bool last = pass == s.passes - 1, second = m + 1 <= p.K;
  float* low_sums = reinterpret_cast<float*>(shared_memory() + s.plan.sums_offset) +
                    warp_in_block() * 2 * Own::kRows * kSumsPitch;
  float* high_sums = low_sums + Own::kRows * kSumsPitch;
  // Not unrolled: one copy of the code for all turns, with the sums selected from their registers.
  // Unrolled, it would be most of the kernel.
#pragma unroll 1
  for (int i = 0; i < kUnits * Own::kTurns; ++i) {
    const int unit = unit0 + warp_in_block() + i / Own::kTurns * kConsumers;
    if (unit >= s.end) return;  // true for the whole warp
    const int first_row = b0 + i % Own::kTurns * Own::kRows;
    const int own_entry = row_of_place(lane_index() / 4);
    const int64_t own_v = static_cast<int64_t>(unit) * kUnit + own_entry;
    const bool there = own_v < p.V, pair = there && second;
    const float low_bias = there ? bias_of(p, p.dtype, m, own_v) : 0.0f;
    const float high_bias = pair ? bias_of(p, p.dtype, m + 1, own_v) : 0.0f;
    const float low_scale = there ? row_scale<kFormat>(p, m, own_v) : 1.0f;
    const float high_scale = pair ? row_scale<kFormat>(p, m + 1, own_v) : 1.0f;
#pragma unroll
    for (int t = 0; t < kTurnTiles; ++t) {
      float own[4] = {};
#pragma unroll
      for (int j = 0; j < kUnits * Own::kTurns; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          own[c] = j == i ? z[j / Own::kTurns][j % Own::kTurns * kTurnTiles + t][c] : own[c];
        }
      }
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const int row = 8 * t + row_of_place(2 * (lane_index() % 4) + column);
        float low = own[column], high = own[2 + column];
        if (steps_of(kFormat) > 1) {
          const float scale = first_row + row < p.B ? s.operand_scale[first_row + row] : 1.0f;
          low = low * low_scale * scale, high = high * high_scale * scale;
        }
        low_sums[row * kSumsPitch + own_entry] = low + low_bias;
        high_sums[row * kSumsPitch + own_entry] = high + high_bias;
      }
    }
    warp_barrier();  // the lanes below read what others have stored
    const int64_t b = first_row + Own::row(),
                  v = static_cast<int64_t>(unit) * kUnit + Own::first_entry();
    const int64_t left = b < p.B && v < p.V ? p.V - v : 0;
    const int count = static_cast<int>(left < kEntries ? left : kEntries);
    const int64_t at = b * p.V + v;
    float lm[kEntries], reward[kEntries];
    load_sums(low_sums + Own::row() * kSumsPitch + Own::first_entry(), lm);
    load_sums(high_sums + Own::row() * kSumsPitch + Own::first_entry(), reward);
    const float weight = second && count > 0 ? objective_weight(p, b, m) : 0.0f;
    if (pass == 0) {
#pragma unroll
      for (int e = 0; e < kEntries; ++e) reward[e] = second ? fmaf(weight, reward[e], 0.0f) : 0.0f;
    } else {
      const float low_weight = count > 0 ? objective_weight(p, b, m - 1) : 0.0f;
#pragma unroll
      for (int e = 0; e < kEntries; ++e) {
        if (e >= count) continue;
        const float so_far = fmaf(low_weight, lm[e], s.ws.reward_logits[at + e]);
        reward[e] = second ? fmaf(weight, reward[e], so_far) : so_far;
        lm[e] = p.out_logits[at + e];
      }
    }
    if (last) {
      finish_entries(p, s.ws, unit, v, b, count, lm, reward);
    } else {
      store_entries(p.out_logits + at, lm, count);
      store_entries(s.ws.reward_logits + at, reward, count);
    }
    warp_barrier();  // the next unit's sums take the place of these
  }
}

// The same for a correction, which has one pass.
template <Format kFormat, int kTiles, int kUnits>
__device__ __forceinline__ void finish_pass(const Stream<true>& s, int unit0, int b0, int,
                                            const float (&z)[kUnits][kTiles][4]) {
#pragma unroll 1
  for (int i = 0; i < kUnits * kTiles; ++i) {
    float own[4] = {};
#pragma unroll
    for (int j = 0; j < kUnits * kTiles; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) own[c] = j == i ? z[j / kTiles][j % kTiles][c] : own[c];
    }
    const int unit = unit0 + warp_in_block() + i / kTiles * kConsumers;
    if (unit >= s.end) return;  // true for the whole warp
    finish_correction<kFormat>(s.p, s.ws, s.operand_scale, unit, b0 + 8 * (i % kTiles), own[0],
                               own[1], own[2], own[3]);
  }
}

// Loads the hidden states of the only batch tile into shared memory, where they stay. All consumers
// do this before the grid barrier. Quantised weights: the hidden states are prepared (operand.cuh),
// and their scales stored below the ring. Otherwise they are copied unchanged. The blocks are those
// of the ring, with zeros beyond the end of a row.
template <Format kFormat, bool kCorrects>
__device__ __forceinline__ void load_resident(const Stream<kCorrects>& s) {
  const DecodeParams& p = s.p;
  unsigned char* to = shared_memory() + s.plan.hidden_offset;
  const int block_pitch = s.plan.batch_tile * kBlockBytes;
  const int blocks = s.row_blocks * steps_of(kFormat), sixteens = 8 * blocks;
  if constexpr (steps_of(kFormat) == 1) {
#pragma unroll 8
    for (int i = threadIdx.x; i < s.rows() * sixteens; i += kConsumers * kWarp) {
      const int b = i / sixteens, j = i % sixteens;
      Words words = {};
      if (16 * j < s.hidden_bytes) words = load_words(s.hidden + b * s.hidden_stride + 16 * j);
      store_words(to + j / 8 * block_pitch + swizzled(b, j % 8), words);
    }
  } else {
    prepare_resident<kConsumerGroup>(p, s.ws, kFormat, s.terms, to, block_pitch, sixteens,
                                     resident_scales(), prepare_slots());
  }
}

template <Format kFormat, bool kCorrects>
__device__ __forceinline__ LaneView lane_view(const Stream<kCorrects>& s, const Slot& slot,
                                              int chunk) {
  const StreamPlan& plan = s.plan;
  const unsigned char* stage = stage_of(plan, slot);
  const int blocks = plan.blocks * steps_of(kFormat);  // of hidden states
  LaneView at;
  at.low = stage + kUnit * kBlockBytes * warp_in_block();
  at.block_pitch = s.block_bytes();
  at.high = plan.blocks * at.block_pitch;
  at.unit_pitch = kUnit * kBlockBytes * kConsumers;
  at.hidden_pitch = plan.batch_tile * kBlockBytes;
  at.hidden = plan.resident
                  ? shared_memory() + plan.hidden_offset + chunk * blocks * at.hidden_pitch
                  : stage + plan.hidden_offset;
  at.tile_pitch = 8 * kBlockBytes;
  at.term_pitch = (plan.resident ? s.row_blocks * steps_of(kFormat) : blocks) * at.hidden_pitch;
  at.own = own_sixteen();
  return at;
}

// int4: where the scales of this lane's rows of a tile begin; null if there is no such row.
template <Format kFormat, int kUnits>
struct ScaleRows {
  template <bool kCorrects>
  __device__ __forceinline__ ScaleRows(const Stream<kCorrects>&, int, int) {}
};

template <int kUnits>
struct ScaleRows<Format::kInt4, kUnits> {
  const float* row[2][kUnits];

  template <bool kCorrects>
  __device__ __forceinline__ ScaleRows(const Stream<kCorrects>& s, int unit0, int pass) {
    const DecodeParams& p = s.p;
    const int64_t groups = p.d / kInt4Group;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int unit = unit0 + warp_in_block() + u * kConsumers;
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int64_t v =
            static_cast<int64_t>(unit + side * s.half()) * kUnit + row_of_place(lane_index() / 4);
        const int64_t m = kCorrects ? 0 : 2 * pass + side;
        const float* all = m == 0 ? p.lm_scale : p.reward_scale + (m - 1) * p.V * groups;
        const bool own = unit < s.end && v < p.V && m <= p.K;
        row[side][u] = own ? all + v * groups : nullptr;
      }
    }
  }
};

// Loaded from memory when needed: the groups of one chunk of a row have at most sixteen bytes of
// scales. The two loads of a stage are issued before the warp waits for its weights. For one
// request that takes 117 issue cycles, of 1,990 that the weights take to arrive. Bulk copies would
// spare the consumers those cycles, but cost the producer two more boxes a stage, of rows of
// sixteen bytes, and need a second path for rows whose scales are no multiple of sixteen bytes (d
// not a multiple of 512). An H200 took 61 clocks per product with these loads (int4) and 63 without
// (int8).
template <Format kFormat, int kUnits, bool kCorrects>
__device__ __forceinline__ void load_scales(const Stream<kCorrects>& s,
                                            const ScaleRows<kFormat, kUnits>& rows, int chunk,
                                            GroupScales<kFormat, kUnits>* scales) {
  if constexpr (kFormat == Format::kInt4) {
    const int per_stage = 2 * s.plan.blocks, first = chunk * per_stage;
    const int left = static_cast<int>(s.p.d / kInt4Group) - first;
    const int there = left < per_stage ? left : per_stage;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const float* row = rows.row[side][u];
        const Four four = load_four(row + (row ? first : 0), row ? there : 0);
#pragma unroll
        for (int i = 0; i < 4; ++i) (side == 0 ? scales->low : scales->high)[u][i] = four.x[i];
      }
    }
  }
}

// Products of tiles that are complete before alpha is. Each lane keeps its own, in shared memory.
template <int kTiles, int kUnits>
struct KeptProducts {
  static constexpr int kNumbers = kUnits * kTiles * 4;
  const StreamPlan& plan;

  __device__ __forceinline__ float* place(int tile) const {
    float* all = reinterpret_cast<float*>(shared_memory() + plan.kept_offset);
    return all + (warp_in_block() * plan.kept_tiles + tile) * kNumbers * kWarp + lane_index();
  }

  __device__ __forceinline__ void store(int tile, const float (&z)[kUnits][kTiles][4]) const {
    float* to = place(tile);
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) {
      to[i * kWarp] = z[i / (4 * kTiles)][i / 4 % kTiles][i % 4];
    }
  }

  __device__ __forceinline__ void load(int tile, float (&z)[kUnits][kTiles][4]) const {
    const float* from = place(tile);
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) {
      z[i / (4 * kTiles)][i / 4 % kTiles][i % 4] = from[i * kWarp];
    }
  }
};

// Whether every row has its alpha. With `wait`, waits until it has. The warp's lanes agree.
template <bool kCorrects>
__device__ __forceinline__ bool alpha_is_there(const Stream<kCorrects>& s, bool wait) {
  const unsigned* counter = s.ws.counter + kWeighedRows;
  const unsigned rows = static_cast<unsigned>(s.p.B);
  if (!wait) return has_reached(counter, rows);
  wait_for(counter, rows);
  return true;
}

// Consumes all of a block's stages, in the producer's order. If alpha is not known when a tile
// ends, its products are kept as long as there is room, and finished later.
template <Format kFormat, int kTiles, bool kCorrects>
__device__ void consume(const Stream<kCorrects>& s) {
  constexpr int kUnits = units_per_warp(kFormat, kTiles);
  const KeptProducts<kTiles, kUnits> products{s.plan};
  Slot slot;
  bool weighed = false;
  int kept = 0;
  for (int b0 = 0; b0 < s.rows(); b0 += s.plan.batch_tile) {
    for (int unit0 = s.begin; unit0 < s.end; unit0 += s.tile_units) {
      for (int pass = 0; pass < s.passes; ++pass) {
        float z[kUnits][kTiles][4] = {};
        const ScaleRows<kFormat, kUnits> scale_rows(s, unit0, pass);
        for (int chunk = 0; chunk < s.chunks; ++chunk) {
          GroupScales<kFormat, kUnits> scales;
          load_scales<kFormat, kUnits>(s, scale_rows, chunk, &scales);
          mbarrier_wait(full_barrier(slot), slot.parity);
          const LaneView at = lane_view<kFormat>(s, slot, chunk);
          const int blocks = s.blocks_of(chunk);
          multiply_stage<kFormat>(at, steps_of(kFormat) == 1 ? 1 : s.terms, blocks, scales, z);
          warp_barrier();  // every lane has read: the stage may be filled again
          if (lane_index() == 0) mbarrier_arrive(empty_barrier(slot));
          slot.advance(s.plan.stages);
        }
        if (pass < s.passes - 1) {
          finish_pass<kFormat>(s, unit0, b0, pass, z);
          continue;
        }
        if (!weighed) {
          const bool last = unit0 + s.tile_units >= s.end && b0 + s.plan.batch_tile >= s.rows();
          weighed = alpha_is_there(s, last || kept + 1 >= s.plan.kept_tiles);
        }
        if (!weighed || kept > 0) products.store(kept++, z);
        if (!weighed) continue;
        // Finishes this tile, or all kept tiles: the run of consecutive tiles that ends with this
        // one.
        int unit = unit0, first = b0;
        for (int back = 1; back < kept; ++back) {
          unit -= s.tile_units;
          if (unit >= s.begin) continue;
          unit = s.begin + (s.end - s.begin - 1) / s.tile_units * s.tile_units;
          first -= s.plan.batch_tile;
        }
        int tile = 0;
        do {
          if (kept > 0) products.load(tile, z);
          finish_pass<kFormat>(s, unit, first, pass, z);
          unit += s.tile_units;
          if (unit >= s.end) unit = s.begin, first += s.plan.batch_tile;
        } while (++tile < kept);
        kept = 0;
      }
    }
  }
}

}  // namespace cuda
}  // namespace dualhead
