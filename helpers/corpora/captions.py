"""Captions of the built-in world: five sentences a GIF of growing detail, and the facts that each of them states.

A fact is a short text, so that it can be kept in a table and compared:

    shape=star  color=red  place=grass            the large shape, the subject, and where it is
    items=3  item_shape=heart  item_color=blue    the small shapes in the corners
    action jump                                   the subject does it at least once
    action jump=4                                 the subject does it exactly so many times
    order jump<slide left                         the subject is done with one before it begins the other

What a caption does not name it does not deny. A subject that blinks is gone meanwhile, and one that flashes is white:
a caption tells what the subject is, never that every frame shows it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations, pairwise

import numpy as np
import pandas as pd

from helpers.corpora.schema import caption_table
from helpers.corpora.shapes import ACTIONS, NUMBERS, SHAPES, Scene, make_world, pick

WHERE = {
    "grass": "on the grass",
    "beach": "on the beach",
    "snow": "in the snow",
    "lake": "on the lake",
    "road": "on the road",
    "space": "in space",
}
_COUNTS = (*NUMBERS, "six", "seven", "eight", "nine", "ten")
_ATTRIBUTE = re.compile(r"(shape|color|place|items|item_shape|item_color)=(.+)")
_ACTION = re.compile(r"action ([^=<]+)(?:=([0-9]+))?")
_ORDER = re.compile(r"order ([^=<]+)<([^=<]+)")


def world_captions(seed: int, train: int, test: int) -> pd.DataFrame:
    """The captions of the built-in world that `shapes.write_tgif_qa` writes, as `schema.CAPTION_COLUMNS`."""
    return caption_table(
        (scene.name, split, caption, facts)
        for split, gifs in (("train", train), ("test", test))
        if gifs
        for scene in make_world(seed, gifs, split)[0]
        for caption, facts in describe_in_detail(scene)
    )


def describe_in_detail(scene: Scene) -> list[tuple[str, list[str]]]:
    """Five captions of a scene, each with the facts that it states; their wording is drawn by the scene's seed alone.

    1 the subject; 2 and what it does most often; 3 and how often, and what it does before or after that; 4 and where it
    is or what small shapes there are; 5 all that the scene shows.
    """
    rng = np.random.default_rng([scene.seed, 2])
    name = f"{'an' if scene.color[0] in 'aeiou' else 'a'} {scene.color} {scene.shape}"
    looks = [f"shape={scene.shape}", f"color={scene.color}"]
    place = WHERE[scene.place], [f"place={scene.place}"]
    items = _items(rng, scene)
    most = max(range(len(scene.blocks)), key=lambda number: scene.blocks[number][1])
    action, _ = scene.blocks[most]
    start = max(0, min(most, len(scene.blocks) - 2))
    told = []

    def tell(sentence: str, *facts: Sequence[str]) -> None:
        told.append((f"{sentence}.", [*looks, *(fact for group in facts for fact in group)]))

    tell(pick(rng, (f"there is {name}", f"{name} can be seen", f"the large shape is {name}")))
    doing = (f"{name} {_verb(action)}", f"{name} is {ACTIONS[action]}", f"there is {name} that {_verb(action)}")
    tell(pick(rng, doing), [f"action {action}"])
    for blocks, details in (
        (scene.blocks[start : start + 2], []),
        (scene.blocks[start : start + 2], [pick(rng, (place, items))]),
        (scene.blocks, [place, items]),
    ):
        motion, facts = _motion(rng, blocks)
        setting = " ".join(text for text, _ in details)
        sentences = [f"{name} {motion} {setting}", f"{setting}, {name} {motion}"] if setting else [f"{name} {motion}"]
        tell(pick(rng, sentences), facts, *(facts for _, facts in details))
    return told


def _items(rng: np.random.Generator, scene: Scene) -> tuple[str, list[str]]:
    shape = scene.item_shape if scene.items == 1 else SHAPES[scene.item_shape]
    facts = [f"items={scene.items}", f"item_shape={scene.item_shape}", f"item_color={scene.item_color}"]
    return f"{pick(rng, ('near', 'beside'))} {NUMBERS[scene.items - 1]} small {scene.item_color} {shape}", facts


def _verb(action: str) -> str:
    verb, *where = action.split()
    return " ".join([verb + ("es" if verb.endswith("sh") else "s"), *where])


def _motion(rng: np.random.Generator, blocks: Sequence[tuple[str, int]]) -> tuple[str, list[str]]:
    """What the subject does, in words, and the facts: how often each action is done, and their order."""
    facts = [f"action {action}={times}" for action, times in blocks]
    facts += [f"order {first}<{second}" for (first, _), (second, _) in pairwise(blocks)]
    parts = [f"{_verb(action)} {_times(rng, times)}" for action, times in blocks]
    if len(parts) == 2:
        first, second = parts
        ways = [f"{first} and then {second}", f"{first} before it {second}", f"{second} after it {first}"]
    else:
        ways = [", then ".join(parts), " and then ".join(parts)]
    return pick(rng, ways), facts


def _times(rng: np.random.Generator, times: int) -> str:
    return {1: "once", 2: "twice"}.get(times) or f"{pick(rng, (times, _COUNTS[times - 1]))} times"


def facts_of(scene: Scene) -> frozenset[str]:
    """All facts that are true of a scene, in the form given above: those that `holds` says yes to."""
    looks = ("shape", "color", "place", "items", "item_shape", "item_color")
    actions = [action for action, _ in scene.blocks]
    return frozenset(
        [
            *(f"{name}={getattr(scene, name)}" for name in looks),
            *(f"action {action}" for action in actions),
            *(f"action {action}={times}" for action, times in scene.blocks),
            *(f"order {first}<{second}" for first, second in combinations(actions, 2)),
        ]
    )


def holds(scene: Scene, fact: str) -> bool:
    """Whether a fact is true of a scene; raises ValueError for a text that is no fact in the form given above."""
    done = dict(scene.blocks)
    if found := _ATTRIBUTE.fullmatch(fact):
        return str(getattr(scene, found[1])) == found[2]
    if found := _ACTION.fullmatch(fact):
        return done.get(found[1], 0) == int(found[2]) if found[2] else found[1] in done
    if found := _ORDER.fullmatch(fact):
        order = list(done)
        return {found[1], found[2]} <= set(order) and order.index(found[1]) < order.index(found[2])
    raise ValueError(f"{fact!r} is no fact about a scene: facts are like color=red, action jump=4, order jump<duck")
