"""The history of a run, a row a step, and how it is shown while the run goes on."""

import math
import sys
import time
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from helpers.training.collective import TrainingError, mean_of
from helpers.training.plan import StepPlan


class Recorder:
    """History of a run, a row for each step. Losses stay on the device until they are needed, to spare a sync."""

    def __init__(
        self, plan: StepPlan, tokens: np.ndarray, parts: Sequence[str], history: pd.DataFrame | None, seconds: float
    ):
        """`tokens`: real tokens of each step; `parts`: those of the model that have a learning rate of their own."""
        self.rows: list[dict[str, Any]] = [] if history is None else history.to_dict("records")
        self.pending: list[torch.Tensor] = []
        self.scales: list[torch.Tensor] = []
        self.plan, self.before, self.began = plan, seconds, time.perf_counter()
        self.tokens, self.parts = tokens, list(parts)

    @property
    def seconds(self) -> float:
        """Training time of all sessions so far, in seconds."""
        return self.before + time.perf_counter() - self.began

    def add(self, loss: torch.Tensor, rates: dict[str, float]) -> None:
        """Note one step: its loss (a scalar, left where it is) and the learning rates that it used."""
        step = len(self.rows)
        self.pending.append(loss)
        row = {"step": step + 1, "epoch": float(self.plan.epoch_after[step]), "loss": math.nan, "eval_loss": math.nan}
        rates = {f"lr_{part}": rates.get(part, 0.0) for part in self.parts}
        self.rows.append(row | rates | {"tokens": int(self.tokens[step]), "seconds": self.seconds})

    def add_scale(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Note the gradient scaler's scale before and after the newest step (scalars, left where they are)."""
        self.scales.append(torch.stack([before, after]))

    def flush(self, scaled: bool) -> None:
        """Fetch the pending losses and scales. TrainingError on a loss that is not finite.

        A gradient scaler (`scaled`) skips such steps: with one, it is an error only if all pending losses are so.
        """
        if not self.pending:
            return
        first = len(self.rows) - len(self.pending)
        losses = mean_of(torch.stack(self.pending).float()).tolist()
        self.pending.clear()
        if self.scales:
            # the scale falls exactly where a gradient was not finite; accelerate's own word for it, which watches calls
            # of the optimizer, is wrong for a fused one: that is called all the same, and skips the step inside
            for row, (before, after) in zip(self.rows[first:], torch.stack(self.scales).tolist(), strict=True):
                row |= {"scale": before, "skipped": int(after < before)}
            self.scales.clear()
        for i, loss in enumerate(losses):
            self.rows[first + i]["loss"] = loss
        finite = [math.isfinite(loss) for loss in losses]
        if not (any(finite) if scaled else all(finite)):
            bad = finite.index(False)
            raise TrainingError(
                f"the loss became {losses[bad]} at step {first + bad + 1}. Lower the learning rates or raise "
                "the warm-up; running again goes on from the last checkpoint, which is before this step."
            )

    def table(self) -> pd.DataFrame:
        """The history so far, a row a step; eval_loss is NaN but at the ends of epochs, seconds are cumulative.

        Runs with a gradient scaler have two more columns: the scale of the step's loss, and skipped (1: its gradients
        were not finite, so that the optimizer took no step). What a job measures is a column too, like eval_loss.
        """
        columns = ["step", "epoch", "loss", "eval_loss", *(f"lr_{part}" for part in self.parts), "tokens", "seconds"]
        more = dict.fromkeys(name for row in self.rows for name in row)  # what only some steps have
        columns += [name for name in more if name not in columns]
        return pd.DataFrame(self.rows, columns=columns)


def _in_kernel() -> bool:
    """Whether this process is a notebook's kernel."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


class LossDisplay:
    """Shows a run as it goes: a bar, and in a notebook a loss curve redrawn in place, elsewhere a line of text."""

    def __init__(self, total_steps: int, done: int, interval: float = 10.0):
        """`interval`: least number of seconds between two drawings."""
        self.bar = tqdm(total=total_steps, initial=done, unit="step", mininterval=1.0)
        self.interval, self.drawn, self.handle = interval, -math.inf, None

    def update(self, recorder: Recorder, window: int) -> None:
        """Show the state after the newest step; the loss is averaged over the last `window` steps."""
        last = recorder.rows[-window:]
        loss = float(np.mean([row["loss"] for row in last]))
        self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        self.bar.update(last[-1]["step"] - self.bar.n)
        if not _in_kernel():
            line = f"step {last[-1]['step']}/{self.bar.total}  epoch {last[-1]['epoch']:.2f}  loss {loss:.4f}"
            self.bar.write(f"{line}  {recorder.seconds:.0f} s")
        elif last[-1]["step"] == self.bar.total or time.perf_counter() - self.drawn >= self.interval:
            self.draw(recorder.table(), window)
            self.drawn = time.perf_counter()

    def draw(self, history: pd.DataFrame, window: int) -> None:
        """Draw the loss curve so far into this cell's output, over the one before, on an axis as long as the run."""
        from IPython.display import Image, display

        from helpers.plots.stages import loss_curve  # pyplot takes its time, and no training needs it elsewhere

        picture = BytesIO()  # a bare figure is shown only where pyplot has set up the kernel
        loss_curve(history, window, steps=self.bar.total).savefig(picture, format="png")
        shown = Image(picture.getvalue(), format="png", alt="training loss by step")
        if self.handle is None:
            self.handle = display(shown, display_id=True)
        else:
            self.handle.update(shown)

    def close(self) -> None:
        """End the bar, and take a finished run's curve away: a notebook shows it where it sums up."""
        self.bar.close()
        if self.handle is not None and self.bar.n == self.bar.total:
            from IPython.display import HTML

            self.handle.update(HTML(""))
