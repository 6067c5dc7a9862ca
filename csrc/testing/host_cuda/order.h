// SPDX-License-Identifier: Apache-2.0
// The order of memory accesses that a device guarantees, as far as the counters in global memory
// need it. A warp counts as one thread; its clock advances with each release. What is known to
// have happened before a point is one clock per warp.
//
// - A barrier gives all its warps the knowledge of each. An mbarrier passes it from those who
//   arrive to those who wait.
// - signal() attaches the warp's knowledge to the counter. raise() attaches nothing: who looks at
//   such a counter must know of the raise already.
// - peek() sees the value. Only acquire_fence(), by the same thread, makes known what was attached.
//
// In a build with -fsanitize=thread, whose hooks are in accesses.cpp, every access to global memory
// is checked: if another warp wrote there and that is not known to have happened before, the grid
// stops, even though the value is right on this machine.
//
// How to poll is checked in every build: one lane of a warp looks at a counter, and it fences once,
// after it has seen a signal.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace dualhead {
namespace host_cuda {

void raise(unsigned* counter, unsigned amount);
void signal(unsigned* counter, unsigned amount);  // Device::releases = false: as raise()
unsigned peek(const unsigned* counter);
void acquire_fence();  // Device::acquires = false: does nothing

void note_access(const void* p, size_t bytes, bool writes);

// --- for grid.cpp and async.cpp ---
void forget_order(int warps);                // a new grid
void order_meeting(std::vector<int> warps);  // a barrier, or an exchange within a warp
void order_arrival(const uint64_t* barrier);
void order_wait(const uint64_t* barrier);
void order_nap();

}  // namespace host_cuda
}  // namespace dualhead
