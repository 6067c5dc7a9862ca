// SPDX-License-Identifier: Apache-2.0
// The ring buffer in shared memory through which the weights arrive, and the producer warp that
// fills it. A stage is full when its copies have arrived, and empty when every consumer warp has
// released it. Each slot has a full and an empty barrier, used alternately and never reset.
//
// A stage contains blocks of 128 bytes: first those of the tile's rows of the first matrix, block
// by block, then those of the second, then those of the hidden states. Within a block the rows
// follow each other, swizzled.
//
// On sm_90 and up one lane asks the copy engine for whole boxes: all rows of a block in one
// instruction. Below sm_90 each lane copies sixteen bytes at a time. Both use the same barrier and
// produce the same layout, so the consumers do not distinguish them.
#pragma once

#include "gate.cuh"
#include "primitives.cuh"
#include "workspace.h"

namespace dualhead {
namespace cuda {

constexpr int kBoxes = 5;  // box sizes: 1, 2, 4, 8 and 16 units

// What the copy engine reads, in boxes of the rows of 2^i units. A full tile is one box. Where a
// block's units end within a tile, there is one box per set bit of the number of units left,
// because a box takes the engine about as long with 8 rows as with 32. Unused and not filled in
// where lanes copy.
struct StreamMaps {
  TensorMap lm[kBoxes];
  TensorMap reward[kBoxes];  // one plane per objective; correction: LM head's second half
  TensorMap hidden;          // a batch tile; the operand's terms follow each other
};

// The work of a block and the layout of its stages, the same for all of its threads. kCorrects: the
// reward head is a correction. Full heads and corrections are separate kernels, so that neither
// needs the other's registers.
template <bool kCorrects>
struct Stream {
  const DecodeParams& p;
  const Workspace& ws;
  const StreamPlan& plan;
  const StreamMaps& maps;
  int begin = 0, end = 0;                      // the block's range of units
  int weight_bytes = 0;                        // per row
  int row_blocks = 0;                          // per row of weights
  int chunks = 0, passes = 0;                  // stages per row; pairs of matrices
  int tile_units = 0;                          // units per full tile
  const unsigned char* hidden = nullptr;       // the products' operand: (terms, B, operand inputs)
  int64_t hidden_stride = 0, term_stride = 0;  // in bytes
  int hidden_bytes = 0;                        // per row
  int terms = 1;
  const float* operand_scale = nullptr;  // (B,): factors of the sums; quantised weights only

  // Rows of hidden states.
  __device__ __forceinline__ int rows() const {
    return static_cast<int>(kCorrects ? product_rows(p) : p.B);
  }

  // For a correction: the distance in units from the first half of the vocabulary to the second.
  // Otherwise 0.
  __device__ __forceinline__ int half() const { return kCorrects ? half_units(p) : 0; }

  // Bytes of one block of a tile's rows.
  __device__ __forceinline__ int block_bytes() const { return tile_units * kUnit * kBlockBytes; }

  // Blocks of a row of weights in a stage of this chunk. Of hidden states there are steps_of()
  // times as many.
  __device__ __forceinline__ int blocks_of(int chunk) const {
    const int left = row_blocks - chunk * plan.blocks;
    return left < plan.blocks ? left : plan.blocks;
  }
};

struct Slot {
  int index = 0;
  unsigned parity = 0;  // of the phase that this round completes

