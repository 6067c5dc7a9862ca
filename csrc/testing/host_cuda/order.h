// SPDX-License-Identifier: Apache-2.0
// The order of memory accesses that a device guarantees, as far as the counters in global memory
// need it. Each thread has a clock, which advances with each release. What a thread knows to have
// happened is one clock per thread.
//
// - A barrier gives all its threads the knowledge of each. An mbarrier passes it from those who
//   arrive to those who wait. An exchange within a warp passes nothing.
// - signal() attaches the thread's knowledge to the counter. raise() attaches nothing: who looks at
//   such a counter must know of every raise already.
// - peek() sees the value. Only acquire_fence(), by the same thread, makes known what was attached.
//
// In a build with -fsanitize=thread, whose hooks are in accesses.cpp, every access to global and
// shared memory is checked: if another thread wrote there and that is not known to have happened
// before, the grid stops, even though the value is right on this machine. So it does if a thread or
// a copy overwrites shared memory that another thread may still be reading. Global memory that is
// overwritten too early is not noticed.
//
// How to poll is checked in every build: one lane of a warp looks at a counter, and it fences once,
// after it has seen a signal.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

namespace dualhead {
namespace host_cuda {

void raise(unsigned* counter, unsigned amount);
void signal(unsigned* counter, unsigned amount);
unsigned peek(const unsigned* counter);
void acquire_fence();

void check_accesses();  // from now on; costs time and memory quadratic in the threads
void note_access(const void* p, size_t bytes, bool writes);

// A signal, fence or barrier in the code, and the warp of its block that has executed it first.
struct Ordering {
  const char* what;
  int warp;
};

// Those that the last grid has executed, by the address in the code that they return to, which is
// the name for Device::missing.
const std::map<uintptr_t, Ordering>& orderings();

// --- for grid.cpp and async.cpp ---
void forget_order(int threads);                // a new grid
void order_meeting(std::vector<int> threads);  // a barrier
void order_exchange();                         // within the running thread's warp
void order_arrival(const uint64_t* barrier);
void order_wait(const uint64_t* barrier);
void order_nap();
bool has_effect(const char* what, const void* place);             // false for Device::missing
void check_copy(const void* to, const void* from, size_t bytes);  // from null: writes only

}  // namespace host_cuda
}  // namespace dualhead
