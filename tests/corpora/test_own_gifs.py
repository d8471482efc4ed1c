"""Own GIFs: the CSV format, its rejects, the hold-out, and writing it."""

import csv
import re
import types
import unicodedata

import pandas as pd
import pytest

from helpers import corpora
from helpers.config import load_profile
from helpers.corpora import own_gifs
from helpers.corpora.schema import CorpusError
from helpers.gifs.decode import read_gif

HEADER = "gif,task,question,answer,options"


@pytest.fixture
def gifs(tmp_path):
    folder = tmp_path / "gifs"
    (folder / "sub").mkdir(parents=True)
    for name in ("cat.gif", "dog.gif", "sub/fox.gif"):
        (folder / name).touch()
    (tmp_path / "outside.gif").touch()
    return folder


def write(folder, *lines):
    path = folder.parent / "qa.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_rows_of_every_task(gifs):
    path = write(
        gifs,
        HEADER,
        "cat.gif,frameqa,what color is the cat ?,black,",
        "cat.gif,count,How many times does the cat jump ?,1,",
        "dog.gif,action,What does the dog do 3 times ?,nod,sit|nod|run",
        "sub/fox.gif,Transition,What does the fox do after nod ?,2,sit|nod|run",
        '"cat.gif",frameqa,"where, then, is the cat ?",under the mat',
    )
    corpus = own_gifs.load(gifs, path, holdout=0)
    assert corpus.rejects.empty
    assert corpus.questions.to_dict("list") == {
        "question_id": ["qa-2", "qa-3", "qa-4", "qa-5", "qa-6"],
        "gif": ["cat.gif", "cat.gif", "dog.gif", "sub/fox.gif", "cat.gif"],
        "split": ["train"] * 5,
        "task": ["frameqa", "count", "action", "transition", "frameqa"],
        "question": [
            "what color is the cat ?",
            "How many times does the cat jump ?",
            "What does the dog do 3 times ?",
            "What does the fox do after nod ?",
            "where, then, is the cat ?",
        ],
        "options": [[], [], ["sit", "nod", "run"], ["sit", "nod", "run"], []],
        "answer": ["black", "1", "nod", "run", "under the mat"],
        "label": [-1, 1, 1, 2, -1],
        "type": ["color", "", "", "", "location"],
    }
    assert corpus.gifs == {name: str(gifs / name) for name in ("cat.gif", "dog.gif", "sub/fox.gif")}


@pytest.mark.parametrize(
    ("rows", "kept", "left_out"),
    [
        (["3 of 1|2|3|4|5", "5 of 1|2|3|4|5"], ["3", "5"], []),  # there is no number 5: they are texts
        (["3 of 1|2|3|4|5", "nod of nod|run"], ["3", "nod"], []),
        (["3 of 1|2|3|4|5", "1 of 1|2|3|4|5"], [], [0, 1]),
        (["3 of 1|2|3|4|5", "0 of 1|2|3|4|5"], ["1"], [0]),  # there is no text 0: numbers are in use
        (["3 of 1|2|3|4|5", "0 of sit|nod", "run of nod|run"], ["sit", "run"], [0]),
        (["2 of 3|2|1", "nod of nod|run", "0 of nod|run"], ["nod", "nod"], [0]),
        (["1 of 3|1|2", "2 of 0|1|2|3"], ["1", "2"], []),  # both readings agree
        (["1 of 3|1|2", "2 of 3|1|2", "0 of a1|b1"], ["1", "2", "a1"], []),
        (["C of 1|2|3|4|5", "D of 1|2|3|4|5", "0 of sit|nod"], ["3", "4", "sit"], []),  # as the reason says
        (["3.0 of 1.0|2.0|3.0|4.0"], [], [0]),
        (["2 of a|2|1"], [], [0]),
    ],
)
def test_a_number_that_is_one_options_text_and_anothers_number(gifs, rows, kept, left_out):
    lines = [
        CHOICE.format(n=n, answer=row.split(" of ")[0], options=row.split(" of ")[1]) for n, row in enumerate(rows)
    ]
    corpus = own_gifs.load(gifs, write(gifs, HEADER, *lines, "dog.gif,frameqa,who ?,dog,"), holdout=0)
    assert corpus.questions.answer.tolist() == [*kept, "dog"]
    assert corpus.rejects["where"].tolist() == [f"qa.csv row {2 + number}" for number in left_out]


@pytest.mark.parametrize(
    ("options", "way"), [("1|2|3|4|5", r"its letter \(C or D\)"), ("1|2|3|4|a", "the options in words")]
)
def test_the_way_to_write_such_an_answer_is_told(gifs, options, way):
    path = write(gifs, HEADER, CHOICE.format(n=0, answer="3", options=options), "dog.gif,frameqa,who ?,dog,")
    [reason] = own_gifs.load(gifs, path, holdout=0).rejects.reason
    assert re.fullmatch(
        f"the answer '3' may be the option '3' or, counted from 0, number 3, which is '4': write {way}", reason
    )


