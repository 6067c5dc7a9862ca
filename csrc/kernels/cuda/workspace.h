// SPDX-License-Identifier: Apache-2.0
// Scratch memory of one launch of the decode step, and the sizes into which its work is cut. These
// are constants of each path (stream_plan.h), independent of the grid and the batch, so that a
// row's bits depend on neither.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../params.h"
#include "../sampling.h"
#include "stream_plan.h"

namespace dualhead {
namespace cuda {

constexpr int kTile = 8;     // batch rows that share one pass over a weight row
constexpr int kChunk = 32;   // vocabulary entries that share one softmax part: one per lane
constexpr int kMergers = 8;  // warps' worth of lanes that merge the parts of a row
constexpr int kSlice = 512;  // inputs that share one partial sum of a projection
constexpr int kSplit = 128;  // cache columns that share one attention part: four per lane

// Attention over one split of the cache: softmax numerators relative to the split's own maximum.
struct alignas(16) AttentionPart {
  float max;     // over visible columns; -inf if none
  float sum;     // sum of exp(score - max)
  float value;   // sum of exp(score - max) u
  int32_t seen;  // number of visible columns
};

// The counters of the streaming path, each in a cache line of its own.
enum Counter {
  kGateBlocks = 0,
  kWeighedRows = 32,
  kNeedLm = 64,
  kNeedReward = 96,
  kCounters = 128
};

// Rows of D h of a correction. Given products include the correction.
DUALHEAD_HD int64_t inner_rows(const DecodeParams& p) { return p.lm_product ? 0 : p.K * p.r; }

// Projection rows of one position in the dtype of hidden states: q, k, and last D h.
DUALHEAD_HD int64_t key_rows(const DecodeParams& p) { return 2 * p.H * p.d_k + inner_rows(p); }
DUALHEAD_HD int64_t inner_row(const DecodeParams& p) { return 2 * p.H * p.d_k; }
// All projection rows: those and, after them, u in fp32.
DUALHEAD_HD int64_t projection_rows(const DecodeParams& p) { return key_rows(p) + p.H; }

// Uninitialised at launch. Each field is written in one phase and read after a grid barrier, or
// after waiting for a counter.
struct Workspace {
  int64_t part_entries;          // vocabulary entries per part: kChunk or kUnit
  float* projection;             // (slices of d, B, projection_rows): partial sums
  AttentionPart* attention;      // (B, H, splits)
  SoftmaxPart* attention_row;    // (B, H): softmax over the whole row
  SoftmaxPart* part[2];          // (B, parts): of the mixture; mix_probs: of the LM and reward head
  unsigned long long* best_key;  // (B, parts): largest score_key of the part
  float* reward_logits;          // (B, V): f(z_RM) if mix_probs; else partial sums over objectives
  float* normalizer[2];          // (B,): log-sum-exp of f(z_LM), f(z_RM), mix_probs only
  unsigned* counter;             // (kCounters,), streaming path only
  uint16_t* operand;             // (terms, B, operand_inputs): hidden states for quantised weights
  float* operand_scale;          // (B,): factors of their sums; both for product_rows() rows
  void* rows;     // (product_rows, d), streaming path: h and M h + c of an embedding head
  float* change;  // (B, d), plain path: M h + c
  float* inner;   // (B, K r): w_k D_k h of a low-rank head
};

// Places the fields from `base` on; if base is null, only counts. Returns the total number of
// bytes.
inline size_t lay_out_workspace(const DecodeParams& p, void* base, Workspace* workspace) {
  size_t used = 0;
  const auto take = [&](auto*& field, int64_t count) {
    using T = std::remove_reference_t<decltype(*field)>;
    field =
        count && base ? reinterpret_cast<T*>(static_cast<unsigned char*>(base) + used) : nullptr;
    used += (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
  };
  const bool stream = streams(p), prepared = stream && p.quantization != Quantization::kNone;
  workspace->part_entries = stream ? kUnit : kChunk;
  const int64_t chunks = ceil_div(p.V, workspace->part_entries), splits = ceil_div(p.S, kSplit);
  const int64_t probs = p.mix_probs ? 1 : 0, sums = p.mix_probs || (stream && p.K > 1) ? 1 : 0;
  take(workspace->projection, ceil_div(p.d, kSlice) * p.B * projection_rows(p));
  take(workspace->attention, p.B * p.H * splits);
  take(workspace->attention_row, p.B * p.H);
  take(workspace->part[0], p.B * chunks);
  take(workspace->part[1], p.B * chunks * probs);
  take(workspace->best_key, p.B * chunks);
  take(workspace->reward_logits, p.B * p.V * sums);
  take(workspace->normalizer[0], p.B * probs);
  take(workspace->normalizer[1], p.B * probs);
  take(workspace->counter, stream ? kCounters : 0);
  take(workspace->operand, prepared ? operand_terms(p) * product_rows(p) * operand_inputs(p) : 0);
  take(workspace->operand_scale, prepared ? product_rows(p) : 0);
  const bool embeds = p.reward_head == RewardHead::kEmbedding;
  unsigned char* rows = nullptr;
  take(rows, embeds && stream ? product_rows(p) * p.d * (p.dtype == DType::kFloat32 ? 4 : 2) : 0);
  workspace->rows = rows;
  take(workspace->change, embeds && !stream && !p.lm_product ? p.B * p.d : 0);
  take(workspace->inner, p.reward_head == RewardHead::kLowRank ? p.B * inner_rows(p) : 0);
  return used;
}

}  // namespace cuda
}  // namespace dualhead
