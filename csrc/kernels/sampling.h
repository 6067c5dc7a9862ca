// SPDX-License-Identifier: Apache-2.0
// The definition of token sampling, shared by host and device: the counter-based random numbers,
// the noise of the exponential race, the order of tokens (ties, NaN), and the merge of partial
// softmax sums.
//
// Random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// 2011). Exponential race: argmax_v x_v - log E_v with E_v ~ Exp(1) is an exact draw from
// softmax(x), and from its restriction to any subset of tokens. Logarithms are written out in fmaf
// so that host and device give the same bits; libm and CUDA's differ.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define DUALHEAD_HD __host__ __device__ __forceinline__
#else
#define DUALHEAD_HD inline
#endif

namespace dualhead {

// The bit pattern of a float and back. memcpy is the only way that is valid C++17 on host and
// device.
DUALHEAD_HD uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

DUALHEAD_HD float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// --- random words --------------------------------------------------------------------------------

struct Philox4 {
  uint32_t word[4];
};

// The four random words of vocabulary indices 4 * block ... 4 * block + 3. The key is the seed, the
// counter is (block, 0, draw).
DUALHEAD_HD Philox4 philox(uint64_t seed, uint64_t draw, uint32_t block) {
  uint32_t c0 = block, c1 = 0;
  uint32_t c2 = static_cast<uint32_t>(draw), c3 = static_cast<uint32_t>(draw >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return Philox4{{c0, c1, c2, c3}};
}

// The random word of one vocabulary index.
DUALHEAD_HD uint32_t random_word(uint64_t seed, uint64_t draw, int64_t index) {
  const Philox4 words = philox(seed, draw, static_cast<uint32_t>(index >> 2));
  // Selected rather than indexed: registers of a GPU have no addresses.
  const uint32_t low = index & 1 ? words.word[1] : words.word[0];
  const uint32_t high = index & 1 ? words.word[3] : words.word[2];
  return index & 2 ? high : low;
}

// Maps a word to a number in (0, 1): at least 2^-33, at most 1 - 2^-24.
DUALHEAD_HD float uniform_from_word(uint32_t word) {
  const float v = (static_cast<float>(word) + 0.5f) * 2.3283064365386963e-10f;  // 2^-32
  return v < 0.99999994f ? v : 0.99999994f;                                     // 1 - 2^-24
}

// --- the race's noise ----------------------------------------------------------------------------

// log(x) for a normal x > 0, relative error under 2^-22 (the polynomial of Cephes' logf). Uses only
// fmaf and single operations, so that no compiler can contract it differently from another.
DUALHEAD_HD float log_positive(float x) {
  // x = m 2^e with m in [sqrt(1/2), sqrt(2)): f = m - 1 is then exact and small.
  const uint32_t bits = float_bits(x);
  const int32_t shifted = static_cast<int32_t>(bits - 0x3F3504F3u);  // 0x3F3504F3 = sqrt(1/2)
  const float e = static_cast<float>(shifted >> 23);
  const float m = bits_float((static_cast<uint32_t>(shifted) & 0x007FFFFFu) + 0x3F3504F3u);
  const float f = m - 1.0f;
  const float z = f * f;
  float p = 7.0376836292e-2f;
  p = fmaf(p, f, -1.1514610310e-1f);
  p = fmaf(p, f, 1.1676998740e-1f);
  p = fmaf(p, f, -1.2420140846e-1f);
  p = fmaf(p, f, 1.4249322787e-1f);
  p = fmaf(p, f, -1.6668057665e-1f);
  p = fmaf(p, f, 2.0000714765e-1f);
  p = fmaf(p, f, -2.4999993993e-1f);
  p = fmaf(p, f, 3.3333331174e-1f);
  const float fz = f * z;
  float y = fmaf(fz, p, e * -2.12194440e-4f);  // log 2 = 0.693359375 - 2.12194440e-4, in two parts
  y = fmaf(z, -0.5f, y);
  return fmaf(e, 0.693359375f, f + y);
}

// E = -log(1 - v) for v in (0, 1). Accurate even for tiny v, where the rounded 1 - v loses v.
DUALHEAD_HD float exponential_from_uniform(float v) {
  const float u = 1.0f - v;
  const float lost = (1.0f - u) - v;  // exact: 1 - v = u + lost
  const float correction = lost / u;  // log(u + lost) = log(u) + lost / u to first order
  return -(log_positive(u) + correction);
}

// -log E, which the race adds to x_v (Gumbel noise), between -2.9 and 22.9.
DUALHEAD_HD float gumbel_from_word(uint32_t word) {
  return -log_positive(exponential_from_uniform(uniform_from_word(word)));
}

// A cheap upper bound of gumbel_from_word, from E >= v and log2(v) >= (bits of v) / 2^23 - 127. A
// candidate whose x + bound is below the best so far needs no logarithm. The last addend covers all
// rounding errors.
DUALHEAD_HD float gumbel_upper_bound(uint32_t word) {
  const float scaled = static_cast<float>(float_bits(uniform_from_word(word)));
  return fmaf(scaled, -8.2629582881927490e-8f /* -log(2) 2^-23 */, 88.029691931f /* 127 log 2 */) +
         1e-3f;
}

// --- the order of tokens -------------------------------------------------------------------------

// The higher value wins, then the lower index; NaN never wins. Start from (-inf, first index).
DUALHEAD_HD bool beats(float value, int64_t index, float best_value, int64_t best_index) {
  return value > best_value || (value == best_value && index < best_index);
}

// Unsigned keys that sort like the floats: -0 equals +0, NaN is below -inf.
DUALHEAD_HD uint32_t ordered_bits(float x) {
  if (x != x) return 0;
  const uint32_t bits = float_bits(x + 0.0f);  // -0 + 0 = +0
  // Flips all bits of negative floats and only the sign bit of others. No branch: the signs of
  // logits are hard to predict.
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

// A unique key per token. Keys in descending order are the ranking: value descending, index
// ascending.
DUALHEAD_HD uint64_t rank_key(float x, int64_t index) {
  return static_cast<uint64_t>(ordered_bits(x)) << 32 |
         static_cast<uint32_t>(0xFFFFFFFFu - static_cast<uint32_t>(index));
}

DUALHEAD_HD int64_t index_of_rank_key(uint64_t key) {
  return static_cast<int64_t>(0xFFFFFFFFu - static_cast<uint32_t>(key));
}

// --- tokens in bins ------------------------------------------------------------------------------

// Filters find a cut without sorting: tokens are counted into bins by their distance from the top
// token, and only the bin that contains the cut is examined closely.
constexpr int kBins = 2048;
constexpr float kBinsPerUnit = 64.0f;  // 32 nats from the top to the last bin, which takes the rest

// The bin of x, given the row's largest value. It is monotone in x, so the bins are in the order of
// their tokens.
DUALHEAD_HD int bin_of(float x, float largest) {
  const float gap = x == largest ? 0.0f : largest - x;  // inf - inf would be NaN
  const float scaled = gap * kBinsPerUnit;
  return scaled < kBins - 1 ? static_cast<int>(scaled) : kBins - 1;
}

// --- log-sum-exp in parts ------------------------------------------------------------------------

// A part of a softmax: sum_v exp(z_v) = sum * exp(max). If all its logits are -inf, max = -inf and
// sum = 0. A NaN makes sum NaN, and +inf makes the log-sum-exp non-finite, so testing the result
// once detects both.
struct alignas(8) SoftmaxPart {
  float max;
  float sum;
};

DUALHEAD_HD SoftmaxPart empty_part() { return SoftmaxPart{-INFINITY, 0.0f}; }

// The two parts merged. Merge in a fixed order: the rounding depends on the order of the arguments
// and on the grouping.
DUALHEAD_HD SoftmaxPart merge_parts(SoftmaxPart a, SoftmaxPart b) {
  const float max = a.max > b.max ? a.max : b.max;
  // -inf - (-inf) would be NaN. A part without mass keeps its sum (0 or NaN) unscaled.
  const float scale_a = a.max == -INFINITY ? 1.0f : expf(a.max - max);
  const float scale_b = b.max == -INFINITY ? 1.0f : expf(b.max - max);
  const float scaled_b = b.sum * scale_b;
  return SoftmaxPart{max, fmaf(a.sum, scale_a, scaled_b)};
}

// log(sum_v exp(z_v)); -inf for a part without mass.
DUALHEAD_HD float log_sum_exp(SoftmaxPart part) { return part.max + logf(part.sum); }

}  // namespace dualhead
