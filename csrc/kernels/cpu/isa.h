// SPDX-License-Identifier: Apache-2.0
// Chooses among the kernels compiled for several instruction sets, and declares what each provides.
// The algorithms (dot_tile.h, int4_tile.h, gate.h, correction.h, vocabulary.h, loss_rows.h) are
// written once and compiled once per instruction set by the isa_*.cpp files. Only simd_*.h,
// packed_tile.h, tile_amx.h and tile_product.h contain intrinsics or assembly. Tests also compile
// the files of AVX-512 and AMX with emulated intrinsics, so that they run on any machine
// (csrc/testing/host_x86, DUALHEAD_EMULATED).
#pragma once

#include <cstdint>
#include <string>

#include "../params.h"
#include "../weight_format.h"

namespace dualhead::cpu {

// Vocabulary rows per unit of work. Fixed, so that the result does not depend on the thread count.
constexpr int64_t kUnit = 64;
// Projection rows per unit of work.
constexpr int64_t kProjectionUnit = 16;
// Requests whose logits of one unit are on the stack at the same time.
constexpr int64_t kBatchBlock = 64;
// Rows of zeros that packing may add to a block, to make its tiles equally large.
constexpr int64_t kTilePadding = 3;

inline int64_t units(int64_t count, int64_t size) { return (count + size - 1) / size; }

// The state of one step: the caller's params and the data that its phases pass on.
struct Step {
  const DecodeParams* params;
  // (B, hidden_rows, d), padded rows: copies of hidden, widened to fp32 and, for bf16, unchanged.
  float* hidden_f32;
  BFloat16* hidden_bf16;
  BFloat16* hidden_packed;  // in the order of packed_tile.h or tile_product.h; null for fp32
  int64_t hidden_f32_stride, hidden_bf16_stride;  // between rows
  // Rows per request that the LM head multiplies: 1; or 2 for the probability mix of an embedding
  // head: h, then h + M h + c.
  int64_t hidden_rows;
  float* inner;  // (B, K r), rows inner_stride apart: D h of a correction
  int64_t inner_stride;
  int32_t* column;       // (B,): column of the new position; -1 if the cache is full
  float* q;              // (B, g)
  float* head_context;   // (B, H): sum_s p_s u_s of each head
  float* reward_logits;  // (B, V), probability mix only: f(z_RM) between the two passes
  float* lm_shift;       // (B, 2), probability mix only: max and log-sum of f(z_LM) - max
  float* rm_shift;       // (B, 2), likewise for f(z_RM)
  float* unit_max;       // (B, units): largest logit; mix_probs, first pass: of f(z_LM)
  float* unit_sum;       // (B, units): sum of exp(logit - unit_max)
  float* rm_unit_max;    // likewise for f(z_RM), probability mix only
  float* rm_unit_sum;
  // The range of matrices that some row's alpha needs. Matrix 0 is the LM head; 1, ... K are the
  // objectives, or U_k of a low-rank correction.
  int64_t first_matrix, end_matrix;
};

// The kernels of one instruction set. Each processes a range [begin, end) of the work, so that
// threads can share it.
struct Kernels {
  const char* name;
  bool (*supported)();
  // From this batch size on, GEMMs of fp32 heads are faster than `vocabulary` (decode.h); 0: never.
  int64_t gemm_batch;
  // Fills hidden_packed with the rows of h, for `project`. Null if that does not use it.
  void (*pack_requests)(const Step&);
  // Units of kProjectionUnit rows for the whole batch: W_Q (g), W_K (g), U (H) of the gate, then D
  // (K r) of a correction. Writes q, the cache's new column and inner.
  void (*project)(const Step&, int64_t begin, int64_t end);
  // Fills hidden_packed with all rows, for `vocabulary`. Null if that does not use it.
  void (*pack_hidden)(const Step&);
  // Units of kProjectionUnit inputs: applies an embedding head's change to the hidden states.
  void (*move_hidden)(const Step&, int64_t begin, int64_t end);
  // (row, head) pairs: attention over the cache, written to head_context and out_attention.
  void (*attend)(const Step&, int64_t begin, int64_t end);
  // Units of kUnit vocabulary rows for the whole batch: both products, the mixture (or, for the
  // probability mix, f of both), and the softmax sums of each unit.
  void (*vocabulary)(const Step&, int64_t begin, int64_t end);
  // The same units, if the products are given.
  void (*mix_products)(const Step&, int64_t begin, int64_t end);
  // The same units: the probability mix, once both log-sum-exps are known.
  void (*mix_probabilities)(const Step&, int64_t begin, int64_t end);
  // Rows of the training loss: the log-probabilities of the labels, then the gradients, which
  // overwrite the logits.
  void (*loss_rows)(const LossRowsParams&, int64_t begin, int64_t end);
  void (*loss_rows_backward)(const LossRowsParams&, int64_t begin, int64_t end);
};

// The rows of `project`, counted in units.
inline int64_t projection_units(const DecodeParams& p) {
  return units(2 * p.H * p.d_k, kProjectionUnit) + units(p.H, kProjectionUnit) +
         units(p.K * p.r, kProjectionUnit);
}

// The kernels in use: the best that this machine can run, or those named by DUALHEAD_FORCE_ISA or
// force_kernels. Throws std::runtime_error if the name is unknown or this machine cannot run it.
const Kernels& chosen_kernels();

// For tests. Takes effect for steps that start afterwards; "" restores the automatic choice.
void force_kernels(const std::string& name);

// The instruction sets that this build has and this machine can run: best first, separated by
// commas.
std::string available_levels();

// Whether the vendor library's bf16 matrix product is faster here than its fp32 one. It is with AMX
// tiles, and on AMD, which issues vdpbf16ps at the rate of fp32 multiply-adds. Intel CPUs without
// AMX issue it at half that rate, so bf16 is no faster there. Outside x86-64 it is unknown, and the
// result is true.
bool bf16_pays();

}  // namespace dualhead::cpu
