# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's generate() with a gated head, in every mode.

It is compared with a slow loop over the reference.
"""

import copy

import numpy
import pytest
import torch
from paper_decoding import NEW, reference_logits, slow_batch
from tiny_models import (
    FAMILIES,
    POST_PROCESSING,
    VOCAB,
    first_row,
    make_backbone,
    make_model,
    prompts,
)
from transformers import GenerationConfig

import dualhead_ext as dh

GREEDY = {"max_new_tokens": NEW, "do_sample": False}
EVERY = pytest.mark.parametrize("family", FAMILIES)


@EVERY
@pytest.mark.parametrize("mix", ["logits", "probs"])
def test_greedy_equals_a_slow_loop_over_the_reference(family, mix):
    model, batch = make_model(family, mix=mix), prompts()
    expected = slow_batch(model, batch)
    assert len(set(expected.flatten().tolist())) > 2, "the tiny model must not repeat one token"
    assert torch.equal(model.generate(**batch, **GREEDY)[:, -NEW:], expected)


@EVERY
def test_post_processing_is_read_from_the_backbone(family):
    config = make_model(family).dual_head_config
    expected = POST_PROCESSING.get(family, (1.0, 0.0))
    assert (config.logit_scale, config.logit_softcap) == pytest.approx(expected)


@EVERY
def test_strength_zero_is_the_backbones_own_text(family):
    batch = prompts()
    expected = make_backbone(family).generate(**batch, **GREEDY)
    model = make_model(family)
    assert torch.equal(model.generate(**batch, **GREEDY, strength=0.0), expected)
    assert not torch.equal(model.generate(**batch, **GREEDY), expected)


@EVERY
def test_logits_of_a_full_pass_with_padding(family):
    model, batch = make_model(family), prompts()
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(**batch, position_ids=positions) if family != "lfm2-hybrid" else model(**batch)
    for row, (ids, mask) in enumerate(zip(*batch.values(), strict=True)):
        expected, _ = reference_logits(model, ids[mask.bool()][None])
        torch.testing.assert_close(out.logits[row, mask.bool()], expected[0], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2-softcap"])
def test_prompt_lookup_and_assisted_decoding(family):
    model = make_model(family)
    batch = first_row(prompts())
    batch["input_ids"] = torch.cat((batch["input_ids"], batch["input_ids"][:, :4]), 1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    expected = slow_batch(model, batch)
    looked_up = model.generate(**batch, **GREEDY, prompt_lookup_num_tokens=3)
    assert torch.equal(looked_up[:, -NEW:], expected)
    assisted = model.generate(**batch, **GREEDY, assistant_model=make_backbone(family))
    assert torch.equal(assisted[:, -NEW:], expected)


def test_assisted_decoding_takes_the_controls():
    """A plain assistant does not know them, a gated one drafts with them."""
    model, batch = make_model("llama"), first_row(prompts())
    expected = model.generate(**batch, **GREEDY, strength=3.0)
    assert not torch.equal(expected, model.generate(**batch, **GREEDY))
    for assistant in (make_backbone("llama"), make_model("llama")):
        assisted = model.generate(**batch, **GREEDY, strength=3.0, assistant_model=assistant)
        assert torch.equal(assisted, expected)


def test_sampling_is_seeded_and_uses_the_mixture():
    model, batch = make_model("llama"), prompts()
    sampled = {"do_sample": True, "max_new_tokens": NEW, "top_k": 5, "num_return_sequences": 2}
    torch.manual_seed(1)
    first = model.generate(**batch, **sampled)
    torch.manual_seed(1)
    assert torch.equal(first, model.generate(**batch, **sampled))
    torch.manual_seed(2)
    assert not torch.equal(first, model.generate(**batch, **sampled))


def test_controls_are_per_request():
    model, batch = make_model("llama", num_objectives=2), prompts()
    strengths = torch.tensor([0.0, 1.0, 0.4])
    together = model.generate(**batch, **GREEDY, strength=strengths)
    for row in range(3):
        alone = {name: value[row : row + 1] for name, value in batch.items()}
        text = model.generate(**alone, **GREEDY, strength=float(strengths[row]))
        assert torch.equal(together[row], text[0])
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    by_row = model.generate(**batch, **GREEDY, objective_weights=weights, gate_offset=2.0)
    same = model.generate(**batch, **GREEDY, objective_weights=weights[1], gate_offset=2.0)
    assert torch.equal(by_row[1], same[1])
    beams = model.generate(**batch, **GREEDY, strength=strengths, num_beams=2)
    alone = first_row(batch)
    assert torch.equal(beams[0], model.generate(**alone, **GREEDY, strength=0.0, num_beams=2)[0])
    fixed = model.generate(**batch, **GREEDY, alpha=0.0)
    assert torch.equal(fixed, model.generate(**batch, **GREEDY, strength=0.0))


def test_controls_may_be_numpys():
    model, batch = make_model("llama"), prompts()
    expected = model.generate(**batch, **GREEDY, strength=[0.0, 1.0, 2.0])
    given = numpy.linspace(0, 2, 3, dtype=numpy.float32)
    assert torch.equal(model.generate(**batch, **GREEDY, strength=given), expected)
    alone = model.generate(**batch, **GREEDY, strength=given[2])
    assert torch.equal(alone[2], expected[2])


def test_controls_of_a_generation_config():
    """It keeps any attribute, so that one that is not read would be ignored silently."""
    model, batch = make_model("llama"), prompts()
    zero, two = (model.generate(**batch, **GREEDY, strength=s) for s in (0.0, 2.0))
    assert not torch.equal(zero, two)
    config = GenerationConfig(**GREEDY, strength=0.0, pad_token_id=0)
    assert torch.equal(model.generate(**batch, generation_config=config), zero)
    assert torch.equal(
        model.generate(batch["input_ids"], config, attention_mask=batch["attention_mask"]), zero
    )
    assert torch.equal(model.generate(**batch, generation_config=config, strength=2.0), two)
    model.generation_config.strength = 0.0
    assert torch.equal(model.generate(**batch, **GREEDY), zero)
    config.strength = -1.0
    with pytest.raises(ValueError, match="generate: strength must be"):
        model.generate(**batch, generation_config=config)


def test_a_generation_config_by_position():
    """Its options choose the loop, wherever it stands."""
    model, batch = make_model("llama"), prompts()
    ids = batch.pop("input_ids")
    config = GenerationConfig(**GREEDY, num_beams=3, pad_token_id=0)
    expected = model.generate(ids, **batch, generation_config=config)
    assert torch.equal(model.generate(ids, config, **batch), expected)
    with pytest.raises(ValueError, match="num_beams"):
        model.generate(ids, config, **batch, fused=True)


@pytest.mark.parametrize("beams", [1, 3])
def test_output_gate(beams):
    model, batch = make_model("llama"), prompts()
    out = model.generate(
        **batch,
        **GREEDY,
        num_beams=beams,
        strength=torch.tensor([1.0, 0.5, 2.0]),
        output_gate=True,
        return_dict_in_generate=True,
    )
    assert out.gate_alpha.shape == (3, NEW)
    for row, strength in enumerate((1.0, 0.5, 2.0)):
        ids = out.sequences[row][prompts()["attention_mask"][row].sum().neg() - NEW :][None]
        _, alpha = reference_logits(model, ids, strength)
        torch.testing.assert_close(
            out.gate_alpha[row], alpha[0, -NEW - 1 : -1], rtol=1e-3, atol=1e-4
        )
    with pytest.raises(ValueError, match="return_dict_in_generate=True"):
        model.generate(**batch, **GREEDY, output_gate=True)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_inputs_embeds(family):
    model, batch = make_model(family), prompts()
    embeds = model.get_input_embeddings()(batch["input_ids"])
    out = model.generate(inputs_embeds=embeds, attention_mask=batch["attention_mask"], **GREEDY)
    assert torch.equal(out, slow_batch(model, batch))


def test_streaming():
    from transformers.generation.streamers import BaseStreamer

    class Collect(BaseStreamer):
        def __init__(self, model):
            self.model, self.tokens, self.alphas = model, [], []

        def put(self, value):
            self.tokens += value.flatten().tolist()
            self.alphas.append(self.model.lm_head_module.last_alpha)

        def end(self):
            self.ended = True

    model = make_model("llama")
    batch = first_row(prompts())
    streamer = Collect(model)
    out = model.generate(**batch, **GREEDY, streamer=streamer)
    assert streamer.ended and streamer.tokens == out[0].tolist()
    got = torch.stack([alpha[0, -1] for alpha in streamer.alphas[1:]])
    _, alpha = reference_logits(model, out)
    torch.testing.assert_close(got, alpha[0, 6:-1], rtol=1e-3, atol=1e-4)


def test_unsupported_inputs_are_refused():
    model, batch = make_model("llama"), prompts()
    with pytest.raises(NotImplementedError, match="cu_seq_lens_q"):
        model(input_ids=batch["input_ids"], cu_seq_lens_q=torch.tensor([0, 3, 7]))
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    with pytest.raises(NotImplementedError, match="packed input"):
        model(input_ids=batch["input_ids"][:1], position_ids=packed)
    with pytest.raises(NotImplementedError, match="dualhead_valid"):
        model(input_ids=batch["input_ids"], attention_mask=torch.ones(3, 1, 7, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="strength must be"):
        model.generate(**batch, **GREEDY, strength=-1.0)
    with pytest.raises(ValueError, match=r"strength must be \(3,\)"):
        model.generate(**batch, **GREEDY, strength=torch.ones(2))
    with pytest.raises(ValueError, match="not used by the model"):
        model.generate(**batch, **GREEDY, strenght=1.0)


@pytest.mark.parametrize(
    "keep",
    [
        3,
        0,
        torch.tensor([1, 4, 6]),
        torch.tensor([[0, 6], [5, 6], [3, 4]]),
        torch.arange(21).view(3, 7) % 2 == 1,
    ],
    ids=["int", "all", "positions", "per row", "mask"],
)
def test_logits_to_keep(keep):
    import transformers
    from packaging.version import Version

    two = isinstance(keep, torch.Tensor) and keep.dim() == 2
    if two and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("this transformers slices by an int or by (N,) positions alone")
    model, batch = make_model("llama"), prompts()
    strength = torch.tensor([1.0, 0.3, 0.0])
    with torch.no_grad():
        every = model(**batch, strength=strength).logits
        kept = model(**batch, strength=strength, logits_to_keep=keep).logits
        uncached = model(**batch, strength=strength, logits_to_keep=keep, use_cache=False).logits
    if isinstance(keep, int):
        expected = every[:, -keep:]
    elif keep.dtype == torch.bool:
        expected = every[keep]
    elif keep.dim() == 1:
        expected = every[:, keep]
    else:
        expected = torch.take_along_dim(every, keep[..., None], 1)
    torch.testing.assert_close(kept, expected)
    torch.testing.assert_close(uncached, expected, rtol=1e-4, atol=1e-4)


def test_the_fused_step_decodes_single_tokens(monkeypatch):
    from dualhead_ext import ops

    model, batch, calls = make_model("llama"), prompts(), []
    original = ops.decode_step
    monkeypatch.setattr(ops, "decode_step", lambda **kw: calls.append(1) or original(**kw))
    model.generate(**batch, **GREEDY)
    assert len(calls) == NEW - 1  # the first token comes from the prompt's pass


def test_two_threads_do_not_mix_their_calls():
    from concurrent.futures import ThreadPoolExecutor

    model, batch = make_model("llama"), prompts()
    rows = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(3)]
    expected = [model.generate(**row, **GREEDY) for row in rows]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(4):
            got = list(pool.map(lambda row: model.generate(**row, **GREEDY), rows))
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_deep_copy_is_a_model_of_its_own():
    model, batch = make_model("llama-tied"), prompts()
    expected = model.generate(**batch, **GREEDY)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.reward_head.weight.zero_()
    assert torch.equal(twin.generate(**batch, **GREEDY), expected)
    assert not torch.equal(model.generate(**batch, **GREEDY), expected)


def test_detach_gives_the_backbone_back():
    model, batch = make_model("llama-tied"), prompts()
    plain = dh.detach(model)
    assert type(plain) is type(make_backbone("llama-tied"))
    expected = make_backbone("llama-tied")
    assert torch.equal(plain.generate(**batch, **GREEDY), expected.generate(**batch, **GREEDY))
    assert set(plain.state_dict()) == set(expected.state_dict())
    with pytest.raises(TypeError, match="must have a gated head"):
        dh.detach(plain)


def test_lora_on_top():
    peft = pytest.importorskip("peft", reason="the extra peft is not installed")
    model, batch = make_model("llama"), prompts()
    expected = model.generate(**batch, **GREEDY)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj"],
        r=2,
    )
    wrapped = peft.get_peft_model(model, config)
    assert torch.equal(wrapped.generate(**batch, **GREEDY), expected)
    for parameter in model.lm_head_module.gate.parameters():
        parameter.requires_grad_(True)
    logits = wrapped(**batch).logits
    logits.float().square().mean().backward()
    graded = [n for n, p in wrapped.named_parameters() if p.grad is not None]
    assert any("lora_" in n for n in graded) and any(".gate." in n for n in graded)


def test_text_generation_pipeline(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, pipeline

    words = {f"w{n}": n for n in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", bos_token="w1")
    model = make_model("llama")
    pipe = pipeline("text-generation", model=model, tokenizer=fast)
    text = pipe("w5 w6 w7", max_new_tokens=NEW, do_sample=False, return_full_text=False)
    ids = torch.tensor([[5, 6, 7]])
    one = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = slow_batch(model, one)[0]
    assert text[0]["generated_text"].split() == [f"w{n}" for n in expected.tolist()]
