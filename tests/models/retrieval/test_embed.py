"""Embeddings out of a model against its layers run by hand, one unpadded sequence at a time."""

import numpy as np
import pytest
import torch
from torch.nn.functional import pad
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaModel,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

from helpers.models.gif_qa.bundle import load_bundle
from helpers.models.gif_qa.window import TooLong
from helpers.models.parts import BundleError
from helpers.models.retrieval.embed import (
    all_layers,
    embed_texts,
    embed_videos,
    embedding_facts,
    text_answer_states,
    token_states,
    video_answer_states,
    video_positions,
)
from tests.toy_features import Features

TEXTS = ["a small blue star", "what color is the circle ?", "it moves left"]
QUESTIONS = ["what color is the star ?", "how many times does the square jump ?"]
LENGTHS = {"gif-a": 20, "gif-b": 3, "gif-c": 16}  # two groups; a short one; a full one
LAYERS = ["before", 1, 2, "last"]


def run_by_hand(llama: LlamaModel, embeddings: torch.Tensor) -> dict:
    """Every layer's states [S, H] of one sequence [1, S, H]: layer by layer, and the norm behind the last."""
    size = embeddings.shape[1]
    turned = llama.rotary_emb(embeddings, torch.arange(size)[None])
    causal = torch.full((size, size), -torch.inf).triu(1)[None, None]
    states, hidden = {"before": embeddings[0]}, embeddings
    for number, layer in enumerate(llama.layers, 1):
        hidden = layer(hidden, attention_mask=causal, position_embeddings=turned)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        states[number] = hidden[0]
    last = hidden / (hidden.pow(2).mean(-1, keepdim=True) + llama.config.rms_norm_eps).sqrt() * llama.norm.weight
    return states | {len(llama.layers): last[0], "last": last[0]}


def features(model, **changes) -> Features:
    rng = np.random.default_rng(0)
    frames = {gif: rng.normal(size=(length, 32)).astype(np.float16) for gif, length in LENGTHS.items()}
    return Features(frames, model.encoder_key or "")


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(evaluation__batch_tokens=64)  # two or three sequences a batch


def video_alone(model, gif: str) -> torch.Tensor:
    """The video tokens [n, H] of one GIF, group by group."""
    tokens = []
    for group in torch.from_numpy(features(model).frames[gif]).float().split(16):
        padded, mask = torch.zeros(1, 16, 32), torch.arange(16)[None] < len(group)
        padded[0, : len(group)] = group
        own, kept = model.connector(padded, *model.mit(padded, mask), mask)
        tokens.append(own[kept])
    return torch.cat(tokens)


def words(model, text: str) -> torch.Tensor:
    """Input embeddings [n, H] of a text by the tokenizer itself."""
    ids = model.tokenizer(text, add_special_tokens=False).input_ids
    return model.language_model.get_input_embeddings()(torch.tensor(ids))


