# SPDX-License-Identifier: Apache-2.0
"""The chunked loss against the reference: values and gradients.

The tests use random shapes and options, every workspace size and extreme values. They also check
what the loss does not compute.
"""

import math
import random

import pytest
import torch
from fused_loss_cases import WEIGHTS, loss_and_gradients, objectives, with_reference
from loss_cases import DIFFERENTIABLE, OPTION_SETS, REWARD_HEADS, Products, batch, ranked
from torch.utils._python_dispatch import TorchDispatchMode

from dualhead_ext.functional import dual_head_loss
from dualhead_ext.loss import chunked, token_rewards
from dualhead_ext.loss import products as loss_products
from dualhead_ext.loss import rows as loss_rows

EVERY_ENTRY = ("default", "mixed_probs", "post")


@pytest.fixture(params=[1, 700, 64 << 20], ids=["1 B", "700 B", "64 MiB"])
def workspace(request, monkeypatch):
    """Workspaces from one row of logits at a time to everything in one chunk.

    With the smallest, every pair is longer than the workspace, and token rewards are computed one
    token at a time.
    """
    monkeypatch.setattr(chunked, "WORKSPACE_BYTES", request.param)
    monkeypatch.setitem(token_rewards.BLOCK_BYTES, "cpu", request.param)
    return request.param


def assert_same(tensors, tolerance=1e-9, **options):
    got, grads = loss_and_gradients(tensors, **options)
    expected, exact = with_reference(loss_and_gradients, tensors, **options)
    close = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
    for name in vars(expected):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), **close)
    assert grads.keys() == exact.keys()
    for name, grad in exact.items():
        # None and zeros both mean that the loss does not depend on the argument.
        zeros = torch.zeros_like(tensors[name])
        pair = (zeros if g is None else g for g in (grads[name], grad))
        torch.testing.assert_close(*pair, msg=lambda m, n=name: f"{n}: {m}", **close)


@pytest.mark.parametrize("name", OPTION_SETS)
def test_every_option_in_every_workspace(workspace, name, seed):
    assert_same(batch(seed, rows=8), **OPTION_SETS[name])
    assert_same(batch(seed + 1, rows=9, objectives=3), num_pairs=3, **OPTION_SETS[name],
                **objectives(seed, 3, 3))  # fmt: skip


@pytest.mark.quick_cases(60)
@pytest.mark.parametrize("name", OPTION_SETS)
@pytest.mark.parametrize("head", REWARD_HEADS)
def test_every_reward_head_on_ranked_lists(workspace, name, head, seed):
    for K in (1, 2):
        lists = ranked(seed + K, 9, K)
        weights = {"objective_weights": torch.tensor([0.3, 1.4])} if K == 2 else {}
        t = batch(seed + K, rows=9, objectives=K, head=head)
        assert_same(t, **lists, **weights, **OPTION_SETS[name])


