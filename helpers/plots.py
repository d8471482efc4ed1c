"""Figures: one look, titles, labelled axes with units, colours that colour-blind readers can tell apart.

Every function returns a closed matplotlib `Figure`: a notebook shows it by naming it, `save_figure` writes it.
"""

from collections.abc import Sequence, Sized
from pathlib import Path
from textwrap import shorten, wrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import get_data_path
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from helpers.quota import WEEK, Piece, session_hours

# Okabe and Ito's palette (2008): told apart with every common form of colour blindness.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#7F7F7F",
)
VARIANT_COLORS = {"main": BLUE, "blind": ORANGE, "shuffled": PURPLE, "majority": GREY}
VARIANT_LABELS = {"main": "model", "blind": "blind (no video)", "shuffled": "shuffled GIFs", "majority": "majority"}
TASK_COLORS = {"frameqa": BLUE, "action": GREEN, "transition": RED, "count": PURPLE}
TASK_LABELS = {"frameqa": "FrameQA", "action": "Action", "transition": "Transition", "count": "Count"}
STYLE = {
    "figure.dpi": 100,
    "savefig.dpi": 130,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E5E5E5",
    "legend.frameon": False,
}


def _figure(rows: int, columns: int, size: tuple[float, float], **options) -> tuple[Figure, np.ndarray]:
    """A figure and its axes as a [rows, columns] array; closed, so that a notebook shows it only once."""
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)
    plt.close(figure)
    return figure, axes