def test_an_option_that_is_a_number_comes_back_as_it_was_written(gifs, tmp_path):
    rows = [("how many ?", "3", "1|2|3|4|5"), ("how few ?", "1", "3|2|1"), ("what ?", "0", "1|0|2")]
    table = []
    for question, text, joined in rows:
        options = joined.split("|")
        row = {"question_id": question, "gif": "cat.gif", "split": "train", "task": "action", "question": question}
        table.append(corpora.question_row(**row, answer=str(options.index(text)), options=options))
    own_gifs.write_own_gifs_csv(corpora.question_table(table), tmp_path / "qa.csv")
    read = own_gifs.load(gifs, tmp_path / "qa.csv", holdout=0)
    assert read.questions.answer.tolist() == [text for _, text, _ in rows]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("bird.gif,frameqa,what ?,bird,", "no such GIF"),
        (",frameqa,what ?,bird,", "no GIF is named"),
        ("../outside.gif,frameqa,what ?,cat,", "leads out of the folder"),
        ("sub/../../outside.gif,frameqa,what ?,cat,", "leads out of the folder"),
        ("/etc/passwd,frameqa,what ?,cat,", "leads out of the folder"),
        ("sub,frameqa,what ?,cat,", "no such GIF"),
        ("cat.gif,frameQ,what ?,cat,", "unknown task 'frameQ'.*did you mean frameqa"),
        ("cat.gif,action,what ?,3,a|b|c", "option index 3 is out of range: the 3 options are 0 to 2"),
        ("cat.gif,action,what ?,-1,a|b|c", "out of range"),
        ("cat.gif,action,what ?,d,a|b|c", "the answer 'd' is not one of the options"),
        ("cat.gif,action,what ?,a,a|b|a", "more than one of the options"),
        ("cat.gif,action,what ?,a,a||b", "none of them empty"),
        ("cat.gif,action,what ?,b,a|b|a", r"two of the options are the same: \['a', 'b', 'a'\]"),
        ("cat.gif,action,what ?,b,a|b|A", r"two of the options are the same: \['a', 'b', 'A'\]"),
        ("cat.gif,transition,what ?,0,", "needs two or more options"),
        ("cat.gif,count,how many ?,two,", "a count is an integer; found 'two'"),
        ("cat.gif,count,how many ?,2.5,", "a count is an integer; found '2.5'"),
        ("cat.gif,count,how many ?,1.000,", "a count is an integer"),
        ("cat.gif,count,how many ?,0,", "the count 0 is outside 1 to 10: the model counts from 1"),
        ("cat.gif,count,how many ?,0.0,", "the count 0 is outside 1 to 10"),
        ("cat.gif,count,how many ?,11,", "outside 1 to 10"),
        ("cat.gif,count,how many ?,-2,", "outside 1 to 10"),
        ("._cat.gif,frameqa,what ?,cat,", "an operating system left behind"),
        ("__MACOSX/cat.gif,frameqa,what ?,cat,", "an operating system left behind"),
        ("C:\\gifs\\cat.gif,frameqa,what ?,cat,", "leads out of the folder"),
        ("fox.gif,frameqa,what ?,cat,", "no such GIF in the folder gifs; did you mean sub/fox.gif?"),
        ("catt.gif,frameqa,what ?,cat,", r"no such GIF in the folder gifs; did you mean cat.gif?"),
        ('cat.gif,action,what ?,green,"red, white and blue, green"', "cannot be told where an option ends"),
        ('cat.gif,action,what ?,0,"1,5 m, 2,7 m"', "cannot be told where an option ends"),
        ('cat.gif,action,what ?,a,"a, b; c"', "cannot be told where an option ends"),
        ('cat.gif,action,what ?,a,"a, b, a"', "cannot be told where an option ends"),
        ('cat.gif,action,what ?,"1,5","1,5,2,7"', "cannot be told where an option ends"),
        ('cat.gif,action,what ?,a,"[""a"", ""b""]"', "cannot be told where an option ends"),
        ("cat.gif,action,what ?,0,\"['a', 'b']\"", "cannot be told where an option ends"),
        ("cat.gif,action,what ?,0,a/b/c", "needs two or more options.*vertical bars between them; found"),
        ("cat.gif,action,what ?,0,a|a|b", "the answer '0' is more than one of the options"),
        ("cat.gif,action,what ?,(2),a b|c d", r"the answer '\(2\)' is not one of the options"),
        ("cat.gif,frameqa,what\0 ?,cat,", "holds NUL characters"),
        ("cat.gif,count,how many ?,10+,", "a count is an integer; found '10\\+'"),
        ("cat.gif,frameqa,  ,cat,", "question is empty"),
        ("cat.gif,frameqa,what ?,,", "answer is empty"),
        ("cat.gif,frameqa,what, then ?,cat,", "6 columns, but the header has 5"),
    ],
)
def test_a_bad_row_is_rejected_with_its_reason_and_the_rest_goes_on(gifs, row, reason):
    (gifs / "._cat.gif").touch()
    path = write(gifs, HEADER, "cat.gif,frameqa,what ?,cat,", row, "dog.gif,frameqa,what ?,dog,")
    corpus = own_gifs.load(gifs, path, holdout=0.5)
    assert corpus.questions.answer.tolist() == ["cat", "dog"]
    assert corpus.rejects.item.tolist() == [row.split(",")[0]]
    assert corpus.rejects["where"].tolist() == ["qa.csv row 3"]
    assert corpus.rejects.reason.str.contains(reason).all(), corpus.rejects.reason.tolist()


