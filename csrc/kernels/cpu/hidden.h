// SPDX-License-Identifier: Apache-2.0
// Hidden states in the dtype and order in which they multiply weights of dtype W. Included inside a
// target region.

// bf16 hidden states in the order in which quantised weights of type W are unpacked, padded with
// zeros to whole steps (packed_tile.h).
template <class W>
struct PackedFor {
  BFloat16 value;
};

// bf16 hidden states as the tile operand for weights of type W (tile_product.h).
template <class W>
struct TiledFor {
  BFloat16 value;
};

// The hidden states that multiply the weights W of every matrix but the heads, and of heads that
// are not quantised.
template <class W>
struct OperandOf {
  typedef float Type;
};
#if DUALHEAD_NATIVE_BF16
template <>
struct OperandOf<BFloat16> {
#if DUALHEAD_TILES
  typedef TiledFor<BFloat16> Type;
#else
  typedef BFloat16 Type;
#endif
};
#endif

// data(): the first of B * hidden_rows rows, stride() elements apart; request_stride() apart are
// the rows of h, one per request.
template <class W, class X>
struct Hidden;
template <class W>
struct Hidden<W, float> {
  static const float* data(const Step& s) { return s.hidden_f32; }
  static int64_t stride(const Step& s) { return s.hidden_f32_stride; }
  static int64_t request_stride(const Step& s) { return stride(s) * s.hidden_rows; }
};
template <class W>
struct Hidden<W, BFloat16> {
  static const BFloat16* data(const Step& s) { return s.hidden_bf16; }
  static int64_t stride(const Step& s) { return s.hidden_bf16_stride; }
  static int64_t request_stride(const Step& s) { return stride(s) * s.hidden_rows; }
};
template <class W>
struct Hidden<W, PackedFor<W>> {
  static const PackedFor<W>* data(const Step& s) {
    return reinterpret_cast<const PackedFor<W>*>(s.hidden_packed);
  }
  static int64_t stride(const Step& s) { return s.hidden_bf16_stride; }
};
// Blocks of kBatchBlock rows are kBatchBlock strides apart. Within one the rows are interleaved.
// `project` finds only the rows of h packed.
template <class W>
struct Hidden<W, TiledFor<W>> {
  static const TiledFor<W>* data(const Step& s) {
    return reinterpret_cast<const TiledFor<W>*>(s.hidden_packed);
  }
  static int64_t stride(const Step& s) { return s.hidden_bf16_stride; }
  static int64_t request_stride(const Step& s) { return stride(s); }
};
