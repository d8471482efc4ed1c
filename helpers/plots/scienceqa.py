"""Figures of notebook 05: how ADEM-VL is built, example questions, scores, ablations, and where it looks.

Every function returns a closed matplotlib `Figure`, in the look of plots/look.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from helpers.corpora.scienceqa import LETTERS, open_image
from helpers.plots.look import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, STYLE, literal, new_figure

SMALLEST_LOSS = 0.01  # nats; below it a loss is rounding as much as the image
FROZEN, LEARNT = "#DCE6EE", "#FBE3B5"  # fill of parts that stay as they are, and of those that are trained
SYSTEM_COLORS = {
    "": BLUE,
    "likelihood": SKY,
    "text_only": ORANGE,
    "shuffled": PURPLE,
    "first_choice": GREY,
    "majority": "#B0B0B0",
}


def _box(axis: Axes, x: float, y: float, width: float, height: float, text: str, fill_color: str) -> None:
    style = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.04", facecolor=fill_color, edgecolor="#555555")
    axis.add_patch(style)
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)


def _arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], **options: Any) -> None:
    axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color="#333333", **options))


@plt.rc_context(STYLE)
def architecture(scales: Sequence[int], blocks: int, drop_ratio: float) -> Figure:
    """ADEM-VL as a drawing: what is frozen, what is trained, and how an image reaches every block.

    scales: visual positions of each scale; blocks: of the language model; drop_ratio: share that fusion drops.
    """
    figure, axes = new_figure(1, 1, (9.6, 5.0))
    axis = axes[0, 0]
    axis.set(xlim=(0, 12), ylim=(0, 6.4), title="ADEM-VL: one image token, and a look at the image in every block")
    axis.axis("off")
    _box(axis, 0.2, 2.6, 1.2, 1.0, "image", "white")
    _box(axis, 1.9, 2.4, 1.9, 1.4, "CLIP encoder\nfrozen, with small\nadapters", FROZEN)
    pools = " + ".join(str(scale) for scale in scales)
    _box(axis, 4.4, 3.3, 2.0, 0.9, f"patches, pooled:\n{pools} positions", "white")
    _box(axis, 4.4, 1.5, 2.0, 0.9, "CLS feature", "white")
    _box(axis, 6.9, 3.3, 1.4, 0.9, "projector", LEARNT)
    _box(axis, 6.9, 1.5, 1.4, 0.9, "CLS projector", LEARNT)
    _box(axis, 6.5, 4.9, 2.2, 0.8, "tables added to\nkeys and values", LEARNT)
    _box(axis, 9.4, 0.5, 2.4, 5.2, "", FROZEN)
    axis.text(10.6, 5.45, f"language model, frozen\n{blocks} blocks", ha="center", va="center", fontsize=9)
    _box(axis, 9.7, 3.9, 1.8, 0.8, "MLP", "white")
    share = f"drops {drop_ratio:.0%}" if drop_ratio else "drops nothing"
    _box(axis, 9.7, 2.55, 1.8, 1.0, f"cross-attention\nwithout weights\n{share}", "white")
    _box(axis, 9.7, 0.8, 1.8, 1.1, "Image: [token]\nquestion, choices\nThe answer is", "white")
    for start, end in (
        ((1.45, 3.1), (1.85, 3.1)),
        ((3.85, 3.4), (4.35, 3.7)),
        ((3.85, 2.8), (4.35, 2.0)),
        ((6.45, 3.75), (6.85, 3.75)),
        ((6.45, 1.95), (6.85, 1.95)),
        ((8.35, 3.7), (9.65, 3.1)),
        ((8.75, 5.1), (9.65, 3.45)),
        ((8.35, 1.9), (9.65, 1.5)),
        ((10.6, 1.95), (10.6, 2.55)),
    ):
        _arrow(axis, start, end)
    _arrow(axis, (11.55, 3.05), (11.55, 4.2), connectionstyle="arc3,rad=0.5")
    axis.text(0.2, 0.55, "yellow: trained     blue: frozen     white: no weights", fontsize=9)
    return figure


def question_text(row: Mapping[str, Any], width: int = 28) -> str:
    """Question, context and choices of a problem as wrapped lines; the right choice is marked."""
    lines = [fill(row["question"], width)]
    if row["hint"]:
        lines.append(fill(f"Context: {row['hint'][:160]}", width))
    for index, choice in enumerate(row["choices"]):
        lines.append(fill(f"({LETTERS[index]}) {choice}" + ("   <- right" if index == row["answer"] else ""), width))
    return "\n".join(lines)


@plt.rc_context(STYLE)
def example_questions(problems: pd.DataFrame) -> Figure:
    """Problems side by side: image, or a note that there is none, and the text beneath. ValueError without any."""
    if problems.empty:
        raise ValueError("nothing to draw: the table has no problems")
    figure, axes = new_figure(2, len(problems), (2.3 * len(problems), 4.4), height_ratios=[1.1, 1])
    figure.suptitle("Questions of the data, the right choice marked", fontweight="bold")
    for column, row in enumerate(problems.to_dict("records")):
        top, bottom = axes[0, column], axes[1, column]
        if row["image"]:
            top.imshow(open_image(row["image"]), interpolation="nearest")
        else:
            top.text(0.5, 0.5, "(no image)", ha="center", va="center", color=GREY, transform=top.transAxes)
        top.set_title(literal(f"{row['subject']}, grade {row['grade']}"), fontsize=9)
        bottom.text(0, 1, literal(question_text(row)), va="top", fontsize=9, transform=bottom.transAxes)
        for axis in (top, bottom):
            axis.axis("off")
    return figure


@plt.rc_context(STYLE)
def accuracy_bars(scored: Mapping[str, Mapping[str, Any]], names: Mapping[str, str], chance: float) -> Figure:
    """Accuracy (%) of each system on image problems, on problems without an image, and on all, with 95 % intervals.

    scored: system -> {"image", "text", "all"}: (correct, total, low, high). chance: of image problems, in percent.
    """
    parts = list(next(iter(scored.values())))
    figure, axes = new_figure(1, 1, (9, 4.2))
    axis, width = axes[0, 0], 0.8 / len(scored)
    for k, (system, values) in enumerate(scored.items()):
        x = np.arange(len(parts)) + (k - (len(scored) - 1) / 2) * width
        heights = [100 * values[p][0] / values[p][1] for p in parts]
        errors = np.clip([[h - values[p][2], values[p][3] - h] for p, h in zip(parts, heights, strict=True)], 0, None).T
        axis.bar(x, heights, width * 0.92, color=SYSTEM_COLORS[system], label=literal(names[system]))
        axis.errorbar(x, heights, errors, fmt="none", ecolor="black", elinewidth=1, capsize=2)
    axis.hlines(chance, -0.45, 0.45, color="black", linestyle=":", label="chance, with an image")
    first = next(iter(scored.values()))
    labels = {"image": "with an image", "text": "without an image", "all": "all"}
    axis.set_xticks(range(len(parts)), [f"{labels[p]}\n(n = {first[p][1]:,})" for p in parts])
    axis.set(title="Accuracy beside baselines, 95 % intervals", xlabel="problems", ylabel="accuracy (%)", ylim=(0, 105))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


@plt.rc_context(STYLE)
def ablation(table: pd.DataFrame, name: str) -> Figure:
    """Accuracy (%) on image problems of each row of an ablation: mean over seeds with its 95 % interval."""
    if table.empty:
        raise ValueError("nothing to draw: the ablation has no rows")
    figure, axes = new_figure(1, 1, (8, 0.6 + 0.5 * len(table)))
    axis, y = axes[0, 0], np.arange(len(table))[::-1]
    finite = np.isfinite(table["image_high"].to_numpy(dtype=float))
    half = np.where(finite, table["image_high"] - table["image"], 0.0)
    axis.errorbar(table["image"], y, xerr=half, fmt="o", color=BLUE, capsize=3, label="image problems")
    axis.plot(table["accuracy"], y, "|", color=GREEN, markersize=12, markeredgewidth=2, label="all problems")
    axis.set_yticks(y, [literal(row) for row in table["row"]])
    seeds = int(table["seeds"].min())
    title = literal(f"Ablation {name!r}: mean of {seeds} seeds, 95 % intervals")
    axis.set(title=title, xlabel="accuracy (%)", ylabel="model")
    axis.legend(loc="best")
    return figure


@plt.rc_context(STYLE)
def regions_over_images(
    problems: pd.DataFrame, looks: Sequence[np.ndarray], worth: Sequence[np.ndarray], answers: Sequence[str]
) -> Figure:
    """Three rows: images, what each patch adds to the answer's position, and what hiding each patch costs the answer.

    The third row is coloured from 0 to the image's own largest loss, which stands above it, but at least to
    `SMALLEST_LOSS`: an answer that no hiding shakes stays dark.
    looks: `answers.regions.attended`; worth: `answers.regions.worth`; answers: what the model says.
    """
    if not len(looks):
        raise ValueError("nothing to draw: no problem has an image")
    figure, axes = new_figure(3, len(looks), (2.3 * len(looks) + 0.8, 7.4))
    figure.suptitle("Where the model looks, and what it needs to see", fontweight="bold")
    shares, losses = 100 * np.stack(looks), np.clip(np.stack(worth), 0, None)
    largest = losses.max((1, 2), keepdims=True)
    losses = 100 * losses / np.maximum(largest, SMALLEST_LOSS)
    rows = (
        (shares, "share of what is added (%)", {"cmap": "inferno", "vmin": 0, "vmax": shares.max()}),
        (losses, "log-probability lost\n(% of the largest)", {"cmap": "inferno", "vmin": 0, "vmax": 100}),
    )
    for column, (row, answer) in enumerate(zip(problems.to_dict("records"), answers, strict=True)):
        picture = np.asarray(open_image(row["image"]))
        place = {"extent": (0, picture.shape[1], picture.shape[0], 0), "interpolation": "nearest"}
        axes[0, column].imshow(picture, **place)
        axes[0, column].set_title(literal(f"{fill(row['question'], 24)}\n{answer}"), fontsize=9)
        axes[2, column].set_title(f"hiding costs at most\n{largest[column].item():.2f} nats", fontsize=9)
        for axis, (maps, _, colors) in zip(axes[1:, column], rows, strict=True):
            axis.imshow(picture.mean(-1), cmap="gray", vmin=-200, vmax=255, **place)
            axis.imshow(maps[column], alpha=0.65, **place, **colors)
        for axis in axes[:, column]:
            axis.set(xlabel="pixels", ylabel="pixels")
            axis.grid(False)
    for line, (_, label, _) in zip(axes[1:], rows, strict=True):
        figure.colorbar(line[0].images[1], ax=line.tolist(), label=label, shrink=0.8)
    return figure
