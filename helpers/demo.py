"""The demo without its widgets: the bundle that answers, the GIFs on show, what was asked, and the panels as HTML.

`helpers/demo_page.py` puts this on a page. Every text that a person or a model wrote is escaped before it enters HTML.
"""

from __future__ import annotations

import base64
import html
import io
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image
from transformers.utils.logging import disable_progress_bar

from helpers import plots
from helpers.config import Profile
from helpers.corpora import MAX_COUNT, CorpusError, own_gifs
from helpers.corpora.shapes import describe, make_world, write_gif
from helpers.gifs import GifRejected
from helpers.models.gif_qa import Answer, BundleError, GifQA, asks_for_count, check_question, read_bundle
from helpers.stage import find_stage, read_manifest
from helpers.workspace import KAGGLE_INPUT, ModelNotFound, find_model, platform, repo_root

SHIPPED_BUNDLE = Path(__file__).resolve().parent / "assets" / "tiny" / "bundle"
BUILT_IN_SEED, BUILT_IN_GIFS = 2026, 6
MAX_GALLERY = 12  # GIFs taken from a folder: each is sent to the page
MAX_QUESTION = 300  # characters; TGIF-QA's longest question has 135
MAX_OPTIONS, MAX_OPTION = 20, 80  # number of options, characters of one
PREVIEW_BYTES = 300_000  # Jupyter sends a page about 1 MB/s at most: larger GIFs play as a small copy ...
PREVIEW_SIDE, PREVIEW_FRAMES = 128, 16  # ... of that many pixels a side and frames
THUMBNAIL_SIDE = 96  # pixels of a frame in the strip
GENERAL_QUESTIONS = ("what is moving ?", "what color is it ?", "where is it ?", "How many times does it jump ?")


# ---- The bundle ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FoundBundle:
    """A trained bundle and, in words, where it comes from."""

    folder: Path
    origin: str

    @property
    def blind(self) -> Path | None:
        """The folder of its blind twin, which notebook 03 writes beside it; None if it was not kept."""
        twin = self.folder.parent / "blind"
        return twin if (twin / "bundle.json").is_file() else None


def interactive() -> bool:
    """Whether a person has this notebook open: as a page of Voila, in Jupyter, or on Kaggle or Colab by hand."""
    if "SUITE_HEADLESS" in os.environ:  # set by the runner, which may itself be called from an open notebook
        return False
    as_page = os.environ.get("SERVER_SOFTWARE", "").startswith("voila")
    by_hand = os.environ.get("KAGGLE_KERNEL_RUN_TYPE") == "Interactive" or platform() == "colab"
    return as_page or by_hand or "JPY_SESSION_NAME" in os.environ


def find_bundle(run_folder: Path, given: str = "") -> FoundBundle:
    """The bundle to show: the one given, else this run's, else the newest attached one, else the shipped one.

    Raises BundleError if the one given is no bundle or takes no video, or if there is none at all.
    """
    if given:
        folder = given_folder(given)
        if not read_bundle(folder)["video"]:
            raise BundleError(f"{given} is a blind bundle, which sees no GIF: give the `bundle` folder beside it")
        return FoundBundle(folder, "given by the parameter `bundle`")
    own = find_stage(run_folder, "03_adapter_training") / "bundle"
    if (own / "bundle.json").is_file():
        return FoundBundle(own, f"trained in the run {own.parents[1].name}")
    if attached := newest_attached("bundle.json", _sees):
        return FoundBundle(attached, f"attached: {attached.relative_to(KAGGLE_INPUT).as_posix()}")
    if (SHIPPED_BUNDLE / "bundle.json").is_file():
        return FoundBundle(SHIPPED_BUNDLE, "the small one that ships with the suite; it knows only shapes")
    raise BundleError(
        f"there is no trained bundle: none in {run_folder}, none attached, none shipped in {SHIPPED_BUNDLE}. Run "
        "notebooks 01 to 03 first (./run_all.sh), or give the parameter `bundle` a bundle's folder."
    )


def given_folder(given: Path | str) -> Path:
    """A folder as typed: from where the notebook runs, or from the repository's root, where run_all.sh is called."""
    path = Path(given).expanduser()
    return (path if path.exists() else repo_root() / path).resolve()


def _sees(folder: Path) -> bool:
    """Whether a folder is a bundle that takes video."""
    try:
        return read_bundle(folder)["video"]
    except (ValueError, KeyError, AttributeError):  # another program's file of the same name, or an older format
        return False


def newest_attached(name: str, wanted: Callable[[Path], bool]) -> Path | None:
    """The attached folder with a file `name` that was finished last, of those that are `wanted`; None without one.

    The time is its stage's, or its file's where it came without stage.json.
    """
    found = []
    for path in sorted(KAGGLE_INPUT.glob(f"**/{name}")) if KAGGLE_INPUT.is_dir() else []:
        if not wanted(path.parent):
            continue
        manifest = read_manifest(path.parents[1])
        written = datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat()
        found.append((manifest["finished"] if manifest else written, path.parent))
    return max(found)[1] if found else None


def load_qa(folder: Path, profile: Profile) -> GifQA:
    """Load a bundle with the base models that it names; where those are not to be had, with the profile's.

    Raises BundleError if the profile's are other models, ModelNotFound with every way out if there are none.
    """
    disable_progress_bar()  # a page has no use for bars of loaded weights
    try:
        return GifQA.from_pretrained(folder)
    except ModelNotFound:
        language, video = profile.language_model, profile.encoder
        return GifQA.from_pretrained(
            folder, find_model(language.model, language.revision), find_model(video.model, video.revision)
        )


# ---- GIFs ----------------------------------------------------------------------------------------------------------


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
            partial = path.with_suffix(f".{os.getpid()}.part")  # two pages may start at once
            write_gif(scene, partial)
            partial.replace(path)
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


# ---- Questions -----------------------------------------------------------------------------------------------------


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
        if text and self.task == "count" and not (re.fullmatch("[0-9]{1,2}", text) and int(text) <= MAX_COUNT):
            raise ValueError(f"{text!r} is no count: give a whole number from 0 to {MAX_COUNT}")
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
        self._name = f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"

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
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".gif" and path.is_file())
        suggested: dict[str, list[Suggestion]] = {}
        notes, before = [], len(self.gifs)
        if (folder / "qa.csv").is_file():
            try:
                for row in own_gifs.load(folder, folder / "qa.csv", holdout=1).questions.itertuples():
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
                self.add(name, (folder / name).read_bytes(), suggested.get(name, ()))
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
            (target / asked.gif.name).write_bytes(asked.gif.data)
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


# ---- Panels --------------------------------------------------------------------------------------------------------

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


def image(data: bytes, alt: str, kind: str = "gif", style: str = "gq-gif") -> str:
    """An img element that carries its own data; animated GIFs play."""
    encoded = base64.b64encode(data).decode()
    return f'<img class="{style}" alt="{html.escape(alt)}" src="data:image/{kind};base64,{encoded}">'


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
            f"<li>{image(out.getvalue(), alt, 'jpeg', 'top' if number == top else '')}"
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
