# SPDX-License-Identifier: Apache-2.0
"""A GGUF file as the backbone: weights, tokenizer, heads that find it again, and files that are
invalid.
"""

import importlib.util
import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer

import dualhead_ext as dh
from dualhead_ext import cli
from dualhead_ext.model import gguf_files
from dualhead_ext.model.builtin_backbones import backbone_path

gguf = pytest.importorskip("gguf")
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
WORDS = ["<unk>", "<s>", "</s>", *map(chr, range(97, 123)), "\u0120", "[", "]", "th", "the"]


def write_gguf(path, without=(), **options):
    """A llama of two layers with random weights and a byte-pair tokenizer.

    Args:
        without: tensors that the file lacks.
        options: of the writer.
    """
    width, layers, inner, heads = 32, 2, 48, 4
    writer = gguf.GGUFWriter(path, "llama", **options)
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3] + [1] * (len(WORDS) - 3))
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    generator = torch.Generator().manual_seed(0)
    shapes = {"token_embd": (len(WORDS), width), "output": (len(WORDS), width)}
    for i in range(layers):
        block = {"attn_norm": (width,), "ffn_norm": (width,), "ffn_down": (width, inner)}
        block |= {f"ffn_{n}": (inner, width) for n in ("gate", "up")}
        block |= {f"attn_{n}": (width, width) for n in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
    tensors = {n: torch.randn(s, generator=generator) * 0.2 for n, s in shapes.items()}
    tensors["output_norm"] = torch.ones(width)
    for name, tensor in tensors.items():
        if name in without:
            continue
        if name == "blk.0.ffn_up":
            data = gguf.quants.quantize(tensor.numpy(), gguf.GGMLQuantizationType.Q8_0)
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
            tensors[name] = torch.from_numpy(gguf.quants.dequantize(data, kind).copy())
        else:
            writer.add_tensor(f"{name}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The file and its tensors. It is converted below a cache folder of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        path = tmp_path_factory.mktemp("models") / "tiny.Q8.gguf"
        yield path, write_gguf(path)


def run(*argv):
    try:
        return cli.main(list(map(str, argv)))
    except SystemExit as stop:
        return stop.code


def test_its_numbers_tokenizer_and_template(file):
    path, tensors = file
    model = dh.DualHeadForCausalLM.from_backbone(path)
    state = model.state_dict()
    for ours, theirs in (
        ("model.embed_tokens.weight", "token_embd"),
        ("model.layers.0.mlp.up_proj.weight", "blk.0.ffn_up"),  # dequantised
        ("model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down"),
        ("lm_head.weight", "output"),
    ):
        torch.testing.assert_close(state[ours], tensors[theirs], rtol=0, atol=0)
    tokenizer = AutoTokenizer.from_pretrained(backbone_path(path))
    assert tokenizer.tokenize("the a") == ["the", "\u0120", "a"]
    message = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "[user] hi "
    assert tokenizer.model_max_length == 128
    specials = [getattr(tokenizer, f"{name}_token") for name in ("unk", "bos", "eos", "pad")]
    assert specials == ["<unk>", "<s>", "</s>", "</s>"]
    assert tokenizer.decode(tokenizer.encode("a b [ th")) == "a b [ th"
    assert not tokenizer.clean_up_tokenization_spaces
    assert model.generation_config.eos_token_id == 2
    other = dh.DualHeadForCausalLM.from_backbone(path.parent, gguf_file=path.name)
    assert other.config._name_or_path == model.config._name_or_path


def test_it_is_read_once_and_a_copy_is_the_same_model(file, tmp_path, monkeypatch):
    path, _ = file
    folder = backbone_path(path)
    monkeypatch.setattr(gguf_files, "_convert", None)
    shutil.copy(path, tmp_path / "other.gguf")
    assert backbone_path(tmp_path / "other.gguf") == folder == backbone_path(str(path))


def test_heads_find_it_again_and_take_no_other(file, tmp_path):
    path, _ = file
    model = dh.DualHeadForCausalLM.from_backbone(path)
    model.save_pretrained(tmp_path / "heads")
    stored = json.loads((tmp_path / "heads" / "dualhead_config.json").read_text())["backbone"]
    assert (stored["name_or_path"], stored["local_path"]) == (None, str(path))
    ids = torch.arange(3, 9)[None]
    again = dh.DualHeadForCausalLM.from_pretrained(tmp_path / "heads")
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)
    # The card contains no path, because it may be uploaded.
    assert str(path.parent) not in (tmp_path / "heads" / "README.md").read_text()
    # If another model is at the stored path, it is refused. If nothing is there, the error says so.
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "heads", moved)
    for place, message in (
        (dh.backbone_path("embedded"), "its backbone must be a llama|vocab_size"),
        (str(tmp_path / "gone.gguf"), "gone.gguf', which is not here.*pass backbone="),
        ("heads", "which is not here"),  # a relative path is not accepted
    ):
        config = json.loads((moved / "dualhead_config.json").read_text())
        config["backbone"]["local_path"] = place
        config.pop("sha256", None)
        (moved / "dualhead_config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            dh.DualHeadForCausalLM.from_pretrained(moved)


def test_what_is_uploaded_holds_no_path_of_this_machine(file, tmp_path, monkeypatch):
    path, _ = file
    model = dh.DualHeadForCausalLM.from_backbone(path)
    uploaded = {}

    def upload(self, folder, *arguments, **options):
        uploaded.update({p.name: p.read_bytes() for p in tmp_path.joinpath(folder).iterdir()})

    monkeypatch.setattr(
        "transformers.utils.hub.PushToHubMixin._upload_modified_files", upload, raising=True
    )
    monkeypatch.setattr(
        "huggingface_hub.create_repo", lambda name, **_: type("Repo", (), {"repo_id": name})
    )
    model.save_pretrained(tmp_path / "heads", push_to_hub=True, repo_id="me/heads")
    assert "dualhead_config.json" in uploaded
    assert not [n for n, data in uploaded.items() if str(path.parent).encode() in data]
    again = dh.DualHeadForCausalLM.from_pretrained(tmp_path / "heads", backbone=path)
    assert again.dual_head_config == model.dual_head_config


def test_a_file_of_a_hub_repository(file, tmp_path, monkeypatch):
    path, _ = file
    asked = []

    def cached_file(repository, name, revision=None, **options):
        asked.append((repository, name, revision))
        return str(path)

    monkeypatch.setattr("transformers.utils.cached_file", cached_file)
    monkeypatch.chdir(tmp_path)
    model = dh.DualHeadForCausalLM.from_backbone("me/models", gguf_file="q/x.gguf", revision="r")
    model.save_pretrained("heads")
    stored = json.loads((tmp_path / "heads" / "dualhead_config.json").read_text())["backbone"]
    assert (stored["name_or_path"], stored["local_path"]) == ("me/models/q/x.gguf", None)
    dh.DualHeadForCausalLM.from_pretrained("heads")
    assert asked[0] == ("me/models", "q/x.gguf", "r")
    assert all(found[:2] == asked[0][:2] for found in asked)


def test_the_command_line_takes_it(file, tmp_path, capsys, monkeypatch):
    path, _ = file
    heads = tmp_path / "heads"
    rows = [{"prompt": f"the {a}", "chosen": f" {a}", "rejected": " the"} for a in "abcdef"]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["train", "--backbone", path, "--data", tmp_path / "pairs.jsonl", "--output", heads]
    assert run(*argv, "--max-steps", 2, "--batch-size", 2) == 0
    for extra in ([], ["--backbone", path]):
        assert run("generate", heads, "the a", "--max-new-tokens", 3, *extra) == 0
    capsys.readouterr()


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "which is not one"),
        (b"PK\x03\x04 a zip", "expected a GGUF file, got"),
        (b"", "expected a GGUF file, got"),
    ],
)
def test_no_file_and_no_gguf_are_found_before_anything_heavy(content, words, tmp_path):
    path = tmp_path / "x.gguf"
    if content is not None:
        path.write_bytes(content)
    code = (
        "import sys; from dualhead_ext import cli; code = cli.main(sys.argv[1:]); "
        "sys.exit(99 if 'torch' in sys.modules or 'transformers' in sys.modules else code)"
    )
    argv = ["train", "--backbone", str(path), "--output", str(tmp_path / "heads")]
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert done.returncode == 2, done
    assert words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "heads").exists()
    with pytest.raises((FileNotFoundError, ValueError), match=words):
        dh.DualHeadForCausalLM.from_backbone(path)


