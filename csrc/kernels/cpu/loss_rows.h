// SPDX-License-Identifier: Apache-2.0
// The elementwise part of the training loss, one row of logits at a time: log-probabilities of the
// labels, and gradients that overwrite the logits. Formulas: dualhead_ext/loss/rows.py. Included
// inside a target region.

// Terms of a row that are summed in fp32 before the sum is added to a double: at most 64 per lane.
constexpr int64_t kLossBlock = 64 * kLanes;

// f(z) = cap(scale * z), and its derivative from y = f(z).
struct PostProcess {
  float scale, cap;
  F32 value(F32 z) const {
    if (scale != 1.0f) z = z * scale;
    if (cap > 0.0f) z = tanh_any(z / cap) * cap;
    return z;
  }
  F32 slope(F32 y) const {
    if (cap <= 0.0f) return splat(scale);
    const F32 t = y / cap;
    return (1.0f - t * t) * scale;
  }
};

// (1 - s) z_LM + s z_RM.
inline F32 mix(LossShares shares, F32 z_lm, F32 z_rm) {
  if (shares.rm == 0.0f) return z_lm;
  if (shares.lm == 0.0f) return z_rm;
  return fma(splat(shares.rm), z_rm, z_lm * shares.lm);
}

// The logits that a distribution is over, kLanes at a time: those of one head, or of the mixture.
struct OneHead {
  const float* z;
  PostProcess post;
  F32 raw(int64_t v) const { return load(z + v); }
  F32 raw(int64_t v, int64_t n) const { return load_partial(z + v, n); }
};
struct Mixture {
  const float *lm, *rm;
  PostProcess post;
  LossShares shares;
  F32 raw(int64_t v) const { return mix(shares, load(lm + v), load(rm + v)); }
  F32 raw(int64_t v, int64_t n) const {
    return mix(shares, load_partial(lm + v, n), load_partial(rm + v, n));
  }
};

inline float first_lane(F32 x) { return x[0]; }

// f of the logits of the last, partial vector; -inf beyond the vocabulary.
template <class Source>
inline F32 tail_values(const Source& s, int64_t v, int64_t n) {
  float lanes[kLanes];
  store(lanes, s.post.value(s.raw(v, n)));
  for (int64_t i = n; i < kLanes; ++i) lanes[i] = -__builtin_inff();
  return load(lanes);
}

template <class Source>
double log_sum_exp(const Source& s, int64_t V) {
  const int64_t whole = V / kLanes * kLanes;
  F32 best = splat(-__builtin_inff());
  for (int64_t v = 0; v < whole; v += kLanes) best = max_skipping_nan(best, s.post.value(s.raw(v)));
  if (whole < V) best = max_skipping_nan(best, tail_values(s, whole, V - whole));
  const float max = reduce_max(best);
  const F32 shift = splat(max == -__builtin_inff() ? 0.0f : max);
  double total = 0.0;
  for (int64_t block = 0; block < whole; block += kLossBlock) {
    const int64_t end = smaller(block + kLossBlock, whole);
    F32 sum = {};
    for (int64_t v = block; v < end; v += kLanes) {
      sum = sum + exp_nonpositive(s.post.value(s.raw(v)) - shift);
    }
    total += static_cast<double>(reduce_add(sum));
  }
  if (whole < V) {
    total +=
        static_cast<double>(reduce_add(exp_nonpositive(tail_values(s, whole, V - whole) - shift)));
  }
  return static_cast<double>(first_lane(shift)) + __builtin_log(total);
}

template <class Source>
inline double value_at(const Source& s, int64_t v) {
  return static_cast<double>(first_lane(s.post.value(s.raw(v, 1))));
}

void loss_rows(const LossRowsParams& p, int64_t begin, int64_t end) {
  const PostProcess post{p.logit_scale, p.logit_softcap};
  for (int64_t n = begin; n < end; ++n) {
    const float* lm = p.z_lm ? p.z_lm + n * p.V : nullptr;
    const float* rm = p.z_rm + n * p.V;
    const int64_t y = p.labels[n];
    double of_reward = 0.0, rm_total = 0.0;
    if (p.reward || (p.mixed && p.mix_probs)) {
      const OneHead head{rm, post};
      rm_total = log_sum_exp(head, p.V);
      of_reward = value_at(head, y) - rm_total;
    }
    if (p.reward) {
      p.reward[n] = static_cast<float>(of_reward);
    }
    if (p.rm_normalizer) p.rm_normalizer[n] = rm_total;
    if (!p.mixed) continue;
    const LossShares shares = loss_shares(p.gate_logit[n]);
    if (!p.mix_probs) {
      const Mixture mixture{lm, rm, post, shares};
      const double total = log_sum_exp(mixture, p.V);
      p.mixed_normalizer[n] = total;
      p.mixed[n] = static_cast<float>(value_at(mixture, y) - total);
      continue;
    }
    const OneHead head{lm, post};
    const double total = log_sum_exp(head, p.V), of_lm = value_at(head, y) - total;
    p.mixed_normalizer[n] = total;
    p.mixed[n] = static_cast<float>(mixed_log_prob(p.gate_logit[n], shares, of_lm, of_reward));
  }
}

