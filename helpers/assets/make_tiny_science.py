"""Makes the tiny backbones of the diagram world: `python -m helpers.assets.make_tiny_science OUT_FOLDER`.

Two models that know the world of helpers/corpora/diagrams.py and have never met each other, as full-size ones have not:

- `science_clip`, the vision tower of a CLIP that was trained contrastively on captions of single facts; its text tower
  is left out of what is saved. It never sees a question.
- `science_llama`, a Llama trained on text alone: problems whose hint describes a diagram in words, questions about
  words, and problems in whose image's place stands one position that holds several words at once (the sum of their
  embeddings), so that it has met a position that says more than one thing, as the CLS token does. It never sees an
  image.

Images and texts come from seeds of their own, never from those of a training or test world.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from helpers.assets.make_tiny_xclip import encode_texts
from helpers.assets.pretraining import (
    Progress,
    aspect_loss,
    learning_rate,
    make_optimizer,
    save,
    train_tokenizer,
    update,
)
from helpers.corpora.diagrams import (
    CAPTIONS,
    HINTS,
    KINDS,
    QUESTIONS,
    SIZE,
    STATEMENTS,
    VALUES,
    WORDS,
    Diagram,
    Problem,
    draw,
    make_diagram,
    make_problem,
)
from helpers.corpora.scienceqa import ANSWER_START, LETTERS, ORDERS, PromptStyle, prompt, target
from helpers.models.adem_vl.config import NO_CLS
from helpers.models.adem_vl.sequences import Encoded, collate, encode, image_tensor, letter_tokens
from helpers.models.parts import IGNORED

PRETRAIN_SEED, GATE_SEED = 880_001, 995_001
WINDOW = 4096  # tokens that the language model takes; real problems are long in this tokenizer
BANKS = {fact: [STATEMENTS[fact][0].format(value) for value in VALUES[fact]] for fact in VALUES}
BANKS["kind"] = [CAPTIONS[kind] for kind in KINDS]
"""Fact -> the captions of all its values; a picture is compared with all of them."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the world's texts; every value, and each of " A" to " E", is one token; spells any text."""
    rng = np.random.default_rng(PRETRAIN_SEED)
    texts = [text for problem in (make_problem(rng) for _ in range(400)) for text in _lines(rng, problem)]
    known = [text for table in (QUESTIONS, HINTS) for bank in table.values() for text in bank]
    known += [*WORDS.values(), *CAPTIONS.values(), *(text for bank in BANKS.values() for text in bank)]
    words = [*(value for values in VALUES.values() for value in values), *KINDS, *LETTERS]
    return train_tokenizer(texts + known * 5 + [f" {word}" for word in words] * 100, 640)


def _row(problem: Problem) -> dict[str, Any]:
    """A problem as the prompts take it."""
    return problem.record | {"caption": problem.caption}


def _lines(rng: np.random.Generator, problem: Problem) -> list[str]:
    style = PromptStyle(ORDERS[rng.integers(len(ORDERS))], captions=bool(rng.integers(2)))
    return ["Image: ", "Image: N/A", prompt(_row(problem), style) + target(problem.record)]


# Vision -------------------------------------------------------------------------------------------------------------


def new_clip(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """A CLIP with random weights, whose vision tower has 0.25 M parameters and an 8x8 grid of patches."""
    common = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "projection_dim": 64}
    text = common | {
        "num_hidden_layers": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 32,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = common | {"num_hidden_layers": 5, "image_size": SIZE, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))
    nn.init.normal_(model.text_model.embeddings.token_embedding.weight, std=0.3)
    nn.init.normal_(model.text_model.embeddings.position_embedding.weight, std=0.1)
    nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=0.1)
    return model


def see(tower: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B, 1 + patches, W] before the last block, as ADEM-VL reads them, and CLS [B, W] after it."""
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    for block in tower.encoder.layers[:-1]:
        hidden = block(hidden, None)
    return tower.post_layernorm(hidden), tower.post_layernorm(tower.encoder.layers[-1](hidden, None)[:, 0])


def pictures(diagrams: list[Diagram]) -> Tensor:
    """Normalised pixels [B, 3, H, W], by the reader of the real pipeline."""
    return torch.stack([image_tensor(draw(diagram), SIZE) for diagram in diagrams])


def targets(diagrams: list[Diagram]) -> dict[str, Tensor]:
    """Fact -> index of each diagram's value, -1 where it does not show the fact."""
    found = {fact: [VALUES[fact].index(d.facts[fact]) if fact in d.facts else -1 for d in diagrams] for fact in VALUES}
    found["kind"] = [list(KINDS).index(d.kind) for d in diagrams]
    return {fact: torch.tensor(values) for fact, values in found.items()}


