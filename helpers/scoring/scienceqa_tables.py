"""Tables of ScienceQA results: systems of a run side by side, beside published ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from helpers.corpora.schema import reject_table
from helpers.scoring.intervals import wilson_interval
from helpers.scoring.scienceqa import GROUPS, WRONG, gold_of, score

SYSTEMS = {
    "": "model, written letter",
    "likelihood": "model, likeliest choice",
    "text_only": "text-only twin",
    "shuffled": "model, shuffled images",
    "first_choice": "first choice",
    "majority": "majority",
}
"""Prefix of a system's columns in the table of predictions -> how it is called."""

PUBLISHED = {
    "paper, LLaMA-7B (20 epochs)": (95.52, 95.39, 89.18, 95.36, 93.95, 90.94, 93.87, 93.80, 93.85),
    "paper, LLaMA-13B (20 epochs)": (96.00, 94.94, 91.27, 95.45, 93.95, 93.03, 94.46, 94.73, 94.55),
    "random choice, by ScienceQA's authors": (*(math.nan,) * 8, 39.83),
    "released weights, run by the student, QCM-A with captions": (*(math.nan,) * 8, 93.61),
    "student, 5 epochs": (86.06, 83.46, 87.18, 85.00, 79.72, 89.06, 86.71, 84.18, 85.81),
    "student, batch 4 x 8, decay 0.01": (*(math.nan,) * 8, 86.4),
    "student, adapter width 16": (*(math.nan,) * 8, 88.4),
}
"""Published accuracies (%) on ScienceQA's 4,241 test problems: the subgroups and the average."""

INTERVAL = ["average, 95 % from", "to"]  # columns of the headline's interval
SIZES = "problems of this run"  # row of the subgroups' sizes


def _column(system: str, name: str) -> str:
    return name if system == "likelihood" else f"{system}_{name}".lstrip("_")


def _answered(predictions: pd.DataFrame, system: str) -> dict[str, int]:
    """The answers of a system, without problems that were too long for it."""
    column = "likeliest" if system == "likelihood" else _column(system, "prediction")
    if _column(system, "too_long") in predictions:
        predictions = predictions[predictions[_column(system, "too_long")] == ""]
    return dict(zip(predictions["pid"], predictions[column].astype(int), strict=True))


def too_long(predictions: pd.DataFrame) -> pd.DataFrame:
    """Problems that did not fit a system's window: item, where (the system), reason. They count as wrong."""
    systems = [name for name in systems_in(predictions) if name != "likelihood"]
    columns = [(name, _column(name, "too_long")) for name in systems if _column(name, "too_long") in predictions]
    return reject_table(
        [
            (pid, SYSTEMS[name], reason)
            for name, column in columns
            for pid, reason in zip(predictions["pid"], predictions[column], strict=True)
            if reason
        ]
    )


def systems_in(predictions: pd.DataFrame) -> list[str]:
    """The systems of `SYSTEMS` that a table of predictions has."""
    return [name for name in SYSTEMS if name == "likelihood" or f"{name}_prediction".lstrip("_") in predictions]


def chance(predictions: pd.DataFrame) -> float:
    """Accuracy (%) of a random choice."""
    return 100 * float(np.mean([1 / len(choices) for choices in predictions["choices"]]))


def scores(predictions: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """System -> `scienceqa.score` of its answers, from the table of predictions alone.

    What is `missing` was too long for the system; `failed` counts what was answered without a letter of a choice.
    """
    gold = gold_of(predictions)
    return {system: score(_answered(predictions, system), gold) for system in systems_in(predictions)}


def split_by_image(predictions: pd.DataFrame) -> dict[str, dict[str, tuple[int, int, float, float]]]:
    """System -> "image" (problems with one), "text" (without), "all" -> correct, total, and 95 % interval (%)."""
    with_image = predictions["image"].to_numpy(dtype=bool)
    parts = {"image": with_image, "text": ~with_image, "all": np.ones_like(with_image)}
    found: dict[str, dict[str, tuple[int, int, float, float]]] = {}
    for system in systems_in(predictions):
        given = _answered(predictions, system)
        right = np.array([given.get(row.pid, WRONG) == row.answer for row in predictions.itertuples()])
        counts = {part: (int(right[rows].sum()), int(rows.sum())) for part, rows in parts.items()}
        found[system] = {part: (*count, *wilson_interval(*count)) for part, count in counts.items() if count[1]}
    return found


def result_table(scored: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Accuracies (%) by subgroup and the average's 95 % interval: a row a system of this run, then the published ones.

    The first row, `SIZES`, holds the number of this run's problems in each subgroup.
    """
    first = next(iter(scored.values()))
    unknown = [math.nan] * len(INTERVAL)
    rows = {SIZES: [*(first["n"].get(g, 0) for g in GROUPS), first["total"], *unknown]}
    rows |= {
        SYSTEMS[name]: [*(values.get(g, math.nan) for g in GROUPS), values["accuracy"], *values["interval"]]
        for name, values in scored.items()
    }
    rows |= {name: [*values, *unknown] for name, values in PUBLISHED.items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=[*GROUPS, "average", *INTERVAL])


def flat_metrics(scored: Mapping[str, Mapping[str, Any]], predictions: pd.DataFrame) -> dict[str, float]:
    """Numbers of a run by name: accuracy and every subgroup (%), the systems' names in front of all but the model's.

    too_long: problems that did not fit the window, wrong in every score; failed: answers without a choice's letter.
    """
    names = {"accuracy": "accuracy", "correct": "correct", "total": "total", "failed": "failed", "missing": "too_long"}
    names |= {group: group for group in GROUPS}
    found = {
        f"{system}_{name}".lstrip("_"): values[key]
        for system, values in scored.items()
        for key, name in names.items()
        if key in values
    }
    seen = predictions[predictions["image"].astype(bool)]
    return found | ({"chance_IMG": chance(seen)} if len(seen) else {})
