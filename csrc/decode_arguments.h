// SPDX-License-Identifier: Apache-2.0
// The arguments of the operator dualhead::decode_step, listed once for the schema, the binding and
// the test module. Each is named after the field of DecodeParams that it fills. Shapes and meaning:
// kernels/params.h.
#pragma once

// X(type in C++, type in the schema, name), in order, after the first argument, `Tensor hidden`.
#define DUALHEAD_DECODE_PARAMS(X)              \
  X(Tensor, "Tensor", lm_weight)               \
  X(MaybeTensor, "Tensor?", lm_bias)           \
  X(MaybeTensor, "Tensor?", lm_scale)          \
  X(std::string, "str", reward_head)           \
  X(MaybeTensor, "Tensor?", reward_weight)     \
  X(MaybeTensor, "Tensor?", reward_down)       \
  X(MaybeTensor, "Tensor?", reward_up)         \
  X(MaybeTensor, "Tensor?", reward_bias)       \
  X(MaybeTensor, "Tensor?", reward_scale)      \
  X(MaybeTensor, "Tensor?", objective_weights) \
  X(MaybeTensor, "Tensor?", q_weight)          \
  X(MaybeTensor, "Tensor?", k_weight)          \
  X(MaybeTensor, "Tensor?", u_weight)          \
  X(MaybeTensor, "Tensor?", gate_bias)         \
  X(MaybeTensor, "Tensor(a!)?", cache_k)       \
  X(MaybeTensor, "Tensor(b!)?", cache_u)       \
  X(MaybeTensor, "Tensor(c!)?", cache_valid)   \
  X(MaybeTensor, "Tensor(d!)?", cache_length)  \
  X(MaybeTensor, "Tensor?", new_valid)         \
  X(MaybeTensor, "Tensor?", gate_logit)        \
  X(MaybeTensor, "Tensor?", gate_offset)       \
  X(MaybeTensor, "Tensor?", strength)          \
  X(MaybeTensor, "Tensor?", alpha)             \
  X(MaybeTensor, "Tensor?", skip_threshold)    \
  X(MaybeTensor, "Tensor?", temperature)       \
  X(MaybeTensor, "Tensor?", top_k)             \
  X(MaybeTensor, "Tensor?", top_p)             \
  X(MaybeTensor, "Tensor?", min_p)             \
  X(MaybeTensor, "Tensor?", seeds)             \
  X(MaybeTensor, "Tensor(e!)?", draws)         \
  X(bool, "bool", mix_probs)                   \
  X(double, "float", logit_scale)              \
  X(double, "float", logit_softcap)

// Which outputs are wanted. DecodeParams has no such fields: there a null pointer means "not
// wanted".
#define DUALHEAD_DECODE_OUTPUT_FLAGS(X) \
  X(bool, "bool", return_logits)        \
  X(bool, "bool", record_attention)

#define DUALHEAD_DECODE_ARGUMENTS(X) \
  DUALHEAD_DECODE_PARAMS(X)          \
  DUALHEAD_DECODE_OUTPUT_FLAGS(X)
