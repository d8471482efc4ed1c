"""A real browser drives notebook 08, in JupyterLab and as a Voila page: upload, ask, break it, export, science.

Screenshots go to the run's folder, and to the folder SCREENSHOTS where that is set. The README shows
demo_voila_count.png.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from PIL import Image, ImageDraw

from helpers.config import load_profile
from helpers.corpora import own_gifs
from helpers.demo.found import SHIPPED_BUNDLE
from helpers.models.gif_qa.ask import GifQA
from helpers.models.gif_qa.model import GifQAModel
from helpers.workspace.place import repo_root

ROOT = repo_root()
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUESTION = "what color is the circle ?"
PATIENCE = 120_000  # ms; a kernel that loads torch on a busy machine takes its time


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium of the system; tests are skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on PATH (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])  # root has no sandbox
        yield running
        running.close()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """The shipped bundle, or where none is shipped one that was not trained."""
    if (SHIPPED_BUNDLE / "bundle.json").is_file():
        return SHIPPED_BUNDLE
    folder, profile = tmp_path_factory.mktemp("untrained"), load_profile("tiny")
    GifQAModel.build(profile, video=False).save_bundle(folder / "blind")
    return GifQAModel.build(profile).save_bundle(folder / "bundle")


@pytest.fixture(scope="module")
def clone(tmp_path_factory, bundle):
    """A folder that looks like the clone: Jupyter saves the notebooks that it runs."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "helpers").symlink_to(ROOT / "helpers")
    (folder / "notebooks").mkdir()
    book = nbformat.read(ROOT / "notebooks" / "08_demo.ipynb", as_version=4)
    assert 'bundle = ""' in book.cells[1].source
    if bundle != SHIPPED_BUNDLE:  # which the notebook finds by itself
        book.cells[1].source = book.cells[1].source.replace('bundle = ""', f'bundle = "{bundle}"')
    nbformat.write(book, folder / "notebooks" / "08_demo.ipynb")
    return folder


@pytest.fixture(scope="module")
def circle(tmp_path_factory):
    """A GIF of a red circle that moves, as a file."""
    frames = []
    for step in range(12):
        frame = Image.new("RGB", (96, 96), (58, 92, 48))
        ImageDraw.Draw(frame).ellipse((6 + 4 * step, 30, 40 + 4 * step, 64), fill=(225, 30, 30), outline="black")
        frames.append(frame)
    path = tmp_path_factory.mktemp("gifs") / "my circle.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=90, loop=0)
    return path


class Server:
    """JupyterLab or Voila on a free port, with settings of its own; `url` opens notebook 08."""

    def __init__(self, kind: str, clone: Path, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.kind, self.runs, token = kind, folder / "runs", "test"
        if kind == "lab":
            line = ["jupyterlab", "--allow-root", f"--ServerApp.port={self.port}", "--ServerApp.port_retries=0"]
            line += ["--no-browser", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={clone}"]
            self.url = f"http://127.0.0.1:{self.port}/lab/tree/notebooks/08_demo.ipynb?token={token}"
        else:
            line = ["voila", str(clone / "notebooks" / "08_demo.ipynb"), f"--port={self.port}", "--no-browser"]
            self.url = f"http://127.0.0.1:{self.port}/"
        names = (
            "JUPYTER_CONFIG_DIR",
            "JUPYTER_DATA_DIR",
            "JUPYTER_RUNTIME_DIR",
            "JUPYTERLAB_SETTINGS_DIR",
            "IPYTHONDIR",
        )
        own = {name: str(folder / name.lower()) for name in names}
        environment = os.environ | own | {"RUNS_ROOT": str(self.runs), "PYTHONPATH": str(ROOT)}
        news = (
            folder
            / "jupyterlab_settings_dir"
            / "@jupyterlab"
            / "apputils-extension"
            / "notification.jupyterlab-settings"
        )
        news.parent.mkdir(parents=True)
        news.write_text('{"fetchNews": "false"}')  # else a question about news lies over the page
        self.log = (folder / "server.log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", *line], cwd=clone, env=environment, stdout=self.log, stderr=subprocess.STDOUT
        )

    def wait(self) -> None:
        """Wait until it listens; raises RuntimeError with its log if it does not."""
        until = time.monotonic() + 120
        while time.monotonic() < until and self.process.poll() is None:
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1):
                    return
            except OSError:
                time.sleep(0.3)
        raise RuntimeError(f"{self.kind} did not start:\n{self.tail()}")

    def tail(self) -> str:
        """The end of the server's log."""
        return Path(self.log.name).read_text(encoding="utf-8")[-3000:]

    def stop(self) -> None:
        """End the server; its kernels end with it."""
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.log.close()


