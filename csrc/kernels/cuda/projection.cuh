// SPDX-License-Identifier: Apache-2.0
// The small products of the new position: for the gate, g rows of W_Q, g rows of W_K and the H
// folded rows u; for a correction, K r rows of D.
//
// The inputs of a row are cut into slices of kSlice, and the sum of each slice goes to the
// workspace. Readers add the slices in order (projected()). So a slice of sixteen rows is a work
// item of its own: at d = 4096 and g = 384 there are 48 x 8 items, one for each gate warp of 132
// multiprocessors, with 16 KiB of weights each.
#pragma once

#include "dot.cuh"
#include "primitives.cuh"
#include "workspace.h"

namespace dualhead {
namespace cuda {

// Warps that share a phase. Each takes item first, first + stride, ...
struct Team {
  int64_t first, stride;

  // The team for items that follow `items` others.
  __device__ __forceinline__ Team after(int64_t items) const {
    return Team{(first + stride - items % stride) % stride, stride};
  }
};

__device__ __forceinline__ Team whole_grid() { return Team{warp_in_grid(), warps_in_grid()}; }

// Projection `row` of batch row b. In order: q, k, a correction's rows, u.
__device__ __forceinline__ float projected(const DecodeParams& p, const Workspace& ws, int64_t b,
                                           int64_t row) {
  const int64_t rows = projection_rows(p), slices = ceil_div(p.d, kSlice);
  const float* slice = ws.projection + b * rows + row;
  constexpr int kAhead = 8;
  float sum = 0.0f;
  for (int64_t first = 0; first < slices; first += kAhead) {
    float part[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      part[i] = first + i < slices ? slice[(first + i) * p.B * rows] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) sum += part[i];
  }
  return sum;
}

// Row `row` of W_Q, W_K and D stacked on each other; the last one beyond the end.
__device__ __forceinline__ const void* key_row(const DecodeParams& p, DType dtype, int64_t row) {
  const int64_t g = p.H * p.d_k, last = row < key_rows(p) ? row : key_rows(p) - 1;
  const void* matrix = last < g ? p.q_weight : last < 2 * g ? p.k_weight : p.reward_down;
  const int64_t first = last < g ? 0 : last < 2 * g ? g : 2 * g;
  return Numbers{matrix, dtype}.from((last - first) * p.d).data;
}

// --- tensor cores: 16-bit weights and hidden states ----------------------------------------------

constexpr int kTileRows = 16, kTileBatch = 32;  // of a work item

// A slice of sixteen rows of W_Q, W_K and D for up to 8 kTiles batch rows. Lanes load sixteen bytes
// of a row as stored, of weights and hidden states alike (fragments.cuh), so each sum takes the
// inputs in one order, whatever kTiles is. kAhead: runs of 32 inputs that are loaded together.
template <bool kBrain, int kTiles, int kAhead>
__device__ __forceinline__ void project_tile(const DecodeParams& p, const Workspace& ws,
                                             int64_t row0, int64_t slice, int64_t b0) {
  constexpr int kRun = 32, kRuns = kSlice / kRun;
  const DType dtype = kBrain ? DType::kBFloat16 : DType::kFloat16;
  const int g = lane_index() / 4, t = lane_index() % 4;
  const int64_t k0 = slice * kSlice + 8 * t;
  const uint16_t* low = static_cast<const uint16_t*>(key_row(p, dtype, row0 + g)) + k0;
  const uint16_t* high = static_cast<const uint16_t*>(key_row(p, dtype, row0 + g + 8)) + k0;
  const uint16_t* hidden[kTiles];
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const int64_t b = b0 + 8 * n + g;
    hidden[n] = static_cast<const uint16_t*>(p.hidden) + (b < p.B ? b : p.B - 1) * p.hidden_stride;
    hidden[n] += k0;
  }
  float z[kTiles][4] = {};
#pragma unroll 1
  for (int run0 = 0; run0 < kRuns; run0 += kAhead) {
    if (slice * kSlice + run0 * kRun >= p.d) break;  // the whole warp
    Words a[kAhead][2], b[kAhead][kTiles];
#pragma unroll
    for (int run = 0; run < kAhead; ++run) {
      const int k = kRun * (run0 + run);
      const bool there = k0 + k < p.d;
      a[run][0] = there ? load_words(low + k) : Words{};
      a[run][1] = there ? load_words(high + k) : Words{};
#pragma unroll
      for (int n = 0; n < kTiles; ++n) b[run][n] = there ? load_words(hidden[n] + k) : Words{};
    }
#pragma unroll
    for (int run = 0; run < kAhead; ++run) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // tiles of 16 inputs
        const uint32_t rows[4] = {a[run][0].x[2 * half], a[run][1].x[2 * half],
                                  a[run][0].x[2 * half + 1], a[run][1].x[2 * half + 1]};
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          mma_m16n8k16<kBrain>(z[n], rows, b[run][n].x[2 * half], b[run][n].x[2 * half + 1]);
        }
      }
    }
  }
  const int64_t rows = projection_rows(p), keys = key_rows(p);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = row0 + g + i / 2 * 8, b = b0 + 8 * n + 2 * t + i % 2;
      if (row < keys && b < p.B) ws.projection[(slice * p.B + b) * rows + row] = z[n][i];
    }
  }
}

