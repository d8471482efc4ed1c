"""What is wrong with embeddings, in numbers: all alike, flat, or apart by modality."""

from __future__ import annotations

import numpy as np


def mean_pairwise_cosine(embeddings: np.ndarray) -> float:
    """Mean cosine of all pairs of different rows of [N, D], N > 1: near 1, all point one way and nothing is told apart.

    From the length of the sum of the unit vectors, so that it takes time and memory of one pass.
    """
    unit = _unit(embeddings, 2)
    total = unit.sum(axis=0)
    return float((total @ total - len(unit)) / (len(unit) * (len(unit) - 1)))


def effective_rank(embeddings: np.ndarray) -> float:
    """How many directions [N, D] fills, from 1 to min(N, D): exp of the entropy of its normalised singular values.

    Roy and Vetterli 2007, definition 1. The mean is not taken off: embeddings that share one are of low rank.
    """
    values = np.linalg.svd(_checked(embeddings, 1), compute_uv=False)
    shares = values / values.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def modality_distance(videos: np.ndarray, texts: np.ndarray) -> float:
    """Distance between the mean of the unit vectors of videos [N, D] and that of texts [M, D], from 0 to 2.

    The modality gap of Liang et al. (arXiv 2203.02053, section 4.2).
    """
    return float(np.linalg.norm(_unit(videos, 1).mean(axis=0) - _unit(texts, 1).mean(axis=0)))


def _checked(embeddings: np.ndarray, least: int) -> np.ndarray:
    values = np.asarray(embeddings, np.float64)
    if values.ndim != 2 or len(values) < least:
        raise ValueError(f"embeddings must be [N, D] with N at least {least}; got {list(values.shape)}")
    for told, bad in (("NaN or infinity", ~np.isfinite(values).all(axis=1)), ("only zeros", ~values.any(axis=1))):
        if bad.any():
            raise ValueError(f"{bad.sum():,} of {len(bad):,} embeddings hold {told}, the first in row {bad.argmax()}")
    return values


def _unit(embeddings: np.ndarray, least: int) -> np.ndarray:
    values = _checked(embeddings, least)
    return values / np.linalg.norm(values, axis=1, keepdims=True)
