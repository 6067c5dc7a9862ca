# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of the vLLM plugin.

They are exported folders, requests with every control, the answers of `generate()` to them, and
engines.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

# Set before vllm is imported, since it reads them only once.
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}
os.environ.update(SETTINGS)

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import dualhead_ext as dh  # noqa: E402
from dualhead_ext.data import embedded_backbone_path  # noqa: E402
from dualhead_ext.model.export import export  # noqa: E402

NEW = 16


def with_something_to_say(model: Any, spread: float, seed: int = 1) -> Any:
    """A gated model whose untrained gate and reward head change its text."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.lm_head_module.named_parameters():
            if "." in name:
                scale = spread if name.startswith("reward_head") else 0.05
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def gated(backbone: Any = None, **config: Any) -> Any:
    """The embedded backbone, or another one, with a gated head, in fp32."""
    if backbone is None:
        backbone = AutoModelForCausalLM.from_pretrained(
            embedded_backbone_path(), dtype=torch.float32
        )
        spread = {"full": 0.02, "embedding": 0.2, "lowrank": 0.2}
    else:
        spread = {"full": 0.3}
    config = {"reward_head": "full", "gate": "attention", "gate_head_dim": 48} | config
    model = dh.DualHeadForCausalLM.from_backbone(backbone, trial=False, **config)
    return with_something_to_say(model, spread[config["reward_head"]])


def served(model: Any, folder: Path, backbone: str | Path = "embedded") -> Path:
    model.save_pretrained(folder / "heads")
    return export(folder / "heads", folder / "served", backbone)


def prompts(vocab: int = 4096) -> list[list[int]]:
    """Prompts of 2 to 260 tokens. The last two share their first 96 tokens."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, vocab, (260,), generator=generator).tolist()
    return [ids[:2], ids[5:36], ids, [*ids[:96], 7, 9, 11]]


def controls(num_objectives: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {},
        {"strength": 0.0},
        {"strength": 2.0, "gate_offset": 0.5},
        {"gate_offset": -1.0},
        {"alpha": 1.0},
        {"max_kl": 0.05, "skip_threshold": 0.1},
    ]
    weights = [1.5] + [0.25] * (num_objectives - 1)
    return found if num_objectives == 1 else [*found, {"objective_weights": weights}]


def jobs(num_objectives: int, vocab: int = 4096) -> list[tuple[list[int], dict[str, Any]]]:
    """Every prompt with every control."""
    return [(ids, own) for ids in prompts(vocab) for own in controls(num_objectives)]


def expected(model: Any, work: list[tuple[list[int], dict[str, Any]]], new: int = NEW) -> list:
    """(tokens, the alpha of each) for every job, run alone."""
    found = []
    for ids, own in work:
        out = model.generate(
            torch.tensor([ids]),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_gate=True,
            return_dict_in_generate=True,
            **own,
        )
        found.append((out.sequences[0, len(ids) :].tolist(), out.gate_alpha[0].float()))
    return found


def engine(folder: Path, **options: Any) -> Any:
    """A small fp32 engine. Its chunks of 64 split prompts and mix them with decoding."""
    from vllm import LLM

    sizes = {
        "dtype": "float32",
        "max_model_len": 320,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 16,
        "enforce_eager": True,
        "disable_log_stats": False,
    }
    return LLM(str(folder), **sizes | options)


def close(llm: Any) -> None:
    """Free an engine of this process."""
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()


def answers(llm: Any, work: list[tuple[list[int], dict[str, Any]]], new: int = NEW) -> list:
    """(tokens, the alpha of each) for every job, all at once."""
    from vllm import SamplingParams

    from dualhead_ext.vllm.alpha import take_alpha

    params = [
        SamplingParams(
            temperature=0.0, max_tokens=new, ignore_eos=True,
            extra_args=own | {"return_alpha": f"job {i}"},
        )
        for i, (_, own) in enumerate(work)
    ]  # fmt: skip
    inputs = [{"prompt_token_ids": ids} for ids, _ in work]
    outputs = llm.generate(inputs, params, use_tqdm=False)
    return [
        (list(out.outputs[0].token_ids), torch.tensor(take_alpha(llm, out, f"job {i}")))
        for i, out in enumerate(outputs)
    ]


def check(found: list, wanted: list, tolerance: float = 1e-4) -> None:
    """Check that all texts are equal and that every alpha is close."""
    assert len(found) == len(wanted)
    texts = {tuple(tokens) for tokens, _ in wanted}
    assert len(texts) > len(wanted) // 3  # otherwise prompts and controls would have no effect
    for i, ((tokens, alpha), (own, own_alpha)) in enumerate(zip(found, wanted, strict=True)):
        assert tokens == own, f"job {i}"
        torch.testing.assert_close(alpha, own_alpha, rtol=0, atol=tolerance, msg=f"job {i}")


def metric(llm: Any, name: str) -> float:
    """The value of one of vLLM's counters."""
    return sum(m.value for m in llm.get_metrics() if m.name == f"vllm:{name}")
