# SPDX-License-Identifier: Apache-2.0
"""The choice of a token on CUDA (filters.cuh, token.cuh), on the host backend, against NumPy.

The tests cover the Gumbel race, filters, ties and rows that are not finite.
test_cuda_kernel_host.py covers the rest of a step.
"""

from __future__ import annotations

import numpy as np
import numpy_decode as model
import pytest
from cuda_host import check_step, runner
from numpy_model import log_softmax


@pytest.fixture
def run(testing_module):
    return runner(testing_module)


FILTERS = {
    "none": {},
    "temperature": dict(temperature=[0.7, 0.0, 1.3, 0.1]),
    "top_k": dict(top_k=[3, 0, 1, 1000]),
    "top_p": dict(top_p=[0.5, 1.0, 0.0, 0.95]),
    "min_p": dict(min_p=[0.2, 0.0, 1.0, 0.01]),
    "all": dict(
        temperature=[0.8, 2.0, 0.0, 1.0],
        top_k=[5, 20, 3, -1],
        top_p=[0.8, 0.9, 0.5, 0.7],
        min_p=[0.05, 0.1, 0.5, 0.02],
    ),
}


@pytest.mark.parametrize("mix_probs", [False, True], ids=["logits", "probs"])
@pytest.mark.parametrize("filters", FILTERS)
def test_sampled_token_wins_the_race_among_what_the_filters_leave(run, seed, filters, mix_probs):
    rng = np.random.default_rng(seed)
    arguments = model.random_arguments(rng, "float32", B=4, V=101, gate="given")
    arguments["mix_probs"] = mix_probs
    for name, values in FILTERS[filters].items():
        arguments[name] = np.array(values, np.int32 if name == "top_k" else np.float32)
    for draw in (0, 2**32 + 3):
        arguments["seeds"] = rng.integers(-(2**63), 2**63 - 1, 4)
        arguments["draws"] = np.arange(4) + draw
        check_step(arguments, run(arguments, seed=seed), "float32")


@pytest.mark.parametrize("filters", ["top_k", "top_p", "min_p", "all"])
def test_filters_leave_exactly_the_right_tokens(run, seed, filters):
    """Over many draws from one row, only tokens that the filters keep are drawn, and all likely
    ones are.
    """
    rng = np.random.default_rng(seed)
    B = 192
    arguments = model.random_arguments(rng, "float32", B=B, d=3, V=9, gate="given")
    arguments["hidden"][:] = arguments["hidden"][0]
    arguments["gate_logit"][:] = 0.0
    for name, values in FILTERS[filters].items():
        arguments[name] = np.full(B, values[0], np.int32 if name == "top_k" else np.float32)
    arguments |= {"seeds": np.full(B, 11), "draws": np.arange(B)}
    step = run(arguments, seed=seed)
    raced = model.race(arguments, 0, step.logits[0], 0)
    kept = np.flatnonzero(raced > -np.inf)
    assert set(step.token) <= set(kept) and 0 < len(kept) < 9
    logits = step.logits[0, kept].astype(np.float64) / float(
        arguments.get("temperature", np.ones(1))[0]
    )
    likely = kept[np.exp(log_softmax(logits)) > 0.1]
    assert set(likely) <= set(step.token)


def equal_logits(values):
    """Arguments for one row whose logits are exactly these values, all from the LM head."""
    values = np.asarray(values, np.float32)
    return {
        "hidden": np.ones((1, 1), np.float32),
        "lm_weight": values[:, None].copy(),
        "reward_weight": np.zeros((1, len(values), 1), np.float32),
        "gate_logit": np.zeros(1, np.float32),
        "alpha": np.zeros(1, np.float32),
        "mix_probs": False,
        "logit_scale": 1.0,
        "logit_softcap": 0.0,
    }


def test_ties_go_to_the_lowest_index(run):
    values = np.full(100, 1.0)
    values[[35, 36, 70, 99]] = 2.0
    assert run(equal_logits(values)).token.tolist() == [35]
    assert run(equal_logits([-0.0, 0.0, -0.0])).token.tolist() == [0]
    assert run(equal_logits([-np.inf, -3.0, -np.inf, -3.0])).token.tolist() == [1]


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        (dict(top_k=2), {35, 36}),
        (dict(top_p=0.5), {35, 36}),  # four tokens share all of the probability
        (dict(top_p=0.51), {35, 36, 70}),
        (dict(min_p=1.0), {35, 36, 70, 99}),
    ],
    ids=str,
)
def test_equal_logits_at_a_cut_keep_the_lowest_indices(run, filters, kept):
    values = np.full(100, -80.0)
    values[[35, 36, 70, 99]] = 20.0
    base = equal_logits(values)
    drawn = set()
    for draw in range(24):
        arguments = base | {"seeds": np.array([3]), "draws": np.array([draw])}
        for name, value in filters.items():
            arguments[name] = np.array([value], np.int32 if name == "top_k" else np.float32)
        drawn |= set(run(arguments, blocks=1, threads=32).token.tolist())
    assert drawn == kept


