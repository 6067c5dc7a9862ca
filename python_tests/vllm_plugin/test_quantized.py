# SPDX-License-Identifier: Apache-2.0
"""Backbones that vLLM quantises, with gated heads in full precision.

The heads are trained on the backbone in floating point and exported with its quantised weights.
"""

import json
import os

import pytest
import torch
from torch import nn

try:
    from vllm import SamplingParams
except ImportError:
    pytest.skip("vLLM is not in this environment: make test-vllm", allow_module_level=True)

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # run the engine in this process

from safetensors.torch import save_file
from serving_cases import NEW, expected, gated, jobs
from vllm_cases import answers, close, engine

from dualhead_ext.data import embedded_backbone_path
from dualhead_ext.model.export import export

K = 2
BITS = {"num_bits": 8, "type": "int", "symmetric": True}
# What LLM Compressor writes for W8A8: int8 weights with a scale for each row, and activations that
# are quantised with a scale for each token when they are computed.
W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": BITS | {"strategy": "channel", "dynamic": False},
            "input_activations": BITS | {"strategy": "token", "dynamic": True},
        }
    },
}


def in_eight_bits(values):
    """Integers and the scale of each row."""
    scale = values.abs().amax(-1, keepdim=True) / 127
    return torch.round(values / scale).clamp(-128, 127), scale


def linears(model):
    return {n: m for n, m in model.model.named_modules() if isinstance(m, nn.Linear)}


def save_w8a8(model, folder):
    """The backbone's folder, as int8 with scales."""
    backbone = {n: p for n, p in model.state_dict().items() if n.startswith("model.")}
    for name in linears(model):
        weight, scale = in_eight_bits(backbone[f"model.{name}.weight"])
        backbone[f"model.{name}.weight"] = weight.to(torch.int8)
        backbone[f"model.{name}.weight_scale"] = scale
    folder.mkdir()
    save_file(backbone, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((embedded_backbone_path() / "config.json").read_text())
    assert config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": W8A8}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((embedded_backbone_path() / name).read_bytes())


def compute_in_eight_bits(model):
    """Let the backbone's layers compute in floating point what W8A8 computes in integers."""

    def rounded(_, inputs):
        number, scale = in_eight_bits(inputs[0])
        return (number * scale, *inputs[1:])

    with torch.no_grad():
        for layer in linears(model).values():
            number, scale = in_eight_bits(layer.weight)
            layer.weight.copy_(number * scale)
            layer.register_forward_pre_hook(rounded)


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    """(the folder, what `generate()` writes in floating point, and with rounded numbers)."""
    place = tmp_path_factory.mktemp("int8")
    model = gated(num_objectives=K)
    save_w8a8(model, place / "backbone")
    model.save_pretrained(place / "heads")
    folder = export(place / "heads", place / "served", place / "backbone")
    exact = expected(model, jobs(K))
    compute_in_eight_bits(model)
    return folder, exact, expected(model, jobs(K))


def plain_texts(folder):
    """What the backbone alone writes in the same engine, for the jobs of strength 0."""
    llm = engine(folder, hf_overrides={"architectures": ["LlamaForCausalLM"]})
    try:
        params = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
        inputs = [{"prompt_token_ids": ids} for ids, own in jobs(K) if own == {"strength": 0.0}]
        outputs = llm.generate(inputs, params, use_tqdm=False)
        return [list(out.outputs[0].token_ids) for out in outputs]
    finally:
        close(llm)


def gated_answers(folder):
    llm = engine(folder)
    try:
        return answers(llm, jobs(K))
    finally:
        close(llm)


def of_strength_0(found):
    return [found[i][0] for i, (_, own) in enumerate(jobs(K)) if own == {"strength": 0.0}]


@pytest.mark.slow
def test_int8_weights_and_activations(int8):
    """Equal to `generate()` with numbers rounded in the same way. Where a product of float sums
    lies between two integers, the engines may round it to different ones; one step of an
    activation then changes alpha by up to a percent.
    """
    folder, exact, rounded = int8
    found = gated_answers(folder)
    equal, distances = 0, []
    for (tokens, alpha), (own, own_alpha) in zip(found, rounded, strict=True):
        # Alpha of a token is computed before it: the first that differs still counts.
        count = next((i for i, (a, b) in enumerate(zip(tokens, own, strict=True)) if a != b), NEW)
        equal += count == NEW
        distances.append(float((alpha - own_alpha)[: count + 1].abs().max()))
    assert equal >= 0.8 * len(found)
    assert max(distances) < 2e-2 and sorted(distances)[len(distances) // 4] < 1e-5
    # At the first token, where all texts are the same: this is what int8 itself changes.
    first = [float((a[0] - b[0]).abs()) for (_, a), (_, b) in zip(found, exact, strict=True)]
    assert 5e-4 < max(first) < 5e-2
    assert of_strength_0(found) == plain_texts(folder)
