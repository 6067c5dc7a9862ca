# SPDX-License-Identifier: Apache-2.0
"""The fused decoding loop of generate(), against transformers' own loop with the same model."""

from __future__ import annotations

import warnings

import pytest
import torch
from tiny_models import FAMILIES, VOCAB, make_backbone, make_model, prompts
from transformers import CompileConfig, EosTokenCriteria, LlamaForCausalLM, StoppingCriteria
from transformers.generation import LogitsProcessor
from transformers.generation.streamers import BaseStreamer

import dualhead_ext as dh
from dualhead_ext.head import decoding
from dualhead_ext.model import fused_loop

NEW = 6
GREEDY = {"max_new_tokens": NEW, "do_sample": False}
SAMPLED = {"max_new_tokens": NEW, "do_sample": True}
EVERY = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def loops(monkeypatch):
    """Counts of fused loops, and of steps without and with logits."""
    seen = {"fused": 0, "tokens": 0, "logits": 0}
    loop, step = fused_loop.fused_sample, decoding.run_step

    def counted_loop(*args, **kwargs):
        seen["fused"] += 1
        return loop(*args, **kwargs)

    def counted_step(*args, return_logits=True, **kwargs):
        seen["logits" if return_logits else "tokens"] += 1
        return step(*args, return_logits=return_logits, **kwargs)

    monkeypatch.setattr(fused_loop, "fused_sample", counted_loop)
    monkeypatch.setattr(decoding, "run_step", counted_step)
    return seen


def assert_same(model, batch, **options):
    """Check that the fused loop and transformers' own loop write the same text."""
    expected = model.generate(**batch, **options, fused=False)
    got = model.generate(**batch, **options, fused=True)
    assert torch.equal(got, expected), options
    return got


@EVERY
@pytest.mark.parametrize("mix", ["logits", "probs"])
def test_greedy_is_the_same_in_every_family(family, mix, loops):
    model, batch = make_model(family, mix=mix), prompts()
    expected = model.generate(**batch, **GREEDY, fused=False)
    assert loops == {"fused": 0, "tokens": 0, "logits": NEW - 1}
    assert torch.equal(model.generate(**batch, **GREEDY), expected)
    assert loops == {"fused": 1, "tokens": NEW - 1, "logits": NEW - 1}
    assert len(set(expected[:, -NEW:].flatten().tolist())) > 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2-softcap", "lfm2-hybrid"])
@pytest.mark.parametrize(
    "options",
    [
        {"prefill_chunk_size": 3},
        {"cache_implementation": "static", "disable_compile": True},
        {"strength": torch.tensor([0.0, 1.0, 0.4])},
        {"gate_offset": torch.tensor([-3.0, 0.0, 3.0]), "strength": 1.5},
        {"max_kl": torch.tensor([0.0, 0.02, torch.inf])},
        {"skip_threshold": torch.tensor([0.0, 0.5, 0.45])},
        {"alpha": torch.tensor([0.0, 1.0, 0.5])},
        {"num_return_sequences": 1, "max_time": 600.0},
    ],
    ids=lambda options: " ".join(options),
)
def test_greedy_with_options_is_the_same(family, options):
    assert_same(make_model(family), prompts(), **GREEDY | options)


@pytest.mark.parametrize(
    "config",
    [
        {"num_objectives": 2},
        {"gate": "fixed", "gate_alpha": 0.3},
        {"gate": "linear"},
    ],
    ids=str,
)
def test_greedy_with_other_heads_is_the_same(config):
    model, options = make_model("llama", **config), {}
    if "num_objectives" in config:
        options["objective_weights"] = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.3, 0.7]])
    assert_same(model, prompts(), **GREEDY, **options)


def test_greedy_from_embeddings_and_from_one_token():
    model, batch = make_model("llama"), prompts()
    embeds = model.get_input_embeddings()(batch["input_ids"])
    assert_same(
        model, {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}, **GREEDY
    )
    assert_same(model, {"input_ids": batch["input_ids"][:, -1:]}, **GREEDY)


@pytest.mark.slow
def test_a_compiled_static_cache_is_the_same():
    """As transformers does by default on a GPU. The third call must not compile another graph."""
    model, batch = make_model("llama"), prompts()
    compiled = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    compiled._compile_all_devices = True
    static = {"cache_implementation": "static", "compile_config": compiled, "fused": True}
    for options in (GREEDY, SAMPLED | {"seeds": torch.arange(3), "top_p": 0.9}):
        expected = model.generate(**batch, **options, fused=options is not GREEDY)
        torch.compiler.reset()
        graphs = []
        for _ in range(3):
            got = model.generate(**batch, **options, **static)
            assert torch.equal(got, expected)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert 0 < graphs[0] and graphs[1] == graphs[2], graphs


# --- when the fused loop is used ------------------------------------------------------------------


