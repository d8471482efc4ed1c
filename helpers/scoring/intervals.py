"""Intervals: bootstrap by cluster, Wilson's, Student's."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pandas as pd

DRAWN_AT_ONCE = 4_000_000  # numbers of a bootstrap held in memory at once (32 MB)


def bootstrap_interval(
    values: pd.Series | np.ndarray,
    clusters: pd.Series | np.ndarray,
    resamples: int,
    seed: int,
    level: float = 0.95,
    statistic: Literal["mean", "median"] = "mean",
) -> tuple[float, float]:
    """Percentile interval of the mean or median of `values`, resampling whole clusters (GIFs) with replacement.

    Questions about one GIF are not independent, so the GIF is what is drawn (Efron and Tibshirani 1993, ch. 13;
    cluster bootstrap). The same seed gives the same interval. A sample in which every value is equal has an interval
    of width zero: that says nothing about how rare the other outcome is.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 0:
        raise ValueError("no values to resample")
    _, index = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
    sums, sizes = np.bincount(index, weights=values), np.bincount(index)
    rng = np.random.default_rng(seed)
    rows = max(1, DRAWN_AT_ONCE // len(sums))
    order = np.argsort(values, kind="stable")
    found = []
    for start in range(0, resamples, rows):
        drawn = rng.integers(0, len(sums), size=(min(rows, resamples - start), len(sums)))
        if statistic == "median":
            times = (np.bincount(one, minlength=len(sums)) for one in drawn)
            found.append([_median(values[order], count[index[order]]) for count in times])
        else:
            found.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _median(rising: np.ndarray, times: np.ndarray) -> float:
    """Median of sorted values, each of which counts several times or not at all."""
    upto = np.cumsum(times)
    middle = np.searchsorted(upto, [(upto[-1] - 1) // 2, upto[-1] // 2], side="right")
    return float(rising[middle].mean())


def wilson_interval(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of an accuracy, in percent (Wilson 1927, the score interval; `z` is the normal quantile)."""
    p, zz = correct / total, z * z
    centre, spread = p + zz / (2 * total), z * math.sqrt(p * (1 - p) / total + zz / (4 * total * total))
    low, high = (centre - spread) / (1 + zz / total), (centre + spread) / (1 + zz / total)
    return round(100 * max(low, 0.0), 2), round(100 * min(high, 1.0), 2)


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t; infinite for a single value."""
    if len(values) < 2:
        return float(values.mean()), math.inf
    from scipy.stats import t  # takes a second to load, which a command line would feel

    quantile = float(t.ppf(0.975, len(values) - 1))
    return float(values.mean()), quantile * float(values.std(ddof=1)) / math.sqrt(len(values))
