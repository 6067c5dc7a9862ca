// SPDX-License-Identifier: Apache-2.0
// Tiles of int4 rows. The scales, one per group of inputs, are applied inside the sum. Included
// inside a target region. The order of each sum is fixed, as in dot_tile.h.

struct Int4Row {
  const Int4Pair* at;
  const float* scales;  // (d / kInt4Group,)
};

template <>
struct Tile<Int4Pair, float> {
  typedef Int4Row Row;
  static constexpr int kMaxBatch = 2;
  static constexpr int64_t kStep = kInt4Group;
  static constexpr int64_t kHalf = kInt4Group / 2;  // bytes: a cache line
  static constexpr bool kSumsByTurn = false, kByRow = false, kRowsAreLong = false;
  static constexpr int64_t kStepBytes = 4 * kHalf, kFetches = 4;

  template <int kBatch>
  static void run(const Row* rows, Fetch fetch, const float* x, int64_t x_stride, int64_t begin,
                  int64_t end, F32 (*sums)[4]) {
    for (int64_t k = begin; k < end; k += kInt4Group) {
      for (int i = 0; i < kFetches; ++i) __builtin_prefetch(fetch.at + i * fetch.step, 0, kToL2);
      fetch.at += kFetches * fetch.step;
      F32 part[kBatch][4] = {};
      for (int64_t i = 0; i < kHalf; i += kLanes) {
        const float* x_i = x + k + i;
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          F32 low, high;
          load_pairs(rows[r].at + k / 2 + i, low, high);
#pragma GCC unroll 4
          for (int b = 0; b < kBatch; ++b) {
            part[b][r] = fma(low, load(x_i + b * x_stride), part[b][r]);
            part[b][r] = fma(high, load(x_i + b * x_stride + kHalf), part[b][r]);
          }
        }
      }
      for (int b = 0; b < kBatch; ++b) {
        for (int r = 0; r < 4; ++r) {
          sums[b][r] = fma(splat(rows[r].scales[k / kInt4Group]), part[b][r], sums[b][r]);
        }
      }
    }
  }
};
