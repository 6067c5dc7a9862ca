// SPDX-License-Identifier: Apache-2.0
#include "order.h"

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>

#include "async.h"
#include "cuda_runtime.h"
#include "grid.h"

namespace dualhead {
namespace host_cuda {
namespace {

using Clocks = std::vector<uint32_t>;  // one per warp

void learn(Clocks& known, const Clocks& more) {
  for (size_t i = 0; i < more.size(); ++i) known[i] = std::max(known[i], more[i]);
}

// What a lane has seen by peek() and not yet fenced for.
struct Look {
  Clocks attached;
  bool saw_signal = false;
};

struct WarpOrder {
  Clocks known;
  std::map<int, Look> looks;                 // by lane
  std::map<const unsigned*, int> looked_at;  // counter: lane, since the warp last met
  std::map<int, bool> fenced;                // lane: has fenced since the warp last met
};

// The last write to each byte of a page of global memory.
struct Write {
  uint32_t clock = 0;  // 0: none
  int warp = 0;
};
constexpr uintptr_t kPage = 4096;
using Page = std::vector<Write>;

std::vector<WarpOrder> warps;
std::map<const unsigned*, Clocks> counters;
std::map<const uint64_t*, Clocks> barriers;
std::unordered_map<uintptr_t, Page> pages;

Clocks none() { return Clocks(warps.size(), 0); }

WarpOrder& own() { return warps[static_cast<size_t>(warp_of_thread())]; }

void release_to(Clocks& known) {
  const auto w = static_cast<size_t>(warp_of_thread());
  if (known.empty()) known = none();
  learn(known, warps[w].known);
  ++warps[w].known[w];
}

// Stops if another warp's write to one of these bytes is not known to have happened.
void check_known(const void* p, size_t bytes, const char* does) {
  const Clocks& known = own().known;
  const auto first = reinterpret_cast<uintptr_t>(p);
  for (uintptr_t at = first; at < first + bytes; ++at) {
    const auto page = pages.find(at / kPage);
    if (page == pages.end()) continue;
    const Write& last = page->second[at % kPage];
    if (last.clock <= known[static_cast<size_t>(last.warp)]) continue;
    stop(place_of_thread() + " " + does + " what warp " + std::to_string(last.warp) +
         " wrote, without an order between them");
  }
}

void note_write(const void* p, size_t bytes) {
  const int w = warp_of_thread();
  const auto first = reinterpret_cast<uintptr_t>(p);
  for (uintptr_t at = first; at < first + bytes; ++at) {
    Page& page = pages[at / kPage];
    if (page.empty()) page.resize(kPage);
    page[at % kPage] = Write{own().known[static_cast<size_t>(w)], w};
  }
}

}  // namespace

void forget_order(int count) {
  warps.assign(static_cast<size_t>(count), WarpOrder{});
  for (size_t w = 0; w < warps.size(); ++w) {
    warps[w].known = none();
    warps[w].known[w] = 1;
  }
  counters.clear();
  barriers.clear();
  pages.clear();
}

void order_meeting(std::vector<int> met) {
  std::sort(met.begin(), met.end());
  met.erase(std::unique(met.begin(), met.end()), met.end());
  Clocks all = none();
  if (met.size() > 1) {
    for (const int w : met) learn(all, warps[static_cast<size_t>(w)].known);
  }
  for (const int w : met) {
    WarpOrder& warp = warps[static_cast<size_t>(w)];
    warp.looked_at.clear();
    warp.fenced.clear();
    if (met.size() == 1) continue;
    warp.known = all;
    ++warp.known[static_cast<size_t>(w)];
  }
}

void order_arrival(const uint64_t* barrier) { release_to(barriers[barrier]); }

void order_wait(const uint64_t* barrier) {
  const auto found = barriers.find(barrier);
  if (found != barriers.end()) learn(own().known, found->second);
}

void order_nap() {
  if (own().fenced[lane_of_thread()]) {
    stop(place_of_thread() + " fences in a polling loop; one fence after it is enough");
  }
}

void raise(unsigned* counter, unsigned amount) {
  step_back();
  note_write(counter, sizeof(*counter));
  *counter += amount;
}

void signal(unsigned* counter, unsigned amount) {
  step_back();
  if (device().releases) release_to(counters[counter]);
  *counter += amount;
}

unsigned peek(const unsigned* counter) {
  const int lane = lane_of_thread();
  check_known(counter, sizeof(*counter), "looks at");
  const auto [looked, first] = own().looked_at.emplace(counter, lane);
  if (!first && looked->second != lane) {
    stop(place_of_thread() + " looks at a counter that another lane of its warp looks at");
  }
  Look& look = own().looks[lane];
  if (look.attached.empty()) look.attached = none();
  const auto found = counters.find(counter);
  if (found != counters.end()) learn(look.attached, found->second);
  look.saw_signal |= *counter > 0;
  return *counter;
}

void acquire_fence() {
  Look& look = own().looks[lane_of_thread()];
  if (!look.saw_signal) {
    stop(place_of_thread() + " fences before it has seen a signal, as in a polling loop");
  }
  if (device().acquires) learn(own().known, look.attached);
  look = Look{};
  own().fenced[lane_of_thread()] = true;
}

void note_access(const void* p, size_t bytes, bool writes) {
  if (!in_grid() || is_private(p)) return;
  check_known(p, bytes, writes ? "overwrites" : "reads");
  if (!writes) return;
  note_write(p, bytes);
  const auto first = reinterpret_cast<uintptr_t>(p);
  for (uintptr_t at = first; at < first + bytes; at = at / 16 * 16 + 16) {
    note_store(reinterpret_cast<const void*>(at));
  }
}

}  // namespace host_cuda
}  // namespace dualhead
