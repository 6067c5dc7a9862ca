// SPDX-License-Identifier: Apache-2.0
// From a stage of the ring to tensor core tiles: which bytes a lane reads, and how they are
// unpacked.
//
// A sum may take its inputs in any order that both operands share, so fragments need no shuffling.
// The four lanes that hold a row read its bytes as they are stored, sixteen bytes each of a run of
// kRunBytes, and form steps of 8 inputs from them. A step is two tiles of 16 inputs; each lane
// supplies 4 inputs of each. Hidden states are stored in the same order: step by step, 16 bytes for
// each of the four lanes.
//
//   format       inputs of a run   lane t's step j                order of the 8
//   bf16, fp16   32                8t ...                         as stored
//   int8, fp8    64                16t + 8j ...                   0 2 1 3, 4 6 5 7
//   int4         128               16t + 4j ... , and 64 further  0 2 1 3, and 64 further
#pragma once

#include "primitives.cuh"
#include "stream_plan.h"

namespace dualhead {
namespace cuda {

// The input at `position` of a run, according to the table.
__device__ __forceinline__ int input_of(Format format, int position) {
  const int step = position / 32, lane = position / 8 % 4, i = position % 8;
  const int crossed = (i & 4) | (i & 1) << 1 | (i >> 1 & 1);
  switch (steps_of(format)) {
    case 1:
      return position;
    case 2:
      return 16 * lane + 8 * step + crossed;
    default:
      return 16 * lane + 4 * step + (crossed & 3) + (i & 4) * 16;
  }
}

// Two e4m3 bytes, each already in the upper byte of a float16, become float16 values that are 2^-8
// times the e4m3 values. The exponent and fraction move down one place and the sign stays; this
// also holds for subnormals.
__device__ __forceinline__ uint32_t halves_from_e4m3(uint32_t bytes) {
  return (bytes & 0x80008000u) | (bytes >> 1 & 0x3F803F80u);
}

// Element i of an array that is in registers.
template <typename T>
__device__ __forceinline__ T pick(const T (&four)[4], int i) {
  return i < 2 ? (i == 0 ? four[0] : four[1]) : (i == 2 ? four[2] : four[3]);
}

// The float16 or bfloat16 pairs of one step of a lane's sixteen bytes. 0x6400 is 1024 in float16,
// whose last place is 1 there: a small integer in its lowest bits is added to 1024.
template <Format kFormat>
__device__ __forceinline__ void unpack(const Words& sixteen, int step, uint32_t (&pairs)[4]) {
  if constexpr (steps_of(kFormat) == 1) {
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = sixteen.x[i];
  } else if constexpr (kFormat == Format::kInt4) {
    const uint32_t even = pick(sixteen.x, step), odd = even >> 8;
    // 1024 + u - 1032, and (1024 + 16 u) / 16 - 72.
    pairs[0] = half2_add((even & 0x000F000Fu) | 0x64006400u, 0xE408E408u);
    pairs[1] = half2_add((odd & 0x000F000Fu) | 0x64006400u, 0xE408E408u);
    pairs[2] = half2_fma((even & 0x00F000F0u) | 0x64006400u, 0x2C002C00u, 0xD480D480u);
    pairs[3] = half2_fma((odd & 0x00F000F0u) | 0x64006400u, 0x2C002C00u, 0xD480D480u);
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t bytes = step == 0 ? sixteen.x[i] : sixteen.x[2 + i];
      if constexpr (kFormat == Format::kInt8) {
        const uint32_t biased = bytes ^ 0x80808080u;  // then subtract 1152 = 1024 + 128, the bias
        pairs[2 * i] = half2_add(select_bytes(biased, 0x64646464u, 0x4240), 0xE480E480u);
        pairs[2 * i + 1] = half2_add(select_bytes(biased, 0x64646464u, 0x4341), 0xE480E480u);
      } else {
        pairs[2 * i] = halves_from_e4m3(bytes << 8);
        pairs[2 * i + 1] = halves_from_e4m3(bytes);
      }
    }
  }
}

// The factor by which the values from `unpack` must be multiplied.
template <Format kFormat>
__device__ __forceinline__ constexpr float unpacked_unit() {
  return kFormat == Format::kFp8 ? 256.0f : 1.0f;
}

// The row, among eight, at `place` of a tile. Lanes 8i to 8i + 7 read shared memory together:
// 16-byte pieces of two rows of one run. Neighbouring places get rows four apart, because those
// have the pieces in different halves of the banks.
__device__ __forceinline__ int row_of_place(int place) { return place / 2 + place % 2 * 4; }

// Where a lane finds its part of a stage. Every group of eight rows starts at a multiple of 1024
// bytes. In it the lane's sixteen bytes of a block's first run are at offset `own`, and those of
// the second run 64 bytes before or after.
struct LaneView {
  const unsigned char* low;  // the warp's first unit, first block, first matrix
  int high;                  // offset of the second matrix, in bytes
  int block_pitch, unit_pitch;
  const unsigned char* hidden;  // the first eight columns of the first block
  int hidden_pitch;             // offset of the next block
  int tile_pitch, term_pitch;   // offsets of the next 8 columns and the next term
  int own;
};

__device__ __forceinline__ int own_sixteen() {
  return swizzled(row_of_place(lane_index() / 4), lane_index() % 4);
}

// int4: the scales of a stage's groups for this lane's row of each unit and matrix.
template <Format kFormat, int kUnits>
struct GroupScales {};

template <int kUnits>
struct GroupScales<Format::kInt4, kUnits> {
  float low[kUnits][4], high[kUnits][4];
};

// Whether `tiles` tiles of sums leave enough registers to multiply several runs at once. int4 has
// two sets of sums.
DUALHEAD_HD constexpr bool few_sums(Format format, int tiles) {
  return tiles < (format == Format::kInt4 ? 4 : 8);
}

// Multiplies one run of a block: z += rows times hidden states.
template <Format kFormat, int kTiles, int kUnits>
__device__ __forceinline__ void multiply_run(const LaneView& at, const unsigned char* hidden,
                                             int block, int half, float (&z)[kUnits][kTiles][4]) {
  constexpr bool kBrain = kFormat == Format::kBFloat16;
  constexpr int kSteps = steps_of(kFormat);
  Words low[kUnits], high[kUnits];
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    const unsigned char* row =
        at.low + block * at.block_pitch + u * at.unit_pitch + (at.own ^ half * kRunBytes);
    low[u] = load_words(row);
    high[u] = load_words(row + at.high);
  }
  // Not unrolled if the sums fill the registers.
  [[maybe_unused]] constexpr int kUnroll = few_sums(kFormat, kTiles * kUnits) ? kSteps : 1;
#pragma unroll kUnroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t first[kUnits][4], second[kUnits][4];
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      unpack<kFormat>(low[u], step, first[u]);
      unpack<kFormat>(high[u], step, second[u]);
    }
    const int run = half * kSteps + step;  // of hidden states
    const unsigned char* column =
        hidden + (block * kSteps + run / 2) * at.hidden_pitch + (at.own ^ run % 2 * kRunBytes);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const Words b = load_words(column + n * at.tile_pitch);
