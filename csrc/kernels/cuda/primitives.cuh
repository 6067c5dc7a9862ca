// SPDX-License-Identifier: Apache-2.0
// The hardware features that the CUDA kernels use, under names: positions in the grid, barriers,
// warp exchange, shared memory, storage types. All intrinsics and all PTX are here, so that the
// kernels read as plain C++ and also compile, unchanged, against the host backend of csrc/testing.
// Blocks are one-dimensional and have a multiple of 32 threads.
#pragma once

#include <cooperative_groups.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#if defined(__CUDACC__)
#include <cuda.h>
#endif

#include <cstdint>

#include "../sampling.h"
#include "../weight_format.h"

namespace dualhead {
namespace cuda {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xFFFFFFFFu;

// Which of the two copy mechanisms this compilation uses. nvcc compiles every kernel once per
// architecture; the host backend has both.
#if !defined(__CUDA_ARCH__)
constexpr bool kHasBulkCopies = true, kHasAsyncCopies = true;
#else
constexpr bool kHasBulkCopies = __CUDA_ARCH__ >= 900, kHasAsyncCopies = __CUDA_ARCH__ < 900;
#endif
constexpr int kBulkArch = 90;  // architectures from here on use bulk copies

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

// --- barriers ------------------------------------------------------------------------------------

// All threads of the block. Writes to shared and global memory become visible to all of them.
__device__ __forceinline__ void block_barrier() { __syncthreads(); }

// The kThreads threads of the block that use this group number, 1 to 15. Whole warps only.
template <int kGroup, int kThreads>
__device__ __forceinline__ void group_barrier() {
#if defined(__CUDACC__)
  asm volatile("barrier.sync %0, %1;" ::"n"(kGroup), "n"(kThreads) : "memory");
#else
  host_cuda::wait_for_group(kGroup, kThreads);
#endif
}

// The lanes of a warp.
__device__ __forceinline__ void warp_barrier() { __syncwarp(); }

// All threads of a cooperative grid. Writes to global memory become visible to all of them.
//
// This is the toolkit's barrier. The driver provides its state per launch, and per replay of a CUDA
// graph. A counter of our own would have to be zeroed by a second graph node or cached per stream;
// in the second case a graph captured on one stream and replayed on another would share it with the
// work on the first.
__device__ __forceinline__ void grid_barrier() { cooperative_groups::this_grid().sync(); }

// Aborts the launch with an error.
__device__ __forceinline__ void trap() {
#if defined(__CUDACC__)
  asm volatile("trap;");
#else
  host_cuda::stop("trap");
#endif
}

// Counters in global memory that some threads of the grid increment and others wait for. What a
// thread wrote before signal() is visible after wait_for(), or after has_reached() returned true.

// Without ordering of its own: the same thread's next signal() orders it.
__device__ __forceinline__ void raise(unsigned* counter, unsigned amount) {
#if defined(__CUDACC__)
  atomicAdd(counter, amount);
#else
  host_cuda::raise(counter, amount);
#endif
}

__device__ __forceinline__ void signal(unsigned* counter, unsigned amount) {
#if defined(__CUDACC__)
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(amount) : "memory");
#else
  host_cuda::signal(counter, amount);
#endif
}

// The counter's value. Does not make visible what was written before the signal().
__device__ __forceinline__ unsigned peek(const unsigned* counter) {
#if defined(__CUDACC__)
  unsigned value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
#else
  return host_cuda::peek(counter);
#endif
}

// After a peek() by the same thread: makes visible what was written before the signal() that it
// saw. It invalidates the multiprocessor's L1 cache, so it is not used while polling.
__device__ __forceinline__ void acquire_fence() {
#if defined(__CUDACC__)
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
#else
  host_cuda::acquire_fence();
#endif
}

// --- exchange within a warp; every lane calls ----------------------------------------------------

template <typename T>
__device__ __forceinline__ T exchange_xor(T value, int offset) {
  return __shfl_xor_sync(kWholeWarp, value, offset);
}

template <typename T>
__device__ __forceinline__ T exchange_from(T value, int lane) {
  return __shfl_sync(kWholeWarp, value, lane);
}

// The reductions below give every lane the same bits. Addition and max commute, so both partners of
// an exchange compute the same value, and the order depends only on the lanes.
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

// The largest value that is not NaN. NaN is reported by the sums instead.
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

// The lower lane's part comes first on both sides of each exchange, because the rounding of a merge
// depends on the order of its arguments. Not unrolled: the code runs once and would have to be
// fetched from memory.
__device__ __forceinline__ SoftmaxPart warp_merge(SoftmaxPart part) {
#pragma unroll 1
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const SoftmaxPart other{exchange_xor(part.max, offset), exchange_xor(part.sum, offset)};
    part = lane_index() & offset ? merge_parts(other, part) : merge_parts(part, other);
  }
  return part;
}

// --- waiting for counters; the whole warp calls --------------------------------------------------

// Only one lane polls, and it fences once.
__device__ __forceinline__ void wait_for(const unsigned* counter, unsigned target) {
  if (lane_index() == 0) {
    while (peek(counter) < target) __nanosleep(32);
    acquire_fence();
  }
  warp_barrier();
}

