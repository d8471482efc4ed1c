"""A person's own GIFs: a folder, and a CSV of questions about them.

The CSV has the columns `gif,task,question,answer,options`, and may have `split`, `type` and `caption`. Options are
separated by a vertical bar, or by commas where that is unambiguous; the answer of a multiple-choice question is an
option's text, its letter or its 0-based index, and where a number may be two of these, the other rows tell or it is
refused; a count is a whole number from 1 to 10, as the model counts. A caption tells of the GIF of its row, which need
not have a question: its task is `caption` then, or empty. For retrieval a CSV of captions alone will do, about videos
as well as GIFs.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pandas as pd

from helpers.corpora.schema import (
    ENDINGS,
    SPLITS,
    Corpus,
    CorpusError,
    RowError,
    caption_table,
    caption_text,
    listed_rejects,
    question_row,
    question_table,
    reject_table,
    require_folder,
    require_questions,
)
from helpers.corpora.sheets import Row, by_column, read_sheet, whole_number
from helpers.corpora.tasks import MAX_COUNT, MULTIPLE_CHOICE, TASKS, TYPES, bare, question_key
from helpers.workspace.disk import whole
from helpers.workspace.names import Names, NoSuchName, files_below, folded, shown, visible

COLUMNS = ["gif", "task", "question", "answer", "options"]
"""The columns of the CSV, in any order; `options` may be missing where no task needs them."""
CAPTION = "caption"
"""The column of captions, and the task of a row that has nothing else."""
FILES = ("video", "gif")  # the columns that may name the file a caption tells of


def load(folder: str | Path, csv_path: str | Path, holdout: float = 0.2, seed: int = 0) -> Corpus:
    """The questions and captions of `csv_path` about the GIFs in `folder`; `gif` cells are paths inside that folder.

    Without a `split` column a share `holdout` of the GIFs is held out for test, drawn by `seed` and the GIFs' names
    alone: a GIF's rows are never split, and their order does not matter. GIFs that have captions only are drawn apart.
    With holdout = 1 everything is test, whatever the `split` column says: the CSV is only scored.
    Rows that cannot be used, or that contradict each other, are listed in the rejects, counting the header as row 1;
    those that are for the test by their own word count among `Corpus.asked` all the same.
    Raises `CorpusError` if the folder or CSV is missing, a column is missing, the CSV is empty, no question is left, or
    there are too few GIFs to hold one out.
    """
    folder, path = Path(folder), Path(csv_path)
    _check(folder, holdout)
    header, records = read_table(path)
    names, kept, reasons, readings, only_told = Names(folder, ".gif"), {}, {}, {}, set()
    for number, cells in records:
        try:
            row = _cells(cells, header)
            if row["task"] == CAPTION:
                only_told.add(number)
                continue
            row |= _options_and_answer(row, number, readings)
            kept[number] = _question(row, names, f"{shown(path.stem)}-{number}", holdout)
        except RowError as error:
            reasons[number] = str(error)
    for find in (_of_unknown_origin(readings), _text_or_number(readings), _contradictory(kept, path)):
        reasons = {number: reason for number, reason in find.items() if number in kept} | reasons
    told, lost = _captions(records, header, names, holdout)
    reasons = lost | reasons
    rows = [row for number, row in kept.items() if number not in reasons]
    named = {
        number: visible(cells[header.index("gif")]) for number, cells in records if len(cells) > header.index("gif")
    }
    rejects = [(named.get(number, ""), f"{path.name} row {number}", reasons[number]) for number in sorted(reasons)]
    require_questions(rows, rejects, path)
    questions = question_table(rows)
    if "split" not in header and holdout < 1:
        questions["split"] = _hold_out(questions.gif, holdout, seed, rejects)
    captions = _in_splits(told, questions, holdout, seed)
    gifs = {gif: str(folder / gif) for gif in [*questions.gif, *captions.gif]}
    broken = [dict(zip(header, map(folded, cells), strict=False)) for number, cells in records if number in reasons]
    tasks = [row.get("task") for row in broken if holdout == 1 or row.get("split") == "test"]
    asked = Counter([*questions.task[questions.split == "test"], *(task for task in tasks if task in TASKS)])
    return Corpus(
        "own_gifs",
        questions,
        gifs,
        reject_table(rejects),
        rows=len(records) - len(only_told),
        asked=dict(asked),
        captions=captions,
        told=len(captions) + len(lost),
    )


def read_table(path: Path) -> tuple[list[str], list[Row]]:
    """The header of the CSV and its rows, unread: what can be told of the file without a look at any GIF.

    Raises `CorpusError` as `load` does for a file that is no such table, and for captions without their column.
    """
    header, records = read_sheet(path, COLUMNS, needed=COLUMNS[:-1])
    task = header.index("task")
    told = [number for number, cells in records if len(cells) > task and visible(cells[task]).lower() == CAPTION]
    if told and CAPTION not in header:
        raise CorpusError(f"{path}: row {told[0]} is of the task caption, but there is no column caption.")
    return header, records


def load_captions(folder: str | Path, csv_path: str | Path, holdout: float = 0.2, seed: int = 0) -> Corpus:
    """The captions of `csv_path` about the videos or GIFs in `folder`, without any question: enough for retrieval.

    The CSV has a column `video` or `gif`, the path of a file inside that folder, whose ending may be left out, and a
    column `caption`; it may have `split`. Further columns are not read. Any number of captions may tell of a video.
    holdout, seed: as for `load`; where the column `split` is empty a video is drawn for one of the splits.
    Listed in the rejects: captions without video, broken rows, what is told of a video twice, training captions of a
    test video, and the videos without caption. Raises `CorpusError` if the folder or CSV is missing, a column is
    missing, no caption is left, or there are too few videos to hold one out.
    """
    folder, path = Path(folder), Path(csv_path)
    _check(folder, holdout)
    header, records = read_sheet(path, ["video", CAPTION, "split"], needed=[CAPTION], each="caption")
    if len(named := [column for column in FILES if column in header]) != 1:
        found = "both video and gif" if named else f"neither of them, but {', '.join(filter(None, header))}"
        raise CorpusError(f"{path}: one column, video or gif, names the file that a caption tells of; found {found}.")
    column = header.index(named[0])
    names, told, reasons = Names(folder, *ENDINGS), {}, {}
    first: dict[tuple[str, str], int] = {}
    for number, cells in records:
        try:
            row = _row(cells, header)
            gif, split, caption = _caption(row, row[named[0]], names, holdout)
            if first.setdefault((gif, caption), number) != number:
                raise RowError(f"repeats row {first[gif, caption]}")
            told[number] = gif, split, caption
        except RowError as error:
            reasons[number] = str(error)
    tests = {gif: number for number, (gif, split, _) in told.items() if split == "test"}
    for number, (gif, split, _) in list(told.items()):
        if split == "train" and gif in tests:
            reasons[number] = f"of the split train, but row {tests[gif]} has its video in test: left out of training"
            del told[number]
    items = {number: visible("".join(cells[column : column + 1])) for number, cells in records}
    rejects = [(items[number], f"{path.name} row {number}", reasons[number]) for number in sorted(reasons)]
    if not told:
        raise CorpusError(f"No usable caption is left of {path}.{listed_rejects(rejects)}")
    captions = _in_splits([*told.values()], question_table([]), holdout, seed)
    if not any(split for _, split, _ in told.values()):
        captions["split"] = _hold_out(captions.gif, holdout, seed, rejects)
    gifs = {gif: str(folder / gif) for gif in captions.gif}
    files = [file.relative_to(folder).as_posix() for file in files_below(folder) if file.suffix.lower() in ENDINGS]
    untold = f"no caption in {path.name}: it is not looked for"
    rejects += [(name, folder.name, untold) for name in files if name not in gifs]
    return Corpus("own_gifs", question_table([]), gifs, reject_table(rejects), captions=captions, told=len(records))


def _check(folder: Path, holdout: float) -> None:
    require_folder(folder, "GIFs")
    if not 0 <= holdout <= 1:
        raise CorpusError(f"holdout is a share of the GIFs from 0 to 1; found {holdout}.")


def _captions(
    records: Sequence[Row], header: list[str], names: Names, holdout: float
) -> tuple[list[tuple[str, str, str]], dict[int, str]]:
    """GIF, split ("" where the row tells none) and text of each caption, and why those of other rows cannot be used."""
    told: list[tuple[str, str, str]] = []
    reasons: dict[int, str] = {}
    if CAPTION not in header:
        return told, reasons
    for number, cells in records:
        try:
            row = _cells(cells, header)
        except RowError:  # told of the question already
            continue
        if not row[CAPTION] and row["task"] != CAPTION:
            continue
        try:
            told.append(_caption(row, row["gif"], names, holdout))
        except RowError as error:
            reasons[number] = str(error)
    return told, reasons


def _caption(row: dict[str, str], gif: str, names: Names, holdout: float) -> tuple[str, str, str]:
    """GIF, split ("" where the row tells none) and text of a row's caption."""
    split = _split(row.get("split"), holdout) if row.get("split") or holdout == 1 else ""
    return _gif(gif, names), split, caption_text(row[CAPTION])


