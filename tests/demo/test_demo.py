"""The demo without a browser: which bundle answers, what is asked and exported, and the page's widgets."""

import html
import os
import re
import subprocess
import sys
import threading
from io import BytesIO
from pathlib import Path

import ipywidgets
import numpy as np
import pytest
import torch
from PIL import Image

from helpers.corpora import own_gifs, shapes
from helpers.demo.found import SHIPPED_BUNDLE, find_bundle, interactive
from helpers.demo.page import DemoPage
from helpers.demo.panels import STYLE, answer_panel, note, still_panels, why_panel
from helpers.demo.session import (
    BUILT_IN_GIFS,
    GENERAL_QUESTIONS,
    MAX_GALLERY,
    PREVIEW_BYTES,
    THUMBNAIL_SIDE,
    Gif,
    Session,
    Suggestion,
    built_in_gifs,
    parse_options,
    read_uploads,
)
from helpers.gifs.decode import GifRejected
from helpers.models.gif_qa.ask import GifQA
from helpers.models.gif_qa.model import GifQAModel
from helpers.models.parts import BundleError
from helpers.plots import image_tag
from helpers.workspace import place, write_json
from helpers.workspace.place import repo_root
from helpers.workspace.weights import ModelNotFound

QUESTION = "what is moving ?"
OPTIONS = ["jump", "duck", "blink"]
NASTY = "<script>alert('x')</script> \"&<b>"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory, make_profile):
    """A bundle on random base models, and its blind twin beside it."""
    folder, profile = tmp_path_factory.mktemp("bundles"), make_profile()
    for name, video in (("bundle", True), ("blind", False)):
        GifQAModel.build(profile, torch.device("cpu"), video=video).save_bundle(folder / name)
    return folder, profile


@pytest.fixture(scope="module")
def qa(bundles, tiny_xclip_dir, tiny_llama_dir):
    return GifQA.from_pretrained(bundles[0] / "bundle", str(tiny_llama_dir), str(tiny_xclip_dir))


@pytest.fixture(scope="module")
def gifs(tmp_path_factory):
    return built_in_gifs(tmp_path_factory.mktemp("gifs"), number=3)


@pytest.fixture
def session(qa, gifs):
    session = Session(qa, "of a test")
    session.gifs += gifs
    return session


@pytest.fixture
def page(session, tmp_path):
    return DemoPage(session, tmp_path / "asked")


def gif_bytes(seed: int = 0, frames: int = 5, side: int = 40) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (frames, side, side, 3), dtype=np.uint8)
    pictures, out = [Image.fromarray(frame) for frame in noise], BytesIO()
    pictures[0].save(out, "GIF", save_all=True, append_images=pictures[1:], duration=80)
    return out.getvalue()


# ---- Which bundle --------------------------------------------------------------------------------------------------


def fake_bundle(folder: Path, video: bool = True, finished: str = "") -> Path:
    """A folder that reads as a bundle, inside a stage that finished at a time."""
    folder.mkdir(parents=True)
    write_json(folder / "bundle.json", {"format": 1, "video": video})
    if finished:
        write_json(folder.parent / "stage.json", {"finished": finished})
    return folder


def test_this_runs_bundle_then_the_newest_attached_then_the_shipped(tmp_path, monkeypatch):
    attached, run = tmp_path / "input", tmp_path / "runs" / "tiny"
    monkeypatch.setattr(place, "KAGGLE_INPUT", attached)
    monkeypatch.setattr("helpers.demo.found.SHIPPED_BUNDLE", tmp_path / "shipped" / "bundle")
    with pytest.raises(BundleError, match=r"no trained bundle.*notebooks 01 to 03"):
        find_bundle(run)
    shipped = fake_bundle(tmp_path / "shipped" / "bundle")
    assert find_bundle(run).folder == shipped
    old = fake_bundle(attached / "z" / "a" / "bundle", finished="2026-01-01T00:00:00+00:00")
    assert find_bundle(run).folder == old
    new = fake_bundle(attached / "b" / "c" / "bundle", finished="2026-02-01T00:00:00+00:00")
    fake_bundle(attached / "b" / "c" / "blind", video=False)
    other = attached / "d" / "bundle.json"  # of another program
    other.parent.mkdir()
    other.write_text("[1]")
    found = find_bundle(run)
    assert (found.folder, found.blind) == (new, new.parent / "blind")
    assert "attached: b/c" in found.origin
    own = fake_bundle(run / "03_adapter_training" / "bundle")
    found = find_bundle(run)
    assert (found.folder, found.blind, found.origin) == (own, None, "trained in the run tiny")
    assert find_bundle(run, str(shipped)).folder == shipped
    # a notebook runs in notebooks/, people type from the root
    monkeypatch.setattr("helpers.demo.found.repo_root", lambda: tmp_path)
    assert find_bundle(run, "shipped/bundle").folder == shipped


