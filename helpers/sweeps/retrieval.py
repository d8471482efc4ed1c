"""The alignment study's ten experiments with its exact numbers, and the suite's own head with one factor changed.

The study: a 2023 internship report on Video-LLaMA's embeddings and MSR-VTT; the experiments are its section 3.3.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from helpers.config import RetrievalConfig
from helpers.scoring.retrieval import retrieval_metrics
from helpers.stage.pace import DeadlineReached
from helpers.training.retrieval import TextVideo, similarity, train_head
from helpers.workspace.machine import free_memory

MEASURES = ("R@1", "R@5", "R@10", "MRR")
Load = Callable[[str, bool], tuple[TextVideo, TextVideo]]
"""Embeddings to train on and to test on, by where they are read ("before" or "after") and whether they are pooled."""


@dataclass(frozen=True)
class Row:
    """A row of a sweep: keys of the section `retrieval` that it sets, where its embeddings are read, what is told.

    told: columns that are only shown beside it.
    """

    values: Mapping[str, Any]
    read: str = "before"
    told: Mapping[str, Any] = field(default_factory=dict)


# The study names batch size and rate alone; nothing is said of warm-up, decay, masks or scaled inputs: none of them.
STUDY = {"warmup_ratio": 0.0, "decay": False, "mask": False, "standardise": False, "batch_size": 32, "widths": [1, 1]}
BROAD = {"head": "mlp", "loss": "mse", "widths": [1, 1], "learning_rate": 1e-3}
DEEP = BROAD | {"widths": [1, 1 / 2, 1 / 4, 1 / 4, 1 / 8, 1 / 8]}  # 4096, 2048, 1024, 1024, 512, 512
TRANSFORMER = {"head": "transformer", "loss": "mse", "widths": [1], "layers": 6, "heads": 8, "learning_rate": 1e-3}
CONTRASTIVE = TRANSFORMER | {"loss": "margin"}
SLOW = CONTRASTIVE | {"learning_rate": 1e-5}
# change, keys, pairs, epochs, precision in bits, read, outcome; where the study restates no pairs, they carry over
EXPERIMENTS: list[tuple[str, dict[str, Any], int, int, int, str, str]] = [
    ("MLP", BROAD, 1, 30, 64, "before", "inconclusive"),
    ("MLP, more pairs", BROAD, 20, 30, 64, "before", "did not work"),
    ("MLP, deeper", DEEP, 20, 100, 32, "before", "no learning"),
    ("MLP, longer", DEEP, 20, 500, 32, "before", "does not learn the data sufficiently"),
    ("Transformer", TRANSFORMER, 1, 10, 64, "before", "no substantial progress"),
    ("Transformer, more pairs", TRANSFORMER, 20, 10, 64, "before", "no improvement claimed"),
    ("Transformer, longer", TRANSFORMER, 20, 100, 64, "before", "limited progress"),
    ("Transformer, contrastive loss", CONTRASTIVE, 20, 5, 64, "before", "limited progress"),
    ("Transformer, lower rate", SLOW, 20, 5, 64, "before", "no breakthrough"),
    ("Transformer, after the language model", SLOW, 20, 5, 64, "after", "no breakthrough"),
]


def presets() -> dict[str, Row]:
    """The ten experiments by number and name. Numbers are the study's; all are computed in 32 bits, whatever it took.

    Columns told beside each: the study's precision in bits, and its outcome in its own words.
    """
    return {
        f"{number} {name}": Row(
            STUDY | keys | {"pairs": pairs, "epochs": float(epochs)},
            read,
            {"study_bits": bits, "study_outcome": outcome},
        )
        for number, (name, keys, pairs, epochs, bits, read, outcome) in enumerate(EXPERIMENTS, 1)
    }


def factors(config: RetrievalConfig) -> dict[str, Row]:
    """The head of `config`, and the same with one factor changed at a time: head, loss, batch, standardisation, mask.

    A smaller batch takes as many steps, in fewer epochs; mse and margin also stand as the study's pairs, drawn once.
    """
    small = max(2, config.batch_size // 8)
    losses = {f"loss: {loss}": {"loss": loss} for loss in ("infonce", "sigmoid", "margin", "mse")}
    drawn = {f"loss: {loss}, 1:1 pairs": {"loss": loss, "pairs": 20} for loss in ("margin", "mse")}
    changes = losses | drawn
    changes |= {
        f"batch: {small}": {"batch_size": small, "epochs": config.epochs * small / config.batch_size},
        f"standardised: {not config.standardise}": {"standardise": not config.standardise},
        f"masked: {not config.mask}": {"mask": not config.mask},
    }
    changes |= {f"head: {head}": {"head": head} for head in ("linear", "mlp")}
    own = config.model_dump()
    kept = {label: keys for label, keys in changes.items() if any(own[key] != value for key, value in keys.items())}
    return {"own": Row({})} | {label: Row(keys) for label, keys in kept.items()}


def run_heads(
    rows: Mapping[str, Row],
    load: Load,
    config: RetrievalConfig,
    folder: Path | str,
    *,
    seeds: int = 1,
    most_epochs: float = math.inf,
    encoder_key: str = "",
    deadline: float = math.inf,
) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """Train and test every row with several seeds, one after another, in `folder`, where a killed run goes on.

    config: gives the keys that a row does not set. most_epochs: a row that asks for more is cut short there. Returns a
    row a training: row, seed, epochs_run of epochs_asked, steps, first_loss, last_loss, constant_loss (of a head that
    tells nothing apart), `MEASURES` of texts that look for videos, with before_ in front those without a head (NaN
    where the widths differ), parameters, seconds, and what the row tells; and the history of each by "row, seed".
    Raises DeadlineReached when the deadline (in seconds from now) has passed.
    """
    ends, folder = time.perf_counter() + deadline, Path(folder)
    found, histories = [], {}
    for label, row in rows.items():
        for seed in range(seeds):
            asked = changed(config, {**row.values, "seed": seed})
            own = changed(asked, {"epochs": min(asked.epochs, most_epochs)})
            train, test = load(row.read, own.head != "transformer")
            place = folder / f"{re.sub('[^a-z0-9]+', '_', label.lower()).strip('_')}-{seed}"
            left = {"deadline": ends - time.perf_counter(), "progress": False}
            result = train_head(train, own, place, encoder_key=encoder_key, **left)
            run = result.run
            if run.status != "complete":
                done = f"step {run.steps:,} of {run.total_steps:,}"
                raise DeadlineReached(f"time is up at {label!r}, seed {seed}, {done}; run again to go on")
            told = run.summary()
            found.append(
                {"row": label, "seed": seed, "epochs_run": own.epochs, "epochs_asked": asked.epochs}
                | {name: told[name] for name in ("steps", "first_loss", "last_loss")}
                | {
                    "constant_loss": result.constant_loss,
                    **_unaligned(test),
                    **measure(similarity(test, result.head), test),
                }
                | {"parameters": sum(p.numel() for p in result.head.parameters()), "seconds": run.seconds}
                | row.told
            )
            histories[f"{label}, {seed}"] = run.history
            free_memory()
    return pd.DataFrame(found), histories


def measure(scores: Any, data: TextVideo) -> dict[str, float]:
    """`MEASURES` of texts that look for videos, by cosines [N, M]."""
    metrics = retrieval_metrics(scores, data.relevant)["text_to_video"]
    return {name: metrics[name] for name in MEASURES}


def _unaligned(data: TextVideo) -> dict[str, float]:
    same = len(set(data.widths)) == 1
    measured = measure(similarity(data), data) if same else dict.fromkeys(MEASURES, math.nan)
    return {f"before_{name}": value for name, value in measured.items()}


def changed(config: RetrievalConfig, values: Mapping[str, Any]) -> RetrievalConfig:
    """`config` with other values, checked like a profile."""
    return RetrievalConfig.model_validate(config.model_dump() | dict(values))
