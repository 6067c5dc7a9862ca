// SPDX-License-Identifier: Apache-2.0
// Turns the tensors of the operator dualhead::decode_step into the plain DecodeParams of the
// kernels, in the same way for every device: it checks all arguments, allocates the outputs and
// fills in the pointers. Shapes and meaning of the arguments: kernels/params.h.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <limits>
#include <tuple>
#include <utility>

#include "checks.h"
#include "decode_arguments.h"
#include "kernels/params.h"

namespace dualhead {

constexpr const char* kDecodeStep = "decode_step";

#define DUALHEAD_FIELD(type, schema, name) type name;
struct DecodeArguments {
  Tensor hidden;
  DUALHEAD_DECODE_ARGUMENTS(DUALHEAD_FIELD)
};
#undef DUALHEAD_FIELD

// The outputs in order: logits, alpha, gate_logit, token, logprob, status, attention.
using DecodeResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// A new contiguous tensor on the device of `like`. The shim is the cheapest allocation in the
// stable ABI.
template <size_t N>
Tensor allocate(std::array<int64_t, N> sizes, ScalarType dtype, const Tensor& like) {
  std::array<int64_t, N> strides;
  int64_t stride = 1;
  for (size_t i = N; i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i];
  }
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      N, sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
      like.get_device_index(), &handle));
  return Tensor(handle);
}

template <typename T>
T* pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <typename T>
T* pointer(const MaybeTensor& tensor) {
  return tensor.has_value() ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}

// --- checks --------------------------------------------------------------------------------------

// Checks an optional read-only argument and makes it contiguous (it may be an expanded scalar or a
// column). The copy is cheap because all of these arguments are small.
inline void check_small(const char* name, MaybeTensor& tensor, const Tensor& like, ScalarType dtype,
                        std::initializer_list<Dim> dims) {
  if (!tensor.has_value()) return;
  check_device(kDecodeStep, name, *tensor, like);
  check_dtype(kDecodeStep, name, *tensor, dtype);
  check_shape(kDecodeStep, name, *tensor, dims);
  if (!tensor->is_contiguous()) tensor = torch::stable::contiguous(*tensor);
}

// Checks an argument that is written in place or is too large to copy.
inline void check_in_place(const char* name, const MaybeTensor& tensor, const Tensor& like,
                           ScalarType dtype, std::initializer_list<Dim> dims) {
  check_device(kDecodeStep, name, *tensor, like);
  check_dtype(kDecodeStep, name, *tensor, dtype);
  check_shape(kDecodeStep, name, *tensor, dims);
  check_contiguous(kDecodeStep, name, *tensor);
}

inline Quantization quantization_of(const Tensor& weight) {
  switch (weight.scalar_type()) {
    case ScalarType::Char:
      return Quantization::kInt8;
    case ScalarType::Float8_e4m3fn:
      return Quantization::kFp8;
    case ScalarType::Byte:
      return Quantization::kInt4;
    default:
      return Quantization::kNone;
  }
}

inline RewardHead reward_head_of(const std::string& name) {
  if (name == "full") return RewardHead::kFull;
  if (name == "embedding") return RewardHead::kEmbedding;
  if (name == "lowrank") return RewardHead::kLowRank;
  fail(kDecodeStep, "reward_head must be full, embedding or lowrank, got " + name);
}

