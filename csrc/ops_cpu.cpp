// SPDX-License-Identifier: Apache-2.0
// The operators on the CPU: check, allocate, run on torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>

#include "decode_binding.h"
#include "head_products.h"
#include "kernels/cpu/decode.h"
#include "kernels/cpu/isa.h"

namespace dualhead {
namespace {

// Uses torch's own pool, so that its thread count and its rule against nested parallelism apply
// here too.
void torch_parallel(int64_t count, int64_t grain, cpu::RangeFunction body, void* context) {
  torch::stable::parallel_for(0, count, grain,
                              [=](int64_t begin, int64_t end) { body(begin, end, context); });
}

DecodeResult decode_step_cpu(DecodeArguments&& arguments) {
  const cpu::Kernels& kernels = cpu::chosen_kernels();
  BoundDecode bound =
      bind_decode_step(std::move(arguments), {ScalarType::Float, ScalarType::BFloat16});
  DecodeParams& params = bound.params;
  HeadProducts products;  // must live until the step ends
  if (cpu::wants_products(params, kernels)) {
    products = head_products(bound.arguments, bound.logits);
    params.lm_product = pointer<const float>(products.lm);
    params.reward_product = pointer<const float>(products.reward);
  }
  const Tensor workspace =
      allocate<1>({cpu::workspace_bytes(params)}, ScalarType::Byte, bound.arguments.hidden);
  cpu::decode_step(params, kernels, workspace.data_ptr(), &torch_parallel);
  return std::move(bound.result);
}

std::string cpu_isa() { return cpu::chosen_kernels().name; }

std::string cpu_isa_levels() { return cpu::available_levels(); }

bool cpu_bf16_pays() { return cpu::bf16_pays(); }

void force_cpu_isa(std::string name) { cpu::force_kernels(name.c_str()); }

}  // namespace
}  // namespace dualhead

STABLE_TORCH_LIBRARY_IMPL(dualhead, CPU, m) {
  m.impl("decode_step", TORCH_BOX(&dualhead::decode_step_entry<dualhead::decode_step_cpu>));
}

STABLE_TORCH_LIBRARY_IMPL(dualhead, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&dualhead::cpu_isa));
  m.impl("cpu_isa_levels", TORCH_BOX(&dualhead::cpu_isa_levels));
  m.impl("cpu_bf16_pays", TORCH_BOX(&dualhead::cpu_bf16_pays));
  m.impl("_force_cpu_isa", TORCH_BOX(&dualhead::force_cpu_isa));
}
