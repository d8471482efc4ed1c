"""Run the benchmarks: `python -m tests.benchmarks [NAME ...] [--json FILE]`; each compares two ways in one run.

Every `bench_*.py` here has a function `run()` that returns one result or a list of them: a dict with `name`, `ratio`,
`aim` (text such as "<= 1.25" or ">= 3") and any further facts. A ratio that misses its aim is shown, not an error.
"""

import argparse
import importlib
import json
import operator
import re
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd

from helpers.workspace import write_json
from helpers.workspace.machine import machine
from helpers.workspace.place import runs_root

COMPARE = {"<=": operator.le, ">=": operator.ge}


def names() -> list[str]:
    """Names of all benchmarks, without `bench_`."""
    return sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def reached(ratio: float, aim: str) -> bool:
    """Tell whether `ratio` meets an aim such as "<= 1.25"; raises ValueError for an aim that cannot be read."""
    match = re.fullmatch(r"\s*(<=|>=)\s*([\d.]+)\s*x?\s*", aim)
    if not match:
        raise ValueError(f"an aim reads like '<= 1.25' or '>= 3', found {aim!r}")
    return COMPARE[match[1]](ratio, float(match[2]))


def collect(chosen: list[str]) -> list[dict[str, Any]]:
    """Run the chosen benchmarks and return their results, checked."""
    results = []
    for name in chosen:
        print(f"{name} ...", flush=True)
        began = time.monotonic()
        found = importlib.import_module(f"tests.benchmarks.bench_{name}").run()
        for result in found if isinstance(found, list) else [found]:
            results.append({**result, "reached": reached(result["ratio"], result["aim"]), "benchmark": name})
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    return results


def main() -> int:
    """Run the command line; returns 0 if every benchmark ran, 2 for an unknown name."""
    if sys.argv[1:2] == ["reliability"]:
        from tests.benchmarks import reliability  # by its own name, under which forked processes find it

        return reliability.main(sys.argv[2:])
    told = "`reliability`, with options of its own, is the trial of kills and power cuts."
    parser = argparse.ArgumentParser(prog="run_all.sh bench", description=f"Run benchmarks, print their ratios. {told}")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one or more of {', '.join(names())} (default: all)")
    parser.add_argument("--json", type=Path, default=runs_root() / "benchmarks.json", help="file to write")
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(names()))
    if unknown:
        parser.error(f"unknown benchmark {', '.join(unknown)}; there are {', '.join(names())}")
    results = collect(args.names or names())
    args.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.json, {"machine": machine(), "results": json.loads(json.dumps(results, default=float))})
    table = pd.DataFrame(results)[["name", "ratio", "aim", "reached"]]
    print(f"\n{table.to_string(index=False, float_format=lambda value: f'{value:.3f}')}\n\nWritten to {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
