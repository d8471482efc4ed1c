"""The question answering model against loops over the stock language model, one unpadded sequence at a time."""

import itertools
import json
import math
import os
import re
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, XCLIPModel

import helpers.models.gif_qa as gif_qa
from helpers.corpora.schema import Corpus, question_row, question_table, reject_table
from helpers.corpora.tasks import ScoreError
from helpers.gifs.decode import GifRejected, decode
from helpers.models.gif_qa.ask import GifQA
from helpers.models.gif_qa.bundle import load_bundle
from helpers.models.gif_qa.model import WORDS_AT_ONCE, GifQAModel
from helpers.models.language import BaseLanguageModel, load_language_model
from helpers.models.parts import BundleError
from helpers.models.xclip import FrameEncoder
from helpers.store.frames import FrameTable
from helpers.store.shards import shard_gifs
from tests.chats import FAMILIES

QUESTIONS = ["what color is the circle ?", "how many times does the square jump ?", "who ?"]
ANSWERS = ["red", "10", "a small blue star"]
LENGTHS = [20, 0, 3]  # two groups; nothing to see; a short group beside an empty one
VARIANTS = {
    "llama": {},
    "nf4": {"language_model__quantisation": "nf4"},
    "qformer": {"connector__kind": "qformer", "connector__output_scale": "fixed"},
    "ia3": {"language_model__adapter": "ia3", "language_model__target_modules": ["k_proj", "v_proj", "down_proj"]},
    "gpt2": {"gpt2": True, "language_model__target_modules": ["c_attn", "c_proj", "c_fc"]},
    "gpt2-nf4": {
        "gpt2": True,
        "language_model__quantisation": "nf4",
        "language_model__target_modules": ["all-linear"],
    },
    "blind": {"video": False},
    "chat": {"language_model__chat": True},
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    return request.param


@pytest.fixture(scope="module")
def build(make_model, tiny_gpt2_dir, chat_dir):
    def make(variant, **more):
        options = VARIANTS[variant] | more
        if options.get("language_model__chat"):
            options["language_model__model"] = str(chat_dir("gemma"))
        if options.pop("gpt2", False):
            options["language_model__model"] = str(tiny_gpt2_dir)
        return make_model(**options)

    return make


@pytest.fixture(scope="module")
def model(variant, build):
    return build(variant)


@pytest.fixture
def llama(build):
    return build("llama")


def features(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    frames = torch.randn(3, 20, 32, generator=torch.Generator().manual_seed(seed))
    return frames, torch.tensor(LENGTHS)


def batch(model: GifQAModel, pad: int = 2) -> dict[str, torch.Tensor]:
    """The right-padded training batch of all questions and their answers."""
    rows = [(model.encode_prompt(q), model.encode_answer(a)) for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    width = max(len(p) + len(a) for p, a in rows)
    ids = torch.tensor([p + a + [pad] * (width - len(p + a)) for p, a in rows])
    labels = torch.tensor([[-100] * len(p) + a + [-100] * (width - len(p + a)) for p, a in rows])
    mask = torch.tensor([[1] * len(p + a) + [0] * (width - len(p + a)) for p, a in rows])
    frames, lengths = features()
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "frames": frames, "lengths": lengths}


def prompts(model: GifQAModel) -> list[list[int]]:
    return [model.encode_prompt(question) for question in QUESTIONS]


def embed_alone(model: GifQAModel, text: list[int], frames: torch.Tensor) -> torch.Tensor:
    """Embeddings [1, S, H] of one sequence built by hand: its head, each group's valid video tokens, other tokens."""
    words = model.language_model.get_input_embeddings()(torch.tensor(text))
    chat = model.profile.language_model.chat
    head = len(model.tokenizer.tokenize(FAMILIES["gemma"].head)) if chat else 1
    parts = [words[:head]]
    for group in frames.split(16) if model.video else []:
        if len(group):
            padded, mask = torch.zeros(1, 16, 32), torch.arange(16)[None] < len(group)
            padded[0, : len(group)] = group
            tokens, token_mask = model.connector(padded, *model.mit(padded, mask), mask)
            parts.append(tokens[token_mask])
    return torch.cat([*parts, words[head:]])[None]


def log_probs_alone(model: GifQAModel, prompt: list[int], answer: list[int], frames: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the answer's tokens from the stock model's full logits over one unpadded sequence."""
    logits = model.language_model(inputs_embeds=embed_alone(model, prompt + answer, frames)).logits[0].float()
    predictions = logits.log_softmax(-1)[-len(answer) - 1 : -1]
    return predictions[torch.arange(len(answer)), answer]


# ---- Training pass -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_batch_equals_one_unpadded_sequence_at_a_time(model):
    frames, lengths = features()
    alone = [
        log_probs_alone(model, prompt, model.encode_answer(answer), video[:length])
        for prompt, answer, video, length in zip(prompts(model), ANSWERS, frames, lengths, strict=True)
    ]
    alone = torch.cat(alone)
    inputs = batch(model)
    output = model(**inputs)
    assert output["logits"].shape == (len(alone), model.language_model.config.vocab_size)
    labels = inputs["labels"]
    together = output["logits"].log_softmax(-1)[torch.arange(len(alone)), labels[labels != -100]]
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(output["loss"], -alone.mean(), atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_a_loss_per_question_weighs_long_and_short_answers_alike(build):
    """Against each row's own mean from the stock model; the answers have 4, 4 and 9 tokens."""
    model = build("llama", training__loss="per_question")
    frames, lengths = features()
    alone = [
        -log_probs_alone(model, prompt, model.encode_answer(answer), video[:length]).mean().item()
        for prompt, answer, video, length in zip(prompts(model), ANSWERS, frames, lengths, strict=True)
    ]
    assert [len(model.encode_answer(answer)) for answer in ANSWERS] == [4, 4, 9]
    assert model(**batch(model))["loss"].item() == pytest.approx(sum(alone) / 3, rel=1e-5)


CHOICES = [["a small star", "red", "10", "it moves left", "a"], ["3"], ["blue", "a small blue star"]]
"""Candidates of the three rows, the right one first; the second row has nothing to choose from."""


def choice_batch(model: GifQAModel) -> dict[str, torch.Tensor]:
    """The right-padded batch of the three prompts with their candidates."""
    rows, answers = prompts(model), [[model.encode_answer(text) for text in texts] for texts in CHOICES]
    width, longest = max(map(len, rows)), max(len(tokens) for row in answers for tokens in row)
    ids, mask = torch.full((3, width), 2), torch.zeros(3, width, dtype=torch.long)
    candidates = torch.full((3, 5, longest), -100)
    for i, (prompt, own) in enumerate(zip(rows, answers, strict=True)):
        ids[i, : len(prompt)], mask[i, : len(prompt)] = torch.tensor(prompt), 1
        for k, tokens in enumerate(own):
            candidates[i, k, : len(tokens)] = torch.tensor(tokens)
    frames, lengths = features()
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "candidates": candidates,
        "frames": frames,
        "lengths": lengths,
    }


def choice_loss_alone(model: GifQAModel, choice: str, loss: str) -> torch.Tensor:
    """The loss by a forward of the stock model for every candidate, one unpadded sequence at a time."""
    total, weights = 0.0, 0
    for prompt, texts, video, length in zip(prompts(model), CHOICES, *features(), strict=True):
        tokens = [log_probs_alone(model, prompt, model.encode_answer(text), video[:length]) for text in texts]
        scores = torch.stack([own.sum() for own in tokens])
        compared = -torch.log(scores[0].exp() / scores.exp().sum())
        own = -tokens[0].mean() + compared if choice == "beside" else compared if len(texts) > 1 else -tokens[0].mean()
        weight = 1 if loss == "per_question" else len(tokens[0])
        total, weights = total + own * weight, weights + weight
    return total / weights


@pytest.mark.parametrize("loss", ["per_question", "per_token"])
@pytest.mark.parametrize("choice", ["beside", "instead"])
def test_choosing_from_one_shared_prefix_is_a_forward_for_every_option(build, variant, choice, loss):
    """Loss, scores and every gradient."""
    together, alone = (build(variant, training__choice=choice, training__loss=loss) for _ in range(2))
    output, expected = together(**choice_batch(together)), choice_loss_alone(alone, choice, loss)
    torch.testing.assert_close(output["loss"], expected, atol=2e-5, rtol=1e-5)
    for model, value in ((together, output["loss"]), (alone, expected)):
        value.backward()
        assert sum(p.grad is not None for p in model.parameters()) > 3
    gradients = dict(alone.named_parameters())
    for name, parameter in together.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[name].grad, atol=1e-4, rtol=1e-3)
    scores = together.score(prompts(together), CHOICES, *features())
    for row, values in zip(output["scores"].tolist(), scores, strict=True):
        assert row[: len(values)] == pytest.approx(values[:, 0].tolist(), abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "nf4", "gpt2"])
