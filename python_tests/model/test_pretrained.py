# SPDX-License-Identifier: Apache-2.0
"""Heads-only files: restored bit for bit, refused when damaged, foreign or of another backbone;
nothing executed.
"""

import dataclasses
import json
import os
import pickle
import random
import struct
import time
from pathlib import Path

import head_forging
import pytest
import torch
from tiny_models import FAMILIES, make_backbone, make_model, prompts

import dualhead_ext as dh
from dualhead_ext.model.fingerprint import fingerprint
from dualhead_ext.model.head_folder import CONFIG_NAME, WEIGHTS_NAME, read_head_folder

FILES = sorted(["README.md", "config.json", CONFIG_NAME, WEIGHTS_NAME])
GREEDY = {"max_new_tokens": 5, "do_sample": False}
load = dh.DualHeadForCausalLM.from_pretrained


@pytest.fixture
def saved(tmp_path):
    model = make_model("llama")
    model.save_pretrained(tmp_path / "heads")
    return model, tmp_path / "heads"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gate", ["attention", "linear", "fixed"])
def test_round_trip_is_bit_for_bit(family, gate, tmp_path):
    model = make_model(family, gate=gate, num_objectives=2, mix="probs")
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == FILES
    again = load(tmp_path, backbone=make_backbone(family))
    assert again.dual_head_config == model.dual_head_config
    expected = model.lm_head_module.state_dict()
    state = again.lm_head_module.state_dict()
    assert set(state) == set(expected)
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    batch = prompts()
    assert torch.equal(again.generate(**batch, **GREEDY), model.generate(**batch, **GREEDY))


def test_files_hold_the_heads_alone_by_their_fixed_names(saved):
    from safetensors import safe_open

    _, folder = saved
    with safe_open(folder / WEIGHTS_NAME, "pt") as file:
        names = set(file.keys())
    projections = {f"gate.{n}_proj.weight" for n in "qkvo"}
    assert names == {"reward_head.weight", "gate.out.weight", "gate.out.bias"} | projections
    stored = json.loads((folder / CONFIG_NAME).read_text())
    assert stored["backbone"]["name_or_path"] is None and str(folder.parent) not in str(stored)


def test_a_trained_lm_head_is_kept_too(tmp_path):
    model = make_model("llama")
    model.lm_head.weight.requires_grad_(True)
    with torch.no_grad():
        model.lm_head.weight.add_(0.01)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, backbone=make_backbone("llama"))
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_heads_trained_in_fp32_stay_so_beside_a_bf16_backbone(tmp_path):
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    again = load(tmp_path, backbone=make_backbone("llama").bfloat16())
    assert again.lm_head.reward_head.weight.dtype == torch.float32
    out = again.generate(**prompts(), **GREEDY)
    assert out.shape == (3, 12)


@pytest.mark.parametrize("kind", [str, Path])
def test_the_embedded_backbone_goes_by_name(tmp_path, kind):
    model = dh.DualHeadForCausalLM.from_backbone(
        kind(dh.data.embedded_backbone_path()), reward_head="full", gate="attention"
    )
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert stored["backbone"]["name_or_path"] == "embedded"
    ids = torch.tensor([[0, 201, 201, 301, 28, 400]])
    again = load(tmp_path)
    assert torch.equal(again.generate(ids, **GREEDY), model.generate(ids, **GREEDY))


def test_save_full_can_be_its_own_backbone(tmp_path):
    model, batch = make_model("llama-tied"), prompts()
    model.save_pretrained(tmp_path, save_full=True)
    again = load(tmp_path, backbone=str(tmp_path))
    assert torch.equal(again.generate(**batch, **GREEDY), model.generate(**batch, **GREEDY))


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
    assert not isinstance(backbone, dh.DualHeadForCausalLM)  # untouched by all of that
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
    """A sample of all bits of both files; blanks of the JSON may change into other blanks."""
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


