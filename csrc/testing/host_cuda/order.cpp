// SPDX-License-Identifier: Apache-2.0
#include "order.h"

#include <algorithm>
#include <string>
#include <unordered_map>

#include "async.h"
#include "cuda_runtime.h"
#include "grid.h"

namespace dualhead {
namespace host_cuda {
namespace {

constexpr int kWarp = 32;

using Clocks = std::vector<uint32_t>;  // one per thread

void learn(Clocks& known, const Clocks& more) {
  for (size_t i = 0; i < more.size(); ++i) known[i] = std::max(known[i], more[i]);
}

struct ThreadOrder {
  Clocks known;     // empty if accesses are not checked
  Clocks attached;  // to the counters that it has seen by peek() and not yet fenced for
  bool saw_signal = false;
  bool fenced = false;  // since the warp last met
};

// The last write to each byte of a page of memory.
struct Write {
  uint32_t clock = 0;  // 0: none
  int thread = 0;
};
constexpr uintptr_t kPage = 4096;
using Page = std::vector<Write>;
constexpr uintptr_t kWord = 4;    // bytes
constexpr uintptr_t kPiece = 16;  // of the smallest copy

bool checks = false;
std::vector<ThreadOrder> threads;
std::vector<std::map<const unsigned*, int>> looked_at;  // by warp since it last met: thread
std::map<const unsigned*, Clocks> signalled, raised;
std::map<const uint64_t*, Clocks> barriers;
std::unordered_map<uintptr_t, Page> pages;
// Of each word of shared memory since it was last written: the clocks of its reads, by thread.
std::unordered_map<uintptr_t, std::unordered_map<int, uint32_t>> readers;
std::map<uintptr_t, Ordering> executed;

Clocks none() { return Clocks(checks ? threads.size() : 0, 0); }

ThreadOrder& own() { return threads[static_cast<size_t>(thread_in_grid())]; }

uint32_t& own_clock() { return own().known[static_cast<size_t>(thread_in_grid())]; }

void release_to(Clocks& known) {
  if (!checks) return;
  if (known.empty()) known = none();
  learn(known, own().known);
  ++own_clock();
}

void acquire_from(const Clocks& known) { learn(own().known, known); }

[[noreturn]] void stop_unordered(const char* does, size_t writer) {
  stop(place_of_thread() + " " + does + " what " + place_of_thread(writer) +
       " wrote, without an order between them");
}

// Stops if another thread's write to one of these bytes is not known to have happened.
void check_known(const void* p, size_t bytes, const char* does) {
  if (!checks) return;
  const Clocks& known = own().known;
  const auto first = reinterpret_cast<uintptr_t>(p);
  for (uintptr_t at = first; at < first + bytes;) {
    const uintptr_t end = std::min(first + bytes, (at / kPage + 1) * kPage);
    const auto page = pages.find(at / kPage);
    for (; page != pages.end() && at < end; ++at) {
      const Write& last = page->second[at % kPage];
      const auto writer = static_cast<size_t>(last.thread);
      if (last.clock > known[writer]) stop_unordered(does, writer);
    }
    at = end;
  }
}

void note_read(const void* p, size_t bytes) {
  const auto first = reinterpret_cast<uintptr_t>(p);
  for (uintptr_t at = first / kWord; at <= (first + bytes - 1) / kWord; ++at) {
    readers[at][thread_in_grid()] = own_clock();
  }
}

// Stops if another thread's read of one of these words of shared memory is not known to have
// happened.
void check_unread(const void* p, size_t bytes) {
  const Clocks& known = own().known;
  const auto first = reinterpret_cast<uintptr_t>(p);
  for (uintptr_t at = first / kWord; at <= (first + bytes - 1) / kWord; ++at) {
    const auto word = readers.find(at);
    if (word == readers.end()) continue;
    for (const auto& [reader, clock] : word->second) {
      if (clock > known[static_cast<size_t>(reader)]) {
        stop(place_of_thread() + " overwrites what " +
             place_of_thread(static_cast<size_t>(reader)) +
             " reads, without an order between them");
      }
    }
    word->second.clear();
  }
}

void note_write(const void* p, size_t bytes) {
  const auto first = reinterpret_cast<uintptr_t>(p);
  for (uintptr_t at = first; at < first + bytes; ++at) {
    Page& page = pages[at / kPage];
    if (page.empty()) page.resize(kPage);
    page[at % kPage] = Write{own_clock(), thread_in_grid()};
  }
}

void forget_looks(size_t warp) {
  looked_at[warp].clear();
  for (size_t lane = 0; lane < kWarp; ++lane) threads[warp * kWarp + lane].fenced = false;
}

}  // namespace

void check_accesses() { checks = true; }

const std::map<uintptr_t, Ordering>& orderings() { return executed; }

bool has_effect(const char* what, const void* place) {
  const auto address = reinterpret_cast<uintptr_t>(place);
  executed.try_emplace(address, Ordering{what, static_cast<int>(threadIdx.x) / kWarp});
  return device().missing != address;
}

void forget_order(int count) {
  threads.assign(static_cast<size_t>(count), ThreadOrder{});
  looked_at.assign(threads.size() / kWarp, {});
  for (size_t i = 0; i < threads.size() && checks; ++i) {
    threads[i].known = none();
    threads[i].known[i] = 1;
  }
  signalled.clear(), raised.clear();
  barriers.clear();
  pages.clear(), readers.clear();
  executed.clear();
}

void order_meeting(std::vector<int> met) {
  for (const int thread : met) {
    if (thread % kWarp == 0) forget_looks(static_cast<size_t>(thread) / kWarp);
  }
  if (!checks) return;
  Clocks all = none();
  for (const int thread : met) learn(all, threads[static_cast<size_t>(thread)].known);
  for (const int thread : met) {
    const auto i = static_cast<size_t>(thread);
    threads[i].known = all;
    ++threads[i].known[i];
  }
}

void order_exchange() { forget_looks(static_cast<size_t>(thread_in_grid()) / kWarp); }

void order_arrival(const uint64_t* barrier) { release_to(barriers[barrier]); }

void order_wait(const uint64_t* barrier) {
  const auto found = barriers.find(barrier);
  if (found != barriers.end()) acquire_from(found->second);
}

void order_nap() {
  if (own().fenced) {
    stop(place_of_thread() + " fences in a polling loop; one fence after it is enough");
  }
}

void raise(unsigned* counter, unsigned amount) {
  step_back();
  check_known(counter, sizeof(*counter), "raises");
  if (checks) {
    Clocks& when = raised[counter];
    if (when.empty()) when = none();
    when[static_cast<size_t>(thread_in_grid())] = own_clock();
  }
  *counter += amount;
}

void signal(unsigned* counter, unsigned amount) {
  const bool releases = has_effect("signal", __builtin_return_address(0));
  step_back();
  check_known(counter, sizeof(*counter), "raises");
  if (releases) release_to(signalled[counter]);
  *counter += amount;
}

unsigned peek(const unsigned* counter) {
  const int thread = thread_in_grid();
  check_known(counter, sizeof(*counter), "looks at");
  const auto raises = raised.find(counter);
  for (size_t i = 0; raises != raised.end() && i < raises->second.size(); ++i) {
    if (raises->second[i] > own().known[i]) stop_unordered("looks at", i);
  }
  const auto [looked, first] =
      looked_at[static_cast<size_t>(thread) / kWarp].emplace(counter, thread);
  if (!first && looked->second != thread) {
    stop(place_of_thread() + " looks at a counter that another lane of its warp looks at");
  }
  const auto found = signalled.find(counter);
  if (found != signalled.end()) {
    if (own().attached.empty()) own().attached = none();
    learn(own().attached, found->second);
  }
  own().saw_signal |= *counter > 0;
  return *counter;
}

void acquire_fence() {
  if (!own().saw_signal) {
    stop(place_of_thread() + " fences before it has seen a signal, as in a polling loop");
  }
  if (has_effect("acquire fence", __builtin_return_address(0))) acquire_from(own().attached);
  own().attached.clear();
  own().saw_signal = false;
  own().fenced = true;
}

void check_copy(const void* to, const void* from, size_t bytes) {
  if (!checks) return;
  if (from) check_known(from, bytes, "copies");
  if (to) check_unread(to, bytes);
}

void note_access(const void* p, size_t bytes, bool writes) {
  if (!checks || !in_grid() || on_stack(p)) return;
  check_known(p, bytes, writes ? "overwrites" : "reads");
  const bool shared = in_shared_memory(p);
  if (!writes) {
    if (shared) note_read(p, bytes);
    return;
  }
  if (shared) check_unread(p, bytes);
  note_write(p, bytes);
  const auto first = reinterpret_cast<uintptr_t>(p);
  for (uintptr_t at = first; at < first + bytes; at = at / kPiece * kPiece + kPiece) {
    note_store(reinterpret_cast<const void*>(at));
  }
}

}  // namespace host_cuda
}  // namespace dualhead
