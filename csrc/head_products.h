// SPDX-License-Identifier: Apache-2.0
// The products of both heads as GEMMs of torch, with fp32 sums and results for every dtype of the
// weights. What is multiplied is in the dtype of the weights: for a correction that includes M h +
// c or A h. The decode step takes the products for batches for which a GEMM is faster than its own
// kernels (kernels/cuda/decode.h, kernels/cpu/decode.h).
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

// The LM head's product (B, V) and those of the objectives (K, B, V): W_k h, or what a correction
// adds to the LM head's, without a bias that belongs to the vocabulary.
struct HeadProducts {
  Tensor lm, reward;
};

// D_k h in the dtype of the weights, (B, r).
inline Tensor inner_of(const DecodeArguments& a, int64_t k) {
  const Tensor down = torch::stable::select(*a.reward_down, 0, k);
  const Tensor inner = allocate<2>({a.hidden.size(0), down.size(0)}, ScalarType::Float, a.hidden);
  multiply_into(a.hidden, down, inner);
  return torch::stable::to(inner, a.hidden.scalar_type());
}

// An embedding head: one GEMM of the rows h and, for each objective, U_k D_k h + c_k.
inline HeadProducts embedding_products(const DecodeArguments& a) {
  const int64_t K = objectives(a), B = a.hidden.size(0), d = a.hidden.size(1);
  Tensor rows = allocate<3>({1 + K, B, d}, a.hidden.scalar_type(), a.hidden);
  const auto put = [&](int64_t i, const Tensor& values) {
    Tensor row = torch::stable::select(rows, 0, i);
    torch::stable::copy_(row, values);
  };
  put(0, a.hidden);
  for (int64_t k = 0; k < K; ++k) {
    const Tensor bias = torch::stable::select(*a.reward_bias, 0, k);
    if (!a.reward_up) {
      put(1 + k, bias);
      continue;
    }
    const Tensor moved = allocate<2>({B, d}, ScalarType::Float, a.hidden);
    multiply_into(inner_of(a, k), torch::stable::select(*a.reward_up, 0, k), moved);
    put(1 + k, torch::stable::subtract(moved, bias, -1.0));  // moved + bias
  }
  const int64_t V = a.lm_weight.size(0);
  Tensor products = allocate<3>({1 + K, B, V}, ScalarType::Float, a.hidden);
  multiply_into(torch::stable::view(rows, {(1 + K) * B, d}), a.lm_weight,
                torch::stable::view(products, {(1 + K) * B, V}));
  return {torch::stable::select(products, 0, 0), torch::stable::narrow(products, 0, 1, K)};
}

// logits: (B, V), fp32; may become the LM head's product.
inline HeadProducts head_products(const DecodeArguments& a, const Tensor& logits) {
  const RewardHead kind = reward_head_of(a.reward_head);
  if (kind == RewardHead::kEmbedding) return embedding_products(a);
  const bool full = kind == RewardHead::kFull;
  const int64_t K = objectives(a);
  const HeadProducts products{
      logits, allocate<3>({K, a.hidden.size(0), a.lm_weight.size(0)}, ScalarType::Float, a.hidden)};
  multiply_into(a.hidden, a.lm_weight, products.lm);
  for (int64_t k = 0; k < K; ++k) {
    Tensor product = torch::stable::select(products.reward, 0, k);
    if (full) {
      multiply_into(a.hidden, torch::stable::select(*a.reward_weight, 0, k), product);
    } else if (a.reward_up) {
      multiply_into(inner_of(a, k), torch::stable::select(*a.reward_up, 0, k), product);
    } else {
      torch::stable::fill_(product, 0.0);
    }
  }
  return products;
}

}  // namespace dualhead