// Like wait_for, but returns at once. The answer is the same in every lane.
__device__ __forceinline__ bool has_reached(const unsigned* counter, unsigned target) {
  int reached = 0;
  if (lane_index() == 0 && peek(counter) >= target) {
    acquire_fence();
    reached = 1;
  }
  reached = exchange_from(reached, 0);
  warp_barrier();  // an exchange alone orders no memory
  return reached != 0;
}

// --- shared memory -------------------------------------------------------------------------------

// The block's dynamic shared memory, aligned to 1024 bytes, the period of the copy engine's
// swizzle. The launch sets its size.
__device__ __forceinline__ unsigned char* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
#else
  return host_cuda::shared_memory();
#endif
}

// --- neighbours in memory ------------------------------------------------------------------------

struct Four {
  float x[4];
};

__device__ __forceinline__ bool sixteen_divides(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// The first `count` of the four floats at p; the others are 0. Uses a single access if all four are
// wanted and the address is aligned.
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

// Stores the first `count`, likewise.
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

// Sixteen bytes, as four words.
struct Words {
  uint32_t x[4];
};

// A single access; the address is aligned to 16 bytes.
__device__ __forceinline__ Words load_words(const void* p) {
  const uint4 all = *static_cast<const uint4*>(p);
  return Words{{all.x, all.y, all.z, all.w}};
}

__device__ __forceinline__ void store_words(void* p, Words words) {
#if !defined(__CUDACC__)
  host_cuda::note_store(p);
#endif
  *static_cast<uint4*>(p) = make_uint4(words.x[0], words.x[1], words.x[2], words.x[3]);
}

// Prefetches the 128-byte line around an address into L2.
__device__ __forceinline__ void prefetch(const void* p) {
#if defined(__CUDACC__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#else
  (void)p;
#endif
}

// --- asynchronous copies into shared memory ------------------------------------------------------

// An mbarrier. A phase ends when `count` arrivals have happened and all announced bytes have
// arrived. One thread initialises it; after a block_barrier() all threads may use it.
using Barrier = uint64_t;

__device__ __forceinline__ uint32_t shared_address(const void* p) {
#if defined(__CUDACC__)
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
#else
  (void)p;
  return 0;
#endif
}

__device__ __forceinline__ void mbarrier_init(Barrier* barrier, unsigned count) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // the copy engine sees it too
#endif
#else
  host_cuda::mbarrier_init(barrier, count);
#endif
}

__device__ __forceinline__ void mbarrier_arrive(Barrier* barrier) {
#if defined(__CUDACC__)
  asm volatile(
      "{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address(barrier))
      : "memory");
#else
  host_cuda::mbarrier_arrive(barrier);
#endif
}

// Waits until the phase with this parity has ended: 0 for the first, 1 for the second, ...
__device__ __forceinline__ void mbarrier_wait(Barrier* barrier, unsigned parity) {
#if defined(__CUDACC__)
  uint32_t done = 0;
  while (!done) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
#else
    asm volatile(
        "{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
#endif
  }
#else
  host_cuda::mbarrier_wait(barrier, parity);
#endif
}

// Arrives, and announces the bytes that bulk copies will deliver.
__device__ __forceinline__ void mbarrier_expect(Barrier* barrier, unsigned bytes) {
#if !defined(__CUDACC__)
  host_cuda::mbarrier_expect(barrier, bytes);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
#endif
}

// The copy engine does not read global memory through the path of ordinary stores. A fence is
// needed between the grid's stores (and a barrier that made them visible to this thread) and this
// thread's bulk copies of that memory.
__device__ __forceinline__ void proxy_fence() {
#if !defined(__CUDACC__)
  host_cuda::proxy_fence();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.global;" ::: "memory");
#endif
}

// Cache hint: whether L2 should evict a line first (it is read once) or keep it (every block reads
// it).
enum class Keep { kFirstToGo, kStay };

__device__ __forceinline__ uint64_t cache_policy(Keep keep) {
  uint64_t policy = 0;
#if defined(__CUDACC__)
  if (keep == Keep::kFirstToGo) {
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  } else {
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  }
#else
  (void)keep;
#endif
  return policy;
}

// True in one lane of the warp; all lanes must call it together. The compiler knows that a single
// thread takes the branch, so the copies in it get their addresses from uniform registers, without
// a loop over the lanes.
__device__ __forceinline__ bool elect_one() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t elected;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xFFFFFFFF; selp.b32 %0, 1, 0, p; }"
               : "=r"(elected));
  return elected != 0;
#else
  warp_barrier();
  return lane_index() == 0;
#endif
}

// A matrix as described to the copy engine (sm_90): planes of rows of bytes, and the box of one
// copy, kBlockBytes of each of `box_rows` rows. encode_map() in tensor_map.h creates it.
#if defined(__CUDACC__)
using TensorMap = CUtensorMap;
#else
using TensorMap = host_cuda::TensorMap;
#endif

// Bytes of a row in a box. In shared memory also the distance between the rows of a box.
constexpr int kBlockBytes = 128;

