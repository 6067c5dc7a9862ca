# SPDX-License-Identifier: Apache-2.0
"""What is refused before anything changes: arguments, caches, generators, wrapped models."""

import copy
import pickle
import types

import pytest
import torch
from tiny_models import make_backbone, make_model, prompts

import dualhead_ext as dh
from dualhead_ext import ops
from dualhead_ext.loss.rows import log_probabilities
from dualhead_ext.loss.terms import LossOptions
from dualhead_ext.quantization import dequantize, quantize

B, D, V, K = 2, 8, 11, 2
GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def head_and_cache():
    config = dh.DualHeadConfig(
        hidden_size=D, vocab_size=V, gate_num_heads=2, gate_head_dim=4, num_objectives=K
    )
    head = dh.DualHead(config)
    cache = head.new_cache(B, 8)
    head.prefill(torch.randn(B, 3, D), cache)
    return head, cache


def state_of(cache):
    names = ("k", "u", "valid", "length", "seeds", "draws")
    tensors = {name: getattr(cache, name) for name in names}
    return {n: None if t is None else t.clone() for n, t in tensors.items()}, cache.columns


def same_state(cache, before):
    tensors, columns = state_of(cache)
    assert columns == before[1]
    for name, value in before[0].items():
        assert (value is None) == (tensors[name] is None), name
        assert value is None or torch.equal(value, tensors[name]), name


# --- a step ---------------------------------------------------------------------------------------

SPARSE = torch.ones(B).to_sparse()
META = torch.ones(B, device="meta")
BAD_STEPS = {
    "strength-negative": ({"strength": -1.0}, ValueError, "strength"),
    "strength-huge": ({"strength": 10**400}, ValueError, "strength"),
    "gate_offset-string": ({"gate_offset": "much"}, TypeError, "gate_offset"),
    "alpha-sparse": ({"alpha": SPARSE}, TypeError, "alpha must be dense"),
    "alpha-meta": ({"alpha": META}, ValueError, "alpha must be on cpu"),
    "weights-strings": ({"objective_weights": ["a", "b"]}, TypeError, "objective_weights"),
    "weights-string": ({"objective_weights": "ab"}, TypeError, "objective_weights"),
    "weights-shape": ({"objective_weights": [1.0]}, ValueError, "objective_weights"),
    "weights-meta": (
        {"objective_weights": torch.ones(K, device="meta")},
        ValueError,
        "objective_weights must be on cpu",
    ),
    "max_kl": ({"max_kl": -1.0}, ValueError, "max_kl"),
    "skip": ({"skip_threshold": 0.7}, ValueError, "skip_threshold"),
    "top_k-huge": ({"top_k": 2**63}, ValueError, "top_k"),
    "do_sample": ({"do_sample": torch.ones(2)}, TypeError, "do_sample must be True or False"),
    "return_logits": ({"return_logits": 1}, TypeError, "return_logits must be True or False"),
}


@pytest.mark.parametrize("case", BAD_STEPS)
def test_a_refused_step_moves_nothing(case):
    """No seeds are drawn, torch's generator does not advance, and the cache stays as it was."""
    options, error, match = BAD_STEPS[case]
    head, cache = head_and_cache()
    before, generator = state_of(cache), torch.get_rng_state()
    with pytest.raises(error, match=f"DualHead.step: .*{match}|{match}"):
        hidden = torch.randn(B, D, generator=torch.Generator())
        head.step(hidden, cache, **{"do_sample": True} | options)
    assert torch.equal(torch.get_rng_state(), generator)
    same_state(cache, before)


def test_a_full_cache_draws_nothing():
    head, cache = head_and_cache()
    head.prefill(torch.randn(B, 5, D), cache)
    before, generator = state_of(cache), torch.get_rng_state()
    with pytest.raises(ValueError, match="1 more do not fit"):
        head.step(torch.ones(B, D), cache, do_sample=True)
    assert torch.equal(torch.get_rng_state(), generator)
    same_state(cache, before)


