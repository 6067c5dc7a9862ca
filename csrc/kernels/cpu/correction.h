// SPDX-License-Identifier: Apache-2.0
// A reward head that corrects the LM head: U_k (D_k h) + c_k, its sum over objectives, and the
// hidden states that an embedding head changes. Included inside a target region.

inline float bias_at(const void* bias, DType dtype, int64_t i) {
  if (!bias) return 0.0f;
  return dtype == DType::kFloat32 ? static_cast<const float*>(bias)[i]
                                  : to_float(static_cast<const BFloat16*>(bias)[i]);
}

// The weight of objective k in z_RM of request b.
inline float objective_share(const DecodeParams& p, int64_t b, int64_t k) {
  return p.objective_weights ? p.objective_weights[b * p.K + k] : 1.0f / static_cast<float>(p.K);
}

// Adds objective k's term to the sum. A single objective without weights is copied unchanged.
inline void add_objective(const DecodeParams& p, int64_t b, int64_t k, float value, float* sum) {
  if (p.K == 1 && !p.objective_weights) {
    *sum = value;
  } else {
    const float part = objective_share(p, b, k) * value;
    *sum = k == 0 ? part : *sum + part;
  }
}

// out[b][i] = U_k[row + i] . (D_k h_b) + c_k[row + i] for `count` of U_k's n rows and for requests
// [b0, b0 + batch).
template <class W>
void correct_rows(const Step& s, int64_t k, int64_t n, int64_t row, int64_t count, int64_t b0,
                  int64_t batch, float (*out)[4 * kMaxGroups]) {
  const DecodeParams& p = *s.params;
  if (p.r == 0) {
    for (int64_t b = 0; b < batch; ++b) __builtin_memset(out[b], 0, count * sizeof(float));
  } else {
    const W* up = static_cast<const W*>(p.reward_up) + k * n * p.r;
    const W* rows[4 * kMaxGroups];
    const int64_t groups = units(count, 4);
    for (int64_t i = 0; i < 4 * groups; ++i) rows[i] = up + smaller(row + i, n - 1) * p.r;
    const float* x = s.inner + b0 * s.inner_stride + k * p.r;
    const W* next = rows[4 * groups - 1];
    dot_rows<W, float>(rows, groups, next, x, s.inner_stride, batch, p.r, out);
  }
  for (int64_t i = 0; i < count; ++i) {
    const float bias = bias_at(p.reward_bias, p.dtype, k * n + smaller(row + i, n - 1));
    for (int64_t b = 0; b < batch; ++b) out[b][i] += bias;
  }
}

// Stores a hidden state in fp32, and rounded to bf16 for the products that take bf16 hidden states.
inline void keep_hidden(const Step& s, int64_t row, int64_t i, float value) {
  s.hidden_f32[row * s.hidden_f32_stride + i] = value;
  if (s.hidden_bf16) s.hidden_bf16[row * s.hidden_bf16_stride + i] = to_bfloat16(value);
}

// Inputs [first, end) of the hidden states that the LM head multiplies under an embedding head:
// h + a (M h + c) replaces h, or (probability mix) h + M h + c is stored after h.
template <class W>
void move_inputs(const Step& s, int64_t first, int64_t end) {
  const DecodeParams& p = *s.params;
  const int64_t count = end - first;
  float out[kBatchBlock][4 * kMaxGroups], change[kBatchBlock][kProjectionUnit];
  for (int64_t b0 = 0; b0 < p.B; b0 += kBatchBlock) {
    const int64_t batch = smaller(kBatchBlock, p.B - b0);
    for (int64_t k = 0; k < p.K; ++k) {
      correct_rows<W>(s, k, p.d, first, count, b0, batch, out);
      for (int64_t b = 0; b < batch; ++b) {
        for (int64_t i = 0; i < count; ++i) {
          add_objective(p, b0 + b, k, out[b][i], change[b] + i);
        }
      }
    }
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t row = (b0 + b) * s.hidden_rows, to = row + s.hidden_rows - 1;
      const float a = p.mix_probs ? 1.0f : p.out_alpha[b0 + b];
      if (a == 0.0f) continue;  // even if the change is not finite
      for (int64_t i = 0; i < count; ++i) {
        const float h = s.hidden_f32[row * s.hidden_f32_stride + first + i];
        keep_hidden(s, to, first + i, h + a * change[b][i]);
      }
    }
  }
}

void move_hidden(const Step& s, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit * kProjectionUnit;
    const int64_t last = smaller(first + kProjectionUnit, s.params->d);
    if (s.params->dtype == DType::kFloat32) {
      move_inputs<float>(s, first, last);
    } else {
      move_inputs<BFloat16>(s, first, last);
    }
  }
}