def test_gradient_checkpointing_changes_no_gradient_of_a_choice(build, name):
    plain, saving = (build(name, training__choice="beside").train() for _ in range(2))
    saving.gradient_checkpointing_enable()
    for model in (plain, saving):
        model(**choice_batch(model))["loss"].backward()
    gradients = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad}
    for n, parameter in saving.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[n])


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "margin"), [(torch.float16, 0.01), (torch.bfloat16, 0.05)])
def test_autocast_in_16_bits_gives_the_choice_of_32(build, dtype, margin):
    model = build("llama", training__choice="beside")
    exact = model(**choice_batch(model))["loss"]
    with torch.autocast("cpu", dtype=dtype):
        assert model(**choice_batch(model))["loss"].item() == pytest.approx(exact.item(), rel=margin)


@torch.no_grad()
def test_padding_of_any_kind_changes_nothing(model):
    inputs = batch(model)
    other = batch(model, pad=77)  # another padding token
    noise = torch.full_like(other["frames"], 9.0)
    valid = torch.arange(20) < other["lengths"][:, None]
    other["frames"] = torch.where(valid[..., None], other["frames"], noise)  # other content behind the frames
    assert torch.equal(model(**inputs)["logits"], model(**other)["logits"])

    wider = batch(model)
    for name, fill in (("input_ids", 5), ("attention_mask", 0), ("labels", -100)):
        wider[name] = torch.nn.functional.pad(wider[name], (0, 7), value=fill)
    wider["frames"] = torch.nn.functional.pad(wider["frames"], (0, 0, 0, 25))
    torch.testing.assert_close(model(**wider)["logits"], model(**inputs)["logits"], atol=2e-5, rtol=1e-5)

    left = batch(model)
    for row, mask in enumerate(left["attention_mask"].clone()):
        for name in ("input_ids", "attention_mask", "labels"):
            left[name][row] = left[name][row].roll(int((mask == 0).sum()))
    torch.testing.assert_close(model(**left)["logits"], model(**inputs)["logits"], atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_video_and_question_matter_but_no_label_outside_the_answer(llama):
    inputs = batch(llama)
    logits = llama(**inputs)["logits"]
    frames, _ = features(seed=1)
    changed = llama(**{**inputs, "frames": frames})["logits"]
    counts = [len(llama.encode_answer(answer)) for answer in ANSWERS]
    seen, blind, short = (logits - changed).abs().amax(1).split(counts)
    assert seen.min() > 1e-3
    assert short.min() > 1e-3
    assert not blind.any()  # the second row shows no frame

    question = inputs["input_ids"].clone()
    question[:, 3] = 90
    assert (llama(**{**inputs, "input_ids": question})["logits"] - logits).abs().amax(1).min() > 1e-3


def test_only_answers_are_trained_on(llama):
    inputs = batch(llama)
    logits = llama(**inputs)["logits"]
    labels = [label for answer in ANSWERS for label in llama.encode_answer(answer)]
    assert len(logits) == len(labels)
    with pytest.raises(ValueError, match="no answer token"):
        llama(**{**inputs, "labels": torch.full_like(inputs["labels"], -100)})


@pytest.mark.parametrize("train_mit", [True, False])
def test_gradient_flows_only_where_intended(build, variant, train_mit):
    model = build(variant, connector__train_mit=train_mit).train()
    model(**batch(model))["loss"].backward()
    parts = {"language_model", *(["connector"] if model.video else []), *(["mit"] if model.video and train_mit else [])}
    found = set()
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        intended = part in parts and (part != "language_model" or "lora_" in name or "ia3_" in name)
        assert parameter.requires_grad == intended, name
        assert (parameter.grad is not None) == intended, name
        if intended:
            found.add(part)
            assert parameter.dtype == torch.float32
            # A bias of keys shifts all scores of a query alike: its gradient is zero in exact arithmetic.
            assert parameter.grad.any() or name.endswith("k_proj.bias"), name
    assert found == parts


@pytest.mark.parametrize("name", ["llama", "nf4", "blind", "gpt2"])
def test_gradient_checkpointing_changes_no_gradient(build, name):
    plain, saving = build(name).train(), build(name).train()
    saving.gradient_checkpointing_enable()
    losses = [model(**batch(model))["loss"] for model in (plain, saving)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    gradients = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad}
    assert gradients
    for n, parameter in saving.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[n])