def test_large_integers_that_are_numbers():
    """An integer of 2^63 or more is a valid strength."""
    head, cache = head_and_cache()
    hidden = torch.ones(B, D)
    out = head.step(hidden, copy.deepcopy(cache), gate_offset=-(2**64), strength=2**63)
    assert (out.alpha == 0).all() and torch.isfinite(out.logits).all()


# --- the cache ------------------------------------------------------------------------------------

BAD_CACHE_CALLS = {
    "select-float": ("select", (torch.ones(2),), ValueError, "indices"),
    "select-list": ("select", ([0, 1],), TypeError, "indices"),
    "select-outside": ("select", (torch.tensor([0, 2]),), ValueError, "indices must be in 0..1"),
    "select-negative": ("select", (torch.tensor([-1]),), ValueError, "indices must be in 0..1"),
    "select-sparse": ("select", (torch.tensor([0, 1]).to_sparse(),), TypeError, "indices"),
    "repeat-zero": ("repeat_interleave", (0,), ValueError, "repeats"),
    "repeat-float": ("repeat_interleave", (1.5,), TypeError, "repeats"),
    "crop-negative": ("crop", (-1,), ValueError, "columns"),
    "crop-float": ("crop", (1.5,), TypeError, "columns"),
    "crop-string": ("crop", ("2",), TypeError, "columns"),
    "reserve-float": ("reserve", (99.5,), TypeError, "max_length"),
    "reserve-negative": ("reserve", (-1,), ValueError, "max_length must be >= 0, got -1"),
    "require-room-negative": ("require_room", ("step", -1), ValueError, "count must be >= 0"),
    "append-shape": (
        "append",
        (torch.zeros(B, 2, 1, 5), torch.zeros(B, 2, 1), torch.ones(B, 1).bool()),
        ValueError,
        "k must be",
    ),
    "append-none": ("append", (None, None, torch.ones(B, 1).bool()), TypeError, "k must be"),
    "append-valid": (
        "append",
        (torch.zeros(B, 2, 1, 4), torch.zeros(B, 2, 1), torch.ones(B, 1)),
        ValueError,
        "valid must be",
    ),
    "append-room": (
        "append",
        (torch.zeros(B, 2, 9, 4), torch.zeros(B, 2, 9), torch.ones(B, 9).bool()),
        ValueError,
        "9 more do not fit",
    ),
}


@pytest.mark.parametrize("case", BAD_CACHE_CALLS)
def test_a_refused_call_leaves_the_cache(case):
    method, arguments, error, match = BAD_CACHE_CALLS[case]
    _, cache = head_and_cache()
    before = state_of(cache)
    with pytest.raises(error, match=f"GateCache.{method}: .*{match}"):
        getattr(cache, method)(*arguments)
    same_state(cache, before)


# --- quantisation ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: quantize("weights", "int8"), TypeError, "weight must be a dense tensor"),
        (lambda: quantize(torch.ones(4, 8).to_sparse(), "int8"), TypeError, "weight must be a de"),
        (lambda: quantize(torch.ones(8), "int8"), ValueError, r"weight must be \(..., V, d\)"),
        (lambda: quantize(torch.ones(0, 8), "int8"), ValueError, "not empty"),
        (lambda: quantize(torch.ones(4, 8), 8), ValueError, "format must be one of"),
        *(
            (
                lambda w=weight: quantize(
                    torch.ones(4, 8, device=w), "int8", torch.ones(2, 8, device="meta")
                ),
                ValueError,
                "quantize: calibration must have values, got a tensor on meta",
            )
            for weight in ("cpu", "meta")
        ),
        (
            lambda: quantize(torch.ones(4, 8, device="meta"), "int8", torch.ones(2, 8)),
            ValueError,
            "quantize: calibration needs a weight with values, got one on meta",
        ),
        (
            lambda: dequantize(torch.ones(4, 8).char(), torch.ones(4, device="meta")),
            ValueError,
            "scale must be on cpu, got a tensor on meta",
        ),
        (
            lambda: dequantize(torch.ones(4, 8).char(), torch.ones(4).to_sparse()),
            TypeError,
            "scale must be",
        ),
        (lambda: dequantize(torch.ones(4, 8), torch.ones(4)), TypeError, "must be quantised"),
        (lambda: dequantize(torch.ones(4, 8).char(), None), TypeError, "scale must be"),
        (lambda: dequantize(torch.ones(4, 8).char(), torch.ones(5)), ValueError, "scale must be"),
        (
            lambda: dequantize(torch.ones(4, 8).char(), torch.ones(4), torch.int8),
            TypeError,
            "dtype must be",
        ),
    ],
)
def test_quantisation_names_its_argument(call, error, match):
    with pytest.raises(error, match=match):
        call()


