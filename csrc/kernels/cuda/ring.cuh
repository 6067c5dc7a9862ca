// SPDX-License-Identifier: Apache-2.0
// The ring of shared memory through which weights come, and the warp that fills it. A stage is full
// when its copies have landed, and empty when every consumer warp has said so; the two barriers of
// a slot are used in turn, for ever, and never reset.
//
// A stage holds blocks of 128 bytes: of the tile's rows of the first matrix, block by block, then
// of the second, then of hidden states. Within a block rows lie beneath each other, swizzled.
//
// sm_90 and up: one lane asks the copy engine for whole boxes, all rows of a block in one
// instruction. Below: sixteen bytes by a lane. Both end at the same barrier and in the same places,
// so that consumers know no difference.
#pragma once

#include "gate.cuh"
#include "primitives.cuh"
#include "workspace.h"

namespace dualhead {
namespace cuda {

constexpr int kBoxes = 5;  // sizes of boxes: 1, 2, 4, 8 and 16 units

// What the copy engine reads, and in which boxes: of 2^i units' rows. A full tile is one box; where
// a block's units end within a tile, the rest is a box for each of its binary digits, since a box
// takes the engine about as long whether it has 8 rows or 32. Unused, and not filled in, where
// lanes copy.
struct StreamMaps {
  TensorMap lm[kBoxes];
  TensorMap reward[kBoxes];  // a plane per objective; of a correction, the LM head's second half
  TensorMap hidden;          // a batch tile; the operand's terms follow each other
};

// What a block has to do, and where its stages lie; the same numbers for all of its threads.
// kCorrects: the reward head is a correction. Kernels of their own, so that neither kind of head
// pays for the other's registers.
template <bool kCorrects>
struct Stream {
  const DecodeParams& p;
  const Workspace& ws;
  const StreamPlan& plan;
  const StreamMaps& maps;
  int begin = 0, end = 0;                 // the block's units
  int weight_bytes = 0;                   // of a row
  int row_blocks = 0;                     // of a row of weights
  int chunks = 0, passes = 0;             // stages of a row; pairs of matrices
  int tile_units = 0;                     // units of a full tile
  const unsigned char* hidden = nullptr;  // the operand of the products: (terms, B, operand inputs)
  int64_t hidden_stride = 0, term_stride = 0;  // in bytes
  int hidden_bytes = 0;                        // of a row
  int terms = 1;
  const float* operand_scale = nullptr;  // (B,): of the sums; quantised weights only

  // Of hidden states.
  __device__ __forceinline__ int rows() const {
    return static_cast<int>(kCorrects ? product_rows(p) : p.B);
  }

  // Of a correction: units from the first half of the vocabulary to the second; else 0.
  __device__ __forceinline__ int half() const { return kCorrects ? half_units(p) : 0; }

  // Bytes of one block of a tile's rows.
  __device__ __forceinline__ int block_bytes() const { return tile_units * kUnit * kBlockBytes; }

  // Blocks of a row of weights that a stage with this chunk holds; of hidden states steps_of()
  // times as many.
  __device__ __forceinline__ int blocks_of(int chunk) const {
    const int left = row_blocks - chunk * plan.blocks;
    return left < plan.blocks ? left : plan.blocks;
  }
};

struct Slot {
  int index = 0;
  unsigned parity = 0;  // of the phase that this round ends

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

// Where a box would put them: `blocks` blocks of `rows` rows, by the lanes of a warp, sixteen bytes
// each. row_of(r) is the row's first byte, null where there is none; bytes from `left` on count as
// zeros, as do rows that are not there.
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

// Walks through a block's stages in the order in which consumers take them: batch tiles, tiles of
// units, passes over pairs of matrices, chunks of the inputs.
template <Format kFormat, bool kBulk, bool kCorrects>
struct Producer {
  const Stream<kCorrects>& s;
  int b0 = 0, unit = s.begin, pass = 0, chunk = 0;
  Slot slot = {};
  Needs needs = {true, true};  // of the batch, as far as is known
  bool weighed = false;
  unsigned seen = 0;  // lane 0: of the counter, when it was last looked at

