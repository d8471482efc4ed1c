"""TGIF-QA: the official question files, and the copies of them that circulate.

Jang et al., "TGIF-QA: Toward Spatio-Temporal Reasoning in Visual Question Answering" (CVPR 2017, IJCV 2019);
files of github.com/YunseokJANG/tgif-qa, of HME-VideoQA (older, complete) and of HQGA (another encoding).

The official files are called .csv but are TAB-separated with CRLF line ends, a header and no quoting: quotes in them
are text. They have no validation split, and none is carved here. The column `description` of FrameQA is a caption of
the very GIF, and is never carried along. Captions come from TGIF's own file, `tgif-v1.0.tsv`: a URL, a TAB and a
sentence a row, no header, and a row for each sentence about a GIF (Li et al., "TGIF", CVPR 2016).
"""

from __future__ import annotations

import csv
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import pandas as pd

from helpers.corpora.schema import (
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
    require_questions,
)
from helpers.corpora.sheets import DAMAGED, table_text, whole_number
from helpers.corpora.tasks import MULTIPLE_CHOICE, TASKS, TYPES
from helpers.workspace.names import files_below, is_leftover, visible

OPTIONS = ["a1", "a2", "a3", "a4", "a5"]
COLUMNS = {
    "action": ["gif_name", "question", *OPTIONS, "answer", "vid_id", "key"],
    "transition": ["gif_name", "question", *OPTIONS, "answer", "vid_id", "key"],
    "count": ["gif_name", "question", "answer", "vid_id", "key"],
    "frameqa": ["gif_name", "question", "answer", "type", "vid_id", "key", "description"],
}
"""The official columns of each task's files, in order."""

TEST_QUESTIONS = {"count": 3554, "action": 2274, "transition": 6232, "frameqa": 13691}
"""Questions of the official test files, by which published scores are divided."""

CAPTIONS_FILE = re.compile(r"tgif-v[0-9].*\.tsv", re.IGNORECASE)

SHEETS = (".xlsx", ".xls", ".ods", ".numbers")

HQGA_OPTIONS = ["a0", "a1", "a2", "a3", "a4"]
# HQGA joined hyphenated answers; undone, the answers of train and test are the 1,746 words that TGIF-QA states
HQGA_SPELLING = {"tshirt": "t-shirt", "bowtie": "bow-tie"}


@dataclass(frozen=True)
class _File:
    path: Path
    name: str  # relative to the folder of questions
    split: str
    task: str
    header: list[str]
    rows: list[tuple[int, list[str]]]  # row number (the header is row 1) and its cells

    @property
    def is_hqga(self) -> bool:
        return "gif_name" not in self.header

    @cached_property
    def counts_from_one(self) -> bool:
        """Whether the answers that are options' indices go to the number of options, and none is 0."""
        if self.task not in MULTIPLE_CHOICE:
            return False
        column, width = self.header.index("answer"), len(self.header)
        answers = {_cell(cells[column]) for _, cells in self.rows if len(cells) == width}
        return str(len(OPTIONS)) in answers and "0" not in answers


