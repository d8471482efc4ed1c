"""Figures of GIF question answering's scores: baselines, types, lengths, groups, calibration."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from helpers.plots.look import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    STYLE,
    TASK_LABELS,
    literal,
    new_figure,
    require_rows,
)

VARIANT_COLORS = {"main": BLUE, "blind": ORANGE, "shuffled": PURPLE, "length": SKY, "majority": GREY}
VARIANT_LABELS = {
    "main": "model",
    "blind": "blind (no video)",
    "shuffled": "shuffled GIFs",
    "length": "length only",
    "majority": "majority",
}
FLOOR, FLOOR_LABEL = "shuffled_floor", "shuffled, floor: reads the other GIF"
TASK_COLORS = {"frameqa": BLUE, "action": GREEN, "transition": RED, "count": PURPLE}


def _task(metric: str) -> str:
    return metric.split("_")[0]


def _error(table: pd.DataFrame, scale: float = 1.0) -> np.ndarray:
    """Distances from value to interval ends, [2, rows]; never negative (a percentile interval may miss the mean)."""
    low, high = table["value"] - table["low"], table["high"] - table["value"]
    return np.clip(np.stack([low, high]) * scale, 0, None)


@plt.rc_context(STYLE)
def scores_with_baselines(table: pd.DataFrame) -> Figure:
    """Headline metrics of the model beside its baselines, with 95 % intervals (`scoring.metric_table`).

    A dotted line across a bar of shuffled GIFs is its floor: what reading the other GIF perfectly gives.
    """
    accuracies = [
        m for m in ("frameqa_accuracy", "action_accuracy", "transition_accuracy") if m in set(table["metric"])
    ]
    has_count = "count_mse" in set(table["metric"])
    panels = [p for p in (accuracies, ["count_mse"] if has_count else []) if p]
    require_rows(panels, "headline metrics")
    widths = {"width_ratios": [len(panel) + 0.6 for panel in panels]}
    figure, axes = new_figure(1, len(panels), (2.6 + 2.3 * len(accuracies) + 2.3 * has_count, 4.2), gridspec_kw=widths)
    for axis, panel in zip(axes[0], panels, strict=True):
        count = panel == ["count_mse"]
        _bars(axis, table[table["metric"].isin(panel)], panel, "metric", scale=1 if count else 100)
        axis.set_xticks(range(len(panel)), [_with_n(table, m) for m in panel])
        if count:
            axis.set(title="Count (lower is better)", ylabel="mean squared error", xlabel="task (questions)")
        else:
            axis.set(
                title="Accuracy (higher is better)", ylabel="accuracy (%)", xlabel="task (questions)", ylim=(0, 105)
            )
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3))
    figure.suptitle("Scores beside baselines, 95 % bootstrap intervals by GIF")
    return figure


def _with_n(table: pd.DataFrame, metric: str) -> str:
    row = table[(table["metric"] == metric) & (table["variant"] == "main")].iloc[0]
    of = f"\nof {row['of']:,}" if row["coverage"] < 1 else ""
    return f"{TASK_LABELS[_task(metric)]}\n(n = {row['n']:,}{of})"


def _bars(axis: Axes, table: pd.DataFrame, groups: Sequence[str], column: str, scale: float) -> None:
    """Bars of the known variants side by side at each group, with intervals and values."""
    variants = [v for v in VARIANT_COLORS if v in set(table["variant"])]
    width = 0.8 / len(variants)
    for k, variant in enumerate(variants):
        rows = table[table["variant"] == variant].set_index(column).reindex(groups)
        x = np.arange(len(groups)) + (k - (len(variants) - 1) / 2) * width
        values = rows["value"].to_numpy(dtype=float) * scale
        error = _error(rows, scale)
        axis.bar(x, values, width * 0.92, color=VARIANT_COLORS[variant], label=VARIANT_LABELS[variant])
        axis.errorbar(x, values, error, fmt="none", ecolor="black", elinewidth=1, capsize=2)
        for position, value, up in zip(x, values, error[1], strict=True):
            if np.isfinite(value):
                text = f"{value:.0f}" if scale == 100 else f"{value:.2f}"
                axis.annotate(text, (position, value + up), (0, 2), textcoords="offset points", ha="center", fontsize=8)
    if FLOOR in set(table["variant"]) and "shuffled" in variants:
        floor = table[table["variant"] == FLOOR].set_index(column).reindex(groups)["value"].astype(float) * scale
        x = np.arange(len(groups)) + (variants.index("shuffled") - (len(variants) - 1) / 2) * width
        axis.hlines(floor, x - width / 2, x + width / 2, color="black", linestyle=":", label=FLOOR_LABEL)
    axis.grid(axis="x", visible=False)


@plt.rc_context(STYLE)
def accuracy_by_type(table: pd.DataFrame) -> Figure:
    """FrameQA accuracy by type of question (`scoring.breakdown` by type), model and variants side by side."""
    rows = table[table["metric"] == "frameqa_accuracy"]
    require_rows(rows, "FrameQA questions")
    groups = list(dict.fromkeys(rows["group"]))
    figure, axes = new_figure(1, 1, (2.5 + 1.5 * len(groups), 4))
    axis = axes[0, 0]
    _bars(axis, rows, groups, "group", scale=100)
    n = rows[rows["variant"] == "main"].set_index("group")["n"]
    axis.set_xticks(range(len(groups)), [literal(f"{group}\n(n = {n[group]:,})") for group in groups])
    axis.set(title="FrameQA by type of question", ylabel="accuracy (%)", xlabel="type (questions)", ylim=(0, 105))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


@plt.rc_context(STYLE)
def accuracy_by_length(table: pd.DataFrame) -> Figure:
    """Headline metrics by GIF length (`scoring.breakdown` by `scoring.length_bins`), 95 % intervals."""
    rows = table[table["variant"] == "main"]
    require_rows(rows, "scores of the model")
    panels = [rows[rows["metric"] != "count_mse"], rows[rows["metric"] == "count_mse"]]
    panels = [panel for panel in panels if len(panel)]
    order = list(dict.fromkeys(rows.sort_values("group", key=lambda g: g.map(_first_number))["group"]))
    figure, axes = new_figure(1, len(panels), (1.5 + 4.2 * len(panels), 3.8))
    for axis, panel in zip(axes[0], panels, strict=True):
        metrics = list(dict.fromkeys(panel["metric"]))
        scale = 1 if metrics == ["count_mse"] else 100
        for k, metric in enumerate(metrics):
            line = panel[panel["metric"] == metric]
            x = [order.index(group) + (k - (len(metrics) - 1) / 2) * 0.12 for group in line["group"]]
            task = _task(metric)
            _points(axis, x, line, scale, TASK_COLORS[task], TASK_LABELS[task])
        axis.set_xticks(range(len(order)), [f"{g}\n(n = {panel.loc[panel['group'] == g, 'n'].sum():,})" for g in order])
        axis.set(xlabel="GIF length in frames (questions)", xlim=(-0.5, len(order) - 0.5))
        _score_axis(axis, scale)
        axis.legend(loc="best")
    figure.suptitle("Scores by GIF length, 95 % bootstrap intervals by GIF")
    return figure


def _first_number(label: str) -> int:
    return int(str(label).split("-")[0].split()[0])


def _points(axis: Axes, x: Sequence[float], rows: pd.DataFrame, scale: float, color: str, label: str) -> None:
    axis.errorbar(
        x, rows["value"] * scale, _error(rows, scale), color=color, marker="o", markersize=5, capsize=3, label=label
    )


def _score_axis(axis: Axes, scale: float) -> None:
    if scale == 100:
        axis.set(title="Accuracy (higher is better)", ylabel="accuracy (%)", ylim=(0, 105))
    else:
        axis.set(title="Count (lower is better)", ylabel="mean squared error")
        axis.set_ylim(bottom=0)


@plt.rc_context(STYLE)
def groups_comparison(table: pd.DataFrame, frames_per_group: int = 16) -> Figure:
    """What more frames bring on long GIFs: a panel a task, a line a GIF length, a point a number of groups.

    `table` is `scoring.breakdown` by length over the variants groups_1, groups_2, ...
    """
    rows = table[table["variant"].str.fullmatch(r"groups_\d+")]
    require_rows(rows, "scores by number of groups")
    rows = rows.assign(groups=rows["variant"].str.removeprefix("groups_").astype(int))
    metrics = list(dict.fromkeys(rows["metric"]))
    bins = sorted(set(rows["group"]), key=_first_number)
    figure, axes = new_figure(1, len(metrics), (1.2 + 2.9 * len(metrics), 4))
    for axis, metric in zip(axes[0], metrics, strict=True):
        scale = 1 if metric == "count_mse" else 100
        numbers = []
        for k, (group, color) in enumerate(zip(bins, (SKY, GREEN, RED, PURPLE, ORANGE), strict=False)):
            line = rows[(rows["metric"] == metric) & (rows["group"] == group)].sort_values("groups")
            x = line["groups"] + (k - (len(bins) - 1) / 2) * 0.08
            _points(axis, x, line, scale, color, f"{group} frames")
            numbers.append(f"{line['n'].max():,}" if len(line) else "0")
        _score_axis(axis, scale)
        counts = sorted(set(rows["groups"]))
        axis.set_xticks(counts, [f"{g}\n({g * frames_per_group})" for g in counts])
        better = "lower" if scale == 1 else "higher"
        title = f"{TASK_LABELS[_task(metric)]} ({better} is better)\nn = {', '.join(numbers)}"
        axis.set(title=title, xlabel="groups (frames at most)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(bins))
    figure.suptitle("Long GIFs: scores by number of groups, 95 % bootstrap intervals by GIF")
    return figure


@plt.rc_context(STYLE)
def reliability(tables: dict[str, pd.DataFrame], errors: dict[str, float]) -> Figure:
    """Confidence against accuracy, a panel a task (`scoring.calibration`), with its expected calibration error."""
    require_rows(tables, "task with confidences")
    figure, axes = new_figure(2, len(tables), (1 + 2.8 * len(tables), 4.6), height_ratios=[3, 1], sharex=True)
    for k, (task, table) in enumerate(tables.items()):
        upper, lower = axes[0, k], axes[1, k]
        width = (table["high"] - table["low"]) * 0.94
        middle = (table["low"] + table["high"]) / 2
        upper.bar(middle, table["accuracy"], width, color=TASK_COLORS[task], alpha=0.75, label="accuracy")
        upper.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="perfect calibration")
        upper.plot(table["confidence"], table["accuracy"], "o", color="black", markersize=3, label="bin mean")
        upper.set(title=f"{TASK_LABELS[task]}: ECE {errors[task]:.3f}", xlim=(0, 1), ylim=(0, 1.02))
        lower.bar(middle, table["n"], width, color=GREY)
        lower.set(xlabel="confidence (probability)")
        lower.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes[0, 0].set_ylabel("accuracy (fraction)")
    axes[1, 0].set_ylabel("questions")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle("Reliability: how often the model is right when it is this sure")
    return figure


@plt.rc_context(STYLE)
def ladder(table: pd.DataFrame, name: str) -> Figure:
    """A panel a task: what each row of a ladder scores, mean over seeds with its 95 % interval (`sweeps.runs`)."""
    require_rows(table, "rungs")
    measures = [name.removesuffix("_high") for name in table if name.endswith("_high")]
    figure, axes = new_figure(1, len(measures), (2.8 * len(measures) + 1.8, 1.2 + 0.45 * len(table)), sharey=True)
    figure.suptitle(literal(f"Ladder {name!r}: mean of {int(table['seeds'].min())} seeds, 95 % intervals"))
    y = np.arange(len(table))[::-1]
    for axis, measure in zip(axes[0], measures, strict=True):
        task = _task(measure)
        scale = 1.0 if task == "count" else 100.0
        half = (table[f"{measure}_high"] - table[measure]).where(lambda h: np.isfinite(h), 0.0)
        axis.errorbar(table[measure] * scale, y, xerr=half * scale, fmt="o", color=TASK_COLORS[task], capsize=3)
        unit = "squared error (lower is better)" if task == "count" else "accuracy (%)"
        axis.set(title=TASK_LABELS[task], xlabel=unit)
    axes[0, 0].set_yticks(y, [literal(row) for row in table["row"]])
    axes[0, 0].set_ylabel("training")
    return figure
