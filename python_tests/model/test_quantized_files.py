# SPDX-License-Identifier: Apache-2.0
"""Files of quantised heads: restored bit for bit, refused if damaged or contradictory."""

from __future__ import annotations

import json
from pathlib import Path

import head_forging
import pytest
import torch
from tiny_models import make_backbone, make_model, prompts
from wide_models import WIDE, same_bits, wide_model

import dualhead_ext as dh
from dualhead_ext.model.head_folder import CONFIG_NAME, WEIGHTS_NAME
from dualhead_ext.quantization import FORMATS

NAMES = tuple(FORMATS)
GREEDY = {"max_new_tokens": 6, "do_sample": False}
load = dh.DualHeadForCausalLM.from_pretrained


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["llama", "llama-tied", "phi-bias"])
def test_files_restore_bit_for_bit(name, family, tmp_path):
    from safetensors import safe_open

    model, batch = wide_model(family, num_objectives=2).quantize(name), prompts()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["quantized"] == name
    with safe_open(tmp_path / WEIGHTS_NAME, "pt") as file:
        names = set(file.keys())
    both = {
        f"{head}.{n}" for head in ("lm_head", "reward_head") for n in ("weight", "weight_scale")
    }
    assert {n for n in names if not n.startswith("gate.") and not n.endswith("bias")} == both
    for quantize_again in (None, name):
        again = load(tmp_path, backbone=make_backbone(family, **WIDE), quantize=quantize_again)
        assert again.lm_head.quantized == name
        assert same_bits(again.state_dict(), model.state_dict())
    assert torch.equal(again.generate(**batch, **GREEDY), model.generate(**batch, **GREEDY))
    again.save_pretrained(tmp_path / "again")
    for file in (CONFIG_NAME, WEIGHTS_NAME):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_full_precision_files_are_quantised_when_loaded(name, tmp_path):
    model, batch = wide_model(), prompts()
    model.save_pretrained(tmp_path)
    again = load(tmp_path, backbone=make_backbone("llama", **WIDE), quantize=name)
    model.quantize(name)
    assert same_bits(again.state_dict(), model.state_dict())
    assert torch.equal(again.generate(**batch, **GREEDY), model.generate(**batch, **GREEDY))
    fresh = dh.DualHeadForCausalLM.from_backbone(
        make_backbone("llama", **WIDE), quantize=name, reward_head="full", gate="attention"
    )
    lm = {n: getattr(fresh.lm_head, n) for n in ("weight", "weight_scale")}
    assert same_bits({n: v[0] for n, v in fresh.lm_head.reward_head.state_dict().items()}, lm)


def test_the_embedded_backbone_by_name(tmp_path):
    """The steps of a user: quantise, save and restore, with a backbone that has a name."""
    model = dh.DualHeadForCausalLM.from_backbone(
        str(dh.data.embedded_backbone_path()), quantize="int4", reward_head="full", gate="attention"
    )
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    ids = torch.tensor([[0, 201, 201, 301, 28, 400]])
    assert torch.equal(again.generate(ids, **GREEDY), model.generate(ids, **GREEDY))
    head = model.lm_head
    size = (tmp_path / WEIGHTS_NAME).stat().st_size
    # The plain weights would be larger
    assert size < 2 * head.in_features * head.out_features * 0.6 + 10**6


@pytest.mark.parametrize("name", NAMES)
def test_quantised_heads_do_not_stay_mapped_to_their_file(name, tmp_path):
    """Overwriting the file must not change the model; truncating it must not kill the process."""
    model = wide_model(num_objectives=2).quantize(name)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, backbone=make_backbone("llama", **WIDE))
    before = {n: v.clone() for n, v in again.lm_head.state_dict().items()}
    with open(tmp_path / WEIGHTS_NAME, "r+b") as file:
        file.write(bytes((tmp_path / WEIGHTS_NAME).stat().st_size))
    assert same_bits(again.lm_head.state_dict(), before)
    (tmp_path / WEIGHTS_NAME).write_bytes(b"")
    assert "dualhead_model" not in Path("/proc/self/maps").read_text()
    assert same_bits(again.lm_head.state_dict(), before)


