# SPDX-License-Identifier: Apache-2.0
"""The architecture as rules: imports point downwards only, the kernels know no torch, nothing
unpickles or runs code from a file, and importing the package is light.

Each rule is a function from source text to findings, and is shown to find something.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dualhead_ext"
KERNELS = ROOT / "csrc" / "kernels"

# Bottom first. A module imports from the layers below its own, or from its own without a cycle.
LAYERS = (
    {
        "config",
        "presets",
        "quantization",
        "rounding",
        "quantized_head",
        "torchao_weights",
        "prompt_projection",
        "reference",
        "reference_heads",
        "reference_sampling",
        "atomic",
        "checkpoint",
        "data",
        "data_files",
        "data_texts",
        "rendering",
        "builtin_backbones",
        "show",
        "cli_errors",
        "bench.timing",  # the one timer, of steps and of whole decoders
    },
    {"_extension", "ops", "collate"},
    # bench.machine: what a results file, of a benchmark or a comparison, says of where it was made
    {"build_info", "bench.machine", "gate", "cache", "controls", "kl_cap"},
    {"reward_head", "correction_step", "head_conversion", "head_base", "head_decode", "head"},
    {"loss_pairs", "losses", "reference_loss", "loss_rows", "loss_products"},
    {"fused_loss", "functional"},
    {"backbones", "hf_cache", "packing", "generation_options", "fingerprint", "head_files"},
    {"head_folder"},
    {
        "calibration",
        "lm_head",
        "backbone_trial",
        "attachment",
        "pretrained",
        "generation",
        "gated_generation",
        "modeling",
    },
    {"state_file", "hidden_cache", "hidden_cache_build", "training_args", "training_state"},
    {"token_limits", "trainer_checkpoints", "trainer_hidden", "trainer"},
    {"decoding", "weak_to_strong", "eval"},
    {"bench", "progress", "demo"},
    {"commands", "cli", "cli_options", "cli_models", "cli_train", "cli_generate", "cli_sample"},
)
LAYER = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def module_name(path: Path) -> str:
    """dualhead_ext/eval/tables.py -> "eval.tables"; a package by its own name."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported_modules(source: str, package: tuple[str, ...] = ()) -> set[str]:
    """Modules of dualhead_ext that a source text imports, lazily too. package: where it lies,
    below dualhead_ext."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = [*package[: len(package) - node.level + 1]]
                base += node.module.split(".") if node.module else []
            elif (node.module or "").split(".")[0] == "dualhead_ext":
                base = node.module.split(".")[1:]
            else:
                continue
            # "from . import ops" names modules, "from .ops import decode_step" things in one.
            for alias in node.names:
                deeper = ".".join([*base, alias.name])
                found.add(deeper if deeper in MODULES else ".".join(base))
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("dualhead_ext.")
                for alias in node.names
                if alias.name.startswith("dualhead_ext.")
            }
    return found - {""}


def layer_of(module: str) -> int:
    """That of the module, or of the package it is in."""
    return LAYER[module] if module in LAYER else LAYER[module.split(".")[0]]


def test_every_module_has_its_layer():
    unplaced = {
        name for name in MODULES if name not in LAYER and name.split(".")[0] not in LAYER
    } - {"__init__"}
    assert not unplaced, f"add to LAYERS: {sorted(unplaced)}"


@pytest.mark.parametrize("module", [name for name in MODULES if name != "__init__"])
def test_imports_point_downwards(module):
    path = MODULES[module]
    folder = path.relative_to(PACKAGE).parent.parts
    for imported in imported_modules(path.read_text(), folder):
        assert layer_of(imported) <= layer_of(module), f"{module} imports {imported}, above it"


def test_no_cycles():
    graph = {}
    for name, path in MODULES.items():
        graph[name] = imported_modules(path.read_text(), path.relative_to(PACKAGE).parent.parts)
        # A package's __init__ may hand its own modules constants, and import them when called.
        graph[name] = {other for other in graph[name] if not name.startswith(f"{other}.")}
    finished: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"cycle: {' -> '.join([*trail, name])}"
        if name not in finished:
            for imported in graph.get(name, ()):
                visit(imported, (*trail, name))
            finished.add(name)

    for name in graph:
        visit(name, ())


def test_imports_are_found():
    source = """
        from . import ops, reference
        from .config import DualHeadConfig
        import dualhead_ext.gate
        from dualhead_ext.head import DualHead
        import torch

        def later():
            from .modeling import DualHeadForCausalLM
    """
    expected = {"ops", "reference", "config", "gate", "head", "modeling"}
    assert imported_modules(textwrap.dedent(source)) == expected
    assert imported_modules("from ..ops import decode_step", ("eval",)) == {"ops"}
    assert imported_modules("from . import tables", ("eval",)) == {"eval"}


# --- csrc ---------------------------------------------------------------------------------------

C_SUFFIXES = {".h", ".cpp", ".cu", ".cuh"}
C_FILES = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in C_SUFFIXES)
FOREIGN_HEADER = re.compile(
    r'(?m)^\s*#\s*include\s*[<"]((?:torch|ATen|c10|caffe2|pybind11|Python)[./][^>"]*)'
)
OWN_HEADER = re.compile(r'(?m)^\s*#\s*include\s*"([^"]+)"')


def test_kernels_include_neither_torch_nor_python():
    checked = [path for path in C_FILES if path.is_relative_to(KERNELS)]
    assert len(checked) >= 2
    for path in checked:
        assert not FOREIGN_HEADER.findall(path.read_text()), path


@pytest.mark.parametrize(
    "header", ["torch/extension.h", "ATen/ATen.h", "c10/util/Half.h", "Python.h"]
)
def test_foreign_headers_are_found(header):
    assert FOREIGN_HEADER.findall(f"#include <vector>\n  # include <{header}>\n") == [header]


def own_includes(path: Path) -> list[Path]:
    """Files of csrc/ that a file of it includes: beside itself, or from csrc/."""
    found = []
    for name in OWN_HEADER.findall(path.read_text()):
        places = [(path.parent / name).resolve(), (ROOT / "csrc" / name).resolve()]
        found += [place for place in places if place.is_file()][:1]
    return found


def test_kernels_include_nothing_above_or_beside_them():
    """params.h and its like serve both devices; neither device includes the other's files."""
    seen = 0
    for path in C_FILES:
        if not path.is_relative_to(KERNELS):
            continue
        device = path.relative_to(KERNELS).parts[0]
        for included in own_includes(path):
            seen += 1
            assert included.is_relative_to(KERNELS), f"{path} includes {included}"
            parts = included.relative_to(KERNELS).parts
            assert len(parts) == 1 or parts[0] == device, f"{path} includes {included}"
    assert seen > 0


