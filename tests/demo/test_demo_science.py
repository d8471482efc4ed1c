"""The demo's science tab without a browser: which model answers, what it says, and what the page shows."""

import base64
import html
import math
import re
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_demo import finish, gif_bytes, shown

from helpers.answers.scienceqa import predict, shuffle_images
from helpers.config import load_profile
from helpers.corpora import diagrams
from helpers.corpora.schema import CorpusError
from helpers.corpora.scienceqa import load
from helpers.demo import science as demo_science
from helpers.demo.page import DemoPage
from helpers.demo.science import Science, find_adem, find_problems, problem_panel, regions_panel, science_panel
from helpers.demo.session import Gif, Session
from helpers.models.adem_vl.model import AdemVL
from helpers.scoring.scienceqa import WRONG
from helpers.stage.manifest import stage_settings
from helpers.stage.suite import load_suite, suite_file
from helpers.sweeps.adem_vl import changed
from helpers.workspace import place, write_json

NASTY = "<script>alert('x')</script> \"&<b>"


@pytest.fixture(scope="module")
def profile():
    return load_profile("tiny")


@pytest.fixture(scope="module")
def science(tmp_path_factory, profile):
    """The shipped model and the built-in problems."""
    run = tmp_path_factory.mktemp("run")
    science, notes = Science.open(run, profile, run / "problems")
    assert not notes
    return science


def with_image(science):
    return next(problem for problem in science.problems if problem["image"])


def without_image(science):
    return next(problem for problem in science.problems if not problem["image"])


# ---- Model and problems --------------------------------------------------------------------------------------------


def fake_adem(folder, finished="", data="", **settings):
    """A folder that looks like a trained ADEM-VL in a stage that finished at a time."""
    folder.mkdir(parents=True)
    write_json(folder / "adem_vl.json", {})
    if finished:
        suite = load_suite(suite_file())
        kept = stage_settings(suite.spec("05_adem_scienceqa"), load_profile("tiny"), {"data": data}, folder.parents[1])
        adem = kept["profile"]["adem"] | settings  # what a real manifest holds
        manifest = {"finished": finished, "settings": {"profile": {"adem": adem}, "parameters": {"data": data}}}
        write_json(folder.parent / "stage.json", manifest)
    return folder


def test_this_runs_model_then_the_newest_attached_then_the_shipped(tmp_path, monkeypatch, profile):
    attached, run = tmp_path / "input", tmp_path / "runs" / "tiny"
    monkeypatch.setattr(place, "KAGGLE_INPUT", attached)
    assert find_adem(run, profile).folder == demo_science.SHIPPED_ADEM
    fake_adem(attached / "old" / "adem_vl", "2026-01-01T00:00:00+00:00")
    new = fake_adem(attached / "new" / "adem_vl", "2026-02-01T00:00:00+00:00", protocol="CQM-A")
    fake_adem(attached / "newest" / "text_only", "2026-03-01T00:00:00+00:00")
    found = find_adem(run, profile)
    assert (found.folder, found.config.protocol) == (new, "CQM-A") and "attached: new/adem_vl" in found.origin
    own = fake_adem(run / "05_adem_scienceqa" / "adem_vl")
    assert find_adem(run, profile) == demo_science.FoundAdem(own, "trained in the run tiny", profile.adem, None)


def test_problems_are_of_the_folder_given_one_a_skill_images_first(tmp_path, profile):
    folder = diagrams.write(tmp_path / "world", seed=5, train=0, val=0, test=40)
    shipped = find_adem(tmp_path / "run", profile)
    problems = find_problems(tmp_path / "unused", shipped, str(folder))
    assert problems["skill"].is_unique and 1 < len(problems) <= demo_science.MAX_PROBLEMS
    seen = (problems["image"] != "").tolist()
    assert seen == sorted(seen, reverse=True) and any(seen)
    assert not (tmp_path / "unused").exists()
    with pytest.raises(CorpusError, match="nowhere"):
        find_problems(tmp_path / "unused", shipped, str(tmp_path / "nowhere"))


