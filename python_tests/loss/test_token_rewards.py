# SPDX-License-Identifier: Apache-2.0
"""Training by token rewards.

The tests cover every head and gate, ranked lists, the KL penalty, separate learning rates, early
stopping, hidden states in memory, and refusals.
"""

import pytest
import torch
from tiny_models import make_backbone, make_model
from torch.utils._python_dispatch import TorchDispatchMode
from trainer_cases import arguments, heads, make_trainer, pairs, ranked_lists, same

import dualhead_ext as dh
from dualhead_ext.functional import dual_head_loss

# Without the weight on squared rewards, under which so few steps on a toy learn too little.
TOKEN = {"preset": "default", "calibrate": False, "reward_l2": 0.0}


def fresh(**config):
    """A model whose reward head starts at zero, like a user's."""
    torch.manual_seed(0)
    config = {"reward_head": "embedding", "reward_rank": 0, "gate": "fixed"} | config
    sizes = {"gate_num_heads": 2, "gate_head_dim": 6}
    return dh.DualHeadForCausalLM.from_backbone(
        make_backbone("llama"), **{"reward_head": "full", "gate": "attention"} | sizes | config
    )


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize("gate", ["attention", "linear", "fixed"])
@pytest.mark.parametrize("head", ["full", "embedding", "lowrank"])
def test_training_ranks_held_out_pairs(tmp_path, head, gate):
    model = fresh(reward_head=head, reward_rank=2, gate=gate)
    trainer = make_trainer(
        tmp_path, model, pairs(64), pairs(40, seed=1), **TOKEN, num_train_epochs=4,
        learning_rate=0.02,
    )  # fmt: skip
    before = trainer.evaluate()["eval_rewards/accuracies"]
    trainer.train()
    after = trainer.evaluate()
    assert before == 0.0 and after["eval_rewards/accuracies"] > 0.9
    assert "eval_lm_loss" not in after and after["eval_loss"] < 0.6


def test_ranked_lists_train(tmp_path):
    trainer = make_trainer(tmp_path, fresh(), ranked_lists(), **TOKEN, num_train_epochs=3)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "rewards/accuracies" in entry]
    assert logged[-1]["preference_loss"] < logged[0]["preference_loss"]


class Sizes(TorchDispatchMode):
    """The size of the largest result that has the vocabulary as a dimension."""

    def __init__(self, vocab):
        super().__init__()
        self.vocab, self.largest = vocab, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor) and self.vocab in x.shape:
                self.largest = max(self.largest, x.numel())
        return result


@pytest.mark.parametrize("head", ["embedding", "lowrank", "full"])
def test_no_product_with_the_vocabulary(head):
    """Token rewards read only the rows of tokens that occur.

    Only weights and their gradients have a row for each token of the vocabulary.
    """
    model = fresh(reward_head=head, reward_rank=2)
    module, vocab = model.lm_head_module, model.config.vocab_size
    for parameter in module.reward_head.parameters():
        parameter.requires_grad_()
    hidden = torch.randn(8, 50, 32)
    labels = torch.randint(0, vocab, (8, 50))
    with Sizes(vocab) as sizes:
        out = dual_head_loss(
            hidden, labels, labels >= 0, torch.zeros(8, 50), lm_weight=module.lm_weight,
            **module.reward_head.tensors(), preference="token_reward", lm_on_chosen=False,
            reward_l2=1.0,
        )  # fmt: skip
        out.loss.backward()
    assert sizes.largest <= vocab * 32


def test_memory_is_bounded_with_a_price_on_the_kl(monkeypatch):
    """The logits of all tokens are never in memory at once."""
    from dualhead_ext.loss import chunked
    from dualhead_ext.loss import rows as loss_rows

    vocab = 997
    monkeypatch.setattr(chunked, "WORKSPACE_BYTES", 32 * vocab * 4)
    monkeypatch.setattr(loss_rows, "KL_ROWS", 16)
    hidden, labels = torch.randn(6, 60, 8), torch.randint(0, vocab, (6, 60))
    bias = torch.randn(1, 8).requires_grad_()
    with Sizes(vocab) as sizes:
        out = dual_head_loss(
            hidden, labels, labels >= 0, torch.zeros(6, 60), lm_weight=torch.randn(vocab, 8),
            reward_head="embedding", reward_bias=bias, preference="token_reward", kl_price=0.1,
            lm_on_chosen=False,
        )  # fmt: skip
        out.loss.backward()
    assert bias.grad.abs().sum() > 0 and sizes.largest <= 32 * vocab < labels.numel() * vocab


def test_a_price_on_the_kl_lowers_it(tmp_path):
    found = {}
    for price in (1e-6, 100.0):
        trainer = make_trainer(
            tmp_path, fresh(), pairs(32), pairs(16, seed=1), **TOKEN, kl_price=price,
            num_train_epochs=4, learning_rate=0.03,
        )  # fmt: skip
        trainer.train()
        found[price] = trainer.evaluate()
    assert found[100.0]["eval_kl"] < 0.5 * found[1e-6]["eval_kl"]
    assert found[100.0]["eval_kl_loss"] == pytest.approx(100.0 * found[100.0]["eval_kl"])


