// SPDX-License-Identifier: Apache-2.0
// The part of the training loss's operators that all devices share: check, allocate, fill in
// pointers. Each device supplies the two kernels: void(const LossRowsParams&, const Tensor& like).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "decode_binding.h"

namespace dualhead {

inline void check_rows_tensor(const char* op, const char* name, const Tensor& tensor,
                              ScalarType dtype, const Tensor& like) {
  check_dtype(op, name, tensor, dtype);
  check_device(op, name, tensor, like, "z_rm");
  check_contiguous(op, name, tensor);
}

inline void check_rows_vector(const char* op, const char* name, const Tensor& tensor,
                              ScalarType dtype, const Tensor& like) {
  check_shape(op, name, tensor, {like.size(0)});
  check_rows_tensor(op, name, tensor, dtype, like);
}

// The arguments that both operators take. The caller checks the values of the labels.
inline LossRowsParams bind_loss_rows(const char* op, const MaybeTensor& z_lm, const Tensor& z_rm,
                                     const Tensor& gate_logit, const Tensor& labels, bool mix_probs,
                                     double logit_scale, double logit_softcap) {
  check_shape(op, "z_rm", z_rm, {"n", "V"});
  check_rows_tensor(op, "z_rm", z_rm, ScalarType::Float, z_rm);
  LossRowsParams p{};
  p.n = z_rm.size(0);
  p.V = z_rm.size(1);
  if (z_lm) {
    check_shape(op, "z_lm", *z_lm, {p.n, p.V});
    check_rows_tensor(op, "z_lm", *z_lm, ScalarType::Float, z_rm);
    p.z_lm = static_cast<float*>(z_lm->data_ptr());
  }
  check_rows_vector(op, "gate_logit", gate_logit, ScalarType::Float, z_rm);
  check_rows_vector(op, "labels", labels, ScalarType::Long, z_rm);
  p.z_rm = static_cast<float*>(z_rm.data_ptr());
  p.gate_logit = static_cast<const float*>(gate_logit.data_ptr());
  p.labels = static_cast<const int64_t*>(labels.data_ptr());
  p.mix_probs = mix_probs;
  p.logit_scale = static_cast<float>(logit_scale);
  p.logit_softcap = static_cast<float>(logit_softcap);
  return p;
}

// (mixed, reward, normalizers): (n,) each, or (0,) where not asked for; normalizers (2, n) float64.
template <void (*kKernel)(const LossRowsParams&, const Tensor&)>
std::tuple<Tensor, Tensor, Tensor> loss_rows(MaybeTensor z_lm, Tensor z_rm, Tensor gate_logit,
                                             Tensor labels, bool mixed, bool reward, bool mix_probs,
                                             double logit_scale, double logit_softcap) {
  constexpr const char* kOp = "loss_rows";
  LossRowsParams p =
      bind_loss_rows(kOp, z_lm, z_rm, gate_logit, labels, mix_probs, logit_scale, logit_softcap);
  if (mixed && !z_lm) fail(kOp, "z_lm must be given where mixed is asked for, got None");
  const Tensor of_mixture = allocate<1>({mixed ? p.n : 0}, ScalarType::Float, z_rm);
  const Tensor of_reward = allocate<1>({reward ? p.n : 0}, ScalarType::Float, z_rm);
  const Tensor normalizers = allocate<2>({2, p.n}, ScalarType::Double, z_rm);
  if (mixed) p.mixed = static_cast<float*>(of_mixture.data_ptr());
  if (reward) p.reward = static_cast<float*>(of_reward.data_ptr());
  p.mixed_normalizer = static_cast<double*>(normalizers.data_ptr());
  p.rm_normalizer = p.mixed_normalizer + p.n;
  kKernel(p, z_rm);
  return {of_mixture, of_reward, normalizers};
}

template <void (*kKernel)(const LossRowsParams&, const Tensor&)>
Tensor loss_rows_backward(MaybeTensor z_lm, Tensor z_rm, Tensor gate_logit, Tensor labels,
                          Tensor normalizers, MaybeTensor mixed, MaybeTensor mixed_grad,
                          MaybeTensor reward_grad, bool write_lm, bool mix_probs,
                          double logit_scale, double logit_softcap) {
  constexpr const char* kOp = "loss_rows_backward_";
  LossRowsParams p =
      bind_loss_rows(kOp, z_lm, z_rm, gate_logit, labels, mix_probs, logit_scale, logit_softcap);
  check_shape(kOp, "normalizers", normalizers, {2, p.n});
  check_rows_tensor(kOp, "normalizers", normalizers, ScalarType::Double, z_rm);
  if (mixed.has_value() != mixed_grad.has_value()) {
    fail(kOp, "mixed and mixed_grad must be given together, got one of them");
  }
  if (mixed && !z_lm) fail(kOp, "z_lm must be given with mixed, got None");
  p.mixed_normalizer = static_cast<double*>(normalizers.data_ptr());
  p.rm_normalizer = p.mixed_normalizer + p.n;
  if (mixed) {
    check_rows_vector(kOp, "mixed", *mixed, ScalarType::Float, z_rm);
    check_rows_vector(kOp, "mixed_grad", *mixed_grad, ScalarType::Float, z_rm);
    p.mixed = static_cast<float*>(mixed->data_ptr());
    p.mixed_grad = static_cast<const float*>(mixed_grad->data_ptr());
  }
  if (reward_grad) {
    check_rows_vector(kOp, "reward_grad", *reward_grad, ScalarType::Float, z_rm);
    p.reward_grad = static_cast<const float*>(reward_grad->data_ptr());
  }
  p.write_lm = write_lm && mixed;
  const Tensor gate_grad = allocate<1>({mixed ? p.n : 0}, ScalarType::Float, z_rm);
  if (mixed) p.gate_grad = static_cast<float*>(gate_grad.data_ptr());
  kKernel(p, z_rm);
  return gate_grad;
}

}  // namespace dualhead
