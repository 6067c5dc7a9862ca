# SPDX-License-Identifier: Apache-2.0
"""vLLM with the gated head.

In fp32, each request's greedy text is the one that `generate()` writes for it alone. It does not
depend on the batch, the cache or the scheduler.
"""

import os

import pytest
import torch

try:
    from vllm import SamplingParams
    from vllm.compilation.counter import compilation_counter
    from vllm.exceptions import VLLMValidationError
    from vllm.model_executor.models import ModelRegistry
except ImportError:
    pytest.skip("vLLM is not in this environment: make test-vllm", allow_module_level=True)

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # run the engine in this process

from serving_cases import check, controls, expected, gated, jobs, prompts, served
from tiny_models import make_backbone
from transformers import Phi3Config, Phi3ForCausalLM
from vllm_cases import answers, close, engine, metric

from dualhead_ext.model.served_folder import ARCHITECTURES
from dualhead_ext.vllm import models
from dualhead_ext.vllm.alpha import take_alpha

K = 2


@pytest.fixture(scope="module")
def model():
    return gated(num_objectives=K)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return served(model, tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def wanted(model):
    return expected(model, jobs(K))


@pytest.fixture(scope="module")
def llm(folder):
    llm = engine(folder)
    yield llm
    close(llm)


def test_chunks_of_64_and_shared_prefixes(llm, wanted):
    assert len(wanted) >= 20
    check(answers(llm, jobs(K)), wanted)
    before = metric(llm, "prefix_cache_hits")
    check(answers(llm, jobs(K)), wanted)
    assert metric(llm, "prefix_cache_hits") > before


def test_a_wrong_control_is_refused_and_its_neighbours_are_not_harmed(llm, wanted):
    for wrong, message in (
        ({"strenght": 1.0}, "got strenght; did you mean strength"),
        ({"strength": "much"}, "strength must be a number"),
        ({"strength": [1.0]}, "strength must be a number"),
        ({"strength": -1.0}, "strength must be a number >= 0"),
        ({"alpha": 1.5}, r"alpha must be a number in \[0, 1\]"),
        ({"max_kl": True}, "max_kl must be a number"),
        ({"objective_weights": [1.0]}, "objective_weights must be"),
        ({"objective_weights": "both"}, "objective_weights must be"),
        ({"return_alpha": True}, "return_alpha must be a name"),
    ):
        params = SamplingParams(extra_args=wrong)
        with pytest.raises(VLLMValidationError, match=message):
            llm.generate([{"prompt_token_ids": [5, 6]}], params, use_tqdm=False)
        # Beside a valid request: vLLM refuses the whole call and drops both requests.
        both = [SamplingParams(max_tokens=4), params]
        with pytest.raises(VLLMValidationError, match=message):
            llm.generate([{"prompt_token_ids": [5, 6]}] * 2, both, use_tqdm=False)
    with pytest.raises(VLLMValidationError, match="needs n = 1"):
        params = SamplingParams(n=2, extra_args={"return_alpha": "a"})
        llm.generate([{"prompt_token_ids": [5, 6]}], params, use_tqdm=False)
    check(answers(llm, jobs(K)[:8]), wanted[:8])


def test_alpha_is_taken_once(llm):
    params = SamplingParams(max_tokens=3, ignore_eos=True, extra_args={"return_alpha": "mine"})
    out = llm.generate([{"prompt_token_ids": [5, 6, 7]}], params, use_tqdm=False)[0]
    assert len(take_alpha(llm, out, "mine")) == 3
    with pytest.raises(KeyError, match="mine"):
        take_alpha(llm, out, "mine")


def test_prompt_logprobs_are_the_mixtures(llm, model):
    ids = prompts()[1]
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, extra_args={"strength": 2.0})
    out = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)[0]
    found = [
        row[token].logprob for row, token in zip(out.prompt_logprobs[1:], ids[1:], strict=True)
    ]
    logits = model(torch.tensor([ids]), strength=2.0).logits[0]
    own = torch.log_softmax(logits.float(), -1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])
    torch.testing.assert_close(torch.tensor(found), own[:, 0], rtol=0, atol=1e-3)


def test_a_cache_too_small_for_all_preempts(folder, model):
    # 20 pages of 32 positions, and vLLM's empty page. Each text needs another page as it grows.
    llm = engine(folder, num_gpu_blocks_override=21, block_size=32, enable_prefix_caching=False)
    work, before = jobs(K)[:14], metric(llm, "num_preemptions")
    try:
        check(answers(llm, work, 40), expected(model, work, 40))
        assert metric(llm, "num_preemptions") > before
    finally:
        close(llm)


