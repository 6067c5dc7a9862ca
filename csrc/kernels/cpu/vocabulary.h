// SPDX-License-Identifier: Apache-2.0
// Both heads over the vocabulary, and their mixture, a unit of kUnit rows at a time. Each weight is
// read from memory once per step (once per kBatchBlock requests from cache). Included inside a
// target region.

// One unit's logits before the mixture, per request of a block; rows beyond the vocabulary hold
// anything, those of a head that is not read some number.
struct UnitLogits {
  float lm[kBatchBlock][kUnit];
  float rm[kBatchBlock][kUnit];
};

inline float bias_at(const void* bias, DType dtype, int64_t i) {
  if (!bias) return 0.0f;
  return dtype == DType::kFloat32 ? static_cast<const float*>(bias)[i]
                                  : to_float(static_cast<const BFloat16*>(bias)[i]);
}

template <class W>
struct IsQuantized {
  static constexpr bool kRows = false;  // a scale per row
};
template <>
struct IsQuantized<int8_t> {
  static constexpr bool kRows = true;
};
template <>
struct IsQuantized<Fp8> {
  static constexpr bool kRows = true;
};

// The products of dot_group, with the scales of quantised rows.
template <class W, class X>
void head_rows(const Step& s, int64_t m, int64_t v, const W* const* rows, int64_t ahead, const X* x,
               int64_t batch, float (*out)[4]) {
  const DecodeParams& p = *s.params;
  dot_rows<W, X>(rows, ahead, x, Hidden<W, X>::stride(s), batch, p.d, out);
  if constexpr (IsQuantized<W>::kRows) {
    const float* scale = m == 0 ? p.lm_scale : p.reward_scale + (m - 1) * p.V;
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t r = 0; r < 4; ++r) out[b][r] *= scale[smaller(v + r, p.V - 1)];
    }
  }
}
template <>
inline void head_rows<Int4Pair, float>(const Step& s, int64_t m, int64_t v,
                                       const Int4Pair* const* rows, int64_t ahead, const float* x,
                                       int64_t batch, float (*out)[4]) {
  const DecodeParams& p = *s.params;
  const int64_t groups = p.d / kInt4Group;
  const float* first = m == 0 ? p.lm_scale : p.reward_scale + (m - 1) * p.V * groups;
  const float* scales[4];
  for (int64_t r = 0; r < 4; ++r) scales[r] = first + smaller(v + r, p.V - 1) * groups;
  int4_rows(rows, scales, ahead, x, Hidden<Int4Pair, float>::stride(s), batch, p.d, out);
}

// One matrix (m = 0: the LM head; m >= 1: objective m - 1), rows [v, v + 4), requests [b0, b0 +
// batch).
template <class W>
void dot_group(const Step& s, int64_t m, int64_t v, int64_t b0, int64_t batch, int64_t in_unit,
               UnitLogits& z) {
  typedef typename OperandOf<W>::Type X;
  const DecodeParams& p = *s.params;
  const int64_t stride = m == 0 ? p.lm_weight_stride : p.reward_weight_stride;
  const W* matrix =
      m == 0 ? static_cast<const W*>(p.lm_weight)
             : static_cast<const W*>(p.reward_weight) + (m - 1) * p.reward_weight_stride_k;
  const W* rows[4];
  for (int64_t r = 0; r < 4; ++r) rows[r] = matrix + smaller(v + r, p.V - 1) * stride;
  const X* x = Hidden<W, X>::data(s) + b0 * Hidden<W, X>::stride(s);
  float out[kBatchBlock][4];
  head_rows<W, X>(s, m, v, rows, 4 * stride * sizeof(W), x, batch, out);

  const void* bias = m == 0 ? p.lm_bias : p.reward_bias;
  float bias4[4];
  for (int64_t r = 0; r < 4; ++r) {
    bias4[r] = bias_at(bias, p.dtype, (m == 0 ? 0 : (m - 1) * p.V) + smaller(v + r, p.V - 1));
  }
  for (int64_t b = 0; b < batch; ++b) {
    float* row = (m == 0 ? z.lm[b] : z.rm[b]) + in_unit;
    if (m == 0 || (p.K == 1 && !p.objective_weights)) {
      for (int r = 0; r < 4; ++r) row[r] = out[b][r] + bias4[r];
      continue;
    }
    const float weight = p.objective_weights ? p.objective_weights[(b0 + b) * p.K + m - 1]
                                             : 1.0f / static_cast<float>(p.K);
    for (int r = 0; r < 4; ++r) {
      const float term = weight * (out[b][r] + bias4[r]);
      row[r] = m == 1 ? term : row[r] + term;
    }
  }
}

// f(z) = cap(scale * z), cap(z) = c tanh(z / c).
inline F32 postprocess(const DecodeParams& p, F32 z) {
  if (p.logit_scale != 1.0f) z = z * p.logit_scale;
  if (p.logit_softcap > 0.0f) z = tanh_any(z / p.logit_softcap) * p.logit_softcap;
  return z;
}

// -inf beyond the vocabulary: no mass, never the largest.
inline void pad_unit(float* z, int64_t count) {
  for (int64_t v = count; v < kUnit; ++v) z[v] = -__builtin_inff();
}

