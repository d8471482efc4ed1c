"""The demo's panels as HTML. Every text that a person or a model wrote is escaped before it enters."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from helpers import plots
from helpers.demo.session import Asked
from helpers.plots.look import image_tag

# Panels bring their own background, so that their text has contrast in dark themes too.
STYLE = """<style>
.gq { background: #fff; color: #1a1a1a; font: 15px/1.45 system-ui, sans-serif; padding: 10px 14px; border-radius: 6px;
  border: 1px solid #767676; margin-bottom: 6px; }
.gq h4 { margin: 0 0 6px; font-size: 15px; } .gq p { margin: 4px 0; }
.gq .answer { font-size: 21px; } .gq .quiet { color: #545454; }
.gq-note { font: 15px/1.45 system-ui, sans-serif; padding: 5px 12px; border-radius: 6px; background: #e7f1f8;
  color: #0b2e45; border-left: 5px solid #0072B2; }
.gq-note a { color: inherit; text-decoration: underline; }
.gq-note.error { background: #fdecea; color: #7a1200; border-left-color: #B3261E; }
.gq table { border-collapse: collapse; width: 100%; } .gq caption { text-align: left; padding: 0; }
.gq td, .gq th { padding: 2px 6px; text-align: left; }
.gq th { font-weight: normal; white-space: nowrap; width: 1%; max-width: 16em; overflow: hidden;
  text-overflow: ellipsis; } .gq th.chosen { font-weight: bold; }
.gq td.number { width: 1%; white-space: nowrap; text-align: right; font-variant-numeric: tabular-nums; }
.gq .bar { height: 14px; background: #56B4E9; min-width: 1px; } .gq .chosen + td .bar { background: #0072B2; }
.gq .strip { display: flex; flex-wrap: wrap; gap: 6px; list-style: none; padding: 0; margin: 8px 0 0; }
.gq .strip li { width: 76px; margin: 0; font-size: 12px; text-align: center; }
.gq .strip img { width: 76px; height: 76px; display: block; border-radius: 3px; }
.gq .strip .meter { height: 8px; background: #ececec; margin: 3px 0; }
.gq .strip .meter div { height: 8px; background: #0072B2; } .gq .strip .meter div.against { background: #E69F00; }
.gq .strip .top { outline: 3px solid #0072B2; outline-offset: -3px; }
.gq .choices { list-style: none; padding: 0; margin: 4px 0; }
.gq .science { max-width: 220px; height: auto; border-radius: 3px; display: block; margin-bottom: 8px; }
.gq .maps { display: flex; flex-wrap: wrap; gap: 18px; } .gq .maps figure { margin: 0; width: 220px; }
.gq .maps figcaption { font-size: 13px; }
.gq-gif { width: 100%; height: 100%; object-fit: contain; object-position: top; background: #fff; border-radius: 4px; }
</style>"""


def note(text: str, error: bool = False) -> str:
    """A message that stands beside a control; screen readers announce it. An empty text is no message."""
    kind, role = (" error", "alert") if error else ("", "status")
    return f'<div class="gq-note{kind}" role="{role}">{html.escape(text)}</div>' if text else ""


def bars(distribution: Sequence[tuple[str, float]], chosen: str, caption: str) -> str:
    """Probabilities as a table of bars, the chosen text in bold. The caption is HTML."""
    rows = [
        f'<tr><th scope="row"{" class=chosen" if text == chosen else ""}>{html.escape(text) or "(nothing)"}</th>'
        f'<td><div class="bar" style="width:{100 * p:.1f}%"></div></td><td class="number">{100 * p:.1f} %</td></tr>'
        for text, p in distribution
    ]
    return f"<table><caption class=quiet>{caption}</caption>{''.join(rows)}</table>"


def answer_panel(asked: Asked, blind: bool = False) -> str:
    """The answer, its confidence, the next best answers as bars, and the time it took; `blind` adds the blind answer.

    Raises ValueError if a blind answer is wanted that was not asked for.
    """
    answer = asked.answer
    caption = {
        "count": "probability of each number of times",
        "frameqa": "probability of each answer, among all texts that could be written",
    }.get(asked.task, "probability of each option")
    parts = [
        f"<h4>{html.escape(asked.question)}</h4><p class=quiet>{html.escape(asked.gif.name)}</p>",
        f'<p class="answer"><strong>{html.escape(answer.text) or "(nothing)"}</strong></p>',
        f"<p>confidence {100 * answer.confidence:.1f} %, answered in {asked.seconds:.2f} s</p>",
        bars(asked.distribution, answer.text, caption),
    ]
    if blind:
        if asked.blind is None:
            raise ValueError("this question was not asked blind yet")
        same = asked.blind.text == answer.text
        verdict = "the same: the question alone may give it away" if same else "another one: the GIF makes a difference"
        said = html.escape(asked.blind.text) or "(nothing)"
        parts.append(
            f"<p><b>Without seeing the GIF</b> it says <strong>{said}</strong> "
            f"(confidence {100 * asked.blind.confidence:.1f} %), {verdict}.</p>"
        )
    return f'<section class="gq" aria-label="Answer">{"".join(parts)}</section>'


def why_panel(asked: Asked, frames: np.ndarray) -> str:
    """The sampled frames (uint8 [N, H, W, 3]) as a strip: when each starts, its relevance, the answer without it."""
    answer = asked.answer
    scale = max(map(abs, answer.relevance), default=0) or 1
    top = int(np.argmax(answer.relevance))
    items = []
    for number, (frame, exact) in enumerate(zip(frames, answer.relevance, strict=True)):
        nats = round(exact, 2) + 0.0  # no "-0.00"
        out, at = io.BytesIO(), f"{answer.frame_times_ms[number] / 1000:.2f} s"
        Image.fromarray(frame).save(out, "JPEG", quality=85)
        without = answer.hidden[number]
        change = "" if without == answer.text else f"<b>→ {html.escape(without) or '(nothing)'}</b>"
        alt = f"frame at {at}, relevance {nats:.2f} nats; without it the answer is {without or 'nothing'}"
        against = " class=against" if exact < 0 else ""
        items.append(
            f"<li>{image_tag(out.getvalue(), alt, 'jpeg', 'top' if number == top else '')}"
            f"<div class=meter><div{against} style='width:{100 * abs(exact) / scale:.0f}%'></div></div>"
            f"{at}<br>{nats:+.2f}<br>{change}</li>"
        )
    changed = sum(text != answer.text for text in answer.hidden)
    left = answer.confidence * np.exp(-answer.relevance[top])
    return (
        '<section class="gq" aria-label="Why"><h4>Why: what each frame is worth</h4>'
        f"<p>The {len(frames)} frames that the model saw, in order of time. Under each: when it starts, and its "
        "relevance, that is by how many nats the answer's log-probability falls when only this frame is hidden "
        "(orange: it rises). An arrow tells the answer that is given then, if it is another one: "
        f"so it is for {changed} of {len(frames)} frames. Without the outlined one the probability of "
        f"<strong>{html.escape(answer.text) or '(nothing)'}</strong> goes from {100 * answer.confidence:.1f} % to "
        f"{100 * left:.1f} %.</p><ol class=strip>{''.join(items)}</ol></section>"
    )


def still_panels(asked: Asked, frames: np.ndarray) -> Figure:
    """The same panels as one figure, for a notebook that runs without a page."""
    blind = (asked.blind.text, asked.blind.confidence) if asked.blind else None
    answer = asked.answer
    return plots.answer_overview(
        asked.question, asked.distribution, answer.text, frames, answer.frame_times_ms, answer.relevance, blind
    )
