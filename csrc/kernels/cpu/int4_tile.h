// SPDX-License-Identifier: Apache-2.0
// dot_tile.h for int4 rows: scales inside the sum, one per group of inputs. Included inside a
// target region. The order of each sum is fixed, as there.

// out[b][r] = rows[r] . x_b; scales[r]: (d / kInt4Group,) of row r; ahead: bytes to what to fetch.
template <int kBatch>
void int4_tile(const Int4Pair* const* rows, const float* const* scales, int64_t ahead,
               const float* x, int64_t x_stride, int64_t d, float (*out)[4]) {
  constexpr int64_t kHalf = kInt4Group / 2;
  F32 sum[kBatch][4] = {};
  for (int64_t g = 0; g < d / kInt4Group; ++g) {
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      // A group's 64 bytes are one line of cache.
      __builtin_prefetch(reinterpret_cast<const char*>(rows[r] + g * kHalf) + ahead, 0, 2);
    }
    F32 part[kBatch][4] = {};
    for (int64_t i = 0; i < kHalf; i += kLanes) {
      const float* x_i = x + g * kInt4Group + i;
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        F32 low, high;
        load_pairs(rows[r] + g * kHalf + i, low, high);
#pragma GCC unroll 4
        for (int b = 0; b < kBatch; ++b) {
          part[b][r] = fma(low, load(x_i + b * x_stride), part[b][r]);
          part[b][r] = fma(high, load(x_i + b * x_stride + kHalf), part[b][r]);
        }
      }
    }
    for (int b = 0; b < kBatch; ++b) {
      for (int r = 0; r < 4; ++r) sum[b][r] = fma(splat(scales[r][g]), part[b][r], sum[b][r]);
    }
  }
  for (int b = 0; b < kBatch; ++b) reduce4(out[b], sum[b][0], sum[b][1], sum[b][2], sum[b][3]);
}

inline void int4_rows(const Int4Pair* const* rows, const float* const* scales, int64_t ahead,
                      const float* x, int64_t x_stride, int64_t batch, int64_t d, float (*out)[4]) {
  int64_t b = 0;
  for (; b + 2 <= batch; b += 2) {
    int4_tile<2>(rows, scales, ahead, x + b * x_stride, x_stride, d, out + b);
  }
  if (b < batch) int4_tile<1>(rows, scales, ahead, x + b * x_stride, x_stride, d, out + b);
}
