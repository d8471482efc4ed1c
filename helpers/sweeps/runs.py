"""What every sweep shares: its runs as one table with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from helpers.scoring.intervals import mean_interval

ABLATIONS = {
    "gif_qa": ("recipe", "captions"),
    "adem_vl": ("ladder", "placements", "scales", "drop", "phi", "bases"),
}
"""System -> its ablations; one parameter names them for all notebooks."""


def is_asked(ablation: str, system: str) -> bool:
    """Whether `ablation` is one of this system's; not if it is empty or another's. Raises ValueError if it is none."""
    if ablation and not any(ablation in names for names in ABLATIONS.values()):
        known = ", ".join(name for names in ABLATIONS.values() for name in names)
        raise ValueError(f"unknown ablation {ablation!r}; there are {known}")
    return ablation in ABLATIONS[system]


def ablation_table(runs: pd.DataFrame, measures: Sequence[str] = ("accuracy", "image")) -> pd.DataFrame:
    """A row an ablation's row: the mean of each measure over seeds, with Student's 95 % intervals (_low, _high)."""
    rows = []
    for label, part in runs.groupby("row", sort=False):
        row: dict[str, Any] = {"row": label, "seeds": len(part), "parameters": int(part["parameters"].iloc[0])}
        for measure in measures:
            middle, half = mean_interval(part[measure].to_numpy())
            row |= {measure: middle, f"{measure}_low": middle - half, f"{measure}_high": middle + half}
        rows.append(row)
    return pd.DataFrame(rows)
