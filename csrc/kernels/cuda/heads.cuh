// SPDX-License-Identifier: Apache-2.0
// Both heads of the decode step and their mixture on the plain path: logits, and per chunk of
// vocabulary rows a softmax part and the best token. Each function is one phase of the launch. The
// streaming path shares the phases that follow the products.
#pragma once

#include "../head_math.h"
#include "../weight_format.h"
#include "correction.cuh"
#include "gate.cuh"
#include "primitives.cuh"
#include "workspace.h"

namespace dualhead {
namespace cuda {

// z_LM and z_RM of one chunk and batch tile, in shared memory.
struct ChunkLogits {
  float lm[kTile][kChunk];
  float reward[kTile][kChunk];
};

__device__ __forceinline__ float postprocess(const DecodeParams& p, float z) {
  return dualhead::postprocess(p.logit_scale, p.logit_softcap, z);
}

// (1 - a) z_LM + a z_RM. a = 0 and a = 1 select one head, so the values of the other do not matter.
__device__ __forceinline__ float mixture(float a, float lm, float reward) {
  return a == 0.0f ? lm : a == 1.0f ? reward : fmaf(a, reward, (1.0f - a) * lm);
}

// f of it.
__device__ __forceinline__ float mix_logits(const DecodeParams& p, float a, float lm,
                                            float reward) {
  return postprocess(p, mixture(a, lm, reward));
}

// log((1 - a) exp(lm) + a exp(reward)) of log-probabilities; a = 0 and a = 1 select one.
__device__ __forceinline__ float mix_log_probabilities(float a, float lm, float reward) {
  if (a == 0.0f) return lm;
  if (a == 1.0f) return reward;
  const float x = log1pf(-a) + lm, y = logf(a) + reward;
  const float max = x > y ? x : y, min = x > y ? y : x;
  return max == -INFINITY ? max : max + log1pf(expf(min - max));  // both -inf: no mass, not NaN
}

// The softmax part of a warp's 32 logits, one per lane. A NaN among them makes the sum NaN.
__device__ __forceinline__ SoftmaxPart warp_softmax_part(float z) {
  const float max = warp_max(z);
  // exp(-inf - (-inf)) would be NaN. A chunk without mass has sum 0, or NaN if a logit is NaN.
  const float e = z == -INFINITY ? 0.0f : expf(z - max);
  return SoftmaxPart{max, warp_sum(e)};
}

__device__ __forceinline__ bool is_sampled(const DecodeParams& p, int64_t b) {
  return p.seeds && (!p.temperature || p.temperature[b] > 0.0f);
}

__device__ __forceinline__ float temperature_of(const DecodeParams& p, int64_t b) {
  return p.temperature ? p.temperature[b] : 1.0f;
}

// The key of entry v of row b: the logit for a greedy row, the logit at its temperature plus noise
// for a sampled one. The largest key selects the row's token before filtering. Not inlined: the
// noise takes about a hundred instructions, which would bloat the loops over the weights.
static __device__ __noinline__ unsigned long long score_key(const DecodeParams& p, int64_t b,
                                                            int64_t v, float z) {
  if (!is_sampled(p, b)) return rank_key(z, v);
  const uint32_t word = random_word(p.seeds[b], p.draws[b], v);
  return rank_key(z / temperature_of(p, b) + gumbel_from_word(word), v);
}

// Stores what the token phase needs of 32 mixed logits of row b. z is that of vocabulary entry v.
__device__ __forceinline__ void summarize_chunk(const DecodeParams& p, const Workspace& ws,
                                                int64_t b, int64_t chunk, int64_t v, float z) {
  const int64_t slot = b * ceil_div(p.V, kChunk) + chunk;
  const SoftmaxPart part = warp_softmax_part(z);
  const unsigned long long key = warp_max(v < p.V ? score_key(p, b, v, z) : 0ull);
  if (lane_index() == 0) ws.part[0][slot] = part, ws.best_key[slot] = key;
}

// The values of one row of a matrix (0: LM head; m: objective m - 1) in any storage format. int4's
// group scales are applied to each value; the scale of a whole row is left to be applied to the
// sum.
struct HeadRow {
  const unsigned char* row;
  const float* scales;
  float scale;
  DType dtype;
  Quantization quantization;

