"""Stage one of the GIF model: the connector learns to say what a GIF shows, before any question is trained on.

As in LLaVA (arXiv 2304.08485, section 4.2): a caption is the answer to one fixed prompt; the connector learns, and the
MIT where it is trained at all, while the adapter stays what it is.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from helpers.config import Profile
from helpers.models.gif_qa.window import Window
from helpers.stage.pace import note_pace
from helpers.training.collective import TrainingError
from helpers.training.engine import TrainResult
from helpers.training.gif_qa import STEPS, TWIN, dataset_of, held_still, plan_batches, train

if TYPE_CHECKING:
    from helpers.models.gif_qa.model import GifQAModel
    from helpers.store.features import FeatureTable


def caption_rows(captions: pd.DataFrame, prompt: str) -> pd.DataFrame:
    """Captions (columns caption_id, gif_sha256, split, caption) as rows of the QA table: `prompt` asks for each."""
    rows = captions[["gif_sha256", "split"]].assign(gif=captions["gif_sha256"], question_id=captions["caption_id"])
    rows = rows.assign(task="caption", question=prompt, answer=captions["caption"], label=-1)
    return rows.assign(options=[[] for _ in range(len(rows))])


@dataclass(frozen=True)
class Captions:
    """What stage one learns from (`trained`) and is measured on (`held`), as rows of the QA table, and a word on it.

    Nothing is learnt from where there is no stage one; `told` says why.
    """

    trained: pd.DataFrame
    held: pd.DataFrame
    told: str


def choose_captions(
    captions: pd.DataFrame, tested: Collection[str], watched: Collection[str], features: FeatureTable, profile: Profile
) -> Captions:
    """Divide the captions of the training GIFs: those of the `watched` GIFs (by gif_sha256) are held out.

    A caption that the language model's window cannot hold is left out. Raises TrainingError if one to train on is of a
    test GIF: one in `tested`, or one with a caption in the test split.
    """
    of_test = captions["split"] == "test"
    rows = caption_rows(captions[captions["split"] == "train"], profile.alignment.prompt)
    if not profile.alignment.epochs:
        return Captions(rows[:0], rows[:0], "Stage one is off (alignment.epochs is 0).")
    if leaked := set(rows["gif_sha256"]) & {*tested, *captions.loc[of_test, "gif_sha256"]}:
        raise TrainingError(
            f"{len(leaked)} GIFs of captions to train on occur in the test questions or captions (the first: "
            f"{min(leaked)}): run 01 again"
        )
    too_long = rows["question_id"].isin(Window.of(profile).too_long(rows, features.longest_views())["item"])
    held = rows["gif_sha256"].isin(watched)
    trained, held = rows[~too_long & ~held], rows[~too_long & held]
    if trained.empty:
        return Captions(trained, held, "Stage one is left out: there is no caption of a GIF to train on.")
    counts = [f"{len(part):,} captions of {part['gif_sha256'].nunique():,} GIFs" for part in (trained, held)]
    told = f"{counts[0]} to train on, {counts[1]} held out"
    return Captions(trained, held, told + f", {too_long.sum():,} too long and left out." if too_long.any() else told)


def align(
    model: GifQAModel,
    captions: pd.DataFrame,
    features: FeatureTable,
    profile: Profile,
    folder: Path | str,
    *,
    questions: pd.DataFrame,
    deadline: float = math.inf,
    eval_captions: pd.DataFrame | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train `model`'s connector on `captions` (rows of `caption_rows`) as `profile.alignment` says, or go on with it.

    The rest is as in `train`: folder, deadline, signals, errors, and the settings that `profile.alignment` does not
    name. `questions` are what is trained on afterwards: their steps count in the stage's forecast.
    """
    to_come = len(plan_batches(dataset_of(model, questions, profile), features, profile))
    own = {"epochs": profile.alignment.epochs, "learning_rate_connector": profile.alignment.learning_rate_connector}
    own["choice"] = "none"  # a caption is compared with no other
    aligning = profile.model_copy(update={"training": profile.training.model_copy(update=own)})
    Path(folder).mkdir(parents=True, exist_ok=True)
    note_pace(Path(folder), STEPS, 0, 0.0, to_come, (TWIN,), profile.training.epochs)
    with held_still(model.language_model):
        return train(
            model,
            captions,
            features,
            aligning,
            folder,
            deadline=deadline,
            eval_questions=eval_captions,
            progress=progress,
        )
