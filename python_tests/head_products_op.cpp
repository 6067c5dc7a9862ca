// SPDX-License-Identifier: Apache-2.0
// csrc/head_products.h as an operator for any device, built by test_head_products.py.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "head_products.h"

namespace {

std::tuple<dualhead::Tensor, dualhead::Tensor> head_products(
    std::string reward_head, dualhead::Tensor hidden, dualhead::Tensor lm_weight,
    dualhead::MaybeTensor reward_weight, dualhead::MaybeTensor reward_down,
    dualhead::MaybeTensor reward_up, dualhead::MaybeTensor reward_bias, dualhead::Tensor logits) {
  dualhead::DecodeArguments arguments{};
  arguments.hidden = hidden, arguments.lm_weight = lm_weight;
  arguments.reward_weight = reward_weight, arguments.reward_down = reward_down;
  arguments.reward_up = reward_up, arguments.reward_bias = reward_bias;
  arguments.reward_head = reward_head;
  const auto products = dualhead::head_products(arguments, logits);
  return {products.lm, products.reward};
}

}  // namespace

STABLE_TORCH_LIBRARY(dualhead_test, m) {
  m.def(
      "head_products(str reward_head, Tensor hidden, Tensor lm_weight, Tensor? reward_weight, "
      "Tensor? reward_down, Tensor? reward_up, Tensor? reward_bias, Tensor(a!) logits)"
      " -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dualhead_test, CompositeExplicitAutograd, m) {
  m.impl("head_products", TORCH_BOX(&head_products));
}
