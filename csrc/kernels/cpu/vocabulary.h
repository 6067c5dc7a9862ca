// SPDX-License-Identifier: Apache-2.0
// Both heads over the vocabulary and their mixture, one unit of kUnit rows at a time. Each weight
// is read from memory once per step, and from cache once per kBatchBlock rows of hidden states.
// Included inside a target region.

// For few requests, this many units of one matrix are read before those of the next, because longer
// contiguous reads are faster. With 4 units instead of 1, one request took 0.86 to 0.92 of the time
// in int4, 0.93 to 0.97 in int8, 0.92 to 0.95 in fp32. With 16 instead of 4 it took a further 0.93,
// 0.95 and 0.96; 32 gained nothing more. But 4 and 8 requests in fp32 took 1.03 and 1.06.
constexpr int64_t kRun = 16;

// Logits of one run of units before the mixture: `rows` for each row of hidden states in a block.
// Rows beyond the vocabulary and those of a head that is not read are unspecified. For a low-rank
// correction rm holds delta.
struct RunLogits {
  float lm[kBatchBlock * kUnit];
  float rm[kBatchBlock * kUnit];
  int64_t rows;
};
static_assert(kFewRequests * kRun <= kBatchBlock, "runs of few requests fit");
static_assert(kBatchBlock % 2 == 0, "both rows of a request are in one block");

// Row v of matrix m (0: the LM head; m >= 1: objective m - 1). Beyond the vocabulary: its last row.
template <class W>
inline const W* head_row(const DecodeParams& p, int64_t m, int64_t v) {
  v = smaller(v, p.V - 1);
  return m == 0 ? static_cast<const W*>(p.lm_weight) + v * p.lm_weight_stride
                : static_cast<const W*>(p.reward_weight) + (m - 1) * p.reward_weight_stride_k +
                      v * p.reward_weight_stride;
}

// The first of row v's `count` scales, if the rows are quantised.
inline const float* head_scale(const DecodeParams& p, int64_t m, int64_t v, int64_t count) {
  const float* first = m == 0 ? p.lm_scale : p.reward_scale + (m - 1) * p.V * count;
  return first + smaller(v, p.V - 1) * count;
}

template <class W>
struct ScaleOf {  // one scale for the whole row
  static float at(const DecodeParams& p, int64_t m, int64_t v) { return *head_scale(p, m, v, 1); }
};
struct NoScale {
  static float at(const DecodeParams&, int64_t, int64_t) { return 1.0f; }
};
template <>
struct ScaleOf<float> : NoScale {};
template <>
struct ScaleOf<BFloat16> : NoScale {};
template <>
struct ScaleOf<Int4Pair> : NoScale {};

template <class W>
inline void find_row(const DecodeParams& p, int64_t m, int64_t v, const W*& row) {
  row = head_row<W>(p, m, v);
}
inline void find_row(const DecodeParams& p, int64_t m, int64_t v, Int4Row& row) {
  row = {head_row<Int4Pair>(p, m, v), head_scale(p, m, v, p.d / kInt4Group)};
}

// The rows of matrix m from v on.
struct Place {
  int64_t m, v;
};

// Logits of `groups` groups of 4 weight rows for rows [b0, b0 + batch) of hidden states. `next` is
// where the following weight rows start.
template <class W, class X>
void dot_groups(const Step& s, Place at, int64_t groups, Place next, int64_t b0, int64_t batch,
                int64_t in_run, RunLogits& z) {
  const DecodeParams& p = *s.params;
  const auto [m, v] = at;
  typename Tile<W, X>::Row rows[4 * kMaxGroups];
  for (int64_t r = 0; r < 4 * groups; ++r) find_row(p, m, v + r, rows[r]);
  const int64_t stride = Hidden<W, X>::stride(s);
  const X* x = Hidden<W, X>::data(s) + b0 * stride;
  float out[kBatchBlock][4 * kMaxGroups];
  dot_rows<W, X>(rows, groups, head_row<W>(p, next.m, next.v), x, stride, batch, p.d, out);

  const void* bias = m == 0 ? p.lm_bias : p.reward_bias;
  for (int64_t r = 0; r < 4 * groups; ++r) {
    const float scale = ScaleOf<W>::at(p, m, v + r);
    const int64_t row = smaller(v + r, p.V - 1);
    const float bias_r = bias_at(bias, p.dtype, m == 0 ? row : (m - 1) * p.V + row);
    for (int64_t b = 0; b < batch; ++b) {
      const float logit = out[b][r] * scale + bias_r;
      const int64_t at = b * z.rows + in_run + r;
      if (m == 0) {
        z.lm[at] = logit;
      } else {
        add_objective(p, b0 + b, m - 1, logit, z.rm + at);
      }
    }
  }
}

