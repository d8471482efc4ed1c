"""Small forwards whose threads wait actively, passively or by default, on quiet cores and beside a busy one.

Run alone with `python -m tests.benchmarks.bench_waiting`. Every measurement is a process of its own on the same two
cores, since OpenMP reads the variable once; the busy core is one of the two, kept at work by another process.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

CORES, ROUNDS = 2, 3
POLICIES = {"active": "ACTIVE", "unset": None, "passive": "PASSIVE"}
CHILD = """
import json, time
import torch
from helpers.models.language import load_language_model
from helpers.models.xclip import FrameEncoder, load_xclip
from helpers.config import load_profile

torch.manual_seed(0)
encoder = FrameEncoder(load_xclip("tiny/xclip"), "tiny/xclip").eval()
language = load_language_model(load_profile("tiny").language_model, torch.device("cpu"))[0].eval()
frames = torch.randint(0, 256, (4, 16, encoder.image_size, encoder.image_size, 3), dtype=torch.uint8)
tokens = torch.randint(3, 300, (16, 48))
ways = {"encoder": lambda: encoder(frames, torch.full((4,), 16)), "language": lambda: language(input_ids=tokens)}
found = {}
with torch.inference_mode():
    for name, way in ways.items():
        seconds, until = [], time.perf_counter() + 20
        while len(seconds) < 23 and (len(seconds) < 4 or time.perf_counter() < until):
            began = time.perf_counter()
            way()
            seconds.append(time.perf_counter() - began)
        kept = sorted(seconds[3:])
        found[name] = kept[len(kept) // 2]
print(json.dumps(found))
"""


def _seconds(policy: str | None) -> dict[str, float]:
    """Time the small forwards in a process of its own: seconds of the median one, by model."""
    environment = os.environ | {"OMP_NUM_THREADS": str(CORES), "HF_HUB_OFFLINE": "1"}
    environment.pop("OMP_WAIT_POLICY", None)
    if policy:
        environment["OMP_WAIT_POLICY"] = policy
    done = subprocess.run([sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def _busy_core(core: int) -> Iterator[None]:
    code = f"import os; os.sched_setaffinity(0, [{core}])\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code]) as other:
        try:
            yield
        finally:
            other.kill()


def _measure() -> dict[str, dict[str, float]]:
    """Seconds by policy and model: the median of the rounds, in which the policies take turns."""
    rounds = [{name: _seconds(policy) for name, policy in POLICIES.items()} for _ in range(ROUNDS)]
    return {
        name: {model: statistics.median(one[name][model] for one in rounds) for model in rounds[0][name]}
        for name in POLICIES
    }


def run() -> list[dict]:
    """Two ratios: active over passive beside a busy core, and passive over active on quiet ones; the worse model's."""
    before = os.sched_getaffinity(0)
    cores = sorted(before)[:CORES]
    os.sched_setaffinity(0, cores)  # children inherit it
    try:
        quiet = _measure()
        with _busy_core(cores[-1]):
            busy = _measure()
    finally:
        os.sched_setaffinity(0, before)
    models = quiet["passive"]
    gain = min(busy["active"][model] / busy["passive"][model] for model in models)
    cost = max(quiet["passive"][model] / quiet["active"][model] for model in models)
    facts = {"milliseconds": {"quiet": _rounded(quiet), "busy": _rounded(busy)}, "cores": len(cores)}
    return [
        {
            "name": "a small forward whose threads spin at barriers, over one whose threads sleep, beside a busy core",
            "ratio": round(gain, 2),
            "aim": ">= 1.5",
            "unit": "x time, higher is better",
            **facts,
        },
        {
            "name": "a small forward whose threads sleep at barriers, over one whose threads spin, on quiet cores",
            "ratio": round(cost, 3),
            "aim": "<= 1.15",
            "unit": "x time, lower is better",
            **facts,
        },
    ]


def _rounded(found: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {name: {model: round(1000 * value, 2) for model, value in each.items()} for name, each in found.items()}


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
