"""The built-in world: GIFs of shapes that act on a scene, with questions in TGIF-QA's schema.

Every GIF shows one large shape (the subject) at a place, and one to five small shapes of another kind and colour in
the corners. The subject rests, repeats an action k times, then repeats another one m times; some GIFs add a third
action, done once. GIFs come in counterfactual pairs: both of a pair are asked the same questions and give different
answers, so that the question alone tells nothing:

    first twin   A x k, then B x m      "How many times does the star A ?"   k / m
    second twin  A x m, then C x k      "What does the star do k times ?"    A / C
                                        "What does the star do after A ?"    B / C

The files are ordinary GIFs written with Pillow, with what real ones bring along: several sizes, frame times,
palettes, transparency, disposal methods, interlacing, noise.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from helpers.corpora import tgif_qa
from helpers.corpora.own_gifs import write_own_gifs_csv
from helpers.corpora.schema import Corpus
from helpers.workspace.disk import file_sha256, read_json, whole, write_json

SHAPES = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "cross": "crosses",
    "heart": "hearts",
}
COLORS = {
    "red": (225, 30, 30),
    "green": (30, 195, 60),
    "blue": (40, 70, 235),
    "yellow": (250, 228, 40),
    "purple": (165, 50, 205),
    "orange": (250, 140, 20),
}
PLACES = {
    "grass": (58, 92, 48),
    "beach": (206, 184, 136),
    "snow": (232, 238, 244),
    "lake": (96, 136, 164),
    "road": (96, 96, 100),
    "space": (14, 14, 34),
}
# An action and the word for a subject that is doing it.
ACTIONS = {
    "jump": "jumping",
    "duck": "ducking",
    "slide left": "sliding left",
    "slide right": "sliding right",
    "blink": "blinking",
    "grow": "growing",
    "shrink": "shrinking",
    "flash": "flashing",
}
NUMBERS = ("one", "two", "three", "four", "five")
MAX_FRAMES = 64
# Unordered pairs (k, m) in which each number from 1 to 10 stands twice: the wide family of repetition counts.
WIDE_COUNTS = (
    (10, 1),
    (10, 2),
    (9, 3),
    (9, 1),
    (8, 4),
    (8, 2),
    (7, 5),
    (7, 3),
    (6, 4),
    (6, 5),
)
SHORT_COUNTS = ((1, 2), (1, 3), (2, 3), (1, 4), (2, 4))
# Corners of the central square, which the subject never enters (fractions of the square's side).
ITEM_SLOTS = [(x, y) for x, y in ((0.09, 0.09), (0.265, 0.09), (0.09, 0.265))]
ITEM_SLOTS += [(1 - x, y) for x, y in ITEM_SLOTS[:3]] + [(x, 1 - y) for x, y in ITEM_SLOTS[:3]]
ITEM_SLOTS += [(1 - x, 1 - y) for x, y in ITEM_SLOTS[:3]]
ITEM_RADIUS, SUBJECT_RADIUS, SHIFT = 0.085, 0.17, 0.22

TASK_FILES = {
    "count": "count",
    "action": "action",
    "transition": "transition",
    "frameqa": "frameqa",
}
FRAMEQA_TYPES = ("object", "number", "color", "location")


@dataclass(frozen=True)
class Scene:
    """All that decides what a GIF shows: `blocks` are (action, times) in order, `states` one entry a frame."""

    name: str
    shape: str
    color: str
    place: str
    item_shape: str
    item_color: str
    items: int
    blocks: tuple[tuple[str, int], ...]
    states: tuple[str | None, ...]
    durations_ms: tuple[int, ...]
    seed: int


def pick(rng: np.random.Generator, choices: Iterable[Any], without: Iterable[Any] = ()) -> Any:
    """One of the choices, each as likely as the others; none of `without`."""
    left = [c for c in choices if c not in without]
    return left[int(rng.integers(len(left)))]


def _timeline(rng: np.random.Generator, blocks: tuple[tuple[str, int], ...]) -> tuple[str | None, ...]:
    """One state a frame (an action, or None at rest); phases are long enough to be seen in 48 samples."""
    cycles = sum(times for _, times in blocks)
    tempos = [(1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (3, 3), (3, 4), (4, 6)]
    while True:
        low, high = tempos[int(rng.integers(len(tempos)))]
        lengths = rng.integers(low, high + 1, size=2 * cycles + 1)
        # Above 48 frames a phase of a single frame could fall between two samples of the largest view.
        if 6 <= lengths.sum() <= MAX_FRAMES and (lengths.sum() <= 48 or low >= 2):
            break
    states: list[str | None] = [None] * int(lengths[0])
    actions = [action for action, times in blocks for _ in range(times)]
    for action, active, rest in zip(actions, lengths[1::2], lengths[2::2], strict=True):
        states += [action] * int(active) + [None] * int(rest)
    return tuple(states)


def _durations(rng: np.random.Generator, count: int) -> tuple[int, ...]:
    """Frame times in ms (multiples of 10): jittered, and with a held frame or two where all frames are sampled."""
    base = int(rng.integers(5, 13))
    centiseconds = base + rng.integers(-1, 2, size=count)
    if count <= 48 and rng.random() < 0.5:
        held = rng.integers(count, size=int(rng.integers(1, 3)))
        centiseconds[held] = base * int(rng.integers(3, 6))
    return tuple(int(c) * 10 for c in centiseconds)


def make_pair(rng: np.random.Generator, names: tuple[str, str]) -> tuple[tuple[Scene, Scene], list[dict]]:
    """Two scenes that answer the same questions differently, and the questions (rows of the QA table)."""
    shape = pick(rng, SHAPES)
    item_shape = pick(rng, SHAPES, [shape])
    a, b, c, x = rng.permutation(list(ACTIONS))[:4].tolist()
    family = WIDE_COUNTS if rng.random() < 0.6 else SHORT_COUNTS
    k, m = rng.permutation(family[int(rng.integers(len(family)))]).tolist()
    after, extra, extra_first = rng.random(3) < (0.5, 0.4, 0.5)
    colors = rng.permutation(list(COLORS))[:4].tolist()
    places = rng.permutation(list(PLACES))[:2].tolist()
    items = (1 + rng.permutation(len(NUMBERS))[:2]).tolist()
    scenes = []
    for twin, ((first, times), (second, others)) in enumerate((((a, k), (b, m)), ((a, m), (c, k)))):
        blocks = [(first, times), (second, others)] if after else [(second, others), (first, times)]
        if extra:
            blocks.insert(0 if extra_first else 2, (x, 1))
        states = _timeline(rng, tuple(blocks))
        scene = Scene(
            name=names[twin],
            shape=shape,
            color=colors[twin],
            place=places[twin],
            item_shape=item_shape,
            item_color=colors[2 + twin],
            items=items[twin],
            blocks=tuple(blocks),
            states=states,
            durations_ms=_durations(rng, len(states)),
            seed=int(rng.integers(2**31)),
        )
        scenes.append(scene)
    asked = pick(rng, [n for n in (k, m) if n > 1])
    rows = list(_questions(rng, scenes, (a, b, c, x), (k, m), asked, bool(after)))
    return (scenes[0], scenes[1]), rows


def _questions(rng, scenes, actions, counts, asked, after) -> Iterator[dict]:
    """The questions of a pair: each text is drawn once and asked of both twins."""
    a, b, c, x = actions
    k, m = counts
    shape, items = scenes[0].shape, SHAPES[scenes[0].item_shape]

    def ask(task, texts, answers, options=None, kind=""):
        text = pick(rng, texts)
        for scene, answer in zip(scenes, answers, strict=True):
            order = [] if options is None else rng.permutation(options).tolist()
            label = {"frameqa": -1, "count": int(answer) if task == "count" else 0}.get(task)
            yield {
                "gif": scene.name,
                "task": task,
                "question": text,
                "options": order,
                "answer": answer,
                "label": order.index(answer) if order else label,
                "type": kind,
            }

    def times(n):
        return str(n if n > 1 else 0)  # TGIF-QA writes 0 for an action done once

    yield from ask(
        "count",
        [
            f"How many times does the {shape} {a} ?",
            f"How many times does the {shape} {a} in the clip ?",
        ],
        (times(k), times(m)),
    )
    others = [n for n in ACTIONS if n not in actions]
    yield from ask(
        "action",
        [
            f"What does the {shape} do {asked} times ?",
            f"What does the {shape} do exactly {asked} times ?",
        ],
        (a, c) if asked == k else (b, a),
        [a, b, c, x, pick(rng, others)],
    )
    when = "after" if after else "before"
    yield from ask(
        "transition",
        [
            f"What does the {shape} do {when} {a} ?",
            f"What does the {shape} do right {when} {a} ?",
        ],
        (b, c),
        [b, c, x, *rng.permutation(others)[:2].tolist()],
    )
    yield from ask(
        "frameqa",
        [
            f"how many {items} are there ?",
            f"how many small {items} can be seen ?",
            f"how many {items} stand around ?",
        ],
        [NUMBERS[s.items - 1] for s in scenes],
        kind="number",
    )
    place_texts = [
        f"where is the {shape} ?",
        f"where does the {shape} move ?",
        f"where can the {shape} be seen ?",
    ]
    yield from ask("frameqa", place_texts, [s.place for s in scenes], kind="location")
    if rng.random() < 0.5:
        texts = [
            f"what is the color of the {shape} ?",
            f"what color is the {shape} ?",
            f"what color has the {shape} ?",
        ]
        yield from ask("frameqa", texts, [s.color for s in scenes], kind="color")
    else:
        texts = [
            f"what is the color of the {items} ?",
            f"what color are the small {items} ?",
        ]
        yield from ask("frameqa", texts, [s.item_color for s in scenes], kind="color")


OBJECT_QUESTIONS = (
    "what is moving ?",
    "what shape is moving ?",
    "what is the large shape ?",
)
ITEM_QUESTIONS = ("what are the small shapes ?", "what stands in the corners ?")


def make_world(seed: int, gifs: int, prefix: str) -> tuple[list[Scene], pd.DataFrame]:
    """`gifs` scenes (an even number, in pairs) and their questions, without split and ids. Deterministic by seed."""
    if gifs < 2 or gifs % 2:
        raise ValueError(f"the shapes world is made of pairs: ask for an even number of GIFs, not {gifs}")
    rng = np.random.default_rng([seed, *prefix.encode()])
    scenes, rows = [], []
    for pair in range(gifs // 2):
        names = (
            f"shapes_{prefix}_{2 * pair:05d}",
            f"shapes_{prefix}_{2 * pair + 1:05d}",
        )
        twins, questions = make_pair(rng, names)
        scenes += twins
        rows += questions
    # "What is moving ?" reads the same for every GIF, so its counterfactual is any GIF with another subject.
    for scene in scenes:
        texts, answer = (OBJECT_QUESTIONS, scene.shape) if rng.random() < 0.5 else (ITEM_QUESTIONS, scene.item_shape)
        row = {
            "gif": scene.name,
            "task": "frameqa",
            "question": pick(rng, texts),
            "options": [],
            "answer": answer,
        }
        rows.append(row | {"label": -1, "type": "object"})
    return scenes, pd.DataFrame(rows)


# Drawing ------------------------------------------------------------------------------------------------------------


def _outline(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    """Corner points of a shape of radius r around (x, y), in pixels."""
    if shape == "square":
        unit = [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]
    elif shape == "triangle":
        unit = [(0, -1), (1, 0.85), (-1, 0.85)]
    elif shape == "cross":
        t = 0.34
        unit = [
            (-t, -1),
            (t, -1),
            (t, -t),
            (1, -t),
            (1, t),
            (t, t),
            (t, 1),
            (-t, 1),
            (-t, t),
            (-1, t),
            (-1, -t),
            (-t, -t),
        ]
    elif shape == "star":
        turns = [(i * math.pi / 5 - math.pi / 2, 1.1 if i % 2 == 0 else 0.45) for i in range(10)]
        unit = [(d * math.cos(t), d * math.sin(t)) for t, d in turns]
    elif shape == "heart":
        turns = [2 * math.pi * i / 24 for i in range(24)]
        unit = [
            (
                math.sin(t) ** 3,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 15,
            )
            for t in turns
        ]
    else:
        turns = [2 * math.pi * i / 24 for i in range(24)]
        unit = [(math.cos(t), math.sin(t)) for t in turns]
    return [(x + r * px, y + r * py) for px, py in unit]


def _background(rng: np.random.Generator, place: str, width: int, height: int) -> np.ndarray:
    """A textured place, uint8 [height, width, 3]."""
    picture = np.empty((height, width, 3), np.float32)
    picture[:] = PLACES[place]
    rows, columns = np.mgrid[:height, :width]
    side = min(width, height)
    if place == "lake":
        picture += (14 * np.sin(rows * 2 * math.pi * 9 / side + 1.5 * np.sin(columns * 7 / side)))[..., None]
    elif place == "beach":
        picture += (12 * np.sin((rows + columns) * 2 * math.pi * 4 / side))[..., None]
    elif place == "road":
        line = (abs(columns - width / 2) < side * 0.02) & ((rows * 10 // side) % 2 == 0)
        picture[line] = (220, 215, 190)
    elif place == "space":
        picture[rng.random((height, width)) < 0.02] = (225, 225, 225)
    elif place == "grass":
        picture[rng.random((height, width)) < 0.15] += 22
    else:
        picture[rng.random((height, width)) < 0.06] -= (40, 28, 12)
    picture += rng.normal(0, 5, (height, width, 1))
    return picture.clip(0, 255).astype(np.uint8)


def _draw(
    image: Image.Image,
    shape: str,
    color: tuple[int, int, int],
    x: float,
    y: float,
    r: float,
) -> None:
    points = _outline(shape, x, y, r)
    draw = ImageDraw.Draw(image)
    draw.polygon(points, fill=color)
    draw.line(
        [*points, points[0]],
        fill=(0, 0, 0) if sum(color) > 250 else (250, 250, 250),
        width=1,
    )


def draw_frames(scene: Scene) -> list[Image.Image]:
    """The scene's frames as RGB pictures of 64 to 160 pixels a side, one a state."""
    rng = np.random.default_rng(scene.seed)
    width, height = (int(n) for n in rng.integers(64, 161, size=2))
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    background = Image.fromarray(_background(rng, scene.place, width, height))
    for slot in rng.permutation(len(ITEM_SLOTS))[: scene.items]:
        u, v = ITEM_SLOTS[slot]
        _draw(
            background,
            scene.item_shape,
            COLORS[scene.item_color],
            left + u * side,
            top + v * side,
            ITEM_RADIUS * side,
        )
    u, v = 0.5 + rng.uniform(-0.03, 0.03, size=2)
    radius = SUBJECT_RADIUS * rng.uniform(0.93, 1.07)
    flicker = rng.random() < 0.3
    dust = 8 * side // 64
    frames = []
    for state in scene.states:
        picture = np.array(background)
        # Dust also keeps Pillow from merging equal frames into one.
        picture[rng.integers(height, size=dust), rng.integers(width, size=dust)] = rng.choice((0, 255))
        if flicker:
            picture = (picture + rng.normal(0, 3, (height, width, 1))).clip(0, 255).astype(np.uint8)
        frame = Image.fromarray(picture)
        x, y, r, color = u, v, radius, COLORS[scene.color]
        shift = SHIFT * rng.uniform(0.9, 1.1)
        x += {"slide left": -shift, "slide right": shift}.get(state, 0)
        y += {"jump": -shift, "duck": shift}.get(state, 0)
        r *= {"grow": 1.5, "shrink": 0.5}.get(state, 1)
        if state == "flash":
            color = (255, 255, 255)
        if state != "blink":
            _draw(frame, scene.shape, color, left + x * side, top + y * side, r * side)
        frames.append(frame)
    return frames


