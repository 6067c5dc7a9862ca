# SPDX-License-Identifier: Apache-2.0
"""Heads as large as real ones.

Where they would take too much memory, one row is expanded to the whole tensor. An expanded tensor
has the shape and the indices, and takes no memory.
"""

import pytest
import torch

import dualhead_ext as dh
from dualhead_ext.model import head_files
from dualhead_ext.model.head_files import check_head_state
from dualhead_ext.model.head_folder import read_head_folder, write_head_folder
from dualhead_ext.quantization import FORMATS, dequantize, quantize, storage_shapes

# (V, d) of Llama 2, Llama 3, Qwen 3.
SHAPES = [(32_000, 4096), (128_256, 4096), (151_936, 2048)]


def config_of(shape, **changes):
    return dh.DualHeadConfig(hidden_size=shape[1], vocab_size=shape[0], gate="linear", **changes)


def expanded_state(config, dtype=torch.float32):
    """The state of a head in which all rows of a matrix are the same row."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in dh.DualHead(config).state_dict().items()}
    shapes.pop("lm_head.weight")
    return {
        name: torch.linspace(-1, 1, shape[-1], dtype=dtype).expand(shape)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_a_state_is_checked_with_four_objectives(shape):
    config = config_of(shape, num_objectives=4)
    state = expanded_state(config)
    check_head_state(config, state, None, "here")
    less = state | {"reward_head.weight": state["reward_head.weight"][:, 1:]}
    with pytest.raises(ValueError, match=rf"must be \(4, {shape[0]}, {shape[1]}\), got"):
        check_head_state(config, less, None, "here")


def test_one_number_that_is_not_finite_is_found_anywhere(monkeypatch):
    monkeypatch.setattr(head_files, "_PIECE", 50)
    for shape in ((1, 1), (301,), (7, 43), (2, 3, 51), (1, 1, 200), (3, 1, 60)):
        for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
            for place in (0, -1):
                value = torch.ones(shape).to(dtype)
                assert head_files._all_finite(value)
                assert sum(x.numel() for x in head_files._pieces(value)) == value.numel()
                infinite = () if dtype == torch.float8_e4m3fn else (torch.inf, -torch.inf)
                for bad in (torch.nan, *infinite):
                    value.view(-1)[place] = torch.tensor(bad).to(dtype)
                    assert not head_files._all_finite(value)


def test_large_finite_numbers_are_finite():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert head_files._all_finite(torch.full((3, 70), torch.finfo(dtype).max, dtype=dtype))


def test_a_head_of_llamas_size_is_saved_and_restored(tmp_path):
    """The whole path with its hash, in bf16: 262 MB."""
    shape = SHAPES[0]
    config = config_of(shape)
    state = expanded_state(config, torch.bfloat16)
    state = {name: value.contiguous() for name, value in state.items()}
    state["reward_head.weight"][0, -1, -1] = 7
    marks = {"model_type": "llama", "parameters": {}}
    backbone = {"name_or_path": None, "revision": None, "fingerprint": marks}
    stored = {"dual_head": config, "quantized": None, "backbone": backbone}
    write_head_folder(tmp_path, stored, state)
    again, tensors = read_head_folder(tmp_path)
    assert again["dual_head"] == config
    check_head_state(config, tensors, None, "here")
    assert all(torch.equal(tensors[name], value) for name, value in state.items())


@pytest.mark.parametrize("name", FORMATS)
def test_quantising_by_rows_is_the_same_whatever_their_number(name):
    """Rows are quantised in pieces. The last of 128,256 rows has the values that it has alone."""
    torch.manual_seed(0)
    few = torch.randn(3, 128)
    rows = few.repeat(42_752, 1)
    weight, scale = quantize(rows, name)
    assert (tuple(weight.shape), tuple(scale.shape)) == storage_shapes(name, rows.shape)
    alone = dequantize(*quantize(few, name))
    for start in (0, 3 * 20_000, 128_256 - 3):
        got = dequantize(weight[start : start + 3], scale[start : start + 3])
        assert torch.equal(got, alone)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_step(shape):
    """The last token of the vocabulary is chosen, since only its row is not zero."""
    vocabulary, d = shape
    weight = torch.zeros(shape, dtype=torch.bfloat16)
    weight[-1] = 1
    linear = torch.nn.Linear(1, 1, bias=False)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    linear.in_features, linear.out_features = d, vocabulary
    head = dh.DualHead.from_lm_head(linear, gate="linear")
    cache = head.new_cache(1, 4)
    out = head.step(torch.ones(1, d, dtype=torch.bfloat16), cache)
    assert out.token.item() == vocabulary - 1 and out.status.item() == 0
    assert out.logits[0, -1] == d and out.logits[0, 0] == 0
