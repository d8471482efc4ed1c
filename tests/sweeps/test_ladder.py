"""The recipe's ladder: which keys its rungs set, what it trains, and that it goes on where it was."""

import numpy as np
import pandas as pd
import pytest

from helpers import plots
from helpers.config import ConfigError, load_profile, profile_keys
from helpers.models.gif_qa.model import GifQAModel
from helpers.runner.plan import sort_parameters
from helpers.stage.pace import DeadlineReached
from helpers.stage.suite import load_suite, suite_file
from helpers.sweeps import gif_qa as sweep
from helpers.sweeps.adem_vl import ablation_rows
from helpers.sweeps.gif_qa import MEASURES, PARTS, WITHOUT, Rung, changed, run_ladder, rungs
from helpers.sweeps.runs import ablation_table
from tests.training.test_alignment import CAPTIONS, GIFS, toy_features

OPTIONS = ["jump", "duck"]


@pytest.fixture(scope="module")
def questions():
    """A question a GIF; the last two GIFs are those of the test."""
    rows = pd.DataFrame({"question_id": [f"q{n}" for n in range(len(GIFS))], "gif_sha256": GIFS, "gif": GIFS})
    rows = rows.assign(task="action", question="what does it do twice ?", type="", num_frames=range(5, 13))
    rows["split"] = ["train"] * 6 + ["test"] * 2
    rows["label"] = [number % 2 for number in range(len(GIFS))]
    return rows.assign(options=[OPTIONS] * len(rows), answer=[OPTIONS[label] for label in rows["label"]])


@pytest.fixture(scope="module")
def profile(make_profile):
    return make_profile(training__epochs=1.0, training__tokens_per_step=200, training__warmup_ratio=0.0)


@pytest.fixture(scope="module")
def features(profile):
    return toy_features(GifQAModel.build(profile).encoder_key)


def test_every_rung_sets_keys_that_there_are_and_changes_one_part_of_the_plain_way():
    rows, tiny = rungs("recipe"), load_profile("tiny")
    assert list(rows) == ["plain", *PARTS, "all"]
    for label, rung in rows.items():
        assert set(rung.values) == set(WITHOUT) <= set(profile_keys())
        moved = {key for key, value in rung.values.items() if value != WITHOUT[key]}
        assert moved == (set(WITHOUT) if label == "all" else set(PARTS.get(label, {})))
        dumped = changed(tiny, rung.values).model_dump()
        assert all(dumped[key.split(".")[0]][key.split(".")[1]] == value for key, value in rung.values.items())
    shares = [(rung.share, rung.values["alignment.epochs"]) for rung in rungs("captions").values()]
    assert shares == [(0.1, 0.0), (0.1, 1.0), (0.3, 0.0), (0.3, 1.0), (1.0, 0.0), (1.0, 1.0)]
    without = rungs("recipe", chat=False)
    assert list(without) == [label for label in rows if "chat" not in label]
    assert not any(rung.values["language_model.chat"] for rung in without.values())
    with pytest.raises(ValueError, match="'recipes'; there are recipe, captions"):
        rungs("recipes")


def test_the_suites_list_of_ablations_is_that_of_the_ladders():
    """The runner gives a notebook only the ablations that suite.yaml names for it."""
    suite = load_suite(suite_file())
    recipes = suite.spec("04_evaluation").choices["ablation"]
    assert [list(rungs(name)) for name in recipes] and rungs(recipes[0]) != rungs(recipes[1])
    assert all(ablation_rows(name, 8) for name in suite.spec("05_adem_scienceqa").choices["ablation"])
    declared = {"04_evaluation": {"ablation": ""}, "05_adem_scienceqa": {"ablation": ""}}
    choices = {name: suite.spec(name).choices for name in declared}
    for own, other in (("04_evaluation", "05_adem_scienceqa"), ("05_adem_scienceqa", "04_evaluation")):
        for name in choices[own]["ablation"]:
            _, given = sort_parameters([("ablation", name)], declared, choices)
            assert given == {own: {"ablation": name}, other: {"ablation": ""}}
    with pytest.raises(ConfigError, match=r"unknown ablation .lader.; did you mean .ladder.\?"):
        sort_parameters([("ablation", "lader")], declared, choices)


def test_a_rung_is_trained_and_scored_on_its_share_and_goes_on(questions, profile, features, tmp_path, monkeypatch):
    captions = CAPTIONS[~CAPTIONS["gif_sha256"].isin(GIFS[6:])]
    rows = {"plain": Rung({}), "captions, half of the GIFs": Rung({"alignment.epochs": 1.0}, 0.5)}
    monkeypatch.setattr(sweep, "rungs", lambda name, chat: rows)
    seen, real = [], sweep.train

    def watched(model, learnt, *args, **options):
        seen.append((sorted(set(learnt["gif_sha256"])), options["aligned"] is not None))
        return real(model, learnt, *args, **options)

    monkeypatch.setattr(sweep, "train", watched)
    with pytest.raises(ValueError, match="no caption of a training GIF"):
        run_ladder("recipe", questions, captions[:0], features, profile, tmp_path, seeds=1)
    with pytest.raises(DeadlineReached, match="'plain', seed 0"):
        run_ladder("recipe", questions, captions, features, profile, tmp_path, seeds=1, deadline=-1.0)
    seen.clear()
    runs = run_ladder("recipe", questions, captions, features, profile, tmp_path, seeds=1)
    assert runs[["row", "seed"]].values.tolist() == [[label, 0] for label in rows]
    assert [aligned for _, aligned in seen] == [False, True]
    assert [len(gifs) for gifs, _ in seen] == [6, 3] and not {*GIFS[6:]} & {g for gifs, _ in seen for g in gifs}
    assert runs["questions"].tolist() == [6, 3]

    answered = pd.read_parquet(tmp_path / "captions_half_of_the_gifs-0" / "predictions.parquet")
    assert set(answered["gif_sha256"]) == set(GIFS[6:])
    right = [row.prediction == row.answer for row in answered.itertuples()]
    assert runs["action_accuracy"].iloc[1] == np.mean(right) and np.isnan(runs["count_mse"]).all()

    monkeypatch.setattr(sweep, "predict", None)  # what is finished is not asked again
    again = run_ladder("recipe", questions, captions, features, profile, tmp_path, seeds=1)
    pd.testing.assert_frame_equal(again.drop(columns="seconds"), runs.drop(columns="seconds"))


def test_the_figure_has_a_panel_a_measure_and_a_point_a_rung():
    """Where a measure has no value, as of a task without questions, there is no point."""
    rng = np.random.default_rng(0)
    runs = [{"row": label, "seed": seed, "parameters": 5} for label in rungs("recipe") for seed in range(3)]
    runs = pd.DataFrame(runs)
    for measure in MEASURES:
        runs[measure] = np.nan if measure == "count_mse" else rng.random(len(runs))
    figure = plots.ladder(ablation_table(runs, MEASURES), "recipe")
    assert [axis.get_title() for axis in figure.axes] == ["FrameQA", "Action", "Transition", "Count"]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == list(rungs("recipe"))
    for axis, measure in zip(figure.axes, MEASURES, strict=True):
        drawn = np.asarray(axis.lines[0].get_xdata(), dtype=float)
        wanted = [part.mean() for _, part in runs.groupby("row", sort=False)[measure]]
        np.testing.assert_allclose(drawn, np.array(wanted) * (1 if measure == "count_mse" else 100))
        assert axis.get_xlabel() and figure.axes[0].get_ylabel() == "training"
