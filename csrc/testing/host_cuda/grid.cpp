// SPDX-License-Identifier: Apache-2.0
// The scheduler behind grid.h. Threads wait in meetings. The thread that completes a meeting makes
// all of its threads ready, and a thread that must wait switches directly to a ready one. If none
// is ready, there is a deadlock.
#undef _FORTIFY_SOURCE  // its longjmp refuses to switch stacks
#include "grid.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "async.h"
#include "order.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace dualhead {
namespace host_cuda {

Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr int kWarp = 32;

struct Fiber;

// A point that `expected` threads must reach before any of them continues. It can be reused at
// once, because no thread arrives again before all have left.
struct Meeting {
  size_t expected = 0;
  const char* name = nullptr;  // what the waiting threads called
  std::vector<Fiber*> waiting;
};

struct Warp {
  Meeting meeting;
  // Two sets of slots, used alternately: a fast lane may write its next value while slow lanes
  // still read the last.
  uint64_t slot[2][kWarp];
  uint32_t words[2][kWarp][6];
  std::vector<Fiber*> ready;
};

struct FreeMemory {
  void operator()(unsigned char* memory) const { std::free(memory); }
};

struct Block {
  Index3 index;
  Meeting meeting;
  std::map<int, Meeting> groups;
  std::unique_ptr<unsigned char, FreeMemory> shared;  // aligned to 1024, as on the device
};

// A stack and its saved execution state.
struct Execution {
  ucontext_t context;
  jmp_buf jump;
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // of AddressSanitizer
  bool started = false;
};

struct Fiber {
  Execution execution;
  Index3 thread;
  int lane;
  unsigned exchanges = 0;
  int grid_barriers = 0, block_barriers = 0, copy_waits = 0;
  Warp* warp;
  Block* block;
  const char* waits_for = nullptr;
};

struct Grid {
  size_t shared_bytes;
  bool cooperative;
  Schedule schedule;
  uint64_t random;
  const std::function<void()>* body;
  Meeting meeting;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Block> blocks;
  std::vector<Warp*> ready_warps;  // those with a ready thread
  size_t finished = 0;
  size_t naps = 0;  // since the last completed meeting or finished thread
  std::string error;
  Execution host;  // the thread that called run_grid
};

Grid* grid_now = nullptr;    // one grid at a time
Fiber* fiber_now = nullptr;  // null while the host's stack runs

// --- stacks and switches -------------------------------------------------------------------------

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 * 1024;
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif

// Stacks are kept between grids. Below each is a page that faults, so that an overflow crashes
// instead of corrupting the next stack.
unsigned char* stack_of(size_t i) {
  static std::vector<unsigned char*> stacks;
  while (stacks.size() <= i) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* memory = mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) throw std::bad_alloc();
    stacks.push_back(static_cast<unsigned char*>(memory) + page);
  }
  return stacks[i];
}

// Switches from `from`, which continues when another switch names it; with `last`, never.
void switch_stacks(Execution* from, Execution* to, bool last) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &from->fake_stack, to->stack, to->stack_bytes);
  swapcontext(&from->context, &to->context);
  __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
#else
  // ucontext creates the stacks, but each of its switches is a system call; longjmp is not.
  (void)last;
  if (_setjmp(from->jump) != 0) return;
  if (to->started) _longjmp(to->jump, 1);
  to->started = true;
  setcontext(&to->context);
#endif
}

void run(Fiber* next, bool last = false) {
  Fiber* previous = fiber_now;
  if (next == previous) return;
  fiber_now = next;
  if (next) threadIdx = next->thread, blockIdx = next->block->index;
  switch_stacks(previous ? &previous->execution : &grid_now->host,
                next ? &next->execution : &grid_now->host, last);
}

}  // namespace

// --- whose turn it is ----------------------------------------------------------------------------

uint64_t next_random() {  // splitmix64
  uint64_t z = grid_now->random += 0x9E3779B97F4A7C15ull;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ z >> 27) * 0x94D049BB133111EBull;
  return z ^ z >> 31;
}

// Abandons all of the grid's threads where they are.
void stop(std::string error) {
  // Moved, because the caller's frame is abandoned with everything it still owns, and LeakSanitizer
  // would report that.
  grid_now->error = std::move(error);
  run(nullptr, true);
  std::abort();  // an abandoned thread is never resumed
}