// A slice of sixteen rows has 128 cache lines.
__device__ __forceinline__ void prefetch_tile(const DecodeParams& p, int64_t row0, int64_t slice) {
  constexpr int kLine = 64, kLines = kSlice / kLine;  // inputs per line, lines per row
#pragma unroll
  for (int i = 0; i < kTileRows * kLines / kWarp; ++i) {
    const int line = i * kWarp + lane_index();
    const int64_t k = slice * kSlice + line % kLines * kLine;
    if (k >= p.d) continue;
    const void* row = key_row(p, DType::kBFloat16, row0 + line / kLines);
    prefetch(static_cast<const uint16_t*>(row) + k);
  }
}

// Work items: tiles of rows x slices x kTileBatch batch rows.
struct ProjectionTiles {
  int64_t slices, tiles, items;

  __device__ __forceinline__ explicit ProjectionTiles(const DecodeParams& p)
      : slices(ceil_div(p.d, kSlice)),
        tiles(ceil_div(key_rows(p), kTileRows)),
        items(p.dtype == DType::kFloat32 ? 0 : tiles * slices * ceil_div(p.B, kTileBatch)) {}

  __device__ __forceinline__ void prefetch(const DecodeParams& p, int64_t item) const {
    if (item < tiles * slices) prefetch_tile(p, item / slices * kTileRows, item % slices);
  }
};

template <bool kBrain>
__device__ __forceinline__ void project_tiles(const DecodeParams& p, const Workspace& ws,
                                              Team team) {
  const ProjectionTiles cut(p);
  for (int64_t item = team.first; item < cut.items; item += team.stride) {
    cut.prefetch(p, item + team.stride);
    const int64_t of_batch = item % (cut.tiles * cut.slices);
    const int64_t row0 = of_batch / cut.slices * kTileRows, slice = of_batch % cut.slices;
    const int64_t b0 = item / (cut.tiles * cut.slices) * kTileBatch, rows = p.B - b0;
    // 12 to 16 loads of sixteen bytes in flight; with more, registers spill.
    if (rows <= 8) {
      project_tile<kBrain, 1, 4>(p, ws, row0, slice, b0);
    } else if (rows <= 16) {
      project_tile<kBrain, 2, 4>(p, ws, row0, slice, b0);
    } else {
      project_tile<kBrain, 4, 2>(p, ws, row0, slice, b0);
    }
  }
}

// --- fp32 arithmetic: fp32 weights, and on the plain path all ------------------------------------

// A slice of kFmaRows rows for kFmaTile batch rows: first all loads of the weights, then those of
// the hidden states, then the sums. kFours: addresses and d allow loads of four values. The bits
// are the same without it.
constexpr int kFmaRows = 2, kFmaTile = 2;

template <bool kFours>
__device__ __forceinline__ void project_rows(const DecodeParams& p, const Workspace& ws,
                                             const Numbers (&weight)[kFmaRows], DType dtype,
                                             int64_t first_row, int rows, int64_t slice,
                                             int64_t b0) {
  constexpr int kSteps = kSlice / (4 * kWarp);
  Four w[kFmaRows][kSteps], h[kFmaTile][kSteps];
#pragma unroll
  for (int r = 0; r < kFmaRows; ++r) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int64_t k = slice * kSlice + 4 * (i * kWarp + lane_index());
      w[r][i] = weight[r].four<kFours>(k, p.d - k);
    }
  }