def load(folder: str | Path, gifs: str | Path | None = None) -> Corpus:
    """TGIF-QA's questions from the files in `folder`, any subset of tasks and splits.

    A question file is a .csv or .tsv whose path inside the folder names a split and a task
    (`Train_action_question.csv`, `frameqa/train.csv`). gifs: a folder of `<gif_name>.gif` (searched to any depth), a
    zip archive of such files, or a text file of URLs (`tgif-v1.0.tsv` or one URL a line); None loads the text alone.
    Captions are those of that list, or of a `tgif-v1.0.tsv` among the question files, about GIFs that are asked about.
    Questions whose GIF the source lacks, broken rows and repeated questions are listed in the rejects.
    A test row that is broken or has no GIF counts among `Corpus.asked` all the same.
    Raises `CorpusError` if a file is not in the format, or nothing is left.
    """
    folder, asked = Path(folder), Counter()
    rejects: list[tuple[str, str, str]] = []
    files = _question_files(folder, rejects)
    names = _names_of_keys(files)
    rows: dict[str, dict] = {}
    first_seen: dict[str, str] = {}
    for file in files:
        for number, cells in file.rows:
            where = f"{file.name} row {number}"
            try:
                row = _question(file, cells, names)
            except RowError as error:
                rejects.append((cells[0] or file.name, where, str(error)))
                asked[file.task] += file.split == "test"
                continue
            if row["question_id"] in rows:
                reason = f"repeats question {row['question_id']} of {first_seen[row['question_id']]}"
                rejects.append((cells[0], where, reason))
                continue
            rows[row["question_id"]] = row
            asked[file.task] += file.split == "test"
            first_seen[row["question_id"]] = where
    require_questions(list(rows.values()), rejects, folder)
    questions, number_of_rows = question_table(rows.values()), sum(len(file.rows) for file in files)
    counted = {task: number for task, number in asked.items() if number}
    if gifs is None:
        return Corpus("tgif_qa", questions, {}, reject_table(rejects), number_of_rows, counted)
    sources = gif_sources(gifs, rejects)
    absent = questions[~questions.gif.isin(sources)]
    rejects += [
        (gif, Path(gifs).name, f"the GIF is not there: its {number} questions are left out")
        for gif, number in absent.gif.value_counts().sort_index().items()
    ]
    kept = questions[questions.gif.isin(sources)].reset_index(drop=True)
    require_questions(kept.index.tolist(), rejects, f"{folder} with the GIFs of {gifs}")
    used = {gif: sources[gif] for gif in kept.gif.unique()}
    captions, told = _captions(folder, Path(gifs), kept, rejects)
    return Corpus("tgif_qa", kept, used, reject_table(rejects), number_of_rows, counted, captions, told)


def _captions(
    folder: Path, gifs: Path, questions: pd.DataFrame, rejects: list[tuple[str, str, str]]
) -> tuple[pd.DataFrame, int]:
    """The captions of the GIFs that are asked about, in the split of their GIF, and how many the file of them holds.

    That file is the list of URLs, if it has more than URLs, else TGIF's own among the question files.
    """
    path, rows = gifs, [] if gifs.is_dir() or zipfile.is_zipfile(gifs) else _listed(gifs)
    if all(len(cells) == 1 for _, cells in rows):
        found = [file for file in files_below(folder) if CAPTIONS_FILE.fullmatch(file.name)]
        if not found:
            return caption_table(), 0
        if len(found) > 1:
            names = ", ".join(file.relative_to(folder).as_posix() for file in found)
            raise CorpusError(f"Captions: {folder} holds {len(found)} files of them ({names}). Leave one.")
        path, rows = found[0], _listed(found[0])
        if all(len(cells) == 1 for _, cells in rows):
            raise CorpusError(f"{path}: no row has a caption. A row is the URL of a GIF, a TAB and a caption of it.")
    asked, test = set(questions.gif), set(questions.gif[questions.split == "test"])
    kept, unasked = [], []
    for number, (url, *rest) in rows:
        name, where = gif_name(url) or "", f"{path.name} row {number}"
        if name not in asked:
            unasked.append((name or url[:200], where))
            continue
        try:
            if len(rest) > 1:
                raise RowError(f"{len(rest) + 1} columns, but a row is a URL, a TAB and a caption")
            kept.append((name, "test" if name in test else "train", caption_text(" ".join(rest)), []))
        except RowError as error:
            rejects.append((name, where, str(error)))
    if unasked:
        what = f"{len(unasked):,} captions, this the first, are of GIFs that no question is left about"
        rejects.append((*unasked[0], f"{what}: left out"))
    captions = caption_table(kept)
    return captions, len(captions) + len(rows) - len(kept)


