# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of whole models: backbones, decoding and training.

They run on tiny sizes, through the code that a GPU runs.
"""

from __future__ import annotations

import pytest
import torch
from benchmark_cases import STEADY

from dualhead_ext import DualHeadForCausalLM, ops, reference
from dualhead_ext.bench import (
    eager_loss,
    generation,
    memory,
    models,
    report,
    training,
    training_cases,
    training_steps,
)
from dualhead_ext.loss import chunked
from dualhead_ext.measurement.timing import Contender, Timing

# --- backbones ------------------------------------------------------------------------------------


def test_a_backbone_is_made_in_bf16_at_once():
    """The backbone is never built in fp32: at 7B, that copy would take 27 GB."""
    made = []
    shape = models.Llama(128, 2, 4, 256, 4096)
    peak = memory.peak_bytes(Contender("build", lambda copy: made.append(shape.build())))
    weights = sum(p.nbytes for p in made[0].parameters())
    assert {p.dtype for p in made[0].parameters()} == {torch.bfloat16}
    assert weights <= peak < 1.5 * weights
    assert all(p.float().std() > 0 for p in made[0].parameters() if p.dim() == 2)
    assert made[0].device.type == "cpu" and shape.build("meta").device.type == "meta"


@pytest.mark.parametrize("tied", [False, True])
def test_a_twin_shares_every_weight_and_stays_plain(tied):
    plain = models.TINY.build().eval()
    if tied:
        plain.config.tie_word_embeddings = True
        plain.lm_head.weight = plain.model.embed_tokens.weight
    prompt = torch.randint(512, (1, 7))
    options = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
    before = plain.generate(prompt, **options)
    gated = DualHeadForCausalLM.from_backbone(
        models.twin(plain), reward_head="full", gate="attention"
    ).eval()
    own = {
        id(p) for p in (*gated.lm_head.reward_head.parameters(), *gated.lm_head.gate.parameters())
    }
    theirs = {id(p): p for p in gated.parameters() if id(p) not in own}
    assert theirs.keys() == {id(p) for p in plain.parameters()}
    assert {id(b) for b in gated.buffers()} == {id(b) for b in plain.buffers()}
    shared = {id(module) for module in gated.modules()} & {id(module) for module in plain.modules()}
    assert not shared and not any(module._forward_hooks for module in plain.modules())
    assert not isinstance(plain, DualHeadForCausalLM) and type(plain.lm_head) is torch.nn.Linear
    assert torch.equal(plain.generate(prompt, **options), before)
    # From here on the gated head has an effect, which the plain model must not show
    with torch.no_grad():
        gated.lm_head.reward_head.weight.normal_()
    assert not torch.equal(gated.generate(prompt, **options), before)
    assert torch.equal(plain.generate(prompt, **options), before)
    assert torch.equal(gated.generate(prompt, **options, strength=0.0), before)


# --- decoding -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_whole_models_decode_with_each_step(monkeypatch):
    calls = []

    def spy(name, step):
        def call(**arguments):
            calls.append(name)
            return step(**arguments)

        return call

    monkeypatch.setattr(ops, "decode_step", spy("fused", ops.decode_step))
    monkeypatch.setattr(reference, "decode_step", spy("eager", reference.decode_step))
    model = generation.tiny_model()
    result = generation.run_model(model, seconds=0, min_rounds=2)
    # The first token comes from the prompt's pass. There are three calls, one of them to warm up.
    # The fused step serves two loops, and the trial when heads are attached.
    expected = 3 * (model.new_tokens - 1)
    assert (calls.count("fused"), calls.count("eager")) == (2 * expected + 1, expected)
    rows = {row["contender"]: row for row in result.rows()}
    assert list(rows) == ["backbone", "dualhead", "logits", "eager"]
    for name, row in rows.items():
        seconds = result.timings[name].us_median / 1e6
        assert row["tokens_per_s_median"] == pytest.approx(model.new_tokens / seconds)
        assert row["tokens_per_s_q1"] <= row["tokens_per_s_median"] <= row["tokens_per_s_q3"]
        assert row["format"] == "bf16"
        against = result.against_plain(name)
        assert f"{against.value:.3f} times backbone's time" in result.text()


@pytest.mark.slow
def test_a_gpus_contenders_decode_compiled_with_a_static_cache(monkeypatch):
    """As transformers does by default on CUDA: one graph for each model, without a graph break."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)  # keep the counters
    model = generation.tiny_model(generation.GPU_CONTENDERS)
    result = generation.run_model(model, seconds=0, min_rounds=3)
    assert list(result.timings) == list(generation.GPU_CONTENDERS)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]
    text = result.text()
    for name, plain in (
        ("logits", "backbone"),
        ("backbone_static", "backbone_static"),
        ("dualhead_static", "backbone_static"),
    ):
        line = next(line for line in text.splitlines() if line.split()[:1] == [name])
        ratio = result.timings[name].us_median / result.timings[plain].us_median
        assert f", {ratio:.3f} times {plain}'s time" in line


