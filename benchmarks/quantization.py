# SPDX-License-Identifier: Apache-2.0
"""What the quantised formats cost and save on this CPU: `python benchmarks/quantization.py FILE`.

Times whole decode steps (d = 4096, V = 32000, B = 1, greedy, attention gate, 256 columns), all
contenders in turns, and compares tokens and mixtures of quantised heads with bf16's on hidden
states of the embedded backbone over its test pairs. Writes one JSON object; docs/quantization.md
quotes it.
"""

from __future__ import annotations

import itertools
import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dualhead_ext import DualHead, ops, reference
from dualhead_ext.bench.machine import describe, read_bandwidth
from dualhead_ext.bench.timing import Contender, alternate, ratio
from dualhead_ext.data import embedded_backbone_path, load_preference_data
from dualhead_ext.quantization import FORMATS

BF16 = torch.bfloat16
D, V, COLUMNS, HEADS, HEAD_DIM = 4096, 32000, 256, 8, 48
PAIRS, TOKENS = 100, 256


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
def hidden_states(pairs) -> tuple[torch.Tensor, torch.nn.Linear]:
    """(N, d) of the prompts and chosen responses of test pairs, and the LM head."""
    path = embedded_backbone_path()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=BF16)
    tokenizer = AutoTokenizer.from_pretrained(path)
    states = []
    for index in range(PAIRS):
        pair = pairs[index]
        ids = tokenizer(pair["prompt"] + pair["chosen"], return_tensors="pt").input_ids[:, :TOKENS]
        states.append(model.model(ids).last_hidden_state[0])
    return torch.cat(states), model.lm_head


@torch.no_grad()
def agreement(hidden: torch.Tensor, linear: torch.nn.Linear, reward_noise: float) -> list[dict]:
    """Greedy agreement with bf16 and KL(bf16 || quantised) in nats per token, alpha = 1/2. The
    reward head is the LM head plus noise of this share of its standard deviation."""

    def head() -> DualHead:
        made = DualHead.from_lm_head(linear, gate="fixed", gate_alpha=0.5).to(BF16)
        noise = torch.randn(made.reward_head.weight.shape, generator=torch.manual_seed(0))
        made.reward_head.weight += (noise * linear.weight.float().std() * reward_noise).to(BF16)
        return made

    # "eager" rounds logits to bf16; "fused" sums the same weights in fp32, as the kernel does.
    bases = {
        "eager": torch.log_softmax(head()(hidden[:, None]).logits[:, 0], -1),
        "fused": torch.log_softmax(head().float()(hidden[:, None].float()).logits[:, 0], -1),
    }
    rows = []
    for name, (against, base) in itertools.product(FORMATS, bases.items()):
        got = torch.log_softmax(head().quantize(name)(hidden[:, None]).logits[:, 0], -1)
        same = (got.argmax(-1) == base.argmax(-1)).float().mean().item()
        kl = (base.exp() * (base - got)).sum(-1).mean().item()
        row = {
            "format": name,
            "against_bf16": against,
            "reward_noise": reward_noise,
            "positions": len(hidden),
        }
        rows.append(row | {"greedy_agreement": same, "kl_nats": kl})
    return rows


if __name__ == "__main__":
    torch.manual_seed(0)
    results = describe()
    with torch.no_grad():
        results["decode"] = timings()
    pairs = load_preference_data("embedded", "test")
    states, linear = hidden_states(pairs)
    random = torch.randn(4096, states.shape[1]) * states.float().std()
    results["agreement"] = {
        "real": agreement(states, linear, 0.0) + agreement(states, linear, 0.1),
        "random": agreement(random.to(BF16), linear, 0.0),
    }
    with open(sys.argv[1], "w") as file:
        json.dump(results, file, indent=1)
        file.write("\n")
