"""One person's visit to the demo: the GIFs on show, what was asked about them, and its export."""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pandas as pd
from PIL import Image

from helpers.config import Profile
from helpers.corpora import own_gifs
from helpers.corpora.schema import CorpusError
from helpers.corpora.shapes import describe, make_world, write_gif
from helpers.corpora.tasks import MAX_COUNT, asks_for_count
from helpers.demo.found import find_bundle, given_folder, load_qa
from helpers.gifs.decode import GifRejected
from helpers.models.gif_qa.ask import Answer, GifQA, check_question
from helpers.workspace.disk import whole
from helpers.workspace.names import files_below, shown

BUILT_IN_SEED, BUILT_IN_GIFS = 2026, 6
MAX_GALLERY = 12  # GIFs taken from a folder: each is sent to the page
MAX_QUESTION = 300  # characters; TGIF-QA's longest question has 135
MAX_OPTIONS, MAX_OPTION = 20, 80  # number of options, characters of one
PREVIEW_BYTES = 300_000  # Jupyter sends a page about 1 MB/s at most: larger GIFs play as a small copy ...
PREVIEW_SIDE, PREVIEW_FRAMES = 128, 16  # ... of that many pixels a side and frames
THUMBNAIL_SIDE = 96  # pixels of a frame in the strip
GENERAL_QUESTIONS = ("what is moving ?", "what color is it ?", "where is it ?", "How many times does it jump ?")


@dataclass(frozen=True)
class Suggestion:
    """A question to try, with its options if it is a multiple-choice one."""

    question: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gif:
    """A GIF on show. name: unique on the page, ends in .gif; alt: what it shows, for those who cannot see it."""

    name: str
    data: bytes
    alt: str
    suggestions: tuple[Suggestion, ...]


def built_in_gifs(folder: Path, number: int = BUILT_IN_GIFS) -> list[Gif]:
    """GIFs of the built-in world with their questions; files that are not in `folder` yet are written there."""
    scenes, questions = make_world(BUILT_IN_SEED, 2 * number, "demo")
    folder.mkdir(parents=True, exist_ok=True)
    gifs = []
    for scene in scenes[::2]:  # twins of a pair look alike
        path = folder / f"{scene.color}-{scene.shape}.gif"
        if not path.is_file():
            with whole(path) as temporary:  # two pages may start at once
                write_gif(scene, temporary)
        rows = questions[questions["gif"] == scene.name]
        suggestions = [Suggestion(row.question, tuple(row.options)) for row in rows.itertuples()]
        gifs.append(Gif(path.name, path.read_bytes(), f"animated GIF: {describe(scene)}", tuple(suggestions)))
    return gifs


def read_uploads(value: Any) -> list[tuple[str, bytes]]:
    """Names and bytes of the files in a `FileUpload`'s value: a dict by name in ipywidgets 7, a tuple of dicts in 8."""
    if isinstance(value, Mapping):
        return [(name, bytes(file["content"])) for name, file in value.items()]
    return [(file["name"], bytes(file["content"])) for file in value]


def _file_name(name: str, taken: set[str]) -> str:
    """A file name from what a person called a GIF: plain letters, ending in .gif, not yet taken."""
    stem = re.sub(r"\.gif$", "", re.split(r"[\\/]", name)[-1], flags=re.IGNORECASE)
    stem = re.sub(r"[^\w.-]+", "-", stem).strip(".-")[:60] or "gif"
    names = [f"{stem}.gif", *(f"{stem}-{number}.gif" for number in range(2, len(taken) + 3))]
    return next(name for name in names if name not in taken)


def parse_options(text: str) -> list[str]:
    """Options as typed, separated by vertical bars; none for an empty text."""
    return [option.strip() for option in text.split("|")] if text.strip() else []


def check_size(question: str, options: Sequence[str]) -> None:
    """Raise ValueError in plain words for a question or options that are too long for the page."""
    if len(question) > MAX_QUESTION:
        raise ValueError(f"the question has {len(question)} characters; ask it in {MAX_QUESTION} or fewer")
    if len(options) > MAX_OPTIONS:
        raise ValueError(f"there are {len(options)} options; give {MAX_OPTIONS} or fewer")
    longest = max(map(len, options), default=0)
    if longest > MAX_OPTION:
        raise ValueError(f"an option has {longest} characters; use {MAX_OPTION} or fewer")