def _question_files(folder: Path, rejects: list[tuple[str, str, str]]) -> list[_File]:
    if not folder.is_dir():
        raise CorpusError(f"TGIF-QA's question files: there is no folder {folder}.")
    files = []
    for path in files_below(folder):
        name = path.relative_to(folder).as_posix()
        words = set(re.split(r"[^a-z]+", name.lower()))
        splits, tasks = words.intersection(SPLITS), words.intersection(TASKS)
        is_table = path.suffix.lower() in (".csv", ".tsv")
        if CAPTIONS_FILE.fullmatch(path.name):
            continue
        if not is_table and len(splits) == len(tasks) == 1 and path.suffix.lower() in SHEETS:
            rejects.append((name, folder.name, "not read: a spreadsheet's own format; save it as CSV UTF-8"))
        elif not is_table:
            continue
        elif len(splits) == len(tasks) == 1:
            files.append(_read(path, name, splits.pop(), tasks.pop()))
        elif splits:
            rule = f"its name must hold one split ({', '.join(SPLITS)}) and one task ({', '.join(TASKS)})"
            rejects.append((name, folder.name, f"not read: {rule}"))
    if not files:
        expected = f"No question file in {folder}: expected names like Train_action_question.csv."
        raise CorpusError(expected + listed_rejects(rejects))
    # where a question is in both encodings the official file wins
    return sorted(files, key=lambda file: file.is_hqga)


def _read(path: Path, name: str, split: str, task: str) -> _File:
    # Official files have no quoting: a line is a row, a TAB ends a cell. HQGA's quote cells but never break a line
    # inside one, so they too are read line by line: an unclosed quote then costs its own row, not the rest of the file.
    # What a spreadsheet saved has commas or semicolons and quotes its cells.
    text, separator = table_text(path, errors="replace")
    rows = [
        (number, line.split("\t") if separator == "\t" else _quoted_cells(line, separator))
        for number, line in enumerate(text.split("\n"), start=1)
        if visible(line).strip(separator)
    ]
    header = [_cell(cell) for cell in rows[0][1]] if rows else []
    _check_header(name, task, header)
    return _File(path, name, split, task, header, rows[1:])


def _cell(text: str) -> str:
    return text.strip() if text.isascii() else visible(text)  # official texts are ASCII, some with two spaces


def _quoted_cells(line: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=separator))
    except csv.Error:
        return [line]  # an over-long cell: the row is rejected for its number of columns


def _check_header(name: str, task: str, header: list[str]) -> None:
    official = [column for column in COLUMNS[task] if column not in ("type", "description", "key")]
    hqga = ["video", "question", *(HQGA_OPTIONS if task in MULTIPLE_CHOICE else []), "answer", "qid"]
    wanted = hqga if "gif_name" not in header and "video" in header else official
    missing = [column for column in wanted if column not in header]
    if missing:
        raise CorpusError(f"{name}: no column {', '.join(missing)} for task {task}; the columns are {header}.")


def _names_of_keys(files: list[_File]) -> dict[str, str]:
    names: dict[str, str] = {}
    for file in files:
        if "gif_name" in file.header and "key" in file.header:
            name, key, width = file.header.index("gif_name"), file.header.index("key"), len(file.header)
            for _, cells in file.rows:
                if len(cells) == width:
                    names.setdefault(_cell(cells[key]), _cell(cells[name]))
    return names


def _question(file: _File, cells: list[str], names: dict[str, str]) -> dict:
    if len(cells) != len(file.header):
        raise RowError(f"{len(cells)} columns, but the header has {len(file.header)}")
    row = {column: _cell(cell) for column, cell in zip(file.header, cells, strict=True)}
    if any("�" in cell for cell in cells):
        raise RowError("not UTF-8 text")
    if any("\0" in cell for cell in cells):
        raise RowError(DAMAGED)
    if file.counts_from_one:
        raise RowError("the file's option indices count from 1 (one is 5, none is 0), TGIF-QA's from 0 to 4")
    gif = names.get(row["video"], row["video"]) if file.is_hqga else row["gif_name"]
    vid_id = row["qid" if file.is_hqga else "vid_id"]
    if not gif or not vid_id:
        raise RowError("no GIF is named" if not gif else "no question id is given")
    options = HQGA_OPTIONS if file.is_hqga else OPTIONS
    question, answer = row["question"], row["answer"]
    if file.task != "frameqa":
        answer = whole_number(answer, "the answer is a whole number")
    if file.is_hqga:
        question, answer = _official_wording(question, file.task), HQGA_SPELLING.get(answer, answer)
    return question_row(
        question_id=f"{vid_id}-{file.split}",
        gif=gif,
        split=file.split,
        task=file.task,
        question=question,
        answer=answer,
        options=[row[column] for column in options] if file.task in MULTIPLE_CHOICE else [],
        type=_type(row.get("type", "")) if file.task == "frameqa" else "",
    )


