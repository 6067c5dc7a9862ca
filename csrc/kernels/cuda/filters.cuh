// SPDX-License-Identifier: Apache-2.0
// Applies top-k, top-p and min-p to one row of logits with one block, in a few passes over the row
// and without sorting it. The result does not depend on the number of threads: keys are unique
// integers, and masses are integers too, so the order of addition does not matter.
#pragma once

#include "heads.cuh"
#include "primitives.cuh"

namespace dualhead {
namespace cuda {

// The most keys that are kept of the bin that contains the cut. With 64 bins per nat, the bin of a
// top-k cut rarely has a hundred.
constexpr int kCandidates = 512;

// Shared memory of the token phase.
struct TokenScratch {
  BlockScratch block;
  unsigned count[kBins];  // tokens per bin
  unsigned long long candidate[kCandidates];
  unsigned candidates;
  unsigned long long cut;
};

// Reduces one value per thread to one value for all. `Combine` reduces the values of a warp.
template <typename Combine>
__device__ __forceinline__ unsigned long long block_reduce(unsigned long long value,
                                                           BlockScratch* scratch, Combine combine) {
  value = combine(value);
  if (lane_index() == 0) scratch->slot[warp_in_block()] = value;
  block_barrier();  // every warp has written its slot
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

// Count and mass of the tokens that rank above a given one, and the mass of all tokens.
struct Above {
  unsigned long long count, mass, all_mass;
};

// One row of logits at its temperature. The whole block calls its functions.
struct Row {
  const float* logits;  // (V,)
  int64_t V;
  float temperature;
  float max;         // of logits / temperature
  float mass_scale;  // 1.0f of exp(x - max) in fixed point
  TokenScratch* scratch;

  __device__ Row(const DecodeParams& p, int64_t b, float largest_logit, TokenScratch* scratch)
      : logits(p.out_logits + b * p.V),
        V(p.V),
        temperature(temperature_of(p, b)),
        max(largest_logit / temperature),  // division preserves the order
        mass_scale(4611686018427387904.0f),
        scratch(scratch) {
    // At most 2^62 / V, so that the sum of V masses fits in 63 bits.
    for (int64_t v = 1; v < V; v *= 2) mass_scale *= 0.5f;
  }

  __device__ float scaled(int64_t v) const { return logits[v] / temperature; }

  // exp(x - max) in fixed point.
  __device__ unsigned long long mass(float x) const {
    return static_cast<unsigned long long>(expf(x - max) * mass_scale);
  }

  __device__ unsigned long long sum(unsigned long long own) const {
    return block_reduce(own, &scratch->block, CombineSum());
  }

  // `masses`: whether the masses are needed.
  __device__ Above above(unsigned long long key, bool masses) const {
    Above own{0, 0, 0};
    for (int64_t v = threadIdx.x; v < V; v += blockDim.x) {
      const float x = scaled(v);
      const bool higher = rank_key(x, v) > key;
      own.count += higher;
      if (!masses) continue;
      const unsigned long long m = mass(x);
      own.all_mass += m;
      if (higher) own.mass += m;
    }
    if (!masses) return Above{sum(own.count), 0, 0};
    return Above{sum(own.count), sum(own.mass), sum(own.all_mass)};
  }

  // The mass of all tokens whose key is at least `key`.
  __device__ unsigned long long mass_from(unsigned long long key) const {
    unsigned long long own = 0;
    for (int64_t v = threadIdx.x; v < V; v += blockDim.x) {
      const float x = scaled(v);
      if (rank_key(x, v) >= key) own += mass(x);
    }
    return sum(own);
  }

  __device__ unsigned long long count_from(unsigned long long key) const {
    unsigned long long own = 0;
    for (int64_t v = threadIdx.x; v < V; v += blockDim.x) own += rank_key(scaled(v), v) >= key;
    return sum(own);
  }
};

// The bin that contains the k-th token, and the token's rank in that bin. The same in every thread.
struct Place {
  int bin;
  unsigned long long k;
};

// Counts the tokens into bins. Then every warp searches the bins by itself, 64 bins per lane.
__device__ __forceinline__ Place find_bin(const Row& row, unsigned long long k) {
  constexpr int kOwn = kBins / kWarp;
  unsigned* count = row.scratch->count;
  for (int i = threadIdx.x; i < kBins; i += blockDim.x) count[i] = 0;
  block_barrier();  // the bins are empty
  for (int64_t v = threadIdx.x; v < row.V; v += blockDim.x) {
    atomicAdd(&count[bin_of(row.scaled(v), row.max)], 1u);
  }
  block_barrier();  // all tokens are counted
  const int lane = lane_index();
  unsigned long long own = 0;
  // Each lane starts at a different offset to avoid bank conflicts in shared memory.
  for (int i = 0; i < kOwn; ++i) own += count[lane * kOwn + (i + lane) % kOwn];
  unsigned long long before = 0;
  for (int other = 0; other < kWarp; ++other) {
    const unsigned long long theirs = exchange_from(own, other);
    if (other < lane) before += theirs;
  }
  Place place{lane * kOwn, k - before};
  const bool mine = before < k && k <= before + own;
  for (; mine && count[place.bin] < place.k; ++place.bin) place.k -= count[place.bin];
  const int owner = static_cast<int>(warp_max(mine ? lane + 1ull : 0ull)) - 1;
  return Place{exchange_from(place.bin, owner), exchange_from(place.k, owner)};
}

// The key of the k-th token by rank, 1 <= k <= V.
__device__ __forceinline__ unsigned long long kth_key(const Row& row, unsigned long long k) {
  const Place place = find_bin(row, k);
  TokenScratch* scratch = row.scratch;
  const unsigned candidates = scratch->count[place.bin];
  if (candidates > kCandidates) {
    // Hundreds of equal logits, or a cut in the last bin: bisection, 64 passes over the row.
    unsigned long long low = 0, high = ~0ull;  // at least k keys are >= low, fewer are >= high
    while (high - low > 1) {
      const unsigned long long middle = low + (high - low) / 2;
      (row.count_from(middle) >= k ? low : high) = middle;
    }
    return low;
  }
  if (threadIdx.x == 0) scratch->candidates = 0;
  block_barrier();  // the list is empty and every thread has read `candidates`
  for (int64_t v = threadIdx.x; v < row.V; v += blockDim.x) {
    const float x = row.scaled(v);
    if (bin_of(x, row.max) != place.bin) continue;
    scratch->candidate[atomicAdd(&scratch->candidates, 1u)] = rank_key(x, v);
  }
  block_barrier();  // the list is complete
  for (unsigned i = threadIdx.x; i < candidates; i += blockDim.x) {
    const unsigned long long key = scratch->candidate[i];
    unsigned long long rank = 0;
    for (unsigned j = 0; j < candidates; ++j) rank += scratch->candidate[j] >= key;
    if (rank == place.k) scratch->cut = key;
  }
  block_barrier();  // the cut is known
  const unsigned long long cut = scratch->cut;
  block_barrier();  // every thread has read; the next call may write
  return cut;
}

// Top-k, then top-p on what remains, then min-p. A row's top token is always kept.
struct Filters {
  unsigned long long k;  // 0: off
  float top_p;           // 1 or more: off
  double floor;          // of logits / temperature; -inf: off

  __device__ Filters(const DecodeParams& p, int64_t b, float max)
      : k(p.top_k && p.top_k[b] > 0 && p.top_k[b] < p.V ? p.top_k[b] : 0),
        top_p(p.top_p ? p.top_p[b] : 1.0f),
        floor(p.min_p && p.min_p[b] > 0.0f ? max + log(static_cast<double>(p.min_p[b]))
                                           : -INFINITY) {}

  __device__ bool nucleus() const { return !(top_p >= 1.0f); }
  __device__ bool ranks() const { return k || nucleus(); }
};

// The token that wins the race among the tokens that the filters keep. `winner` wins it among all
// tokens. If the filters keep `winner`, which is the usual case, it is the result. Otherwise the
// race is run again among the tokens that rank above it, and so on: the filters remove every token
// that ranks below one they remove. `race(key)` returns the winner among the tokens whose key is
// above `key`.
template <typename Race>
__device__ __forceinline__ int64_t first_kept(const Row& row, const Filters& filters,
                                              int64_t winner, Race race) {
  double target = -1.0;  // top-p removes a token if at least this much mass ranks above it
  for (int64_t token = winner;;) {
    const float x = row.scaled(token);
    const bool high = x >= filters.floor;
    if (high && !filters.ranks()) return token;
    const unsigned long long key = rank_key(x, token);
    const Above above = row.above(key, high && filters.nucleus());
    if (above.count == 0) return token;
    bool kept = high && (!filters.k || above.count < filters.k);
    if (kept && filters.nucleus()) {
      if (target < 0.0) {
        const unsigned long long left =
            filters.k ? row.mass_from(kth_key(row, filters.k)) : above.all_mass;
        target = filters.top_p > 0.0f ? static_cast<double>(filters.top_p) * left : 0.0;
      }
      kept = static_cast<double>(above.mass) < target;
    }
    if (kept) return token;
    token = race(key);
  }
}

}  // namespace cuda
}  // namespace dualhead