@dataclass
class Asked:
    """A question that was answered. right: the right answer as the person says, at first the model's own."""

    gif: Gif
    question: str
    options: tuple[str, ...]
    answer: Answer
    seconds: float
    blind: Answer | None = None
    right: str = field(init=False)

    def __post_init__(self) -> None:
        self.right = self.answer.text

    @property
    def task(self) -> str:
        """The task of TGIF-QA that this question is."""
        if self.options:
            return "transition" if re.search(r"\b(after|before)\b", self.question, re.IGNORECASE) else "action"
        return "count" if asks_for_count(self.question) else "frameqa"

    @property
    def distribution(self) -> list[tuple[str, float]]:
        """Answers with their probabilities: counts in their order, others best first and five at most."""
        answers = [(self.answer.text, self.answer.confidence), *self.answer.alternatives]
        if self.task == "count":
            return sorted(answers, key=lambda pair: int(pair[0]))
        return answers if self.options else answers[:5]

    def correct(self, text: str) -> None:
        """Take a person's answer as the right one; an empty text leaves the question out of the export.

        Raises ValueError for an answer that no such question can have.
        """
        text = " ".join(text.split())
        if text and self.options and text not in self.options:
            raise ValueError(f"{text!r} is none of the options: {', '.join(self.options)}")
        if text and self.task == "count" and not (re.fullmatch("[0-9]{1,2}", text) and 1 <= int(text) <= MAX_COUNT):
            raise ValueError(f"{text!r} is no count: give a whole number from 1 to {MAX_COUNT}, as the model counts")
        self.right = text


