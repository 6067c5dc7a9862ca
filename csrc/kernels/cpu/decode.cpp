// SPDX-License-Identifier: Apache-2.0
// The phases of a step. Work proportional to the weights is cut into units that threads share; the
// rest is a few numbers per row. Every reduction has a fixed order that does not depend on the
// number of threads.
#include "decode.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "../head_math.h"
#include "../sampling.h"
#include "../weight_format.h"
#include "sample.h"

namespace dualhead::cpu {
namespace {

// A thread gets at least this many bytes of weights or cache, because waking it costs microseconds.
constexpr int64_t kBytesPerThread = 64 * 1024;

// --- scratch -------------------------------------------------------------------------------------

// Hands out 64-byte aligned pieces of one buffer. With a null buffer it only measures.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    char* at = base_ ? base_ + used_ : nullptr;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(at);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// The row stride in elements: a multiple of 4 KB plus 1 KB. The padding keeps the rows of different
// requests out of the same L1 set. Without it, 4 requests took 1.05 of the time in fp32.
template <class T>
int64_t spread_stride(int64_t d) {
  return units(d * sizeof(T), 4096) * 4096 / sizeof(T) + 1024 / sizeof(T);
}

Step lay_out(const DecodeParams& p, Arena& arena) {
  Step s{};
  s.params = &p;
  const int64_t stats = p.B * units(p.V, kUnit);
  const bool apart = p.reward_head == RewardHead::kEmbedding && p.mix_probs && !p.lm_product;
  s.hidden_rows = apart ? 2 : 1;
  const int64_t rows = p.B * s.hidden_rows;
  s.hidden_f32_stride = spread_stride<float>(p.d);
  s.hidden_f32 = arena.take<float>(rows * s.hidden_f32_stride);
  if (p.dtype != DType::kFloat32) {
    s.hidden_bf16_stride = spread_stride<BFloat16>(p.d);
    s.hidden_bf16 = arena.take<BFloat16>(rows * s.hidden_bf16_stride);
    s.hidden_packed = arena.take<BFloat16>((rows + kTilePadding) * s.hidden_bf16_stride);
  }
  s.inner_stride = units(p.K * p.r, 16) * 16;
  s.inner = arena.take<float>(p.B * s.inner_stride);
  s.column = arena.take<int32_t>(p.B);
  s.q = arena.take<float>(p.B * p.H * p.d_k);
  s.head_context = arena.take<float>(p.B * p.H);
  s.unit_max = arena.take<float>(stats);
  s.unit_sum = arena.take<float>(stats);
  if (p.mix_probs) {
    s.reward_logits = arena.take<float>(p.B * p.V);
    s.lm_shift = arena.take<float>(p.B * 2);
    s.rm_shift = arena.take<float>(p.B * 2);
    s.rm_unit_max = arena.take<float>(stats);
    s.rm_unit_sum = arena.take<float>(stats);
  }
  return s;
}

// A call to one of the kernels' range functions, in the form that ParallelFor takes.
struct RangeCall {
  void (*kernel)(const Step&, int64_t, int64_t);
  const Step* step;
};

void run_range(int64_t begin, int64_t end, void* context) {
  const RangeCall& call = *static_cast<const RangeCall*>(context);
  call.kernel(*call.step, begin, end);
}

// `bytes`: what one of the `count` items reads.
void share(ParallelFor parallel, const Step& step, void (*kernel)(const Step&, int64_t, int64_t),
           int64_t count, int64_t bytes) {
  RangeCall call{kernel, &step};
  const int64_t grain = std::max<int64_t>(1, kBytesPerThread / std::max<int64_t>(1, bytes));
  if (count <= grain) {
    kernel(step, 0, count);
  } else {
    parallel(count, grain, &run_range, &call);
  }
}

// --- the gate ------------------------------------------------------------------------------------

void copy_hidden(const Step& s) {
  const DecodeParams& p = *s.params;
  for (int64_t b = 0; b < p.B; ++b) {
    float* wide = s.hidden_f32 + b * s.hidden_rows * s.hidden_f32_stride;
    if (p.dtype == DType::kFloat32) {
      std::copy_n(static_cast<const float*>(p.hidden) + b * p.hidden_stride, p.d, wide);
      continue;
    }
    const BFloat16* row = static_cast<const BFloat16*>(p.hidden) + b * p.hidden_stride;
    std::copy_n(row, p.d, s.hidden_bf16 + b * s.hidden_rows * s.hidden_bf16_stride);
    for (int64_t k = 0; k < p.d; ++k) wide[k] = to_float(row[k]);
  }
}

// The cache column of each row's new position. A length that no cache can have counts as full.
void place_columns(const Step& s) {
  const DecodeParams& p = *s.params;
  for (int64_t b = 0; b < p.B; ++b) {
    const int32_t length = p.cache_length[b];
    s.column[b] = length >= 0 && length < p.S ? length : -1;
  }
}

int64_t element_bytes(const DecodeParams& p) { return p.dtype == DType::kFloat32 ? 4 : 2; }

void run_attention(const Step& s, const Kernels& kernels, ParallelFor parallel) {
  const DecodeParams& p = *s.params;
  int64_t columns = 0;
  for (int64_t b = 0; b < p.B; ++b) {
    if (s.column[b] < 0) continue;
    p.cache_valid[b * p.S + s.column[b]] = p.new_valid ? p.new_valid[b] : 1;
    p.cache_length[b] = s.column[b] + 1;
    columns += s.column[b] + 1;
  }
  const int64_t bytes = columns / std::max<int64_t>(1, p.B) * p.d_k * element_bytes(p);
  share(parallel, s, kernels.attend, p.B * p.H, bytes);
}

// Whether the gate is attention. The cache pointers cannot tell: a cache of capacity 0 is null.
bool has_cache(const DecodeParams& p) { return p.H > 0; }

bool is_full(const Step& s, int64_t b) { return has_cache(*s.params) && s.column[b] < 0; }

void finish_gate(const Step& s) {
  const DecodeParams& p = *s.params;
  for (int64_t b = 0; b < p.B; ++b) {
    if (is_full(s, b)) {
      p.out_gate_logit[b] = p.out_alpha[b] = std::numeric_limits<float>::quiet_NaN();
      continue;
    }
    float logit = 0.0f;
    if (p.gate_logit) {
      logit = p.gate_logit[b];
    } else {
      for (int64_t h = 0; h < p.H; ++h) logit += s.head_context[b * p.H + h];
      logit += p.gate_bias[0];
    }
    if (p.gate_offset) logit += p.gate_offset[b];
    p.out_gate_logit[b] = logit;
    p.out_alpha[b] = mixing_weight(p, b, logit);
  }
}

bool every_alpha_is(const DecodeParams& p, float alpha) {
  return std::all_of(p.out_alpha, p.out_alpha + p.B, [=](float a) { return a == alpha; });
}

// A head that no row needs is not read. Rows with alpha 0 or 1 select one head, so their bits are
// the same whether or not the other head is read for a neighbour. A correction needs the LM head's
// logits.
void choose_matrices(Step& s) {
  const DecodeParams& p = *s.params;
  s.first_matrix = p.reward_head == RewardHead::kFull && every_alpha_is(p, 1.0f) ? 1 : 0;
  const bool one = p.reward_head == RewardHead::kEmbedding || every_alpha_is(p, 0.0f);
  s.end_matrix = one ? 1 : 1 + p.K;
}

// For an embedding head: computes the hidden states that the LM head multiplies.
void move_hidden(Step& s, const Kernels& kernels, ParallelFor parallel) {
  const DecodeParams& p = *s.params;
  if (every_alpha_is(p, 0.0f)) {  // no row needs a second one
    s.hidden_f32_stride *= s.hidden_rows, s.hidden_bf16_stride *= s.hidden_rows;
    s.hidden_rows = 1;
    return;
  }
  const int64_t bytes = kProjectionUnit * (p.K * p.r * element_bytes(p) + p.B * 4);
  share(parallel, s, kernels.move_hidden, units(p.d, kProjectionUnit), bytes);
}

int64_t head_row_bytes(const DecodeParams& p) {
  switch (p.quantization) {
    case Quantization::kInt8:
    case Quantization::kFp8:
      return p.d;
    case Quantization::kInt4:
      return p.d / 2;
    default:
      return p.d * element_bytes(p);
  }
}

// Bytes per vocabulary row of the matrices in use.
int64_t vocabulary_row_bytes(const Step& s) {
  const DecodeParams& p = *s.params;
  const int64_t head = head_row_bytes(p), objectives = s.end_matrix - 1;
  const int64_t reward = p.reward_head == RewardHead::kFull ? head : p.r * element_bytes(p);
  return (s.first_matrix == 0 ? head : 0) + objectives * reward;
}

// --- softmax sums and tokens ---------------------------------------------------------------------

// A row's log-sum-exp as max + log_sum. Subtracting max from z first and then log_sum loses the
// least precision. The sum is NaN if a logit is NaN or +inf, or if all are -inf.
struct RowSum {
  float max;
  double log_sum;
};

RowSum merge_units(const float* unit_max, const float* unit_sum, int64_t count) {
  float max = -INFINITY;
  for (int64_t i = 0; i < count; ++i) max = std::max(max, unit_max[i]);
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    sum += unit_sum[i] * std::exp(double{unit_max[i]} - double{max});
  }
  return RowSum{max, std::log(sum)};
}

void normalise_rows(const Step& s, int64_t begin, int64_t end) {
  const int64_t count = units(s.params->V, kUnit);
  for (int64_t b = begin; b < end; ++b) {
    const RowSum lm = merge_units(s.unit_max + b * count, s.unit_sum + b * count, count);
    const RowSum rm = merge_units(s.rm_unit_max + b * count, s.rm_unit_sum + b * count, count);
    s.lm_shift[2 * b] = lm.max, s.lm_shift[2 * b + 1] = static_cast<float>(lm.log_sum);
    s.rm_shift[2 * b] = rm.max, s.rm_shift[2 * b + 1] = static_cast<float>(rm.log_sum);
  }
}

// The first index of the largest logit. Searches only the first unit that contains it.
int64_t argmax(const Step& s, int64_t b, float max) {
  const DecodeParams& p = *s.params;
  const int64_t count = units(p.V, kUnit);
  int64_t unit = 0;
  while (unit + 1 < count && s.unit_max[b * count + unit] != max) ++unit;
  int64_t v = unit * kUnit;
  while (v + 1 < p.V && p.out_logits[b * p.V + v] != max) ++v;
  return v;
}

int64_t choose_token(const Step& s, int64_t b, float max) {
  const DecodeParams& p = *s.params;
  const int64_t top = argmax(s, b, max);
  const float temperature = p.temperature ? p.temperature[b] : 1.0f;
  if (!p.seeds || !(temperature > 0.0f)) return top;
  SampleRow row{};
  row.logits = p.out_logits + b * p.V;
  row.V = p.V, row.top = top, row.temperature = temperature;
  row.top_k = p.top_k ? p.top_k[b] : 0;
  row.top_p = p.top_p ? p.top_p[b] : 1.0f;
  row.min_p = p.min_p ? p.min_p[b] : 0.0f;
  row.seed = static_cast<uint64_t>(p.seeds[b]), row.draw = static_cast<uint64_t>(p.draws[b]);
  return sample_token(row);
}

void finish_rows(const Step& s, int64_t begin, int64_t end) {
  const DecodeParams& p = *s.params;
  const int64_t count = units(p.V, kUnit);
  for (int64_t b = begin; b < end; ++b) {
    const RowSum sum = merge_units(s.unit_max + b * count, s.unit_sum + b * count, count);
    const bool full = is_full(s, b);
    const bool finite = std::isfinite(sum.max + sum.log_sum);  // if alpha is NaN, so are the logits
    p.out_token[b] = 0;
    p.out_logprob[b] = std::numeric_limits<float>::quiet_NaN();
    p.out_status[b] = full ? kCacheFull : (finite ? kOk : kNonFinite);
    if (finite && !full) {
      const int64_t token = choose_token(s, b, sum.max);
      p.out_token[b] = token;
      p.out_logprob[b] = static_cast<float>(
          (double{p.out_logits[b * p.V + token]} - double{sum.max}) - sum.log_sum);
    }
    if (p.draws && !full) ++p.draws[b];
  }
}

}  // namespace