def write_gif(scene: Scene, file: Path | BinaryIO) -> None:
    """Writes the scene as a GIF whose palettes, transparency, disposal and interlacing vary with its seed."""
    rng = np.random.default_rng([scene.seed, 1])
    frames = draw_frames(scene)
    style = pick(rng, ("local palettes", "global palette", "full frames", "transparent rim", "interlaced"))
    options: dict = {"disposal": int(rng.integers(0, 2)), "loop": 0}
    if style in ("local palettes", "interlaced"):
        frames = [frame.quantize(200, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE) for frame in frames]
    elif style == "transparent rim":
        mask = Image.new("L", frames[0].size, 0)
        ImageDraw.Draw(mask).rounded_rectangle((0, 0, mask.width - 1, mask.height - 1), radius=3, fill=255)
        for frame in frames:
            frame.putalpha(mask)
        options["disposal"] = 2
    else:
        # One frame of each state side by side: a palette of a single frame would lack, say, the white of a flash.
        shown = [frames[scene.states.index(state)] for state in dict.fromkeys(scene.states)]
        sheet = Image.fromarray(np.concatenate([np.asarray(frame) for frame in shown], axis=1))
        palette = sheet.quantize(200, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
        options["disposal"] = 2 if style == "full frames" else options["disposal"]
    if style == "interlaced":
        data = _interlaced(frames, scene.durations_ms)
    else:
        stored = io.BytesIO()
        durations = list(scene.durations_ms)
        frames[0].save(
            stored, "GIF", save_all=True, append_images=frames[1:], duration=durations, optimize=False, **options
        )
        data = stored.getvalue()
    if isinstance(file, Path):
        file.write_bytes(data)
    else:
        file.write(data)


def _interlaced(frames: list[Image.Image], durations_ms: tuple[int, ...]) -> bytes:
    """An animation of interlaced frames with local palettes, which Pillow writes for single pictures only.

    Each frame is saved as a GIF of its own; its colour table and picture are put behind a graphic control extension
    with the frame's time (GIF89a specification, sections 18 to 23).
    """
    out = io.BytesIO()
    for number, (frame, duration) in enumerate(zip(frames, durations_ms, strict=True)):
        single = io.BytesIO()
        frame.save(single, "GIF", interlace=1)
        data = single.getvalue()
        bits = data[10] & 7
        table = data[13 : 13 + 3 * 2 ** (bits + 1)]
        start = 13 + len(table)
        while data[start] == 0x21:  # skip extensions: introducer, label, then sub-blocks that each tell their length
            start += 2
            while data[start]:
                start += data[start] + 1
            start += 1
        if number == 0:
            out.write(b"GIF89a" + data[6:10] + b"\0\0\0")
            out.write(b"\x21\xff\x0bNETSCAPE2.0\x03\x01\0\0\0")
        out.write(b"\x21\xf9\x04\x04" + (duration // 10).to_bytes(2, "little") + b"\0\0")
        out.write(data[start : start + 9] + bytes([0x80 | data[start + 9] | bits]) + table)
        out.write(data[start + 10 : -1])
    return out.getvalue() + b"\x3b"


# Data sets on disk --------------------------------------------------------------------------------------------------


def _write_gifs(folder: Path, scenes: list[Scene], what: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    note = folder.parent / f".{what}.json"  # without it nothing tells a GIF that a stop of the machine has cut
    known = read_json(note) or {}
    for scene in tqdm(scenes, desc=f"drawing {what} GIFs", unit="GIF", mininterval=1):
        path = folder / f"{scene.name}.gif"
        if not path.is_file() or file_sha256(path) != known.get(path.name):
            write_gif(scene, path)  # a half-written one is told by its digest
    drawn = {f"{scene.name}.gif": file_sha256(folder / f"{scene.name}.gif") for scene in scenes}
    if drawn != known:
        write_json(note, drawn)


def _splits(seed: int, train: int, test: int) -> Iterator[tuple[str, list[Scene], pd.DataFrame]]:
    for split, gifs in (("train", train), ("test", test)):
        if gifs:
            yield (split, *make_world(seed, gifs, split))


def write_tgif_qa(folder: Path, seed: int, train: int, test: int) -> Path:
    """Writes GIFs and TGIF-QA's question files (tab-separated, CRLF, 0-based answers); returns the GIF folder."""
    folder = Path(folder)
    key = 0
    for split, scenes, questions in _splits(seed, train, test):
        _write_gifs(folder / "gifs", scenes, split)
        keys = {scene.name: key + n for n, scene in enumerate(scenes)}
        key += len(scenes)
        scene_of = {scene.name: scene for scene in scenes}
        for task, rows in questions.groupby("task", sort=False):
            _write_task_file(
                folder / f"{split.title()}_{task}_question.csv",
                task,
                rows,
                keys,
                scene_of,
            )
    return folder / "gifs"


_ID_PREFIX = {
    "count": "COUNT",
    "action": "ACTION",
    "transition": "TRANS",
    "frameqa": "FRAMEQA",
}


def _write_task_file(
    path: Path,
    task: str,
    rows: pd.DataFrame,
    keys: dict[str, int],
    scenes: dict[str, Scene],
) -> None:
    header = {
        "count": ["gif_name", "question", "answer", "vid_id", "key"],
        "frameqa": [
            "gif_name",
            "question",
            "answer",
            "type",
            "vid_id",
            "key",
            "description",
        ],
    }.get(
        task,
        [
            "gif_name",
            "question",
            "a1",
            "a2",
            "a3",
            "a4",
            "a5",
            "answer",
            "vid_id",
            "key",
        ],
    )
    lines = []
    for number, row in enumerate(rows.itertuples(), 1):
        ids = [f"{_ID_PREFIX[task]}{number}", keys[row.gif]]
        if task == "count":
            lines.append([row.gif, row.question, row.answer, *ids])
        elif task == "frameqa":
            kind = FRAMEQA_TYPES.index(row.type)
            lines.append(
                [
                    row.gif,
                    row.question,
                    row.answer,
                    kind,
                    *ids,
                    describe(scenes[row.gif]),
                ]
            )
        else:
            lines.append([row.gif, row.question, *row.options, row.label, *ids])
    with whole(path) as temporary, temporary.open("w", newline="", encoding="ascii") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\r\n", quoting=csv.QUOTE_NONE)
        writer.writerow(header)
        writer.writerows(lines)


def describe(scene: Scene) -> str:
    """A caption of the scene in TGIF's tokenised style. Never given to a model that answers."""
    items = scene.item_shape if scene.items == 1 else SHAPES[scene.item_shape]
    doing = " then ".join(ACTIONS[action] for action, _ in scene.blocks)
    return (
        f"a {scene.color} {scene.shape} is {doing} on the {scene.place} "
        f"near {NUMBERS[scene.items - 1]} small {scene.item_color} {items} ."
    )


def write_own_gifs(folder: Path, seed: int, train: int, test: int) -> Path:
    """Writes a fresh world in the own-GIFs format (GIF files and `qa.csv`); returns the CSV's path."""
    folder = Path(folder)
    tables = []
    for split, scenes, questions in _splits(seed, train, test):
        _write_gifs(folder, scenes, split)
        tables.append(questions.assign(split=split))
    if not tables:
        raise ValueError("nothing to write: ask for at least two training or test GIFs")
    table = pd.concat(tables, ignore_index=True)
    path = folder / "qa.csv"
    write_own_gifs_csv(table.assign(gif=table["gif"] + ".gif"), path)
    return path


def load(profile, folder: Path) -> Corpus:
    """Writes the profile's world under `folder` (once) and reads it back as any TGIF-QA copy is read."""
    world = profile.shapes
    gifs = write_tgif_qa(Path(folder), world.seed, world.train, world.test)
    return tgif_qa.load(Path(folder), gifs=gifs)