// The offset of 16-byte piece `sixteen` (0 to 7) of row `row` of a box in shared memory. This is
// the copy engine's 128-byte swizzle: lanes that read the same piece of several rows use different
// banks.
__device__ __forceinline__ int swizzled(int row, int sixteen) {
  return row * kBlockBytes + 16 * ((sixteen ^ row) & 7);
}

// Starts the copy of one box, from `byte` of row `row` of `plane` on, to an address aligned to 1024
// bytes. Bytes outside of the matrix become zeros; the barrier still counts the bytes of the whole
// box. Called by one lane; the arguments must be uniform across the warp.
__device__ __forceinline__ void copy_box(void* to, const TensorMap* map, int byte, int row,
                                         int plane, Barrier* barrier, uint64_t policy) {
#if !defined(__CUDACC__)
  (void)policy;
  host_cuda::copy_box(to, *map, byte, row, plane, barrier);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cta.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(shared_address(to)),
      "l"(map), "r"(byte), "r"(row), "r"(plane), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
#endif
}

// Prefetches the map itself; otherwise the first copy would wait for it.
__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#else
  (void)map;
#endif
}

// Copies sixteen bytes asynchronously, as one thread (sm_80). If `there` is false it writes zeros
// and does not read `from`.
__device__ __forceinline__ void async_copy_16(void* to, const void* from, bool there,
                                              uint64_t policy) {
#if defined(__CUDACC__)
  asm volatile(
      "cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared_address(to)),
      "l"(from), "r"(there ? 16 : 0), "l"(policy)
      : "memory");
#else
  (void)policy;
  host_cuda::async_copy(to, there ? from : nullptr, 16);
#endif
}

// Arrives for this thread when all of its async_copy_16 copies so far have completed. Counts as one
// of the barrier's arrivals.
__device__ __forceinline__ void async_copies_arrive(Barrier* barrier) {
#if defined(__CUDACC__)
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier))
               : "memory");
#else
  host_cuda::async_copies_arrive(barrier);
#endif
}

// --- tensor cores and packed halves --------------------------------------------------------------

// c += a b in fp32, for a (16, 16), b (16, 8), c (16, 8) of a warp. A lane holds, with g = lane / 4
// and t = lane % 4,
//
//   a = {row g, inputs 2t 2t+1; row g+8, the same; row g, inputs 2t+8 2t+9; row g+8, the same}
//   b = {inputs 2t 2t+1; inputs 2t+8 2t+9} of column g
//   c = {row g, columns 2t 2t+1; row g+8, the same}
//
// kBrain: pairs of bfloat16, otherwise of float16. The first of a pair is in the lower half.
template <bool kBrain>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
#if !defined(__CUDACC__)
  host_cuda::mma_m16n8k16(c, a, b0, b1, kBrain);
#else
  if constexpr (kBrain) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#endif
}

// Operations on two float16 values at once. Each result is rounded once.
__device__ __forceinline__ uint32_t half2_add(uint32_t a, uint32_t b) {
#if defined(__CUDACC__)
  uint32_t sum;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
#else
  return host_cuda::half2_fma(a, 0x3C003C00u, b);
#endif
}

__device__ __forceinline__ uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDACC__)
  uint32_t result;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
#else
  return host_cuda::half2_fma(a, b, c);
#endif
}

// Byte i of the result is the byte that nibble i of `selector` names: of a (0 to 3) or of b (4 to
// 7).
__device__ __forceinline__ uint32_t select_bytes(uint32_t a, uint32_t b, uint32_t selector) {
#if defined(__CUDACC__)
  return __byte_perm(a, b, selector);
#else
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<uint32_t>(both >> 8 * (selector >> 4 * i & 7u) & 0xFFu) << 8 * i;
  }
  return result;
#endif
}

// The place of the highest set bit of a positive number.
__device__ __forceinline__ int highest_bit(int x) {
#if defined(__CUDACC__)
  return 31 - __clz(x);
#else
  return 31 - __builtin_clz(static_cast<unsigned>(x));
#endif
}

// --- storage types -------------------------------------------------------------------------------

using dualhead::to_float;

struct Float16 {
  uint16_t bits;
};

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

// Eight adjacent values, aligned to 16 bytes.
template <typename T>
__device__ __forceinline__ void load_eight(const T* p, float (&out)[8]) {
  if constexpr (sizeof(T) == sizeof(float)) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Words words = load_words(p + 4 * half);
#pragma unroll
      for (int i = 0; i < 4; ++i) out[4 * half + i] = bits_float(words.x[i]);
    }
  } else {
    const Words words = load_words(p);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[2 * i] = to_float(T{static_cast<uint16_t>(words.x[i] & 0xFFFFu)});
      out[2 * i + 1] = to_float(T{static_cast<uint16_t>(words.x[i] >> 16)});
    }
  }
}

template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float x) {
  return to_bfloat16(x);
}

template <>
__device__ __forceinline__ Float16 from_float<Float16>(float x) {
  return Float16{__half_as_ushort(__float2half_rn(x))};
}

}  // namespace cuda
}  // namespace dualhead
