"""Figures of answers: one answer with its frames, a GIF beside its questions, a gallery."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten, wrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import get_data_path
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from helpers.corpora.tasks import target_answer
from helpers.plots.look import (
    BLUE,
    GREEN,
    ORANGE,
    RED,
    SKY,
    STYLE,
    TASK_LABELS,
    literal,
    new_figure,
    percent_text,
    require_rows,
)
from helpers.workspace.disk import whole


@plt.rc_context(STYLE)
def gallery(examples: pd.DataFrame, frames: Sequence[np.ndarray], per_row: int = 6) -> Figure:
    """One strip of frames an example, with question, answer, prediction and confidence above it.

    Args:
        examples: rows of a predictions table with a boolean column `right`.
        frames: for each row its frames, uint8 [T, H, W, 3]; `per_row` of them are shown, evenly spaced in order.
    """
    if len(examples) != len(frames):
        raise ValueError(f"{len(examples)} examples but frames of {len(frames)} GIFs")
    require_rows(examples, "examples")
    figure, axes = new_figure(len(examples), 1, (1.25 * per_row + 0.3, 2.15 * len(examples) + 0.4))
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
    answer = target_answer(row.task, row.answer, row.label)
    question = shorten(f"{TASK_LABELS[row.task]}: {row.question}", 2 * width, placeholder=" ...")
    lines = wrap(question, width)
    if len(row.options):
        lines += wrap(shorten("options: " + " | ".join(row.options), 2 * width, placeholder=" ..."), width)
    verdict = f"{mark}: says {row.prediction!r} (confidence {row.confidence:.2f}), answer {answer!r}"
    lines += wrap(shorten(verdict, 2 * width, placeholder=" ..."), width)
    return literal("\n".join(lines))


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
    require_rows(distribution, "answers")
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

    texts = [literal(shorten(text, 24, placeholder=" ...")) or "(nothing)" for text, _ in distribution]
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
    title = (
        f"{shorten(question, 90, placeholder=' ...')}   Answer: {chosen or '(nothing)'} ({percent_text(confidence)})"
    )
    if blind is not None:
        title += f";   without the GIF: {blind[0] or '(nothing)'} ({percent_text(blind[1])})"
    figure.suptitle(literal("\n".join(wrap(title, 100))))
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
        truth = target_answer(row.task, row.answer, row.label)
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
    with whole(path) as temporary:
        pictures[0].save(temporary, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    return path