  // Once every row has its alpha, a head that none of them needs is not read any more: what its
  // half of the tensor cores' tiles then holds is selected by nobody. The warp's lanes agree. What
  // is looked at was asked for a stage ago, so that no stage waits for the answer.
  __device__ __forceinline__ void learn_needs() {
    if (weighed) return;
    const unsigned* counter = s.ws.counter;
    weighed = exchange_from(seen, 0) == static_cast<unsigned>(s.p.B);
    if (lane_index() == 0) seen = peek(counter + kWeighedRows);
    if (!weighed) return;
    acquire_fence();
    needs = Needs{peek(counter + kNeedLm) > 0, peek(counter + kNeedReward) > 0};
  }

  __device__ __forceinline__ bool reads(int matrix) const {
    if (kCorrects) return true;  // the LM head, whatever alpha is
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

  // Announces a stage, and starts to copy its weights. Read once: nothing else should leave the
  // cache for them.
  __device__ __forceinline__ void copy_weights() const {
    const uint64_t policy = cache_policy(Keep::kFirstToGo);
    const int blocks = s.blocks_of(chunk), own = units();
    unsigned char* stage = stage_of(s.plan, slot);
    if constexpr (kBulk) {
      if (!elect_one()) return;
      const int matrices = reads(2 * pass) + reads(2 * pass + 1);
      const int boxes = blocks * steps_of(kFormat) * s.terms;
      mbarrier_expect(full_barrier(slot), (matrices * blocks * own * kUnit +
                                           (s.plan.resident ? 0 : boxes * s.plan.batch_tile)) *
                                              kBlockBytes);
      for (int side = 0; side < 2; ++side) {
        const int m = 2 * pass + side;
        if (!reads(m)) continue;
        for (int block = 0; block < blocks; ++block) {
          copy_block(stage + (side * s.plan.blocks + block) * s.block_bytes(), m,
                     (chunk * s.plan.blocks + block) * kBlockBytes, own, policy);
        }
      }
    } else {
      const int left = s.weight_bytes - chunk * s.plan.blocks * kBlockBytes;
      for (int side = 0; side < 2; ++side) {
        const int m = 2 * pass + side;
        if (!reads(m)) continue;
        copy_by_lanes(stage + side * s.plan.blocks * s.block_bytes(), s.tile_units * kUnit, blocks,
                      left, policy, [&](int r) { return row_of(m, r); });
      }
    }
  }

  // One block of the tile's rows: a box for each binary digit of their number, the largest first.
  __device__ __forceinline__ void copy_block(unsigned char* to, int m, int byte, int own,
                                             uint64_t policy) const {
    const int plane = m == 0 ? 0 : m - 1;
    Barrier* full = full_barrier(slot);
    const TensorMap* maps = m == 0 ? s.maps.lm : s.maps.reward;
    int row = unit * kUnit;
    for (int digit = kBoxes - 1; digit >= 0; --digit) {
      if (!(own >> digit & 1)) continue;
      copy_box(to, maps + digit, byte, row, plane, full, policy);
      to += (kUnit << digit) * kBlockBytes;
      row += kUnit << digit;
    }
  }

  // This chunk of matrix m's row r of the tile; null where there is no such row.
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
      for (int term = 0; term < s.terms; ++term, to += s.plan.blocks * kSteps * block_bytes) {
        if constexpr (kBulk) {
          if (!elect_one()) continue;
          const int row = static_cast<int>(term * s.rows()) + b0;
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

  // Arrivals that fill a stage.
  static __device__ __forceinline__ unsigned arrivals() { return kBulk ? 1 : kWarp; }
};

}  // namespace cuda
}  // namespace dualhead
