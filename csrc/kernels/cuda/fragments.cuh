// SPDX-License-Identifier: Apache-2.0
// From a stage of the ring to tensor core tiles: which bytes a lane reads, and what they become.
//
// Inputs may be summed in any order that both operands share, so fragments need no shuffling: the
// four lanes that hold a row read its bytes as they lie, sixteen each of a run of kRunBytes, and
// make steps of 8 inputs of them. A step is two tiles of 16 inputs, to which a lane gives 4 each.
// Hidden states lie in the same order: step by step, 16 bytes for each of the four lanes.
//
//   format           inputs of a run   lane t's step j                       order of the 8
//   bf16, fp16       32                8t ...                                as they lie
//   int8, fp8        64                16t + 8j ...                          0 2 1 3, 4 6 5 7
//   int4             128               16t + 4j ... , and 64 further         0 2 1 3, and 64
//   further
#pragma once

#include "primitives.cuh"
#include "stream_plan.h"

namespace dualhead {
namespace cuda {

// Input at `position` of a run, as the table says.
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

// Two bytes that were moved to where a half has its upper ones, as e4m3 numbers times 2^-8: sign,
// exponent and fraction are the half's, one place lower; subnormals too.
__device__ __forceinline__ uint32_t halves_from_e4m3(uint32_t bytes) {
  return (bytes & 0x80008000u) | (bytes >> 1 & 0x3F803F80u);
}

// The pairs of one step, from where its bytes begin: 16, 8 or 4. 0x6400 is 1024 in float16, whose
// last place is 1: a small number in the lowest bits is added to it.
template <Format kFormat>
__device__ __forceinline__ void unpack(const unsigned char* at, uint32_t (&pairs)[4]) {
  if constexpr (steps_of(kFormat) == 1) {
    const Words raw = load_words(at);
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = raw.x[i];
  } else if constexpr (kFormat == Format::kInt4) {
    const uint32_t even = *reinterpret_cast<const uint32_t*>(at), odd = even >> 8;
    // 1024 + u - 1032, and (1024 + 16 u) / 16 - 72.
    pairs[0] = half2_add((even & 0x000F000Fu) | 0x64006400u, 0xE408E408u);
    pairs[1] = half2_add((odd & 0x000F000Fu) | 0x64006400u, 0xE408E408u);
    pairs[2] = half2_fma((even & 0x00F000F0u) | 0x64006400u, 0x2C002C00u, 0xD480D480u);
    pairs[3] = half2_fma((odd & 0x00F000F0u) | 0x64006400u, 0x2C002C00u, 0xD480D480u);
  } else {
    const uint2 raw = *reinterpret_cast<const uint2*>(at);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t bytes = i == 0 ? raw.x : raw.y;
      if constexpr (kFormat == Format::kInt8) {
        const uint32_t biased = bytes ^ 0x80808080u;  // and less 1152, of which 128 is the bias
        pairs[2 * i] = half2_add(select_bytes(biased, 0x64646464u, 0x4240), 0xE480E480u);
        pairs[2 * i + 1] = half2_add(select_bytes(biased, 0x64646464u, 0x4341), 0xE480E480u);
      } else {
        pairs[2 * i] = halves_from_e4m3(bytes << 8);
        pairs[2 * i + 1] = halves_from_e4m3(bytes);
      }
    }
  }
}

// What `unpack` leaves to be multiplied by.
template <Format kFormat>
__device__ __forceinline__ constexpr float unpacked_unit() {
  return kFormat == Format::kFp8 ? 256.0f : 1.0f;
}

// Where a lane finds its part of a stage.
struct LaneView {
  const unsigned char* low;     // rows of the unit's first matrix, at this lane's row and sixteen
  const unsigned char* high;    // of its second
  int unit_pitch;               // to the warp's next unit, in bytes
  const unsigned char* hidden;  // column lane / 4, this lane's sixteen
  int tile_pitch, term_pitch;   // to the next 8 columns, the next term
  int terms;
  const unsigned char* low_scales;  // int4: of the stage's groups
  const unsigned char* high_scales;
};

// `there`: whether the row has this lane's sixteen bytes; else they count as zeros, whatever lies
// in their place.
template <Format kFormat, int kTiles, int kUnits>
__device__ __forceinline__ void multiply_step(const LaneView& at, int run, int step, bool there,
                                              float (&z)[kUnits][kTiles][4]) {
  constexpr bool kBrain = kFormat == Format::kBFloat16;
  uint32_t low[kUnits][4] = {}, high[kUnits][4] = {};
  if (there) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int bytes = u * at.unit_pitch + run * kRunBytes + step * (16 / steps_of(kFormat));
      unpack<kFormat>(at.low + bytes, low[u]);
      unpack<kFormat>(at.high + bytes, high[u]);
    }
  }
  const int terms = steps_of(kFormat) == 1 ? 1 : at.terms;
