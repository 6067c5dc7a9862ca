// SPDX-License-Identifier: Apache-2.0
// The host backend's asynchronous copies, mbarriers and tensor cores: copies arrive late, and code
// that does not wait is reported.
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "cuda_runtime.h"  // the host backend's
#include "kernels/cuda/fragments.cuh"
#include "kernels/weight_format.h"

using namespace dualhead;
using host_cuda::Schedule;

namespace {

constexpr int kCopied = 128;  // bytes: a row of a box

// Runs one warp whose lane 0 copies from `source` to shared memory, counted by an mbarrier. Returns
// a byte of the destination before and after the wait.
struct Seen {
  uint8_t before, after;
};

Seen copy_once(const std::vector<uint8_t>& source, bool bulk, uint64_t seed) {
  Seen seen{};
  cuda::TensorMap map;
  CHECK(host_cuda::encode_map(source.data(), kCopied, 1, kCopied, 1, kCopied, 1, &map));
  host_cuda::run_grid({1, 1, 1}, {32, 1, 1}, 2048, false, {seed, -1, -1, -1}, [&] {
    cuda::Barrier* barrier = reinterpret_cast<cuda::Barrier*>(cuda::shared_memory());
    unsigned char* to = cuda::shared_memory() + 1024;
    if (threadIdx.x == 0) cuda::mbarrier_init(barrier, 1);
    cuda::block_barrier();
    if (threadIdx.x == 0) {
      if (bulk) {
        cuda::mbarrier_expect(barrier, kCopied);
        cuda::copy_box(to, &map, 0, 0, 0, barrier, 0);
      } else {
        for (int i = 0; i < kCopied; i += 16) {
          cuda::async_copy_16(to + i, source.data() + i, true, 0);
        }
        cuda::async_copies_arrive(barrier);
      }
      seen.before = to[5];
    }
    cuda::mbarrier_wait(barrier, 0);
    if (threadIdx.x == 0) seen.after = to[5];
  });
  return seen;
}

std::string error_of(Schedule schedule, const std::function<void()>& body) {
  try {
    host_cuda::run_grid({1, 1, 1}, {32, 1, 1}, 2048, false, schedule, body);
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

bool mentions(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

}  // namespace

TEST(a_copy_lands_when_it_is_waited_for) {
  std::vector<uint8_t> source(kCopied, 7);
  for (bool bulk : {false, true}) {
    const Seen lazy = copy_once(source, bulk, 0);
    CHECK_EQUAL(int{lazy.before}, 255);
    int early = 0;
    for (uint64_t seed = 1; seed <= 40; ++seed) {
      const Seen seen = copy_once(source, bulk, seed);
      CHECK(seen.before == 255 || seen.before == 7);
      CHECK_EQUAL(int{seen.after}, 7);
      early += seen.before == 7;
    }
    CHECK(early > 0 && early < 40);  // and sometimes before
  }
}

TEST(misuse_is_named) {
  const auto barrier = [] { return reinterpret_cast<cuda::Barrier*>(cuda::shared_memory()); };
  alignas(16) static unsigned char source[kCopied];
  cuda::TensorMap map;
  CHECK(host_cuda::encode_map(source, kCopied, 1, kCopied, 1, kCopied, 1, &map));
  CHECK(!host_cuda::encode_map(source + 8, kCopied, 1, kCopied, 1, kCopied, 1, &map));
  CHECK(mentions(error_of({}, [&] { cuda::mbarrier_wait(barrier(), 0); }), "nobody made"));
  CHECK(mentions(error_of({},
                          [&] {
                            if (threadIdx.x == 0) cuda::mbarrier_init(barrier(), 1);
                            cuda::block_barrier();
                            cuda::mbarrier_wait(barrier(), 0);
                          }),
                 "no progress"));
  CHECK(mentions(
      error_of({},
               [&] { cuda::copy_box(cuda::shared_memory() + 16, &map, 0, 0, 0, barrier(), 0); }),
      "not aligned"));
  // The wrong phase: the first has ended, the second has not.
  CHECK(mentions(error_of({},
                          [&] {
                            if (threadIdx.x == 0) cuda::mbarrier_init(barrier(), 32);
                            cuda::block_barrier();
                            cuda::mbarrier_arrive(barrier());
                            cuda::mbarrier_wait(barrier(), 0);
                            cuda::mbarrier_wait(barrier(), 1);
                          }),
                 "no progress"));
}

TEST(a_tile_is_the_product_of_two_matrices) {
  for (bool brain : {false, true}) {
    float a[16][16], b[16][8], got[16][8];
    const auto number = [](int i) { return static_cast<float>(i % 17 - 8) / 4; };
    const auto bits = [brain](float x) -> uint32_t {
      return brain ? cuda::from_float<BFloat16>(x).bits : cuda::from_float<cuda::Float16>(x).bits;
    };
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 16; ++j) a[i][j] = number(3 * i + 7 * j + 1);
      for (int j = 0; j < 8; ++j) b[i][j] = number(5 * i + 11 * j + 2);
    }
    host_cuda::run_grid({1, 1, 1}, {32, 1, 1}, 16, false, {1, -1, -1, -1}, [&] {
      const int g = cuda::lane_index() / 4, t = cuda::lane_index() % 4;
      const auto pair_a = [&](int row, int k) {
        return bits(a[row][k]) | bits(a[row][k + 1]) << 16;
      };
      const auto pair_b = [&](int k) { return bits(b[k][g]) | bits(b[k + 1][g]) << 16; };
      const uint32_t tile[4] = {pair_a(g, 2 * t), pair_a(g + 8, 2 * t), pair_a(g, 2 * t + 8),
                                pair_a(g + 8, 2 * t + 8)};
      float c[4] = {1, 2, 3, 4};
      if (brain) {
        cuda::mma_m16n8k16<true>(c, tile, pair_b(2 * t), pair_b(2 * t + 8));
      } else {
        cuda::mma_m16n8k16<false>(c, tile, pair_b(2 * t), pair_b(2 * t + 8));
      }
      for (int i = 0; i < 4; ++i) got[g + i / 2 * 8][2 * t + i % 2] = c[i];
    });
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 8; ++j) {
        double sum = 1 + j % 2 + i / 8 * 2;
        for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[i][k]) * b[k][j];
        CHECK_EQUAL(got[i][j], static_cast<float>(sum));
      }
    }
  }
}

