// SPDX-License-Identifier: Apache-2.0
// Both heads' products as GEMMs of torch, fp32 sums and results whatever the weights' dtype: what
// the CUDA decode step is given for batches that its kernels would read the weights for more than
// once (kernels/cuda/decode.h).
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>

#include "decode_binding.h"

namespace dualhead {

// out = hidden weight^T, fp32; hidden (B, d), weight (V, d), out (B, V).
inline void multiply_into(const Tensor& hidden, const Tensor& weight, const Tensor& out) {
  const Tensor transposed = torch::stable::transpose(weight, 0, 1);
  const auto call = [](const char* overload, auto stack) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::mm", overload, stack.data(), TORCH_ABI_VERSION));
    (void)torch::stable::detail::to<Tensor>(stack[0]);  // `out` once more: takes its reference
  };
  using torch::stable::detail::from;
  if (weight.scalar_type() == ScalarType::Float) {
    call("out", std::array{from(hidden), from(transposed), from(out)});
  } else {
    // mm.out would round its sums to the operands' dtype.
    call("dtype_out",
         std::array{from(hidden), from(transposed), from(ScalarType::Float), from(out)});
  }
}

// The LM head's product into lm (B, V), objective k's into reward[k], reward (K, B, V).
inline void head_products(const DecodeArguments& arguments, const Tensor& lm,
                          const Tensor& reward) {
  multiply_into(arguments.hidden, arguments.lm_weight, lm);
  for (int64_t k = 0; k < arguments.reward_weight->size(0); ++k) {
    multiply_into(arguments.hidden, torch::stable::select(*arguments.reward_weight, 0, k),
                  torch::stable::select(reward, 0, k));
  }
}

}  // namespace dualhead
