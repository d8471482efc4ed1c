"""What training learns comes from the answers: true ones are learned, shuffled ones leave the model at blind level."""

import math

import numpy as np
import pytest

from helpers.answers import predict
from helpers.config import load_profile
from helpers.corpora import shapes
from helpers.models.gif_qa.model import GifQAModel
from helpers.models.xclip import FrameEncoder, load_xclip
from helpers.store.encoding import cache_features
from helpers.store.features import FeatureTable
from helpers.store.shards import shard_gifs
from helpers.training.gif_qa import train

TRAIN, TEST = 160, 60


@pytest.fixture(scope="module")
def profile():
    return load_profile(
        "tiny",
        {
            "shapes.seed": 31,
            "shapes.train": TRAIN,
            "shapes.test": TEST,
            "data.groups": [1],
            "data.workers": 1,
            "training.groups": [1],
            "training.epochs": 5,
            "evaluation.groups": 1,
        },
    )


@pytest.fixture(scope="module")
def world(profile, tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    sharded = shard_gifs(shapes.load(profile, folder / "gifs"), folder / "01", profile.data)
    encoder = FrameEncoder(load_xclip("tiny/xclip"), "tiny/xclip")
    cache_features(folder / "01" / "frames", folder / "features.lance", encoder, profile.data, 32)
    # Questions that 16 frames answer and a short training reaches.
    rows = sharded.questions[sharded.questions["task"] == "frameqa"]
    rows = rows[rows["type"].isin(["location", "color", "number"])].reset_index(drop=True)
    return rows, FeatureTable(folder / "features.lance")


def shuffled_answers(rows):
    """Answers of the same type that tell nothing: behind every true answer, each word stands equally often.

    A plain permutation of so few rows would by chance pair some words with themselves, and that can be learned.
    """
    rng, out = np.random.default_rng(0), rows["answer"].copy()
    for _, same_type in rows.groupby("type"):
        words = sorted(set(same_type["answer"]))
        for _, same_answer in same_type.groupby("answer"):
            out[same_answer.index] = rng.permutation(np.resize(rng.permutation(words), len(same_answer)))
    return out


def accuracy(profile, world, folder, *, video=True, shuffle=False):
    questions, features = world
    known, asked = questions[questions["split"] == "train"].copy(), questions[questions["split"] == "test"]
    if shuffle:
        known["answer"] = shuffled_answers(known)
    model = GifQAModel.build(profile, video=video)
    assert train(model, known, features, profile, folder, progress=False).status == "complete"
    answered = predict(model, asked, features, profile.evaluation, groups=1)
    return float((answered["prediction"].to_numpy() == asked["answer"].to_numpy()).mean())


@pytest.mark.slow
def test_shuffled_answers_stay_at_blind_level(profile, world, tmp_path):
    # Who does not see gives one answer to one text: at best the one that is right most often.
    asked = world[0][world[0]["split"] == "test"]
    blind_at_best = asked.groupby("question")["answer"].agg(lambda answers: answers.value_counts().iloc[0]).sum()
    blind_at_best /= len(asked)
    true = accuracy(profile, world, tmp_path / "true")
    shuffled = accuracy(profile, world, tmp_path / "shuffled", shuffle=True)
    blind = accuracy(profile, world, tmp_path / "blind", video=False)
    assert blind <= blind_at_best < true
    # Two standard errors of the difference of two shares of so many answers.
    assert shuffled < blind + 2 * math.sqrt((blind * (1 - blind) + shuffled * (1 - shuffled)) / len(asked))
    assert true > blind + 0.3
