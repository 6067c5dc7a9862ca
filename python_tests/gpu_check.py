# SPDX-License-Identifier: Apache-2.0
"""`make gpu-check`: the GPU tests, in the current Python's environment, none skipped.

Exits with 3 and one sentence where there is no GPU to check (make itself then says "Error 3").
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NO_GPU = 3


def missing() -> str | None:
    """Why the GPU tests cannot run here, as one sentence."""
    try:
        import torch
    except ImportError:
        return f"torch is not installed in the environment of {sys.executable}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    return None


def main() -> int:
    sentence = missing()
    if sentence is not None:
        print(f"gpu-check: no GPU to check: {sentence}.", file=sys.stderr)
        return NO_GPU
    steps = (
        ["setup.py", "--quiet", "build_ext", "--inplace"],
        ["-m", "pytest", "-m", "cuda", "--require-cuda"],
    )
    for step in steps:
        code = subprocess.run([sys.executable, *step], cwd=ROOT).returncode
        if code != 0:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
