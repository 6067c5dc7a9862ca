// SPDX-License-Identifier: Apache-2.0
// The inner loop of all products: dot products of 4 weight rows with up to kMaxBatchTile requests.
// Included inside a target region and in a separate namespace per instruction set.
//
// The order of each dot product is fixed. It goes through the inputs k in order, with one vector
// accumulator per turn (int4_tile.h and packed_tile.h: one for all turns), and ends in one masked
// step. reduce4 sums the lanes by the same tree in every tile size and at every place in a tile. So
// the bits of a request's result depend neither on the batch nor on its place in it.

template <class T>
inline T smaller(T a, T b) {  // std::min could be linked into baseline code
  return a < b ? a : b;
}
template <class T>
inline T larger(T a, T b) {
  return a > b ? a : b;
}

// fp32 arithmetic on values widened to fp32.
template <class W, class X>
struct Product {
  static constexpr int kStep = kLanes;
  typedef F32 Vector;
  template <class T>
  static Vector load(const T* p) {
    return DUALHEAD_ISA::load(p);
  }
  template <class T>
  static Vector load_partial(const T* p, int64_t n) {
    return DUALHEAD_ISA::load_partial(p, n);
  }
  static F32 accumulate(F32 sum, Vector w, Vector x) { return fma(w, x, sum); }
};

#if DUALHEAD_NATIVE_BF16
template <>
struct Product<BFloat16, BFloat16> : NativeBf16Product {};
#endif

// Whether hidden states of type X are an operand of AMX tiles (tile_product.h).
template <class X>
constexpr bool kInTiles = false;

// What a tile prefetches while it computes: one sequential stream, `step` bytes per prefetch. The
// hardware prefetchers recognise one stream and run ahead of it. Four rows of 4 KB fetched side by
// side reached 0.8 of the rate.
struct Fetch {
  const char* at;
  int64_t step;
};
// Into L2, not L1: the stream is up to 256 KB ahead, and in L1 it would displace the hidden states.
// Zen 4, two threads, d = 4096: with L1, 4, 8 and 16 requests took 1.3 times as long in bf16 and
// fp32, and 2 and 4 requests 1.4 times in int8.
constexpr int kToL2 = 2;
// One prefetch this far ahead translates the address of each page that the stream will reach;
// otherwise all of its cache lines wait for the translation. Batches of 4 and 8 took 0.95 to 0.98
// of the time (the same at 16 KB ahead).
constexpr int64_t kPage = 4096, kPagesAhead = 64 * 1024;

// Inputs per turn. The hidden states of a turn should stay in L1 while groups of weight rows and
// prefetched lines pass through it, but each turn costs additions. In fp32 with tiles of 4 or more
// requests, 1024 took 1.03 of the time for 4 requests and 1.17 for 8. Elsewhere 512 took up to 1.2.
template <class W>
constexpr int64_t kTurn = sizeof(W) == 4 && kMaxBatchTile >= 4 ? 512 : 1024;

// A tile of weights W and hidden states X. run(): sums[b][r] += rows[r] . x_b over the inputs k in
// [begin, end) of one turn, which share an accumulator, for kBatch requests. `begin` is a multiple
// of kTurn.
template <class W, class X>
struct Tile {
  typedef Product<W, X> P;
  typedef const W* Row;
  typedef W Weight;
  static constexpr int kMaxBatch = kMaxBatchTile;
  static constexpr int64_t kStep = P::kStep;
  static constexpr bool kSumsByTurn = true, kRowsAreLong = sizeof(W) == 4;
  // Whether few requests are computed row by row: if one step of one row is a cache line.
  static constexpr bool kByRow = kStep * sizeof(W) == 64;
  // Prefetches per step: one per cache line if a step reads at least a line.
  static constexpr int64_t kStepBytes = 4 * kStep * sizeof(W);
  static constexpr int64_t kFetches = kStepBytes < 64 ? 1 : kStepBytes / 64;

