// SPDX-License-Identifier: Apache-2.0
// Launches from several threads, bulk copies without the fence that they need, wrong ways to wait
// for a counter, and accesses without an order, on the host backend.
#include "kernels/cuda/launch.cuh"

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "cuda_runtime.h"  // the host backend's
#include "kernels/cuda/primitives.cuh"

using namespace dualhead;

namespace {

void count_threads(std::atomic<int>* threads) { ++*threads; }

// Runs one warp: lane 1 stores to `global`, then lane 0 copies it in bulk. Returns the error's
// text.
std::string error_of_copy(bool fenced, bool stored_later) {
  alignas(16) static unsigned char global[128];
  cuda::TensorMap map;
  CHECK(host_cuda::encode_map(global, 128, 1, 128, 1, 128, 1, &map));
  try {
    host_cuda::run_grid({1, 1, 1}, {32, 1, 1}, 2048, false, {1, -1, -1, -1}, [&] {
      cuda::Barrier* barrier = reinterpret_cast<cuda::Barrier*>(cuda::shared_memory());
      if (threadIdx.x == 0) cuda::mbarrier_init(barrier, 1);
      if (threadIdx.x == 1) cuda::store_words(global + 16, cuda::Words{});
      cuda::block_barrier();
      if (threadIdx.x == 0 && fenced) cuda::proxy_fence();
      cuda::block_barrier();
      if (threadIdx.x == 1 && stored_later) cuda::store_words(global + 16, cuda::Words{});
      cuda::block_barrier();
      if (threadIdx.x == 0) {
        cuda::mbarrier_expect(barrier, 128);
        cuda::copy_box(cuda::shared_memory() + 1024, &map, 0, 0, 0, barrier, 0);
      }
      cuda::mbarrier_wait(barrier, 0);
    });
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

// Runs two warps. Warp 1 signals twice, the second time once warp 0 has looked; warp 0 runs
// `wait`(counter, seen), and sets `seen` when it has looked. Returns the error's text.
template <typename Wait>
std::string error_of_wait(Wait wait) {
  unsigned counter = 0;
  bool seen = false;
  try {
    host_cuda::run_grid({1, 1, 1}, {64, 1, 1}, 1024, false, {1, -1, -1, -1}, [&] {
      if (threadIdx.x < 32) return wait(&counter, &seen);
      if (threadIdx.x > 32) return;
      cuda::signal(&counter, 1);
      while (!seen) __nanosleep(32);
      cuda::signal(&counter, 1);
    });
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

// Runs one warp: lane 0 writes to global memory, all lanes call `between`, and lane 1 reads.
// Returns the error's text.
template <typename Between>
std::string error_of_read(Between between) {
  static int written = 0;
  try {
    host_cuda::run_grid({1, 1, 1}, {32, 1, 1}, 1024, false, {0, -1, -1, -1}, [&] {
      if (threadIdx.x == 0) host_cuda::note_access(&written, sizeof(written), true);
      between();
      if (threadIdx.x == 1) host_cuda::note_access(&written, sizeof(written), false);
    });
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

bool contains(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

}  // namespace

TEST(one_lane_polls_and_fences_once) {
  const auto right = [](unsigned* counter, bool* seen) {
    cuda::wait_for(counter, 1);
    *seen = true;
    cuda::warp_barrier();
    cuda::wait_for(counter, 2);
    cuda::warp_barrier();
    CHECK(cuda::has_reached(counter, 2));
  };
  CHECK_EQUAL(error_of_wait(right), std::string());
  const auto all_lanes = [](unsigned* counter, bool* seen) {
    while (cuda::peek(counter) < 2) *seen = true, __nanosleep(32);
    cuda::acquire_fence();
  };
  CHECK(contains(error_of_wait(all_lanes), "another lane of its warp looks at"));
  const auto fence_each_time = [](unsigned* counter, bool* seen) {
    if (threadIdx.x != 0) return;
    for (;;) {
      const unsigned value = cuda::peek(counter);
      if (value > 0) *seen = true, cuda::acquire_fence();
      if (value == 2) return;
      __nanosleep(32);
    }
  };
  CHECK(contains(error_of_wait(fence_each_time), "fences in a polling loop"));
  const auto fence_too_early = [](unsigned* counter, bool* seen) {
    if (threadIdx.x != 0) return;
    *seen = true;
    counter[0] = 0;
    (void)cuda::peek(counter);
    cuda::acquire_fence();
  };
  CHECK(contains(error_of_wait(fence_too_early), "before it has seen a signal"));
}

TEST(threads_that_launch_different_plans_do_not_refuse_each_other) {
  const int shared_bytes[] = {60 * 1024, 220 * 1024};
  std::atomic<int> errors{0}, ran{0};
  constexpr int kLaunches = 500;
  std::vector<std::thread> threads;
  for (const int bytes : shared_bytes) {
    threads.emplace_back([&, bytes] {
      for (int i = 0; i < kLaunches; ++i) {
        errors += cuda::launch_cooperative(count_threads, 0, nullptr, 1, 1, cuda::kWarp, bytes,
                                           &ran) != cudaSuccess;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK_EQUAL(errors.load(), 0);
  CHECK_EQUAL(ran.load(), 2 * kLaunches * cuda::kWarp);
  const auto kernel = reinterpret_cast<const void*>(count_threads);
  CHECK_EQUAL(host_cuda::times_limit_was_set(kernel), 1);
}

TEST(more_shared_memory_than_there_is_is_refused) {
  std::atomic<int> ran{0};
  CHECK_EQUAL(static_cast<int>(cuda::launch_cooperative(count_threads, 0, nullptr, 1, 1,
                                                        cuda::kWarp, 228 * 1024, &ran)),
              static_cast<int>(cudaErrorInvalidConfiguration));
  CHECK_EQUAL(ran.load(), 0);
}

TEST(a_bulk_copy_of_what_the_grid_stored_needs_a_fence) {
  CHECK_EQUAL(error_of_copy(true, false), std::string());
  for (const bool fenced : {false, true}) {
    const std::string error = error_of_copy(fenced, fenced);  // no fence, or a store after it
    CHECK(error.find("without a proxy fence") != std::string::npos);
  }
}

TEST(an_exchange_within_a_warp_orders_no_memory) {
  host_cuda::check_accesses();
  CHECK_EQUAL(error_of_read([] { cuda::warp_barrier(); }), std::string());
  const std::string error = error_of_read([] { (void)cuda::exchange_from(1, 0); });
  CHECK(contains(error, "block 0 thread 1 reads what block 0 thread 0 wrote, without an order"));
}

TEST(a_counter_orders_only_for_who_fences) {
  host_cuda::check_accesses();
  unsigned counter = 0;
  const auto signalled = [&](bool fences) {
    counter = 0;
    return error_of_read([&, fences] {
      if (threadIdx.x == 0) cuda::signal(&counter, 1);
      if (threadIdx.x != 1) return;
      while (cuda::peek(&counter) == 0) __nanosleep(32);
      if (fences) cuda::acquire_fence();
    });
  };
  CHECK_EQUAL(signalled(true), std::string());
  CHECK(contains(signalled(false), "without an order"));
}

TEST(a_raise_is_ordered_by_the_signal_that_follows) {
  host_cuda::check_accesses();
  unsigned counter[2];
  const auto error_of = [&](bool raises_late) {
    counter[0] = counter[1] = 0;
    return error_of_read([&, raises_late] {
      if (threadIdx.x == 0 && !raises_late) cuda::raise(counter, 1);
      if (threadIdx.x == 0) cuda::signal(counter + 1, 1);
      if (threadIdx.x == 0 && raises_late) cuda::raise(counter, 1);
      if (threadIdx.x != 1) return;
      while (cuda::peek(counter + 1) == 0) __nanosleep(32);
      cuda::acquire_fence();
      (void)cuda::peek(counter);
    });
  };
  CHECK_EQUAL(error_of(false), std::string());
  CHECK(contains(error_of(true), "looks at what block 0 thread 0 wrote, without an order"));
}
