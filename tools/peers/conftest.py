# SPDX-License-Identifier: Apache-2.0
"""Skips tests that cannot apply, and writes the outcomes of all tests to --results-json."""

from __future__ import annotations

import collections
import datetime
import json
from pathlib import Path

import pytest
import torch

import dualhead_ext

from .inapplicable import reason_of
from .sources import VERSIONS, version_of

OUTCOMES: dict[str, dict[str, str]] = collections.defaultdict(dict)
# PEFT's decoder tests combine 40 methods with six models, 9000 tests in all. These are the common
# methods of each kind (weights added, scaled, rotated; prompts), for one model family.
PEFT_METHODS = ("LoraConfig", "AdaLoraConfig", "IA3Config", "OFTConfig", "PromptTuningConfig",
                "PromptEncoderConfig", "PrefixTuningConfig", "VeraConfig")  # fmt: skip
PEFT_MODELS = ("LlamaForCausalLM",)
# The hidden size of Liger's large shape, which is for GPUs. Its odd shapes stay.
LIGER_LARGE = 1024


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = [item for item in items if _wanted(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept
    for item in items:
        if (why := reason_of(item.nodeid)) is not None:
            item.add_marker(pytest.mark.skip(reason=f"inapplicable: {why}"))


def _wanted(item: pytest.Item) -> bool:
    given = getattr(item, "callspec", None)
    if given is not None and given.params.get("H") == LIGER_LARGE:
        return False
    method = given and given.params.get("config_cls")
    model = given and given.params.get("model_id")
    if method is None or model is None:
        return True
    return method.__name__ in PEFT_METHODS and model.endswith(PEFT_MODELS)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    peer, test = _name(report.nodeid)
    if report.skipped:
        OUTCOMES[peer][test] = _why(report)
    elif report.failed:
        OUTCOMES[peer][test] = "failed"
    elif report.when == "call":
        OUTCOMES[peer].setdefault(test, "passed")


def _name(nodeid: str) -> tuple[str, str]:
    file, _, test = nodeid.partition("::")
    return Path(file).stem.removeprefix("test_"), test


def _why(report: pytest.TestReport) -> str:
    text = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
    text = text.removeprefix("Skipped: ")
    return text if text.startswith("inapplicable: ") else f"skipped by its own suite: {text}"


def pytest_sessionfinish(session: pytest.Session) -> None:
    target = session.config.option.results_json
    if target is None:
        return
    path = Path(target)
    found = json.loads(path.read_text()) if path.is_file() else {}
    for peer, outcomes in OUTCOMES.items():
        counts = collections.Counter(why.split(":")[0] for why in outcomes.values())
        reasons = collections.Counter(
            why for why in outcomes.values() if why.startswith("inapplicable")
        )
        found[peer] = {
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "commit": dualhead_ext.build_info()["commit"],
            "torch": torch.__version__,
            "versions": _versions(),
            "outcomes": dict(sorted(counts.items())),
            "failed": sorted(t for t, why in outcomes.items() if why == "failed"),
            "inapplicable": {
                why.removeprefix("inapplicable: "): count for why, count in sorted(reasons.items())
            },
        }
    path.write_text(json.dumps(found, indent=1) + "\n")


def _versions() -> dict[str, str]:
    return {name: version_of(name) for name in ("transformers", "peft", *VERSIONS)}
