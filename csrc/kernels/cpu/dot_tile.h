// SPDX-License-Identifier: Apache-2.0
// The inner loop of everything: dot products of 4 weight rows with up to kMaxBatchTile requests.
// Included inside a target region and a namespace of its own per instruction set.
//
// Each dot product has one vector accumulator, goes through k in order, ends in one masked step,
// and is summed over lanes by reduce4's tree, in every tile size and at every place in a tile: so a
// request's bits depend neither on the batch nor on its place in it.

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

// Into which cache the rows `ahead` are fetched, if at all.
enum class Prefetch { kNone, kToL1, kToL2 };

// out[b][r] = rows[r] . x_b for kBatch requests. `ahead`: bytes from each row to the one to
// prefetch.
template <class W, class X, int kBatch, Prefetch kPrefetch>
void dot_tile(const W* const* rows, int64_t ahead, const X* x, int64_t x_stride, int64_t d,
              float (*out)[4]) {
  typedef Product<W, X> P;
  F32 sum[kBatch][4] = {};
  int64_t k = 0;
  for (; k + P::kStep <= d; k += P::kStep) {
    typename P::Vector x_k[kBatch];
#pragma GCC unroll 8
    for (int b = 0; b < kBatch; ++b) x_k[b] = P::load(x + b * x_stride + k);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const W* w = rows[r] + k;
      if (kPrefetch != Prefetch::kNone) {
        constexpr int kLocality = kPrefetch == Prefetch::kToL1 ? 3 : 2;
        __builtin_prefetch(reinterpret_cast<const char*>(w) + ahead, 0, kLocality);
      }
      const typename P::Vector w_k = P::load(w);
#pragma GCC unroll 8
      for (int b = 0; b < kBatch; ++b) sum[b][r] = P::accumulate(sum[b][r], w_k, x_k[b]);
    }
  }
  if (k < d) {
    for (int b = 0; b < kBatch; ++b) {
      const typename P::Vector x_k = P::load_partial(x + b * x_stride + k, d - k);
      for (int r = 0; r < 4; ++r) {
        sum[b][r] = P::accumulate(sum[b][r], P::load_partial(rows[r] + k, d - k), x_k);
      }
    }
  }
#pragma GCC unroll 8
  for (int b = 0; b < kBatch; ++b) reduce4(out[b], sum[b][0], sum[b][1], sum[b][2], sum[b][3]);
}

// One batch tile of `count` <= kMaxBatchTile requests.
template <class W, class X, Prefetch kPrefetch, int kCount = kMaxBatchTile>
inline void dot_tile_of(int64_t count, const W* const* rows, int64_t ahead, const X* x,
                        int64_t x_stride, int64_t d, float (*out)[4]) {
  if constexpr (kCount == 1) {
    dot_tile<W, X, 1, kPrefetch>(rows, ahead, x, x_stride, d, out);
  } else if (count == kCount) {
    dot_tile<W, X, kCount, kPrefetch>(rows, ahead, x, x_stride, d, out);
  } else {
    dot_tile_of<W, X, kPrefetch, kCount - 1>(count, rows, ahead, x, x_stride, d, out);
  }
}

// Rows further ahead than this would push each other out of L1 before their turn.
constexpr int64_t kFarAhead = 8 * 1024;

// out[b][r] for a batch of any size, in tiles as equal as can be (8 is 4 + 4, not 6 + 2). The first
// tile brings the rows in and prefetches; the others find them in cache.
template <class W, class X>
void dot_rows(const W* const* rows, int64_t ahead, const X* x, int64_t x_stride, int64_t batch,
              int64_t d, float (*out)[4]) {
  int64_t tiles = (batch + kMaxBatchTile - 1) / kMaxBatchTile;
  for (int64_t b = 0; b < batch; --tiles) {
    const int64_t count = (batch - b + tiles - 1) / tiles;
    const X* x_b = x + b * x_stride;
    if (b > 0) {
      dot_tile_of<W, X, Prefetch::kNone>(count, rows, ahead, x_b, x_stride, d, out + b);
    } else if (ahead <= kFarAhead) {
      dot_tile_of<W, X, Prefetch::kToL1>(count, rows, ahead, x_b, x_stride, d, out + b);
    } else {
      dot_tile_of<W, X, Prefetch::kToL2>(count, rows, ahead, x_b, x_stride, d, out + b);
    }
    b += count;
  }
}
