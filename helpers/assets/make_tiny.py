"""Makes the tiny backbones under helpers/assets/tiny: `python -m helpers.assets.make_tiny OUT_FOLDER`.

Two models that know the built-in world and have never met each other, as the full-size ones have not:

- an X-CLIP, trained contrastively on captions: first its frame tower on what single frames show, then, with the frame
  tower frozen, its multi-frame integration transformer (MIT) on motion, counts and order. It never sees a question.
- a Llama, trained on text alone: captions, storyboards (a word or a few words a frame) and questions about them.
  It never sees a GIF. Some of its positions hold several words at once (the sum of their embeddings), so that it has
  met positions that say more than one thing, as a video token does.

Every caption names one aspect of the scene. A picture is compared with all captions of each aspect ("a red star"
against the 35 other colours and shapes), so that each step has every hard negative.
GIFs and texts come from seeds of their own, never from those of the training or test world.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import combinations, permutations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, XCLIPConfig, XCLIPModel

from helpers.corpora.shapes import ACTIONS, COLORS, NUMBERS, PLACES, SHAPES, Scene, make_world, pick, write_gif
from helpers.gifs.decode import Limits, decode, sample_indices
from helpers.models.parts import IGNORED

PRETRAIN_SEED, GATE_SEED = 770_001, 990_001  # texts use the seeds that follow as well
FRAMES, SIZE, GROUPS = 16, 64, 4
PROMPT = "Question: {question}\nAnswer:"
TIMES = ("never", "once", "twice", *(f"{n} times" for n in ("three", "four", "five", "six", "seven", "eight")))
REST = "rest"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# Captions -----------------------------------------------------------------------------------------------------------


def _banks() -> dict[str, list[str]]:
    """Aspect -> all its captions. The order of each list is what the index functions below count in."""
    return {
        "subject": [f"a {color} {shape}" for color in COLORS for shape in SHAPES],
        "items": [f"{number} small {items}" for number in NUMBERS for items in SHAPES.values()],
        "item color": [f"small {color} {items}" for color in COLORS for items in SHAPES.values()],
        "place": [f"on the {place}" for place in PLACES],
        "state": ["it is resting", *(f"it is {doing}" for doing in ACTIONS.values())],
        "count": [f"{action} {times}" for action in ACTIONS for times in TIMES],
        "order": [f"{a} then {b}" for a, b in permutations(ACTIONS, 2)],
    }


BANKS = _banks()
# Captions of one frame as a part of the motion: rest, the start of an action, the rest of it.
STEPS = ["it rests", *(f"it starts to {a}" for a in ACTIONS), *(f"it is still {doing}" for doing in ACTIONS.values())]
ORDERS = list(permutations(ACTIONS, 2))
# Captions of one word's worth, so that shape and colour of a "red star" can also be read apart.
LOOKS = {
    "shape": [f"it is a {shape}" for shape in SHAPES],
    "color": [f"it is {color}" for color in COLORS],
    "item shape": [f"small {items}" for items in SHAPES.values()],
}


def _static_targets(scene: Scene) -> dict[str, int]:
    color, shape = list(COLORS).index(scene.color), list(SHAPES).index(scene.shape)
    item_color, item_shape = list(COLORS).index(scene.item_color), list(SHAPES).index(scene.item_shape)
    return {
        "subject": color * len(SHAPES) + shape,
        "items": (scene.items - 1) * len(SHAPES) + item_shape,
        "item color": item_color * len(SHAPES) + item_shape,
        "place": list(PLACES).index(scene.place),
        "shape": shape,
        "color": color,
        "item shape": item_shape,
    }


def _state_index(state: str | None) -> int:
    return 0 if state is None else 1 + list(ACTIONS).index(state)


def runs(states: list[str | None]) -> list[str]:
    """The actions in order, one entry for each time it is done: a run of equal states counts once."""
    return [now for before, now in zip([None, *states], states, strict=False) if now is not None and now != before]


def _step_targets(states: list[str | None]) -> list[int]:
    """For each frame, its caption in STEPS."""
    names = list(ACTIONS)
    return [
        0 if now is None else 1 + names.index(now) + (len(names) if now == before else 0)
        for before, now in zip([None, *states], states, strict=False)
    ]


def _motion_targets(states: list[str | None]) -> dict:
    done = runs(states)
    blocks = [a for a, b in zip(done, [None, *done], strict=False) if a != b]
    counts = {action: min(done.count(action), len(TIMES) - 1) for action in ACTIONS}
    return {"counts": counts, "order": ORDERS.index(tuple(blocks)) if len(blocks) == 2 else None}


# Data ---------------------------------------------------------------------------------------------------------------


def _frames_of(scene: Scene) -> np.ndarray:
    """All frames of the scene's GIF file, as the suite decodes them: uint8 [N, 64, 64, 3]."""
    file = io.BytesIO()
    write_gif(scene, file)
    return decode(file.getvalue(), image_size=SIZE, groups=(GROUPS,), frames_per_group=FRAMES, limits=Limits()).frames