@pytest.mark.parametrize("name", ["llama", "chat"])
def test_training_lowers_the_loss_of_video_dependent_answers(build, name):
    """Same question, different GIFs, different answers: only a model that reads the video tokens can fit them."""
    model = build(name).train()
    inputs = batch(model)
    prompt, answers = model.encode_prompt(QUESTIONS[0]), [model.encode_answer(a) for a in ("1", "2", "3")]
    inputs["input_ids"] = torch.tensor([prompt + answer for answer in answers])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["labels"] = torch.tensor([[-100] * len(prompt) + answer for answer in answers])
    inputs["lengths"] = torch.tensor([20, 5, 3])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(60):
        loss = model(**inputs)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    assert model.generate([prompt] * 3, inputs["frames"], inputs["lengths"]) == ["1", "2", "3"]


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "margin"), [(torch.float16, 0.01), (torch.bfloat16, 0.05)])
def test_autocast_in_16_bits_gives_the_loss_of_32_also_with_empty_groups(llama, dtype, margin):
    inputs = batch(llama)
    exact = llama(**inputs)["loss"]
    with torch.autocast("cpu", dtype=dtype):
        loss = llama(**inputs)["loss"]
    assert loss.item() == pytest.approx(exact.item(), rel=margin)


@pytest.mark.parametrize("kind", ["llama", "qformer"])
def test_training_in_float16_with_a_gradient_scaler_learns_and_skips_what_overflows(build, kind):
    """What a T4 does, on the CPU: float16 autocast, float32 parameters, a scaled loss."""
    model = build(kind).train()
    inputs = batch(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=3e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)

    def step():
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(**inputs)["loss"]
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        gradients = {name: p.grad.clone() for name, p in trained.items()}
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.item(), gradients

    model(**inputs)["loss"].backward()
    exact = {name: p.grad.clone() for name, p in trained.items()}
    optimizer.zero_grad()
    first, gradients = step()
    assert all(p.dtype == torch.float32 for p in trained.values())
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        assert torch.linalg.vector_norm(gradient - exact[name]) <= 0.1 * torch.linalg.vector_norm(exact[name]), name
    losses = [step()[0] for _ in range(20)]
    assert losses[-1] < 0.8 * first and scaler.get_scale() == 1024.0  # not one step was skipped
    before = {name: p.detach().clone() for name, p in trained.items()}
    scaler.update(2.0**126)  # gradients of this scale are beyond float16
    _, gradients = step()
    assert not all(gradient.isfinite().all() for gradient in gradients.values())
    assert all(torch.equal(before[name], p) for name, p in trained.items()) and scaler.get_scale() == 2.0**125


def test_build_is_repeatable_and_leaves_the_random_state_alone(make_profile):
    def weights(seed):
        model = GifQAModel.build(make_profile(training__seed=seed), torch.device("cpu"))
        return torch.cat([p.flatten() for p in model.parameters() if p.requires_grad])

    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, again, other = weights(0), weights(0), weights(1)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# ---- Answers -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def greedy_alone(model: GifQAModel, prompt: list[int], frames: torch.Tensor) -> str:
    """Greedy decoding by hand: the whole sequence again for every token, no cache, no padding."""
    tokens: list[int] = []
    told = ["</turn>", "<eos>", "<|eos|>"] if model.profile.language_model.chat else [model.tokenizer.eos_token]
    ends = model.tokenizer.convert_tokens_to_ids(told)
    for _ in range(gif_qa.MAX_NEW_TOKENS):
        logits = model.language_model(inputs_embeds=embed_alone(model, prompt + tokens, frames)).logits
        token = int(logits[0, -1].argmax())
        if token in ends:
            break
        tokens.append(token)
    return model.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_greedy_generation_equals_uncached_unpadded_decoding(model):
    frames, lengths = features()
    alone = [greedy_alone(model, p, f[:n]) for p, f, n in zip(prompts(model), frames, lengths, strict=True)]
    assert model.generate(prompts(model), frames, lengths) == alone


def test_beam_search_equals_uncached_unpadded_beam_search(model):
    frames, lengths = features()
    alone = []
    for prompt, video, length in zip(prompts(model), frames, lengths, strict=True):
        with torch.no_grad():
            tokens = model.language_model.generate(
                inputs_embeds=embed_alone(model, prompt, video[:length]),
                max_new_tokens=gif_qa.MAX_NEW_TOKENS,
                num_beams=3,
                do_sample=False,
                use_cache=False,
            )
        alone.append(model.tokenizer.decode(tokens[0], skip_special_tokens=True).strip())
    assert model.generate(prompts(model), frames, lengths, num_beams=3) == alone


CANDIDATES = [["red", "blue", "a small green star", "", "red"], ["1", "10"], ["it spins"]]


