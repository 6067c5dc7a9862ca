# SPDX-License-Identifier: Apache-2.0
"""Rules of the architecture.

Imports point downwards only. The kernels do not use torch. Nothing unpickles, or runs code from a
file. Importing the package is fast.

Each rule is a function from source text to findings, and a test shows that it finds something.
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

# The package's folders and root modules, lowest first. Each imports only from those before it.
# Within one there are no import cycles.
ORDER = (
    "config",
    "quantization",
    "reference",
    "ops",
    "build_info",
    "measurement",
    "files",
    "data",
    "loss",
    "head",
)
ORDER += ("functional", "model", "generation", "train", "bench", "eval", "vllm", "cli", "__main__")
RANK = {name: rank for rank, name in enumerate(ORDER)}


def module_name(path: Path) -> str:
    """dualhead_ext/eval/tables.py -> "eval.tables"; a package by its own name."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported_modules(source: str, package: tuple[str, ...] = ()) -> set[str]:
    """Modules of dualhead_ext that a source text imports, including imports inside functions.

    package: the folder of the source text, below dualhead_ext.
    """
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
            # "from . import ops" imports modules, "from .ops import decode_step" imports a module's
            # names.
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


def room(module: str) -> str:
    return module.split(".")[0]


def test_every_module_has_its_room():
    assert {room(name) for name in MODULES} - {"__init__"} == set(ORDER)
    assert sum(name in MODULES and "." not in name for name in ORDER if _is_file(name)) <= 6


def _is_file(name: str) -> bool:
    return MODULES[name].name != "__init__.py"


@pytest.mark.parametrize("module", [name for name in MODULES if name != "__init__"])
def test_imports_point_downwards(module):
    path = MODULES[module]
    folder = path.relative_to(PACKAGE).parent.parts
    for imported in imported_modules(path.read_text(), folder):
        assert RANK[room(imported)] <= RANK[room(module)], f"{module} imports {imported}, above it"


def test_no_cycles():
    graph = {}
    for name, path in MODULES.items():
        graph[name] = imported_modules(path.read_text(), path.relative_to(PACKAGE).parent.parts)
        # A package's __init__ may import its own modules inside functions, and they may read its
        # constants.
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


# The reference implementation is for comparisons. These modules may import it, for these names.
ORACLES = {"reference", "reference.heads", "reference.sampling", "loss.reference"}
MAY_IMPORT_THE_ORACLE = {
    "ops": {"DecodeOutput"},  # the type of a step's result
    "head.decoding": {"decode_step"},  # the fallback, which ops.warn_of_reference announces
}


def uses_of_the_oracle(module: str) -> set[str]:
    """Names that a module uses from the reference: imported, or as attributes of it."""
    path, found = MODULES[module], set()
    package = path.relative_to(PACKAGE).parent.parts
    tree = ast.parse(path.read_text())
    aliases = {"reference"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            base = ".".join(part for part in base if part)
            if base in ORACLES:
                found |= {alias.name for alias in node.names}
            for alias in node.names:
                if f"{base}.{alias.name}".removeprefix(".") in ORACLES:
                    aliases.add(alias.asname or alias.name)
                    found.add("")
    if "" in found:
        attributes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
        found |= {
            a.attr for a in attributes if isinstance(a.value, ast.Name) and a.value.id in aliases
        }
    return found - {""}


def test_only_the_fallback_uses_the_oracle():
    """The package has formulas of its own, so that an error in one of the two shows.

    Benchmarks may time the reference.
    """
    for module in MODULES:
        if module not in ORACLES and room(module) != "bench":
            assert uses_of_the_oracle(module) <= MAY_IMPORT_THE_ORACLE.get(module, set()), module


def test_uses_of_the_oracle_are_found():
    assert uses_of_the_oracle("head.decoding") == {"decode_step"}
    assert uses_of_the_oracle("ops") == {"DecodeOutput"}
    assert "decode_step" in uses_of_the_oracle("bench.contenders")
    assert "row_sums" in uses_of_the_oracle("bench.eager_loss")


def test_a_control_is_named_in_four_places():
    """As CONTRIBUTING states, they are the field, its formula, the reference's formula, and the
    operator's argument.
    """
    named = {n for n, path in MODULES.items() if re.search(r"\bskip_threshold\b", path.read_text())}
    assert named == {"head.controls", "head.mixture", "reference", "ops"}


def test_imports_are_found():
    source = """
        from . import ops, reference
        from .config import DualHeadConfig
        import dualhead_ext.head.gate
        from dualhead_ext.head.dual_head import DualHead
        import torch

        def later():
            from .model.causal_lm import DualHeadForCausalLM
    """
    expected = {"ops", "reference", "config", "head.gate", "head.dual_head", "model.causal_lm"}
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
    """Files of csrc/ that a file includes: beside itself, or from csrc/."""
    found = []
    for name in OWN_HEADER.findall(path.read_text()):
        places = [(path.parent / name).resolve(), (ROOT / "csrc" / name).resolve()]
        found += [place for place in places if place.is_file()][:1]
    return found


def test_kernels_include_nothing_above_or_beside_them():
    """params.h and similar headers serve both devices. No device includes the other's files."""
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
UNSAFE_KEYWORDS = {"trust_remote_code", "allow_pickle", "shell"}  # with the literal value True


def unsafe_uses(source: str) -> list[str]:
    """Ways to run code, to unpickle or to skip checks that a source text contains."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert):  # python -O removes asserts, and the checks in them
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
SOURCES += [ROOT / "setup.py", ROOT / "conftest.py", *sorted((ROOT / "python_tests").rglob("*.py"))]
SOURCES += sorted((ROOT / "benchmarks").rglob("*.py"))
SOURCES += sorted((ROOT / "tools").rglob("*.py"))


def test_every_source_states_its_licence():
    for path in SOURCES:
        first = path.read_text().partition("\n")[0]
        assert re.fullmatch(r"(#|//) SPDX-License-Identifier: Apache-2\.0", first), path


# --- importing ------------------------------------------------------------------------------------

CORE = ("dualhead_ext.ops", "dualhead_ext.head.dual_head", "dualhead_ext.functional")


def run_python(source: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)], capture_output=True, text=True, cwd=ROOT
    )


def test_the_package_alone_imports_neither_torch_nor_transformers():
    """`dualhead --help` must not take the seconds that importing torch takes."""
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
    """A CUDA context created by an import breaks every process that forks afterwards."""
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
    """It has the name of its module, and importing the module could replace the function."""
    import dualhead_ext
    import dualhead_ext.build_info

    assert callable(dualhead_ext.build_info)
