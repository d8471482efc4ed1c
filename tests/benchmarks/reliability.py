"""Kills and power cuts: `./run_all.sh bench reliability` stops notebooks 01 to 05 at random.

A world of a dozen GIFs and a few problems goes through the notebooks' own cells, in a process forked from one that has
done the imports. The process is killed by -9 at a random moment; after some kills a random file below the run is
emptied, cut or halved, as a stop of the machine leaves it. The same work is begun again until it ends, and what it made
is compared with a run that nothing disturbed. Some kills are dealt to the runner or its kernels under papermill.
Two runs go on side by side; what is done is kept in the folder `--keep`, so that the same command goes on from there.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil

from helpers.workspace import runs_root
from helpers.workspace.disk import read_json, write_json
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
REACH = 0.3  # of the calm run's computing time: the most that an attempt has before it is killed, at first
POLL = 0.2  # seconds between two looks at an attempt: looking costs computing time too
STUCK = 6  # attempts that end by an error, after which a run is given up
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
    made = {name: hashlib.sha256(content.encode()).hexdigest() for name, content in found.items()}
    return made | {
        f"digest of {name}": json.loads((run / name / "stage.json").read_text())["digest"] for name in STAGES
    }


def damage(run: Path, chance: random.Random) -> str:
    """Empty, cut or halve one file below a run; say what was done to which."""
    files = sorted(path for path in run.rglob("*") if path.is_file() and path.name != ".lock" and path.stat().st_size)
    if not files:
        return ""
    file, how = chance.choice(files), chance.choice(["emptied", "cut", "halved"])
    size = file.stat().st_size
    os.truncate(file, {"emptied": 0, "cut": chance.randrange(size), "halved": size // 2}[how])
    return f"{file.relative_to(run)} {how}"


class Attempt:
    """Processes that do the work. How far they are is told by their computing time, which a busy machine leaves."""

    process: psutil.Process
    used = 0.0  # seconds of computing time, as last seen

    def code(self, seconds: float) -> int | None:
        """The exit code, waited for for so many seconds at most; None before the end."""
        raise NotImplementedError

    def wait(self, until: float) -> int | None:
        """Wait for the end, or until so many seconds of computing time are used; the exit code, or None."""
        while (code := self.code(POLL)) is None and self.used < until:
            with contextlib.suppress(psutil.NoSuchProcess):
                family = [self.process, *self.process.children(recursive=True)]
                self.used = sum(sum(process.cpu_times()[:4]) for process in family)
        return code


class Forked(Attempt):
    """An attempt in a forked process."""

    def __init__(self, runs: Path, log: Path) -> None:
        self.forked = SERVER.Process(target=work, args=(str(runs), str(log)))
        self.forked.start()
        self.process = psutil.Process(self.forked.pid)

    def code(self, seconds: float) -> int | None:
        """See Attempt."""
        self.forked.join(seconds)
        return self.forked.exitcode

    def kill(self, chance: random.Random) -> None:
        """Kill it by -9."""
        os.kill(self.forked.pid, signal.SIGKILL)
        self.forked.join()


class Papermill(Attempt):
    """An attempt by the runner itself: papermill, and a kernel a notebook."""

    def __init__(self, runs: Path, log: Path) -> None:
        keys = [word for key, value in OVERRIDES.items() for word in ("-p", key, json.dumps(value))]
        line = [sys.executable, "-m", "helpers.suite", "--run", RUN, "--profile", "tiny", *keys]
        line += [word for name in STAGES for word in ("--only", name[:2])]
        environment = os.environ | {"RUNS_ROOT": str(runs), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo_root())}
        with log.open("a") as file:
            self.process = psutil.Popen(line, env=environment, stdout=file, stderr=file, cwd=repo_root())

    def code(self, seconds: float) -> int | None:
        """See Attempt."""
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


def unfinished(run: Path) -> str:
    """The stage at which a run is: the first that its stage.json does not tell to be complete."""
    told = ((name, run / name / "stage.json") for name in STAGES)
    return next((name for name, file in told if not file.is_file() or '"complete"' not in file.read_text()), "the end")


@dataclass
class Left:
    """How many kills and damaged files are still to be dealt, by all runs of a kind together."""

    kills: int
    damaged: int
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, what: str) -> bool:
        """Take one, if there is one."""
        with self.lock:
            number = getattr(self, what)
            setattr(self, what, max(number - 1, 0))
            return number > 0

    def any(self) -> bool:
        """Whether any is left."""
        return self.kills > 0 or self.damaged > 0


def one_run(
    start: Callable[[Path, Path], Any],
    runs: Path,
    expected: dict[str, str],
    seconds: float,
    left: Left,
    chance: random.Random,
) -> dict[str, Any]:
    """Kill one run on its way, damage files after some kills, let it end and compare it; what happened, in order."""
    happened, faults, errors, attempts, kills = [], [], 0, [], Counter()
    while True:
        attempts.append(attempt := start(runs, runs / "log.txt"))
        moment = chance.uniform(0, REACH * seconds) * (1 + kills.total() / 8)  # so that every run ends
        code = attempt.wait(moment if left.kills else math.inf)
        if code is None and left.take("kills"):
            attempt.kill(chance)
            kills[unfinished(runs / RUN)] += 1
            happened.append(f"killed in {unfinished(runs / RUN)}")
            print(f"  {runs.name}: {happened[-1]}; {left.kills} kills of this kind to go", flush=True)
            due = chance.random() < left.damaged / max(left.kills, 1)
        elif code := attempt.wait(math.inf):
            happened.append(f"ended with {code}")
            errors += 1
            due = False
            if errors >= STUCK:
                faults.append(f"{runs.name}: {', '.join(happened)}: given up")
                break
        else:
            found = contents(runs / RUN)
            names = sorted(name for name in expected.keys() | found if expected.get(name) != found.get(name))
            if names:
                faults.append(f"{runs.name}: {', '.join(happened)}: other than the calm run: {', '.join(names)}")
                break
            due = left.kills == 0  # what is left to be damaged is damaged in finished runs
            if not (due and left.damaged):
                break
        if due and left.take("damaged"):
            done = damage(runs / RUN, chance)
            happened.append(done or "nothing to damage")
            left.damaged += not done
    if errors and not faults:
        faults.append(f"{runs.name}: {', '.join(happened)}")
    damaged = [what for what in happened if what.endswith(("emptied", "cut", "halved"))]
    told = {"run": runs.name, "attempts": len(attempts), "cpu_seconds": round(sum(each.used for each in attempts))}
    return told | {"kills": dict(kills), "damaged": damaged, "faults": faults}


def dealt(state: dict[str, Any], kind: str) -> tuple[int, int]:
    """How many kills and damaged files the finished runs of a kind had."""
    runs = [run for run in state["runs"] if run["run"].startswith(kind)]
    return sum(sum(run["kills"].values()) for run in runs), sum(len(run["damaged"]) for run in runs)


def trial(folder: Path, kills: dict[str, int], damaged: dict[str, int], seed: int) -> dict[str, Any]:
    """Runs until `kills` and `damaged` of each kind are dealt, those of an earlier call in `folder` included."""
    kinds = {kind: start for kind, start in KINDS.items() if kills[kind]}
    state = read_json(folder / "state.json") or {"calm_cpu_seconds": {}, "runs": [], "seconds": 0.0}
    undone = [kind for kind in kinds if kind not in state["calm_cpu_seconds"]]
    with ThreadPoolExecutor(len(KINDS)) as pool:
        for kind, seconds in zip(undone, pool.map(lambda kind: calm(kinds[kind], folder, kind), undone), strict=True):
            state["calm_cpu_seconds"][kind] = round(seconds, 1)
            write_json(folder / "state.json", state)
    expected = {kind: contents(folder / f"calm-{kind}" / RUN) for kind in kinds}
    print(f"calm: {state['calm_cpu_seconds']} s, {len(expected['forked'])} things to compare", flush=True)
    left = {kind: Left(kills[kind] - dealt(state, kind)[0], damaged[kind] - dealt(state, kind)[1]) for kind in kinds}
    to_deal, began, earlier = sum(kind.kills for kind in left.values()), time.monotonic(), state["seconds"]
    told = {run["run"] for run in state["runs"]}
    for runs in folder.glob("*-[0-9][0-9][0-9]"):
        if runs.name not in told:  # of a call that was stopped
            shutil.rmtree(runs)
    first = max((int(name[-3:]) + 1 for name in told), default=0)
    numbers, lock = iter(range(first, 1000)), threading.Lock()

    def go_on(prefers: str) -> None:
        while due := [kind for kind in sorted(kinds, key=lambda kind: kind != prefers) if left[kind].any()]:
            with lock:
                number = next(numbers)
            kind, chance = due[0], random.Random(f"{seed} {number}")
            runs = folder / f"{kind}-{number:03d}"
            runs.mkdir()
            told = one_run(kinds[kind], runs, expected[kind], state["calm_cpu_seconds"][kind], left[kind], chance)
            if not told["faults"]:
                shutil.rmtree(runs)
            with lock:
                state["runs"].append(told)
                spent = time.monotonic() - began
                state["seconds"] = round(earlier + spent)
                write_json(folder / "state.json", state)
                done = to_deal - sum(kind.kills for kind in left.values())
                print(
                    f"{told['run']}: {sum(told['kills'].values())} kills, {len(told['damaged'])} files; "
                    f"{sum(dealt(state, kind)[0] for kind in kinds)} of {sum(kills.values())} kills, "
                    f"{sum(dealt(state, kind)[1] for kind in kinds)} of {sum(damaged.values())} files, "
                    f"{sum(len(run['faults']) for run in state['runs'])} faults; {state['seconds']} s, about "
                    f"{spent / max(done, 1) * (to_deal - done) / 60:.0f} minutes to go",
                    flush=True,
                )

    with ThreadPoolExecutor(len(KINDS)) as pool:
        for job in [pool.submit(go_on, prefers) for prefers in KINDS]:
            job.result()
    return state


def calm(start: Callable[[Path, Path], Any], folder: Path, kind: str) -> float:
    """Let the work end undisturbed; its computing time (s). RuntimeError with the end of its words if it fails."""
    runs = folder / f"calm-{kind}"
    if runs.exists():
        shutil.rmtree(runs)
    runs.mkdir()
    attempt = start(runs, runs / "log.txt")
    if code := attempt.wait(math.inf):
        raise RuntimeError(f"the calm run ended with {code}:\n{(runs / 'log.txt').read_text()[-4000:]}")
    return attempt.used


def main(arguments: list[str]) -> int:
    """Run the command line; returns 0 if every run ended with the calm run's bytes, else 1."""
    parser = argparse.ArgumentParser(prog="run_all.sh bench reliability", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="kills in all (default: 200)")
    parser.add_argument("--papermill", type=int, default=20, help="of these, through papermill (default: 20)")
    parser.add_argument("--emptied", type=int, default=50, help="files to be emptied, cut or halved (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and files (default: 0)")
    parser.add_argument("--json", type=Path, default=runs_root() / "reliability.json", help="file to write")
    parser.add_argument(
        "--keep", type=Path, default=None, help="folder for the runs, gone on with if it is there (default: a new one)"
    )
    args = parser.parse_args(arguments)
    SERVER.set_forkserver_preload([__name__, *PRELOADED])
    kills = {"forked": args.kills - args.papermill, "papermill": args.papermill}
    through = round(args.emptied * args.papermill / max(args.kills, 1))
    with contextlib.ExitStack() as stack:
        folder = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        state = trial(folder, kills, {"forked": args.emptied - through, "papermill": through}, args.seed)
    killed = sum((Counter(run["kills"]) for run in state["runs"]), Counter())
    faults = [fault for run in state["runs"] for fault in run["faults"]]
    write_json(args.json, {"machine": machine(), "seed": args.seed, "killed_in": killed, **state})
    print(f"killed in: {dict(sorted(killed.items()))}")
    print("\n".join(faults) or "Every run ended with the bytes of the calm one.")
    print(f"Written to {args.json}")
    return 1 if faults else 0


KINDS = {"forked": Forked, "papermill": Papermill}
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