// Quantised weights need one scale per row, or for int4 one per group. Other weights have none.
inline void check_scales(DecodeArguments& a, Quantization quantization, int64_t K, int64_t V,
                         int64_t d) {
  const std::pair<const char*, MaybeTensor*> scales[] = {{"lm_scale", &a.lm_scale},
                                                         {"reward_scale", &a.reward_scale}};
  const bool quantized = quantization != Quantization::kNone;
  const bool corrects = reward_head_of(a.reward_head) != RewardHead::kFull;
  for (const auto& [name, scale] : scales) {
    const bool wanted = quantized && !(corrects && scale == &a.reward_scale);
    if (scale->has_value() == wanted) continue;
    fail(kDecodeStep, std::string(name) + (wanted ? " must be given with quantised weights, "
                                                    "got None"
                                                  : " must be None unless the weights are "
                                                    "quantised, got a tensor"));
  }
  if (quantization == Quantization::kInt4) {
    check_small("lm_scale", a.lm_scale, a.hidden, ScalarType::Float, {V, d / kInt4Group});
    check_small("reward_scale", a.reward_scale, a.hidden, ScalarType::Float,
                {K, V, d / kInt4Group});
  } else {
    check_small("lm_scale", a.lm_scale, a.hidden, ScalarType::Float, {V});
    check_small("reward_scale", a.reward_scale, a.hidden, ScalarType::Float, {K, V});
  }
}

inline void check_given(const char* name, const MaybeTensor& tensor, bool wanted,
                        const std::string& reward_head) {
  if (tensor.has_value() == wanted) return;
  fail(kDecodeStep, std::string(name) + (wanted ? " must be given" : " must be None") +
                        " with reward_head " + reward_head + ", got " +
                        (wanted ? "None" : "a tensor"));
}

// A full reward head: K matrices of the LM head's shape and dtype. Returns K.
inline int64_t check_full_head(DecodeArguments& a, ScalarType weight_dtype) {
  check_given("reward_weight", a.reward_weight, true, a.reward_head);
  check_given("reward_down", a.reward_down, false, a.reward_head);
  check_given("reward_up", a.reward_up, false, a.reward_head);
  const int64_t V = a.lm_weight.size(0);
  check_device(kDecodeStep, "reward_weight", *a.reward_weight, a.hidden);
  check_dtype(kDecodeStep, "reward_weight", *a.reward_weight, a.lm_weight.scalar_type());
  check_shape(kDecodeStep, "reward_weight", *a.reward_weight, {"K", V, a.lm_weight.size(1)});
  check_adjacent(kDecodeStep, "reward_weight", *a.reward_weight);
  const int64_t K = a.reward_weight->size(0);
  if (K < 1) {
    fail(kDecodeStep,
         "reward_weight must be (K, V, d) with K >= 1, got " + shape_text(*a.reward_weight));
  }
  check_small("reward_bias", a.reward_bias, a.hidden, weight_dtype, {K, V});
  return K;
}

// A correction: K objectives of rank r, or K biases alone. Returns K.
inline int64_t check_correction(DecodeArguments& a, RewardHead reward_head) {
  check_given("reward_weight", a.reward_weight, false, a.reward_head);
  check_given("reward_bias", a.reward_bias, true, a.reward_head);
  const Tensor& like = a.hidden;
  const ScalarType dtype = like.scalar_type();
  const int64_t d = like.size(1);
  const int64_t n = reward_head == RewardHead::kEmbedding ? d : a.lm_weight.size(0);
  check_small("reward_bias", a.reward_bias, like, dtype, {"K", n});
  const int64_t K = a.reward_bias->size(0);
  if (K < 1) {
    fail(kDecodeStep, "reward_bias must be (K, " + std::to_string(n) + ") with K >= 1, got " +
                          shape_text(*a.reward_bias));
  }
  if (a.reward_down.has_value() != a.reward_up.has_value()) {
    fail(kDecodeStep, a.reward_down ? "reward_up must be given with reward_down, got None"
                                    : "reward_down must be given with reward_up, got None");
  }
  if (!a.reward_down.has_value()) return K;
  check_small("reward_down", a.reward_down, like, dtype, {K, "r", d});
  const int64_t r = a.reward_down->size(1);
  if (r < 1) {
    fail(kDecodeStep,
         "reward_down must be (K, r, d) with r >= 1, got " + shape_text(*a.reward_down));
  }
  check_small("reward_up", a.reward_up, like, dtype, {K, n, r});
  return K;
}

inline int64_t objectives(const DecodeArguments& a) {
  return a.reward_weight.has_value() ? a.reward_weight->size(0) : a.reward_bias->size(0);
}