def test_a_weight_on_squared_rewards_lowers_them(tmp_path):
    found = {}
    for weight in (1e-6, 25.0):
        trainer = make_trainer(
            tmp_path, fresh(), pairs(32), pairs(16, seed=1), **TOKEN | {"reward_l2": weight},
            num_train_epochs=4, learning_rate=0.03,
        )  # fmt: skip
        trainer.train()
        result = trainer.evaluate()
        found[weight] = result["eval_l2_loss"] / weight
        assert result["eval_rewards/accuracies"] > 0.8
        terms = result["eval_preference_loss"] + result["eval_l2_loss"]
        assert result["eval_loss"] == pytest.approx(terms)
    assert found[25.0] < 0.1 * found[1e-6]


@pytest.mark.parametrize("gate", ["attention", "linear"])
def test_a_gate_that_would_learn_nothing_is_refused(tmp_path, gate):
    for change in ({"pref_gate": 1}, {"kl_price": 0.1}, {"lm_on_chosen": True}):
        make_trainer(tmp_path, fresh(gate=gate), **TOKEN | {"pref_gate": 0} | change)
    with pytest.raises(ValueError, match="the gate would learn nothing"):
        make_trainer(tmp_path, fresh(gate=gate), **TOKEN, pref_gate=0)
    make_trainer(tmp_path, fresh(gate="fixed"), **TOKEN, pref_gate=0)
    labels = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="the gate would learn nothing"):
        dual_head_loss(
            torch.randn(2, 3, 4), labels, labels > 0, torch.zeros(2, 3, requires_grad=True),
            lm_weight=torch.randn(5, 4), reward_head="embedding", reward_bias=torch.randn(1, 4),
            preference="token_reward", lm_on_chosen=False,
        )  # fmt: skip


def test_the_gate_has_a_learning_rate_of_its_own(tmp_path):
    model = fresh(gate="linear")
    trainer = make_trainer(
        tmp_path, model, **TOKEN, learning_rate=0.0, gate_learning_rate=0.1, max_steps=2
    )
    # The gate has no gradient while the reward is zero, as at the start.
    model.lm_head_module.reward_head.bias.data.normal_()
    before = heads(model)
    trainer.train()
    moved = {name for name, x in heads(model).items() if not torch.equal(x, before[name])}
    assert moved and all(".gate." in name for name in moved)
    assert {g["initial_lr"] for g in trainer.optimizer.param_groups} == {0.0, 0.1}


def test_early_stopping_keeps_the_best_heads(tmp_path):
    trainer = make_trainer(
        tmp_path, fresh(reward_head="lowrank", reward_rank=4), pairs(8), pairs(24, seed=5),
        **TOKEN, early_stopping_patience=1, num_train_epochs=60, learning_rate=0.3,
    )  # fmt: skip
    trainer.train()
    evaluations = [e for e in trainer.state.log_history if "eval_preference_loss" in e]
    assert len(evaluations) < 60
    best = min(e["eval_preference_loss"] for e in evaluations)
    assert trainer.evaluate()["eval_preference_loss"] == pytest.approx(best, rel=1e-5)
    with pytest.raises(ValueError, match="needs an eval_dataset"):
        make_trainer(tmp_path, fresh(), **TOKEN, early_stopping_patience=1)


@pytest.mark.parametrize("rows", [pairs(14), "ranked"], ids=["pairs", "ranked"])
def test_states_in_memory_change_nothing(tmp_path, rows):
    rows = ranked_lists() if rows == "ranked" else rows
    found, seen = [], []
    for where in ("memory", None):
        model = fresh()
        model.get_decoder().register_forward_hook(lambda *_: seen.append(1))
        seen.clear()
        trainer = make_trainer(
            tmp_path, model, rows, **TOKEN | {"cache_hidden": where}, num_train_epochs=3
        )
        trainer.train()
        found.append((heads(model), len(seen)))
    (a, few), (b, many) = found
    assert 3 * few == many
    for name, x in a.items():
        torch.testing.assert_close(x, b[name])


def test_states_are_kept_in_memory_by_themselves_where_they_are_read_again(tmp_path, monkeypatch):
    def passes(**changes):
        model, seen = fresh(), []
        model.get_decoder().register_forward_hook(lambda *_: seen.append(1))
        make_trainer(tmp_path, model, **TOKEN | {"cache_hidden": "auto"} | changes).train()
        return len(seen)

    assert passes(num_train_epochs=1) == passes(num_train_epochs=3) == 7
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("", (), {"available": 1000}))
    assert passes(num_train_epochs=3) == 21


def test_presets(tmp_path):
    paper, default = (arguments(tmp_path, preset=name) for name in ("paper", "default"))
    assert paper.preference == "log_prob" and paper.lm_on_chosen and not paper.calibrate
    assert default.preference == "token_reward" and default.calibrate
    assert arguments(tmp_path, preset="paper", beta_r=0.7).beta_r == 0.7
    with pytest.raises(ValueError, match="preset must be one of default, paper, got 'dpo'"):
        arguments(tmp_path, preset="dpo")
    with pytest.raises(ValueError, match='preset="paper" trains a full reward head'):
        make_trainer(tmp_path, fresh(), preset="paper")
    model = make_model("llama")
    make_trainer(tmp_path, model, preset="paper")
    assert model.dual_head_config.preference == "log_prob"
    model = fresh()
    make_trainer(tmp_path, model, **TOKEN)
    assert model.dual_head_config.preference == "token_reward" and same(heads(model), heads(model))
