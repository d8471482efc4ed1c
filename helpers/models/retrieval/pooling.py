"""From the vectors of a sequence to one: pooling over a mask, and centring by what was trained on."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

POOLINGS = ("first", "last", "max", "mean", "sum", "none")


def pool(hidden: Tensor, mask: Tensor, how: str) -> Tensor | list[Tensor]:
    """One vector a row from those that its mask takes: float32 [B, H]; for "none" these themselves, B times [L_i, H].

    hidden [B, L, H] in any precision; mask [B, L], true where a vector counts, wherever these stand: what is masked
    may hold anything, NaN too. Under cosine similarity "sum" ranks as "mean" does; under a dot product it tells the
    length as well. Raises ValueError for another `how`, for shapes that do not fit, and for a row without a vector.
    """
    if how not in POOLINGS:
        raise ValueError(f"pooling is {how!r}; it must be one of {', '.join(POOLINGS)}")
    if hidden.ndim != 3 or mask.shape != hidden.shape[:2]:
        raise ValueError(f"pool takes [B, L, H] with a mask [B, L]; got {list(hidden.shape)} and {list(mask.shape)}")
    mask, hidden = mask.bool(), hidden.float()
    if not mask.any(1).all():
        raise ValueError(f"row {int(mask.any(1).long().argmin())} has no vector to pool: its mask takes none")
    if how == "none":
        return [row[own] for row, own in zip(hidden, mask, strict=True)]
    if how in ("first", "last"):
        place = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        place = place.masked_fill(~mask, mask.shape[1]).amin(1) if how == "first" else (place * mask).amax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), place]
    if how == "max":
        return hidden.masked_fill(~mask[..., None], -torch.inf).amax(1)
    total = hidden.masked_fill(~mask[..., None], 0).sum(1)
    return total if how == "sum" else total / mask.sum(1, keepdim=True)


def centred(values: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Embeddings [N, D] of one modality without the mean of those [M, D] of its training items.

    Each modality is centred by its own mean, so that what all videos share, and what all texts share, does not decide
    which are alike. Test items do not enter it. Raises ValueError for other shapes, or without a training item.
    """
    if values.ndim != 2 or training.ndim != 2 or values.shape[1] != training.shape[1] or not len(training):
        shapes = f"{list(values.shape)} and {list(training.shape)}"
        raise ValueError(f"centred takes [N, D] and [M, D] with M above 0; got {shapes}")
    return values - training.mean(axis=0, dtype=np.float64).astype(values.dtype)
