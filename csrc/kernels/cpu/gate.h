// SPDX-License-Identifier: Apache-2.0
// The small products of one step and the attention gate: first the projections of the new position,
// then attention over the cache. decode.cpp computes alpha from the heads' contexts. Included
// inside a target region.

// Weight rows that are multiplied at a time.
constexpr int64_t kProjected = DUALHEAD_TILES ? kProjectionUnit : 4;

inline void store_as(float* p, float x) { *p = x; }
inline void store_as(BFloat16* p, float x) { *p = to_bfloat16(x); }

// Rows from `row` on of [W_Q; W_K], which has 2g rows, for all requests. Rows past `end` repeat the
// last one.
template <class W>
void project_keys_and_queries(const Step& s, int64_t row, int64_t end) {
  typedef typename OperandOf<W>::Type X;
  const DecodeParams& p = *s.params;
  const int64_t g = p.H * p.d_k;
  const W* rows[kProjected];
  for (int64_t r = 0; r < kProjected; ++r) {
    const int64_t i = smaller(row + r, end - 1);
    rows[r] = (i < g ? static_cast<const W*>(p.q_weight) + i * p.d
                     : static_cast<const W*>(p.k_weight) + (i - g) * p.d);
  }
  float out[kBatchBlock][4 * kMaxGroups];
  for (int64_t b0 = 0; b0 < p.B; b0 += kBatchBlock) {
    const int64_t batch = smaller(kBatchBlock, p.B - b0);
    const int64_t stride = Hidden<W, X>::request_stride(s);
    const X* x = Hidden<W, X>::data(s) + b0 * stride;
    dot_rows<W, X>(rows, kProjected / 4, rows[0] + kProjected * p.d, x, stride, batch, p.d, out);
    for (int64_t b = b0; b < b0 + batch; ++b) {
      for (int64_t i = row; i < smaller(row + kProjected, end); ++i) {
        const float value = out[b - b0][i - row];
        if (i < g) {
          s.q[b * g + i] = value;
        } else if (s.column[b] >= 0) {
          const int64_t h = (i - g) / p.d_k, j = (i - g) % p.d_k;
          W* cache = static_cast<W*>(p.cache_k);
          store_as(cache + ((b * p.H + h) * p.S + s.column[b]) * p.d_k + j, value);
        }
      }
    }
  }
}

// Rows from `row` on of U, which has H rows: in fp32, whatever the dtype of the other weights.
inline void project_values(const Step& s, int64_t row, int64_t end) {
  const DecodeParams& p = *s.params;
  const float* rows[kProjected];
  for (int64_t r = 0; r < kProjected; ++r) rows[r] = p.u_weight + smaller(row + r, end - 1) * p.d;
  float out[kBatchBlock][4 * kMaxGroups];
  for (int64_t b0 = 0; b0 < p.B; b0 += kBatchBlock) {
    const int64_t batch = smaller(kBatchBlock, p.B - b0);
    const int64_t stride = Hidden<float, float>::request_stride(s);
    const float* x = s.hidden_f32 + b0 * stride;
    dot_rows<float, float>(rows, kProjected / 4, rows[0] + kProjected * p.d, x, stride, batch, p.d,
                           out);
    for (int64_t b = b0; b < b0 + batch; ++b) {
      if (s.column[b] < 0) continue;
      for (int64_t h = row; h < smaller(row + kProjected, end); ++h) {
        p.cache_u[(b * p.H + h) * p.S + s.column[b]] = out[b - b0][h - row];
      }
    }
  }
}

// Rows from `row` on of a correction's D, which has K r rows.
template <class W>
void project_inner(const Step& s, int64_t row, int64_t end) {
  typedef typename OperandOf<W>::Type X;
  const DecodeParams& p = *s.params;
  const W* rows[kProjected];
  for (int64_t i = 0; i < kProjected; ++i) {
    rows[i] = static_cast<const W*>(p.reward_down) + smaller(row + i, end - 1) * p.d;
  }
  const int64_t stride = Hidden<W, X>::request_stride(s);
  float out[kBatchBlock][4 * kMaxGroups];
  for (int64_t b0 = 0; b0 < p.B; b0 += kBatchBlock) {
    const int64_t batch = smaller(kBatchBlock, p.B - b0);
    const X* x = Hidden<W, X>::data(s) + b0 * stride;
    dot_rows<W, X>(rows, kProjected / 4, rows[0] + kProjected * p.d, x, stride, batch, p.d, out);
    for (int64_t b = b0; b < b0 + batch; ++b) {
      for (int64_t i = row; i < smaller(row + kProjected, end); ++i) {
        s.inner[b * s.inner_stride + i] = out[b - b0][i - row];
      }
    }
  }
}

template <class W>
void project_units(const Step& s, int64_t begin, int64_t end) {
  const DecodeParams& p = *s.params;
  const int64_t counts[3] = {2 * p.H * p.d_k, p.H, p.K * p.r};
  void (*const parts[3])(const Step&, int64_t, int64_t) = {&project_keys_and_queries<W>,
                                                           &project_values, &project_inner<W>};
  int64_t unit = begin;
  for (int64_t part = 0, past = 0; part < 3; ++part) {
    const int64_t start = past;
    past += units(counts[part], kProjectionUnit);
    for (; unit < smaller(past, end); ++unit) {
      const int64_t first = (unit - start) * kProjectionUnit;
      const int64_t last = smaller(first + kProjectionUnit, counts[part]);
      for (int64_t row = first; row < last; row += kProjected) parts[part](s, row, last);
    }
  }
}

