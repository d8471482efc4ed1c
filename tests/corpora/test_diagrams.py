"""The world of diagrams: read by ScienceQA's strict reader, the same by seed, and not to be answered from text."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from helpers.corpora import diagrams, scienceqa


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return diagrams.write(tmp_path_factory.mktemp("world") / "w", seed=3, train=120, val=20, test=60)


def test_the_strict_reader_takes_all_of_it(world):
    found = scienceqa.load(world, captions=True)
    assert len(found.problems) == 200 and found.rejects.empty
    assert found.problems["split"].value_counts().to_dict() == {"train": 120, "test": 60, "val": 20}
    images = found.problems[found.problems["image"] != ""]
    assert all(Image.open(path).size == (64, 64) for path in images["image"])
    assert set(found.problems["subject"]) == set(scienceqa.SUBJECTS)
    for column in ("hint", "caption"):  # there or not, with an image or without
        assert 0.1 < (images[column] != "").mean() < 0.9
    assert (found.problems[found.problems["image"] == ""]["hint"] != "").any()


def test_the_same_world_by_seed_and_another_one_by_another(world, tmp_path):
    again = diagrams.write(tmp_path / "again", seed=3, train=120, val=20, test=60)
    other = diagrams.write(tmp_path / "other", seed=4, train=120, val=20, test=60)
    names = sorted(path.relative_to(world) for path in world.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((world / name).read_bytes() == (again / name).read_bytes() for name in names)
    assert (world / "problems.json").read_bytes() != (other / "problems.json").read_bytes()


def test_a_finished_world_is_kept_and_one_of_other_sizes_replaced(tmp_path):
    folder = diagrams.write(tmp_path / "w", seed=1, train=4, val=1, test=2)
    (folder / "mine.txt").touch()
    diagrams.write(folder, seed=1, train=4, val=1, test=2)
    assert (folder / "mine.txt").is_file()
    diagrams.write(folder, seed=1, train=5, val=1, test=2)
    assert not (folder / "mine.txt").exists()
    assert len(json.loads((folder / "problems.json").read_text())) == 8
    assert not list(tmp_path.glob(".w.*"))


def test_the_right_choice_says_what_the_diagram_shows():
    for problem in diagrams.make_problems(5, 300):
        right = problem.record["choices"][problem.record["answer"]]
        assert len(set(problem.record["choices"])) == len(problem.record["choices"])
        if problem.diagram is not None:
            assert right == problem.diagram.facts[problem.fact]
            assert not any(value in problem.record["hint"] + problem.caption for value in problem.record["choices"])
        elif problem.fact:
            assert right in problem.record["hint"]
        else:
            about = next(fact for fact, text in diagrams.WORDS.items() if text == problem.record["question"])
            assert [choice in diagrams.VALUES[about] for choice in problem.record["choices"]].count(True) == 1
            assert right in diagrams.VALUES[about]


def test_text_does_not_tell_the_answer_of_an_image_problem():
    """Whatever is known of the text, the answer's place and value are as good as drawn by lot."""
    problems = [p for p in diagrams.make_problems(11, 12_000) if p.diagram is not None]
    for count in (2, 3, 4):
        asked = [p for p in problems if len(p.record["choices"]) == count]
        for text in ("question", "hint"):
            for value in {p.record[text] for p in asked}:
                places = Counter(p.record["answer"] for p in asked if p.record[text] == value)
                total = sum(places.values())
                if total >= 200:  # five standard deviations of a fair draw
                    assert max(abs(places[i] / total - 1 / count) for i in range(count)) < 5 * 0.5 / total**0.5
    pairs = Counter()
    for p in problems:
        if len(p.record["choices"]) == 2:
            pairs[(p.fact, tuple(sorted(p.record["choices"])), p.record["choices"][p.record["answer"]])] += 1
    for (fact, choices, _), _ in list(pairs.items()):
        first, second = (pairs[(fact, choices, choice)] for choice in choices)
        assert abs(first - second) < 5 * (first + second) ** 0.5


def test_images_differ_by_what_they_show():
    """Two diagrams of the same seed that differ in one fact differ in their pixels, and equal ones do not."""
    for kind, facts in diagrams.KINDS.items():
        first = {fact: diagrams.VALUES[fact][0] for fact in facts}
        drawn = np.asarray(diagrams.draw(diagrams.Diagram(kind, first, 7)), dtype=int)
        assert (drawn == np.asarray(diagrams.draw(diagrams.Diagram(kind, dict(first), 7)))).all()
        for fact in facts:
            other = diagrams.Diagram(kind, first | {fact: diagrams.VALUES[fact][1]}, 7)
            changed = np.abs(np.asarray(diagrams.draw(other), dtype=int) - drawn).max(-1) > 60
            assert changed.sum() >= 25, (kind, fact)


def test_every_value_is_a_word_of_its_own():
    values = [value for bank in diagrams.VALUES.values() for value in bank]
    assert len(values) == len(set(values)) and not any(" " in value for value in values)
