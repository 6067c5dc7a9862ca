# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding of a gated model by the paper's formulas, with a full pass for each token."""

import slow_decoding
import torch

from dualhead_ext import reference

NEW = slow_decoding.NEW


def hidden_states(model, ids):
    """The inputs of the backbone's lm_head, from its decoder alone."""
    with torch.no_grad():
        return model.get_decoder()(input_ids=ids, use_cache=False)[0]


def reference_logits(model, ids, strength=None):
    """The paper's formulas over a whole sequence: (1, T, V), after the backbone's own f."""
    head, config = model.lm_head_module, model.dual_head_config
    hidden, gate = hidden_states(model, ids), head.gate
    projections = (getattr(gate, f"{name}_weight") for name in "qkvo")
    logit = reference.attention_gate_logit(
        hidden, *projections, gate.out_weight, gate.out_bias, gate.num_heads
    )
    alpha = reference.mixing_weight(
        logit, None, None if strength is None else torch.tensor(strength)
    )
    z_lm = reference.head_logits(hidden, head.lm_weight, head.lm_bias)
    z_rm = reference.reward_logits(hidden, head.reward_head.weight, head.reward_head.bias, None)
    return reference.mix_logits(
        z_lm, z_rm, alpha, config.mix, config.logit_scale, config.logit_softcap
    ), alpha


@torch.no_grad()
def slow_batch(model, batch, strength=None):
    """Greedy text of each row alone, without padding and without a cache: (B, NEW)."""
    return slow_decoding.slow_batch(
        batch, lambda ids: reference_logits(model, ids, strength)[0][:, -1]
    )
