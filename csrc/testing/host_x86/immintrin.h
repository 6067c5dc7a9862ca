// SPDX-License-Identifier: Apache-2.0
// The intrinsics that the kernels for AVX-512 and AMX use, in plain C++, so that tests run these
// kernels on any machine. It replaces the compiler's header of the same name where
// DUALHEAD_EMULATED is defined. Results have the bits of the instructions, except that
// _mm512_reduce_add_ps need not add in the same order as a compiler's.
//
// Loads and stores touch exactly the bytes of the instructions, so that AddressSanitizer finds
// those out of bounds.
#pragma once

#ifndef DUALHEAD_EMULATED
#error "define DUALHEAD_EMULATED: the kernels must not be compiled for the real instructions"
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

typedef float __m128 __attribute__((vector_size(16)));
typedef float __m256 __attribute__((vector_size(32)));
typedef float __m512 __attribute__((vector_size(64)));
typedef long long __m128i __attribute__((vector_size(16)));
typedef long long __m256i __attribute__((vector_size(32)));
typedef long long __m512i __attribute__((vector_size(64)));
typedef short __m512bh __attribute__((vector_size(64)));
typedef uint16_t __mmask16;
typedef uint32_t __mmask32;
typedef uint64_t __mmask64;

namespace host_x86 {

// The lanes of a vector. Assigning to an element of the vector itself is lost under GCC 12's UBSan.
template <class T, class V>
struct Lanes {
  static constexpr int kCount = sizeof(V) / sizeof(T);
  T at[kCount];
  Lanes() : at() {}
  explicit Lanes(V v) { std::memcpy(at, &v, sizeof(V)); }
  operator V() const {
    V v;
    std::memcpy(&v, at, sizeof(V));
    return v;
  }
};

template <class V>
V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

// The lanes whose bit in `mask` is set; the others are 0 and are not read.
template <class T, class V>
V load_masked(uint64_t mask, const void* from) {
  Lanes<T, V> to;
  for (int i = 0; i < to.kCount; ++i) {
    if (mask >> i & 1) std::memcpy(to.at + i, static_cast<const T*>(from) + i, sizeof(T));
  }
  return to;
}

template <class From, class To, class V, class W>
V convert(W x) {
  const Lanes<From, W> from(x);
  Lanes<To, V> to;
  for (int i = 0; i < to.kCount; ++i) to.at[i] = static_cast<To>(from.at[i]);
  return to;
}

template <class T, class V, class F>
V map(V x, F f) {
  Lanes<T, V> lanes(x);
  for (T& value : lanes.at) value = static_cast<T>(f(value));
  return lanes;
}

template <class T, class V>
V splat(T value) {
  Lanes<T, V> lanes;
  for (T& lane : lanes.at) lane = value;
  return lanes;
}

inline float half_to_float(uint16_t half) {
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  const float magnitude = exponent == 0    ? std::ldexp(static_cast<float>(fraction), -24)
                          : exponent == 31 ? (fraction ? NAN : INFINITY)
                                           : std::ldexp(1024.0f + fraction, exponent - 25);
  return half & 0x8000 ? -magnitude : magnitude;
}

// --- bf16 products -------------------------------------------------------------------------------

// A denormal counts as zero.
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

inline float widened(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof(x));
  return flushed(x);
}

inline float multiply_add(uint16_t a, uint16_t b, float sum) {
  return flushed(std::fma(widened(a), widened(b), flushed(sum)));
}

// An instruction with these operands would be invalid: stop, as the processor does.
inline void require(bool holds) {
  if (!holds) __builtin_trap();
}

}  // namespace host_x86

// Not inlined: the kernels would take minutes to compile.
#define HOST_X86 __attribute__((noinline)) inline

// --- 128 and 256 bits ----------------------------------------------------------------------------

HOST_X86 __m128 _mm_add_ps(__m128 a, __m128 b) { return a + b; }
HOST_X86 void _mm_storeu_ps(float* to, __m128 x) { std::memcpy(to, &x, sizeof(x)); }
HOST_X86 __m128i _mm_loadu_si128(const __m128i* from) { return host_x86::load<__m128i>(from); }