#pragma unroll
      for (int i = 0; i < 2; ++i) {  // tiles of 16 inputs
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
          const uint32_t a[4] = {first[u][2 * i], second[u][2 * i], first[u][2 * i + 1],
                                 second[u][2 * i + 1]};
          mma_m16n8k16<kBrain>(z[u][n], a, b.x[2 * i], b.x[2 * i + 1]);
        }
      }
    }
  }
}

// int4: multiplies both runs of a block alternately. Each run has a sum of its own, so that the
// tensor cores' next product of one need not wait for that of the other. The sums are the same as
// one run after the other.
template <int kTiles, int kUnits>
__device__ __forceinline__ void multiply_groups(const LaneView& at, const unsigned char* hidden,
                                                int block, float (&part)[2][kUnits][kTiles][4]) {
  constexpr Format kFormat = Format::kInt4;
  constexpr int kSteps = steps_of(kFormat);
  Words low[2][kUnits], high[2][kUnits];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const unsigned char* row =
          at.low + block * at.block_pitch + u * at.unit_pitch + (at.own ^ half * kRunBytes);
      low[half][u] = load_words(row);
      high[half][u] = load_words(row + at.high);
    }
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int run = half * kSteps + step;
      const unsigned char* column =
          hidden + (block * kSteps + run / 2) * at.hidden_pitch + (at.own ^ run % 2 * kRunBytes);
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        uint32_t first[4], second[4];
        unpack<kFormat>(low[half][u], step, first);
        unpack<kFormat>(high[half][u], step, second);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          const Words b = load_words(column + n * at.tile_pitch);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint32_t a[4] = {first[2 * i], second[2 * i], first[2 * i + 1],
                                   second[2 * i + 1]};
            mma_m16n8k16<false>(part[half][u][n], a, b.x[2 * i], b.x[2 * i + 1]);
          }
        }
      }
    }
  }
}

