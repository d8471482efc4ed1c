"""Connectors: from a group of frame embeddings to tokens in the language model's embedding space."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.models.xclip import additive_mask


class ConnectorConfig(Protocol):
    """The profile's `connector` section, as far as it is read here."""

    kind: str  # 'mlp' or 'qformer'
    hidden: int  # width of the hidden layer (mlp) or of the query transformer (qformer)
    queries: int  # tokens a group (qformer)
    heads: int  # attention heads (qformer)
    output_scale: str  # 'fixed' or 'learned': see OutputNorm


def build_connector(
    config: ConnectorConfig, video_dim: int, text_dim: int, frames_per_group: int = 16, output_rms: float = 1.0
) -> nn.Module:
    """Build the connector named by `config.kind`; `output_rms` is the root mean square of a token embedding.

    Raises ValueError for an unknown kind.
    """
    norm = OutputNorm(text_dim, output_rms, fixed=config.output_scale == "fixed")
    if config.kind == "mlp":
        return MLPConnector(video_dim, config.hidden, norm)
    if config.kind == "qformer":
        return QFormerConnector(video_dim, config.hidden, config.queries, config.heads, norm, frames_per_group)
    raise ValueError(f"connector.kind is '{config.kind}'; it must be 'mlp' or 'qformer'")


class OutputNorm(nn.LayerNorm):
    """The last layer of a connector: video tokens start at the size of word embeddings, the root mean square `rms`.

    Much larger ones would drown what the first layers of the language model add to them. `fixed`: rms * LayerNorm(x),
    whose gain starts at 1, so that one step of Adam moves the tokens by the same share whatever rms is; rms is kept
    with the weights. Else the gain itself starts at rms, and there is nothing else to keep.
    """

    def __init__(self, text_dim: int, rms: float, *, fixed: bool) -> None:
        super().__init__(text_dim)
        self.register_buffer("rms", torch.tensor(rms) if fixed else None)
        if not fixed:
            nn.init.constant_(self.weight, rms)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x [..., H] and bring it to the size of word embeddings."""
        normed = super().forward(x)
        return normed if self.rms is None else self.rms * normed


def video_tokens(config: ConnectorConfig, frames: np.ndarray, frames_per_group: int = 16) -> np.ndarray:
    """Number of video tokens that the connector of `config` makes of `frames` frames, in groups of that many."""
    groups = -(-frames // frames_per_group)
    return groups * config.queries if config.kind == "qformer" else frames + groups


class MLPConnector(nn.Module):
    """One token a frame, from its embedding and its MIT token, and one token for the group (nanoVLM, LLaVA-1.5)."""

    def __init__(self, video_dim: int, hidden: int, output_norm: OutputNorm) -> None:
        super().__init__()
        (text_dim,) = output_norm.normalized_shape
        self.frame_norm = nn.LayerNorm(video_dim)
        self.mit_norm = nn.LayerNorm(video_dim)
        self.pooled_norm = nn.LayerNorm(video_dim)
        self.frame_mlp = nn.Sequential(nn.Linear(2 * video_dim, hidden), nn.GELU(), nn.Linear(hidden, text_dim))
        self.group_mlp = nn.Sequential(nn.Linear(video_dim, hidden), nn.GELU(), nn.Linear(hidden, text_dim))
        self.output_norm = output_norm

    def forward(self, frames: Tensor, mit_tokens: Tensor, pooled: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Map groups to tokens.

        frames, mit_tokens: [G, T, D]; pooled: [G, D]; mask: bool [G, T].
        Returns tokens [G, T + 1, H] (the group's token last) and their mask [G, T + 1].
        """
        pair = torch.cat([self.frame_norm(frames), self.mit_norm(mit_tokens)], dim=-1)
        tokens = torch.cat([self.frame_mlp(pair), self.group_mlp(self.pooled_norm(pooled))[:, None]], dim=1)
        return self.output_norm(tokens), torch.cat([mask, mask.any(1, keepdim=True)], dim=1)


class _Attention(nn.Module):
    """Multi-head attention of queries [G, Q, W] over a memory [G, M, W], with a boolean key mask [G, M]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        query = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.key_value(memory).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = None if mask is None else additive_mask(mask, query.dtype)[:, None, None]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.output(attended.transpose(1, 2).flatten(2))


class _QFormerLayer(nn.Module):
    """Self-attention of the queries, cross-attention to the frames, feed-forward; pre-norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_norm, self.cross_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
        self.self_attention = _Attention(width, heads)
        self.cross_attention = _Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, queries: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        normed = self.self_norm(queries)
        queries = queries + self.self_attention(normed, normed)
        queries = queries + self.cross_attention(self.cross_norm(queries), memory, mask)
        return queries + self.mlp(self.mlp_norm(queries))


class QFormerConnector(nn.Module):
    """A small querying transformer (BLIP-2, arXiv 2301.12597, section 3.1): a fixed number of tokens a group.

    Its memory is one vector a frame, from the frame's embedding, its MIT token and its place in the group, and one
    for the group's pooled vector. With 32 queries of width 768 and 12 heads it is Video-LLaMA's video Q-Former (arXiv
    2306.02858, section 2.1.1) over one vector a frame in place of 32, in groups of frames, pre-norm, and with a mask
    of the frames, which that one lacks.
    """

    def __init__(
        self,
        video_dim: int,
        hidden: int,
        queries: int,
        heads: int,
        output_norm: OutputNorm,
        frames_per_group: int = 16,
        layers: int = 2,
    ) -> None:
        super().__init__()
        if hidden % heads:
            raise ValueError(f"connector.hidden ({hidden}) must be a multiple of connector.heads ({heads})")
        self.frame_norm = nn.LayerNorm(video_dim)
        self.mit_norm = nn.LayerNorm(video_dim)
        self.pooled_norm = nn.LayerNorm(video_dim)
        self.frame_input = nn.Linear(2 * video_dim, hidden)
        self.group_input = nn.Linear(video_dim, hidden)
        self.queries = nn.Parameter(torch.randn(queries, hidden) * 0.02)
        self.positions = nn.Parameter(torch.randn(frames_per_group, hidden) * 0.02)
        self.memory_norm = nn.LayerNorm(hidden)
        self.layers = nn.ModuleList([_QFormerLayer(hidden, heads) for _ in range(layers)])
        self.output = nn.Linear(hidden, *output_norm.normalized_shape)
        self.output_norm = output_norm

    def forward(self, frames: Tensor, mit_tokens: Tensor, pooled: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Map groups to tokens.

        frames, mit_tokens: [G, T, D]; pooled: [G, D]; mask: bool [G, T].
        Returns tokens [G, queries, H] and their mask [G, queries] (False for a group without a valid frame).
        """
        pair = torch.cat([self.frame_norm(frames), self.mit_norm(mit_tokens)], dim=-1)
        memory = torch.cat(
            [self.frame_input(pair) + self.positions, self.group_input(self.pooled_norm(pooled))[:, None]], dim=1
        )
        valid = mask.any(1, keepdim=True)
        memory, memory_mask = self.memory_norm(memory), torch.cat([mask, valid], dim=1)
        queries = self.queries.expand(len(frames), -1, -1)
        for layer in self.layers:
            queries = layer(queries, memory, memory_mask)
        return self.output_norm(self.output(queries)), valid.expand(-1, queries.shape[1])
