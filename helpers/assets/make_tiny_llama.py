"""Makes the built-in world's tiny language model: `python -m helpers.assets.make_tiny_llama OUT_FOLDER`.

A Llama that has read, and never seen: captions of scenes, stories of what happens in them event by event, and questions
about what is written, asked in several ways (plainly, with the options listed, as a chat). One position is one token of
text everywhere. It has not met a frame, nor a position that stands for one: that a video can be read like a
text is learnt where full-size models learn it too, by the connector and the adapter.

Texts come from seeds of their own, never from those of the training or test world.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from helpers.assets.pretraining import Progress, learning_rate, make_optimizer, save, train_tokenizer, update
from helpers.corpora.captions import describe_in_detail
from helpers.corpora.shapes import ACTIONS, COLORS, NUMBERS, PLACES, SHAPES, Scene, make_world, pick
from helpers.models.parts import IGNORED

TEXT_SEED, GO_ON_SEED, GATE_SEED = 770_001, 880_001, 990_001  # the seeds that follow are used as well
REST = "rest"
USER, ASSISTANT, TURN_END = "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# How a question is asked of a text: with what it begins, and what stands before the answer.
WAYS = (("Question: ", "\nAnswer:"), ("Q: ", "\nA:"), ("", ""), ("Tell me: ", "\nIt is:"))
REQUESTS = ("Describe this GIF.", "Describe this.", "Say what happens.")  # each is answered by a caption
TELLINGS = {"summary": 0.35, "story": 0.25, "tally": 0.2, "caption": 0.2}  # what is read, and the share of each
# Reading sets in much sooner where a text is short and asked in one way: so the first part of the training is.
FIRST_PART, FIRST_TELLINGS, SHORT = 0.3, {"summary": 0.4, "story": 0.3, "tally": 0.3}, 6
WEIGHTS = {"count": 2.0, "action": 3.0}  # in the loss, of a question's answer; counting is the hardest to learn
CAPTION, CAPTION_WEIGHT, TEXT_WEIGHT = "caption", 0.2, 0.05  # of a caption's tokens, and of those that are only read


# Texts --------------------------------------------------------------------------------------------------------------


def describe(rng: np.random.Generator, scene: Scene) -> str:
    """What can be seen at any time: " a red star two small blue circles on the beach ."."""
    items = scene.item_shape if scene.items == 1 else SHAPES[scene.item_shape]
    parts = [f"{NUMBERS[scene.items - 1]} small {scene.item_color} {items}", f"on the {scene.place}"]
    return f" {' '.join([f'a {scene.color} {scene.shape}', *rng.permutation(parts).tolist()])} ."


def summarise(rng: np.random.Generator, scene: Scene) -> str:
    """What happens, in numbers: " it will jump four times then it will blink once ."."""
    words = {1: "once", 2: "twice"} if rng.random() < 0.5 else {1: "1 time"}
    told = [f"it will {action} {words.get(times, f'{times} times')}" for action, times in scene.blocks]
    return f" {' then '.join(told)} ."


def tell(rng: np.random.Generator, scene: Scene) -> str:
    """What happens, event by event: " it can be seen to rest , jump , rest , jump ."; some leave the rests out."""
    states = [REST if state is None else state for state in scene.states]
    events = [now for before, now in zip([None, *states], states, strict=False) if now != before]
    if rng.random() < 0.5:
        events = [event for event in events if event != REST]
    return f" it can be seen to {' , '.join(events)} ."


def count_aloud(scene: Scene) -> str:
    """What happens, each time with its number: " it can be seen to jump 1 , jump 2 , blink 1 ."."""
    told = [f"{action} {number}" for action, times in scene.blocks for number in range(1, times + 1)]
    return f" it can be seen to {' , '.join(told)} ."


def scene_text(rng: np.random.Generator, scene: Scene, telling: str) -> str:
    """All of a scene in words: how it looks and what happens, in any order, or its longest caption."""
    if telling == "caption":
        return f" {describe_in_detail(scene)[-1][0]}"
    if telling == "tally":
        happens = count_aloud(scene)
    else:
        happens = summarise(rng, scene) if telling == "summary" else tell(rng, scene)
    return "".join(rng.permutation([describe(rng, scene), happens]).tolist())


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the world's texts, with a chat template; spells any text."""
    scenes, questions = make_world(TEXT_SEED, 400, "tokens")
    rng = np.random.default_rng(TEXT_SEED)
    texts = [scene_text(rng, scene, telling) for scene in scenes for telling in TELLINGS]
    texts += [f" {caption}" for scene in scenes for caption, _ in describe_in_detail(scene)]
    texts += [f"{before}{q}{after}" for before, after in WAYS for q in [*questions["question"], *REQUESTS]]
    words = [*COLORS, *SHAPES, *SHAPES.values(), *PLACES, *ACTIONS, *NUMBERS, *range(11), REST, "time", "times"]
    texts += [text for word in words for text in (f" {word}", str(word))] * 50
    tokenizer = train_tokenizer(texts, 768, (USER, ASSISTANT, TURN_END))
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@dataclass(frozen=True)
class Reading:
    """A text, and what is asked of it: (prompt, reply, kind) of each question, all of token ids."""

    text: list[int]
    asked: list[tuple[list[int], list[int], str]]


