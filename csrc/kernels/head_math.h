// SPDX-License-Identifier: Apache-2.0
// The scalar maths of the two heads, shared by host and device: alpha from the gate's logit and the
// controls of its request, and f, the backbone's post-processing of logits. The reference is
// reference.mixing_weight and reference.postprocess.
#pragma once

#include <cmath>

#include "params.h"
#include "sampling.h"  // DUALHEAD_HD

namespace dualhead {

// alpha of row b before skip_threshold.
DUALHEAD_HD float controlled_weight(const DecodeParams& p, int64_t b, float gate_logit) {
  const float a = p.alpha ? p.alpha[b]
                          : static_cast<float>(1.0 / (1.0 + exp(-static_cast<double>(gate_logit))));
  if (!p.strength) return a;
  if (p.strength[b] == 0.0f) return 0.0f;  // even if alpha is NaN
  const float scaled = p.strength[b] * a;
  // The weight between two distributions must lie in [0, 1]. Logits may be pushed beyond the reward
  // head's.
  if (p.mix_probs && scaled > 1.0f) return 1.0f;
  return scaled < 0.0f ? 0.0f : scaled;  // NaN passes through
}

// alpha of row b.
DUALHEAD_HD float mixing_weight(const DecodeParams& p, int64_t b, float gate_logit) {
  const float a = controlled_weight(p, b, gate_logit);
  if (!p.skip_threshold) return a;
  const float threshold = p.skip_threshold[b];
  return a < threshold ? 0.0f : fabsf(1.0f - a) < threshold ? 1.0f : a;
}

// f(z) = cap(scale * z), cap(z) = softcap * tanh(z / softcap); softcap 0 = no cap.
DUALHEAD_HD float postprocess(float logit_scale, float logit_softcap, float z) {
  z *= logit_scale;
  return logit_softcap > 0.0f ? logit_softcap * tanhf(z / logit_softcap) : z;
}

// f'(z), from y = f(z).
DUALHEAD_HD float postprocess_slope(float logit_scale, float logit_softcap, float y) {
  if (logit_softcap <= 0.0f) return logit_scale;
  const float t = y / logit_softcap;
  return (1.0f - t * t) * logit_scale;
}

}  // namespace dualhead
