// SPDX-License-Identifier: Apache-2.0
// The choice of a token from one row of logits, by a block: greedy, or the exponential race over
// what the filters leave. All of it is independent of the number of threads: keys are unique
// integers, and masses are integers too, so that no order of addition shows.
#pragma once

#include "heads.cuh"
#include "primitives.cuh"
#include "workspace.h"

namespace dualhead {
namespace cuda {

// One value per thread to one value for all. `Combine` folds a warp's values.
template <typename Combine>
__device__ __forceinline__ unsigned long long block_reduce(unsigned long long value,
                                                           BlockScratch* scratch, Combine combine) {
  value = combine(value);
  if (lane_index() == 0) scratch->slot[warp_in_block()] = value;
  block_barrier();  // every warp's slot is written
  value = combine(lane_index() < warps_per_block() ? scratch->slot[lane_index()] : 0ull);
  block_barrier();  // every warp has read; the next call may write
  return value;
}

struct CombineSum {
  __device__ unsigned long long operator()(unsigned long long x) const { return warp_sum(x); }
};

struct CombineMax {
  __device__ unsigned long long operator()(unsigned long long x) const { return warp_max(x); }
};

// One row of logits under temperature, and the part of it that a threshold on rank keys leaves.
struct Row {
  const float* logits;  // (V,)
  int64_t V;
  float temperature;
  float max;         // of logits / temperature
  float mass_scale;  // 1.0f of probability numerator in fixed point
  BlockScratch* scratch;

  __device__ float scaled(int64_t v) const { return logits[v] / temperature; }

  // exp(x - max) in fixed point.
  __device__ unsigned long long mass(float x) const {
    return static_cast<unsigned long long>(expf(x - max) * mass_scale);
  }

  // Number, or mass, of the tokens whose key is at least `key`; the whole block calls.
  __device__ unsigned long long count_from(unsigned long long key) const {
    unsigned long long count = 0;
    for (int64_t v = threadIdx.x; v < V; v += blockDim.x) count += rank_key(scaled(v), v) >= key;
    return block_reduce(count, scratch, CombineSum());
  }

