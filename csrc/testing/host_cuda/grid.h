// SPDX-License-Identifier: Apache-2.0
// Runs a CUDA grid on the CPU, for tests. Each CUDA thread is a fiber (ucontext), all blocks of the
// grid exist at once, and one host thread switches between them. A fiber runs until it waits (a
// barrier, an exchange within a warp, __nanosleep) or reaches an atomic. The next one is drawn from
// a seed, so code without a necessary barrier is run in orders that break it.
//
// It differs from a device: memory is sequentially consistent (but see order.h), the lanes of a
// warp do not run in lockstep, and expf and similar functions are the host's. It finds wrong
// indices, missing or diverging barriers, reads of unwritten memory (shared memory is poisoned),
// deadlocks, and with sanitizers accesses out of bounds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace dualhead {
namespace host_cuda {

struct Index3 {
  unsigned x, y, z;
};

struct Schedule {
  // 0: in turn. Odd: drawn from this seed, each warp as far as it goes. Even: drawn from this seed,
  // any thread next.
  uint64_t seed = 0;
  // Seeded bugs, to show that tests detect them: every thread passes its n-th barrier (from 0) of
  // the kind without waiting. -1: none.
  int skipped_grid_barrier = -1;
  int skipped_block_barrier = -1;  // group barriers count among them
  int skipped_copy_wait = -1;      // waits for an mbarrier
};

// Runs body once per thread of the grid. If the threads can never all finish, throws
// std::runtime_error that says which of them wait where. Shared memory is filled with 0xFF bytes
// (floats: NaN) first.
void run_grid(Index3 grid, Index3 block, size_t shared_bytes, bool cooperative, Schedule schedule,
              const std::function<void()>& body);

// --- what a running thread sees ------------------------------------------------------------------

extern Index3 threadIdx, blockIdx, blockDim, gridDim;  // set at every switch
unsigned char* shared_memory();

void wait_for_block();                        // __syncthreads: all threads of the block
void wait_for_group(int group, int threads);  // barrier.sync: all that name the group
void wait_for_warp();                         // __syncwarp: all 32 lanes
void wait_for_grid();  // the grid barrier; an error unless the grid was launched as cooperative
void nap();            // __nanosleep: lets other warps go first
void step_back();      // before an atomic: lets any ready thread go first

// --- for async.cpp and order.cpp ---
[[noreturn]] void stop(std::string error);  // ends the grid; run_grid throws it
void note_progress();                       // nap() gives up after too long without it
uint64_t next_random();                     // drawn from the seed
uint64_t schedule_seed();
bool in_grid();                // whether a thread of a grid runs
int thread_in_grid();          // the running thread, counted over the grid
bool on_stack(const void* p);  // of the running thread
bool in_shared_memory(const void* p);
std::string place_of_thread();
std::string place_of_thread(size_t thread);  // counted over the grid
int count_copy_wait();                       // number of calls by this thread
int skipped_copy_wait();
// Every lane gives six words and gets those of all lanes, by lane. All 32 must call.
const uint32_t (*exchange_six(const uint32_t (&mine)[6]))[6];

// Every lane gives a value and gets that of lane `source`. All 32 must call.
uint64_t exchange(uint64_t value, int source);

}  // namespace host_cuda
}  // namespace dualhead