@pytest.mark.parametrize("tokens_a_row", [512, 6])  # 6: candidates spread over several rows
@torch.no_grad()
def test_shared_prefix_scores_equal_one_prompt_per_option(model, monkeypatch, tokens_a_row):
    monkeypatch.setattr(gif_qa.model, "CANDIDATE_TOKENS", tokens_a_row)
    frames, lengths = features()
    scores = model.score(prompts(model), CANDIDATES, frames.numpy(), lengths.numpy())
    for prompt, texts, video, length, ours in zip(prompts(model), CANDIDATES, frames, lengths, scores, strict=True):
        assert ours.shape == (len(texts), 2)
        for text, (summed, per_token) in zip(texts, ours, strict=True):
            alone = log_probs_alone(model, prompt, model.encode_answer(text), video[:length])
            assert summed == pytest.approx(alone.sum().item(), abs=1e-4)
            assert per_token == pytest.approx(alone.mean().item(), abs=1e-4)


def test_best_answer_is_the_argmax_over_the_whole_vocabulary(model):
    frames, lengths = features()
    vocabulary = [
        f"{a}{b}" for a in ("re", "blu", "", "gre", "the ") for b in ("d", "e", "en", "circle", "7", "s", "x")
    ]
    vocabulary += [str(number) for number in range(40)]
    scores = model.score(prompts(model), [vocabulary] * 3, frames, lengths)
    best = [vocabulary[int(score[:, 0].argmax())] for score in scores]
    assert model.best_answer(prompts(model), vocabulary, frames, lengths) == best


def test_best_answer_goes_on_while_a_bound_allows_it(llama, monkeypatch):
    """The best word may be far down in the order of first tokens: bounds decide, not a fixed number of words."""
    vocabulary = [f"{letter}{number}" for letter in "abcdefghijklmnopqrstuvwxyz" for number in (1, 2)]
    tokens = {word: llama.encode_answer(word) for word in vocabulary}
    (frames, lengths), prompt = features(), prompts(llama)[0]
    with torch.no_grad():
        bounds = {word: log_probs_alone(llama, prompt, tokens[word][:1], frames[0]).item() for word in vocabulary}
    by_bound = sorted(vocabulary, key=lambda word: -bounds[word])
    likeliest, last = by_bound[0], by_bound[-1]
    assert sum(bounds[word] > bounds[last] + 1e-3 for word in vocabulary) > WORDS_AT_ONCE  # never in the first lot
    scored = []

    def costs(best, cost):
        def fake(prompts, candidates, video):
            scored.extend(tuple(c) for words in candidates for c in words)
            return [np.array([[cost if c == tokens[best] else -100.0, 0.0] for c in words]) for words in candidates]

        return fake

    monkeypatch.setattr(llama, "score_tokens", costs(last, -50.0))
    assert llama.best_answer([prompt], vocabulary, frames[:1], lengths[:1]) == [last]
    assert len(scored) == len(vocabulary)
    scored.clear()
    monkeypatch.setattr(llama, "score_tokens", costs(likeliest, bounds[likeliest]))  # as good as any word can be
    assert llama.best_answer([prompt], vocabulary, frames[:1], lengths[:1]) == [likeliest]
    assert len(scored) == WORDS_AT_ONCE


@pytest.mark.parametrize("place", ["first", "later"])
def test_best_answer_is_not_chosen_from_scores_that_are_not_finite(llama, monkeypatch, place):
    """NaN in the bounds of the first tokens, or in the scores of whole words, of the second prompt alone."""
    frames, lengths = features()
    if place == "first":
        frames[2] = math.nan
        expected = "prompt 3 of 3"
    else:
        original, expected = llama.score_tokens, "prompt 2 of 3"

        def score_tokens(*arguments):
            scores = original(*arguments)
            scores[1][-1, 0] = math.nan
            return scores

        monkeypatch.setattr(llama, "score_tokens", score_tokens)
    with pytest.raises(ScoreError, match=expected):
        llama.best_answer(prompts(llama), ["red", "blue", "7"], frames, lengths)


