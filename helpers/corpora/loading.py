"""The corpus that a profile names, read by its reader, without leaks from test to training."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import pandas as pd

from helpers.config import AdemConfig, Profile
from helpers.corpora import captions, diagrams, own_gifs, scienceqa, shapes, tgif_qa
from helpers.corpora.schema import Corpus, CorpusError, listed_rejects, reject_table
from helpers.corpora.scienceqa import ScienceQA


def drop_leaked(questions: pd.DataFrame, test_gifs: Collection[str] = ()) -> pd.DataFrame:
    """The questions without those training rows whose GIF is in `test_gifs` or occurs in any test row of any task.

    Within a task TGIF-QA's train and test GIFs are disjoint, across tasks they are not.
    """
    test_gifs = {*test_gifs, *questions.gif[questions.split == "test"]}
    leaked = (questions.split == "train") & questions.gif.isin(test_gifs)
    return questions[~leaked].reset_index(drop=True)


def load(
    profile: Profile,
    *,
    folder: str | Path,
    gifs: str | Path | None = None,
    qa: str | Path | None = None,
    holdout: float = 0.2,
    seed: int = 0,
) -> Corpus:
    """The corpus that `profile.data.corpus` names, without the training questions of test GIFs.

    folder: where the built-in world is written (shapes only).
    gifs: folder of GIFs; for TGIF-QA also a zip archive or a list of URLs.
    qa: TGIF-QA's folder of question files, or the CSV of own GIFs.
    holdout, seed: share of own GIFs held out for test, and the seed of the draw.
    Leaked training GIFs are listed in the rejects. Of TGIF-QA the official number of test questions counts as asked,
    whatever the files hold. Raises `CorpusError` if an input is missing or nothing is left.
    """
    name = profile.data.corpus
    if name == "shapes":
        if gifs or qa:
            raise CorpusError("The built-in world takes no GIFs or questions of yours: set data.corpus to own_gifs.")
        world = profile.shapes
        told = captions.world_captions(world.seed, world.train, world.test)
        corpus = replace(shapes.load(profile, folder), captions=told, told=len(told))
    elif name == "tgif_qa":
        corpus = tgif_qa.load(_required(qa, "qa", "the folder of TGIF-QA's question files"), gifs=gifs or None)
        corpus = replace(corpus, asked={task: tgif_qa.TEST_QUESTIONS[task] for task in corpus.asked})
    elif name == "own_gifs":
        gifs, qa = _required(gifs, "gifs", "the folder of your GIFs"), _required(qa, "qa", "the CSV of your questions")
        corpus = own_gifs.load(gifs, qa, holdout=holdout, seed=seed)
    else:
        raise CorpusError(f"Unknown corpus {name!r} in data.corpus; there are shapes, tgif_qa and own_gifs.")
    return _without_leaks(corpus, name)


def _required(value: str | Path | None, name: str, meaning: str) -> str | Path:
    if not value:
        raise CorpusError(f"The corpus needs `{name}`: {meaning}.")
    return value


def _without_leaks(corpus: Corpus, name: str) -> Corpus:
    """The corpus in which each GIF is in one split: in test if any question or caption about it is."""
    captions = corpus.captions
    kept = drop_leaked(corpus.questions, set(captions.gif[captions.split == "test"]))
    leaked = corpus.questions[~corpus.questions.question_id.isin(kept.question_id)]
    if len(leaked) and "train" not in set(kept.split):
        told = list(corpus.rejects.itertuples(index=False, name=None))
        reason = "Every training GIF also occurs in a test question or caption: no GIF may be in both splits."
        raise CorpusError(reason + listed_rejects(told))
    rejects = [
        (gif, "train split", f"also a test GIF: its {number} training questions are left out")
        for gif, number in leaked.gif.value_counts().sort_index().items()
    ]
    test_gifs = {*kept.gif[kept.split == "test"], *captions.gif[captions.split == "test"]}
    used = {*kept.gif, *captions.gif}
    return replace(
        corpus,
        name=name,
        questions=kept,
        captions=captions.assign(split=["test" if gif in test_gifs else "train" for gif in captions.gif]),
        gifs={gif: source for gif, source in corpus.gifs.items() if gif in used},
        rejects=pd.concat([corpus.rejects, reject_table(rejects)], ignore_index=True),
    )


VALIDATION = 100  # problems of the built-in world's val split, which nothing is selected on


def load_problems(config: AdemConfig, folder: Path | str, data: Path | str = "") -> ScienceQA:
    """Problems to train on and those of `evaluation_splits`, with captions: of `data`, a folder in ScienceQA's layout.

    Without `data`, of what `adem.corpus` names: the built-in world, which is written to `folder`, or ScienceQA, which
    is taken as attached on Kaggle or else fetched into `folder`. Raises CorpusError for files that are missing or
    broken, or if ScienceQA cannot be had.
    """
    splits = ("train", *config.evaluation_splits)
    if not data and config.corpus == "scienceqa":
        data = scienceqa.find_attached() or scienceqa.fetch(folder, splits)
    if not data:
        sizes = {"train": config.world_train, "val": VALIDATION, "test": config.world_test}
        data = diagrams.write(folder, seed=config.world_seed, **sizes)
    return scienceqa.load(data, splits=splits, captions=True)
