"""Figures of stages at work: frames, features, losses."""

from collections.abc import Sequence
from textwrap import shorten

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from helpers.plots.look import BLUE, ORANGE, SKY, STYLE, literal, new_figure, require_rows


@plt.rc_context(STYLE)
def loss_curve(history: pd.DataFrame, window: int = 20, steps: int | None = None) -> Figure:
    """Training loss (columns step, loss) with its running median over `window` steps; `eval_loss` too.

    steps: of the whole run, for the length of the axis while it goes on.
    """
    figure, axes = new_figure(1, 1, (7, 3.6))
    axis = axes[0, 0]
    points = history.dropna(subset=["loss"])
    require_rows(points, "logged losses")
    axis.plot(points["step"], points["loss"], color=SKY, linewidth=0.8, label="each logged step")
    smooth = points["loss"].rolling(window, center=True, min_periods=1).median()
    axis.plot(points["step"], smooth, color=BLUE, linewidth=2, label=f"running median of {window}")
    measured = history.dropna(subset=["eval_loss"]) if "eval_loss" in history else history[:0]
    if len(measured):
        axis.plot(measured["step"], measured["eval_loss"], "o--", color=ORANGE, label="GIFs held out, each epoch")
    axis.set(title="Training loss", xlabel="optimizer step", ylabel="loss of the answer (nats per token)")
    axis.set_ylim(bottom=0)
    if steps is not None:
        axis.set_xlim(0, steps)
    axis.legend()
    return figure


@plt.rc_context(STYLE)
def frames_overview(info: pd.DataFrame, frames: Sequence[np.ndarray], names: Sequence[str], per_row: int = 8) -> Figure:
    """How many frames the GIFs have and how long they last, above strips of a few GIFs' sampled frames.

    Args:
        info: a row a GIF with `num_frames` and `duration_ms`.
        frames: for each GIF shown its frames, uint8 [T, H, W, 3]; `per_row` of them, evenly spaced, make its strip.
        names: the title of each strip.
    """
    if len(frames) != len(names) or not len(info):
        raise ValueError(f"{len(names)} names for {len(frames)} strips, {len(info)} GIFs: one name a strip, and GIFs")
    heights = [2.2] + [0.95] * len(frames)
    figure = plt.figure(figsize=(9, sum(heights) + 0.6), layout="constrained")
    plt.close(figure)
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    for column, (values, label) in enumerate(
        ((info["num_frames"], "frames in the file"), (info["duration_ms"] / 1000, "duration (s)"))
    ):
        axis = figure.add_subplot(grid[0, column])
        # the longest percent would squeeze all others into one bar: the last bar holds them
        axis.hist(np.minimum(values, np.quantile(values, 0.99)), bins=30, color=BLUE)
        axis.set(xlabel=label, ylabel="GIFs")
        axis.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    for number, (strip, name) in enumerate(zip(frames, names, strict=True), start=1):
        axis = figure.add_subplot(grid[number, :])
        chosen = strip[np.unique(np.linspace(0, len(strip) - 1, per_row).round().astype(int))]
        gap = max(1, chosen.shape[2] // 24)
        padded = np.pad(chosen, ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=255)
        axis.imshow(np.concatenate(list(padded), axis=1))
        axis.set_xlim(-0.5, per_row * padded.shape[2] - gap - 0.5)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.set_title(literal(name), loc="left", fontsize=8.5, fontweight="normal")
    figure.suptitle(f"{len(info):,} GIFs, and the sampled frames of {len(frames)} (time runs to the right)")
    return figure


@plt.rc_context(STYLE)
def features_overview(
    lengths: np.ndarray, embeddings: Sequence[np.ndarray], times_ms: Sequence[np.ndarray], names: Sequence[str]
) -> Figure:
    """How many frames the cached views hold, and for a few GIFs how alike their frames are to the encoder.

    Likeness is the cosine similarity of frame embeddings, from which the mean over the GIF's frames is taken.

    Args:
        lengths: frames in each GIF's longest view, [GIFs].
        embeddings: for each GIF shown its frame embeddings [T, D]. times_ms: when each frame starts, [T].
        names: the title of each.
    """
    figure, axes = new_figure(1, 1 + len(embeddings), (3.1 * (1 + len(embeddings)), 3.1))
    axes[0, 0].hist(lengths, bins=np.arange(0.5, lengths.max() + 1), color=BLUE)
    axes[0, 0].set(title="Longest cached view", xlabel="frames", ylabel="GIFs")
    axes[0, 0].yaxis.set_major_locator(MaxNLocator(4, integer=True))
    image = None
    for axis, values, times, name in zip(axes[0, 1:], embeddings, times_ms, names, strict=True):
        unit = values.astype(np.float32)
        unit -= unit.mean(axis=0)  # what all frames share would hide how they differ
        unit /= np.linalg.norm(unit, axis=1, keepdims=True).clip(min=1e-8)
        image = axis.imshow(unit @ unit.T, vmin=-1, vmax=1, cmap="RdBu_r")
        ticks = np.unique(np.linspace(0, len(times) - 1, 4).round().astype(int))
        labels = [f"{times[tick] / 1000:.1f}" for tick in ticks]
        axis.set_xticks(ticks, labels)
        axis.set_yticks(ticks, labels)
        axis.set(title=literal(shorten(name, 30, placeholder=" ...")), xlabel="time (s)", ylabel="time (s)")
        axis.grid(visible=False)
    if image is not None:
        figure.colorbar(image, ax=axes[0, 1:].tolist(), label="similarity (cosine)", shrink=0.9)
    figure.suptitle("Cached frame embeddings")
    return figure