def test_a_hub_name_does_not_pick_up_a_folder_of_the_working_directory(
    saved, tmp_path, monkeypatch
):
    _, folder = saved
    stored = head_forging.read(folder)
    stored["backbone"]["name_or_path"] = "someone/model"
    head_forging.write(folder, stored)
    make_backbone("llama").save_pretrained(tmp_path / "someone" / "model")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"'someone/model' of the hub, and the working directory"):
        load(folder)
    load(folder, backbone="someone/model")


@pytest.mark.parametrize("name", ["./model", "no such folder", "/gone/model"])
def test_no_path_of_this_machine_is_stored(tmp_path, name):
    model = make_model("llama")
    model.config._name_or_path = name
    model.save_pretrained(tmp_path)
    assert head_forging.read(tmp_path)["backbone"]["name_or_path"] is None


# --- versions -------------------------------------------------------------------------------------


def version_1(folder):
    """Turn a saved folder into what release 0.1.0 wrote."""
    stored = head_forging.read(folder)
    old = ("gate", "gate_num_heads", "gate_head_dim", "gate_alpha", "mix", "num_objectives", "bias")
    old = (*old, "hidden_size", "vocab_size", "logit_scale", "logit_softcap")
    stored["dual_head"] = {name: stored["dual_head"][name] for name in old}
    del stored["sha256"], stored["weights_sha256"]
    head_forging.write(folder, stored | {"format_version": 1})


def test_version_1_loads_as_what_it_meant_with_a_warning(tmp_path, caplog):
    model = make_model("llama", num_objectives=2)
    model.save_pretrained(tmp_path)
    version_1(tmp_path)
    again = load(tmp_path, backbone=make_backbone("llama"))
    assert "was saved without hashes" in caplog.text
    for name, value in (("reward_head", "full"), ("preference", "log_prob"), ("kl_curve", None)):
        assert getattr(again.dual_head_config, name, value) == value
    expected = model.lm_head_module.state_dict()
    state = again.lm_head_module.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    caplog.clear()
    again.save_pretrained(tmp_path)
    assert head_forging.read(tmp_path)["format_version"] == 2
    load(tmp_path, backbone=make_backbone("llama"))
    assert not caplog.text


def test_a_change_by_hand_is_named_and_can_be_made(saved, caplog):
    _, folder = saved
    stored = head_forging.read(folder)
    stored["backbone"]["name_or_path"] = "someone/model"
    (folder / CONFIG_NAME).write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r'changed after it was saved.* remove the key "sha256"'):
        load(folder, backbone=make_backbone("llama"))
    del stored["sha256"]
    (folder / CONFIG_NAME).write_text(json.dumps(stored))
    load(folder, backbone=make_backbone("llama"))


def test_every_field_of_the_configuration_comes_back(tmp_path):
    model = make_model("llama", gate="fixed", gate_alpha=0.25, mix="probs", num_objectives=2)
    model.save_pretrained(tmp_path)
    stored, _ = read_head_folder(tmp_path)
    assert stored["dual_head"] == model.dual_head_config
    assert set(head_forging.read(tmp_path)["dual_head"]) == {
        field.name for field in dataclasses.fields(dh.DualHeadConfig)
    }


# --- files --------------------------------------------------------------------------------------


