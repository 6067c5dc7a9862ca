# SPDX-License-Identifier: Apache-2.0
"""What the quantised formats cost and save on this CPU:

    dualhead train --eval-share 0 --output HEADS --learning-rate 1e-3 \\
        --set per_device_train_batch_size=16 --set gradient_accumulation_steps=1 \\
        --set warmup_steps=0.1 --set lm_reduction=mean --set max_length=256
    python benchmarks/quantization.py FILE --part accuracy --heads HEADS
    python benchmarks/quantization.py FILE --part speed

speed: whole decode steps (d = 4096, V = 32000, B = 1, greedy, attention gate, 256 columns), all
contenders in turns. accuracy: tokens and mixtures of quantised heads against bf16's, on hidden
states of the embedded backbone over its test pairs, with and without calibration on those of its
training pairs. Each part replaces its own in FILE, one JSON object, which docs/quantization.md
quotes.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
from pathlib import Path

import torch
from transformers import AutoTokenizer

from dualhead_ext import DualHead, DualHeadForCausalLM, detach, ops, reference
from dualhead_ext.bench.machine import describe, read_bandwidth
from dualhead_ext.bench.timing import Contender, alternate, ratio
from dualhead_ext.data import embedded_backbone_path, load_preference_data
from dualhead_ext.quantization import FORMATS

BF16 = torch.bfloat16
D, V, COLUMNS, HEADS, HEAD_DIM = 4096, 32000, 256, 8, 48
TEST_PAIRS, CALIBRATION_PAIRS, TOKENS = 100, 60, 256


def random_heads(name: str) -> dict[str, torch.Tensor]:
    """Both heads of one format, numbers drawn as they are stored; bf16 for "bf16"."""
    if name == "bf16":
        memory = torch.randn(2 * V, D, dtype=BF16) / 64
        return {"lm_weight": memory[:V], "reward_weight": memory[V:].view(1, V, D)}
    columns = D // 2 if name == "int4" else D
    q = torch.randint(0, 256, (2 * V, columns), dtype=torch.uint8)
    if name == "fp8":
        q &= 0xBF  # below 2, without NaN
    q = q.view(FORMATS[name].dtype)
    scale = torch.full((2 * V, D // 128) if name == "int4" else (2 * V,), 1e-4)
    return {
        "lm_weight": q[:V],
        "lm_scale": scale[:V],
        "reward_weight": q[V:].view(1, V, columns),
        "reward_scale": scale[V:].view(1, V, *scale.shape[1:]),
    }


def timings() -> dict:
    gate = {
        "q_weight": (torch.randn(HEADS * HEAD_DIM, D) / 64).to(BF16),
        "k_weight": (torch.randn(HEADS * HEAD_DIM, D) / 64).to(BF16),
        "u_weight": torch.randn(HEADS, D) / 64,
        "gate_bias": torch.zeros(1),
        "cache_k": torch.randn(1, HEADS, COLUMNS, HEAD_DIM).to(BF16),
        "cache_u": torch.randn(1, HEADS, COLUMNS),
        "cache_valid": torch.ones(1, COLUMNS, dtype=torch.bool),
        "cache_length": torch.full((1,), COLUMNS - 1, dtype=torch.int32),
    }
    hidden = torch.randn(1, D).to(BF16)
    weights = {name: random_heads(name) for name in ("bf16", *FORMATS)}

    def prepare(copy: int) -> None:
        gate["cache_length"].fill_(COLUMNS - 1)

    def step(function, name: str):
        return lambda copy: function(hidden=hidden, **weights[name], **gate)

    plain = weights["bf16"]["lm_weight"]
    contenders = [
        Contender("eager bf16", step(reference.decode_step, "bf16"), prepare),
        Contender(
            "lm_head bf16",
            lambda copy: reference.head_logits(hidden, plain, None).argmax(-1),
            prepare,
        ),
        *(Contender(name, step(ops.decode_step, name), prepare) for name in weights),
    ]
    read = read_bandwidth(weights["bf16"]["lm_weight"]._base)
    times = alternate(contenders, seconds=8, copies=1)
    rows = []
    for name, timing in times.items():
        row = {"contender": name, "us_median": timing.us_median, "us_q1": timing.us_q1}
        row |= {"us_q3": timing.us_q3, "repeats": timing.repeats}
        for slower in ("eager bf16", "lm_head bf16"):
            row[f"speedup_over_{slower.replace(' ', '_')}"] = ratio(times[slower], timing).value
        if name in weights:
            tensors = [*weights[name].values(), *gate.values()]
            row["bytes"] = sum(t.numel() * t.element_size() for t in tensors)
            row["share_of_read_bandwidth"] = read.share(row["bytes"], timing.us_median)
        rows.append(row)
    return {"d": D, "V": V, "B": 1, "T": COLUMNS, "read_gb_per_s": read.gb_per_s, "rows": rows}


@torch.no_grad()
def hidden_states(model, tokenizer, split: str, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the prompts and chosen responses of pairs: (N, d), and alpha (N,) that a gated model's
    gate gives them.
    """
    states, alphas = [], []
    model.lm_head.register_forward_hook(lambda module, x, out: states.append(x[0][0]))
    for pair in itertools.islice(load_preference_data("embedded", split), pairs):
        ids = tokenizer(pair["prompt"] + pair["chosen"], return_tensors="pt").input_ids[:, :TOKENS]
        model(ids)
        alphas.append(model.lm_head.last_alpha[0])
    model.lm_head._forward_hooks.clear()
    return torch.cat(states), torch.cat(alphas)