namespace {

void make_ready(Fiber* fiber) {
  fiber->waits_for = nullptr;
  if (fiber->warp->ready.empty()) grid_now->ready_warps.push_back(fiber->warp);
  fiber->warp->ready.push_back(fiber);
}

// Removes and returns a ready thread; null if there is none.
Fiber* take_ready(bool another_warp) {
  std::vector<Warp*>& line = grid_now->ready_warps;
  if (line.empty()) return nullptr;
  const uint64_t seed = grid_now->schedule.seed;
  if (seed == 0 && another_warp && line.front() == fiber_now->warp) {
    std::rotate(line.begin(), line.begin() + 1, line.end());
  }
  if (seed != 0) {
    const bool same_warp = seed % 2 == 1 && fiber_now && !another_warp;
    const auto same = same_warp ? std::find(line.begin(), line.end(), fiber_now->warp) : line.end();
    std::iter_swap(line.begin(),
                   same != line.end()
                       ? same
                       : line.begin() + static_cast<std::ptrdiff_t>(next_random() % line.size()));
  }
  std::vector<Fiber*>& ready = line.front()->ready;
  const size_t i = seed == 0 ? 0 : next_random() % ready.size();
  Fiber* fiber = ready[i];
  ready.erase(ready.begin() + static_cast<std::ptrdiff_t>(i));
  if (ready.empty()) line.erase(line.begin());
  return fiber;
}

std::string place(const Fiber& fiber) {
  return "block " + std::to_string(fiber.block->index.x) + " thread " +
         std::to_string(fiber.thread.x);
}

// Describes how many threads have finished, and where the others wait.
std::string whereabouts() {
  std::map<std::string, std::pair<size_t, std::string>> places;  // wait: count, example
  for (const Fiber& fiber : grid_now->fibers) {
    if (!fiber.waits_for) continue;
    auto& [count, example] = places[fiber.waits_for];
    if (count++ == 0) example = place(fiber);
  }
  std::string text = std::to_string(grid_now->finished) + " of " +
                     std::to_string(grid_now->fibers.size()) + " threads finished";
  for (const auto& [what, who] : places) {
    text += ", " + std::to_string(who.first) + " wait in " + what + " (" + who.second + ")";
  }
  return text;
}

void run_next(bool another_warp = false, bool last = false) {
  Fiber* next = take_ready(another_warp);
  if (!next) {
    stop("deadlock: " + whereabouts());
  } else {
    run(next, last);
  }
}

int index_of(const Fiber& fiber) { return static_cast<int>(&fiber - grid_now->fibers.data()); }

// orders: memory, as a barrier does and an exchange does not.
void meet(Meeting* meeting, const char* name, bool orders = true) {
  Fiber* self = fiber_now;
  if (meeting->waiting.empty()) meeting->name = name;
  if (std::strcmp(meeting->name, name) != 0) {
    std::string text = "diverged: " + place(*self) + " is in " + name + " while ";
    text += place(*meeting->waiting.front()) + " waits in " + meeting->name;
    stop(std::move(text));
  }
  if (meeting->waiting.size() + 1 < meeting->expected) {
    self->waits_for = name;
    meeting->waiting.push_back(self);
    run_next();
    return;
  }
  grid_now->naps = 0;
  if (orders) {
    std::vector<int> met{thread_in_grid()};
    for (Fiber* fiber : meeting->waiting) met.push_back(index_of(*fiber));
    order_meeting(std::move(met));
  } else {
    order_exchange();
  }
  for (Fiber* fiber : meeting->waiting) make_ready(fiber);
  meeting->waiting.clear();
  step_back();  // the last to arrive need not be the first to leave
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  // The first fiber is entered from the host's stack, and so learns where that is.
  Execution& host = grid_now->host;
  if (host.stack) {
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
  } else {
    __sanitizer_finish_switch_fiber(nullptr, &host.stack, &host.stack_bytes);
  }
#endif
  (*grid_now->body)();
  grid_now->naps = 0;
  if (++grid_now->finished == grid_now->fibers.size()) {
    run(nullptr, true);
  } else {
    run_next(false, true);
  }
}

// --- the grid ------------------------------------------------------------------------------------

void make_threads(Grid* grid) {
  const size_t blocks = gridDim.x, threads = blockDim.x;
  grid->blocks.resize(blocks);
  grid->warps.resize(blocks * threads / kWarp);
  grid->fibers.resize(blocks * threads);
  grid->meeting.expected = grid->fibers.size();
  for (Warp& warp : grid->warps) warp.meeting.expected = kWarp;
  for (size_t i = 0; i < grid->fibers.size(); ++i) {
    Fiber& fiber = grid->fibers[i];
    fiber.thread = {static_cast<unsigned>(i % threads), 0, 0};
    fiber.lane = static_cast<int>(i % kWarp);
    fiber.warp = &grid->warps[i / kWarp];
    fiber.block = &grid->blocks[i / threads];
    Execution& execution = fiber.execution;
    execution.stack = stack_of(i);
    execution.stack_bytes = kStackBytes;
    getcontext(&execution.context);
    execution.context.uc_stack.ss_sp = const_cast<void*>(execution.stack);
    execution.context.uc_stack.ss_size = kStackBytes;
    execution.context.uc_link = nullptr;
    makecontext(&execution.context, fiber_main, 0);
  }
  for (size_t b = 0; b < blocks; ++b) {
    Block& block = grid->blocks[b];
    block.index = {static_cast<unsigned>(b), 0, 0};
    block.meeting.expected = threads;
    const size_t rounded = (grid->shared_bytes + 1023) / 1024 * 1024;
    block.shared.reset(static_cast<unsigned char*>(std::aligned_alloc(1024, rounded)));
    std::memset(block.shared.get(), 0xFF, grid->shared_bytes);
  }
  for (Fiber& fiber : grid->fibers) make_ready(&fiber);
}

}  // namespace

