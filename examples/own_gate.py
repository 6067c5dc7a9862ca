# SPDX-License-Identifier: Apache-2.0
"""Bring your own gate: a class and a name are enough to train, decode, save and load with it.

    python examples/own_gate.py --output own-gate

The gate here is a small network with one hidden layer. A gate maps hidden states (..., d) to the
logit of alpha (...). It owns its parameters; `state_names` gives their names in files.
"""

import argparse
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from transformers import AutoTokenizer

import dualhead_ext as dh
from dualhead_ext.head.gate import Gate, register_gate


class NetworkGate(Gate):
    """logit_t = w · tanh(A h_t) + b, with a hidden layer of 16 units."""

    state_names: ClassVar = {
        "in_weight": "in.weight",
        "out_weight": "out.weight",
        "out_bias": "out.bias",
    }

    def __init__(self, config: dh.DualHeadConfig) -> None:
        super().__init__()
        self.in_weight = nn.Parameter(torch.randn(16, config.hidden_size) / config.hidden_size**0.5)
        self.out_weight = nn.Parameter(torch.zeros(1, 16))
        self.out_bias = nn.Parameter(torch.zeros(1))  # alpha starts at 1/2 everywhere

    def forward(self, hidden: torch.Tensor, attention_mask: object = None) -> torch.Tensor:
        """hidden (..., d) -> (...), in fp32. This gate looks at single positions, so it needs no
        mask.
        """
        units = torch.tanh(hidden.float() @ self.in_weight.float().T)
        return (units @ self.out_weight.float().T).squeeze(-1) + self.out_bias.float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("own-gate"))
    parser.add_argument("--max-new-tokens", type=int, default=24)
    arguments = parser.parse_args()

    register_gate("network", NetworkGate)
    path = dh.backbone_path("embedded")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = dh.DualHeadForCausalLM.from_backbone(path, gate="network")
    options = dh.DualHeadTrainingArguments(
        output_dir=str(arguments.output),
        num_train_epochs=2,
        max_length=96,
        reward_l2=0.0,  # with a weight on squared rewards, a trained gate opens on every token
        gate_learning_rate=1e-3,  # a trained gate needs smaller steps than the reward head
        pref_gate=1,  # token rewards are weighted by alpha, so that the gate learns from them
        save_strategy="no",
        report_to="none",
    )
    rows = dh.data.load_preference_data("embedded")[:16]
    dh.DualHeadTrainer(model, options, train_dataset=rows, processing_class=tokenizer).train()
    model.save_pretrained(arguments.output)

    model = dh.DualHeadForCausalLM.from_pretrained(arguments.output)  # the gate is registered
    prompt = tokenizer("\n\nHuman: How do I bake bread?\n\nAssistant:", return_tensors="pt")
    out = model.generate(
        **prompt,
        max_new_tokens=arguments.max_new_tokens,
        return_dict_in_generate=True,
        output_gate=True,
    )
    alpha = out.gate_alpha[0]
    print(
        f"alpha from {alpha.min():.3f} to {alpha.max():.3f}, by {type(model.lm_head.gate).__name__}"
    )
    print(tokenizer.decode(out.sequences[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
