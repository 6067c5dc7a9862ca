# SPDX-License-Identifier: Apache-2.0
"""decode_step as an operator of torch.

The tests cover invalid arguments, opcheck, torch.compile, gradients, and the choice of the
instruction set.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

import pytest
import torch
from decode_cases import CPU_ISAS, STATE, assert_same_bits, bits, make_case, run

import dualhead_ext
from dualhead_ext import ops

B, d, V, K, H, d_k, S = 3, 16, 40, 2, 2, 4, 6
SCHEMA = torch.ops.dualhead.decode_step.default._schema.arguments
SCALES = ("lm_scale", "reward_scale")  # of quantised weights, see test_ops_quantized.py
TENSORS = [a.name for a in SCHEMA if "Tensor" in str(a.type) and a.name not in SCALES]
ATTENTION = ("q_weight", "k_weight", "u_weight", "gate_bias", "cache_k", "cache_u", "cache_valid",
             "cache_length")  # fmt: skip
CORRECTION = ("reward_down", "reward_up")
OPTIONS = ("mix_probs", "logit_scale", "logit_softcap", "return_logits", "record_attention")


def full_case(seed: int, gate: str = "attention", reward_head: str = "full") -> dict:
    """Every argument that this gate and this reward head allow."""
    case = make_case(seed, B, d, V, K, torch.bfloat16, H=H, d_k=d_k, S=S, gate=gate, bias=True,
                     objective_weights=True, reward_head=reward_head, controls=True,
                     sample=True)  # fmt: skip
    case |= {name: torch.rand(B) for name in ("alpha", "temperature", "top_p", "min_p")}
    case["skip_threshold"] = torch.rand(B) / 2
    case["top_k"] = torch.arange(B, dtype=torch.int32)
    if gate == "attention":
        case["new_valid"] = torch.ones(B, dtype=torch.bool)
    return case


def positional(case: dict, *options) -> tuple:
    named = {"reward_head": "full"} | case | dict(zip(OPTIONS, options, strict=True))
    return tuple(named.get(argument.name) for argument in SCHEMA)


# --- the call -------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["mix_probs", "return_logits", "record_attention"])
def test_arguments_are_handed_over_in_the_schemas_order(monkeypatch, flag):
    handed = []
    monkeypatch.setattr(ops, "_decode_step", lambda *values: handed.extend(values) or [None] * 7)
    flags = {"mix_probs", "return_logits", "record_attention"}
    given = {a.name: a.name == flag if a.name in flags else a.name for a in SCHEMA}
    ops.decode_step(**given)
    assert handed == list(given.values())


def test_a_missing_library_is_said(monkeypatch):
    monkeypatch.setitem(ops.library._problems, "cpu", "the compiled library _C.so is missing")
    monkeypatch.setattr(ops, "_decode_step", ops._missing)
    with pytest.raises(RuntimeError, match=r"_C\.so is missing"):
        ops.decode_step(hidden=torch.ones(1, 2), lm_weight=torch.ones(2, 2))


# --- invalid arguments ----------------------------------------------------------------------------


def assert_refused(case: dict, changes: dict, error: type, pattern: str) -> None:
    """Check the error and its text, and that nothing was written."""
    bad = case | changes
    before = {n: bad[n].clone() for n in STATE if isinstance(bad.get(n), torch.Tensor)}
    with torch.no_grad(), pytest.raises(error, match=pattern):
        ops.decode_step(**bad)
    for name, value in before.items():
        if value.device.type != "meta":
            assert torch.equal(bits(bad[name]), bits(value)), name


OTHER_DTYPE = {
    torch.bfloat16: torch.float32,
    torch.float32: torch.float64,
    torch.int32: torch.int64,
    torch.int64: torch.int32,
    torch.bool: torch.uint8,
}


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("fault", ["dtype", "rank", "size", "device", "type", "missing"])
def test_every_argument_is_checked(name, fault, seed):
    gate = "logit" if name == "gate_logit" else "attention"
    reward_head = "lowrank" if name in CORRECTION else "full"
    case = full_case(seed, gate, reward_head)
    value = case[name]
    own = rf"^decode_step: {name} must "
    if fault == "dtype":
        # The LM head defines the dtype of all heads, so that another dtype there makes the others
        # wrong.
        named = "hidden|lm_weight" if name == "lm_weight" else name
        pattern = rf"^decode_step: ({named}) must have dtype \w+, got \w+$"
        changed = value.to(OTHER_DTYPE[value.dtype])
        assert_refused(case, {name: changed}, TypeError, pattern)
    elif fault == "rank":
        assert_refused(case, {name: value[None]}, ValueError, own + r"be \(.*\), got \(1, .*\)$")
    elif fault == "size":
        # lm_weight and others define sizes (B, V, d, H, S, d_k), so that another argument is
        # reported.
        for dim in range(value.dim()):
            shape = list(value.shape)
            shape[dim] += 1
            grown = torch.zeros(shape, dtype=value.dtype)
            free = {"lm_weight", "reward_weight", "hidden", "cache_k", "reward_down"}
            pattern = r"^decode_step: \w+ must be \(.*\), got \(.*\)$" if name in free else own
            assert_refused(case, {name: grown}, ValueError, pattern)
    elif fault == "device":
        assert_refused(
            case, {name: value.to("meta")}, ValueError, "must be on the device of hidden"
        )
    elif fault == "type":
        assert_refused(case, {name: value.tolist()}, TypeError, own + "be a tensor.*, got list$")
    elif name in ("hidden", "lm_weight"):
        assert_refused(case, {name: None}, TypeError, own + "be a tensor, got NoneType$")
    elif name in ("reward_weight", "seeds", "draws", "gate_logit", *ATTENTION, *CORRECTION):
        pattern = r"^decode_step: \w+ must be given( with [\w ]+)?, got None"
        assert_refused(case, {name: None}, ValueError, pattern)
    else:  # really optional
        got, _ = run(ops.decode_step, case | {name: None})
        assert got.status.eq(0).all()


bf16 = {"dtype": torch.bfloat16}
ADJACENT = "must have adjacent elements in each row, got stride 40"
BAD = {
    "no vocabulary": ({"lm_weight": torch.zeros(0, d, **bf16)}, r"1 <= V < 2\^31.*got \(0, 16\)"),
    "no hidden size": ({"lm_weight": torch.zeros(V, 0, **bf16)}, r"d >= 1, got \(40, 0\)"),
    "no objective": ({"reward_weight": torch.zeros(0, V, d, **bf16)}, r"K >= 1, got \(0, 40, 16\)"),
    "column-major weight": ({"lm_weight": torch.zeros(d, V, **bf16).T}, f"lm_weight {ADJACENT}"),
    "column-major reward weight": (
        {"reward_weight": torch.zeros(K, d, V, **bf16).mT},
        f"reward_weight {ADJACENT}",
    ),
    "strided cache": (
        {"cache_u": torch.zeros(B, H, 2 * S)[..., ::2]},
        "cache_u must be contiguous",
    ),
    "expanded cache": (
        {"cache_k": torch.zeros(1, H, S, d_k, **bf16).expand(B, -1, -1, -1)},
        "cache_k must be contiguous",
    ),
    "strided draws": (
        {"draws": torch.zeros(2 * B, dtype=torch.int64)[::2]},
        "draws must be contiguous",
    ),
    "gate logit beside attention": (
        {"gate_logit": torch.zeros(B)},
        "q_weight must be None beside gate_logit",
    ),
    "another kind of reward head": (
        {"reward_head": "diagonal"},
        "reward_head must be full, embedding or lowrank, got diagonal",
    ),
    "a full head's weight beside a correction": (
        {"reward_head": "embedding"},
        "reward_weight must be None with reward_head embedding, got a tensor",
    ),
    "a correction's map beside a full head": (
        {"reward_up": torch.zeros(K, V, 2, **bf16)},
        "reward_up must be None with reward_head full, got a tensor",
    ),
    "a correction without bias": (
        {"reward_head": "lowrank", "reward_weight": None, "reward_bias": None},
        "reward_bias must be given with reward_head lowrank, got None",
    ),
    "a correction without objectives": (
        {"reward_head": "lowrank", "reward_weight": None, "reward_bias": torch.zeros(0, V, **bf16)},
        r"reward_bias must be \(K, 40\) with K >= 1, got \(0, 40\)",
    ),
    "rank 0 by shape": (
        {
            "reward_head": "lowrank",
            "reward_weight": None,
            "reward_down": torch.zeros(K, 0, d, **bf16),
            "reward_up": torch.zeros(K, V, 0, **bf16),
        },
        r"reward_down must be \(K, r, d\) with r >= 1, got \(2, 0, 16\)",
    ),
    "negative cap": ({"logit_softcap": -1.0}, "logit_softcap must be finite and >= 0, got -1"),
    "infinite cap": ({"logit_softcap": float("inf")}, "logit_softcap must be finite"),
    "NaN cap": ({"logit_softcap": float("nan")}, "logit_softcap must be finite"),
    "infinite scale": ({"logit_scale": float("-inf")}, "logit_scale must be finite, got -inf"),
    "NaN scale": ({"logit_scale": float("nan")}, "logit_scale must be finite, got nan"),
}


@pytest.mark.parametrize("changes, pattern", BAD.values(), ids=BAD)
def test_bad_values_are_named(changes, pattern, seed):
    assert_refused(full_case(seed), changes, ValueError, "^decode_step: .*" + pattern)


def test_the_issues_own_example(seed):
    case = make_case(seed, 2, 4096, 8, gate="logit") | {"hidden": torch.zeros(2, 4095)}
    text = re.escape("decode_step: hidden must be (B, 4096), got (2, 4095)")
    assert_refused(case, {}, ValueError, f"^{text}$")


def test_options_are_checked(seed):
    case = full_case(seed)
    options = {"mix_probs": "yes", "logit_scale": "1", "return_logits": None, "reward_head": None}
    for name, bad in options.items():
        assert_refused(case, {name: bad}, TypeError, f"^decode_step: {name} must be a ")


def test_new_valid_belongs_to_attention(seed):
    case = full_case(seed, "logit") | {"new_valid": torch.ones(B, dtype=torch.bool)}
    assert_refused(case, {}, ValueError, "new_valid must be None beside gate_logit")


def test_float64_and_float16_have_no_cpu_kernel(seed):
    assert ops.kernel_for("cpu", torch.float32) and ops.kernel_for("cpu", torch.bfloat16)
    for dtype in (torch.float64, torch.float16, torch.int64):
        assert not ops.kernel_for("cpu", dtype)
    assert not ops.kernel_for("meta", torch.float32)
    case = make_case(seed, dtype=torch.float16, gate="logit")
    assert_refused(
        case, {}, TypeError, "lm_weight must have dtype float32 or bfloat16, got float16"
    )


def test_a_valid_call_after_a_refused_one(seed):
    case = full_case(seed)
    expected = run(ops.decode_step, case)
    assert_refused(case, {"cache_u": torch.zeros(1)}, ValueError, "cache_u")
    got = run(ops.decode_step, case)
    assert_same_bits(got[0], expected[0])
    assert_same_bits(got[1], expected[1])


def test_empty_batch(seed):
    case = make_case(seed, 0, d, V, K, sample=True, record_attention=True, H=H, d_k=d_k, S=S)
    got, _ = run(ops.decode_step, case)
    assert got.logits.shape == (0, V) and got.attention.shape == (0, H, S)
    assert all(value.shape == (0,) for value in got[1:6])


def test_a_cache_without_room(seed):
    got, _ = run(ops.decode_step, make_case(seed, B, d, V, S=0))
    assert got.status.tolist() == [2] * B


# --- the operator in torch ------------------------------------------------------------------------


def opcheck_cases() -> dict[str, tuple]:
    """Positional arguments for each dtype, gate and mixture, with odd sizes and strides."""
    wide = torch.randn(3, 30)
    cases = {
        "fp32": make_case(1, 2, 16, 40),
        "bf16": make_case(2, 2, 16, 40, dtype=torch.bfloat16),
        "one of each": make_case(3, 1, 1, 1, S=1, H=1, d_k=1),
        "objectives": make_case(4, 3, 7, 13, 4, bias=True, objective_weights=True),
        "fixed gate": make_case(5, 3, 7, 13, gate="logit", controls=True),
        "everything": full_case(6),
        "everything but attention": full_case(7, "logit"),
        "embedding": full_case(14, reward_head="embedding"),
        "lowrank": full_case(15, "logit", "lowrank"),
        "sampled": make_case(8, 4, 9, 33, sample=True),
        "strided hidden": make_case(9, 3, 15, 20) | {"hidden": wide[:, 3:18]},
        "column-major hidden": make_case(10, 3, 15, 20) | {"hidden": torch.randn(15, 3).T},
        "strided weights": make_case(11, 3, 15, 20, gate="logit")
        | {"lm_weight": torch.randn(40, 31)[::2, 8:23]},
        "expanded controls": make_case(12, 3, 15, 20) | {"strength": torch.ones(1).expand(3)},
    }
    options = [(False, 1.0, 0.0, True, False), (True, 0.5, 30.0, True, True)]
    options.append((False, 1.0, 0.0, False, True))
    return {
        f"{name} {i}": positional(case, *options[i])
        for i in range(3)
        for name, case in cases.items()
        if i == 0 or name in ("fp32", "everything", "fixed gate", "sampled")
    }


OPCHECK_CASES = opcheck_cases()


@pytest.mark.quick_cases(8)
@pytest.mark.parametrize("arguments", OPCHECK_CASES.values(), ids=OPCHECK_CASES)
def test_opcheck(arguments):
    results = torch.library.opcheck(torch.ops.dualhead.decode_step.default, arguments)
    assert set(results.values()) == {"SUCCESS"} and len(results) == 4


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("gate, reward_head", [("attention", "full"), ("logit", "embedding")])
def test_compiled_whole_equals_direct(backend, gate, reward_head, seed):
    """One whole graph, with other operations around the step, and caches that it writes.

    New batch sizes recompile at most once.
    """
    torch._dynamo.reset()
    frames = []

    def step(case):
        out = ops.decode_step(**case | {"hidden": case["hidden"] * 2})
        return out.token + 1, out.logits, out.alpha

    def counted(graph, inputs):
        frames.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(step, fullgraph=True, backend=counted)
    for batch in (2, 3, 5, 7, 4):
        options = {"gate": gate, "reward_head": reward_head, "sample": True, "S": 5}
        case = make_case(seed + batch, batch, 16, 40, 1, **options)
        case["cache_length" if gate == "attention" else "draws"].clamp_(max=3)
        ours = {k: v.clone() if k in STATE else v for k, v in case.items()}
        direct = {k: v.clone() if k in STATE else v for k, v in case.items()}
        with torch.no_grad():
            for _ in range(2):
                for a, b in zip(compiled(ours), step(direct), strict=True):
                    assert torch.equal(a, b)
        for name in STATE:
            assert name not in case or torch.equal(ours[name], direct[name]), name
    assert len(frames) <= 2


def test_exported_with_a_dynamic_batch(seed):
    class Step(torch.nn.Module):
        def __init__(self, case):
            super().__init__()
            self.case = {k: v for k, v in case.items() if k in ("lm_weight", "reward_weight")}

        def forward(self, hidden, gate_logit):
            return ops.decode_step(hidden=hidden, gate_logit=gate_logit, **self.case).token

    case = make_case(seed, 6, 16, 40, gate="logit")
    step, dim = Step(case), torch.export.Dim("B")
    with torch.no_grad():
        program = torch.export.export(
            step, (case["hidden"], case["gate_logit"]), dynamic_shapes=({0: dim}, {0: dim})
        )
        got = program.module()(case["hidden"][:4], case["gate_logit"][:4])
        assert torch.equal(got, step(case["hidden"][:4], case["gate_logit"][:4]))


def test_inference_mode(seed):
    case = full_case(seed)
    expected, _ = run(ops.decode_step, case)
    with torch.inference_mode():
        got = ops.decode_step(**{k: v.clone() for k, v in case.items()})
    assert_same_bits(type(got)(*(value.clone() for value in got)), expected)


@pytest.mark.parametrize("name", ["hidden", "reward_weight", "alpha"])
def test_gradients_are_refused_by_name(name, seed):
    case = full_case(seed)
    case[name].requires_grad_()
    with pytest.raises(RuntimeError, match="decode_step: has no gradient"):
        ops.decode_step(**case)
    with torch.no_grad():
        assert not ops.decode_step(**case).logits.requires_grad


# --- the instruction set --------------------------------------------------------------------------


def test_choice_is_the_best_level():
    assert ops.cpu_isa() == os.environ.get("DUALHEAD_FORCE_ISA", CPU_ISAS[0])
    with pytest.raises(RuntimeError, match=r"must be one of .*portable, got 'sse9'"):
        torch.ops.dualhead._force_cpu_isa("sse9")
    assert CPU_ISAS[-1] == "portable"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="looks for x86 instructions")
def test_wide_instructions_stay_in_their_functions():
    """The linker may share inline functions: one compiled with AVX would crash older machines."""
    library = Path(dualhead_ext.__file__).with_name("_C.so")
    listing = subprocess.run(
        ["objdump", "--disassemble", "--no-show-raw-insn", str(library)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    wide = set()
    for line in listing.splitlines():
        if line.endswith(">:"):
            function = line
        elif re.search(r"%[yz]mm|%k[0-7]", line):
            wide.add(function)
    assert wide, "the listing shows nothing"
    assert [name for name in wide if not re.search("avx2|avx512|3amx", name)] == []
