"""ADEM-VL's inputs: sequences as the official code lays them out, batches and pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from helpers.config import nearest
from helpers.models.adem_vl.config import NO_CLS, AdemVLError
from helpers.models.parts import IGNORED
from helpers.models.text import start_token, text_tokens
from helpers.models.xclip import IMAGENET_MEAN, IMAGENET_STD

NORMALISATION = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
}
"""Mean and standard deviation of RGB in 0..1; the paper feeds CLIP with ImageNet's on ScienceQA."""


class PromptTooLong(AdemVLError):
    """A sequence that is longer than the window; neither its answer nor "The answer is" is ever cut."""


@dataclass(frozen=True)
class Encoded:
    """One tokenised sample: input_ids and labels (-100: not learnt) of equal length, and where the CLS token goes."""

    input_ids: list[int]
    labels: list[int]
    has_image: bool
    cls_position: int  # NO_CLS without


def encode(
    tokenizer: Any,
    prompt: str,
    answer: str | None = None,
    *,
    has_image: bool,
    use_cls: bool = True,
    max_tokens: int = 512,
) -> Encoded:
    """Tokenise one sample as the official code lays it out.

    With an image: BOS, "Image: ", the CLS token's place, prompt and answer, EOS; without: BOS, "Image: N/A", prompt and
    answer, EOS. Without `use_cls` the piece about the image is left out in both. The pieces are tokenised apart, prompt
    and answer together. Answer tokens and EOS are learnt; without an answer the sequence ends with the prompt and
    nothing is. Raises PromptTooLong above `max_tokens`, AdemVLError for an empty answer.
    """

    def tokens(text: str) -> list[int]:
        return text_tokens(tokenizer, text)

    start = start_token(tokenizer)
    ids, cls_position = [start], NO_CLS
    if use_cls:
        ids += tokens("Image: " if has_image else "Image: N/A")
        if has_image:
            cls_position = len(ids)
            ids.append(start)  # any token: its embedding is replaced
    asked = tokens(prompt)
    if answer is None:
        ids, learnt = ids + asked, 0
    else:
        whole = tokens(prompt + answer)
        # Some tokenisers join the prompt's last character with the answer's first: such a token is learnt too.
        shared = next((i for i, (a, b) in enumerate(zip(asked, whole, strict=False)) if a != b), len(asked))
        learnt = len(whole) - shared + 1
        if learnt < 2:
            raise AdemVLError(f"the answer {answer!r} adds no token to the prompt {prompt[-40:]!r}")
        ids = [*ids, *whole, tokenizer.eos_token_id]
    if len(ids) > max_tokens:
        raise PromptTooLong(f"{len(ids)} tokens; the window has {max_tokens}. Raise max_tokens or leave the sample out")
    labels = [IGNORED] * (len(ids) - learnt) + ids[len(ids) - learnt :]
    return Encoded(ids, labels, has_image, cls_position)


def letter_tokens(tokenizer: Any, prompt: str, letters: Sequence[str]) -> list[int]:
    """The token that begins each letter's answer behind `prompt`, which ends with "The answer is".

    Raises AdemVLError if the tokeniser does not tell the letters apart by their first token: such a language model
    cannot answer with one token.
    """
    asked = text_tokens(tokenizer, prompt)
    found = []
    for letter in letters:
        whole = text_tokens(tokenizer, f"{prompt} {letter}.")
        if whole[: len(asked)] != asked or len(whole) == len(asked):
            raise AdemVLError(f"the answer {letter!r} changes how the end of the prompt {prompt[-20:]!r} is tokenised")
        found.append(whole[len(asked)])
    if len(set(found)) < len(found):
        raise AdemVLError(f"the letters {', '.join(letters)} do not begin with different tokens: {found}")
    return found


def collate(
    samples: Sequence[Encoded], pixel_values: Tensor | None, padding: int, left: bool = False
) -> dict[str, Tensor]:
    """Pad samples to a batch of `AdemVL.forward`; `left` for generation. padding: the padding token's id.

    pixel_values [B, 3, H, W] (rows without an image hold anything), or None for a batch without images. Returns
    input_ids, attention_mask, labels [B, S], has_image and cls_position [B], and pixel_values where given.
    """
    width = max(len(sample.input_ids) for sample in samples)
    shape = (len(samples), width)
    batch = {
        "input_ids": torch.full(shape, padding),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, IGNORED),
        "has_image": torch.tensor([sample.has_image for sample in samples]),
        "cls_position": torch.full((len(samples),), NO_CLS),
    }
    for row, sample in enumerate(samples):
        first = width - len(sample.input_ids) if left else 0
        span = slice(first, first + len(sample.input_ids))
        batch["input_ids"][row, span] = torch.tensor(sample.input_ids)
        batch["attention_mask"][row, span] = 1
        batch["labels"][row, span] = torch.tensor(sample.labels)
        if sample.cls_position != NO_CLS:
            batch["cls_position"][row] = first + sample.cls_position
    return batch if pixel_values is None else batch | {"pixel_values": pixel_values}


def image_tensor(image: Image.Image | None, size: int, normalisation: str = "clip") -> Tensor:
    """Pixels [3, size, size] of an RGB image: resized to exactly this size (aspect ratio not kept), normalised.

    Bicubic, 0..1, then `NORMALISATION`: "clip" and "siglip" are the encoders' own, "imagenet" is the paper's on
    ScienceQA. None, a sample without an image, gives zeros. Raises AdemVLError for an unknown normalisation.
    """
    if normalisation not in NORMALISATION:
        raise AdemVLError(f"normalisation {normalisation!r}; {nearest(normalisation, list(NORMALISATION))}")
    if image is None:
        return torch.zeros(3, size, size)
    resized = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(resized, dtype=np.float32)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORMALISATION[normalisation])
    return (pixels - mean) / std