  __device__ unsigned long long mass_from(unsigned long long key) const {
    unsigned long long sum = 0;
    for (int64_t v = threadIdx.x; v < V; v += blockDim.x) {
      const float x = scaled(v);
      if (rank_key(x, v) >= key) sum += mass(x);
    }
    return block_reduce(sum, scratch, CombineSum());
  }
};

// Bisection: the largest key with holds(key), which is true at `low` and false at `high`.
template <typename Holds>
__device__ __forceinline__ unsigned long long largest_key(unsigned long long low,
                                                          unsigned long long high, Holds holds) {
  while (high - low > 1) {
    const unsigned long long middle = low + (high - low) / 2;
    (holds(middle) ? low : high) = middle;
  }
  return low;
}

// Lowest rank key that top-k, then top-p on what it leaves, keep. `top`: the row's largest key.
__device__ __forceinline__ unsigned long long filter_threshold(const DecodeParams& p, int64_t b,
                                                               const Row& row,
                                                               unsigned long long top) {
  unsigned long long threshold = 0;
  if (p.top_k && p.top_k[b] > 0 && p.top_k[b] < p.V) {
    const unsigned long long k = p.top_k[b];
    threshold = largest_key(threshold, top + 1,
                            [&](unsigned long long key) { return row.count_from(key) >= k; });
  }
  if (p.top_p && !(p.top_p[b] >= 1.0f)) {
    if (!(p.top_p[b] > 0.0f)) return top;
    // A token stays while the mass ranked above it is below the target, so the last one to stay is
    // the first at which the mass, its own included, reaches the target.
    const double target = static_cast<double>(p.top_p[b]) * row.mass_from(threshold);
    threshold = largest_key(threshold, top + 1, [&](unsigned long long key) {
      return static_cast<double>(row.mass_from(key)) >= target;
    });
  }
  return threshold;
}

// Sampled token of row b; the whole block calls.
__device__ __forceinline__ int64_t sample(const DecodeParams& p, int64_t b, BlockScratch* scratch) {
  const float temperature = p.temperature ? p.temperature[b] : 1.0f;
  Row row{p.out_logits + b * p.V, p.V, temperature, 0.0f, 0.0f, scratch};
  // Ranked anew under temperature: the division may round two logits to one value.
  unsigned long long top = 0;
  for (int64_t v = threadIdx.x; v < p.V; v += blockDim.x) {
    const unsigned long long key = rank_key(row.scaled(v), v);
    top = key > top ? key : top;
  }
  top = block_reduce(top, scratch, CombineMax());
  row.max = row.scaled(index_of_rank_key(top));
  row.mass_scale = 4611686018427387904.0f;                      // 2^62 / V or less: the sum
  for (int64_t v = 1; v < p.V; v *= 2) row.mass_scale *= 0.5f;  // of V masses fits 63 bits
  const unsigned long long threshold = filter_threshold(p, b, row, top);
  const float min_p = p.min_p ? p.min_p[b] : 0.0f;
  const double floor = min_p > 0.0f ? row.max + log(static_cast<double>(min_p)) : -INFINITY;
  const uint64_t seed = p.seeds[b], draw = p.draws[b];
  unsigned long long best = 0;
  // Four neighbours at a time: they share one block of random words.
  for (int64_t v0 = 4 * static_cast<int64_t>(threadIdx.x); v0 < p.V; v0 += 4 * blockDim.x) {
    const Philox4 words = philox(seed, draw, static_cast<uint32_t>(v0 / 4));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t v = v0 + i;
      if (v >= p.V) break;
      const float x = row.scaled(v);
      const unsigned long long key = rank_key(x, v);
      if (key != top && (key < threshold || !(x >= floor))) continue;
      const unsigned long long raced = rank_key(x + gumbel_from_word(words.word[i]), v);
      best = raced > best ? raced : best;
    }
  }
  return index_of_rank_key(block_reduce(best, scratch, CombineMax()));
}

// Last phase: token, log-probability, status and draw counter of each batch row, by a block.
__device__ __forceinline__ void pick_tokens(const DecodeParams& p, const Workspace& ws) {
  BlockScratch* scratch = reinterpret_cast<BlockScratch*>(shared_memory());
  // mix_distributions makes chunks of its own.
  const int64_t parts = ceil_div(p.V, p.mix_probs ? kChunk : ws.part_entries);
  for (int64_t b = blockIdx.x; b < p.B; b += gridDim.x) {
    const float normalizer = log_sum_exp(merge_row(ws.part[0] + b * parts, parts, scratch));
    const float a = p.out_alpha[b];
    const bool full = p.out_status[b] == kCacheFull;
    const bool failed = a != a || !(fabsf(normalizer) < INFINITY);
    const bool sampled = p.seeds && (!p.temperature || p.temperature[b] > 0.0f);
    int64_t token = 0;
    if (!failed && sampled) {
      token = sample(p, b, scratch);
    } else if (!failed) {
      unsigned long long top = 0;
      for (int64_t i = threadIdx.x; i < parts; i += blockDim.x) {
        const unsigned long long key = ws.top_key[b * parts + i];
        top = key > top ? key : top;
      }
      token = index_of_rank_key(block_reduce(top, scratch, CombineMax()));
    }
    block_barrier();  // every thread has read the row's status and draw counter
    if (threadIdx.x != 0) continue;
    p.out_token[b] = token;
    p.out_logprob[b] = failed ? NAN : p.out_logits[b * p.V + token] - normalizer;
    if (!full) p.out_status[b] = failed ? kNonFinite : kOk;
    if (!full && p.seeds) p.draws[b] += 1;
  }
}

}  // namespace cuda
}  // namespace dualhead
