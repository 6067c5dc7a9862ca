# SPDX-License-Identifier: Apache-2.0
"""Quantised heads inside a Hugging Face model: every way of generating, casts, copies, detaching,
files. What their numbers mean is tested in test_quantization.
"""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path

import head_forging
import pytest
import torch
from hidden_states import hidden_states
from tiny_models import FAMILIES, make_backbone, make_model, prompts
from transformers import AutoTokenizer, CompileConfig, StaticCache

import dualhead_ext as dh
from dualhead_ext.data import embedded_backbone_path, load_preference_data
from dualhead_ext.model.head_folder import CONFIG_NAME, WEIGHTS_NAME
from dualhead_ext.quantization import FORMATS, dequantize, quantize

NAMES = tuple(FORMATS)
GREEDY = {"max_new_tokens": 6, "do_sample": False}
WIDE = {"hidden_size": 128, "head_dim": 16}  # int4 needs a multiple of 128
load = dh.DualHeadForCausalLM.from_pretrained


def wide_model(family: str = "llama", seed: int = 0, **config):
    return make_model(family, seed, sizes=WIDE, **config)


def meaning(model):
    """A copy of a model whose plain heads have the values of the quantised ones' numbers."""
    plain = copy.deepcopy(model)
    head = plain.lm_head_module
    lm, reward = head.dequantized(), head.reward_head.dequantized()
    bias = head.reward_head.bias
    gate, config = head.gate, head.config
    plain = dh.DualHeadForCausalLM.from_backbone(
        dh.detach(plain, dequantize=True),
        **config.to_dict(),
    )
    head = plain.lm_head_module
    with torch.no_grad():
        head.weight = torch.nn.Parameter(lm, requires_grad=False)  # also of a tied one
        head.reward_head.weight.copy_(reward)
        if bias is not None:
            head.reward_head.bias.copy_(bias)
    head.gate = gate
    return plain.eval()


def same_bits(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8))
        for n in a
    )


# --- generating -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_generates_what_the_numbers_mean(family):
    model = make_model(family, num_objectives=2).quantize("int8")
    plain, batch = meaning(model), prompts()
    assert torch.equal(model.generate(**batch, **GREEDY), plain.generate(**batch, **GREEDY))
    torch.testing.assert_close(model(**batch).logits, plain(**batch).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options",
    [
        {"fused": True},
        {"fused": False},
        {"num_beams": 3},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 2},
        {"cache_implementation": "static", "disable_compile": True},
        {"do_sample": True, "top_k": 7, "seeds": torch.arange(3)},
        {"max_kl": 0.01},
        {"strength": torch.tensor([0.0, 0.5, 2.0])},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_way_of_generating(name, options):
    model, batch = wide_model(mix="probs").quantize(name), prompts()
    if "prompt_lookup_num_tokens" in options:
        batch = {n: value[:1] for n, value in batch.items()}
    options = GREEDY | options
    assert torch.equal(
        model.generate(**batch, **options), meaning(model).generate(**batch, **options)
    )


def test_assisted_by_the_plain_backbone():
    model, batch = wide_model().quantize("int4"), {n: v[:1] for n, v in prompts().items()}
    draft = make_backbone("llama", **WIDE)
    expected = model.generate(**batch, **GREEDY)
    assert torch.equal(model.generate(**batch, **GREEDY, assistant_model=draft), expected)


@pytest.mark.parametrize("name", NAMES)
def test_compiled_steps(name):
    """The whole forward as one graph without a break, as with plain heads."""
    model, batch = wide_model().quantize(name), prompts()
    tokens = model.generate(**batch, **GREEDY)
    torch._dynamo.reset()
    compiled = model.generate(
        **batch,
        **GREEDY,
        cache_implementation="static",
        compile_config=_eager_compiling(),
    )
    assert torch.equal(compiled, tokens)


def _eager_compiling() -> CompileConfig:
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True
    return config


# --- in a model -----------------------------------------------------------------------------------


def test_the_lm_head_holds_the_numbers():
    model = wide_model("phi-bias", num_objectives=2)
    head, bias = model.lm_head, model.lm_head.bias
    weight, reward = head.weight, head.reward_head.weight.detach().clone()
    assert model.quantize("int8") is model and head.quantized == "int8"
    assert isinstance(head, torch.nn.Linear) and head.bias is bias
    expected = {
        "lm_head.weight": quantize(weight, "int8")[0],
        "lm_head.weight_scale": quantize(weight, "int8")[1],
        "lm_head.reward_head.weight": quantize(reward, "int8")[0],
        "lm_head.reward_head.weight_scale": quantize(reward, "int8")[1],
    }
    state = model.state_dict()
    assert same_bits({n: state[n] for n in expected}, expected)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".gate." not in n)
    with pytest.raises(RuntimeError, match=r"quantize: the heads are quantised \(int8\)"):
        model.quantize("fp8")