def train_clip(model: CLIPModel, tokenizer, minutes: float, seed: int, count: int = 8000, batch: int = 64) -> None:
    """Contrastive training on captions of single facts, until the CPU minutes are spent.

    Besides CLS behind the last block, as usual, CLS and the mean patch before it are compared with the captions: there
    ADEM-VL reads, and from there a small encoder of few blocks would keep what it knows out.
    """
    rng = np.random.default_rng(seed)
    diagrams = [make_diagram(rng) for _ in range(count)]
    pixels, wanted = pictures(diagrams), targets(diagrams)
    optimizer, progress = make_optimizer(model.parameters(), 1.5e-3), Progress("vision", minutes, 100)
    while progress.done < 1:
        rows = torch.from_numpy(rng.integers(count, size=batch))
        with torch.autocast("cpu", torch.bfloat16):
            tokens, last = see(model.vision_model, pixels[rows])
            views = {"": last, "before: ": tokens[:, 0], "patches: ": tokens[:, 1:].mean(1)}
            seen = {name: model.visual_projection(view) for name, view in views.items()}
            banks = encode_texts(model, tokenizer, [text for bank in BANKS.values() for text in bank])
        scale, loss = model.logit_scale.exp().clamp(max=100), 0.0
        split = banks.float().split([len(bank) for bank in BANKS.values()])
        for name, view in seen.items():
            unit = F.normalize(view.float(), dim=-1)
            for fact, bank in zip(BANKS, split, strict=True):
                loss = loss + aspect_loss(unit, bank, wanted[fact][rows], scale, progress, name + fact)
        update(optimizer, loss, learning_rate(1.5e-3, progress.step, progress.done))
        progress.advance(loss)


def vision_tower(model: CLIPModel) -> CLIPVisionModel:
    """The vision tower alone."""
    vision = CLIPVisionModel(model.config.vision_config)
    getattr(vision, "vision_model", vision).load_state_dict(model.vision_model.state_dict())
    return vision


@torch.no_grad()
def gate_clip(model: CLIPVisionModel, learn: int = 1500, test: int = 700) -> dict[str, dict[str, float]]:
    """What a linear probe tells of held-out diagrams: "cls" or "patches" -> fact -> accuracy.

    The probe is a ridge regression on the tokens that ADEM-VL reads (CLS, or the mean of the patches), learnt from
    `learn` other diagrams.
    """
    rng = np.random.default_rng(GATE_SEED)
    diagrams = [make_diagram(rng) for _ in range(learn + test)]
    tower = getattr(model.eval(), "vision_model", model)
    tokens = torch.cat([see(tower, pictures(diagrams[i : i + 100]))[0] for i in range(0, len(diagrams), 100)])
    table: dict[str, dict[str, float]] = {}
    for name, features in (("cls", tokens[:, 0]), ("patches", tokens[:, 1:].mean(1))):
        x = F.pad(features.double(), (0, 1), value=1.0)
        table[name] = {}
        for fact, values in targets(diagrams).items():
            known = values >= 0
            first, second = known.clone(), known.clone()
            first[learn:], second[:learn] = False, False
            a, b = x[first], F.one_hot(values[first]).double()
            probe = torch.linalg.solve(a.T @ a + 1e-2 * torch.eye(x.shape[1]).double(), a.T @ b)
            table[name][fact] = float(((x[second] @ probe).argmax(1) == values[second]).double().mean())
    return table


# Language -----------------------------------------------------------------------------------------------------------


def new_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 0.6 M parameters with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._attn_implementation = "eager"  # on a CPU, twice as fast as SDPA with a mask of this kind
    return LlamaForCausalLM(config)


def text_batches(tokenizer, seed: int, size: int, bags: float = 0.5) -> Iterator[dict[str, Any]]:
    """Endless batches of `collate`, with `words` (token ids of what the image's position holds) and `kinds` by row.

    `marks` [B, S] are labels at the words of the choices: the right one is followed by its letter, as if somebody had
    ticked it, the others by what stands there. Learnt beside the answers, they show at once what is to be found out;
    without them thousands of steps go by before the answers' loss begins to fall.
    bags: the share of problems in whose image's place stands a bag of words; the others are problems without an image.
    kinds: "hint", "words" or "bag", and the fact asked about.
    """
    rng = np.random.default_rng(seed)
    while True:
        samples: list[Encoded] = []
        words: list[list[int]] = []
        kinds: list[str] = []
        answers: list[int] = []
        for _ in range(size):
            bag = rng.random() < bags
            problem = make_problem(rng, images=float(bag))
            style = PromptStyle(ORDERS[rng.integers(len(ORDERS))], captions=bool(rng.integers(2)))
            text = prompt(_row(problem), style)
            samples.append(encode(tokenizer, text, target(problem.record), has_image=bag, max_tokens=WINDOW))
            told = [*problem.diagram_facts.values()] + [problem.record["category"]] * int(rng.integers(2))
            words.append([tokenizer(f" {w}", add_special_tokens=False).input_ids[0] for w in told] if bag else [])
            answers.append(problem.record["answer"])
            kinds.append(f"{'bag' if bag else 'hint'}: {problem.fact}" if problem.fact else "words")
        batch = collate(samples, None, tokenizer.pad_token_id)
        yield batch | {"words": words, "kinds": kinds, "marks": _marks(tokenizer, batch, answers)}


