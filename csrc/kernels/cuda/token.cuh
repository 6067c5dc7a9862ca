// SPDX-License-Identifier: Apache-2.0
// Chooses a token from one row of logits with one block: the token with the largest score
// (heads.cuh) or, if the filters remove that, the winner of the race among the tokens that they
// keep.
#pragma once

#include "filters.cuh"
#include "heads.cuh"
#include "primitives.cuh"
#include "workspace.h"

namespace dualhead {
namespace cuda {

// The winner of the exponential race among tokens that rank above `key`; the whole block calls.
__device__ __forceinline__ int64_t race_above(const DecodeParams& p, int64_t b, const Row& row,
                                              unsigned long long key) {
  const uint64_t seed = p.seeds[b], draw = p.draws[b];
  unsigned long long best = 0;
  // Four adjacent tokens at a time: they share one block of random words.
  for (int64_t v0 = 4 * static_cast<int64_t>(threadIdx.x); v0 < p.V; v0 += 4 * blockDim.x) {
    const Philox4 words = philox(seed, draw, static_cast<uint32_t>(v0 / 4));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t v = v0 + i;
      if (v >= p.V) break;
      const float x = row.scaled(v);
      if (rank_key(x, v) <= key) continue;
      const unsigned long long raced = rank_key(x + gumbel_from_word(words.word[i]), v);
      best = raced > best ? raced : best;
    }
  }
  return index_of_rank_key(block_reduce(best, &row.scratch->block, CombineMax()));
}

// Last phase: token, log-probability, status and draw counter of each batch row, one block per row.
__device__ __forceinline__ void pick_tokens(const DecodeParams& p, const Workspace& ws) {
  TokenScratch* scratch = reinterpret_cast<TokenScratch*>(shared_memory());
  // mix_distributions writes parts of kChunk entries on every path.
  const int64_t parts = ceil_div(p.V, p.mix_probs ? kChunk : ws.part_entries);
  for (int64_t b = blockIdx.x; b < p.B; b += gridDim.x) {
    const RowSummary whole =
        merge_row(ws.part[0] + b * parts, ws.best_key + b * parts, parts, &scratch->block);
    const float a = p.out_alpha[b], normalizer = log_sum_exp(whole.softmax);
    const bool full = p.out_status[b] == kCacheFull;
    const bool failed = a != a || !(fabsf(normalizer) < INFINITY);
    int64_t token = failed ? 0 : index_of_rank_key(whole.best_key);
    if (!failed && is_sampled(p, b)) {
      const Row row(p, b, whole.softmax.max, scratch);
      token = first_kept(row, Filters(p, b, row.max), token,
                         [&](unsigned long long key) { return race_above(p, b, row, key); });
    }
    block_barrier();  // every thread has read the row's status and draw counter
    if (threadIdx.x != 0) continue;
    p.out_token[b] = token;
    p.out_logprob[b] = failed ? NAN : p.out_logits[b * p.V + token] - normalizer;
    if (!full) p.out_status[b] = failed ? kNonFinite : kOk;
    if (!full && p.seeds) p.draws[b] += 1;
  }
}

// All phases that follow the products, on every path. Not inlined: one copy serves the kernels of
// all formats, and they need no registers for it.
static __device__ __noinline__ void finish_step(const DecodeParams& p, const Workspace& ws) {
  if (p.mix_probs) {
    normalizers(p, ws);
    grid_barrier();  // both log-sum-exps are complete, and their parts may be overwritten
    mix_distributions(p, ws);
    grid_barrier();  // log-probabilities and their parts are complete
  }
  pick_tokens(p, ws);
}

}  // namespace cuda
}  // namespace dualhead
