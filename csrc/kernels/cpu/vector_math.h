// SPDX-License-Identifier: Apache-2.0
// exp, log, tanh and softmax sums on vectors, the same code for every instruction set. The
// polynomials are those of Cephes (Moshier), with errors of about one ulp of fp32. Included inside
// a target region.

inline F32 splat(float x) { return x - F32{}; }

inline I32 as_int(F32 x) { return reinterpret_cast<I32>(x); }
inline F32 as_float(I32 x) { return reinterpret_cast<F32>(x); }

// exp(x) for x <= 0 and NaN. Below -87 the result is 0, too small to change a sum that has a term
// of 1.
inline F32 exp_nonpositive(F32 x) {
  const F32 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const F32 n = fma(x, splat(1.44269504f), magic) - magic;
  F32 r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  F32 p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  const F32 y = fma(p, r * r, r) + 1.0f;
  // n is in the low bits of n + magic. Unsigned, because the sum wraps if x is far below -87.
  typedef uint32_t U32 __attribute__((vector_size(sizeof(F32))));
  const U32 exponent = reinterpret_cast<U32>(n + magic) << 23;
  const F32 result = reinterpret_cast<F32>(reinterpret_cast<U32>(y) + exponent);
  return x < -87.0f ? F32{} : result;
}

// log(x) for normal x > 0.
inline F32 log_positive(F32 x) {
  const I32 root_half = I32{} + 0x3F3504F3;
  const I32 shifted = as_int(x) - root_half;
  const F32 e = __builtin_convertvector(shifted >> 23, F32);
  const F32 f = as_float((shifted & 0x007FFFFF) + root_half) - 1.0f;
  const F32 z = f * f;
  F32 p = splat(7.0376836292e-2f);
  p = fma(p, f, splat(-1.1514610310e-1f));
  p = fma(p, f, splat(1.1676998740e-1f));
  p = fma(p, f, splat(-1.2420140846e-1f));
  p = fma(p, f, splat(1.4249322787e-1f));
  p = fma(p, f, splat(-1.6668057665e-1f));
  p = fma(p, f, splat(2.0000714765e-1f));
  p = fma(p, f, splat(-2.4999993993e-1f));
  p = fma(p, f, splat(3.3333331174e-1f));
  F32 y = fma(f * z, p, e * splat(-2.12194440e-4f));
  y = fma(z, splat(-0.5f), y);
  return fma(e, splat(0.693359375f), f + y);
}

// log(1 + x) for x in [0, 1], and NaN.
inline F32 log1p_unit(F32 x) {
  const F32 u = x + 1.0f;
  const F32 y = log_positive(u) + (x - (u - 1.0f)) / u;
  return x != x ? x : y;
}

inline F32 tanh_any(F32 x) {
  const F32 magnitude = as_float(as_int(x) & 0x7FFFFFFF);
  const F32 e = exp_nonpositive(magnitude * -2.0f);
  const F32 large = (1.0f - e) / (1.0f + e);
  const F32 z = x * x;
  F32 p = splat(-5.70498872745e-3f);
  p = fma(p, z, splat(2.06390887954e-2f));
  p = fma(p, z, splat(-5.37397155531e-2f));
  p = fma(p, z, splat(1.33314422036e-1f));
  p = fma(p, z, splat(-3.33332819422e-1f));
  const F32 small = fma(p, z * x, x);
  const F32 signed_large = x < 0.0f ? -large : large;
  return magnitude < 0.625f ? small : signed_large;  // NaN takes the second and stays NaN
}

// The larger of the two; a NaN in x is ignored.
inline F32 max_skipping_nan(F32 best, F32 x) { return x > best ? x : best; }

// What one unit's logits z (kUnit of them, -inf beyond the vocabulary) add to a log-sum-exp: their
// maximum and sum exp(z - maximum). NaN and +inf make the sum NaN.
inline void softmax_sums(const float* z, float* max_out, float* sum_out) {
  F32 best = splat(-__builtin_inff());
  for (int64_t v = 0; v < kUnit; v += kLanes) best = max_skipping_nan(best, load(z + v));
  const float max = reduce_max(best);
  const F32 shift = splat(max == -__builtin_inff() ? 0.0f : max);  // -inf - (-inf) would be NaN
  F32 sum = {};
  for (int64_t v = 0; v < kUnit; v += kLanes) sum = sum + exp_nonpositive(load(z + v) - shift);
  *max_out = max;
  *sum_out = reduce_add(sum);
}
