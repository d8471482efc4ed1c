"""Kills and power cuts: `./run_all.sh bench reliability` stops notebooks 01 to 05 at random.

A world of a dozen GIFs and a few problems goes through the notebooks' own cells, in a process forked from one that has
done the imports. The process is killed by -9 at a random moment; after some kills a random file below the run is
emptied, cut or halved, as a stop of the machine leaves it. The same work is begun again until it ends, and what it made
is compared with a run that nothing disturbed. Some kills are dealt to the runner or its kernels under papermill.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil

from helpers.workspace import runs_root, write_json
from helpers.workspace.machine import machine
from helpers.workspace.place import repo_root

STAGES = ["01_data_sharding", "02_feature_caching", "03_adapter_training", "04_evaluation", "05_adem_scienceqa"]
OVERRIDES = {
    "shapes.train": 8,
    "shapes.test": 4,
    "data.shard_size": 5,
    "data.workers": 1,
    "data.groups": [1, 2],
    "evaluation.groups": 2,
    "evaluation.bootstrap": 20,
    "training.epochs": 2,
    "training.groups": [1, 2],
    "training.validation_share": 0.0,
    "training.checkpoint_minutes": 1e-9,
    "adem.world_train": 24,
    "adem.world_test": 8,
    "adem.epochs": 3,
    "adem.batch_size": 8,
    "adem.checkpoint_minutes": 1e-9,
}
LEFT_OUT = ("set_up()", "step_cost(")  # cells: the imports are done, and what only measures the machine is no result
RUN = "trial"
STUCK = 12  # attempts in a row, after the last kill, in which a run must end
SERVER = get_context("forkserver")


def work(runs: str, log: str) -> None:
    """Run the cells of every stage that is not done, in this process; what it prints goes to `log`."""
    os.environ |= {"RUNS_ROOT": runs, "SUITE_HEADLESS": "1", "OMP_NUM_THREADS": "1"}
    file = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    import torch

    from helpers.answers import tgif_qa
    from helpers.stage.manifest import read_manifest, step_back
    from helpers.store import encoding, shards

    torch.set_num_threads(1)
    shards.BATCH_GIFS = encoding.BATCH_GIFS = 2  # so that there are commits to be killed between
    tgif_qa.CHUNK = 8
    os.chdir(repo_root() / "notebooks")
    try:
        for name in STAGES:
            folder = Path(runs) / RUN / name
            if folder.is_dir():
                step_back(folder)
            manifest = read_manifest(folder)
            if not manifest or manifest["status"] != "complete":
                run_cells(name)
    except BaseException:
        traceback.print_exc()
        raise


def run_cells(name: str) -> None:
    """Run a notebook's code cells in order, in a namespace of their own."""
    cells = json.loads(Path(f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    values: dict[str, Any] = {"__name__": "notebook", "Path": Path}
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and not any(words in source for words in LEFT_OUT):
            exec(compile(source, name, "exec"), values)
            if "parameters" in cell["metadata"].get("tags", []):
                values |= {"profile": "tiny", "run": RUN, "overrides": OVERRIDES}


def contents(run: Path) -> dict[str, str]:
    """A digest of everything that a run made and that must be equal: tables row by row, other files byte by byte."""
    import lance
    import pandas as pd

    found = {}
    tables = ["01_data_sharding/questions", "01_data_sharding/rejects", "02_feature_caching/questions"]
    for name in [*tables, "04_evaluation/predictions", "05_adem_scienceqa/predictions"]:
        found[name] = pd.read_parquet(run / f"{name}.parquet").to_json(orient="split", double_precision=15)
    for shard in [*sorted((run / STAGES[0] / "frames").glob("*.lance")), run / STAGES[1] / "features.lance"]:
        found[str(shard.relative_to(run))] = repr(lance.dataset(str(shard)).to_table().to_pylist())
    folders = ["03_adapter_training/bundle", "03_adapter_training/blind"]
    folders += ["05_adem_scienceqa/adem_vl", "05_adem_scienceqa/text_only"]
    files = [file for folder in folders for file in sorted((run / folder).iterdir())]
    for file in [*files, run / STAGES[3] / "scores.csv", run / STAGES[4] / "scores.json"]:
        found[str(file.relative_to(run))] = file.read_bytes().hex()
    return {name: hashlib.sha256(content.encode()).hexdigest() for name, content in found.items()}


def damage(run: Path, chance: random.Random) -> str:
    """Empty, cut or halve one file below a run; say what was done to which."""
    files = sorted(path for path in run.rglob("*") if path.is_file() and path.name != ".lock" and path.stat().st_size)
    if not files:
        return ""
    file, how = chance.choice(files), chance.choice(["emptied", "cut", "halved"])
    size = file.stat().st_size
    os.truncate(file, {"emptied": 0, "cut": chance.randrange(size), "halved": size // 2}[how])
    return f"{file.relative_to(run)} {how}"


class Forked:
    """An attempt in a forked process."""

    def __init__(self, runs: Path, log: Path) -> None:
        self.process = SERVER.Process(target=work, args=(str(runs), str(log)))
        self.process.start()

    def wait(self, seconds: float | None) -> int | None:
        """Wait for the end, `seconds` at most; the exit code, or None."""
        self.process.join(seconds)
        return self.process.exitcode

    def kill(self, chance: random.Random) -> None:
        """Kill it by -9."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()


class Papermill:
    """An attempt by the runner itself: papermill, and a kernel a notebook."""

    def __init__(self, runs: Path, log: Path) -> None:
        keys = [word for key, value in OVERRIDES.items() for word in ("-p", key, json.dumps(value))]
        line = [sys.executable, "-m", "helpers.suite", "--run", RUN, "--profile", "tiny", *keys]
        line += ["--only", "01,02,03,04,05"]
        environment = os.environ | {"RUNS_ROOT": str(runs), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo_root())}
        with log.open("a") as file:
            self.process = psutil.Popen(line, env=environment, stdout=file, stderr=file, cwd=repo_root())

    def wait(self, seconds: float | None) -> int | None:
        """Wait for the end, `seconds` at most; the exit code, or None."""
        try:
            return self.process.wait(seconds)
        except psutil.TimeoutExpired:
            return None

    def kill(self, chance: random.Random) -> None:
        """Kill the runner by -9, and with it, or before it notices, its kernels."""
        kernels = self.process.children(recursive=True)
        self.process.kill()
        self.process.wait()
        for kernel in kernels if chance.random() < 0.5 else []:
            with contextlib.suppress(psutil.NoSuchProcess):
                kernel.kill()
        psutil.wait_procs(kernels, timeout=60)  # those that live end when they notice


def calm(start: Callable[[Path, Path], Any], folder: Path) -> float:
    """Let the work end undisturbed; its seconds. RuntimeError with the end of its words if it fails."""
    began = time.monotonic()
    if code := start(folder, folder / "log.txt").wait(None):
        raise RuntimeError(f"the calm run ended with {code}:\n{(folder / 'log.txt').read_text()[-4000:]}")
    return time.monotonic() - began


def trial(
    start: Callable[[Path, Path], Any],
    folder: Path,
    expected: dict[str, str],
    seconds: float,
    kills: int,
    emptied: int,
    chance: random.Random,
    what: str,
) -> dict[str, Any]:
    """Runs in new folders until `kills` processes were killed and `emptied` files damaged; the figures."""
    told: Counter[str] = Counter()
    faults: list[str] = []
    began = time.monotonic()
    while told["kills"] < kills or told["damaged"] < emptied:
        runs = folder / f"{what}-{told['runs']:03d}"
        runs.mkdir()
        log, history, calm_tries = runs / "log.txt", [], 0
        for _ in range(10_000):
            wanted = told["kills"] < kills or told["damaged"] < emptied
            attempt = start(runs, log)
            code = attempt.wait(chance.uniform(0, 0.4 * seconds) if wanted else None)
            told["attempts"] += 1
            if code is None:
                attempt.kill(chance)
                told["kills"] += 1
                history.append("killed")
                share = emptied / max(kills, 1)
                due = told["damaged"] < emptied and (chance.random() < share or told["kills"] >= kills)
                if due and (done := damage(runs / RUN, chance)):
                    told["damaged"] += 1
                    history.append(done)
                continue
            calm_tries += 1
            if code == 0 or calm_tries > STUCK:
                break
            history.append(f"ended with {code}")
            faults.append(f"{runs.name}: {', '.join(history)}")
        told["runs"] += 1
        found = contents(runs / RUN) if code == 0 else {}
        if other := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
            told["unequal"] += 1
            faults.append(f"{runs.name}: {', '.join(history)}: other than the calm run: {', '.join(other)}")
        elif not any(fault.startswith(runs.name) for fault in faults):
            shutil.rmtree(runs)
        spent = time.monotonic() - began
        print(
            f"{what}: {told['runs']} runs, {told['kills']} of {kills} kills, {told['damaged']} of {emptied} files, "
            f"{len(faults)} faults, {spent:.0f} s",
            flush=True,
        )
    return {
        **{name: told[name] for name in ("runs", "attempts", "kills", "damaged", "unequal")},
        "seconds": round(time.monotonic() - began),
        "calm_seconds": round(seconds, 1),
        "faults": faults,
    }


def main(arguments: list[str]) -> int:
    """Run the command line; returns 0 if every run ended with the calm run's bytes, else 1."""
    parser = argparse.ArgumentParser(prog="run_all.sh bench reliability", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="kills in all (default: 200)")
    parser.add_argument("--papermill", type=int, default=20, help="of these, through papermill (default: 20)")
    parser.add_argument("--emptied", type=int, default=50, help="files to be emptied, cut or halved (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and files (default: 0)")
    parser.add_argument("--json", type=Path, default=runs_root() / "reliability.json", help="file to write")
    parser.add_argument("--keep", type=Path, default=None, help="folder for the runs (default: one that goes again)")
    args = parser.parse_args(arguments)
    SERVER.set_forkserver_preload([__name__, *PRELOADED])
    warnings.simplefilter("always")
    with contextlib.ExitStack() as stack:
        folder = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "calm").mkdir()
        seconds = calm(Forked, folder / "calm")
        expected = contents(folder / "calm" / RUN)
        print(f"calm run: {seconds:.0f} s, {len(expected)} things to compare", flush=True)
        chance = random.Random(args.seed)
        share = args.papermill / max(args.kills, 1)
        through = round(args.emptied * share)
        plain = trial(
            Forked, folder, expected, seconds, args.kills - args.papermill, args.emptied - through, chance, "forked"
        )
        results = {"forked": plain}
        if args.papermill:
            (folder / "calm-papermill").mkdir()
            longer = calm(Papermill, folder / "calm-papermill")
            results["papermill"] = trial(
                Papermill, folder, expected, longer, args.papermill, through, chance, "papermill"
            )
    write_json(args.json, {"machine": machine(), "seed": args.seed, "results": results})
    faults = [fault for result in results.values() for fault in result["faults"]]
    print("\n".join(faults) or "Every run ended with the bytes of the calm one.")
    print(f"Written to {args.json}")
    return 1 if faults else 0


PRELOADED = [  # imports alone: threads do not outlive a fork
    "torch",
    "transformers",
    "peft",
    "lance",
    "pandas",
    "matplotlib.pyplot",
    "helpers.plots",
    "helpers.training",
    "helpers.training.adem_vl",
    "helpers.answers.scienceqa",
    "helpers.answers.regions",
    "helpers.sweeps.adem_vl",
    "helpers.sweeps.step_cost",
    "helpers.plots.scienceqa",
    "helpers.store",
    "helpers.stage",
]
