"""The schema of all corpora of GIFs: one row a question, checked as it is built, and the table of what is left out.

A question is one row of `QUESTION_COLUMNS`:

    question_id  str        unique over the corpus
    gif          str        the data set's name of the GIF
    split        str        "train" or "test"
    task         str        one of `tasks.TASKS`
    question     str
    options      list[str]  the options of action and transition; empty for the other tasks
    answer       str        text of the right option; count: the raw label as text; frameqa: the word
    label        int        index of the right option; count: the raw label (0 is the code for "once"); frameqa: -1
    type         str        frameqa: one of `tasks.TYPES`; empty for the other tasks

A caption, a sentence about a GIF, is one row of `CAPTION_COLUMNS`:

    caption_id   str        the GIF's name and a running number
    gif          str        as above
    split        str        that of the GIF; "val" too, where the data set has such a split
    caption      str        with single spaces
    facts        list[str]  what the caption states; empty where that is unknown
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from helpers.corpora.tasks import MAX_COUNT, MULTIPLE_CHOICE, TASKS, TYPES, bare, question_form
from helpers.workspace.names import shown, visible

SPLITS = ("train", "test")
QUESTION_COLUMNS = ["question_id", "gif", "split", "task", "question", "options", "answer", "label", "type"]
CAPTION_COLUMNS = ["caption_id", "gif", "split", "caption", "facts"]
REJECT_COLUMNS = ["item", "where", "reason"]
ENDINGS = (".gif", ".webp", ".png", ".apng", ".mp4", ".m4v", ".mov", ".webm", ".mkv")
"""How files are called that are read as animations; what they are is told by their first bytes."""


class CorpusError(ValueError):
    """A corpus that cannot be loaded at all: what is wrong, in which file, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(shown(message))


class RowError(ValueError):
    """One question that cannot be used; its message is the reason in the table of rejects."""


def caption_text(text: str) -> str:
    """A caption without invisible characters, with single spaces; raises `RowError` for one that is empty or broken."""
    if "\0" in text or "\ufffd" in text:
        raise RowError("the caption is not whole: it holds NUL characters or bytes that are no text")
    if not (caption := visible(text)):
        raise RowError("the caption is empty")
    return caption


def caption_table(captions: Iterable[tuple[str, str, str, Sequence[str]]] = (), repeated: bool = False) -> pd.DataFrame:
    """The table of these captions: GIF, split, caption and facts of each.

    What is told of a GIF twice is kept once, unless `repeated`: published scores count each of its captions as a query.
    """
    rows: list[list[Any]] = []
    seen: set[tuple[str, str]] = set()
    told: Counter[str] = Counter()
    for gif, split, caption, facts in captions:
        if repeated or (gif, caption) not in seen:
            seen.add((gif, caption))
            told[gif] += 1
            rows.append([f"{gif}-{told[gif]}", gif, split, caption, list(facts)])
    return pd.DataFrame(rows, columns=CAPTION_COLUMNS, dtype=object)


@dataclass(frozen=True)
class Corpus:
    """Questions, captions, and where the GIFs they are about are found."""

    name: str
    questions: pd.DataFrame
    """One row a question: `QUESTION_COLUMNS`."""
    gifs: dict[str, str]
    """GIF name -> local path, "archive.zip::member", or http(s) URL. Empty if only the text was asked for."""
    rejects: pd.DataFrame
    """What was left out: `item` (a GIF, a file or a question), `where` (file and row), `reason`."""
    rows: int = 0
    """Rows that the files of questions hold, those left out too."""
    asked: dict[str, int] = field(default_factory=dict)
    """Task -> its test questions, those too that are left out: what a score's coverage is measured by."""
    captions: pd.DataFrame = field(default_factory=caption_table)
    """One row a caption: `CAPTION_COLUMNS`."""
    told: int = 0
    """Captions that the files hold, those left out too."""


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
        if len({bare(option) for option in options}) < len(options):
            raise RowError(f"two of the options are the same: {options}")
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
    """The table of rejects of (item, where, reason) tuples; bytes of a name that are not UTF-8 are spelt out."""
    return pd.DataFrame([[shown(text) for text in row] for row in rows], columns=REJECT_COLUMNS)


def listed_rejects(rejects: Sequence[tuple[str, str, str]], most: int = 20) -> str:
    """The rejects that lie behind an error, a line each, to stand at the end of its message; "" without any."""
    lines = [f"\n  {where}, {item}: {reason}" for item, where, reason in rejects[:most]]
    more = f"\n  and {len(rejects) - most:,} more" if len(rejects) > most else ""
    return shown(f"\nLeft out: {len(rejects):,}{''.join(lines)}{more}") if rejects else ""


def left_out(corpus: Corpus, questions: pd.DataFrame, captions: pd.DataFrame, gifs: Iterable[str]) -> str:
    """One line for the terminal: how many rows, captions and GIFs were left out of what there was, and where to look.

    questions, captions: what is left in the end. gifs: the names of all GIFs that were looked at.
    """
    rows, told = max(corpus.rows, len(corpus.questions)), max(corpus.told, len(corpus.captions))
    lost = len({*gifs} - {*questions.gif, *captions.gif})
    captioned = f", {told - len(captions):,} of {told:,} captions" if told > len(captions) else ""
    if rows == len(questions) and not lost and not captioned:
        return f"nothing left out of {rows:,} rows" + (f" and {told:,} captions" if told else "")
    listed = f"{lost:,} GIF" + ("" if lost == 1 else "s")
    return f"{rows - len(questions):,} of {rows:,} rows{captioned} and {listed} left out: rejects.parquet"


def require_folder(folder: Path, what: str) -> None:
    """Raise `CorpusError` if there is no such folder; what: what was looked for in it."""
    if folder.is_file():
        raise CorpusError(f"{what}: {folder} is a file: unpack it, and name the folder.")
    if not folder.is_dir():
        raise CorpusError(f"{what}: there is no folder {folder}.")


def require_one_caption(captions: pd.DataFrame, source: str | Path) -> None:
    """Raise `CorpusError` if a video of this table has several captions, where a protocol has one a video.

    source: where they come from, for the message. Scored with all 20, a model's R@1 came out as 3 instead of 44.
    """
    numbers = captions.gif.value_counts()
    if (several := numbers[numbers > 1]).empty:
        return
    told = ", ".join(f"{gif}: {number}" for gif, number in several.sort_index().head(5).items())
    raise CorpusError(
        f"{source}: {len(captions):,} captions of {len(numbers):,} videos, but the protocol has one caption a video "
        f"({len(several):,} have more, {told}{', ...' if len(several) > 5 else ''}). Give one caption for each, or "
        "choose a protocol of all captions, where a video is right for each caption of its own."
    )


def require_questions(questions: Sequence[Any], rejects: Sequence[tuple[str, str, str]], source: str | Path) -> None:
    """Raise `CorpusError` if no question is left, with the rejects that lie behind it."""
    if not questions:
        why = listed_rejects(rejects) or " No row has a question."
        raise CorpusError(f"No usable question is left of {source}.{why}")
