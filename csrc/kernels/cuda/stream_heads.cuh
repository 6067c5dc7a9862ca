// SPDX-License-Identifier: Apache-2.0
// The warps that multiply, on the streaming path: both heads of a tile of units from the ring, and,
// while they are still in registers, their mixture, the logits, and each unit's softmax part and
// best token. alpha is waited for only then.
#pragma once

#include "fragments.cuh"
#include "heads.cuh"
#include "operand.cuh"
#include "ring.cuh"

namespace dualhead {
namespace cuda {

// Of group_barrier; 0 is the block's.
constexpr int kConsumerGroup = 1, kGateGroup = 2, kPrepareGroup = 3;

// In the head of shared memory, behind the ring's barriers: scales of at most kMaxBatchTile rows of
// resident hidden states; and a float per warp for prepare_batch.
__device__ __forceinline__ float* resident_scales() {
  return reinterpret_cast<float*>(shared_memory() + kHeadBytes / 2);
}

__device__ __forceinline__ float* prepare_slots() { return resident_scales() + kMaxBatchTile; }

// This lane's vocabulary entry of a unit, and what belongs to its rows.
struct Entry {
  int unit;
  int64_t v;
  bool there;
};

// The scale of a whole row: int4 has them inside its sums.
template <Format kFormat>
__device__ __forceinline__ float row_scale(const DecodeParams& p, int64_t matrix, int64_t v) {
  if constexpr (kFormat != Format::kInt8 && kFormat != Format::kFp8) return 1.0f;
  const float scale = matrix == 0 ? p.lm_scale[v] : p.reward_scale[(matrix - 1) * p.V + v];
  return scale * unpacked_unit<kFormat>();
}

// The eight lanes that hold one column of a tile, an entry each.
template <typename Combine, typename T>
__device__ __forceinline__ T column_reduce(T value, Combine combine) {
#pragma unroll
  for (int offset = 4; offset < kWarp; offset *= 2) {
    value = combine(value, exchange_xor(value, offset));
  }
  return value;
}

__device__ __forceinline__ SoftmaxPart column_part(float z) {
  const float max = column_reduce(z, [](float a, float b) { return fmaxf(a, b); });
  const float e = z == -INFINITY ? 0.0f : expf(z - max);  // as warp_softmax_part
  return SoftmaxPart{max, column_reduce(e, [](float a, float b) { return a + b; })};
}

// Stores one entry's logits of batch row b, and with the other lanes of the column the unit's
// summary. `real`: whether there is such an entry and row.
__device__ __forceinline__ void finish_entry(const Stream& s, const Entry& entry, int64_t b,
                                             bool real, float lm, float reward) {
  const DecodeParams& p = s.p;
  const Workspace& ws = s.ws;
  const int64_t at = b * p.V + entry.v, slot = b * ceil_div(p.V, kUnit) + entry.unit;
  const bool reports = lane_index() / 4 == 0 && b < p.B;  // the column's first entry
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
  const unsigned long long key =
      column_reduce(real ? score_key(p, b, entry.v, z) : 0ull,
                    [](unsigned long long x, unsigned long long y) { return x > y ? x : y; });
  if (reports) ws.part[0][slot] = part, ws.best_key[slot] = key;
}

// A tile's sums become logits; or, where more objectives follow, sums over those so far, kept in
// memory by the very lanes that read them in the next pass.
template <Format kFormat, int kTiles, int kUnits>
__device__ __forceinline__ void finish_pass(const Stream& s, int unit0, int b0, int pass,
                                            const float (&z)[kUnits][kTiles][4]) {
  const DecodeParams& p = s.p;
  const int64_t m = 2 * pass;  // and m + 1: the pass's matrices
  const bool last = pass == s.passes - 1, second = m + 1 <= p.K;
  const auto add = [&](float reward, int64_t b, int64_t k, float product) {
    return fmaf(objective_weight(p, b, k), product, reward);
  };
  // One place of code for all tiles of all units, columns two by two: the sums are picked out of
  // their registers. Unrolled, this would be most of the kernel.
#pragma unroll 1
  for (int i = 0; i < kUnits * kTiles; ++i) {
    float own[4] = {};
#pragma unroll
    for (int j = 0; j < kUnits * kTiles; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) own[c] = j == i ? z[j / kTiles][j % kTiles][c] : own[c];
    }
    Entry entry;
    entry.unit = unit0 + warp_in_block() + i / kTiles * kConsumers;
    if (entry.unit >= s.end) return;  // the whole warp
    entry.v = static_cast<int64_t>(entry.unit) * kUnit + lane_index() / 4;
    entry.there = entry.v < p.V;
    const bool pair = entry.there && second;
    const float low_bias = entry.there ? bias_of(p, p.dtype, m, entry.v) : 0.0f;
    const float high_bias = pair ? bias_of(p, p.dtype, m + 1, entry.v) : 0.0f;
    const float low_scale = entry.there ? row_scale<kFormat>(p, m, entry.v) : 1.0f;
    const float high_scale = pair ? row_scale<kFormat>(p, m + 1, entry.v) : 1.0f;
#pragma unroll 1
    for (int column = 0; column < 2; ++column) {
      const int64_t b =
          static_cast<int64_t>(b0) + 8 * (i % kTiles) + 2 * (lane_index() % 4) + column;
      const bool real = entry.there && b < p.B;
      const int64_t at = b * p.V + entry.v;
      float low = column == 0 ? own[0] : own[1], high = column == 0 ? own[2] : own[3];
      if (steps_of(kFormat) > 1) {
        const float unit = real ? s.operand_scale[b] : 1.0f;
        low = low * low_scale * unit, high = high * high_scale * unit;
      }
      low += low_bias, high += high_bias;
      float lm = low, reward = 0.0f;
      if (real && pass > 0) {
        lm = p.out_logits[at];
        reward = add(s.ws.reward_logits[at], b, m - 1, low);
      }
      if (real && second) reward = add(reward, b, m, high);
      if (last) {
        finish_entry(s, entry, b, real, lm, reward);
      } else if (real) {
        p.out_logits[at] = lm, s.ws.reward_logits[at] = reward;
      }
    }
  }
}

// Hidden states of the one batch tile that stay in shared memory, by all consumers: as they are, or
// (quantised weights) prepared, a row by a warp, with scales below the ring.
template <Format kFormat>
__device__ __forceinline__ void load_resident(const Stream& s) {
  const DecodeParams& p = s.p;
  unsigned char* to = shared_memory() + s.plan.hidden_offset;
  if constexpr (steps_of(kFormat) == 1) {
    const int pieces = s.hidden_bytes / 16;
    for (int i = threadIdx.x; i < p.B * pieces; i += kConsumers * kWarp) {
      const int b = i / pieces, at = 16 * (i % pieces);
      store_words(to + b * s.plan.hidden_pitch + at,
                  load_words(s.hidden + b * s.hidden_stride + at));
    }
  } else {
    for (int b = warp_in_block(); b < p.B; b += kConsumers) {
      const int64_t term_bytes = s.plan.batch_tile * s.plan.hidden_pitch;
      const Numbers row = Numbers{p.hidden, p.dtype}.from(b * p.hidden_stride);
      const float unit = operand_unit(warp_max(largest_of(row, p.d, lane_index(), kWarp)));
      if (lane_index() == 0) resident_scales()[b] = unit;
      write_operand(kFormat, row, p.d, unit, s.terms, to + b * s.plan.hidden_pitch, term_bytes,
                    lane_index(), kWarp);
    }
  }
  group_barrier<kConsumerGroup, kConsumers * kWarp>();
}

template <Format kFormat>
__device__ __forceinline__ LaneView lane_view(const Stream& s, const Slot& slot, int chunk) {
  const StreamPlan& plan = s.plan;
  const unsigned char* stage = stage_of(plan, slot);
  const int row = lane_index() / 4, sixteen = 16 * (lane_index() % 4);
  const unsigned char* rows = stage + (2 * kUnit * warp_in_block() + row) * plan.row_pitch;
  const unsigned char* hidden = plan.resident ? shared_memory() + plan.hidden_offset +
                                                    chunk * steps_of(kFormat) * plan.row_bytes
                                              : stage + plan.hidden_offset;
  LaneView at;
  at.low = rows + sixteen;
  at.high = at.low + kUnit * plan.row_pitch;
  at.unit_pitch = 2 * kUnit * kConsumers * plan.row_pitch;
  at.hidden = hidden + row * plan.hidden_pitch + sixteen;
  at.tile_pitch = 8 * plan.hidden_pitch;
  at.term_pitch = plan.batch_tile * plan.hidden_pitch;
  at.terms = s.terms;
  at.low_scales = rows + plan.row_bytes;
  at.high_scales = at.low_scales + kUnit * plan.row_pitch;
  return at;
}

// All of a block's stages, in the producer's order.
template <Format kFormat, int kTiles>
__device__ void consume(const Stream& s) {
  constexpr int kUnits = units_per_warp(kFormat, kTiles);
  if (s.plan.resident) load_resident<kFormat>(s);
  Slot slot;
  bool weighed = false;
  for (int b0 = 0; b0 < s.p.B; b0 += s.plan.batch_tile) {
    for (int unit0 = s.begin; unit0 < s.end; unit0 += s.tile_units) {
      for (int pass = 0; pass < s.passes; ++pass) {
        float z[kUnits][kTiles][4] = {};
        int left = s.weight_bytes;
        for (int chunk = 0; chunk < s.chunks; ++chunk) {
          mbarrier_wait(full_barrier(slot), slot.parity);
          const int bytes = left < s.plan.row_bytes ? left : s.plan.row_bytes;
          multiply_stage<kFormat>(lane_view<kFormat>(s, slot, chunk), bytes, z);
          left -= bytes;
          warp_barrier();  // every lane has read: the stage may be filled again
          if (lane_index() == 0) mbarrier_arrive(empty_barrier(slot));
          slot.advance(s.plan.stages);
        }
        if (!weighed) wait_for(s.ws.counter + kWeighedRows, static_cast<unsigned>(s.p.B));
        weighed = true;
        finish_pass<kFormat>(s, unit0, b0, pass, z);
      }
    }
  }
}

}  // namespace cuda
}  // namespace dualhead
