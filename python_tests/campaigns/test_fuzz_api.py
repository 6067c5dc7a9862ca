# SPDX-License-Identifier: Apache-2.0
"""Random arguments for the heads' methods.

Each call works, or raises an error that names an argument. After an error the cache and the random
generator are unchanged.
"""

from __future__ import annotations

import random
from typing import Any

import torch

import dualhead_ext as dh
from dualhead_ext.quantization import dequantize, quantize

CALLS = 1000
B, T, D, V = 3, 4, 16, 13
DTYPES = (torch.float32, torch.float64, torch.int64, torch.int8, torch.bool, torch.complex64)


def number(rng: random.Random) -> Any:
    return rng.choice(
        [None, -1, 0, 1, 2, 7, 0.5, 1.0, -0.0, 1e-30, 1e308, float("nan"), float("inf"), 2**31,
         2**63, -(2**63) - 1, 10**400, True, "1", b"1", [], [0.5] * B, [1] * (B + 1), [None] * B,
         ["a"] * B, {}, object(), (0.5, 1, 0)]
    )  # fmt: skip


def tensor(rng: random.Random) -> torch.Tensor:
    shapes = [(), (B,), (B, 1), (B, D), (B, T, D), (B, T), (B, T + 1, D + 1), (0,), (2,), (B, 2)]
    value = torch.ones(rng.choice(shapes)).to(rng.choice(DTYPES))
    kind = rng.random()
    if kind < 0.1:
        return value.to("meta")
    if kind < 0.2:
        return value.to_sparse()
    return value


def thing(rng: random.Random) -> Any:
    return tensor(rng) if rng.random() < 0.4 else number(rng)


CONTROLS = ("strength", "gate_offset", "alpha", "objective_weights", "max_kl", "skip_threshold")
FILTERS = ("temperature", "top_k", "top_p", "min_p", "seeds", "do_sample", "return_logits",
           "record_attention")  # fmt: skip


def some(rng: random.Random, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: thing(rng) for name in rng.sample(names, rng.randint(0, 2))}


def call_of(rng: random.Random, head: dh.DualHead, cache: Any) -> tuple[str, Any, dict[str, Any]]:
    """(name, function, arguments) of one call."""
    hidden = torch.randn(B, T, D)
    calls = {
        "forward": (head.forward, {"hidden": hidden}, ("hidden", "attention_mask", *CONTROLS)),
        "prefill": (
            head.prefill,
            {"hidden": hidden, "cache": cache},
            ("hidden", "cache", "attention_mask", "logits_to_keep", *CONTROLS),
        ),
        "step": (
            head.step,
            {"hidden": hidden[:, 0], "cache": cache, "do_sample": True},
            ("hidden", "cache", *CONTROLS, *FILTERS),
        ),
        "new_cache": (
            head.new_cache,
            {"batch_size": B, "max_length": 4},
            ("batch_size", "max_length", "dtype", "device"),
        ),
        "crop": (cache.crop, {"columns": 2}, ("columns",)),
        "reserve": (cache.reserve, {"max_length": 40}, ("max_length",)),
        "repeat_interleave": (cache.repeat_interleave, {"repeats": 1}, ("repeats",)),
        "select": (cache.select, {"indices": torch.arange(B)}, ("indices",)),
        "append": (
            cache.append,
            {
                "k": torch.zeros(B, 2, 1, 4),
                "u": torch.zeros(B, 2, 1),
                "valid": torch.ones(B, 1, dtype=torch.bool),
            },
            ("k", "u", "valid"),
        ),
        "quantize": (
            quantize,
            {"weight": torch.randn(V, D), "name": "int8"},
            ("weight", "calibration"),
        ),
        "dequantize": (
            dequantize,
            {"weight": torch.ones(V, D).char(), "scale": torch.ones(V)},
            ("weight", "scale", "dtype"),
        ),
    }
    name = rng.choice(list(calls))
    function, arguments, names = calls[name]
    return name, function, arguments | some(rng, names if len(names) > 1 else names * 2)


def state(cache: Any) -> tuple:
    names = ("k", "u", "valid", "length", "seeds", "draws")
    values = [getattr(cache, name) for name in names]
    return [None if v is None else v.clone() for v in values], cache.columns


def same(a: tuple, b: tuple) -> bool:
    return a[1] == b[1] and all(
        x is y if x is None or y is None else torch.equal(x, y)
        for x, y in zip(a[0], b[0], strict=True)
    )


def test_every_call_works_or_names_its_argument(seed):
    rng, refused = random.Random(seed), 0
    head = dh.DualHead(
        dh.DualHeadConfig(
            hidden_size=D, vocab_size=V, gate_num_heads=2, gate_head_dim=4, num_objectives=2
        )
    )
    for number_of_call in range(CALLS):
        cache = head.new_cache(B, 8)
        head.prefill(torch.randn(B, 2, D), cache)
        name, function, arguments = call_of(rng, head, cache)
        before, generator = state(cache), torch.get_rng_state()
        told = f"call {number_of_call}: {name}({arguments})"
        try:
            function(**arguments)
        except (TypeError, ValueError) as error:
            refused += 1
            text = str(error)
            words = [*arguments, "format"]
            assert any(word in text for word in words), f"{told}\nnames no argument: {error!r}"
            assert same(state(cache), before), f"{told}\nmoved the cache, then raised {error!r}"
            assert torch.equal(torch.get_rng_state(), generator), f"{told}\ndrew numbers"
        except Exception as error:
            if "allocate memory" in str(error) and same(state(cache), before):
                continue  # out of memory: the call asked for 2^31 rows
            raise AssertionError(f"{told}\nraised {error!r}") from error
    assert CALLS / 10 < refused < CALLS, refused