HOST_X86 __m256 _mm256_add_ps(__m256 a, __m256 b) { return a + b; }
HOST_X86 __m128 _mm256_castps256_ps128(__m256 x) { return host_x86::load<__m128>(&x); }
HOST_X86 __m128 _mm256_extractf128_ps(__m256 x, int half) {
  return host_x86::load<__m128>(reinterpret_cast<const char*>(&x) + 16 * half);
}
HOST_X86 __m256 _mm256_unpacklo_ps(__m256 a, __m256 b) {
  return __m256{a[0], b[0], a[1], b[1], a[4], b[4], a[5], b[5]};
}
HOST_X86 __m256 _mm256_unpackhi_ps(__m256 a, __m256 b) {
  return __m256{a[2], b[2], a[3], b[3], a[6], b[6], a[7], b[7]};
}
HOST_X86 __m256 _mm256_shuffle_ps(__m256 a, __m256 b, int order) {
  const host_x86::Lanes<float, __m256> x(a), y(b);
  host_x86::Lanes<float, __m256> out;
  for (int half = 0; half < 8; half += 4) {
    for (int i = 0; i < 4; ++i) {
      out.at[half + i] = (i < 2 ? x : y).at[half + (order >> 2 * i & 3)];
    }
  }
  return out;
}
HOST_X86 __m256i _mm256_loadu_si256(const __m256i* from) { return host_x86::load<__m256i>(from); }
HOST_X86 __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* from) {
  return host_x86::load_masked<uint16_t, __m256i>(mask, from);
}
HOST_X86 __m256i _mm256_and_si256(__m256i a, __m256i b) { return a & b; }
HOST_X86 __m256i _mm256_set1_epi16(int16_t x) { return host_x86::splat<int16_t, __m256i>(x); }
HOST_X86 __m256i _mm256_slli_epi16(__m256i x, int count) {
  return host_x86::map<uint16_t>(x, [=](uint16_t lane) { return lane << count; });
}
HOST_X86 __m256i _mm256_cvtepi8_epi16(__m128i x) {
  return host_x86::convert<int8_t, int16_t, __m256i>(x);
}

// --- 512 bits: memory ----------------------------------------------------------------------------

HOST_X86 __m512 _mm512_loadu_ps(const void* from) { return host_x86::load<__m512>(from); }
HOST_X86 __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* from) {
  return host_x86::load_masked<float, __m512>(mask, from);
}
HOST_X86 void _mm512_storeu_ps(void* to, __m512 x) { std::memcpy(to, &x, sizeof(x)); }
HOST_X86 __m512i _mm512_loadu_si512(const void* from) { return host_x86::load<__m512i>(from); }
HOST_X86 __m512i _mm512_load_si512(const void* from) {
  host_x86::require(reinterpret_cast<uintptr_t>(from) % 64 == 0);
  return host_x86::load<__m512i>(from);
}
HOST_X86 void _mm512_store_si512(void* to, __m512i x) {
  host_x86::require(reinterpret_cast<uintptr_t>(to) % 64 == 0);
  std::memcpy(to, &x, sizeof(x));
}
HOST_X86 __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const void* from) {
  return host_x86::load_masked<uint16_t, __m512i>(mask, from);
}
HOST_X86 __m512i _mm512_maskz_loadu_epi8(__mmask64 mask, const void* from) {
  return host_x86::load_masked<uint8_t, __m512i>(mask, from);
}

// --- 512 bits: fp32 ------------------------------------------------------------------------------

HOST_X86 __m512 _mm512_set1_ps(float x) { return host_x86::splat<float, __m512>(x); }
HOST_X86 __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
HOST_X86 __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  const host_x86::Lanes<float, __m512> x(a), y(b);
  host_x86::Lanes<float, __m512> sum(c);
  for (int i = 0; i < 16; ++i) sum.at[i] = std::fma(x.at[i], y.at[i], sum.at[i]);
  return sum;
}
HOST_X86 __m256 _mm512_castps512_ps256(__m512 x) { return host_x86::load<__m256>(&x); }
HOST_X86 __m256 _mm512_extractf32x8_ps(__m512 x, int half) {
  return host_x86::load<__m256>(reinterpret_cast<const char*>(&x) + 32 * half);
}
HOST_X86 float _mm512_reduce_add_ps(__m512 lanes) {
  host_x86::Lanes<float, __m512> x(lanes);
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) x.at[i] += x.at[i + width];
  }
  return x.at[0];
}
// The second operand if either is NaN, like vmaxps.
HOST_X86 float _mm512_reduce_max_ps(__m512 lanes) {
  host_x86::Lanes<float, __m512> x(lanes);
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) {
      x.at[i] = x.at[i] > x.at[i + width] ? x.at[i] : x.at[i + width];
    }
  }
  return x.at[0];
}
HOST_X86 __m512 _mm512_dpbf16_ps(__m512 c, __m512bh a, __m512bh b) {
  const host_x86::Lanes<uint16_t, __m512bh> x(a), y(b);
  host_x86::Lanes<float, __m512> sum(c);
  for (int i = 0; i < 16; ++i) {
    const float odd = host_x86::multiply_add(x.at[2 * i + 1], y.at[2 * i + 1], sum.at[i]);
    sum.at[i] = host_x86::multiply_add(x.at[2 * i], y.at[2 * i], odd);
  }
  return sum;
}

// --- 512 bits: integers --------------------------------------------------------------------------