def test_a_folder_that_cannot_answer_is_refused(tmp_path):
    with pytest.raises(BundleError, match=r"no bundle\.json"):
        find_bundle(tmp_path, str(tmp_path))
    blind = fake_bundle(tmp_path / "blind", video=False)
    with pytest.raises(BundleError, match="blind bundle"):
        find_bundle(tmp_path, str(blind))


def test_base_models_of_the_bundle_then_those_of_the_profile(bundles, monkeypatch):
    """A bundle trained on a local folder names that folder without its path: only the profile knows where it is."""

    def find(model_id, revision=None):
        if "/" not in model_id:
            raise ModelNotFound(model_id)
        return model_id

    monkeypatch.setattr("helpers.models.gif_qa.bundle.find_model", find)
    monkeypatch.setattr("helpers.demo.found.find_model", find)
    session = Session.open(bundles[0], bundles[1], str(bundles[0] / "bundle"))
    session.gifs += [Gif("a.gif", gif_bytes(), "", ())]
    asked = session.ask(session.gifs[0], QUESTION)
    assert session.has_blind_twin
    assert session.ask_blind(asked) == asked.blind
    assert asked.blind.relevance == []


# ---- GIFs ----------------------------------------------------------------------------------------------------------


def test_uploads_of_both_versions_of_ipywidgets():
    seven = {"a.gif": {"metadata": {"name": "a.gif", "size": 3}, "content": b"abc"}}
    eight = ({"name": "a.gif", "type": "image/gif", "size": 3, "content": memoryview(b"abc")},)
    assert read_uploads(seven) == read_uploads(eight) == [("a.gif", b"abc")]
    assert read_uploads({}) == read_uploads(()) == []


def test_built_in_gifs_are_written_once_and_stay_the_same(tmp_path):
    first = built_in_gifs(tmp_path, number=2)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert built_in_gifs(tmp_path, number=2) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times
    assert {gif.name for gif in first} == {path.name for path in tmp_path.iterdir()}
    for gif in first:
        assert gif.alt.startswith("animated GIF: a ")
        assert {bool(suggestion.options) for suggestion in gif.suggestions} == {True, False}


def test_names_on_the_built_in_page_are_unique(tmp_path):
    names = [gif.name for gif in built_in_gifs(tmp_path)]
    assert len(set(names)) == BUILT_IN_GIFS


def test_added_gifs_get_safe_unique_names_and_are_not_added_twice(session):
    first = session.add("../../etc/my cat<b>.GIF", gif_bytes(1))
    assert first.name == "my-cat-b.gif"
    assert session.add("again.gif", gif_bytes(1)) is first
    assert session.add("my cat<b>.gif", gif_bytes(2)).name == "my-cat-b-2.gif"
    assert session.add("...", gif_bytes(3)).name == "gif.gif"
    with pytest.raises(GifRejected, match=r"^notes\.gif cannot be used: "):
        session.add("notes.gif", b"just some text")


