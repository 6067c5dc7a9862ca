# SPDX-License-Identifier: Apache-2.0
"""Install a wheel into its own environment and run `smoke` there, without the source tree on the
path. It tests the Python that runs this program:

    python3.12 -m tools.wheel.environment dist/*.whl --torch 2.11.0
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

SMOKE = Path(__file__).with_name("smoke.py").resolve()


def try_wheel(wheel: Path, folder: Path, torch: str | None, extra: str | None) -> None:
    """Make the environment in ``folder``, unless there is one, and run `smoke` in it.

    Raises:
        subprocess.CalledProcessError: it could not be installed, or `smoke` failed.
    """
    python = folder / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, f"torch=={torch}" if torch else "torch>=2.11"], check=True)
    # Install it without extras first: its only requirement, torch, must be enough.
    subprocess.run([*pip, "--force-reinstall", "--no-deps", wheel.resolve()], check=True)
    if extra:
        subprocess.run([*pip, f"{wheel.resolve()}[{extra}]"], check=True)
    # -I: neither the working folder, nor the script's, nor PYTHONPATH is searched.
    quiet = ["-W", "ignore:Failed to initialize NumPy"]  # torch's remark where there is none
    command = [python.absolute(), "-I", *quiet, SMOKE, *(["--command-line"] if extra else [])]
    with tempfile.TemporaryDirectory() as elsewhere:
        subprocess.run(command, cwd=elsewhere, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", help="version of torch; default: the newest")
    parser.add_argument("--extra", help="an extra that the command line needs, such as train")
    parser.add_argument(
        "--environment", type=Path, help="folder to create or reuse; default: a temporary one"
    )
    arguments = parser.parse_args()
    options = (arguments.torch, arguments.extra)
    try:
        if arguments.environment is not None:
            try_wheel(arguments.wheel, arguments.environment, *options)
        else:
            with tempfile.TemporaryDirectory() as folder:
                try_wheel(arguments.wheel, Path(folder, "environment"), *options)
    except subprocess.CalledProcessError as error:
        sys.exit(f"wheel: {' '.join(map(str, error.cmd))} returned {error.returncode}")


if __name__ == "__main__":
    main()
