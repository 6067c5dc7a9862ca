// SPDX-License-Identifier: Apache-2.0
// How the streaming path cuts the heads' work, decided on the host: which steps it takes, and what
// a block's shared memory holds.
//
// A unit is kUnit vocabulary entries: their rows of two matrices (LM head and first objective, then
// objectives two at a time; of a correction, the two halves of the vocabulary's rows of the LM
// head) are the 16 rows of one tensor core tile. A block has a run of units and
// takes them a tile at a time, units_per_warp() for each of its kConsumers warps; a tile's rows
// come through a ring of stages, each with a few blocks of 128 bytes of every row. None of these
// sizes shows in a result: each sum goes through the inputs in the one order that the format has.
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
constexpr int kRunBytes = 64;   // of a row: what the four lanes that share it take at once
constexpr int kRowBlock = 128;  // bytes of a row that lie together in shared memory: two runs
constexpr int kMaxStages = 8;
constexpr int kMaxBatchTile = 64;  // batch rows that share one pass over the weights

DUALHEAD_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
DUALHEAD_HD int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Whether the reward head corrects the LM head, whose matrix it shares.
DUALHEAD_HD bool corrects(const DecodeParams& p) { return p.reward_head != RewardHead::kFull; }

// Rows of hidden states that meet the LM head on this path. Of an embedding head each request has
// two, h and M h + c: their products are z_LM and delta, and neither waits for alpha. Eight rows
// are of four requests (row_of_request).
DUALHEAD_HD int64_t product_rows(const DecodeParams& p) {
  return p.reward_head == RewardHead::kEmbedding ? 8 * ceil_div(p.B, 4) : p.B;
}

// Of a correction: units of the vocabulary's first half; the second has as many or one less.
DUALHEAD_HD int half_units(const DecodeParams& p) {
  return corrects(p) ? static_cast<int>(ceil_div(ceil_div(p.V, kUnit), 2)) : 0;
}

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
  int32_t under_way;      // stages that are asked for at once until alpha is there
  int32_t blocks;         // of a row of weights in one stage
  int32_t stage_bytes;    // of weights, then of hidden states unless they are resident
  int32_t hidden_offset;  // into a stage; resident: into shared memory
  int32_t ring_offset;    // into shared memory, as is:
  int32_t kept_offset;    // of the products of tiles that wait for alpha
  int32_t kept_tiles;     // of each warp
  int32_t shared_bytes;
  bool resident;  // hidden states lie in shared memory as a whole
};

// A load waits behind all bytes that its multiprocessor has asked for: with 128 KiB under way about
// 7,000 clocks on an H200, which the gate would pay in each of its phases. 64 KiB keep memory busy.
constexpr int64_t kUnderWay = 64 << 10;

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

// Bytes of one tile's products, for all consumers: 16 x 8 numbers a unit and 8 columns.
DUALHEAD_HD constexpr int64_t kept_bytes(Format format, int batch_tiles) {
  return int64_t{4} * 2 * kUnit * 8 * batch_tiles * kConsumers *
         units_per_warp(format, batch_tiles);
}

