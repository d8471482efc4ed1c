"""Makes the built-in world's tiny X-CLIP: `python -m helpers.assets.make_tiny_xclip OUT_FOLDER`.

It is trained contrastively on captions: first its frame tower on what single frames show, then, with the frame tower
frozen, its multi-frame integration transformer (MIT) and its text tower on motion, counts and order, and on whole
sentences about a GIF. It never sees a question, nor the language model.

A phrase names one aspect of the scene. A picture is compared with all phrases of each aspect ("a red star" against the
35 other colours and shapes), so that each step has every hard negative. A sentence is one of the world's captions; it
is compared with all other GIFs of the step of which it is not true.
GIFs and texts come from seeds of their own, never from those of the training or test world.
"""

from __future__ import annotations

import argparse
import io
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, XCLIPConfig, XCLIPModel

from helpers.assets.pretraining import (
    Progress,
    aspect_loss,
    learning_rate,
    make_optimizer,
    save,
    train_tokenizer,
    update,
)
from helpers.corpora.captions import describe_in_detail, facts_of
from helpers.corpora.shapes import ACTIONS, COLORS, NUMBERS, PLACES, SHAPES, Scene, make_world, pick, write_gif
from helpers.gifs.decode import Limits, decode, sample_indices

PRETRAIN_SEED, GATE_SEED = 770_001, 990_001
FRAMES, SIZE, GROUPS = 16, 64, 4
TIMES = ("never", "once", "twice", *(f"{n} times" for n in ("three", "four", "five", "six", "seven", "eight")))
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


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over phrases and sentences; spells any text; the end token has the highest id, as X-CLIP needs."""
    scenes, _ = make_world(PRETRAIN_SEED, 400, "tokens")
    texts = [text for bank in (BANKS | LOOKS).values() for text in bank] + STEPS
    texts += [caption for scene in scenes for caption, _ in describe_in_detail(scene)]
    words = [*COLORS, *SHAPES, *SHAPES.values(), *PLACES, *ACTIONS, *NUMBERS, *range(11)]
    return train_tokenizer(texts + [f" {word}" for word in words] * 50, 768)


# X-CLIP -------------------------------------------------------------------------------------------------------------


def xclip_config(vocabulary: int, eos: int) -> XCLIPConfig:
    text = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 48,
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
        "mit_num_hidden_layers": 2,
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
        prompt_layers=0,  # no use is made of a text that depends on the video
    )


def new_xclip(tokenizer: PreTrainedTokenizerFast) -> XCLIPModel:
    """An X-CLIP of 1.1 M parameters with random weights; with the stock, smaller ones training starts much slower."""
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


def encode_videos(model: XCLIPModel, gifs: list[list[Tensor]]) -> Tensor:
    """Frame embeddings [T, D] of each group of each GIF -> unit embeddings [B, D]: the mean of its unit groups'."""
    lengths = torch.tensor([len(group) for groups in gifs for group in groups])
    x = torch.stack([F.pad(group, (0, 0, 0, FRAMES - len(group))) for groups in gifs for group in groups])
    each = F.normalize(encode_groups(model, x, torch.arange(FRAMES) < lengths[:, None])[1], dim=-1)
    means = [groups.mean(0) for groups in each.split([len(groups) for groups in gifs])]
    return F.normalize(torch.stack(means), dim=-1)


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
        found.append(torch.cat([encode_frames(model, run[None])[0] for run in runs_of_16]).half())
    model.train()
    return found


def sentence_loss(
    model, tokenizer, videos: Tensor, scenes: list[Scene], rng: np.random.Generator, scale: Tensor, progress: Progress
) -> Tensor:
    """InfoNCE both ways of unit video embeddings [B, D] and a caption each, blind to captions that are true of a GIF.

    Longer captions are drawn more often: there is more in them to learn.
    """
    told = []
    for scene in scenes:
        captions = describe_in_detail(replace(scene, seed=int(rng.integers(2**31))))
        told.append(captions[int(rng.choice(5, p=(0.08, 0.12, 0.25, 0.25, 0.3)))])
    texts = encode_texts(model, tokenizer, [caption for caption, _ in told])
    facts = [facts_of(scene) for scene in scenes]
    true = torch.tensor([[truth.issuperset(stated) for _, stated in told] for truth in facts])
    logits, own = scale * videos @ texts.T, torch.arange(len(scenes))
    logits = logits.masked_fill(true & ~torch.eye(len(scenes), dtype=torch.bool), -1e4)
    progress.note("sentence", logits.argmax(0) == own)
    return F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)