@pytest.mark.parametrize("fetched", [False, True])
def test_problems_are_of_the_data_that_the_model_was_trained_on(tmp_path, profile, fetched):
    """A folder that was given to notebook 05, or the ScienceQA that it fetched into its own."""
    stage = tmp_path / "run" / "05_adem_scienceqa"
    folder = stage / "world" if fetched else tmp_path / "mine"
    diagrams.write(folder, seed=6, train=0, val=0, test=30)
    given = {"corpus": "scienceqa"} if fetched else {"data": str(folder)}
    fake_adem(stage / "adem_vl", "2026-01-01T00:00:00+00:00", **given)
    problems = find_problems(tmp_path / "unused", find_adem(tmp_path / "run", profile))
    assert all(path.startswith(str(folder)) for path in problems["image"] if path) and len(problems) > 3
    assert not (tmp_path / "unused").exists()


def test_a_folder_that_is_no_scienceqa_is_told_and_the_built_in_problems_are_shown(tmp_path, profile):
    science, notes = Science.open(tmp_path / "run", profile, tmp_path / "problems", str(tmp_path / "nowhere"))
    assert len(notes) == 1 and "nowhere" in notes[0]
    assert len(science.problems) > 3


def test_the_shipped_model_sees(tmp_path, profile):
    """On problems that it was not trained on: right with its image, at chance with another's and with none."""
    world = diagrams.write(tmp_path / "world", seed=990, train=0, val=0, test=600)
    problems = load(world, splits=("test",)).problems
    problems = problems[problems["image"] != ""].head(400).reset_index(drop=True)
    assert len(problems) == 400
    model = AdemVL.from_pretrained(demo_science.SHIPPED_ADEM)
    chance = (1 / problems["choices"].map(len)).mean()

    def accuracy(**options):
        answers = predict(model, problems, profile.adem, progress=False, **options)
        return np.mean(answers["prediction"].to_numpy() == problems["answer"].to_numpy())

    shuffled = shuffle_images(problems, seed=0)
    found = {"own": accuracy(), "shuffled": accuracy(images=shuffled), "blind": accuracy(blind=True)}
    assert found["own"] >= 0.85, found
    # Two standard errors of a share of 400 around chance.
    assert max(found["shuffled"], found["blind"]) <= chance + 2 * np.sqrt(chance * (1 - chance) / 400), found


# ---- Answers -------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_predict(science):
    for problem in (with_image(science), without_image(science)):
        answer, table = science.ask(problem), pd.DataFrame([problem])
        expected = predict(science.model, table, science.found.config).iloc[0]
        assert list(answer.scores) == expected["scores"]
        assert (answer.written, answer.prediction) == (expected["generated"], expected["prediction"])
        if problem["image"]:
            blind = predict(science.model, table, science.found.config, blind=True).iloc[0]
            assert list(answer.blind_scores) == blind["scores"] != expected["scores"]
        else:
            assert answer.blind_scores is None


def test_a_problem_that_is_too_long_is_refused(science):
    found = demo_science.FoundAdem(science.found.folder, "", changed(science.found.config, {"max_tokens": 20}))
    long = with_image(science) | {"hint": "word " * 40}
    with pytest.raises(ValueError, match="longer than the 20 tokens"):
        Science(found, pd.DataFrame([long])).ask(long)


# ---- Panels --------------------------------------------------------------------------------------------------------


def test_panels_show_every_choice_with_its_likelihood(science):
    problem = with_image(science)
    answer = science.ask(problem)
    panel = science_panel(answer)
    for letter, text, score in zip("ABCDE", problem["choices"], answer.scores, strict=False):
        assert html.escape(f"({letter}) {text}") in panel
        assert f"{100 * math.exp(score):.1f} %" in panel
    assert html.escape(answer.text) in panel and "without the image" in panel
    wrong = demo_science.ScienceAnswer(problem, answer.scores, "the", WRONG, 0.1, None)
    assert "no choice (&#x27;the&#x27;)" in science_panel(wrong) and "wrong: it is (" in science_panel(wrong)
    assert "without the image" not in science_panel(wrong)


