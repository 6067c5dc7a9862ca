# SPDX-License-Identifier: Apache-2.0
"""The CUDA step on a real device, from the operator to generate() and training.

These tests cover what the host backend (test_cuda_*_host.py) cannot show, with the cases and bounds
of the CPU's tests.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from decode_cases import STATE, assert_same_bits, bits, in_double, make_case, quantized, rows, run
from sampling_cases import FILTERS, assert_distribution, case_of_logits, filtered_probabilities
from tiny_models import make_model, prompts

import dualhead_ext as dh
from dualhead_ext import ops, reference
from dualhead_ext.quantization import FORMATS, dequantize

pytestmark = pytest.mark.cuda
DEVICE = "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

SIZES = [  # B, d, V, K, options
    (1, 1, 1, 1, {"S": 1}),
    (3, 31, 63, 2, {"bias": True}),
    (5, 64, 65, 3, {"objective_weights": True, "logit_scale": 0.25}),
    (7, 127, 129, 1, {"H": 8, "d_k": 48, "S": 700, "controls": True}),
    (9, 130, 257, 1, {"gate": "logit", "controls": True, "bias": True}),
    (64, 384, 1000, 1, {"logit_scale": -1.5, "logit_softcap": 30.0, "S": 200}),
    (2, 1024, 32003, 1, {"H": 8, "d_k": 48, "S": 4096}),
    (65, 31, 63, 2, {"bias": True, "objective_weights": True}),  # beyond 64 rows: GEMMs
    (130, 384, 1000, 1, {"logit_softcap": 30.0, "S": 200}),
]


@pytest.fixture(params=DTYPES, ids=["fp32", "bf16", "fp16"])
def dtype(request):
    return request.param


def there(case):
    return {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in case.items()}


def make(seed, *sizes, **options):
    return there(make_case(seed, *sizes, **options))


def test_the_kernel_is_built_and_used(dtype):
    assert ops.kernel_for(DEVICE, dtype), dh.build_info()
    head = dh.DualHead(dh.DualHeadConfig(hidden_size=64, vocab_size=100)).to(DEVICE, dtype)
    cache = head.new_cache(2, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a fallback to the reference warns
        head.prefill(torch.randn(2, 3, 64, device=DEVICE, dtype=dtype), cache)
        out = head.step(torch.randn(2, 64, device=DEVICE, dtype=dtype), cache)
    assert out.token.device.type == DEVICE and out.status.eq(0).all()


@pytest.mark.parametrize("mix_probs", [False, True], ids=["logits", "probs"])
def test_errors_are_at_most_those_of_eager(dtype, mix_probs, seed):
    """Against float64 with the same inputs: root mean square and largest error, over all sizes."""
    names = ("logits", "alpha", "gate_logit", "attention")
    ours, theirs = ({name: [] for name in names} for _ in range(2))
    for i, (B, d, V, K, options) in enumerate(SIZES):
        case = make(seed + i, B, d, V, K, dtype, mix_probs=mix_probs, record_attention=True,
                    **options)  # fmt: skip
        truth, _ = run(reference.decode_step, in_double(case))
        got, state = run(ops.decode_step, case)
        eager, _ = run(reference.decode_step, case)
        assert got.status.eq(0).all() and got.logits.dtype == torch.float32
        if "cache_length" in state:
            assert torch.equal(state["cache_length"], case["cache_length"] + 1)
        for name in names:
            exact = getattr(truth, name)
            scale = exact.abs().max().clamp(min=1.0) if exact.numel() else 1.0
            for errors, out in ((ours, got), (theirs, eager)):
                errors[name].append(((getattr(out, name) - exact) / scale).flatten())
    for name in names:
        mine, other = torch.cat(ours[name]).abs(), torch.cat(theirs[name]).abs()
        # In fp32, eager splits a sum over the threads of a block; the plain kernel adds longer
        # chains.
        factor = 2.0 if dtype == torch.float32 else 1.1
        assert mine.square().mean() <= (factor * other.square().mean().sqrt()) ** 2, name
        assert mine.max() <= 2 * factor * other.max(), name


@pytest.mark.parametrize("B", [1, 2, 7, 8, 9, 33, 64])
def test_a_row_depends_neither_on_its_batch_nor_on_the_run(dtype, B, seed):
    case = make(seed, B, 192, 1003, 1, dtype, H=8, d_k=48, S=300, sample=True, mix_probs=True)
    expected, state = run(ops.decode_step, case)
    for _ in range(5):
        again, left = run(ops.decode_step, case)
        assert_same_bits(again, expected)
        assert_same_bits(left, state)
    for b in {0, B // 2, B - 1}:
        alone, _ = run(ops.decode_step, rows(case, [b]))
        assert_same_bits(
            alone,
            type(expected)(*(x[[b]] if x.numel() else x for x in expected)),
            f"row {b} of {B}",
        )


@pytest.mark.parametrize("mix_probs", [False, True], ids=["logits", "probs"])
def test_more_rows_than_one_pass_are_the_same_run_after_run(dtype, mix_probs, seed):
    case = make(seed, 100, 192, 1003, 2, dtype, S=300, sample=True, mix_probs=mix_probs)
    expected, state = run(ops.decode_step, case)
    for _ in range(5):
        again, left = run(ops.decode_step, case)
        assert_same_bits(again, expected)
        assert_same_bits(left, state)


CORRECTED_SIZES = [  # B, d, V, K, options
    (1, 4096, 4001, 1, {"H": 8, "d_k": 48, "S": 300, "r": 16}),
    (3, 33, 131, 2, {"bias": True, "r": 5}),
    (9, 1152, 257, 1, {"gate": "logit", "controls": True, "r": 70}),
    (33, 256, 70, 3, {"objective_weights": True, "r": 3}),
    (70, 128, 65, 1, {"logit_softcap": 30.0, "r": 0}),
]


@pytest.mark.parametrize("reward_head", ["embedding", "lowrank"])
@pytest.mark.parametrize("format", [None, "int8", "int4"])
@pytest.mark.parametrize("mix_probs", [False, True], ids=["logits", "probs"])
def test_corrections_are_close_to_float64_and_the_same_in_any_batch(
    dtype, reward_head, format, mix_probs, seed
):
    for i, (B, d, V, K, options) in enumerate(CORRECTED_SIZES):
        if format == "int4" and d % 128:
            continue
        case = make_case(seed + i, B, d, V, K, dtype, reward_head=reward_head,
                         mix_probs=mix_probs, sample=True, **options)  # fmt: skip
        # If log(1 - alpha) were near 1, only the gate's errors would show
        case["alpha"] = torch.rand(B)
        case = there(quantized(case, format) if format else case)
        got, state = run(ops.decode_step, case)
        truth, _ = run(reference.decode_step, in_double(case))
        eager, _ = run(reference.decode_step, case)
        assert got.status.eq(0).all()
        mine, other = (x.logits - truth.logits for x in (got, eager))
        # M h + c is rounded to the dtype of the hidden states before it is multiplied by the LM
        # head.
        rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-9, torch.float16: 2**-12}[dtype]
        most = max(2 * other.square().mean().sqrt(), rounding * truth.logits.abs().max())
        assert mine.square().mean().sqrt() <= most
        again, left = run(ops.decode_step, case)
        assert_same_bits(again, got)
        assert_same_bits(left, state)
        if B > 64 and format is None:
            continue  # GEMMs, which choose by the batch
        alone, _ = run(ops.decode_step, rows(case, [B - 1]))
        assert_same_bits(alone, type(got)(*(x[[B - 1]] if x.numel() else x for x in got)))


QUANTIZED_SIZES = [  # B, d, V, K, options; int4's groups divide d
    (1, 4096, 4001, 1, {"H": 8, "d_k": 48, "S": 300}),
    (3, 384, 131, 2, {"bias": True}),
    (9, 1152, 257, 1, {"gate": "logit", "controls": True}),
    (33, 256, 70, 3, {"mix_probs": True}),
    (64, 512, 1000, 1, {"logit_softcap": 30.0, "S": 200}),
    (70, 128, 65, 1, {"sample": True}),
]


@pytest.mark.parametrize("name", FORMATS)
def test_quantized_heads_err_less_than_their_weights_in_bf16(dtype, name, seed):
    """Against float64 with the same inputs.

    Eager multiplies the dequantised weights in bf16, which is what a step without this kernel would
    do.
    """
    ours, theirs = [], []
    for i, (B, d, V, K, options) in enumerate(QUANTIZED_SIZES):
        case = there(quantized(make_case(seed + i, B, d, V, K, dtype, **options), name))
        truth, _ = run(reference.decode_step, in_double(case))
        got, state = run(ops.decode_step, case)
        assert got.status.eq(0).all()
        if "cache_length" in state:
            assert torch.equal(state["cache_length"], case["cache_length"] + 1)
        plain = {n: v for n, v in case.items() if n not in ("lm_scale", "reward_scale")}
        for head in ("lm", "reward"):
            weight = dequantize(case[f"{head}_weight"], case[f"{head}_scale"], torch.bfloat16)
            plain[f"{head}_weight"] = weight.to(dtype)
        eager, _ = run(reference.decode_step, plain)
        ours.append((got.logits - truth.logits).flatten())
        theirs.append((eager.logits - truth.logits).flatten())
        for b in {0, B - 1} if B <= 64 else ():
            alone, _ = run(ops.decode_step, rows(case, [b]))
            assert torch.equal(bits(alone.logits[0]), bits(got.logits[b])), (B, b)
    mine, other = torch.cat(ours).abs(), torch.cat(theirs).abs()
    assert mine.square().mean() <= other.square().mean() and mine.max() <= other.max()


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantized_head_steps_without_a_warning(dtype, name):
    head = dh.DualHead(dh.DualHeadConfig(hidden_size=128, vocab_size=100)).to(DEVICE, dtype)
    head.quantize(name)
    cache = head.new_cache(2, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a fallback to the reference warns
        head.prefill(torch.randn(2, 3, 128, device=DEVICE, dtype=dtype), cache)
        out = head.step(torch.randn(2, 128, device=DEVICE, dtype=dtype), cache)
    assert out.token.device.type == DEVICE and out.status.eq(0).all()


@pytest.mark.parametrize("mix_probs", [False, True], ids=["logits", "probs"])
def test_a_head_that_no_row_needs_changes_nothing_but_time(dtype, mix_probs, seed):
    """The kernel stops reading the unneeded head while it runs. That head's weights may be NaN."""
    case = make(seed, 2, 512, 32003, 1, dtype, mix_probs=mix_probs, S=64)
    for alpha, head in ((0.0, "reward"), (1.0, "lm")):
        case["alpha"] = torch.full((2,), alpha, device=DEVICE)
        expected, _ = run(ops.decode_step, case)
        broken = case | {f"{head}_weight": torch.full_like(case[f"{head}_weight"], torch.nan)}
        for _ in range(5):
            assert_same_bits(run(ops.decode_step, broken)[0], expected)


