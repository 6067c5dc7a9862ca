// SPDX-License-Identifier: Apache-2.0
// Products of tiles (tile_amx.h): 16 weight rows, as they lie in memory, times up to 16 hidden
// states, packed once per step. Quantised weights are widened to bf16, which is exact, in a buffer
// that stays in L1. Included inside a target region.
//
// Each result is one element of a tile of sums, to which tiles of 32 inputs are added in order. So
// its bits depend neither on the batch nor on its place in it.

constexpr int64_t kTileRows = 16, kTileInputs = 32, kTileColumns = 16;
constexpr int64_t kTileRowBytes = 64;
constexpr int64_t kRowTiles = 4 * kMaxGroups / kTileRows;  // tiles of weights at the same time
static_assert(kRowTiles == 2, "registers: 2 x 2 sums, 2 weights, 2 hidden states");

template <class W>
constexpr bool kInTiles<TiledFor<W>> = true;

// A batch of up to kBatchBlock requests as tiles of equal numbers of columns.
struct Columns {
  int64_t tiles, each;
  explicit Columns(int64_t batch) : tiles(units(batch, kTileColumns)), each(units(batch, tiles)) {}
};
static_assert(kBatchBlock / kTileColumns <= kTilePadding + 1, "the padding of all tiles fits");

// --- hidden states -------------------------------------------------------------------------------

// Inputs per column: d and zeros.
inline int64_t padded_inputs(int64_t d) { return units(d, kInt4Group) * kInt4Group; }

// Packs `count` rows of hidden states, `every` rows apart, for weights in a format. Each tile of
// columns is contiguous: for each pair of inputs its columns' pairs.
inline void pack_tiles(const Step& s, Quantization format, int64_t count, int64_t every) {
  const DecodeParams& p = *s.params;
  int64_t from[kInt4Group];
  for (int64_t i = 0; i < kInt4Group; ++i) {
    from[i] = format == Quantization::kNone ? i : packed_from(format, i);
  }
  for (int64_t b0 = 0; b0 < count; b0 += kBatchBlock) {
    const int64_t batch = smaller(kBatchBlock, count - b0);
    const Columns columns(batch);
    BFloat16* to = s.hidden_packed + b0 * s.hidden_bf16_stride;
    for (int64_t first = 0; first < columns.tiles * columns.each; first += columns.each) {
      for (int64_t k = 0; k < padded_inputs(p.d); k += 2) {
        const int64_t group = k / kInt4Group * kInt4Group;
        const int64_t inputs[2] = {group + from[k - group], group + from[k - group + 1]};
        for (int64_t b = first; b < first + columns.each; ++b) {
          const BFloat16* row = s.hidden_bf16 + (b0 + b) * every * s.hidden_bf16_stride;
          for (const int64_t i : inputs) *to++ = b < batch && i < p.d ? row[i] : BFloat16{0};
        }
      }
    }
  }
}

void pack_requests(const Step& s) {
  pack_tiles(s, Quantization::kNone, s.params->B, s.hidden_rows);
}

// What pack_requests has packed still holds if neither the order nor the hidden states differ.
void pack_hidden(const Step& s) {
  const DecodeParams& p = *s.params;
  if (p.quantization == Quantization::kNone && p.reward_head != RewardHead::kEmbedding) return;
  pack_tiles(s, p.quantization, p.B * s.hidden_rows, 1);
}

// --- weights -------------------------------------------------------------------------------------

// Where a tile of weights is, and the distance of its rows in bytes.
struct WeightTile {
  const void* at;
  int64_t stride;
};

struct alignas(64) TileBuffer {
  BFloat16 value[kTileRows][kTileInputs];
};

// find(): tiles of inputs [k, k + kInputs) for weight rows rows[0, count), count >= 1. Their
// kTiles tiles are one kTileBytes after the other if kTiles > 1. `spare` has room for them. Rows
// beyond `count` are unspecified, inputs beyond d are 0.
template <class W>
struct WeightTiles;

template <>
struct WeightTiles<BFloat16> {
  typedef const BFloat16* Row;
  static constexpr int64_t kTiles = 1, kInputs = kTileInputs;