class Reader:
    """Turns scenes and their questions into readings, remembering the tokens of the few texts that come again."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator) -> None:
        self.tokenizer, self.rng = tokenizer, rng
        self._known: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, without BOS and EOS."""
        if text not in self._known:
            self._known[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self._known[text]

    def reading(self, text: str, questions: list[tuple[str, str, str, list[str]]], chat: bool, way: int) -> Reading:
        """questions: (question, answer, kind, options to list: may be empty) of each."""
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        user, assistant, turn_end = self.tokenizer.convert_tokens_to_ids([USER, ASSISTANT, TURN_END])
        before, after = WAYS[way]
        asked = []
        for question, answer, kind, options in questions:
            listed = f"{question}\nOptions: {'; '.join(options)}" if options else question
            if chat:
                reply = [*self.ids(answer), turn_end]
                asked.append(([*self.ids(f" {listed}"), turn_end, assistant], reply, kind))
            else:
                asked.append((self.ids(f"{before}{listed}{after}"), [*self.ids(f" {answer}"), end], kind))
        return Reading([start, *([user] if chat else []), *self.ids(text)], asked)


def _share_a_word(scene: Scene) -> bool:
    return any(set(a.split()) & set(b.split()) for (a, _), (b, _) in combinations(scene.blocks, 2))


def readings(
    tokenizer: PreTrainedTokenizerFast, seed: int, size: int, first: bool = False, pool: int = 512
) -> Iterator[list[Reading]]:
    """Endless batches of `size` readings to learn from; those of a batch are of similar length.

    first: the readings of the first part, short ones asked plainly. Of the second part: to count "slide left" where the
    subject also slides right is the hardest to learn, and such scenes are rare, so that of the others most are passed
    over; how often is asked of every action, and of looks only half of the questions.
    """
    rng, number = np.random.default_rng(seed), 0
    reader = Reader(tokenizer, rng)
    found: list[Reading] = []
    while True:
        scenes, questions = make_world(seed + number, 1024, "text")
        number += 1
        of_scene = dict(iter(questions.groupby("gif", sort=False)))
        for scene in scenes:
            if first:
                if sum(times for _, times in scene.blocks) <= SHORT or rng.random() < 0.2:
                    text = scene_text(
                        rng, scene, str(rng.choice(list(FIRST_TELLINGS), p=list(FIRST_TELLINGS.values())))
                    )
                    asked = [(*question[:3], []) for question in _questions(of_scene[scene.name])]
                    found.append(reader.reading(text, asked, chat=False, way=0))
                continue
            if not _share_a_word(scene) and rng.random() > 0.25:
                continue
            asked = []
            for question in _questions(of_scene[scene.name]):
                if question[2] not in ("count", "action", "transition") and rng.random() < 0.5:
                    continue
                asked.append((*question[:3], question[3] if rng.random() < 0.3 else []))
            counted = [f"How many times does the {scene.shape} {action} ?" for action, _ in scene.blocks]
            asked += [(q, str(n), "count", []) for q, (_, n) in zip(counted, scene.blocks, strict=True)]
            captions = describe_in_detail(scene)
            asked.append((pick(rng, REQUESTS), pick(rng, captions)[0], CAPTION, []))
            text = scene_text(rng, scene, str(rng.choice(list(TELLINGS), p=list(TELLINGS.values()))))
            way = 0 if rng.random() < 0.4 else int(rng.integers(len(WAYS)))
            found.append(reader.reading(text, asked, bool(rng.random() < 0.25), way))
        if len(found) >= pool:
            found.sort(key=lambda r: len(r.text) + sum(len(p) + len(a) for p, a, _ in r.asked))
            batches = [found[i : i + size] for i in range(0, len(found) - size + 1, size)]
            for i in rng.permutation(len(batches)):
                yield batches[i]
            found = []


def _questions(rows: pd.DataFrame) -> list[tuple[str, str, str, list[str]]]:
    """(question, answer, kind, options) of each row; a count of 0 means once in the world's files."""
    return [
        (r.question, str(max(r.label, 1)) if r.task == "count" else r.answer, r.type or r.task, list(r.options))
        for r in rows.itertuples()
    ]


# Learning -----------------------------------------------------------------------------------------------------------


def pack(batch: list[Reading]) -> dict[str, Any]:
    """One sequence a reading, text question answer question answer ..., in which no question sees another.

    ids, labels, positions int [B, L] (labels: what the position before foretells; -100: nothing), mask bool [B, L, L],
    kinds: for each reading, (first position, length, kind) of its answers.
    """
    lengths = [len(r.text) + sum(len(prompt) + len(reply) for prompt, reply, _ in r.asked) for r in batch]
    shape = (len(batch), max(lengths))
    ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    labels, blocks = np.full(shape, IGNORED, np.int64), np.full(shape, -1, np.int64)
    kinds = []
    for row, reading in enumerate(batch):
        end = told = len(reading.text)
        ids[row, :end], positions[row, :end], blocks[row, :end] = reading.text, range(end), 0
        labels[row, 1:end] = reading.text[1:]
        answers = []
        for number, (prompt, reply, kind) in enumerate(reading.asked, 1):
            start, answer = end, end + len(prompt)
            end = answer + len(reply)
            ids[row, start:end], blocks[row, start:end] = prompt + reply, number
            positions[row, start:end] = range(told, told + end - start)
            labels[row, answer:end] = reply
            answers.append((answer, len(reply), kind))
        kinds.append(answers)
    same = blocks[:, :, None] == blocks[:, None, :]
    mask = (same | (blocks[:, None, :] == 0)) & np.tril(np.ones((shape[1], shape[1]), bool))
    arrays = {"ids": ids, "labels": labels, "positions": positions, "mask": mask | np.eye(shape[1], dtype=bool)}
    return {name: torch.from_numpy(array) for name, array in arrays.items()} | {"kinds": kinds}


def forward(model: LlamaForCausalLM, packed: dict[str, Any]) -> Tensor:
    """Logits [B, L, V]."""
    mask = torch.zeros(packed["mask"].shape).masked_fill(~packed["mask"], -1e9)[:, None]
    return model(packed["ids"], attention_mask=mask, position_ids=packed["positions"], use_cache=False).logits


def accuracy(logits: Tensor, packed: dict[str, Any]) -> dict[str, list[float]]:
    """Kind of question -> 1.0 or 0.0 a question, for the whole answer including its end."""
    guess = logits.argmax(-1)
    found: dict[str, list[float]] = {}
    for row, kinds in enumerate(packed["kinds"]):
        for start, length, kind in kinds:
            wanted = packed["labels"][row, start : start + length]
            right = bool((guess[row, start - 1 : start + length - 1] == wanted).all())
            found.setdefault(kind, []).append(float(right))
    return found


def new_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 1.1 M parameters with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=128**-0.5,  # with the stock one, 0.02, reading sets in many times later
    )
    return LlamaForCausalLM(config)


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    minutes: float,
    seed: int,
    rate: float,
    first_part: float,
) -> None:
    """Language modelling of the texts, and above all of the answers to questions about them, in CPU minutes.

    first_part: the share of them that is spent on short readings, asked plainly.
    """
    optimizer = make_optimizer(model.parameters(), rate)
    progress = Progress("text", minutes, 100)
    easy, all_forms = readings(tokenizer, seed, 8, first=True), readings(tokenizer, seed + 50_000, 8)
    while progress.done < 1:
        packed = pack(next(easy if progress.done < first_part else all_forms))
        logits = forward(model, packed)
        labels = packed["labels"][:, 1:]
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="none")
        weight = torch.where(packed["labels"] == IGNORED, 0.0, TEXT_WEIGHT)
        for row, kinds in enumerate(packed["kinds"]):
            for start, length, kind in kinds:
                weight[row, start : start + length] = CAPTION_WEIGHT if kind == CAPTION else WEIGHTS.get(kind, 1.0)
        weight = weight[:, 1:].flatten()
        loss = (losses * weight).sum() / weight.sum()
        update(optimizer, loss, learning_rate(rate, progress.step, progress.done))
        for kind, right in accuracy(logits.detach(), packed).items():
            progress.note(kind, torch.tensor(right))
        progress.advance(loss)