@pytest.mark.slow
def test_500_random_problems(monkeypatch, seed):
    """Random shapes, options, objectives and workspaces, also with rows that are in no pair."""
    r = random.Random(seed)
    for i in range(500):
        monkeypatch.setattr(chunked, "WORKSPACE_BYTES", r.choice([1, 200, 900, 5000, 1 << 26]))
        rows, K = r.randint(1, 9), r.choice([1, 1, 2, 3])
        pairs = r.randint(0, rows // 2)
        options = dict(r.choice(list(OPTION_SETS.values())))
        for extra in (dict(o) for o in r.sample(list(OPTION_SETS.values()), 2)):
            options = extra | options
        if pairs and (K > 1 or r.random() < 0.2):
            options |= objectives(seed + i, pairs, K)
        if options.get("preference") == "token_reward":
            options |= {"pref_on": "reward", "pref_gate": 1}
        t = batch(seed + i, rows, r.randint(1, 12), r.randint(1, 7), r.randint(1, 20), K,
                  r.random() < 0.5, head=r.choice(list(REWARD_HEADS)))  # fmt: skip
        try:
            assert_same(t, num_pairs=pairs, **options)
        except AssertionError as error:
            raise AssertionError(f"problem {i}: rows {rows}, pairs {pairs}, {options}") from error


@pytest.mark.quick_cases(17)
@pytest.mark.parametrize("name", OPTION_SETS)
def test_gradcheck(workspace, name, seed):
    """Every entry for three sets of options, and a random direction for the others."""
    t = batch(seed, rows=5, length=3)
    names = [n for n in DIFFERENTIABLE if n in t]
    leaves = [t[n].requires_grad_() for n in names]

    def loss(*values):
        changed = dict(zip(names, values, strict=True))
        return dual_head_loss(**(t | changed), num_pairs=2, **OPTION_SETS[name]).loss

    assert torch.autograd.gradcheck(loss, leaves, fast_mode=name not in EVERY_ENTRY)


@pytest.mark.quick_cases(12)
@pytest.mark.parametrize("name", OPTION_SETS)
@pytest.mark.parametrize("head", ["embedding", "embedding, rank 0", "lowrank"])
def test_gradcheck_of_corrections(head, name, monkeypatch, seed):
    """By every weight, the hidden states and the gate, with small chunks and blocks."""
    monkeypatch.setattr(chunked, "WORKSPACE_BYTES", 700)
    monkeypatch.setitem(token_rewards.BLOCK_BYTES, "cpu", 40)
    monkeypatch.setattr(loss_rows, "KL_ROWS", 3)
    t = batch(seed, rows=5, length=3, objectives=2, head=head)
    names = [n for n in DIFFERENTIABLE if n in t]
    leaves = [t[n].requires_grad_() for n in names]
    which = {"num_pairs": 2, **objectives(seed, 2, 2)}

    def loss(*values):
        changed = dict(zip(names, values, strict=True))
        return dual_head_loss(**(t | changed), **which, **OPTION_SETS[name]).loss

    entry_by_entry = name in ("default", "token_reward_alone", "kl_post")
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=not entry_by_entry)


@pytest.mark.parametrize("mix", ["logits", "probs"])
@pytest.mark.parametrize("pref_on", ["reward", "mixed"])
def test_extreme_logits_and_gates(workspace, mix, pref_on, seed):
    """Logits of 1e4, gate logits of +-60, and alpha of exactly 0 and 1."""
    t = batch(seed, rows=6, length=6)
    t["hidden"] *= 1e3
    values = torch.tensor([60.0, -60.0, torch.inf, -torch.inf, 800.0, -800.0])
    t["gate_logit"] = values.double().repeat(6, 1)
    got, grads = loss_and_gradients(t, mix=mix, pref_on=pref_on)
    assert got.loss.isfinite() and all(g.isfinite().all() for g in grads.values())
    expected, exact = with_reference(loss_and_gradients, t, mix=mix, pref_on=pref_on)
    torch.testing.assert_close(got.loss, expected.loss)
    for name, grad in exact.items():
        # The reference's gradient of the mixture is NaN where the gate's logit is infinite.
        same = {"rtol": 1e-7, "atol": 1e-7 * float(grad.nan_to_num().abs().max() + 1)}
        torch.testing.assert_close(grads[name], grad.nan_to_num(), **same)


def test_lengths_that_differ_100_fold(workspace, seed):
    t = batch(seed, rows=6, length=200)
    lengths = torch.tensor([200, 1, 2, 2, 100, 0])
    t["mask"] = torch.arange(200) < lengths[:, None]
    t["labels"] = torch.randint(0, 6, (6, 200))
    assert_same(t)


def in_eager(*args, **kwargs):
    return with_reference(loss_and_gradients, *args, **kwargs)


def relative_errors(problem, exact, wanted, options, call):
    """{name: root mean square error against exact, relative to exact's largest entry}"""
    truth, true_grads = exact
    out, grads = call(problem, wanted, **options)
    pairs = {n: (grads[n], true_grads[n]) for n in wanted if true_grads[n] is not None}
    pairs["loss"] = (out.loss.detach(), truth.loss.detach())
    return {
        n: float(((got - right) / right.abs().max().clamp(min=1e-12)).square().mean().sqrt())
        for n, (got, right) in pairs.items()
    }


