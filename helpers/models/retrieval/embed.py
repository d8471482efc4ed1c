"""Embeddings out of a video-language model: of its video tokens and of texts, before and after the language model.

*Before* is what the language model is given: projected video tokens, input embeddings of a text. *After* are hidden
states at the same places. The attention is causal, so that one of them knows only what stands in front of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from helpers.models.parts import inference, token_batches
from helpers.models.retrieval.pooling import pool
from helpers.models.text import text_tokens

if TYPE_CHECKING:
    from helpers.models.gif_qa.model import GifQAModel
    from helpers.store.features import FeatureTable

BEFORE, LAST = "before", "last"
Layer = int | str  # BEFORE; 1, 2, ...: behind so many layers; LAST: behind all of them and the final norm
Embeddings = dict[tuple[Layer, str], Any]  # by layer and pooling: [N, H], or N times [L_i, H] for pooling "none"
PLAIN = {"input_ids", "inputs_embeds", "attention_mask"}


# ---- Any model -----------------------------------------------------------------------------------------------------


def all_layers(model: nn.Module) -> list[Layer]:
    """Every layer that `token_states` can read of a model: "before", 1, 2, ..., "last"."""
    return [BEFORE, *range(1, _own(model).get_decoder().config.num_hidden_layers), LAST]


def token_states(
    model: nn.Module,
    inputs: Mapping[str, Any],
    positions: Tensor,
    layers: Sequence[Layer] = (LAST,),
    poolings: Sequence[str] = ("mean",),
) -> Embeddings:
    """Pool what stands at `positions` [B, S] of a batch, in every layer and every way that is asked for.

    model: a causal language model of transformers, with an adapter or not, or a video model around one. inputs: what
    its forward takes, for example inputs_embeds with attention_mask, or all that a video model's processor gives;
    padding may stand on either side. One forward pass, without gradient, dropout or the head. Returns, by (layer,
    pooling), float32 [B, H], or for "none" B tensors [L_i, H]. Layers are "before", numbers from 1 on, and "last":
    behind the final norm, as the layer of the highest number is. Raises ValueError for a layer that the model lacks.
    """
    model = _own(model)
    decoder, seen = model.get_decoder(), {}
    known = {*all_layers(model), decoder.config.num_hidden_layers}
    if unknown := [layer for layer in layers if layer not in known]:
        raise ValueError(
            f"the language model has no layer {unknown[0]!r}: ask for {BEFORE!r}, 1 to "
            f"{decoder.config.num_hidden_layers}, or {LAST!r}"
        )
    inputs = dict(inputs)
    if inputs.keys() <= PLAIN and inputs.get("attention_mask") is not None:
        # positions count from a row's first token, wherever padding stands; a video model finds its own
        inputs["position_ids"] = (inputs["attention_mask"].long().cumsum(1) - 1).clamp(min=0)

    def note(_module: nn.Module, _args: tuple, given: dict[str, Any], output: Any) -> None:
        seen.update(given=given, output=output)

    hook = decoder.register_forward_hook(note, with_kwargs=True)
    try:
        with inference(model):
            between = any(layer not in (BEFORE, LAST) for layer in layers)
            model.base_model(**inputs, use_cache=False, output_hidden_states=between)
            embeddings = seen["given"].get("inputs_embeds")
            if embeddings is None:
                embeddings = decoder.get_input_embeddings()(seen["given"]["input_ids"])
    finally:
        hook.remove()
    # What transformers lists as the last hidden state went through the final norm or not, by release and model; what a
    # language model returns as its last one always did.
    last = seen["output"].last_hidden_state
    states = {BEFORE: embeddings, LAST: last, decoder.config.num_hidden_layers: last}
    states |= {layer: seen["output"].hidden_states[layer] for layer in layers if layer not in states}
    with torch.no_grad():  # out of inference mode, so that a head can be trained on what comes of it
        return {(layer, how): pool(states[layer], positions, how) for layer in layers for how in poolings}


def _own(model: nn.Module) -> nn.Module:
    """The model of transformers itself, in which an adapter's layers stand."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def video_positions(model: nn.Module, input_ids: Tensor, token_id: int | None = None) -> Tensor:
    """Where the video tokens stand [B, S] in a video model's `input_ids` [B, S]: its placeholders.

    token_id: the placeholder's, where the configuration names none for videos. Raises ValueError if there is none, or
    a row has none.
    """
    token_id = getattr(model.config, "video_token_id", None) if token_id is None else token_id
    if token_id is None:
        raise ValueError(f"the configuration of {type(model).__name__} names no video token: give its token_id")
    found = input_ids == token_id
    if not found.any(1).all():
        raise ValueError(f"row {int(found.any(1).long().argmin())} has no video token ({token_id}) among its input_ids")
    return found


