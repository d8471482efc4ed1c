"""Losses of a retrieval head over the cosines of texts and videos, each with a mask of false negatives.

A loss takes `similarity`, cosines [T, V] of all texts and videos of a batch, or [P] of pairs; `positive`, bool of the
same shape: the text is of the video; and `counted`, bool: False for a false negative, a text that fits the video though
it is another's. That pair is neither pulled together nor pushed apart.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MARGIN = 0.2  # cosine above which a pair that does not match costs something
CLIP_TEMPERATURE, LARGEST_SCALE = 0.07, 100.0  # where CLIP starts, and where it stops (arXiv 2103.00020, section 2.5)
SIGMOID_SCALE, SIGMOID_BIAS = 10.0, -10.0  # where SigLIP starts (arXiv 2303.15343, section 3.2)


def mse(similarity: Tensor, positive: Tensor, counted: Tensor) -> Tensor:
    """Mean squared distance of the cosines from 1 for what belongs together and 0 for what does not."""
    return F.mse_loss(similarity[counted], positive[counted].to(similarity.dtype))


def margin_contrastive(similarity: Tensor, positive: Tensor, counted: Tensor, margin: float = MARGIN) -> Tensor:
    """Mean of 1 - cosine for what belongs together, and of what the cosine has above `margin` for what does not."""
    return torch.where(positive, 1 - similarity, (similarity - margin).relu())[counted].mean()


def info_nce(similarity: Tensor, positive: Tensor, counted: Tensor, scale: Tensor | float) -> Tensor:
    """Cross-entropy in nats of each text among the batch's videos and each video among its texts, their mean.

    similarity [T, V] is multiplied by `scale`, one over the temperature (CLIP, arXiv 2103.00020, figure 3).
    """
    logits = (scale * similarity).masked_fill(~counted, -math.inf)
    both = logits.logsumexp(1, keepdim=True) + logits.logsumexp(0, keepdim=True)
    return (both / 2 - logits)[positive].mean()


def sigmoid(
    similarity: Tensor, positive: Tensor, counted: Tensor, scale: Tensor | float, bias: Tensor | float
) -> Tensor:
    """Cross-entropy in nats of "belongs together", summed over all pairs, over the number of rows (SigLIP, eq. 1)."""
    logits = scale * similarity + bias
    return -F.logsigmoid(torch.where(positive, logits, -logits))[counted].sum() / len(similarity)


class RetrievalLoss(nn.Module):
    """One of the losses by its name in the profile, with the temperature and bias that it learns."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        if name in ("infonce", "sigmoid"):
            start = 1 / CLIP_TEMPERATURE if name == "infonce" else SIGMOID_SCALE
            self.log_scale = nn.Parameter(torch.tensor(math.log(start)))
        if name == "sigmoid":
            self.bias = nn.Parameter(torch.tensor(SIGMOID_BIAS))

    def forward(self, similarity: Tensor, positive: Tensor, counted: Tensor) -> Tensor:
        """The loss, a scalar."""
        batch = similarity, positive, counted
        if self.name == "infonce":
            return info_nce(*batch, self.log_scale.exp().clamp(max=LARGEST_SCALE))
        if self.name == "sigmoid":
            return sigmoid(*batch, self.log_scale.exp(), self.bias)
        return {"mse": mse, "margin": margin_contrastive}[self.name](*batch)


def constant_loss(name: str, positive: Tensor, counted: Tensor) -> float:
    """The least loss, by its name in the profile, of a head that gives every pair of this batch the same cosine.

    A loss that stays there has learnt nothing: 0.25 for mse with as many pairs that match as not.
    """
    pairs = int(counted.sum())
    share = int((positive & counted).sum()) / pairs
    if name == "infonce":
        rows, columns = counted.sum(1, keepdim=True), counted.sum(0, keepdim=True)
        return float((rows * columns).double().log().expand_as(positive)[positive].mean() / 2)
    if name == "mse":
        return share * (1 - share)
    if name == "margin":
        return min(share, 1 - share) * (1 - MARGIN)
    uncertain = -sum(p * math.log(p) for p in (share, 1 - share) if p)
    return uncertain * pairs / len(positive)