def test_one_gif_in_several_spellings_is_one_gif(gifs):
    path = write(gifs, HEADER, *(f"{name},frameqa,what ?,cat," for name in ("cat", "cat.gif", "./sub/../cat.gif")))
    assert set(own_gifs.load(gifs, path, holdout=0).gifs) == {"cat.gif"}


def test_files_that_cannot_be_used_are_clear_errors(gifs):
    row = "cat.gif,frameqa,what ?,cat,"
    cases = [
        (["gif,task,question,options", row], "no column answer; the columns found are gif, task, question, options"),
        ([""], "is empty: expected the header gif,task"),
        ([HEADER], "has a header but no questions"),
        ([HEADER, "bird.gif,frameqa,what ?,bird,"], r"No usable question (.|\n)*qa.csv row 2, bird.gif: .*no such GIF"),
        ([HEADER + ",gif", row], "column gif occurs more than once"),
        ([HEADER, row, 'cat.gif,frameqa,"what ?,cat,', row], "not a readable CSV near line 4"),
    ]
    for lines, message in cases:
        with pytest.raises(CorpusError, match=message):
            own_gifs.load(gifs, write(gifs, *lines))
    with pytest.raises(CorpusError, match="there is no file"):
        own_gifs.load(gifs, gifs / "absent.csv")
    with pytest.raises(CorpusError, match=r"qa\.csv is a file: unpack it, and name the folder\.$"):
        own_gifs.load(write(gifs, HEADER, row), gifs.parent / "qa.csv")
    with pytest.raises(CorpusError, match=r"gifs is a folder: name the CSV in it\.$"):
        own_gifs.load(gifs, gifs)
    with pytest.raises(CorpusError, match="there is no folder"):
        own_gifs.load(gifs / "absent", write(gifs, HEADER, row))
    (gifs.parent / "qa.csv").write_bytes(HEADER.encode() + b"\ncat.gif,frameqa,caf\xe9 ?,cat,\n")
    with pytest.raises(CorpusError, match="not UTF-8"):
        own_gifs.load(gifs, gifs.parent / "qa.csv")
    with pytest.raises(CorpusError, match="from 0 to 1"):
        own_gifs.load(gifs, write(gifs, HEADER, row), holdout=20)


def test_spreadsheet_exports(gifs):
    path = gifs.parent / "qa.csv"
    path.write_bytes("﻿GIF;Task;Question;Answer;Options\r\ncat.gif;frameqa;what, then ?;cat;\r\n".encode())
    questions = own_gifs.load(gifs, path, holdout=1).questions
    assert questions[["question", "answer"]].to_numpy().tolist() == [["what, then ?", "cat"]]


def many(tmp_path, number, order=1):
    folder = tmp_path / "many"
    folder.mkdir(exist_ok=True)
    names = [f"{i:03d}.gif" for i in range(number)]
    for name in names:
        (folder / name).touch()
    rows = [f"{name},frameqa,what {word} ?,cat," for name in names for word in ("a", "b", "c")][::order]
    return folder, write(folder, HEADER, *rows)


def test_holdout_is_by_gif_and_deterministic(tmp_path):
    questions = own_gifs.load(*many(tmp_path, 50), holdout=0.2, seed=3).questions
    splits = questions.groupby("gif").split.agg(set)
    assert all(len(split) == 1 for split in splits)
    held_out = {gif for gif, split in splits.items() if split == {"test"}}
    assert len(held_out) == 10
    again = own_gifs.load(*many(tmp_path, 50, order=-1), holdout=0.2, seed=3).questions
    assert set(again.gif[again.split == "test"]) == held_out
    other = own_gifs.load(*many(tmp_path, 50), holdout=0.2, seed=4).questions
    assert set(other.gif[other.split == "test"]) != held_out


def test_holdout_leaves_both_splits_something(tmp_path):
    for holdout in (0.01, 0.99):
        questions = own_gifs.load(*many(tmp_path, 2), holdout=holdout).questions
        assert questions.groupby("split").gif.nunique().to_dict() == {"test": 1, "train": 1}


def test_one_gif_cannot_be_held_out(tmp_path):
    folder, path = many(tmp_path, 1)
    with pytest.raises(CorpusError, match="at least 2, but the rows are about 1"):
        own_gifs.load(folder, path)
    assert set(own_gifs.load(folder, path, holdout=1).questions.split) == {"test"}
    assert set(own_gifs.load(folder, path, holdout=0).questions.split) == {"train"}


