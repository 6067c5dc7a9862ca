// SPDX-License-Identifier: Apache-2.0
// Scratch memory of one launch of the decode step, and the sizes into which its work is cut. The
// cuts are constants, not functions of the grid or the batch: a row's bits depend on neither.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../params.h"
#include "../sampling.h"

namespace dualhead {
namespace cuda {

constexpr int kTile = 8;     // batch rows that share one pass over a weight row
constexpr int kChunk = 32;   // vocabulary rows that share one softmax part: one per lane
constexpr int kSplit = 128;  // cache columns that share one attention part: four per lane

DUALHEAD_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Attention over one split of the cache: softmax numerators relative to the split's own maximum.
struct AttentionPart {
  float max;     // over visible columns; -inf if none
  float sum;     // sum of exp(score - max)
  float value;   // sum of exp(score - max) u
  int32_t seen;  // number of visible columns
};

// Uninitialised at launch; each field is written in one phase and read after a grid barrier.
struct Workspace {
  float* q;                     // (B, g)
  AttentionPart* attention;     // (B, H, splits)
  SoftmaxPart* attention_row;   // (B, H): softmax over the whole row
  SoftmaxPart* part[2];         // (B, chunks): of the mixture, or of LM and reward head (mix_probs)
  unsigned long long* top_key;  // (B, chunks): largest rank_key of the chunk
  float* reward_logits;         // (B, V): f(z_RM), mix_probs only
  float* normalizer[2];         // (B,): log-sum-exp of f(z_LM), f(z_RM), mix_probs only
};

// Lays the fields out from `base` on; with base null, only counts. Returns the bytes in all.
inline size_t lay_out_workspace(const DecodeParams& p, void* base, Workspace* workspace) {
  size_t used = 0;
  const auto take = [&](auto*& field, int64_t count) {
    using T = std::remove_reference_t<decltype(*field)>;
    field =
        count && base ? reinterpret_cast<T*>(static_cast<unsigned char*>(base) + used) : nullptr;
    used += (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
  };
  const int64_t chunks = ceil_div(p.V, kChunk), splits = ceil_div(p.S, kSplit);
  const int64_t probs = p.mix_probs ? 1 : 0;
  take(workspace->q, p.B * p.H * p.d_k);
  take(workspace->attention, p.B * p.H * splits);
  take(workspace->attention_row, p.B * p.H);
  take(workspace->part[0], p.B * chunks);
  take(workspace->part[1], p.B * chunks * probs);
  take(workspace->top_key, p.B * chunks);
  take(workspace->reward_logits, p.B * p.V * probs);
  take(workspace->normalizer[0], p.B * probs);
  take(workspace->normalizer[1], p.B * probs);
  return used;
}

}  // namespace cuda
}  // namespace dualhead
