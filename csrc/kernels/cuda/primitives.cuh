// SPDX-License-Identifier: Apache-2.0
// What the CUDA kernels ask of the machine, by name: places in the grid, barriers, warp exchange,
// shared memory, storage types. Every intrinsic and every line of PTX lives here, so that the
// kernels above read as C++ and also compile, unchanged, against the host backend of csrc/testing.
// Blocks are one-dimensional and a multiple of 32 threads.
#pragma once

#include <cooperative_groups.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../sampling.h"

namespace dualhead {
namespace cuda {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xFFFFFFFFu;

// --- places --------------------------------------------------------------------------------------

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }

__device__ __forceinline__ int warp_in_block() { return static_cast<int>(threadIdx.x) / kWarp; }

__device__ __forceinline__ int warps_per_block() { return static_cast<int>(blockDim.x) / kWarp; }

__device__ __forceinline__ int64_t warp_in_grid() {
  return static_cast<int64_t>(blockIdx.x) * warps_per_block() + warp_in_block();
}

__device__ __forceinline__ int64_t warps_in_grid() {
  return static_cast<int64_t>(gridDim.x) * warps_per_block();
}

__device__ __forceinline__ int64_t thread_in_grid() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

__device__ __forceinline__ int64_t threads_in_grid() {
  return static_cast<int64_t>(gridDim.x) * blockDim.x;
}

// --- barriers ------------------------------------------------------------------------------------

// All threads of the block; what they wrote to shared and global memory is visible to each other.
__device__ __forceinline__ void block_barrier() { __syncthreads(); }

// All threads of a cooperative grid; what any wrote to global memory is visible to all.
// It is the toolkit's own barrier, whose state the driver lends per launch, also per replay of a
// CUDA graph. A counter of ours would have to be zeroed by a second graph node, or be cached per
// stream, where a graph captured on one stream and replayed on another would share it with whatever
// runs on the first.
__device__ __forceinline__ void grid_barrier() { cooperative_groups::this_grid().sync(); }

// --- exchange within a warp; every lane calls
// ------------------------------------------------------

template <typename T>
__device__ __forceinline__ T exchange_xor(T value, int offset) {
  return __shfl_xor_sync(kWholeWarp, value, offset);
}

// The reductions below give every lane the same bits: addition and max commute, so both partners of
// each exchange compute the same number, in an order fixed by the lanes alone.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += exchange_xor(value, offset);
  return value;
}

__device__ __forceinline__ unsigned long long warp_sum(unsigned long long value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += exchange_xor(value, offset);
  return value;
}

__device__ __forceinline__ int warp_sum(int value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += exchange_xor(value, offset);
  return value;
}

__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += exchange_xor(value, offset);
  return value;
}

// Of the numbers among the values: a NaN is passed over, and is left to the sums to report.
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = fmaxf(value, exchange_xor(value, offset));
  }
  return value;
}

__device__ __forceinline__ unsigned long long warp_max(unsigned long long value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const unsigned long long other = exchange_xor(value, offset);
    value = other > value ? other : value;
  }
  return value;
}

// Lower lanes first on both sides of each exchange: merging does not commute in its rounding.
__device__ __forceinline__ SoftmaxPart warp_merge(SoftmaxPart part) {
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const SoftmaxPart other{exchange_xor(part.max, offset), exchange_xor(part.sum, offset)};
    part = lane_index() & offset ? merge_parts(other, part) : merge_parts(part, other);
  }
  return part;
}

// --- shared memory -------------------------------------------------------------------------------

// The block's dynamic shared memory, aligned to 16 bytes; the launch says how much there is.
__device__ __forceinline__ unsigned char* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
#else
  return host_cuda::shared_memory();
#endif
}

// --- neighbours in memory ------------------------------------------------------------------------

struct Four {
  float x[4];
};

__device__ __forceinline__ bool sixteen_divides(const float* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// The first `count` of the four floats at p, the others 0; in one access where all four are wanted
// and the address allows it.
__device__ __forceinline__ Four load_four(const float* p, int count) {
  if (count == 4 && sixteen_divides(p)) {
    const float4 all = *reinterpret_cast<const float4*>(p);
    return Four{{all.x, all.y, all.z, all.w}};
  }
  Four four = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < count) four.x[i] = p[i];
  }
  return four;
}

// Likewise.
__device__ __forceinline__ void store_four(float* p, Four four, int count) {
  if (count == 4 && sixteen_divides(p)) {
    *reinterpret_cast<float4*>(p) = make_float4(four.x[0], four.x[1], four.x[2], four.x[3]);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < count) p[i] = four.x[i];
  }
}

// --- storage types -------------------------------------------------------------------------------

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }

__device__ __forceinline__ float to_float(BFloat16 x) {
  return bits_float(static_cast<uint32_t>(x.bits) << 16);
}

__device__ __forceinline__ float to_float(Float16 x) {
  return __half2float(__ushort_as_half(x.bits));
}

// Round to nearest, ties to even.
template <typename T>
__device__ T from_float(float x);

template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}

template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float x) {
  if (x != x) return BFloat16{0x7FC0};  // rounding the bits of a NaN could give an infinity
  const uint32_t bits = float_bits(x);
  return BFloat16{static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16)};
}

template <>
__device__ __forceinline__ Float16 from_float<Float16>(float x) {
  return Float16{__half_as_ushort(__float2half_rn(x))};
}

}  // namespace cuda
}  // namespace dualhead
