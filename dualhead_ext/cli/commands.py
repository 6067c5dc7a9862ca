# SPDX-License-Identifier: Apache-2.0
"""The commands by name, and the small ones. Heavy modules are imported when they are needed."""

from __future__ import annotations

import importlib.metadata
import json
import os
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from ..data import EMBEDDED
from . import eval_heads
from .chat import chat
from .completion import completion
from .errors import UserError, argument, extras
from .export import export
from .generate import generate
from .inspect import inspect
from .models import quiet_transformers
from .sample import sample
from .serve import serve
from .train import train


def info(arguments: Namespace) -> None:
    """Print what was built, the device and the optional packages; or describe heads."""
    if arguments.heads is not None:
        _print(_describe_heads(arguments.heads), arguments.json)
        return
    import torch

    from ..build_info import build_info

    report: dict[str, Any] = build_info()
    report["cuda_device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    optional = {name: extra for name, extra in reversed(extras()) if extra != "test"}
    report["packages"] = {name: _version(name) for name in sorted(optional)}
    if arguments.json:
        _print(report, as_json=True)
        return
    packages = report.pop("packages")
    _print(report)
    for name, version in packages.items():
        print(f"{name:16} {version or f'not installed (extra: {optional[name]})'}")


def _print(report: dict[str, Any], as_json: bool = False) -> None:
    if as_json:
        print(json.dumps(report, indent=2))
        return
    for name, value in report.items():
        if isinstance(value, list):
            value = ", ".join(map(_text, value)) or "none"
        print(f"{name:16} {'-' if value is None else value}")


def _text(value: Any) -> str:
    """A string as it is; a point of the curve (strength, KL) as "1: 0.1"."""
    return value if isinstance(value, str) else ": ".join(f"{x:.3g}" for x in value)


def _describe_heads(folder: str) -> dict[str, Any]:
    if not os.path.isdir(folder):
        raise UserError(
            f"heads: expected a folder written by train, got {folder}, which is not one"
        )
    with argument("heads"):
        quiet_transformers(EMBEDDED)
        from ..model.head_folder import WEIGHTS_NAME, read_head_folder

        stored, _ = read_head_folder(folder)  # so that damaged weights are noticed
        size = os.path.getsize(os.path.join(folder, WEIGHTS_NAME))
    return {
        "heads": folder,
        "backbone": stored["backbone"]["name_or_path"],
        "quantized": stored["quantized"],
        "megabytes": round(size / 1e6, 1),
        **stored["dual_head"].to_dict(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def bench(arguments: Namespace) -> int:
    """Run the benchmarks. Returns 1 if the fused step misses a speed that it must reach."""
    if arguments.report is not None and not os.path.isfile(arguments.report):
        raise UserError(f"--report: expected a file of results, got {arguments.report}")
    from ..bench import main
    from ..ops import library

    if arguments.report is None and (problem := library.problem("cpu")) is not None:
        raise UserError(problem)
    with argument():
        return main(arguments)


def evaluate(arguments: Namespace) -> int | None:
    """Measure heads; or compute the missing cells of a suite and write its tables. Returns 3 if the
    time limit was reached.
    """
    _check_suite(arguments)
    if arguments.heads is not None:
        eval_heads.main(arguments)
        return None
    with argument(extra="steering" if arguments.suite == "steering" else "train"):
        quiet_transformers(EMBEDDED)
        if arguments.suite == "steering":
            from .eval_steering import main
        else:
            from .eval_suite import main
    return main(arguments)


_OF_SUITES = ("scale", "seeds", "minutes", "state_mb")
# Options of HEADS and of each suite, and the scales of each suite.
_HEADS = "HEADS"
_OPTIONS = {
    _HEADS: ("data", "judge_url", *eval_heads.DEFAULTS),
    "paper": ("data", "judge_url", "judge_model", "decoders", *_OF_SUITES),
    "steering": ("attributes", "systems", "kl", *_OF_SUITES),
}
_SCALES = {"paper": ("tiny", "small", "gpu"), "steering": ("tiny", "standard", None)}


def _check_suite(arguments: Namespace) -> None:
    """Check that HEADS or --suite is given (default: --suite paper), and only its options."""
    if arguments.heads is not None and arguments.suite is not None:
        raise UserError(
            f"--suite: expected HEADS or --suite, got {arguments.heads} and --suite "
            f"{arguments.suite}"
        )
    if arguments.heads is None and arguments.suite is None:
        arguments.suite = "paper"
    chosen = arguments.suite or _HEADS
    for name in dict.fromkeys(name for names in _OPTIONS.values() for name in names):
        if name in _OPTIONS[chosen] or getattr(arguments, name) is None:
            continue
        owners = [one if one == _HEADS else f"--suite {one}" for one in _OPTIONS
                  if name in _OPTIONS[one]]  # fmt: skip
        option = f"--{name.replace('_', '-')}"
        raise UserError(f"{option}: expected only with {' or '.join(owners)}")
    if chosen != _HEADS and arguments.scale not in _SCALES[chosen]:
        raise UserError(
            f"--scale: expected one of {', '.join(filter(None, _SCALES[chosen]))} for --suite "
            f"{chosen}, got {arguments.scale}"
        )


def demo(arguments: Namespace) -> None:
    """Sample, train, measure and decode; see `demo.run`. With --web, serve a page."""
    if arguments.port is not None and not arguments.web:
        raise UserError("--port: expected only with --web")
    if not arguments.web:
        _train_demo(arguments)
        return
    with argument():
        from . import web
    arguments.port = web.PORT if arguments.port is None else arguments.port
    web.serve(arguments, lambda: _train_demo(arguments))


def _train_demo(arguments: Namespace) -> None:
    with argument(extra="train"):
        quiet_transformers(arguments.backbone)
        from . import demo as script
    others = ("command", "traceback", "argv", "parser", "web", "port")
    options = {n: v for n, v in vars(arguments).items() if n not in others}
    with argument():
        options["backbone"] = script.find_backbone(arguments.backbone)
    script.run(**options)


COMMANDS: dict[str, Callable[[Namespace], int | None]] = {
    "train": train,
    "generate": generate,
    "chat": chat,
    "inspect": inspect,
    "sample": sample,
    "export": export,
    "serve": serve,
    "eval": evaluate,
    "info": info,
    "bench": bench,
    "completion": completion,
    "demo": demo,
}
