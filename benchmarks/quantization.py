# SPDX-License-Identifier: Apache-2.0
"""The accuracy of the quantised formats:

    dualhead train --eval-share 0 --output HEADS --learning-rate 1e-3 \\
        --set per_device_train_batch_size=16 --set gradient_accumulation_steps=1 \\
        --set warmup_steps=0.1 --set lm_reduction=mean --set max_length=256
    python benchmarks/quantization.py FILE --heads HEADS

Compares tokens and mixtures of quantised heads with bf16, at the embedded backbone's hidden states
on its test pairs, with and without calibration on its training pairs. Writes one JSON object, which
docs/quantization.md quotes. `dualhead bench` measures the time of a step.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
from pathlib import Path

import torch
from transformers import AutoTokenizer

from dualhead_ext import DualHead, DualHeadForCausalLM, detach
from dualhead_ext.data import embedded_backbone_path, load_preference_data
from dualhead_ext.measurement.machine import describe
from dualhead_ext.quantization import FORMATS, quantize

BF16 = torch.bfloat16
TEST_PAIRS, CALIBRATION_PAIRS, TOKENS = 100, 60, 256


@torch.no_grad()
def hidden_states(model, tokenizer, split: str, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states (N, d) of pairs' prompts and chosen responses.

    Also returns alpha (N,), if the model has a gate.
    """
    states, alphas = [], []
    model.lm_head.register_forward_hook(lambda module, x, out: states.append(x[0][0]))
    for pair in itertools.islice(load_preference_data("embedded", split), pairs):
        ids = tokenizer(pair["prompt"] + pair["chosen"], return_tensors="pt").input_ids[:, :TOKENS]
        model(ids)
        alphas.append(model.lm_head.last_alpha[0])
    model.lm_head._forward_hooks.clear()
    return torch.cat(states), torch.cat(alphas)


def quantized(heads: DualHead, name: str, calibration: str, states: torch.Tensor) -> DualHead:
    """A quantised copy of the heads.

    calibration: "nearest" rounds to nearest, "default" calls `quantize` without hidden states, and
    "states" calibrates on ``states`` (N, d).
    """
    copied = copy.deepcopy(heads)
    if calibration != "nearest":
        return copied.quantize(name, states if calibration == "states" else None)
    lm, reward = (quantize(w, name) for w in (heads.lm_weight, heads.reward_head.weight))
    copied.hold_quantized(lm, reward, heads.reward_head.bias, heads.hidden_dtype)
    return copied


@torch.no_grad()
def agreement(
    heads: DualHead, hidden: torch.Tensor, alpha: torch.Tensor, states: torch.Tensor | None
) -> list[dict]:
    """How far quantised heads agree with bf16 ones, at hidden states (N, d) and alpha (N,).

    Returns the share of equal greedy tokens and KL(bf16 || quantised) in nats per token. The
    quantised heads are calibrated on ``states``, which are other hidden states.
    """
    # "eager" rounds logits to bf16. "fused" sums the same weights in fp32, as the kernel does.
    wide = copy.deepcopy(heads).float()(hidden[:, None].float(), alpha=alpha)
    bases = {
        name: torch.log_softmax(out.logits[:, 0], -1)
        for name, out in (("eager", heads(hidden[:, None], alpha=alpha)), ("fused", wide))
    }
    rows = []
    for name, calibration in itertools.product(FORMATS, ("nearest", "default", "states")):
        if calibration == "states" and states is None:
            continue
        if calibration == "nearest" and not FORMATS[name].coarse:
            continue  # the same as their default
        made = quantized(heads, name, calibration, states)
        got = torch.log_softmax(made(hidden[:, None], alpha=alpha).logits[:, 0], -1)
        for against, base in bases.items():
            row = {"format": name, "calibration": calibration, "against_bf16": against}
            row["greedy_agreement"] = (got.argmax(-1) == base.argmax(-1)).float().mean().item()
            row["kl_nats"] = (base.exp() * (base - got)).sum(-1).mean().item()
            rows.append(row)
    return rows


def accuracy(trained: str | None) -> dict:
    """The accuracy of three reward heads, at alpha = 1/2.

    They are a copy of the LM head, a copy with noise of a tenth of its standard deviation, and
    trained heads if a folder is given. Trained heads are also measured at the alpha of their gate.
    """
    path = str(embedded_backbone_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    if trained is None:
        model = DualHeadForCausalLM.from_backbone(
            path, dtype=BF16, reward_head="full", gate="attention"
        )
    else:
        model = DualHeadForCausalLM.from_pretrained(trained, dtype=BF16)
    hidden, alpha = hidden_states(model, tokenizer, "test", TEST_PAIRS)
    calibration, _ = hidden_states(model, tokenizer, "train", CALIBRATION_PAIRS)
    reward = model.lm_head.reward_head.weight.detach().to(BF16)
    linear, half = detach(model).lm_head, torch.full((len(hidden),), 0.5)

    def heads(reward: torch.Tensor) -> DualHead:
        made = DualHead.from_lm_head(linear, gate="fixed").to(BF16)
        with torch.no_grad():
            made.reward_head.weight.copy_(reward)
        return made

    weight = linear.weight.detach()
    noise = torch.randn(weight.shape, generator=torch.manual_seed(0)) * weight.float().std() / 10
    random = (torch.randn(4096, hidden.shape[1]) * hidden.float().std()).to(BF16)
    copied = heads(weight)
    found = {
        "copy": agreement(copied, hidden, half, calibration),
        "noise": agreement(heads(weight + noise.to(BF16)), hidden, half, calibration),
        "random_states": agreement(copied, random, half[:4096], None),
    }
    if trained is not None:
        found["trained"] = agreement(heads(reward), hidden, half, calibration)
        found["trained_with_its_gate"] = agreement(heads(reward), hidden, alpha, calibration)
    return {
        "positions": len(hidden),
        "calibration_states": len(calibration),
        "mean_alpha_of_trained": alpha.mean().item() if trained is not None else None,
        "rows": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--heads", help="folder of trained heads")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    results = {"machine": describe(), **accuracy(arguments.heads)}
    arguments.file.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