def train_motion(model, tokenizer, scenes, gifs, minutes: float, seed: int, rate: float) -> None:
    """Step two: MIT and text tower on frozen frame embeddings: motion, counts and order, and all the rest again.

    Sentences are about the groups of a step, as far as something happens in them, and about whole GIFs of several
    groups, whose embedding is the mean of their groups'.
    """
    features = frame_features(model, gifs)
    rng, batch, whole = np.random.default_rng(seed), 192, 40
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
        motion, hidden, steps, tellable = [], [], torch.full((batch, FRAMES), -1), []
        for row, owner in enumerate(owners):
            states = scenes[owner].states
            cut = _recut(rng, states) if rng.random() < 0.7 else pick(rng, cuts[owner])
            x[row, : len(cut)], masks[row, : len(cut)] = features[owner][cut].float(), True
            motion.append(_motion_targets([states[t] for t in cut]))
            steps[row, : len(cut)] = torch.tensor(_step_targets([states[t] for t in cut]))
            hidden.append(all(states[t] in ("blink", "flash") for t in cut))
            done = runs([states[t] for t in cut])
            if done and not hidden[-1]:
                blocks = tuple((action, done.count(action)) for action in dict.fromkeys(done))
                tellable.append((row, replace(scenes[owner], blocks=blocks)))
        tokens, pictures = encode_groups(model, x, masks)
        texts = [text for a in aspects for text in bank_of[a]]
        banks = encode_texts(model, tokenizer, texts + STEPS)
        tokens, pictures = F.normalize(tokens.float(), dim=-1), F.normalize(pictures.float(), dim=-1)
        banks, of_steps = banks.float().split([len(texts), len(STEPS)])
        scale = model.logit_scale.exp().clamp(max=100)
        loss = aspect_loss(tokens.flatten(0, 1), of_steps, steps.flatten(), scale, progress, "step")
        longest = [list(views(scenes[owner]).values())[-1] for owner in owners[:whole]]
        gif = [[features[owner][g].float() for g in view] for owner, view in zip(owners, longest, strict=False)]
        pictured = torch.cat([pictures[[row for row, _ in tellable]], encode_videos(model, gif)])
        described = [scene for _, scene in tellable] + [scenes[owner] for owner in owners[:whole]]
        loss = loss + 2 * sentence_loss(model, tokenizer, pictured, described, rng, scale, progress)
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
                loss = loss + 4 * F.cross_entropy(by_count, wanted[:, 1])
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


# Gates --------------------------------------------------------------------------------------------------------------


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
    share = {name: float(np.mean(right)) for name, right in found.items()}
    return share | _gate_sentences(model, tokenizer, scenes, features.float(), masks, owners)


def _gate_sentences(model, tokenizer, scenes, features, masks, owners) -> dict[str, float]:
    """Share of captions with a GIF of which they are true among the ten nearest, and the other way round."""
    gifs = []
    for number, scene in enumerate(scenes):
        mine = [row for row, owner in enumerate(owners) if owner == number]
        gifs.append([features[row][masks[row]] for row in mine[-len(list(views(scene).values())[-1]) :]])
    told = [caption for scene in scenes for caption in describe_in_detail(scene)]
    texts = [encode_texts(model, tokenizer, [c for c, _ in told[i : i + 500]]) for i in range(0, len(told), 500)]
    true = torch.tensor([[truth.issuperset(stated) for truth in map(facts_of, scenes)] for _, stated in told])
    scores = torch.cat(texts) @ encode_videos(model, gifs).T
    found = {}
    for name, near, relevant in (("text to video", scores, true), ("video to text", scores.T, true.T)):
        found[name] = relevant.gather(1, near.topk(10, dim=1).indices).any(1).float().mean().item()
    return found


# Command ------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--part", choices=("all", "frames", "motion"), default="all", help="motion goes on from OUT")
    parser.add_argument("--seed", type=int, default=PRETRAIN_SEED, help="of the GIFs; take another to go on")
    parser.add_argument("--gifs", type=int, default=4000, help="GIFs that each part learns from")
    parser.add_argument("--frame-minutes", type=float, default=20, help="CPU minutes of each part")
    parser.add_argument("--motion-minutes", type=float, default=17)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    folder, tokenizer = args.out / "xclip", make_tokenizer()
    model = new_xclip(tokenizer)
    if args.part == "motion":
        model.load_state_dict(load_file(folder / "model.safetensors"))
    else:
        scenes, _ = make_world(args.seed, args.gifs, "pretrain")
        train_frames(model, tokenizer, scenes, render(scenes), args.frame_minutes, args.seed, rate=1.5e-3)
        save(model, tokenizer, folder)
    if args.part != "frames":
        # Other GIFs, so that the MIT meets frame embeddings as they are on GIFs that the frame tower has not learned.
        seed = args.seed + 1
        scenes, _ = make_world(seed, args.gifs, "motion")
        train_motion(model, tokenizer, scenes, render(scenes), args.motion_minutes, seed, rate=1e-3)
        save(model, tokenizer, folder)
    held_out, _ = make_world(GATE_SEED, 300, "gate")
    print(json.dumps(gate_encoder(model, tokenizer, held_out, render(held_out)), indent=1))


if __name__ == "__main__":
    main()