inline void check_heads(DecodeArguments& a) {
  const Tensor& like = a.hidden;
  const ScalarType stored = a.lm_weight.scalar_type();
  const Quantization quantization = quantization_of(a.lm_weight);
  const ScalarType weight_dtype =
      quantization == Quantization::kNone ? stored : a.hidden.scalar_type();
  check_shape(kDecodeStep, "lm_weight", a.lm_weight, {"V", "d"});
  const RewardHead reward_head = reward_head_of(a.reward_head);
  const int64_t V = a.lm_weight.size(0), columns = a.lm_weight.size(1);
  const int64_t d = quantization == Quantization::kInt4 ? 2 * columns : columns;
  if (quantization == Quantization::kInt4 && d % kInt4Group != 0) {
    fail(kDecodeStep, "lm_weight must be (V, d/2) with d a multiple of 128 for int4, got " +
                          shape_text(a.lm_weight));
  }
  if (V < 1 || d < 1 || V > std::numeric_limits<int32_t>::max()) {
    fail(kDecodeStep,
         "lm_weight must be (V, d) with 1 <= V < 2^31 and d >= 1, got " + shape_text(a.lm_weight));
  }
  check_shape(kDecodeStep, "hidden", a.hidden, {"B", d});
  check_dtype(kDecodeStep, "hidden", a.hidden, weight_dtype);
  check_device(kDecodeStep, "lm_weight", a.lm_weight, like);
  check_adjacent(kDecodeStep, "lm_weight", a.lm_weight);
  const int64_t B = a.hidden.size(0);
  const int64_t K = reward_head == RewardHead::kFull ? check_full_head(a, weight_dtype)
                                                     : check_correction(a, reward_head);
  if (d > 1 && a.hidden.stride(1) != 1) a.hidden = torch::stable::contiguous(a.hidden);
  check_small("lm_bias", a.lm_bias, like, weight_dtype, {V});
  check_small("objective_weights", a.objective_weights, like, ScalarType::Float, {B, K});
  check_scales(a, quantization, K, V, d);
}

// Either all parts of the attention gate are given, or gate_logit is given instead.
inline void check_gate(DecodeArguments& a) {
  const std::pair<const char*, const MaybeTensor*> parts[] = {
      {"q_weight", &a.q_weight},       {"k_weight", &a.k_weight},        {"u_weight", &a.u_weight},
      {"gate_bias", &a.gate_bias},     {"cache_k", &a.cache_k},          {"cache_u", &a.cache_u},
      {"cache_valid", &a.cache_valid}, {"cache_length", &a.cache_length}};
  const bool attention = !a.gate_logit.has_value();
  for (const auto& [name, part] : parts) {
    if (part->has_value() == attention) continue;
    fail(kDecodeStep, attention
                          ? std::string(name) +
                                " must be given, got None (the attention "
                                "gate needs it; gate_logit replaces it)"
                          : std::string(name) + " must be None beside gate_logit, got a tensor");
  }
  const Tensor& like = a.hidden;
  const ScalarType weight_dtype = a.hidden.scalar_type();
  const int64_t B = a.hidden.size(0), d = a.hidden.size(1);
  check_small("gate_logit", a.gate_logit, like, ScalarType::Float, {B});
  if (!attention) {
    if (a.new_valid.has_value()) {
      fail(kDecodeStep, "new_valid must be None beside gate_logit, got a tensor");
    }
    return;
  }
  check_shape(kDecodeStep, "cache_k", *a.cache_k, {B, "H", "S", "d_k"});
  const int64_t H = a.cache_k->size(1), S = a.cache_k->size(2), d_k = a.cache_k->size(3);
  if (H < 1 || d_k < 1 || S > std::numeric_limits<int32_t>::max()) {
    fail(kDecodeStep, "cache_k must be (B, H, S, d_k) with H >= 1, d_k >= 1 and S < 2^31, got " +
                          shape_text(*a.cache_k));
  }
  check_small("q_weight", a.q_weight, like, weight_dtype, {H * d_k, d});
  check_small("k_weight", a.k_weight, like, weight_dtype, {H * d_k, d});
  check_small("u_weight", a.u_weight, like, ScalarType::Float, {H, d});
  check_small("gate_bias", a.gate_bias, like, ScalarType::Float, {1});
  check_in_place("cache_k", a.cache_k, like, weight_dtype, {B, H, S, d_k});
  check_in_place("cache_u", a.cache_u, like, ScalarType::Float, {B, H, S});
  check_in_place("cache_valid", a.cache_valid, like, ScalarType::Bool, {B, S});
  check_in_place("cache_length", a.cache_length, like, ScalarType::Int, {B});
  check_small("new_valid", a.new_valid, like, ScalarType::Bool, {B});
}

