// SPDX-License-Identifier: Apache-2.0
// What one decode step reads and writes, as plain pointers and sizes; no torch below csrc/kernels/.
//
// The step (docs/paper.md, DecodeParams in words): append the new position's key and folded value
// to the gate's cache, attend over the cache, alpha = sigmoid(gate logit), both V x d products,
// their mixture, its log-sum-exp, and a token. Dimensions: B batch, d hidden, V vocabulary, K
// objectives, H gate heads, d_k gate head size, g = H * d_k, S cache capacity in columns. All
// strides are in elements, not bytes. The innermost dimension of every tensor has stride 1; a
// tensor whose stride is not listed is contiguous. The binding checks shapes, kernels assume them.
#pragma once

#include <cstdint>

namespace dualhead {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// How the two heads' weights are stored: in the dtype of everything else, or quantised
// (dualhead_ext/quantization says what the bits mean). Int4 has a scale per kInt4Group inputs.
enum class Quantization : int32_t { kNone = 0, kInt8 = 1, kFp8 = 2, kInt4 = 3 };
constexpr int64_t kInt4Group = 128;

// What z_RM is. kFull: sum_k w_k (W_RM,k h + b_RM,k). The others correct z_LM, whose matrix they
// share: z_RM = z_LM + sum_k w_k delta_k, kEmbedding: delta_k = W_LM (U_k D_k h + c_k); kLowRank:
// delta_k = U_k D_k h + c_k.
enum class RewardHead : int32_t { kFull = 0, kEmbedding = 1, kLowRank = 2 };

// out.status, per row.
enum Status : int32_t { kOk = 0, kNonFinite = 1, kCacheFull = 2 };

struct DecodeParams {
  // --- sizes ---
  int64_t B, d, V, K;
  int64_t H, d_k, S;  // 0 when the gate is not attention (gate_logit is given instead)
  DType dtype;        // of hidden, weights, biases and cache_k
  RewardHead reward_head;
  int64_t r;  // rank of a correction; 0: it is its bias alone

  // --- heads ---
  const void* hidden;              // (B, d)
  int64_t hidden_stride;           // between rows
  const void* lm_weight;           // (V, d)
  int64_t lm_weight_stride;        // between rows
  const void* lm_bias;             // (V,) or null
  const void* reward_weight;       // (K, V, d); null for a correction
  int64_t reward_weight_stride_k;  // between objectives
  int64_t reward_weight_stride;    // between rows
  const void* reward_down;         // D (K, r, d), or null: full head, or rank 0
  const void* reward_up;           // U (K, d, r) of kEmbedding, (K, V, r) of kLowRank; likewise
  const void* reward_bias;         // (K, V) or null; c (K, d) of kEmbedding
  Quantization quantization;       // of both (V, d) heads; row strides are then in bytes
  const float* lm_scale;           // (V,) or, int4, (V, d / 128); null for kNone
  const float* reward_scale;       // (K, V) or (K, V, d / 128); null for kNone
  const float* objective_weights;  // (B, K) or null: 1/K each
  // Where the caller has multiplied already (CUDA, batches above 64): W h, without bias or scale;
  // null = the launch multiplies. lm_product may be out_logits.
  const float* lm_product;      // (B, V)
  const float* reward_product;  // (K, B, V)

  // --- attention gate; all null when gate_logit is given ---
  const void* q_weight;      // (g, d)
  const void* k_weight;      // (g, d)
  const float* u_weight;     // (H, d): folded value rows, W_V,i^T (W_O^T w_g)_i
  const float* gate_bias;    // (1,): b_g
  void* cache_k;             // (B, H, S, d_k), written at column length[b]
  float* cache_u;            // (B, H, S), likewise
  uint8_t* cache_valid;      // (B, S): 0 = padding
  int32_t* cache_length;     // (B,): columns filled, padding included; +1 per step
  const uint8_t* new_valid;  // (B,) or null: every new position is valid

  // --- gate without attention, and per-request controls; null = not given ---
  const float* gate_logit;   // (B,): raw gate logit; -inf / +inf are alpha 0 / 1
  const float* gate_offset;  // (B,): added to the gate logit
  const float* strength;     // (B,): alpha <- max(strength * alpha, 0); 0 selects z_LM;
                             //       with mix_probs at most 1
  const float* alpha;        // (B,): replaces sigmoid(gate logit), before strength
  // (B,): last; alpha counts as 0 if alpha < it, as 1 if |1 - alpha| < it
  const float* skip_threshold;

  // --- post-processing f and mixture ---
  bool mix_probs;       // false: f(mix of logits); true: log of the mixed softmaxes of f(z)
  float logit_scale;    // f(z) = cap(scale * z)
  float logit_softcap;  // cap(z) = softcap * tanh(z / softcap); 0 = no cap

  // --- sampling; seeds null = greedy for every row ---
  const float* temperature;  // (B,) or null: 1; a row with 0 is greedy
  const int32_t* top_k;      // (B,) or null; <= 0 = off
  const float* top_p;        // (B,) or null; >= 1 = off
  const float* min_p;        // (B,) or null; <= 0 = off
  const int64_t* seeds;      // (B,)
  int64_t* draws;  // (B,): how often the row has drawn; +1 per sampled step; null if greedy

  // --- outputs ---
  float* out_logits;  // (B, V); always given: the binding lends scratch when the caller wants none
  float* out_alpha;   // (B,)
  float* out_gate_logit;  // (B,): with gate_offset
  int64_t* out_token;     // (B,)
  float* out_logprob;     // (B,): of the token, mixture at temperature 1, before filters
  int32_t* out_status;    // (B,): Status
  float* out_attention;   // (B, H, S) or null: attention rows of this step, 0 beyond the length
};

// A chunk of the training loss, n rows of logits (formulas: dualhead_ext/loss/rows.py). All
// contiguous.
struct LossRowsParams {
  int64_t n, V;
  float* z_lm;              // (n, V) or null where nothing is mixed; gradients overwrite it
  float* z_rm;              // (n, V), likewise
  const float* gate_logit;  // (n,)
  const int64_t* labels;    // (n,), in [0, V)
  bool mix_probs;
  float logit_scale, logit_softcap;
  // --- log-probabilities of the labels: written, later read; null = not wanted ---
  float* mixed;              // (n,)
  float* reward;             // (n,)
  double* mixed_normalizer;  // (n,): log-sum-exp of the mixture; mix_probs: of f(z_LM)
  double* rm_normalizer;     // (n,): of f(z_RM)
  // --- gradients ---
  const float* mixed_grad;   // (n,), of mixed; null where that is
  const float* reward_grad;  // (n,), of reward; null where that is
  bool write_lm;             // whether z_lm's gradient is wanted
  float* gate_grad;          // (n,), or null
};

}  // namespace dualhead