  template <int kBatch>
  static void run(const Row* rows, Fetch fetch, const X* x, int64_t x_stride, int64_t begin,
                  int64_t end, F32 (*sums)[4]) {
    for (int64_t page = 0; page < kTurn<W> / kStep * kFetches * fetch.step; page += kPage) {
      __builtin_prefetch(fetch.at + kPagesAhead + page, 0, kToL2);
    }
    F32 sum[kBatch][4] = {};
    int64_t k = begin;
    for (; k + kStep <= end; k += kStep) {
      typename P::Vector x_k[kBatch];
#pragma GCC unroll 8
      for (int b = 0; b < kBatch; ++b) x_k[b] = P::load(x + b * x_stride + k);
      for (int i = 0; i < kFetches; ++i) __builtin_prefetch(fetch.at + i * fetch.step, 0, kToL2);
      fetch.at += kFetches * fetch.step;
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const typename P::Vector w_k = P::load(rows[r] + k);
#pragma GCC unroll 8
        for (int b = 0; b < kBatch; ++b) sum[b][r] = P::accumulate(sum[b][r], w_k, x_k[b]);
      }
    }
    if (k < end) {
      for (int b = 0; b < kBatch; ++b) {
        const typename P::Vector x_k = P::load_partial(x + b * x_stride + k, end - k);
        for (int r = 0; r < 4; ++r) {
          sum[b][r] = P::accumulate(sum[b][r], P::load_partial(rows[r] + k, end - k), x_k);
        }
      }
    }
#pragma GCC unroll 8
    for (int b = 0; b < kBatch; ++b) {
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) sums[b][r] += sum[b][r];
    }
  }

  // The same for kRows whole rows: sums[r][b] = rows[r] . x_b.
  template <int kRows, int kBatch>
  static void run_rows(const Row* rows, const X* x, int64_t x_stride, int64_t d,
                       F32 (*sums)[kBatch]) {
    F32 total[kRows][kBatch] = {};
    for (int64_t k = 0; k < d;) {
      const int64_t stop = smaller(k + kTurn<W>, d);
      F32 sum[kRows][kBatch] = {};
      for (; k + kStep <= stop; k += kStep) {
        typename P::Vector x_k[kBatch];
#pragma GCC unroll 8
        for (int b = 0; b < kBatch; ++b) x_k[b] = P::load(x + b * x_stride + k);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const typename P::Vector w_k = P::load(rows[r] + k);
#pragma GCC unroll 8
          for (int b = 0; b < kBatch; ++b) sum[r][b] = P::accumulate(sum[r][b], w_k, x_k[b]);
        }
      }
      for (int r = 0; r < kRows; ++r) {
        for (int b = 0; b < kBatch; ++b) {
          if (k < stop) {
            const typename P::Vector x_k = P::load_partial(x + b * x_stride + k, stop - k);
            sum[r][b] = P::accumulate(sum[r][b], P::load_partial(rows[r] + k, stop - k), x_k);
          }
          total[r][b] += sum[r][b];
        }
      }
      k = stop;
    }
    __builtin_memcpy(sums, total, sizeof(total));
  }

  // The same for one whole row: sums[b] = row . x_b. Meanwhile it prefetches the `next` row, except
  // in fp32, where plain loads of four steps at a time were faster: one request took 0.80 of the
  // time at a memory bandwidth of 75 GB/s and 0.95 at 48 GB/s. In bf16 they took 1.04 or more.
  template <int kBatch>
  static void run_row(Row row, Row next, const X* x, int64_t x_stride, int64_t d, F32* sums) {
    constexpr bool kFetch = sizeof(W) < 4;
    constexpr int64_t kAtOnce = kFetch ? 1 : 4;
    F32 total[kBatch] = {};
    for (int64_t k = 0; k < d;) {
      const int64_t stop = smaller(k + kTurn<W>, d);
      F32 sum[kBatch] = {};
      const auto step = [&](int64_t at) {
        if (kFetch) __builtin_prefetch(next + at, 0, 3);
        const typename P::Vector w_k = P::load(row + at);
#pragma GCC unroll 8
        for (int b = 0; b < kBatch; ++b) {
          sum[b] = P::accumulate(sum[b], w_k, P::load(x + b * x_stride + at));
        }
      };
      for (; k + kAtOnce * kStep <= stop; k += kAtOnce * kStep) {
#pragma GCC unroll 4
        for (int64_t i = 0; i < kAtOnce; ++i) step(k + i * kStep);
      }
      for (; k + kStep <= stop; k += kStep) step(k);
      for (int b = 0; b < kBatch; ++b) {
        if (k < stop) {
          const typename P::Vector x_k = P::load_partial(x + b * x_stride + k, stop - k);
          sum[b] = P::accumulate(sum[b], P::load_partial(row + k, stop - k), x_k);
        }
        total[b] += sum[b];
      }
      k = stop;
    }
    for (int b = 0; b < kBatch; ++b) sums[b] = total[b];
  }
};