@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_a_tied_embedding_stays(family):
    sizes = {} if family == "gpt2" else WIDE
    model, plain = make_model(family, sizes=sizes), make_backbone(family, **sizes)
    embedding = model.get_input_embeddings().weight
    assert model.lm_head.weight is embedding  # tied indeed
    model.quantize("int8")
    assert model.get_input_embeddings().weight is embedding and embedding.dtype == torch.float32
    numbers = model.lm_head.weight
    for recompute in (True, False):
        model.tie_weights(recompute_mapping=recompute)  # as transformers and peft do now and then
        assert model.lm_head.weight is numbers
    assert model.config.tie_word_embeddings
    detached = dh.detach(model)
    assert detached.lm_head.weight is embedding and detached.tie_weights() is None
    batch = prompts()
    assert torch.equal(detached.generate(**batch, **GREEDY), plain.generate(**batch, **GREEDY))
    assert same_bits(detached.state_dict(), plain.state_dict())


def test_detaching_an_untied_head():
    model = wide_model().quantize("int4")
    batch, tokens = prompts(), model.generate(**prompts(), **GREEDY)
    with pytest.raises(RuntimeError, match=r"detach: the LM head is quantised \(int4\)"):
        dh.detach(model)
    assert torch.equal(model.generate(**batch, **GREEDY), tokens)  # still whole
    head = model.lm_head
    values = dequantize(head.weight, head.weight_scale)
    only_lm = model.generate(**batch, **GREEDY, strength=0.0)
    plain = dh.detach(model, dequantize=True)
    assert type(plain) is type(make_backbone("llama")) and type(plain.lm_head) is torch.nn.Linear
    assert torch.equal(plain.lm_head.weight, values)
    assert torch.equal(plain.generate(**batch, **GREEDY), only_lm)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_casts_and_copies(name, family):
    model, batch = wide_model(family).quantize(name), prompts()
    numbers = {n: v.clone() for n, v in model.state_dict().items() if "head.weight" in n}
    assert len(numbers) == 4
    tokens = model.generate(**batch, **GREEDY)
    twin = copy.deepcopy(model)
    head = twin.lm_head_module
    for cast in (torch.bfloat16, torch.float16, "cpu", torch.float32):
        dtype = twin.to(cast).dtype
        assert cast in ("cpu", dtype)
        assert head.hidden_dtype == head.gate.out_weight.dtype == dtype
        assert head.reward_head.compute_dtype == dtype
        state = twin.state_dict()
        assert same_bits({n: state[n] for n in numbers}, numbers)
        assert twin.generate(**batch, **GREEDY).shape == tokens.shape
    assert torch.equal(model.generate(**batch, **GREEDY), tokens)
    other = wide_model(family, seed=4).quantize(name)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.generate(**batch, **GREEDY), tokens)


def test_a_cache_of_before_is_refused():
    model, batch = wide_model(), prompts()
    out = model(**batch)
    model.quantize("int8")
    mask = torch.cat((batch["attention_mask"], torch.ones(3, 1, dtype=torch.long)), 1)
    with pytest.raises(RuntimeError, match="weights have changed since the cache was made"):
        model(
            input_ids=batch["input_ids"][:, -1:],
            attention_mask=mask,
            past_key_values=out.past_key_values,
        )


def test_a_cache_of_the_callers_own():
    model, batch = wide_model().quantize("int8"), prompts()
    cache = StaticCache(config=model.config, max_cache_len=20)
    got = model.generate(**batch, **GREEDY, past_key_values=cache, disable_compile=True)
    assert torch.equal(got, model.generate(**batch, **GREEDY))


def test_training_is_refused(tmp_path):
    model, rows = wide_model().quantize("int8"), [{"prompt": [5], "chosen": [6], "rejected": [7]}]
    args = dh.DualHeadTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(RuntimeError, match=r"DualHeadTrainer: the model's heads are quantised"):
        dh.DualHeadTrainer(model, args, train_dataset=rows)
    ids = torch.randint(3, 50, (2, 5))
    with pytest.raises(RuntimeError, match=r"training: the heads are quantised \(int8\)"):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), completion_mask=ids > 9)
    with pytest.raises(RuntimeError, match="DualHeadLMHead: quantised heads cannot be trained"):
        model.lm_head.requires_grad_(True)
    with pytest.raises(RuntimeError, match="resize_token_embeddings: the heads are quantised"):
        model.resize_token_embeddings(120)