def test_a_split_column_is_kept(gifs):
    path = write(
        gifs,
        HEADER + ",split,type",
        "cat.gif,frameqa,what ?,cat,,Train,color",
        "dog.gif,frameqa,what ?,dog,,test,3",
        "dog.gif,frameqa,what ?,dog,,validation,",
        "dog.gif,frameqa,what ?,dog,,test,size",
    )
    corpus = own_gifs.load(gifs, path)
    assert corpus.questions[["split", "type"]].to_numpy().tolist() == [["train", "color"], ["test", "location"]]
    assert corpus.rejects["where"].tolist() == ["qa.csv row 4", "qa.csv row 5"]
    assert "unknown split 'validation'" in corpus.rejects.reason[0]
    assert "unknown type 'size'" in corpus.rejects.reason[1]
    assert set(own_gifs.load(gifs, path, holdout=1).questions.split) == {"test"}


def test_what_is_written_is_read_again(gifs, tmp_path):
    path = write(
        gifs,
        HEADER + ",split,type",
        'cat.gif,frameqa,"what, ""then"" ?",cat,,train,object',
        "cat.gif,count,How many times ?,1,,train,",
        "dog.gif,action,What ?,1,3|2|1,test,",
    )
    questions = own_gifs.load(gifs, path).questions
    coded = questions.assign(answer=questions.answer.replace("1", "0"), label=questions.label.replace(1, 0))
    own_gifs.write_own_gifs_csv(coded[coded.task == "count"], tmp_path / "qa.csv")  # TGIF-QA's code for once
    assert own_gifs.load(gifs, tmp_path / "qa.csv").questions.answer.tolist() == ["1"]
    own_gifs.write_own_gifs_csv(questions, tmp_path / "qa.csv")
    pd.testing.assert_frame_equal(own_gifs.load(gifs, tmp_path / "qa.csv").questions, questions)
    bare = questions.assign(gif=questions.gif.str.removesuffix(".gif"))
    own_gifs.write_own_gifs_csv(bare, tmp_path / "qa.csv")
    pd.testing.assert_frame_equal(own_gifs.load(gifs, tmp_path / "qa.csv").questions, questions)


def test_an_option_with_a_bar_is_not_written(gifs, tmp_path):
    row = corpora.question_row(
        question_id="1", gif="cat", split="test", task="action", question="What ?", answer="0", options=["a|b", "c"]
    )
    with pytest.raises(CorpusError, match=r"cat, 'What \?': an option holds '\|'"):
        own_gifs.write_own_gifs_csv(corpora.question_table([row]), tmp_path / "out.csv")
    assert not list(tmp_path.glob("out.csv*"))


CHOICE = "cat.gif,action,what {n} ?,{answer},{options}"


@pytest.mark.parametrize(
    ("answer", "options", "meant"),
    [
        ("nod", "sit|nod|run", "nod"),
        ("Nod\u200b", " sit |\u00a0nod | run", "nod"),
        ("B", "sit|nod|run", "nod"),
        ("b", "sit|nod|run", "nod"),
        ("(c)", "sit|nod|run", "run"),
        ("a)", "sit|nod|run", "sit"),
        ("C.", "sit|nod|run", "run"),
        ("0", "sit|nod|run", "sit"),
        ("2.0", "sit|nod|run", "run"),
        ('"1,0"', "sit|nod|run", "nod"),
        ("b", "c|b|a", "b"),  # the text comes before the letter
        ("B", "c|b|a", "b"),
        ("jump", '"jump, spin, blink"', "jump"),
        ("spin", '"jump,spin,blink"', "spin"),
        ("c", '"jump, spin, blink"', "blink"),
        ("1", "jump;spin;blink", "spin"),
        ("3", '"1,2,3"', "3"),
        ('"a, b"', '"a, b|c, d"', "a, b"),  # bars come before commas
    ],
)
def test_an_option_is_found_as_people_write_it(gifs, answer, options, meant):
    path = write(gifs, HEADER, CHOICE.format(n=1, answer=answer, options=options))
    assert own_gifs.load(gifs, path, holdout=0).questions.answer.tolist() == [meant]


@pytest.mark.parametrize(
    ("answers", "kept", "reason"),
    [
        ("0 1 2", ["sit", "nod", "run"], None),  # a 0 is among them: counted from 0
        ("2", ["run"], None),  # one number alone is read as the documentation says
        ("nod 1 0", ["nod", "nod", "sit"], None),
        ("1 2", [], "none of these is 0 and nothing tells it from a count that begins with 1"),
        ("1 2 sit", ["sit"], "none of these is 0 and nothing tells"),
        ("1 2 3", [], "none of these is 0 and one is the number of options: write the option's text|option index 3"),
        ("3 1 run b", ["run", "nod"], "one is the number of options|option index 3 is out of range"),
        ("0 3", ["sit"], "option index 3 is out of range: the 3 options are 0 to 2"),
    ],
)
def test_numbers_that_may_count_options_from_one_are_refused(gifs, answers, kept, reason):
    lines = [CHOICE.format(n=n, answer=answer, options="sit|nod|run") for n, answer in enumerate(answers.split())]
    corpus = own_gifs.load(gifs, write(gifs, HEADER, *lines, "dog.gif,frameqa,who ?,dog,"), holdout=0)
    assert corpus.questions.answer.tolist() == [*kept, "dog"]
    assert len(corpus.rejects) == len(lines) - len(kept)
    assert reason is None or corpus.rejects.reason.str.contains(reason).all(), corpus.rejects.reason.tolist()


