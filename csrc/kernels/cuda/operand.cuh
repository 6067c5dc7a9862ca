// SPDX-License-Identifier: Apache-2.0
// Hidden states in float16, the operand that the tensor cores multiply with quantised weights.
//
// Quantised weights are exact in float16. Hidden states need not be: bfloat16 and fp32 have a
// larger range. So a power of two scales each row to a largest magnitude in [2^14, 2^15), and the
// sums are scaled back. An fp32 row becomes three terms of 11 bits each. The error is below 2^-39
// of the row's largest value: less than one rounding of the sum.
#pragma once

#include "fragments.cuh"
#include "numbers.cuh"
#include "workspace.h"

namespace dualhead {
namespace cuda {

// The factor by which a row's sums must be multiplied, from the row's largest magnitude. Rows
// without one (zeros, infinities, NaN) are not scaled.
__device__ __forceinline__ float operand_unit(float largest) {
  if (!(largest > 0.0f && largest < INFINITY)) return 1.0f;
  const int exponent = static_cast<int>(float_bits(largest) >> 23) - 127;
  const int bounded = exponent > -100 ? exponent : -100;  // so that the inverse is finite
  return bits_float(static_cast<uint32_t>(bounded - 14 + 127) << 23);
}

// Groups of eight that a thread loads before it uses the first.
constexpr int kOperandAhead = 4;

// The largest magnitude in a thread's share of a row of d inputs, a multiple of 8: every
// `threads`-th group of eight, starting at group `thread`. NaN is ignored here; it shows up in the
// sums.
template <DType kDType>
__device__ __forceinline__ float largest_in(const void* row, int64_t d, int thread, int threads) {
  float largest = 0.0f;
  for (int64_t first = thread; first < d / 8; first += kOperandAhead * threads) {
    Eight<kDType> eight[kOperandAhead];
#pragma unroll
    for (int n = 0; n < kOperandAhead; ++n) {
      const int64_t at = 8 * (first + n * threads);
      eight[n].template load<true>(row, at, d - at);
    }
#pragma unroll
    for (int n = 0; n < kOperandAhead; ++n) {
#pragma unroll
      for (int j = 0; j < 8; ++j) largest = fmaxf(largest, fabsf(eight[n].number(j)));
    }
  }
  return largest;
}

static __device__ __noinline__ float largest_of(Numbers row, int64_t d, int thread, int threads) {
  switch (row.dtype) {
    case DType::kFloat32:
      return largest_in<DType::kFloat32>(row.data, d, thread, threads);
    case DType::kBFloat16:
      return largest_in<DType::kBFloat16>(row.data, d, thread, threads);
    default:
      return largest_in<DType::kFloat16>(row.data, d, thread, threads);
  }
}

// Where a row of the operand is stored, eight positions per sixteen bytes: contiguously, or (in
// shared memory) in blocks `block_pitch` apart, swizzled as row `row` of a box.
struct OperandPlace {
  unsigned char* first;
  int64_t block_pitch;
  int row;

  __device__ __forceinline__ unsigned char* sixteen(int64_t i) const {
    return first + i / 8 * block_pitch + 16 * ((static_cast<int>(i) ^ row) & 7);
  }
};

template <DType kDType>
__device__ __forceinline__ void write_eights(Format format, const void* data, int64_t d, float unit,
                                             int terms, OperandPlace to, int64_t eights,
                                             int64_t term_bytes, int thread, int threads) {
  const Numbers row{data, kDType};
  const int run = run_inputs(format);
  const float inverse = 1.0f / unit;  // a power of two
  for (int64_t first = thread; first < eights; first += kOperandAhead * threads) {
    Four low[kOperandAhead], high[kOperandAhead];
#pragma unroll
    for (int n = 0; n < kOperandAhead; ++n) {
      // Eight positions are two groups of four adjacent inputs (input_of), the middle two of each
      // swapped.
      const int64_t i = first + n * threads, begin = 8 * i / run * run;
      const int64_t k = begin + input_of(format, static_cast<int>(8 * i - begin));
      const int64_t further = begin + input_of(format, static_cast<int>(8 * i - begin) + 4);
      low[n] = row.four<true>(k, i < eights ? d - k : 0);
      high[n] = row.four<true>(further, i < eights ? d - further : 0);
    }
#pragma unroll
    for (int n = 0; n < kOperandAhead; ++n) {
      const int64_t i = first + n * threads;
      if (i >= eights) break;
      float rest[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int crossed = (j & 1) << 1 | (j >> 1 & 1);
        rest[j] = (j < 4 ? low[n] : high[n]).x[crossed] * inverse;
      }
      for (int term = 0; term < terms; ++term) {
        Words words;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const Float16 left = from_float<Float16>(rest[2 * j]);
          const Float16 right = from_float<Float16>(rest[2 * j + 1]);
          words.x[j] = left.bits | static_cast<uint32_t>(right.bits) << 16;
          rest[2 * j] -= to_float(left), rest[2 * j + 1] -= to_float(right);
        }
        store_words(to.sixteen(i) + term * term_bytes, words);
      }
    }
  }
}

// Writes a thread's share of a row: `eights` groups of eight positions (fragments.cuh), with zeros
// beyond d. Terms are `term_bytes` apart. Not inlined: one copy serves all formats.
static __device__ __noinline__ void write_operand(Format format, Numbers row, int64_t d, float unit,
                                                  int terms, OperandPlace to, int64_t eights,
                                                  int64_t term_bytes, int thread, int threads) {
  switch (row.dtype) {
    case DType::kFloat32:
      return write_eights<DType::kFloat32>(format, row.data, d, unit, terms, to, eights, term_bytes,
                                           thread, threads);
    case DType::kBFloat16:
      return write_eights<DType::kBFloat16>(format, row.data, d, unit, terms, to, eights,
                                            term_bytes, thread, threads);
    default:
      return write_eights<DType::kFloat16>(format, row.data, d, unit, terms, to, eights, term_bytes,
                                           thread, threads);
  }
}

// The rows that the LM head multiplies.
struct HiddenRows {
  Numbers numbers;
  int64_t stride;
  int count;