#pragma unroll 1
  for (int term = 0; term < terms; ++term) {
    const unsigned char* hidden =
        at.hidden + (run * steps_of(kFormat) + step) * kRunBytes + term * at.term_pitch;
#pragma unroll
    for (int n = 0; n < kTiles; ++n, hidden += at.tile_pitch) {
      Words b = {};
      if (there) b = load_words(hidden);
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // tiles of 16 inputs
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
          const uint32_t a[4] = {low[u][2 * half], high[u][2 * half], low[u][2 * half + 1],
                                 high[u][2 * half + 1]};
          mma_m16n8k16<kBrain>(z[u][n], a, b.x[2 * half], b.x[2 * half + 1]);
        }
      }
    }
  }
}

template <Format kFormat, int kTiles, int kUnits>
__device__ __forceinline__ void multiply_run(const LaneView& at, int run, bool there,
                                             float (&z)[kUnits][kTiles][4]) {
  constexpr int kSteps = steps_of(kFormat), kUnroll = kTiles * kUnits < 8 ? kSteps : 1;
#pragma unroll kUnroll
  for (int step = 0; step < kSteps; ++step) multiply_step<kFormat>(at, run, step, there, z);
}

// int4: a run is a group, with a sum of its own, times its scale.
template <int kTiles, int kUnits>
__device__ __forceinline__ void multiply_group(const LaneView& at, int run,
                                               float (&z)[kUnits][kTiles][4]) {
  float part[kUnits][kTiles][4] = {};
  multiply_run<Format::kInt4>(at, run, true, part);
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    const int scale = u * at.unit_pitch + 4 * run;
    const float low = *reinterpret_cast<const float*>(at.low_scales + scale);
    const float high = *reinterpret_cast<const float*>(at.high_scales + scale);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) z[u][n][i] = fmaf(i < 2 ? low : high, part[u][n][i], z[u][n][i]);
    }
  }
}

// A stage: z += rows times hidden states over `bytes` of each row.
template <Format kFormat, int kTiles, int kUnits>
__device__ __forceinline__ void multiply_stage(const LaneView& at, int bytes,
                                               float (&z)[kUnits][kTiles][4]) {
  // Two runs at once where one would leave the tensor cores waiting, and registers allow it.
  [[maybe_unused]] constexpr int kUnroll = kTiles * kUnits < 8 ? 2 : 1;
  const int runs = bytes / kRunBytes, rest = bytes % kRunBytes;
  if constexpr (kFormat == Format::kInt4) {
#pragma unroll kUnroll
    for (int run = 0; run < runs; ++run) multiply_group(at, run, z);
  } else if constexpr (steps_of(kFormat) == 2) {
    // Behind a row's end lie bytes of another, which are numbers, and meet hidden states' zeros.
#pragma unroll kUnroll
    for (int run = 0; run < runs + (rest > 0); ++run) multiply_run<kFormat>(at, run, true, z);
  } else {
#pragma unroll kUnroll
    for (int run = 0; run < runs; ++run) multiply_run<kFormat>(at, run, true, z);
    if (rest > 0) multiply_run<kFormat>(at, runs, 16 * (lane_index() % 4) < rest, z);
  }
}

}  // namespace cuda
}  // namespace dualhead