  __device__ __forceinline__ void advance(int stages) {
    if (++index < stages) return;
    index = 0;
    parity ^= 1u;
  }
};

__device__ __forceinline__ Barrier* full_barrier(const Slot& slot) {
  return reinterpret_cast<Barrier*>(shared_memory()) + slot.index;
}

__device__ __forceinline__ Barrier* empty_barrier(const Slot& slot) {
  return reinterpret_cast<Barrier*>(shared_memory()) + kMaxStages + slot.index;
}

__device__ __forceinline__ unsigned char* stage_of(const StreamPlan& plan, const Slot& slot) {
  return shared_memory() + plan.ring_offset + slot.index * plan.stage_bytes;
}

// Copies what a box would copy, to the same places, with the lanes of a warp: `blocks` blocks of
// `rows` rows, sixteen bytes at a time. row_of(r) is the first byte of row r, or null if there is
// none. Missing rows, and bytes from `left` on, become zeros.
template <typename RowOf>
__device__ __forceinline__ void copy_by_lanes(unsigned char* to, int rows, int blocks, int left,
                                              uint64_t policy, RowOf row_of) {
  const unsigned sixteens = kBlockBytes / 16;
  for (unsigned i = lane_index(); i < sixteens * rows * blocks; i += kWarp) {
    const int sixteen = i % sixteens, r = i / sixteens % rows, block = i / sixteens / rows;
    const int at = block * kBlockBytes + 16 * sixteen;
    const unsigned char* row = row_of(r);
    const bool there = row != nullptr && at < left;
    async_copy_16(to + block * rows * kBlockBytes + swizzled(r, sixteen),
                  there ? row + at : nullptr, there, policy);
  }
}

// Goes through a block's stages in the order in which the consumers take them: batch tiles, tiles
// of units, passes over pairs of matrices, chunks of the inputs.
template <Format kFormat, bool kBulk, bool kCorrects>
struct Producer {
  const Stream<kCorrects>& s;
  int b0 = 0, unit = s.begin, pass = 0, chunk = 0;
  Slot slot = {};
  Needs needs = {true, true};  // of the batch, as far as known
  bool weighed = false;
  unsigned seen = 0;  // lane 0: the counter's value when it was last read

  // Once every row has its alpha, a head that no row needs is no longer read: nothing selects the
  // values that its half of the tensor core tiles then holds. Lane 0 looks, once per stage, at a
  // value that it loaded one stage earlier, so that no stage waits for it; it fences once.
  __device__ __forceinline__ void learn_needs() {
    if (weighed) return;
    const unsigned* counter = s.ws.counter;
    unsigned found = 0;
    if (lane_index() == 0 && seen == static_cast<unsigned>(s.p.B)) {
      acquire_fence();
      found = 4u | (peek(counter + kNeedLm) > 0) | (peek(counter + kNeedReward) > 0) << 1;
    } else if (lane_index() == 0) {
      seen = peek(counter + kWeighedRows);
    }
    found = exchange_from(found, 0);
    if (found == 0) return;
    weighed = true;
    needs = Needs{(found & 1u) != 0, (found & 2u) != 0};
  }

  __device__ __forceinline__ bool reads(int matrix) const {
    if (kCorrects) return true;  // the LM head, for any alpha
    return matrix <= s.p.K && (matrix == 0 ? needs.lm : needs.reward);
  }

  __device__ __forceinline__ bool more() const { return b0 < s.rows() && unit < s.end; }

  __device__ __forceinline__ void advance() {
    slot.advance(s.plan.stages);
    if (++chunk < s.chunks) return;
    chunk = 0;
    if (++pass < s.passes) return;
    pass = 0;
    unit += s.tile_units;
    if (unit < s.end) return;
    unit = s.begin;
    b0 += s.plan.batch_tile;
  }

  __device__ __forceinline__ int units() const {
    return s.end - unit < s.tile_units ? s.end - unit : s.tile_units;
  }

  // Announces a stage and starts to copy its weights. They are read once, so L2 should evict them
  // before anything else. None of the loops around the copies is unrolled: a full tile is one box
  // per block, so most of the unrolled code would only be skipped.
  __device__ __forceinline__ void copy_weights() const {
    const uint64_t policy = cache_policy(Keep::kFirstToGo);
    const int blocks = s.blocks_of(chunk), own = units(), matrix = 2 * pass;
    const bool wanted[2] = {reads(matrix), reads(matrix + 1)};
    unsigned char* stage = stage_of(s.plan, slot);
    if constexpr (kBulk) {
      if (!elect_one()) return;
      const int boxes = blocks * steps_of(kFormat) * s.terms;
      mbarrier_expect(full_barrier(slot), ((wanted[0] + wanted[1]) * blocks * own * kUnit +
                                           (s.plan.resident ? 0 : boxes * s.plan.batch_tile)) *
                                              kBlockBytes);
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        if (!wanted[side]) continue;
        const bool lm = matrix + side == 0;
        const TensorMap* maps = lm ? s.maps.lm : s.maps.reward;
        const int plane = lm ? 0 : matrix + side - 1;
        unsigned char* to = stage + side * s.plan.blocks * s.block_bytes();
        int byte = chunk * s.plan.blocks * kBlockBytes;
#pragma unroll 1
        for (int block = 0; block < blocks; ++block) {
          copy_block(to, maps, byte, plane, own, policy);
          to += s.block_bytes();
          byte += kBlockBytes;
        }
      }
    } else {
      const int left = s.weight_bytes - chunk * s.plan.blocks * kBlockBytes;
      for (int side = 0; side < 2; ++side) {
        if (!wanted[side]) continue;
        copy_by_lanes(stage + side * s.plan.blocks * s.block_bytes(), s.tile_units * kUnit, blocks,
                      left, policy, [&](int r) { return row_of(matrix + side, r); });
      }
    }
  }