// Multiplies both runs of a block. Beyond the end of a row, weights and hidden states are zeros.
// int4: a run is a group, whose own sum is multiplied by its scale.
template <Format kFormat, int kTiles, int kUnits>
__device__ __forceinline__ void multiply_block(const LaneView& at, const unsigned char* hidden,
                                               int block,
                                               const GroupScales<kFormat, kUnits>& scales,
                                               float (&z)[kUnits][kTiles][4]) {
  constexpr bool kFew = few_sums(kFormat, kTiles * kUnits);
  [[maybe_unused]] constexpr int kUnroll = kFew || steps_of(kFormat) == 1 ? 2 : 1;
  const auto scale = [&](int half, const float (&part)[kUnits][kTiles][4]) {
    if constexpr (kFormat == Format::kInt4) {
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const float low = pick(scales.low[u], 2 * block + half);
        const float high = pick(scales.high[u], 2 * block + half);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            z[u][n][i] = fmaf(i < 2 ? low : high, part[u][n][i], z[u][n][i]);
          }
        }
      }
    }
  };
  if constexpr (kFormat == Format::kInt4 && kFew) {
    float part[2][kUnits][kTiles][4] = {};
    multiply_groups<kTiles, kUnits>(at, hidden, block, part);
    scale(0, part[0]);
    scale(1, part[1]);
  } else {
#pragma unroll kUnroll
    for (int half = 0; half < 2; ++half) {
      if constexpr (kFormat == Format::kInt4) {
        float part[kUnits][kTiles][4] = {};
        multiply_run<kFormat>(at, hidden, block, half, part);
        scale(half, part);
      } else {
        multiply_run<kFormat>(at, hidden, block, half, z);
      }
    }
  }
}

// Multiplies a stage: z += rows times hidden states over `blocks` blocks; within each block, term
// by term.
template <Format kFormat, int kTiles, int kUnits>
__device__ __forceinline__ void multiply_stage(const LaneView& at, int terms, int blocks,
                                               const GroupScales<kFormat, kUnits>& scales,
                                               float (&z)[kUnits][kTiles][4]) {
  if (few_sums(kFormat, kTiles * kUnits) && terms == 1) {
    // Two blocks at once: one alone would leave the tensor cores waiting.
#pragma unroll 2
    for (int block = 0; block < blocks; ++block) {
      multiply_block<kFormat>(at, at.hidden, block, scales, z);
    }
    return;
  }
#pragma unroll 1
  for (int block = 0; block < blocks; ++block) {
    const unsigned char* hidden = at.hidden;
#pragma unroll 1
    for (int term = 0; term < terms; ++term, hidden += at.term_pitch) {
      multiply_block<kFormat>(at, hidden, block, scales, z);
    }
  }
}

}  // namespace cuda
}  // namespace dualhead
