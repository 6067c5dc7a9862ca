// SPDX-License-Identifier: Apache-2.0
// The functions of kernels/cpu/tile_amx.h in plain C++, with the bits of the instructions.
#pragma once

namespace host_x86 {

constexpr int kTiles = 8, kMaxRows = 16, kMaxRowBytes = 64;

struct Tiles {
  bool configured = false;
  int rows[kTiles] = {}, row_bytes[kTiles] = {};
  uint8_t data[kTiles][kMaxRows][kMaxRowBytes] = {};
};

// Of one thread, as in the processor.
inline Tiles& tiles() {
  static thread_local Tiles state;
  return state;
}

inline void require_tile(int tile) {
  require(tiles().configured && tiles().rows[tile] > 0 && tiles().row_bytes[tile] > 0);
}

template <class TileConfig>
void load_tile_config(const TileConfig& config) {
  static_assert(sizeof(TileConfig) == 64, "as ldtilecfg reads it");
  require(config.palette == 1 && config.start_row == 0);
  tiles() = Tiles();
  tiles().configured = true;
  for (int i = 0; i < kTiles; ++i) {
    require(config.rows[i] <= kMaxRows && config.row_bytes[i] <= kMaxRowBytes);
    tiles().rows[i] = config.rows[i], tiles().row_bytes[i] = config.row_bytes[i];
  }
}

inline void release_tiles() { tiles() = Tiles(); }

template <int kTile>
void zero_tile() {
  require_tile(kTile);
  std::memset(tiles().data[kTile], 0, sizeof(tiles().data[kTile]));
}

template <int kTile>
void load_tile(const void* from, int64_t stride) {
  zero_tile<kTile>();
  for (int r = 0; r < tiles().rows[kTile]; ++r) {
    const char* row = static_cast<const char*>(from) + r * stride;
    std::memcpy(tiles().data[kTile][r], row, tiles().row_bytes[kTile]);
  }
}

template <int kTile>
void store_tile(void* to, int64_t stride) {
  require_tile(kTile);
  for (int r = 0; r < tiles().rows[kTile]; ++r) {
    char* row = static_cast<char*>(to) + r * stride;
    std::memcpy(row, tiles().data[kTile][r], tiles().row_bytes[kTile]);
  }
}

// TDPBF16PS as in Intel's Software Developer's Manual.
template <int kSum, int kWeights, int kHidden>
__attribute__((noinline)) void multiply_tiles() {
  require_tile(kSum), require_tile(kWeights), require_tile(kHidden);
  Tiles& t = tiles();
  const int pairs = t.row_bytes[kWeights] / 4, columns = t.row_bytes[kSum] / 4;
  require(t.rows[kSum] == t.rows[kWeights] && t.row_bytes[kSum] == t.row_bytes[kHidden]);
  require(t.rows[kHidden] == pairs);
  for (int m = 0; m < t.rows[kSum]; ++m) {
    uint16_t weights[kMaxRowBytes / 2];
    std::memcpy(weights, t.data[kWeights][m], sizeof(weights));
    float even[kMaxRows] = {}, odd[kMaxRows] = {}, sum[kMaxRows];
    for (int k = 0; k < pairs; ++k) {
      uint16_t x[kMaxRowBytes / 2];
      std::memcpy(x, t.data[kHidden][k], sizeof(x));
      for (int n = 0; n < columns; ++n) {
        even[n] = multiply_add(weights[2 * k], x[2 * n], even[n]);
        odd[n] = multiply_add(weights[2 * k + 1], x[2 * n + 1], odd[n]);
      }
    }
    std::memcpy(sum, t.data[kSum][m], sizeof(sum));
    for (int n = 0; n < columns; ++n) {
      sum[n] = flushed(flushed(sum[n]) + flushed(even[n] + odd[n]));
    }
    std::memcpy(t.data[kSum][m], sum, sizeof(sum));
  }
}

}  // namespace host_x86
