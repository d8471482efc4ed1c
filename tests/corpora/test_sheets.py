"""Tables of questions as editors and spreadsheets save them; what is right is written out by hand in each case."""

import zipfile
from pathlib import Path

import pytest

from helpers.corpora.own_gifs import COLUMNS
from helpers.corpora.schema import CorpusError, RowError
from helpers.corpora.sheets import read_sheet, whole_number

HEADER = "gif,task,question,answer,options"
ROW = "cat.gif,count,how many ?,3,"
CELLS = ["cat.gif", "count", "how many ?", "3", ""]


def read(tmp_path, content):
    path = tmp_path / "qa.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_sheet(path, COLUMNS, COLUMNS[:-1])


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\r\r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("last", [True, False])
def test_every_line_end(tmp_path, end, start, last):
    header, rows = read(tmp_path, start + end.join([HEADER, ROW, ROW]) + end * last)
    assert header == COLUMNS and rows == [(2, CELLS), (3, CELLS)]


def test_mixed_line_ends_and_one_inside_a_cell(tmp_path):
    _, rows = read(tmp_path, f'{HEADER}\r{ROW}\r\n{ROW}\ncat.gif,count,"how\r\nmany ?",3,\r\n')
    assert rows == [(2, CELLS), (3, CELLS), (4, ["cat.gif", "count", "how\nmany ?", "3", ""])]


@pytest.mark.parametrize("separator", [";", ",", "\t", "|", "^", ":"])
@pytest.mark.parametrize("first", ["sep={}", "SEP={}", '"sep={}"', "\ufeffsep={}", "sep={}{}{}"])
@pytest.mark.parametrize("end", ["\r\n", "\n", "\r"])
def test_excels_first_line(tmp_path, separator, first, end):
    if first.count("{}") > 1 and separator not in ",;\t":
        return  # only a spreadsheet that saves its cells again adds separators
    lines = [first.replace("{}", separator), *(line.replace(",", separator) for line in (HEADER, ROW))]
    header, rows = read(tmp_path, end.join(lines))
    assert header == COLUMNS and rows == [(2, CELLS)]


@pytest.mark.parametrize("first", ["sep=", "sep=\\t"])
def test_excels_first_line_without_a_character(tmp_path, first):
    lines = [HEADER, ROW] if first == "sep=" else [line.replace(",", "\t") for line in (HEADER, ROW)]
    assert read(tmp_path, "\n".join([first, *lines])) == (COLUMNS, [(2, CELLS)])


def test_bars_as_separators_leave_quoted_options_whole(tmp_path):
    text = 'sep=|\ngif|task|question|answer|options\ncat.gif|action|what ?|a|"a|b"\n'
    assert read(tmp_path, text)[1] == [(2, ["cat.gif", "action", "what ?", "a", "a|b"])]


@pytest.mark.parametrize("end", ["\x85", "\u2028", "\u2029", "\x0b", "\x0c", "\x1e"])
def test_rare_line_ends_count_only_where_there_are_no_others(tmp_path, end):
    assert read(tmp_path, end.join([HEADER, ROW, ROW]) + end) == (COLUMNS, [(2, CELLS), (3, CELLS)])
    _, rows = read(tmp_path, f"{HEADER}\r\ncat.gif,count,how{end}many ?,3,\r\n{ROW}\r\n")
    assert rows == [(2, ["cat.gif", "count", f"how{end}many ?", "3", ""]), (3, CELLS)]


@pytest.mark.parametrize("mark", ["\ufeff", ""])
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
)
def test_encodings_that_can_be_told(tmp_path, encoding, mark):
    if encoding in ("utf-32-le", "utf-32-be") and not mark:
        return  # nobody writes it
    text = f"{mark}{HEADER}\ncaf\u00e9.gif,count,how many ?,3,\n".replace(",", "\t")
    assert read(tmp_path, text.encode(encoding))[1] == [(2, ["caf\u00e9.gif", *CELLS[1:]])]


def test_a_header_with_invisible_characters(tmp_path):
    text = "\ufeff\ufeffGIF\u00a0;\u200bTask; Question;Answer\u200b\r\ncat.gif;count;how many ?;3\r\n"
    assert read(tmp_path, text) == (COLUMNS[:4], [(2, CELLS[:4])])


def workbook(tmp_path, member):
    with zipfile.ZipFile(tmp_path / "book", "w") as opened:
        opened.writestr(member, "x")
    return (tmp_path / "book").read_bytes()


def test_what_is_no_csv_is_named(tmp_path):
    cases = [
        (workbook(tmp_path, "xl/workbook.xml"), r"is an Excel workbook \(.xlsx\), not a CSV.*CSV UTF-8"),
        (workbook(tmp_path, "content.xml"), "is an OpenDocument table"),
        (workbook(tmp_path, "Index/Document.iwa"), "is a Numbers table"),
        (workbook(tmp_path, "cat.gif"), "is a zip archive"),
        (workbook(tmp_path, "xl/workbook.xml")[:20], r"damaged .*xlsx"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", r"an old Excel workbook \(.xls\)"),
        (
            f"{ROW}\n{ROW}\n".encode(),
            r"has no header: its first row is data \(cat.gif, count.*the line gif,task,question",
        ),
        (b"file;task;question;answer\n", "no column gif; the columns found are file, task"),
        (b"gif,task,questions,answer\n", "no column question; .* Is 'questions' meant as question"),
        (b"sep=;\n", "is empty"),
        (bytes(4096), "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS.*git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "is a web page, not a CSV"),
        (b"\x1f\x8b\x08\0", "is packed by gzip, not a CSV"),
        (
            f"{HEADER}\n{ROW}\ncaf\u00e9.gif,count,a ?,3,\n".encode("cp1252"),
            "line 3 is not UTF-8 text. Save the CSV as",
        ),
        (f"{HEADER}\n{ROW}\n".encode("utf-16") + b"\0", "is not whole UTF-16 text"),
        (b"\xef\xbb\xbf", "is empty"),
    ]
    for content, message in cases:
        with pytest.raises(CorpusError, match=message):
            read(tmp_path, content)


def test_a_table_that_may_not_be_read_is_a_sentence(tmp_path, monkeypatch):
    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refused)
    (tmp_path / "qa.csv").touch()
    with pytest.raises(CorpusError, match=r"qa\.csv cannot be read: Permission denied\.$"):
        read_sheet(tmp_path / "qa.csv", COLUMNS, COLUMNS[:-1])


def test_whole_numbers_as_spreadsheets_write_them():
    right = {"3": "3", "3.0": "3", "3,0": "3", "3.00": "3", "3.": "3", "10,0": "10", "+2": "+2", "-1": "-1", "03": "03"}
    assert {text: whole_number(text, "") for text in right} == right
    for wrong in ("3.5", "3,5", "1.000", "1,000", "three", "", "1e0", "1_0", "\u0663", "3.0.0", "3 0"):
        with pytest.raises(RowError, match="a rule; found"):
            whole_number(wrong, "a rule")
