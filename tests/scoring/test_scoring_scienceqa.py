"""ScienceQA scores: by hand-counted problems, every layout of result files, and the published file at hand."""

import json
import math

import pytest

from helpers.corpora.schema import CorpusError
from helpers.scoring import scienceqa as scoring
from helpers.scoring import wilson_interval
from helpers.scoring.scienceqa import Gold, ResultsError, parse_answer
from helpers.suite import main

GOLD = {
    "1": Gold(0, 2, hint=True, image=False, subject="natural science", grade=6),
    "2": Gold(1, 3, hint=True, image=True, subject="natural science", grade=7),
    "3": Gold(2, 4, hint=False, image=True, subject="social science", grade=1),
    "4": Gold(0, 5, hint=False, image=False, subject="language science", grade=12),
    "5": Gold(1, 2, hint=False, image=False, subject="language science", grade=3),
    "6": Gold(1, 2, hint=False, image=False, subject="natural science", grade=3),
}
INDICES = {"1": 0, "2": 1, "3": 0, "4": 0, "5": -1, "6": 3}


# ---- Answers from texts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is B.", "B"),
        ("The answer is B. BECAUSE: stone is solid.", "B"),
        ("So The answer is C!", "C"),
        ("The answer is A", None),  # the official pattern wants one more character
        ("The answer is A. No, The answer is B.", None),
        ("A. But The answer is B. Or The answer is C.", None),
        ("the answer is B.", None),
        ("", None),
        ("B", "B"),
        (" B. ", "B"),
        ("B. because\nof this", "B"),
        ("Because", None),
        ("B.C.", None),
        ("AB", None),
    ],
)
def test_answers_are_parsed_as_officially(text, letter):
    assert parse_answer(text) == letter


def test_one_token_answers_and_indices():
    assert scoring.first_capital("▁D") == "D" and scoring.first_capital(" is") is None
    assert scoring.first_capital("The A") == "T"
    assert [scoring.choice_index(letter, 3) for letter in ("A", "C", "D", "T", None)] == [0, 2, -1, -1, -1]


# ---- Scores --------------------------------------------------------------------------------------------------------


def test_accuracies_are_those_counted_by_hand():
    found = scoring.score(INDICES, GOLD)
    assert (found["accuracy"], found["correct"], found["total"]) == (50.0, 3, 6)
    expected = {
        "NAT": 66.67, "SOC": 0.0, "LAN": 50.0, "TXT": 100.0, "IMG": 50.0, "NO": 33.33, "G1-6": 25.0, "G7-12": 100.0
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    assert found["n"] == {"NAT": 3, "SOC": 1, "LAN": 2, "TXT": 2, "IMG": 2, "NO": 3, "G1-6": 4, "G7-12": 2}
    assert (found["missing"], found["failed"]) == (0, 2)


def test_problems_without_an_answer_are_wrong():
    found = scoring.score({"1": 0}, GOLD)
    assert (found["accuracy"], found["missing"], found["failed"]) == (16.67, 5, 0)


def test_the_interval_solves_the_score_equation():
    for correct, total in ((3188, 4241), (1, 7), (0, 5), (5, 5)):
        for bound in wilson_interval(correct, total):
            p, rate = bound / 100, correct / total
            if 0 < bound < 100:  # the bound is where the rate lies 1.96 standard errors away
                assert abs(p - rate) / math.sqrt(p * (1 - p) / total) == pytest.approx(1.96, abs=0.01)
    assert wilson_interval(0, 5)[0] == 0 and wilson_interval(5, 5)[1] == 100


def test_baselines():
    assert scoring.score(scoring.first_choice(GOLD), GOLD)["correct"] == 2
    train = [Gold(1, 2, False, False)] * 3 + [Gold(0, 2, False, False)] * 2 + [Gold(2, 3, False, False)]
    assert scoring.majority(train, GOLD) == {"1": 1, "2": 2, "3": 0, "4": 0, "5": 1, "6": 1}


# ---- Result files --------------------------------------------------------------------------------------------------


@pytest.fixture
def save(tmp_path):
    def save(content, name="results.json"):
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path / name

    return save


def scored(path):
    return scoring.score_results(scoring.read_results(path), GOLD)


def test_what_is_stored_decides_and_texts_give_a_second_figure(save):
    outputs = {"1": "The answer is B.", "2": "The answer is B.", "3": "?", "6": "The answer is E.", "99": "A"}
    found = scored(save({"acc": 99.0, "correct": 6, "results": INDICES | {"98": 1, "99": 0}, "outputs": outputs}))
    assert found["layout"] == "results" and found["correct"] == 3 and found["not_in_gold"] == 2
    again = found["reparsed"]
    assert (again["correct"], again["missing"], again["failed"]) == (1, 2, 2)


def test_texts_alone_are_parsed(save):
    found = scored(save({"outputs": {"1": "The answer is A.", "2": "B", "3": ""}}))
    assert (found["layout"], found["correct"], found["missing"], found["failed"]) == ("outputs", 2, 3, 1)
    assert found["reparsed"]["correct"] == 2


def test_lists_of_correct_and_incorrect(save):
    entries = [{"question_id": "1", "pred": "A", "parsed_ans": "A"}, {"question_id": "3", "pred": "The answer is A."}]
    found = scored(save({"correct": entries, "incorrect": [{"question_id": "2", "pred": "B."}]}))
    assert (found["layout"], found["correct"], found["total"], found["missing"]) == ("lists", 2, 6, 3)
    assert (found["TXT"], found["IMG"]) == (50.0, 50.0)
    assert found["reparsed"]["correct"] == 2  # 1 and 2: the texts tell another story than the lists
    plain = scored(save({"correct": ["1", 4], "incorrect": ["2"]}))
    assert plain["correct"] == 2 and "reparsed" not in plain


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ([], "one JSON object"),
        ({"acc": 1}, "its keys are acc"),
        ({"results": {"1": "A"}}, "`results` of 1 is 'A'"),
        ({"results": {"1": True}}, "`results` of 1 is True"),
        ({"results": [1]}, "`results` must be an object"),
        ({"results": {"1": 0}, "outputs": {"1": 3}}, "`outputs` must be an object of texts"),
        ({"correct": ["1"], "incorrect": ["1"]}, "`incorrect` entry 1: problem 1 is listed twice"),
        ({"correct": [{"id": "1"}], "incorrect": []}, "`correct` entry 1"),
        ({"results": {"77": 0}}, "none of the 1 problems"),
    ],
)
def test_files_that_cannot_be_scored_are_refused(save, content, fault):
    with pytest.raises(ResultsError, match=fault):
        scored(save(content))