  __device__ __forceinline__ HiddenRows(const DecodeParams& p, const Workspace& ws)
      : numbers{ws.rows ? ws.rows : p.hidden, p.dtype},
        stride(ws.rows ? p.d : p.hidden_stride),
        count(static_cast<int>(product_rows(p))) {}

  __device__ __forceinline__ Numbers row(int64_t i) const { return numbers.from(i * stride); }
};

// Prepares all rows in the workspace, one block per row. The first kThreads threads of a block do
// the work; they form the barrier group `kGroup`. slot: one float for each of their warps.
template <int kGroup, int kThreads>
__device__ __noinline__ void prepare_batch(const DecodeParams& p, const Workspace& ws,
                                           Format format, float* slot) {
  const int64_t row_bytes = 2 * round_up(p.d, run_inputs(format));
  const int terms = p.dtype == DType::kFloat32 ? 3 : 1;
  const HiddenRows hidden(p, ws);
  for (int b = blockIdx.x; b < hidden.count; b += gridDim.x) {
    const Numbers row = hidden.row(b);
    const float own = warp_max(largest_of(row, p.d, threadIdx.x, kThreads));
    if (lane_index() == 0) slot[warp_in_block()] = own;
    group_barrier<kGroup, kThreads>();  // every warp has written its slot
    float largest = 0.0f;
    for (int warp = 0; warp < kThreads / kWarp; ++warp) largest = fmaxf(largest, slot[warp]);
    const float unit = operand_unit(largest);
    if (threadIdx.x == 0) ws.operand_scale[b] = unit;
    unsigned char* to = reinterpret_cast<unsigned char*>(ws.operand) + b * row_bytes;
    write_operand(format, row, p.d, unit, terms, {to, kBlockBytes, 0}, row_bytes / 16,
                  hidden.count * row_bytes, threadIdx.x, kThreads);
    group_barrier<kGroup, kThreads>();  // every thread has read the slots
  }
}

// Prepares all rows in shared memory, in swizzled blocks, with the kConsumers warps that form
// `kGroup`. The warps are divided evenly among the rows. slot: one float per warp. Not inlined, to
// save the callers' registers.
template <int kGroup>
__device__ __noinline__ void prepare_resident(const DecodeParams& p, const Workspace& ws,
                                              Format format, int terms, unsigned char* to,
                                              int block_pitch, int sixteens, float* scales,
                                              float* slot) {
  const HiddenRows hidden(p, ws);
  int warps = kConsumers;
  while (warps > 1 && warps * hidden.count > kConsumers) warps /= 2;
  const int thread = warp_in_block() % warps * kWarp + lane_index(), threads = warps * kWarp;
  const int64_t term_bytes = static_cast<int64_t>(sixteens / 8) * block_pitch;
  // With several warps per row there is one round, which all warps must enter.
  for (int b = warp_in_block() / warps; b < hidden.count || warps > 1; b += kConsumers / warps) {
    const bool there = b < hidden.count;
    const Numbers row = hidden.row(there ? b : 0);
    float largest = warp_max(largest_of(row, there ? p.d : 0, thread, threads));
    if (warps > 1) {
      if (lane_index() == 0) slot[warp_in_block()] = largest;
      group_barrier<kGroup, kConsumers * kWarp>();  // every warp has written its slot
      for (int i = 0; i < warps; ++i) {
        largest = fmaxf(largest, slot[warp_in_block() / warps * warps + i]);
      }
    }
    if (!there) return;
    const float unit = operand_unit(largest);
    if (thread == 0) scales[b] = unit;
    write_operand(format, row, p.d, unit, terms, {to + b * kBlockBytes, block_pitch, b}, sixteens,
                  term_bytes, thread, threads);
    if (warps > 1) return;
  }
}

}  // namespace cuda
}  // namespace dualhead
