"""ScienceQA scores: accuracies by subgroup, answers parsed from texts, and everyone's result files.

Definitions of the official evaluator (github.com/lupantech/ScienceQA), with one difference: where it replaces an answer
that cannot be parsed by a random choice, here such an answer is wrong, so that a score can be repeated.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from helpers.config import nearest
from helpers.corpora.json_files import read_json
from helpers.corpora.schema import RowError
from helpers.corpora.scienceqa import LETTERS, SPLITS, problem_row, read_records, read_splits
from helpers.scoring.intervals import wilson_interval
from helpers.workspace.disk import whole

GOLD_FILES = ("problems.json", "llava_test_CQM-A.json")
WRONG = -1  # index of an answer that is none of the choices
# The dot stands for any character, as in the official pattern: "The answer is B" at the very end does not match.
ANSWER = re.compile(r"The answer is ([A-Z]).")
BARE = re.compile(r"([A-Z])(\.( .*)?)?", re.DOTALL)


class ResultsError(ValueError):
    """A result file or gold file that cannot be scored: what is wrong, in which file, and what to do."""


def parse_answer(text: str) -> str | None:
    """The letter that a text answers with, or None if it has none or contradicts itself.

    Official rule: exactly one match of "The answer is ([A-Z])." in the text. Where there is no match at all, a bare
    letter ("B", "B.", "B. because ...") counts too, as in LLaVA's evaluator.
    """
    found = ANSWER.findall(text)
    if found:
        return found[0] if len(found) == 1 else None
    bare = BARE.fullmatch(text.strip())
    return bare[1] if bare else None


def first_capital(text: str) -> str | None:
    """The first capital letter A to Z of a generated token's text, as ADEM-VL's evaluator reads it; None without."""
    found = re.search("[A-Z]", text)
    return found[0] if found else None


def choice_index(letter: str | None, choices: int) -> int:
    """0-based index of `letter` among the first `choices` letters, else `WRONG`."""
    return LETTERS.index(letter) if letter in LETTERS[:choices] else WRONG


@dataclass(frozen=True)
class Gold:
    """What scoring needs to know of a problem; subject and grade are None where the gold file does not tell."""

    answer: int
    choices: int
    hint: bool
    image: bool
    subject: str | None = None
    grade: int | None = None


GROUPS: dict[str, Callable[[Gold], bool]] = {
    "NAT": lambda g: g.subject == "natural science",
    "SOC": lambda g: g.subject == "social science",
    "LAN": lambda g: g.subject == "language science",
    "TXT": lambda g: g.hint,
    "IMG": lambda g: g.image,
    "NO": lambda g: not g.hint and not g.image,
    "G1-6": lambda g: g.grade is not None and g.grade <= 6,
    "G7-12": lambda g: g.grade is not None and g.grade >= 7,
}
"""The published subgroups, by what makes a problem a member. TXT and IMG overlap; together with NO they are all."""


def gold_of(problems: pd.DataFrame) -> dict[str, Gold]:
    """Gold of a table of problems (`corpora.scienceqa.PROBLEM_COLUMNS`), by problem id."""
    return {
        row.pid: Gold(row.answer, len(row.choices), bool(row.hint), bool(row.image), row.subject, row.grade)
        for row in problems.itertuples()
    }


def read_gold(path: str | Path, split: str = "test") -> dict[str, Gold]:
    """Gold by problem id from problems.json (its problems of `split`) or from LLaVA's llava_test_CQM-A.json.

    path: the file, or the folder that holds one of the two (problems.json, if it holds both).

    Members of `split` are those that problems.json itself names. Where it names no splits, or `split` is another one
    (minitest, trainval, ...), pid_splits.json beside it is asked. LLaVA's file is the test split; it holds neither
    subjects nor grades. Raises `CorpusError` for a file that is missing or no JSON, `ResultsError` for any other
    fault: here a broken problem is an error, since leaving it out would change the score.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in GOLD_FILES if (path / name).is_file()]
        if not found:
            raise ResultsError(f"the folder {path} holds no gold: neither {' nor '.join(GOLD_FILES)}")
        path = found[0]
    content = read_json(path)
    if isinstance(content, list):
        gold = _llava_gold(path, content)
        return gold if split == "test" else _members(path, gold, split)
    gold, named = {}, {}
    for pid, record in read_records(path).items():
        try:
            row = problem_row(pid, record, partial=True)
        except RowError as error:
            raise ResultsError(f"{path}, problem {pid}: {error}.") from error
        named.setdefault(row["split"], []).append(pid)
        gold[pid] = Gold(
            row["answer"], len(row["choices"]), bool(row["hint"]), bool(row["image"]), row["subject"], row["grade"]
        )
    if split in named:
        return {pid: gold[pid] for pid in named[split]}
    if set(named) == {""} and not path.with_name("pid_splits.json").is_file() and split == "test":
        return gold
    return _members(path, gold, split)


