# SPDX-License-Identifier: Apache-2.0
"""LM heads that torchao has quantised. Run by test_torchao_weights.py.

Their weights are taken over bit for bit, or refused with a reason, which leaves the backbone as it
was.
"""

from __future__ import annotations

import pytest
import torch
from tiny_models import make_backbone, make_model, prompts
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerAxis, PerGroup, PerRow, PerTensor
from torchao.quantization.quant_primitives import MappingType

import dualhead_ext as dh
from dualhead_ext.quantization import dequantize
from dualhead_ext.quantization.torchao_weights import is_torchao

GREEDY = {"max_new_tokens": 6, "do_sample": False}
WIDE = {"hidden_size": 256, "head_dim": 16}
INT4 = {"weight_dtype": torch.int4, "granularity": PerGroup(128)}
OURS = {
    "int8": ("int8", Int8WeightOnlyConfig()),
    "int8 intx": ("int8", IntxWeightOnlyConfig(torch.int8, PerAxis(0))),
    "fp8": ("fp8", Float8WeightOnlyConfig(granularity=PerRow())),
    "int4": ("int4", IntxWeightOnlyConfig(**INT4)),
    "int4 no clipping": (
        "int4",
        IntxWeightOnlyConfig(**INT4, mapping_type=MappingType.SYMMETRIC_NO_CLIPPING_ERR),
    ),
}


def torchao_backbone(config, dtype=torch.float32, everything: bool = False):
    model = make_backbone("llama", **WIDE).to(dtype)
    if not everything:
        quantize_(model, config, filter_fn=lambda module, name: name == "lm_head")
    else:
        quantize_(model, config)
    assert is_torchao(model.lm_head.weight)
    return model


