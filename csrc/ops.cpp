// SPDX-License-Identifier: Apache-2.0
// Every operator schema, once. Implementations: ops_cpu.cpp, ops_cuda.cpp, ops_loss.cpp,
// ops_loss_cuda.cpp; fakes and the text of the documentation: ops.py; the arguments'
// meaning, field by field: kernels/params.h.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(dualhead, m) {
  m.def(
      "decode_step("
      "Tensor hidden, Tensor lm_weight, Tensor? lm_bias, Tensor reward_weight, "
      "Tensor? reward_bias, Tensor? objective_weights, "
      "Tensor? q_weight, Tensor? k_weight, Tensor? u_weight, Tensor? gate_bias, "
      "Tensor(a!)? cache_k, Tensor(b!)? cache_u, Tensor(c!)? cache_valid, "
      "Tensor(d!)? cache_length, Tensor? new_valid, "
      "Tensor? gate_logit, Tensor? gate_offset, Tensor? strength, Tensor? alpha, "
      "Tensor? temperature, Tensor? top_k, Tensor? top_p, Tensor? min_p, "
      "Tensor? seeds, Tensor(e!)? draws, "
      "bool mix_probs, float logit_scale, float logit_softcap, "
      "bool return_logits, bool record_attention, "
      "Tensor? lm_scale=None, Tensor? reward_scale=None, Tensor? skip_threshold=None"
      ") -> (Tensor logits, Tensor alpha, Tensor gate_logit, Tensor token, Tensor logprob, "
      "Tensor status, Tensor attention)");
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
  // The instruction set in use, and all that this build has and this machine runs, best first,
  // separated by commas.
  m.def("cpu_isa() -> str");
  m.def("cpu_isa_levels() -> str");
  // For tests: a name from cpu_isa_levels, or "" for the automatic choice.
  m.def("_force_cpu_isa(str isa) -> ()");
  // Whether this CPU multiplies bf16 matrices faster than fp32 ones.
  m.def("cpu_bf16_pays() -> bool");
}
