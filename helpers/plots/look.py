"""One look for all figures: colours that colour-blind readers can tell apart, sizes, files, and pictures in HTML."""

from __future__ import annotations

import base64
import html
from collections.abc import Sized
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from helpers.workspace.disk import whole

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


def new_figure(rows: int, columns: int, size: tuple[float, float], **options) -> tuple[Figure, np.ndarray]:
    """A figure and its axes as a [rows, columns] array; closed, so that a notebook shows it only once."""
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)
    plt.close(figure)
    return figure, axes


def save_figure(figure: Figure, path: Path) -> Path:
    """Write `figure` as PNG to `path`, making its folder, and return the path."""
    with whole(path) as temporary:
        figure.savefig(temporary, dpi=STYLE["savefig.dpi"], format="png")
    return path


def require_rows(table: Sized, what: str) -> None:
    """Raise ValueError if a table has nothing to draw; what: of which it has none."""
    if not len(table):
        raise ValueError(f"nothing to draw: the table has no {what}")


def percent_text(share: float) -> str:
    """Write a share as whole percent, which a line break never parts from its sign."""
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"  # a title is not broken between the two


def literal(text: object) -> str:
    """A person's or a model's text as matplotlib is to draw it: as it stands, dollar signs never begin mathematics.

    Texts are cut and wrapped before, so that no line ends inside what stands for a dollar sign.
    """
    return str(text).replace("$", r"\$")


def image_tag(data: bytes, alt: str, kind: str = "gif", style: str = "") -> str:
    """An img element that carries its own data; animated GIFs play. kind: of the file; style: CSS class."""
    named = f' class="{style}"' if style else ""
    return f'<img{named} alt="{html.escape(alt)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'
