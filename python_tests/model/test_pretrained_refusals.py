# SPDX-License-Identifier: Apache-2.0
"""Head folders that are refused: damaged, foreign, hostile, or for another backbone."""

import json
import os
import pickle
import random
import struct
import time

import head_forging
import pytest
import torch
from tiny_models import make_backbone

import dualhead_ext as dh
from dualhead_ext.model.head_folder import CONFIG_NAME, WEIGHTS_NAME, read_head_folder

load = dh.DualHeadForCausalLM.from_pretrained


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 90}, "vocab_size 101, the backbone has 90"),
        ({"hidden_size": 48}, "hidden_size 32, the backbone has 48"),
    ],
)
def test_another_size_is_refused_with_both_numbers(saved, change, message):
    from transformers import LlamaForCausalLM

    model, folder = saved
    config = type(model.config)(**model.config.to_dict() | change)
    with pytest.raises(ValueError, match=message):
        load(folder, backbone=LlamaForCausalLM(config))


def test_another_backbone_is_refused(saved):
    _, folder = saved
    with pytest.raises(ValueError, match="was trained on another backbone: parameter"):
        load(folder, backbone=make_backbone("llama", seed=5))
    with pytest.raises(ValueError, match="must be a llama model, got qwen2"):
        load(folder, backbone=make_backbone("qwen2"))


def test_a_file_without_a_backbone_name_asks_for_one(saved):
    with pytest.raises(ValueError, match="pass backbone="):
        load(saved[1])


def test_every_truncation_is_refused(saved):
    _, folder = saved
    backbone = make_backbone("llama")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        whole = (folder / name).read_bytes()
        for length in {0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 2}:
            (folder / name).write_bytes(whole[:length])
            with pytest.raises(ValueError, match=name):
                load(folder, backbone=backbone)
        (folder / name).write_bytes(whole)
    assert not isinstance(backbone, dh.DualHeadForCausalLM)  # all the refusals left it unchanged
    load(folder, backbone=backbone)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_pickles_and_other_foreign_files_are_refused(saved, monkeypatch):
    _, folder = saved
    monkeypatch.chdir(folder)
    huge = struct.pack("<Q", 2**40) + b"{}"
    for payload in (pickle.dumps(Bomb()), b"PK\x03\x04" + bytes(64), huge, b"{}" * 100):
        head_forging.write(folder, weights=payload)
        with pytest.raises(ValueError, match="not a complete safetensors file"):
            load(folder, backbone=make_backbone("llama"))
    torch.save({"reward_head.weight": torch.zeros(1)}, folder / WEIGHTS_NAME)
    head_forging.write(folder)
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load(folder, backbone=make_backbone("llama"))
    assert not (folder / "exploded").exists()


def test_tensors_of_other_names_shapes_or_kinds_are_refused(saved):
    from safetensors.torch import load_file

    _, folder = saved
    state = {n: value.clone() for n, value in load_file(folder / WEIGHTS_NAME).items()}
    without = {n: v for n, v in state.items() if n != "gate.out.bias"}
    for bad, message in (
        (without, "missing: gate.out.bias"),
        (state | {"gate.extra": torch.zeros(1)}, "unknown: gate.extra"),
        (state | {"gate.out.bias": torch.zeros(2)}, r"gate.out.bias must be \(1,\), got \(2,\)"),
        (state | {"gate.out.bias": torch.zeros(1).int()}, "must hold floating-point numbers"),
        (state | {"gate.out.bias": torch.full((1,), torch.nan)}, "out.bias must be finite"),
        (state | {"gate.out.weight": torch.full((1, 12), -torch.inf)}, "out.weight must be finite"),
    ):
        head_forging.write(folder, weights=bad)
        with pytest.raises(ValueError, match=message):
            load(folder, backbone=make_backbone("llama"))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format_version",), 3, "format version 3, this release reads up to 2"),
        (("format_version",), True, "format_version must be a whole number from 1, got True"),
        (("format_version",), 0, "format_version must be a whole number from 1, got 0"),
        (("format_version",), None, "format_version must be a whole number"),
        (("colour",), 1, "unknown keys colour"),
        (("dual_head", "colour"), 1, "unknown keys colour"),
        (("dual_head", "gate"), "exec", "gate must be one of"),
        (("dual_head",), None, "dual_head must be an object, got None"),
        (("dual_head",), [], "dual_head must be an object"),
        (("dual_head", "hidden_size"), 32.0, "hidden_size must be an int"),
        (("dual_head", "vocab_size"), 10**400, "no head can have these sizes"),
        (("dual_head", "vocab_size"), 10**18, "no head can have these sizes"),
        (("dual_head", "num_objectives"), 2**62, "no head can have these sizes"),
        (("dual_head", "gate_num_heads"), 2**40, "no head can have these sizes|must be"),
        (("dual_head", "gate_alpha"), 10**400, "gate_alpha must be finite"),
        (("quantized",), "int2", "quantized must be null or one of"),
        (("quantized",), ["int8"], "quantized must be null or one of"),
        (("backbone",), None, "backbone must be an object"),
        (("backbone", "fingerprint"), {}, "it has no 'model_type'"),
        (("backbone", "fingerprint"), None, "must hold model_type"),
        (("backbone", "fingerprint", "parameters"), {"a": "abcd"}, "a must be 4 decimal numbers"),
        (("backbone", "fingerprint", "parameters"), {"a": [1, 2, 3, 10**400]}, "must be 4 decimal"),
        (("backbone", "name_or_path"), 3, "name_or_path must be a string"),
        (("backbone", "name_or_path"), "../../etc", "not a hub name"),
        (("backbone", "name_or_path"), "/etc", "not a hub name"),
        (("backbone", "name_or_path"), "a" * 4096, "not a hub name"),
        (("backbone", "name_or_path"), "a/b\0c", "not a hub name"),
    ],
)
def test_configurations_that_are_not_ours_are_refused(saved, path, value, message):
    _, folder = saved
    stored = head_forging.read(folder)
    place = stored
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    head_forging.write(folder, stored)
    backbone = None if path[-1] == "name_or_path" else make_backbone("llama")
    started = time.process_time()
    with pytest.raises(ValueError, match=message) as refusal:
        load(folder, backbone=backbone)
    assert time.process_time() - started < 1
    assert str(folder) in str(refusal.value) and len(str(refusal.value)) < 2000
    assert type(refusal.value) is ValueError and not isinstance(backbone, dh.DualHeadForCausalLM)


