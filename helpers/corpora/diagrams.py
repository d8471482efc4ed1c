"""The built-in world of science questions: drawn diagrams, with questions in ScienceQA's schema and official files.

Five kinds of diagram (a map with a marked part, a line graph, a food chain, two magnets, a figure) are each asked about
what only the picture shows: the right answer is drawn with equal chances, and so are the other choices and their order,
so that question, hint, choices and caption tell nothing about it. Other problems have no image; they are answered from
a hint that describes a diagram in words, or from what words mean.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from helpers.workspace.disk import hashes, read_json, whole, write_json

SIZE = 64  # pixels, side of an image
FINE = 4  # drawn this many times larger and averaged down, so that edges are smooth
IMAGE_SHARE, HINT_SHARE, CAPTION_SHARE = 0.7, 0.5, 0.7
TEXT_KINDS = 0.6  # share of the problems without an image whose hint describes a diagram; the rest are about words

VALUES = {
    "marked": ("north", "south", "east", "west"),
    "trend": ("rising", "falling", "level"),
    "producer": ("grass", "corn", "flower"),
    "predator": ("hawk", "fox", "shark"),
    "force": ("attract", "repel"),
    "shape": ("circle", "square", "triangle", "star"),
    "color": ("red", "green", "blue", "purple"),
}
"""Fact -> its values, each of them one word and of no other fact."""

KINDS = {
    "map": ("marked",),
    "graph": ("trend",),
    "chain": ("producer", "predator"),
    "magnets": ("force",),
    "figure": ("shape", "color"),
}
"""Kind of diagram -> the facts that it shows."""

QUESTIONS = {
    "marked": ("Which part of the map is marked?", "Where is the marked part of the map?"),
    "trend": ("How does the line of the graph run?", "What is the line of the graph doing?"),
    "producer": ("Which living thing is the producer?", "What does the food chain start with?"),
    "predator": ("Which living thing is the top predator?", "What does the food chain end with?"),
    "force": ("Will the magnets attract or repel each other?", "What will the two magnets do?"),
    "shape": ("What shape does the figure have?", "Which shape is drawn?"),
    "color": ("What color does the figure have?", "Which color is the figure?"),
}
STATEMENTS = {
    "marked": ("The {} part of the map is marked.", "The mark is in the {}."),
    "trend": ("The line of the graph is {}.", "The graph shows a {} line."),
    "producer": ("The producer is the {}.", "The food chain starts with the {}."),
    "predator": ("The top predator is the {}.", "The food chain ends with the {}."),
    "force": ("The magnets {} each other.", "The two magnets will {}."),
    "shape": ("The figure is a {}.", "The shape is a {}."),
    "color": ("The figure is {}.", "The color is {}."),
}
"""What a hint says where it describes a diagram."""

HINTS = {
    "map": ("Maps show where places are.", "The map shows an island."),
    "graph": ("A graph shows how a number changes.", "Time runs to the right."),
    "chain": ("Arrows point from what is eaten to what eats it.", "A food chain starts with a producer."),
    "magnets": ("Unlike poles pull, like poles push.", "Each magnet has two poles."),
    "figure": ("Look at the picture.", "A figure has a shape and a color."),
}
CAPTIONS = {
    "map": "a drawing of a map",
    "graph": "a drawing of a graph",
    "chain": "a drawing of a food chain",
    "magnets": "a drawing of two magnets",
    "figure": "a drawing of a figure",
}
WORDS = {
    "color": "Which of these words is a color?",
    "shape": "Which of these words is a shape?",
    "producer": "Which of these words is a plant?",
    "predator": "Which of these words is an animal?",
    "marked": "Which of these words is a direction?",
}
"""Questions about words: the fact whose values are right answers, among values of the others."""

SUBJECTS = {"map": "social science", "words": "language science"}  # all others are natural science
TOPICS = {
    "map": "geography",
    "graph": "science-and-engineering-practices",
    "chain": "biology",
    "magnets": "physics",
    "figure": "physics",
    "words": "vocabulary",
}

INKS = {"red": (220, 40, 40), "green": (30, 160, 60), "blue": (40, 80, 220), "purple": (150, 60, 190)}
RED, BLUE, BLACK = (225, 40, 40), (50, 80, 215), (40, 40, 40)


@dataclass(frozen=True)
class Diagram:
    """What one image shows: its kind, the value of each of the kind's facts, and the seed of all that is by chance."""

    kind: str
    facts: dict[str, str]
    seed: int


