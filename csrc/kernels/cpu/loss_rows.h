// SPDX-License-Identifier: Apache-2.0
// The elementwise middle of the training loss, a row of logits at a time: log-probabilities of the
// labels, and the gradients of the logits in their place. Formulas: dualhead_ext/loss_rows.py.
// Included inside a target region.

// Terms of a row that are summed in fp32 before they go into a double: 64 to a lane at most.
constexpr int64_t kLossBlock = 64 * kLanes;

// f(z) = cap(scale * z) and what its derivative multiplies by.
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

// The mixture's shares of a row. A share that is exactly 0 selects the other head.
struct Shares {
  float lm, rm;
  explicit Shares(float gate_logit) {
    lm = static_cast<float>(1.0 / (1.0 + __builtin_exp(static_cast<double>(gate_logit))));
    rm = static_cast<float>(1.0 / (1.0 + __builtin_exp(-static_cast<double>(gate_logit))));
  }
  bool selects() const { return lm == 0.0f || rm == 0.0f; }
  F32 mix(F32 z_lm, F32 z_rm) const {
    if (rm == 0.0f) return z_lm;
    if (lm == 0.0f) return z_rm;
    return fma(splat(rm), z_rm, z_lm * lm);
  }
};

// f of the logits that a distribution is over, kLanes at a time: one head's, or the mixture's.
struct OneHead {
  const float* z;
  PostProcess post;
  F32 raw(int64_t v) const { return load(z + v); }
  F32 raw(int64_t v, int64_t n) const { return load_partial(z + v, n); }
};
struct Mixture {
  const float *lm, *rm;
  PostProcess post;
  Shares shares;
  F32 raw(int64_t v) const { return shares.mix(load(lm + v), load(rm + v)); }
  F32 raw(int64_t v, int64_t n) const {
    return shares.mix(load_partial(lm + v, n), load_partial(rm + v, n));
  }
};

inline float first_lane(F32 x) { return x[0]; }

// f's logits of the last, partial vector, -inf beyond the vocabulary.
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

// log((1 - s) e^lm + s e^rm), s = sigmoid(l): log-shares of l, which a saturated s has lost.
inline double mixed_log_prob(float gate_logit, const Shares& shares, double lm, double rm) {
  if (shares.rm == 0.0f) return lm;
  if (shares.lm == 0.0f) return rm;
  const double l = static_cast<double>(gate_logit);
  const double soft = __builtin_log1p(__builtin_exp(-__builtin_fabs(l)));
  const double a = lm + (l > 0 ? -l - soft : -soft), b = rm + (l > 0 ? -soft : l - soft);
  const double high = a > b ? a : b, low = a > b ? b : a;
  return high + __builtin_log1p(__builtin_exp(low - high));
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
    const Shares shares(p.gate_logit[n]);
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

// --- gradients
// --------------------------------------------------------------------------------------

inline void store_partial(float* p, F32 x, int64_t n) {
  float lanes[kLanes];
  store(lanes, x);
  __builtin_memcpy(p, lanes, n * sizeof(float));
}

// A log-sum-exp in two floats: the difference to a logit near it stays exact.
struct Normalizer {
  float high, low;
  explicit Normalizer(double total)
      : high(static_cast<float>(total)), low(static_cast<float>(total - double{high})) {}
  F32 softmax(F32 y) const { return exp_nonpositive((y - high) - low); }
};

// What the kernel does to kLanes logits of a row: the new z_lm and z_rm; returns the gate's terms.
struct RowGradient {
  PostProcess post;
  Shares shares;
  bool mixes, mix_probs;
  float mixed, reward;  // upstream gradients
  Normalizer mixed_total, rm_total;
  float to_lm, to_rm;  // probability mix: c (1 - q) and c q
  // label: 1 in the label's lane, else 0.
  F32 apply(F32& lm, F32& rm, F32 label) const {
    F32 gate = {}, out_rm = {};
    const F32 z_rm = rm;
    if (reward != 0.0f || (mixes && mix_probs)) {
      const F32 y = post.value(z_rm);
      const F32 each = (label - rm_total.softmax(y)) * post.slope(y);
      out_rm = each * (reward + (mixes && mix_probs ? to_rm : 0.0f));
    }
    if (mixes && mix_probs) {
      const F32 y = post.value(lm);
      lm = (label - mixed_total.softmax(y)) * post.slope(y) * to_lm;
    } else if (mixes) {
      const F32 y = post.value(shares.mix(lm, z_rm));
      const F32 dz = (label - mixed_total.softmax(y)) * post.slope(y) * mixed;
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
    const Shares shares(p.mixed ? p.gate_logit[n] : 0.0f);
    RowGradient g{{p.logit_scale, p.logit_softcap},
                  shares,
                  p.mixed != nullptr,
                  p.mix_probs,
                  p.mixed ? p.mixed_grad[n] : 0.0f,
                  p.reward_grad ? p.reward_grad[n] : 0.0f,
                  Normalizer(p.mixed ? p.mixed_normalizer[n] : 0.0),
                  Normalizer(p.rm_normalizer[n]),
                  0.0f,
                  0.0f};
    double through_shares = 0.0;  // d log P_y / d(gate logit), probability mix
    if (p.mixed && p.mix_probs) {
      // Of two ways to the same numbers, the one that a saturated share does not cancel in.
      const bool high = p.gate_logit[n] > 0.0f;
      const OneHead lm_head{p.z_lm + n * p.V, g.post}, rm_head{p.z_rm + n * p.V, g.post};
      const double of_lm = value_at(lm_head, p.labels[n]) - p.mixed_normalizer[n];
      const double of_rm = value_at(rm_head, p.labels[n]) - p.rm_normalizer[n];
      const double mixed = mixed_log_prob(p.gate_logit[n], shares, of_lm, of_rm);
      const double ratio = __builtin_exp((high ? of_lm : of_rm) - mixed);
      const double share = static_cast<double>(high ? shares.lm : shares.rm);
      // The posterior of the head that has the smaller share.
      const double part = share == 0.0 ? 0.0 : share * ratio, c = static_cast<double>(g.mixed);
      g.to_lm = static_cast<float>(c * (high ? part : 1.0 - part));
      g.to_rm = static_cast<float>(c * (high ? 1.0 - part : part));
      through_shares = high ? share * (1.0 - ratio) : share * (ratio - 1.0);
    }
    float* lm = p.z_lm ? p.z_lm + n * p.V : nullptr;
    double gate = row_gradient(g, lm, p.z_rm + n * p.V, p.write_lm, p.labels[n], p.V);
    if (!p.gate_grad) continue;
    gate = p.mix_probs ? static_cast<double>(g.mixed) * through_shares
                       : gate * static_cast<double>(shares.rm) * static_cast<double>(shares.lm);
    p.gate_grad[n] = shares.selects() ? 0.0f : static_cast<float>(gate);
  }
}
