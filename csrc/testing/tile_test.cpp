// SPDX-License-Identifier: Apache-2.0
// The emulated tile instructions (host_x86), on products small enough to be worked out by hand. The
// kernels' tests rely on them.
#define DUALHEAD_EMULATED
#include "check.h"
#include "host_x86/immintrin.h"

namespace {

#include "kernels/cpu/tile_amx.h"

uint16_t bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return static_cast<uint16_t>(bits >> 16);
}

// One weight row, two pairs of inputs and one column: sum + weights . x.
float product(float sum, const float (&weights)[4], const float (&x)[4]) {
  TileConfig config;
  config.rows[0] = config.rows[4] = 1, config.rows[6] = 2;
  config.row_bytes[0] = config.row_bytes[6] = 4, config.row_bytes[4] = 8;
  uint16_t a[4], b[4];
  for (int i = 0; i < 4; ++i) a[i] = bf16(weights[i]), b[i] = bf16(x[i]);
  load_tile_config(config);
  load_tile<0>(&sum, 4), load_tile<4>(a, 8), load_tile<6>(b, 4);
  multiply_tiles<0, 4, 6>();
  store_tile<0>(&sum, 4);
  release_tiles();
  return sum;
}

}  // namespace

TEST(products_are_added_in_the_documented_order) {
  CHECK_EQUAL(product(5, {1, 2, 3, 4}, {1, 10, 100, 1000}), 4326.0f);
  const float big = 0x1p30f;
  // Even inputs together, then odd inputs, then both. In the order of the inputs the 1 would be
  // lost.
  CHECK_EQUAL(product(0, {1, 1, 1, 0}, {big, 1, -big, 0}), 1.0f);
  CHECK_EQUAL(product(0, {1, 1, 0, 1}, {1, big, 0, -big}), 1.0f);
  CHECK_EQUAL(product(0, {1, 0, 1, 1}, {1, 0, big, -big}), 0.0f);
  // The sum comes last.
  CHECK_EQUAL(product(-big, {1, 1, 0, 0}, {big, 1, 0, 0}), 0.0f);
}

TEST(denormals_count_as_zero) {
  const float least = 0x1p-126f;
  CHECK_EQUAL(product(0, {least, 0, 0, 0}, {1, 0, 0, 0}), least);
  CHECK_EQUAL(product(0, {least / 2, 0, 0, 0}, {0x1p20f, 0, 0, 0}), 0.0f);
  CHECK_EQUAL(product(0, {least, 0, 0, 0}, {0.5f, 0, 0, 0}), 0.0f);
  CHECK_EQUAL(product(least / 2, {0, 0, 0, 0}, {0, 0, 0, 0}), 0.0f);
}