def test_not_finite_rows_and_full_caches_stay_alone(dtype, seed):
    case = make(seed, 6, 40, 90, 1, dtype, S=9)
    clean, _ = run(ops.decode_step, case)
    case["hidden"][1] = torch.nan
    case["hidden"][2] = torch.inf
    case["cache_length"][4] = 9
    got, state = run(ops.decode_step, case)
    assert got.status.tolist() == [0, 1, 1, 0, 2, 0]
    good = got.status == 0
    for name in ("logits", "alpha", "token", "logprob"):
        assert torch.equal(bits(getattr(got, name)[good]), bits(getattr(clean, name)[good])), name
    assert got.token[~good].eq(0).all()
    assert torch.equal(state["cache_k"][4], case["cache_k"][4])
    assert state["cache_length"][4] == 9


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
def test_distribution_of_400000_draws(filters, seed):
    logits = torch.randn(37, generator=torch.Generator().manual_seed(seed)) * 1.5
    case = there(case_of_logits(logits, seed, rows=4096, **filters))
    with torch.no_grad():  # the step advances the draw counters itself
        tokens = torch.cat([ops.decode_step(**case).token.cpu() for _ in range(100)])
    assert_distribution(tokens, filtered_probabilities(logits, **filters))


@pytest.mark.parametrize("B", [3, 66])
def test_a_captured_step_replays_with_growing_lengths(dtype, B, seed):
    """Lengths and draws are read on the device: a graph's replays equal separate calls."""
    case = make(seed, B, 64, 501, 1, dtype, S=40, sample=True)
    case["cache_length"][:] = torch.tensor([0, 5, 20], device=DEVICE).repeat(B // 3)
    plain = {k: v.clone() if k in STATE else v for k, v in case.items()}
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # a first call outside the graph, on copies
            run(ops.decode_step, case)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = ops.decode_step(**case)
        for _ in range(15):
            graph.replay()
            expected = ops.decode_step(**plain)
            torch.cuda.synchronize()
            assert_same_bits(captured, expected)
    assert_same_bits({k: case[k] for k in STATE}, {k: plain[k] for k in STATE})


def test_two_streams_share_no_scratch(seed):
    cases = [make(seed + i, 4, 256, 5003, 1, torch.bfloat16, S=64) for i in range(2)]
    expected = [run(ops.decode_step, case) for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    for _ in range(100):
        got = []
        for case, stream in zip(cases, streams, strict=True):
            with torch.cuda.stream(stream):
                got.append(run(ops.decode_step, case))
        torch.cuda.synchronize()
        for mine, right in zip(got, expected, strict=True):
            assert_same_bits(mine[0], right[0])
            assert_same_bits(mine[1], right[1])


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma2-softcap", "phi-bias"])
@pytest.mark.parametrize("mix", ["logits", "probs"])
def test_generate_writes_what_the_cpu_writes(family, mix):
    """In fp32, greedy, with left-padded rows."""
    model, batch = make_model(family, mix=mix), prompts()
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(**batch, **options)
    there_batch = {k: v.to(DEVICE) for k, v in batch.items()}
    got = model.to(DEVICE).generate(**there_batch, **options)
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("mix", ["logits", "probs"])
def test_the_fused_loop_writes_what_the_ordinary_one_writes(mix):
    """Rows end at different steps. Without a streamer the loop ends one step late."""
    model, batch = make_model("llama", mix=mix).to(DEVICE), there(prompts())
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1}
    text = model.generate(**batch, **options, fused=False)[:, -12:]
    options["eos_token_id"] = text[:, 2].tolist()
    expected = model.generate(**batch, **options, fused=False)
    assert torch.equal(model.generate(**batch, **options, fused=True), expected)
    kept = model.generate(**batch, **options, fused=True, return_dict_in_generate=True)
    assert torch.equal(kept.sequences, expected)
    seeds = {"seeds": torch.arange(3), "do_sample": True, "max_new_tokens": 12}
    on_gpu = model.generate(**batch, **seeds)
    assert torch.equal(on_gpu, model.generate(**batch, **seeds))


def test_the_fused_loop_from_a_compiled_static_cache():
    model, batch = make_model("llama").to(DEVICE), there(prompts())
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(**batch, **options, fused=False)
    torch.compiler.reset()
    got = model.generate(**batch, **options, cache_implementation="static", fused=True)
    assert torch.equal(got, expected)


def test_the_benchmark_of_a_small_step(monkeypatch, tmp_path):
    """With CUDA graphs, events, and all contenders except torch.compile."""
    from dualhead_ext.bench import cases, runner

    tiny = (cases.Case(2, 9, graphs=True), cases.Case(1, 5, sampled=True, graphs=True))
    groups = [cases.Group(64, 500, "bf16", tiny)]
    monkeypatch.setattr(cases, "gpu_plan", lambda quick: groups)
    monkeypatch.setattr(runner, "GPU_ROUNDS", 5)
    found = runner.run_gpu(True, 0.0, lambda text: None, str(tmp_path / "results.json"))
    assert len(found.cases) == 10 and found.copy_gb_per_s > 0


def test_training_on_the_device_follows_the_cpu(tmp_path):
    """Three optimizer steps in fp32 give the same losses up to rounding."""
    from transformers import AutoTokenizer, set_seed

    path = str(dh.data.embedded_backbone_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    pairs = dh.data.load_preference_data("embedded")[:12]
    losses = {}
    for device in ("cpu", DEVICE):
        set_seed(0)
        model = dh.DualHeadForCausalLM.from_backbone(
            path, dtype=torch.float32, reward_head="full", gate="attention"
        )
        arguments = dh.DualHeadTrainingArguments(
            output_dir=str(tmp_path / device), use_cpu=device == "cpu", max_steps=3,
            per_device_train_batch_size=4, gradient_accumulation_steps=1, learning_rate=1e-3,
            logging_steps=1, save_strategy="no", report_to="none", max_length=128, bf16=False,
        )  # fmt: skip
        trainer = dh.DualHeadTrainer(
            model, arguments, train_dataset=pairs, processing_class=tokenizer
        )
        trainer.train()
        losses[device] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses["cpu"]) == 3
    assert losses[DEVICE] == pytest.approx(losses["cpu"], rel=1e-4)
