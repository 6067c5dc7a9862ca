# SPDX-License-Identifier: Apache-2.0
"""Quantised heads inside a Hugging Face model: every way of generating, casts, copies, detaching.

test_quantization tests the quantised weights themselves.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hidden_states import hidden_states
from tiny_models import FAMILIES, make_backbone, make_model, prompts
from transformers import AutoTokenizer, CompileConfig, StaticCache
from wide_models import WIDE, same_bits, wide_model

import dualhead_ext as dh
from dualhead_ext.data import embedded_backbone_path, load_preference_data
from dualhead_ext.quantization import FORMATS, dequantize, quantize

NAMES = tuple(FORMATS)
GREEDY = {"max_new_tokens": 6, "do_sample": False}


def meaning(model):
    """A copy of the model whose plain heads have the dequantised weights."""
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
        head.weight = torch.nn.Parameter(lm, requires_grad=False)  # in place of a tied weight too
        head.reward_head.weight.copy_(reward)
        if bias is not None:
            head.reward_head.bias.copy_(bias)
    head.gate = gate
    return plain.eval()


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


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("name", NAMES)
def test_compiled_steps(name):
    """The complete forward pass is one graph without a break, as with plain heads."""
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
    assert model.lm_head.weight is embedding  # the weight is really tied
    model.quantize("int8")
    assert model.get_input_embeddings().weight is embedding and embedding.dtype == torch.float32
    numbers = model.lm_head.weight
    for recompute in (True, False):
        model.tie_weights(recompute_mapping=recompute)  # transformers and peft call this at times
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
    # The refused call has changed nothing
    assert torch.equal(model.generate(**batch, **GREEDY), tokens)
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
    """By KL(bf16 || int4) on real hidden states. The LM head's rows stand in for hidden states."""
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


def test_dequantize_names_the_call_that_is_meant():
    model = make_model("llama")
    with pytest.raises(ValueError, match="need to first quantize"):  # transformers' own message
        model.dequantize()
    model.quantize("int8")
    with pytest.raises(ValueError, match=r"quantised \(int8\).*detach\(model, dequantize=True\)"):
        model.dequantize()