def test_inference_ignores_and_restores_training_mode(build):
    model = build("llama", language_model__lora_dropout=0.5).train()
    frames, lengths = features()
    first, second = (model.score(prompts(model), CANDIDATES, frames, lengths) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert model.training
    assert model.language_model.training


def test_options_stand_in_the_prompt_only_when_given(llama):
    decode = llama.tokenizer.decode
    assert decode(llama.encode_prompt("who ?")) == "<|bos|>Question: who ?\nAnswer:"
    assert decode(llama.encode_prompt("who ?", ["a", "b"])) == "<|bos|>Question: who ?\nOptions: a; b\nAnswer:"
    assert decode(llama.encode_answer("red")) == " red<|eos|>"


def test_impossible_inputs_are_refused(llama, build, tiny_gpt2_dir):
    frames, lengths = features()
    with pytest.raises(ValueError, match="takes video"):
        llama.generate(prompts(llama))
    with pytest.raises(ValueError, match="32"):
        llama.generate(prompts(llama), frames[..., :8], lengths)
    with pytest.raises(ValueError, match="over the language model's 128"):
        gpt2 = build("gpt2")
        gpt2.generate([gpt2.encode_prompt("a b c d e f " * 20)], frames[:1], lengths[:1])
    with pytest.raises(BundleError, match="other-encoder"):
        llama.check_features("other-encoder")
    llama.check_features(llama.encoder_key)
    name, _, content = llama.encoder_key.partition("|")
    llama.check_features(f"moved/{name}|{content}")
    with pytest.raises(BundleError, match="another"):
        llama.check_features(llama.encoder_key.replace(content.split("|")[2], "another"))


@pytest.mark.parametrize("name", ["c_attn", "proj"])
def test_target_modules_that_the_model_lacks_are_named(make_model, name):
    with pytest.raises(ValueError, match=rf"\['{name}'\].*q_proj"):
        make_model(language_model__target_modules=["q_proj", name])


# ---- Bundle --------------------------------------------------------------------------------------------------------


def reload(model: GifQAModel, folder, dirs) -> GifQAModel:
    model.save_bundle(folder, {"metrics": {"loss": 1.5}})
    return load_bundle(folder, language_model=str(dirs[Path(model.profile.language_model.model).name]))


@pytest.fixture(scope="module")
def dirs(tiny_llama_dir, tiny_gpt2_dir, chat_dir):
    return {folder.name: folder for folder in (tiny_llama_dir, tiny_gpt2_dir, chat_dir("gemma"))}


@torch.no_grad()
def test_saved_and_reloaded_model_has_identical_logits(model, tmp_path, dirs):
    loaded = reload(model, tmp_path / "bundle", dirs)
    assert torch.equal(loaded(**batch(loaded))["logits"], model(**batch(model))["logits"])
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.video == model.video
    assert loaded.encoder_key == model.encoder_key
    again = reload(loaded, tmp_path / "again", dirs)
    assert torch.equal(again(**batch(again))["logits"], model(**batch(model))["logits"])


@torch.no_grad()
def test_stock_peft_loads_the_adapter(model, tmp_path, dirs):
    folder = model.save_bundle(tmp_path / "bundle")
    path = str(dirs[Path(model.profile.language_model.model).name])
    base, _ = load_language_model(model.profile.language_model, torch.device("cpu"), path)
    ids = torch.arange(3, 40)[None]
    untrained = base(ids).logits
    stock = PeftModel.from_pretrained(base, folder).eval()
    torch.testing.assert_close(stock(ids).logits, model.language_model(ids).logits, atol=1e-6, rtol=1e-6)
    assert (stock(ids).logits - untrained).abs().max() > 0.1


def test_bundle_files_are_complete_portable_and_repeatable(llama, build, tmp_path):
    folder = llama.save_bundle(tmp_path / "a", {"metrics": {"loss": 1.5}})
    names = {"adapter_model.safetensors", "adapter_config.json", "connector.safetensors", "bundle.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert {name.split(".")[0] for name in load_file(folder / "connector.safetensors")} == {"connector", "mit"}
    facts = json.loads((folder / "bundle.json").read_text())
    assert facts["video"] is True
    assert facts["metrics"] == {"loss": 1.5}
    assert facts["encoder"]["key"] == llama.encoder_key
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny-llama0"
    for file in ("bundle.json", "adapter_config.json"):
        assert str(tmp_path.parent) not in (folder / file).read_text()
        assert '"/' not in (folder / file).read_text()
    other = build("llama").save_bundle(tmp_path / "b", {"metrics": {"loss": 1.5}})
    assert all((folder / name).read_bytes() == (other / name).read_bytes() for name in names)

    blind = build("blind").save_bundle(tmp_path / "blind")
    assert {path.name for path in blind.iterdir()} == names - {"connector.safetensors"}
    assert json.loads((blind / "bundle.json").read_text())["video"] is False
    with pytest.raises(ValueError, match="profile"):
        llama.save_bundle(tmp_path / "a", {"profile": {}})


def test_interrupted_save_keeps_the_old_bundle(llama, tmp_path, monkeypatch, tiny_llama_dir):
    folder = llama.save_bundle(tmp_path / "bundle", {"metrics": {"run": 1}})

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(gif_qa.model, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        llama.save_bundle(folder, {"metrics": {"run": 2}})
    assert gif_qa.read_bundle(folder)["metrics"] == {"run": 1}
    load_bundle(folder, language_model=str(tiny_llama_dir))


@torch.no_grad()
def test_a_frozen_mit_is_kept_in_half_precision_where_it_came_in_it(build, tmp_path, tiny_llama_dir):
    """Of numbers that half precision holds nothing is lost; others, and what was trained, stay as they are."""
    model = build("llama", connector__train_mit=False)
    mit = model.mit.state_dict()
    for tensor in mit.values():
        tensor.copy_(tensor.half())
    odd = sorted(mit)[0]
    mit[odd].view(-1)[0] = 1 + 2**-20  # between two numbers of half precision
    path = model.save_bundle(tmp_path / "bundle") / "connector.safetensors"
    kept = load_file(path)
    assert {name for name, t in kept.items() if t.dtype == torch.float32} == {
        f"mit.{odd}",
        *(name for name in kept if name.startswith("connector.")),
    }
    loaded = load_bundle(path.parent, language_model=str(tiny_llama_dir))
    assert all(t.dtype == torch.float32 and torch.equal(t, mit[n]) for n, t in loaded.mit.state_dict().items())
    trained = build("llama", connector__train_mit=True).save_bundle(tmp_path / "trained") / "connector.safetensors"
    assert {tensor.dtype for tensor in load_file(trained).values()} == {torch.float32}


FAULTS = {
    "missing": lambda tensors, name: tensors.pop(name),
    "not expected": lambda tensors, name: tensors.update({name + ".more": torch.zeros(1)}),
    "expected": lambda tensors, name: tensors.update({name: torch.zeros(3)}),
}


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "connector.safetensors"])
@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_tensors_are_named(llama, tmp_path, tiny_llama_dir, file, fault):
    path = llama.save_bundle(tmp_path / "bundle") / file
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}  # not mapped to the file written below
    name = sorted(tensors)[-1]
    FAULTS[fault](tensors, name)
    save_file(tensors, path)
    with pytest.raises(BundleError, match=rf"{fault}.*") as error:
        load_bundle(path.parent, language_model=str(tiny_llama_dir))
    assert name in str(error.value)


