"""The demo as a page of ipywidgets (7.7 and 8.1), for Jupyter, Kaggle, Colab and Voila: no server, no account.

The model runs in a thread of its own, one question at a time, so that the page stays alive. Whatever goes wrong is
told in plain words beside the control that it belongs to.
"""

from __future__ import annotations

import base64
import html
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from helpers.demo.panels import STYLE, answer_panel, note, why_panel
from helpers.demo.science import Science, problem_panel, regions_panel, science_panel
from helpers.demo.session import Asked, Gif, Session, Suggestion, parse_options, read_uploads
from helpers.gifs.decode import GifRejected
from helpers.plots.look import image_tag

WIDE = widgets.Layout(width="auto")
LABELLED = {"description_width": "80px"}
ONE_AT_A_TIME = "One question at a time: the second click was ignored."
BUSY = "The model is busy in the other tab: click again when it is done."
MAX_LABEL = 90  # characters of a problem in the list


class DemoPage:
    """Gallery, question, answer, why, and history; and ScienceQA. Name `page.view` in a notebook's cell to show it.

    session: with at least one GIF on show. exports: the folder that exported questions go to. notes: sentences shown
    beside the gallery. science: fills a tab of its own. Raises ValueError for a session without a GIF.
    """

    def __init__(
        self, session: Session, exports: Path, notes: tuple[str, ...] = (), science: Science | None = None
    ) -> None:
        if not session.gifs:
            raise ValueError("the session has no GIF on show: add one first (Session.add, Session.add_folder)")
        self.session, self.exports = session, exports
        self.gif = session.gifs[0]
        self.asked: Asked | None = None
        self.worker: threading.Thread | None = None
        self._turn, self._ignored, self._told = threading.Lock(), False, None
        self.science = science
        self._gallery(notes)
        self._question()
        self._history()
        tabs = {"Ask": self._ask_tab(), "History": self._history_tab()}
        if science is not None:
            tabs["Science"] = self._science_tab(science)
        self.tabs = widgets.Tab(children=list(tabs.values()))
        for number, title in enumerate(tabs):
            self.tabs.set_title(number, title)
        self.view = widgets.VBox([widgets.HTML(STYLE), self.tabs], layout=widgets.Layout(max_width="1080px"))
        self.select(self.gif)

    # ---- Making the widgets ----------------------------------------------------------------------------------------

    def _gallery(self, notes: tuple[str, ...]) -> None:
        self.cards = widgets.Box(layout=widgets.Layout(flex_flow="row wrap"))
        self.upload = widgets.FileUpload(accept=".gif", multiple=True, description="Upload GIFs")
        self.upload.observe(self._on_upload, "value")
        self.upload_note = widgets.HTML(note(". ".join(notes), error=True))
        self._buttons: dict[str, widgets.Button] = {}
        for gif in self.session.gifs:
            self._add_card(gif)

    def _add_card(self, gif: Gif) -> None:
        button = widgets.Button(
            description=gif.name.removesuffix(".gif").replace("-", " "),
            tooltip=f"Ask about {gif.name}",
            layout=widgets.Layout(width="auto"),
        )
        button.on_click(lambda _: self.select(gif))
        self._buttons[gif.name] = button
        picture = widgets.HTML(
            image_tag(self.session.picture(gif), gif.alt, style="gq-gif"), layout=widgets.Layout(height="110px")
        )
        card = widgets.VBox([picture, button], layout=widgets.Layout(width="150px", margin="0 10px 10px 0"))
        self.cards.children = (*self.cards.children, card)

    def _question(self) -> None:
        self.shown = widgets.HTML(layout=widgets.Layout(width="260px", height="260px", margin="0 14px 0 0"))
        self.suggestions = widgets.Dropdown(description="Suggested", options=[("", None)], layout=WIDE, style=LABELLED)
        self.suggestions.observe(self._on_suggestion, "value")
        self.question = widgets.Text(
            description="Question", placeholder="what is moving ?", layout=WIDE, style=LABELLED
        )
        self.options = widgets.Text(
            description="Options", placeholder="none, or: jump | duck | blink", layout=WIDE, style=LABELLED
        )
        self._suggested: Suggestion | None = None
        self.question.observe(self._on_question, "value")
        for text in (self.question, self.options):
            text.on_msg(self._on_message)
        self.ask_button = widgets.Button(description="Ask", button_style="primary")
        self.ask_button.on_click(lambda _: self.ask())
        self.blind = widgets.Checkbox(
            description="Show what it says without seeing the GIF (blind)", indent=False, layout=WIDE
        )
        self.blind.observe(lambda _: self._on_blind(), "value")
        self.status, self.answer, self.why = widgets.HTML(), widgets.HTML(), widgets.HTML()

    def _ask_tab(self) -> widgets.VBox:
        about = f"The model: {html.escape(self.session.origin)}. " if self.session.origin else ""
        twin = "a twin that was trained without video" if self.session.has_blind_twin else "the same model, no frames"
        intro = widgets.HTML(
            f'<div class="gq"><p>Pick a GIF, type a question or pick a suggested one, press Enter or Ask. {about}'
            f"Blind answers come from {twin}.</p></div>"
        )
        buttons = widgets.HBox([self.ask_button, self.blind])
        controls = widgets.VBox(
            [self.suggestions, self.question, self.options, buttons, self.status],
            layout=widgets.Layout(flex="1 1 420px"),
        )
        top = widgets.Box([self.shown, controls], layout=widgets.Layout(flex_flow="row wrap", margin="8px 0"))
        limit = widgets.HTML("up to 8 MB together: Jupyter lets no more through at once")
        upload = widgets.VBox([widgets.HBox([self.upload, limit]), self.upload_note])
        return widgets.VBox([intro, self.cards, upload, top, self.answer, self.why])

    def _history(self) -> None:
        self.rows = widgets.VBox()
        self.export_button = widgets.Button(
            description="Export as CSV", tooltip="Write the questions and right answers as training data"
        )
        self.export_button.on_click(lambda _: self.export())
        self.history_note = widgets.HTML()

    def _history_tab(self) -> widgets.VBox:
        intro = widgets.HTML(
            '<div class="gq"><p>What was asked. Mend the right answer where the model was wrong; clear it to leave the '
            "question out. The export is a folder of the GIFs with a qa.csv, which notebook 01 takes as your own GIFs: "
            "so corrections become training data.</p></div>"
        )
        return widgets.VBox([intro, self.rows, self.export_button, self.history_note])

    def _science_tab(self, science: Science) -> widgets.VBox:
        intro = widgets.HTML(
            '<div class="gq"><p>Pick a problem of ScienceQA\'s kind; ADEM-VL, a language model that learnt to look at '
            "images, chooses. Beside each choice stands how likely it is, and beneath it what it would be without the "
            f"image. The model: {html.escape(science.found.origin)}. It is loaded when first asked.</p></div>"
        )
        listed = [(_label(problem), number) for number, problem in enumerate(science.problems)]
        self.problem = widgets.Dropdown(description="Problem", options=listed, layout=WIDE, style=LABELLED)
        self.problem.observe(lambda _: self._show_problem(), "value")
        self.science_button = widgets.Button(description="Answer it", button_style="primary")
        self.science_button.on_click(lambda _: self.ask_science())
        self.science_status, self.set_problem = widgets.HTML(), widgets.HTML()
        self.science_answer, self.regions = widgets.HTML(), widgets.HTML()
        self._show_problem()
        parts = [self.problem, self.set_problem, self.science_button, self.science_status]
        return widgets.VBox([intro, *parts, self.science_answer, self.regions])

    # ---- What a person does ----------------------------------------------------------------------------------------

    def select(self, gif: Gif) -> None:
        """Make `gif` the one that is asked about."""
        self.gif = gif
        for name, button in self._buttons.items():
            chosen = name == gif.name
            button.icon, button.button_style = ("check", "primary") if chosen else ("", "")
        self.shown.value = image_tag(self.session.picture(gif), gif.alt, style="gq-gif")
        self.asked, self.answer.value, self.why.value = None, "", ""  # they are about another GIF
        listed = [(suggestion.question, suggestion) for suggestion in gif.suggestions]
        self.suggestions.options = [("pick a question ...", None), *listed]

    def _on_suggestion(self, change: dict) -> None:
        suggestion: Suggestion | None = change["new"]
        if suggestion is not None:
            self._suggested = suggestion
            self.question.value = suggestion.question
            self.options.value = " | ".join(suggestion.options)

    def _on_question(self, change: dict) -> None:
        # Options of a suggestion belong to its question; left behind, they would turn any other into a choice.
        if self._suggested is not None and change["new"] != self._suggested.question:
            if parse_options(self.options.value) == list(self._suggested.options):
                self.options.value = ""
            self._suggested = None

    def _on_upload(self, change: dict) -> None:
        files = read_uploads(change["new"])
        if not files:
            return
        faults, added = [], None
        for name, data in files:
            known = len(self.session.gifs)
            try:
                added = self.session.add(name, data)
            except GifRejected as error:
                faults.append(error.reason)
                continue
            if len(self.session.gifs) > known:
                self._add_card(added)
        # An empty value lets the same file be given again; its type is the one of the ipywidgets that runs.
        self.upload.set_trait("value", type(change["new"])())
        if added:
            self.select(added)
        self.upload_note.value = note(". ".join(faults), error=True) or note(f"{added.name} is ready: ask about it.")

    def _on_message(self, _: widgets.Widget, content: dict, __: list) -> None:
        # Enter. `on_submit` is deprecated, and its successor would also ask when the field only loses the focus.
        if content.get("event") == "submit":
            self.ask()

    def ask(self) -> None:
        """Ask the question that stands on the page; the answer appears when the model is done."""
        gif, question, options = self.gif, self.question.value, parse_options(self.options.value)
        self._start(f"Looking at {gif.name} ...", lambda: self._answer(gif, question, options))

    def _answer(self, gif: Gif, question: str, options: list[str]) -> str:
        asked = self.session.ask(gif, question, options)
        if self.blind.value:
            self.session.ask_blind(asked)
        self.asked = asked
        self.session.history.append(asked)
        self._add_row(asked)
        self._show_answer()
        self.why.value = why_panel(asked, self.session.frames(gif))
        return f"Answered in {asked.seconds:.2f} s."

    def _on_blind(self) -> None:
        asked = self.asked
        if asked is None:
            return
        if not self.blind.value or asked.blind is not None:
            self._show_answer()
            return

        def ask_blind() -> str:
            self.session.ask_blind(asked)
            self._show_answer()
            return "Asked again without the GIF."

        self._start("Asking again without the GIF ...", ask_blind)

    def _show_answer(self) -> None:
        self.answer.value = answer_panel(self.asked, blind=self.blind.value and self.asked.blind is not None)

    def _show_problem(self) -> None:
        self.set_problem.value = problem_panel(self.science.problems[self.problem.value])
        self.science_answer.value = self.regions.value = self.science_status.value = ""

    def ask_science(self) -> None:
        """Have the problem that stands in the science tab answered."""
        number = self.problem.value
        problem = self.science.problems[number]

        def answer() -> str:
            answered = self.science.ask(problem)
            if self.problem.value == number:
                self.science_answer.value = science_panel(answered)
            regions = regions_panel(problem, *self.science.regions(problem)) if problem["image"] else ""
            if self.problem.value != number:
                return "Another problem was picked meanwhile."
            self.regions.value = regions
            return f"Answered in {answered.seconds:.2f} s."

        self._start("Looking at the problem ...", answer, self.science_status)

    def _start(self, message: str, work: Callable[[], str], status: widgets.HTML | None = None) -> None:
        """Run `work` in the worker thread and show the sentence it returns; while it runs, further clicks are told."""
        status = status or self.status
        with self._turn:
            if self.worker is not None:
                self._ignored = self._ignored or status is self._told
                status.value = note(f"{message} {ONE_AT_A_TIME}" if status is self._told else BUSY)
                return
            self._ignored, self._told = False, status
            status.value = note(message)
            self.worker = threading.Thread(target=self._run, args=(work, status), daemon=True)
        self.worker.start()

    def _run(self, work: Callable[[], str], status: widgets.HTML) -> None:
        try:
            text, fault = work(), False
        except (ValueError, OSError) as error:  # what a person can mend: the question, the options, the GIF, weights
            text, fault = f"This could not be asked: {error}", True
        except Exception as error:  # anything else must not leave the page waiting for ever
            text, fault = f"The model failed ({type(error).__name__}: {error}). Try another question or GIF.", True
        with self._turn:  # else a click between the two lines would leave its message standing
            status.value = note(f"{text} {ONE_AT_A_TIME}" if self._ignored else text, fault)
            self.worker = None

    def _add_row(self, asked: Asked) -> None:
        """A line of the history, with the right answer open to correction."""
        said = f"{asked.gif.name}: {asked.question}"
        options = f" ({' | '.join(asked.options)})" if asked.options else ""
        text = f"<b>{html.escape(said)}</b>{html.escape(options)}<br>it says {html.escape(asked.answer.text)}"
        label = widgets.HTML(f'<div class="gq">{text}</div>', layout=widgets.Layout(flex="1 1 auto"))
        right = widgets.Text(
            value=asked.right, description="Right answer", continuous_update=False, style={"description_width": "90px"}
        )
        fault = widgets.HTML()

        def correct(change: dict) -> None:
            try:
                asked.correct(change["new"])
                fault.value = ""
            except ValueError as error:
                fault.value = note(f"Not taken: {error}", error=True)

        right.observe(correct, "value")
        mending = widgets.VBox([right, fault], layout=widgets.Layout(flex="0 0 320px"))
        row = widgets.HBox([label, mending], layout=widgets.Layout(margin="4px 0"))
        self.rows.children = (row, *self.rows.children)

    def export(self) -> None:
        """Write the history with its right answers and tell where, with a link that saves the CSV."""
        try:
            path = self.session.export(self.exports)
        except (ValueError, OSError) as error:
            self.history_note.value = note(f"Nothing was written: {error}", error=True)
            return
        encoded = base64.b64encode(path.read_bytes()).decode()
        folder = html.escape(str(path.parent))
        self.history_note.value = (
            f'<div class="gq-note" role="status">Written to {folder} (GIFs and qa.csv). '
            f'<a download="qa.csv" href="data:text/csv;base64,{encoded}">Save the CSV</a><br>'
            f'Train on it: <code>./run_all.sh --gifs "{folder}" --qa "{folder}/qa.csv" --holdout 0.2</code></div>'
        )


def _label(problem: Mapping[str, Any]) -> str:
    """A problem's line in the list."""
    text = f"{problem['pid']}: {problem['question']}" + ("" if problem["image"] else " (no image)")
    return text if len(text) <= MAX_LABEL else text[: MAX_LABEL - 1] + "…"
