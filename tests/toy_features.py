"""The feature table's interface over embeddings that a test made up."""

from collections.abc import Mapping, Sequence

import numpy as np


class Features:
    """GIFs by name with their frame embeddings [N, D]; a GIF has one view, whatever the number of groups."""

    def __init__(self, frames: Mapping[str, np.ndarray], encoder_key: str = "") -> None:
        self.frames, self.encoder_key = dict(frames), encoder_key

    def longest_views(self) -> dict[str, int]:
        return {gif: len(frames) for gif, frames in self.frames.items()}

    def lengths(self, ids: Sequence[str], groups: object) -> np.ndarray:
        return np.array([len(self.frames[gif]) for gif in ids])

    def fetch(self, ids: Sequence[str], groups: object) -> tuple[np.ndarray, np.ndarray]:
        lengths, first = self.lengths(ids, groups), self.frames[ids[0]]
        out = np.zeros((len(ids), lengths.max(), first.shape[1]), first.dtype)
        for row, gif in enumerate(ids):
            out[row, : lengths[row]] = self.frames[gif]
        return out, lengths