@torch.no_grad()
def test_a_bundle_keeps_the_size_of_word_embeddings_where_its_gain_is_relative_to_it(build, tmp_path, tiny_llama_dir):
    """Whatever the size is on the machine that loads it; in half precision it comes out a little different."""
    model = build("llama", connector__output_scale="fixed")
    words = model.language_model.get_input_embeddings().weight
    assert model.connector.output_norm.rms.item() == pytest.approx(words.pow(2).mean().sqrt().item(), rel=1e-6)
    model.connector.output_norm.rms.mul_(1.5)
    path = model.save_bundle(tmp_path / "bundle") / "connector.safetensors"
    loaded = load_bundle(path.parent, language_model=str(tiny_llama_dir))
    assert torch.equal(loaded(**batch(loaded))["logits"], model(**batch(model))["logits"])
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    del tensors["connector.output_norm.rms"]
    save_file(tensors, path)
    with pytest.raises(BundleError, match=r"missing: connector\.output_norm\.rms"):
        load_bundle(path.parent, language_model=str(tiny_llama_dir))


NOT_FINITE = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "connector.safetensors"])
@pytest.mark.parametrize("number", NOT_FINITE)
def test_tensors_that_are_not_finite_are_named_with_their_file(llama, tmp_path, tiny_llama_dir, file, number):
    path = llama.save_bundle(tmp_path / "bundle") / file
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    name = sorted(tensors)[3]
    tensors[name].view(-1)[-1] = number
    save_file(tensors, path)
    with pytest.raises(BundleError, match="not finite") as error:
        load_bundle(path.parent, language_model=str(tiny_llama_dir))
    assert str(path) in str(error.value) and name in str(error.value) and sorted(tensors)[2] not in str(error.value)


@pytest.mark.parametrize("part", ["lora_B", "connector"])
def test_a_model_that_is_not_finite_is_not_saved_over_one_that_is(build, tmp_path, part):
    model = build("llama")
    folder = model.save_bundle(tmp_path / "bundle")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    parameter = next(p for name, p in model.named_parameters() if part in name)
    with torch.no_grad():
        parameter.view(-1)[0] = math.nan
    with pytest.raises(BundleError, match=f"not finite.*{part}.*bundle was not written"):
        model.save_bundle(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("quantisation", ["none", "nf4"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_language_model_that_is_not_finite_is_refused(tmp_path, make_profile, tiny_llama_dir, quantisation, name):
    """The matrix is one of those that nf4 packs: there its block's scale tells."""
    shutil.copytree(tiny_llama_dir, tmp_path / "llama")
    path = tmp_path / "llama" / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    tensors[name].view(-1)[5] = math.inf
    save_file(tensors, path, {"format": "pt"})
    profile = make_profile(language_model__model=str(path.parent), language_model__quantisation=quantisation)
    with pytest.raises(BundleError, match=rf"{path.parent} .*not finite.*{name}"):
        load_language_model(profile.language_model, torch.device("cpu"))


def test_weights_that_overflow_in_the_precision_of_the_gpu_are_refused(
    tmp_path, make_profile, tiny_llama_dir, monkeypatch
):
    """70,000 is a number in float32 and bfloat16; the greatest of float16 is 65,504."""
    shutil.copytree(tiny_llama_dir, tmp_path / "llama")
    path = tmp_path / "llama" / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    tensors["model.norm.weight"][0] = 70_000
    save_file(tensors, path, {"format": "pt"})
    config = make_profile(language_model__model=str(path.parent)).language_model
    load_language_model(config, torch.device("cpu"))
    monkeypatch.setattr("helpers.models.language.compute_dtype", lambda device: torch.float16)
    with pytest.raises(BundleError, match=r"float16.*model\.norm\.weight"):
        load_language_model(config, torch.device("cpu"))


@pytest.mark.parametrize("left", [0.0, 0.5])
@pytest.mark.parametrize(
    "file", ["adapter_model.safetensors", "connector.safetensors", "adapter_config.json", "bundle.json"]
)
def test_damaged_files_are_named_with_what_to_do(llama, tmp_path, tiny_llama_dir, file, left):
    path = llama.save_bundle(tmp_path / "bundle") / file
    os.truncate(path, int(left * path.stat().st_size))
    with pytest.raises(BundleError, match=rf"{path} is damaged .*: copy the bundle again, or train it anew"):
        load_bundle(path.parent, language_model=str(tiny_llama_dir))


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "connector.safetensors", "bundle.json"])
def test_missing_files_are_named(llama, tmp_path, tiny_llama_dir, file):
    folder = llama.save_bundle(tmp_path / "bundle")
    (folder / file).unlink()
    with pytest.raises(BundleError, match=file):
        load_bundle(folder, language_model=str(tiny_llama_dir))


def test_another_base_model_is_refused_naming_both(llama, tmp_path, tiny_llama_dir, tiny_gpt2_dir, tiny_xclip_dir):
    folder = llama.save_bundle(tmp_path / "bundle")
    torch.manual_seed(5)
    config = LlamaConfig.from_pretrained(tiny_llama_dir)
    twin = tmp_path / "twin-llama"  # same shape, other weights
    LlamaForCausalLM(config).save_pretrained(twin)
    AutoTokenizer.from_pretrained(tiny_llama_dir).save_pretrained(twin)
    for other in (twin, tiny_gpt2_dir):
        with pytest.raises(BundleError, match=rf"tiny-llama0.*{other.name}"):
            load_bundle(folder, language_model=str(other))

    other = tmp_path / "other-xclip"
    XCLIPModel(XCLIPModel.from_pretrained(tiny_xclip_dir).config).save_pretrained(other)
    with pytest.raises(BundleError, match=rf"tiny-xclip0.*{other.name}"):
        load_bundle(folder, language_model=str(tiny_llama_dir), video_model=str(other))
    with pytest.raises(BundleError, match=rf"tiny-xclip0.*{other.name}"):
        GifQA.from_pretrained(folder, language_model=str(tiny_llama_dir), video_model=str(other))


def test_the_same_base_model_in_another_precision_is_accepted(llama, tmp_path, tiny_llama_dir):
    folder = llama.save_bundle(tmp_path / "bundle")
    half = tmp_path / "half"
    LlamaForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(tiny_llama_dir).save_pretrained(half)
    load_bundle(folder, language_model=str(half))


def test_merging_into_the_dequantised_base_keeps_the_answers_and_into_nf4_does_not(build, tmp_path, tiny_llama_dir):
    """As docs/tgif-qa.md says to merge: LoRA belongs to the numbers that NF4 stands for."""
    model = build("nf4")
    with torch.no_grad():  # a fresh adapter adds nothing
        for name, parameter in model.language_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    folder = model.save_bundle(tmp_path / "bundle")
    ids = torch.tensor([model.encode_prompt(QUESTIONS[1])])

    def base():
        config = BaseLanguageModel(str(tiny_llama_dir), None, "nf4")
        return load_language_model(config, torch.device("cpu"))[0]

    with torch.no_grad():
        wanted = model.language_model(ids).logits
        merged = PeftModel.from_pretrained(base().dequantize(), folder).merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        right = LlamaForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
        wrong = PeftModel.from_pretrained(base(), folder).merge_and_unload()(ids).logits
    assert (right - wanted).abs().max() < 1e-4
    assert (wrong - wanted).abs().mean() > 1e-2


# ---- One call ------------------------------------------------------------------------------------------------------


def make_gif(frames: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, 40, 48, 3), dtype=np.uint8)
    images = [Image.fromarray(frame) for frame in pixels]
    buffer = BytesIO()
    images[0].save(buffer, format="GIF", save_all=True, append_images=images[1:], duration=50, loop=0)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def qa(build, tmp_path_factory, tiny_llama_dir, tiny_xclip_dir):
    folder = build("llama").save_bundle(tmp_path_factory.mktemp("qa") / "bundle")
    return GifQA.from_pretrained(folder, language_model=str(tiny_llama_dir), video_model=str(tiny_xclip_dir))