// One tile of `count` <= kMaxBatch requests.
template <class T, int kCount, class X>
inline void run_tile(int64_t count, const typename T::Row* rows, Fetch fetch, const X* x,
                     int64_t x_stride, int64_t begin, int64_t end, F32 (*sums)[4]) {
  if constexpr (kCount == 1) {
    T::template run<1>(rows, fetch, x, x_stride, begin, end, sums);
  } else if (count == kCount) {
    T::template run<kCount>(rows, fetch, x, x_stride, begin, end, sums);
  } else {
    run_tile<T, kCount - 1>(count, rows, fetch, x, x_stride, begin, end, sums);
  }
}

// The most groups of 4 rows that share a turn. With more groups, hidden states are reloaded from L2
// less often: 8 instead of 4 took 0.87 to 0.98 of the time for 8 requests in bf16. fp32 rows are
// twice as long and were faster with 4.
constexpr int64_t kMaxGroups = 8;
// The hidden states of this many requests stay in L1 while the weights stream through it, for every
// d met in practice; up to kFewBytes they certainly do.
constexpr int64_t kFewRequests = 2;
constexpr int64_t kFewBytes = 16 * 1024;

template <class T, class X>
inline bool goes_by_row(int64_t batch, int64_t d) {
  return T::kByRow && batch <= kFewRequests &&
         batch * d * static_cast<int64_t>(sizeof(X)) <= kFewBytes;
}

// Whether few requests are computed with several rows side by side and without prefetches: rows of
// at least this many bytes. Each row is a stream for the hardware prefetchers, and more streams
// keep more reads in flight. Measured alternately, one thread. Zen 3 (AVX2), fp32, d = 2048 and
// 4096: one request took 0.85 to 0.95 of the time of four rows with prefetches, and 0.8 to 0.92 of
// that of MKL's product; two requests took 0.93 to 0.98. One row at a time took 1.3 to 1.6 of
// eight. Zen 4 (AVX-512), bf16, d = 4096: one request took 0.85 of the time of one row at a time,
// two took 0.92; with prefetches 1 KB or 4 KB ahead one took 0.9. Streams end with their page: rows
// of 4 KB or less took up to 1.7.
constexpr int64_t kLongRow = 8192;
// Widened bf16 rows are not: their arithmetic takes longer than the reads.
template <class T>
constexpr bool kSideBySide = T::kByRow || T::kRowsAreLong;
template <class T>
inline bool goes_side_by_side(int64_t batch, int64_t d) {
  if constexpr (kSideBySide<T>) {
    return batch <= kFewRequests &&
           d * static_cast<int64_t>(sizeof(typename T::Weight)) >= kLongRow;
  }
  return false;
}

template <class T, class X>
inline int64_t groups_at_once(int64_t batch, int64_t d) {
  if constexpr (kInTiles<X>) {
    return kMaxGroups;
  } else {
    const bool whole_rows = goes_by_row<T, X>(batch, d) || goes_side_by_side<T>(batch, d);
    if (batch <= kFewRequests && !whole_rows) return 1;
    return T::kRowsAreLong ? kMaxGroups / 2 : kMaxGroups;
  }
}

// dot_rows row by row, for shorter rows: one sequential stream, which the hardware prefetchers
// recognise and run ahead of. Four rows side by side, prefetched four rows ahead, took 1.03 to 1.28
// of the time (measured alternately, at memory bandwidths of 45 and 80 GB/s).
template <class W, int kBatch, class X>
void dot_single_rows(const W* const* rows, int64_t groups, const W* next, const X* x,
                     int64_t x_stride, int64_t d, float (*out)[4 * kMaxGroups]) {
  for (int64_t first = 0; first < 4 * groups; first += 4) {
    F32 sums[4][kBatch];
    for (int64_t r = 0; r < 4; ++r) {
      const W* following = first + r + 1 < 4 * groups ? rows[first + r + 1] : next;
      Tile<W, X>::template run_row<kBatch>(rows[first + r], following, x, x_stride, d, sums[r]);
    }
    for (int b = 0; b < kBatch; ++b) {
      reduce4(out[b] + first, sums[0][b], sums[1][b], sums[2][b], sums[3][b]);
    }
  }
}