def test_adapters_train_through_quantised_heads():
    peft = pytest.importorskip("peft", reason="the extra peft is not installed")
    model, batch = wide_model().quantize("int8"), prompts()
    plain = meaning(model)
    grads = []
    for each in (model, plain):
        torch.manual_seed(0)
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            target_modules=["q_proj", "v_proj"],
            r=2,
        )
        wrapped = peft.get_peft_model(each, config)
        wrapped(**batch, labels=batch["input_ids"]).loss.backward()
        grads.append({n: p.grad for n, p in wrapped.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 0
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-3, atol=1e-6)


def test_a_backbone_that_casts_to_the_weights_dtype_is_refused():
    model, batch = wide_model().quantize("int8"), prompts()
    head = model.lm_head
    hook = head.register_forward_pre_hook(lambda module, args: (args[0].to(module.weight.dtype),))
    with pytest.raises(NotImplementedError, match=r"which is torch\.int8 once quantised"):
        model(**batch)
    hook.remove()
    assert torch.isfinite(model(**batch).logits).all()


def test_weights_that_are_not_in_memory():
    model = wide_model()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to("meta"), False)
    with pytest.raises(RuntimeError, match="not in memory"):
        model.quantize("int8")


def test_calibration_reaches_both_heads():
    model, hidden = wide_model(), hidden_states(200, 128)
    expected = [
        quantize(w, "int4", hidden)[0]
        for w in (model.lm_head.weight, model.lm_head.reward_head.weight)
    ]
    model.quantize("int4", calibration=hidden.view(2, 100, 128))
    assert torch.equal(model.lm_head.weight, expected[0])
    assert torch.equal(model.lm_head.reward_head.weight, expected[1])


@torch.no_grad()
def test_int4_of_a_trained_backbone_is_nearer_than_nearest_numbers():
    """Its LM head's rows as stand-ins for hidden states, on real ones: KL(bf16 || int4)."""
    model = dh.DualHeadForCausalLM.from_backbone(
        embedded_backbone_path(), reward_head="full", gate="attention"
    )
    tokenizer = AutoTokenizer.from_pretrained(embedded_backbone_path())
    pairs = itertools.islice(load_preference_data("embedded", "test"), 12)
    texts = [tokenizer(pair["prompt"] + pair["chosen"], return_tensors="pt") for pair in pairs]
    states = [model.get_decoder()(**text).last_hidden_state[0] for text in texts]
    hidden = torch.cat(states).float()
    weight = model.lm_head.weight.detach().clone()
    base = torch.log_softmax(hidden @ weight.float().T, -1)

    def kl(numbers, scale):
        got = torch.log_softmax(hidden @ dequantize(numbers, scale).T, -1)
        return (base.exp() * (base - got)).sum(-1).mean()

    nearest = kl(*quantize(weight, "int4"))
    model.quantize("int4")
    by_rows = kl(model.lm_head.weight, model.lm_head.weight_scale)
    assert by_rows < 0.9 * nearest


# --- files ----------------------------------------------------------------------------------------


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
    """The whole of it as a user does: quantise, save, restore, on a backbone that has a name."""
    model = dh.DualHeadForCausalLM.from_backbone(
        str(dh.data.embedded_backbone_path()), quantize="int4", reward_head="full", gate="attention"
    )
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    ids = torch.tensor([[0, 201, 201, 301, 28, 400]])
    assert torch.equal(again.generate(ids, **GREEDY), model.generate(ids, **GREEDY))
    head = model.lm_head
    size = (tmp_path / WEIGHTS_NAME).stat().st_size
    assert size < 2 * head.in_features * head.out_features * 0.6 + 10**6  # not the plain weights


@pytest.mark.parametrize("name", NAMES)
def test_quantised_heads_do_not_stay_mapped_to_their_file(name, tmp_path):
    """Overwriting the file must not change the model, truncating it must not kill the process."""
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


def test_a_whole_folder(tmp_path):
    """save_full has the backbone in full precision, or says that it is gone."""
    tied, batch = wide_model("llama-tied").quantize("int8"), prompts()
    tied.save_pretrained(tmp_path / "tied", save_full=True)
    again = load(tmp_path / "tied", backbone=str(tmp_path / "tied"))
    assert torch.equal(again.generate(**batch, **GREEDY), tied.generate(**batch, **GREEDY))
    with pytest.raises(RuntimeError, match=r"save_full: the LM head is quantised \(int8\)"):
        wide_model().quantize("int8").save_pretrained(tmp_path / "untied", save_full=True)
    assert not (tmp_path / "untied").exists()
