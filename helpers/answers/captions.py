"""Captions that a model writes of GIFs, beside those that people wrote of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from helpers.models.parts import token_batches
from helpers.scoring.captions import caption_scores

if TYPE_CHECKING:
    from helpers.models.gif_qa.model import GifQAModel
    from helpers.store.features import FeatureTable

WRITTEN_GIFS = 200  # enough to compare two trainings by; each caption is written word by word
CAPTION_TOKENS = 60  # of a caption at most


def write_captions_of(
    model: GifQAModel, held: pd.DataFrame, features: FeatureTable, most: int = WRITTEN_GIFS
) -> pd.DataFrame:
    """Caption held-out GIFs greedily by the prompt of stage one, `most` of them, drawn by training.seed.

    held: rows of `training.caption_rows`. Returns a row a GIF: gif_sha256, written, references (its own captions).
    """
    profile = model.profile
    references = held.groupby("gif_sha256")["answer"].agg(list)
    drawn = np.random.default_rng(profile.training.seed).permutation(len(references))[:most]
    gifs, groups = references.index[np.sort(drawn)].tolist(), profile.evaluation.groups
    prompt, window = model.encode_prompt(profile.alignment.prompt), model.window()
    needed = window.video(features.lengths(gifs, groups)) + len(prompt)
    written = dict.fromkeys(gifs, "")
    for batch in tqdm(token_batches(needed + CAPTION_TOKENS, profile.evaluation.batch_tokens), desc="captions"):
        shown = [gifs[i] for i in batch]
        # the captions themselves fit behind their GIFs, so that there is room for some tokens at least
        room = CAPTION_TOKENS if window.size is None else min(CAPTION_TOKENS, window.size - int(needed[batch].max()))
        texts = model.generate([prompt] * len(batch), *features.fetch(shown, groups), new_tokens=room)
        written |= dict(zip(shown, texts, strict=True))
    return pd.DataFrame(
        {"gif_sha256": gifs, "written": written.values(), "references": [references[gif] for gif in gifs]}
    )


def score_captions(table: pd.DataFrame) -> pd.DataFrame:
    """BLEU-4 and CIDEr of `write_captions_of`'s table; below, the same captions as if each were of the next GIF.

    That second row is what fluent captions of other GIFs score: what is above it comes from looking. A single GIF has
    no other one, and no such row.
    """
    references = dict(zip(table["gif_sha256"], table["references"], strict=True))
    others = [*table["gif_sha256"][1:], *table["gif_sha256"][:1]]
    rows = {"model": table["gif_sha256"]} | ({"another GIF's captions": others} if len(table) > 1 else {})
    return pd.DataFrame(
        {
            name: caption_scores(dict(zip(gifs, table["written"], strict=True)), references)
            for name, gifs in rows.items()
        }
    ).T