def test_panels_escape_what_the_data_say(science):
    problem = with_image(science) | {"question": NASTY, "hint": NASTY, "choices": [NASTY, "b"], "answer": 0}
    problem |= {"caption": NASTY, "subject": NASTY}
    answer = demo_science.ScienceAnswer(problem, (-0.1, -3.0), NASTY, WRONG, 0.1, None)
    for panel in (problem_panel(problem), science_panel(answer)):
        assert "<script" not in panel and "&lt;script" in panel


def test_regions_are_drawn_where_the_maps_are_largest(science):
    problem = with_image(science)
    looks, costs = np.full((8, 8), 0.01), np.full((8, 8), -1.0)
    looks[2, 5], costs[7, 0] = 1.0, 2.5
    panel = regions_panel(problem, looks, costs)
    assert "row 3, column 6 of 8" in panel and "row 8, column 1 of 8" in panel and "2.50 nats" in panel
    for encoded, (row, column) in zip(re.findall('base64,([^"]+)"', panel), [(2, 5), (7, 0)], strict=True):
        pixels = np.asarray(Image.open(BytesIO(base64.b64decode(encoded))), dtype=float)
        side = len(pixels) / 8
        patches = [
            [
                pixels[round(i * side) : round((i + 1) * side), round(j * side) : round((j + 1) * side)].mean()
                for j in range(8)
            ]
            for i in range(8)
        ]
        assert np.unravel_index(np.argmax(patches), (8, 8)) == (row, column)


def test_a_map_of_next_to_nothing_is_dark_and_said_to_be(science):
    problem = with_image(science)
    panel = regions_panel(problem, np.full((8, 8), 1 / 64), np.full((8, 8), 1e-4))
    assert "next to nothing: 0.000 nats" in panel
    encoded = re.findall('base64,([^"]+)"', panel)[1]
    assert np.asarray(Image.open(BytesIO(base64.b64decode(encoded)))).mean() < 100


def test_still_figure_is_titled(science):
    figure = science.still(2)
    assert figure.get_suptitle()
    assert sum(bool(axis.images) for axis in figure.axes) == 6  # two problems, three rows
    assert Science(science.found, pd.DataFrame([without_image(science)])).still() is None


def test_still_figure_passes_over_a_problem_that_is_too_long(science):
    long = with_image(science) | {"hint": "word " * 2000}
    problems = pd.DataFrame([long, with_image(science)])
    assert sum(bool(axis.images) for axis in Science(science.found, problems).still(2).axes) == 3
    assert Science(science.found, pd.DataFrame([long])).still() is None


# ---- The page ------------------------------------------------------------------------------------------------------


@pytest.fixture
def page(science, tmp_path):
    session = Session.open(tmp_path, load_profile("tiny"))
    session.gifs += [Gif("a.gif", gif_bytes(), "animated GIF: noise", ())]
    return DemoPage(session, tmp_path, science=science)


def test_pick_a_problem_and_see_the_answer(page, science):
    for number, problem in enumerate(science.problems):
        page.problem.value = number
        assert html.escape(problem["question"]) in page.set_problem.value and page.science_answer.value == ""
        page.science_button.click()
        finish(page)
        assert html.escape(science.ask(problem).text) in page.science_answer.value
        assert ("Which regions" in page.regions.value) == bool(problem["image"])
        assert "Answered in" in page.science_status.value
    assert page.status.value == ""  # the other tab has its own messages
    assert all(re.search('alt="[^"]+"', picture) for picture in re.findall("<img[^>]+>", shown(page.view)))


def test_faults_and_a_busy_model_are_told_in_the_tab(page, science, monkeypatch):
    def missing(problem):
        raise ValueError("weights are missing: <b>attach them</b>")

    monkeypatch.setattr(science, "ask", missing)
    page.science_button.click()
    finish(page)
    assert "weights are missing: &lt;b&gt;" in page.science_status.value and 'role="alert"' in page.science_status.value
    page.worker = object()  # an answer that is under way in the first tab
    page._told = page.status
    page.science_button.click()
    assert "busy in the other tab" in page.science_status.value
