"""Runs the fast tests and the tiny notebooks under the package set of a platform: run_all.sh test --against NAME."""

import argparse
import hashlib
import importlib.metadata
import subprocess
import sys
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
SLOW = ["tests/reliability", "tests/benchmarks", "tests/test_learning.py", "tests/notebooks/test_demo_in_a_browser.py"]


def torch_options(version: str) -> list[str]:
    """Return pip's options for a torch of this version; its CPU builds have an index of their own."""
    if version.endswith("+cpu"):
        try:
            with urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=5):
                return [f"--extra-index-url={CPU_INDEX}", f"torch=={version}"]
        except OSError:  # not reached from here: pip may have a file of it, under the version without the build
            return [f"torch=={version.removesuffix('+cpu')}"]
    return [f"torch=={version}"]


def environment(name: str) -> Path:
    """Make the environment .venv-NAME, or find it as it was made for the same lists; returns its Python."""
    folder, constraints, wanted = ROOT / f".venv-{name}", HERE / f"{name}.txt", ROOT / "requirements.txt"
    torch = importlib.metadata.version("torch")
    made_for = hashlib.sha256(constraints.read_bytes() + wanted.read_bytes() + torch.encode()).hexdigest()
    python, stamp = folder / "bin" / "python", folder / "made_for.sha256"
    print(f"Packages of {constraints.relative_to(ROOT)}; torch {torch} and Python {sys.version.split()[0]} as here")
    if stamp.is_file() and stamp.read_text() == made_for:
        return python
    print(f"Making the environment {folder.name} (once; some minutes) ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    pip = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    subprocess.run([*pip, *torch_options(torch)], check=True)  # first: the newest would pull gigabytes of CUDA
    subprocess.run([*pip, "-c", constraints, "-r", wanted], check=True)
    stamp.write_text(made_for)
    return python


def main() -> int:
    """Make the environment and run pytest in it; returns pytest's exit code."""
    names = sorted(path.stem for path in HERE.glob("*.txt"))
    parser = argparse.ArgumentParser(prog="run_all.sh test --against", description=__doc__, allow_abbrev=False)
    parser.add_argument("name", choices=names, help="the package set, a file of tests/constraints")
    args, rest = parser.parse_known_args()
    try:
        python = environment(args.name)
    except subprocess.CalledProcessError as error:
        print(f"The environment for {args.name} could not be made (see above): {error}", file=sys.stderr)
        return 1
    chosen = rest or ["tests", *(f"--ignore={path}" for path in SLOW)]
    return subprocess.run([python, "-m", "pytest", "--durations=15", *chosen], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
