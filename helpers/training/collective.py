"""Processes that train together: their number, what they agree on, and how a step is shared out."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


class TrainingError(RuntimeError):
    """Training cannot start or go on; the message says why and what to do."""


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT instead of dying by them, so that a step can end and be saved (main thread only)."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    names = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(name, lambda number, frame: received.append(number)) for name in names]
    try:
        yield received
    finally:
        for name, handler in zip(names, before, strict=True):
            signal.signal(name, handler)


def rank() -> int:
    """Number of this process among those that train together; 0 for one that trains alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for the other processes."""
    if world() > 1:
        dist.barrier()


def any_of(flags: Sequence[bool], place: torch.device) -> list[bool]:
    """Each flag, true if it is so in any of the processes: decisions by the clock must be the same in all of them."""
    if world() == 1:
        return [bool(flag) for flag in flags]
    agreed = torch.tensor([float(flag) for flag in flags], device=place)
    dist.all_reduce(agreed, dist.ReduceOp.MAX)
    return [flag > 0 for flag in agreed.tolist()]


def mean_of(values: torch.Tensor) -> torch.Tensor:
    """Mean of a tensor over the processes."""
    if world() > 1:
        dist.all_reduce(values)
        values /= world()
    return values


@dataclass(frozen=True)
class Shared:
    """A collator of this process's rows of each batch: every n-th one, which spreads long and short rows alike.

    A batch gets the key `share`, by which its mean loss must be multiplied so that the mean over all processes, and so
    DDP's mean gradient, is the whole batch's loss. `counts` tells what a row counts in a mean loss: its tokens with
    loss, or 1. The whole batch's loss is the mean over what its rows count; with `expected`, what a batch counts in the
    mean over the run, it is the sum over them by that, and the key `weight` is that sum by that mean. A process that
    gets no row of a small batch computes the first one with share 0, since DDP waits for all.
    """

    collator: Callable[[Sequence[Any]], dict[str, Any]]
    counts: Callable[[Any], int]
    expected: float | None = None

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Collate rows number rank, rank + world, ..."""
        own = rows[rank() :: world()]
        total, part = (sum(self.counts(row) for row in some) for some in (rows, own))
        whole = self.expected or total
        return self.collator(own or rows[:1]) | {"share": world() * part / whole, "weight": total / whole}