inline void check_controls(DecodeArguments& a) {
  const Tensor& like = a.hidden;
  const int64_t B = a.hidden.size(0);
  check_small("gate_offset", a.gate_offset, like, ScalarType::Float, {B});
  check_small("strength", a.strength, like, ScalarType::Float, {B});
  check_small("alpha", a.alpha, like, ScalarType::Float, {B});
  check_small("skip_threshold", a.skip_threshold, like, ScalarType::Float, {B});
  check_small("temperature", a.temperature, like, ScalarType::Float, {B});
  check_small("top_k", a.top_k, like, ScalarType::Int, {B});
  check_small("top_p", a.top_p, like, ScalarType::Float, {B});
  check_small("min_p", a.min_p, like, ScalarType::Float, {B});
  check_small("seeds", a.seeds, like, ScalarType::Long, {B});
  if (a.seeds.has_value() != a.draws.has_value()) {
    fail(kDecodeStep, a.draws ? "seeds must be given with draws, got None"
                              : "draws must be given with seeds, got None");
  }
  if (a.draws.has_value()) check_in_place("draws", a.draws, like, ScalarType::Long, {B});
  if (!(a.logit_softcap >= 0.0) || a.logit_softcap > std::numeric_limits<float>::max()) {
    fail(kDecodeStep,
         "logit_softcap must be finite and >= 0, got " + std::to_string(a.logit_softcap));
  }
  if (!(a.logit_scale >= -std::numeric_limits<float>::max() &&
        a.logit_scale <= std::numeric_limits<float>::max())) {
    fail(kDecodeStep, "logit_scale must be finite, got " + std::to_string(a.logit_scale));
  }
}

// --- binding -------------------------------------------------------------------------------------

// The checked arguments, the new outputs, and the params that point into both.
struct BoundDecode {
  DecodeArguments arguments;
  Tensor logits;  // scratch for the kernel even if the caller does not want it
  DecodeResult result;
  DecodeParams params;
};

inline DType kernel_dtype(ScalarType dtype) {
  return dtype == ScalarType::Float      ? DType::kFloat32
         : dtype == ScalarType::BFloat16 ? DType::kBFloat16
                                         : DType::kFloat16;
}

inline void allocate_outputs(BoundDecode& bound) {
  const DecodeArguments& a = bound.arguments;
  const Tensor& like = a.hidden;
  const int64_t B = like.size(0), V = a.lm_weight.size(0);
  const ScalarType f32 = ScalarType::Float;
  bound.logits = allocate<2>({B, V}, f32, like);
  const bool record = a.record_attention && a.cache_k.has_value();
  bound.result = DecodeResult(
      a.return_logits ? bound.logits : allocate<1>({0}, f32, like), allocate<1>({B}, f32, like),
      allocate<1>({B}, f32, like), allocate<1>({B}, ScalarType::Long, like),
      allocate<1>({B}, f32, like), allocate<1>({B}, ScalarType::Int, like),
      record ? allocate<3>({B, a.cache_k->size(1), a.cache_k->size(2)}, f32, like)
             : allocate<1>({0}, f32, like));
}

template <typename T>
void fill(T*& field, const Tensor& tensor) {
  field = pointer<T>(tensor);
}

