"""Captions of the built-in world: what they state is what the frames show, by a reading of the sentences of its own."""

import re
from itertools import pairwise

import pytest

from helpers.config import load_profile
from helpers.corpora import load, shapes
from helpers.corpora.captions import describe_in_detail, facts_of, holds, world_captions
from helpers.corpora.shapes import Scene

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
COLORS = ["red", "green", "blue", "yellow", "purple", "orange"]
ITEMS = {
    "circles": "circle",
    "squares": "square",
    "triangles": "triangle",
    "stars": "star",
    "crosses": "cross",
    "hearts": "heart",
}
PLACES = {"on the grass": "grass", "on the beach": "beach", "in the snow": "snow", "on the lake": "lake"}
PLACES |= {"on the road": "road", "in space": "space"}
VERBS = {}  # every form of a verb that may stand in a sentence -> the action
for action, *forms in (
    ("jump", "jumps", "jumping"),
    ("duck", "ducks", "ducking"),
    ("slide left", "slides left", "sliding left"),
    ("slide right", "slides right", "sliding right"),
    ("blink", "blinks", "blinking"),
    ("grow", "grows", "growing"),
    ("shrink", "shrinks", "shrinking"),
    ("flash", "flashes", "flashing"),
):
    VERBS |= dict.fromkeys(forms, action)


@pytest.fixture(scope="module")
def scenes():
    return shapes.make_world(seed=11, gifs=600, prefix="train")[0]


def number(word: str) -> int:
    return int(word) if word.isdigit() else {"once": 1, "twice": 2}.get(word) or NUMBERS.index(word) + 1


def read_back(sentence: str) -> set[str]:
    """The facts that a person would take from the sentence; fails on a word that says nothing known."""
    left, facts = sentence.removesuffix("."), set()
    for phrase, place in PLACES.items():
        if phrase in left:
            left, facts = left.replace(phrase, ""), facts | {f"place={place}"}
    if found := re.search(r"(?:near|beside) (\w+) small (\w+) (\w+)", left):
        count, color, shape = found.groups()
        assert color in COLORS and (shape in ITEMS if count != "one" else shape in ITEMS.values())
        facts |= {f"items={number(count)}", f"item_color={color}", f"item_shape={ITEMS.get(shape, shape)}"}
        left = left.replace(found[0], "")
    found = re.search(rf"\b(an?) ({'|'.join(COLORS)}) ({'|'.join(ITEMS.values())})\b", left)
    assert (found[1] == "an") == (found[2] == "orange")
    facts |= {f"color={found[2]}", f"shape={found[3]}"}
    left = left.replace(found[0], "")
    done = re.findall(rf"({'|'.join(VERBS)})(?: (once|twice)| (\w+) times)?", left)
    left = re.sub(rf"({'|'.join(VERBS)})(?: (once|twice)| (\w+) times)?", "", left)
    actions = [VERBS[verb] for verb, _, _ in done]
    facts |= {
        f"action {action}" + (f"={number(once or count)}" if once or count else "")
        for action, (_, once, count) in zip(actions, done, strict=True)
    }
    if " after " in left:
        actions.reverse()
    facts |= {f"order {first}<{second}" for first, second in pairwise(actions)}
    known = [
        "there",
        "is",
        "that",
        "can",
        "be",
        "seen",
        "the",
        "large",
        "shape",
        "and",
        "then",
        "before",
        "after",
        "it",
    ]
    assert not set(re.sub("[, ]+", " ", left).split()) - set(known), sentence
    return facts


def seen(scene: Scene, fact: str) -> bool:
    """Whether the fact is true of the frames, which are gone through one by one."""
    runs = [now for before, now in zip((None, *scene.states), scene.states, strict=False) if now and now != before]
    kind, _, rest = fact.partition(" ")
    if kind == "order":
        first, second = rest.split("<")
        places = [[place for place, action in enumerate(runs) if action == wanted] for wanted in (first, second)]
        return all(places) and max(places[0]) < min(places[1])
    if kind == "action":
        action, _, times = rest.partition("=")
        return runs.count(action) == int(times) if times else action in runs
    name, _, value = fact.partition("=")
    return str(vars(scene)[name]) == value