def _header(entries: bytes) -> bytes:
    return struct.pack("<Q", len(entries)) + entries


MANY = {f"k{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(300_000)}

HOSTILE = {
    "deep JSON": (CONFIG_NAME, b"[" * 500_000),
    "deeper objects": (CONFIG_NAME, b'{"a":' * 100_000),
    "a list": (CONFIG_NAME, b"[1]"),
    "large": (CONFIG_NAME, b'{"a": "' + b"x" * 2**24 + b'"}'),
    "a long number": (CONFIG_NAME, b'{"format_version": ' + b"9" * 10_000 + b"}"),
    "infinity": (CONFIG_NAME, b'{"format_version": Infinity}'),
    "an infinite exponent": (CONFIG_NAME, b'{"format_version": 1e999}'),
    "a key twice": (CONFIG_NAME, b'{"format_version": 1, "format_version": 2}'),
    "not UTF-8": (CONFIG_NAME, b'{"format_version": "\xff"}'),
    "UTF-16": (CONFIG_NAME, '{"format_version": 2}'.encode("utf-16")),
    "empty": (CONFIG_NAME, b""),
    "a long value": (
        CONFIG_NAME,
        b'{"format_version": 2, "quantized": "' + b"x" * 10**5 + b'", "backbone": '
        b'{"fingerprint": {"model_type": "llama", "parameters": {}}}, "dual_head": {}}',
    ),
    "a long value in the header": (
        WEIGHTS_NAME,
        _header(b'{"gate.out.bias":"' + b"x" * 10**4 + b'"}'),
    ),
    "300,000 names": (WEIGHTS_NAME, _header(json.dumps(MANY).encode())),
    "deep header": (WEIGHTS_NAME, _header(b'{"a":' * 100_000)),
    "nearly too many names": (
        WEIGHTS_NAME,
        _header(json.dumps(dict(list(MANY.items())[:1100])).encode()),
    ),
    "a name twice": (
        WEIGHTS_NAME,
        _header(
            b'{"gate.out.bias":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
            b'"gate.out.bias":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
        ),
    ),
    "a shape that overflows": (
        WEIGHTS_NAME,
        _header(
            b'{"gate.out.bias":{"dtype":"F32","shape":[4294967296,4294967296,4],'
            b'"data_offsets":[0,0]}}'
        ),
    ),
    "no header": (WEIGHTS_NAME, b"1234567"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_one_error_that_names_the_file_within_a_second(saved, case):
    _, folder = saved
    name, data = HOSTILE[case]
    if name == WEIGHTS_NAME:
        head_forging.write(folder, weights=data)
    else:
        (folder / name).write_bytes(data)
    backbone = make_backbone("llama")
    started = time.process_time()
    with pytest.raises(ValueError, match=str(folder)) as refusal:
        load(folder, backbone=backbone)
    assert time.process_time() - started < 1
    assert type(refusal.value) is ValueError and len(str(refusal.value)) < 2000
    assert not isinstance(backbone, dh.DualHeadForCausalLM)


def test_every_flipped_bit_is_refused_or_changes_nothing(saved, seed):
    """A sample of all bits of both files. A blank in the JSON may become another kind of blank."""
    model, folder = saved
    expected = model.lm_head_module.state_dict()
    generator = random.Random(seed)
    for name, count in ((CONFIG_NAME, 150), (WEIGHTS_NAME, 50)):
        whole = (folder / name).read_bytes()
        for bit in generator.sample(range(8 * len(whole)), count):
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            (folder / name).write_bytes(flipped)
            try:
                stored, state = read_head_folder(folder)
            except ValueError as error:
                assert str(folder) in str(error)
                continue
            assert name == CONFIG_NAME and stored["dual_head"] == model.dual_head_config
            assert all(torch.equal(value, expected[n]) for n, value in state.items())
        (folder / name).write_bytes(whole)


def test_only_regular_files_of_the_folder_are_read(saved, tmp_path):
    _, folder = saved
    outside = tmp_path / "outside"
    (folder / WEIGHTS_NAME).rename(outside)
    (folder / WEIGHTS_NAME).symlink_to(outside)
    with pytest.raises(ValueError, match="must be a regular file"):
        load(folder, backbone=make_backbone("llama"))
    (folder / WEIGHTS_NAME).unlink()
    os.mkfifo(folder / WEIGHTS_NAME)
    with pytest.raises(ValueError, match="must be a regular file"):  # and opening it must not block
        load(folder, backbone=make_backbone("llama"))
    (folder / WEIGHTS_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no {WEIGHTS_NAME}"):
        load(folder, backbone=make_backbone("llama"))
    with pytest.raises(FileNotFoundError, match="is not a folder of heads"):
        load(tmp_path / "nowhere")