void project(const Step& s, int64_t begin, int64_t end) {
  if (s.params->dtype == DType::kFloat32) {
    project_units<float>(s, begin, end);
  } else {
    project_units<BFloat16>(s, begin, end);
  }
}

// --- attention -----------------------------------------------------------------------------------

// The softmax over the columns so far. Columns are processed kUnit at a time, so the scores of a
// long cache need no memory.
struct RunningSoftmax {
  float max = -__builtin_inff();
  float sum = 0.0f;      // of exp(score - max) over the visible columns so far
  float context = 0.0f;  // of exp(score - max) * u
  bool seen = false;     // whether any column was visible
};

// Adds kUnit columns: scores (-inf where not visible) and values u (0 where not visible).
inline void add_columns(RunningSoftmax& run, const float* scores, const float* values) {
  F32 best = splat(run.max);
  for (int64_t i = 0; i < kUnit; i += kLanes) best = max_skipping_nan(best, load(scores + i));
  const float max = reduce_max(best);
  const float shift = max == -__builtin_inff() ? 0.0f : max;  // -inf - (-inf) would be NaN
  F32 sum = {}, context = {};
  for (int64_t i = 0; i < kUnit; i += kLanes) {
    const F32 weight = exp_nonpositive(load(scores + i) - shift);
    sum = sum + weight;
    context = fma(weight, load(values + i), context);
  }
  const float kept =
      run.max == -__builtin_inff() ? 1.0f : exp_nonpositive(splat(run.max - shift))[0];
  run.sum = run.sum * kept + reduce_add(sum);
  run.context = run.context * kept + reduce_add(context);
  run.max = max;
}

// Scores of columns [first, first + count) of one head: q . k, scaled. Invisible columns get score
// -inf and value 0.
template <class W>
void score_columns(const Step& s, int64_t b, int64_t h, int64_t first, int64_t count, float* scores,
                   float* values, bool* seen) {
  const DecodeParams& p = *s.params;
  const int64_t pair = b * p.H + h;
  const W* k = static_cast<const W*>(p.cache_k) + (pair * p.S + first) * p.d_k;
  const float* u = p.cache_u + pair * p.S + first;
  const uint8_t* valid = p.cache_valid + b * p.S + first;
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(p.d_k));
  for (int64_t i = 0; i < kUnit; i += 4) {
    float out[4] = {};
    if (i < count) {
      const W* rows[4];
      for (int64_t r = 0; r < 4; ++r) rows[r] = k + smaller(i + r, count - 1) * p.d_k;
      F32 sums[1][4] = {};
      const Fetch fetch{reinterpret_cast<const char*>(rows[0] + 16 * p.d_k), 64};
      Tile<W, float>::template run<1>(rows, fetch, s.q + pair * p.d_k, 0, 0, p.d_k, sums);
      reduce4(out, sums[0][0], sums[0][1], sums[0][2], sums[0][3]);
    }
    for (int64_t r = 0; r < 4; ++r) {
      const bool visible = i + r < count && valid[i + r];
      scores[i + r] = visible ? out[r] * scale : -__builtin_inff();
      values[i + r] = visible ? u[i + r] : 0.0f;
      *seen = *seen || visible;
    }
  }
}

// Turns one head's scores into its attention row.
inline void finish_attention_row(float* row, const uint8_t* valid, int64_t length, int64_t capacity,
                                 const RunningSoftmax& run) {
  for (int64_t i = 0; i < capacity; ++i) {
    const bool visible = i < length && valid[i];
    row[i] = visible ? exp_nonpositive(splat(row[i] - run.max))[0] / run.sum : 0.0f;
  }
}

template <class W>
void attend_pairs(const Step& s, int64_t begin, int64_t end) {
  const DecodeParams& p = *s.params;
  for (int64_t pair = begin; pair < end; ++pair) {
    const int64_t b = pair / p.H, h = pair % p.H;
    const int64_t length = s.column[b] + 1;  // 0 if the cache is full: nothing is visible
    float* recorded = p.out_attention ? p.out_attention + pair * p.S : nullptr;
    RunningSoftmax run;
    for (int64_t first = 0; first < length; first += kUnit) {
      float scores[kUnit], values[kUnit];
      const int64_t count = smaller(kUnit, length - first);
      score_columns<W>(s, b, h, first, count, scores, values, &run.seen);
      add_columns(run, scores, values);
      if (recorded) __builtin_memcpy(recorded + first, scores, count * sizeof(float));
    }
    // With no visible column the context is 0, so alpha = sigmoid(b_g).
    s.head_context[pair] = run.seen ? run.context / run.sum : 0.0f;
    if (recorded) finish_attention_row(recorded, p.cache_valid + b * p.S, length, p.S, run);
  }
}

void attend(const Step& s, int64_t begin, int64_t end) {
  if (s.params->dtype == DType::kFloat32) {
    attend_pairs<float>(s, begin, end);
  } else {
    attend_pairs<BFloat16>(s, begin, end);
  }
}