def test_only_tests_include_tests():
    for path in C_FILES:
        if path.is_relative_to(ROOT / "csrc" / "testing"):
            continue
        for included in own_includes(path):
            assert not included.is_relative_to(ROOT / "csrc" / "testing"), path


# --- what no file may contain ---------------------------------------------------------------------

UNSAFE_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}
UNSAFE_METHODS = {
    "torch.load",
    "torch.hub.load",
    "torch.save",
    "os.system",
    "yaml.load",
    "yaml.unsafe_load",
}
UNSAFE_KEYWORDS = {"trust_remote_code", "allow_pickle", "shell"}  # when they are literally True


def unsafe_uses(source: str) -> list[str]:
    """Ways to run code, to unpickle, or to check nothing that a source text contains."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert):  # python -O leaves them out, and the check with them
            found.append("assert")
        elif isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in UNSAFE_MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module.split(".")[0] in UNSAFE_MODULES:
                found.append(node.module)
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found += sorted(names & UNSAFE_METHODS)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found += [name] if name in UNSAFE_CALLS | UNSAFE_METHODS else []
            found += [
                f"{keyword.arg}=True"
                for keyword in node.keywords
                if keyword.arg in UNSAFE_KEYWORDS and ast.unparse(keyword.value) == "True"
            ]
    return found


@pytest.mark.parametrize("module", list(MODULES))
def test_nothing_unpickles_or_runs_code(module):
    assert not unsafe_uses(MODULES[module].read_text())


@pytest.mark.parametrize(
    ("source", "finding"),
    [
        ("import pickle", "pickle"),
        ("from pickle import loads", "pickle"),
        ("state = torch.load(path)", "torch.load"),
        ("from torch import load", "torch.load"),
        ("def f():\n    return eval(text)", "eval"),
        ("AutoModel.from_pretrained(p, trust_remote_code=True)", "trust_remote_code=True"),
        ("numpy.load(p, allow_pickle=True)", "allow_pickle=True"),
        ("assert name in folder", "assert"),
    ],
)
def test_unsafe_uses_are_found(source, finding):
    assert unsafe_uses(source) == [finding]


def test_harmless_uses_are_not_unsafe():
    assert not unsafe_uses("model.eval()\nre.compile('a')\nf(trust_remote_code=False)")


SOURCES = [*C_FILES, *MODULES.values(), *sorted((ROOT / "_build").glob("*.py"))]
SOURCES += [ROOT / "setup.py", ROOT / "conftest.py", *sorted((ROOT / "python_tests").glob("*.py"))]
SOURCES += sorted((ROOT / "benchmarks").rglob("*.py"))
SOURCES += sorted((ROOT / "tools").rglob("*.py"))


def test_every_source_states_its_licence():
    for path in SOURCES:
        first = path.read_text().partition("\n")[0]
        assert re.fullmatch(r"(#|//) SPDX-License-Identifier: Apache-2\.0", first), path


# --- importing ------------------------------------------------------------------------------------

CORE = ("dualhead_ext.ops", "dualhead_ext.head", "dualhead_ext.functional")


def run_python(source: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)], capture_output=True, text=True, cwd=ROOT
    )


def test_the_package_alone_imports_neither_torch_nor_transformers():
    """`dualhead --help` must not take the seconds that torch takes."""
    done = run_python("""
        import sys, dualhead_ext
        dualhead_ext.DualHeadConfig
        print(sorted({"torch", "transformers", "numpy"} & set(sys.modules)))
    """)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_core_needs_torch_alone():
    done = run_python(f"""
        import importlib, sys
        for name in "transformers accelerate datasets trl peft safetensors rich".split():
            sys.modules[name] = None  # importing it raises
        import torch
        for name in {CORE}:
            importlib.import_module(name)
        import dualhead_ext as dh
        head = dh.DualHead(dh.DualHeadConfig(hidden_size=8, vocab_size=11, gate_num_heads=2))
        cache = head.new_cache(1, 4)
        print(head.step(torch.ones(1, 8), cache).token.shape)
    """)
    assert done.stdout.strip() == "torch.Size([1])", done.stderr


def test_importing_does_not_touch_cuda():
    """A context made at import time breaks every process that forks afterwards."""
    done = run_python(f"""
        import importlib, torch

        def touched(*arguments):
            raise SystemExit("CUDA was touched")

        for name in ("_lazy_init", "is_available", "device_count", "current_device", "init"):
            setattr(torch.cuda, name, touched)
        torch._C._cuda_getDeviceCount = torch._C._cuda_init = touched
        for name in {CORE}:
            importlib.import_module(name)
        print("untouched", torch.cuda.is_initialized())
    """)
    assert done.stdout.strip() == "untouched False", done.stderr


def test_public_names_resolve():
    import dualhead_ext

    for name in dualhead_ext.__all__:
        assert getattr(dualhead_ext, name) is not None
        assert name in dir(dualhead_ext)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = dualhead_ext.no_such_name


def test_build_info_stays_a_function():
    """It shares its name with the module it comes from, which importing could put in its place."""
    import dualhead_ext
    import dualhead_ext.build_info

    assert callable(dualhead_ext.build_info)
