"""A person's table of questions as text editors and spreadsheets save it: from bytes to a header and rows of cells."""

from __future__ import annotations

import csv
import difflib
import io
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

from helpers.corpora.schema import CorpusError, RowError
from helpers.workspace.names import visible

SEPARATOR_LINE = re.compile(r'"?sep=(?P<named>\\t|[^"\n]?)"?[,;\t ]*(?:\n|$)', re.IGNORECASE)
"""The first line by which Excel is told what separates the cells."""

DAMAGED = "it holds NUL characters, as files have them that a power cut or a disk damaged"
"""Why a row is left out that holds them."""

WIDE = {  # the byte order mark of longer units comes first; without one a header shows them by its zeros
    rb"\xff\xfe\0\0|\0\0\xfe\xff": "utf-32",
    rb"\xff\xfe|\xfe\xff": "utf-16",
    rb"[^\0]\0[^\0]\0": "utf-16-le",
    rb"\0[^\0]\0[^\0]": "utf-16-be",
}
"""Encodings of more than a byte a character, by how a file in them begins."""

Row = tuple[int, list[str]]
"""The row's number, the header being row 1, and its cells as they are written."""


def read_sheet(
    path: Path, columns: Sequence[str], needed: Sequence[str], each: str = "question"
) -> tuple[list[str], list[Row]]:
    """Return the header, in lower case, and the rows that are not blank.

    Read are UTF-8 and UTF-16, any kind of line end, commas, semicolons or tabs, and whatever character a first line
    `sep=` names. columns: those of the format, by which a header is known. needed: those that must be there. each: what
    a row is. Raises CorpusError for a file that is no such table, cannot be read, or holds no header or no rows.
    """
    if not path.is_file():
        what = f"{path} is a folder: name the CSV in it" if path.is_dir() else f"there is no file {path}"
        raise CorpusError(f"{each.capitalize()}s: {what}.")
    text, separator = table_text(path)
    # strict: else a quote that is never closed would swallow the rows after it in silence
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        records = list(reader)
    except csv.Error as error:
        advice = "A quote inside a quoted cell is written twice, and every opened quote is closed."
        raise CorpusError(f"{path}: not a readable CSV near line {reader.line_num} ({error}). {advice}") from error
    if not records or not any(visible(cell).strip("\0") for cell in records[0]):
        raise CorpusError(f"{path} is empty: expected the header {','.join(columns)} and a row for each {each}.")
    header = [visible(cell).lower() for cell in records[0]]
    _check_header(header, path, columns, needed)
    rows = [(number, cells) for number, cells in enumerate(records[1:], start=2) if any(map(visible, cells))]
    if not rows:
        raise CorpusError(f"{path} has a header but no {each}s.")
    return header, rows


def by_column(cells: Sequence[str], header: Sequence[str]) -> dict[str, str]:
    """The cells of a row as they are written, by their columns; "" for those that it lacks at its end.

    Raises RowError for a row with more cells than the header, or with NUL characters.
    """
    if len(cells) > len(header):
        raise RowError(f"{len(cells)} columns, but the header has {len(header)}: quote a text that holds the separator")
    if any("\0" in cell for cell in cells):
        raise RowError(DAMAGED)
    # commas at the end of a row are easily left out by hand
    return dict(zip(header, [*cells, *[""] * (len(header) - len(cells))], strict=True))


def table_text(path: Path, errors: str = "strict") -> tuple[str, str]:
    """The text of a table with "\\n" at each line's end, without a line `sep=`, and the character between its cells.

    errors: what becomes of bytes that are no text, as `bytes.decode` takes it. Raises CorpusError for a file that is
    no text or cannot be read.
    """
    text = re.sub(r"\r*\n|\r", "\n", _decoded(path, errors)).lstrip("\ufeff\n")
    if "\n" not in text:  # what other systems end a line with; beside a usual line end they are part of a cell
        text = "\n".join(text.splitlines())
    told = SEPARATOR_LINE.match(text)
    text = text[told.end() :].lstrip("\n") if told else text
    if told and told["named"]:
        return text, told["named"].replace("\\t", "\t")
    # spreadsheets of some countries write semicolons
    return text, max(",;\t", key=text.split("\n", 1)[0].count)


def _decoded(path: Path, errors: str) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}.") from error
    if kind := _other_kind(data):
        raise CorpusError(f'{path} is {kind}, not a CSV. Open it and save it as "CSV UTF-8".')
    encoding = next((name for start, name in WIDE.items() if re.match(start, data, re.DOTALL)), "utf-8-sig")
    try:
        return data.decode(encoding, errors)
    except UnicodeDecodeError as error:
        line, name = data.count(b"\n", 0, error.start) + 1, "UTF-8" if encoding == "utf-8-sig" else "whole UTF-16"
        raise CorpusError(f"{path}: line {line} is not {name} text. Save the CSV as UTF-8.") from error


def _other_kind(data: bytes) -> str:
    """What a file of questions is by its first bytes if it is no text; "" if it may be one."""
    if data.startswith(b"\xd0\xcf\x11\xe0"):
        return "an old Excel workbook (.xls)"
    if data.startswith(b"\x1f\x8b"):
        return "packed by gzip"
    if data.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS (`git lfs pull` fetches the file)"
    if re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype|html)", data, re.IGNORECASE):
        return "a web page"
    if not data.startswith(b"PK\x03\x04"):
        return ""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as opened:
            names = opened.namelist()
    except zipfile.BadZipFile:
        return "a damaged zip archive or Excel workbook (.xlsx)"
    if any(name.startswith("xl/") for name in names):
        return "an Excel workbook (.xlsx)"
    if any(name.startswith("Index/") for name in names):
        return "a Numbers table (.numbers)"
    return "an OpenDocument table (.ods)" if "content.xml" in names else "a zip archive"


def _check_header(header: list[str], path: Path, columns: Sequence[str], needed: Sequence[str]) -> None:
    if not set(header) & set(columns):
        row, line = ", ".join(filter(None, header)), ",".join(columns)
        raise CorpusError(f"{path} has no header: its first row is data ({row}). Put the line {line} above it.")
    if missing := [column for column in needed if column not in header]:
        near = [difflib.get_close_matches(column, header, n=1) for column in missing]
        hint = "".join(
            f" Is {found[0]!r} meant as {column}?" for column, found in zip(missing, near, strict=True) if found
        )
        listed = ", ".join(filter(None, header))
        raise CorpusError(f"{path}: no column {', '.join(missing)}; the columns found are {listed}.{hint}")
    if repeated := sorted({column for column in header if header.count(column) > 1 and column}):
        raise CorpusError(f"{path}: the column {', '.join(repeated)} occurs more than once.")


def whole_number(text: str, rule: str) -> str:
    """A whole number's digits, also from 3.0 or 3,0 as spreadsheets write it; raises RowError with the rule."""
    found = re.fullmatch(r"([+-]?[0-9]{1,9})(?:[.,]0{0,2})?", text)
    if not found:
        raise RowError(f"{rule}; found {text!r}")
    return found[1]
