# SPDX-License-Identifier: Apache-2.0
"""Calibration: strength 1 gives 0.1 nats per token of decoded text, and kl= chooses a strength."""

import logging

import pytest
import torch
from tiny_models import VOCAB, make_model, prompts
from trainer_cases import make_trainer, pairs

from dualhead_ext.head import calibration, kl_cap
from dualhead_ext.head.calibration import calibrate, scale_reward, strength_of_kl

HEADS = [("full", "logits"), ("embedding", "logits"), ("lowrank", "logits"), ("embedding", "probs")]


def states(model, seed=0):
    ids = torch.randint(3, VOCAB, (4, 20), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        hidden = model.training_hidden_states(input_ids=ids)
        gate_logit = model.lm_head_module.gate(hidden)
    return hidden.flatten(0, 1), gate_logit.flatten()


def some_prompts(count=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (5,), generator=generator).tolist() for _ in range(count)]


@pytest.mark.parametrize(("head", "mix"), HEADS)
def test_kl_of_states_is_that_of_the_mixture(head, mix):
    """This includes alpha above 1, which only the logits mix allows."""
    model = make_model("llama", reward_head=head, mix=mix)
    module = model.lm_head_module
    hidden, gate_logit = states(model)
    for strength in (0.0, 0.7, 1.6):
        got = calibration.mean_kl(module, hidden, gate_logit, strength)
        alpha = torch.sigmoid(gate_logit) * strength
        alpha = alpha.clamp(max=1) if mix == "probs" else alpha
        with torch.no_grad():
            z_lm = module.lm_logits(hidden[:, None])
            z_rm = module.reward_logits(hidden[:, None], z_lm, None)
            expected = kl_cap.kl_from_backbone(z_lm[:, 0], z_rm[:, 0], alpha, mix)
        torch.testing.assert_close(got.double(), expected, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("head", ["full", "embedding", "lowrank"])
def test_scale_reward_scales_delta_alone(head):
    model = make_model("llama", reward_head=head)
    module = model.lm_head_module
    hidden = states(model)[0][:, None]
    with torch.no_grad():
        z_lm = module.lm_logits(hidden)
        before = module.reward_logits(hidden, z_lm, None) - z_lm
        scale_reward(module, 0.3)
        assert torch.equal(module.lm_logits(hidden), z_lm)
        after = module.reward_logits(hidden, z_lm, None) - z_lm
    torch.testing.assert_close(after, 0.3 * before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("head", "mix"), HEADS)
def test_decoded_text_has_the_kl_that_was_asked(head, mix, monkeypatch):
    """On other prompts and other random numbers than those of the calibration."""
    monkeypatch.setattr(calibration, "REQUESTS", 96)
    model = make_model("llama", reward_head=head, mix=mix, gate="linear")
    curve = calibrate(model, *states(model), some_prompts(24))
    assert model.dual_head_config.kl_curve is curve and curve[0] == [0.0, 0.0]
    fresh = some_prompts(96, seed=1)
    for kl in (0.05, 0.1, 0.2):
        if kl > curve[-1][1]:
            assert mix == "probs"
            continue
        strength = torch.full((96,), strength_of_kl(curve, kl))
        sampled = calibration.sample(model, fresh, strength, seed=5)
        measured, _ = calibration.decoded_kl(model, sampled, strength)
        assert measured.mean().item() == pytest.approx(kl, rel=0.25)


@pytest.mark.parametrize("gate", ["attention", "linear", "fixed"])
def test_kl_of_sampled_text_is_that_of_a_pass_over_it(gate):
    """Prompts have several lengths, and some texts end early."""
    model = make_model("llama", reward_head="embedding", gate=gate)
    model.generation_config.eos_token_id = list(range(3, 23))
    given = [prompt[: 1 + i % 5] for i, prompt in enumerate(some_prompts(12))]
    strength = torch.linspace(0.1, 3, 12)
    sampled = calibration.sample(model, given, strength, seed=5)
    assert len({len(text) for text in sampled.texts}) > 2
    kl, rows = calibration.decoded_kl(model, sampled, strength)
    head = model.lm_head_module
    for row, (prompt, text) in enumerate(zip(given, sampled.texts, strict=True)):
        with torch.no_grad():
            hidden = model.training_hidden_states(input_ids=torch.tensor([[*prompt, *text]]))
            gate_logit = head.gate(hidden)
        of_text = slice(len(prompt) - 1, -1)
        parts = hidden[0, of_text], gate_logit[0, of_text]
        expected = calibration.mean_kl(head, *parts, float(strength[row]))
        torch.testing.assert_close(kl[rows == row], expected, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize(("head", "mix"), HEADS)
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e3])
def test_the_first_scale_gives_the_kl_on_the_states(head, mix, size):
    model = make_model("llama", reward_head=head, mix=mix, gate="linear")
    module = model.lm_head_module
    scale_reward(module, size)
    found = calibration._States(module, *states(model))
    found.keep_logits()
    with torch.no_grad():
        scale = found.scale_for(0.05)
        got = found.kl(scale, torch.ones(len(found.hidden))).mean()
    assert got.item() == pytest.approx(0.05, rel=5e-3)


