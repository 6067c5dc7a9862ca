// SPDX-License-Identifier: Apache-2.0
// Asynchronous copies, mbarriers and tensor cores of the host backend. A copy fills its destination
// with 0xFF bytes (NaN) at once and arrives at any later time, in any order, at the latest when a
// thread waits for it. Code that reads too early, or overwrites memory that is still being read,
// therefore sees NaN.
#pragma once

#include <cstdint>

namespace dualhead {
namespace host_cuda {

void mbarrier_init(uint64_t* barrier, unsigned count);
void mbarrier_arrive(uint64_t* barrier);
void mbarrier_expect(uint64_t* barrier, unsigned bytes);  // announces bytes, then arrives
void mbarrier_wait(uint64_t* barrier, unsigned parity);

// A matrix of planes x rows x row_bytes bytes, and the box of one copy: 128 bytes of box_rows rows.
struct TensorMap {
  const void* base = nullptr;
  long long row_bytes = 0, rows = 0, row_stride = 0, planes = 0, plane_stride = 0;
  int box_rows = 0;
};

// Returns false where the driver would refuse: alignment, sizes.
bool encode_map(const void* base, long long row_bytes, long long rows, long long row_stride,
                long long planes, long long plane_stride, int box_rows, TensorMap* map);

// Applies the 128-byte swizzle. Bytes outside of the matrix become zeros.
void copy_box(void* to, const TensorMap& map, int byte, int row, int plane, uint64_t* barrier);

void async_copy(void* to, const void* from, unsigned bytes);  // from null: zeros
void async_copies_arrive(uint64_t* barrier);

// The copy engine does not see the grid's own stores before a fence of the copying thread. A bulk
// copy from memory that store_words() has written since that thread's last fence stops the grid.
void note_store(const void* to);  // sixteen bytes
void proxy_fence();

// Products are exact. Each of the four sums is rounded once.
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool brain);

// a b + c of two float16 numbers, rounded once each.
uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c);

// Bytes that the asynchronous copies of the last grid have delivered, and how many of the copies
// were boxes.
uint64_t bytes_copied();
uint64_t boxes_copied();

// Resets the state for a new grid: no mbarriers, no copies in flight.
void forget_copies();

}  // namespace host_cuda
}  // namespace dualhead
