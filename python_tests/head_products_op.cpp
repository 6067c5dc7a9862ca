// SPDX-License-Identifier: Apache-2.0
// csrc/head_products.h as an operator for any device, built by test_head_products.py.
#include <torch/csrc/stable/library.h>

#include "head_products.h"

namespace {

void head_products(dualhead::Tensor hidden, dualhead::Tensor lm_weight,
                   dualhead::Tensor reward_weight, dualhead::Tensor lm, dualhead::Tensor reward) {
  dualhead::DecodeArguments arguments{};
  arguments.hidden = hidden, arguments.lm_weight = lm_weight;
  arguments.reward_weight = reward_weight;
  dualhead::head_products(arguments, lm, reward);
}

}  // namespace

STABLE_TORCH_LIBRARY(dualhead_test, m) {
  m.def(
      "head_products(Tensor hidden, Tensor lm_weight, Tensor reward_weight, Tensor(a!) lm, "
      "Tensor(b!) reward) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dualhead_test, CompositeExplicitAutograd, m) {
  m.impl("head_products", TORCH_BOX(&head_products));
}
