# SPDX-License-Identifier: Apache-2.0
"""Run bare decode kernels on the host and check a step against float64.

The CUDA kernels run on the host backend, csrc/testing/host_cuda, and those for AVX-512 and AMX with
emulated instructions, csrc/testing/host_x86. Both take NumPy arrays.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy_decode as model
from numpy_model import log_softmax

STATE = ("cache_k", "cache_u", "cache_valid", "cache_length", "draws")  # what a step writes
GUARD = 64  # elements before and after each output; nothing may write to them
# Products of bfloat16 and float16 are exact in fp32, so that every dtype has the error of fp32.
# Logits here are sums of at most 64 terms of a size of about 1.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


class Step(NamedTuple):
    """A step's outputs, and the state after it."""

    logits: np.ndarray
    alpha: np.ndarray
    gate_logit: np.ndarray
    token: np.ndarray
    logprob: np.ndarray
    status: np.ndarray
    attention: np.ndarray | None
    state: dict[str, np.ndarray]

    def arrays(self) -> dict[str, np.ndarray]:
        return {k: v for k, v in (self._asdict() | self.state).items() if k != "state"}


def guarded(shape, dtype, fill):
    """An array of `fill` values inside a larger array of 0xA5 bytes; returns both."""
    size = math.prod(shape)
    whole = np.frombuffer(b"\xa5" * ((size + 2 * GUARD) * np.dtype(dtype).itemsize), dtype).copy()
    view = whole[GUARD : GUARD + size].reshape(shape)
    view[...] = fill
    return whole, view


def run_guarded(call, arguments, record=False) -> Step:
    """Run one step with guarded outputs. The new state is in the result, not in ``arguments``.

    call: runs the kernels on a dict of arguments and outputs.
    """
    arguments = arguments | {k: arguments[k].copy() for k in STATE if k in arguments}
    B, V = len(arguments["hidden"]), len(arguments["lm_weight"])
    outputs = {
        "logits": guarded((B, V), np.float32, np.nan),
        "alpha": guarded((B,), np.float32, np.nan),
        "gate_logit": guarded((B,), np.float32, np.nan),
        "token": guarded((B,), np.int64, -7),
        "logprob": guarded((B,), np.float32, np.nan),
        "status": guarded((B,), np.int32, -7),
    }
    if record and "cache_u" in arguments:
        outputs["attention"] = guarded(arguments["cache_u"].shape, np.float32, np.nan)
    named = {f"out_{name}": view for name, (_, view) in outputs.items()}
    if "lm_product" in arguments:  # in the same memory as the logits, as in the operator
        named["out_logits"][...] = arguments["lm_product"]
        named["lm_product"] = named["out_logits"]
    call(arguments | named)
    for name, (whole, view) in outputs.items():
        bands = np.concatenate([whole[:GUARD], whole[GUARD + view.size :]])
        assert (bands.view(np.uint8) == 0xA5).all(), f"{name}: written out of bounds"
    results = {name: view for name, (_, view) in outputs.items()}
    results["attention"] = results.get("attention")
    return Step(**results, state={k: arguments[k] for k in STATE if k in arguments})


def runner(testing_module):
    """A function that runs one step on the host backend."""

    def step(
        arguments, dtype="float32", *, record=False, blocks=3, threads=64, dirt=0xFF, **device
    ):
        """device: options of the testing module's ``set_device``."""

        def call(named):
            testing_module.set_device(**device)
            try:
                error = testing_module.decode_step(
                    named, dtype, blocks=blocks, threads=threads, dirt=dirt
                )
            finally:
                testing_module.set_device()
            assert error == "cudaSuccess", error

        return run_guarded(call, arguments, record)

    return step


def emulated_runner(testing_module, level):
    """A function that runs one step of the CPU kernels of an emulated level."""

    def step(arguments, dtype, *, record=False, ranges=False):
        """ranges: the smallest ranges that threads may get, instead of one."""

        def call(named):
            testing_module.emulated_decode_step(named, dtype, level, ranges)

        return run_guarded(call, arguments, record)

    return step