  __device__ __forceinline__ HeadRow(const DecodeParams& p, int64_t m, int64_t v, DType dtype,
                                     Quantization quantization)
      : scales(nullptr), scale(1.0f), dtype(dtype), quantization(quantization) {
    const int64_t bytes = quantization != Quantization::kNone ? 1
                          : dtype == DType::kFloat32          ? 4
                                                              : 2;
    const void* matrix = m == 0 ? p.lm_weight : p.reward_weight;
    const int64_t at = m == 0 ? v * p.lm_weight_stride
                              : (m - 1) * p.reward_weight_stride_k + v * p.reward_weight_stride;
    row = static_cast<const unsigned char*>(matrix) + at * bytes;
    const float* all = m == 0 ? p.lm_scale : p.reward_scale;
    const int64_t i = m == 0 ? v : (m - 1) * p.V + v;
    if (quantization == Quantization::kInt4) {
      scales = all + i * (p.d / kInt4Group);
    } else if (quantization != Quantization::kNone) {
      scale = all[i];
    }
  }

  __device__ __forceinline__ float operator()(int64_t k) const {
    constexpr int64_t kHalf = kInt4Group / 2;
    const int64_t group = k / kInt4Group, i = k % kInt4Group;
    int pair;
    switch (quantization) {
      case Quantization::kInt8:
        return static_cast<float>(reinterpret_cast<const int8_t*>(row)[k]);
      case Quantization::kFp8:
        return to_float(Fp8{row[k]});
      case Quantization::kInt4:
        pair = row[group * kHalf + i % kHalf];
        return scales[group] * static_cast<float>((i < kHalf ? pair & 15 : pair >> 4) - 8);
      default:
        return Numbers{row, dtype}(k);
    }
  }

  // Like Numbers::four. kFours is only for weights that are not quantised.
  template <bool kFours>
  __device__ __forceinline__ Four four(int64_t k, int64_t left) const {
    if constexpr (kFours) return Numbers{row, dtype}.template four<true>(k, left);
    Four out = {};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j < left) out.x[j] = (*this)(k + j);
    }
    return out;
  }
};

// The bias of row v of matrix m (0: LM head; m: objective m - 1).
__device__ __forceinline__ float bias_of(const DecodeParams& p, DType dtype, int64_t m, int64_t v) {
  const Numbers bias{m == 0 ? p.lm_bias : p.reward_bias, dtype};
  return bias.data ? bias(m == 0 ? v : (m - 1) * p.V + v) : 0.0f;
}

// z_LM and z_RM of vocabulary rows v0 ... v0 + 31 for `count` batch rows from b0 on, one warp per
// vocabulary row. z_RM = sum_k w_k (W_RM,k h + b_k), objectives in order. A head that none of these
// rows needs is not read. For a correction, only z_LM.
template <bool kFours, bool kCorrects>
__device__ __forceinline__ void chunk_products(const DecodeParams& p, int64_t v0, int64_t b0,
                                               int count, Needs needs, DType dtype,
                                               Quantization quantization, ChunkLogits* out) {
  const Numbers hidden = Numbers{p.hidden, dtype}.from(b0 * p.hidden_stride);
  for (int j = warp_in_block(); j < kChunk && v0 + j < p.V; j += warps_per_block()) {
    const int64_t v = v0 + j;
    float lm = 0.0f, reward = 0.0f;
    for (int64_t m = 0; m <= (kCorrects ? 0 : p.K); ++m) {
      if (!(m == 0 ? needs.lm : needs.reward)) continue;
      const HeadRow row(p, m, v, dtype, quantization);
      float dots[kTile];
      dot_tile<kFours>(row, hidden, p.hidden_stride, p.d, count, dots);
      if (lane_index() >= count) continue;  // objective weights exist only for rows of the batch
      const float z = pick_own(dots) * row.scale + bias_of(p, dtype, m, v);
      if (m == 0) {
        lm = z;
        continue;
      }
      reward = fmaf(objective_weight(p, b0 + lane_index(), m - 1), z, reward);
    }
    if (lane_index() < count) {
      out->lm[lane_index()][j] = lm;
      out->reward[lane_index()][j] = reward;
    }
  }
}

// For a correction, z_RM of the same rows: z_LM, written before by the same lanes, plus delta.
template <bool kFours>
__device__ __forceinline__ void chunk_corrections(const DecodeParams& p, const Workspace& ws,
                                                  int64_t v0, int64_t b0, int count, DType dtype,
                                                  Quantization quantization, ChunkLogits* out) {
  const bool embeds = p.reward_head == RewardHead::kEmbedding;
  const Numbers change = Numbers{ws.change, DType::kFloat32}.from(b0 * p.d);
  for (int j = warp_in_block(); j < kChunk && v0 + j < p.V; j += warps_per_block()) {
    const HeadRow row(p, 0, v0 + j, dtype, quantization);
    float delta = 0.0f;
    if (embeds) {
      float dots[kTile];
      dot_tile<kFours>(row, change, p.d, p.d, count, dots);
      delta = pick_own(dots) * row.scale;
    }
    for (int t = 0; t < count && !embeds; ++t) {
      const float found = low_rank_delta(p, ws, dtype, v0 + j, b0 + t);
      if (lane_index() == t) delta = found;
    }
    const int t = lane_index();
    if (t < count) out->reward[t][j] = out->lm[t][j] + delta;
  }
}