def test_letters_are_no_letters_among_options_of_one_letter(gifs):
    path = write(gifs, HEADER, "cat.gif,action,what ?,a,b|c|d", "cat.gif,frameqa,what ?,cat,")
    corpus = own_gifs.load(gifs, path, holdout=0)
    assert corpus.rejects.reason.tolist() == ["the answer 'a' is not one of the options ['b', 'c', 'd']"]


def test_counts_as_a_spreadsheet_writes_them(gifs):
    lines = [
        "cat.gif;count;how many a ?;3,0;",
        "cat.gif;count;how many b ?;4.0;",
        "cat.gif;count;how many c ?;\u200b5 ;",
    ]
    corpus = own_gifs.load(gifs, write(gifs, HEADER.replace(",", ";"), *lines), holdout=0)
    assert corpus.questions.label.tolist() == [3, 4, 5] and corpus.questions.answer.tolist() == ["3", "4", "5"]


def test_options_are_needed_where_a_task_needs_them(gifs):
    path = write(gifs, "gif,task,question,answer", "cat.gif,count,how many ?,3", "dog.gif,action,what ?,nod")
    corpus = own_gifs.load(gifs, path, holdout=0)
    assert corpus.questions.answer.tolist() == ["3"]
    assert corpus.rejects.values.tolist() == [
        ["dog.gif", "qa.csv row 3", "action needs options, and the CSV has no column options"]
    ]


def test_rows_that_contradict_each_other_are_left_out(gifs):
    path = write(
        gifs,
        HEADER,
        "cat.gif,frameqa,what color is it ?,red,",
        "CAT,frameqa,What color is it?,blue,",  # the same GIF and question, written otherwise
        "cat.gif,count,how many ?,3,",
        "cat.gif,count,how many ?,3.0,",  # the same answer
        "dog.gif,frameqa,what color is it ?,Red,",
        "dog.gif,frameqa,what color is it ?,red,",
        "dog.gif,action,what ?,sit,sit|nod|run",
        "dog.gif,action,what ?,nod,run|nod|sit",
        "dog.gif,transition,what ?,sit,sit|nod",
        "dog.gif,transition,what ?,jump,jump|run",  # other options: both may be right
    )
    corpus = own_gifs.load(gifs, path, holdout=0)
    assert corpus.questions.question_id.tolist() == ["qa-4", "qa-5", "qa-6", "qa-7", "qa-10", "qa-11"]
    assert corpus.rejects["where"].tolist() == [f"qa.csv row {number}" for number in (2, 3, 8, 9)]
    assert corpus.rejects.reason.tolist() == [
        f"contradicts row {number} of qa.csv: the same question with another answer" for number in (3, 2, 9, 8)
    ]


def test_an_error_carries_what_lies_behind_it(gifs):
    lines = [f"bird{n}.gif,frameqa,what ?,bird," for n in range(8)]
    path = write(gifs, HEADER, "cat.gif,frameqa,what ?,cat,", *lines)
    with pytest.raises(CorpusError, match="at least 2, but the rows are about 1") as error:
        own_gifs.load(gifs, path)
    told = str(error.value).split("Left out: ")[1].splitlines()
    assert told[0] == "8" and len(told) == 9
    assert told[1] == "  qa.csv row 3, bird0.gif: there is no such GIF in the folder gifs"
    with pytest.raises(CorpusError, match=r"row 22, bird19.*\n  and 5 more$"):
        own_gifs.load(
            gifs, write(gifs, HEADER, "cat,frameqa,what ?,cat,", *(f"bird{n},frameqa,a ?,b," for n in range(25)))
        )
    path = write(
        gifs, HEADER + ",split", *(f"cat,frameqa,a ?,b,,{s}" for s in ("train", "test")), "dog,count,a ?,0,,train"
    )
    with pytest.raises(CorpusError, match=r"also occurs in a test(.|\n)*row 4, dog: the count 0 is outside"):
        corpora.load(profile("own_gifs"), folder=gifs, gifs=gifs, qa=path)


def test_a_corpus_of_which_nothing_is_left_lists_its_rejects(gifs):
    path = write(gifs, HEADER, *(f"bird{n},frameqa,a ?,b," for n in range(8)), "cat,count,a ?,0,")
    with pytest.raises(CorpusError) as error:
        own_gifs.load(gifs, path)
    first, left_out, *listed = str(error.value).splitlines()
    assert first == f"No usable question is left of {path}." and left_out == "Left out: 9"
    missing = "there is no such GIF in the folder gifs"
    assert listed[:-1] == [f"  qa.csv row {n + 2}, bird{n}: {missing}" for n in range(8)]
    assert listed[-1].startswith("  qa.csv row 10, cat: the count 0 is outside 1 to 10")


