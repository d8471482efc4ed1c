"""The picture of the weeks that a plan takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from helpers.runner.quota.forecasts import Piece, session_hours
from helpers.runner.quota.ledger import WEEK

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def quota_weeks(pieces: Sequence[Piece], weekly_hours: float, refresh: float) -> Figure:
    """Sessions of a plan (`plan_sessions`), a row a week from its first hour on, above the GPU-hours of each week.

    weekly_hours: the quota. refresh: any time at which it is refreshed (seconds since 1970).
    """
    from matplotlib.pyplot import rc_context

    from helpers.plots.look import STYLE  # pyplot takes its time, and the face of this wing is loaded by every command

    with rc_context(STYLE):
        return _draw(pieces, weekly_hours, refresh)


def _draw(pieces: Sequence[Piece], weekly_hours: float, refresh: float) -> Figure:
    from helpers.plots.look import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, literal, new_figure, require_rows

    require_rows(pieces, "sessions")
    first = min((piece.opened - refresh) // WEEK for piece in pieces)
    weeks = int(max((piece.closed - refresh) // WEEK for piece in pieces) - first) + 1
    starts = refresh + WEEK * (first + np.arange(weeks))
    used = [session_hours(pieces, start, start + WEEK) for start in starts]
    stages = list(dict.fromkeys(piece.stage for piece in pieces))
    height = 0.45 * weeks + 1.5
    figure, axes = new_figure(1, 2, (9.5, height + 0.6), gridspec_kw={"width_ratios": [3, 1]}, sharey=True)
    calendar, sums = axes[0]
    for stage, color in zip(stages, (SKY, BLUE, GREEN, PURPLE, ORANGE, RED) * len(stages), strict=False):
        label = literal(stage)
        for number, start in enumerate(starts):
            spans = [
                (max(piece.began, start), min(piece.ended, start + WEEK)) for piece in pieces if piece.stage == stage
            ]
            bars = [((begin - start) / 86400, (end - begin) / 86400) for begin, end in spans if end > begin]
            if bars:
                calendar.broken_barh(bars, (number - 0.35, 0.7), color=color, label=label)
                label = None
    calendar.set(
        title=f"{sum(used):.1f} GPU-hours, sessions: {len({piece.session for piece in pieces})}",
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