def _members(path: Path, gold: dict[str, Gold], split: str) -> dict[str, Gold]:
    beside = path.with_name("pid_splits.json")
    splits = read_splits(beside) if beside.is_file() else {}
    if split not in splits:
        ways = nearest(split, sorted({*splits, *SPLITS}))
        raise ResultsError(
            f"{path} has no problem of the split {split!r}, and no pid_splits.json beside it does; {ways}"
        )
    if missing := [pid for pid in splits[split] if pid not in gold]:
        raise ResultsError(
            f"{beside} puts {len(splits[split])} problems in {split}, but {path.name} lacks {len(missing)} of them, "
            f"among them {missing[0]}: give the gold file that these splits belong to"
        )
    return {pid: gold[pid] for pid in splits[split]}


def _llava_gold(path: Path, items: list[Any]) -> dict[str, Gold]:
    """Gold from LLaVA's conversations: "<image>", "Context: ..." where there is a hint, question, lettered choices."""
    gold: dict[str, Gold] = {}
    for number, item in enumerate(items, start=1):
        try:
            pid, (asked, told) = item["id"], (turn["value"] for turn in item["conversations"])
            text, letter = asked.strip(), told.strip()
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ResultsError(
                f"{path}, item {number}: expected `id` and two `conversations` with a `value`."
            ) from error
        choices = _lettered(text)
        answer = choice_index(letter, choices)
        if not isinstance(pid, str) or pid in gold or answer == WRONG:
            what = f"the answer {letter!r} is none of its {choices} choices" if answer == WRONG else f"bad id {pid!r}"
            raise ResultsError(f"{path}, item {number}: {what}.")
        body = text.removeprefix("<image>").lstrip("\n")
        gold[pid] = Gold(answer, choices, body.startswith("Context: "), "image" in item)
    return gold


def _lettered(text: str) -> int:
    """How many choices a text ends with: the longest run of lines "A. ...", "B. ...", ... in order."""
    starts = re.findall(r"^([A-E])\. ", text, re.MULTILINE)
    last_a = len(starts) - 1 - starts[::-1].index("A") if "A" in starts else len(starts)
    run = starts[last_a:]
    return len(run) if tuple(run) == LETTERS[: len(run)] else 0


def percent(correct: int, total: int) -> float:
    """Percentage with two decimals, as published."""
    return round(100 * correct / total, 2)


def accuracies(right: Mapping[str, bool], gold: Mapping[str, Gold]) -> dict[str, Any]:
    """Accuracy over all problems of `gold` and in every subgroup that it allows, in percent with two decimals.

    right: whether each problem was answered right; one that is missing counts as wrong. Returns accuracy, correct,
    total, interval (95 %), the subgroups of `GROUPS` by name, and n, the number of problems of each subgroup.
    """
    if not gold:
        raise ResultsError("the gold holds no problem")
    found = [bool(right.get(pid, False)) for pid in gold]
    result: dict[str, Any] = {"accuracy": percent(sum(found), len(found)), "correct": sum(found), "total": len(found)}
    result["interval"] = list(wilson_interval(sum(found), len(found)))
    sizes = {}
    for name, member in GROUPS.items():
        values = [value for value, problem in zip(found, gold.values(), strict=True) if member(problem)]
        if values:
            result[name], sizes[name] = percent(sum(values), len(values)), len(values)
    return result | {"n": sizes}


def score(predictions: Mapping[str, int], gold: Mapping[str, Gold]) -> dict[str, Any]:
    """`accuracies` of predicted indices, with `missing` (no prediction) and `failed` (an index outside the choices)."""
    given = {pid: predictions[pid] for pid in gold if pid in predictions}
    right = {pid: index == gold[pid].answer for pid, index in given.items()}
    failed = sum(not 0 <= index < gold[pid].choices for pid, index in given.items())
    return accuracies(right, gold) | {"missing": len(gold) - len(given), "failed": failed}


def first_choice(gold: Mapping[str, Gold]) -> dict[str, int]:
    """The baseline that always takes the first choice."""
    return dict.fromkeys(gold, 0)


def majority(train: Iterable[Gold], gold: Mapping[str, Gold]) -> dict[str, int]:
    """The baseline that takes the index that was right most often among training problems with as many choices."""
    counts: dict[int, Counter[int]] = {}
    for problem in train:
        counts.setdefault(problem.choices, Counter())[problem.answer] += 1
    best = {choices: min(counted, key=lambda i: (-counted[i], i)) for choices, counted in counts.items()}
    return {pid: best.get(problem.choices, 0) for pid, problem in gold.items()}


@dataclass(frozen=True)
class Results:
    """A published result file. What is stored decides; texts, where there are any, are parsed for a second figure."""

    layout: str  # "results", "outputs" or "lists"
    indices: dict[str, int] = field(default_factory=dict)  # layout "results"
    correct: dict[str, bool] = field(default_factory=dict)  # layout "lists"
    texts: dict[str, str] = field(default_factory=dict)


