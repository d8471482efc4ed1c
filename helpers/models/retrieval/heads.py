"""Heads: networks that bring frozen text and video embeddings into one space, one tower for each of the two.

Shapes are those of the alignment study: an MLP over pooled embeddings (per hidden layer Linear, ReLU, LayerNorm,
dropout), and an encoder-only Transformer (arXiv 1706.03762) over unpooled ones with a [CLS] token. The study does not
say whether text and video share their weights; here they do not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.config import RetrievalConfig

FEED_FORWARD = 4  # times a Transformer layer's width, as in the paper that the study cites


class Standardise(nn.Module):
    """Features as deviations from the mean of the training inputs, in their standard deviations."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))

    def fit(self, rows: Tensor) -> None:
        """Take the statistics from rows [N, D]; a feature that never varies is only centred."""
        deviation, mean = torch.std_mean(rows.float(), dim=0, correction=0)
        varies = deviation > 1e-6 * mean.abs().clamp(min=deviation.max())
        self.mean.copy_(mean)
        self.deviation.copy_(torch.where(varies, deviation, 1.0))

    def forward(self, x: Tensor) -> Tensor:
        """Standardise the last dimension of x."""
        return (x - self.mean) / self.deviation


class PooledTower(nn.Module):
    """Hidden layers and a linear output over one vector an item; without hidden layers it is linear."""

    def __init__(self, width: int, hidden: Sequence[int], out: int, dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for size in hidden:
            layers += [nn.Linear(width, size), nn.ReLU(), nn.LayerNorm(size), nn.Dropout(dropout)]
            width = size
        self.layers = nn.Sequential(*layers, nn.Linear(width, out))

    def forward(self, x: Tensor, mask: None = None) -> Tensor:
        """Map x [B, D] to [B, E]. Raises ValueError for unpooled input."""
        if x.ndim != 2:
            raise ValueError(f"this head takes pooled embeddings [B, D], got {list(x.shape)}: pool them first")
        return self.layers(x)


class TransformerTower(nn.Module):
    """Encoder layers over [CLS] and all tokens, and a linear output from [CLS]; it has no positions, as the study."""

    def __init__(self, width: int, layers: int, heads: int, out: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"retrieval.heads is {heads}: it must divide the embeddings' width, {width}")
        self.cls = nn.Parameter(torch.randn(width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, heads, FEED_FORWARD * width, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.output = nn.Linear(width, out)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map tokens x [B, L, D], valid where mask [B, L] is True, to [B, E]. Raises ValueError for pooled input."""
        if x.ndim != 3 or mask is None:
            raise ValueError(f"this head takes unpooled embeddings [B, L, D] with a mask, got {list(x.shape)}")
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], dim=1)
        hidden = self.encoder(x, src_key_padding_mask=~F.pad(mask, (1, 0), value=True))
        return self.output(hidden[:, 0])


class RetrievalHead(nn.Module):
    """A tower for texts and one for videos, of which cosine similarity tells how well they match."""

    def __init__(self, config: RetrievalConfig, text_width: int, video_width: int) -> None:
        """`text_width`, `video_width`: of the embeddings; `config.widths` are multiples of the former."""
        super().__init__()
        self.config, self.text_width, self.video_width = config, text_width, video_width
        self.text_scale, self.video_scale = Standardise(text_width), Standardise(video_width)
        sizes = [max(1, round(times * text_width)) for times in config.widths]
        self.width = sizes[-1]

        def tower(width: int) -> nn.Module:
            if config.head == "transformer":
                return TransformerTower(width, config.layers, config.heads, self.width, config.dropout)
            return PooledTower(width, sizes if config.head == "mlp" else [], self.width, config.dropout)

        self.text_tower, self.video_tower = tower(text_width), tower(video_width)

    @classmethod
    def build(cls, config: RetrievalConfig, text_width: int, video_width: int) -> RetrievalHead:
        """An untrained head on the CPU, its weights drawn by `config.seed` alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return cls(config, text_width, video_width)

    def text(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Unit vectors [B, E] of text embeddings [B, D], or of unpooled ones [B, L, D] with their mask [B, L]."""
        return self._unit(self.text_tower(self.text_scale(x), mask))

    def video(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Unit vectors [B, E] of video embeddings, as `text`."""
        return self._unit(self.video_tower(self.video_scale(x), mask))

    @staticmethod
    def _unit(x: Tensor) -> Tensor:
        return F.normalize(x.float(), dim=-1)
