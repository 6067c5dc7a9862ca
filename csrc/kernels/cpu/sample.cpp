// SPDX-License-Identifier: Apache-2.0
// Each filter keeps a prefix of one ranking (value descending, index ascending), so together they
// keep the shortest prefix: one rank key, found without sorting the vocabulary. Tokens are counted
// into bins by their distance from the top, only the bin that a cut falls into is looked at
// closely. Masses are sums of exp in double, in a fixed order.
#include "sample.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../sampling.h"

namespace dualhead::cpu {
namespace {

constexpr int kBins = 2048;
constexpr float kBinsPerUnit = 64.0f;  // 32 nats from the top to the last bin, which takes the rest

// The bin of x, given the row's largest: monotone, so bins are ordered as their tokens are.
inline int bin_of(float x, float largest) {
  const float gap = x == largest ? 0.0f : largest - x;  // inf - inf would be NaN
  const float scaled = gap * kBinsPerUnit;
  return scaled < kBins - 1 ? static_cast<int>(scaled) : kBins - 1;
}

// What the filters keep: tokens whose key is at least `cut` and whose value is at least `floor`.
struct Kept {
  uint64_t cut = 0;
  double floor = -std::numeric_limits<double>::infinity();
};

class Ranking {
 public:
  explicit Ranking(const SampleRow& row, bool with_mass)
      : row_(row), largest_(value(row.top)), count_(kBins, 0), mass_(with_mass ? kBins : 0, 0.0) {
    for (int64_t v = 0; v < row.V; ++v) {
      const float x = value(v);
      const int bin = bin_of(x, largest_);
      ++count_[bin];
      if (with_mass) mass_[bin] += mass(x);
    }
  }

  // The key of the k-th token, 1 <= k <= V.
  uint64_t key_of_rank(int64_t k) const {
    int bin = 0;
    while (count_[bin] < k) k -= count_[bin++];
    std::vector<uint64_t> keys = keys_in(bin, 0);
    std::nth_element(keys.begin(), keys.begin() + (k - 1), keys.end(), std::greater<>());
    return keys[k - 1];
  }

  // The last key to keep so that the mass ranked above each kept token is below top_p of the mass
  // of all tokens with keys >= cut.
  uint64_t nucleus_cut(float top_p, uint64_t cut) const {
    const int last = cut ? bin_of(value(index_of_rank_key(cut)), largest_) : kBins - 1;
    double total = 0.0;
    for (int bin = 0; bin < last; ++bin) total += mass_[bin];
    double mass_of_last = 0.0;
    for (uint64_t key : keys_in(last, cut)) mass_of_last += mass(value(index_of_rank_key(key)));
    total += mass_of_last;
    const double limit = static_cast<double>(top_p) * total;

    double above = 0.0;
    int bin = 0;
    while (bin < last && above + mass_[bin] < limit) above += mass_[bin++];
    std::vector<uint64_t> keys = keys_in(bin, cut);
    std::sort(keys.begin(), keys.end(), std::greater<>());
    // Bins before this one are kept whole; if nothing of it stays, its first key excludes all of
    // it.
    uint64_t smallest = keys.empty() ? cut : keys.front() + 1;
    for (uint64_t key : keys) {
      if (!(above < limit)) break;
      smallest = key;
      above += mass(value(index_of_rank_key(key)));
    }
    return smallest;
  }

 private:
  float value(int64_t v) const { return row_.logits[v] / row_.temperature; }

  double mass(float x) const {
    return x == largest_ ? 1.0 : std::exp(static_cast<double>(x) - static_cast<double>(largest_));
  }

  std::vector<uint64_t> keys_in(int bin, uint64_t cut) const {
    std::vector<uint64_t> keys;
    keys.reserve(count_[bin]);
    for (int64_t v = 0; v < row_.V; ++v) {
      const float x = value(v);
      if (bin_of(x, largest_) != bin) continue;
      const uint64_t key = rank_key(x, v);
      if (key >= cut) keys.push_back(key);
    }
    return keys;
  }

  const SampleRow& row_;
  float largest_;
  std::vector<int64_t> count_;
  std::vector<double> mass_;
};

Kept apply_filters(const SampleRow& row) {
  Kept kept;
  const bool by_rank = row.top_k > 0 && row.top_k < row.V;
  const bool by_mass = !(row.top_p >= 1.0f);
  const float largest = row.logits[row.top] / row.temperature;
  if (by_mass && !(row.top_p > 0.0f)) {  // nothing ranks above the first: it alone stays
    kept.cut = rank_key(largest, row.top);
    return kept;
  }
  if (by_rank || by_mass) {
    const Ranking ranking(row, by_mass);
    if (by_rank) kept.cut = ranking.key_of_rank(row.top_k);
    if (by_mass) kept.cut = std::max(kept.cut, ranking.nucleus_cut(row.top_p, kept.cut));
  }
  if (!(row.min_p <= 0.0f)) {
    kept.floor = static_cast<double>(largest) + std::log(static_cast<double>(row.min_p));
  }
  return kept;
}

}  // namespace

int64_t sample_token(const SampleRow& row) {
  const Kept kept = apply_filters(row);
  const bool filtered = kept.cut != 0 || !(kept.floor == -std::numeric_limits<double>::infinity());
  // The top token is kept whatever the filters say; it opens the race.
  float best = row.logits[row.top] / row.temperature +
               gumbel_from_word(random_word(row.seed, row.draw, row.top));
  int64_t token = row.top;
  Philox4 words{};
  int64_t block = -1;
  for (int64_t v = 0; v < row.V; ++v) {
    const float x = row.logits[v] / row.temperature;
    if (filtered && !(rank_key(x, v) >= kept.cut && static_cast<double>(x) >= kept.floor)) continue;
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

}  // namespace dualhead::cpu
