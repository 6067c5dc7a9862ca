// SPDX-License-Identifier: Apache-2.0
// The tile instructions of AMX. A tile register holds up to 16 rows of 64 bytes. Their numbers here
// are 0 to 3: sums, 4 and 5: weights, 6 and 7: hidden states. Written as assembly, because the
// compilers' own functions do not say which memory they read (GCC 12) and are missing in older
// compilers. Included inside a target region.
//
// Tests define DUALHEAD_EMULATED and take the same functions from csrc/testing/host_x86.

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

#ifdef DUALHEAD_EMULATED

using host_x86::load_tile;
using host_x86::load_tile_config;
using host_x86::multiply_tiles;
using host_x86::release_tiles;
using host_x86::store_tile;
using host_x86::zero_tile;

#else

// Must precede the other functions on each thread, and zeroes all tiles.
inline void load_tile_config(const TileConfig& config) {
  __asm__ volatile("ldtilecfg %0" ::"m"(config));
}
// Returns the tiles to their initial state, so that the system need not save them.
inline void release_tiles() { __asm__ volatile("tilerelease" ::: "memory"); }

template <int kTile>
inline void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
// Rows `stride` bytes apart.
template <int kTile>
inline void load_tile(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void store_tile(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}
// sum[m][n] += sum over pairs k of weights[m][2 k] x[k][2 n] + weights[m][2 k + 1] x[k][2 n + 1]
// for bf16 inputs and fp32 sums. First all even inputs and all odd inputs are added up by fused
// multiply-adds, each in order. Then their sum is added to sum[m][n]. Denormals count as zero.
template <int kSum, int kWeights, int kHidden>
inline void multiply_tiles() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kWeights),
                   "i"(kHidden));
}

#endif  // DUALHEAD_EMULATED