  static WeightTile find(const Row* rows, int64_t count, int64_t k, int64_t d, TileBuffer* spare) {
    const int64_t stride = count > 1 ? rows[1] - rows[0] : 0;
    // Rows beyond the matrix repeat its last one.
    if (count == kTileRows && k + kInputs <= d && rows[count - 1] - rows[0] == (count - 1) * stride)
      return {rows[0] + k, stride * static_cast<int64_t>(sizeof(BFloat16))};
    *spare = TileBuffer{};
    for (int64_t r = 0; r < count; ++r) {
      const int64_t inputs = smaller(kInputs, d - k);
      __builtin_memcpy(spare->value[r], rows[r] + k, inputs * sizeof(BFloat16));
    }
    return {spare, kTileRowBytes};
  }
};

template <class W>  // one byte each
struct WeightTiles {
  typedef const W* Row;
  static constexpr int64_t kTiles = 2, kInputs = kTiles * kTileInputs;

  static WeightTile find(const Row* rows, int64_t count, int64_t k, int64_t d, TileBuffer* spare) {
    const ByteTables tables = byte_tables<W>();
    const __mmask64 inside = d - k < kInputs ? (uint64_t{1} << (d - k)) - 1 : ~uint64_t{0};
    for (int64_t r = 0; r < count; ++r) {
      __m512i low, high;
      to_bytes(W{}, tables, _mm512_maskz_loadu_epi8(inside, rows[r] + k), low, high);
      _mm512_store_si512(spare[0].value[r], _mm512_unpacklo_epi8(low, high));
      _mm512_store_si512(spare[1].value[r], _mm512_unpackhi_epi8(low, high));
    }
    return {spare, kTileRowBytes};
  }
};

template <>
struct WeightTiles<Int4Pair> {
  typedef Int4Row Row;
  static constexpr int64_t kTiles = 4, kInputs = kInt4Group;

  static WeightTile find(const Row* rows, int64_t count, int64_t k, int64_t, TileBuffer* spare) {
    const __m512i numbers = _mm512_load_si512(kInt4Table.bits);
    for (int64_t r = 0; r < count; ++r) {
      __m512i w[kTiles];
      int4_numbers(load_packed(rows[r].at + k / 2), numbers, w);
      for (int64_t j = 0; j < kTiles; ++j) _mm512_store_si512(spare[j].value[r], w[j]);
    }
    return {spare, kTileRowBytes};
  }
};

// --- products ------------------------------------------------------------------------------------

struct alignas(64) TileSums {
  float value[kTileRows][kTileColumns];
};

// The sums of kRows tiles of weights and kColumns of hidden states, as TileSums.
template <int kRows, int kColumns>
inline void zero_sums() {
  zero_tile<0>();
  if constexpr (kColumns == 2) zero_tile<1>();
  if constexpr (kRows == 2) zero_tile<2>();
  if constexpr (kRows == 2 && kColumns == 2) zero_tile<3>();
}
template <int kRows, int kColumns>
inline void store_sums(TileSums (*sums)[2]) {
  constexpr int64_t stride = kTileColumns * sizeof(float);
  store_tile<0>(&sums[0][0], stride);
  if constexpr (kColumns == 2) store_tile<1>(&sums[0][1], stride);
  if constexpr (kRows == 2) store_tile<2>(&sums[1][0], stride);
  if constexpr (kRows == 2 && kColumns == 2) store_tile<3>(&sums[1][1], stride);
}
template <int kRows, int kColumns>
inline void add_products(const WeightTile (&weights)[kRows], int64_t tile, const BFloat16* x,
                         int64_t next_x, int64_t x_stride) {
  const int64_t offset = tile * static_cast<int64_t>(sizeof(TileBuffer));
  load_tile<6>(x, x_stride);
  if constexpr (kColumns == 2) load_tile<7>(x + next_x, x_stride);
  load_tile<4>(static_cast<const char*>(weights[0].at) + offset, weights[0].stride);
  multiply_tiles<0, 4, 6>();
  if constexpr (kColumns == 2) multiply_tiles<1, 4, 7>();
  if constexpr (kRows == 2) {
    load_tile<5>(static_cast<const char*>(weights[1].at) + offset, weights[1].stride);
    multiply_tiles<2, 5, 6>();
    if constexpr (kColumns == 2) multiply_tiles<3, 5, 7>();
  }
}

// Adds scale * part for a group of inputs with scales of their own.
inline void add_scaled(const Int4Row* rows, int64_t count, int64_t group, const TileSums& part,
                       TileSums& sums) {
  for (int64_t r = 0; r < count; ++r) {
    const F32 scale = splat(rows[r].scales[group]);
    store(sums.value[r], fma(scale, load(part.value[r]), load(sums.value[r])));
  }
}