def test_a_csv_that_excel_padded_and_a_row_with_a_comma_too_many(gifs):
    """Excel pads header and rows alike; a row that alone is longer holds a comma that belongs to a text."""
    path = write(gifs, f"{HEADER},,", "cat,frameqa,what ?,cat,,,", "dog,frameqa,what ?,dog,,,", ",,,,,,", ",,,,,,")
    assert own_gifs.load(gifs, path, holdout=0).questions.answer.tolist() == ["cat", "dog"]
    path = write(gifs, HEADER, "cat,frameqa,what, then ?,cat,", "dog,frameqa,what ?,dog,")
    assert own_gifs.load(gifs, path, holdout=0).questions.answer.tolist() == ["dog"]


NAMES = [
    "a::b",
    "a#b",
    "a%20b",
    "a?b",
    "a*b",
    "a[x]b",
    "a\nb",
    "n" * 251,
    "$a$",
    "a;b",
    "a,b",
    'a"b',
    "a\tb",
    "~a",
    "-a",
]


@pytest.mark.parametrize("place", ["in::side", "100%20#?", "[x]*", "$HOME"])
def test_names_with_any_character_are_names(tmp_path, place):
    """In the folder's path and in the GIF's own name, from the CSV to the bytes."""
    folder = tmp_path / place
    folder.mkdir()
    for number, name in enumerate(NAMES):
        (folder / f"{name}.gif").write_bytes(bytes([number]))
    with (folder / "qa.csv").open("w", newline="") as file:
        csv.writer(file).writerows([HEADER.split(","), *([f"{name}.gif", "frameqa", "a ?", "b", ""] for name in NAMES)])
    corpus = own_gifs.load(folder, folder / "qa.csv", holdout=0)
    assert corpus.rejects.empty
    assert [read_gif(corpus.gifs[gif]) for gif in corpus.questions.gif] == [bytes([n]) for n in range(len(NAMES))]


def test_names_of_any_bytes_and_leftovers_beside_the_data_change_nothing(gifs, tmp_path):
    strange = tmp_path / "caf\udce9"
    strange.mkdir()
    for name in ("caf\udce9.gif", "._cat.gif", ".DS_Store", "Thumbs.db"):
        (gifs / name).touch()
        (strange / name).touch()
    (strange / "cat.gif").touch()
    path = write(gifs, HEADER, "cat,frameqa,what ?,cat,", "caf\u00e9.gif,frameqa,what ?,cat,")
    for folder in (gifs, strange):
        corpus = own_gifs.load(folder, path, holdout=0)
        assert corpus.questions.gif.tolist() == ["cat.gif"] and corpus.gifs == {"cat.gif": str(folder / "cat.gif")}
        assert corpus.rejects.reason[0].endswith("did you mean caf\\xe9.gif?")
        assert "caf\\xe9" in corpus.rejects.reason[0]
        corpus.rejects.to_parquet(tmp_path / "rejects.parquet")
        "".join(corpus.rejects.to_numpy().ravel()).encode()
    with pytest.raises(CorpusError) as error:
        own_gifs.load(strange / "no", path)
    assert str(error.value).endswith("caf\\xe9/no.")