def test_a_folder_gives_gifs_in_front_with_the_questions_of_its_csv(session, tmp_path):
    built_in = list(session.gifs)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "cat.gif").write_bytes(gif_bytes(1))
    (tmp_path / "ant.GIF").write_bytes(gif_bytes(2))
    (tmp_path / "broken.gif").write_text("no GIF")
    rows = ["gif,task,question,answer,options", "deep/cat.gif,action,What does it do ?,yawn,jump|yawn"]
    (tmp_path / "qa.csv").write_text("\n".join(rows))
    notes = session.add_folder(tmp_path)
    assert len(notes) == 1 and "broken.gif cannot be used" in notes[0]
    assert [gif.name for gif in session.gifs] == ["cat.gif", "ant.gif", *(gif.name for gif in built_in)]
    assert session.gifs[0].suggestions == (Suggestion("What does it do ?", ("jump", "yawn")),)
    assert [s.question for s in session.gifs[1].suggestions] == list(GENERAL_QUESTIONS)
    with pytest.raises(ValueError, match="there is no folder"):
        session.add_folder(tmp_path / "nowhere")


def test_questions_of_a_csv_that_the_page_would_refuse_are_not_suggested_but_told(session, tmp_path):
    (tmp_path / "a.gif").write_bytes(gif_bytes(3))
    rows = [
        "gif,task,question,answer,options",
        "a.gif,action,What does it do 2 times ?,jump,jump|duck|duck",
        f"a.gif,frameqa,{'very ' * 80}long ?,red,",
        f"a.gif,action,What does it do 3 times ?,jump,jump|{'x' * 90}",
        "a.gif,frameqa,what is it ?,red,",
    ]
    (tmp_path / "qa.csv").write_text("\n".join(rows) + "\n")
    notes = session.add_folder(tmp_path)
    assert [s.question for s in session.gifs[0].suggestions] == ["what is it ?"]
    refused, *others = notes  # what no table may hold, then what the page alone refuses
    assert refused == "qa.csv: a.gif: two of the options are the same: ['jump', 'duck', 'duck']"
    assert [n.split(": ")[-1].split(";")[0] for n in others] == [
        "the question has 406 characters",
        "an option has 90 characters",
    ]
    for suggestion in session.gifs[0].suggestions:
        session.ask(session.gifs[0], suggestion.question, suggestion.options)