def test_a_sentence_says_what_its_facts_say_and_nothing_else(scenes):
    for scene in scenes:
        for sentence, facts in describe_in_detail(scene):
            assert read_back(sentence) == set(facts) and len(set(facts)) == len(facts), sentence


def test_every_stated_fact_is_seen_in_the_frames(scenes):
    for scene in scenes:
        assert any(state is None for state in scene.states)  # the subject's looks are seen while it rests
        for _, facts in describe_in_detail(scene):
            assert all(seen(scene, fact) and holds(scene, fact) for fact in facts)


def test_holds_agrees_with_the_frames_of_other_scenes(scenes):
    facts = sorted({fact for scene in scenes for _, stated in describe_in_detail(scene) for fact in stated})
    assert {fact.partition("=")[0].partition(" ")[0] for fact in facts} >= {"action", "order", "items", "item_shape"}
    true = 0
    for scene in scenes[::20]:
        for fact in facts:
            assert holds(scene, fact) == seen(scene, fact), (scene, fact)
            true += holds(scene, fact)
    assert 0 < true < len(facts) * len(scenes[::20]) / 10


def test_facts_of_a_scene_are_those_that_hold_of_all_that_are_told_of_any(scenes):
    """Each of the two is written without the other: one builds texts, the other reads them."""
    told = {fact for scene in scenes for _, facts in describe_in_detail(scene) for fact in facts}
    for scene in scenes[:20]:
        assert {fact for fact in told if holds(scene, fact)} == told & facts_of(scene)
        assert {fact for _, facts in describe_in_detail(scene) for fact in facts} <= facts_of(scene)


@pytest.mark.parametrize("text", ["", "red", "color", "name=x", "seed=3", "action ", "action jump=x", "order jump"])
def test_a_text_that_is_no_fact_is_refused(scenes, text):
    with pytest.raises(ValueError, match="is no fact about a scene"):
        holds(scenes[0], text)


def test_captions_grow_in_detail(scenes):
    for scene in scenes:
        told = [facts for _, facts in describe_in_detail(scene)]
        assert len(told) == 5 and len({sentence for sentence, _ in describe_in_detail(scene)}) == 5
        for less, more in pairwise(told):
            stated = {*more, *(fact.partition("=")[0] for fact in more if fact.startswith("action"))}
            assert set(less) < stated  # to jump four times is to jump
        assert len(told[0]) == 2 and len(told[1]) == 3
        every = {f"action {action}={times}" for action, times in scene.blocks} | {f"place={scene.place}"}
        assert every < set(told[4]) and len(told[4]) == 6 + 2 * len(scene.blocks) - 1


def test_wording_varies_and_comes_from_the_seed_alone(scenes):
    few = world_captions(11, 4, 2)
    many = world_captions(11, 40, 20)
    shared = many[many.gif.isin(few.gif)].reset_index(drop=True)
    assert few.equals(shared) and set(few.split) == {"train", "test"} and len(few) == 30
    assert many.caption_id.is_unique and few.caption_id[0] == "shapes_train_00000-1"
    # what is left of a sentence without what it tells
    told = "|".join([*VERBS, *COLORS, *ITEMS, *ITEMS.values(), *PLACES, "once", "twice", *NUMBERS, "[0-9]+"])
    for level, least in enumerate((3, 3, 3, 6, 6)):
        frames = {re.sub(rf"\b({told})\b", "_", describe_in_detail(scene)[level][0]) for scene in scenes}
        assert len(frames) >= least


def test_the_world_that_is_loaded_has_captions_of_every_gif(tmp_path):
    profile = load_profile("tiny", {"shapes.train": 4, "shapes.test": 2})
    corpus = load(profile, folder=tmp_path)
    splits = dict(zip(corpus.questions.gif, corpus.questions.split, strict=True))
    assert corpus.captions.groupby(["gif", "split"]).size().to_dict() == dict.fromkeys(splits.items(), 5)
    assert corpus.told == 30 and corpus.captions.facts.map(len).min() == 2