class Nothing(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


ORDINARY = {
    "output_scores": {"output_scores": True, "return_dict_in_generate": True},
    "output_logits": {"output_logits": True, "return_dict_in_generate": True},
    "output_hidden_states": {"output_hidden_states": True, "return_dict_in_generate": True},
    "use_cache=False": {"use_cache": False},
    "num_beams": {"num_beams": 2},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 2},
    "RepetitionPenaltyLogitsProcessor": {"repetition_penalty": 1.2},
    "MinLengthLogitsProcessor": {"min_new_tokens": 2, "eos_token_id": 5},
    "SuppressTokensLogitsProcessor": {"suppress_tokens": [4]},
    "TypicalLogitsWarper": {"do_sample": True, "typical_p": 0.9},
    "Nothing": {"logits_processor": [Nothing()]},
}


@pytest.mark.parametrize("name", ORDINARY)
def test_other_options_take_the_ordinary_loop(name, loops):
    model, batch = make_model("llama"), prompts()
    if name == "prompt_lookup_num_tokens":
        batch = {key: value[:1] for key, value in batch.items()}
    options = GREEDY | ORDINARY[name]
    model.generate(**batch, **options)
    assert loops["fused"] == 0
    with pytest.raises(ValueError, match=f"fused=True needs the fused decoding loop, which {name}"):
        model.generate(**batch, **options, fused=True)
    seeds = torch.arange(len(batch["input_ids"]))
    with pytest.raises(ValueError, match=f"seeds needs .* which {name}"):
        model.generate(**batch, **options, seeds=seeds)


def test_arguments_are_checked():
    model, batch = make_model("llama"), prompts()
    for options, error, message in (
        ({"fused": "yes"}, TypeError, "fused must be True, False or None, got 'yes'"),
        ({"seeds": [1, 2, 3]}, TypeError, "seeds must be an int64 tensor, got list"),
        ({"seeds": torch.ones(3)}, TypeError, "got torch.float32"),
        ({"seeds": torch.arange(2)}, ValueError, r"seeds must be \(3,\), got \(2,\)"),
        ({"seeds": torch.arange(3), "fused": False}, ValueError, "seeds needs .* fused=False"),
        ({"generator": torch.Generator(), "num_beams": 2}, ValueError, "generator needs .* num_b"),
    ):
        with pytest.raises(error, match=message):
            model.generate(**batch, **GREEDY, **options)


def test_it_is_a_custom_loop_too(loops):
    model, batch = make_model("llama"), prompts()
    expected = model.generate(**batch, **GREEDY, fused=False)
    got = model.generate(**batch, **GREEDY, custom_generate=fused_loop.fused_sample)
    assert torch.equal(got, expected) and loops["tokens"] == NEW - 1
    got = super(dh.DualHeadForCausalLM, model).generate(
        **batch, **GREEDY, custom_generate=fused_loop.fused_sample
    )
    assert torch.equal(got, expected) and loops["tokens"] == 2 * (NEW - 1)
    with pytest.raises(ValueError, match=r"fused_sample: .* does not support output_scores"):
        super(dh.DualHeadForCausalLM, model).generate(
            **batch, **GREEDY, output_scores=True, custom_generate=fused_loop.fused_sample
        )


def test_a_callers_own_loop_is_called():
    model, batch = make_model("llama"), prompts()

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        return input_ids

    assert torch.equal(model.generate(**batch, custom_generate=loop), batch["input_ids"])


