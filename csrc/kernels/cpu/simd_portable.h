// SPDX-License-Identifier: Apache-2.0
// Plain C++ with the compiler's 16-byte vectors: SSE2 on any x86-64, NEON on ARM. No intrinsics.

constexpr int kLanes = 4;
constexpr int kMaxBatchTile = 2;  // registers: 8 sums, 2 operands, 1 weight of 16
constexpr bool kNativeBf16 = false;

typedef float F32 __attribute__((vector_size(16)));
typedef int32_t I32 __attribute__((vector_size(16)));
typedef uint16_t U16 __attribute__((vector_size(8)));

inline F32 load(const float* p) {
  F32 x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}
inline void store(float* p, F32 x) { __builtin_memcpy(p, &x, sizeof(x)); }
inline F32 load(const BFloat16* p) {
  U16 x;
  __builtin_memcpy(&x, p, sizeof(x));
  return reinterpret_cast<F32>(__builtin_convertvector(x, I32) << 16);
}
// Loads four bytes as one word and shifts them apart, because no machine has four-byte vector
// registers.
inline I32 load_bytes(const void* p) {
  uint32_t x;
  __builtin_memcpy(&x, p, sizeof(x));
  if constexpr (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__) x = __builtin_bswap32(x);
  const I32 all = I32{} + static_cast<int32_t>(x);
  return (all >> I32{0, 8, 16, 24}) & 255;
}
inline F32 load(const int8_t* p) {
  return __builtin_convertvector((load_bytes(p) ^ 128) - 128, F32);
}
// Moves the exponent to its position in a float. Subnormal values are multiples of 2^-9.
inline F32 load(const Fp8* p) {
  const I32 x = load_bytes(p), magnitude = x & 127;
  const F32 normal = reinterpret_cast<F32>((magnitude << 20) + (120 << 23));
  const F32 subnormal = __builtin_convertvector(magnitude, F32) * 0.001953125f;
  const F32 y = magnitude < 8 ? subnormal : normal;
  return reinterpret_cast<F32>(reinterpret_cast<I32>(y) | (x & 128) << 24);
}
inline void load_pairs(const Int4Pair* p, F32& low, F32& high) {
  const I32 x = load_bytes(p);
  low = __builtin_convertvector((x & 15) - 8, F32);
  high = __builtin_convertvector((x >> 4) - 8, F32);
}
template <class T>
inline F32 load_partial(const T* p, int64_t n) {
  T padded[kLanes] = {};
  __builtin_memcpy(padded, p, n * sizeof(T));
  return load(padded);
}

inline F32 fma(F32 a, F32 b, F32 c) { return a * b + c; }

inline float reduce_add(F32 x) { return (x[0] + x[2]) + (x[1] + x[3]); }
inline float reduce_max(F32 x) {
  const float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
  return a > b ? a : b;
}

// out[i] = sum of the lanes of the i-th argument. All four are summed by the same tree.
inline void reduce4(float* out, F32 a, F32 b, F32 c, F32 d) {
  out[0] = reduce_add(a);
  out[1] = reduce_add(b);
  out[2] = reduce_add(c);
  out[3] = reduce_add(d);
}
