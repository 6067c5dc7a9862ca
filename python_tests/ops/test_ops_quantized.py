# SPDX-License-Identifier: Apache-2.0
"""decode_step with quantised heads on the CPU, for every instruction set, against float64.

The bits do not depend on the batch or on the number of threads. Invalid arguments are refused.
"""

from __future__ import annotations

import pytest
import torch
from decode_cases import (
    CPU_ISAS,
    assert_same_bits,
    forced_isa,
    in_double,
    make_case,
    quantized,
    rows,
    run,
    threads,
)

from dualhead_ext import ops, quantization, reference
from dualhead_ext.quantization import FORMATS, quantize

F32, BF16 = torch.float32, torch.bfloat16


def quantized_case(name: str, *sizes, **options) -> dict:
    return quantized(make_case(*sizes, **options), name)


def truth_of(case: dict) -> reference.DecodeOutput:
    """The result in float64, from the quantised weights and the fp32 scales."""
    return run(reference.decode_step, in_double(case))[0]


def sizes_of(name: str) -> list[tuple[int, int, int, int]]:
    """(B, d, V, K)."""
    if name == "int4":
        return [(1, 128, 1, 1), (3, 384, 131, 2), (7, 256, 66, 1)]
    return [(1, 1, 1, 1), (3, 77, 131, 2), (7, 130, 66, 1)]


@pytest.mark.parametrize("isa", CPU_ISAS)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("mix_probs", [False, True])
def test_against_float64(isa, name, dtype, mix_probs):
    for seed, sizes in enumerate(sizes_of(name)):
        options = {"bias": True, "objective_weights": True, "gate": "logit"}
        case = quantized_case(name, seed, *sizes, dtype, mix_probs=mix_probs, **options)
        with forced_isa(isa):
            got, _ = run(ops.decode_step, case)
        truth = truth_of(case)
        torch.testing.assert_close(got.logits.double(), truth.logits, rtol=1e-5, atol=2e-5)
        assert torch.equal(got.token, got.logits.argmax(-1)) and (got.status == 0).all()