@torch.no_grad()
def gate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, scenes: int = 300) -> dict[str, dict[str, float]]:
    """Telling (or "chat": a story told and asked as a chat) -> kind -> share answered right, on scenes never read.

    Every question of the world is asked of every scene, without options: as the profiles ask it, and in a chat bare.
    """
    model.eval()
    told, questions = make_world(GATE_SEED, scenes, "gate")
    of_scene = dict(iter(questions.groupby("gif", sort=False)))
    table = {}
    for way in (*TELLINGS, "chat"):
        rng = np.random.default_rng(GATE_SEED)
        reader, found = Reader(tokenizer, rng), {}
        for start in range(0, scenes, 50):
            batch = []
            for scene in told[start : start + 50]:
                asked = [(*question[:3], []) for question in _questions(of_scene[scene.name])]
                text = scene_text(rng, scene, "story" if way == "chat" else way)
                batch.append(reader.reading(text, asked, way == "chat", 0))
            packed = pack(batch)
            for kind, right in accuracy(forward(model, packed), packed).items():
                found.setdefault(kind, []).extend(right)
        table[way] = {kind: float(np.mean(right)) for kind, right in sorted(found.items())}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=42, help="CPU minutes of training")
    parser.add_argument("--go-on", action="store_true", help="start from OUT's weights, and read other texts")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = new_llama(tokenizer)
    if args.go_on:
        model.load_state_dict(load_file(args.out / "llama" / "model.safetensors"), strict=False)  # the head is tied
        train(model, tokenizer, args.minutes, GO_ON_SEED, rate=1e-3, first_part=0)
    else:
        train(model, tokenizer, args.minutes, TEXT_SEED, rate=1.5e-3, first_part=FIRST_PART)
    save(model, tokenizer, args.out / "llama")
    print(json.dumps(gate(model, tokenizer), indent=1))


if __name__ == "__main__":
    main()