@pytest.fixture(scope="module", params=["lab", "voila"])
def opened(request, browser, clone, tmp_path_factory):
    """Notebook 08 in the browser, run from top to bottom; with its server."""
    server = Server(request.param, clone, tmp_path_factory.mktemp(request.param))
    page = browser.new_page(viewport={"width": 1180, "height": 1900})
    try:
        server.wait()
        page.goto(server.url, timeout=PATIENCE)
        if request.param == "lab":
            page.get_by_text("| Idle").wait_for(timeout=PATIENCE)  # cells run before the kernel is there are lost
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        try:
            ask(page).wait_for(timeout=PATIENCE)
        except Exception as error:
            screenshot(page, server, "failure")
            raise RuntimeError(f"{server.kind} shows no demo; its log ends:\n{server.tail()}") from error
        yield page, server
    finally:
        page.close()
        server.stop()


def ask(page):
    return page.get_by_role("button", name="Ask", exact=True)


def question(page):
    return page.get_by_role("textbox", name="Question")


def note(page, text):
    """The message with this text, once it is there."""
    found = page.locator(".gq-note", has_text=text).first
    found.wait_for(timeout=PATIENCE)
    return found


def upload(page, path):
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Upload GIFs").click()
    chooser.value.set_files(path)


def screenshot(page, server, name):
    """Keep a picture of the demo, or of all that is there if the demo is not."""
    demo = page.locator(".jupyter-widget-tab, .widget-tab").first
    for folder in (server.runs / "tiny" / "08_demo" / "screenshots", os.environ.get("SCREENSHOTS")):
        if folder is not None:
            path = Path(folder) / f"demo_{server.kind}_{name}.png"
            (demo if demo.is_visible() else page).screenshot(path=path)
            assert path.stat().st_size > 10_000


def test_upload_ask_and_see_what_gifqa_answers(opened, circle, bundle):
    page, server = opened
    upload(page, circle)
    note(page, "my-circle.gif is ready")
    question(page).fill(QUESTION)
    question(page).press("Enter")
    note(page, "Answered in")
    answer = GifQA.from_pretrained(bundle).answer(circle, QUESTION)
    panel = page.get_by_role("region", name="Answer")
    assert panel.locator(".answer").inner_text() == answer.text
    assert f"confidence {100 * answer.confidence:.1f} %" in panel.inner_text()
    assert [row.inner_text() for row in panel.locator("th").all()] == [
        answer.text,
        *(text for text, _ in answer.alternatives[:4]),
    ]
    frames = page.get_by_role("region", name="Why").get_by_role("img")
    assert frames.count() == len(answer.relevance) == 12
    assert all(picture.get_attribute("alt") for picture in page.locator(".gq-gif, .gq img").all())
    # every GIF is really drawn
    assert page.locator(".gq-gif").evaluate_all("all => all.every(one => one.complete && one.naturalWidth > 0)")
    screenshot(page, server, "upload")


def pick(page, card, words):
    """Pick a GIF by its card and a suggested question by some of its words, with the keyboard; returns the question.

    The words must be of this GIF alone: the questions of the one before are there for a moment longer.
    """
    button = page.get_by_role("button", name=card).first
    button.focus()
    button.press("Enter")
    suggested = page.get_by_role("combobox", name="Suggested")
    option = suggested.locator("option").filter(has_text=re.compile(words.replace(" ", r"\s")))
    option.wait_for(state="attached")
    text = option.inner_text().replace("\xa0", " ")
    suggested.select_option(value=option.get_attribute("value"))
    return text


