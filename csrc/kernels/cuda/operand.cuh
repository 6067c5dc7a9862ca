// SPDX-License-Identifier: Apache-2.0
// Hidden states as the tensor cores meet quantised weights: float16, exactly.
//
// Quantised numbers are exact in float16, hidden states need not be: bfloat16 and fp32 reach
// further. So each row is brought to a largest magnitude in [2^14, 2^15) by a power of two, which
// the sums get back, and an fp32 row becomes three terms of 11 bits each. What is lost is below
// 2^-39 of the row's largest number: less than one rounding of the sum.
#pragma once

#include "fragments.cuh"
#include "numbers.cuh"
#include "workspace.h"

namespace dualhead {
namespace cuda {

// What a row's sums are to be multiplied by, from its largest magnitude. Rows without one (zeros,
// infinities, NaN) stay as they are.
__device__ __forceinline__ float operand_unit(float largest) {
  if (!(largest > 0.0f && largest < INFINITY)) return 1.0f;
  const int exponent = static_cast<int>(float_bits(largest) >> 23) - 127;
  const int bounded = exponent > -100 ? exponent : -100;  // so that the inverse is finite
  return bits_float(static_cast<uint32_t>(bounded - 14 + 127) << 23);
}

// The largest magnitude among a thread's share of a row of d inputs, a multiple of 8; NaN is left
// to the sums.
__device__ __forceinline__ float largest_of(Numbers row, int64_t d, int thread, int threads) {
  float largest = 0.0f;
  for (int64_t i = 8 * thread; i < d; i += 8 * threads) {
    float eight[8];
    row.eight(i, eight);
#pragma unroll
    for (int j = 0; j < 8; ++j) largest = fmaxf(largest, fabsf(eight[j]));
  }
  return largest;
}

// Where a row of the operand goes, eight positions to each sixteen bytes: one after the other, or
// (shared memory) in blocks `block_pitch` apart, swizzled as row `row` of a box.
struct OperandPlace {
  unsigned char* first;
  int64_t block_pitch;
  int row;

  __device__ __forceinline__ unsigned char* sixteen(int64_t i) const {
    return first + i / 8 * block_pitch + 16 * ((static_cast<int>(i) ^ row) & 7);
  }
};

// Writes a thread's share of a row: `eights` of positions (fragments.cuh), `term_bytes` between
// terms; zeros beyond d. Not inlined: one copy serves all formats.
__device__ __noinline__ void write_operand(Format format, Numbers row, int64_t d, float unit,
                                           int terms, OperandPlace to, int64_t eights,
                                           int64_t term_bytes, int thread, int threads) {
  const int run = run_inputs(format);
  const float inverse = 1.0f / unit;  // a power of two
  for (int64_t i = thread; i < eights; i += threads) {
    float rest[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int position = static_cast<int>(8 * i % run) + j;
      const int64_t k = 8 * i / run * run + input_of(format, position);
      rest[j] = k < d ? row(k) * inverse : 0.0f;
    }
    for (int term = 0; term < terms; ++term) {
      Words words;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const Float16 first = from_float<Float16>(rest[2 * j]);
        const Float16 second = from_float<Float16>(rest[2 * j + 1]);
        words.x[j] = first.bits | static_cast<uint32_t>(second.bits) << 16;
        rest[2 * j] -= to_float(first), rest[2 * j + 1] -= to_float(second);
      }
      store_words(to.sixteen(i) + term * term_bytes, words);
    }
  }
}

// Rows of the whole batch to the workspace, a block per row: by its first kThreads threads, which
// form `kGroup`. slot: one float per warp of them.
template <int kGroup, int kThreads>
__device__ __noinline__ void prepare_batch(const DecodeParams& p, const Workspace& ws,
                                           Format format, float* slot) {
  const int64_t row_bytes = 2 * round_up(p.d, run_inputs(format));
  const int terms = p.dtype == DType::kFloat32 ? 3 : 1;
  for (int64_t b = blockIdx.x; b < p.B; b += gridDim.x) {
    const Numbers row = Numbers{p.hidden, p.dtype}.from(b * p.hidden_stride);
    const float own = warp_max(largest_of(row, p.d, threadIdx.x, kThreads));
    if (lane_index() == 0) slot[warp_in_block()] = own;
    group_barrier<kGroup, kThreads>();  // every warp's is there
    float largest = 0.0f;
    for (int warp = 0; warp < kThreads / kWarp; ++warp) largest = fmaxf(largest, slot[warp]);
    const float unit = operand_unit(largest);
    if (threadIdx.x == 0) ws.operand_scale[b] = unit;
    unsigned char* to = reinterpret_cast<unsigned char*>(ws.operand) + b * row_bytes;
    write_operand(format, row, p.d, unit, terms, {to, kBlockBytes, 0}, row_bytes / 16,
                  p.B * row_bytes, threadIdx.x, kThreads);
    group_barrier<kGroup, kThreads>();  // every thread has read the slots
  }
}

}  // namespace cuda
}  // namespace dualhead