def test_formats_that_contradict_are_refused(tmp_path):
    model = wide_model().quantize("int8")
    model.save_pretrained(tmp_path)
    backbone = make_backbone("llama", **WIDE)
    with pytest.raises(ValueError, match="holds heads in int8, which cannot become fp8"):
        load(tmp_path, backbone=backbone, quantize="fp8")
    with pytest.raises(ValueError, match="format must be one of int8, fp8, int4, got 'int3'"):
        load(tmp_path, backbone=backbone, quantize="int3")
    with pytest.raises(ValueError, match="format must be one of int8, fp8, int4, got 8"):
        dh.DualHeadForCausalLM.from_backbone(
            backbone, quantize=8, reward_head="full", gate="attention"
        )
    narrow = make_backbone("llama")
    make_model("llama").save_pretrained(tmp_path / "narrow")
    for refused in (
        lambda: load(tmp_path / "narrow", backbone=narrow, quantize="int4"),
        lambda: dh.DualHeadForCausalLM.from_backbone(
            narrow, quantize="int4", reward_head="full", gate="attention"
        ),
    ):
        with pytest.raises(ValueError, match="int4 needs a hidden size that is a multiple of 128"):
            refused()
    assert not isinstance(narrow, dh.DualHeadForCausalLM)
    assert not isinstance(backbone, dh.DualHeadForCausalLM)


def test_damaged_files_are_refused_and_leave_the_backbone(tmp_path):
    from safetensors.torch import load_file

    wide_model().quantize("int8").save_pretrained(tmp_path)
    backbone = make_backbone("llama", **WIDE)
    state = {n: value.clone() for n, value in load_file(tmp_path / WEIGHTS_NAME).items()}
    stored = (tmp_path / CONFIG_NAME).read_text()
    scale = state["lm_head.weight_scale"]

    def refused(message: str, config: str = stored, **changes) -> None:
        changes = {n.replace("__", "."): value for n, value in changes.items()}
        changed = {n: v for n, v in (state | changes).items() if v is not None}
        head_forging.write(tmp_path, json.loads(config), changed)
        with pytest.raises(ValueError, match=message):
            load(tmp_path, backbone=backbone)
        assert not isinstance(backbone, dh.DualHeadForCausalLM)

    refused("missing: lm_head.weight_scale", lm_head__weight_scale=None)
    refused(
        "missing: lm_head.weight, lm_head.weight_scale;",
        lm_head__weight=None,
        lm_head__weight_scale=None,
    )
    refused(r"weight_scale must be \(101,\), got \(100,\)", lm_head__weight_scale=scale[1:])
    refused(
        r"must be \(1, 101, 128\), got \(1, 101, 64\)",
        reward_head__weight=state["reward_head.weight"][..., 1::2].contiguous(),
    )
    refused(
        r"must hold torch.int8, as int8 does, got torch.float32",
        lm_head__weight=state["lm_head.weight"].float(),
    )
    refused(
        r"must hold torch.int8, as int8 does, got torch.uint8",
        lm_head__weight=state["lm_head.weight"].view(torch.uint8),
    )
    refused(
        r"weight_scale must hold torch.float32, got torch.bfloat16",
        lm_head__weight_scale=scale.bfloat16(),
    )
    refused(
        "weight_scale must be finite",
        lm_head__weight_scale=scale.where(scale != scale[3], torch.nan),
    )
    refused(
        "gate.out.bias must hold floating-point numbers, got torch.int8",
        gate__out__bias=torch.zeros(1, dtype=torch.int8),
    )
    other = json.loads(stored)
    refused("not a dual-head configuration", json.dumps(other | {"quantized": "int2"}))
    refused(
        "unknown: lm_head.weight_scale, reward_head.weight_scale",
        json.dumps(other | {"quantized": None}),
    )
    refused(r"lm_head\.weight\S* must be \(101, ", json.dumps(other | {"quantized": "int4"}))
    refused("must hold torch.float8_e4m3fn, as fp8 does", json.dumps(other | {"quantized": "fp8"}))
    head_forging.write(tmp_path, json.loads(stored), state)
    assert load(tmp_path, backbone=backbone).lm_head.quantized == "int8"


def test_a_file_of_before_the_format_was_noted(tmp_path):
    model = wide_model()
    model.save_pretrained(tmp_path)
    stored = head_forging.read(tmp_path)
    assert stored.pop("quantized") is None
    head_forging.write(tmp_path, stored)
    again = load(tmp_path, backbone=make_backbone("llama", **WIDE))
    assert again.lm_head.quantized is None


def test_save_full_of_quantised_heads(tmp_path):
    """save_full writes the LM head in full precision. If that is lost, it raises an error."""
    tied, batch = wide_model("llama-tied").quantize("int8"), prompts()
    tied.save_pretrained(tmp_path / "tied", save_full=True)
    again = load(tmp_path / "tied", backbone=str(tmp_path / "tied"))
    assert torch.equal(again.generate(**batch, **GREEDY), tied.generate(**batch, **GREEDY))
    with pytest.raises(RuntimeError, match=r"save_full: the LM head is quantised \(int8\)"):
        wide_model().quantize("int8").save_pretrained(tmp_path / "untied", save_full=True)
    assert not (tmp_path / "untied").exists()
