"""ADEM-VL's formulas and trained layers (arXiv 2410.17779, section 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ADAPTER_SCALE = 0.1  # of a CLIP adapter's output; a constant of the official code, whatever alpha is
ADAPTER_DROPOUT = 0.1  # inside a CLIP adapter, behind its activation
TEMPERATURE = 0.1  # of the learnable threshold's gate, in standard deviations of a row of scores


def pool_scales(patches: Tensor, scales: Sequence[int]) -> Tensor:
    """Average-pool patch features [B, N, W] (row-major square grid) to each scale; concatenated: [B, sum(scales), W].

    Section 3.3 of the paper; in the official code pooling comes before projection, and CLS takes no part.
    """
    side = math.isqrt(patches.shape[1])
    grid = patches.transpose(1, 2).unflatten(2, (side, side))
    pooled = [
        patches if scale == side * side else F.avg_pool2d(grid, side // math.isqrt(scale)).flatten(2).transpose(1, 2)
        for scale in scales
    ]
    return torch.cat(pooled, dim=1)


def fuse(scores: Tensor, dropped: int) -> Tensor:
    """Adaptive fusion: zero the `dropped` signed-smallest of the scores [..., V] of each row; ties at the bound stay.

    The bound is the (dropped + 1)-th smallest score, selected without sorting. It and the mask are constants to the
    gradient, and the same in training and evaluation.
    """
    if not dropped:
        return scores
    bound = scores.detach().kthvalue(dropped + 1, dim=-1, keepdim=True).values
    return scores.masked_fill(scores < bound, 0)


def fuse_softly(scores: Tensor, threshold: Tensor) -> Tensor:
    """Adaptive fusion with a learnable threshold: scores [..., V] times sigmoid((z - threshold) / `TEMPERATURE`).

    z is the score standardised within its row, so that `threshold` (a scalar) is in standard deviations and its
    gradient does not depend on the scores' size. Differentiable in both arguments.
    """
    wide = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    centred = wide - wide.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()  # rows of equal scores have none
    return scores * ((centred / deviation - threshold) / TEMPERATURE).sigmoid().to(scores.dtype)


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """`layer` in the precision of `x`: trained weights stay float32 beside a half-precision base."""
    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


class ClipAdapter(nn.Module):
    """Bottleneck beside an encoder block's MLP: 0.1 * up(dropout(gelu(down(z)))), no biases; starts as zero."""

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck, bias=False)
        self.up = nn.Linear(bottleneck, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, z: Tensor) -> Tensor:
        """Map the MLP's input [B, N, W] to what is added to its output."""
        hidden = F.dropout(F.gelu(_linear(z, self.down)), ADAPTER_DROPOUT, self.training)
        return ADAPTER_SCALE * _linear(hidden, self.up)


class Projector(nn.Module):
    """Encoder features to the language model's width: fc2(silu(fc1(z))), Xavier-uniform weights, zero biases."""

    def __init__(self, width: int, hidden: int, output: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, output)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, z: Tensor) -> Tensor:
        """Map [..., W] to [..., D]."""
        return _linear(F.silu(_linear(z, self.fc1)), self.fc2)
