// SPDX-License-Identifier: Apache-2.0
// The inputs and outputs of one decode step as plain pointers and sizes. Nothing below
// csrc/kernels/ uses torch.
//
// The step, as in docs/paper.md: append the new position's key and folded value to the gate's
// cache, attend over the cache, compute alpha = sigmoid(gate logit), both V x d products, their
// mixture, its log-sum-exp, and a token.
//
// Dimensions: B batch, d hidden, V vocabulary, K objectives, H gate heads, d_k gate head size,
// g = H * d_k, S cache capacity in columns. Strides are in elements, not bytes. The innermost
// dimension of every tensor has stride 1, and a tensor without a listed stride is contiguous. The
// binding checks shapes; the kernels rely on them.
#pragma once

#include <cstdint>

namespace dualhead {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// How the weights of the two heads are stored: in the dtype of all other tensors, or quantised. The
// formats are defined in dualhead_ext/quantization. Int4 has one scale per kInt4Group inputs.
enum class Quantization : int32_t { kNone = 0, kInt8 = 1, kFp8 = 2, kInt4 = 3 };
constexpr int64_t kInt4Group = 128;

// How z_RM is computed. kFull: sum_k w_k (W_RM,k h + b_RM,k). The other two correct z_LM and share
// its matrix: z_RM = z_LM + sum_k w_k delta_k. kEmbedding: delta_k = W_LM (U_k D_k h + c_k).
// kLowRank: delta_k = U_k D_k h + c_k.
enum class RewardHead : int32_t { kFull = 0, kEmbedding = 1, kLowRank = 2 };

// Values of out_status, one per row.
enum Status : int32_t { kOk = 0, kNonFinite = 1, kCacheFull = 2 };

struct DecodeParams {
  // --- sizes ---
  int64_t B, d, V, K;
  int64_t H, d_k, S;  // 0 if the gate is not attention (gate_logit is given instead)
  DType dtype;        // of hidden, weights, biases and cache_k
  RewardHead reward_head;
  int64_t r;  // rank of a correction; 0 means bias only

  // --- heads ---
  const void* hidden;              // (B, d)
  int64_t hidden_stride;           // between rows
  const void* lm_weight;           // (V, d)
  int64_t lm_weight_stride;        // between rows
  const void* lm_bias;             // (V,) or null
  const void* reward_weight;       // (K, V, d); null for a correction
  int64_t reward_weight_stride_k;  // between objectives
  int64_t reward_weight_stride;    // between rows
  const void* reward_down;         // D (K, r, d); null for a full head or rank 0
  const void* reward_up;           // U: kEmbedding (K, d, r), kLowRank (K, V, r); null likewise
  const void* reward_bias;         // (K, V) or null; kEmbedding: c (K, d)
  Quantization quantization;       // of both (V, d) heads; if quantised, their strides are in bytes
  const float* lm_scale;           // (V,), int4 (V, d / 128); null for kNone
  const float* reward_scale;       // (K, V), int4 (K, V, d / 128); null for kNone
  const float* objective_weights;  // (B, K), or null for 1/K each
  // W h without bias or scale, if the caller has already computed it, for large batches (the CUDA
  // and CPU decode.h say which). Null: the step computes it. lm_product may be the same memory as
  // out_logits.
  const float* lm_product;      // (B, V)
  const float* reward_product;  // (K, B, V); kEmbedding: delta; kLowRank: delta without bias

  // --- attention gate; all null when gate_logit is given ---
  const void* q_weight;      // (g, d)
  const void* k_weight;      // (g, d)
  const float* u_weight;     // (H, d): folded value rows, W_V,i^T (W_O^T w_g)_i
  const float* gate_bias;    // (1,): b_g
  void* cache_k;             // (B, H, S, d_k), written at column length[b]
  float* cache_u;            // (B, H, S), written at the same column
  uint8_t* cache_valid;      // (B, S): 0 = padding
  int32_t* cache_length;     // (B,): filled columns, padding included; +1 per step
  const uint8_t* new_valid;  // (B,), or null if every new position is valid

  // --- gate without attention, and per-request controls; null = not given ---
  const float* gate_logit;   // (B,): raw gate logit; -inf / +inf mean alpha 0 / 1
  const float* gate_offset;  // (B,): added to the gate logit
  const float* strength;     // (B,): alpha <- max(strength * alpha, 0); 0 selects z_LM;
                             //       with mix_probs at most 1
  const float* alpha;        // (B,): replaces sigmoid(gate logit), before strength
  // (B,): applied last; alpha becomes 0 if alpha < threshold, 1 if |1 - alpha| < threshold
  const float* skip_threshold;

  // --- post-processing f and mixture ---
  bool mix_probs;       // false: f(mix of logits); true: log of the mixed softmaxes of f(z)
  float logit_scale;    // f(z) = cap(scale * z)
  float logit_softcap;  // cap(z) = softcap * tanh(z / softcap); 0 = no cap

  // --- sampling; seeds null = greedy for every row ---
  const float* temperature;  // (B,), or null for 1; a row with 0 is greedy
  const int32_t* top_k;      // (B,) or null; <= 0 = off
  const float* top_p;        // (B,) or null; >= 1 = off
  const float* min_p;        // (B,) or null; <= 0 = off
  const int64_t* seeds;      // (B,)
  int64_t* draws;            // (B,): number of draws so far; +1 per sampled step; null if greedy

  // --- outputs ---
  float* out_logits;  // (B, V); never null: the binding allocates scratch if the caller wants none
  float* out_alpha;   // (B,)
  float* out_gate_logit;  // (B,): includes gate_offset
  int64_t* out_token;     // (B,)
  float* out_logprob;     // (B,): of the token, under the mixture at temperature 1, before filters
  int32_t* out_status;    // (B,): Status
  float* out_attention;   // (B, H, S) or null: attention rows of this step; 0 beyond the length
};

// A chunk of the training loss: n rows of logits (formulas: dualhead_ext/loss/rows.py). All arrays
// are contiguous.
struct LossRowsParams {
  int64_t n, V;
  float* z_lm;              // (n, V), or null if nothing is mixed; overwritten by its gradient
  float* z_rm;              // (n, V); overwritten by its gradient
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
  const float* mixed_grad;   // (n,), gradient of mixed; null if that is null
  const float* reward_grad;  // (n,), gradient of reward; null if that is null
  bool write_lm;             // whether to write z_lm's gradient
  float* gate_grad;          // (n,), or null
};

}  // namespace dualhead
