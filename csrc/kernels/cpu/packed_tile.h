// SPDX-License-Identifier: Apache-2.0
// Tiles of quantised rows for AVX512_BF16. Tables convert the weights to bf16, which is exact for
// every format, and NativeBf16Product multiplies them with bf16 hidden states. Included inside a
// target region. The order of each sum is fixed, as in dot_tile.h.

// The input, among 128, that the i-th packed position holds.
inline int64_t packed_from(Quantization quantization, int64_t i) {
  if (quantization == Quantization::kInt4) {
    // Shifted right by 4 j, the 16-bit lane n of a cache line has in its low bits the weight of
    // input 2 n + j / 2, plus 64 if j is odd.
    const int64_t j = i / 32, n = i % 32;
    return j % 2 * 64 + 2 * n + j / 2;
  }
  // Unpacking takes 8 bytes of each 16: first the lower halves of 64 bytes, then the upper halves.
  const int64_t half = i % 64 / 32, n = i % 32;
  return i / 64 * 64 + n / 8 * 16 + half * 8 + n % 8;
}

inline __m512i load_packed(const void* x) { return _mm512_loadu_si512(x); }

// --- one byte each -------------------------------------------------------------------------------

// The bf16 bits of an integer 0 <= n < 256.
constexpr int integer_bits(int n) {
  int exponent = 0;
  while (n >> (exponent + 1)) ++exponent;
  return n == 0 ? 0 : (127 + exponent) << 7 | (n << 7 >> exponent & 127);
}

// The bf16 bits of the positive W whose lowest 7 bits are i.
constexpr int magnitude_bits(int8_t, int i) { return integer_bits(i); }
constexpr int magnitude_bits(Fp8, int i) {
  if (i >= 8) return ((i >> 3) + 120) << 7 | (i & 7) << 4;
  return i == 0 ? 0 : integer_bits(i) - (9 << 7);  // subnormal: i 2^-9
}

// The low and high bytes of 128 magnitudes, indexed by the lowest 7 bits.
template <class W>
struct ByteTable {
  alignas(64) uint8_t low[128], high[128];
  constexpr ByteTable() : low(), high() {
    for (int i = 0; i < 128; ++i) {
      low[i] = static_cast<uint8_t>(magnitude_bits(W{}, i) & 255);
      high[i] = static_cast<uint8_t>(magnitude_bits(W{}, i) >> 8);
    }
  }
};
template <class W>
constexpr ByteTable<W> kByteTable{};

struct ByteTables {
  __m512i low[2], high[2];
};

template <class W>
inline ByteTables byte_tables() {
  const ByteTable<W>& t = kByteTable<W>;
  return {{_mm512_load_si512(t.low), _mm512_load_si512(t.low + 64)},
          {_mm512_load_si512(t.high), _mm512_load_si512(t.high + 64)}};
}

inline __m512i look_up(const __m512i (&table)[2], __m512i index) {
  return _mm512_permutex2var_epi8(table[0], index, table[1]);
}

// The high bytes with the signs of their weights.
inline __m512i with_sign(__m512i high, __m512i numbers) {
  constexpr int kOrAnd = 0xF8;  // a | (b & c)
  return _mm512_ternarylogic_epi32(high, numbers, _mm512_set1_epi8(-128), kOrAnd);
}

inline void to_bytes(Fp8, const ByteTables& t, __m512i x, __m512i& low, __m512i& high) {
  low = look_up(t.low, x), high = with_sign(look_up(t.high, x), x);
}
inline void to_bytes(int8_t, const ByteTables& t, __m512i x, __m512i& low, __m512i& high) {
  const __m512i index = _mm512_abs_epi8(x);
  low = look_up(t.low, index), high = look_up(t.high, index);
  // The magnitude of -128 does not fit in 7 bits, so it is looked up as 0. Its low byte is right;
  // its high byte is set here.
  const __mmask64 lowest = _mm512_cmpeq_epi8_mask(x, _mm512_set1_epi8(-128));
  high = with_sign(_mm512_mask_mov_epi8(high, lowest, _mm512_set1_epi8(0x43)), x);
}

template <class W>
struct Tile<W, PackedFor<W>> {
  typedef const W* Row;
  static constexpr int kMaxBatch = 4;
  static constexpr int64_t kStep = 64;
  static constexpr bool kSumsByTurn = false, kByRow = false, kRowsAreLong = false;
  static constexpr int64_t kStepBytes = 4 * kStep, kFetches = 4;

