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
  int32_t sums_offset;    // of the sums on their way to the lanes that finish them
  int32_t shared_bytes;
  bool resident;        // all hidden states stay in shared memory
  bool projects_early;  // the gate projects before the grid barrier, while memory is still idle
};

// A load waits behind all bytes that its multiprocessor has requested. With 128 KiB in flight that
// is about 7,000 clocks on an H200, which each of the gate's loads would pay. With 64 KiB it is
// less, but the stream then runs at two thirds of its speed. So alpha gets these 64 KiB only where
// tiles would wait for it.
constexpr int64_t kUnderWay = 64 << 10;

// Of a ring's bytes a load waits for no more than these: behind a full ring the slowest took 9,000
// clocks. And what idle memory could deliver during a load, 1,600 clocks at 17.6 bytes.
constexpr int64_t kMostAhead = 128 << 10, kIdleLoad = 28 << 10;

// Loads from the grid barrier to alpha, each of which waits for the one before: 8.3 by the clocks
// of an H200, and 6.0 more, for larger batches 10.3, if the projections come behind the barrier.
// With the gate's logit given, alpha and the counter of rows are left.
inline int64_t loads_until_alpha(const DecodeParams& p, bool early) {
  if (p.gate_logit) return 2;
  return early ? 9 : p.B <= 16 ? 15 : 20;
}

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

// A row of sums in shared memory: a unit's eight, and four that are not used, so that eight lanes
// which read sixteen bytes of eight rows use all 32 banks once.
constexpr int kSumsPitch = 12;

// Bytes of the sums that all consumers finish at once: two matrices, at most 32 rows.
DUALHEAD_HD constexpr int64_t sums_bytes(int64_t batch_tile) {
  return int64_t{4} * 2 * kSumsPitch * kConsumers * (batch_tile < 32 ? batch_tile : 32);
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
  const int64_t sums = corrects(p) ? 0 : sums_bytes(batch_tile);
  const int64_t space = shared_bytes - kHeadBytes - kept - sums;
  // If resident, every block reads them only once; but the ring must keep enough stages.
  const bool resident = product_rows(p) <= batch_tile && whole <= space / 2 &&
                        (space - whole) / weights >= least_stages;
  const int64_t stage = weights + (resident ? 0 : row * blocks * steps_of(format));
  const int64_t ring = kHeadBytes + (resident ? whole : 0);
  const int64_t fit = (shared_bytes - kept - sums - ring) / stage;
  const int64_t stages = fit < kMaxStages ? fit : kMaxStages;
  if (stages < least_stages) return false;
  plan->batch_tile = static_cast<int32_t>(batch_tile);
  plan->stages = static_cast<int32_t>(stages);
  plan->blocks = static_cast<int32_t>(blocks);
  plan->stage_bytes = static_cast<int32_t>(stage);
  plan->hidden_offset = static_cast<int32_t>(resident ? kHeadBytes : weights);
  plan->ring_offset = static_cast<int32_t>(ring);
  plan->kept_offset = static_cast<int32_t>(ring + stages * stage);
  plan->kept_tiles = static_cast<int32_t>(kept_tiles);
  plan->sums_offset = static_cast<int32_t>(ring + stages * stage + kept);
  plan->shared_bytes = static_cast<int32_t>(ring + stages * stage + kept + sums);
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

// Decides how the gate runs beside the stream, so that alpha comes before the tiles of a block that
// can wait for it have passed. Each of the gate's loads takes the time of the ring's bytes. In this
// order, the cheapest first: project behind the grid barrier; project before it, which at d = 4096
// delays the stream by 6,000 clocks for one request and 16,000 for 64; and leave a part of the ring
// empty until alpha is known.
inline void plan_gate(const DecodeParams& p, int64_t grid, StreamPlan* plan) {
  const Format format = format_of(p);
  const int64_t stage = plan->stage_bytes, ring = plan->stages * stage;
  const int64_t ahead = (ring < kMostAhead ? ring : kMostAhead) + kIdleLoad;
  const int64_t tile_units = kConsumers * units_per_warp(format, plan->batch_tile / 8);
  const int64_t units = ceil_div(corrects(p) ? half_units(p) : ceil_div(p.V, kUnit), grid);
  const int64_t waiting = (plan->kept_tiles > 1 ? plan->kept_tiles : 1) * tile_units;
  const int64_t passes = corrects(p) ? 1 : (p.K + 2) / 2;
  const int64_t unit_bytes = passes * 2 * kUnit * (2 * p.d / steps_of(format));
  const int64_t until_needed = (waiting < units ? waiting : units) * unit_bytes;
  const auto comes_in_time = [&](bool early) {
    return until_needed >= loads_until_alpha(p, early) * ahead;
  };
  // Early fp32 projections of more than two requests would take too long. With a correction, the
  // rows that the LM head multiplies depend on them.
  const int64_t most = p.dtype == DType::kFloat32 ? 2 : kMaxBatchTile;
  const bool can_be_early = !p.gate_logit && p.B <= most;
  plan->projects_early = corrects(p) || (can_be_early && !comes_in_time(false));
  const int64_t least = ceil_div(kUnderWay, stage) > 2 ? ceil_div(kUnderWay, stage) : 2;
  const bool whole = comes_in_time(plan->projects_early) || least > plan->stages;
  plan->under_way = static_cast<int32_t>(whole ? plan->stages : least);
}

// The plan for a device with this much shared memory per block and a grid of so many blocks; false
// if none fits.
//
// Worked example, H200, bf16, d = 4096, B = 1: of the 227 KiB of a block, hidden states take 64,
// kept products 16 and sums 6. Two blocks of 128 rows are 32 KiB per stage, so there are four
// stages. Memory delivers 16.5 bytes per clock to a multiprocessor, so a stage takes 1,990 clocks.
// With a latency of 1,600 clocks 26 KiB must be in flight; at least 96 are. At V = 32000 a block
// has 31 units of 128 KiB, which all can wait: 3.9 MiB. The gate's fifteen loads, projections
// included, take the time of 2.3 MiB. So it projects behind the barrier, and the whole ring is
// under way from the start. int4's tiles are a quarter of that: it projects early, and 64 KiB are
// under way.
inline bool make_plan(const DecodeParams& p, int64_t shared_bytes, int64_t grid, StreamPlan* plan) {
  int64_t most = 8;
  while (most < kMaxBatchTile && most < product_rows(p)) most *= 2;
  const auto fits = [&](int64_t batch_tile, int64_t kept, int64_t stages) {
    for (int64_t blocks : {2, 1}) {
      if (!try_plan(p, shared_bytes, batch_tile, blocks, kept, stages, plan)) continue;
      plan_gate(p, grid, plan);
      return true;
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