// dot_rows with 8 rows side by side, or 4 where the registers do not suffice.
template <class W, int kBatch, class X>
void dot_side_by_side(const W* const* rows, int64_t groups, const X* x, int64_t x_stride, int64_t d,
                      float (*out)[4 * kMaxGroups]) {
  constexpr int kRows = kBatch == 1 || kMaxBatchTile >= 4 ? 8 : 4;
  for (int64_t first = 0, count; first < 4 * groups; first += count) {
    F32 sums[kRows][kBatch];
    count = smaller(int64_t{kRows}, 4 * groups - first);
    if (count == kRows) {
      Tile<W, X>::template run_rows<kRows, kBatch>(rows + first, x, x_stride, d, sums);
    } else {
      Tile<W, X>::template run_rows<4, kBatch>(rows + first, x, x_stride, d, sums);
    }
    for (int64_t r = 0; r < count; r += 4) {
      for (int b = 0; b < kBatch; ++b) {
        reduce4(out[b] + first + r, sums[r][b], sums[r + 1][b], sums[r + 2][b], sums[r + 3][b]);
      }
    }
  }
}

// dot_rows for more than a few requests, or formats that are not computed row by row. The inputs
// are cut into turns of kTurn, so that all groups find the hidden states in L1; partial sums are
// kept in `sums`. A batch is cut into tiles as equal as possible (8 is 4 + 4, not 6 + 2). Together
// the tiles prefetch the same number of bytes from `next` on, so that memory does not wait for
// arithmetic.
template <class W, class X>
void dot_in_turns(const typename Tile<W, X>::Row* rows, int64_t groups, const void* next,
                  const X* x, int64_t x_stride, int64_t batch, int64_t d,
                  float (*out)[4 * kMaxGroups]) {
  typedef Tile<W, X> T;
  F32 sums[kMaxGroups][kBatchBlock][4];
  for (int64_t g = 0; g < groups; ++g) __builtin_memset(sums[g], 0, batch * sizeof(sums[g][0]));
  const int64_t all_tiles = (batch + T::kMaxBatch - 1) / T::kMaxBatch;
  const int64_t bytes = T::kStepBytes / T::kFetches;
  Fetch fetch{static_cast<const char*>(next), (bytes + all_tiles - 1) / all_tiles};
  const int64_t turn = T::kSumsByTurn || batch > kFewRequests ? kTurn<W> : d;
  for (int64_t begin = 0; begin < d; begin += turn) {
    const int64_t end = smaller(begin + turn, d);
    for (int64_t g = 0; g < groups; ++g) {
      int64_t tiles = all_tiles;
      for (int64_t b = 0; b < batch; --tiles) {
        const int64_t count = (batch - b + tiles - 1) / tiles;
        run_tile<T, T::kMaxBatch>(count, rows + 4 * g, fetch, x + b * x_stride, x_stride, begin,
                                  end, sums[g] + b);
        fetch.at += (end - begin) / T::kStep * T::kFetches * fetch.step;
        b += count;
      }
    }
  }
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t b = 0; b < batch; ++b) {
      reduce4(out[b] + 4 * g, sums[g][b][0], sums[g][b][1], sums[g][b][2], sums[g][b][3]);
    }
  }
}

// out[b][i] = rows[i] . x_b for 4 * groups rows. `next` is where the following rows start.
template <class W, class X>
void dot_rows(const typename Tile<W, X>::Row* rows, int64_t groups, const void* next, const X* x,
              int64_t x_stride, int64_t batch, int64_t d, float (*out)[4 * kMaxGroups]) {
  typedef Tile<W, X> T;
  if constexpr (kInTiles<X>) {
    T::dot_rows(rows, groups, next, x, batch, d, out);
  } else {
    if constexpr (kSideBySide<T>) {
      if (goes_side_by_side<T>(batch, d)) {
        return batch == 1 ? dot_side_by_side<W, 1>(rows, groups, x, x_stride, d, out)
                          : dot_side_by_side<W, 2>(rows, groups, x, x_stride, d, out);
      }
    }
    if constexpr (T::kByRow) {
      if (goes_by_row<T, X>(batch, d)) {
        const W* first = static_cast<const W*>(next);
        return batch == 1 ? dot_single_rows<W, 1>(rows, groups, first, x, x_stride, d, out)
                          : dot_single_rows<W, 2>(rows, groups, first, x, x_stride, d, out);
      }
    }
    dot_in_turns<W, X>(rows, groups, next, x, x_stride, batch, d, out);
  }
}