  // Copies one block of the rows of `left` units, at least one: one box per set bit, the largest
  // first.
  __device__ __forceinline__ void copy_block(unsigned char* to, const TensorMap* maps, int byte,
                                             int plane, int left, uint64_t policy) const {
    Barrier* full = full_barrier(slot);
    int row = unit * kUnit;
#pragma unroll 1
    do {
      const int digit = highest_bit(left);
      copy_box(to, maps + digit, byte, row, plane, full, policy);
      to += (kUnit << digit) * kBlockBytes;
      row += kUnit << digit;
      left -= 1 << digit;
    } while (left > 0);
  }

  // This chunk of row r of the tile in matrix m; null if there is no such row.
  __device__ __forceinline__ const unsigned char* row_of(int m, int r) const {
    constexpr int kPerByte = kFormat == Format::kBFloat16 || kFormat == Format::kFloat16 ? 2 : 1;
    const DecodeParams& p = s.p;
    const bool lm = m == 0 || kCorrects;
    const int64_t v = static_cast<int64_t>(unit + m * s.half()) * kUnit + r;
    if (v >= p.V || unit + r / kUnit >= s.end) return nullptr;
    const void* matrix = lm ? p.lm_weight : p.reward_weight;
    const int64_t row = lm ? v * p.lm_weight_stride
                           : (m - 1) * p.reward_weight_stride_k + v * p.reward_weight_stride;
    return static_cast<const unsigned char*>(matrix) + row * kPerByte +
           static_cast<int64_t>(chunk) * s.plan.blocks * kBlockBytes;
  }

  __device__ __forceinline__ void copy_hidden() const {
    constexpr int kSteps = steps_of(kFormat);
    Barrier* full = full_barrier(slot);
    if (!s.plan.resident) {
      const uint64_t policy = cache_policy(Keep::kStay);
      const int blocks = s.blocks_of(chunk) * kSteps;
      const int first = chunk * s.plan.blocks * kSteps * kBlockBytes;
      const int rows = s.plan.batch_tile, block_bytes = rows * kBlockBytes;
      unsigned char* to = stage_of(s.plan, slot) + s.plan.hidden_offset;
#pragma unroll 1
      for (int term = 0; term < s.terms; ++term, to += s.plan.blocks * kSteps * block_bytes) {
        if constexpr (kBulk) {
          if (!elect_one()) continue;
          const int row = static_cast<int>(term * s.rows()) + b0;
#pragma unroll 1
          for (int block = 0; block < blocks; ++block) {
            copy_box(to + block * block_bytes, &s.maps.hidden, first + block * kBlockBytes, row, 0,
                     full, policy);
          }
        } else {
          const unsigned char* from =
              s.hidden + term * s.term_stride + b0 * s.hidden_stride + first;
          copy_by_lanes(to, rows, blocks, s.hidden_bytes - first, policy, [&](int r) {
            return b0 + r < s.rows() ? from + r * s.hidden_stride : nullptr;
          });
        }
      }
    }
    if (!kBulk) async_copies_arrive(full);
  }

  // The number of arrivals that complete a stage.
  static __device__ __forceinline__ unsigned arrivals() { return kBulk ? 1 : kWarp; }
};

}  // namespace cuda
}  // namespace dualhead