OPTIONS = ["it spins", "red", "a small star"]


def test_options_are_answered_by_their_scores(qa):
    gif = make_gif(19)
    answer = qa.answer(gif, "what does it do ?", OPTIONS)
    frames, times = qa.encode(gif)
    assert len(frames) == len(times) == len(answer.relevance) == len(answer.frame_times_ms) == 19
    scores = qa.model.score([qa.model.encode_prompt("what does it do ?")], [OPTIONS], frames[None], [19])[0][:, 0]
    probabilities = np.exp(scores) / np.exp(scores).sum()
    ours = dict([(answer.text, answer.confidence), *answer.alternatives])
    assert ours == pytest.approx(dict(zip(OPTIONS, probabilities, strict=True)), abs=1e-5)
    assert answer.text == OPTIONS[int(scores.argmax())]
    assert [p for _, p in answer.alternatives] == sorted((p for _, p in answer.alternatives), reverse=True)


def test_a_bundle_asks_with_options_as_it_was_trained(qa, monkeypatch):
    """Lettered, in an order of its own, whichever way they are given; where it lists none, the prompt has none."""
    told = []
    original = GifQAModel.score_tokens
    monkeypatch.setattr(
        GifQAModel,
        "score_tokens",
        lambda self, prompts, *rest: told.append(prompts[0]) or original(self, prompts, *rest),
    )
    profile, question = qa.model.profile, "what does it do ?"
    for style, pattern in (
        ("lettered", r"\nOptions:\n\(A\) (.+)\n\(B\) (.+)\n\(C\) (.+)\nAnswer:"),
        ("listed", r"\nOptions: (.+); (.+); (.+)\nAnswer:"),
    ):
        update = {
            "evaluation": profile.evaluation.model_copy(update={"options_in_prompt": True}),
            "language_model": profile.language_model.model_copy(update={"option_style": style}),
        }
        monkeypatch.setattr(qa.model, "profile", profile.model_copy(update=update))
        answers = [qa.answer(None, question, list(order)) for order in itertools.permutations(OPTIONS)]
        prompt = qa.model.tokenizer.decode(told[-1])
        found = re.fullmatch(rf"<\|bos\|>Question: what does it do \?{pattern}", prompt)
        assert sorted(found.groups()) == sorted(OPTIONS)
        assert {answer.text for answer in answers} == {answers[0].text} and told[-6:] == [told[-1]] * 6
        assert [answer.confidence for answer in answers] == pytest.approx([answers[0].confidence] * 6, rel=1e-4)
    monkeypatch.setattr(qa.model, "profile", profile)
    qa.answer(None, question, OPTIONS)
    assert qa.model.tokenizer.decode(told[-1]) == "<|bos|>Question: what does it do ?\nAnswer:"


def test_frames_are_those_that_the_store_keeps(qa, tmp_path, monkeypatch):
    """Also under WebP, which changes pixels: what is asked about is compressed as what was trained on."""
    rough = {"frame_format": "webp", "frame_quality": 40, "image_size": 32, "groups": [1, 2, 3], "workers": 1}
    data = qa.model.profile.data.model_copy(update=rough)
    monkeypatch.setattr(qa.model, "profile", qa.model.profile.model_copy(update={"data": data}))
    gif = make_gif(19)
    (tmp_path / "a.gif").write_bytes(gif)
    row = question_row(question_id="q", gif="a.gif", split="train", task="count", question="how many ?", answer="3")
    corpus = Corpus("one", question_table([row]), {"a.gif": str(tmp_path / "a.gif")}, reject_table([]))
    shard_gifs(corpus, tmp_path / "01", data)
    table = FrameTable(tmp_path / "01" / "frames")
    kept, times = table.frames(table.ids[0], qa.model.profile.evaluation.groups)
    seen, starts = qa.sample(gif)
    assert np.array_equal(seen, kept) and starts == times.tolist()
    assert not np.array_equal(seen, decode(gif, image_size=32, groups=[3]).frames)


def test_frame_embeddings_are_the_cached_ones(qa, tiny_xclip_dir):
    """What 02 caches: groups of 16, the last one padded and masked, in fp16."""
    frames, _ = qa.encode(make_gif(19))
    decoded = torch.from_numpy(decode(make_gif(19), image_size=32, groups=[3]).frames)
    padded = torch.zeros(2, 16, 32, 32, 3, dtype=torch.uint8)
    padded[0], padded[1, :3] = decoded[:16], decoded[16:]
    encoder = FrameEncoder(XCLIPModel.from_pretrained(tiny_xclip_dir).eval(), str(tiny_xclip_dir))
    with torch.no_grad():
        expected = encoder(padded, torch.tensor([16, 3])).half().flatten(0, 1)[:19]
    assert torch.equal(frames, expected)
    assert encoder.key == qa.model.encoder_key