def test_a_suggested_multiple_choice_question_with_the_keyboard_alone(opened):
    page, server = opened
    panel = page.get_by_role("region", name="Answer")
    page.get_by_role("checkbox", name="Show what it says").press("Space")
    panel.get_by_text("Without seeing the GIF").wait_for(timeout=PATIENCE)  # of the question before
    wanted = pick(page, "yellow heart", "heart do (before|after)")
    ask(page).press("Enter")
    panel.locator("h4", has_text=wanted).wait_for(timeout=PATIENCE)
    note(page, "Answered in")
    assert panel.locator("th").count() == 5
    assert panel.get_by_text("Without seeing the GIF").is_visible()
    screenshot(page, server, "choice")


def test_a_count_is_a_distribution_over_numbers(opened):
    page, server = opened
    wanted = pick(page, "red star", "How many times does the star")
    question(page).press("Enter")
    panel = page.get_by_role("region", name="Answer")
    panel.locator("h4", has_text=wanted).wait_for(timeout=PATIENCE)
    note(page, "Answered in")
    assert panel.locator("th").all_inner_texts() == [str(number) for number in range(1, 11)]
    screenshot(page, server, "count")


def test_what_goes_wrong_is_told_and_the_page_goes_on(opened, tmp_path):
    page, server = opened
    fake = tmp_path / "notes.gif"
    fake.write_text("just some text")
    upload(page, fake)
    note(page, "notes.gif cannot be used")
    question(page).fill("")
    ask(page).click()
    note(page, "the question is empty")
    screenshot(page, server, "faults")
    question(page).fill("x" * 500)
    ask(page).click()
    note(page, "the question has 500 characters")
    question(page).fill("How many times does it jump ?")
    ask(page).dblclick()
    note(page, "the second click was ignored")
    note(page, "Answered in")


def test_corrections_are_exported(opened):
    page, server = opened
    page.get_by_role("tab", name="History").click()
    right = page.get_by_role("textbox", name="Right answer").first
    right.fill("7")
    right.press("Enter")
    page.get_by_role("button", name="Export as CSV").click()
    note(page, "Written to")
    screenshot(page, server, "history")
    [path] = (server.runs / "tiny" / "asked").glob("*/qa.csv")
    corpus = own_gifs.load(path.parent, path, holdout=0)
    assert len(corpus.rejects) == 0
    counts = corpus.questions[corpus.questions["task"] == "count"]
    assert counts["answer"].iloc[-1] == "7" and len(counts) == 2  # the double click asked once
    assert QUESTION in corpus.questions["question"].tolist()


def test_a_science_problem_is_answered(opened):
    page, server = opened
    page.get_by_role("tab", name="Science").click()
    problem = page.get_by_role("combobox", name="Problem")
    color = problem.locator("option").filter(has_text=re.compile(r"color.is.the.figure"))
    problem.select_option(value=color.get_attribute("value"))
    page.get_by_role("region", name="Problem").locator("h4", has_text="color is the figure").wait_for(timeout=PATIENCE)
    page.get_by_role("button", name="Answer it").click()
    page.get_by_role("region", name="Regions").wait_for(timeout=PATIENCE)
    panel = page.get_by_role("region", name="Science answer")
    assert "That is right" in panel.inner_text() and panel.locator("table").count() == 2
    assert page.get_by_role("region", name="Regions").get_by_role("img").count() == 2
    screenshot(page, server, "science")


def test_the_stage_is_finished(opened):
    _, server = opened
    path = server.runs / "tiny" / "08_demo" / "stage.json"
    until = time.monotonic() + PATIENCE / 1000
    while not path.is_file() and time.monotonic() < until:
        time.sleep(0.5)
    metrics = json.loads(path.read_text())["metrics"]
    assert metrics["gifs"] == 6
    assert metrics["answers"] == 0  # a page that is open has no use for still figures, and they would hold it up