def _official_wording(question: str, task: str) -> str:
    """HQGA's question as the official files spell it: a space before "?", FrameQA alone in lower case."""
    question = question.removesuffix("?").strip()
    if not question:
        return ""
    return f"{question if task == 'frameqa' else question[0].upper() + question[1:]} ?"


def _type(code: str) -> str:
    if code and code not in ("0", "1", "2", "3"):
        raise RowError(f"unknown type code {code!r}; the codes are 0 to 3 ({', '.join(TYPES)})")
    return TYPES[int(code)] if code else ""


def gif_sources(source: str | Path, rejects: list[tuple[str, str, str]]) -> dict[str, str]:
    """GIF name -> where it is, for a folder, a zip archive or a text file of URLs; unusable entries go to `rejects`.

    Of two GIFs of one name the first in sorted order (in the list's order, for URLs) is used.
    Raises `CorpusError` if the source does not exist or holds no GIF.
    """
    source = Path(source)
    if source.is_dir():
        found = _in_folder(source)
    elif not source.is_file():
        raise CorpusError(f"GIFs: there is no folder, zip archive or list of URLs {source}.")
    elif zipfile.is_zipfile(source):
        found = _in_archive(source, rejects)
    else:
        found = _in_list(source, rejects)
    sources: dict[str, str] = {}
    for name, place in found:
        sources.setdefault(name, place)
    if not sources:
        raise CorpusError(f"GIFs: {source} holds none (a folder or zip archive of .gif files, or a list of URLs).")
    return sources


def gif_name(path: str) -> str | None:
    """The GIF name of a path, archive member or URL (its last part without .gif), or None if it is no .gif file."""
    base = PurePosixPath(unquote(urlsplit(path).path) if "://" in path else path).name
    is_gif = base.lower().endswith(".gif") and not is_leftover(path)  # "._x.gif" is macOS metadata
    return base[:-4] or None if is_gif else None


def _in_folder(folder: Path) -> Iterator[tuple[str, str]]:
    def walk(file: Path) -> list[tuple[bool, str]]:  # a folder's own files come before those of its folders
        return [*((True, part) for part in file.parts[:-1]), (False, file.name)]

    for file in sorted(files_below(folder), key=walk):
        if name := gif_name(file.name):
            yield name, str(file)


def _in_archive(archive: Path, rejects: list[tuple[str, str, str]]) -> Iterator[tuple[str, str]]:
    with zipfile.ZipFile(archive) as opened:
        members = sorted(opened.namelist())
    for member in members:
        path = PurePosixPath(member.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
            rejects.append((member, archive.name, "the member's name leads out of the archive"))
        elif name := gif_name(member):
            yield name, f"{archive}::{member}"


def _in_list(path: Path, rejects: list[tuple[str, str, str]]) -> Iterator[tuple[str, str]]:
    for number, (url, *_) in _listed(path):
        name = gif_name(url) if re.match(r"https?://[^/\s]+/\S+$", url) else None
        if name:
            yield name, url
        else:
            rejects.append((url[:200], f"{path.name} row {number}", "not an http(s) URL of a .gif file"))


def _listed(path: Path) -> list[tuple[int, list[str]]]:
    """The number and the cells of each row of a list of URLs: a URL, and a caption where there are some."""
    text, _ = table_text(path, errors="replace")
    by_hand = re.match(r'"?https?://[^\s"]+\.gif"?([,;])', text)  # as a spreadsheet saves it
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        cells = line.split("\t") if "\t" in text or not by_hand else _quoted_cells(line, by_hand[1])
        if any(map(visible, cells)):
            rows.append((number, [cells[0].strip(), *cells[1:]]))
    return rows
