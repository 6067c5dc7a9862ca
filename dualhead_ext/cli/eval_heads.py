# SPDX-License-Identifier: Apache-2.0
"""``dualhead eval HEADS``: measure trained heads on your own pairs and prompts."""

from __future__ import annotations

import importlib.util
import json
import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..data import EMBEDDED, load_preference_data
from ..eval.scorers import Scorer, scorer
from .errors import UserError, argument
from .models import check_device, check_heads, loading, quiet_transformers
from .sample import failing_scorer, load_prompts

STRENGTHS = (0.0, 0.5, 1.0, 2.0)
# Defaults of the options that only HEADS has.
DEFAULTS: dict[str, Any] = {
    "strengths": STRENGTHS,
    "prompts": None,
    "scorer": (),
    "backbone": None,
    "objective_weights": None,
    "limit": None,
    "max_new_tokens": 64,
    "max_length": 512,
    "batch_size": 32,
    "seed": 0,
    "device": "auto",
    "no_plot": False,
}
# The number of prompts without --limit. A reply at each strength takes seconds on a CPU.
PROMPTS = 32


def main(arguments: Namespace) -> None:
    """Check the arguments, measure, write the report, and print its path."""
    for name, value in DEFAULTS.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    strengths = sorted({0.0, *arguments.strengths})
    rows, prompts, scorers = check(arguments)
    with argument():
        quiet_transformers(EMBEDDED)
    model, tokenizer = _load(arguments)
    _check_weights(arguments, model, rows)
    with argument("--prompts"):
        _check_lengths(model, tokenizer, prompts, arguments.max_new_tokens)
    from ..eval.heads import report as pages

    with failing_scorer():
        report = _measure(arguments, model, tokenizer, rows, prompts, strengths, scorers)
    files = {pages.RESULTS: pages.to_json(report), pages.PAGE: pages.to_markdown(report).encode()}
    if report["plot"]:
        from ..eval.heads.plot import sweep_figure
        from ..measurement.figure import png

        files[pages.PLOT] = png(sweep_figure(report))
    from ..files.atomic import replace_files

    out = Path(arguments.out)
    with argument("--out"):
        out.mkdir(parents=True, exist_ok=True)
        replace_files(out, files)
    _summarize(report)
    for name in files:
        print(out / name)


def check(arguments: Namespace) -> tuple[list[dict], list[Any], list[Scorer]]:
    """(rows, prompts, scorers), checked before heavy modules are imported."""
    limit = arguments.limit
    check_heads(arguments)
    if arguments.data is None and arguments.prompts is None:
        raise UserError("expected --data, --prompts or both with HEADS, got neither")
    for value in arguments.strengths:
        if value < 0:
            raise UserError(f"--strengths: expected numbers of at least 0, got {value:g}")
    _check_out(Path(arguments.out))
    if not arguments.no_plot and importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "the plot needs the package matplotlib, which is not installed; install it with: "
            "pip install 'dualhead_ext[plot]', or pass --no-plot"
        )
    rows: list[dict] = []
    if arguments.data is not None:
        with argument("--data"):
            split = "test" if arguments.data == EMBEDDED else None
            rows = list(load_preference_data(arguments.data, split))[:limit]
    if arguments.prompts is None:
        prompts = _prompts_of(rows)
    else:
        with argument("--prompts"):
            prompts = load_prompts(arguments.prompts)
    names = list(dict.fromkeys(arguments.scorer))
    with argument("--scorer"):
        scorers = [scorer(name, arguments.judge_url) for name in names]
    return rows, prompts[: limit or PROMPTS], scorers


def _check_out(out: Path) -> None:
    with argument("--out"):
        existing = next(p for p in (out, *out.absolute().parents) if p.exists())
        if not existing.is_dir():
            raise NotADirectoryError(f"expected a folder, got {out}: {existing} is a file")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(f"expected a folder to write to, got {out}: not permitted")


def _prompts_of(rows: list[dict]) -> list[Any]:
    """The distinct prompts of the data, in order."""
    found = {json.dumps(row["prompt"]): row["prompt"] for row in rows if row["prompt"]}
    if not found:
        raise UserError("--prompts: expected a file, since the rows of --data have no prompts")
    return list(found.values())


def _load(arguments: Namespace) -> tuple[Any, Any]:
    """(model, tokenizer). On a CPU the model is in float32, since CPUs compute bf16 slowly."""
    import torch
    from transformers import AutoTokenizer

    from ..model.builtin_backbones import backbone_path
    from ..model.causal_lm import DualHeadForCausalLM

    check_device(arguments.device)
    cuda = arguments.device == "auto" and torch.cuda.is_available()
    device = "cuda" if cuda else "cpu" if arguments.device == "auto" else arguments.device
    given: dict[str, Any] = {"dtype": torch.float32} if device == "cpu" else {}
    if arguments.backbone is not None:
        with loading("--backbone", arguments.backbone):
            given["backbone"] = backbone_path(arguments.backbone)
    with loading("heads", arguments.heads):
        model = DualHeadForCausalLM.from_pretrained(arguments.heads, **given)
    with argument("--backbone"):
        tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    return model.eval().to(device), tokenizer