@pytest.mark.parametrize("isa", CPU_ISAS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_every_number_of_a_byte(isa, dtype, name):
    """All byte values except fp8's NaN. This includes -128, which quantize never produces."""
    numbers = torch.arange(256, dtype=torch.uint8).view(FORMATS[name].dtype)
    numbers = numbers[~numbers.float().isnan()]
    weight, count = numbers[:, None], numbers.numel()
    case = {
        "hidden": torch.ones(1, 1, dtype=dtype),
        "lm_weight": weight,
        "reward_weight": weight[None],
        "lm_scale": torch.ones(count),
        "reward_scale": torch.ones(1, count),
        "gate_logit": torch.tensor([-torch.inf]),
    }
    with forced_isa(isa):
        got, _ = run(ops.decode_step, case)
    assert torch.equal(got.logits[0], numbers.float())


@pytest.mark.parametrize("isa", CPU_ISAS)
@pytest.mark.parametrize("name", FORMATS)
def test_every_input_meets_its_own_weight(isa, name):
    """Logit v is a multiple of the sum of the inputs from v on.

    A wrong order of inputs shows, in the main loop, in remainders and in every pass.
    """
    d = 2176 if name == "int4" else 2117
    steps = torch.ones(d, d).triu()
    q, scale = quantize(steps, name)
    hidden = torch.randint(-8, 8, (5, d)).to(BF16)
    case = {"hidden": hidden, "lm_weight": q, "reward_weight": q[None], "lm_scale": scale}
    case |= {"reward_scale": scale[None], "gate_logit": torch.full((5,), -torch.inf)}
    with forced_isa(isa):
        got, _ = run(ops.decode_step, case)
    exact = hidden.double() @ quantization.dequantize(q, scale, torch.float64).T
    torch.testing.assert_close(got.logits.double(), exact, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("isa", CPU_ISAS)
@pytest.mark.parametrize("name", FORMATS)
def test_same_bits_in_any_batch_and_thread_count(isa, name):
    d = 384 if name == "int4" else 301
    case = quantized_case(name, 5, 9, d, 333, 2, BF16, gate="logit")
    with forced_isa(isa):
        with threads(1):
            expected, _ = run(ops.decode_step, case)
        with threads(2):
            assert_same_bits(run(ops.decode_step, case)[0], expected, "threads")
        for b in range(9):
            alone, _ = run(ops.decode_step, rows(case, [b]))
            assert torch.equal(alone.logits[0], expected.logits[b]), b


@pytest.mark.parametrize("name", FORMATS)
def test_rows_may_be_apart(name):
    case = quantized_case(name, 6, 2, 128, 37, 1, gate="logit")
    expected, _ = run(ops.decode_step, case)
    for head in ("lm_weight", "reward_weight"):
        q = case[head]
        wide = torch.full((*q.shape[:-1], q.shape[-1] + 9), 127, dtype=torch.uint8).view(q.dtype)
        wide[..., 5:-4] = q
        case[head] = wide[..., 5:-4]
    assert_same_bits(run(ops.decode_step, case)[0], expected, "strides")


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_is_read_beyond_its_end(name):
    """The bytes before every weight have other values, and the last row ends with the storage."""
    case = quantized_case(name, 7, 2, 128, 37, 1, gate="logit")
    for isa in CPU_ISAS:
        with forced_isa(isa):
            expected, _ = run(ops.decode_step, case)
            for head in ("lm_weight", "reward_weight"):
                q = case[head].contiguous().view(torch.uint8)
                block = torch.full((q.numel() + 64,), 127, dtype=torch.uint8)
                block[64:] = q.flatten()
                case[head] = block[64:].view(case[head].dtype).view(q.shape)
            assert_same_bits(run(ops.decode_step, case)[0], expected, isa)


def test_refusals():
    case = quantized_case("int8", 8, 2, 128, 9, 1, gate="logit")
    changes = [
        ({"lm_scale": None}, ValueError, "lm_scale must be given with quantised weights"),
        ({"reward_scale": case["reward_scale"][:, 1:]}, ValueError, "reward_scale must be"),
        ({"lm_scale": case["lm_scale"].double()}, TypeError, "lm_scale must have dtype float32"),
        ({"reward_weight": case["reward_weight"].float()}, TypeError, "reward_weight must have"),
        ({"hidden": case["hidden"].half()}, TypeError, "hidden must have dtype float32 or bfloat"),
        ({"hidden": case["hidden"][:, 1:]}, ValueError, r"hidden must be \(B, 128\)"),
        ({"lm_scale": 3.0}, TypeError, "lm_scale must be a tensor or None"),
    ]
    for change, kind, text in changes:
        with pytest.raises(kind, match=f"^decode_step: {text}"):
            ops.decode_step(**case | change)
    plain = make_case(8, 2, 128, 9, 1, gate="logit")
    with pytest.raises(ValueError, match="lm_scale must be None unless the weights are quantised"):
        ops.decode_step(**plain, lm_scale=case["lm_scale"])
    odd = case | {
        "lm_weight": torch.zeros(9, 50, dtype=torch.uint8),
        "reward_weight": torch.zeros(1, 9, 50, dtype=torch.uint8),
    }
    with pytest.raises(ValueError, match="a multiple of 128 for int4"):
        ops.decode_step(**odd)


@pytest.mark.parametrize("name", FORMATS)
def test_opcheck(name):
    case = quantized_case(name, 9, 2, 128, 9, 1, BF16, gate="logit")
    schema = torch.ops.dualhead.decode_step.default._schema.arguments
    options = {
        "mix_probs": False,
        "logit_scale": 1.0,
        "logit_softcap": 0.0,
        "return_logits": True,
        "record_attention": False,
    }
    arguments = [
        ({"reward_head": "full"} | case | options).get(argument.name) for argument in schema
    ]
    utilities = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if name != "fp8":  # test_schema multiplies its inputs, which torch cannot do in fp8
        utilities.append("test_schema")
    operator = torch.ops.dualhead.decode_step.default
    results = torch.library.opcheck(operator, arguments, test_utils=utilities)
    assert set(results.values()) == {"SUCCESS"}