#pragma unroll
  for (int t = 0; t < kFmaTile; ++t) {
    const int64_t b = b0 + t < p.B ? b0 + t : p.B - 1;
    const Numbers hidden = Numbers{p.hidden, dtype}.from(b * p.hidden_stride);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int64_t k = slice * kSlice + 4 * (i * kWarp + lane_index());
      h[t][i] = hidden.four<kFours>(k, p.d - k);
    }
  }
#pragma unroll
  for (int t = 0; t < kFmaTile; ++t) {
#pragma unroll
    for (int r = 0; r < kFmaRows; ++r) {
      float dot = 0.0f;
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) dot = fmaf(w[r][i].x[j], h[t][i].x[j], dot);
      }
      dot = warp_sum(dot);
      if (lane_index() != 0 || r >= rows || b0 + t >= p.B) continue;
      ws.projection[(slice * p.B + b0 + t) * projection_rows(p) + first_row + r] = dot;
    }
  }
}

// Work items: kFmaRows rows x slices x kFmaTile batch rows, of W_Q, W_K and D, or of u.
template <bool kFours, bool kFolded>
__device__ __forceinline__ void project_by_rows(const DecodeParams& p, const Workspace& ws,
                                                Team team, DType dtype) {
  const int64_t keys = key_rows(p), rows = kFolded ? p.H : keys;
  const int64_t slices = ceil_div(p.d, kSlice), groups = ceil_div(p.B, kFmaTile);
  const int64_t items = ceil_div(rows, kFmaRows) * slices * groups;
  for (int64_t item = team.first; item < items; item += team.stride) {
    const int64_t row0 = item / (slices * groups) * kFmaRows, rest = item % (slices * groups);
    const int count = static_cast<int>(rows - row0 < kFmaRows ? rows - row0 : kFmaRows);
    Numbers weight[kFmaRows];
#pragma unroll
    for (int r = 0; r < kFmaRows; ++r) {
      const int64_t row = row0 + (r < count ? r : count - 1);
      weight[r] = kFolded ? Numbers{p.u_weight + row * p.d, DType::kFloat32}
                          : Numbers{key_row(p, dtype, row), dtype};
    }
    project_rows<kFours>(p, ws, weight, dtype, kFolded ? keys + row0 : row0, count, rest / groups,
                         rest % groups * kFmaTile);
  }
}

// --- phase 1 -------------------------------------------------------------------------------------

// Prefetches a warp's first weights. They depend on nothing, so this can run early.
__device__ __forceinline__ void prefetch_projection(const DecodeParams& p, Team team) {
  if (key_rows(p) > 0 && p.dtype != DType::kFloat32) {
    ProjectionTiles(p).prefetch(p, team.first);
  }
}

// All projections of the new position, written to the workspace. On the streaming path (streams())
// every address is aligned to 16 bytes.
__device__ __forceinline__ void project_streamed(const DecodeParams& p, const Workspace& ws,
                                                 Team team) {
  const Team rest = team.after(ProjectionTiles(p).items);
  switch (p.dtype) {
    case DType::kFloat32:
      project_by_rows<true, false>(p, ws, team, DType::kFloat32);
      return project_by_rows<true, true>(p, ws, rest, DType::kFloat32);
    case DType::kBFloat16:
      project_tiles<true>(p, ws, team);
      return project_by_rows<true, true>(p, ws, rest, DType::kBFloat16);
    default:
      project_tiles<false>(p, ws, team);
      return project_by_rows<true, true>(p, ws, rest, DType::kFloat16);
  }
}

// dtype: p.dtype, which the caller may know at compile time.
template <bool kFours>
__device__ __forceinline__ void project_plain(const DecodeParams& p, const Workspace& ws, Team team,
                                              DType dtype) {
  project_by_rows<kFours, false>(p, ws, team, dtype);
  project_by_rows<kFours, true>(p, ws, team, dtype);
}

}  // namespace cuda
}  // namespace dualhead