@dataclass(frozen=True)
class Problem:
    """One problem: its record as in problems.json, its diagram (None without an image), its caption ("" if none).

    fact: the fact asked about, and diagram_facts: what image or hint say; "" and {} for a question about words.
    """

    record: dict[str, Any]
    diagram: Diagram | None
    caption: str
    fact: str
    diagram_facts: dict[str, str]


# ---- Drawing -------------------------------------------------------------------------------------------------------


class _Pen:
    """Draws on a unit square, (0, 0) at the top left; the page's own shift and scale are by chance."""

    def __init__(self, rng: np.random.Generator) -> None:
        paper = tuple(int(v) for v in rng.integers(228, 256, 3))
        self.image = Image.new("RGB", (SIZE * FINE, SIZE * FINE), paper)
        self.drawing = ImageDraw.Draw(self.image)
        self.rng, self.scale, self.shift = rng, rng.uniform(0.88, 1.0), rng.uniform(-0.03, 0.03, 2)

    def at(self, *points: tuple[float, float]) -> list[tuple[float, float]]:
        """Pixel coordinates of points."""
        place = 0.5 + (np.array(points) - 0.5) * self.scale + self.shift
        return [(float(x), float(y)) for x, y in place * SIZE * FINE]

    def polygon(self, points: list[tuple[float, float]], color: tuple[int, int, int]) -> None:
        """A filled polygon."""
        self.drawing.polygon(self.at(*points), fill=color)

    def disc(self, x: float, y: float, rx: float, ry: float, color: tuple[int, int, int]) -> None:
        """A filled ellipse with centre and half axes."""
        (x0, y0), (x1, y1) = self.at((x - rx, y - ry), (x + rx, y + ry))
        self.drawing.ellipse((x0, y0, x1, y1), fill=color)

    def box(self, x0: float, y0: float, x1: float, y1: float, color: tuple[int, int, int]) -> None:
        """A filled upright rectangle."""
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], color)

    def line(self, points: list[tuple[float, float]], color: tuple[int, int, int], width: float = 0.03) -> None:
        """A line through points; width as a share of the page."""
        self.drawing.line(self.at(*points), fill=color, width=round(width * SIZE * FINE), joint="curve")


def _pale(rng: np.random.Generator, base: tuple[int, int, int]) -> tuple[int, int, int]:
    return tuple(int(v) for v in np.clip(np.array(base) + rng.integers(-18, 19, 3), 0, 255))


def _map(pen: _Pen, facts: dict[str, str]) -> None:
    pen.box(-0.2, -0.2, 1.2, 1.2, _pale(pen.rng, (170, 205, 235)))  # the sea
    middle = tuple(pen.rng.uniform(0.44, 0.56, 2))
    corners = [(0.08, 0.08), (0.92, 0.08), (0.92, 0.92), (0.08, 0.92)]
    corners = [(x + dx, y + dy) for (x, y), (dx, dy) in zip(corners, pen.rng.uniform(-0.04, 0.04, (4, 2)), strict=True)]
    for i, part in enumerate(("north", "east", "south", "west")):
        wedge = [corners[i], corners[(i + 1) % 4], middle]
        pen.polygon(wedge, RED if part == facts["marked"] else _pale(pen.rng, (215, 220, 170)))
        pen.line([*wedge, wedge[0]], BLACK, 0.015)


def _graph(pen: _Pen, facts: dict[str, str]) -> None:
    pen.line([(0.12, 0.06), (0.12, 0.88), (0.95, 0.88)], BLACK, 0.03)
    for i in range(1, 5):
        pen.line([(0.12 + 0.18 * i, 0.88), (0.12 + 0.18 * i, 0.93)], BLACK, 0.02)
        pen.line([(0.07, 0.88 - 0.18 * i), (0.12, 0.88 - 0.18 * i)], BLACK, 0.02)
    low, high = pen.rng.uniform(0.68, 0.8), pen.rng.uniform(0.12, 0.3)
    flat = pen.rng.uniform(0.2, 0.72)
    ends = {"rising": (low, high), "falling": (high, low), "level": (flat, flat)}[facts["trend"]]
    heights = np.linspace(*ends, 5) + pen.rng.uniform(-0.025, 0.025, 5)
    ink = INKS[str(pen.rng.choice(list(INKS)))]
    pen.line(list(zip(np.linspace(0.2, 0.9, 5), heights, strict=True)), ink, 0.05)


