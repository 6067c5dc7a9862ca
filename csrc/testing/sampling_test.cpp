// SPDX-License-Identifier: Apache-2.0
// Tests of kernels/sampling.h: random words against the published vectors, the noise of the race
// against double precision, the order of tokens, and the merge of softmax parts.
#include "kernels/sampling.h"

#include <array>
#include <cmath>
#include <limits>

#include "check.h"

using namespace dualhead;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

using Words = std::array<uint32_t, 4>;

// Philox4x32-10 as in its paper, for any counter; sampling.h fixes one of the words to 0.
Words textbook_philox(Words counter, std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t left = uint64_t{0xD2511F53} * counter[0];
    const uint64_t right = uint64_t{0xCD9E8D57} * counter[2];
    const auto high = [](uint64_t product) { return static_cast<uint32_t>(product >> 32); };
    counter = {high(right) ^ counter[1] ^ key[0], static_cast<uint32_t>(right),
               high(left) ^ counter[3] ^ key[1], static_cast<uint32_t>(left)};
    key = {key[0] + 0x9E3779B9u, key[1] + 0xBB67AE85u};
  }
  return counter;
}

// Test inputs from another generator than the one under test (splitmix64).
uint64_t next_input(uint64_t& state) {
  uint64_t z = state += 0x9E3779B97F4A7C15u;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}

}  // namespace

// The known-answer vectors of Random123 (kat_vectors, "philox4x32 10").
TEST(textbook_philox_gives_the_published_vectors) {
  CHECK((textbook_philox({0, 0, 0, 0}, {0, 0}) ==
         Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  const uint32_t ones = 0xffffffff;
  CHECK((textbook_philox({ones, ones, ones, ones}, {ones, ones}) ==
         Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  CHECK((
      textbook_philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}) ==
      Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(philox_is_the_textbook_one_at_seed_draw_and_block) {
  const Philox4 zero = philox(0, 0, 0);
  CHECK_EQUAL(zero.word[0], 0x6627e8d5u);
  CHECK_EQUAL(zero.word[3], 0x9b00dbd8u);
  uint64_t state = 1;
  for (int i = 0; i < 1000; ++i) {
    const uint64_t seed = next_input(state), draw = next_input(state);
    const uint32_t block = static_cast<uint32_t>(next_input(state));
    const Philox4 got = philox(seed, draw, block);
    const Words expected =
        textbook_philox({block, 0, static_cast<uint32_t>(draw), static_cast<uint32_t>(draw >> 32)},
                        {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
    for (int j = 0; j < 4; ++j) CHECK_EQUAL(got.word[j], expected[j]);
    const int64_t index = static_cast<int64_t>(block) * 4 + 2;
    CHECK_EQUAL(random_word(seed, draw, index), expected[2]);
  }
}

TEST(uniform_numbers_stay_inside_the_open_interval) {
  CHECK_EQUAL(uniform_from_word(0), std::ldexp(1.0f, -33));
  CHECK_EQUAL(uniform_from_word(0xffffffff), 1.0f - std::ldexp(1.0f, -24));
  CHECK_EQUAL(uniform_from_word(0x80000000), 0.5f);
}

TEST(noise_is_that_of_double_precision) {
  uint64_t state = 2;
  double worst_exponential = 0, worst_gumbel = 0;
  for (int i = 0; i < 200000; ++i) {
    // Every other word is very small or very large, because extremes decide a race.
    uint32_t word = static_cast<uint32_t>(next_input(state));
    if (i % 4 == 1) word >>= next_input(state) % 32;
    if (i % 4 == 3) word = ~(word >> next_input(state) % 32);
    const float v = uniform_from_word(word);
    const double exponential = -std::log1p(-static_cast<double>(v));
    const double got = exponential_from_uniform(v);
    worst_exponential = std::fmax(worst_exponential, std::fabs(got - exponential) / exponential);
    const double gumbel = -std::log(exponential);
    worst_gumbel = std::fmax(worst_gumbel, std::fabs(gumbel_from_word(word) - gumbel));
    CHECK(gumbel_upper_bound(word) >= gumbel_from_word(word));
  }
  CHECK(worst_exponential < std::ldexp(1.0, -21));
  CHECK(worst_gumbel < 3e-6);  // absolute: noise is added to logits and reaches 22.9
}

TEST(the_higher_value_wins_then_the_lower_index) {
  CHECK(beats(1.0f, 5, 0.0f, 2));
  CHECK(!beats(0.0f, 2, 1.0f, 5));
  CHECK(beats(1.0f, 2, 1.0f, 5));
  CHECK(!beats(1.0f, 5, 1.0f, 2));
  CHECK(!beats(1.0f, 2, 1.0f, 2));
  CHECK(beats(0.0f, 1, -0.0f, 2));
  CHECK(!beats(-0.0f, 2, 0.0f, 1));
}

TEST(a_nan_never_wins) {
  CHECK(!beats(kNan, 0, -kInf, 7));
  CHECK(!beats(kNan, 0, 1.0f, 7));
  CHECK(rank_key(kNan, 0) < rank_key(-kInf, 1000000));
}

TEST(rank_keys_order_as_the_tokens_do) {
  const float values[] = {-kInf, -3e38f, -1.0f, -1e-40f, -0.0f, 0.0f, 1e-40f, 1.0f, 3e38f, kInf};
  const int64_t indices[] = {0, 1, 31999, 0x7fffffff};
  for (float a : values) {
    for (float b : values) {
      for (int64_t i : indices) {
        for (int64_t j : indices) {
          CHECK_EQUAL(rank_key(a, i) > rank_key(b, j), beats(a, i, b, j));
        }
        CHECK_EQUAL(index_of_rank_key(rank_key(a, i)), i);
      }
    }
  }
}

TEST(softmax_parts_merge_to_the_whole) {
  const float values[] = {1.0f, -2.0f, 80.0f, -kInf, 79.0f, -100.0f};
  double sum = 0;
  for (float value : values) sum += std::exp(static_cast<double>(value) - 80.0);
  SoftmaxPart part = empty_part();
  for (float value : values) {
    part = merge_parts(part, value == -kInf ? empty_part() : SoftmaxPart{value, 1.0f});
  }
  CHECK(std::fabs(log_sum_exp(part) - (80.0 + std::log(sum))) < 1e-5);
  CHECK_EQUAL(log_sum_exp(empty_part()), -kInf);
}

TEST(a_nan_or_infinity_in_any_part_reaches_the_sum) {
  const SoftmaxPart fine{1.0f, 1.0f};
  for (const SoftmaxPart bad : {SoftmaxPart{-kInf, kNan}, SoftmaxPart{2.0f, kNan},
                                SoftmaxPart{kInf, 1.0f}, SoftmaxPart{kInf, kNan}}) {
    CHECK(!std::isfinite(log_sum_exp(merge_parts(bad, fine))));
    CHECK(!std::isfinite(log_sum_exp(merge_parts(fine, bad))));
    CHECK(!std::isfinite(log_sum_exp(merge_parts(empty_part(), bad))));
  }
}