// Objective k's delta of `count` vocabulary rows from v on, accumulated in z.rm.
template <class W>
void correct_logits(const Step& s, int64_t k, int64_t v, int64_t count, int64_t b0, int64_t batch,
                    RunLogits& z) {
  float out[kBatchBlock][4 * kMaxGroups];
  for (int64_t first = 0, rows; first < count; first += rows) {
    rows = smaller(4 * kMaxGroups, count - first);
    correct_rows<W>(s, k, s.params->V, v + first, rows, b0, batch, out);
    for (int64_t b = 0; b < batch; ++b) {
      float* to = z.rm + b * z.rows + first;
      for (int64_t i = 0; i < rows; ++i) add_objective(*s.params, b0 + b, k, out[b][i], to + i);
    }
  }
}

// f(z) = cap(scale * z), cap(z) = c tanh(z / c).
inline F32 postprocess(const DecodeParams& p, F32 z) {
  if (p.logit_scale != 1.0f) z = z * p.logit_scale;
  if (p.logit_softcap > 0.0f) z = tanh_any(z / p.logit_softcap) * p.logit_softcap;
  return z;
}

// -inf beyond the vocabulary: it has no mass and is never the largest.
inline void pad_unit(float* z, int64_t count) {
  for (int64_t v = count; v < kUnit; ++v) z[v] = -__builtin_inff();
}

// One request's unit of a logits mix: writes f of the mixture to out_logits, and its softmax sums.
inline void finish_mixture(const Step& s, int64_t unit, int64_t b, float* lm, const float* rm) {
  const DecodeParams& p = *s.params;
  const int64_t count = smaller(kUnit, p.V - unit * kUnit);
  // An embedding head's mixture is already in the hidden state that the LM head multiplied, unless
  // the products are given.
  const bool mixed = p.reward_head == RewardHead::kEmbedding && !p.lm_product;
  const float a = mixed ? 0.0f : p.out_alpha[b];
  const float kept = p.reward_head == RewardHead::kFull ? 1.0f - a : 1.0f;
  for (int64_t v = 0; v < kUnit; v += kLanes) {
    // Selects instead of multiplying by 0, so that an infinity in the unused head does not matter.
    F32 z = load(lm + v);
    if (a == 1.0f && kept == 0.0f) {
      z = load(rm + v);
    } else if (a != 0.0f) {
      z = fma(splat(a), load(rm + v), z * kept);
    }
    store(lm + v, postprocess(p, z));
  }
  pad_unit(lm, count);
  __builtin_memcpy(p.out_logits + b * p.V + unit * kUnit, lm, count * sizeof(float));
  const int64_t at = b * units(p.V, kUnit) + unit;
  softmax_sums(lm, s.unit_max + at, s.unit_sum + at);
}

// One request's unit of the probability mix: writes f of both heads separately, and their softmax
// sums.
inline void finish_apart(const Step& s, int64_t unit, int64_t b, float* lm, float* rm) {
  const DecodeParams& p = *s.params;
  const int64_t count = smaller(kUnit, p.V - unit * kUnit);
  const bool corrects = p.reward_head == RewardHead::kLowRank ||
                        (p.reward_head == RewardHead::kEmbedding && p.lm_product);
  for (int64_t v = 0; v < kUnit; v += kLanes) {
    const F32 z_lm = load(lm + v);
    const F32 z_rm = corrects ? z_lm + load(rm + v) : load(rm + v);
    store(lm + v, postprocess(p, z_lm));
    store(rm + v, postprocess(p, z_rm));
  }
  pad_unit(lm, count);
  pad_unit(rm, count);
  __builtin_memcpy(p.out_logits + b * p.V + unit * kUnit, lm, count * sizeof(float));
  __builtin_memcpy(s.reward_logits + b * p.V + unit * kUnit, rm, count * sizeof(float));
  const int64_t at = b * units(p.V, kUnit) + unit;
  softmax_sums(lm, s.unit_max + at, s.unit_sum + at);
  softmax_sums(rm, s.rm_unit_max + at, s.rm_unit_sum + at);
}

// Finishes one unit of a run, for rows [b0, b0 + batch) of hidden states.
inline void finish_unit(const Step& s, int64_t unit, int64_t b0, int64_t batch, RunLogits& z,
                        int64_t in_run) {
  for (int64_t b = 0; b < batch; b += s.hidden_rows) {
    float* lm = z.lm + b * z.rows + in_run;
    float* rm = s.hidden_rows == 2 ? lm + z.rows : z.rm + b * z.rows + in_run;
    const int64_t request = (b0 + b) / s.hidden_rows;
    if (s.params->mix_probs) {
      finish_apart(s, unit, request, lm, rm);
    } else {
      finish_mixture(s, unit, request, lm, rm);
    }
  }
}

