"""Training on several GPUs: one process each (DDP under accelerate), started from a notebook and watched by it.

Each planned batch is shared out among the processes, so that steps, batches and losses are those of one GPU; only the
random numbers of dropout differ. Without a GPU the processes share the CPU (gloo), which is how this is tested.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from helpers.config import Profile
from helpers.training.collective import TrainingError, stop_signals
from helpers.workspace.disk import whole, write_json
from helpers.workspace.place import repo_root

TAIL = 30  # lines of the processes' output that an error shows
PATIENCE = 45  # seconds that the processes get to save after a signal


def train_in_processes(
    count: int,
    module: str,
    questions: pd.DataFrame,
    features: Path | str,
    profile: Profile,
    folder: Path | str,
    *,
    video: bool,
    deadline: float = math.inf,
    eval_questions: pd.DataFrame | None = None,
    aligning: bool = False,
    aligned: Path | str | None = None,
) -> None:
    """Training by `module` in `count` processes, one a GPU: what it did lies in `folder` as checkpoints.

    module: entry point, started with the folder that holds `order.json` and the tables. aligning, aligned: whether the
    adapter is held still, and the folder of the alignment that training starts from.
    The caller's own model stays where it is: on the first GPU it takes its place beside that of the first process.
    The processes' output is printed here. SIGTERM and SIGINT are handed on: they save and end. Raises TrainingError if
    there are fewer GPUs, or with the end of the output if a process fails.
    """
    if torch.cuda.is_available() and torch.cuda.device_count() < count:
        found = torch.cuda.device_count()
        raise TrainingError(f"training.gpus is {count}, but this machine has {found}: set it to {found}")
    ends, folder = time.time() + deadline, Path(folder)
    work = folder / "processes"
    order = {
        "profile": profile.model_dump(mode="json"),
        "features": str(Path(features).resolve()),
        "folder": str(folder.resolve()),
        "video": video,
        "aligning": aligning,
        "aligned": str(Path(aligned).resolve()) if aligned else None,
        "ends": ends if math.isfinite(ends) else None,
        "parent": os.getpid(),
    }
    with whole(work) as staging:
        staging.mkdir()
        questions.to_parquet(staging / "questions.parquet")
        if eval_questions is not None and len(eval_questions):
            eval_questions.to_parquet(staging / "watched.parquet")
        write_json(staging / "order.json", order)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    line += ["-m", module, str(work)]
    path = os.pathsep.join([str(repo_root()), os.environ.get("PYTHONPATH", "")])
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