// sums[i][j] = rows [16 i, 16 i + 16) times the j-th tile of columns, for `count` rows. Meanwhile
// prefetches `lines` cache lines per turn.
template <class W, int kRows, int kColumns>
void tile_sums(const typename WeightTiles<W>::Row* rows, int64_t count, const char* next,
               int64_t lines, const BFloat16* x, int64_t columns, int64_t d, TileSums (*sums)[2]) {
  typedef WeightTiles<W> T;
  constexpr bool kScalesInside = T::kInputs == kInt4Group;
  TileBuffer spare[kRows][T::kTiles];
  TileSums parts[kRows][2];
  if (kScalesInside) __builtin_memset(sums, 0, kRows * sizeof(sums[0]));
  const int64_t next_x = columns * padded_inputs(d), step = columns * kTileInputs;
  zero_sums<kRows, kColumns>();
  for (int64_t k = 0; k < d; k += T::kInputs) {
    for (int64_t i = 0; i < lines; ++i, next += 64) __builtin_prefetch(next, 0, kToL2);
    WeightTile weights[kRows];
    for (int64_t i = 0; i < kRows; ++i) {
      const int64_t inside = smaller(kTileRows, count - i * kTileRows);
      weights[i] = T::find(rows + i * kTileRows, inside, k, d, spare[i]);
    }
    for (int64_t j = 0; j < T::kTiles; ++j) {
      add_products<kRows, kColumns>(weights, j, x, next_x, columns * 4);
      x += step;
    }
    if constexpr (kScalesInside) {
      store_sums<kRows, kColumns>(parts);
      zero_sums<kRows, kColumns>();
      for (int64_t i = 0; i < kRows; ++i) {
        const int64_t inside = smaller(kTileRows, count - i * kTileRows);
        for (int64_t j = 0; j < kColumns; ++j) {
          add_scaled(rows + i * kTileRows, inside, k / kInt4Group, parts[i][j], sums[i][j]);
        }
      }
    }
  }
  if (!kScalesInside) store_sums<kRows, kColumns>(sums);
}

// dot_rows (dot_tile.h) with tiles. Two tiles of columns share each pass over the weights; the
// second pass of a larger batch finds them in L2. The first pass prefetches from `next` on as many
// cache lines as it reads: one per row and turn in every format.
template <class W>
void tile_rows(const typename WeightTiles<W>::Row* rows, int64_t groups, const void* next,
               const TiledFor<W>* x, int64_t batch, int64_t d, float (*out)[4 * kMaxGroups]) {
  const Columns columns(batch);
  const int64_t count = 4 * groups, row_tiles = units(count, kTileRows);
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.rows[i] = kTileRows;
    config.row_bytes[i] = i == 4 || i == 5 ? kTileRowBytes : columns.each * 4;
  }
  load_tile_config(config);
  TileSums sums[kRowTiles][2];
  for (int64_t tile = 0; tile < columns.tiles; tile += 2) {
    const bool pair = tile + 1 < columns.tiles;
    const auto run = row_tiles == 2 ? pair ? &tile_sums<W, 2, 2> : &tile_sums<W, 2, 1>
                     : pair         ? &tile_sums<W, 1, 2>
                                    : &tile_sums<W, 1, 1>;
    const int64_t first = tile * columns.each;
    const BFloat16* hidden = &x->value + first * padded_inputs(d);
    run(rows, count, static_cast<const char*>(next), tile == 0 ? count : 0, hidden, columns.each, d,
        sums);
    const int64_t end = smaller(batch, (tile + 1 + pair) * columns.each);
    for (int64_t b = first; b < end; ++b) {
      const int64_t j = (b - first) / columns.each, column = (b - first) % columns.each;
      for (int64_t i = 0; i < count; ++i) {
        out[b][i] = sums[i / kTileRows][j].value[i % kTileRows][column];
      }
    }
  }
  release_tiles();
}

template <class W>
struct Tile<W, TiledFor<W>> {
  typedef typename WeightTiles<W>::Row Row;

  static void dot_rows(const Row* rows, int64_t groups, const void* next, const TiledFor<W>* x,
                       int64_t batch, int64_t d, float (*out)[4 * kMaxGroups]) {
    tile_rows<W>(rows, groups, next, x, batch, d, out);
  }
};
