// SPDX-License-Identifier: Apache-2.0
// The ring of shared memory through which weights come, and the warp that fills it. A stage is full
// when its copies have landed, and empty when every consumer warp has said so; the two barriers of
// a slot are used in turn, for ever, and never reset.
//
// sm_90 and up: a bulk copy per row. Below: sixteen bytes by a lane. Both end at the same barrier,
// so that consumers know no difference.
#pragma once

#include "gate.cuh"
#include "primitives.cuh"
#include "workspace.h"

namespace dualhead {
namespace cuda {

// What a block has to do, and where its stages lie; the same numbers for all of its threads.
struct Stream {
  const DecodeParams& p;
  const Workspace& ws;
  const StreamPlan& plan;
  int begin = 0, end = 0;                 // the block's units
  int weight_bytes = 0;                   // of a row
  int chunks = 0, passes = 0;             // stages of a row; pairs of matrices
  int tile_units = 0;                     // units of a full tile
  const unsigned char* hidden = nullptr;  // the operand of the products: (terms, B, operand inputs)
  int64_t hidden_stride = 0, term_stride = 0;  // in bytes
  int hidden_bytes = 0;                        // of a row
  int terms = 1;
  const float* operand_scale = nullptr;  // (B,): of the sums; quantised weights only
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

// Copies rows of `bytes` bytes each, `pitch` apart, by a warp; row_of(r) is null where there is
// none.
template <bool kBulk, typename RowOf>
__device__ __forceinline__ void copy_rows(unsigned char* to, int pitch, int rows, int bytes,
                                          Barrier* barrier, uint64_t policy, RowOf row_of) {
  if constexpr (kBulk) {
    for (int r = lane_index(); r < rows; r += kWarp) {
      const void* row = row_of(r);
      if (row) bulk_copy(to + r * pitch, row, static_cast<unsigned>(bytes), barrier, policy);
    }
  } else {
    // Neighbouring lanes copy neighbouring sixteens; as many rows at once as that leaves lanes for.
    int lanes = kWarp;
    while (lanes > 4 && lanes * 8 >= bytes) lanes /= 2;
    for (int r = lane_index() / lanes; r < rows; r += kWarp / lanes) {
      const unsigned char* row = static_cast<const unsigned char*>(row_of(r));
      if (!row) continue;
      for (int i = 16 * (lane_index() % lanes); i < bytes; i += 16 * lanes) {
        async_copy_16(to + r * pitch + i, row + i, policy);
      }
    }
  }
}

// Walks through a block's stages in the order in which consumers take them: batch tiles, tiles of
// units, passes over pairs of matrices, chunks of the inputs.
template <Format kFormat, bool kBulk>
struct Producer {
  const Stream& s;
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
    return matrix <= s.p.K && (matrix == 0 ? needs.lm : needs.reward);
  }

  __device__ __forceinline__ bool more() const { return b0 < s.p.B && unit < s.end; }

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

  __device__ __forceinline__ int weight_bytes() const {
    const int left = s.weight_bytes - chunk * s.plan.row_bytes;
    return left < s.plan.row_bytes ? left : s.plan.row_bytes;
  }

  // Of a row of hidden states in this chunk.
  __device__ __forceinline__ int hidden_bytes() const {
    const int most = steps_of(kFormat) * s.plan.row_bytes;
    const int left = s.hidden_bytes - chunk * most;
    return left < most ? left : most;
  }

  __device__ __forceinline__ int batch_rows() const {
    const int64_t left = s.p.B - b0;
    return static_cast<int>(left < s.plan.batch_tile ? left : s.plan.batch_tile);
  }

  // Vocabulary entry of row r of the stage; -1 where there is no such row, or nobody needs it.
  __device__ __forceinline__ int64_t entry_of(int r) const {
    const int own = unit + r / (2 * kUnit);
    const int64_t v = static_cast<int64_t>(own) * kUnit + r % kUnit;
    const bool there = own < s.end && v < s.p.V && reads(matrix_of(r));
    return there ? v : -1;
  }

  __device__ __forceinline__ int matrix_of(int r) const { return 2 * pass + r / kUnit % 2; }