def test_only_regular_files_of_the_folder_are_read(saved, tmp_path):
    _, folder = saved
    outside = tmp_path / "outside"
    (folder / WEIGHTS_NAME).rename(outside)
    (folder / WEIGHTS_NAME).symlink_to(outside)
    with pytest.raises(ValueError, match="must be a regular file"):
        load(folder, backbone=make_backbone("llama"))
    (folder / WEIGHTS_NAME).unlink()
    os.mkfifo(folder / WEIGHTS_NAME)
    with pytest.raises(ValueError, match="must be a regular file"):  # and does not hang
        load(folder, backbone=make_backbone("llama"))
    (folder / WEIGHTS_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no {WEIGHTS_NAME}"):
        load(folder, backbone=make_backbone("llama"))
    with pytest.raises(FileNotFoundError, match="is not a folder of heads"):
        load(tmp_path / "nowhere")


def test_a_failed_save_leaves_the_old_files(saved, monkeypatch):
    model, folder = saved
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space")))
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(folder)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before


def test_heads_that_are_not_finite_are_not_saved(saved):
    model, folder = saved
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    with torch.no_grad():
        model.lm_head.reward_head.weight[0, 3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"reward_head.weight must be finite"):
        model.save_pretrained(folder)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before


def test_the_arguments_that_trainer_trl_and_accelerate_pass(tmp_path):
    """accelerate's recipe, word for word; then each argument does what it says."""
    from accelerate import Accelerator

    accelerator, model = Accelerator(cpu=True), make_model("llama")
    accelerator.unwrap_model(model).save_pretrained(
        tmp_path / "recipe",
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    read_head_folder(tmp_path / "recipe")
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()

    gathered = {name: value.clone() for name, value in model.state_dict().items()}
    gathered["lm_head.reward_head.weight"] += 1
    model.save_pretrained(tmp_path / "gathered", state_dict=gathered)
    state = read_head_folder(tmp_path / "gathered")[1]
    assert torch.equal(state["reward_head.weight"], gathered["lm_head.reward_head.weight"])
    del gathered["lm_head.reward_head.weight"]
    with pytest.raises(ValueError, match=r"state_dict must hold .*reward_head.weight are missing"):
        model.save_pretrained(tmp_path / "less", state_dict=gathered)
    assert not (tmp_path / "less").exists()


def test_pushing_to_the_hub_uploads_the_files(tmp_path, monkeypatch):
    import huggingface_hub
    import transformers.utils.hub as hub

    uploaded = []
    url = huggingface_hub.RepoUrl("https://huggingface.co/someone/heads")
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda repo, **options: url)
    monkeypatch.setattr(
        hub.PushToHubMixin,
        "_upload_modified_files",
        lambda self, folder, repo, before, **o: uploaded.append(
            (sorted(os.listdir(folder)), repo, o)
        ),
    )
    model = make_model("llama")
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id="someone/heads", commit_message="new")
    expected = (
        FILES,
        "someone/heads",
        {"token": None, "commit_message": "new"},
    )
    assert uploaded == [expected]


def test_an_adapter_on_the_backbone_is_not_dropped_without_a_word(tmp_path, caplog):
    peft = pytest.importorskip("peft")
    model = make_model("llama")
    plain = fingerprint(model)
    config = peft.LoraConfig(target_modules=["gate_proj", "up_proj"], r=2)
    model.add_adapter(config, "mine")
    model.save_pretrained(tmp_path)
    assert "adapters (mine), which the heads' files do not hold" in caplog.text
    assert fingerprint(model) == plain  # of the backbone as it is without
    load(tmp_path, backbone=make_backbone("llama"))


def test_arguments_that_are_refused(saved):
    model, folder = saved
    with pytest.raises(TypeError, match="save_pretrained: unknown arguments max_shards"):
        model.save_pretrained(folder, max_shards=3)
    with pytest.raises(ValueError, match="variant is for the backbone: it needs save_full"):
        model.save_pretrained(folder, variant="fp16")
    with pytest.raises(ValueError, match="has a gated head already"):
        dh.DualHeadForCausalLM.from_backbone(model, reward_head="full", gate="attention")
    with pytest.raises(TypeError, match="must be a model, a path or a hub name"):
        dh.DualHeadForCausalLM.from_backbone(3, reward_head="full", gate="attention")
    with pytest.raises(TypeError, match="unknown arguments gate_heads"):
        dh.DualHeadForCausalLM.from_backbone(
            make_backbone("llama"), gate_heads=3, reward_head="full", gate="attention"
        )
    with pytest.raises(ValueError, match="vocab_size is 101 in the backbone, got 7"):
        dh.DualHeadForCausalLM.from_backbone(
            make_backbone("llama"), vocab_size=7, reward_head="full", gate="attention"
        )