template <class W, class X = typename OperandOf<W>::Type>
void vocabulary_units(const Step& s, int64_t begin, int64_t end) {
  const DecodeParams& p = *s.params;
  const bool corrects = p.reward_head == RewardHead::kLowRank;
  const int64_t hidden_rows = p.B * s.hidden_rows, end_head = corrects ? 1 : s.end_matrix;
  RunLogits z = {};
  for (int64_t unit = begin, run; unit < end; unit += run) {
    run = smaller(hidden_rows <= kFewRequests ? kRun : 1, end - unit);
    z.rows = run * kUnit;
    const int64_t first = unit * kUnit, last = smaller(first + z.rows, p.V);
    for (int64_t b0 = 0; b0 < hidden_rows; b0 += kBatchBlock) {
      const int64_t batch = smaller(kBatchBlock, hidden_rows - b0);
      for (int64_t m = s.first_matrix; m < end_head; ++m) {
        const bool more = m + 1 < end_head;
        const Place after = more ? Place{m + 1, first} : Place{s.first_matrix, last};
        for (int64_t v = first, groups; v < last; v += 4 * groups) {
          groups = smaller(groups_at_once<Tile<W, X>, X>(batch, p.d), units(last - v, 4));
          const Place next = v + 4 * groups < last ? Place{m, v + 4 * groups} : after;
          dot_groups<W, X>(s, {m, v}, groups, next, b0, batch, v - first, z);
        }
      }
      for (int64_t m = end_head; m < s.end_matrix; ++m) {
        if (p.dtype == DType::kFloat32) {
          correct_logits<float>(s, m - 1, first, last - first, b0, batch, z);
        } else {
          correct_logits<BFloat16>(s, m - 1, first, last - first, b0, batch, z);
        }
      }
      for (int64_t u = 0; u < run; ++u) finish_unit(s, unit + u, b0, batch, z, u * kUnit);
    }
  }
}

// Units of quantised heads. Uses hidden states packed in the format's order if the instruction set
// has such tiles.
template <class W>
void quantized_units(const Step& s, int64_t begin, int64_t end) {
#if DUALHEAD_TILES
  if (s.hidden_packed) return vocabulary_units<W, TiledFor<W>>(s, begin, end);
#elif DUALHEAD_NATIVE_BF16
  if (s.hidden_packed) return vocabulary_units<W, PackedFor<W>>(s, begin, end);
#endif
  vocabulary_units<W>(s, begin, end);
}

void vocabulary(const Step& s, int64_t begin, int64_t end) {
  switch (s.params->quantization) {
    case Quantization::kInt8:
      return quantized_units<int8_t>(s, begin, end);
    case Quantization::kFp8:
      return quantized_units<Fp8>(s, begin, end);
    case Quantization::kInt4:
      return quantized_units<Int4Pair>(s, begin, end);
    default:
      break;
  }
  if (s.params->dtype == DType::kFloat32) {
    vocabulary_units<float>(s, begin, end);
  } else {
    vocabulary_units<BFloat16>(s, begin, end);
  }
}

// The products of both heads are given: adds the biases, and finishes each unit.
void mix_products(const Step& s, int64_t begin, int64_t end) {
  const DecodeParams& p = *s.params;
  // An embedding head's bias c is in its product.
  const void* bias = p.reward_head == RewardHead::kEmbedding ? nullptr : p.reward_bias;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit * kUnit, count = smaller(kUnit, p.V - first);
    for (int64_t b = 0; b < p.B; ++b) {
      float lm[kUnit] = {}, rm[kUnit] = {};
      const float* product = p.lm_product + b * p.V + first;
      for (int64_t v = 0; v < count; ++v) {
        lm[v] = product[v] + bias_at(p.lm_bias, p.dtype, first + v);
      }
      for (int64_t k = 0; k < p.K; ++k) {
        product = p.reward_product + (k * p.B + b) * p.V + first;
        for (int64_t v = 0; v < count; ++v) {
          add_objective(p, b, k, product[v] + bias_at(bias, p.dtype, k * p.V + first + v), rm + v);
        }
      }
      if (p.mix_probs) {
        finish_apart(s, unit, b, lm, rm);
      } else {
        finish_mixture(s, unit, b, lm, rm);
      }
    }
  }
}

// --- second pass of the probability mix ----------------------------------------------------------

// log((1-a) e^lm + a e^rm) of log-probabilities; log_keep = log(1-a), log_a = log(a).
inline F32 log_mixture(F32 lm, F32 rm, float log_keep, float log_a) {
  const F32 x = lm + log_keep, y = rm + log_a;
  const F32 high = x > y ? x : y, low = x > y ? y : x;
  const F32 difference = low - high;
  // If both are -inf, the difference is NaN and the result is -inf. A NaN on either side gives NaN.
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