@pytest.mark.parametrize("case", OURS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_taken_over_bit_for_bit(case, dtype):
    name, config = OURS[case]
    backbone = torchao_backbone(config, dtype)
    theirs = backbone.lm_head.weight
    model = dh.DualHeadForCausalLM.from_backbone(
        backbone, quantize=name, num_objectives=2, reward_head="full", gate="attention"
    )
    head = model.lm_head
    assert head.quantized == name and head.hidden_dtype == dtype
    ours = dequantize(head.weight, head.weight_scale)
    # torchao's own dequantised weights, rounded once to its dtype.
    assert torch.equal(ours.to(dtype), theirs.dequantize())
    scale = theirs.scale.float().view(head.weight_scale.shape)
    assert torch.equal(head.weight_scale, scale)
    if name != "int4":
        assert torch.equal(head.weight.view(torch.int8), theirs.qdata.view(torch.int8))
    for k in range(2):  # the reward heads start as copies of the LM head, in quantised weights too
        assert torch.equal(
            head.reward_head.weight[k].view(torch.uint8), head.weight.view(torch.uint8)
        )
        assert torch.equal(head.reward_head.weight_scale[k], head.weight_scale)


def test_greedy_text_is_torchaos():
    """In fp32, with equal heads: the text that the torchao model itself writes."""
    backbone, batch = torchao_backbone(Int8WeightOnlyConfig()), prompts()
    expected = backbone.generate(**batch, **GREEDY)
    model = dh.DualHeadForCausalLM.from_backbone(
        backbone, quantize="int8", reward_head="full", gate="attention"
    )
    assert torch.equal(model.generate(**batch, **GREEDY), expected)


def test_a_backbone_quantised_throughout(tmp_path):
    """Its layers stay torchao's. The heads' file loads on it, and on one whose layers are plain."""
    model = dh.DualHeadForCausalLM.from_backbone(
        torchao_backbone(Int8WeightOnlyConfig(), everything=True),
        quantize="int8",
        reward_head="full",
        gate="attention",
    )
    assert is_torchao(model.model.layers[0].mlp.up_proj.weight)
    tokens = model.generate(**prompts(), **GREEDY)
    model.save_pretrained(tmp_path)
    for everything in (True, False):
        backbone = torchao_backbone(Int8WeightOnlyConfig(), everything=everything)
        again = dh.DualHeadForCausalLM.from_pretrained(tmp_path, backbone=backbone)
        assert torch.equal(again.lm_head.weight, model.lm_head.weight)
        if everything:
            assert torch.equal(again.generate(**prompts(), **GREEDY), tokens)


def test_trained_heads_on_a_torchao_lm_head(tmp_path):
    """The LM head keeps torchao's weights, and the reward head keeps its own."""
    trained = make_model("llama", sizes=WIDE)
    trained.save_pretrained(tmp_path)
    backbone = torchao_backbone(Int8WeightOnlyConfig())
    theirs = backbone.lm_head.weight.qdata.clone()
    with pytest.raises(
        ValueError, match=r"from_pretrained: lm_head.weight is torchao's Int8Tensor"
    ):
        dh.DualHeadForCausalLM.from_pretrained(tmp_path, backbone=backbone)
    model = dh.DualHeadForCausalLM.from_pretrained(tmp_path, backbone=backbone, quantize="int8")
    assert torch.equal(model.lm_head.weight, theirs)
    trained.quantize("int8")
    assert torch.equal(model.lm_head.reward_head.weight, trained.lm_head.reward_head.weight)


@pytest.mark.parametrize(
    ("config", "name", "message"),
    [
        (
            Int8WeightOnlyConfig(),
            None,
            "Int8Tensor: both heads are in one format, so pass quantize=",
        ),
        (Int8WeightOnlyConfig(), "fp8", r"cannot be taken over as fp8: it holds torch\.int8"),
        (
            Int8WeightOnlyConfig(granularity=PerGroup(64)),
            "int8",
            r"block of \[1, 256\], got \[1, 64\]",
        ),
        (Int8WeightOnlyConfig(granularity=PerTensor()), "int8", r"got \[101, 256\]"),
        (Int8DynamicActivationInt8WeightConfig(), "int8", "it quantises the hidden states too"),
        (
            Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(128)),
            "int4",
            "it quantises the hidden states too",
        ),
        (
            IntxWeightOnlyConfig(**INT4, mapping_type=MappingType.ASYMMETRIC),
            "int4",
            "it is not symmetric",
        ),
        (
            IntxWeightOnlyConfig(torch.int4, PerGroup(32)),
            "int4",
            r"block of \[1, 128\], got \[1, 32\]",
        ),
    ],
)
def test_what_is_not_ours_is_refused(config, name, message):
    backbone = torchao_backbone(config)
    with pytest.raises(ValueError, match=message) as error:
        dh.DualHeadForCausalLM.from_backbone(
            backbone, quantize=name, reward_head="full", gate="attention"
        )
    assert not isinstance(backbone, dh.DualHeadForCausalLM)
    # The message suggests a conversion, which works.
    assert "linear.weight = nn.Parameter(linear.weight.dequantize(), False)" in str(error.value)
    linear = backbone.lm_head
    linear.weight = torch.nn.Parameter(linear.weight.dequantize(), False)
    model = dh.DualHeadForCausalLM.from_backbone(
        backbone, quantize=name, reward_head="full", gate="attention"
    )
    assert model.lm_head.quantized == name


def test_other_quantised_heads_are_refused():
    linear = torch.nn.Linear(128, 9, bias=False)
    quantize_(linear, Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match=r"DualHead\.from_lm_head: lm_head.weight is torchao's"):
        dh.DualHead.from_lm_head(linear)
    backbone = make_backbone("llama")
    backbone.lm_head.weight = torch.nn.Parameter(backbone.lm_head.weight.to(torch.int8), False)
    with pytest.raises(TypeError, match=r"got Parameter of torch\.int8"):
        dh.DualHeadForCausalLM.from_backbone(backbone, reward_head="full", gate="attention")
    assert not isinstance(backbone, dh.DualHeadForCausalLM)