// Finishes 32 entries' logits of row b, one per lane: stores the mixed logits and their summary, or
// (mix_probs) f of both heads' logits and the softmax part of each.
__device__ __forceinline__ void finish_chunk(const DecodeParams& p, const Workspace& ws, int64_t b,
                                             int64_t chunk, int64_t v, float lm, float reward) {
  const int64_t at = b * p.V + v;
  if (!p.mix_probs) {
    const float mixed = v < p.V ? mix_logits(p, p.out_alpha[b], lm, reward) : -INFINITY;
    if (v < p.V) p.out_logits[at] = mixed;
    summarize_chunk(p, ws, b, chunk, v, mixed);
    return;
  }
  const float f_lm = v < p.V ? postprocess(p, lm) : -INFINITY;
  const float f_reward = v < p.V ? postprocess(p, reward) : -INFINITY;
  if (v < p.V) p.out_logits[at] = f_lm, ws.reward_logits[at] = f_reward;
  const SoftmaxPart part_lm = warp_softmax_part(f_lm), part_reward = warp_softmax_part(f_reward);
  const int64_t slot = b * ceil_div(p.V, kChunk) + chunk;
  if (lane_index() == 0) ws.part[0][slot] = part_lm, ws.part[1][slot] = part_reward;
}

// Phase 4: both products and their mixture. One block per chunk and batch tile.
template <bool kFours, bool kCorrects>
__device__ __forceinline__ void heads(const DecodeParams& p, const Workspace& ws, DType dtype,
                                      Quantization quantization) {
  ChunkLogits* z = reinterpret_cast<ChunkLogits*>(shared_memory());
  const int64_t chunks = ceil_div(p.V, kChunk), tiles = ceil_div(p.B, kTile);
  for (int64_t item = blockIdx.x; item < chunks * tiles; item += gridDim.x) {
    const int64_t chunk = item / tiles, v0 = chunk * kChunk, b0 = item % tiles * kTile;
    const int count = static_cast<int>(p.B - b0 < kTile ? p.B - b0 : kTile);
    Needs needs{false, false};
    for (int t = 0; t < count; ++t) {
      const Needs own = needs_of(p.out_alpha[b0 + t]);
      needs.lm |= own.lm, needs.reward |= own.reward;
    }
    needs.lm |= kCorrects && needs.reward;
    chunk_products<kFours, kCorrects>(p, v0, b0, count, needs, dtype, quantization, z);
    if (kCorrects && needs.reward) {
      chunk_corrections<kFours>(p, ws, v0, b0, count, dtype, quantization, z);
    }
    block_barrier();  // the warps below read what other warps have computed
    const int64_t v = v0 + lane_index();
    for (int t = warp_in_block(); t < count; t += warps_per_block()) {
      const int64_t b = b0 + t;
      const float lm = v < p.V ? z->lm[t][lane_index()] : -INFINITY;
      const float reward = v < p.V ? z->reward[t][lane_index()] : -INFINITY;
      finish_chunk(p, ws, b, chunk, v, lm, reward);
    }
    block_barrier();  // the next chunk overwrites z
  }
}

// Phase 4 if the products are given: z_LM and z_RM = sum_k w_k (product + b_k), objectives in
// order, and their mixture. For a correction the sum is added to z_LM, and an embedding head's
// product includes its bias. One warp per chunk and batch row.
__device__ __forceinline__ void finish_products(const DecodeParams& p, const Workspace& ws,
                                                DType dtype) {
  const int64_t chunks = ceil_div(p.V, kChunk);
  for (int64_t item = warp_in_grid(); item < p.B * chunks; item += warps_in_grid()) {
    const int64_t b = item / chunks, chunk = item % chunks, v = chunk * kChunk + lane_index();
    float lm = 0.0f, reward = 0.0f;
    for (int64_t m = 0; m <= p.K && v < p.V; ++m) {
      const float* product = m == 0 ? p.lm_product : p.reward_product + (m - 1) * p.B * p.V;
      const bool biased = m == 0 || p.reward_head != RewardHead::kEmbedding;
      const float z = product[b * p.V + v] + (biased ? bias_of(p, dtype, m, v) : 0.0f);
      if (m == 0) {
        lm = z;
      } else {
        reward = fmaf(objective_weight(p, b, m - 1), z, reward);
      }
    }
    finish_chunk(p, ws, b, chunk, v, lm, corrects(p) ? lm + reward : reward);
  }
}

