// SPDX-License-Identifier: Apache-2.0
// Tiles of int4 rows: scales inside the sum, one per group of inputs. Included inside a target
// region. The order of each sum is fixed, as in dot_tile.h.

struct Int4Row {
  const Int4Pair* at;
  const float* scales;  // (d / kInt4Group,)
};

template <>
struct Tile<Int4Pair, float> {
  typedef Int4Row Row;
  static constexpr int kMaxBatch = 2;
  static constexpr int64_t kStep = kInt4Group;
  static constexpr int64_t kHalf = kInt4Group / 2;  // bytes: a line of cache
  static constexpr int64_t kStepBytes = 4 * kHalf, kFetches = 4;

  template <int kBatch>
  static void run(const Row* rows, Fetch fetch, const float* x, int64_t x_stride, int64_t begin,
                  int64_t end, F32 (*sums)[4]) {
    for (int64_t k = begin; k < end; k += kInt4Group) {
      for (int i = 0; i < kFetches; ++i) __builtin_prefetch(fetch.at + i * fetch.step, 0, 3);
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

#if DUALHEAD_NATIVE_BF16
// bf16 hidden states in the order in which a line of int4 numbers comes apart: 16-bit lane i of
// line k / 128, shifted right by 4 j, has at its bottom the number of input (j odd: 64 +) 2 i + j
// / 2.
struct PackedBFloat16 {
  BFloat16 value;
};

template <>
struct Hidden<Int4Pair, PackedBFloat16> {
  static const PackedBFloat16* data(const Step& s) {
    return reinterpret_cast<const PackedBFloat16*>(s.hidden_packed);
  }
  static int64_t stride(const Step& s) { return s.hidden_bf16_stride; }
};

inline void pack_hidden(const Step& s) {
  const DecodeParams& p = *s.params;
  for (int64_t b = 0; b < p.B; ++b) {
    const BFloat16* from = s.hidden_bf16 + b * s.hidden_bf16_stride;
    BFloat16* to = s.hidden_packed + b * s.hidden_bf16_stride;
    for (int64_t k = 0; k < p.d; k += kInt4Group) {
      for (int64_t j = 0; j < 4; ++j) {
        for (int64_t i = 0; i < 32; ++i) to[k + 32 * j + i] = from[k + j % 2 * 64 + 2 * i + j / 2];
      }
    }
  }
}

// A table turns the lowest bits of 16-bit lanes into bf16, in which all of -8 ... 7 are exact, so
// that the products are those of NativeBf16Product.
template <>
struct Tile<Int4Pair, PackedBFloat16> {
  typedef Int4Row Row;
  static constexpr int kMaxBatch = 4;
  static constexpr int64_t kStep = kInt4Group;
  static constexpr int64_t kStepBytes = 4 * kStep / 2, kFetches = 4;

  // By the 5 lowest bits, of which the highest is another number's.
  static __m512i table() {
    alignas(64) BFloat16 entries[32];
    for (int i = 0; i < 32; ++i) entries[i] = to_bfloat16(static_cast<float>(i % 16 - 8));
    return _mm512_load_si512(entries);
  }

  template <int kBatch>
  static void run(const Row* rows, Fetch fetch, const PackedBFloat16* x, int64_t x_stride,
                  int64_t begin, int64_t end, F32 (*sums)[4]) {
    const __m512i numbers = table();
    F32 sum[kBatch][4];
    __builtin_memcpy(sum, sums, sizeof(sum));
    for (int64_t k = begin; k < end; k += kStep) {
      for (int i = 0; i < kFetches; ++i) __builtin_prefetch(fetch.at + i * fetch.step, 0, 3);
      fetch.at += kFetches * fetch.step;
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const __m512i line = _mm512_loadu_si512(rows[r].at + k / 2);
        const F32 scale = splat(rows[r].scales[k / kStep]);
        const __m512i w[4] = {_mm512_permutexvar_epi16(line, numbers),
                              _mm512_permutexvar_epi16(_mm512_srli_epi16(line, 4), numbers),
                              _mm512_permutexvar_epi16(_mm512_srli_epi16(line, 8), numbers),
                              _mm512_permutexvar_epi16(_mm512_srli_epi16(line, 12), numbers)};
#pragma GCC unroll 4
        for (int b = 0; b < kBatch; ++b) {
          F32 part = {};
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) {
            const __m512i x_j = _mm512_loadu_si512(x + b * x_stride + k + 32 * j);
            part = NativeBf16Product::accumulate(part, w[j], x_j);
          }
          sum[b][r] = fma(scale, part, sum[b][r]);
        }
      }
    }
    __builtin_memcpy(sums, sum, sizeof(sum));
  }
};
#endif