# --- the loss's rows ------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [-1, V, 10**6, -(2**62)])
def test_labels_outside_are_refused(label):
    z = torch.randn(3, V)
    labels = torch.tensor([0, label, 2])
    gate = torch.zeros(3)
    with pytest.raises(ValueError, match=f"loss_rows: labels must be in 0..10, got {label}"):
        ops.loss_rows(z, z.clone(), gate, labels, True, True, False, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"loss_rows_backward_: labels must be in 0\.\.10"):
        ops.loss_rows_backward_(
            z, z.clone(), gate, labels, torch.zeros(2, 3).double(), torch.zeros(3),
            torch.ones(3), None, False, False, 1.0, 0.0,
        )  # fmt: skip


@pytest.mark.parametrize("mix_probs", [False, True])
def test_rows_that_were_not_asked_for_are_zero(mix_probs):
    filler = [torch.full((2, 64), 7.0, dtype=torch.float64) for _ in range(8)]
    del filler  # so that the memory allocated next is not zero
    z = torch.randn(64, V)
    labels = torch.zeros(64, dtype=torch.int64)
    _, _, normalizers = ops.loss_rows(
        None, z, torch.zeros(64), labels, False, True, mix_probs, 1.0, 0.0
    )
    assert (normalizers[0] == 0).all()
    torch.testing.assert_close(normalizers[1], torch.logsumexp(z.double(), -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_probabilities_are_at_most_0(dtype):
    """Even if one token has all of the probability, under every gate."""
    n = 4096
    z = torch.full((n, V), -40.0, dtype=dtype)
    z[:, 3] = 10.0 + torch.rand(n, dtype=dtype)
    other = z + torch.rand(n, 1, dtype=dtype)
    gate = torch.randn(n, dtype=dtype) * 4
    options = LossOptions(mix="probs")
    labels = torch.full((n,), 3)
    rows = log_probabilities(z, other, gate, labels, options, mixed=True, reward=True)
    assert (rows.mixed <= 0).all() and (rows.reward <= 0).all()
    assert (rows.mixed > -1e-5).all()


# --- wrapped, copied and pickled models -----------------------------------------------------------


def test_a_forward_of_trl_is_refused():
    trl = pytest.importorskip("trl", reason="the extra trl is not installed")
    from trl.trainer.utils import add_fused_lm_head

    assert trl.__version__
    model = make_model("llama")
    with pytest.raises(NotImplementedError, match=r"trl\.trainer\.utils computes its loss from"):
        add_fused_lm_head(model)
    assert "forward" not in model.__dict__
    plain = dh.detach(model)
    add_fused_lm_head(plain)
    assert "forward" in plain.__dict__


def test_pickled_and_copied_models():
    """As torch.save(model) and spawned workers do."""
    for family, quantized in (("llama", None), ("llama-tied", None), ("llama-tied", "int8")):
        model, batch = make_model(family), prompts()
        if quantized:
            model.quantize(quantized)
        expected = model.generate(**batch, **GREEDY)
        for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            assert type(twin) is type(model) and twin.lm_head is not model.lm_head
            assert torch.equal(twin.generate(**batch, **GREEDY), expected)
            with torch.no_grad():
                twin.model.norm.weight.add_(1.0)  # the copy has its own backbone and its own hook
            assert torch.equal(model.generate(**batch, **GREEDY), expected)
        assert torch.equal(
            dh.detach(twin).generate(**batch, max_new_tokens=1)[:, :7], expected[:, :7]
        )


# --- accelerate -----------------------------------------------------------------------------------


def test_mixed_precision_wrappers_come_off():
    """As accelerate's prepare() does under bf16, followed by unwrap_model() and detach()."""
    from accelerate.utils import convert_outputs_to_fp32, extract_model_from_parallel

    for unwrap in (False, True):
        backbone, batch = make_backbone("llama"), prompts()
        expected = backbone(**batch).logits
        model = dh.DualHeadForCausalLM.from_backbone(backbone, reward_head="full", gate="attention")
        model._original_forward = model.forward
        autocast = torch.autocast("cpu", torch.bfloat16)
        model.forward = types.MethodType(autocast(model.forward.__func__), model)
        model.forward = types.MethodType(convert_outputs_to_fp32(model.forward.__func__), model)
        assert torch.isfinite(model(**batch).logits).all()
        if unwrap:
            model = extract_model_from_parallel(model, keep_fp32_wrapper=False)
            gated = model(**batch, strength=0.0).logits
            torch.testing.assert_close(gated, expected)
        plain = dh.detach(model)
        assert torch.equal(plain(**batch).logits, expected)


def offloaded(tmp_path, *layers):
    folder = tmp_path / "backbone"
    make_backbone("llama").save_pretrained(folder)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= dict.fromkeys(layers, "disk")
    return {
        "pretrained_model_name_or_path": folder,
        "device_map": places,
        "offload_folder": tmp_path / "offload",
    }


def test_a_layer_on_the_disk(tmp_path):
    from transformers import AutoModelForCausalLM

    plain, batch = make_backbone("llama"), prompts()
    options = offloaded(tmp_path, "model.layers.1")
    backbone = AutoModelForCausalLM.from_pretrained(**options)
    assert backbone.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    model = dh.DualHeadForCausalLM.from_backbone(backbone, reward_head="full", gate="attention")
    got = model.generate(**batch, **GREEDY, eos_token_id=None, strength=0.0)
    assert torch.equal(got, plain.generate(**batch, **GREEDY))
    again = dh.detach(model)
    assert torch.equal(again.generate(**batch, **GREEDY, eos_token_id=None), got)


def test_an_lm_head_on_the_disk_is_one_sentence(tmp_path):
    from accelerate import cpu_offload
    from transformers import AutoModelForCausalLM

    backbone = AutoModelForCausalLM.from_pretrained(**offloaded(tmp_path, "lm_head"))
    match = "from_backbone: the weight of LlamaForCausalLM's lm_head is offloaded"
    with pytest.raises(NotImplementedError, match=match):
        dh.DualHeadForCausalLM.from_backbone(backbone, reward_head="full", gate="attention")
    backbone = make_backbone("llama")
    cpu_offload(backbone)
    with pytest.raises(NotImplementedError, match=match):
        dh.DualHeadForCausalLM.from_backbone(backbone, reward_head="full", gate="attention")


def test_heads_offloaded_later_are_one_sentence(tmp_path):
    from accelerate import cpu_offload

    model = make_model("llama")
    cpu_offload(model)
    for call in (lambda: model.generate(**prompts(), **GREEDY), lambda: model(**prompts())):
        with pytest.raises(NotImplementedError, match="LlamaForCausalLM's lm_head is offloaded"):
            call()
    with pytest.raises(NotImplementedError, match="lm_head is offloaded"):
        model.save_pretrained(tmp_path / "heads")
    assert not (tmp_path / "heads").exists()


def test_a_prompt_without_tokens():
    model = make_model("llama")
    embeds = torch.zeros(1, 0, model.config.hidden_size)
    for given in (
        {"input_ids": torch.zeros(1, 0, dtype=torch.long)},
        {"inputs": torch.zeros(2, 0, dtype=torch.long)},
        {"inputs_embeds": embeds},
    ):
        with pytest.raises(ValueError, match="generate: expected one prompt or more, each of at"):
            model.generate(**given, **GREEDY)
    ids = torch.zeros(1, 0, dtype=torch.long)  # valid: transformers takes empty ids with embeddings
    model.generate(input_ids=ids, inputs_embeds=torch.zeros(1, 2, embeds.shape[-1]), **GREEDY)
