"""Training on several GPUs: one process each (DDP under accelerate), started from a notebook and watched by it.

Each planned batch is shared out among the processes, so that steps, batches and losses are those of one GPU; only the
random numbers of dropout differ. Without a GPU the processes share the CPU (gloo), which is how this is tested.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist

TAIL = 30  # lines of the processes' output that an error shows
PATIENCE = 45  # seconds that the processes get to save after a signal


def rank() -> int:
    """Number of this process among those that train together; 0 for one that trains alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for the other processes."""
    if world() > 1:
        dist.barrier()


def any_of(flags: Sequence[bool], place: torch.device) -> list[bool]:
    """Each flag, true if it is so in any of the processes: decisions by the clock must be the same in all of them."""
    if world() == 1:
        return [bool(flag) for flag in flags]
    agreed = torch.tensor([float(flag) for flag in flags], device=place)
    dist.all_reduce(agreed, dist.ReduceOp.MAX)
    return [flag > 0 for flag in agreed.tolist()]


def mean_of(values: torch.Tensor) -> torch.Tensor:
    """Mean of a tensor over the processes."""
    if world() > 1:
        dist.all_reduce(values)
        values /= world()
    return values


@dataclass(frozen=True)
class Shared:
    """A collator of this process's rows of each batch: every n-th one, which spreads long and short rows alike.

    A batch gets the key `share`, by which its mean loss must be multiplied so that the mean over all processes, and so
    DDP's mean gradient, is the mean over the whole batch's answer tokens. A process that gets no row of a small batch
    computes the first one with share 0, since DDP waits for all.
    """

    collator: Callable[[Sequence[Any]], dict[str, Any]]
    answer_tokens: Callable[[Any], int]

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Collate rows number rank, rank + world, ..."""
        own = rows[rank() :: world()]
        total, part = (sum(self.answer_tokens(row) for row in some) for some in (rows, own))
        return self.collator(own or rows[:1]) | {"share": world() * part / total}


def train_in_processes(
    count: int,
    questions: pd.DataFrame,
    features: Path | str,
    profile: Any,
    folder: Path | str,
    *,
    video: bool,
    deadline: float = math.inf,
    eval_questions: pd.DataFrame | None = None,
) -> None:
    """`training.train` in `count` processes, one a GPU: what it did lies in `folder` as checkpoints.

    The caller's own model stays where it is: on the first GPU it takes its place beside that of the first process.
    The processes' output is printed here. SIGTERM and SIGINT are handed on: they save and end. Raises TrainingError if
    there are fewer GPUs, or with the end of the output if a process fails.
    """
    from helpers.training import TrainingError, stop_signals

    if torch.cuda.is_available() and torch.cuda.device_count() < count:
        found = torch.cuda.device_count()
        raise TrainingError(f"training.gpus is {count}, but this machine has {found}: set it to {found}")
    ends, folder = time.time() + deadline, Path(folder)
    work = folder / "processes"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    questions.to_parquet(work / "questions.parquet")
    if eval_questions is not None and len(eval_questions):
        eval_questions.to_parquet(work / "watched.parquet")
    order = {
        "profile": profile.model_dump(mode="json"),
        "features": str(Path(features).resolve()),
        "folder": str(folder.resolve()),
        "video": video,
        "ends": ends if math.isfinite(ends) else None,
        "parent": os.getpid(),
    }
    (work / "order.json").write_text(json.dumps(order), encoding="utf-8")
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    line += ["-m", "helpers.distributed", str(work)]
    path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path.rstrip(os.pathsep)}
    with stop_signals() as signals:
        # A session of its own: Ctrl-C reaches the processes once, handed on from here.
        process = subprocess.Popen(
            line,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )
        tail: deque[str] = deque(maxlen=TAIL)
        reader = threading.Thread(target=_print_lines, args=(process.stdout, tail), daemon=True)
        reader.start()
        while process.poll() is None and not signals:
            time.sleep(0.1)
        if signals:
            process.terminate()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
        reader.join(5)
    shutil.rmtree(work, ignore_errors=True)
    if signal.SIGINT in signals:
        raise KeyboardInterrupt("stopped; the processes saved, so running again goes on")
    if process.returncode and not signals:
        raise TrainingError(f"a training process failed (exit code {process.returncode}):\n" + "".join(tail))


def _print_lines(stream: Any, tail: deque[str]) -> None:
    for line in stream:
        tail.append(line)
        print(line, end="", flush=True)


def _end_with(parent: int) -> None:
    """End this process when the notebook that started it is gone, however it went."""
    while True:
        try:
            os.kill(parent, 0)
        except ProcessLookupError:
            os._exit(1)
        time.sleep(1)


def main(work: Path) -> None:
    """One of the processes: carry out the order in `work`."""
    from accelerate import PartialState

    from helpers.config import Profile
    from helpers.models.gif_qa import GifQAModel
    from helpers.store import FeatureTable
    from helpers.training import train

    order = json.loads((work / "order.json").read_text(encoding="utf-8"))
    threading.Thread(target=_end_with, args=(order["parent"],), daemon=True).start()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        PartialState()
    else:
        PartialState(cpu=True, backend="gloo")
    watched = work / "watched.parquet"
    profile = Profile.model_validate(order["profile"])
    try:
        train(
            GifQAModel.build(profile, video=order["video"]),
            pd.read_parquet(work / "questions.parquet"),
            FeatureTable(order["features"]),
            profile,
            order["folder"],
            deadline=math.inf if order["ends"] is None else order["ends"] - time.time(),
            eval_questions=pd.read_parquet(watched) if watched.is_file() else None,
            progress=rank() == 0,
        )
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