  __device__ __forceinline__ unsigned weight_rows() const {
    const int64_t last = unit + s.tile_units < s.end ? unit + s.tile_units : s.end;
    const int64_t entries =
        (last * kUnit < s.p.V ? last * kUnit : s.p.V) - static_cast<int64_t>(unit) * kUnit;
    return static_cast<unsigned>(entries * (reads(2 * pass) + reads(2 * pass + 1)));
  }

  __device__ __forceinline__ void copy_weights() const {
    constexpr int kPerByte = kFormat == Format::kBFloat16 || kFormat == Format::kFloat16 ? 2 : 1;
    const DecodeParams& p = s.p;
    const int bytes = weight_bytes(), rows = 2 * kUnit * s.tile_units;
    unsigned char* stage = stage_of(s.plan, slot);
    Barrier* full = full_barrier(slot);
    if (kBulk && lane_index() == 0) {
      const int terms = s.plan.resident ? 0 : s.terms;
      mbarrier_expect(full, weight_rows() * bytes + terms * batch_rows() * hidden_bytes());
    }
    warp_barrier();  // announced before the first can land
    const auto row_of = [&](int r) -> const void* {
      const int64_t v = entry_of(r), m = matrix_of(r);
      if (v < 0) return nullptr;
      const void* matrix = m == 0 ? p.lm_weight : p.reward_weight;
      const int64_t row = m == 0 ? v * p.lm_weight_stride
                                 : (m - 1) * p.reward_weight_stride_k + v * p.reward_weight_stride;
      return static_cast<const unsigned char*>(matrix) + row * kPerByte +
             static_cast<int64_t>(chunk) * s.plan.row_bytes;
    };
    // Read once: nothing else should leave the cache for it.
    copy_rows<kBulk>(stage, s.plan.row_pitch, rows, bytes, full, cache_policy(Keep::kFirstToGo),
                     row_of);
    if constexpr (kFormat == Format::kInt4) {
      copy_scales(stage, rows);
      if (kBulk) async_copies_arrive(full);
    }
  }

  // int4: the scales of this chunk's groups, behind each row.
  __device__ __forceinline__ void copy_scales(unsigned char* stage, int rows) const {
    const int64_t row_groups = s.p.d / kInt4Group;
    const int groups = weight_bytes() / kRunBytes, first = chunk * (s.plan.row_bytes / kRunBytes);
    for (int i = lane_index(); i < rows * groups; i += kWarp) {
      const int r = i / groups, group = i % groups;
      const int64_t v = entry_of(r), m = matrix_of(r);
      if (v < 0) continue;
      const float* scales = m == 0 ? s.p.lm_scale : s.p.reward_scale + (m - 1) * s.p.V * row_groups;
      async_copy_4(stage + r * s.plan.row_pitch + s.plan.row_bytes + 4 * group,
                   scales + v * row_groups + first + group);
    }
  }

  __device__ __forceinline__ void copy_hidden() const {
    Barrier* full = full_barrier(slot);
    if (!s.plan.resident) {
      unsigned char* to = stage_of(s.plan, slot) + s.plan.hidden_offset;
      const int64_t from = static_cast<int64_t>(chunk) * steps_of(kFormat) * s.plan.row_bytes;
      for (int term = 0; term < s.terms; ++term) {
        const unsigned char* first = s.hidden + term * s.term_stride + b0 * s.hidden_stride + from;
        copy_rows<kBulk>(to + term * s.plan.batch_tile * s.plan.hidden_pitch, s.plan.hidden_pitch,
                         batch_rows(), hidden_bytes(), full, cache_policy(Keep::kStay),
                         [&](int r) -> const void* { return first + r * s.hidden_stride; });
      }
    }
    if (!kBulk) async_copies_arrive(full);
  }

  // Arrivals that fill a stage.
  static __device__ __forceinline__ unsigned arrivals() {
    return (kBulk ? 1 : kWarp) + (kBulk && kFormat == Format::kInt4 ? kWarp : 0);
  }
};

}  // namespace cuda
}  // namespace dualhead