def test_what_was_not_compiled_is_an_error(monkeypatch):
    options = {"cache_implementation": "static", "compile_config": None}
    monkeypatch.setattr(generation, "_static_options", lambda device: options)
    with pytest.raises(RuntimeError, match="did not compile backbone_static's forward pass"):
        generation.run_model(generation.tiny_model(("backbone_static",)), seconds=0, min_rounds=2)


def test_a_model_is_not_timed_without_a_kernel(monkeypatch):
    monkeypatch.setattr(generation.ops, "kernel_for", lambda device, dtype: False)
    with pytest.raises(RuntimeError, match=r"no compiled CPU kernel for torch\.bfloat16"):
        generation.run_model(generation.tiny_model(), seconds=0)


@pytest.mark.parametrize(("factor", "misses"), [(1.02, 0), (1.03, 1)])
def test_what_a_gated_head_may_add_to_a_7b_model(factor, misses):
    plan = generation.gpu_plan()
    assert sum((model.contenders for model in plan), ()) == generation.GPU_CONTENDERS
    model = plan[1]
    assert model.allowed == 1.022
    factors = {"dualhead": 1.0, "logits": 9.0, "dualhead_static": factor}
    timings = {
        name: Timing(name, tuple(us * factors.get(name, 1.0) for us in STEADY))
        for name in model.contenders
    }
    result = generation.ModelResult(model, "bf16", timings)
    found = report.Report({})
    assert found.add_model(result).count("TOO SLOW: ") == misses == len(found.failures)
    assert all(f"dualhead_static takes {factor:.3f} times" in text for text in found.failures)


# --- training -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """One run of the tiny case: its result, and the names of the functions called, in order."""
    calls = []

    def spy(name, function):
        def call(*arguments, **named):
            calls.append(name)
            return function(*arguments, **named)

        return call

    model = DualHeadForCausalLM
    with pytest.MonkeyPatch.context() as patch:
        backbone = spy("backbone", model._hidden_states)
        patch.setattr(model, "_hidden_states", backbone)
        for name, module in (("fused", chunked), ("eager", eager_loss)):
            patch.setattr(module, "dual_head_loss", spy(name, module.dual_head_loss))
        result = training.run_case(training_cases.tiny_case(), seconds=0, min_rounds=3)
    return result, calls


def test_training_steps_are_timed(trained):
    result, calls = trained
    case = result.case
    rows = {row["contender"]: row for row in result.rows()}
    assert list(rows) == ["forward", "dualhead", "eager", "cached"]
    for name, row in rows.items():
        assert (row["pairs"], row["tokens"], row["response_tokens"]) == (2, 44, 24)
        seconds = result.timings[name].us_median / 1e6
        assert row["tokens_per_s_median"] == pytest.approx(case.tokens / seconds)
        assert row["tokens_per_s_q1"] <= row["tokens_per_s_median"] <= row["tokens_per_s_q3"]
        assert row["repeats"] == 3 and row["extra_bytes"] > 0
        against = result.against_forward(name)
        assert f", {against.value:.3f} times forward's time" in result.text()
    # Calls for: agreement, the optimizer's first step, memory, warm-up, rounds.
    assert (calls.count("fused"), calls.count("eager")) == (2 + 1 + 2 * 5, 1 + 5)
    # The given hidden states are computed once, and the cached steps compute none.
    assert calls.count("backbone") == 1 + 2 + 1 + 3 * 5