def test_a_written_file_reads_back_to_the_same_score(tmp_path):
    path = tmp_path / "out.json"
    texts = {"1": "The answer is A.", "2": "The answer is “B”."}
    scoring.write_results(path, INDICES, texts, GOLD, {"model": "tiny"})
    content = json.loads(path.read_text())
    assert list(content) == ["acc", "correct", "count", "args", "results", "outputs"]
    assert (content["acc"], content["correct"], content["count"]) == (50.0, 3, 6)
    assert content["results"] == INDICES and content["outputs"] == texts
    found = scored(path)
    assert {key: found[key] for key in scoring.score(INDICES, GOLD)} == scoring.score(INDICES, GOLD)
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]
    with pytest.raises(ResultsError, match="gold lacks, among them 7"):
        scoring.write_results(path, {"7": 0}, {}, GOLD)


# ---- Gold files ----------------------------------------------------------------------------------------------------

RECORD = {"choices": ["x", "y"], "answer": 1, "hint": "h", "image": None}


def test_gold_from_problems_of_a_split(save):
    problems = {"1": RECORD | {"split": "test", "subject": "social science", "grade": "grade9"}}
    problems |= {"2": RECORD | {"split": "val"}, "3": RECORD | {"split": "train"}}
    path = save(problems, "problems.json")
    assert scoring.read_gold(path) == {"1": Gold(1, 2, True, False, "social science", 9)}
    assert scoring.read_gold(path, "val") == {"2": Gold(1, 2, True, False)}
    assert "NAT" not in scoring.accuracies({}, scoring.read_gold(path, "val"))  # the gold does not tell
    with pytest.raises(ResultsError, match="minitest"):
        scoring.read_gold(path, "minitest")
    save({"minitest": ["3", "1"], "minival": ["9"]}, "pid_splits.json")
    assert list(scoring.read_gold(path, "minitest")) == ["3", "1"]
    with pytest.raises(ResultsError, match="lacks 1 of them, among them 9"):
        scoring.read_gold(path, "minival")


def test_gold_without_splits_is_scored_whole_or_by_the_splits_beside_it(save):
    path = save({"1": RECORD, "2": RECORD}, "problems.json")
    assert list(scoring.read_gold(path)) == ["1", "2"]
    save({"test": ["2"]}, "pid_splits.json")
    assert list(scoring.read_gold(path)) == ["2"]