void run_grid(Index3 grid, Index3 block, size_t shared_bytes, bool cooperative, Schedule schedule,
              const std::function<void()>& body) {
  forget_copies();
  if (grid.x == 0 || grid.y != 1 || grid.z != 1 || block.x == 0 || block.y != 1 || block.z != 1 ||
      block.x % kWarp != 0) {
    throw std::runtime_error("run_grid: only one-dimensional grids of whole warps");
  }
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  Grid now{};
  gridDim = grid, blockDim = block;
  now.shared_bytes = shared_bytes, now.cooperative = cooperative;
  now.schedule = schedule, now.random = schedule.seed;
  now.body = &body;
  now.host.started = true;
  grid_now = &now;
  fiber_now = nullptr;
  make_threads(&now);
  forget_order(static_cast<int>(now.fibers.size()));
  run_next();
  grid_now = nullptr;
  if (!now.error.empty()) throw std::runtime_error(now.error);
}

unsigned char* shared_memory() { return fiber_now->block->shared.get(); }

void wait_for_block() {
  const void* caller = __builtin_return_address(0);
  if (fiber_now->block_barriers++ == grid_now->schedule.skipped_block_barrier) return;
  meet(&fiber_now->block->meeting, "__syncthreads", has_effect("block barrier", caller));
}

void wait_for_group(int group, int threads) {
  const void* caller = __builtin_return_address(0);
  if (fiber_now->block_barriers++ == grid_now->schedule.skipped_block_barrier) return;
  Meeting& meeting = fiber_now->block->groups[group];
  if (meeting.waiting.empty()) meeting.expected = static_cast<size_t>(threads);
  if (meeting.expected != static_cast<size_t>(threads)) {
    stop("diverged: " + place(*fiber_now) + " expects another number of threads in its group");
  }
  meet(&meeting, "a group's barrier", has_effect("group barrier", caller));
}

void wait_for_warp() {
  const void* caller = __builtin_return_address(0);
  meet(&fiber_now->warp->meeting, "__syncwarp", has_effect("warp barrier", caller));
}

void wait_for_grid() {
  if (!grid_now->cooperative) stop("a grid barrier in a launch that is not cooperative");
  if (fiber_now->grid_barriers++ == grid_now->schedule.skipped_grid_barrier) return;
  meet(&grid_now->meeting, "the grid barrier");
}

void nap() {
  order_nap();
  // Each nap lets other threads run to their next wait, so after this many in a row none makes
  // progress.
  if (++grid_now->naps > 1000 + 100 * grid_now->fibers.size()) {
    std::string text =
        "no progress: " + place(*fiber_now) + " and others only sleep and look again; ";
    text += whereabouts();
    stop(std::move(text));
  }
  make_ready(fiber_now);
  run_next(true);
}

void step_back() {
  if (grid_now->schedule.seed == 0) return;
  make_ready(fiber_now);
  run_next();
}

void note_progress() { grid_now->naps = 0; }

uint64_t schedule_seed() { return grid_now->schedule.seed; }

bool in_grid() { return fiber_now != nullptr; }

int thread_in_grid() { return index_of(*fiber_now); }

namespace {

bool within(const void* p, const void* first, size_t bytes) {
  return reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(first) < bytes;
}

}  // namespace

bool on_stack(const void* p) { return within(p, fiber_now->execution.stack, kStackBytes); }

bool in_shared_memory(const void* p) {
  return within(p, fiber_now->block->shared.get(), grid_now->shared_bytes);
}

std::string place_of_thread() { return place(*fiber_now); }

std::string place_of_thread(size_t thread) { return place(grid_now->fibers[thread]); }

int count_copy_wait() { return fiber_now->copy_waits++; }

int skipped_copy_wait() { return grid_now->schedule.skipped_copy_wait; }

const uint32_t (*exchange_six(const uint32_t (&mine)[6]))[6] {
  Warp* warp = fiber_now->warp;
  uint32_t (*words)[6] = warp->words[fiber_now->exchanges++ % 2];
  std::memcpy(words[fiber_now->lane], mine, sizeof(mine));
  meet(&warp->meeting, "a warp exchange", false);
  return words;
}

uint64_t exchange(uint64_t value, int source) {
  Warp* warp = fiber_now->warp;
  uint64_t* slot = warp->slot[fiber_now->exchanges++ % 2];
  slot[fiber_now->lane] = value;
  meet(&warp->meeting, "a warp exchange", false);
  return slot[source];
}

}  // namespace host_cuda
}  // namespace dualhead