def test_calibration_repeats_itself_and_leaves_the_random_numbers_alone():
    curves = []
    for _ in range(2):
        model = make_model("llama", reward_head="embedding")
        torch.manual_seed(3)
        expected = torch.rand(2)
        torch.manual_seed(3)
        curves.append(calibrate(model, *states(model), some_prompts()))
        assert torch.equal(torch.rand(2), expected)
    # The last bit of eager PyTorch's sums may depend on the memory's alignment.
    assert curves[0] == [pytest.approx(point, rel=1e-12) for point in curves[1]]


def test_strength_of_kl():
    curve = [[0.0, 0.0], [1.0, 0.1], [2.0, 0.4]]
    assert strength_of_kl(curve, 0.0) == 0.0 and strength_of_kl(curve, 0.4) == 2.0
    # KL is proportional to the square of the strength.
    assert strength_of_kl(curve, 0.025) == pytest.approx(0.5)
    assert strength_of_kl(curve, [0.1, 0.225]) == pytest.approx([1.0, 1.5])
    assert strength_of_kl(curve, torch.tensor([0.1])) == pytest.approx([1.0])
    for kl in (0.41, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"kl must be in \[0, 0.4\]"):
            strength_of_kl(curve, kl)
    with pytest.raises(TypeError, match="kl must be a number"):
        strength_of_kl(curve, "0.1")
    with pytest.raises(ValueError, match="kl needs calibrated heads"):
        strength_of_kl(None, 0.1)


def test_generate_takes_kl(caplog):
    model = make_model("llama", reward_head="embedding", num_objectives=2)
    model.dual_head_config.kl_curve = [[0.0, 0.0], [1.0, 0.1], [2.0, 0.4]]
    inputs = prompts()
    given = {"max_new_tokens": 6, "do_sample": False}
    by_kl = model.generate(**inputs, **given, kl=0.225)
    assert torch.equal(by_kl, model.generate(**inputs, **given, strength=1.5))
    rows = model.generate(**inputs, **given, kl=[0.0, 0.1, 0.4])
    assert torch.equal(rows, model.generate(**inputs, **given, strength=[0.0, 1.0, 2.0]))
    with pytest.raises(ValueError, match="give one"):
        model.generate(**inputs, **given, kl=0.1, strength=1.0)
    with caplog.at_level(logging.WARNING):
        model.generate(**inputs, **given, kl=0.1, objective_weights=[0.5, 0.5])
        assert not caplog.records
        model.generate(**inputs, **given, kl=0.1, objective_weights=[1.0, 0.0])
    assert "uniform objective weights" in caplog.text


def test_the_trainer_calibrates_at_the_end(tmp_path, caplog):
    options = {"preset": "default", "num_train_epochs": 2, "learning_rate": 0.05}
    config = {"reward_head": "embedding", "gate": "fixed"}
    trainer = make_trainer(tmp_path, None, None, pairs(8, seed=1), config, **options)
    trainer.train()
    curve = trainer.model.dual_head_config.kl_curve
    assert dict(map(tuple, curve))[1.0] == pytest.approx(0.1, rel=1e-3)
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, None, None, None, config, **options).train()
    assert "prompts that were trained on" in caplog.text
    trainer = make_trainer(tmp_path, None, None, None, config, **options, calibrate=False)
    trainer.train()
    assert trainer.model.dual_head_config.kl_curve is None


def test_a_reward_of_zero_cannot_be_scaled():
    model = make_model("llama", reward_head="embedding")
    scale_reward(model.lm_head_module, 0.0)
    with pytest.raises(ValueError, match="no scale of the reward"):
        calibrate(model, *states(model), some_prompts())
    with pytest.raises(ValueError, match="expected states and prompts, got 80 and 0"):
        calibrate(model, *states(model), [])
