"""A person's own GIFs: a folder, and a CSV of questions about them.

The CSV has the columns `gif,task,question,answer,options`, and may have `split` and `type`. Options are separated by
a vertical bar; the answer of a multiple-choice question is an option's text or its 0-based index; a count is an
integer from 0 to 10 (0 and 1 both mean once).
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
from pathlib import Path, PurePosixPath

import pandas as pd

from helpers.corpora.schema import (
    SPLITS,
    Corpus,
    CorpusError,
    RowError,
    question_row,
    question_table,
    reject_table,
    require_questions,
)
from helpers.corpora.tasks import MULTIPLE_CHOICE, TASKS, TYPES
from helpers.workspace.disk import whole

COLUMNS = ["gif", "task", "question", "answer", "options"]
"""The columns that the CSV must have, in any order."""


def load(folder: str | Path, csv_path: str | Path, holdout: float = 0.2, seed: int = 0) -> Corpus:
    """The questions of `csv_path` about the GIFs in `folder`; `gif` cells are paths inside that folder.

    Without a `split` column a share `holdout` of the GIFs is held out for test, drawn by `seed` and the GIFs' names
    alone: a GIF's questions are never split, and the order of the rows does not matter. With holdout = 1 everything
    is test, whatever the `split` column says: the CSV is only scored.
    Rows that cannot be used are listed in the rejects, counting the header as row 1.
    Raises `CorpusError` if the folder or CSV is missing, a column is missing, the CSV is empty, nothing is left, or
    there are too few GIFs to hold one out.
    """
    folder, path = Path(folder), Path(csv_path)
    if not folder.is_dir():
        raise CorpusError(f"GIFs: there is no folder {folder}.")
    if not 0 <= holdout <= 1:
        raise CorpusError(f"holdout is a share of the GIFs from 0 to 1; found {holdout}.")
    header, records = _read(path)
    rows, rejects, gifs = [], [], {}
    for number, cells in records:
        try:
            row = _question(cells, header, folder, f"{path.stem}-{number}", holdout)
        except RowError as error:
            rejects.append(
                (
                    cells[header.index("gif")].strip() if len(cells) > header.index("gif") else "",
                    f"{path.name} row {number}",
                    str(error),
                )
            )
            continue
        rows.append(row)
        gifs[row["gif"]] = str(folder / row["gif"])
    require_questions(rows, rejects, path)
    questions = question_table(rows)
    if "split" not in header and holdout < 1:
        questions["split"] = _hold_out(questions.gif, holdout, seed)
    return Corpus("own_gifs", questions, gifs, reject_table(rejects))


def _read(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    if not path.is_file():
        raise CorpusError(f"Questions: there is no file {path}.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: not UTF-8 text (byte {error.start}). Save the CSV as UTF-8.") from error
    first_line = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=first_line.count)  # spreadsheets of some countries write semicolons
    # strict: else a quote that is never closed would swallow the rows after it in silence
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        records = list(reader)
    except csv.Error as error:
        advice = "A quote inside a quoted cell is written twice, and every opened quote is closed."
        raise CorpusError(f"{path}: not a readable CSV near line {reader.line_num} ({error}). {advice}") from error
    if not records or not any(cell.strip() for cell in records[0]):
        raise CorpusError(f"{path} is empty: expected the header {','.join(COLUMNS)} and a row for each question.")
    header = [cell.strip().lower() for cell in records[0]]
    missing = [column for column in COLUMNS if column not in header]
    if missing:
        raise CorpusError(f"{path}: no column {', '.join(missing)}; the columns found are {', '.join(header)}.")
    if repeated := sorted({column for column in header if header.count(column) > 1 and column}):
        raise CorpusError(f"{path}: the column {', '.join(repeated)} occurs more than once.")
    rows = [(number, cells) for number, cells in enumerate(records[1:], start=2) if any(c.strip() for c in cells)]
    if not rows:
        raise CorpusError(f"{path} has a header but no questions.")
    return header, rows


def _question(cells: list[str], header: list[str], folder: Path, question_id: str, holdout: float) -> dict:
    if len(cells) > len(header):
        raise RowError(f"{len(cells)} columns, but the header has {len(header)}: quote a text that holds the separator")
    # commas at the end of a row are easily left out by hand
    cells = cells + [""] * (len(header) - len(cells))
    row = {column: " ".join(cell.split()) for column, cell in zip(header, cells, strict=True)}
    task = row["task"].lower()
    if task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise RowError(f"unknown task {row['task']!r}; the tasks are {', '.join(TASKS)}{hint}")
    options = [option.strip() for option in row["options"].split("|")] if row["options"] else []
    answer = row["answer"]
    if task in MULTIPLE_CHOICE:
        answer = _option_index(answer, options)
    return question_row(
        question_id=question_id,
        gif=_gif(cells[header.index("gif")].strip(), folder),
        split=_split(row.get("split"), holdout),
        task=task,
        question=row["question"],
        answer=answer,
        options=options if task in MULTIPLE_CHOICE else [],
        type=_type(row.get("type", "")),
    )


def _gif(cell: str, folder: Path) -> str:
    """The GIF's path inside the folder, in one spelling ("./cat.gif", "cat" and "cat.gif" are one GIF)."""
    if not cell:
        raise RowError("no GIF is named")
    if "\0" in cell:
        raise RowError("the GIF's name holds a NUL character")
    root = folder.resolve()
    for name in (cell, f"{cell}.gif"):
        path = (root / name.replace("\\", "/")).resolve()
        if not path.is_relative_to(root):
            raise RowError(f"the GIF's path leads out of the folder {folder.name}")
        if path.is_file():
            return path.relative_to(root).as_posix()
    raise RowError(f"there is no such GIF in the folder {folder.name}")