def _plant(pen: _Pen, x: float, y: float, name: str) -> None:
    if name == "grass":
        for dx in (-0.08, 0.0, 0.08):
            pen.polygon(
                [(x + dx - 0.035, y + 0.13), (x + dx + 0.035, y + 0.13), (x + 1.6 * dx, y - 0.13)], (40, 160, 50)
            )
    elif name == "corn":
        pen.disc(x, y, 0.06, 0.13, (240, 195, 30))
    else:
        pen.line([(x, y), (x, y + 0.14)], (40, 140, 60), 0.025)
        for turn in range(5):
            angle = 2 * np.pi * turn / 5
            pen.disc(x + 0.07 * np.sin(angle), y - 0.04 - 0.07 * np.cos(angle), 0.05, 0.05, (235, 90, 170))


def _predator(pen: _Pen, x: float, y: float, name: str) -> None:
    if name == "hawk":
        wings = [
            (x - 0.15, y - 0.1),
            (x, y),
            (x + 0.15, y - 0.1),
            (x + 0.05, y + 0.07),
            (x, y + 0.12),
            (x - 0.05, y + 0.07),
        ]
        pen.polygon(wings, (120, 75, 40))
    elif name == "fox":
        face = [(x - 0.13, y - 0.13), (x - 0.05, y - 0.06), (x + 0.05, y - 0.06), (x + 0.13, y - 0.13), (x, y + 0.13)]
        pen.polygon(face, (240, 120, 20))
    else:
        pen.disc(x, y, 0.14, 0.06, (110, 130, 150))
        pen.polygon([(x - 0.03, y - 0.04), (x + 0.05, y - 0.04), (x + 0.05, y - 0.14)], (110, 130, 150))


def _chain(pen: _Pen, facts: dict[str, str]) -> None:
    heights = 0.5 + pen.rng.uniform(-0.12, 0.12, 3)
    _plant(pen, 0.17, heights[0], facts["producer"])
    pen.disc(0.5, heights[1], 0.075, 0.055, _pale(pen.rng, (150, 150, 150)))  # what eats the one and is eaten
    pen.disc(0.57, heights[1] - 0.03, 0.03, 0.03, (130, 130, 130))
    _predator(pen, 0.83, heights[2], facts["predator"])
    for x in (0.31, 0.62):
        pen.line([(x, 0.5), (x + 0.06, 0.5)], BLACK, 0.02)
        pen.polygon([(x + 0.05, 0.46), (x + 0.05, 0.54), (x + 0.09, 0.5)], BLACK)


def _magnets(pen: _Pen, facts: dict[str, str]) -> None:
    gap, height, y = pen.rng.uniform(0.05, 0.1), pen.rng.uniform(0.1, 0.14), pen.rng.uniform(0.4, 0.6)
    first = bool(pen.rng.integers(2))  # which pole the left magnet turns to the right one
    second = first if facts["force"] == "repel" else not first
    for x, inner, side in ((0.5 - gap, first, -1), (0.5 + gap, second, 1)):
        near, far = (RED, BLUE) if inner else (BLUE, RED)
        for start, ink in ((0.0, near), (0.18, far)):
            ends = sorted((x + side * start, x + side * (start + 0.18)))
            pen.box(ends[0], y - height, ends[1], y + height, ink)


def _figure(pen: _Pen, facts: dict[str, str]) -> None:
    x, y = pen.rng.uniform(0.38, 0.62, 2)
    r, ink = pen.rng.uniform(0.24, 0.34), _pale(pen.rng, INKS[facts["color"]])
    if facts["shape"] == "circle":
        pen.disc(x, y, r, r, ink)
    elif facts["shape"] == "square":
        pen.box(x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r, ink)
    elif facts["shape"] == "triangle":
        pen.polygon([(x, y - r), (x + 0.95 * r, y + 0.75 * r), (x - 0.95 * r, y + 0.75 * r)], ink)
    else:
        turns = np.arange(10) * np.pi / 5
        reach = np.where(np.arange(10) % 2, 0.42, 1.1) * r
        pen.polygon(list(zip(x + reach * np.sin(turns), y - reach * np.cos(turns), strict=True)), ink)


DRAW = {"map": _map, "graph": _graph, "chain": _chain, "magnets": _magnets, "figure": _figure}


def draw(diagram: Diagram) -> Image.Image:
    """The diagram as an RGB image of `SIZE` pixels a side; the same for equal diagrams."""
    pen = _Pen(np.random.default_rng(diagram.seed))
    DRAW[diagram.kind](pen, diagram.facts)
    pixels = np.asarray(pen.image.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.int16)
    noise = pen.rng.integers(-6, 7, pixels.shape)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


# ---- Problems ------------------------------------------------------------------------------------------------------


def _pick(rng: np.random.Generator, values: Any) -> Any:
    return values[int(rng.integers(len(values)))]