def test_the_layout_of_a_hub_cache_is_read(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0a1b"
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    rows = [f"g{n}.gif,frameqa,what {m} ?,a{m}," for n in range(3) for m in range(4)]
    (blobs / "bq").write_text("\n".join([HEADER, *rows]))
    for n in range(3):
        (blobs / f"b{n}").touch()
        (snapshot / f"g{n}.gif").symlink_to(f"../../blobs/b{n}")
    (snapshot / "qa.csv").symlink_to("../../blobs/bq")
    corpus = own_gifs.load(snapshot, snapshot / "qa.csv")
    assert corpus.rejects.empty and len(corpus.questions) == 12
    assert corpus.gifs["g1.gif"] == str(snapshot / "g1.gif")


def test_a_mac_and_another_system_hold_out_the_same(tmp_path):
    held_out = []
    for form in ("NFC", "NFD"):
        folder = tmp_path / form
        folder.mkdir()
        names = [unicodedata.normalize(form, f"\u00e9{n}.gif") for n in range(20)]
        for name in names:
            (folder / name).touch()
        questions = own_gifs.load(
            folder, write(folder, HEADER, *(f"{name},frameqa,a ?,b," for name in names))
        ).questions
        held_out.append({unicodedata.normalize("NFC", gif) for gif in questions.gif[questions.split == "test"]})
    assert held_out[0] == held_out[1] and len(held_out[0]) == 4


def test_test_questions_that_are_left_out_are_counted_as_asked(gifs):
    """A dead GIF and a broken answer; the training row and the row of no task are no test questions."""
    path = gifs / "split.csv"
    path.write_text(
        "gif,task,question,answer,options,split\n"
        "cat.gif,frameqa,what is it ?,cat,,train\n"
        "cat.gif,count,how many ?,2,,Test\n"
        "dead.gif,count,how many ?,2,,test\n"
        "cat.gif,Count,how often ?,many,,TEST\n"
        "dead.gif,frameqa,what is it ?,cat,,train\n"
        "cat.gif,riddle,what ?,cat,,test\n"
    )
    corpus = own_gifs.load(gifs, path)
    assert corpus.asked == {"count": 3} and (corpus.questions.split == "test").sum() == 1
    assert own_gifs.load(gifs, path, holdout=1).asked == {"count": 3, "frameqa": 2}


def test_what_is_left_out_is_one_line(gifs):
    lines = [
        "cat,frameqa,what ?,cat,",
        "dog,frameqa,what ?,dog,",
        "dog,frameqa,who ?,dog,",
        "bird,frameqa,a ?,b,",
        ",,,,",
    ]
    corpus = own_gifs.load(gifs, write(gifs, HEADER, *lines), holdout=0)
    questions, none = corpus.questions, corpus.captions
    assert corpora.left_out(corpus, questions, none, corpus.gifs) == "1 of 4 rows and 0 GIFs left out: rejects.parquet"
    without_dog = questions[questions.gif != "dog.gif"]
    assert corpora.left_out(corpus, without_dog, none, corpus.gifs) == "3 of 4 rows and 1 GIF left out: rejects.parquet"
    corpus = own_gifs.load(gifs, write(gifs, HEADER, *lines[:3]), holdout=0)
    assert corpora.left_out(corpus, corpus.questions, none, corpus.gifs) == "nothing left out of 3 rows"


def profile(corpus):
    return types.SimpleNamespace(data=types.SimpleNamespace(corpus=corpus))


def test_load_dispatches_and_drops_leaks(gifs, tmp_path):
    path = write(
        gifs,
        HEADER + ",split",
        "cat.gif,frameqa,what ?,cat,,train",
        "dog.gif,frameqa,what ?,dog,,train",
        "dog.gif,frameqa,who ?,dog,,train",
        "dog.gif,frameqa,what ?,dog,,test",
    )
    corpus = corpora.load(profile("own_gifs"), folder=tmp_path, gifs=gifs, qa=path)
    assert corpus.questions[["gif", "split"]].to_numpy().tolist() == [["cat.gif", "train"], ["dog.gif", "test"]]
    assert corpus.rejects.item.tolist() == ["dog.gif"]
    assert "its 2 training questions are left out" in corpus.rejects.reason[0]


def test_load_names_what_is_missing(gifs, tmp_path):
    with pytest.raises(CorpusError, match="needs `qa`"):
        corpora.load(profile("own_gifs"), folder=tmp_path, gifs=gifs)
    with pytest.raises(CorpusError, match="needs `qa`: the folder of TGIF-QA"):
        corpora.load(profile("tgif_qa"), folder=tmp_path, qa="")
    with pytest.raises(CorpusError, match=r"set data\.corpus to own_gifs"):
        corpora.load(profile("shapes"), folder=tmp_path, gifs=gifs)
    path = write(gifs, HEADER + ",split", "cat.gif,frameqa,what ?,cat,,train", "cat.gif,frameqa,what ?,cat,,test")
    with pytest.raises(CorpusError, match="Every training GIF also occurs in a test"):
        corpora.load(profile("own_gifs"), folder=tmp_path, gifs=gifs, qa=path)


def test_natural_gifs(shared_data):
    folder = shared_data / "gifs" / "natural"
    corpus = own_gifs.load(folder, folder / "qa.csv")
    written = pd.read_csv(folder / "qa.csv", keep_default_na=False, dtype=str)
    assert corpus.rejects.empty
    assert corpus.questions.question.tolist() == written.question.tolist()
    assert corpus.questions.answer.tolist() == written.answer.tolist()
    assert corpus.questions.task.value_counts().to_dict() == written.task.value_counts().to_dict()
    test_gifs = set(corpus.questions.gif[corpus.questions.split == "test"])
    assert len(test_gifs) == round(0.2 * written.gif.nunique())
    assert not test_gifs & set(corpus.questions.gif[corpus.questions.split == "train"])


def told(corpus):
    return {tuple(row) for row in corpus.captions[["gif", "split", "caption"]].to_numpy().tolist()}


def test_captions_in_a_column_and_in_rows_of_their_own(gifs):
    path = write(
        gifs,
        HEADER + ",Caption",
        "cat.gif,frameqa,what color is the cat ?,black,,a  black cat\u200b jumps",
        "cat.gif,count,How many times does the cat jump ?,3,,a black cat jumps",  # as a sheet repeats it
        "CAT,caption,,,,it sits",
        "sub/fox,,,,,a fox",
        "dog.gif,frameqa,what ?,dog,,",
        "dog.gif,count,How many ?,eleven,,a dog",  # a bad answer makes no bad caption
        "dog.gif,frameqa,what ?",
        "bird,caption,,,,a bird",
    )
    corpus = own_gifs.load(gifs, path, holdout=0)
    assert told(corpus) == {
        ("cat.gif", "train", "a black cat jumps"),
        ("cat.gif", "train", "it sits"),
        ("sub/fox.gif", "train", "a fox"),
        ("dog.gif", "train", "a dog"),
    }
    assert corpus.captions.caption_id.tolist() == ["cat.gif-1", "cat.gif-2", "sub/fox.gif-1", "dog.gif-1"]
    assert corpus.questions.question_id.tolist() == ["qa-2", "qa-3", "qa-6"] and corpus.rows == 5 and corpus.told == 5
    assert corpus.gifs == {name: str(gifs / name) for name in ("cat.gif", "dog.gif", "sub/fox.gif")}
    assert corpus.rejects["where"].tolist() == ["qa.csv row 7", "qa.csv row 8", "qa.csv row 9"]
    listed = corpora.left_out(corpus, corpus.questions, corpus.captions, corpus.gifs)
    assert listed == "2 of 5 rows, 1 of 5 captions and 0 GIFs left out: rejects.parquet"
    short = corpora.left_out(corpus, corpus.questions, corpus.captions.head(2), corpus.gifs)
    assert short == "2 of 5 rows, 3 of 5 captions and 1 GIF left out: rejects.parquet"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("bird.gif,caption,,,,a bird", "there is no such GIF in the folder gifs"),
        ("cat.gif,caption,,,,\u200b ", "the caption is empty"),
        ("cat.gif,,,,,", "the caption is empty"),
        ("cat.gif,caption,,a cat sits,,", "has its text in the column caption, and no question or answer"),
        ("cat.gif,captoin,,,,a cat", "unknown task 'captoin'.*did you mean caption"),
        ("cat.gif,,what ?,cat,,a cat", "unknown task ''"),
        ("cat.gif,caption,,,,a \0 cat", "holds NUL characters"),
    ],
)
def test_a_caption_that_cannot_be_used_is_listed(gifs, row, reason):
    path = write(gifs, HEADER + ",caption", "cat.gif,frameqa,what ?,cat,,a cat", row, "dog.gif,frameqa,what ?,dog,,")
    corpus = own_gifs.load(gifs, path, holdout=0)
    assert told(corpus) == {("cat.gif", "train", "a cat")} and len(corpus.questions) == 2
    assert corpus.rejects["where"].tolist() == ["qa.csv row 3"]
    assert corpus.rejects.reason.str.contains(reason).all()