def _option_index(answer: str, options: list[str]) -> str:
    # the text comes first: among options that are numbers "2" means the option 2
    if options.count(answer) > 1:
        raise RowError(f"the answer {answer!r} is more than one of the options {options}")
    if answer in options:
        return str(options.index(answer))
    if not answer.lstrip("+-").isdecimal():
        raise RowError(f"the answer {answer!r} is not one of the options {options}")
    return answer


def _split(cell: str | None, holdout: float) -> str:
    if cell is None or holdout == 1:
        return "test"
    if cell.lower() not in SPLITS:
        raise RowError(f"unknown split {cell!r}; the splits are {', '.join(SPLITS)}")
    return cell.lower()


def _type(cell: str) -> str:
    return TYPES[int(cell)] if cell in ("0", "1", "2", "3") else cell.lower()


def _hold_out(gifs: pd.Series, holdout: float, seed: int) -> pd.Series:
    """The split of each row: "test" for `holdout` of the distinct GIFs, at least one and not all if 0 < holdout < 1."""
    distinct = sorted(set(gifs), key=lambda gif: hashlib.sha256(f"{seed}:{gif}".encode()).hexdigest())
    number = 0
    if holdout > 0:
        if len(distinct) < 2:
            raise CorpusError(
                f"Holding out a share of the GIFs needs at least 2, but the questions are about {len(distinct)}. "
                "Add GIFs, or give a split column, or hold out 1 (everything is scored) or 0 (nothing is)."
            )
        number = min(max(round(holdout * len(distinct)), 1), len(distinct) - 1)
    held_out = set(distinct[:number])
    return gifs.map(lambda gif: "test" if gif in held_out else "train")


def write_own_gifs_csv(questions: pd.DataFrame, path: str | Path) -> None:
    """Write a question table as the CSV that `load` reads; replaces `path` in one step.

    `split` and `type` are written where the table has them. A GIF's name gets the ending .gif if it has none. Raises
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
            writer.writerow([gif, row.task, row.question, row.answer, options, *more])