// --- gradients -----------------------------------------------------------------------------------

inline void store_partial(float* p, F32 x, int64_t n) {
  float lanes[kLanes];
  store(lanes, x);
  __builtin_memcpy(p, lanes, n * sizeof(float));
}

inline F32 softmax(SplitNormalizer total, F32 y) {
  return exp_nonpositive((y - total.high) - total.low);
}

// What turns kLanes logits of a row into their gradients. Returns the gate's terms.
struct RowGradient {
  PostProcess post;
  LossShares shares;
  bool mixes, mix_probs;
  float mixed, reward;  // upstream gradients
  SplitNormalizer mixed_total, rm_total;
  float to_lm, to_rm;  // probability mix: c (1 - q) and c q
  // label: 1 in the label's lane, else 0.
  F32 apply(F32& lm, F32& rm, F32 label) const {
    F32 gate = {}, out_rm = {};
    const F32 z_rm = rm;
    if (reward != 0.0f || (mixes && mix_probs)) {
      const F32 y = post.value(z_rm);
      const F32 each = (label - softmax(rm_total, y)) * post.slope(y);
      out_rm = each * (reward + (mixes && mix_probs ? to_rm : 0.0f));
    }
    if (mixes && mix_probs) {
      const F32 y = post.value(lm);
      lm = (label - softmax(mixed_total, y)) * post.slope(y) * to_lm;
    } else if (mixes) {
      const F32 y = post.value(mix(shares, lm, z_rm));
      const F32 dz = (label - softmax(mixed_total, y)) * post.slope(y) * mixed;
      if (!shares.selects()) gate = dz * (z_rm - lm);
      lm = dz * shares.lm;
      out_rm = out_rm + dz * shares.rm;
    }
    rm = out_rm;
    return gate;
  }
};

inline F32 label_lane(int64_t label, int64_t v) {
  float lanes[kLanes] = {};
  if (label >= v && label < v + kLanes) lanes[label - v] = 1.0f;
  return load(lanes);
}

inline double row_gradient(const RowGradient& g, float* lm, float* rm, bool write_lm, int64_t label,
                           int64_t V) {
  const int64_t whole = V / kLanes * kLanes;
  double gate = 0.0;
  for (int64_t block = 0; block < whole; block += kLossBlock) {
    const int64_t end = smaller(block + kLossBlock, whole);
    F32 sum = {};
    for (int64_t v = block; v < end; v += kLanes) {
      F32 a = lm ? load(lm + v) : F32{}, b = load(rm + v);
      const bool here = label >= v && label < v + kLanes;
      sum = sum + g.apply(a, b, here ? label_lane(label, v) : F32{});
      if (write_lm) store(lm + v, a);
      store(rm + v, b);
    }
    gate += static_cast<double>(reduce_add(sum));
  }
  if (whole < V) {
    const int64_t n = V - whole;
    F32 a = lm ? load_partial(lm + whole, n) : F32{}, b = load_partial(rm + whole, n);
    float terms[kLanes];
    store(terms, g.apply(a, b, label_lane(label, whole)));
    for (int64_t i = 0; i < n; ++i) gate += static_cast<double>(terms[i]);
    if (write_lm) store_partial(lm + whole, a, n);
    store_partial(rm + whole, b, n);
  }
  return gate;
}

void loss_rows_backward(const LossRowsParams& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const LossShares shares = loss_shares(p.mixed ? p.gate_logit[n] : 0.0f);
    RowGradient g{{p.logit_scale, p.logit_softcap},
                  shares,
                  p.mixed != nullptr,
                  p.mix_probs,
                  p.mixed ? p.mixed_grad[n] : 0.0f,
                  p.reward_grad ? p.reward_grad[n] : 0.0f,
                  split_normalizer(p.mixed ? p.mixed_normalizer[n] : 0.0),
                  split_normalizer(p.rm_normalizer[n]),
                  0.0f,
                  0.0f};
    float of_shares = 0.0f;
    if (p.mixed && p.mix_probs) {
      const OneHead lm_head{p.z_lm + n * p.V, g.post}, rm_head{p.z_rm + n * p.V, g.post};
      const double of_lm = value_at(lm_head, p.labels[n]) - p.mixed_normalizer[n];
      const double of_rm = value_at(rm_head, p.labels[n]) - p.rm_normalizer[n];
      const MixedGradient of_mix = mixed_gradient(p.gate_logit[n], shares, of_lm, of_rm, g.mixed);
      g.to_lm = of_mix.to_lm;
      g.to_rm = of_mix.to_rm;
      of_shares = of_mix.gate;
    }
    float* lm = p.z_lm ? p.z_lm + n * p.V : nullptr;
    const double gate = row_gradient(g, lm, p.z_rm + n * p.V, p.write_lm, p.labels[n], p.V);
    if (!p.gate_grad) continue;
    const double of_logits = gate * static_cast<double>(shares.rm) * static_cast<double>(shares.lm);
    p.gate_grad[n] = p.mix_probs        ? of_shares
                     : shares.selects() ? 0.0f
                                        : static_cast<float>(of_logits);
  }
}