# How much larger than eager's our error may be. Narrow products round as eager's do, so that both
# errors are alike except for noise. The gradient of a bf16 weight is a sum of such products, one
# for each chunk, and is rounded once more. Widened products are not rounded.
ALLOWED = {"fp32": 1.1, "autocast": 1.05, "bf16": 1.15}


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("pays", [True, False], ids=["narrow products", "widened"])
@pytest.mark.parametrize("kind", ALLOWED)
def test_errors_are_at_most_those_of_eager(kind, pays, monkeypatch, seed):
    """Errors of the loss and of every gradient, over 500 random shapes, options and objectives.

    The test compares the geometric mean of the ratios, so that no single problem decides.

    kind: the dtype of weights and hidden states. autocast: hidden states in bf16, weights in fp32,
    as in training.
    """
    monkeypatch.setattr(loss_products, "narrow_pays", lambda device, dtype: pays)
    monkeypatch.setattr(loss_products, "VOCABULARY_BLOCK", 64)
    wanted, r = ("hidden", "gate_logit", "lm_weight", "reward_weight"), random.Random(seed)
    narrow = {"fp32": (), "autocast": ("hidden",), "bf16": ("hidden", *WEIGHTS)}[kind]
    calls = [loss_and_gradients, in_eager]
    calls = [under_autocast(call) for call in calls] if kind == "autocast" else calls
    logs = {name: [] for name in (*wanted, "loss")}
    for i in range(500):
        vocab, pairs, K = r.randint(2, 200), r.randint(1, 3), r.choice([1, 1, 2])
        monkeypatch.setattr(chunked, "WORKSPACE_BYTES", r.choice([8, 40]) * vocab * 4)
        shape = (2 * pairs, r.randint(1, 10), r.randint(1, 40), vocab, K, r.random() < 0.3)
        t = batch(seed + i, *shape, dtype=torch.float32)
        t |= {n: (0.3 * t[n]).bfloat16().float() for n in WEIGHTS if n in t}
        t |= {n: t[n].bfloat16() for n in narrow if n in t}
        options = dict(r.choice(list(OPTION_SETS.values())))
        options |= objectives(seed + i, pairs, K) if K > 1 else {}
        doubles = {k: v.double() if v.is_floating_point() else v for k, v in t.items()}
        exact = in_eager(doubles, wanted, **options)
        ours, eager = (relative_errors(t, exact, wanted, options, call) for call in calls)
        for name in ours:
            if ours[name] > 0 and eager[name] > 0:
                logs[name].append(math.log(ours[name] / eager[name]))
    for name, values in logs.items():
        ratio = math.exp(sum(values) / len(values))
        assert len(values) > 300 and ratio <= (
            1.0 if kind != "fp32" and not pays else ALLOWED[kind]
        ), (name, ratio)