// One request's unit: f of the mixture, to out_logits, with its softmax sums.
inline void finish_mixture(const Step& s, int64_t unit, int64_t b, float* lm, const float* rm) {
  const DecodeParams& p = *s.params;
  const int64_t count = smaller(kUnit, p.V - unit * kUnit);
  const float a = p.out_alpha[b];
  for (int64_t v = 0; v < kUnit; v += kLanes) {
    // Selected, not multiplied by 0: an infinity in the head that is switched off does not matter.
    F32 z = load(lm + v);
    if (a == 1.0f) {
      z = load(rm + v);
    } else if (a != 0.0f) {
      z = fma(splat(a), load(rm + v), z * (1.0f - a));
    }
    store(lm + v, postprocess(p, z));
  }
  pad_unit(lm, count);
  __builtin_memcpy(p.out_logits + b * p.V + unit * kUnit, lm, count * sizeof(float));
  const int64_t at = b * units(p.V, kUnit) + unit;
  softmax_sums(lm, s.unit_max + at, s.unit_sum + at);
}

// One request's unit for the probability mix: f of both heads, kept apart, with their sums.
inline void finish_apart(const Step& s, int64_t unit, int64_t b, float* lm, float* rm) {
  const DecodeParams& p = *s.params;
  const int64_t count = smaller(kUnit, p.V - unit * kUnit);
  for (int64_t v = 0; v < kUnit; v += kLanes) {
    store(lm + v, postprocess(p, load(lm + v)));
    store(rm + v, postprocess(p, load(rm + v)));
  }
  pad_unit(lm, count);
  pad_unit(rm, count);
  __builtin_memcpy(p.out_logits + b * p.V + unit * kUnit, lm, count * sizeof(float));
  __builtin_memcpy(s.reward_logits + b * p.V + unit * kUnit, rm, count * sizeof(float));
  const int64_t at = b * units(p.V, kUnit) + unit;
  softmax_sums(lm, s.unit_max + at, s.unit_sum + at);
  softmax_sums(rm, s.rm_unit_max + at, s.rm_unit_sum + at);
}

template <class W>
void vocabulary_units(const Step& s, int64_t begin, int64_t end) {
  const DecodeParams& p = *s.params;
  UnitLogits z = {};
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit * kUnit, last = smaller(first + kUnit, p.V);
    for (int64_t b0 = 0; b0 < p.B; b0 += kBatchBlock) {
      const int64_t batch = smaller(kBatchBlock, p.B - b0);
      for (int64_t v = first; v < last; v += 4) {
        for (int64_t m = s.first_matrix; m < s.end_matrix; ++m) {
          dot_group<W>(s, m, v, b0, batch, v - first, z);
        }
      }
      for (int64_t b = 0; b < batch; ++b) {
        if (p.mix_probs) {
          finish_apart(s, unit, b0 + b, z.lm[b], z.rm[b]);
        } else {
          finish_mixture(s, unit, b0 + b, z.lm[b], z.rm[b]);
        }
      }
    }
  }
}

void vocabulary(const Step& s, int64_t begin, int64_t end) {
  switch (s.params->quantization) {
    case Quantization::kInt8:
      return vocabulary_units<int8_t>(s, begin, end);
    case Quantization::kFp8:
      return vocabulary_units<Fp8>(s, begin, end);
    case Quantization::kInt4:
      return vocabulary_units<Int4Pair>(s, begin, end);
    default:
      break;
  }
  if (s.params->dtype == DType::kFloat32) {
    vocabulary_units<float>(s, begin, end);
  } else {
    vocabulary_units<BFloat16>(s, begin, end);
  }
}

// --- second pass of the probability mix
// -------------------------------------------------------------

// log((1-a) e^lm + a e^rm) of log-probabilities; log_keep = log(1-a), log_a = log(a).
inline F32 log_mixture(F32 lm, F32 rm, float log_keep, float log_a) {
  const F32 x = lm + log_keep, y = rm + log_a;
  const F32 high = x > y ? x : y, low = x > y ? y : x;
  const F32 difference = low - high;
  // Both -inf: the difference is NaN and the result is -inf. A NaN on either side stays NaN in low.
  const F32 sum = high + log1p_unit(exp_nonpositive(difference));
  const F32 nan = low + high;
  return nan != nan ? nan : (high == -__builtin_inff() ? high : sum);
}

void mix_probabilities(const Step& s, int64_t begin, int64_t end) {
  const DecodeParams& p = *s.params;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit * kUnit, count = smaller(kUnit, p.V - first);
    for (int64_t b = 0; b < p.B; ++b) {
      float lm[kUnit] = {}, rm[kUnit] = {};
      float* out = p.out_logits + b * p.V + first;
      __builtin_memcpy(lm, out, count * sizeof(float));
      __builtin_memcpy(rm, s.reward_logits + b * p.V + first, count * sizeof(float));
      const float a = p.out_alpha[b];
      const float log_keep = __builtin_log1pf(-a), log_a = __builtin_logf(a);
      for (int64_t v = 0; v < kUnit; v += kLanes) {
        const F32 lp_lm = (load(lm + v) - s.lm_shift[2 * b]) - s.lm_shift[2 * b + 1];
        const F32 lp_rm = (load(rm + v) - s.rm_shift[2 * b]) - s.rm_shift[2 * b + 1];
        F32 z = a == 1.0f ? lp_rm : lp_lm;
        if (a != 0.0f && a != 1.0f) z = log_mixture(lp_lm, lp_rm, log_keep, log_a);
        store(lm + v, z);
      }
      pad_unit(lm, count);
      __builtin_memcpy(out, lm, count * sizeof(float));
      const int64_t at = b * units(p.V, kUnit) + unit;
      softmax_sums(lm, s.unit_max + at, s.unit_sum + at);
    }
  }
}