def read_results(path: str | Path) -> Results:
    """Read a result file in one of three published layouts.

    `results` {id: index} with or without `outputs` {id: text}; `outputs` alone; lists `correct` and `incorrect` of ids
    or of objects with `question_id` (and `pred`, the text). Raises `ResultsError` for anything else.
    """
    content = read_json(path)
    layouts = "`results` {id: index}, `outputs` {id: text}, or lists `correct` and `incorrect`"
    if not isinstance(content, dict):
        raise ResultsError(f"{path}: expected one JSON object with {layouts}; found a {type(content).__name__}.")
    outputs = content.get("outputs")
    if outputs is not None and not (isinstance(outputs, dict) and all(isinstance(t, str) for t in outputs.values())):
        raise ResultsError(f"{path}: `outputs` must be an object of texts by problem id.")
    if "results" in content:
        indices = content["results"]
        if not isinstance(indices, dict):
            raise ResultsError(f"{path}: `results` must be an object of choice indices by problem id.")
        if bad := [pid for pid, index in indices.items() if type(index) is not int]:
            raise ResultsError(f"{path}: `results` of {bad[0]} is {indices[bad[0]]!r}; a 0-based index is expected.")
        return Results("results", indices=indices, texts=outputs or {})
    if outputs is not None:
        return Results("outputs", texts=outputs)
    if isinstance(content.get("correct"), list) and isinstance(content.get("incorrect"), list):
        return _listed(path, content)
    raise ResultsError(f"{path}: expected {layouts}; its keys are {', '.join(content) or 'none'}.")


def _listed(path: str | Path, content: dict[str, Any]) -> Results:
    correct: dict[str, bool] = {}
    texts: dict[str, str] = {}
    for name in ("correct", "incorrect"):
        for number, entry in enumerate(content[name], start=1):
            pid = entry.get("question_id") if isinstance(entry, dict) else entry
            if type(pid) not in (str, int):
                raise ResultsError(
                    f"{path}, `{name}` entry {number}: expected a problem id or an object with question_id."
                )
            if (pid := str(pid)) in correct:
                raise ResultsError(f"{path}, `{name}` entry {number}: problem {pid} is listed twice.")
            correct[pid] = name == "correct"
            if isinstance(entry, dict) and isinstance(entry.get("pred"), str):
                texts[pid] = entry["pred"]
    return Results("lists", correct=correct, texts=texts)


def score_results(results: Results, gold: Mapping[str, Gold]) -> dict[str, Any]:
    """Score a result file against gold; the answer to `./run_all.sh score scienceqa`.

    Returns `accuracies` of what the file stores (of its parsed texts, if texts are all it has), layout, missing (gold
    problems without an entry: wrong), not_in_gold (entries left out), and, where there are texts, `reparsed`: the
    scores of `parse_answer` on them, in which `failed` counts texts without a valid letter (wrong, never a guess).
    Raises `ResultsError` if no entry is in the gold.
    """
    entries = {"results": results.indices, "outputs": results.texts, "lists": results.correct}[results.layout]
    covered = sum(pid in gold for pid in entries)
    if not covered:
        raise ResultsError(f"none of the {len(entries)} problems of the results is among the {len(gold)} of the gold")
    parsed = {
        pid: choice_index(parse_answer(text), gold[pid].choices) for pid, text in results.texts.items() if pid in gold
    }
    reparsed = score(parsed, gold) if parsed else None
    if results.layout == "lists":
        main = accuracies(results.correct, gold) | {"missing": len(gold) - covered}
    else:
        main = score(results.indices if results.layout == "results" else parsed, gold)
    extra: dict[str, Any] = {"layout": results.layout, "not_in_gold": len(entries) - covered}
    return main | extra | ({"reparsed": reparsed} if reparsed else {})


def write_results(
    path: str | Path,
    predictions: Mapping[str, int],
    outputs: Mapping[str, str],
    gold: Mapping[str, Gold],
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write a result file in the official layout (acc, correct, count, args, results, outputs), by atomic rename.

    predictions: index of each answered problem, `WRONG` where it could not be parsed; outputs: its generated text;
    settings: what goes under `args`. Raises `ResultsError` for an answer to a problem that the gold lacks.
    """
    if unknown := sorted({*predictions, *outputs} - set(gold)):
        raise ResultsError(f"{len(unknown)} answers are to problems that the gold lacks, among them {unknown[0]}")
    correct = sum(index == gold[pid].answer for pid, index in predictions.items())
    content = {
        "acc": 100 * correct / len(gold),
        "correct": correct,
        "count": len(gold),
        "args": dict(settings or {}),
        "results": {pid: int(predictions[pid]) for pid in gold if pid in predictions},
        "outputs": {pid: outputs[pid] for pid in gold if pid in outputs},
    }
    with whole(Path(path)) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
