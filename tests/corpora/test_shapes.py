"""The built-in world: real GIF files, balanced questions, counterfactual pairs, TGIF-QA's own schema."""

import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from helpers.corpora import shapes, tgif_qa
from helpers.corpora.own_gifs import load as load_own_gifs
from helpers.gifs.decode import sample_indices


@pytest.fixture(scope="module")
def world():
    return shapes.make_world(seed=11, gifs=600, prefix="train")


def count_runs(states, action):
    """How often an action is done, counted frame by frame."""
    times, inside = 0, False
    for state in states:
        if state == action and not inside:
            times += 1
        inside = state == action
    return times


def test_states_agree_with_blocks(world):
    for scene in world[0]:
        for action, times in scene.blocks:
            assert count_runs(scene.states, action) == times


def test_answers_follow_from_what_the_frames_show(world):
    scenes, questions = world
    by_name = {scene.name: scene for scene in scenes}
    verbs = "|".join(sorted(shapes.ACTIONS, key=len, reverse=True))
    checked = dict.fromkeys(("count", "action", "transition"), 0)
    for row in questions.itertuples():
        scene = by_name[row.gif]
        order = [action for action, _ in scene.blocks]
        if row.task == "count":
            action = re.search(rf"does the \w+ ({verbs})", row.question)[1]
            seen = count_runs(scene.states, action)
            assert row.label == int(row.answer) == (seen if seen > 1 else 0)
        elif row.task == "action":
            asked = int(re.search(r"(\d+) times", row.question)[1])
            assert [a for a in row.options if count_runs(scene.states, a) == asked] == [row.answer]
        elif row.task == "transition":
            word, action = re.search(rf"(after|before) ({verbs}) \?", row.question).groups()
            step = 1 if word == "after" else -1
            assert order[order.index(action) + step] == row.answer
        else:
            continue
        if row.options:
            assert len(set(row.options)) == 5 and row.options[row.label] == row.answer
        checked[row.task] += 1
    assert checked == dict.fromkeys(checked, len(scenes))


def test_twins_answer_every_shared_question_differently(world):
    scenes, questions = world
    for first, second in zip(scenes[::2], scenes[1::2], strict=True):
        asked = [questions[questions.gif == s.name].set_index("question")["answer"] for s in (first, second)]
        shared = asked[0].index.intersection(asked[1].index)
        # All but the object question, which every GIF is asked and which may differ in wording between twins.
        shared = [q for q in shared if q not in shapes.OBJECT_QUESTIONS + shapes.ITEM_QUESTIONS]
        assert len(shared) == 6
        assert all(asked[0][q] != asked[1][q] for q in shared)


def test_a_question_alone_tells_little(world):
    """The best guess from a question's words, learned on half the pairs, scored on the other half."""
    _, questions = world
    half = questions["gif"].map(lambda name: int(name[-5:]) // 2 % 2)
    for task, limit in (("frameqa", 0.36), ("action", 0.36), ("transition", 0.36)):
        rows = questions[questions.task == task]
        known, new = rows[half[rows.index] == 0], rows[half[rows.index] == 1]
        guess = known.groupby("question")["answer"].agg(lambda answers: answers.mode()[0])
        assert (new["question"].map(guess) == new["answer"]).mean() < limit
    labels = questions[questions.task == "count"]["label"].clip(lower=1)
    assert set(labels) == set(range(1, 11))
    assert labels.var(ddof=0) > 6  # the mean squared error of the best constant


def test_deterministic_by_seed_and_disjoint_between_splits(tmp_path, world):
    again, questions = shapes.make_world(seed=11, gifs=600, prefix="train")
    assert again == world[0]
    pd.testing.assert_frame_equal(questions, world[1])
    other, _ = shapes.make_world(seed=11, gifs=600, prefix="test")
    assert not {s.seed for s in other} & {s.seed for s in again}
    for name in ("a.gif", "b.gif"):
        shapes.write_gif(again[0], tmp_path / name)
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()


def test_gif_files_hold_the_drawn_frames_and_vary(tmp_path, world):
    sizes, disposals, transparent, interlaced, counts = set(), set(), 0, 0, []
    for scene in world[0][:40]:
        path = tmp_path / f"{scene.name}.gif"
        shapes.write_gif(scene, path)
        frames = shapes.draw_frames(scene)
        with Image.open(path) as image:
            interlaced += bool(image.tile[0].args[1])
            assert image.n_frames == len(scene.states)
            sizes.add(image.size)
            counts.append(image.n_frames)
            for number, drawn in enumerate(frames):
                image.seek(number)
                assert image.info["duration"] == scene.durations_ms[number]
                disposals.add(image.disposal_method)
                transparent += "transparency" in image.info
                if number in (0, len(frames) // 2):
                    inner = np.s_[6:-6, 6:-6]
                    error = abs(np.asarray(image.convert("RGB"), float)[inner] - np.asarray(drawn, float)[inner])
                    assert error.mean() < 6  # palette rounding
    assert all(64 <= side <= 160 for size in sizes for side in size) and len(sizes) > 20
    assert min(counts) >= 6 and max(counts) <= 64 and len(set(counts)) > 10
    assert disposals >= {1, 2} and transparent and interlaced


def test_some_answers_need_more_than_sixteen_frames(world):
    hidden = {1: 0, 3: 0}
    for scene in world[0]:
        for groups in hidden:
            seen = [scene.states[i] for i in sample_indices(scene.durations_ms, groups)]
            hidden[groups] += any(count_runs(seen, action) != times for action, times in scene.blocks)
    assert hidden[1] > 0.3 * len(world[0])
    assert hidden[3] < 0.02 * len(world[0])


def test_written_in_tgif_qas_schema_and_read_back(tmp_path):
    gifs = shapes.write_tgif_qa(tmp_path, seed=3, train=6, test=4)
    raw = (tmp_path / "Train_action_question.csv").read_bytes()
    assert raw.startswith(b"gif_name\tquestion\ta1\ta2\ta3\ta4\ta5\tanswer\tvid_id\tkey\r\n")
    corpus = tgif_qa.load(tmp_path, gifs=gifs)
    assert corpus.questions.groupby(["split", "task"]).size().to_dict() == {
        **{("train", task): 6 for task in ("count", "action", "transition")},
        **{("test", task): 4 for task in ("count", "action", "transition")},
        ("train", "frameqa"): 24,
        ("test", "frameqa"): 16,
    }
    assert set(corpus.questions["type"]) == {"", "object", "number", "color", "location"}
    assert corpus.rejects.empty and len(corpus.gifs) == 10
    assert "description" not in corpus.questions


def test_own_gifs_format_round_trip(tmp_path):
    path = shapes.write_own_gifs(tmp_path, seed=4, train=4, test=2)
    corpus = load_own_gifs(tmp_path, path)
    assert corpus.rejects.empty
    assert corpus.questions["split"].value_counts().to_dict() == {"train": 28, "test": 14}
    again, _ = shapes.make_world(4, 2, "test")
    assert {s.name for s in again} == {g.removesuffix(".gif") for g in corpus.questions.query("split == 'test'")["gif"]}


def test_odd_numbers_are_refused():
    with pytest.raises(ValueError, match="even number of GIFs, not 3"):
        shapes.make_world(0, 3, "train")