def test_gold_from_conversations(save):
    def item(pid, text, letter, **more):
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": letter}]
        return {"id": pid, "conversations": turns, **more}

    items = [
        item("4", "Which word is before Context: ?\nA. no\nB. yes", "B"),
        item("5", "<image>\nContext: A. stands for Ann.\nWho?\nA. x\nB. y\nC. z", "A", image="5/image.png"),
        item("6", "<image>\nWhich list?\nA. b\nB. c\nWhat follows?\nA. one\nB. two", "A", image="6/image.png"),
    ]
    gold = scoring.read_gold(save(items))
    assert gold == {"4": Gold(1, 2, False, False), "5": Gold(0, 3, True, True), "6": Gold(0, 2, False, True)}
    for bad, fault in [
        (item("7", "Which?\nA. no\nB. yes", "C"), "answer 'C' is none of its 2 choices"),
        (item("4", "Which?\nA. no\nB. yes", "A"), "bad id '4'"),
        ({"id": "8"}, "item 4"),
    ]:
        with pytest.raises(ResultsError, match=fault):
            scoring.read_gold(save([*items, bad]))


def test_gold_from_a_folder(save, tmp_path):
    with pytest.raises(ResultsError, match=r"holds no gold: neither problems.json nor llava_test_CQM-A.json"):
        scoring.read_gold(tmp_path)
    turns = [{"from": "human", "value": "Which?\nA. no\nB. yes"}, {"from": "gpt", "value": "B"}]
    save([{"id": "4", "conversations": turns}], "llava_test_CQM-A.json")
    assert scoring.read_gold(tmp_path) == {"4": Gold(1, 2, False, False)}
    save({"1": RECORD}, "problems.json")
    assert list(scoring.read_gold(tmp_path)) == ["1"]


def test_a_broken_gold_problem_is_an_error(save):
    with pytest.raises(ResultsError, match="problem 2: the answer 5"):
        scoring.read_gold(save({"1": RECORD, "2": RECORD | {"answer": 5}}))
    with pytest.raises(CorpusError, match="not readable"):
        scoring.read_gold(save("{"))


# ---- The command, and the published file ---------------------------------------------------------------------------


def test_the_command_prints_one_json_object(save, capsys):
    results = save({"results": {"1": 1, "2": 0}})
    gold = save({"1": RECORD, "2": RECORD}, "problems.json")
    assert main(["score", "scienceqa", str(results), "--gold", str(gold)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["accuracy"], found["correct"], found["total"], found["TXT"]) == (50.0, 1, 2, 50.0)
    assert main(["score", "scienceqa", str(results), "--gold", str(gold), "--split", "tset"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "did you mean 'test'" in said.err
    assert main(["score", "scienceqa", "absent.json", "--gold", str(gold)]) == 2
    assert "no file absent.json" in capsys.readouterr().err


def test_gpt3_published_file_gives_the_published_numbers(shared_data):
    folder = shared_data / "scienceqa" / "full"
    if not folder.is_dir():
        pytest.skip(f"no published results at {folder}")
    gold = scoring.read_gold(folder / "llava_test_CQM-A.json")
    assert list(gold) == json.loads((folder / "pid_splits.json").read_text())["test"]
    results = scoring.read_results(folder / "final_test_QCM-ALE_2_seed_3.json")
    found = scoring.score_results(results, gold)
    assert (found["accuracy"], found["correct"], found["total"]) == (75.17, 3188, 4241)
    assert (found["TXT"], found["IMG"], found["NO"]) == (74.68, 67.43, 79.93)
    assert (found["reparsed"]["correct"], found["reparsed"]["failed"]) == (3061, 249)
    assert found["n"] == {"TXT": 2046, "IMG": 2017, "NO": 1435}
    first = scoring.score(scoring.first_choice(gold), gold)
    assert [first[key] for key in ("accuracy", "IMG", "TXT", "NO")] == [40.08, 35.35, 41.98, 44.88]


def test_both_golds_of_the_real_problems_agree(shared_data):
    folder = shared_data / "scienceqa"
    if not folder.is_dir():
        pytest.skip(f"no ScienceQA at {folder}")
    rich, plain = (scoring.read_gold(folder / name) for name in ("problems.json", "full/llava_test_CQM-A.json"))
    assert len(rich) == 361
    for pid, problem in rich.items():
        other = plain[pid]
        facts = ("answer", "choices", "hint", "image")
        assert [getattr(problem, fact) for fact in facts] == [getattr(other, fact) for fact in facts], pid
    found = scoring.score_results(scoring.read_results(folder / "full/final_test_QCM-ALE_2_seed_3.json"), rich)
    assert found["total"] == 361 and found["not_in_gold"] == 3880
    assert set(found) >= set(scoring.GROUPS) and sum(found["n"][name] for name in ("NAT", "SOC", "LAN")) == 361
