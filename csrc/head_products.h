// SPDX-License-Identifier: Apache-2.0
// The products of both heads as GEMMs of torch, with fp32 sums and results for every dtype of the
// weights. The CUDA decode step takes them for batches for which its own kernels would have to read
// the weights more than once (kernels/cuda/decode.h).
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>

#include "decode_binding.h"

namespace dualhead {

// out = hidden weight^T, fp32; hidden (B, d), weight (V, d), out (B, V).
inline void multiply_into(const Tensor& hidden, const Tensor& weight, const Tensor& out) {
  const Tensor transposed = torch::stable::transpose(weight, 0, 1);
  const auto call = [](const char* overload, auto stack) {
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::mm", overload, stack.data(), TORCH_ABI_VERSION));
    (void)torch::stable::detail::to<Tensor>(stack[0]);  // releases the second handle of `out`
  };
  using torch::stable::detail::from;
  if (weight.scalar_type() == ScalarType::Float) {
    call("out", std::array{from(hidden), from(transposed), from(out)});
  } else {
    // mm.out would round the sums to the operands' dtype.
    call("dtype_out",
         std::array{from(hidden), from(transposed), from(ScalarType::Float), from(out)});
  }
}

// Writes the LM head's product to lm (B, V) and objective k's to reward[k], with reward (K, B, V).
inline void head_products(const DecodeArguments& arguments, const Tensor& lm,
                          const Tensor& reward) {
  multiply_into(arguments.hidden, arguments.lm_weight, lm);
  for (int64_t k = 0; k < arguments.reward_weight->size(0); ++k) {
    multiply_into(arguments.hidden, torch::stable::select(*arguments.reward_weight, 0, k),
                  torch::stable::select(reward, 0, k));
  }
}

}  // namespace dualhead