// One way to cut: a batch tile, `blocks` of each row per stage, and room for the products of
// kept_tiles.
inline bool try_plan(const DecodeParams& p, int64_t shared_bytes, int64_t batch_tile,
                     int64_t blocks, int64_t kept_tiles, int64_t least_stages, StreamPlan* plan) {
  const Format format = format_of(p);
  const int64_t terms = operand_terms(p), batch_tiles = batch_tile / 8;
  const int64_t rows =
      2 * kUnit * kConsumers * units_per_warp(format, static_cast<int>(batch_tiles));
  const int64_t weights = rows * blocks * kRowBlock;
  const int64_t row = terms * batch_tile * kRowBlock;  // of hidden states, a block of each
  const int64_t row_blocks = ceil_div(2 * p.d / steps_of(format), kRowBlock);
  const int64_t whole = row * row_blocks * steps_of(format);
  const int64_t kept = kept_tiles * kept_bytes(format, static_cast<int>(batch_tiles));
  const int64_t space = shared_bytes - kHeadBytes - kept;
  // Resident, every block reads them once; but not at the ring's expense.
  const bool resident = product_rows(p) <= batch_tile && whole <= space / 2 &&
                        (space - whole) / weights >= least_stages;
  const int64_t stage = weights + (resident ? 0 : row * blocks * steps_of(format));
  const int64_t ring = kHeadBytes + (resident ? whole : 0);
  const int64_t fit = (shared_bytes - kept - ring) / stage;
  const int64_t stages = fit < kMaxStages ? fit : kMaxStages;
  if (stages < least_stages) return false;
  plan->batch_tile = static_cast<int32_t>(batch_tile);
  plan->stages = static_cast<int32_t>(stages);
  const int64_t under_way = ceil_div(kUnderWay, stage) > 2 ? ceil_div(kUnderWay, stage) : 2;
  plan->under_way = static_cast<int32_t>(under_way < stages ? under_way : stages);
  plan->blocks = static_cast<int32_t>(blocks);
  plan->stage_bytes = static_cast<int32_t>(stage);
  plan->hidden_offset = static_cast<int32_t>(resident ? kHeadBytes : weights);
  plan->ring_offset = static_cast<int32_t>(ring);
  plan->kept_offset = static_cast<int32_t>(ring + stages * stage);
  plan->kept_tiles = static_cast<int32_t>(kept_tiles);
  plan->shared_bytes = static_cast<int32_t>(ring + stages * stage + kept);
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
         sixteen_divides_all({p.hidden, p.lm_weight, p.reward_weight, p.reward_down, p.q_weight,
                              p.k_weight, p.u_weight});
}

// Beyond one pass's rows a GEMM reads the weights once, the kernels once per pass. Quantised
// weights have no GEMM but after widening: a byte read, two written and two read again for each,
// which five passes over the byte itself do not exceed, at 320 rows. Corrections have none yet.
inline bool wants_products(const DecodeParams& p) {
  return p.B > kMaxBatchTile && p.quantization == Quantization::kNone && !corrects(p);
}

// Room for the products of this many tiles, while alpha is not there yet. A tile of 8 batch rows is
// 1 MiB of bf16 weights at d = 4096, 32 us of memory's time, and of int4 8 us; alpha takes
// about 10. Larger batches have tiles of twice the rows, and alpha is there before the first ends.
constexpr int64_t kKeptTiles = 4;

// The plan for a device with so much shared memory per block; false if none fits.
//
// Worked example, H200, bf16, d = 4096, B = 1: 227 KiB a block, of which hidden states take 64 and
// kept products 16. Two blocks of 128 rows are 32 KiB a stage, so four stages. Memory brings 16.5
// bytes a clock to a multiprocessor, a stage in 1,990 clocks; with a latency of 1,600 clocks 26 KiB
// must be under way, and at least 96 are.
inline bool make_plan(const DecodeParams& p, int64_t shared_bytes, StreamPlan* plan) {
  int64_t most = 8;
  while (most < kMaxBatchTile && most < product_rows(p)) most *= 2;
  const auto fits = [&](int64_t batch_tile, int64_t kept, int64_t stages) {
    for (int64_t blocks : {2, 1}) {
      if (try_plan(p, shared_bytes, batch_tile, blocks, kept, stages, plan)) return true;
    }
    return false;
  };
  // With fewer than four stages memory idles while one of them is read; with a smaller batch tile
  // the weights are read twice, which is worse.
  for (int64_t batch_tile = most; batch_tile >= 8; batch_tile /= 2) {
    if (batch_tile == 8 && fits(8, kKeptTiles, 4)) return true;
    if (fits(batch_tile, 0, 4) || fits(batch_tile, 0, 2)) return true;
  }
  return false;
}

}  // namespace cuda
}  // namespace dualhead