  template <int kBatch>
  static void run(const Row* rows, Fetch fetch, const PackedFor<W>* x, int64_t x_stride,
                  int64_t begin, int64_t end, F32 (*sums)[4]) {
    const ByteTables tables = byte_tables<W>();
    F32 sum[kBatch][4];
    __builtin_memcpy(sum, sums, sizeof(sum));
    for (int64_t k = begin; k < end; k += kStep) {
      for (int i = 0; i < kFetches; ++i) __builtin_prefetch(fetch.at + i * fetch.step, 0, kToL2);
      fetch.at += kFetches * fetch.step;
      const __mmask64 inside = end - k < kStep ? (uint64_t{1} << (end - k)) - 1 : ~uint64_t{0};
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        __m512i low, high;
        to_bytes(W{}, tables, _mm512_maskz_loadu_epi8(inside, rows[r] + k), low, high);
        const __m512i w0 = _mm512_unpacklo_epi8(low, high), w1 = _mm512_unpackhi_epi8(low, high);
#pragma GCC unroll 4
        for (int b = 0; b < kBatch; ++b) {
          const PackedFor<W>* x_b = x + b * x_stride + k;
          sum[b][r] = NativeBf16Product::accumulate(sum[b][r], w0, load_packed(x_b));
          sum[b][r] = NativeBf16Product::accumulate(sum[b][r], w1, load_packed(x_b + 32));
        }
      }
    }
    __builtin_memcpy(sums, sum, sizeof(sum));
  }
};

// --- int4 ----------------------------------------------------------------------------------------

// Indexed by the lowest 5 bits. The highest of them belongs to the next weight, so the table
// repeats after 16 entries.
struct Int4Table {
  alignas(64) uint16_t bits[32];
  constexpr Int4Table() : bits() {
    for (int i = 0; i < 32; ++i) {
      const int n = i % 16 - 8;
      bits[i] = static_cast<uint16_t>(n < 0 ? 0x8000 | integer_bits(-n) : integer_bits(n));
    }
  }
};
constexpr Int4Table kInt4Table{};

// The 128 numbers of a group in bf16, in the order of packed_from.
inline void int4_numbers(__m512i line, __m512i numbers, __m512i (&w)[4]) {
  w[0] = _mm512_permutexvar_epi16(line, numbers);
  w[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(line, 4), numbers);
  w[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(line, 8), numbers);
  w[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(line, 12), numbers);
}

template <>
struct Tile<Int4Pair, PackedFor<Int4Pair>> {
  typedef Int4Row Row;
  static constexpr int kMaxBatch = 4;
  static constexpr int64_t kStep = kInt4Group;
  static constexpr bool kSumsByTurn = false, kByRow = false, kRowsAreLong = false;
  static constexpr int64_t kStepBytes = 4 * kStep / 2, kFetches = 4;

  template <int kBatch>
  static void run(const Row* rows, Fetch fetch, const PackedFor<Int4Pair>* x, int64_t x_stride,
                  int64_t begin, int64_t end, F32 (*sums)[4]) {
    const __m512i numbers = _mm512_load_si512(kInt4Table.bits);
    F32 sum[kBatch][4];
    __builtin_memcpy(sum, sums, sizeof(sum));
    for (int64_t k = begin; k < end; k += kStep) {
      for (int i = 0; i < kFetches; ++i) __builtin_prefetch(fetch.at + i * fetch.step, 0, kToL2);
      fetch.at += kFetches * fetch.step;
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const __m512i line = load_packed(rows[r].at + k / 2);
        const F32 scale = splat(rows[r].scales[k / kStep]);
        __m512i w[4];
        int4_numbers(line, numbers, w);
#pragma GCC unroll 4
        for (int b = 0; b < kBatch; ++b) {
          F32 part = {};
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) {
            const __m512i x_j = load_packed(x + b * x_stride + k + 32 * j);
            part = NativeBf16Product::accumulate(part, w[j], x_j);
          }
          sum[b][r] = fma(scale, part, sum[b][r]);
        }
      }
    }
    __builtin_memcpy(sums, sum, sizeof(sum));
  }
};

#if !DUALHEAD_TILES
constexpr void (*pack_requests)(const Step&) = nullptr;

void pack_hidden(const Step& s) {
  const DecodeParams& p = *s.params;
  if (p.quantization == Quantization::kNone) return;
  int64_t from[128];
  for (int64_t i = 0; i < 128; ++i) from[i] = packed_from(p.quantization, i);
  for (int64_t b = 0; b < p.B * s.hidden_rows; ++b) {
    const BFloat16* row = s.hidden_bf16 + b * s.hidden_bf16_stride;
    BFloat16* to = s.hidden_packed + b * s.hidden_bf16_stride;
    for (int64_t k = 0; k < p.d; k += 128) {
      for (int64_t i = 0; i < 128; ++i) {
        to[k + i] = k + from[i] < p.d ? row[k + from[i]] : BFloat16{0};
      }
    }
  }
}
#endif