def test_counts_are_the_rounded_expectation(qa):
    question = "How many times does it jump ?"
    answer = qa.answer(make_gif(5), question)
    distribution = dict([(answer.text, answer.confidence), *answer.alternatives])
    assert set(distribution) == {str(number) for number in range(1, 11)}
    assert sum(distribution.values()) == pytest.approx(1)
    expectation = sum(int(number) * p for number, p in distribution.items())
    assert answer.text == str(math.floor(expectation + 0.5))
    assert qa.answer(make_gif(5), "number of jumps ?", task="count").text in distribution
    assert qa.answer(make_gif(5), question, ["2", "3"]).text in ("2", "3")


def test_open_answers_are_greedy_with_their_probability(qa):
    gif, question = make_gif(5), "what is it ?"
    answer = qa.answer(gif, question)
    frames, _ = qa.encode(gif)
    prompt = [qa.model.encode_prompt(question)]
    assert [answer.text] == qa.model.generate(prompt, frames[None], [5])
    score = qa.model.score(prompt, [[answer.text]], frames[None], [5])[0][0, 0]
    assert answer.confidence == pytest.approx(math.exp(score), rel=1e-4)
    assert answer.text not in [text for text, _ in answer.alternatives]
    assert len(answer.alternatives) >= 1


@pytest.mark.parametrize("options", [OPTIONS, None])
def test_relevance_is_the_fall_when_a_frame_is_hidden(qa, options):
    """A GIF of one frame: hiding it is the same as seeing no GIF at all."""
    gif, question = make_gif(1), "what is it ?"
    answer = qa.answer(gif, question, options)
    prompt, texts = [qa.model.encode_prompt(question)], options or [answer.text]
    unseen = qa.model.score(prompt, [texts], torch.zeros(1, 1, 32), [0])[0][:, 0]
    if options:
        unseen = unseen - np.logaddexp.reduce(unseen)
    drop = math.log(answer.confidence) - unseen[texts.index(answer.text)]
    assert answer.relevance == pytest.approx([drop], abs=1e-4)
    assert answer.hidden == [qa.answer(None, question, options).text]


def test_relevance_of_frames_in_one_batch_equals_one_at_a_time(qa):
    gif = make_gif(18)
    answer = qa.answer(gif, "what is it ?", OPTIONS)
    frames, _ = qa.encode(gif)
    prompt, tokens = [qa.model.encode_prompt("what is it ?")], [[qa.model.encode_answer(o) for o in OPTIONS]]
    for hidden in (0, 7, 17):
        mask = torch.ones(1, 18, dtype=torch.bool)
        mask[0, hidden] = False
        with torch.no_grad():
            scores = qa.model.score_tokens(prompt, tokens, (frames[None].float(), mask))[0][:, 0]
        without = (scores - np.logaddexp.reduce(scores))[OPTIONS.index(answer.text)]
        assert answer.relevance[hidden] == pytest.approx(math.log(answer.confidence) - without, abs=1e-4)
        assert answer.hidden[hidden] == OPTIONS[int(scores.argmax())]
    assert np.ptp(answer.relevance) > 1e-4


def test_path_bytes_and_image_give_the_same_answer(qa, tmp_path):
    gif = make_gif(6)
    (tmp_path / "a.gif").write_bytes(gif)
    image = Image.open(BytesIO(gif))
    image.seek(3)
    answers = [qa.answer(given, "what is it ?") for given in (gif, tmp_path / "a.gif", str(tmp_path / "a.gif"), image)]
    assert all(answer == answers[0] for answer in answers)
    assert image.tell() == 3
    still = Image.new("RGB", (40, 40), "red")
    assert len(qa.answer(still, "what color ?").frame_times_ms) == 1


def test_without_a_gif_nothing_is_shown(qa, build, tmp_path, tiny_llama_dir):
    answer = qa.answer(None, "what is it ?", OPTIONS)
    assert answer.relevance == answer.frame_times_ms == []
    folder = build("blind").save_bundle(tmp_path / "blind")
    blind = GifQA.from_pretrained(folder, language_model=str(tiny_llama_dir))
    # Both models have the same adapter, so without video tokens they are the same model.
    assert blind.answer(None, "what is it ?", OPTIONS) == blind.answer(make_gif(4), "what is it ?", OPTIONS)


@pytest.mark.parametrize(
    ("question", "options"),
    [("what does it do ?", ["it spins", "red"]), ("How many times does it jump ?", None), ("what is it ?", None)],
)
@pytest.mark.parametrize("hidden", [False, True])
def test_no_answer_has_the_confidence_nan(qa, monkeypatch, question, options, hidden):
    """Whatever is asked: damage that shows at once, and damage that shows only where a frame is hidden."""
    tokens = qa.model._video_tokens

    def damaged(frames, mask):
        result, token_mask = tokens(frames, mask)
        return result * (1.0 if hidden and mask.all() else math.inf), token_mask

    monkeypatch.setattr(qa.model, "_video_tokens", damaged)
    said = re.escape(f"the question {question!r}" + (" with a frame hidden" if hidden else ""))
    with pytest.raises(ScoreError, match=f"{said} are not finite"):
        qa.answer(make_gif(5), question, options)


@pytest.mark.parametrize("options", [["one"], ["a", " "], ["a", "a"]])
def test_useless_options_are_refused(qa, options):
    with pytest.raises(ValueError, match="option"):
        qa.answer(make_gif(2), "what is it ?", options)


def test_empty_question_and_broken_gif_are_refused(qa):
    with pytest.raises(ValueError, match="empty"):
        qa.answer(make_gif(2), "  ")
    with pytest.raises(GifRejected):
        qa.answer(b"this is no GIF", "what is it ?")
