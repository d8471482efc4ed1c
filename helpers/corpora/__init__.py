"""Corpora: where questions and their GIFs come from, all in one table schema.

A question is one row of `QUESTION_COLUMNS`:

    question_id  str        unique over the corpus
    gif          str        the data set's name of the GIF
    split        str        "train" or "test"
    task         str        one of `TASKS`
    question     str
    options      list[str]  the options of action and transition; empty for the other tasks
    answer       str        text of the right option; count: the raw label as text; frameqa: the word
    label        int        index of the right option; count: the raw label (0 is the code for "once"); frameqa: -1
    type         str        frameqa: one of `TYPES`; empty for the other tasks
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from helpers.config import Profile

TASKS = ("count", "action", "transition", "frameqa")
MULTIPLE_CHOICE = ("action", "transition")
TYPES = ("object", "number", "color", "location")  # in the order of TGIF-QA's type codes 0 to 3
SPLITS = ("train", "test")
MAX_COUNT = 10
QUESTION_COLUMNS = ["question_id", "gif", "split", "task", "question", "options", "answer", "label", "type"]
REJECT_COLUMNS = ["item", "where", "reason"]

COLOR_FORM = re.compile(r"(of |in )?(what|which)( is| are| was| were)?( the)? colou?rs?\b")


class CorpusError(ValueError):
    """A corpus that cannot be loaded at all: what is wrong, in which file, and what to do."""


class RowError(ValueError):
    """One question that cannot be used; its message is the reason in the table of rejects."""


@dataclass(frozen=True)
class Corpus:
    """Questions, and where the GIFs they ask about are found."""

    name: str
    questions: pd.DataFrame
    """One row a question: `QUESTION_COLUMNS`."""
    gifs: dict[str, str]
    """GIF name -> local path, "archive.zip::member", or http(s) URL. Empty if only the text was asked for."""
    rejects: pd.DataFrame
    """What was left out: `item` (a GIF, a file or a question), `where` (file and row), `reason`."""


def question_form(question: str) -> str:
    """The FrameQA type that a question's wording asks for, one of `TYPES`.

    TGIF-QA generated each type from one template ("how many", "what is the color", "where", else an object), so that
    the wording gives the annotated type of all 13,691 test questions.
    """
    text = question.strip().lower()
    if text.startswith("how many"):
        return "number"
    if COLOR_FORM.match(text):
        return "color"
    return "location" if text.startswith("where") else "object"


def question_row(
    *,
    question_id: str,
    gif: str,
    split: str,
    task: str,
    question: str,
    answer: str,
    options: Sequence[str] = (),
    type: str = "",
) -> dict[str, Any]:
    """One checked row of the question table; `answer` is a 0-based option index, an integer count, or a word.

    Raises `RowError` with the reason if the question cannot be used.
    """
    if task not in TASKS:
        raise RowError(f"unknown task {task!r}; the tasks are {', '.join(TASKS)}")
    if not question:
        raise RowError("the question is empty")
    options, label = list(options), -1
    if task in MULTIPLE_CHOICE:
        label = _integer(answer, "the answer of a multiple-choice question is a 0-based option index")
        if len(options) < 2 or "" in options:
            raise RowError(f"{task} needs two or more options, none of them empty; found {options}")
        if not 0 <= label < len(options):
            raise RowError(
                f"option index {label} is out of range: the {len(options)} options are 0 to {len(options) - 1}"
            )
        answer = options[label]
    elif task == "count":
        label = _integer(answer, "a count is an integer")
        if not 0 <= label <= MAX_COUNT:
            raise RowError(f"the count {label} is outside 0 to {MAX_COUNT} (0 is the code for once)")
        answer = str(label)
    elif not answer:
        raise RowError("the answer is empty")
    if task == "frameqa":
        type = type or question_form(question)
        if type not in TYPES:
            raise RowError(f"unknown type {type!r}; the types are {', '.join(TYPES)}")
    values = (question_id, gif, split, task, question, options, answer, label, type if task == "frameqa" else "")
    return dict(zip(QUESTION_COLUMNS, values, strict=True))


def _integer(text: str, rule: str) -> int:
    # int() alone would also take "1_0", " 1" and other scripts' digits
    if not re.fullmatch(r"[+-]?[0-9]{1,9}", text):
        raise RowError(f"{rule}; found {text!r}")
    return int(text)


def question_table(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """The question table of these rows, with all columns even if there are no rows."""
    return pd.DataFrame(list(rows), columns=QUESTION_COLUMNS).astype({"label": "int64"})


def reject_table(rows: Iterable[tuple[str, str, str]]) -> pd.DataFrame:
    """The table of rejects of (item, where, reason) tuples."""
    return pd.DataFrame(list(rows), columns=REJECT_COLUMNS)


def require_questions(questions: Sequence[Any], rejects: Sequence[tuple[str, str, str]], source: str | Path) -> None:
    """Raise `CorpusError` if no question is left, quoting the commonest reasons."""
    if questions:
        return
    reasons = pd.Series([reason for _, _, reason in rejects], dtype=str).value_counts().head(3)
    first = f" The first was {rejects[0][0]!r} ({rejects[0][1]})." if rejects else ""
    listed = "; ".join(f"{reason} ({number} times)" for reason, number in reasons.items())
    raise CorpusError(f"No usable question is left of {source}. Reasons: {listed or 'there are no rows'}.{first}")


def drop_leaked(questions: pd.DataFrame) -> pd.DataFrame:
    """The questions without those training rows whose GIF occurs in any test row of any task.

    Within a task TGIF-QA's train and test GIFs are disjoint, across tasks they are not.
    """
    test_gifs = set(questions.gif[questions.split == "test"])
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
    Leaked training GIFs are listed in the rejects. Raises `CorpusError` if an input is missing or nothing is left.
    """
    name = profile.data.corpus
    if name == "shapes":
        if gifs or qa:
            raise CorpusError("The built-in world takes no GIFs or questions of yours: set data.corpus to own_gifs.")
        from helpers.corpora import shapes

        corpus = shapes.load(profile, folder)
    elif name == "tgif_qa":
        from helpers.corpora import tgif_qa

        corpus = tgif_qa.load(_required(qa, "qa", "the folder of TGIF-QA's question files"), gifs=gifs or None)
    elif name == "own_gifs":
        from helpers.corpora import own_gifs

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
    kept = drop_leaked(corpus.questions)
    leaked = corpus.questions[~corpus.questions.question_id.isin(kept.question_id)]
    if len(leaked) and "train" not in set(kept.split):
        raise CorpusError("Every training GIF also occurs in a test question: no GIF may be in both splits.")
    rejects = [
        (gif, "train split", f"also a test GIF: its {number} training questions are left out")
        for gif, number in leaked.gif.value_counts().sort_index().items()
    ]
    used = set(kept.gif)
    return Corpus(
        name=name,
        questions=kept,
        gifs={gif: source for gif, source in corpus.gifs.items() if gif in used},
        rejects=pd.concat([corpus.rejects, reject_table(rejects)], ignore_index=True),
    )
