"""The plan of a training run: every batch of every epoch, laid out before the first step."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from helpers.training.collective import TrainingError


def bucket(lengths: np.ndarray, budget: int, rng: np.random.Generator, window: int = 50) -> list[np.ndarray]:
    """Split all rows into batches of at most `budget` padded tokens, each of rows of like length, in random order.

    Rows are shuffled, then sorted by length inside windows of about `window` batches: enough rows to find equals, few
    enough that batches differ from epoch to epoch. A row longer than the budget is a batch of its own.
    """
    order = rng.permutation(len(lengths))
    rows_per_window = max(1, round(window * budget / lengths.mean()))
    batches: list[np.ndarray] = []
    left = order[:0]  # rows that filled no batch: they join the next window
    for start in range(0, len(order), rows_per_window):
        rows = np.concatenate([left, order[start : start + rows_per_window]])
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        first = 0
        for i, length in enumerate(lengths[rows].tolist()):
            if i > first and (i - first + 1) * length > budget:
                batches.append(rows[first:i])
                first = i
        left = rows[first:]
    batches.append(left)
    return [batches[i] for i in rng.permutation(len(batches))]


class StepPlan(Sampler[list[Any]]):
    """Batch sampler over a whole run: `batches`, lists of keys into a dataset, all epochs one after another."""

    def __init__(
        self,
        batches: list[list[Any]],
        text_tokens: np.ndarray,
        video_tokens: np.ndarray,
        padded_tokens: np.ndarray,
        epoch_after: np.ndarray,
    ):
        """For each batch: its real text and video tokens, its tokens with padding, and the epochs done after it."""
        self.batches, self.text_tokens, self.video_tokens = batches, text_tokens, video_tokens
        self.padded_tokens, self.epoch_after = padded_tokens, epoch_after
        whole = np.floor(self.epoch_after + 1e-9)
        self.epoch_ends = {int(i) + 1 for i in np.flatnonzero(np.diff(whole, prepend=0) > 0)} | {len(self)}

    def __iter__(self) -> Iterator[list[Any]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def waste(self) -> float:
        """Padded tokens over real tokens; 1 is no padding at all."""
        return float(self.padded_tokens.sum() / (self.text_tokens + self.video_tokens).sum())


class BatchPlan(StepPlan):
    """Batches of (row, groups, epoch) that hold a budget of tokens.

    Each epoch draws a group count for each row and buckets the rows by the length that follows, both from the seed and
    the epoch's number alone. The plan does not depend on whether the model will see the video tokens.
    """

    def __init__(
        self,
        text_lengths: np.ndarray,
        video_lengths: dict[int, np.ndarray],
        *,
        tokens_per_step: int,
        epochs: float,
        seed: int,
    ):
        """`text_lengths` [R] and `video_lengths[g]` [R] (video tokens at g groups) in tokens, for each row."""
        if epochs <= 0:
            raise TrainingError(f"training.epochs is {epochs}: it must be above 0")
        self.groups = sorted(video_lengths)
        planned: list[list[tuple[int, int, int]]] = []
        text, video, padded, epoch_of = [], [], [], []
        table = np.stack([video_lengths[g] for g in self.groups])
        rows_of_epoch = np.arange(len(text_lengths))
        for epoch in range(math.ceil(epochs)):
            rng = np.random.default_rng([seed, epoch])
            drawn = rng.integers(len(self.groups), size=len(text_lengths))
            video_now = table[drawn, rows_of_epoch]
            lengths = video_now + text_lengths
            batches = bucket(lengths, tokens_per_step, rng)
            batches = batches[: math.ceil(min(1.0, epochs - epoch) * len(batches))]
            for i, rows in enumerate(batches):
                planned.append([(int(r), self.groups[drawn[r]], epoch) for r in rows])
                text.append(int(text_lengths[rows].sum()))
                video.append(int(video_now[rows].sum()))
                padded.append(int(lengths[rows].max()) * len(rows))
                epoch_of.append(epoch + (i + 1) / len(batches) * min(1.0, epochs - epoch))
        super().__init__(planned, np.array(text), np.array(video), np.array(padded), np.array(epoch_of))
