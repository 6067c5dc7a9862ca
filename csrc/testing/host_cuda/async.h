// SPDX-License-Identifier: Apache-2.0
// Asynchronous copies, their barriers and the tensor cores of the host backend. A copy takes its
// destination away at once (0xFF bytes: NaN) and lands at any later time, in any order, at the
// latest when somebody waits for it: whoever reads too early, or gives a place away while it is
// still read, sees NaN.
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

// False where the driver would refuse: alignment, sizes.
bool encode_map(const void* base, long long row_bytes, long long rows, long long row_stride,
                long long planes, long long plane_stride, int box_rows, TensorMap* map);

// With the 128-byte swizzle; zeros for what lies outside of the matrix.
void copy_box(void* to, const TensorMap& map, int byte, int row, int plane, uint64_t* barrier);

void async_copy(void* to, const void* from, unsigned bytes);  // from null: zeros
void async_copies_arrive(uint64_t* barrier);

// The copy engine does not see the grid's own stores before a fence of the copying thread: a bulk
// copy from where store_words() has stored since that thread's last one stops the grid.
void note_store(const void* to);  // sixteen bytes
void proxy_fence();

// Products are exact, and each of the four sums is rounded once.
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool brain);

// a b + c of two float16 numbers, rounded once each.
uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c);

// That asynchronous copies of the last grid have brought, and how many of them were boxes.
uint64_t bytes_copied();
uint64_t boxes_copied();

// A new grid: no barrier exists, nothing is under way.
void forget_copies();

}  // namespace host_cuda
}  // namespace dualhead