# ---- Any model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["LlamaModel", "causal", "untied"])
@torch.no_grad()
def test_every_layer_is_the_layers_run_by_hand(tiny_llama_dir, which):
    """Also where transformers lists a last hidden state in front of the final norm, as it does when untied."""
    causal = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, attention_dropout=0.5).train()
    llama = causal.model
    torch.nn.init.uniform_(llama.norm.weight, 0.5, 1.5)
    if which == "untied":
        llama.config.tie_last_hidden_states = False
    ids = torch.tensor([[3, 50, 7, 100, 22], [9, 8, 41, 2, 2]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    found = token_states(llama if which == "LlamaModel" else causal, {"input_ids": ids, "attention_mask": mask}, mask,
                         LAYERS, ["none"])  # fmt: skip
    assert all_layers(causal) == ["before", 1, "last"]
    assert llama.training and not llama._forward_hooks
    causal.eval()  # layers run by hand drop nothing either
    for row, length in enumerate((5, 3)):
        expected = run_by_hand(llama, llama.embed_tokens(ids[row : row + 1, :length]))
        for layer in LAYERS:
            torch.testing.assert_close(found[layer, "none"][row], expected[layer], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("folder", ["tiny_llama_dir", "tiny_gpt2_dir"])
def test_any_causal_model_takes_embeddings_and_positions_with_padding_on_either_side(folder, request):
    causal = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(folder))
    embeddings = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    one = torch.ones(1, 4, dtype=torch.long)
    positions = torch.tensor([[0, 1, 1, 0]])
    alone = token_states(causal, {"inputs_embeds": embeddings, "attention_mask": one}, positions, LAYERS, ["mean"])
    assert torch.equal(alone["before", "mean"], embeddings[:, 1:3].mean(1))
    for side in ((2, 0), (0, 2)):
        inputs = {"inputs_embeds": pad(embeddings, (0, 0, *side), value=9.0), "attention_mask": pad(one, side)}
        found = token_states(causal, inputs, pad(positions, side), LAYERS, ["mean"])
        for reading, value in alone.items():
            torch.testing.assert_close(found[reading], value, atol=1e-5, rtol=1e-4)
            assert not value.requires_grad
            torch.nn.Linear(64, 1)(value).sum().backward()  # a head can be trained on it


@pytest.fixture(scope="module")
def video_llava():
    """A random Video-LLaVA: 2 frames of 4 patches and a class token in a CLIP, 2 layers of a Llama."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                              image_size=8, patch_size=4, projection_dim=32)  # fmt: skip
    text = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                       num_key_value_heads=2, initializer_range=0.2)  # fmt: skip
    config = VideoLlavaConfig(vision_config=vision, text_config=text, image_token_index=38, video_token_index=39)
    return VideoLlavaForConditionalGeneration(config).eval()


@torch.no_grad()
def test_a_video_model_of_transformers_gives_its_projected_tokens_and_their_states(video_llava):
    pixels = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 5, *[39] * 10, 7, 8, 9], [1, *[39] * 10, 6, 2, 2, 2]])
    mask = torch.tensor([[1] * 15, [1] * 12 + [0] * 3])
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values_videos": pixels}
    positions = video_positions(video_llava, ids)
    found = token_states(video_llava, inputs, positions, LAYERS, ["none", "mean"])
    inner = video_llava.model
    for row, (start, length) in enumerate(((2, 15), (1, 12))):
        tower = inner.video_tower(pixels[row], output_hidden_states=True).hidden_states[-2]
        tokens = inner.multi_modal_projector(tower).flatten(0, 1)
        assert tokens.shape == (10, 16)
        own = inner.language_model.embed_tokens(ids[row, :length])
        own = torch.cat([own[:start], tokens, own[start + 10 :]])[None]
        for layer, expected in run_by_hand(inner.language_model, own).items():
            seen = expected[start : start + 10]
            torch.testing.assert_close(found[layer, "none"][row], seen, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(found[layer, "mean"][row], seen.mean(0), atol=1e-5, rtol=1e-4)


def test_where_the_video_tokens_stand_is_told_by_the_configuration_or_by_hand(video_llava, tiny_llama_dir):
    ids = torch.tensor([[1, 39, 39, 5], [39, 5, 4, 39]])
    assert video_positions(video_llava, ids).tolist() == [[False, True, True, False], [True, False, False, True]]
    with pytest.raises(ValueError, match="row 1 has no video token"):
        video_positions(video_llava, torch.tensor([[39, 1], [1, 1]]))
    causal = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    with pytest.raises(ValueError, match="LlamaForCausalLM names no video token"):
        video_positions(causal, ids)
    assert video_positions(causal, ids, token_id=5).tolist()[0] == [False, False, False, True]


@pytest.mark.parametrize("layer", [0, 3, -1, "first", "2"])
def test_a_layer_that_is_not_there_is_refused(tiny_llama_dir, layer):
    causal = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    one = torch.ones(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="ask for 'before', 1 to 2, or 'last'"):
        token_states(causal, {"input_ids": one}, one, [layer])


# ---- The suite's own model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"connector__kind": "qformer"}, {"language_model__chat": True}], ids=str)
@torch.no_grad()
def test_videos_are_read_at_their_tokens(make_model, chat_dir, changes):
    if "language_model__chat" in changes:
        changes = changes | {"language_model__model": str(chat_dir("gemma"))}
    model = make_model(evaluation__batch_tokens=64, **changes)
    gifs = ["gif-b", "gif-a", "gif-c", "gif-b"]
    found = embed_videos(model, gifs, features(model), LAYERS, ["none", "max"])
    llama = model.language_model.get_base_model().model
    head = model.language_model.get_input_embeddings()(torch.tensor(model.encode_prompt("who ?")[: model.head]))
    for place, gif in enumerate(gifs):
        tokens = video_alone(model, gif)
        for layer, expected in run_by_hand(llama, torch.cat([head, tokens])[None]).items():
            seen = expected[len(head) :]
            assert found[layer, "none"][place] == pytest.approx(seen.numpy(), abs=2e-5, rel=1e-4)
            assert found[layer, "max"][place] == pytest.approx(seen.amax(0).numpy(), abs=2e-5, rel=1e-4)
    assert found["last", "max"].shape == (4, 64) and found["last", "max"].dtype == np.float32


@pytest.mark.parametrize("start", [True, False])
@torch.no_grad()
def test_texts_are_read_with_their_start_token_or_without(model, start):
    found = embed_texts(model, TEXTS, LAYERS, ["none", "first", "last"], start=start)
    llama = model.language_model.get_base_model().model
    begin = llama.embed_tokens(torch.tensor([model.tokenizer.bos_token_id]))
    for place, text in enumerate(TEXTS):
        own = torch.cat([begin, words(model, text)])[None]
        for layer, expected in run_by_hand(llama, own).items():
            expected = expected if start else expected[1:]
            assert found[layer, "none"][place] == pytest.approx(expected.numpy(), abs=2e-5, rel=1e-4)
            assert found[layer, "last"][place] == pytest.approx(expected[-1].numpy(), abs=2e-5, rel=1e-4)
    constant = np.ptp(found["last", "first"], axis=0).max() < 1e-5
    assert constant == start  # the first token of every text has seen nothing but itself


@torch.no_grad()
def test_answer_states_stand_where_the_answer_begins(model):
    """One question behind the other, behind the video and behind the caption."""
    llama = model.language_model.get_base_model().model
    begin = llama.embed_tokens(torch.tensor([model.tokenizer.bos_token_id]))
    gifs = [*LENGTHS]
    videos = video_answer_states(model, QUESTIONS, gifs, features(model))
    texts = text_answer_states(model, QUESTIONS, TEXTS)
    middle = text_answer_states(model, QUESTIONS, TEXTS, layer=1)
    assert videos.shape == texts.shape == middle.shape == (3, 128)
    for place in range(3):
        seen = [video_alone(model, gifs[place]), words(model, TEXTS[place])]
        for number, question in enumerate(QUESTIONS):
            asked = words(model, f"Question: {question}\nAnswer:")
            states = [run_by_hand(llama, torch.cat([begin, what, asked])[None]) for what in seen]
            own = slice(64 * number, 64 * number + 64)
            assert videos[place, own] == pytest.approx(states[0]["last"][-1].numpy(), abs=2e-5, rel=1e-4)
            assert texts[place, own] == pytest.approx(states[1]["last"][-1].numpy(), abs=2e-5, rel=1e-4)
            assert middle[place, own] == pytest.approx(states[1][1][-1].numpy(), abs=2e-5, rel=1e-4)


def test_a_bundle_gives_the_embeddings_of_the_model_that_was_saved(model, tmp_path, make_profile):
    loaded = load_bundle(model.save_bundle(tmp_path / "bundle"), make_profile().language_model.model)
    expected, found = (
        embed_videos(one, [*LENGTHS], features(model), ["last"])["last", "mean"] for one in (model, loaded)
    )
    assert np.array_equal(found, expected)
    facts = embedding_facts(loaded)
    assert facts == embedding_facts(model)
    assert facts["encoder_key"] == model.encoder_key
    assert facts["language_model"] == model.base["language_model"]["identity"]["digest"]
    with torch.no_grad():
        next(loaded.connector.parameters()).mul_(2)
    assert embedding_facts(loaded) == facts | {"trained": embedding_facts(loaded)["trained"]} != facts


def test_bad_input_is_refused_by_name(model, make_model):
    with pytest.raises(ValueError, match="no videos to embed"):
        embed_videos(model, [], features(model))
    with pytest.raises(ValueError, match="2 of 4 texts are empty, the first in row 1"):
        embed_texts(model, ["a star", " ", "who ?", ""])
    with pytest.raises(ValueError, match="no question"):
        text_answer_states(model, [], TEXTS)
    with pytest.raises(TooLong, match="the text 'star star"):
        embed_texts(model, [*TEXTS, "star " * 600])
    with pytest.raises(BundleError, match="another-encoder"):
        embed_videos(model, ["gif-a"], Features(features(model).frames, "another-encoder|a|b|c|d"))
    blind = make_model(video=False)
    with pytest.raises(ValueError, match="blind"):
        embed_videos(blind, ["gif-a"], features(model))
    assert embed_texts(blind, TEXTS)["before", "mean"].shape == (3, 64)
    assert embedding_facts(blind)["encoder_key"] == ""
    broken = features(model)
    broken.frames["gif-b"] = np.full((3, 32), np.nan, np.float16)
    with pytest.raises(ValueError, match=r"the embedding of GIF gif-b \(layer 'before'\) holds NaN"):
        embed_videos(model, [*LENGTHS], broken)