class Session:
    """One person's visit: the model that answers, the GIFs on show, and the questions asked so far.

    blind: folder of the blind twin, loaded when it is first asked; without one the same model answers with no frames.
    """

    def __init__(self, qa: GifQA, origin: str = "", blind: Path | None = None, profile: Profile | None = None) -> None:
        self.qa, self.origin = qa, origin
        self.gifs: list[Gif] = []
        self.history: list[Asked] = []
        self._blind_folder, self._blind = blind, None if blind else qa
        self._profile = profile or qa.model.profile
        # machines that share a disk have equal process ids, and one process may open two pages in a second
        self._name = f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}-{uuid4().hex[:8]}"

    @classmethod
    def open(cls, run_folder: Path, profile: Profile, bundle: str = "") -> Session:
        """Find the bundle (`find_bundle`) and load it."""
        found = find_bundle(run_folder, bundle)
        return cls(load_qa(found.folder, profile), found.origin, found.blind, profile)

    @property
    def has_blind_twin(self) -> bool:
        """Whether blind answers come from a model that was trained without video."""
        return self._blind_folder is not None

    def add(self, name: str, data: bytes, suggestions: Sequence[Suggestion] = ()) -> Gif:
        """Put a GIF on show under a file name made of `name`; one that is there already is not added twice.

        Raises GifRejected, naming the file, if it is no usable GIF.
        """
        for gif in self.gifs:
            if gif.data == data:
                return gif
        try:
            frames, _ = self.qa.sample(data, THUMBNAIL_SIDE)
        except GifRejected as error:
            raise GifRejected(f"{name} cannot be used: {error.reason}") from error
        name = _file_name(name, {gif.name for gif in self.gifs})
        suggestions = suggestions or [Suggestion(text) for text in GENERAL_QUESTIONS]
        gif = Gif(name, data, f"animated GIF {name}, of which {len(frames)} frames are looked at", tuple(suggestions))
        self.gifs.append(gif)
        return gif

    def add_folder(self, folder: Path | str) -> list[str]:
        """Put the first `MAX_GALLERY` GIFs of a folder on show, in front, and return what was left out, as sentences.

        A qa.csv in it, in the own-GIFs format, gives the suggested questions; GIFs that have some come first. Raises
        CorpusError if there is no folder.
        """
        folder = given_folder(folder)
        if not folder.is_dir():
            raise CorpusError(f"gallery: there is no folder {folder}")
        paths = [path for path in files_below(folder) if path.suffix.lower() == ".gif"]
        suggested: dict[str, list[Suggestion]] = {}
        notes, before = [], len(self.gifs)
        if (folder / "qa.csv").is_file():
            try:
                asked = own_gifs.load(folder, folder / "qa.csv", holdout=1)
                notes += [f"qa.csv: {row.item}: {row.reason}" for row in asked.rejects.itertuples()]
                for row in asked.questions.itertuples():
                    try:
                        check_size(row.question, row.options)
                        question, options = check_question(row.question, row.options)
                    except ValueError as error:
                        notes.append(f"qa.csv: a question about {row.gif} is not suggested: {error}")
                        continue
                    suggested.setdefault(row.gif, []).append(Suggestion(question, tuple(options)))
            except CorpusError as error:
                notes.append(str(error))
        names = sorted((path.relative_to(folder).as_posix() for path in paths), key=lambda name: name not in suggested)
        for name in names[:MAX_GALLERY]:
            try:
                self.add(shown(name), (folder / name).read_bytes(), suggested.get(name, ()))
            except GifRejected as error:
                notes.append(error.reason)
        if len(paths) > MAX_GALLERY:
            notes.append(f"{len(paths) - MAX_GALLERY} more GIFs of {folder.name} are not shown")
        self.gifs = self.gifs[before:] + self.gifs[:before]
        return notes

    def ask(self, gif: Gif, question: str, options: Sequence[str] = ()) -> Asked:
        """Answer as `GifQA.answer` does, and take the time.

        Raises ValueError in plain words for a question or options that cannot be asked.
        """
        check_size(question, options)
        began = time.perf_counter()
        answer = self.qa.answer(gif.data, question, list(options) or None)
        return Asked(gif, question.strip(), tuple(options), answer, time.perf_counter() - began)

    def ask_blind(self, asked: Asked) -> Answer:
        """What is answered to the same question without seeing the GIF; kept in `asked.blind`."""
        if asked.blind is None:
            self._blind = self._blind or load_qa(self._blind_folder, self._profile)
            asked.blind = self._blind.answer(None, asked.question, list(asked.options) or None)
        return asked.blind

    def frames(self, gif: Gif) -> np.ndarray:
        """The frames of a GIF that the model sees, uint8 [N, 96, 96, 3]."""
        return self.qa.sample(gif.data, THUMBNAIL_SIDE)[0]

    def picture(self, gif: Gif) -> bytes:
        """The GIF as the page plays it: itself, or a small copy of a large one."""
        if len(gif.data) <= PREVIEW_BYTES:
            return gif.data
        frames, times = self.qa.sample(gif.data, PREVIEW_SIDE)
        step = -(-len(frames) // PREVIEW_FRAMES)
        pictures = [Image.fromarray(frame).quantize(64, dither=Image.Dither.NONE) for frame in frames[::step]]
        starts = times[::step]
        durations = np.diff([*starts, starts[-1] + max(starts[-1] / len(starts), 100)]).clip(20)
        out = io.BytesIO()
        pictures[0].save(
            out, "GIF", save_all=True, append_images=pictures[1:], duration=durations.astype(int).tolist(), loop=0
        )
        return out.getvalue()

    def export(self, folder: Path) -> Path:
        """Write the history to a folder of this session's own inside `folder`, in the own-GIFs format.

        The GIFs and qa.csv lie side by side, ready for `run_all.sh --gifs ... --qa ...`. A question asked twice is
        written once, with the later answer; one without a right answer is left out. Returns the CSV's path. Raises
        ValueError if nothing is left.
        """
        last = {(asked.gif.name, asked.question, asked.options): asked for asked in self.history}
        kept = [asked for asked in last.values() if asked.right]
        if not kept:
            raise ValueError("there is nothing to export yet: ask a question first, and leave its right answer filled")
        rows = [
            {"gif": a.gif.name, "task": a.task, "question": a.question, "answer": a.right, "options": list(a.options)}
            for a in kept
        ]
        target = folder / self._name
        target.mkdir(parents=True, exist_ok=True)
        for asked in kept:
            with whole(target / asked.gif.name) as temporary:
                temporary.write_bytes(asked.gif.data)
        own_gifs.write_own_gifs_csv(pd.DataFrame(rows), target / "qa.csv")
        return target / "qa.csv"


def asked_table(asked: Sequence[Asked]) -> pd.DataFrame:
    """Questions and answers, one row each."""
    columns = ["gif", "task", "question", "options", "answer", "confidence", "blind answer", "seconds"]
    rows = [
        (
            one.gif.name,
            one.task,
            one.question,
            " | ".join(one.options),
            one.answer.text,
            one.answer.confidence,
            one.blind.text if one.blind else "",
            one.seconds,
        )
        for one in asked
    ]
    return pd.DataFrame(rows, columns=columns)
