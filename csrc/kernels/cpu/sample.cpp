// SPDX-License-Identifier: Apache-2.0
// Each filter keeps a prefix of one ranking (value descending, index ascending), so all of them
// together keep the shortest prefix. That is a single cut, found with bins (sampling.h). Masses are
// sums of exp in double, in a fixed order.
#include "sample.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../sampling.h"

namespace dualhead::cpu {
namespace {

// The last token that is kept, in the order (value descending, index ascending). It compares
// floats, not rank keys: the comparison is made for every token, and its branch predicts well.
struct Cut {
  float value = -std::numeric_limits<float>::infinity();
  int64_t index = std::numeric_limits<int64_t>::max();
  bool keeps(float x, int64_t v) const { return x > value || (x == value && v <= index); }
};

class Ranking {
 public:
  explicit Ranking(const SampleRow& row) : row_(row), largest_(value(row.top)) {}

  // The k-th token, 1 <= k <= V.
  Cut at_rank(int64_t k) const {
    std::vector<int64_t> count(kBins, 0);
    for (int64_t v = 0; v < row_.V; ++v) ++count[bin_of(value(v), largest_)];
    int bin = 0;
    while (count[bin] < k) k -= count[bin++];
    std::vector<uint64_t> keys = keys_in(bin, Cut());
    std::nth_element(keys.begin(), keys.begin() + (k - 1), keys.end(), std::greater<>());
    return cut_at(keys[k - 1]);
  }

  // The last token for which the mass ranked above it is below top_p of the mass that `before`
  // keeps.
  Cut nucleus(float top_p, const Cut& before) const {
    std::vector<double> mass_of(kBins, 0.0);
    for (int64_t v = 0; v < row_.V; ++v) {
      const float x = value(v);
      if (before.keeps(x, v)) mass_of[bin_of(x, largest_)] += mass(x);
    }
    double total = 0.0;
    for (double bin_mass : mass_of) total += bin_mass;
    const double limit = static_cast<double>(top_p) * total;

    double above = 0.0;
    int bin = 0;
    while (bin < kBins - 1 && above + mass_of[bin] < limit) above += mass_of[bin++];
    std::vector<uint64_t> keys = keys_in(bin, before);
    if (keys.empty()) return before;
    std::sort(keys.begin(), keys.end(), std::greater<>());
    // All earlier bins are kept whole. The cut starts just above this bin's first token, in case
    // none of them is kept.
    Cut cut = cut_at(keys.front());
    --cut.index;
    for (uint64_t key : keys) {
      if (!(above < limit)) break;
      cut = cut_at(key);
      above += mass(cut.value);
    }
    return cut;
  }

 private:
  float value(int64_t v) const { return row_.logits[v] / row_.temperature; }

  double mass(float x) const { return x == largest_ ? 1.0 : std::exp(x - largest_); }

  Cut cut_at(uint64_t key) const {
    const int64_t index = index_of_rank_key(key);
    return Cut{value(index), index};
  }

  std::vector<uint64_t> keys_in(int bin, const Cut& cut) const {
    std::vector<uint64_t> keys;
    for (int64_t v = 0; v < row_.V; ++v) {
      const float x = value(v);
      if (bin_of(x, largest_) == bin && cut.keeps(x, v)) keys.push_back(rank_key(x, v));
    }
    return keys;
  }

  const SampleRow& row_;
  float largest_;
};

// What the filters keep besides the top token: tokens up to `cut` with a value of at least `floor`.
struct Kept {
  Cut cut;
  double floor = -std::numeric_limits<double>::infinity();
};

Kept apply_filters(const SampleRow& row) {
  Kept kept;
  const float largest = row.logits[row.top] / row.temperature;
  if (!(row.top_p > 0.0f)) {  // nothing ranks above the top token: it alone is kept
    kept.cut = Cut{largest, row.top};
    return kept;
  }
  const Ranking ranking(row);
  if (row.top_k > 0 && row.top_k < row.V) kept.cut = ranking.at_rank(row.top_k);
  if (row.top_p < 1.0f) kept.cut = ranking.nucleus(row.top_p, kept.cut);
  if (!(row.min_p <= 0.0f)) {
    kept.floor = static_cast<double>(largest) + std::log(static_cast<double>(row.min_p));
  }
  return kept;
}

// argmax of x + noise over the tokens that are kept.
template <bool kFiltered>
int64_t race(const SampleRow& row, const Kept& kept) {
  // The top token is always kept, so the race starts with it.
  float best = row.logits[row.top] / row.temperature +
               gumbel_from_word(random_word(row.seed, row.draw, row.top));
  int64_t token = row.top;
  Philox4 words{};
  int64_t block = -1;
  for (int64_t v = 0; v < row.V; ++v) {
    const float x = row.logits[v] / row.temperature;
    if (kFiltered && !(kept.cut.keeps(x, v) && static_cast<double>(x) >= kept.floor)) continue;
    if (v >> 2 != block) {
      block = v >> 2;
      words = philox(row.seed, row.draw, static_cast<uint32_t>(block));
    }
    const uint32_t word = words.word[v & 3];
    if (x + gumbel_upper_bound(word) < best) continue;
    const float score = x + gumbel_from_word(word);
    if (beats(score, v, best, token)) best = score, token = v;
  }
  return token;
}

}  // namespace

int64_t sample_token(const SampleRow& row) {
  if (row.top_k <= 0 && row.top_p >= 1.0f && row.min_p <= 0.0f) return race<false>(row, Kept());
  return race<true>(row, apply_filters(row));
}

}  // namespace dualhead::cpu