class MaskingLlama(LlamaForCausalLM):
    """A backbone that masks half the vocabulary although its config does not say so."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits.index_fill(-1, torch.arange(0, VOCAB, 2), -torch.inf)
        return out


class TrimmingLlama(LlamaForCausalLM):
    """A backbone whose vocabulary is padded: its last entries are not tokens."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits[..., : VOCAB // 2]
        return out


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("backbone_class", [MaskingLlama, TrimmingLlama])
def test_the_backbone_has_the_last_word_on_logits(options, backbone_class):
    batch, backbone = prompts(), make_backbone("llama")
    backbone.__class__ = backbone_class
    model = dh.DualHeadForCausalLM.from_backbone(
        backbone, gate_num_heads=2, gate_head_dim=6, reward_head="full", gate="attention"
    )
    got = model.generate(**batch, **options)[:, -NEW:]
    assert ((got % 2 == 1) if backbone_class is MaskingLlama else (got < VOCAB // 2)).all()
    if options is GREEDY:
        assert torch.equal(got, model.generate(**batch, **options, fused=False)[:, -NEW:])
    with pytest.raises(ValueError, match="which what the backbone does to its logits rules out"):
        model.generate(**batch, **options, fused=True)


# --- when it ends ---------------------------------------------------------------------------------


def test_rows_that_end_need_a_pad():
    model, batch = make_model("llama"), prompts()
    ends = [EosTokenCriteria(eos_token_id=5)]
    model.generation_config.pad_token_id = None
    with pytest.raises(ValueError, match="pad_token_id must be given if rows can end, got None"):
        model.generate(**batch, **GREEDY, stopping_criteria=ends)
    assert_same(model, batch, **GREEDY, stopping_criteria=ends, pad_token_id=0)


class StopsRow(StoppingCriteria):
    """Row b is done once it has lengths[b] tokens."""

    def __init__(self, lengths):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= self.lengths


def ending(model, batch):
    """A token that ends the first row after 2 new tokens, and options that make it do so."""
    text = model.generate(**batch, max_new_tokens=12, do_sample=False, fused=False)[:, -12:]
    return {"max_new_tokens": 12, "do_sample": False, "eos_token_id": int(text[0, 1])}


@pytest.mark.parametrize("late", [False, True], ids=["at once", "one step late"])
@pytest.mark.parametrize("case", ["eos", "criterion", "both", "length", "one row"])
def test_rows_end_where_they_should(case, late, monkeypatch):
    class Forced(fused_loop._Finished):
        def __init__(self, device, _):
            super().__init__(device, late)

    monkeypatch.setattr(fused_loop, "_Finished", Forced)
    model, batch = make_model("llama"), prompts()
    if case == "one row":
        batch = {name: value[:1] for name, value in batch.items()}
    options = {"max_new_tokens": 12, "do_sample": False} if case == "criterion" else GREEDY
    options = ending(model, batch) if case in ("eos", "both", "one row") else options
    options = options | {"pad_token_id": 1}
    if case in ("criterion", "both"):
        options["stopping_criteria"] = [StopsRow([9, 12, 14])]
    got = assert_same(model, batch, **options)
    if case == "one row":
        assert got.shape[1] == 9
    if case == "criterion":
        assert got.shape[1] == 14


def test_stop_strings():
    from transformers import AutoTokenizer

    path = str(dh.data.embedded_backbone_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = dh.DualHeadForCausalLM.from_backbone(path, reward_head="full", gate="attention")
    batch = dict(tokenizer("\n\nHuman: How do I bake bread?\n\nAssistant:", return_tensors="pt"))
    whole = assert_same(model, batch, max_new_tokens=12, do_sample=False)
    new = tokenizer.decode(whole[0, batch["input_ids"].shape[1] :])
    got = assert_same(
        model,
        batch,
        max_new_tokens=12,
        do_sample=False,
        stop_strings=[new[6:9]],
        tokenizer=tokenizer,
    )
    assert got.shape[1] < whole.shape[1]


def test_a_streamer_gets_each_token_with_its_alpha():
    class Collect(BaseStreamer):
        def __init__(self, model):
            self.model, self.tokens, self.alphas, self.ended = model, [], [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()
            self.alphas.append(self.model.lm_head_module.last_alpha)

        def end(self):
            self.ended = True

    model = make_model("llama")
    batch = {name: value[:1] for name, value in prompts().items()}
    seen = {}
    for fused in (True, False):
        streamer = Collect(model)
        out = model.generate(**batch, **GREEDY, streamer=streamer, fused=fused)
        assert streamer.ended and streamer.tokens == out[0].tolist()
        seen[fused] = torch.stack([alpha[0, -1] for alpha in streamer.alphas[1:]])
    assert torch.equal(seen[True], seen[False])


def test_a_second_turn_on_the_returned_cache(loops):
    model, first = make_model("llama"), prompts()
    more = torch.randint(3, VOCAB, (3, 4), generator=torch.Generator().manual_seed(9))
    texts = []
    for fused in (True, False):
        one = model.generate(**first, **GREEDY, return_dict_in_generate=True, fused=fused)
        ids = torch.cat((one.sequences, more), 1)
        ones = torch.ones(3, NEW + 4, dtype=torch.long)
        mask = torch.cat((first["attention_mask"], ones), 1)
        cache = one.past_key_values
        assert cache.layers[-1].gate_cache.columns == one.sequences.shape[1] - 1
        both = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}
        texts.append(model.generate(**both, **GREEDY, fused=fused))
    assert torch.equal(*texts) and loops["fused"] == 2


def test_the_gates_alphas_of_a_fused_text():
    model, batch = make_model("llama"), prompts()
    options = GREEDY | {"output_gate": True, "return_dict_in_generate": True}
    alphas = [model.generate(**batch, **options, fused=fused).gate_alpha for fused in (True, False)]
    assert torch.equal(*alphas)


def test_a_row_that_is_not_finite_is_named():
    model, batch = make_model("llama"), prompts()
    expected = model.generate(**batch, **GREEDY)
    offset = torch.tensor([0.0, float("nan"), 0.0])
    with pytest.warns(RuntimeWarning, match=r"rows \[1\] became infinite or NaN"):
        got = model.generate(**batch, **GREEDY, gate_offset=offset)
    assert torch.equal(got[[0, 2]], expected[[0, 2]])
    # A single token depends on the prompt's logits only
    with pytest.warns(RuntimeWarning, match=r"rows \[1\]"):
        got = model.generate(**batch, max_new_tokens=1, do_sample=False, gate_offset=offset)
    assert got[1, -1] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(**batch, **GREEDY)