def under_autocast(call):
    def within(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return call(*args, **kwargs)

    return within


class Watch(TorchDispatchMode):
    """Counts the products of matrices, and records the size of the largest tensor."""

    def __init__(self):
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.products += func._schema.name in ("aten::mm", "aten::addmm_", "aten::addmm")
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return result


def test_three_products_where_the_lm_head_is_frozen(seed):
    """z_LM of the chosen responses, z_RM of both responses, dW of both. There is no dW_LM and no
    dh.
    """
    t = batch(seed, rows=4, length=9, dtype=torch.float32, bias=False)
    with Watch() as watch:
        loss_and_gradients(t, ("reward_weight", "gate_logit"))
    assert watch.products == 3
    with Watch() as watch, torch.no_grad():
        dual_head_loss(**t)
    assert watch.products == 2


@pytest.mark.parametrize("name", ["token_reward_alone", "token_reward", "kl_post", "kl"])
@pytest.mark.parametrize("head", ["embedding", "lowrank"])
def test_products_with_the_vocabulary_of_a_correction(head, name, seed):
    """Token rewards need no product with the vocabulary.

    With L_LM alone, an "embedding" mixture is one product, and "lowrank" one each by W_LM and B.
    With a KL there is one for z_LM and one for the correction. The correction's gradient takes two
    for "lowrank", by B and by A h, and one for "embedding", by M h + c.
    """
    t = batch(seed, rows=4, length=9, d=5, vocab=50, dtype=torch.float32, head=head)
    wanted = ("reward_down", "reward_up", "reward_bias", "gate_logit")
    with Products() as products:
        loss_and_gradients(t, wanted, **OPTION_SETS[name])
    forward = [shape[-1] == 50 for *_, shape in products.seen]
    expected = {"token_reward_alone": (0, 0), "token_reward": (1, 1)}.get(name, (2, 1))
    if head == "lowrank" and name != "token_reward_alone":
        expected = (2, 2)
    assert (sum(forward), len(forward) - sum(forward)) == expected


def test_token_rewards_hold_a_block_of_rows(monkeypatch, seed):
    """The hidden states, or the labels' rows, of all tokens are never in memory at once."""
    t = batch(seed, rows=12, length=40, d=32, vocab=16, dtype=torch.float32, head="embedding")
    count = int(t["mask"].sum())
    monkeypatch.setitem(token_rewards.BLOCK_BYTES, "cpu", 4 * 4 * 32)
    for name in ("reward_down", "reward_up", "reward_bias"):
        t[name].requires_grad_()
    with Watch() as watch:
        dual_head_loss(**t, **OPTION_SETS["token_reward_alone"]).loss.backward()
    assert t["reward_up"].grad.abs().sum() > 0 and watch.largest < count * 32 / 4


def test_never_all_logits(monkeypatch, seed):
    """The largest tensor is the gradient of the weight, or a chunk of logits."""
    monkeypatch.setattr(chunked, "WORKSPACE_BYTES", 4 * 500 * 16)
    t = batch(seed, rows=12, length=40, d=4, vocab=500, dtype=torch.float32, bias=False)
    assert int(t["mask"].sum()) * 500 > 16 * 500 * 4
    with Watch() as watch:
        loss_and_gradients(t, ("reward_weight", "gate_logit"))
    assert watch.largest <= 16 * 500


def test_double_backward_is_refused():
    t = batch(3)
    t["reward_weight"].requires_grad_()
    loss = dual_head_loss(**t).loss
    with pytest.raises(RuntimeError, match="first derivative only"):
        torch.autograd.grad(loss, t["reward_weight"], create_graph=True)


def test_gradients_are_handed_over_without_a_copy(monkeypatch):
    """.grad is the tensor in which the gradient was summed, so that it exists only once."""
    made = []
    gradients_of = chunked._gradients_of
    monkeypatch.setattr(
        chunked, "_gradients_of", lambda result: made.append(gradients_of(result)) or made[-1]
    )
    t = batch(7, dtype=torch.float32)
    t["reward_weight"].requires_grad_()
    (dual_head_loss(**t).loss * 0.5).backward()
    address = made.pop()[chunked._INPUTS.index("reward_weight")].data_ptr()
    assert t["reward_weight"].grad.data_ptr() == address


def test_a_retained_graph_gives_its_gradients_again():
    t = batch(8)
    weight = t["reward_weight"].requires_grad_()
    loss = dual_head_loss(**t).loss
    (once,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (twice,) = torch.autograd.grad(2 * loss, weight, retain_graph=True)
    assert torch.equal(2 * once, twice)
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, weight)


def test_nothing_to_train_costs_no_gradients():
    t = batch(5)
    assert not dual_head_loss(**t).loss.requires_grad
    t["reward_weight"].requires_grad_()
    with torch.no_grad():
        assert not dual_head_loss(**t).loss.requires_grad


def test_thread_count_changes_nothing(seed):
    t = batch(seed, rows=8, length=20, d=32, vocab=700, dtype=torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(loss_and_gradients(t)[0].loss)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*found)