def stream_runner(testing_module):
    """A runner for steps that must take the streaming path."""
    step = runner(testing_module)

    def stream(arguments, dtype, **options):
        kept = {k: options[k] for k in ("shared_kib",) if k in options}
        assert testing_module.stream_plan(arguments, dtype, **kept), "takes the plain path"
        options = {"blocks": 2, "threads": 0, "blocks_per_multiprocessor": 1} | options
        return step(arguments, dtype, **options)

    return stream


def same_bits(a: Step, b: Step, but=()) -> list[str]:
    """Names of the arrays that differ in any bit."""
    left, right = a.arrays(), b.arrays()
    return [
        name
        for name, value in left.items()
        if name not in but and value is not None and value.tobytes() != right[name].tobytes()
    ]


def check_appended(arguments, step, dtype, b):
    """Check that row b's new column is right, and that nothing else of its cache has changed."""
    column = int(arguments["cache_length"][b])
    k, u, valid = model.append(arguments, dtype, b)
    stored = model.widen(step.state["cache_k"][b, :, column], dtype).ravel()
    assert (np.abs(stored - k) <= 0.51 * model.spacing(k, dtype) + 1e-5).all()
    np.testing.assert_allclose(step.state["cache_u"][b, :, column], u, **CLOSE)
    assert bool(step.state["cache_valid"][b, column]) == valid
    assert step.state["cache_length"][b] == column + 1
    others = np.arange(arguments["cache_u"].shape[2]) != column
    for name in ("cache_k", "cache_u"):
        before, after = (x[name][b][:, others] for x in (arguments, step.state))
        assert before.tobytes() == after.tobytes()
    before, after = (x["cache_valid"][b][others] for x in (arguments, step.state))
    assert before.tobytes() == after.tobytes()


def check_row(arguments, step, dtype, b, close=CLOSE):
    """Check a row with a finite result, from gate to token. close: the logits' tolerances."""
    if "gate_logit" in arguments:
        gate_logit = float(arguments["gate_logit"][b])
    else:
        check_appended(arguments, step, dtype, b)
        # The stored key has been checked above. From here on it replaces the exact one, since
        # attention reads it.
        columns = int(step.state["cache_length"][b])
        gate_logit, rows = model.attend(arguments | step.state, dtype, b, columns)
        if step.attention is not None:
            np.testing.assert_allclose(step.attention[b], rows, **CLOSE)
    gate_logit += float(arguments["gate_offset"][b]) if "gate_offset" in arguments else 0.0
    np.testing.assert_allclose(step.gate_logit[b], gate_logit, **CLOSE)
    alpha = model.mixing_weight(arguments, b, gate_logit)
    np.testing.assert_allclose(step.alpha[b], alpha, rtol=1e-5, atol=1e-6)
    logits = model.row_logits(arguments, dtype, b, float(step.alpha[b]))
    np.testing.assert_allclose(step.logits[b], logits, **close)
    assert step.status[b] == 0
    token = int(step.token[b])
    exact = log_softmax(step.logits[b].astype(np.float64))
    np.testing.assert_allclose(step.logprob[b], exact[token], **CLOSE)
    if "seeds" not in arguments:
        assert token == np.argmax(step.logits[b])  # numpy too takes the first of equals
        return
    draw = int(arguments["draws"][b])
    assert step.state["draws"][b] == draw + 1
    raced = model.race(arguments, b, step.logits[b], draw)
    # The noise is accurate to about 1e-6. If two scores are closer than that, either may win.
    assert raced[token] >= raced.max() - 1e-5
    if (raced >= raced.max() - 1e-5).sum() == 1:
        assert token == raced.argmax()


def check_step(arguments, step, dtype, close=CLOSE):
    for b in range(len(arguments["hidden"])):
        check_row(arguments, step, dtype, b, close)