def _in_splits(told: list[tuple[str, str, str]], questions: pd.DataFrame, holdout: float, seed: int) -> pd.DataFrame:
    """The table of captions, each in the split of its GIF: that of its questions, or what a caption's row says.

    Of the GIFs for which neither tells a share is drawn.
    """
    splits = {gif: split for gif, split, _ in told if split} | dict(zip(questions.gif, questions.split, strict=True))
    alone = {gif for gif, _, _ in told if gif not in splits}
    held_out = _drawn(alone, round(holdout * len(alone)), seed)
    splits |= {gif: "test" if gif in held_out else "train" for gif in alone}
    return caption_table((gif, split or splits[gif], caption, []) for gif, split, caption in told)


def _row(cells: list[str], header: list[str]) -> dict[str, str]:
    # a file's name may hold any character: Names knows what to make of it
    row = by_column(cells, header)
    return {column: cell if column in FILES else visible(cell) for column, cell in row.items()}


def _cells(cells: list[str], header: list[str]) -> dict[str, str]:
    row = _row(cells, header)
    task, asks = row["task"].lower(), bool(row["question"] or row["answer"])
    if not task and not asks and CAPTION in header:
        task = CAPTION
    if task == CAPTION and asks:
        raise RowError("a row of the task caption has its text in the column caption, and no question or answer")
    if task not in (*TASKS, CAPTION):
        near = difflib.get_close_matches(task, (*TASKS, CAPTION), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise RowError(f"unknown task {row['task']!r}; the tasks are {', '.join((*TASKS, CAPTION))}{hint}")
    return row | {"task": task}


def _gif(written: str, names: Names) -> str:
    try:
        return names.find(written)
    except NoSuchName as error:
        raise RowError(str(error)) from error


def _question(row: dict[str, Any], names: Names, question_id: str, holdout: float) -> dict[str, Any]:
    return question_row(
        question_id=question_id,
        gif=_gif(row["gif"], names),
        split=_split(row.get("split"), holdout),
        task=row["task"],
        question=row["question"],
        answer=row["answer"],
        options=row["options"],
        type=_type(row.get("type", "")),
    )


class _Reading(NamedTuple):
    """What an answer means among the options: by its text, and by its number, counted from 0; None: not so."""

    answer: str
    options: list[str]
    text: int | None
    number: int | None


def _options_and_answer(row: dict[str, str], number: int, readings: dict[int, _Reading]) -> dict[str, Any]:
    """The row's options, and its answer as `question_row` takes it.

    What an answer that is no letter means is noted in `readings` by the row's number.
    """
    answer = row["answer"]
    if row["task"] == "count":
        answer = whole_number(answer, "a count is an integer")
        if not 1 <= int(answer) <= MAX_COUNT:
            raise RowError(
                f"the count {int(answer)} is outside 1 to {MAX_COUNT}: the model counts from 1 to {MAX_COUNT}"
            )
    if row["task"] not in MULTIPLE_CHOICE:
        return {"options": [], "answer": answer}
    if "options" not in row:
        raise RowError(f"{row['task']} needs options, and the CSV has no column options")
    options = _split_options(row["options"], answer)
    if len(options) < 2 or "" in options:
        rule = f"{row['task']} needs two or more options, none of them empty, with vertical bars between them"
        raise RowError(f"{rule}; found {options}")
    text, by_number = _text_index(answer, options), _number(answer)
    if text is None and (letter := _letter_index(answer, options)) is not None:
        return {"options": options, "answer": str(letter)}
    if text is None:
        if by_number is None:
            raise RowError(f"the answer {answer!r} is not one of the options {options}")
        if options.count(dict(enumerate(options)).get(by_number, "")) > 1:
            raise RowError(f"the answer {answer!r} is more than one of the options {options}")
    elif by_number not in range(len(options)):
        by_number = None
    readings[number] = _Reading(answer, options, text, by_number)
    return {"options": options, "answer": str(by_number if text is None else text)}


def _split_options(cell: str, answer: str) -> list[str]:
    if "|" in cell or not re.search("[,;]", cell):
        return [visible(option) for option in cell.split("|")] if cell else []
    separator = ";" if ";" in cell else ","
    options = [visible(option) for option in cell.split(separator)]
    forms = [folded(option) for option in options]
    unlike = (
        {",", ";"} <= set(cell)
        or "" in options
        or len(set(forms)) < len(forms)
        or len({bool(option[:1].isspace()) for option in cell.split(separator)[1:]}) > 1  # "1,5 m, 2,5 m"
        or any(re.search(r"\b(and|or)\b", form) for form in forms)  # "red, white and blue"
        or re.match("[\\[{\"'\u2018\u201c]", cell)  # a list as a program writes it
        or re.search("[,;]", answer)
    )
    if unlike:
        raise RowError(f"it cannot be told where an option ends in {cell!r}: separate the options by vertical bars")
    return options


def _text_index(answer: str, options: list[str]) -> int | None:
    for texts, text in ((options, answer), ([*map(folded, options)], folded(answer))):
        if texts.count(text) > 1:
            raise RowError(f"the answer {answer!r} is more than one of the options {options}")
        if text in texts:
            return texts.index(text)
    return None


def _letter_index(answer: str, options: list[str]) -> int | None:
    letter = re.fullmatch(r"\(?([a-z])[).:]?", answer.lower())
    if letter and not any(len(option) == 1 and option.isalpha() for option in options):
        index = ord(letter[1]) - ord("a")
        return index if index < len(options) else None
    return None


def _letter(index: int, options: list[str]) -> str:
    """The letter by which an option can be named; "" where letters name none."""
    letter = chr(ord("A") + index)
    return letter if _letter_index(letter, options) == index else ""


def _number(answer: str) -> int | None:
    try:
        return int(whole_number(answer, ""))
    except RowError:
        return None


def _of_unknown_origin(readings: dict[int, _Reading]) -> dict[int, str]:
    """Reasons to leave out answers that are numbers: several of them and no 0, as where somebody counts from 1."""
    indices = {row: reading for row, reading in readings.items() if reading.text is None}
    if len(indices) < 2 or any(reading.number == 0 for reading in indices.values()):
        return {}
    from_one = any(reading.number == len(reading.options) for reading in indices.values())
    seen = "one is the number of options" if from_one else "nothing tells it from a count that begins with 1"
    reason = (
        f"the answers that are option numbers count from 0, but none of these is 0 and {seen}: write the option's text"
    )
    return dict.fromkeys(indices, reason)


def _text_or_number(readings: dict[int, _Reading]) -> dict[int, str]:
    """Reasons to leave out answers that are one option's text and another's number, unless all of them are texts.

    That they are is told by one that cannot be a number, where none must be.
    """
    if any(reading.number is None for reading in readings.values()) and all(
        reading.text is not None for reading in readings.values()
    ):
        return {}
    reasons = {}
    for row, (answer, options, text, number) in readings.items():
        if None not in (text, number) and text != number:
            letters = [_letter(index, options) for index in (text, number)]
            way = f"its letter ({' or '.join(letters)})" if all(letters) else "the options in words"
            reasons[row] = (
                f"the answer {answer!r} may be the option {options[text]!r} or, counted from 0, number {number}, which "
                f"is {options[number]!r}: write {way}"
            )
    return reasons


def _contradictory(kept: dict[int, dict[str, Any]], path: Path) -> dict[int, str]:
    """Reasons to leave out rows that answer one question about one GIF in different ways.

    Where the options differ too, only an answer that the other row offers and does not choose contradicts it.
    """
    groups: dict[tuple[str, str, str], list[int]] = {}
    for number, row in kept.items():
        groups.setdefault((row["gif"], row["task"], question_key(row["question"])), []).append(number)
    reasons = {}
    for numbers in groups.values():
        answers = {number: bare(kept[number]["answer"]) for number in numbers}
        offered = {number: {bare(option) for option in kept[number]["options"]} for number in numbers}
        for number in numbers:
            others = [
                other
                for other in numbers
                if answers[other] != answers[number]
                and (not offered[number] or answers[other] in offered[number] or answers[number] in offered[other])
            ]
            if others:
                told = ", ".join(map(str, others[:5])) + (" and others" if others[5:] else "")
                reasons[number] = f"contradicts row {told} of {path.name}: the same question with another answer"
    return reasons


def _split(cell: str | None, holdout: float) -> str:
    if cell is None or holdout == 1:
        return "test"
    if cell.lower() not in SPLITS:
        raise RowError(f"unknown split {cell!r}; the splits are {', '.join(SPLITS)}")
    return cell.lower()


def _type(cell: str) -> str:
    return TYPES[int(cell)] if cell in ("0", "1", "2", "3") else cell.lower()


def _hold_out(gifs: pd.Series, holdout: float, seed: int, rejects: Sequence[tuple[str, str, str]]) -> pd.Series:
    """The split of each row: "test" for `holdout` of the distinct GIFs, at least one and not all if 0 < holdout < 1."""
    number, distinct = 0, gifs.nunique()
    if holdout > 0:
        if distinct < 2:
            raise CorpusError(
                f"Holding out a share of the GIFs needs at least 2, but the rows are about {distinct}. "
                "Add GIFs, or give a split column, or hold out 1 (everything is scored) or 0 (nothing is)."
                + listed_rejects(rejects)
            )
        number = min(max(round(holdout * distinct), 1), distinct - 1)
    held_out = _drawn(gifs, number, seed)
    return gifs.map(lambda gif: "test" if gif in held_out else "train")


def _drawn(gifs: Iterable[str], number: int, seed: int) -> set[str]:
    """So many of the GIFs, drawn by the seed and their names alone."""

    def draw(gif: str) -> str:  # the same on a Mac, which decomposes accents
        return hashlib.sha256(f"{seed}:{unicodedata.normalize('NFC', gif)}".encode()).hexdigest()

    return set(sorted(set(gifs), key=draw)[:number])


def write_own_gifs_csv(questions: pd.DataFrame, path: str | Path) -> None:
    """Write a question table as the CSV that `load` reads; replaces `path` in one step.

    `split` and `type` are written where the table has them. TGIF-QA's count 0, its code for once, is written as 1, and
    an answer that is a number among options by its letter. A GIF's name gets the ending .gif if it has none. Raises
    `CorpusError` if an option holds a vertical bar or a column is missing.
    """
    missing = [column for column in COLUMNS if column not in questions.columns]
    further = [column for column in ("split", "type") if column in questions.columns]
    if missing:
        raise CorpusError(f"Questions to write to {path}: no column {', '.join(missing)}.")
    for row in questions.itertuples():
        if any("|" in option for option in row.options):
            raise CorpusError(f"{row.gif}, {row.question!r}: an option holds '|', which separates options in a CSV.")
    with whole(Path(path)) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*COLUMNS, *further])
        for row in questions.itertuples():
            gif = row.gif if PurePosixPath(row.gif).suffix.lower() == ".gif" else f"{row.gif}.gif"
            options, more = "|".join(row.options), (getattr(row, column) for column in further)
            answer = "1" if row.task == "count" and row.answer == "0" else row.answer
            if row.task in MULTIPLE_CHOICE and _number(answer) not in (None, row.options.index(answer)):
                answer = _letter(row.options.index(answer), row.options) or answer
            writer.writerow([gif, row.task, row.question, answer, options, *more])