def test_a_cut_file_is_one_sentence(file, tmp_path, capsys):
    path, _ = file
    cut = tmp_path / "cut.gguf"
    for length in (6, 40, 900, 5000):
        cut.write_bytes(path.read_bytes()[:length])
        assert run("train", "--backbone", cut, "--output", tmp_path / "heads") == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("dualhead train: --backbone: ") and "cannot be read" in last
    assert not list(gguf_files.cache_folder().glob("cut*"))


def test_a_split_gguf_file_is_refused(file, tmp_path, capsys):
    write_gguf(tmp_path / "whole.gguf", split_max_tensors=8)
    parts = sorted(tmp_path.glob("whole-*.gguf"))
    assert len(parts) > 2
    shutil.copy(parts[0], tmp_path / "renamed.gguf")
    for name in (parts[0], parts[1], tmp_path / "renamed.gguf"):
        assert run("train", "--backbone", name, "--output", tmp_path / "heads") == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert f"one of {len(parts)} parts; merge them first" in last
    # This also holds for a model on the hub, which is not contacted.
    with pytest.raises(ValueError, match=r"q/x-00001-of-00002\.gguf, one of 2 parts"):
        dh.DualHeadForCausalLM.from_backbone("me/models/q/x-00001-of-00002.gguf")
    alone = tmp_path / "tiny-00001-of-00001.gguf"  # a model in one part is complete
    shutil.copy(file[0], alone)
    assert backbone_path(alone) == backbone_path(file[0])


def test_a_file_without_some_weights_is_refused(file, tmp_path):
    write_gguf(tmp_path / "lacking.gguf", without=("blk.1.ffn_down", "blk.0.attn_k"))
    with pytest.raises(ValueError, match=r"lacks 2 weights, model\.layers\.0\..*k_proj\.weight"):
        dh.DualHeadForCausalLM.from_backbone(tmp_path / "lacking.gguf")
    assert not list(gguf_files.cache_folder().glob("lacking*"))


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_missing_package_names_its_extra(package, tmp_path, monkeypatch):
    (tmp_path / "new.gguf").write_bytes(b"GGUF new")
    find = importlib.util.find_spec
    without = lambda name, *rest: None if name == package else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(ImportError, match=rf"package {package}: pip install 'dualhead_ext\[gguf"):
        dh.DualHeadForCausalLM.from_backbone(tmp_path / "new.gguf")


def test_gguf_file_is_the_name_of_one(tmp_path):
    with pytest.raises(ValueError, match=r"gguf_file: expected a name ending in \.gguf"):
        dh.DualHeadForCausalLM.from_backbone(tmp_path, gguf_file="model.safetensors")
