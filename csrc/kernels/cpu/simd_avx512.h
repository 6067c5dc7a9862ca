// SPDX-License-Identifier: Apache-2.0
// AVX-512 (F, BW, VL, DQ): 16 fp32 lanes, masked tails. Included inside a target region; the bf16
// products of AVX512_BF16 are added where DUALHEAD_NATIVE_BF16 is 1.

constexpr int kLanes = 16;
constexpr int kMaxBatchTile = 6;  // registers: 24 sums, 6 operands, 1 weight of 32
constexpr bool kNativeBf16 = DUALHEAD_NATIVE_BF16;

typedef float F32 __attribute__((vector_size(64)));
typedef int32_t I32 __attribute__((vector_size(64)));

inline __mmask16 lanes_below(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline F32 load(const float* p) { return _mm512_loadu_ps(p); }
inline F32 load_partial(const float* p, int64_t n) {
  return _mm512_maskz_loadu_ps(lanes_below(n), p);
}
inline void store(float* p, F32 x) { _mm512_storeu_ps(p, x); }

inline F32 widen(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
inline F32 load(const BFloat16* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline F32 load_partial(const BFloat16* p, int64_t n) {
  return widen(_mm256_maskz_loadu_epi16(lanes_below(n), p));
}

inline F32 load(const int8_t* p) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
// Through float16: e4m3's bits below the sign, moved up 7 places, are the float16 of the value
// times 2^-8.
inline F32 load(const Fp8* p) {
  const __m256i x = _mm256_slli_epi16(
      _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 7);
  const __m256i half = _mm256_and_si256(x, _mm256_set1_epi16(static_cast<int16_t>(0xBFFF)));
  return _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f));
}
template <class T>
inline F32 load_partial(const T* p, int64_t n) {
  T padded[kLanes] = {};
  __builtin_memcpy(padded, p, n * sizeof(T));
  return load(padded);
}
inline void load_pairs(const Int4Pair* p, F32& low, F32& high) {
  const __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m512i eight = _mm512_set1_epi32(8);
  low = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_and_si512(x, _mm512_set1_epi32(15)), eight));
  high = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_srli_epi32(x, 4), eight));
}

inline F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }

inline float reduce_add(F32 x) { return _mm512_reduce_add_ps(x); }
inline float reduce_max(F32 x) { return _mm512_reduce_max_ps(x); }

inline __m256 fold(F32 x) {
  return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
}

// out[i] = sum of the lanes of the i-th argument. All four are summed by the same tree.
inline void reduce4(float* out, F32 a, F32 b, F32 c, F32 d) {
  const __m256 a8 = fold(a), b8 = fold(b), c8 = fold(c), d8 = fold(d);
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a8, b8), _mm256_unpackhi_ps(a8, b8));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c8, d8), _mm256_unpackhi_ps(c8, d8));
  const __m256 abcd =
      _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
}

#if DUALHEAD_NATIVE_BF16
// 32 products of pairs per instruction, summed in fp32. Denormals count as zero.
struct NativeBf16Product {
  static constexpr int kStep = 32;
  typedef __m512i Vector;
  static Vector load(const BFloat16* p) { return _mm512_loadu_si512(p); }
  static Vector load_partial(const BFloat16* p, int64_t n) {
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), p);
  }
  static F32 accumulate(F32 sum, Vector w, Vector x) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
  }
};
#endif