bool wants_products(const DecodeParams& p, const Kernels& kernels) {
  return kernels.gemm_batch > 0 && p.B >= kernels.gemm_batch && p.dtype == DType::kFloat32 &&
         p.quantization == Quantization::kNone;
}

int64_t workspace_bytes(const DecodeParams& params) {
  Arena arena(nullptr);
  lay_out(params, arena);
  return arena.used();
}

void decode_step(const DecodeParams& params, const Kernels& kernels, void* workspace,
                 ParallelFor parallel) {
  if (params.B == 0) return;
  Arena arena(workspace);
  Step step = lay_out(params, arena);
  copy_hidden(step);
  if (has_cache(params)) place_columns(step);
  if (step.hidden_packed && kernels.pack_requests) kernels.pack_requests(step);
  share(parallel, step, kernels.project, projection_units(params),
        kProjectionUnit * params.d * element_bytes(params));
  if (has_cache(params)) run_attention(step, kernels, parallel);
  finish_gate(step);

  const int64_t vocabulary_units = units(params.V, kUnit);
  if (params.lm_product) {
    share(parallel, step, kernels.mix_products, vocabulary_units,
          kUnit * params.B * (1 + params.K) * 4);
  } else {
    choose_matrices(step);
    if (params.reward_head == RewardHead::kEmbedding) move_hidden(step, kernels, parallel);
    if (step.hidden_packed && kernels.pack_hidden) kernels.pack_hidden(step);
    share(parallel, step, kernels.vocabulary, vocabulary_units, kUnit * vocabulary_row_bytes(step));
  }
  if (params.mix_probs) {
    share(parallel, step, &normalise_rows, params.B, params.V * 4);
    share(parallel, step, kernels.mix_probabilities, vocabulary_units, params.B * kUnit * 8);
  }
  share(parallel, step, &finish_rows, params.B, params.V * 4);
}

}  // namespace dualhead::cpu