@pytest.mark.slow
def test_compiled_by_torch(folder, wanted, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))  # else an earlier run's code may be loaded
    before = compilation_counter.num_aot_compiles
    llm = engine(folder, enforce_eager=False)
    try:
        assert compilation_counter.num_aot_compiles > before
        check(answers(llm, jobs(K)), wanted)
    finally:
        close(llm)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "config",
    [
        {"reward_head": "full", "mix": "probs", "gate": "linear"},
        {"reward_head": "embedding", "mix": "probs", "num_objectives": 2},
        {"reward_head": "embedding", "reward_rank": 0, "gate": "fixed"},
        {"reward_head": "lowrank", "num_objectives": 2, "gate_num_heads": 3, "gate_head_dim": 20},
    ],
)
def test_every_gate_reward_head_and_mixture(config, tmp_path):
    model = gated(**config)
    work = [
        (ids, own) for ids in prompts()[1:3] for own in controls(config.get("num_objectives", 1))
    ]
    wanted = expected(model, work)
    llm = engine(served(model, tmp_path))
    try:
        check(answers(llm, work), wanted)
    finally:
        close(llm)


def _phi3():
    torch.manual_seed(0)
    sizes = {"vocab_size": 101, "hidden_size": 64, "intermediate_size": 40, "pad_token_id": 0}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = Phi3ForCausalLM(Phi3Config(max_position_embeddings=512, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


# Sliding windows, soft caps, scaled logits, normalised queries, biases, fused projections.
OTHERS = ("mistral-sliding", "qwen2", "qwen3", "gemma2-softcap", "gemma3", "granite-scale", "phi3")


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERS)
def test_other_backbones(family, tmp_path):
    sizes = {"head_dim": 32, "max_position_embeddings": 512, "hidden_size": 128}
    backbone = _phi3() if family == "phi3" else make_backbone(family, **sizes)
    backbone.save_pretrained(tmp_path / "backbone")
    name = ARCHITECTURES[backbone.config.model_type][0]
    # Otherwise vLLM would start a process to inspect the class, which takes seconds.
    ModelRegistry.register_model(name, getattr(models, name))
    model = gated(backbone, gate_num_heads=2, gate_head_dim=6)
    work = [
        (ids, own) for ids in prompts(101)[:3] for own in ({}, {"strength": 0.0}, {"alpha": 0.9})
    ]
    wanted = expected(model, work)
    llm = engine(served(model, tmp_path, tmp_path / "backbone"), skip_tokenizer_init=True)
    try:
        check(answers(llm, work), wanted)
    finally:
        close(llm)


def test_plain_vllm_loads_the_backbone_from_the_same_folder(folder, wanted):
    llm = engine(folder, hf_overrides={"architectures": ["LlamaForCausalLM"]})
    try:
        params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
        plain = {i for i, (_, own) in enumerate(jobs(K)) if own == {"strength": 0.0}}
        inputs = [{"prompt_token_ids": jobs(K)[i][0]} for i in sorted(plain)]
        found = [list(o.outputs[0].token_ids) for o in llm.generate(inputs, params, use_tqdm=False)]
        assert found == [wanted[i][0] for i in sorted(plain)]
    finally:
        close(llm)


def test_bfloat16_gate_logits_are_those_of_the_same_hidden_states(folder, model):
    llm = engine(folder, dtype="bfloat16")
    try:
        worker = llm.llm_engine.model_executor.driver_worker
        head, seen = worker.model_runner.model.dual_head, []
        original = head.gate_logits

        def noted(hidden):
            seen.append((hidden.float(), logit := original(hidden)))
            return logit

        head.gate_logits = noted
        params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
        llm.generate([{"prompt_token_ids": prompts()[2][:100]}], params, use_tqdm=False)
        hidden, logits = (torch.cat(parts) for parts in zip(*seen, strict=True))
        own = model.lm_head_module.gate(hidden[None])[0]
        assert len(own) >= 139
        torch.testing.assert_close(logits.sigmoid(), own.sigmoid(), rtol=0, atol=2e-2)
        assert own.sigmoid().std() > 0.1  # alpha varies, so that an error would show
    finally:
        close(llm)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism is not supported"),
        ({"enable_lora": True}, "LoRA is not supported"),
        ({"load_format": "dummy"}, "load_format dummy is not supported"),
    ],
)
def test_what_the_head_cannot_do_is_refused_before_a_model_is_loaded(folder, options, message):
    with pytest.raises(Exception, match=message):
        engine(folder, **options)
