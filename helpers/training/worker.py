"""The entry point of one of several processes that train the GIF model together."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import torch
import torch.distributed as dist
from accelerate import PartialState

from helpers.config import Profile
from helpers.models.gif_qa.model import GifQAModel
from helpers.store.features import FeatureTable
from helpers.training.collective import rank
from helpers.training.gif_qa import train


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
        model = GifQAModel.build(profile, video=order["video"])
        if order["aligning"]:
            model.language_model.requires_grad_(False)
        train(
            model,
            pd.read_parquet(work / "questions.parquet"),
            FeatureTable(order["features"]),
            profile,
            order["folder"],
            deadline=math.inf if order["ends"] is None else order["ends"] - time.time(),
            eval_questions=pd.read_parquet(watched) if watched.is_file() else None,
            progress=rank() == 0,
            aligned=order["aligned"],
        )
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
