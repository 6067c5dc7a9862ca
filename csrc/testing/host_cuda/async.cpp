// SPDX-License-Identifier: Apache-2.0
#include "async.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cuda_fp16.h"
#include "cuda_runtime.h"
#include "grid.h"
#include "order.h"

namespace dualhead {
namespace host_cuda {
namespace {

constexpr int kBoxBytes = 128;  // per row

struct Phase {
  unsigned count;       // arrivals per phase
  unsigned missing;     // in this phase
  long long bytes = 0;  // announced, not yet arrived; negative if a copy was early
  unsigned parity = 0;  // of the current phase
};

// A copy; or, with bytes = 0, a thread's arrival after its earlier copies.
struct Copy {
  unsigned thread;
  bool bulk;
  void* to;
  const void* from;
  unsigned bytes;
  uint64_t* barrier;
  TensorMap map = {};  // for a box; it starts at:
  int byte = 0, row = 0, plane = 0;
};

std::map<const uint64_t*, Phase> phases;
std::map<unsigned, std::vector<Copy>> under_way;  // by block
uint64_t copied = 0, boxes = 0;
// For note_store: the time of the last store to each 16-byte piece and of each thread's last fence.
uint64_t stores = 0;
std::unordered_map<uintptr_t, uint64_t> stored;
std::map<std::pair<unsigned, unsigned>, uint64_t> fenced;  // by block and thread

Phase& phase_of(const uint64_t* barrier) {
  const auto found = phases.find(barrier);
  if (found == phases.end()) stop("an mbarrier is used that nobody made");
  return found->second;
}

void settle(Phase& phase) {
  note_progress();
  if (phase.missing > 0 || phase.bytes != 0) return;
  phase.missing = phase.count;
  phase.parity ^= 1u;
}

void arrive(Phase& phase) {
  if (phase.missing == 0) stop("more threads arrive at an mbarrier than it was made for");
  --phase.missing;
  settle(phase);
}

// Writes a box to its destination. Returns how many of its bytes are inside the matrix.
unsigned land_box(const Copy& copy) {
  const TensorMap& map = copy.map;
  unsigned read = 0;
  for (int r = 0; r < map.box_rows; ++r) {
    for (int i = 0; i < kBoxBytes; ++i) {
      const long long byte = copy.byte + i, row = copy.row + r;
      const bool there = byte < map.row_bytes && row < map.rows && copy.plane < map.planes;
      const unsigned char* from = static_cast<const unsigned char*>(map.base) +
                                  copy.plane * map.plane_stride + row * map.row_stride + byte;
      const int swizzled = ((i / 16) ^ (r & 7)) * 16 + i % 16;
      static_cast<unsigned char*>(copy.to)[r * kBoxBytes + swizzled] = there ? *from : 0;
      read += there;
    }
  }
  return read;
}

void land(std::vector<Copy>& copies, size_t i) {
  const Copy copy = copies[i];
  copies.erase(copies.begin() + static_cast<std::ptrdiff_t>(i));
  if (copy.bulk) {
    copied += land_box(copy);
    ++boxes;
  } else if (copy.bytes > 0 && copy.from) {
    std::memcpy(copy.to, copy.from, copy.bytes);
    copied += copy.bytes;
  } else if (copy.bytes > 0) {
    std::memset(copy.to, 0, copy.bytes);
  }
  note_progress();
  if (copy.bulk) {
    Phase& phase = phase_of(copy.barrier);
    phase.bytes -= copy.bytes;
    settle(phase);
  } else if (copy.bytes == 0) {
    arrive(phase_of(copy.barrier));
  }
}

// Completes up to `most` of this block's copies: the most recent first, or drawn from the seed.
void land_some(size_t most) {
  std::vector<Copy>& copies = under_way[blockIdx.x];
  for (; most > 0 && !copies.empty(); --most) {
    size_t i = schedule_seed() == 0 ? copies.size() - 1 : next_random() % copies.size();
    if (copies[i].bytes == 0) {  // an arrival comes after its thread's copies
      const unsigned thread = copies[i].thread;
      i = static_cast<size_t>(
          std::find_if(copies.begin(), copies.end(),
                       [&](const Copy& copy) { return !copy.bulk && copy.thread == thread; }) -
          copies.begin());
    }
    land(copies, i);
  }
}

// With a seed, copies sometimes also arrive early.
void maybe_land() {
  if (schedule_seed() != 0 && next_random() % 16 == 0) land_some(1 + next_random() % 4);
}

void start(const Copy& copy) {
  const auto bits = reinterpret_cast<uintptr_t>(copy.to) | reinterpret_cast<uintptr_t>(copy.from);
  const unsigned unit = copy.bulk ? 1024 : copy.bytes;  // the swizzle's period, or the copy's size
  if (bits % unit != 0) stop("an asynchronous copy is not aligned");
  check_copy(copy.to, nullptr, copy.bytes);
  std::memset(copy.to, 0xFF, copy.bytes);
  under_way[blockIdx.x].push_back(copy);
  maybe_land();
}

void check_fenced(const void* from, unsigned bytes) {
  if (stored.empty()) return;
  const auto fence = fenced.find({blockIdx.x, threadIdx.x});
  const uint64_t seen = fence == fenced.end() ? 0 : fence->second;
  const uintptr_t first = reinterpret_cast<uintptr_t>(from) / 16;
  for (uintptr_t i = first; i < first + bytes / 16; ++i) {
    const auto store = stored.find(i);
    if (store != stored.end() && store->second > seen) {
      stop("a bulk copy reads what the grid has stored, without a proxy fence");
    }
  }
}

float brain_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

}  // namespace

uint64_t bytes_copied() { return copied; }
uint64_t boxes_copied() { return boxes; }

void forget_copies() {
  copied = boxes = 0;
  phases.clear();
  under_way.clear();
  stores = 0;
  stored.clear();
  fenced.clear();
}

void mbarrier_init(uint64_t* barrier, unsigned count) {
  Phase phase;
  phase.count = phase.missing = count;
  phases[barrier] = phase;
}

void mbarrier_arrive(uint64_t* barrier) {
  step_back();
  order_arrival(barrier);
  arrive(phase_of(barrier));
}

void mbarrier_expect(uint64_t* barrier, unsigned bytes) {
  step_back();
  order_arrival(barrier);
  Phase& phase = phase_of(barrier);
  phase.bytes += bytes;
  arrive(phase);
}

void mbarrier_wait(uint64_t* barrier, unsigned parity) {
  if (count_copy_wait() == skipped_copy_wait()) return;
  maybe_land();
  while (phase_of(barrier).parity == parity) {
    land_some(1);  // no more than needed, so that a missing wait is noticed
    if (phase_of(barrier).parity == parity) nap();
  }
  order_wait(barrier);
}

void note_store(const void* to) { stored[reinterpret_cast<uintptr_t>(to) / 16] = ++stores; }

void proxy_fence() {
  if (!has_effect("proxy fence", __builtin_return_address(0))) return;
  fenced[{blockIdx.x, threadIdx.x}] = stores;
}

bool encode_map(const void* base, long long row_bytes, long long rows, long long row_stride,
                long long planes, long long plane_stride, int box_rows, TensorMap* map) {
  const auto bits = static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(base)) |
                    static_cast<unsigned long long>(row_stride | plane_stride);
  if (bits % 16 != 0 || row_bytes < 1 || rows < 1 || planes < 1) return false;
  if (row_stride < row_bytes || plane_stride >= 1ll << 40 || box_rows < 1 || box_rows > 256) {
    return false;
  }
  *map = {base, row_bytes, rows, row_stride, planes, plane_stride, box_rows};
  return true;
}

void copy_box(void* to, const TensorMap& map, int byte, int row, int plane, uint64_t* barrier) {
  if (map.box_rows == 0) stop("a copy by a map that nobody made");
  if (byte < 0 || row < 0 || plane < 0) stop("a box starts before its matrix");
  const Device& here = device();
  if ((here.compiled_major ? here.compiled_major : here.compute_major) < 9) {
    stop("a bulk copy in code for a device without them: nvcc's kernel would be empty");
  }
  for (int r = 0; r < map.box_rows && row + r < map.rows && plane < map.planes; ++r) {
    const long long left = map.row_bytes - byte;
    if (left <= 0) break;
    const unsigned char* from = static_cast<const unsigned char*>(map.base) +
                                plane * map.plane_stride + (row + r) * map.row_stride + byte;
    const auto bytes = static_cast<unsigned>(left < kBoxBytes ? left : kBoxBytes);
    check_copy(nullptr, from, bytes);
    check_fenced(from, bytes);
  }
  Copy copy{threadIdx.x, true, to, nullptr, 0, barrier, map, byte, row, plane};
  copy.bytes = static_cast<unsigned>(kBoxBytes * map.box_rows);
  start(copy);
}

void async_copy(void* to, const void* from, unsigned bytes) {
  check_copy(nullptr, from, bytes);
  start({threadIdx.x, false, to, from, bytes, nullptr});
}

void async_copies_arrive(uint64_t* barrier) {
  order_arrival(barrier);
  under_way[blockIdx.x].push_back({threadIdx.x, false, nullptr, nullptr, 0, barrier});
  maybe_land();
}

void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool brain) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const auto words = exchange_six(mine);
  const auto number = [brain](uint32_t word, int half) {
    const uint16_t bits = static_cast<uint16_t>(word >> (16 * half));
    return brain ? brain_float(bits) : __half2float(__half{bits});
  };
  const unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  double sum[4] = {c[0], c[1], c[2], c[3]};
  for (unsigned lane = 0; lane < 4; ++lane) {
    for (int part = 0; part < 2; ++part) {  // inputs 2 lane ..., then 2 lane + 8 ...
      for (int half = 0; half < 2; ++half) {
        const double low = number(words[4 * g + lane][2 * part], half);
        const double high = number(words[4 * g + lane][2 * part + 1], half);
        for (unsigned column = 0; column < 2; ++column) {
          const double b = number(words[4 * (2 * t + column) + lane][4 + part], half);
          sum[column] += low * b;
          sum[2 + column] += high * b;
        }
      }
    }
  }
  for (int i = 0; i < 4; ++i) c[i] = static_cast<float>(sum[i]);
}

uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const auto half = [shift](uint32_t word) {
      return __half2float(__half{static_cast<uint16_t>(word >> shift)});
    };
    // The product of two float16 values is exact in fp32, and so is its sum with a third up to 24
    // bits.
    const __half sum = __float2half_rn(fmaf(half(a), half(b), half(c)));
    result |= static_cast<uint32_t>(sum.bits) << shift;
  }
  return result;
}

}  // namespace host_cuda
}  // namespace dualhead