@torch.no_grad()
def agreement(
    heads: DualHead, hidden: torch.Tensor, alpha: torch.Tensor, calibration: torch.Tensor | None
) -> list[dict]:
    """Greedy agreement of quantised heads with bf16 and KL(bf16 || quantised) in nats per token, at
    hidden states (N, d) and alpha (N,).
    """
    # "eager" rounds logits to bf16; "fused" sums the same weights in fp32, as the kernel does.
    wide = copy.deepcopy(heads).float()(hidden[:, None].float(), alpha=alpha)
    bases = {
        name: torch.log_softmax(out.logits[:, 0], -1)
        for name, out in (("eager", heads(hidden[:, None], alpha=alpha)), ("fused", wide))
    }
    rows = []
    for name, calibrated in itertools.product(FORMATS, (False, True)):
        if calibrated and calibration is None:
            continue
        quantized = copy.deepcopy(heads).quantize(name, calibration if calibrated else None)
        got = torch.log_softmax(quantized(hidden[:, None], alpha=alpha).logits[:, 0], -1)
        for against, base in bases.items():
            row = {"format": name, "calibrated": calibrated, "against_bf16": against}
            row["greedy_agreement"] = (got.argmax(-1) == base.argmax(-1)).float().mean().item()
            row["kl_nats"] = (base.exp() * (base - got)).sum(-1).mean().item()
            rows.append(row)
    return rows


def accuracy(trained: str | None) -> dict:
    """Reward heads that are the LM head, that and noise of a tenth of its standard deviation, and,
    with a folder of heads, trained ones; alpha = 1/2, of trained heads also what their gate says.
    """
    path = str(embedded_backbone_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    if trained is None:
        model = DualHeadForCausalLM.from_backbone(path, dtype=BF16)
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
    parser.add_argument("--part", choices=("speed", "accuracy"), action="append")
    parser.add_argument("--heads", help="folder of trained heads, for accuracy")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    results = json.loads(arguments.file.read_text()) if arguments.file.exists() else {}
    for part in arguments.part or ("speed", "accuracy"):
        machine = describe()
        with torch.no_grad():
            found = timings() if part == "speed" else accuracy(arguments.heads)
        results[part] = {"machine": machine, **found}
        arguments.file.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
