// SPDX-License-Identifier: Apache-2.0
// The inner loop of everything: dot products of 4 weight rows with up to kMaxBatchTile requests.
// Included inside a target region and a namespace of its own per instruction set.
//
// Each dot product goes through k in order, with one vector accumulator per turn (quantised rows:
// one for all), ends in one masked step, and is summed over lanes by reduce4's tree, in every
// tile size and at every place in a tile: so a request's bits depend neither on the batch nor on
// its place in it.

template <class T>
inline T smaller(T a, T b) {  // not std::min: an instance made here could be linked in elsewhere
  return a < b ? a : b;
}
template <class T>
inline T larger(T a, T b) {
  return a > b ? a : b;
}

// fp32 arithmetic on widened numbers.
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

// The dtype in which hidden states meet weights of type W.
template <class W>
struct OperandOf {
  typedef float Type;
};
#if DUALHEAD_NATIVE_BF16
template <>
struct OperandOf<BFloat16> {
  typedef BFloat16 Type;
};
#endif

// What a tile brings into cache meanwhile: a walk through memory, `step` bytes per prefetch. One
// walk, and not one beside each row, is what the hardware's own prefetchers understand and run
// ahead of: four rows of 4 KB beside each other came at 0.8 of the rate.
struct Fetch {
  const char* at;
  int64_t step;
};
// A page that the walk comes to is looked up this far ahead, by one prefetch, lest all of its lines
// wait for that: 0.95 to 0.98 of the time of batches of 4 and 8 (16 KB ahead as well).
constexpr int64_t kPage = 4096, kPagesAhead = 64 * 1024;

// Inputs that take a turn together. Their hidden states should stay in L1 while groups of rows, and
// what is fetched meanwhile, pass through it; but each turn costs additions. In fp32 with tiles of
// 4 requests and more, 1024 took 1.03 of the time of 4 requests and 1.17 of that of 8; elsewhere
// 512 took up to 1.2.
template <class W>
constexpr int64_t kTurn = sizeof(W) == 4 && kMaxBatchTile >= 4 ? 512 : 1024;

// Of weights W and hidden states X: sums[b][r] += rows[r] . x_b over a turn's inputs k in [begin,
// end), which share an accumulator, for kBatch requests; `begin` is a multiple of kTurn.
template <class W, class X>
struct Tile {
  typedef Product<W, X> P;
  typedef const W* Row;
  static constexpr int kMaxBatch = kMaxBatchTile;
  static constexpr int64_t kStep = P::kStep;
  static constexpr bool kSumsByTurn = true, kRowsAreLong = sizeof(W) == 4;
  // Whether few requests go through it row by row: where a step of one row is a line of cache.
  static constexpr bool kByRow = kStep * sizeof(W) == 64;
  // Prefetches per step, a line each where a step reads that much.
  static constexpr int64_t kStepBytes = 4 * kStep * sizeof(W);
  static constexpr int64_t kFetches = kStepBytes < 64 ? 1 : kStepBytes / 64;

  template <int kBatch>
  static void run(const Row* rows, Fetch fetch, const X* x, int64_t x_stride, int64_t begin,
                  int64_t end, F32 (*sums)[4]) {
    for (int64_t page = 0; page < kTurn<W> / kStep * kFetches * fetch.step; page += kPage) {
      __builtin_prefetch(fetch.at + kPagesAhead + page, 0, 3);
    }
    F32 sum[kBatch][4] = {};
    int64_t k = begin;
    for (; k + kStep <= end; k += kStep) {
      typename P::Vector x_k[kBatch];
#pragma GCC unroll 8
      for (int b = 0; b < kBatch; ++b) x_k[b] = P::load(x + b * x_stride + k);
      for (int i = 0; i < kFetches; ++i) __builtin_prefetch(fetch.at + i * fetch.step, 0, 3);
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

  // The same of one whole row: sums[b] = row . x_b. Meanwhile the `next` one comes; but fp32 was
  // faster by loads alone, and four at a time (one request took 0.80 of the time where memory gave
  // 75 GB/s, 0.95 where it gave 48; bf16 1.04 and more).
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

// Groups of 4 rows that are taken together at most. The more, the less often a turn of hidden
// states comes from L2 once more: 8 instead of 4 took 0.87 to 0.98 of the time of 8 requests in
// bf16. fp32 rows, twice as long, were faster by 4.
constexpr int64_t kMaxGroups = 8;
// So few requests' hidden states stay in L1 beside the weights that pass through it: of any size
// met in practice, and surely if they are as small as this.
constexpr int64_t kFewRequests = 2;
constexpr int64_t kFewBytes = 16 * 1024;

template <class T, class X>
inline bool goes_by_row(int64_t batch, int64_t d) {
  return T::kByRow && batch <= kFewRequests &&
         batch * d * static_cast<int64_t>(sizeof(X)) <= kFewBytes;
}

template <class T, class X>
inline int64_t groups_at_once(int64_t batch, int64_t d) {
  if (batch <= kFewRequests && !goes_by_row<T, X>(batch, d)) return 1;
  return T::kRowsAreLong ? kMaxGroups / 2 : kMaxGroups;
}

// dot_rows row by row: a single stream, which the hardware's prefetchers understand and run ahead
// of. Four rows beside each other, fetched four rows ahead, took 1.03 to 1.28 of the time (in
// alternation, whether memory gave 45 or 80 GB/s).
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

// out[b][i] = rows[i] . x_b for 4 * groups rows. More than a few requests take turns of kTurn
// inputs, so that all groups find hidden states in L1, partial sums being put aside; and a batch
// takes tiles as equal as can be (8 is 4 + 4, not 6 + 2). Each tile fetches its part of as many
// bytes from `next` on, so that memory does not wait for arithmetic.
template <class W, class X>
void dot_rows(const typename Tile<W, X>::Row* rows, int64_t groups, const void* next, const X* x,
              int64_t x_stride, int64_t batch, int64_t d, float (*out)[4 * kMaxGroups]) {
  typedef Tile<W, X> T;
  if constexpr (T::kByRow) {
    if (goes_by_row<T, X>(batch, d)) {
      const W* first = static_cast<const W*>(next);
      return batch == 1 ? dot_single_rows<W, 1>(rows, groups, first, x, x_stride, d, out)
                        : dot_single_rows<W, 2>(rows, groups, first, x, x_stride, d, out);
    }
  }
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