# ---- The suite's own model -----------------------------------------------------------------------------------------


def embed_videos(
    model: GifQAModel,
    gifs: Sequence[str],
    features: FeatureTable,
    layers: Sequence[Layer] = (BEFORE,),
    poolings: Sequence[str] = ("mean",),
) -> Embeddings:
    """Embeddings of GIFs, from their cached features, at the model's video tokens.

    gifs: gif_sha256 of each, in the groups of the profile's evaluation. Returns, by (layer, pooling), float32 [N, H],
    or for "none" a list of N arrays [L_i, H]. Raises ValueError for a blind model, no GIFs, a layer that the model
    lacks, or states that are not finite; BundleError for another encoder's features, StoreError for an unknown GIF.
    """
    head = model.encode_prompt("")[: model.head]  # what stands behind the video is nothing to a causal model
    show = _shower(model, gifs, features)
    lengths = len(head) + model.window().video(features.lengths(gifs, model.profile.evaluation.groups))

    def pack(rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        return model.packed([head] * len(rows), show(rows))

    return _embed(model, lengths, pack, layers, poolings, "videos", [f"GIF {gif}" for gif in gifs])


def embed_texts(
    model: GifQAModel,
    texts: Sequence[str],
    layers: Sequence[Layer] = (BEFORE,),
    poolings: Sequence[str] = ("mean",),
    *,
    start: bool = True,
) -> Embeddings:
    """Embeddings of texts, each by itself behind the start token.

    start: whether that token is part of the text, as it is for the language model's own tokenizer; pooling "first" is
    then the same vector for all texts. Returns as `embed_videos` does. Raises ValueError for an empty text and as
    `embed_videos` does, TooLong for a text over the window.
    """
    ids = [[model.start, *text] for text in _token_ids(model, texts)]

    def pack(rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        embeddings, mask, _ = model.packed([ids[row] for row in rows], None)
        positions = mask.clone()
        positions[:, 0] &= start
        return embeddings, mask, positions

    return _embed(model, np.array([*map(len, ids)]), pack, layers, poolings, "texts", [*map(_told, texts)])


def video_answer_states(
    model: GifQAModel, questions: Sequence[str], gifs: Sequence[str], features: FeatureTable, layer: Layer = LAST
) -> np.ndarray:
    """What the model is about to answer when it is asked `questions` about GIFs: float32 [N, Q * H].

    The hidden state at the prompt's last token ("Answer:"), of one question behind the other. To be compared with
    `text_answer_states` of the same questions, each less the mean of its training items (`centred`). Raises ValueError
    without a question, and as `embed_videos` does; TooLong, naming the GIF.
    """
    prompts = [model.encode_prompt(question) for question in questions]
    show = _shower(model, gifs, features)
    lengths = model.window().video(features.lengths(gifs, model.profile.evaluation.groups))

    def pack(items: list[int], asked: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
        return model.packed(asked, show(items))

    return _answer_states(model, [prompts] * len(gifs), lengths, pack, layer, [f"GIF {gif}" for gif in gifs])


def text_answer_states(
    model: GifQAModel, questions: Sequence[str], captions: Sequence[str], layer: Layer = LAST
) -> np.ndarray:
    """What the model is about to answer when a caption stands where the video would: float32 [N, Q * H].

    Raises ValueError for an empty caption, and as `video_answer_states` does; TooLong, naming the caption.
    """
    prompts = [model.encode_prompt(question) for question in questions]
    texts, head = _token_ids(model, captions), model.head
    asked = [[[*prompt[:head], *text, *prompt[head:]] for prompt in prompts] for text in texts]

    def pack(_items: list[int], asked: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
        return model.packed(asked, None)

    return _answer_states(model, asked, np.zeros(len(texts), int), pack, layer, [*map(_told, captions)])


def embedding_facts(model: GifQAModel) -> dict[str, str]:
    """What tells a model's embeddings from another's: its encoder's key, and digests of base model and trained parts.

    The base model's is empty where the bundle was made before there was one.
    """
    return {
        "encoder_key": model.encoder_key or "",
        "language_model": model.base["language_model"]["identity"].get("digest", ""),
        "trained": model.trained_digest(),
    }


def _answer_states(
    model: GifQAModel,
    asked: Sequence[Sequence[list[int]]],
    video: np.ndarray,
    pack: Callable[[list[int], list[list[int]]], tuple[Tensor, Tensor, Tensor]],
    layer: Layer,
    told: Sequence[str],
) -> np.ndarray:
    """States at the last token of every item's prompts, side by side; video: video tokens of each item."""
    if not all(asked):
        raise ValueError("there is no question to ask")
    rows = [(item, prompt) for item, prompts in enumerate(asked) for prompt in prompts]

    def pack_rows(batch: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        items, prompts = zip(*(rows[i] for i in batch), strict=True)
        embeddings, mask, _ = pack([*items], [*prompts])
        return embeddings, mask, mask

    lengths = np.array([len(prompt) + video[item] for item, prompt in rows])
    named = [told[item] for item, _ in rows]
    states = _embed(model, lengths, pack_rows, [layer], ["last"], "answer states", named)
    return states[layer, "last"].reshape(len(asked), -1)


def _embed(
    model: GifQAModel,
    lengths: np.ndarray,
    pack: Callable[[list[int]], tuple[Tensor, Tensor, Tensor]],
    layers: Sequence[Layer],
    poolings: Sequence[str],
    what: str,
    told: Sequence[str],
) -> Embeddings:
    """Embeddings of rows of so many tokens, batch by batch; `pack` gives each batch's sequences, mask and positions."""
    if not len(lengths):
        raise ValueError(f"there are no {what} to embed")
    window = model.window()
    for needed, name in zip(lengths.tolist(), told, strict=True):
        window.require_room(needed, name)
    found: Embeddings = {(layer, how): [None] * len(lengths) for layer in layers for how in poolings}
    with inference(model), tqdm(total=len(lengths), desc=what) as progress:
        for rows in token_batches(lengths, model.profile.evaluation.batch_tokens):
            embeddings, mask, positions = pack(rows)
            inputs = {"inputs_embeds": embeddings, "attention_mask": mask.long()}
            for reading, values in token_states(model.language_model, inputs, positions, layers, poolings).items():
                for row, value in zip(rows, values, strict=True):
                    found[reading][row] = value.cpu().numpy()
            progress.update(len(rows))
    for (layer, _), values in found.items():
        for name, value in zip(told, values, strict=True):
            if not np.isfinite(value).all():
                raise ValueError(
                    f"the embedding of {name} (layer {layer!r}) holds NaN or infinity: look at the bundle and its input"
                )
    return {reading: values if reading[1] == "none" else np.stack(values) for reading, values in found.items()}


def _shower(
    model: GifQAModel, gifs: Sequence[str], features: FeatureTable
) -> Callable[[list[int]], tuple[Tensor, Tensor]]:
    """What gives the model's video input for some of the GIFs, by their places."""
    if not model.video:
        raise ValueError("this model is blind: it has no video tokens to embed a GIF by; give one trained with video")
    model.check_features(features.encoder_key)
    return lambda rows: model.video_input(*features.fetch([gifs[i] for i in rows], model.profile.evaluation.groups))


def _token_ids(model: GifQAModel, texts: Sequence[str]) -> list[list[int]]:
    if empty := [place for place, text in enumerate(texts) if not text.strip()]:
        raise ValueError(f"{len(empty)} of {len(texts)} texts are empty, the first in row {empty[0]}: leave them out")
    return [text_tokens(model.tokenizer, text.strip()) for text in texts]


def _told(text: str) -> str:
    return f"the text {shorten(text, 80)!r}"
