"""The demo's science tab without its widgets: the ADEM-VL that answers, the problems on show, the panels as HTML."""

from __future__ import annotations

import html
import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from helpers.answers.regions import attended, worth
from helpers.answers.scienceqa import predict
from helpers.config import AdemConfig, Profile, as_now, tiny_adem
from helpers.corpora import diagrams
from helpers.corpora.schema import CorpusError
from helpers.corpora.scienceqa import LETTERS, find_attached, image_faults, load, open_image
from helpers.demo.found import given_folder
from helpers.demo.panels import bars
from helpers.demo.session import BUILT_IN_SEED
from helpers.models.adem_vl.model import AdemVL
from helpers.plots import scienceqa as plots_scienceqa
from helpers.plots.look import image_tag
from helpers.scoring.scienceqa import WRONG
from helpers.stage.manifest import find_stage, newest_attached, read_manifest
from helpers.training.adem_vl import load_model
from helpers.workspace.inputs import attached_name
from helpers.workspace.weights import ModelNotFound

SHIPPED_ADEM = Path(__file__).resolve().parents[1] / "assets" / "tiny" / "adem_vl"
STAGE = "05_adem_scienceqa"
BUILT_IN_PROBLEMS = 60  # drawn at random; the page shows the first of each skill
MAX_PROBLEMS = 12
SMALL_COST = 0.05  # nats; a map of smaller ones would show noise
PICTURE_SIDE = 220  # pixels of the longer side of a picture on the page


@dataclass(frozen=True)
class FoundAdem:
    """A trained ADEM-VL: its folder, where it comes from in words, its settings, and the data it was trained on."""

    folder: Path
    origin: str
    config: AdemConfig
    data: Path | None = None


def find_adem(run_folder: Path, profile: Profile) -> FoundAdem:
    """The ADEM-VL to show: this run's, else the newest attached one, else the shipped one (only diagrams)."""
    own = find_stage(run_folder, STAGE) / "adem_vl"
    if (own / "adem_vl.json").is_file():
        return _found(own, f"trained in the run {own.parents[1].name}", profile)
    # A text-only twin is a folder of the same kind, beside the model.
    if attached := newest_attached("adem_vl.json", lambda folder: folder.name == "adem_vl"):
        origin = f"attached: {attached_name(attached)}"
        return _found(attached, origin, profile)
    return FoundAdem(
        SHIPPED_ADEM, "the small one that ships with the suite; it knows only its own diagrams", tiny_adem()
    )


def _found(folder: Path, origin: str, profile: Profile) -> FoundAdem:
    manifest = read_manifest(folder.parent)
    if not manifest:
        return FoundAdem(folder, origin, profile.adem)
    settings = manifest["settings"]
    # A manifest leaves out what only paces a run.
    config = AdemConfig.model_validate(profile.adem.model_dump() | as_now("adem", settings["profile"]["adem"]))
    # A folder that was given, or what was fetched into the stage's own.
    places = [Path(given)] if (given := settings["parameters"]["data"]) else [folder.parent / "world"]
    places = places if given or config.corpus == "scienceqa" else []
    return FoundAdem(folder, origin, config, next((p for p in places if (p / "problems.json").is_file()), None))


def find_problems(folder: Path, found: FoundAdem, data: str = "") -> pd.DataFrame:
    """At most `MAX_PROBLEMS` test problems, one a skill, those with an image first.

    Of `data`, a folder in ScienceQA's official layout, if given; else of what the model was trained on, or of the
    attached ScienceQA if it was trained on that; else of the built-in world, which is drawn into `folder`. One whose
    image cannot be read is left out. Raises
    CorpusError if `data` is no such folder.
    """
    if data:
        source = given_folder(data)
    else:
        attached = find_attached() if found.config.corpus == "scienceqa" else None
        source = (
            found.data or attached or diagrams.write(folder, seed=BUILT_IN_SEED, train=0, val=0, test=BUILT_IN_PROBLEMS)
        )
    captions = (source / "captions.json").is_file()
    problems = load(source, splits=("test",), captions=captions, decode=False).problems
    problems = problems.sort_values("image", key=lambda path: path == "", kind="stable").drop_duplicates("skill")
    problems = problems.head(MAX_PROBLEMS)
    broken = image_faults(dict(zip(problems["pid"], problems["image"], strict=True)))
    return problems[~problems["pid"].isin(broken)].reset_index(drop=True)