// Shared memory of the block-wide reductions.
struct BlockScratch {
  unsigned long long slot[kWarp];  // one per warp
  SoftmaxPart part[kMergers];
};

// The softmax part and the largest key of a whole row.
struct RowSummary {
  SoftmaxPart softmax;
  unsigned long long best_key;
};

// Merges a row's `count` parts. The whole block calls, and every thread gets the same bits. keys:
// one per part, or null. Part i goes to lane i % 32 of merger i / 32 % kMergers, no matter which
// warp runs that merger. A lane loads kAhead parts of eight bytes at once: two rounds for the 4000
// parts of the streaming path at V = 32000.
__device__ __forceinline__ RowSummary merge_row(const SoftmaxPart* parts,
                                                const unsigned long long* keys, int64_t count,
                                                BlockScratch* scratch) {
  constexpr int kAhead = 8, kStep = kMergers * kWarp;
  for (int merger = warp_in_block(); merger < kMergers; merger += warps_per_block()) {
    SoftmaxPart whole = empty_part();
    unsigned long long best = 0;
    for (int64_t first = merger * kWarp + lane_index(); first < count; first += kAhead * kStep) {
      SoftmaxPart part[kAhead];
      unsigned long long key[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int64_t at = first + i * kStep;
        part[i] = at < count ? parts[at] : empty_part();
        key[i] = keys && at < count ? keys[at] : 0ull;
      }
      // Like merge_parts, but only the additions depend on each other.
      float max = whole.max;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) max = part[i].max > max ? part[i].max : max;
      float sum = whole.sum * (whole.max == -INFINITY ? 1.0f : expf(whole.max - max));
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const float scale = part[i].max == -INFINITY ? 1.0f : expf(part[i].max - max);
        sum = fmaf(part[i].sum, scale, sum);
        best = key[i] > best ? key[i] : best;
      }
      whole = SoftmaxPart{max, sum};
    }
    whole = warp_merge(whole);
    best = warp_max(best);
    if (lane_index() == 0) scratch->part[merger] = whole, scratch->slot[merger] = best;
  }
  block_barrier();  // all mergers are done
  RowSummary row{scratch->part[0], scratch->slot[0]};
  // A loop: code that runs once costs more to fetch from memory than to execute.
#pragma unroll 1
  for (int merger = 1; merger < kMergers; ++merger) {
    const unsigned long long key = scratch->slot[merger];
    row.softmax = merge_parts(row.softmax, scratch->part[merger]);
    row.best_key = key > row.best_key ? key : row.best_key;
  }
  block_barrier();  // every thread has read; the next call may write
  return row;
}

// Phase 5, mix_probs only: the log-sum-exp of each head's row, one block each.
__device__ __forceinline__ void normalizers(const DecodeParams& p, const Workspace& ws) {
  BlockScratch* scratch = reinterpret_cast<BlockScratch*>(shared_memory());
  const int64_t parts = ceil_div(p.V, ws.part_entries);
  for (int64_t item = blockIdx.x; item < 2 * p.B; item += gridDim.x) {
    const int64_t head = item / p.B, b = item % p.B;
    const RowSummary row = merge_row(ws.part[head] + b * parts, nullptr, parts, scratch);
    const float normalizer = log_sum_exp(row.softmax);
    if (threadIdx.x == 0) ws.normalizer[head][b] = normalizer;
  }
}

// Phase 6, mix_probs only: replaces f(z_LM) by the log-probabilities of the mixture and stores
// their summary. One warp per chunk and batch row.
__device__ __forceinline__ void mix_distributions(const DecodeParams& p, const Workspace& ws) {
  const int64_t chunks = ceil_div(p.V, kChunk);
  for (int64_t item = warp_in_grid(); item < p.B * chunks; item += warps_in_grid()) {
    const int64_t b = item / chunks, chunk = item % chunks, v = chunk * kChunk + lane_index();
    float z = -INFINITY;
    if (v < p.V) {
      const float lm = p.out_logits[b * p.V + v] - ws.normalizer[0][b];
      const float reward = ws.reward_logits[b * p.V + v] - ws.normalizer[1][b];
      z = mix_log_probabilities(p.out_alpha[b], lm, reward);
      p.out_logits[b * p.V + v] = z;
    }
    summarize_chunk(p, ws, b, chunk, v, z);
  }
}

}  // namespace cuda
}  // namespace dualhead