def render(scenes: list[Scene], workers: int = 2) -> list[np.ndarray]:
    """Decoded frames of every scene's GIF."""
    with ProcessPoolExecutor(workers) as pool:
        return list(tqdm(pool.map(_frames_of, scenes, chunksize=16), total=len(scenes), desc="GIFs", mininterval=10))


def views(scene: Scene) -> dict[int, list[list[int]]]:
    """Group count -> groups of frame indices, for each number of groups that shows this GIF differently."""
    found = {}
    for groups in range(1, GROUPS):
        indices = sample_indices(scene.durations_ms, groups, FRAMES)
        found[groups] = [indices[i : i + FRAMES] for i in range(0, len(indices), FRAMES)]
        if len(scene.states) <= FRAMES * groups:
            break
    return found


def train_tokenizer(texts: list[str], vocabulary: int, controls: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `vocabulary` tokens learnt from `texts`; the end token has the highest id.

    controls: further special tokens, such as those of a chat template.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 1, special_tokens=["<pad>", "<bos>", *controls], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(["<eos>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the world's texts; spells any text; the end token has the highest id, as X-CLIP needs."""
    scenes, questions = make_world(PRETRAIN_SEED, 400, "tokens")
    texts = [text for bank in BANKS.values() for text in bank] + questions["question"].tolist()
    texts += [f" {answer}" for answer in questions["answer"]] + [narrate(np.random.default_rng(0), s) for s in scenes]
    texts += [PROMPT.format(question=q) for q in questions["question"]]
    words = [*COLORS, *SHAPES, *SHAPES.values(), *PLACES, *ACTIONS, *NUMBERS, *range(11), REST, "time", "times"]
    texts += [f" {word}" for word in words] * 50
    return train_tokenizer(texts, 768)


# X-CLIP -------------------------------------------------------------------------------------------------------------


def xclip_config(vocabulary: int, eos: int) -> XCLIPConfig:
    text = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "bos_token_id": 1,
        "eos_token_id": eos,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 96,
        "intermediate_size": 288,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "mit_hidden_size": 128,
        "mit_intermediate_size": 384,
        "mit_num_hidden_layers": 3,
        "mit_num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": 8,
        "num_frames": FRAMES,
        "drop_path_rate": 0.0,
    }
    return XCLIPConfig(
        text_config=text,
        vision_config=vision,
        projection_dim=128,
        prompt_layers=1,
        prompt_num_attention_heads=4,
        prompt_attention_dropout=0.0,
        prompt_projection_dropout=0.0,
    )


def new_xclip(tokenizer: PreTrainedTokenizerFast) -> XCLIPModel:
    """An X-CLIP of 1.3 M parameters with random weights; with the stock, smaller ones training starts much slower."""
    model = XCLIPModel(xclip_config(len(tokenizer), tokenizer.eos_token_id))
    torch.nn.init.normal_(model.text_model.embeddings.token_embedding.weight, std=0.3)
    torch.nn.init.normal_(model.text_model.embeddings.position_embedding.weight, std=0.1)
    torch.nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=0.1)
    torch.nn.init.normal_(model.mit.position_embedding, std=0.1)
    return model


def encode_texts(model: XCLIPModel, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Unit caption embeddings [K, D]."""
    tokens = tokenizer([text + "<eos>" for text in texts], return_tensors="pt", padding=True)
    hidden = model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
    return F.normalize(model.text_projection(hidden), dim=-1)


def encode_frames(model: XCLIPModel, frames: Tensor) -> Tensor:
    """uint8 [B, T, H, W, 3] of unpadded groups of T frames -> frame embeddings [B, T, D]."""
    batch, count = frames.shape[:2]
    for layer in model.vision_model.encoder.layers:
        layer.num_frames = count
    pixels = frames.flatten(0, 1).permute(0, 3, 1, 2).float() / 255
    pixels = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    pooled = model.vision_model(pixel_values=pixels).pooler_output
    for layer in model.vision_model.encoder.layers:
        layer.num_frames = FRAMES
    return model.visual_projection(pooled).view(batch, count, -1)


def encode_groups(model: XCLIPModel, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Frame embeddings [B, T, D] and mask [B, T] -> the masked MIT's tokens [B, T, D] and video embeddings [B, D]."""
    keys = torch.zeros(mask.shape, dtype=x.dtype).masked_fill(~mask, torch.finfo(x.dtype).min)[:, None, None, :]
    positions = model.mit.position_embedding[:, : x.shape[1]]
    hidden = model.mit.encoder(inputs_embeds=x + positions, attention_mask=keys).last_hidden_state
    hidden = (hidden + x) * mask[..., None]
    return hidden, hidden.sum(1) / mask.sum(1, keepdim=True)


def learning_rate(peak: float, step: int, done: float) -> float:
    """Learning rate after 200 steps of warm-up and a share `done` of a cosine to 1 % of the peak."""
    return peak * min(1, (step + 1) / 200) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizer(parameters, rate: float) -> torch.optim.Optimizer:
    parameters = [p for p in parameters if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05}]
    groups.append({"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))


def update(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


class Progress:
    """Share of the CPU minutes that is spent, and a line with recent accuracies every so many steps."""

    def __init__(self, name: str, minutes: float, every: int) -> None:
        self.name, self.seconds, self.every = name, 60 * minutes, every
        self.started, self.step, self.done = time.process_time(), 0, 0.0
        self.shown: dict[str, list[float]] = {}

    def note(self, kind: str, right: Tensor) -> None:
        if right.numel():
            self.shown.setdefault(kind, []).append(right.float().mean().item())

    def advance(self, loss: Tensor) -> None:
        self.step, self.done = self.step + 1, (time.process_time() - self.started) / self.seconds
        if self.step % self.every == 0:
            accuracy = {k: round(float(np.mean(v[-self.every :])), 3) for k, v in sorted(self.shown.items())}
            print(
                f"{self.name}: {100 * self.done:3.0f} %, step {self.step}, loss {loss.item():.3f}, {accuracy}",
                flush=True,
            )


def aspect_loss(
    pictures: Tensor, bank: Tensor, targets: Tensor, scale: Tensor, progress: Progress, aspect: str
) -> Tensor:
    keep = targets >= 0
    logits = scale * pictures[keep] @ bank.T
    progress.note(aspect, logits.argmax(-1) == targets[keep])
    return F.cross_entropy(logits, targets[keep])


def train_frames(model, tokenizer, scenes, gifs, minutes: float, seed: int, rate: float, batch: int = 128) -> None:
    """Step one: every frame against the captions of what it shows, in groups of 1, 4 or 16 frames.

    The frames of a group come from different GIFs, so that a frame's embedding tells of that frame: messages from the
    others are of no use. Step two may then put frames together as it likes.
    """
    rng = np.random.default_rng(seed)
    for module in (model.vision_model, model.visual_projection, model.text_model, model.text_projection):
        module.requires_grad_(True)
    modules = (model.vision_model, model.visual_projection, model.text_model, model.text_projection)
    optimizer = make_optimizer([p for m in modules for p in m.parameters()] + [model.logit_scale], rate)
    aspects = ("subject", "items", "item color", "place", "state")
    static = [_static_targets(scene) for scene in scenes]
    progress = Progress("frames", minutes, 100)
    while progress.done < 1:
        count = int(rng.choice([1, 4, 16], p=[0.5, 0.3, 0.2]))
        picked = [(int(i), int(rng.integers(len(gifs[i])))) for i in rng.integers(len(scenes), size=batch)]
        frames = torch.from_numpy(np.stack([gifs[i][t] for i, t in picked])).unflatten(0, (-1, count))
        targets = {aspect: [] for aspect in aspects}
        for i, t in picked:
            state = scenes[i].states[t]
            seen = static[i] | {"state": _state_index(state)}
            seen["subject"] = -1 if state in ("blink", "flash") else seen["subject"]
            for aspect in aspects:
                targets[aspect].append(seen[aspect])
        with torch.autocast("cpu", torch.bfloat16):
            pictures = encode_frames(model, frames).flatten(0, 1)
            banks = encode_texts(model, tokenizer, [text for a in aspects for text in BANKS[a]])
        pictures, banks = F.normalize(pictures.float(), dim=-1), banks.float()
        scale, loss = model.logit_scale.exp().clamp(max=100), 0.0
        for aspect, bank in zip(aspects, banks.split([len(BANKS[a]) for a in aspects]), strict=True):
            loss = loss + aspect_loss(pictures, bank, torch.tensor(targets[aspect]), scale, progress, aspect)
        update(optimizer, loss, learning_rate(rate, progress.step, progress.done))
        progress.advance(loss)


@torch.no_grad()
def group_features(model, scenes, gifs) -> tuple[Tensor, Tensor, list[int], list[list[str | None]]]:
    """Frozen frame embeddings of every group of every view: [G, 16, D], mask, scene numbers, states."""
    features, masks, owners, states = [], [], [], []
    model.eval()
    for number, scene in enumerate(tqdm(scenes, desc="frame embeddings", mininterval=10)):
        for group in (g for view in views(scene).values() for g in view):
            frames = torch.from_numpy(gifs[number][group])[None]
            with torch.autocast("cpu", torch.bfloat16):
                x = encode_frames(model, frames)[0].float()
            features.append(F.pad(x, (0, 0, 0, FRAMES - len(group))).half())
            masks.append(torch.arange(FRAMES) < len(group))
            owners.append(number)
            states.append([scene.states[t] for t in group])
    model.train()
    return torch.stack(features), torch.stack(masks), owners, states


def _recut(rng: np.random.Generator, states: list[str | None]) -> list[int]:
    """Up to 16 frame numbers of a GIF in a new order that tells another story: rests, and runs of one to three actions.

    Frames of one state look alike wherever they stand, so a few thousand GIFs make as many motions as there are steps.
    """
    places = {state: [t for t, s in enumerate(states) if s == state] for state in set(states)}
    actions = [state for state in places if state is not None]
    length = FRAMES if rng.random() < 0.7 else int(rng.integers(4, FRAMES))
    slowest = int(rng.integers(1, 4))
    story: list[str | None] = [None] * int(rng.integers(0, slowest + 1))
    for action in rng.permutation(len(actions))[: int(rng.integers(1, len(actions) + 1))]:
        for _ in range(int(rng.integers(1, 9))):
            story += [actions[action]] * int(rng.integers(1, slowest + 1))
            story += [None] * int(rng.integers(1, slowest + 1))
    start = int(rng.integers(max(1, len(story) - length + 1)))
    return [places[state][int(rng.integers(len(places[state])))] for state in story[start : start + length]]


@torch.no_grad()
def frame_features(model: XCLIPModel, gifs: list[np.ndarray]) -> list[Tensor]:
    """Frozen embeddings of all frames of each GIF, [N, D] in fp16, encoded in runs of 16."""
    model.eval()
    found = []
    for frames in tqdm(gifs, desc="frame embeddings", mininterval=10):
        runs_of_16 = torch.from_numpy(frames).split(FRAMES)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(torch.cat([encode_frames(model, run[None])[0] for run in runs_of_16]).half())
    model.train()
    return found


def train_motion(model, tokenizer, scenes, gifs, minutes: float, seed: int, rate: float) -> None:
    """Step two: MIT and text tower on frozen frame embeddings: motion, counts and order, and all the rest again."""
    features = frame_features(model, gifs)
    rng, batch = np.random.default_rng(seed), 256
    model.vision_model.requires_grad_(False)
    model.visual_projection.requires_grad_(False)
    modules = (model.mit, model.text_model, model.text_projection)
    optimizer = make_optimizer([p for m in modules for p in m.parameters()] + [model.logit_scale], rate)
    static = [_static_targets(scene) for scene in scenes]
    cuts = [[g for view in views(scene).values() for g in view] for scene in scenes]
    bank_of = BANKS | LOOKS
    aspects = ("subject", "items", "item color", "place", "shape", "color", "item shape", "count", "order")
    names, times = list(ACTIONS), len(TIMES)
    progress = Progress("motion", minutes, 200)
    while progress.done < 1:
        owners = rng.integers(len(scenes), size=batch)
        x, masks = torch.zeros(batch, FRAMES, model.config.projection_dim), torch.zeros(batch, FRAMES, dtype=torch.bool)
        motion, hidden, steps = [], [], torch.full((batch, FRAMES), -1)
        for row, owner in enumerate(owners):
            states = scenes[owner].states
            cut = _recut(rng, states) if rng.random() < 0.7 else pick(rng, cuts[owner])
            x[row, : len(cut)], masks[row, : len(cut)] = features[owner][cut].float(), True
            motion.append(_motion_targets([states[t] for t in cut]))
            steps[row, : len(cut)] = torch.tensor(_step_targets([states[t] for t in cut]))
            hidden.append(all(states[t] in ("blink", "flash") for t in cut))
        with torch.autocast("cpu", torch.bfloat16):
            tokens, pictures = encode_groups(model, x, masks)
            texts = [text for a in aspects for text in bank_of[a]]
            banks = encode_texts(model, tokenizer, texts + STEPS)
        tokens, pictures = F.normalize(tokens.float(), dim=-1), F.normalize(pictures.float(), dim=-1)
        banks, of_steps = banks.float().split([len(texts), len(STEPS)])
        scale = model.logit_scale.exp().clamp(max=100)
        loss = aspect_loss(tokens.flatten(0, 1), of_steps, steps.flatten(), scale, progress, "step")
        for aspect, bank in zip(aspects, banks.split([len(bank_of[a]) for a in aspects]), strict=True):
            if aspect == "count":
                # For each action that occurs, and one that does not: its count against the other counts; and for the
                # count that it has, the action against the other actions with that count.
                rows, wanted = [], []
                for row, told in enumerate(motion):
                    counts = told["counts"]
                    absent = [a for a in names if not counts[a]]
                    for action in [a for a in names if counts[a]] + [absent[int(rng.integers(len(absent)))]]:
                        rows.append(row)
                        wanted.append((names.index(action), counts[action]))
                rows, wanted = torch.tensor(rows), torch.tensor(wanted)
                logits = (scale * pictures @ bank.T).view(batch, len(names), times)[rows]
                each = torch.arange(len(rows))
                by_count = logits[each, wanted[:, 0]]
                loss = loss + 2 * F.cross_entropy(by_count, wanted[:, 1])
                progress.note(aspect, by_count.argmax(-1) == wanted[:, 1])
                occurs = wanted[:, 1] > 0
                by_action = logits[each, :, wanted[:, 1]]
                same = torch.tensor([[motion[r]["counts"][a] for a in names] for r in rows.tolist()])
                rivals = (same == wanted[:, 1:]) & (torch.arange(len(names)) != wanted[:, :1])
                by_action = by_action.masked_fill(rivals, -1e4)
                loss = loss + F.cross_entropy(by_action[occurs], wanted[occurs, 0])
                continue
            if aspect == "order":
                target = [-1 if told["order"] is None else told["order"] for told in motion]
            else:
                target = [static[owner][aspect] for owner in owners]
                if aspect in ("subject", "shape", "color"):
                    target = [-1 if unseen else t for unseen, t in zip(hidden, target, strict=True)]
            loss = loss + aspect_loss(pictures, bank, torch.tensor(target), scale, progress, aspect)
        update(optimizer, loss, learning_rate(rate, progress.step, progress.done))
        progress.advance(loss)


# Llama --------------------------------------------------------------------------------------------------------------


def _caption(rng: np.random.Generator, scene: Scene) -> str:
    items = scene.item_shape if scene.items == 1 else SHAPES[scene.item_shape]
    parts = [f"{NUMBERS[scene.items - 1]} small {scene.item_color} {items}", f"on the {scene.place}"]
    parts = [f"a {scene.color} {scene.shape}", *rng.permutation(parts).tolist()]
    return f" {' '.join(parts)} ."


def narrate(rng: np.random.Generator, scene: Scene) -> str:
    """What happens, in words: " it will jump four times then it will blink once ."."""
    times = {1: "once", 2: "twice"}
    told = [f"it will {a} {times.get(n) or f'{n} times'}" for a, n in scene.blocks]
    if rng.random() < 0.5:
        told = [f"it will {a} {'1 time' if n == 1 else f'{n} times'}" for a, n in scene.blocks]
    return f" {' then '.join(told)} ."


_IDS: dict[str, list[int]] = {}


def token_ids(tokenizer, text: str) -> list[int]:
    """Token ids of a text without special tokens; remembered, since the same few texts come again and again."""
    if text not in _IDS:
        _IDS[text] = tokenizer(text, add_special_tokens=False).input_ids
    return _IDS[text]


def _story(rng, tokenizer, scene: Scene, style: str, whole: float) -> tuple[list[list[int]], list[int]]:
    """A text about the scene as positions; each position is a bag of token ids (of one id in plain text).

    Also what each position foretells (IGNORED: nothing): in plain text the next token; in bags, where the subject
    acts, how often it has done so by then, which teaches counting as one counts on the fingers.
    A share `whole` of the stories tell all frames; the others only 16, in which some actions may be missed.
    """

    def plain(text):
        return [[i] for i in token_ids(tokenizer, text)]

    def bag(words):
        return [i for word in words for i in token_ids(tokenizer, f" {word}")]

    if style == "caption":
        parts = [_caption(rng, scene), narrate(rng, scene)]
        return _plain([p for text in rng.permutation(parts) for p in plain(str(text))])
    groups = list(views(scene).values())[-1 if rng.random() < whole else 0]
    story = plain(_caption(rng, scene)) if style == "storyboard" else []
    items = SHAPES[scene.item_shape] if rng.random() < 0.8 else scene.item_shape
    static = [NUMBERS[scene.items - 1], scene.item_color, items, scene.place]
    keep = rng.uniform(0.3, 1)
    tallies, told, before = [], dict.fromkeys(ACTIONS, 0), None
    for group in groups:
        for frame in group:
            state = scene.states[frame]
            if style == "storyboard":
                story += plain(f" {state or REST}")
                continue
            if state is not None and state != before:
                told[state] += 1
            tallies.append(token_ids(tokenizer, f" {told[state]}")[0] if state else IGNORED)
            before = state
            words = [state or REST]
            looks = [] if state == "blink" else [scene.shape] if state == "flash" else [scene.color, scene.shape]
            words += [w for w in looks if rng.random() < keep]
            words += [scene.place] if rng.random() < 0.2 else []
            story.append(bag(words))
        if style == "bags":
            story.append(bag(static + [w for w in (scene.color, scene.shape) if rng.random() < 0.5]))
            tallies.append(IGNORED)
    return (story, tallies) if style == "bags" else _plain(story)


def _plain(story: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    return story, [ids[0] for ids in story[1:]] + [IGNORED]


def _share_a_word(scene: Scene) -> bool:
    return any(set(a.split()) & set(b.split()) for (a, _), (b, _) in combinations(scene.blocks, 2))


def lm_batches(
    tokenizer,
    seed: int,
    size: int,
    styles: dict[str, float],
    whole: float = 0.9,
    looks: float = 1.0,
    apart: float = 1.0,
    every_count: bool = False,
):
    """Endless batches of stories with their questions: see `_pack`.

    `looks`: share of the questions about looks that is asked; `apart`: share of the scenes told in which no two actions
    share a word; `every_count`: ask how often each action is done, not only the one that the world asks for.
    """
    rng, number = np.random.default_rng(seed), 0
    names, weights = list(styles), np.array(list(styles.values()))
    weights = weights / weights.sum()
    while True:
        scenes, questions = make_world(seed + number, 1024, "text")
        number += 1
        asked = dict(iter(questions.groupby("gif", sort=False)))
        told = [s for s in scenes if _share_a_word(s) or rng.random() < apart]
        order = rng.permutation(len(told))
        for start in range(0, len(order) - size + 1, size):
            batch = []
            for scene in (told[i] for i in order[start : start + size]):
                story, foretold = _story(rng, tokenizer, scene, str(rng.choice(names, p=weights)), whole)
                pairs = []
                for row in asked[scene.name].itertuples():
                    if row.task == "frameqa" and rng.random() > looks:
                        continue
                    answer = str(max(row.label, 1)) if row.task == "count" else row.answer
                    pairs.append((row.question, answer, row.type or row.task))
                for action, times in scene.blocks if every_count else ():
                    pairs.append((f"How many times does the {scene.shape} {action} ?", str(times), "count"))
                batch.append((story, foretold, pairs))
            yield _pack(tokenizer, batch)


def _pack(tokenizer, batch) -> dict:
    """One sequence a story, [BOS] story question answer question answer ..., each pair blind to the other pairs.

    `bags` int [B, L, K] (token ids, padded with 0), `weights` [B, L, K], `mask` bool [B, L, L], `positions` [B, L],
    `labels` int [B, L] (what the position before foretells; -100: nothing), `kinds`: a list a row of (position,
    length, kind of question) of its answers.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    rows = []
    for story, foretold, pairs in batch:
        bags = [[bos], *story]
        blocks, labels, positions = [0] * len(bags), [IGNORED, IGNORED, *foretold[:-1]], list(range(len(bags)))
        told, kinds, last = len(bags), [], foretold[-1]
        for block, (question, answer, kind) in enumerate(pairs, 1):
            prompt = token_ids(tokenizer, PROMPT.format(question=question))
            reply = [*token_ids(tokenizer, f" {answer}"), eos]
            kinds.append((len(bags) + len(prompt), len(reply), kind))
            bags += [[i] for i in prompt + reply]
            labels += [last] + [IGNORED] * (len(prompt) - 1) + reply
            last = IGNORED
            blocks += [block] * (len(prompt) + len(reply))
            positions += list(range(told, told + len(prompt) + len(reply)))
        rows.append((bags, labels, blocks, positions, kinds))
    length, width = max(len(r[0]) for r in rows), max(len(b) for r in rows for b in r[0])
    out = {
        "bags": np.zeros((len(rows), length, width), np.int64),
        "weights": np.zeros((len(rows), length, width), np.float32),
        "labels": np.full((len(rows), length), IGNORED, np.int64),
        "positions": np.zeros((len(rows), length), np.int64),
    }
    blocks = np.full((len(rows), length), -1, np.int64)
    for n, (bags, labels, block, positions, _) in enumerate(rows):
        for t, ids in enumerate(bags):
            out["bags"][n, t, : len(ids)] = ids
            out["weights"][n, t, : len(ids)] = 1
        out["labels"][n, : len(labels)] = labels
        out["positions"][n, : len(positions)] = positions
        blocks[n, : len(block)] = block
    same = blocks[:, :, None] == blocks[:, None, :]
    mask = (same | (blocks[:, None, :] == 0)) & np.tril(np.ones((length, length), bool))
    mask |= np.eye(length, dtype=bool)
    packed = {key: torch.from_numpy(value) for key, value in out.items()}
    return packed | {"mask": torch.from_numpy(mask), "kinds": [r[4] for r in rows]}


def lm_forward(model: LlamaForCausalLM, packed: dict) -> Tensor:
    """Logits [B, L, V]."""
    table = model.get_input_embeddings().weight
    embeds = (table[packed["bags"]] * packed["weights"][..., None]).sum(2)
    mask = torch.zeros(packed["mask"].shape).masked_fill(~packed["mask"], -1e9)[:, None]
    return model(inputs_embeds=embeds, attention_mask=mask, position_ids=packed["positions"], use_cache=False).logits


def lm_accuracy(logits: Tensor, packed: dict) -> dict[str, list[float]]:
    """Kind of question -> 1.0 or 0.0 a question, for the whole answer including its end."""
    guess = logits.argmax(-1)
    found: dict[str, list[float]] = {}
    for row, kinds in enumerate(packed["kinds"]):
        for start, length, kind in kinds:
            wanted = packed["labels"][row, start : start + length]
            right = bool((guess[row, start - 1 : start + length - 1] == wanted).all())
            found.setdefault(kind, []).append(float(right))
    return found


LM_STYLES = {"caption": 0.15, "storyboard": 0.25, "bags": 0.6}
# What the loss gives to the answers of a question; counting is the hardest to learn.
LM_WEIGHTS = {"count": 3.0, "action": 2.0}


def new_language_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
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
    )
    config._attn_implementation = "eager"  # on a CPU, several times as fast as SDPA with a mask of this kind
    return LlamaForCausalLM(config)


def train_language_model(model, tokenizer, minutes: float, seed: int, rate: float, batch: int = 32) -> None:
    """Language modelling of stories, and above all of the answers to questions about them."""
    optimizer = make_optimizer(model.parameters(), rate)
    progress = Progress("text", minutes, 100)
    # To count "slide left" where the subject also slides right is the hardest to learn, and such scenes are rare.
    for packed in lm_batches(tokenizer, seed, batch, LM_STYLES, looks=0.5, apart=0.05, every_count=True):
        with torch.autocast("cpu", torch.bfloat16):
            logits = lm_forward(model, packed)
        labels = packed["labels"][:, 1:]
        losses = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels.flatten(), reduction="none")
        text = packed["labels"] == packed["bags"][..., 0]  # the others are tallies and answers
        weight = torch.where(packed["labels"] == IGNORED, 0.0, torch.where(text, 0.05, 0.3))
        for row, kinds in enumerate(packed["kinds"]):
            for start, length, kind in kinds:
                weight[row, start : start + length] = LM_WEIGHTS.get(kind, 1.0)
        weight = weight[:, 1:].flatten()
        loss = (losses * weight).sum() / weight.sum()
        update(optimizer, loss, learning_rate(rate, progress.step, progress.done))
        for kind, right in lm_accuracy(logits.detach(), packed).items():
            progress.note(kind, torch.tensor(right))
        progress.advance(loss)
        if progress.done >= 1:
            return


# Gates --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def gate_language_model(model, tokenizer, scenes: int = 300) -> dict[str, dict[str, float]]:
    """Style of text -> kind of question -> share answered right, on scenes of a seed of their own."""
    model.eval()
    table = {}
    for style in LM_STYLES:
        found: dict[str, list[float]] = {}
        batches = lm_batches(tokenizer, GATE_SEED, 50, {style: 1.0}, whole=1.0)
        for _ in range(scenes // 50):
            packed = next(batches)
            for kind, right in lm_accuracy(lm_forward(model, packed), packed).items():
                found.setdefault(kind, []).extend(right)
        table[style] = {kind: float(np.mean(right)) for kind, right in sorted(found.items())}
    return table


@torch.no_grad()
def gate_encoder(model, tokenizer, scenes: list[Scene], gifs: list[np.ndarray]) -> dict[str, float]:
    """Attribute -> share of groups whose own caption beats all captions that differ in that attribute alone."""
    model.eval()
    features, masks, owners, states = group_features(model, scenes, gifs)
    model.eval()
    pictures = F.normalize(encode_groups(model, features.float(), masks)[1], dim=-1)
    scores = {aspect: pictures @ encode_texts(model, tokenizer, bank).T for aspect, bank in BANKS.items()}
    found: dict[str, list[bool]] = {}
    n = len(SHAPES)
    for row, (owner, shown) in enumerate(zip(owners, states, strict=True)):
        target, motion = _static_targets(scenes[owner]), _motion_targets(shown)

        def check(name, aspect, rivals, wanted, row=row):
            scored = scores[aspect][row, list(rivals)]
            found.setdefault(name, []).append(list(rivals)[int(scored.argmax())] == wanted)

        if not all(s in ("blink", "flash") for s in shown):
            color, shape = divmod(target["subject"], n)
            check("object", "subject", range(color * n, color * n + n), target["subject"])
            check("color", "subject", range(shape, len(COLORS) * n, n), target["subject"])
        number, item = divmod(target["items"], n)
        check("number", "items", range(item, len(NUMBERS) * n, n), target["items"])
        check("item object", "items", range(number * n, number * n + n), target["items"])
        check("item color", "item color", range(item, len(COLORS) * n, n), target["item color"])
        check("location", "place", range(len(PLACES)), target["place"])
        for a, (action, count) in enumerate(motion["counts"].items()):
            if count:
                wanted = a * len(TIMES) + count
                check("count", "count", range(a * len(TIMES), (a + 1) * len(TIMES)), wanted)
                rivals = [i for i, x in enumerate(ACTIONS) if motion["counts"][x] != count or x == action]
                check("motion", "count", [i * len(TIMES) + count for i in rivals], wanted)
        if motion["order"] is not None:
            a, b = ORDERS[motion["order"]]
            rivals = [i for i, (x, y) in enumerate(ORDERS) if x == a or y == b or (x, y) == (b, a)]
            check("order", "order", rivals, motion["order"])
    return {name: float(np.mean(right)) for name, right in found.items()}


# Command ------------------------------------------------------------------------------------------------------------


def save(model, tokenizer, folder: Path) -> None:
    """fp16 weights as safetensors, config and tokenizer."""
    model.half().save_pretrained(folder, safe_serialization=True)
    model.float()
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--part", choices=("all", "frames", "motion", "text"), default="all")
    parser.add_argument("--go-on", action="store_true", help="start from OUT's weights rather than from random ones")
    parser.add_argument("--gifs", type=int, default=8000, help="GIFs that each step of the encoder learns from")
    parser.add_argument("--frame-minutes", type=float, default=50, help="CPU minutes of each step")
    parser.add_argument("--motion-minutes", type=float, default=35)
    parser.add_argument("--text-minutes", type=float, default=80)
    parser.add_argument("--seed", type=int, default=PRETRAIN_SEED, help="of GIFs and texts; take another to go on")
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    peak = 1.0 if not args.go_on else 0.5
    if args.part in ("all", "text"):
        folder = args.out / "llama"
        model = new_language_model(tokenizer)
        if args.go_on:
            model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        train_language_model(model, tokenizer, args.text_minutes, args.seed, rate=2e-3 * peak)
        save(model, tokenizer, folder)
        print(json.dumps(gate_language_model(model, tokenizer), indent=1))
    folder = args.out / "xclip"
    model = new_xclip(tokenizer)
    if args.go_on or args.part == "motion":
        # Not strict: a model with fewer layers than today's goes on with new ones on top.
        model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    if args.part in ("all", "frames"):
        scenes, _ = make_world(args.seed, args.gifs, "pretrain")
        train_frames(model, tokenizer, scenes, render(scenes), args.frame_minutes, args.seed, rate=1.5e-3 * peak)
        save(model, tokenizer, folder)
    if args.part in ("all", "motion"):
        # Other GIFs, so that the MIT meets frame embeddings as they are on GIFs that the frame tower has not learned.
        scenes, _ = make_world(args.seed + 1, args.gifs, "motion")
        train_motion(model, tokenizer, scenes, render(scenes), args.motion_minutes, args.seed + 1, rate=1e-3)
        save(model, tokenizer, folder)
    if args.part != "text":
        held_out, _ = make_world(GATE_SEED, 300, "gate")
        print(json.dumps(gate_encoder(model, tokenizer, held_out, render(held_out)), indent=1))


if __name__ == "__main__":
    main()
