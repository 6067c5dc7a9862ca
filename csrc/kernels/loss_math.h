// SPDX-License-Identifier: Apache-2.0
// The scalar maths of one row of the training loss, shared by host and device. The passes over the
// row's logits are elsewhere. Formulas: dualhead_ext/loss/rows.py.
#pragma once

#include <cmath>

#include "sampling.h"

namespace dualhead {

// The weights of the two heads in a row's mixture. A weight of exactly 0 selects the other head.
struct LossShares {
  float lm, rm;
  DUALHEAD_HD bool selects() const { return lm == 0.0f || rm == 0.0f; }
};

DUALHEAD_HD LossShares loss_shares(float gate_logit) {
  const double l = static_cast<double>(gate_logit);
  return {static_cast<float>(1.0 / (1.0 + exp(l))), static_cast<float>(1.0 / (1.0 + exp(-l)))};
}

// log((1 - s) e^lm + s e^rm) with s = sigmoid(l). Computes log s and log(1 - s) from l, because a
// saturated s has lost them.
DUALHEAD_HD double mixed_log_prob(float gate_logit, LossShares shares, double lm, double rm) {
  if (shares.rm == 0.0f) return lm;
  if (shares.lm == 0.0f) return rm;
  const double l = static_cast<double>(gate_logit);
  const double soft = log1p(exp(-fabs(l)));
  const double a = lm + (l > 0 ? -l - soft : -soft), b = rm + (l > 0 ? -soft : l - soft);
  const double high = a > b ? a : b, low = a > b ? b : a;
  return high + log1p(exp(low - high));
}

// Gradients of the probability mix: c (1 - q), c q, and that of the gate logit. c is the upstream
// gradient of log P_y and q the posterior of the reward head.
struct MixedGradient {
  float to_lm, to_rm, gate;
};

// of_lm, of_rm: the label's log-probability under each head.
DUALHEAD_HD MixedGradient mixed_gradient(float gate_logit, LossShares shares, double of_lm,
                                         double of_rm, float upstream) {
  // There are two equivalent formulas. The one through the head with the smaller share does not
  // cancel when the shares saturate.
  const bool high = gate_logit > 0.0f;
  const double mixed = mixed_log_prob(gate_logit, shares, of_lm, of_rm);
  const double ratio = exp((high ? of_lm : of_rm) - mixed);
  const double share = static_cast<double>(high ? shares.lm : shares.rm);
  const double part = share == 0.0 ? 0.0 : share * ratio, c = static_cast<double>(upstream);
  const double through = high ? share * (1.0 - ratio) : share * (ratio - 1.0);
  return {static_cast<float>(c * (high ? part : 1.0 - part)),
          static_cast<float>(c * (high ? 1.0 - part : part)),
          shares.selects() ? 0.0f : static_cast<float>(c * through)};
}

// A log-sum-exp as the sum of two floats, so that its difference to a nearby logit stays exact.
struct SplitNormalizer {
  float high, low;
};

DUALHEAD_HD SplitNormalizer split_normalizer(double total) {
  const float high = static_cast<float>(total);
  return {high, static_cast<float>(total - static_cast<double>(high))};
}

}  // namespace dualhead
