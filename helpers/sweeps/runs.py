"""What every sweep shares: its runs as one table with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from helpers.scoring.intervals import mean_interval


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