def save_figure(figure: Figure, path: Path) -> Path:
    """Write `figure` as PNG to `path`, making its folder, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=STYLE["savefig.dpi"])
    return path


def _require_rows(table: Sized, what: str) -> None:
    if not len(table):
        raise ValueError(f"nothing to draw: the table has no {what}")


def _task(metric: str) -> str:
    return metric.split("_")[0]


def _error(table: pd.DataFrame, scale: float = 1.0) -> np.ndarray:
    """Distances from value to interval ends, [2, rows]; never negative (a percentile interval may miss the mean)."""
    low, high = table["value"] - table["low"], table["high"] - table["value"]
    return np.clip(np.stack([low, high]) * scale, 0, None)


@plt.rc_context(STYLE)
def loss_curve(history: pd.DataFrame, window: int = 20) -> Figure:
    """Training loss (columns step, loss) with its running median over `window` steps; `eval_loss` too."""
    figure, axes = _figure(1, 1, (7, 3.6))
    axis = axes[0, 0]
    points = history.dropna(subset=["loss"])
    _require_rows(points, "logged losses")
    axis.plot(points["step"], points["loss"], color=SKY, linewidth=0.8, label="each logged step")
    smooth = points["loss"].rolling(window, center=True, min_periods=1).median()
    axis.plot(points["step"], smooth, color=BLUE, linewidth=2, label=f"running median of {window}")
    measured = history.dropna(subset=["eval_loss"]) if "eval_loss" in history else history[:0]
    if len(measured):
        axis.plot(measured["step"], measured["eval_loss"], "o--", color=ORANGE, label="GIFs held out, each epoch")
    axis.set(title="Training loss", xlabel="optimizer step", ylabel="loss of the answer (nats per token)")
    axis.set_ylim(bottom=0)
    axis.legend()
    return figure


@plt.rc_context(STYLE)
def scores_with_baselines(table: pd.DataFrame) -> Figure:
    """Headline metrics of the model beside its baselines, with 95 % intervals (`scoring.metric_table`)."""
    accuracies = [
        m for m in ("frameqa_accuracy", "action_accuracy", "transition_accuracy") if m in set(table["metric"])
    ]
    has_count = "count_mse" in set(table["metric"])
    panels = [p for p in (accuracies, ["count_mse"] if has_count else []) if p]
    _require_rows(panels, "headline metrics")
    widths = {"width_ratios": [len(panel) + 0.6 for panel in panels]}
    figure, axes = _figure(1, len(panels), (2.6 + 2.3 * len(accuracies) + 2.3 * has_count, 4.2), gridspec_kw=widths)
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
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.suptitle("Scores beside baselines, 95 % bootstrap intervals by GIF")
    return figure


def _with_n(table: pd.DataFrame, metric: str) -> str:
    n = table.loc[(table["metric"] == metric) & (table["variant"] == "main"), "n"]
    return f"{TASK_LABELS[_task(metric)]}\n(n = {int(n.iloc[0]):,})"


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
    axis.grid(axis="x", visible=False)


@plt.rc_context(STYLE)
def accuracy_by_type(table: pd.DataFrame) -> Figure:
    """FrameQA accuracy by type of question (`scoring.breakdown` by type), model and variants side by side."""
    rows = table[table["metric"] == "frameqa_accuracy"]
    _require_rows(rows, "FrameQA questions")
    groups = list(dict.fromkeys(rows["group"]))
    figure, axes = _figure(1, 1, (2.5 + 1.5 * len(groups), 4))
    axis = axes[0, 0]
    _bars(axis, rows, groups, "group", scale=100)
    n = rows[rows["variant"] == "main"].set_index("group")["n"]
    axis.set_xticks(range(len(groups)), [f"{group}\n(n = {n[group]:,})" for group in groups])
    axis.set(title="FrameQA by type of question", ylabel="accuracy (%)", xlabel="type (questions)", ylim=(0, 105))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


@plt.rc_context(STYLE)
def accuracy_by_length(table: pd.DataFrame) -> Figure:
    """Headline metrics by GIF length (`scoring.breakdown` by `scoring.length_bins`), 95 % intervals."""
    rows = table[table["variant"] == "main"]
    _require_rows(rows, "scores of the model")
    panels = [rows[rows["metric"] != "count_mse"], rows[rows["metric"] == "count_mse"]]
    panels = [panel for panel in panels if len(panel)]
    order = list(dict.fromkeys(rows.sort_values("group", key=lambda g: g.map(_first_number))["group"]))
    figure, axes = _figure(1, len(panels), (1.5 + 4.2 * len(panels), 3.8))
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
    _require_rows(rows, "scores by number of groups")
    rows = rows.assign(groups=rows["variant"].str.removeprefix("groups_").astype(int))
    metrics = list(dict.fromkeys(rows["metric"]))
    bins = sorted(set(rows["group"]), key=_first_number)
    figure, axes = _figure(1, len(metrics), (1.2 + 2.9 * len(metrics), 4))
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
    _require_rows(tables, "task with confidences")
    figure, axes = _figure(2, len(tables), (1 + 2.8 * len(tables), 4.6), height_ratios=[3, 1], sharex=True)
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
def gallery(examples: pd.DataFrame, frames: Sequence[np.ndarray], per_row: int = 6) -> Figure:
    """One strip of frames an example, with question, answer, prediction and confidence above it.

    Args:
        examples: rows of a predictions table with a boolean column `right`.
        frames: for each row its frames, uint8 [T, H, W, 3]; `per_row` of them are shown, evenly spaced in order.
    """
    if len(examples) != len(frames):
        raise ValueError(f"{len(examples)} examples but frames of {len(frames)} GIFs")
    _require_rows(examples, "examples")
    figure, axes = _figure(len(examples), 1, (1.25 * per_row + 0.3, 2.15 * len(examples) + 0.4))
    for axis, strip, row in zip(axes[:, 0], frames, examples.itertuples(), strict=True):
        chosen = strip[np.unique(np.linspace(0, len(strip) - 1, per_row).round().astype(int))]
        height, gap = chosen.shape[1], max(1, chosen.shape[2] // 24)
        white = np.full((height, gap, 3), 255, dtype=np.uint8)
        picture = np.concatenate([part for frame in chosen for part in (frame, white)][:-1], axis=1)
        axis.imshow(picture, aspect="equal", interpolation="nearest" if height < 96 else "antialiased")
        axis.set_xlim(-0.5, per_row * (chosen.shape[2] + gap) - gap - 0.5)
        axis.set(xticks=[], yticks=[])
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
        color, mark = (GREEN, "right") if row.right else (RED, "wrong")
        axis.set_title(_caption(row, mark, 16 * per_row), color=color, loc="left", fontsize=8.5, fontweight="normal")
        axis.set_xlabel(f"{len(chosen)} of {len(strip)} sampled frames, time runs to the right", fontsize=7, loc="left")
    figure.suptitle("Right and wrong answers")
    return figure


def _caption(row, mark: str, width: int) -> str:
    """Lines above a strip: question, options where there are any, and the answers; long texts are cut."""
    # A dollar sign would start mathematical text.
    answer = str(max(int(row.label), 1)) if row.task == "count" else row.answer
    question = shorten(f"{TASK_LABELS[row.task]}: {row.question}", 2 * width, placeholder=" ...")
    lines = wrap(question, width)
    if len(row.options):
        lines += wrap(shorten("options: " + " | ".join(row.options), 2 * width, placeholder=" ..."), width)
    verdict = f"{mark}: says {row.prediction!r} (confidence {row.confidence:.2f}), answer {answer!r}"
    lines += wrap(shorten(verdict, 2 * width, placeholder=" ..."), width)
    return "\n".join(lines).replace("$", r"\$")


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
        axis.set_title(name.replace("$", r"\$"), loc="left", fontsize=8.5, fontweight="normal")
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
    figure, axes = _figure(1, 1 + len(embeddings), (3.1 * (1 + len(embeddings)), 3.1))
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
        axis.set(title=shorten(name, 30, placeholder=" ...").replace("$", r"\$"), xlabel="time (s)", ylabel="time (s)")
        axis.grid(visible=False)
    if image is not None:
        figure.colorbar(image, ax=axes[0, 1:].tolist(), label="similarity (cosine)", shrink=0.9)
    figure.suptitle("Cached frame embeddings")
    return figure


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"  # a title is not broken between the two


@plt.rc_context(STYLE)
def answer_overview(
    question: str,
    distribution: Sequence[tuple[str, float]],
    chosen: str,
    frames: np.ndarray,
    times_ms: Sequence[float],
    relevance: Sequence[float],
    blind: tuple[str, float] | None = None,
    shown: int = 8,
) -> Figure:
    """One answer and what it rests on: probabilities, relevance of each frame, and the most relevant frames.

    Args:
        distribution: answers with their probabilities; `chosen` is the one given.
        frames: the N sampled frames, uint8 [N, H, W, 3]; times_ms: when each starts; relevance: nats, see `Answer`.
        blind: the answer given without seeing the GIF, with its probability.
        shown: how many of the frames are drawn, those with the highest relevance, in order of time.
    """
    if not len(frames) == len(times_ms) == len(relevance):
        raise ValueError(f"{len(frames)} frames, {len(times_ms)} times, {len(relevance)} relevances: one each a frame")
    _require_rows(distribution, "answers")
    best = np.sort(np.argsort(-np.asarray(relevance), kind="stable")[:shown])
    figure = plt.figure(figsize=(10, 4.7), layout="constrained")
    plt.close(figure)
    grid = figure.add_gridspec(2, 2, width_ratios=[2, 3], height_ratios=[1, 2.2])
    strip, bars, nats = figure.add_subplot(grid[0, :]), figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[1, 1])

    gap = max(1, frames.shape[2] // 24)
    padded = np.pad(frames[best], ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=255)
    strip.imshow(np.concatenate(list(padded), axis=1))
    strip.set_xlim(-0.5, shown * padded.shape[2] - gap - 0.5)
    strip.set_xticks(
        [k * padded.shape[2] + frames.shape[2] / 2 for k in range(len(best))],
        [f"{times_ms[n] / 1000:.2f}" for n in best],
    )
    strip.set(yticks=[], xlabel="start of the frame (s)")
    strip.grid(visible=False)
    strip.spines[:].set_visible(False)
    strip.set_title(f"The {len(best)} most relevant of {len(frames)} frames", loc="left")

    texts = [shorten(text, 24, placeholder=" ...").replace("$", r"\$") or "(nothing)" for text, _ in distribution]
    colors = [BLUE if text == chosen else SKY for text, _ in distribution]
    bars.barh(range(len(texts)), [100 * p for _, p in distribution], color=colors)
    bars.set_yticks(range(len(texts)), texts)
    bars.invert_yaxis()
    bars.set(title="Answers", xlabel="probability (%)", ylabel="answer", xlim=(0, 100))
    bars.grid(axis="y", visible=False)

    colors = [BLUE if value >= 0 else ORANGE for value in relevance]
    nats.bar(range(1, len(relevance) + 1), relevance, color=colors)
    nats.axhline(0, color="black", linewidth=0.8)
    low, high = nats.get_ylim()
    nats.set_ylim(min(low, -0.02), max(high, 0.1))  # else the rounding of a sure answer would look like relevance
    nats.set(title="Relevance of each frame", xlabel="frame (in order of time)")
    nats.set_ylabel("fall of log-probability\nif hidden (nats)")
    nats.xaxis.set_major_locator(MaxNLocator(8, integer=True))

    confidence = next(p for text, p in distribution if text == chosen)
    title = f"{shorten(question, 90, placeholder=' ...')}   Answer: {chosen or '(nothing)'} ({_percent(confidence)})"
    if blind is not None:
        title += f";   without the GIF: {blind[0] or '(nothing)'} ({_percent(blind[1])})"
    figure.suptitle("\n".join(wrap(title, 100)).replace("$", r"\$"))
    return figure


def asked_gif(
    rows: pd.DataFrame, frames: np.ndarray, times_ms: Sequence[float], duration_ms: float, path: Path
) -> Path:
    """Write an animated GIF that plays a GIF beside the questions it was asked and the answers; returns the path.

    rows: rows of a predictions table, all about this GIF. frames: uint8 [T, H, W, 3]; times_ms: when each of them
    starts; the last one stays until `duration_ms`.
    """
    side, width, margin = 256, 400, 10
    zoom = Image.Resampling.NEAREST if frames.shape[1] < 128 else Image.Resampling.LANCZOS
    fonts = Path(get_data_path()) / "fonts" / "ttf"
    plain, bold = (ImageFont.truetype(fonts / name, 13) for name in ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf"))
    panel = Image.new("RGB", (width, side), "white")
    draw, top = ImageDraw.Draw(panel), margin
    step = (side - margin) / len(rows)
    for row in rows.itertuples():
        truth = str(max(int(row.label), 1)) if row.task == "count" else row.answer
        right = str(row.prediction) == truth
        draw.text((margin, top), shorten(row.question, 54, placeholder=" ..."), "black", plain)
        said = f"{row.prediction} ({100 * row.confidence:.0f} %)" + ("" if right else f", but it is {truth}")
        draw.text((margin + 14, top + 17), shorten(said, 50, placeholder=" ..."), GREEN if right else RED, bold)
        top += step
    pictures = []
    for frame in frames:
        page = Image.new("RGB", (side + width, side), "white")
        page.paste(Image.fromarray(frame).resize((side, side), zoom), (0, 0))
        page.paste(panel, (side, 0))
        pictures.append(page.quantize(64, dither=Image.Dither.NONE))
    durations = np.diff([*times_ms, max(duration_ms, times_ms[-1] + 20)]).clip(20).round(-1).astype(int).tolist()
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    return path


STAGE_COLORS = (SKY, BLUE, GREEN, PURPLE, ORANGE, RED)


@plt.rc_context(STYLE)
def quota_weeks(pieces: Sequence[Piece], weekly_hours: float, refresh: float) -> Figure:
    """Sessions of a plan (`quota.simulate`), a row a week from its first hour on, above the GPU-hours of each week.

    weekly_hours: the quota. refresh: any time at which it is refreshed (seconds since 1970).
    """
    _require_rows(pieces, "sessions")
    first = min((piece.opened - refresh) // WEEK for piece in pieces)
    weeks = int(max((piece.closed - refresh) // WEEK for piece in pieces) - first) + 1
    starts = refresh + WEEK * (first + np.arange(weeks))
    used = [session_hours(pieces, start, start + WEEK) for start in starts]
    stages = list(dict.fromkeys(piece.stage for piece in pieces))
    height = 0.45 * weeks + 1.5
    figure, axes = _figure(1, 2, (9.5, height + 0.6), gridspec_kw={"width_ratios": [3, 1]}, sharey=True)
    calendar, sums = axes[0]
    for stage, color in zip(stages, STAGE_COLORS * len(stages), strict=False):
        label = stage
        for number, start in enumerate(starts):
            spans = [
                (max(piece.began, start), min(piece.ended, start + WEEK)) for piece in pieces if piece.stage == stage
            ]
            bars = [((begin - start) / 86400, (end - begin) / 86400) for begin, end in spans if end > begin]
            if bars:
                calendar.broken_barh(bars, (number - 0.35, 0.7), color=color, label=label)
                label = None
    lost, sessions = sum(piece.lost for piece in pieces) / 3600, len({piece.session for piece in pieces})
    calendar.set(
        title=f"{sum(used):.1f} GPU-hours, sessions: {sessions}" + (f", {lost:.1f} h lost to deaths" if lost else ""),
        xlabel="day of the quota's week",
        ylabel="week",
        xlim=(0, 7),
    )
    calendar.set_yticks(range(weeks), [str(number + 1) for number in range(weeks)])
    calendar.invert_yaxis()
    right = 1.35 * max(weekly_hours, *used)
    sums.barh(range(weeks), used, height=0.7, color=GREY)
    sums.axvline(weekly_hours, color=RED, linewidth=2, label=f"quota: {weekly_hours:g} h")
    for number, hours in enumerate(used):
        sums.annotate(
            f"{hours:.1f}", (right, number), xytext=(-3, 0), textcoords="offset points", va="center", ha="right"
        )
    sums.set(title="used in each week", xlabel="GPU time (hours)", xlim=(0, right))
    handles = [*calendar.get_legend_handles_labels()[0], *sums.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure
