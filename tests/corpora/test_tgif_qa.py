"""TGIF-QA loading: hand-written files in each of the circulating formats, and the real ones where they are at hand."""

import zipfile

import pandas as pd
import pytest

from helpers.config import load_profile
from helpers.corpora import tgif_qa
from helpers.corpora.loading import drop_leaked, load
from helpers.corpora.schema import QUESTION_COLUMNS, CorpusError
from helpers.corpora.tasks import question_form

ACTION = "gif_name\tquestion\ta1\ta2\ta3\ta4\ta5\tanswer\tvid_id\tkey"
COUNT = "gif_name\tquestion\tanswer\tvid_id\tkey"
FRAMEQA = "gif_name\tquestion\tanswer\ttype\tvid_id\tkey\tdescription"


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(f"{line}\r\n" for line in lines).encode())


@pytest.fixture
def folder(tmp_path):
    """A few rows of every kind: quotes as text, a GIF of several tasks, one leaked GIF, HQGA's encoding."""
    questions = tmp_path / "questions"
    write(
        questions / "Train_action_question.csv",
        ACTION,
        "tumblr_a\tWhat does the man do 3 times ?\trun\tnod\twave\tjump\tclap\t0\tACTION1\t11",
        "tumblr_b\tWhat does the cat do 2 times ?\trun\tnod\twave\tjump\tclap\t4\tACTION2\t12",
    )
    write(
        questions / "Test_transition_question.csv",
        ACTION,
        'tumblr_c\tWhat does he do before nod ?\tlean\t"write ""yes"""\trun\tsit\tsay "no\t1\tTRANS1\t13',
        "tumblr_b\tWhat does he do after nod ?\tlean\trun\tsit\twave\tjump\t2\tTRANS2\t12",
    )
    write(
        questions / "Train_count_question.csv",
        COUNT,
        "tumblr_a\tHow many times does the man run ?\t0\tCOUNT1\t11",
        "tumblr_d\tHow many times does the cat run ?\t10\tCOUNT2\t14",
    )
    write(
        questions / "Test_frameqa_question.csv",
        FRAMEQA,
        "tumblr_c\twhat is on the mat ?\tcat\t0\tFRAMEQA1\t13\ta cat is on the mat .",
        "tumblr_e\thow many dogs run ?\ttwo\t1\tFRAMEQA2\t15\ttwo dogs run .",
    )
    (questions / "hqga_frameqa_train.csv").write_text(
        "video,width,height,question,answer,qid\n"
        "14,477,280,what is the color of the hair,brown,FRAMEQA3\n"
        '99,204,209,"where, then, is the man",tshirt,FRAMEQA4\n'
    )
    return questions


def by_id(corpus):
    return corpus.questions.set_index("question_id")


def test_every_format_becomes_one_table(folder):
    corpus = tgif_qa.load(folder)
    assert corpus.name == "tgif_qa" and corpus.gifs == {} and corpus.rejects.empty
    assert list(corpus.questions.columns) == QUESTION_COLUMNS
    rows = by_id(corpus)
    assert rows.index.is_unique and len(rows) == 10
    assert rows.loc["ACTION2-train"].to_dict() == {
        "gif": "tumblr_b",
        "split": "train",
        "task": "action",
        "question": "What does the cat do 2 times ?",
        "options": ["run", "nod", "wave", "jump", "clap"],
        "answer": "clap",
        "label": 4,
        "type": "",
    }
    # the count keeps the raw label: 0 is the data set's code for once
    assert rows.loc["COUNT1-train", ["answer", "label"]].tolist() == ["0", 0]
    assert rows.loc["FRAMEQA2-test", ["answer", "label", "type"]].tolist() == ["two", -1, "number"]


def test_quotes_are_text(folder):
    row = by_id(tgif_qa.load(folder)).loc["TRANS1-test"]
    assert row.options == ["lean", '"write ""yes"""', "run", "sit", 'say "no']
    assert row.answer == '"write ""yes"""'


def test_description_is_not_carried_along(folder):
    questions = tgif_qa.load(folder).questions
    assert "description" not in questions.columns
    assert not questions.map(str).map(lambda cell: "on the mat ." in cell or "dogs run ." in cell).to_numpy().any()


def test_hqga_rows_take_the_official_names_and_wording(folder):
    rows = by_id(tgif_qa.load(folder))
    # key 14 is named by the count file; key 99 by none
    assert rows.loc["FRAMEQA3-train", ["gif", "question", "type"]].tolist() == [
        "tumblr_d",
        "what is the color of the hair ?",
        "color",
    ]
    assert rows.loc["FRAMEQA4-train", ["gif", "question", "answer", "type"]].tolist() == [
        "99",
        "where, then, is the man ?",
        "t-shirt",
        "location",
    ]


def test_hqga_multiple_choice(tmp_path):
    path = tmp_path / "action" / "test.csv"
    path.parent.mkdir()
    path.write_text(
        "video,width,height,question,a0,a1,a2,a3,a4,answer,qid\n7,1,1,what does he do 3 times,a,b,c,d,e,3,ACTION9\n"
    )
    row = by_id(tgif_qa.load(tmp_path)).loc["ACTION9-test"]
    assert (row.question, row.answer, row.label, row.gif) == ("What does he do 3 times ?", "d", 3, "7")


def test_bad_rows_are_rejected_by_file_and_row(folder):
    write(
        folder / "Test_action_question.csv",
        ACTION,
        "tumblr_f\tWhat does he do ?\ta\tb\tc\td\te\t5\tACTION5\t20",
        "tumblr_g\tWhat does he do ?\ta\tb\tc\td\te\t4\tACTION6\t21",
        "tumblr_h\tWhat does he do ?\ta\tb\tc\td\t4\tACTION7\t22",
        "tumblr_i\t \ta\tb\tc\td\te\t4\tACTION8\t23",
        "tumblr_j\tWhat does he do ?\ta\tb\tc\td\te\t-1\tACTION9\t24",
        "tumblr_k\tWhat does he do ?\ta\t\tc\td\te\t0\tACTION10\t25",
        "tumblr_g\tWhat does he do ?\ta\tb\tc\td\te\tfour\tACTION11\t21",
        "tumblr_g\tThe same again ?\ta\tb\tc\td\te\t4\tACTION6\t21",
    )
    write(folder / "Test_count_question.csv", COUNT, "tumblr_l\tHow often ?\t11\tCOUNT9\t30")
    write(folder / "Test_riddle_question.csv", COUNT, "tumblr_l\tHow often ?\t2\tX9\t30")
    corpus = tgif_qa.load(folder)
    assert by_id(corpus).loc["ACTION6-test", "question"] == "What does he do ?"
    assert len(corpus.questions) == 11
    reasons = {where: (item, reason) for item, where, reason in corpus.rejects.itertuples(index=False)}
    expected = {
        "Test_action_question.csv row 2": ("tumblr_f", "out of range"),
        "Test_action_question.csv row 4": ("tumblr_h", "9 columns, but the header has 10"),
        "Test_action_question.csv row 5": ("tumblr_i", "question is empty"),
        "Test_action_question.csv row 6": ("tumblr_j", "out of range"),
        "Test_action_question.csv row 7": ("tumblr_k", "none of them empty"),
        "Test_action_question.csv row 8": ("tumblr_g", "'four'"),
        "Test_action_question.csv row 9": ("tumblr_g", "repeats question ACTION6-test"),
        "Test_count_question.csv row 2": ("tumblr_l", "outside 0 to 10"),
        "questions": ("Test_riddle_question.csv", "one task"),
    }
    assert reasons.keys() == expected.keys()
    for where, (item, reason) in expected.items():
        assert reasons[where][0] == item and reason in reasons[where][1]


def test_an_official_row_wins_over_its_hqga_copy(folder):
    (folder / "a_frameqa_test.csv").write_text(
        "video,width,height,question,answer,qid\n13,1,1,what is on the mat,dog,FRAMEQA1\n"
    )
    corpus = tgif_qa.load(folder)
    assert by_id(corpus).loc["FRAMEQA1-test", "answer"] == "cat"
    assert corpus.rejects["where"].tolist() == ["a_frameqa_test.csv row 2"]


def test_test_questions_that_are_left_out_are_counted_as_asked(folder, tmp_path):
    """Of the official data set its own numbers; of the files alone each question once, with or without its GIF."""
    write(folder / "Test_count_question.csv", COUNT, "tumblr_c\tHow many ?\t2\tC1\t13", "tumblr_c\tHow ?\tmany\tC2\t13")
    repeated = (folder / "Test_count_question.csv").read_bytes()
    (folder / "again_Test_count.csv").write_bytes(repeated.replace(b"tumblr_c\tHow ?\tmany\tC2\t13\r\n", b""))
    (tmp_path / "gifs").mkdir()
    for name in ("tumblr_a", "tumblr_b", "tumblr_c"):
        (tmp_path / "gifs" / f"{name}.gif").write_bytes(b"GIF89a")
    corpus = tgif_qa.load(folder, gifs=tmp_path / "gifs")
    assert corpus.asked == {"count": 2, "transition": 2, "frameqa": 2}
    kept = corpus.questions[corpus.questions.split == "test"].task.value_counts()
    assert kept.to_dict() == {"transition": 2, "count": 1, "frameqa": 1}
    profile = load_profile("tiny", {"data.corpus": "tgif_qa"})
    official = load(profile, folder=tmp_path, gifs=tmp_path / "gifs", qa=folder)
    assert official.asked == {"count": 3554, "transition": 6232, "frameqa": 13691}


def test_broken_bytes_and_open_quotes_cost_their_own_row(folder):
    with (folder / "Train_count_question.csv").open("ab") as file:
        file.write(b"tumblr_\xff\tHow many times ?\t2\tCOUNT7\t40\r\ntumblr_z\tHow many times ?\t2\tCOUNT8\t41\r\n")
        file.write(b"tumblr_z\tHow\0many times ?\t2\tCOUNT9\t41\r\n\0\0\0\0")
    with (folder / "hqga_frameqa_train.csv").open("a") as file:
        file.write('98,1,1,"what is open,cat,FRAMEQA7\n97,1,1,what is shut,dog,FRAMEQA8\n')
    corpus = tgif_qa.load(folder)
    assert {"COUNT8-train", "FRAMEQA8-train"} <= set(corpus.questions.question_id)
    broken = [f"Train_count_question.csv row {number}" for number in (4, 6, 7)]
    assert corpus.rejects["where"].tolist() == [*broken, "hqga_frameqa_train.csv row 4"]
    assert "NUL" in corpus.rejects.reason[1]