def test_captions_without_their_column_or_without_questions(gifs):
    path = write(gifs, HEADER, "cat.gif,frameqa,what ?,cat,", "cat.gif,caption,,,")
    with pytest.raises(CorpusError, match=r"qa\.csv: row 3 is of the task caption, but there is no column caption"):
        own_gifs.load(gifs, path)
    path = write(gifs, HEADER + ",caption", "cat.gif,caption,,,,a cat")
    with pytest.raises(CorpusError, match=r"No usable question is left of .*qa\.csv\. No row has a question\."):
        own_gifs.load(gifs, path)


def with_captions(gifs, count):
    for number in range(count):
        (gifs / f"g{number}.gif").touch()
    asked = [f"g{number},frameqa,what ?,it,,g{number} shown" for number in range(count // 2)]
    return asked, [f"g{number},,,,,g{number} shown" for number in range(count // 2, count)]


@pytest.mark.parametrize(("holdout", "asked_test", "told_test"), [(0, 0, 0), (0.2, 4, 8), (1, 20, 40)])
def test_captions_are_in_the_split_of_their_gif(gifs, holdout, asked_test, told_test):
    asked, only = with_captions(gifs, 40)
    corpus = own_gifs.load(gifs, write(gifs, HEADER + ",caption", *asked, *only), holdout=holdout)
    splits = dict(zip(corpus.questions.gif, corpus.questions.split, strict=True))
    assert all(splits.get(gif, split) == split for gif, split, _ in told(corpus)) and len(told(corpus)) == 40
    assert (corpus.questions.split == "test").sum() == asked_test
    assert (corpus.captions.split == "test").sum() == told_test
    # captions of further GIFs change nothing for the questions, nor does the order of the rows
    alone = own_gifs.load(gifs, write(gifs, HEADER, *(row[: row.rindex(",")] for row in asked)), holdout=holdout)
    assert dict(zip(alone.questions.gif, alone.questions.split, strict=True)) == splits
    turned = own_gifs.load(gifs, write(gifs, HEADER + ",caption", *only[::-1], *asked), holdout=holdout)
    assert told(turned) == told(corpus)


def test_a_split_column_decides_for_captions_and_a_test_gif_stays_one(gifs):
    path = write(
        gifs,
        HEADER + ",caption,split",
        "cat.gif,frameqa,what ?,cat,,,train",
        "cat.gif,caption,,,,a cat,",  # of its GIF
        "sub/fox.gif,caption,,,,a fox,test",
        "sub/fox.gif,frameqa,what ?,fox,,a fox runs,train",
        "dog.gif,caption,,,,a dog,valid",
    )
    profile = load_profile("tiny", {"data.corpus": "own_gifs"})
    corpus = corpora.load(profile, folder="", gifs=gifs, qa=path)
    assert told(corpus) == {
        ("cat.gif", "train", "a cat"),
        ("sub/fox.gif", "test", "a fox"),
        ("sub/fox.gif", "test", "a fox runs"),
    }
    assert corpus.questions.gif.tolist() == ["cat.gif"] and set(corpus.gifs) == {"cat.gif", "sub/fox.gif"}
    assert corpus.rejects.reason.tolist() == [
        "unknown split 'valid'; the splits are train, test",
        "also a test GIF: its 1 training questions are left out",
    ]
