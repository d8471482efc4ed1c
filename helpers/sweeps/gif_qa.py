"""The GIF model's recipe, rung by rung, and what captions first are worth where questions are few."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from transformers import AutoTokenizer

from helpers.answers.tgif_qa import predict
from helpers.config import Profile
from helpers.models.gif_qa.model import GifQAModel
from helpers.models.gif_qa.window import Window
from helpers.scoring.tgif_qa import join_variants, metrics
from helpers.stage.pace import DeadlineReached
from helpers.store.tables import keep
from helpers.training.captions import align, choose_captions
from helpers.training.checkpoints import trainable
from helpers.training.gif_qa import hold_out, train
from helpers.workspace.machine import free_memory
from helpers.workspace.weights import find_model

if TYPE_CHECKING:
    from helpers.store.features import FeatureTable

MEASURES = ("frameqa_accuracy", "action_accuracy", "transition_accuracy", "count_mse")
SHARES = (0.1, 0.3, 1.0)  # of the training GIFs, with all of their questions
WITHOUT = {
    "training.loss": "per_token",
    "training.choice": "none",
    "evaluation.options_in_prompt": False,
    "connector.output_scale": "learned",
    "alignment.epochs": 0.0,
    "language_model.chat": False,
}
PARTS: dict[str, dict[str, Any]] = {
    "+ per-question loss": {"training.loss": "per_question"},
    "+ fixed output scale": {"connector.output_scale": "fixed"},
    "+ choice": {"training.choice": "beside", "evaluation.options_in_prompt": True},
    "+ stage one": {"alignment.epochs": 1.0},
    "+ chat template": {"language_model.chat": True},
}


@dataclass(frozen=True)
class Rung:
    """Profile keys that a row of a ladder sets, and the share of the training GIFs whose questions it learns from."""

    values: Mapping[str, Any]
    share: float = 1.0


def rungs(name: str, chat: bool = True) -> dict[str, Rung]:
    """Rows of a ladder by label. "recipe": the plain way, each part alone on top of it, and all of them together.

    chat: whether the language model has a chat template; without one there is no such part. "captions": questions of a
    share of the GIFs, with and without stage one on the captions of all of them; the rest is the profile's. Raises
    ValueError for another name.
    """
    parts = {label: part for label, part in PARTS.items() if chat or "language_model.chat" not in part}
    every = {key: value for part in parts.values() for key, value in part.items()}
    tables = {
        "recipe": {"plain": Rung(WITHOUT)}
        | {label: Rung(WITHOUT | part) for label, part in parts.items()}
        | {"all": Rung(WITHOUT | every)},
        "captions": {
            f"{share:.0%} of the GIFs asked about{told}": Rung({"alignment.epochs": epochs}, share)
            for share in SHARES
            for told, epochs in (("", 0.0), (", captions first", 1.0))
        },
    }
    if name not in tables:
        raise ValueError(f"unknown ablation {name!r}; there are {', '.join(tables)}")
    return tables[name]


def run_ladder(
    name: str,
    questions: pd.DataFrame,
    captions: pd.DataFrame,
    features: FeatureTable,
    profile: Profile,
    folder: Path | str,
    *,
    seeds: int = 3,
    deadline: float = math.inf,
) -> pd.DataFrame:
    """Train and score every rung of a ladder with several seeds: row, seed, `MEASURES`, parameters, questions, seconds.

    questions: of both splits, with `num_frames`; captions: as `store.read_captions` gives them. The seed decides
    weights, order and, where a rung takes a share of the GIFs, which. A run that is finished is kept in `folder`, so
    that a killed one goes on; a model is freed before the next is built. What one rung has no room for in the language
    model's window no rung is asked. Raises, before anything is trained, ValueError
    for an unknown ladder and where there are no captions to learn from; DeadlineReached when the deadline (in seconds
    from now) has passed.
    """
    ends, folder, found = time.perf_counter() + deadline, Path(folder), []
    language = find_model(profile.language_model.model, profile.language_model.revision)
    chat = bool(AutoTokenizer.from_pretrained(language).chat_template)
    rows = {label: (changed(profile, rung.values), rung.share) for label, rung in rungs(name, chat).items()}
    if captions[captions["split"] == "train"].empty and any(own.alignment.epochs for own, _ in rows.values()):
        raise ValueError(
            f"the ladder {name!r} has a stage one, and there is no caption of a training GIF to learn from"
        )
    longest = features.longest_views()
    too_long = [set(Window.of(own).too_long(questions, longest)["item"]) for own, _ in rows.values()]
    questions = questions[~questions["question_id"].isin(set().union(*too_long))]
    for label, (own, share) in rows.items():
        for seed in range(seeds):
            place = folder / f"{re.sub('[^a-z0-9]+', '_', label.lower()).strip('_')}-{seed}"
            seeded = changed(own, {"training.seed": seed})
            # stage one learns from all captions, whatever share of the questions follows: it is done once
            described = folder / f"captions-{seed}" if name == "captions" else place / "alignment"
            values = _run(label, questions, captions, features, seeded, share, (place, described), ends)
            found.append({"row": label, "seed": seed, **values})
            free_memory()
    return pd.DataFrame(found)


def _run(
    label: str,
    questions: pd.DataFrame,
    captions: pd.DataFrame,
    features: FeatureTable,
    profile: Profile,
    share: float,
    places: tuple[Path, Path],
    ends: float,
) -> dict[str, float]:
    place, described = places
    of_train = questions["split"] == "train"
    _, learnt = hold_out(questions[of_train], share, profile.training.seed)
    test = questions[~of_train]
    told = choose_captions(captions, set(test["gif_sha256"]), (), features, profile)
    model, aligned, seconds = GifQAModel.build(profile), None, 0.0
    size = sum(p.numel() for p in trainable(model).values())
    steps = []
    if len(told.trained):
        aligned = described
        steps.append(lambda left: align(model, told.trained, features, profile, aligned, questions=learnt, **left))
    steps.append(lambda left: train(model, learnt, features, profile, place, aligned=aligned, **left))
    for step in steps:
        result = step({"deadline": ends - time.perf_counter(), "progress": False})
        if result.status != "complete":
            done = f"step {result.steps:,} of {result.total_steps:,}"
            raise DeadlineReached(f"time is up at {label!r}, seed {profile.training.seed}, {done}; run again to go on")
        seconds += result.seconds

    def answer() -> pd.DataFrame:
        config = profile.evaluation
        options = {"groups": config.groups, "description": f"{label}, {profile.training.seed}"}
        answers = predict(model, test, features, config, deadline=ends - time.perf_counter(), **options)
        return join_variants(test, {"main": answers})

    scored = metrics(keep(place / "predictions.parquet", answer))
    measured = {measure: scored.get(measure, math.nan) for measure in MEASURES}
    return measured | {"parameters": size, "questions": len(learnt), "seconds": seconds}


def changed(profile: Profile, values: Mapping[str, Any]) -> Profile:
    """`profile` with other values by dotted key, checked like a profile."""
    update: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        update.setdefault(section, {})[name] = value
    sections = {name: getattr(profile, name) for name in update}
    return profile.model_copy(
        update={name: type(old).model_validate(old.model_dump() | update[name]) for name, old in sections.items()}
    )