@pytest.mark.parametrize(
    ("environment", "open_"),
    [
        ({}, False),
        ({"SERVER_SOFTWARE": "voila/0.5"}, True),
        ({"JPY_SESSION_NAME": "a.ipynb"}, True),
        ({"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}, True),
        ({"KAGGLE_KERNEL_RUN_TYPE": "Batch"}, False),
        ({"JPY_SESSION_NAME": "a.ipynb", "SUITE_HEADLESS": "1"}, False),
    ],
)
def test_figures_are_drawn_when_nobody_has_the_notebook_open(monkeypatch, environment, open_):
    for name in ("SERVER_SOFTWARE", "JPY_SESSION_NAME", "KAGGLE_KERNEL_RUN_TYPE", "SUITE_HEADLESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert interactive() is open_


def test_a_large_folder_is_cut_and_said_to_be(session, tmp_path):
    for number in range(MAX_GALLERY + 2):
        (tmp_path / f"{number:02d}.gif").write_bytes(gif_bytes(number))
    assert session.add_folder(tmp_path) == [f"2 more GIFs of {tmp_path.name} are not shown"]


def test_large_gifs_play_as_a_small_copy(session):
    small, large = session.add("small", gif_bytes(1)), session.add("large", gif_bytes(2, frames=40, side=160))
    assert session.picture(small) == small.data
    copy = session.picture(large)
    assert len(large.data) > PREVIEW_BYTES >= len(copy)
    assert Image.open(BytesIO(copy)).n_frames > 1


# ---- Questions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", [QUESTION, f"  {QUESTION} ", "How many times does it jump ?", NASTY])
@pytest.mark.parametrize("options", [[], OPTIONS])
def test_answers_are_those_of_gifqa(session, qa, question, options):
    gif = session.gifs[1]
    assert session.ask(gif, question, options).answer == qa.answer(gif.data, question, options or None)


def test_blind_answers_are_those_of_gifqa(session, qa):
    asked = session.ask(session.gifs[0], QUESTION, OPTIONS)
    assert session.ask_blind(asked) == qa.answer(None, QUESTION, OPTIONS)


def test_options_are_separated_by_bars():
    assert parse_options(" jump |duck| blink ") == ["jump", "duck", "blink"]
    assert parse_options("  ") == []
    assert parse_options("jump") == ["jump"]


@pytest.mark.parametrize(
    ("question", "options", "message"),
    [
        ("", [], "the question is empty"),
        ("x" * 500, [], "the question has 500 characters; ask it in 300 or fewer"),
        (QUESTION, ["jump"], "two or more options"),
        (QUESTION, ["jump", ""], "none of them empty"),
        (QUESTION, ["jump", "jump"], "two options are the same"),
        (QUESTION, [str(n) for n in range(30)], "30 options"),
        (QUESTION, ["a", "b" * 99], "an option has 99 characters"),
    ],
)
def test_what_cannot_be_asked_is_said_in_plain_words(session, question, options, message):
    with pytest.raises(ValueError, match=message):
        session.ask(session.gifs[0], question, options)


def test_counts_are_shown_in_order_and_options_all(session):
    count = session.ask(session.gifs[0], "How many times does it jump ?")
    assert [text for text, _ in count.distribution] == [str(n) for n in range(1, 11)]
    assert sum(p for _, p in count.distribution) == pytest.approx(1)
    choice = session.ask(session.gifs[0], "What does it do after jump ?", OPTIONS)
    assert {text for text, _ in choice.distribution} == set(OPTIONS)
    assert (count.task, choice.task) == ("count", "transition")
    assert session.ask(session.gifs[0], "What does it do twice ?", OPTIONS).task == "action"
    assert session.ask(session.gifs[0], QUESTION).task == "frameqa"


# ---- Export --------------------------------------------------------------------------------------------------------


def test_corrections_become_training_data(session, tmp_path):
    gif, uploaded = session.gifs[0], session.add('my cat, "the" one.gif', gif_bytes(1))
    asked = [
        session.ask(gif, "How many times does it jump ?"),
        session.ask(gif, "What does it do after jump ?", OPTIONS),
        session.ask(uploaded, 'what, "exactly", is it ?'),
        session.ask(uploaded, "where is it ?"),
        session.ask(uploaded, "where is it ?"),
    ]
    session.history += asked
    for one, right in zip(asked, ["3", "blink", "a cat; of course", "first", "lap"], strict=True):
        one.correct(f" {right} ")
    path = session.export(tmp_path)
    corpus = own_gifs.load(path.parent, path, holdout=0)
    assert len(corpus.rejects) == 0
    table = corpus.questions.set_index("question")
    assert table["answer"].to_dict() == {
        "How many times does it jump ?": "3",
        "What does it do after jump ?": "blink",
        'what, "exactly", is it ?': "a cat; of course",
        "where is it ?": "lap",
    }
    assert table["task"].tolist() == ["count", "transition", "frameqa", "frameqa"]
    assert table.loc["What does it do after jump ?", "options"] == OPTIONS
    assert {Path(gif).read_bytes() for gif in corpus.gifs.values()} == {gif.data, uploaded.data}
    # Two GIFs: enough for a share to be held out, which needs the CSV to have no split column.
    assert set(own_gifs.load(path.parent, path, holdout=0.5).questions["split"]) == {"train", "test"}


def test_answers_that_were_not_corrected_are_exported_as_they_are_and_cleared_ones_not(session, tmp_path):
    asked = [session.ask(session.gifs[0], text, OPTIONS) for text in ("What does it do ?", "What else does it do ?")]
    session.history += asked
    asked[1].correct("")
    path = session.export(tmp_path)
    corpus = own_gifs.load(path.parent, path, holdout=0)
    assert corpus.questions["answer"].tolist() == [asked[0].answer.text]
    asked[0].correct("")
    with pytest.raises(ValueError, match="nothing to export"):
        session.export(tmp_path)


@pytest.mark.parametrize(
    ("question", "options", "right", "message"),
    [
        ("What does it do ?", OPTIONS, "yawn", "'yawn' is none of the options"),
        ("How many times does it jump ?", [], "many", "'many' is no count"),
        ("How many times does it jump ?", [], "11", "'11' is no count"),
    ],
)
def test_impossible_corrections_are_refused(session, question, options, right, message):
    asked = session.ask(session.gifs[0], question, options)
    with pytest.raises(ValueError, match=message):
        asked.correct(right)
    assert asked.right == asked.answer.text


# ---- Panels --------------------------------------------------------------------------------------------------------


def test_panels_escape_what_people_and_models_write(session):
    asked = session.ask(session.gifs[0], f"{NASTY} ?", [NASTY, f"{NASTY}2"])
    session.ask_blind(asked)
    for panel in (answer_panel(asked, blind=True), why_panel(asked, session.frames(asked.gif))):
        assert "<script" not in panel and "<b>alert" not in panel
        assert html.escape(NASTY) in panel
    assert 'alt="&quot;&gt;"' in image_tag(b"x", '">')
    assert "<script" not in note(NASTY)


def test_why_shows_each_frame_with_its_relevance_and_what_is_said_without_it(session):
    asked = session.ask(session.gifs[0], QUESTION, OPTIONS)
    frames = session.frames(asked.gif)
    panel = why_panel(asked, frames)
    assert len(frames) == len(asked.answer.relevance) == panel.count("<li>") == panel.count("<img")
    alts = re.findall(r'alt="([^"]+)"', panel)
    for alt, nats, without in zip(alts, asked.answer.relevance, asked.answer.hidden, strict=True):
        assert f"relevance {round(nats, 2) + 0.0:.2f} nats; without it the answer is {without}" in alt
    changed = sum(text != asked.answer.text for text in asked.answer.hidden)
    assert panel.count("→") == changed and f"so it is for {changed} of {len(frames)} frames" in panel


def test_frames_on_the_page_are_the_ones_the_model_saw(session, qa):
    gif = session.gifs[0]
    frames, times = qa.sample(gif.data)
    assert qa.sample(gif.data, THUMBNAIL_SIDE)[1] == times == qa.answer(gif.data, QUESTION).frame_times_ms
    assert len(session.frames(gif)) == len(frames) == len(qa.encode(gif.data)[0])


def test_blind_panel_needs_a_blind_answer(session):
    with pytest.raises(ValueError, match="blind"):
        answer_panel(session.ask(session.gifs[0], QUESTION), blind=True)


def luminance(color: str) -> float:
    color = color.lstrip("#")
    channels = [
        int(part * (2 if len(part) == 1 else 1), 16) / 255 for part in re.findall("." * (len(color) // 3), color)
    ]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


@pytest.mark.parametrize(
    ("text", "background"), [(".gq {", ".gq {"), (".quiet", ".gq {"), *[(k, k) for k in (".gq-note {", ".error")]]
)
def test_text_has_contrast(text, background):
    """WCAG 2.1, 1.4.3: at least 4.5 to 1."""

    def rule(selector, name):
        block = STYLE.split(selector)[1].split("}")[0]
        return re.search(rf"(?:^|[ {{;])(?:{name}): (#[0-9a-f]+)", block)[1]

    light, dark = sorted([luminance(rule(text, "color")), luminance(rule(background, "background"))], reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_still_panels_are_a_titled_figure_with_labelled_axes(session):
    asked = session.ask(session.gifs[0], "what is $5 ?", OPTIONS)
    session.ask_blind(asked)
    figure = still_panels(asked, session.frames(asked.gif))
    figure.savefig(BytesIO())
    assert "5 ?" in figure.get_suptitle() and "without the GIF" in figure.get_suptitle()
    strip, bars, nats = figure.axes
    assert all(axis.get_title(loc="left") or axis.get_title() for axis in figure.axes)
    assert "(s)" in strip.get_xlabel() and "(%)" in bars.get_xlabel() and "(nats)" in nats.get_ylabel()
    assert [patch.get_height() for patch in nats.patches] == pytest.approx(asked.answer.relevance)


# ---- The page ------------------------------------------------------------------------------------------------------


def finish(page: DemoPage) -> None:
    """Wait for the answer."""
    worker = page.worker
    if worker is not None:
        worker.join(60)
        assert not worker.is_alive()


def give(upload: ipywidgets.FileUpload, name: str, data: bytes) -> None:
    """Hand over a file as the browser's side of the installed ipywidgets does."""
    if ipywidgets.__version__.startswith("7."):
        state = {"metadata": [{"name": name, "type": "image/gif", "size": len(data), "lastModified": 0}]}
        upload.set_state({**state, "data": [memoryview(data)], "_counter": upload._counter + 1})
    else:
        file = {"name": name, "type": "image/gif", "size": len(data), "last_modified": 0}
        upload.set_state({"value": [file | {"content": memoryview(data)}]})


def press_enter(text: ipywidgets.Text) -> None:
    text._handle_custom_msg({"event": "submit"}, [])


def shown(widget: ipywidgets.Widget) -> str:
    """All HTML on the page."""
    parts = [widget.value] if isinstance(widget, ipywidgets.HTML) else []
    return "".join(parts + [shown(child) for child in getattr(widget, "children", ())])


@pytest.mark.parametrize("ask", [lambda page: page.ask_button.click(), lambda page: press_enter(page.question)])
def test_upload_ask_and_see_the_answer(page, qa, ask):
    data = gif_bytes(1)
    give(page.upload, "cat.gif", data)
    assert page.gif.data == data and "cat.gif is ready" in page.upload_note.value
    assert not page.upload.value  # so that the same file can be given again
    page.question.value = QUESTION
    ask(page)
    finish(page)
    answer = qa.answer(data, QUESTION)
    assert page.asked.answer == answer
    assert f"<strong>{html.escape(answer.text)}</strong>" in page.answer.value
    assert f"confidence {100 * answer.confidence:.1f} %" in page.answer.value
    assert "Answered in" in page.status.value and "<li>" in page.why.value
    assert len(page.rows.children) == len(page.session.history) == 1


def test_suggestions_fill_question_and_options(page, qa):
    suggestion = next(s for s in page.gif.suggestions if s.options)
    page.suggestions.value = suggestion
    assert page.question.value == suggestion.question
    page.ask()
    finish(page)
    assert page.asked.answer == qa.answer(page.gif.data, suggestion.question, suggestion.options)


def test_options_of_a_suggestion_go_with_its_question(page):
    suggestion = next(s for s in page.gif.suggestions if s.options)
    page.suggestions.value = suggestion
    assert parse_options(page.options.value) == list(suggestion.options)
    page.question.value = QUESTION
    assert page.options.value == ""
    page.options.value = "jump | duck"  # typed by hand
    page.question.value = "what does it do ?"
    assert page.options.value == "jump | duck"


def test_picking_a_gif_marks_it_and_offers_its_questions(page):
    last = page.session.gifs[-1]
    page.cards.children[-1].children[1].click()
    assert page.gif is last and html.escape(last.alt) in page.shown.value
    assert [label for label, _ in page.suggestions.options[1:]] == [s.question for s in last.suggestions]
    icons = [card.children[1].icon for card in page.cards.children]
    assert icons == [""] * (len(icons) - 1) + ["check"]


def test_an_answer_names_its_gif_and_goes_when_another_one_is_picked(page):
    page.question.value = QUESTION
    page.ask()
    finish(page)
    assert f"<p class=quiet>{html.escape(page.gif.name)}</p>" in page.answer.value and page.why.value
    page.select(page.session.gifs[-1])
    assert page.answer.value == page.why.value == "" and page.asked is None
    page.blind.value = True  # there is no answer that it could be about
    assert page.answer.value == "" and page.worker is None


def test_every_picture_has_a_text_and_is_a_gif_that_plays(page):
    pictures = re.findall("<img[^>]+>", shown(page.view))
    assert len(pictures) == len(page.session.gifs) + 1
    assert all(re.search('alt="animated GIF[^"]+"', p) and "data:image/gif;base64," in p for p in pictures)


def test_a_text_file_called_gif_is_told_beside_the_upload(page):
    before = page.gif
    give(page.upload, "notes.gif", b"just some text")
    assert "notes.gif cannot be used" in page.upload_note.value and 'role="alert"' in page.upload_note.value
    assert page.gif is before and page.status.value == ""
    give(page.upload, "<b>.gif", b"just some text")
    assert "&lt;b&gt;.gif cannot" in page.upload_note.value


@pytest.mark.parametrize(
    ("question", "options", "message"),
    [
        ("", "", "the question is empty"),
        ("x" * 500, "", "the question has 500 characters"),
        (QUESTION, "jump", "two or more options"),
    ],
)
def test_faults_are_told_beside_the_button_and_the_page_goes_on(page, question, options, message):
    page.question.value, page.options.value = question, options
    page.ask()
    finish(page)
    assert message in page.status.value and 'role="alert"' in page.status.value
    assert not page.session.history and page.answer.value == ""
    page.question.value, page.options.value = QUESTION, ""
    page.ask()
    finish(page)
    assert "Answered in" in page.status.value


def test_a_fault_of_the_model_does_not_leave_the_page_waiting(page, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of <memory>")

    monkeypatch.setattr(page.session, "ask", fail)
    page.question.value = QUESTION
    page.ask()
    finish(page)
    assert "RuntimeError: out of &lt;memory&gt;" in page.status.value
    assert page.worker is None


def test_a_second_click_is_ignored_and_told_and_the_page_is_alive_meanwhile(page, monkeypatch):
    go, ask = threading.Event(), page.session.ask

    def slow(*given):
        assert go.wait(60)
        return ask(*given)

    monkeypatch.setattr(page.session, "ask", slow)
    page.question.value = QUESTION
    page.ask()
    worker = page.worker
    assert "Looking at" in page.status.value
    page.ask()
    assert page.worker is worker and "the second click was ignored" in page.status.value
    page.select(page.session.gifs[-1])  # what is asked about is what was picked when it was asked
    go.set()
    worker.join(60)
    assert page.asked.gif is page.session.gifs[0]
    assert "Answered in" in page.status.value and "the second click was ignored" in page.status.value
    assert len(page.session.history) == 1
    page.ask()
    finish(page)
    assert "ignored" not in page.status.value


def test_blind_toggle_shows_and_hides_what_is_said_without_the_gif(page, qa):
    page.blind.value = True  # nothing was asked yet: nothing to show
    page.blind.value = False
    page.question.value = QUESTION
    page.ask()
    finish(page)
    assert "Without seeing the GIF" not in page.answer.value
    page.blind.value = True
    finish(page)
    said = html.escape(qa.answer(None, QUESTION).text)
    assert f"<b>Without seeing the GIF</b> it says <strong>{said}</strong>" in page.answer.value
    page.blind.value = False
    assert "Without seeing the GIF" not in page.answer.value
    page.blind.value = True
    assert "Without seeing the GIF" in page.answer.value


def test_history_is_corrected_and_exported_from_the_page(page, tmp_path):
    page.export()
    assert "nothing to export" in page.history_note.value
    page.question.value = "How many times does it jump ?"
    page.ask()
    finish(page)
    right, fault = page.rows.children[0].children[1].children
    right.value = "often"
    assert "is no count" in fault.value
    right.value = "0"  # never, and not TGIF-QA's code for once
    assert "from 1 to 10, as the model counts" in fault.value
    right.value = "7"
    assert fault.value == ""
    page.export()
    [path] = (tmp_path / "asked").glob("*/qa.csv")
    assert str(path.parent) in page.history_note.value and 'download="qa.csv"' in page.history_note.value
    assert own_gifs.load(path.parent, path, holdout=0).questions["answer"].tolist() == ["7"]


def test_nothing_that_was_typed_enters_the_page_as_html(page):
    give(page.upload, f"{NASTY}.gif", gif_bytes(1))
    page.question.value, page.options.value = NASTY, f"{NASTY} | {NASTY}2"
    page.ask()
    finish(page)
    assert page.asked is not None
    assert "<script" not in shown(page.view)


def test_a_page_needs_a_gif(qa, tmp_path):
    with pytest.raises(ValueError, match="no GIF on show"):
        DemoPage(Session(qa), tmp_path)


def test_the_same_on_the_ipywidgets_of_colab():
    """Colab has ipywidgets 7.7, whose FileUpload hands over another shape: this file again, in another process."""
    folder = os.environ.get("IPYWIDGETS_7", "")
    if not folder:
        pytest.skip(
            "no ipywidgets 7.7: pip install --no-deps --target DIR ipywidgets==7.7.1 ipython_genutils, IPYWIDGETS_7=DIR"
        )
    path = os.pathsep.join([folder, str(repo_root())])
    common = {"env": os.environ | {"PYTHONPATH": path, "IPYWIDGETS_7": ""}, "cwd": repo_root(), "text": True}
    version = [sys.executable, "-c", "import ipywidgets; print(ipywidgets.__version__)"]
    assert subprocess.check_output(version, **common).startswith("7.7.")
    line = [sys.executable, "-m", "pytest", "-x", __file__, "-k", "not ranks_first"]
    done = subprocess.run(line, **common, capture_output=True)
    assert done.returncode == 0, done.stdout[-3000:]


# ---- The notebook's stage ------------------------------------------------------------------------------------------


def test_the_demo_may_be_open_twice_and_change_its_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path))
    code = (
        "import sys; from helpers.stage import Stage\n"
        "stage = Stage('08_demo', profile='tiny', parameters={'bundle': '', 'gallery': sys.argv[1]})\n"
        "stage.finish({}); print('open', flush=True); sys.stdin.read()"
    )
    pages = [
        subprocess.Popen(
            [sys.executable, "-c", code, gallery],
            cwd=repo_root(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for gallery in ("", "my_gifs")
    ]
    try:
        assert [page.stdout.readline() for page in pages] == ["open\n", "open\n"]
    finally:
        for page in pages:
            page.communicate("")


# ---- Relevance -----------------------------------------------------------------------------------------------------


def single_event(seed: int) -> tuple[bytes, str, list[str], str, int]:
    """A GIF in which one frame alone shows the answer: its bytes, the question, options, answer and that frame.

    The subject repeats an action two to four times and then does another one, once, for a single frame.
    """
    rng = np.random.default_rng([seed, 77])
    first, then, *others = rng.permutation(list(shapes.ACTIONS)).tolist()
    shape, item_shape = rng.permutation(list(shapes.SHAPES))[:2].tolist()
    color, item_color = rng.permutation(list(shapes.COLORS))[:2].tolist()
    times = int(rng.integers(2, 5))
    states: list[str | None] = [None]
    for _ in range(times):
        states += [first] * int(rng.integers(1, 3)) + [None] * int(rng.integers(1, 3))
    frame = len(states)
    states += [then] + [None] * int(rng.integers(1, 3))
    scene = shapes.Scene(
        name=f"event-{seed}",
        shape=shape,
        color=color,
        place=str(rng.choice(list(shapes.PLACES))),
        item_shape=item_shape,
        item_color=item_color,
        items=int(rng.integers(1, 6)),
        blocks=((first, times), (then, 1)),
        states=tuple(states),
        durations_ms=(80,) * len(states),
        seed=int(rng.integers(2**31)),
    )
    out = BytesIO()
    shapes.write_gif(scene, out)
    options = rng.permutation([then, *others[:4]]).tolist()
    return out.getvalue(), f"What does the {shape} do after {first} ?", options, then, frame


@pytest.mark.skipif(not (SHIPPED_BUNDLE / "bundle.json").is_file(), reason="no trained bundle is shipped")
def test_the_frame_that_alone_shows_the_answer_ranks_first_in_relevance():
    qa, ranks, right = GifQA.from_pretrained(SHIPPED_BUNDLE), [], []
    for seed in range(100):
        data, question, options, truth, frame = single_event(seed)
        answer = qa.answer(data, question, options)
        assert len(answer.relevance) == Image.open(BytesIO(data)).n_frames  # every frame is sampled
        ranks.append(int(np.argsort(np.argsort(-np.array(answer.relevance)))[frame]))
        right.append(answer.text == truth)
    assert np.mean(np.array(ranks) == 0) >= 0.9, f"ranks {ranks}; answered right: {np.mean(right):.2f}"
