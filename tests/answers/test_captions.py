"""Captions of held-out GIFs: which GIFs, what the model is shown, and the scores beside those of the wrong GIF."""

import pandas as pd
import pytest
import torch

from helpers.answers.captions import CAPTION_TOKENS, score_captions, write_captions_of
from helpers.models.gif_qa.model import GifQAModel
from helpers.scoring import caption_scores
from tests.toy_features import Features

GIFS = [f"gif{n}" for n in range(6)]
HELD = pd.DataFrame(
    {"gif_sha256": [gif for gif in GIFS for _ in range(2)], "answer": [f"a {n} star" for n in range(12)]}
).sample(frac=1, random_state=0)


def toy_features():
    """Random embeddings; a GIF's number of frames follows from its number."""
    return Features({gif: torch.randn(3 + 4 * n, 32).numpy() for n, gif in enumerate(GIFS)})


@pytest.fixture(scope="module")
def model(make_profile):
    return GifQAModel.build(make_profile(evaluation__batch_tokens=300))


def test_each_gif_is_captioned_as_if_it_were_alone(model):
    """Greedily, by the stock model's own decoding of one sequence built by hand."""
    features = toy_features()
    table = write_captions_of(model, HELD, features)
    assert table["gif_sha256"].tolist() == GIFS
    assert [sorted(texts) for texts in table["references"]] == [
        sorted([f"a {2 * n} star", f"a {2 * n + 1} star"]) for n in range(6)
    ]
    ids = model.tokenizer(f"Question: {model.profile.alignment.prompt}\nAnswer:").input_ids
    embed = model.language_model.get_input_embeddings()
    for gif, written in zip(GIFS, table["written"], strict=True):
        parts = [embed(torch.tensor([model.tokenizer.bos_token_id]))]
        for group in torch.from_numpy(features.frames[gif]).split(16):
            frames, mask = torch.zeros(1, 16, 32), torch.arange(16)[None] < len(group)
            frames[0, : len(group)] = group
            tokens, token_mask = model.connector(frames, *model.mit(frames, mask), mask)
            parts.append(tokens[token_mask])
        sequence, said = torch.cat([*parts, embed(torch.tensor(ids))]), []
        while len(said) < CAPTION_TOKENS and model.tokenizer.eos_token_id not in said:
            with torch.no_grad():
                said.append(int(model.language_model(inputs_embeds=sequence[None]).logits[0, -1].argmax()))
            sequence = torch.cat([sequence, embed(torch.tensor(said[-1:]))])
        assert written == model.tokenizer.decode(said, skip_special_tokens=True).strip()


def test_no_more_gifs_than_asked_for_drawn_by_the_seed(model, monkeypatch):
    monkeypatch.setattr(model, "generate", lambda prompts, *video, new_tokens: ["a star"] * len(prompts))
    drawn = {tuple(write_captions_of(model, HELD, toy_features(), most=3)["gif_sha256"]) for _ in range(2)}
    assert len(drawn) == 1 and len(*drawn) == 3 and drawn != {tuple(GIFS[:3])}


def test_captions_end_where_the_window_does(model, monkeypatch):
    """The longest GIF has 23 frames in two groups: with the prompt, five tokens less than the window."""
    prompt = model.encode_prompt(model.profile.alignment.prompt)
    monkeypatch.setattr(model.language_model.config, "max_position_embeddings", 23 + 2 + len(prompt) + 5)
    asked, real = [], model.generate

    def watched(prompts, frames, lengths, new_tokens):
        asked.append((int(max(lengths)), new_tokens))
        return real(prompts, frames, lengths, new_tokens=new_tokens)

    monkeypatch.setattr(model, "generate", watched)
    assert write_captions_of(model, HELD, toy_features())["gif_sha256"].tolist() == GIFS
    assert (23, 5) in asked
    for frames, tokens in asked:
        assert tokens == min(CAPTION_TOKENS, 23 + 2 + 5 - frames - -(-frames // 16))


def test_a_single_gif_has_no_other_ones_captions():
    table = pd.DataFrame({"gif_sha256": ["a"], "written": ["a red star"], "references": [["a red star"]]})
    assert score_captions(table).index.tolist() == ["model"]


def test_the_floor_is_what_the_same_captions_score_on_other_gifs():
    words = ["red", "green", "blue", "black"]
    own = [[f"a {word} star spins around quickly", f"the {word} star is spinning around"] for word in words]
    table = pd.DataFrame({"gif_sha256": list("abcd"), "written": [texts[0] for texts in own], "references": own})
    scores = score_captions(table)
    references = dict(zip("abcd", own, strict=True))
    right = caption_scores(dict(zip("abcd", table["written"], strict=True)), references)
    wrong = caption_scores(dict(zip("bcda", table["written"], strict=True)), references)
    assert scores.loc["model"].to_dict() == right and scores.loc["another GIF's captions"].to_dict() == wrong
    assert right["BLEU-4"] == pytest.approx(1.0) and wrong["BLEU-4"] < 0.9
