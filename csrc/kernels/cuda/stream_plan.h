// SPDX-License-Identifier: Apache-2.0
// How the streaming path cuts the heads' work, decided on the host: which steps it takes, and what
// a block's shared memory holds.
//
// A unit is kUnit vocabulary entries: their rows of two matrices (LM head and first objective, then
// objectives two at a time) are the 16 rows of one tensor core tile. A block has a run of units and
// takes them a tile at a time, units_per_warp() for each of its kConsumers warps; a tile's rows
// come through a ring of stages, each with run_bytes of every row. None of these sizes shows in a
// result: each sum goes through the inputs in the one order that the format has.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "../params.h"
#include "../sampling.h"

namespace dualhead {
namespace cuda {

constexpr int kUnit = 8;       // vocabulary entries that share a tile, and one softmax part
constexpr int kConsumers = 8;  // warps that multiply
constexpr int kGateWarps = 3;  // warps that make alpha meanwhile
// And one that fills the ring. Twelve warps have 168 registers a thread; a thirteenth, the fourth
// of its scheduler, would leave 128.
constexpr int kStreamWarps = kConsumers + kGateWarps + 1;
constexpr int kRunBytes = 64;  // of a row: what the four lanes that share it take at once
constexpr int kPadBytes = 64;  // between rows in shared memory, against bank conflicts; int4
                               // keeps the scales of a stage's groups there
constexpr int kMaxStages = 8;
constexpr int kMaxBatchTile = 64;  // batch rows that share one pass over the weights

DUALHEAD_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
DUALHEAD_HD int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

enum class Format : int32_t { kBFloat16, kFloat16, kInt8, kFp8, kInt4 };

inline Format format_of(const DecodeParams& p) {
  switch (p.quantization) {
    case Quantization::kInt8:
      return Format::kInt8;
    case Quantization::kFp8:
      return Format::kFp8;
    case Quantization::kInt4:
      return Format::kInt4;
    default:
      return p.dtype == DType::kFloat16 ? Format::kFloat16 : Format::kBFloat16;
  }
}

// Steps of 8 inputs that sixteen bytes of a row hold; a lane takes as many at once.
DUALHEAD_HD constexpr int steps_of(Format format) {
  return format == Format::kInt4 ? 4 : format == Format::kInt8 || format == Format::kFp8 ? 2 : 1;
}

// Inputs of kRunBytes of a row.
DUALHEAD_HD constexpr int run_inputs(Format format) { return 32 * steps_of(format); }

// Units that each warp holds at once, by tiles of 8 batch rows: more share what is read of hidden
// states, as far as the registers go. int4 keeps a second sum, of the group.
DUALHEAD_HD constexpr int units_per_warp(Format format, int batch_tiles) {
  return batch_tiles == 1 || (batch_tiles == 8 && format == Format::kInt4) ? 1 : 2;
}

// Hidden states under quantised weights become float16, a power of two apart and in the order of
// the runs: one term, or for fp32 the three that hold all of its 24 bits.
inline int64_t operand_terms(const DecodeParams& p) {
  return p.quantization != Quantization::kNone && p.dtype == DType::kFloat32 ? 3 : 1;
}

inline int64_t operand_inputs(const DecodeParams& p) {
  return round_up(p.d, run_inputs(format_of(p)));
}

struct StreamPlan {
  int32_t batch_tile;  // batch rows of one pass over the weights: 8, 16, 32 or 64
  int32_t stages;
  int32_t row_bytes;      // of a row in one stage
  int32_t row_pitch;      // between rows of a stage, in bytes
  int32_t hidden_pitch;   // between rows of hidden states in shared memory, in bytes
  int32_t stage_bytes;    // of weights, then of hidden states unless they are resident
  int32_t hidden_offset;  // into a stage; resident: into shared memory
  int32_t ring_offset;    // into shared memory
  int32_t shared_bytes;
  bool resident;  // hidden states lie in shared memory as a whole
};

// Shared memory below the ring: its barriers, and scales.
constexpr int kHeadBytes = 1024;

inline bool sixteen_divides_all(std::initializer_list<const void*> pointers) {
  uintptr_t bits = 0;
  for (const void* pointer : pointers) bits |= reinterpret_cast<uintptr_t>(pointer);
  return bits % 16 == 0;
}

// Bytes of a row, and of what is between rows, in the heads' format.
inline int64_t stored_bytes(const DecodeParams& p, int64_t elements) {
  return p.quantization == Quantization::kNone ? 2 * elements : elements;
}

// One way to cut: a batch tile, and run_bytes of each row per stage.
inline bool try_plan(const DecodeParams& p, int64_t shared_bytes, int64_t batch_tile,
                     int64_t row_bytes, int64_t least_stages, StreamPlan* plan) {
  const Format format = format_of(p);
  const int64_t terms = operand_terms(p), batch_tiles = batch_tile / 8;
  const int64_t rows = 2 * kUnit * kConsumers * units_per_warp(format, batch_tiles);
  const int64_t weights = rows * (row_bytes + kPadBytes);
  // Rows of hidden states too are an odd number of 64 bytes apart.
  const int64_t whole_pitch = round_up(2 * operand_inputs(p), 128) + kPadBytes;
  const int64_t stage_pitch = row_bytes * steps_of(format) + kPadBytes;
  const int64_t whole = terms * batch_tile * whole_pitch;
  const int64_t space = shared_bytes - kHeadBytes;
  // Resident, every block reads them once; but not at the ring's expense.
  const bool resident =
      p.B <= batch_tile && whole <= space / 2 && (space - whole) / weights >= least_stages;
  const int64_t stage = weights + (resident ? 0 : terms * batch_tile * stage_pitch);
  const int64_t ring = kHeadBytes + (resident ? whole : 0);
  const int64_t fit = (shared_bytes - ring) / stage, stages = fit < kMaxStages ? fit : kMaxStages;
  if (stages < least_stages) return false;
  plan->batch_tile = static_cast<int32_t>(batch_tile);
  plan->stages = static_cast<int32_t>(stages);
  plan->row_bytes = static_cast<int32_t>(row_bytes);
  plan->row_pitch = static_cast<int32_t>(row_bytes + kPadBytes);
  plan->hidden_pitch = static_cast<int32_t>(resident ? whole_pitch : stage_pitch);
  plan->stage_bytes = static_cast<int32_t>(stage);
  plan->hidden_offset = static_cast<int32_t>(resident ? kHeadBytes : weights);
  plan->ring_offset = static_cast<int32_t>(ring);
  plan->shared_bytes = static_cast<int32_t>(ring + stages * stage);
  plan->resident = resident;
  return true;
}

// Whether the streaming path takes this step. fp32 weights go to the plain one, and so do rows that
// do not start at multiples of 16 bytes.
inline bool streams(const DecodeParams& p) {
  if (p.lm_product) return false;
  const bool quantized = p.quantization != Quantization::kNone;
  if (!quantized && p.dtype == DType::kFloat32) return false;
  const int64_t weight_bits = stored_bytes(p, p.lm_weight_stride) |
                              stored_bytes(p, p.reward_weight_stride) |
                              stored_bytes(p, p.reward_weight_stride_k);
  const int64_t row_bytes = p.quantization == Quantization::kInt4 ? p.d / 2 : stored_bytes(p, p.d);
  // Eight hidden states are 16 bytes or 32.
  return row_bytes % 16 == 0 && weight_bits % 16 == 0 && p.d % 8 == 0 && p.hidden_stride % 8 == 0 &&
         sixteen_divides_all(
             {p.hidden, p.lm_weight, p.reward_weight, p.q_weight, p.k_weight, p.u_weight});
}

// Beyond one pass's rows a GEMM reads the weights once, the kernels once per pass. Quantised
// weights have no GEMM but after widening: a byte read, two written and two read again for each,
// which five passes over the byte itself do not exceed, at 320 rows.
inline bool wants_products(const DecodeParams& p) {
  return p.B > kMaxBatchTile && p.quantization == Quantization::kNone;
}

// The plan for a device with so much shared memory per block; false if none fits.
inline bool make_plan(const DecodeParams& p, int64_t shared_bytes, bool bulk, StreamPlan* plan) {
  // The longer a row's run, the better for memory, and the fewer bulk copies; at least two stages,
  // or, where each thread copies 16 bytes at a time, four: then there is less to wait for at once.
  const int64_t least = bulk ? 2 : 4;
  int64_t batch_tile = 8;
  while (batch_tile < kMaxBatchTile && batch_tile < p.B) batch_tile *= 2;
  for (; batch_tile >= 8; batch_tile /= 2) {
    for (int64_t row_bytes = 256; row_bytes >= kRunBytes; row_bytes /= 2) {
      if (try_plan(p, shared_bytes, batch_tile, row_bytes, least, plan)) return true;
    }
  }
  return false;
}

}  // namespace cuda
}  // namespace dualhead