template <typename T>
void fill(T*& field, const MaybeTensor& tensor) {
  field = pointer<T>(tensor);
}

inline void fill(RewardHead& field, const std::string& name) { field = reward_head_of(name); }
inline void fill(bool& field, bool value) { field = value; }
inline void fill(float& field, double value) { field = static_cast<float>(value); }

inline void fill_params(BoundDecode& bound) {
  const DecodeArguments& a = bound.arguments;
  DecodeParams& p = bound.params;
  p = DecodeParams{};
  p.B = a.hidden.size(0), p.d = a.hidden.size(1), p.V = a.lm_weight.size(0);
  p.K = objectives(a), p.r = a.reward_down.has_value() ? a.reward_down->size(1) : 0;
  p.dtype = kernel_dtype(a.hidden.scalar_type());
  p.quantization = quantization_of(a.lm_weight);
  if (a.cache_k.has_value()) {
    p.H = a.cache_k->size(1), p.S = a.cache_k->size(2), p.d_k = a.cache_k->size(3);
  }
  fill(p.hidden, a.hidden);
#define DUALHEAD_FILL(type, schema, name) fill(p.name, a.name);
  DUALHEAD_DECODE_PARAMS(DUALHEAD_FILL)
#undef DUALHEAD_FILL
  p.hidden_stride = a.hidden.stride(0), p.lm_weight_stride = a.lm_weight.stride(0);
  if (a.reward_weight.has_value()) {
    p.reward_weight_stride_k = a.reward_weight->stride(0);
    p.reward_weight_stride = a.reward_weight->stride(1);
  }
  p.out_logits = pointer<float>(bound.logits);
  const auto& [logits, alpha, gate_logit, token, logprob, status, attention] = bound.result;
  p.out_alpha = pointer<float>(alpha), p.out_gate_logit = pointer<float>(gate_logit);
  p.out_token = pointer<int64_t>(token), p.out_logprob = pointer<float>(logprob);
  p.out_status = pointer<int32_t>(status);
  p.out_attention = attention.dim() == 3 ? pointer<float>(attention) : nullptr;
}

// `dtypes`: those that the device's kernel supports. With quantised weights they apply to `hidden`.
inline BoundDecode bind_decode_step(DecodeArguments&& arguments,
                                    std::initializer_list<ScalarType> dtypes) {
  BoundDecode bound{std::move(arguments), Tensor(), {}, {}};
  const bool formats = quantization_of(bound.arguments.lm_weight) != Quantization::kNone;
  const Tensor& told = formats ? bound.arguments.hidden : bound.arguments.lm_weight;
  bool known = false;
  std::string names;
  for (ScalarType dtype : dtypes) {
    known = known || told.scalar_type() == dtype;
    names += (names.empty() ? "" : " or ") + std::string(dtype_name(dtype));
  }
  if (!known) {
    fail(kDecodeStep, std::string(formats ? "hidden" : "lm_weight") + " must have dtype " + names +
                          ", got " + dtype_name(told.scalar_type()));
  }
  check_heads(bound.arguments);
  check_gate(bound.arguments);
  check_controls(bound.arguments);
  allocate_outputs(bound);
  fill_params(bound);
  return bound;
}

// The operator as the dispatcher calls it, for TORCH_BOX. `Implementation` runs it on one device.
#define DUALHEAD_PARAMETER(type, schema, name) , type name
#define DUALHEAD_MOVE(type, schema, name) , std::move(name)
template <DecodeResult (*Implementation)(DecodeArguments&&)>
DecodeResult decode_step_entry(Tensor hidden DUALHEAD_DECODE_ARGUMENTS(DUALHEAD_PARAMETER)) {
  return Implementation(
      DecodeArguments{std::move(hidden) DUALHEAD_DECODE_ARGUMENTS(DUALHEAD_MOVE)});
}
#undef DUALHEAD_MOVE
#undef DUALHEAD_PARAMETER

}  // namespace dualhead
