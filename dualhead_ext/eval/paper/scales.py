# SPDX-License-Identifier: Apache-2.0
"""Sizes of a run of the suite: backbones, data, lengths, trainings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .settings import BackboneSpec

# Name for the package's embedded backbone in a scale's backbones.
EMBEDDED = "embedded"


@dataclass(frozen=True)
class Scale:
    """The size of a run.

    Attributes:
        backbones: ``main`` (for every system), ``weak`` (smaller, same tokenizer, guides main),
            ``other`` (another architecture, for the headline systems).
        corpora: folders of dialogues, below the data folder, to pre-train backbones on.
        compiled: whether pre-training uses torch.compile, which pays off after about a minute.
        training: fields of TrainSettings for all methods.
        methods: method -> fields of TrainSettings for that method.
        guide_pairs, judge_pairs: number of pairs from each of two disjoint halves of the data.
        test_pairs, prompts: number of pairs and of prompts from the test split.
        new_tokens: tokens of each response.
        batch: batch size of decoding.
        prompt_tokens: maximum tokens of a prompt; longer ones are left out.
        temperature: sampling temperature of every system; exponents are scaled to sum to 1.
        best_of: n of best-of-n.
        rl_tokens: tokens of RLOO's samples.
        alphas: values of alpha for the fixed gate's sweep.
        weights: weights of the first of two objectives.
        truthfulqa, mt_bench: number of questions.
        dtype: dtype of the weights for decoding.
        cost: arguments of :func:`dualhead_ext.eval.cost.measure`, and prompt_tokens.
        seeds: default seeds of the headline systems.
    """

    backbones: Mapping[str, BackboneSpec | str]
    corpora: tuple[str, ...] = ("hh-rlhf-text",)
    compiled: bool = True
    training: Mapping[str, Any] = field(default_factory=dict)
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    guide_pairs: int = 1000
    judge_pairs: int = 1200
    test_pairs: int = 200
    prompts: int = 200
    new_tokens: int = 64
    batch: int = 50
    temperature: float = 0.7
    best_of: int = 16
    rl_tokens: int = 48
    prompt_tokens: int = 192
    dtype: str = "float32"
    alphas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    weights: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    truthfulqa: int = 100
    mt_bench: int = 16
    cost: Mapping[str, Any] = field(default_factory=dict)
    seeds: int = 1


# Learning rates of heads and adapters, and of full fine-tuning of a few million parameters.
_SMALL_METHODS = {
    "full": {"learning_rate": 2e-4},
    "rloo": {"max_steps": 16, "batch_size": 16, "micro_batch_size": 16},
}

SCALES = {
    "tiny": Scale(
        backbones={
            "main": BackboneSpec(
                hidden_size=32,
                layers=2,
                heads=2,
                intermediate=48,
                context=32,
                max_steps=4,
                max_position_embeddings=512,
                bf16=False,
            ),
            "weak": BackboneSpec(
                hidden_size=16,
                layers=1,
                heads=2,
                intermediate=24,
                context=32,
                max_steps=4,
                max_position_embeddings=512,
                bf16=False,
            ),
            "other": BackboneSpec(
                "mistral",
                hidden_size=32,
                layers=1,
                heads=2,
                intermediate=48,
                context=32,
                max_steps=4,
                max_position_embeddings=512,
                bf16=False,
            ),
        },
        compiled=False,
        training={"max_steps": 2, "batch_size": 4, "max_length": 96, "learning_rate": 1e-2},
        guide_pairs=16,
        judge_pairs=8,
        test_pairs=4,
        prompts=4,
        new_tokens=8,
        batch=4,
        best_of=2,
        rl_tokens=4,
        prompt_tokens=96,
        alphas=(0.0, 0.5, 1.0),
        weights=(0.0, 1.0),
        truthfulqa=2,
        mt_bench=2,
        cost={
            "batch_sizes": (1, 2),
            "new_tokens": 4,
            "prompt_tokens": 8,
            "seconds": 0.01,
            "min_rounds": 2,
        },
    ),
    "small": Scale(
        backbones={
            "main": EMBEDDED,
            "weak": BackboneSpec(hidden_size=128, layers=4, heads=4, intermediate=352, bf16=False),
            "other": BackboneSpec(
                "mistral",
                hidden_size=192,
                layers=4,
                heads=4,
                intermediate=512,
                epochs=2,
                bf16=False,
            ),
        },
        training={"batch_size": 16, "micro_batch_size": 4, "max_length": 192},
        methods=_SMALL_METHODS,
        guide_pairs=400,
        test_pairs=150,
        prompts=100,
        new_tokens=48,
        rl_tokens=32,
        cost={
            "batch_sizes": (1, 8, 32),
            "new_tokens": 32,
            "prompt_tokens": 64,
            "seconds": 1.0,
            "min_rounds": 3,
        },
    ),
    "gpu": Scale(
        backbones={
            "main": BackboneSpec(
                hidden_size=512, layers=6, heads=8, intermediate=1408, batch_size=32, max_steps=3000
            ),
            "weak": BackboneSpec(
                hidden_size=448, layers=6, heads=8, intermediate=1216, batch_size=32, max_steps=3000
            ),
            "other": BackboneSpec(
                "mistral",
                hidden_size=512,
                layers=6,
                heads=8,
                intermediate=1408,
                batch_size=32,
                max_steps=3000,
            ),
        },
        corpora=("hh-rlhf-text", "instruct-text"),
        training={"batch_size": 32, "max_length": 512, "bf16": True},
        methods=_SMALL_METHODS,
        test_pairs=800,
        prompts=300,
        new_tokens=128,
        batch=100,
        rl_tokens=64,
        prompt_tokens=512,
        dtype="bfloat16",
        truthfulqa=817,
        mt_bench=80,
        cost={"batch_sizes": (1, 8, 32), "new_tokens": 128, "prompt_tokens": 128, "seconds": 5.0},
        seeds=3,
    ),
}
