// SPDX-License-Identifier: Apache-2.0
// How the streaming path divides the heads' work. This is decided on the host: which steps it
// takes, and the layout of a block's shared memory.
//
// A unit is kUnit vocabulary entries. Their rows of two matrices are the 16 rows of one tensor core
// tile: the LM head and the first objective, then two objectives at a time; for a correction, the
// two halves of the LM head's rows. A block has a contiguous run of units and processes them tile
// by tile, with units_per_warp() units for each of its kConsumers warps. A tile's rows arrive
// through a ring of stages, each with a few blocks of 128 bytes of every row. These sizes do not
// affect the results: each sum takes the inputs in the one order of its format.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "../params.h"
#include "../sampling.h"

namespace dualhead {
namespace cuda {

constexpr int kUnit = 8;       // vocabulary entries that share a tile, and one softmax part
constexpr int kConsumers = 8;  // warps that multiply
constexpr int kGateWarps = 3;  // warps that compute alpha meanwhile
// One more warp fills the ring. With twelve warps a thread can have 168 registers; a thirteenth
// would be the fourth of its scheduler and leave 128.
constexpr int kStreamWarps = kConsumers + kGateWarps + 1;
constexpr int kRunBytes = 64;   // of a row: what the four lanes that share it read at once
constexpr int kRowBlock = 128;  // bytes of a row that are contiguous in shared memory: two runs
constexpr int kMaxStages = 8;
constexpr int kMaxBatchTile = 64;  // batch rows that share one pass over the weights

DUALHEAD_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
DUALHEAD_HD int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Whether the reward head corrects the LM head, whose matrix it shares.
DUALHEAD_HD bool corrects(const DecodeParams& p) { return p.reward_head != RewardHead::kFull; }

// Rows of hidden states that the LM head multiplies on this path. With an embedding head each
// request has two, h and M h + c. Their products are z_LM and delta, and neither waits for alpha.
// Four requests take eight rows (row_of_request).
DUALHEAD_HD int64_t product_rows(const DecodeParams& p) {
  return p.reward_head == RewardHead::kEmbedding ? 8 * ceil_div(p.B, 4) : p.B;
}

// For a correction: units of the vocabulary's first half. The second has as many, or one less.
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

// Steps of 8 inputs in sixteen bytes of a row, the bytes that a lane takes at once.
DUALHEAD_HD constexpr int steps_of(Format format) {
  return format == Format::kInt4 ? 4 : format == Format::kInt8 || format == Format::kFp8 ? 2 : 1;
}

// Inputs in kRunBytes of a row.
DUALHEAD_HD constexpr int run_inputs(Format format) { return 32 * steps_of(format); }

// Units per warp by the number of tiles of 8 batch rows. More units share the reads of hidden
// states, as far as the registers allow. int4 keeps a second sum, that of the group.
DUALHEAD_HD constexpr int units_per_warp(Format format, int batch_tiles) {
  return batch_tiles == 1 || (batch_tiles == 8 && format == Format::kInt4) ? 1 : 2;
}

// With quantised weights, hidden states become float16, scaled by a power of two and in the order
// of the runs. They have one term; fp32 has three, which hold all of its 24 bits.
inline int64_t operand_terms(const DecodeParams& p) {
  return p.quantization != Quantization::kNone && p.dtype == DType::kFloat32 ? 3 : 1;
}

inline int64_t operand_inputs(const DecodeParams& p) {
  return round_up(p.d, run_inputs(format_of(p)));
}

struct StreamPlan {
  int32_t batch_tile;  // batch rows of one pass over the weights: 8, 16, 32 or 64
  int32_t stages;
  int32_t under_way;      // stages in flight until alpha is known
  int32_t blocks;         // of a row of weights per stage
  int32_t stage_bytes;    // of weights, then of hidden states unless they are resident
  int32_t hidden_offset;  // into a stage; if resident, into shared memory
  int32_t ring_offset;    // into shared memory, as are the following
  int32_t kept_offset;    // of the products of tiles that wait for alpha
  int32_t kept_tiles;     // per warp
  int32_t shared_bytes;
  bool resident;  // all hidden states stay in shared memory
};

// A load waits behind all bytes that its multiprocessor has requested. With 128 KiB in flight that
// is about 7,000 clocks on an H200, which each phase of the gate would pay. 64 KiB keep the memory
// busy.
constexpr int64_t kUnderWay = 64 << 10;

// Bytes of shared memory below the ring: its barriers, and scales.
constexpr int kHeadBytes = 1024;

inline bool sixteen_divides_all(std::initializer_list<const void*> pointers) {
  uintptr_t bits = 0;
  for (const void* pointer : pointers) bits |= reinterpret_cast<uintptr_t>(pointer);
  return bits % 16 == 0;
}

// Bytes of a row, or of a stride, in the heads' format.
inline int64_t stored_bytes(const DecodeParams& p, int64_t elements) {
  return p.quantization == Quantization::kNone ? 2 * elements : elements;
}

// Bytes of one tile's products for all consumers: 16 x 8 values per unit and 8 columns.
DUALHEAD_HD constexpr int64_t kept_bytes(Format format, int batch_tiles) {
  return int64_t{4} * 2 * kUnit * 8 * batch_tiles * kConsumers *
         units_per_warp(format, batch_tiles);
}

// Tries one plan: a batch tile, `blocks` of each row per stage, and room for the products of
// kept_tiles tiles.
inline bool try_plan(const DecodeParams& p, int64_t shared_bytes, int64_t batch_tile,
                     int64_t blocks, int64_t kept_tiles, int64_t least_stages, StreamPlan* plan) {
  const Format format = format_of(p);
  const int64_t terms = operand_terms(p), batch_tiles = batch_tile / 8;
  const int64_t rows =
      2 * kUnit * kConsumers * units_per_warp(format, static_cast<int>(batch_tiles));
  const int64_t weights = rows * blocks * kRowBlock;
  const int64_t row = terms * batch_tile * kRowBlock;  // of hidden states, one block of each
  const int64_t row_blocks = ceil_div(2 * p.d / steps_of(format), kRowBlock);
  const int64_t whole = row * row_blocks * steps_of(format);
  const int64_t kept = kept_tiles * kept_bytes(format, static_cast<int>(batch_tiles));
  const int64_t space = shared_bytes - kHeadBytes - kept;
  // If resident, every block reads them only once; but the ring must keep enough stages.
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

// Whether the streaming path takes this step. fp32 weights, and rows that do not start and end at
// multiples of 16 bytes, go to the plain path.
inline bool streams(const DecodeParams& p) {
  if (p.lm_product) return false;
  const bool quantized = p.quantization != Quantization::kNone;
  if (!quantized && p.dtype == DType::kFloat32) return false;
  const int64_t weight_bits = stored_bytes(p, p.lm_weight_stride) |
                              stored_bytes(p, p.reward_weight_stride) |
                              stored_bytes(p, p.reward_weight_stride_k);
  const int64_t row_bytes = p.quantization == Quantization::kInt4 ? p.d / 2 : stored_bytes(p, p.d);
  // Eight hidden states are 16 or 32 bytes.
  return row_bytes % 16 == 0 && weight_bits % 16 == 0 && p.d % 8 == 0 && p.hidden_stride % 8 == 0 &&
         sixteen_divides_all({p.hidden, p.lm_weight, p.reward_weight, p.reward_down, p.q_weight,
                              p.k_weight, p.u_weight});
}

// Beyond the rows of one pass, a GEMM reads the weights once and the kernels once per pass. A GEMM
// of quantised weights would need them dequantised first: per weight one byte read, two written and
// two read again. Five passes over the one byte, enough for 320 rows, move no more.
inline bool wants_products(const DecodeParams& p) {
  return p.B > kMaxBatchTile && p.quantization == Quantization::kNone;
}

// Tiles whose products can be kept while alpha is not yet known. A tile of 8 batch rows at d = 4096
// is 1 MiB of bf16 weights, 32 us of memory bandwidth, or for int4 8 us; alpha takes about 10.
// Larger batches have tiles of twice the rows, and alpha is known before the first one ends.
constexpr int64_t kKeptTiles = 4;

// The plan for a device with this much shared memory per block; false if none fits.
//
// Worked example, H200, bf16, d = 4096, B = 1: of the 227 KiB of a block, hidden states take 64 and
// kept products 16. Two blocks of 128 rows are 32 KiB per stage, so there are four stages. Memory
// delivers 16.5 bytes per clock to a multiprocessor, so a stage takes 1,990 clocks. With a latency
// of 1,600 clocks 26 KiB must be in flight; at least 96 are (64 until alpha is known).
inline bool make_plan(const DecodeParams& p, int64_t shared_bytes, StreamPlan* plan) {
  int64_t most = 8;
  while (most < kMaxBatchTile && most < product_rows(p)) most *= 2;
  const auto fits = [&](int64_t batch_tile, int64_t kept, int64_t stages) {
    for (int64_t blocks : {2, 1}) {
      if (try_plan(p, shared_bytes, batch_tile, blocks, kept, stages, plan)) return true;
    }
    return false;
  };
  // With fewer than four stages memory idles while one of them is read. With a smaller batch tile
  // the weights are read twice, which is worse.
  for (int64_t batch_tile = most; batch_tile >= 8; batch_tile /= 2) {
    if (batch_tile == 8 && fits(8, kKeptTiles, 4)) return true;
    if (fits(batch_tile, 0, 4) || fits(batch_tile, 0, 2)) return true;
  }
  return false;
}

}  // namespace cuda
}  // namespace dualhead