def make_diagram(rng: np.random.Generator) -> Diagram:
    """A diagram of any kind, each value of its facts with equal chances."""
    kind = _pick(rng, tuple(KINDS))
    facts = {fact: _pick(rng, VALUES[fact]) for fact in KINDS[kind]}
    return Diagram(kind, facts, int(rng.integers(2**62)))


def describe(rng: np.random.Generator, facts: dict[str, str]) -> str:
    """Facts in words, in any order, one sentence each."""
    order = [list(facts)[i] for i in rng.permutation(len(facts))]
    return " ".join(_pick(rng, STATEMENTS[fact]).format(facts[fact]) for fact in order)


def _choices(rng: np.random.Generator, right: str, wrong: list[str]) -> tuple[list[str], int]:
    """2 to 4 choices in any order, and the index of the right one; all that is drawn is drawn with equal chances."""
    count = int(rng.integers(1, min(3, len(wrong)) + 1))
    picked = [right, *(wrong[i] for i in rng.permutation(len(wrong))[:count])]
    order = rng.permutation(len(picked))
    return [picked[i] for i in order], int(np.flatnonzero(order == 0)[0])


def make_problem(rng: np.random.Generator, images: float = IMAGE_SHARE) -> Problem:
    """One problem; `images` is the chance that it has an image."""
    diagram = make_diagram(rng)
    seen = rng.random() < images
    told = not seen and rng.random() < TEXT_KINDS
    caption = ""
    if seen or told:
        kind, fact = diagram.kind, _pick(rng, KINDS[diagram.kind])
        right, question = diagram.facts[fact], _pick(rng, QUESTIONS[fact])
        wrong = [value for value in VALUES[fact] if value != right]
        hint = describe(rng, diagram.facts) if told else _pick(rng, HINTS[kind]) if rng.random() < HINT_SHARE else ""
        caption = CAPTIONS[kind] if seen and rng.random() < CAPTION_SHARE else ""
    else:
        kind, fact, hint = "words", "", ""
        about = _pick(rng, tuple(WORDS))
        right, question = _pick(rng, VALUES[about]), WORDS[about]
        wrong = [value for other in WORDS if other != about for value in VALUES[other]]
    choices, answer = _choices(rng, right, wrong)
    record = {
        "question": question,
        "choices": choices,
        "answer": answer,
        "hint": hint,
        "image": "image.png" if seen else None,
        "task": "closed choice",
        "grade": f"grade{int(rng.integers(1, 13))}",
        "subject": SUBJECTS.get(kind, "natural science"),
        "topic": TOPICS[kind],
        "category": kind,
        "skill": fact or "words",
        "lecture": "",
        "solution": "",
    }
    return Problem(record, diagram if seen else None, caption, fact, diagram.facts if fact else {})


def make_problems(seed: int, count: int, images: float = IMAGE_SHARE) -> list[Problem]:
    """`count` problems; the same for the same arguments."""
    rng = np.random.default_rng(seed)
    return [make_problem(rng, images) for _ in range(count)]


def write(folder: str | Path, *, seed: int, train: int, val: int, test: int) -> Path:
    """Write a world in ScienceQA's official layout, at once or not at all, and return `folder`.

    The split of a problem is drawn by its place alone: train first, then val, then test, each with a seed of its own.
    A folder that is already there and complete for the same arguments is left as it is; another one is replaced.
    """
    folder = Path(folder)
    made = {"seed": seed, "train": train, "val": val, "test": test}
    found = read_json(folder / "world.json") or {}
    drawn = found.pop("files", {}).items()
    if found == made and drawn and drawn <= hashes(folder).items():
        return folder
    with whole(folder) as staging:
        records: dict[str, dict[str, Any]] = {}
        captions: dict[str, str] = {}
        splits: dict[str, list[str]] = {}
        for number, (split, count) in enumerate((("train", train), ("val", val), ("test", test))):
            splits[split] = []
            for problem in make_problems(seed * 3 + number, count):
                pid = str(len(records) + 1)
                splits[split].append(pid)
                records[pid] = problem.record | {"split": split}
                if problem.caption:
                    captions[pid] = problem.caption
                if problem.diagram is not None:
                    path = staging / "images" / split / pid / "image.png"
                    path.parent.mkdir(parents=True)
                    draw(problem.diagram).save(path)
        staging.mkdir(parents=True, exist_ok=True)
        contents = {"problems": records, "pid_splits": splits, "captions": {"captions": captions}}
        for name, content in contents.items():
            (staging / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        write_json(staging / "world.json", made | {"files": hashes(staging)})
    return folder
