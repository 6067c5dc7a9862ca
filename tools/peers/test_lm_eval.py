# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness on a gated model: likelihoods and texts agree with the model's own forward
and generate, and with the plain backbone's if the heads change nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dualhead_ext as dh
from dualhead_ext.data import embedded_backbone_path

from .sources import installed

# Its imports that are not installed with this project.
NEEDS = ("evaluate", "sqlitedict", "word2number", "more_itertools", "dill", "pytablewriter",
         "sacrebleu", "rouge-score", "portalocker", "colorama", "lxml", "tabulate")  # fmt: skip
QUESTIONS = [
    {"question": f"What comes after {word}?", "choices": ["a tree", "the sea", "nothing at all"]}
    for word in ("rain", "the night", "a war", "winter", "the end", "dinner")
]


@pytest.fixture(scope="module")
def harness():
    sys.path.insert(0, str(installed("lm-eval", NEEDS)))
    return pytest.importorskip("lm_eval.evaluator")


def results(harness: Any, folder: Path, model: Any) -> dict[str, Any]:
    """The harness's results for a multiple-choice task and a generation task on our questions."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows = folder / "rows.json"
    rows.write_text("\n".join(json.dumps(row | {"answer": 0}) for row in QUESTIONS))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    choices = common | {
        "task": "choices",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    texts = common | {
        "task": "texts",
        "doc_to_text": "{{question}}\n",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"max_gen_toks": 6, "do_sample": False, "until": ["\n\n"]},
        "metric_list": [{"metric": "exact_match"}],
    }
    tokenizer = AutoTokenizer.from_pretrained(embedded_backbone_path())
    return harness.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        tasks=[choices, texts],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )


def answers(found: dict[str, Any]) -> tuple[torch.Tensor, list[str]]:
    """(log-likelihoods of all choices, texts)."""
    likelihoods = [
        [float(pair[0]) for (pair,) in sample["resps"]] for sample in found["samples"]["choices"]
    ]
    return torch.tensor(likelihoods), [s["resps"][0][0] for s in found["samples"]["texts"]]


@torch.no_grad()
def test_likelihoods_and_texts(harness, tmp_path):
    def backbone() -> Any:
        path = embedded_backbone_path()
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    plain = answers(results(harness, tmp_path, backbone()))
    model = dh.DualHeadForCausalLM.from_backbone(backbone(), reward_head="full")
    silent = answers(results(harness, tmp_path, model))
    torch.testing.assert_close(silent[0], plain[0], rtol=1e-4, atol=1e-3)
    assert silent[1] == plain[1]
    torch.manual_seed(0)
    for parameter in model.lm_head_module.reward_head.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    gated = answers(results(harness, tmp_path, model))
    assert (gated[0] - plain[0]).abs().max() > 0.1 and gated[1] != plain[1]
    tokenizer = AutoTokenizer.from_pretrained(embedded_backbone_path())
    for row, found in zip(QUESTIONS, gated[0], strict=True):
        for choice, likelihood in zip(row["choices"], found, strict=True):
            prompt = tokenizer(row["question"], return_tensors="pt").input_ids
            whole = tokenizer(f"{row['question']} {choice}", return_tensors="pt").input_ids
            logits = model(whole).logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1)
            own = logits.gather(1, whole[0, prompt.shape[1] :, None]).sum()
            assert abs(float(own - likelihood)) < 1e-2
