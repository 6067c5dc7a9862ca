// SPDX-License-Identifier: Apache-2.0
// The schemas of all operators. Implementations: ops_cpu.cpp, ops_cuda.cpp, ops_loss.cpp,
// ops_loss_cuda.cpp. Fake kernels and documentation: dualhead_ext/ops/. Meaning of the arguments,
// field by field: kernels/params.h.
#include <torch/csrc/stable/library.h>

#include "decode_arguments.h"

STABLE_TORCH_LIBRARY(dualhead, m) {
#define DUALHEAD_SCHEMA(type, schema, name) ", " schema " " #name
  m.def(
      "decode_step(Tensor hidden" DUALHEAD_DECODE_ARGUMENTS(DUALHEAD_SCHEMA)
      ") -> (Tensor logits, Tensor alpha, Tensor gate_logit, Tensor token, Tensor logprob, "
      "Tensor status, Tensor attention)");
#undef DUALHEAD_SCHEMA
  m.def(
      "loss_rows("
      "Tensor? z_lm, Tensor z_rm, Tensor gate_logit, Tensor labels, bool mixed, bool reward, "
      "bool mix_probs, float logit_scale, float logit_softcap"
      ") -> (Tensor mixed, Tensor reward, Tensor normalizers)");
  m.def(
      "loss_rows_backward_("
      "Tensor(a!)? z_lm, Tensor(b!) z_rm, Tensor gate_logit, Tensor labels, Tensor normalizers, "
      "Tensor? mixed, Tensor? mixed_grad, Tensor? reward_grad, bool write_lm, "
      "bool mix_probs, float logit_scale, float logit_softcap"
      ") -> Tensor gate_grad");
  // The instruction set in use, and all those that this build has and this machine runs: best
  // first, separated by commas.
  m.def("cpu_isa() -> str");
  m.def("cpu_isa_levels() -> str");
  // For tests: a name from cpu_isa_levels, or "" for the automatic choice.
  m.def("_force_cpu_isa(str isa) -> ()");
  // Whether this CPU multiplies bf16 matrices faster than fp32 ones.
  m.def("cpu_bf16_pays() -> bool");
}
