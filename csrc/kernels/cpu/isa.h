// SPDX-License-Identifier: Apache-2.0
// The choice among the kernels compiled for several instruction sets, and what each of them offers.
// The algorithms (dot_tile.h, gate.h, correction.h, vocabulary.h, loss_rows.h) are written once and
// compiled once per instruction set by the isa_*.cpp files; only simd_*.h there contain intrinsics.
#pragma once

#include <cstdint>
#include <string>

#include "../params.h"
#include "../weight_format.h"

namespace dualhead::cpu {

// Vocabulary rows per unit of work: fixed, so that no bit of the result depends on the thread
// count.
constexpr int64_t kUnit = 64;
// Projection rows of the gate per unit of work.
constexpr int64_t kProjectionUnit = 16;
// Requests whose logits of one unit are kept on the stack at a time.
constexpr int64_t kBatchBlock = 64;

inline int64_t units(int64_t count, int64_t size) { return (count + size - 1) / size; }

// One step in flight: the caller's params and what the phases hand to each other.
struct Step {
  const DecodeParams* params;
  // (B, hidden_rows, d), rows apart: copies of hidden, widened, and as it is (bf16 only).
  float* hidden_f32;
  BFloat16* hidden_bf16;
  BFloat16* hidden_packed;  // in the order of packed_tile.h; bf16 with quantised heads only
  int64_t hidden_f32_stride, hidden_bf16_stride;  // between rows
  // A request's rows that meet the LM head: 1, or, for the probability mix of an embedding head,
  // 2: h, and h + M h + c right after it.
  int64_t hidden_rows;
  float* inner;  // (B, K r), rows inner_stride apart: D h of a correction
  int64_t inner_stride;
  int32_t* column;       // (B,): where the new position goes; -1 = the cache is full
  float* q;              // (B, g)
  float* head_context;   // (B, H): sum_s p_s u_s of each head
  float* reward_logits;  // (B, V), probability mix only: f(z_RM) between its two passes
  float* lm_shift;       // (B, 2), probability mix only: max and log-sum of f(z_LM) - max
  float* rm_shift;       // (B, 2), likewise for f(z_RM)
  float* unit_max;       // (B, units): largest logit; of f(z_LM) in the first pass of mix_probs
  float* unit_sum;       // (B, units): sum of exp(logit - unit_max)
  float* rm_unit_max;    // likewise for f(z_RM), probability mix only
  float* rm_unit_sum;
  // Of the matrices 0 (LM head), 1, ... K (objectives; U_k of a low-rank correction): those that
  // some row's alpha listens to.
  int64_t first_matrix, end_matrix;
};

// Work in ranges [begin, end) that threads share.
struct Kernels {
  const char* name;
  bool (*supported)();
  // hidden_packed of the whole batch; null where it is not used.
  void (*pack_hidden)(const Step&);
  // Units of kProjectionUnit rows: W_Q (g), W_K (g), then U (H) of the gate, then D (K r) of a
  // correction, for the whole batch. Writes q, the cache's new column and inner.
  void (*project)(const Step&, int64_t begin, int64_t end);
  // Units of kProjectionUnit inputs: an embedding head's change of hidden states.
  void (*move_hidden)(const Step&, int64_t begin, int64_t end);
  // (row, head) pairs: attention over the cache into head_context and out_attention.
  void (*attend)(const Step&, int64_t begin, int64_t end);
  // Units of kUnit vocabulary rows, for the whole batch: both products, the mixture (or, for the
  // probability mix, f of both), and each unit's softmax sums.
  void (*vocabulary)(const Step&, int64_t begin, int64_t end);
  // Units again: the probability mix, once both log-sum-exps are known.
  void (*mix_probabilities)(const Step&, int64_t begin, int64_t end);
  // Rows of the training loss: log-probabilities of the labels; then gradients in the logits'
  // place.
  void (*loss_rows)(const LossRowsParams&, int64_t begin, int64_t end);
  void (*loss_rows_backward)(const LossRowsParams&, int64_t begin, int64_t end);
};

// Rows of `project`, in units.
inline int64_t projection_units(const DecodeParams& p) {
  return units(2 * p.H * p.d_k, kProjectionUnit) + units(p.H, kProjectionUnit) +
         units(p.K * p.r, kProjectionUnit);
}

// The kernels in use: the best that this machine runs, or those that DUALHEAD_FORCE_ISA or
// force_kernels named. Throws std::runtime_error for a name that is unknown or that this machine
// cannot run.
const Kernels& chosen_kernels();

// "" goes back to the automatic choice. For tests: takes effect for steps that start afterwards.
void force_kernels(const std::string& name);

// Names that this build has and this machine runs, best first, separated by commas.
std::string available_levels();

// Whether the vendor's bf16 matrix product is faster here than its fp32 one. It is with AMX tiles,
// and on AMD, which issues vdpbf16ps at the rate of fp32 multiply-adds. Intel CPUs without AMX
// issue it at half that rate, so bf16 is no faster there. Outside x86-64 it is unknown: as the
// caller asked.
bool bf16_pays();

}  // namespace dualhead::cpu