def _marks(tokenizer, batch: dict[str, Tensor], answers: list[int]) -> Tensor:
    """Labels at the last token of each choice; answers: index of the right choice by row."""
    opening, closing = tokenizer(" ()", add_special_tokens=False).input_ids
    letters = letter_tokens(tokenizer, f"Response:{ANSWER_START}", LETTERS)
    marks = torch.full_like(batch["input_ids"], IGNORED)
    for row, answer in enumerate(answers):
        ends = torch.nonzero(batch["input_ids"][row] == closing)[:, 0] + 1  # every choice is one token
        marks[row, ends] = opening
        marks[row, ends[answer]] = letters[answer]
    return marks


def answer_logits(model: LlamaForCausalLM, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [M, vocabulary] and labels [M] of all answer tokens of a batch of `text_batches`, in row-major order.

    The third tensor is the loss of the marks.
    """
    table = model.get_input_embeddings().weight
    embeds = table[batch["input_ids"]]
    rows = [row for row, place in enumerate(batch["cls_position"].tolist()) if place != NO_CLS]
    if rows:
        held = torch.stack([table[batch["words"][row]].sum(0) for row in rows])
        embeds = embeds.index_put((torch.tensor(rows), batch["cls_position"][rows]), held)
    out = model.model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], use_cache=False)
    hidden, labels, marked = out.last_hidden_state, batch["labels"][:, 1:], batch["marks"] != IGNORED
    marks = F.cross_entropy(model.lm_head(hidden[marked]).float(), batch["marks"][marked])
    return model.lm_head(hidden[:, :-1][labels != IGNORED]), labels[labels != IGNORED], marks


def train_llama(model: LlamaForCausalLM, tokenizer, minutes: float, seed: int, batch: int = 64) -> None:
    """Training on the answers and the marks, until the CPU minutes are spent."""
    peak = 2e-3
    optimizer, progress = make_optimizer(model.parameters(), peak), Progress("text", minutes, 100)
    for texts in text_batches(tokenizer, seed, batch):
        with torch.autocast("cpu", torch.bfloat16):
            logits, labels, marks = answer_logits(model, texts)
        loss = F.cross_entropy(logits.float(), labels) + marks
        update(optimizer, loss, learning_rate(peak, progress.step, progress.done))
        for kind, right in right_answers(tokenizer, logits.detach(), labels, texts["kinds"]):
            progress.note(kind.split(":")[0], torch.tensor([right]))
        progress.advance(loss)
        if progress.done >= 1:
            return


def right_answers(tokenizer, logits: Tensor, labels: Tensor, kinds: list[str]) -> Iterator[tuple[str, bool]]:
    """(kind, whether the letter is right) of each row; the letter is the one answer token that is a letter's."""
    letters = torch.tensor(letter_tokens(tokenizer, f"Response:{ANSWER_START}", LETTERS))
    rows = torch.isin(labels, letters)
    return zip(kinds, (logits[rows].argmax(-1) == labels[rows]).tolist(), strict=True)


@torch.no_grad()
def gate_llama(model: LlamaForCausalLM, tokenizer, batches: int = 40) -> dict[str, float]:
    """ "hint: fact" and "bag: fact" -> share of the problems answered right, and of those about words."""
    model.eval()
    found: dict[str, list[bool]] = {}
    texts = text_batches(tokenizer, GATE_SEED, 64)
    for _ in range(batches):
        batch = next(texts)
        logits, labels, _ = answer_logits(model, batch)
        for kind, right in right_answers(tokenizer, logits, labels, batch["kinds"]):
            found.setdefault(kind, []).append(right)
    return {kind: float(np.mean(right)) for kind, right in sorted(found.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--part", choices=("all", "vision", "text"), default="all")
    parser.add_argument("--vision-minutes", type=float, default=8, help="CPU minutes of training")
    parser.add_argument("--text-minutes", type=float, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    if args.part in ("all", "text"):
        llama = new_llama(tokenizer)
        train_llama(llama, tokenizer, args.text_minutes, PRETRAIN_SEED)
        save(llama, tokenizer, args.out / "science_llama")
        print(json.dumps(gate_llama(llama, tokenizer), indent=1))
    if args.part in ("all", "vision"):
        clip = new_clip(tokenizer)
        train_clip(clip, tokenizer, args.vision_minutes, PRETRAIN_SEED)
        tower = vision_tower(clip)
        tower.half().save_pretrained(args.out / "science_clip", safe_serialization=True)
        print(json.dumps(gate_clip(tower.float()), indent=1))


if __name__ == "__main__":
    main()