@dataclass(frozen=True)
class ScienceAnswer:
    """What the model says to a problem.

    scores: log-probability of each choice's letter among the whole vocabulary. written: the token that it writes;
    prediction: index of the choice of that letter, `WRONG` if it is no letter of a choice. seconds: for all of it, at
    first with the model's loading. blind_scores: the same without the image, None for a problem that has none.
    """

    problem: Mapping[str, Any]
    scores: tuple[float, ...]
    written: str
    prediction: int
    seconds: float
    blind_scores: tuple[float, ...] | None

    @property
    def text(self) -> str:
        """The choice that was answered, in words."""
        return choice(self.problem, self.prediction) if self.prediction != WRONG else f"no choice ({self.written!r})"


class Science:
    """The science tab's model, loaded when it is first asked, and its problems (rows as of `corpora.scienceqa`)."""

    def __init__(self, found: FoundAdem, problems: pd.DataFrame) -> None:
        self.found, self.problems = found, problems.to_dict("records")
        self._model: AdemVL | None = None

    @classmethod
    def open(cls, run_folder: Path, profile: Profile, folder: Path, data: str = "") -> tuple[Science, list[str]]:
        """Find the model (`find_adem`) and the problems (`find_problems`); sentences tell what was not to be had."""
        found = find_adem(run_folder, profile)
        try:
            return cls(found, find_problems(folder, found, data)), []
        except CorpusError as error:
            return cls(found, find_problems(folder, replace(found, config=tiny_adem(), data=None))), [str(error)]

    @property
    def model(self) -> AdemVL:
        """The model; its base models are those that it names, or where those are not to be had, the settings'.

        Raises ModelNotFound with every way out if there are none, AdemVLError if the settings' are others.
        """
        if self._model is None:
            try:
                self._model = AdemVL.from_pretrained(self.found.folder)
            except ModelNotFound:
                self._model = load_model(self.found.config, self.found.folder)
        return self._model

    def ask(self, problem: Mapping[str, Any]) -> ScienceAnswer:
        """Answer as `answers.scienceqa.predict` does, and take the time. ValueError for one that is too long."""
        began = time.perf_counter()
        model, config, table = self.model, self.found.config, pd.DataFrame([problem])
        row = predict(model, table, config, progress=False).iloc[0]
        if not row["scores"]:
            raise ValueError(f"its text is longer than the {config.max_tokens} tokens that the model was trained on")
        blind = predict(model, table, config, blind=True, progress=False).iloc[0] if problem["image"] else None
        scores = None if blind is None else tuple(blind["scores"])
        seconds = time.perf_counter() - began
        return ScienceAnswer(problem, tuple(row["scores"]), row["generated"], int(row["prediction"]), seconds, scores)

    def regions(self, problem: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """`answers.regions.attended` and `answers.regions.worth` of a problem with an image, [grid, grid] each."""
        return attended(self.model, problem, self.found.config), worth(self.model, problem, self.found.config)

    def still(self, number: int = 3) -> Figure | None:
        """The first image problems as one figure, for a notebook that runs without a page; None if there is none."""
        shown, answers = [], []
        for problem in self.problems:
            if problem["image"] and len(shown) < number:
                try:
                    answers.append(self.ask(problem).text)
                except ValueError:  # too long, as the page says when it is picked
                    continue
                shown.append(problem)
        if not shown:
            return None
        looks, costs = zip(*(self.regions(problem) for problem in shown), strict=True)
        return plots_scienceqa.regions_over_images(pd.DataFrame(shown), looks, costs, answers)


# ---- Panels --------------------------------------------------------------------------------------------------------


def choice(problem: Mapping[str, Any], index: int) -> str:
    """A choice with its letter."""
    return f"({LETTERS[index]}) {problem['choices'][index]}"


def _picture(path: str) -> Image.Image:
    """A problem's image at the size of the page; small ones are enlarged without smoothing, so that pixels show."""
    picture = open_image(path)
    scale = PICTURE_SIDE / max(picture.size)
    kind = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return picture.resize([max(1, round(side * scale)) for side in picture.size], kind)


def _png(picture: Image.Image, alt: str) -> str:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return image_tag(out.getvalue(), alt, "png", "science")


def _overlay(path: str, values: np.ndarray, least: float) -> Image.Image:
    """The image in grey under a map of its patches, from black (0) to yellow: the map's largest value, or `least`."""
    picture = _picture(path)
    shares = np.clip(values, 0, None) / max(values.max(), least)
    colors = matplotlib.colormaps["inferno"](shares)[..., :3]
    layer = Image.fromarray((255 * colors).astype(np.uint8)).resize(picture.size, Image.Resampling.NEAREST)
    return Image.blend(picture.convert("L").convert("RGB"), layer, 0.65)


def _place(values: np.ndarray) -> str:
    row, column = (int(i) for i in np.unravel_index(np.argmax(values), values.shape))
    return f"row {row + 1}, column {column + 1} of {values.shape[0]}"


def problem_panel(problem: Mapping[str, Any]) -> str:
    """The problem as it is set: image, question, context, choices."""
    hint = f"<p>{html.escape(problem['hint'])}</p>" if problem["hint"] else ""
    listed = "".join(f"<li>{html.escape(choice(problem, i))}</li>" for i in range(len(problem["choices"])))
    about = f"{problem['subject']}, grade {problem['grade']}"
    drawn = ""
    if problem["image"]:
        drawn = _png(_picture(problem["image"]), problem["caption"] or f"image of the problem: {problem['question']}")
    return (
        f'<section class="gq" aria-label="Problem">{drawn}<h4>{html.escape(problem["question"])}</h4>{hint}'
        f"<ul class=choices>{listed}</ul><p class=quiet>{html.escape(about)}</p></section>"
    )


def science_panel(answer: ScienceAnswer) -> str:
    """The choice that was answered, every choice's likelihood with and without the image, and the right one."""
    problem = answer.problem
    right = choice(problem, problem["answer"])
    verdict = "right" if answer.prediction == problem["answer"] else f"wrong: it is {right}"
    names = [choice(problem, i) for i in range(len(problem["choices"]))]
    parts = [
        f'<p class="answer"><strong>{html.escape(answer.text)}</strong></p>',
        f"<p>That is {html.escape(verdict)}. Answered in {answer.seconds:.2f} s.</p>",
        _likelihoods(names, answer.scores, "probability of each choice's letter, among all that could be written"),
    ]
    if answer.blind_scores is not None:
        parts.append(_likelihoods(names, answer.blind_scores, "the same without the image"))
    return f'<section class="gq" aria-label="Science answer">{"".join(parts)}</section>'


def _likelihoods(names: Sequence[str], scores: Sequence[float], caption: str) -> str:
    shares = np.exp(scores)
    return bars(list(zip(names, shares.tolist(), strict=True)), names[int(np.argmax(shares))], caption)


def regions_panel(problem: Mapping[str, Any], looks: np.ndarray, costs: np.ndarray) -> str:
    """Where the model looks, and what hiding a region costs its answer, over the problem's image."""
    most = float(costs.max())
    need = f"Hiding a bright square costs the answer up to {most:.2f} nats."
    if most < SMALL_COST:
        need = f"Hiding any one square costs next to nothing: {max(most, 0):.3f} nats at most."
    maps = (
        (
            looks,
            0.0,
            f"most is read at {_place(looks)}",
            "<b>What it reads.</b> Bright patches add most to the answer.",
        ),
        (costs, SMALL_COST, f"hiding costs most at {_place(costs)}", f"<b>What it needs.</b> {need}"),
    )
    drawn = "".join(
        f"<figure>{_png(_overlay(problem['image'], values, least), alt)}<figcaption>{text}</figcaption></figure>"
        for values, least, alt, text in maps
    )
    return (
        '<section class="gq" aria-label="Regions"><h4>Which regions of the image</h4>'
        f'<div class="maps">{drawn}</div></section>'
    )