// The rows of a box arrive 128 bytes apart, each with its 16-byte pieces permuted by swizzled();
// bytes outside of the matrix are zeros. Here rows 5 to 12 of 10, from byte 128 on, of 160 bytes
// each.
TEST(a_box_is_swizzled_and_ends_in_zeros) {
  constexpr int kRow = 160, kRows = 10, kPlanes = 2;
  alignas(16) static unsigned char source[kPlanes][kRows][kRow];
  for (int i = 0; i < kPlanes * kRows * kRow; ++i) {
    (&source[0][0][0])[i] = static_cast<unsigned char>(1 + i % 251);
  }
  cuda::TensorMap map;
  CHECK(host_cuda::encode_map(source, kRow, kRows, kRow, kPlanes, kRows * kRow, 8, &map));
  std::vector<unsigned char> seen(1024);
  host_cuda::run_grid({1, 1, 1}, {32, 1, 1}, 2048, false, {}, [&] {
    cuda::Barrier* barrier = reinterpret_cast<cuda::Barrier*>(cuda::shared_memory());
    if (threadIdx.x == 0) {
      cuda::mbarrier_init(barrier, 1);
      cuda::mbarrier_expect(barrier, 1024);
      cuda::copy_box(cuda::shared_memory() + 1024, &map, 128, 5, 1, barrier, 0);
      cuda::mbarrier_wait(barrier, 0);
      std::memcpy(seen.data(), cuda::shared_memory() + 1024, 1024);
    }
  });
  for (int r = 0; r < 8; ++r) {
    for (int i = 0; i < 128; ++i) {
      const bool there = 5 + r < kRows && 128 + i < kRow;
      const int expected = there ? source[1][5 + r][128 + i] : 0;
      CHECK_EQUAL(int{seen[cuda::swizzled(r, i / 16) + i % 16]}, expected);
    }
  }
}

// The eight lanes that read shared memory together use all 32 banks, in both runs of a block.
TEST(lanes_that_read_together_meet_different_banks) {
  for (int phase = 0; phase < 4; ++phase) {
    std::vector<int> seen(8);
    for (int lane = 8 * phase; lane < 8 * phase + 8; ++lane) {
      ++seen[cuda::swizzled(cuda::row_of_place(lane / 4), lane % 4) / 16 % 8];
    }
    for (int count : seen) CHECK_EQUAL(count, 1);
  }
}

// Every byte is unpacked to its value, at every position of a step.
template <cuda::Format kFormat>
void check_unpack(float (*number)(int byte, int half)) {
  constexpr int kBytes = 16 / cuda::steps_of(kFormat);
  unsigned char stored[16];
  for (int first = 0; first < 256; ++first) {
    for (int i = 0; i < 16; ++i) stored[i] = static_cast<unsigned char>(first + 37 * i);
    cuda::Words words;
    std::memcpy(words.x, stored, sizeof(words.x));
    for (int step = 0; step < cuda::steps_of(kFormat); ++step) {
      uint32_t pairs[4];
      cuda::unpack<kFormat>(words, step, pairs);
      for (int i = 0; i < 8; ++i) {
        const uint16_t half = static_cast<uint16_t>(pairs[i / 2] >> 16 * (i % 2));
        const int input = cuda::input_of(kFormat, i);  // of lane 0, step 0
        const float expected = number(stored[input % 64 + step * kBytes], input / 64);
        if (expected != expected) continue;  // fp8's NaN, which quantised rows do not contain
        CHECK_EQUAL(cuda::to_float(cuda::Float16{half}) * cuda::unpacked_unit<kFormat>(), expected);
      }
    }
  }
}

TEST(every_stored_byte_unpacks_to_its_number) {
  check_unpack<cuda::Format::kInt8>(
      [](int byte, int) { return static_cast<float>(static_cast<int8_t>(byte)); });
  check_unpack<cuda::Format::kFp8>([](int byte, int) {
    return (byte & 127) == 127 ? NAN : to_float(Fp8{static_cast<uint8_t>(byte)});
  });
  check_unpack<cuda::Format::kInt4>(
      [](int byte, int half) { return static_cast<float>((half ? byte >> 4 : byte & 15) - 8); });
}