HOST_X86 __m512 _mm512_castsi512_ps(__m512i x) { return host_x86::load<__m512>(&x); }
HOST_X86 __m512i _mm512_set1_epi8(char x) { return host_x86::splat<char, __m512i>(x); }
HOST_X86 __m512i _mm512_set1_epi32(int x) { return host_x86::splat<int, __m512i>(x); }
HOST_X86 __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
HOST_X86 __m512i _mm512_sub_epi32(__m512i a, __m512i b) {
  host_x86::Lanes<uint32_t, __m512i> x(a);
  const host_x86::Lanes<uint32_t, __m512i> y(b);
  for (int i = 0; i < 16; ++i) x.at[i] -= y.at[i];
  return x;
}
HOST_X86 __m512i _mm512_slli_epi32(__m512i x, int count) {
  return host_x86::map<uint32_t>(x, [=](uint32_t lane) { return lane << count; });
}
HOST_X86 __m512i _mm512_srli_epi32(__m512i x, int count) {
  return host_x86::map<uint32_t>(x, [=](uint32_t lane) { return lane >> count; });
}
HOST_X86 __m512i _mm512_srli_epi16(__m512i x, int count) {
  return host_x86::map<uint16_t>(x, [=](uint16_t lane) { return lane >> count; });
}
HOST_X86 __m512i _mm512_abs_epi8(__m512i x) {
  return host_x86::map<int8_t>(x, [](int8_t lane) { return lane < 0 ? -lane : lane; });
}
HOST_X86 __m512i _mm512_cvtepi8_epi32(__m128i x) {
  return host_x86::convert<int8_t, int32_t, __m512i>(x);
}
HOST_X86 __m512i _mm512_cvtepu8_epi32(__m128i x) {
  return host_x86::convert<uint8_t, int32_t, __m512i>(x);
}
HOST_X86 __m512i _mm512_cvtepu16_epi32(__m256i x) {
  return host_x86::convert<uint16_t, int32_t, __m512i>(x);
}
HOST_X86 __m512 _mm512_cvtepi32_ps(__m512i x) {
  return host_x86::convert<int32_t, float, __m512>(x);
}
HOST_X86 __m512 _mm512_cvtph_ps(__m256i x) {
  const host_x86::Lanes<uint16_t, __m256i> half(x);
  host_x86::Lanes<float, __m512> out;
  for (int i = 0; i < 16; ++i) out.at[i] = host_x86::half_to_float(half.at[i]);
  return out;
}
HOST_X86 __mmask64 _mm512_cmpeq_epi8_mask(__m512i a, __m512i b) {
  const host_x86::Lanes<uint8_t, __m512i> x(a), y(b);
  __mmask64 mask = 0;
  for (int i = 0; i < 64; ++i) mask |= static_cast<__mmask64>(x.at[i] == y.at[i]) << i;
  return mask;
}
HOST_X86 __m512i _mm512_mask_mov_epi8(__m512i otherwise, __mmask64 mask, __m512i x) {
  host_x86::Lanes<uint8_t, __m512i> to(otherwise);
  const host_x86::Lanes<uint8_t, __m512i> from(x);
  for (int i = 0; i < 64; ++i) {
    if (mask >> i & 1) to.at[i] = from.at[i];
  }
  return to;
}
HOST_X86 __m512i _mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
  __m512i out{};
  for (int i = 0; i < 8; ++i) {
    if (table >> i & 1) out |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return out;
}
// Bits 0 to 5 of each index choose a byte, bit 6 chooses b.
HOST_X86 __m512i _mm512_permutex2var_epi8(__m512i a, __m512i index, __m512i b) {
  const host_x86::Lanes<uint8_t, __m512i> x(a), y(b);
  return host_x86::map<uint8_t>(index,
                                [&](uint8_t lane) { return (lane & 64 ? y : x).at[lane & 63]; });
}
HOST_X86 __m512i _mm512_permutexvar_epi16(__m512i index, __m512i a) {
  const host_x86::Lanes<uint16_t, __m512i> x(a);
  return host_x86::map<uint16_t>(index, [&](uint16_t lane) { return x.at[lane & 31]; });
}
// Interleaves the first (`from` = 0) or last (8) 8 bytes of each 16.
HOST_X86 __m512i unpack_epi8(__m512i a, __m512i b, int from) {
  const host_x86::Lanes<uint8_t, __m512i> x(a), y(b);
  host_x86::Lanes<uint8_t, __m512i> out;
  for (int i = 0; i < 64; i += 2) {
    const int at = i / 16 * 16 + from + i % 16 / 2;
    out.at[i] = x.at[at], out.at[i + 1] = y.at[at];
  }
  return out;
}
HOST_X86 __m512i _mm512_unpacklo_epi8(__m512i a, __m512i b) { return unpack_epi8(a, b, 0); }
HOST_X86 __m512i _mm512_unpackhi_epi8(__m512i a, __m512i b) { return unpack_epi8(a, b, 8); }

#undef HOST_X86

// kernels/cpu/tile_amx.h takes these.
#include "tile_emulated.h"