def test_what_training_holds_is_weights_and_the_optimizers_state():
    case = training_cases.tiny_case()
    steps = training_steps.Training(case, "cpu")
    weights = sum(p.nbytes for p in steps.model.parameters())
    heads = sum(p.nbytes for p in steps.trained)
    assert heads >= 4 * 512 * 64  # heads in fp32
    buffers = sum(b.nbytes for b in steps.model.buffers())
    assert steps.held_bytes() == weights + buffers
    steps.step(steps.batch, chunked.dual_head_loss)
    counters = 4 * len(steps.trained)
    assert steps.held_bytes() == weights + buffers + 2 * heads + counters


def test_a_step_trains_the_heads_alone_and_a_forward_pass_nothing():
    steps = training_steps.Training(training_cases.tiny_case(), "cpu")
    before = {name: p.clone() for name, p in steps.model.named_parameters()}
    steps.forward()
    assert all(torch.equal(p, before[name]) for name, p in steps.model.named_parameters())
    steps.step(steps.batch, chunked.dual_head_loss)
    changed = {n for n, p in steps.model.named_parameters() if not torch.equal(p, before[n])}
    assert "lm_head.reward_head.weight" in changed and "lm_head.gate.out_weight" in changed
    assert all(name.startswith(("lm_head.reward_head.", "lm_head.gate.")) for name in changed)


def test_given_hidden_states_no_backbone_runs():
    steps = training_steps.Training(training_cases.tiny_case(), "cpu")
    ran = []
    steps.model.get_decoder().register_forward_hook(lambda *arguments: ran.append(1))
    fused = chunked.dual_head_loss
    with_backbone = steps.gradients(steps.batch, fused)
    assert len(ran) == 1
    without = steps.gradients(steps.cached, fused)
    assert len(ran) == 1
    assert all(torch.equal(a, b) for a, b in zip(with_backbone, without, strict=True))
    assert all(gradient.any() for gradient in without), "a zero is compared with nothing"


@pytest.mark.parametrize("what", ["loss", "gate_logit", "reward_weight"])
def test_a_wrong_training_step_is_not_timed(what, monkeypatch):
    right = chunked.dual_head_loss

    def wrong(hidden, labels, mask, gate_logit, heads, *rest):
        if what == "gate_logit":
            gate_logit = gate_logit * 0.5 + gate_logit.detach() * 0.5
        elif what == "reward_weight":
            heads.reward_weight = heads.reward_weight * 0.5 + heads.reward_weight.detach() * 0.5
        out = right(hidden, labels, mask, gate_logit, heads, *rest)
        out.loss = out.loss * (1.1 if what == "loss" else 1.0)
        return out

    monkeypatch.setattr(chunked, "dual_head_loss", wrong)
    with pytest.raises(RuntimeError, match="a step of dualhead and eager's differ by"):
        training.run_case(training_cases.tiny_case(), seconds=0)


@pytest.mark.parametrize(("factor", "misses"), [(1.09, 0), (1.12, 1)])
def test_what_the_heads_may_add_to_a_7b_backbone(factor, misses):
    case = training_cases.gpu_plan()[0]
    assert case.allowed == 1.1 and case.tokens == 8192
    names = {"forward": 1.0, "dualhead": factor, "eager": 9.0, "cached": 0.1}
    timings = {name: Timing(name, tuple(us * f for us in STEADY)) for name, f in names.items()}
    result = training.TrainingResult(case, timings, 10**9, dict.fromkeys(names, 10**6))
    found = report.Report({"device": "Made Up"})
    assert found.add_training(result).count("TOO SLOW: ") == misses == len(found.failures)
    lines = report.markdown(found.as_json()).splitlines()
    rate = 8192 / 11.0 * 1e6
    assert f"| random Llama, 6.7B | bf16 | forward | {rate:.0f} | 1000 MB | 1 MB |" in lines