HARD_ROWS = {  # the cut is searched for in bins of 1/64 nat, with up to 512 tokens in one bin
    "equal": np.full(1100, 1.5),
    "nearly equal": 1.5 + np.arange(1100) * 1e-6,
    "two values": np.where(np.arange(1100) % 3 == 0, 2.0, -50.0),
    "beyond the last bin": -0.5 * np.arange(1100.0),
    "spread": 4.0 * np.sin(np.arange(1100.0)),
}


@pytest.mark.quick_cases(16)
@pytest.mark.parametrize("values", HARD_ROWS.values(), ids=list(HARD_ROWS))
@pytest.mark.parametrize(
    "filters",
    [
        dict(top_k=1),  # nearly every winner is refused, and the race is repeated above it
        dict(top_k=600),
        dict(top_p=1e-6),
        dict(top_k=600, top_p=0.50042),
        dict(top_k=3, top_p=0.9),
        dict(top_k=2, top_p=0.45),
        dict(top_k=2, min_p=0.999),
        dict(top_p=0.7, min_p=0.01),
    ],
    ids=str,
)
def test_filters_of_rows_that_are_hard_to_cut(run, seed, values, filters):
    base = equal_logits(values)
    for name, value in filters.items():
        base[name] = np.array([value], np.int32 if name == "top_k" else np.float32)
    for draw in range(3):
        arguments = base | {"seeds": np.array([7]), "draws": np.array([draw])}
        step = run(arguments, blocks=1, threads=64 if draw % 2 else 256, seed=seed + draw)
        raced = model.race(arguments, 0, step.logits[0], draw)
        assert step.token.tolist() == [int(np.argmax(raced))]


# --- rows that are not finite --------------------------------------------------------------------


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("mix_probs", [False, True], ids=["logits", "probs"])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_non_finite_row_is_reported_and_leaves_its_neighbours_alone(
    run, seed, poison, mix_probs, sampled
):
    rng = np.random.default_rng(seed)
    arguments = model.random_arguments(rng, "float32", B=4, S=6, V=40)
    arguments["mix_probs"] = mix_probs
    if sampled:
        arguments |= {"seeds": np.arange(4), "draws": np.zeros(4, np.int64)}
        arguments |= {"top_k": np.full(4, 5, np.int32), "top_p": np.full(4, 0.9, np.float32)}
    healthy = run(arguments, record=True, seed=seed)
    check_step(arguments, healthy, "float32")
    arguments["hidden"] = arguments["hidden"].copy()
    arguments["hidden"][1, 5] = poison
    step = run(arguments, record=True, seed=seed)
    assert step.status.tolist() == [0, 1, 0, 0]
    assert step.token[1] == 0 and np.isnan(step.logprob[1])
    assert step.state["cache_length"].tolist() == healthy.state["cache_length"].tolist()
    assert not sampled or step.state["draws"].tolist() == [1, 1, 1, 1]
    for b in (0, 2, 3):
        for name, value in step.arrays().items():
            assert value[b].tobytes() == healthy.arrays()[name][b].tobytes(), name


def test_rows_without_any_mass_or_with_a_nan_alpha_are_not_finite(run):
    assert run(equal_logits([-np.inf] * 40)).status.tolist() == [1]
    assert run(equal_logits([0.0] * 39 + [np.inf])).status.tolist() == [1]
    nan = run(equal_logits([0.0, 1.0]) | {"alpha": np.array([np.nan], np.float32)})
    assert nan.status.tolist() == [1] and nan.token.tolist() == [0] and np.isnan(nan.alpha).all()
    # Strength 0 switches the gate off, even if alpha is NaN.
    zero = equal_logits([0.0, 1.0]) | {"alpha": np.array([np.nan], np.float32)}
    zero["strength"] = np.zeros(1, np.float32)
    step = run(zero)
    assert step.status.tolist() == [0] and step.token.tolist() == [1] and step.alpha == 0