def _check_weights(arguments: Namespace, model: Any, rows: list[dict]) -> None:
    count, weights = model.dual_head_config.num_objectives, arguments.objective_weights
    if weights is not None and len(weights) != count:
        raise UserError(
            f"--objective-weights: expected as many weights as the heads have objectives, {count}, "
            f"got {len(weights)}"
        )
    highest = max((row.get("objective", 0) for row in rows), default=0)
    if highest >= count:
        raise UserError(
            f"--data: expected objectives below {count}, as many as the heads have, got {highest}"
        )
    if model.lm_head_module.knows_f is False:
        raise UserError(
            "heads: this backbone changes its logits in a way that its config does not say "
            "(logit_scale, logit_softcap), which the figures need"
        )


def _check_lengths(model: Any, tokenizer: Any, prompts: list[Any], new_tokens: int) -> None:
    from ..eval.sampling import encode_prompts, prompt_text

    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    for number, prompt in enumerate(prompts, start=1):
        length = encode_prompts([prompt_text(prompt, tokenizer)], tokenizer)[0].shape[1]
        if context is not None and length + new_tokens > context:
            raise ValueError(
                f"expected prompts that leave room for {new_tokens} tokens in a context of "
                f"{context}, got {length} tokens in prompt {number}"
            )


def _measure(
    arguments: Namespace,
    model: Any,
    tokenizer: Any,
    rows: list[dict],
    prompts: list[Any],
    strengths: list[float],
    scorers: list[Scorer],
) -> dict[str, Any]:
    from ..eval.heads import pairs, sweep
    from ..measurement.machine import describe
    from ..model.head_folder import read_config

    weights, size = arguments.objective_weights, arguments.batch_size
    found = None
    if rows:
        texts = sum(len(row.get("responses", "ab")) for row in rows)  # a pair has two
        with _bar("ranking responses", texts) as done:
            found = pairs.pair_figures(
                model, tokenizer, rows, arguments.max_length, max(1, size // 4), done
            )
    print(
        f"{len(prompts)} prompts at strengths {', '.join(f'{s:g}' for s in strengths)}", flush=True
    )
    with _bar("replying to prompts", len(prompts)) as done:
        replies = sweep.sample_replies(
            model, tokenizer, prompts, strengths, arguments.max_new_tokens, arguments.seed,
            weights, size, done,
        )  # fmt: skip
    with _bar("measuring replies", len(prompts) * len(strengths)) as done:
        figures = sweep.sweep_figures(
            model, prompts, strengths, replies, scorers, weights, max(1, size // 4), done
        )
    settings = ("seed", "max_new_tokens", "max_length", "objective_weights")
    stored = read_config(arguments.heads) if os.path.isdir(arguments.heads) else None
    return {
        "heads": arguments.heads,
        "backbone": arguments.backbone or (stored or {}).get("backbone", {}).get("name_or_path"),
        "head": model.dual_head_config.to_dict(),
        "quantized": model.lm_head_module.quantized,
        "data": arguments.data,
        "prompts_from": arguments.prompts or arguments.data,
        "prompts": len(prompts),
        "scorers": [one.name for one in scorers],
        "settings": {name: getattr(arguments, name) for name in settings},
        "plot": not arguments.no_plot,
        "pairs": found,
        "sweep": figures,
        "replies": [
            {
                "prompt": prompt if isinstance(prompt, str) else prompt[-1]["content"],
                "replies": [reply.text for reply in row],
            }
            for prompt, row in zip(prompts, replies, strict=True)
        ],
        "environment": describe(model.device.type),
    }


@contextmanager
def _bar(name: str, total: int) -> Iterator[Callable[[int], Any]]:
    """A progress bar on standard error; yields the function that advances it."""
    from tqdm.auto import tqdm

    with tqdm(desc=name, total=total, dynamic_ncols=True) as bar:
        yield bar.update


def _summarize(report: dict[str, Any]) -> None:
    """Print the figures."""
    from ..eval.heads.report import finding, with_interval
    from .terminal import percent

    if found := report["pairs"]:
        print(f"\naccuracy on {found['pairs']} pairs (95 % interval)")
        for name, (value, low, high) in found["accuracy"].items():
            print(f"  {name:16} {percent(value)} ({100 * low:.1f} to {percent(high)})")
    names = report["scorers"]
    print(f"\n{'strength':>8} {'KL':>8} {'perplexity':>10} {'alpha':>6} {'words':>6}  "
          + "  ".join(names))  # fmt: skip
    for row in report["sweep"]:
        figures = (row["kl"][0], row["perplexity"][0], row["alpha"]["mean"], row["words"][0])
        line = "{:8g} {:8.3f} {:10.1f} {:6.3f} {:6.1f}  ".format(row["strength"], *figures)
        print(line + "  ".join(with_interval(row["scores"][name]) for name in names))
    print(f"\n{finding(report)}")