@pytest.mark.parametrize("end", ["\r\n", "\n", "\r", "\r\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("separator", ["\t", ",", ";"])
def test_files_that_a_spreadsheet_saved_again(tmp_path, end, encoding, separator):
    """Any line end, the mark of its encoding, padding, whole numbers with decimals, invisible characters."""
    decimal = "3,0" if separator == ";" else "3.0"
    rows = [
        ACTION.replace("\t", separator) + separator,
        separator.join(["tumblr_a", "What ?", "run", "nod", "wave\u200b", "sit", "clap\u00a0", "0", "A1", "1", ""]),
        separator.join(["tumblr_b", "What ?", "run", "nod", "wave", "sit", "clap", decimal, "A2", "2", ""]),
        separator * 10,
    ]
    if separator == ";":
        rows.insert(0, "sep=;")
    (tmp_path / "Train_action_question.csv").write_bytes((end.join(rows) + end).encode(encoding))
    corpus = tgif_qa.load(tmp_path)
    assert corpus.rejects.empty and corpus.questions.answer.tolist() == ["run", "sit"]
    assert corpus.questions.options[0] == ["run", "nod", "wave", "sit", "clap"]


def test_a_file_whose_indices_count_from_one_is_left_out(folder):
    row = "tumblr_a\tWhat {0} ?\ta\tb\tc\td\te\t{0}\tONE{0}\t11"
    write(folder / "Test_action_question.csv", ACTION, *(row.format(answer) for answer in (1, 5, 3)))
    corpus = tgif_qa.load(folder)
    assert corpus.rejects["where"].tolist() == [f"Test_action_question.csv row {n}" for n in (2, 3, 4)]
    assert corpus.rejects.reason.str.contains("count from 1").all() and corpus.asked["action"] == 3
    write(folder / "Test_action_question.csv", ACTION, *(row.format(answer) for answer in (1, 5, 0)))
    assert tgif_qa.load(folder).rejects.reason.tolist() == ["option index 5 is out of range: the 5 options are 0 to 4"]


def test_what_is_no_question_file_is_named_or_passed_over(folder, tmp_path):
    for name in (".ipynb_checkpoints/Test_action-checkpoint.csv", "__MACOSX/._Test_action.csv", "~$Test_action.xlsx"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\0\5\x16\7")
    assert tgif_qa.load(folder).rejects.empty
    (folder / "Test_action_question.xlsx").touch()
    assert tgif_qa.load(folder).rejects.values.tolist() == [
        ["Test_action_question.xlsx", "questions", "not read: a spreadsheet's own format; save it as CSV UTF-8"]
    ]
    (tmp_path / "sheets").mkdir()
    (tmp_path / "sheets" / "Test_action_question.xlsx").touch()
    with pytest.raises(CorpusError, match=r"No question file (.|\n)*xlsx: not read"):
        tgif_qa.load(tmp_path / "sheets")
    (folder / "Test_action_question.csv").write_bytes(b"PK\x03\x04")
    with pytest.raises(CorpusError, match="damaged zip archive or Excel workbook"):
        tgif_qa.load(folder)


def test_unreadable_folders_are_clear_errors(tmp_path):
    with pytest.raises(CorpusError, match="there is no folder"):
        tgif_qa.load(tmp_path / "absent")
    with pytest.raises(CorpusError, match="Train_action_question"):
        tgif_qa.load(tmp_path)
    write(tmp_path / "Train_count_question.csv", "gif_name\tquestion\tvid_id\tkey", "a\tb\tc\td")
    with pytest.raises(CorpusError, match=r"Train_count_question\.csv: no column answer .*vid_id"):
        tgif_qa.load(tmp_path)
    write(tmp_path / "Train_count_question.csv", COUNT, "a\tHow many times ?\tmany\tc\td")
    with pytest.raises(CorpusError, match=r"No usable question (.|\n)*csv row 2, a: .*found 'many'"):
        tgif_qa.load(tmp_path)


def test_drop_leaked(folder):
    kept = drop_leaked(tgif_qa.load(folder).questions)
    # tumblr_b is a transition test GIF, so its action training row goes; test rows all stay
    assert set(kept.question_id) == {
        "ACTION1-train",
        "COUNT1-train",
        "COUNT2-train",
        "FRAMEQA3-train",
        "FRAMEQA4-train",
        "TRANS1-test",
        "TRANS2-test",
        "FRAMEQA1-test",
        "FRAMEQA2-test",
    }


def test_gifs_in_a_folder(folder, tmp_path):
    gifs = tmp_path / "gifs"
    for name in ("tumblr_a.gif", "part2/tumblr_c.GIF", "part2/tumblr_a.gif", "unused.gif", "tumblr_d.jpg"):
        (gifs / name).parent.mkdir(parents=True, exist_ok=True)
        (gifs / name).touch()
    corpus = tgif_qa.load(folder, gifs)
    assert corpus.gifs == {"tumblr_a": str(gifs / "tumblr_a.gif"), "tumblr_c": str(gifs / "part2" / "tumblr_c.GIF")}
    assert set(corpus.questions.gif) == {"tumblr_a", "tumblr_c"}
    assert set(corpus.rejects.item) == {"tumblr_b", "tumblr_d", "tumblr_e", "99"}
    assert corpus.rejects["where"].unique().tolist() == ["gifs"]


def test_gifs_in_an_archive(folder, tmp_path):
    archive = tmp_path / "tgif.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for member in (
            "gifs/tumblr_a.gif",
            "../tumblr_b.gif",
            "/tumblr_c.gif",
            "__MACOSX/._tumblr_d.gif",
            "x/.Trash-1/tumblr_e.gif",
        ):
            file.writestr(member, b"GIF89a")
    corpus = tgif_qa.load(folder, archive)
    assert corpus.gifs == {"tumblr_a": f"{archive}::gifs/tumblr_a.gif"}
    escaping = corpus.rejects[corpus.rejects.reason.str.contains("leads out")]
    assert set(escaping.item) == {"../tumblr_b.gif", "/tumblr_c.gif"}


def test_gifs_in_a_list_of_urls(folder, tmp_path):
    urls = tmp_path / "tgif-v1.0.tsv"
    urls.write_text(
        "https://38.media.tumblr.com/9f/tumblr_a.gif\ta man runs .\n"
        "https://38.media.tumblr.com/9f/tumblr_a.gif\tsomeone runs .\n"
        "https://38.media.tumblr.com/8e/tumblr_c.gif?x=1\ta cat .\n"
        "file:///etc/tumblr_d.gif\tno .\n"
        "https://38.media.tumblr.com/8e/tumblr_e.jpg\tno .\n"
    )
    corpus = tgif_qa.load(folder, urls)
    assert corpus.gifs == {
        "tumblr_a": "https://38.media.tumblr.com/9f/tumblr_a.gif",
        "tumblr_c": "https://38.media.tumblr.com/8e/tumblr_c.gif?x=1",
    }
    assert corpus.rejects["where"].tolist()[:2] == ["tgif-v1.0.tsv row 4", "tgif-v1.0.tsv row 5"]


def test_gif_sources_without_gifs_are_clear_errors(folder, tmp_path):
    with pytest.raises(CorpusError, match="there is no folder, zip archive or list"):
        tgif_qa.load(folder, tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match="holds none"):
        tgif_qa.load(folder, tmp_path / "empty")
    (tmp_path / "empty" / "other.gif").touch()
    with pytest.raises(CorpusError, match=r"No usable question (.|\n)*not there"):
        tgif_qa.load(folder, tmp_path / "empty")


@pytest.mark.parametrize(
    ("question", "form"),
    [
        ("how many cats run ?", "number"),
        ("what color is the circle ?", "color"),
        ("What is the colour of the hair ?", "color"),
        ("where is the man ?", "location"),
        ("what is golden color moving its two hind legs ?", "object"),
        ("who colors the wall where they stand ?", "object"),
    ],
)
def test_question_form(question, form):
    assert question_form(question) == form


# The real files. Expected numbers are those that the data set's README and other readers of the files published.


@pytest.fixture(scope="session")
def real(shared_data):
    return tgif_qa.load(shared_data / "tgif_qa")


def test_real_counts(real):
    assert real.rejects.empty
    assert real.questions.question_id.is_unique
    assert real.questions.groupby(["split", "task"]).size().to_dict() == {
        ("test", "action"): 2274,
        ("test", "count"): 3554,
        ("test", "frameqa"): 13691,
        ("test", "transition"): 6232,
        ("train", "action"): 20475,
        ("train", "count"): 26843,
        ("train", "frameqa"): 39392,
    }
    test = real.questions[real.questions.split == "test"]
    assert test.gif.nunique() == 9575
    assert test[test.task == "frameqa"].gif.nunique() == 7132


def test_real_quotes_survive(real, shared_data):
    texts = real.questions.question.tolist() + [option for row in real.questions.options for option in row]
    raw = b"".join(path.read_bytes() for path in (shared_data / "tgif_qa").glob("*.csv"))
    assert sum(text.count('"') for text in texts) == raw.count(b'"') == 12


def test_real_labels(real):
    test = real.questions[real.questions.split == "test"]
    labels = test[test.task == "count"].label.clip(lower=1).value_counts().sort_index()
    assert labels.tolist() == [918, 914, 582, 394, 222, 161, 85, 73, 41, 164]
    assert test[test.task == "action"].label.value_counts().sort_index().tolist() == [463, 448, 471, 446, 446]
    transition = test[test.task == "transition"]
    assert transition.label.value_counts().sort_index().tolist() == [1192, 1175, 1314, 1271, 1280]
    assert all(row.options[row.label] == row.answer for row in transition.itertuples())
    frameqa = test[test.task == "frameqa"]
    types = {"object": 5586, "color": 3904, "number": 3148, "location": 1053}
    assert frameqa.type.value_counts().to_dict() == types
    assert (frameqa.answer == "two").sum() == 2395
    assert real.questions[real.questions.task == "frameqa"].answer.nunique() == 1746


def test_real_wording_of_hqga_is_the_official_one(real):
    frameqa = real.questions[real.questions.task == "frameqa"]
    train, test = frameqa[frameqa.split == "train"], frameqa[frameqa.split == "test"]
    assert test.question.isin(set(train.question)).mean() == pytest.approx(0.304, abs=5e-4)
    assert test.question.map(question_form).tolist() == test.type.tolist()


def test_real_leakage(real):
    gifs = real.questions.groupby(["split", "task"]).gif.agg(set)

    def leaked(train, test):
        return len(gifs["train", train] & gifs["test", test])

    assert [leaked("action", task) for task in ("action", "count", "frameqa", "transition")] == [0, 397, 275, 93]
    assert [leaked("count", task) for task in ("action", "count", "frameqa", "transition")] == [35, 0, 0, 0]
    assert leaked("frameqa", "action") == 14
    in_train = set().union(*gifs["train"])
    test_gifs = set().union(*gifs["test"])
    assert len(in_train & test_gifs) == 432
    kept = drop_leaked(real.questions)
    assert not set(kept.gif[kept.split == "train"]) & test_gifs
    dropped = pd.Index(real.questions.question_id).difference(pd.Index(kept.question_id))
    leaked_rows = real.questions[(real.questions.split == "train") & real.questions.gif.isin(test_gifs)]
    assert set(dropped) == set(leaked_rows.question_id)


def test_real_url_list_names_the_gifs(real, shared_data):
    sources = tgif_qa.gif_sources(shared_data / "tgif_qa" / "tgif_splits_test.txt", [])
    assert len(sources) == 11360
    action = real.questions[real.questions.task == "action"]
    found = action[action.gif.isin(sources)]
    assert found.groupby("split").gif.nunique().to_dict() == {"test": 2052, "train": 400}


URL = "https://38.media.tumblr.com/9f/tumblr_{}.gif"
TOLD = [
    ("a", "a man  runs ."),
    ("a", "someone runs ."),
    ("c", 'a cat says "no"'),
    ("b", "a dog nods ."),
    ("d", "a bat ."),
]


def listed(rows, separator="\t"):
    return "".join(f"{URL.format(name)}{separator}{caption}\r\n" for name, caption in rows)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_captions_of_the_list_of_urls(folder, tmp_path, encoding):
    urls = tmp_path / "tgif-v1.0.tsv"
    urls.write_bytes((listed([*TOLD, ("x", "a man ."), ("a", "someone runs ."), ("y", "rain")])).encode(encoding))
    corpus = tgif_qa.load(folder, urls)
    assert corpus.captions.drop(columns="facts").to_numpy().tolist() == [
        ["tumblr_a-1", "tumblr_a", "train", "a man runs ."],
        ["tumblr_a-2", "tumblr_a", "train", "someone runs ."],
        ["tumblr_c-1", "tumblr_c", "test", 'a cat says "no"'],
        ["tumblr_b-1", "tumblr_b", "test", "a dog nods ."],  # a test GIF of one task, a training GIF of another
        ["tumblr_d-1", "tumblr_d", "train", "a bat ."],
    ]
    assert corpus.captions.facts.tolist() == [[]] * 5 and corpus.told == 7  # what is told twice counts once
    unknown = corpus.rejects[corpus.rejects.reason.str.contains("captions")].to_numpy().tolist()
    what = "2 captions, this the first, are of GIFs that no question is left about: left out"
    assert unknown == [["tumblr_x", "tgif-v1.0.tsv row 6", what]]


def test_captions_beside_the_questions_of_gifs_in_a_folder(folder, tmp_path):
    gifs = tmp_path / "gifs"
    gifs.mkdir()
    for name in "abcd":
        (gifs / f"tumblr_{name}.gif").write_bytes(b"GIF89a")
    assert tgif_qa.load(folder, gifs).captions.empty
    (folder / "train").mkdir()
    path = folder / "train" / "TGIF-v1.0.tsv"
    path.write_text(listed(TOLD))
    corpus = tgif_qa.load(folder, gifs)
    assert corpus.captions.caption_id.tolist() == ["tumblr_a-1", "tumblr_a-2", "tumblr_c-1", "tumblr_b-1", "tumblr_d-1"]
    assert corpus.rejects.reason.str.startswith("the GIF is not there").all()
    urls = tmp_path / "urls.txt"  # a list without captions leaves the word to that file
    urls.write_text("".join(f"{URL.format(name)}\n" for name in "ac"))
    assert tgif_qa.load(folder, urls).captions.gif.unique().tolist() == ["tumblr_a", "tumblr_c"]
    path.write_text(listed([(name, "") for name in "ab"], separator=""))
    with pytest.raises(CorpusError, match=r"TGIF-v1\.0\.tsv: no row has a caption\. A row is the URL of a GIF, a TAB"):
        tgif_qa.load(folder, gifs)
    (folder / "tgif-v1.0.tsv").write_text(listed(TOLD))
    with pytest.raises(CorpusError, match=r"holds 2 files of them \(tgif-v1\.0\.tsv, train/TGIF-v1\.0\.tsv\)"):
        tgif_qa.load(folder, gifs)


def test_captions_that_cannot_be_used_are_listed(folder, tmp_path):
    urls = tmp_path / "urls.txt"
    rows = [("a", " \u200b"), ("a", "a\0 man"), ("a", "a\tman"), ("c", "fine")]
    urls.write_bytes(listed(rows).encode() + b"https://h.org/tumblr_d.gif\tcaf\xe9\nhttps://h.org/tumblr_d.gif\n")
    corpus = tgif_qa.load(folder, urls)
    assert corpus.captions.caption.tolist() == ["fine"] and set(corpus.gifs) == {"tumblr_a", "tumblr_c", "tumblr_d"}
    broken = "the caption is not whole: it holds NUL characters or bytes that are no text"
    rejects = corpus.rejects[corpus.rejects["where"].str.startswith("urls.txt row")].to_numpy().tolist()
    assert rejects == [
        ["tumblr_a", "urls.txt row 1", "the caption is empty"],
        ["tumblr_a", "urls.txt row 2", broken],
        ["tumblr_a", "urls.txt row 3", "3 columns, but a row is a URL, a TAB and a caption"],
        ["tumblr_d", "urls.txt row 5", broken],
        ["tumblr_d", "urls.txt row 6", "the caption is empty"],
    ]


def test_a_list_that_a_spreadsheet_saved(folder, tmp_path):
    urls = tmp_path / "list.csv"
    urls.write_text("sep=,\n" + listed([("a", '"a man, who says ""no"""'), ("c", "a cat")], separator=","))
    corpus = tgif_qa.load(folder, urls)
    assert corpus.captions[["gif", "caption"]].to_numpy().tolist() == [
        ["tumblr_a", 'a man, who says "no"'],
        ["tumblr_c", "a cat"],
    ]
