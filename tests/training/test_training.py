"""Batches, collator, optimizer groups, checkpoints, deadline and resume, on a toy model that learns in a second."""

import hashlib
import inspect
import itertools
import json
import math
import os
import re
import signal
import time
import warnings
import weakref
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from helpers import training
from helpers.corpora import target_answer
from helpers.models.gif_qa import TooLong, Window
from helpers.models.parts import IGNORED
from helpers.training.checkpoints import CheckpointError
from helpers.training.collective import TrainingError
from helpers.training.gif_qa import Collator, QADataset, parameter_groups, plan_batches, train
from helpers.training.plan import BatchPlan, bucket
from helpers.workspace.machine import free_memory


class Section(SimpleNamespace):
    def model_dump(self, mode="json", exclude=()):
        return {k: v for k, v in vars(self).items() if k not in exclude}


def test_held_out_gifs_are_whole_and_not_trained_on():
    questions = toy_questions(300, 50)
    kept, held = training.hold_out(questions, 0.1, seed=0)
    assert held["gif_sha256"].nunique() == 5 and not set(kept["gif_sha256"]) & set(held["gif_sha256"])
    assert len(kept) + len(held) == 300 and kept.index.union(held.index).equals(questions.index)
    assert not held.equals(training.hold_out(questions, 0.1, seed=1)[1])
    assert len(training.hold_out(questions, 0.0, seed=0)[1]) == 0


def toy_config(**changes):
    settings = {
        "epochs": 2.0,
        "tokens_per_step": 200,
        "learning_rate_lora": 1e-2,
        "learning_rate_connector": 2e-2,
        "learning_rate_mit": 5e-3,
        "weight_decay": 0.01,
        "warmup_ratio": 0.1,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "seed": 3,
        "checkpoint_minutes": 60.0,
        "groups": [1, 2, 3],
        "log_steps": 4,
        "gpus": 1,
        "loss": "per_token",
        "choice": "none",
    } | changes
    return SimpleNamespace(
        training=Section(**settings),
        evaluation=Section(options_in_prompt=False, groups=2, batch_tokens=400),
        encoder=Section(frames_per_group=16),
        connector=Section(kind="mlp", queries=4),
        language_model=Section(model="toy"),
    )


class ToyFeatures:
    """The feature table's interface over arrays in memory; the GIF's name is its number."""

    encoder_key, dim = "toy", 8

    def __init__(self, count: int, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.frames = rng.integers(6, 49, size=count)
        self.means = rng.normal(size=(count, self.dim))
        self.calls = 0

    def lengths(self, ids, groups):
        return np.array([min(self.frames[int(i)], 16 * g) for i, g in zip(ids, groups, strict=True)])

    def fetch(self, ids, groups):
        self.calls += 1
        lengths = self.lengths(ids, groups)
        frames = np.zeros((len(ids), lengths.max(), self.dim), dtype=np.float16)
        for i, (name, n) in enumerate(zip(ids, lengths, strict=True)):
            frames[i, :n] = self.means[int(name)]
        return frames, lengths.astype(np.int64)


class ToyModel(nn.Module):
    """Predicts the answer's tokens from the mean of the frames and the token before, with dropout."""

    def __init__(self, video: bool = True, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.video, self.size = video, None
        self.tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=1)
        self.mit = nn.Linear(8, 8)
        self.connector = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16))
        self.language_model = nn.ModuleDict({"embed": nn.Embedding(64, 16), "head": nn.Linear(16, 64)})
        self.language_model["embed"].requires_grad_(False)
        self.dropout = nn.Dropout(0.2)

    def check_features(self, encoder_key):
        assert encoder_key == "toy"

    def window(self):
        return Window(self.tokenizer, self.size, toy_config())

    def encode_prompt(self, question, options=None):
        words = [question, *(options or [])]
        return [2 + sum(w.encode()) % 60 for text in words for w in text.split()]

    def encode_answer(self, answer):
        return [2 + sum(answer.encode()) % 60, 1]

    def forward(self, input_ids, attention_mask, labels, frames=None, lengths=None):
        text = self.language_model["embed"](input_ids)
        hidden = text.roll(1, dims=1)
        if frames is not None:  # a blind model that was shown frames would see
            pooled = frames.float().sum(1) / lengths[:, None]
            hidden = hidden + self.connector(torch.tanh(self.mit(pooled)))[:, None]
        chosen = labels != IGNORED
        logits = self.language_model["head"](self.dropout(hidden[chosen]))
        return {"loss": nn.functional.cross_entropy(logits, labels[chosen]), "logits": logits}


def toy_questions(rows: int, gifs: int, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    words = [
        "what",
        "color",
        "is",
        "the",
        "small",
        "circle",
        "square",
        "star",
        "doing",
        "when",
        "it",
        "turns",
        "around",
    ]
    gif = rng.integers(gifs, size=rows)
    task = np.where(rng.random(rows) < 0.3, "count", "frameqa")
    return pd.DataFrame(
        {
            "question_id": [f"q{i}" for i in range(rows)],
            "gif_sha256": gif.astype(str),
            "task": task,
            "question": [" ".join(rng.choice(words, size=rng.integers(4, 14))) for _ in range(rows)],
            "options": [[] for _ in range(rows)],
            "answer": np.where(task == "count", "0", np.where(gif % 2 == 0, "red", "green")),
            "label": np.where(task == "count", 0, -1),
        }
    )


def test_a_question_that_the_window_cannot_hold_is_named(tmp_path, world):
    """Each row's tokens by loops; the window is one token short of the longest row, to be trained on or watched."""
    questions, features, profile = world
    model = ToyModel()

    def room(row, groups):
        frames = min(features.frames[int(row.gif_sha256)], 16 * groups)
        answer = target_answer(row.task, row.answer, row.label)
        return len(row.question.split()) + len(model.encode_answer(answer)) + frames + math.ceil(frames / 16)

    for watched, groups in ((None, 3), (questions, 2)):
        trained = questions if watched is None else questions[questions["question"].str.split().str.len() < 5]
        asked = questions if watched is None else watched
        needed = {row.question_id: room(row, groups) for row in asked.itertuples()}
        model.size = max(needed.values()) - 1
        if watched is not None:
            trained = trained[[room(row, 3) <= model.size for row in trained.itertuples()]]
        longest = {name for name, tokens in needed.items() if tokens > model.size}
        with pytest.raises(TooLong, match="needs") as error:
            train(model, trained, features, profile, tmp_path / str(groups), eval_questions=watched, progress=False)
        assert re.match(r"question (\w+) needs (\d+) tokens", str(error.value)).groups() in {
            (name, str(model.size + 1)) for name in longest
        }


HOUR = 3600.0  # seconds; with a disk as slow as `slow_disk` a run stops after one step to save in time


@pytest.fixture
def slow_disk(monkeypatch):
    monkeypatch.setattr(training.engine, "SLOW_DISK", 1e-3)


@pytest.fixture
def world():
    features = ToyFeatures(40)
    return toy_questions(120, 40), features, toy_config()


def run(folder, world, *, video=True, **options):
    questions, features, config = world
    model = ToyModel(video)
    result = train(model, questions, features, config, folder, progress=False, **options)
    return model, result


def test_a_trained_model_that_is_deleted_gives_its_memory_back(tmp_path, world):
    model, _ = run(tmp_path, world)
    gone = weakref.ref(model)
    del model
    free_memory()
    assert gone() is None


def newest(folder):
    return sorted((folder / "checkpoints").glob("step-*"))[-1]


# ---- rows and batches ----


def test_labels_cover_the_answer_and_nothing_else():
    questions = toy_questions(5, 3)
    model, features = ToyModel(), ToyFeatures(3)
    dataset = QADataset(model, questions)
    batch = Collator(features, pad_token_id=0)([dataset[(i, 1, 0)] for i in range(5)])
    for i, row in enumerate(questions.itertuples()):
        prompt = model.encode_prompt(row.question)
        answer = model.encode_answer("1" if row.task == "count" else row.answer)
        n = len(prompt) + len(answer)
        assert batch["input_ids"][i, :n].tolist() == prompt + answer
        assert batch["labels"][i].tolist() == [IGNORED] * len(prompt) + answer + [IGNORED] * (
            len(batch["labels"][i]) - n
        )
        assert batch["attention_mask"][i].tolist() == [1] * n + [0] * (len(batch["labels"][i]) - n)
        assert batch["lengths"][i] == min(16, features.frames[int(row.gif_sha256)])
    assert features.calls == 1


def test_a_count_of_zero_is_trained_as_one():
    answers = [target_answer("count", str(n), n) for n in (0, 2, 10)]
    assert answers == ["1", "2", "10"]
    assert target_answer("action", "jumps", 0) == "jumps"


def test_options_enter_the_prompt_only_when_asked():
    questions = toy_questions(2, 2).assign(task="action", options=[["one thing", "two"], ["three", "four"]])
    questions = questions.assign(answer=["two", "three"], label=[1, 0])
    plain, with_options = QADataset(ToyModel(), questions), QADataset(ToyModel(), questions, options_in_prompt=True)
    assert (with_options.text_lengths - plain.text_lengths).tolist() == [3, 2]


# ---- options ----


def choices(rows: int, seed: int = 0) -> pd.DataFrame:
    """Questions with five options of one to three words each, of which any may be right."""
    rng, words = np.random.default_rng(seed), ["a", "bb", "ccc", "dddd", "eeeee", "ffffff", "ggggggg"]
    some = [[" ".join(rng.permutation(words)[: rng.integers(1, 4)]) for _ in range(5)] for _ in range(rows)]
    options = [[f"{text} {row}-{i}" for i, text in enumerate(own)] for row, own in enumerate(some)]
    labels = rng.integers(5, size=rows)
    return pd.DataFrame(
        {
            "question_id": [f"c{i}" for i in range(rows)],
            "gif_sha256": rng.integers(40, size=rows).astype(str),
            "task": "action",
            "question": [f"what is done {i % 7} times" for i in range(rows)],
            "options": options,
            "answer": [own[label] for own, label in zip(options, labels, strict=True)],
            "label": labels,
        }
    )


class Listing(ToyModel):
    """A prompt is the place of the right option, the answer, and all of the options."""

    def __init__(self, answers):
        super().__init__()
        self.right = answers

    def encode_prompt(self, question, options=None):
        (place,) = [i for i, option in enumerate(options) if option in self.right] if options else [0]
        return [place]


def test_the_place_of_the_right_option_tells_nothing_in_training():
    """Each of five places is as frequent, in all and for each question form; what was right before tells as little."""
    questions, epochs = choices(400), 10
    dataset = QADataset(Listing(set(questions["answer"])), questions, options_in_prompt=True)
    places = np.array([[dataset[(row, 1, epoch)].prompt[0] for row in range(400)] for epoch in range(epochs)])
    n = places.size
    spread = math.sqrt(n * 0.2 * 0.8)
    assert np.abs(np.bincount(places.ravel(), minlength=5) - n / 5).max() < 4 * spread
    # guessing the place that was right most often in the other epochs, by row, by question, by given place, in all
    for by in (np.arange(400), questions["question"].factorize()[0], questions["label"].to_numpy(), np.zeros(400, int)):
        hits = 0
        for epoch in range(epochs):
            seen = np.zeros((by.max() + 1, 5))
            np.add.at(seen, (np.tile(by, epochs - 1), np.delete(places, epoch, axis=0).ravel()), 1)
            hits += (seen.argmax(1)[by] == places[epoch]).sum()
        assert abs(hits - n / 5) < 4 * spread
    assert (places[0] != places[1]).any()


def test_the_order_of_options_is_the_rows_and_the_epochs_alone():
    """Not that of calls, of the seed's other uses or of workers: a run that goes on lists as one never stopped."""
    questions = choices(30)
    make = lambda seed=3: QADataset(ToyModel(), questions, options_in_prompt=True, choice=True, seed=seed)  # noqa: E731
    keys = [(row, 1, epoch) for epoch in (1, 0) for row in range(30)]
    dataset = make()
    expected = [dataset[key] for key in keys]
    np.random.seed(5)
    assert [make()[key] for key in reversed(keys)] == expected[::-1]
    loader = torch.utils.data.DataLoader(make(), sampler=keys, batch_size=7, num_workers=2, collate_fn=list)
    assert [row for batch in loader for row in batch] == expected
    assert [make(seed=4)[key].prompt for key in keys] != [row.prompt for row in expected]
    for row, (number, _, _) in zip(expected, keys, strict=True):
        assert sorted(row.prompt) == sorted(dataset.prompts[number])  # the toy's tokens are words


def test_rows_bring_their_wrong_options_and_the_plan_counts_them(world):
    _, features, _ = world
    questions, model = choices(50), ToyModel()
    questions.loc[7, ["task", "answer"]] = ["frameqa", "red"]
    dataset = QADataset(model, questions, choice=True)
    for number, row in enumerate(questions.itertuples()):
        wrong = [text for k, text in enumerate(row.options) if k != row.label] if row.task == "action" else []
        item = dataset[(number, 2, 0)]
        assert item.wrong == [model.encode_answer(text) for text in wrong] and item.groups == 2
        assert dataset.text_lengths[number] == len(row.question.split()) + 2 * (1 + len(wrong))
        assert dataset.longest[number] == len(row.question.split()) + 2
    plan = plan_batches(dataset, features, toy_config())
    rows = [r for batch in plan.batches for r, _, _ in batch]
    assert plan.text_tokens.sum() == dataset.text_lengths[rows].sum()
    batch = Collator(features, pad_token_id=0, choice=True)([dataset[(i, 1, 0)] for i in (6, 7)])
    assert "labels" not in batch and batch["candidates"].shape == (2, 5, 2)
    assert batch["candidates"][0, 0].tolist() == model.encode_answer(questions["answer"][6])
    assert (batch["candidates"][1, 1:] == IGNORED).all() and (batch["candidates"][0] != IGNORED).all()
    assert batch["attention_mask"].sum(1).tolist() == [len(text.split()) for text in questions["question"][6:8]]


@pytest.mark.parametrize(
    ("options", "answer", "label", "reason"),
    [
        (["a"], "a", 0, r"action needs two or more options, none of them empty; found \['a'\]"),
        ([], "a", 0, r"action needs two or more options, none of them empty; found \[\]"),
        (["a", "b", "a"], "b", 1, r"two of the options are the same: \['a', 'b', 'a'\]"),
        (["a", "A "], "a", 0, r"two of the options are the same: \['a', 'A '\]"),
        (["a", "b"], "c", 0, r"the answer 'c' is not the option 0 of \['a', 'b'\]"),
        (["a", "b"], "a", 2, r"option index 2 is out of range: the 2 options are 0 to 1"),
        (["a", "b"], "a", -1, r"option index -1 is out of range"),
    ],
)
@pytest.mark.parametrize("asking", [{"choice": True}, {"options_in_prompt": True}])
def test_options_that_cannot_be_chosen_from_are_named(options, answer, label, reason, asking):
    questions = choices(3)
    for name, value in {"options": options, "answer": answer, "label": label}.items():
        questions.at[1, name] = value
    with pytest.raises(
        TrainingError,
        match=f"^question c1 cannot be trained on as a choice: {reason}.* leave it out, or run 01 again with --force",
    ):
        QADataset(ToyModel(), questions, **asking)


@pytest.mark.parametrize("rows", [1, 7, 5000])
def test_buckets_hold_every_row_once_within_budget(rows):
    rng = np.random.default_rng(1)
    lengths = np.clip(rng.normal(45, 15, rows).astype(int), 20, 120)
    batches = bucket(lengths, 1500, np.random.default_rng(0))
    assert sorted(np.concatenate(batches).tolist()) == list(range(rows))
    assert all(len(b) * lengths[b].max() <= 1500 for b in batches)
    padded = sum(len(b) * lengths[b].max() for b in batches)
    if rows == 5000:
        assert padded / lengths.sum() <= 1.02
        firsts = [lengths[b].mean() for b in batches]
        assert abs(np.corrcoef(np.arange(len(firsts)), firsts)[0, 1]) < 0.3, "batches come sorted by length"


def test_a_row_longer_than_the_budget_is_alone():
    lengths = np.array([10, 500, 10])
    batches = bucket(lengths, 100, np.random.default_rng(0))
    assert [1] in [b.tolist() for b in batches]
    assert sorted(np.concatenate(batches).tolist()) == [0, 1, 2]


def plan_of(epochs, seed=0, rows=300):
    rng = np.random.default_rng(9)
    video = {g: rng.integers(8, 17, rows) * g for g in (1, 2, 3)}
    return BatchPlan(rng.integers(10, 30, rows), video, tokens_per_step=600, epochs=epochs, seed=seed), video


def test_plan_is_one_pass_over_all_epochs_and_repeats_by_seed():
    plan, video = plan_of(2.5)
    ends = sorted(plan.epoch_ends)
    drawn = [[key for batch in plan.batches[a:b] for key in batch] for a, b in itertools.pairwise([0, *ends])]
    assert [{epoch for _, _, epoch in keys} for keys in drawn] == [{0}, {1}, {2}]
    first, second = ([(row, groups) for row, groups, _ in keys] for keys in drawn[:2])
    assert sorted(r for r, _ in first) == sorted(r for r, _ in second) == list(range(300))
    assert dict(first) != dict(second), "the same group counts in both epochs"
    assert {g for _, g in first} == {1, 2, 3}
    assert plan.epoch_after[-1] == pytest.approx(2.5) and ends[-1] == len(plan)
    real = sum(video[g][r] for batch in plan.batches for r, g, _ in batch)
    assert plan.video_tokens.sum() == real
    assert plan_of(2.5)[0].batches == plan.batches
    assert plan_of(2.5, seed=1)[0].batches != plan.batches


def test_no_rows_and_no_epochs_are_refused(world):
    questions, features, _ = world
    with pytest.raises(TrainingError, match="no questions"):
        QADataset(ToyModel(), questions.iloc[:0])
    with pytest.raises(TrainingError, match="epochs"):
        plan_batches(QADataset(ToyModel(), questions), features, toy_config(epochs=0.0))


# ---- optimizer ----


def test_three_learning_rates_and_no_decay_on_vectors():
    model, config = ToyModel(), toy_config()
    groups = parameter_groups(model, config.training)
    where = {id(p): g for g in groups for p in g["params"]}
    assert where.keys() == {id(p) for p in model.parameters() if p.requires_grad}
    for name, p in model.named_parameters():
        if p.requires_grad:
            rate = {"mit": 5e-3, "connector": 2e-2, "language_model": 1e-2}[name.split(".")[0]]
            assert where[id(p)]["lr"] == rate
            assert where[id(p)]["weight_decay"] == (0.01 if p.ndim == 2 else 0.0)


def test_half_precision_and_stray_parameters_are_refused():
    model = ToyModel()
    model.mit.half()
    with pytest.raises(TrainingError, match=r"mit\.weight is torch\.float16"):
        parameter_groups(model, toy_config().training)
    model = ToyModel()
    model.other = nn.Linear(2, 2)
    with pytest.raises(TrainingError, match="other"):
        parameter_groups(model, toy_config().training)
    with pytest.raises(TrainingError, match="no trainable"):
        training.trainable(ToyModel().requires_grad_(False))


@pytest.mark.parametrize("loss_by", ["per_token", "per_question"])
def test_a_run_equals_a_plain_loop(tmp_path, world, loss_by):
    """Trainer, plan and collator against AdamW, clipping and the schedule written out, bit for bit.

    By question a step is the sum over its rows by the run's mean number of them, and so is what its gradient is
    clipped to (it is in more than half of the steps). Every answer here has two tokens: a mean over tokens is one over
    rows.
    """
    questions, features, _ = world
    config = toy_config(loss=loss_by, max_grad_norm=0.3)
    model, result = run(tmp_path, (questions, features, config))
    plain = ToyModel()
    torch.manual_seed(config.training.seed)
    dataset = QADataset(plain, questions)
    plan, collate = plan_batches(dataset, features, config), Collator(features, 0)
    optimizer = torch.optim.AdamW(parameter_groups(plain, config.training), fused=True)
    rates = [g["lr"] for g in optimizer.param_groups]
    torch.empty((), dtype=torch.int64).random_()  # a DataLoader draws its workers' seed
    losses, clipped = [], 0
    drawn = sum(len(keys) for keys in plan.batches)
    for step, keys in enumerate(plan.batches):
        warm, n = math.ceil(0.1 * len(plan)), len(plan)
        scale = step / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (n - warm)))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * scale
        loss = plain(**collate([dataset[key] for key in keys]))["loss"]
        weight = 1.0 if loss_by == "per_token" else len(keys) / (drawn / len(plan))
        optimizer.zero_grad()
        (loss * weight).backward()
        clipped += nn.utils.clip_grad_norm_(plain.parameters(), 0.3 * weight) > 0.3 * weight
        optimizer.step()
        losses.append((loss * weight / weight).item())
    assert clipped > len(plan) / 2
    assert result.history["loss"].tolist() == losses
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert result.history["tokens"].sum() == result.tokens == (plan.text_tokens + plan.video_tokens).sum()
    assert result.history["lr_connector"].max() == pytest.approx(2e-2)
    assert (result.status, result.steps, result.epochs) == ("complete", len(plan), 2.0)


class Weighed(ToyModel):
    """A number a question, which is its loss: the gradient tells what the question weighs in the step."""

    def __init__(self):
        super().__init__()
        self.language_model = nn.ModuleDict({"number": nn.Embedding(200, 1)})

    def encode_prompt(self, question, options=None):
        return [int(question)]

    def forward(self, input_ids, attention_mask, labels, frames=None, lengths=None):
        return {"loss": self.language_model["number"](input_ids[:, 0]).mean()}


@pytest.mark.parametrize("loss_by", ["per_question", "per_token"])
def test_every_question_weighs_the_same_in_the_run_whatever_its_number_of_groups(tmp_path, monkeypatch, loss_by):
    """By question; the old way gives one with three groups, whose step holds fewer rows, a larger weight."""
    questions, features = toy_questions(160, 40).assign(question=[str(i) for i in range(160)]), ToyFeatures(40)
    config, model, weights = toy_config(loss=loss_by, max_grad_norm=1e9), Weighed(), []
    original = training.AdapterTrainer.training_step

    def training_step(self, *args):
        loss = original(self, *args)
        gradient = model.language_model["number"].weight.grad[:, 0]
        weights.extend((groups, gradient[row].item()) for row, groups, _ in self.plan.batches[self.state.global_step])
        return loss

    monkeypatch.setattr(training.AdapterTrainer, "training_step", training_step)
    result = train(model, questions, features, config, tmp_path, progress=False)
    table = pd.DataFrame(weights, columns=["groups", "weight"])
    assert len(table) == 2 * 160 and set(table["groups"]) == {1, 2, 3}
    if loss_by == "per_question":
        assert table["weight"].tolist() == pytest.approx([result.steps / 320] * 320)
    else:
        means = table.groupby("groups")["weight"].mean()
        assert means[3] > 1.5 * means[1]


@pytest.mark.slow
def test_it_learns_what_the_video_shows_and_blind_does_not(tmp_path):
    config = toy_config(epochs=40.0)
    questions = toy_questions(120, 40)
    questions = questions[questions["task"] == "frameqa"]
    features = ToyFeatures(40)
    features.means[:] = np.where(np.arange(40) % 2 == 0, 1, -1)[:, None]
    world = (questions, features, config)
    seeing = run(tmp_path / "main", world, eval_questions=questions)[1]
    blind = run(tmp_path / "blind", world, video=False, eval_questions=questions)[1]
    # Each of an answer's two tokens is told from the token before it and from the video. Without the video no function
    # of that token has a lower mean loss than the entropy that it leaves: -log(share among the tokens that follow it).
    pairs = []
    for row in questions.itertuples():
        prompt, answer = ToyModel.encode_prompt(None, row.question), ToyModel.encode_answer(None, row.answer)
        pairs += [(prompt[-1], answer[0]), (answer[0], answer[1])]
    before = [token for token, _ in pairs]
    least = sum(-math.log(pairs.count(pair) / before.count(pair[0])) for pair in pairs) / len(pairs)
    assert seeing.history["eval_loss"].iloc[-1] < 0.15 < least
    assert blind.history["eval_loss"].iloc[-1] >= least
    assert seeing.steps == blind.steps and blind.tokens < seeing.tokens


def test_blind_takes_the_same_batches_without_fetching_video(tmp_path, world, monkeypatch):
    seen = {True: [], False: []}
    for video in (True, False):
        original = ToyModel.forward

        def spy(self, input_ids, attention_mask, labels, frames=None, lengths=None, original=original):
            seen[self.video].append(input_ids.clone())
            assert (frames is not None, lengths is not None) == (self.video, self.video)
            return original(self, input_ids, attention_mask, labels, frames, lengths)

        monkeypatch.setattr(ToyModel, "forward", spy)
        before = world[1].calls
        run(tmp_path / str(video), world, video=video)
        monkeypatch.setattr(ToyModel, "forward", original)
    assert world[1].calls == before
    assert all(torch.equal(a, b) for a, b in zip(seen[True], seen[False], strict=True))


# ---- checkpoints and resume ----


class Stop(Exception):
    """Stands for a crash in the middle of a step."""


def crash_at(monkeypatch, step):
    original = training.AdapterTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise Stop
        return original(self, *args, **kwargs)

    monkeypatch.setattr(training.AdapterTrainer, "training_step", training_step)
    return lambda: monkeypatch.setattr(training.AdapterTrainer, "training_step", original)


def same_state(a, b):
    """Compare two checkpoints: tensors and optimizer, scheduler and RNG states, bit for bit."""
    x, y = load_file(a / training.TENSORS), load_file(b / training.TENSORS)
    assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    states = [torch.load(p / "optimizer.pt", weights_only=True)["state"] for p in (a, b)]
    for i in states[0]:
        assert all(torch.equal(states[0][i][k], states[1][i][k]) for k in states[0][i])
    schedules = [torch.load(p / "scheduler.pt", weights_only=True) for p in (a, b)]
    assert schedules[0] == schedules[1]
    assert (a / "rng_state.pth").stat().st_size == (b / "rng_state.pth").stat().st_size


@pytest.mark.parametrize("step", [1, 9, 20, 21])
def test_resume_equals_uninterrupted(tmp_path, world, monkeypatch, step):
    questions, features, _ = world
    world = (questions, features, toy_config(checkpoint_minutes=1e-9))  # saves at every step
    held_out = toy_questions(30, 40, seed=5)
    _, whole = run(tmp_path / "whole", world, eval_questions=held_out)
    mend = crash_at(monkeypatch, step)
    with pytest.raises(Stop):
        run(tmp_path / "killed", world, eval_questions=held_out)
    mend()
    torch.manual_seed(99)  # a new process starts with another state
    np.random.seed(99)
    model, resumed = run(tmp_path / "killed", world, eval_questions=held_out)
    same_state(newest(tmp_path / "whole"), newest(tmp_path / "killed"))
    for column in ("step", "epoch", "loss", "eval_loss", "lr_mit", "tokens"):
        pd.testing.assert_series_equal(whole.history[column], resumed.history[column], check_exact=True)
    assert resumed.history["eval_loss"].notna().sum() == 2
    assert len(list((tmp_path / "killed" / "checkpoints").iterdir())) == 2, "the newest two are kept"
    tensors = load_file(newest(tmp_path / "killed") / training.TENSORS)
    assert tensors.keys() == {n for n, p in model.named_parameters() if p.requires_grad}


def test_evaluation_is_the_token_mean_and_changes_nothing(tmp_path, world):
    held_out = toy_questions(30, 40, seed=5)
    _, plain = run(tmp_path / "plain", world)
    model, measured = run(tmp_path / "measured", world, eval_questions=held_out)
    assert measured.history["loss"].tolist() == plain.history["loss"].tolist()
    dataset = QADataset(model, held_out)
    model.eval()
    with torch.no_grad():  # each row alone; every answer has two tokens
        rows = [model(**Collator(world[1], 0)([dataset[(i, 2, 0)]]))["loss"].item() for i in range(30)]
    assert measured.history["eval_loss"].iloc[-1] == pytest.approx(np.mean(rows), rel=1e-5)


def test_a_finished_run_is_loaded_not_repeated(tmp_path, world, monkeypatch):
    model, first = run(tmp_path, world)
    crash_at(monkeypatch, 0)
    again, second = run(tmp_path, world)
    assert second.status == "complete" and second.tokens == first.tokens and second.seconds == first.seconds
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_deadline_ends_as_partial_and_the_next_call_goes_on(tmp_path, world, slow_disk):
    _, whole = run(tmp_path / "whole", world)
    result, calls = None, 0
    while result is None or result.status == "partial":
        before = result.steps if result else 0
        _, result = run(tmp_path / "parts", world, deadline=HOUR if calls < 3 else math.inf)
        calls += 1
        assert result.steps > before
    assert calls == 4 and result.epochs == 2.0
    assert result.history["loss"].tolist() == whole.history["loss"].tolist()
    assert run(tmp_path / "none", world, deadline=0)[1].steps == 0


def test_measuring_the_pace_costs_no_step(tmp_path, world, monkeypatch):
    _, whole = run(tmp_path / "whole", world)
    monkeypatch.setenv("SUITE_PROBE_STEPS", "3")
    results = [run(tmp_path / "parts", world)[1] for _ in range(2)]
    assert [result.steps for result in results] == [3, 6] and results[1].status == "partial"
    monkeypatch.delenv("SUITE_PROBE_STEPS")
    result = run(tmp_path / "parts", world)[1]
    assert result.status == "complete" and result.history["loss"].tolist() == whole.history["loss"].tolist()


def test_the_margin_before_the_deadline_is_three_saves(world, tmp_path):
    control = training.RunControl.__new__(training.RunControl)
    flags = SimpleNamespace(should_training_stop=False, should_save=False)
    control.trainer = SimpleNamespace(plan=range(1000), args=SimpleNamespace(device=torch.device("cpu")))
    control.job = Section(**vars(toy_config(log_steps=10**6).training), measure=None)
    control.signals, control.evaluate, control.longest_step, control.last_step = [], None, 0.0, math.inf
    now = time.perf_counter()
    control.saved = control.last = now
    control.ends, control.save_seconds = now + 100, 20.0
    control.on_step_end(None, SimpleNamespace(global_step=1), flags)
    assert not flags.should_training_stop
    control.save_seconds = 34.0
    control.on_step_end(None, SimpleNamespace(global_step=2), flags)
    assert flags.should_training_stop and flags.should_save


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, None), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_saves_after_the_step(tmp_path, world, monkeypatch, number, error):
    original = training.AdapterTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 5:
            os.kill(os.getpid(), number)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(training.AdapterTrainer, "training_step", training_step)
    handler = signal.getsignal(number)
    if error:
        with pytest.raises(error):
            run(tmp_path, world)
    else:
        assert run(tmp_path, world)[1].status == "partial"
    assert signal.getsignal(number) is handler
    assert newest(tmp_path).name == "step-00000006"


def test_checkpoint_of_other_settings_is_refused_by_name(tmp_path, world, slow_disk):
    questions, features, _ = world
    run(tmp_path, world, deadline=HOUR)
    with pytest.raises(CheckpointError, match=r"training.epochs: 2.0 in the checkpoint, 3.0 now"):
        run(tmp_path, (questions, features, toy_config(epochs=3.0)))
    with pytest.raises(CheckpointError, match="questions"):
        run(tmp_path, (questions.iloc[::-1], features, toy_config()))
    with pytest.raises(CheckpointError, match="video: True in the checkpoint, False now"):
        run(tmp_path, world, video=False)
    # What only paces a run may change.
    assert run(tmp_path, (questions, features, toy_config(log_steps=1, checkpoint_minutes=1.0)))[1].status == "complete"


@pytest.mark.parametrize("damage", ["cut", "flipped", "no description", "not json", "file gone"])
def test_a_torn_checkpoint_is_passed_over(tmp_path, world, damage):
    questions, features, _ = world
    world = (questions, features, toy_config(checkpoint_minutes=1e-9))
    _, whole = run(tmp_path, world)
    last = newest(tmp_path)
    target = last / training.TENSORS
    if damage == "cut":
        target.write_bytes(target.read_bytes()[:-10])
    elif damage == "flipped":
        content = bytearray(target.read_bytes())
        content[-1] ^= 1
        target.write_bytes(content)
    elif damage == "no description":
        (last / training.META).unlink()
    elif damage == "not json":
        (last / training.META).write_text("{")
    else:
        (last / "optimizer.pt").unlink()
    with pytest.warns(UserWarning, match=f"{last.name} is damaged"):
        _, result = run(tmp_path, world)
    assert result.history["loss"].tolist() == whole.history["loss"].tolist()


def test_a_save_cut_short_leaves_the_run_as_it_was(tmp_path, world, monkeypatch):
    questions, features, _ = world
    world = (questions, features, toy_config(checkpoint_minutes=1e-9))

    def fail(self, folder):
        if self.state.global_step == 7:
            raise Stop

    monkeypatch.setattr(training.AdapterTrainer, "_save_scaler", fail)
    with pytest.raises(Stop):
        run(tmp_path, world)
    assert list((tmp_path / "checkpoints").glob("saving-*"))
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _, result = run(tmp_path, world)
    assert result.status == "complete"
    assert not list((tmp_path / "checkpoints").glob("saving-*"))


def test_tensors_that_do_not_fit_are_named(tmp_path, world):
    model, _ = run(tmp_path, world)
    model.mit.bias.requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"mit\.bias"):
        training.load_tensors(model, newest(tmp_path))


def test_a_diverged_loss_stops_the_run_before_it_is_saved(tmp_path, world, monkeypatch):
    questions, features, _ = world
    world = (questions, features, toy_config(checkpoint_minutes=1e-9))
    original, calls = ToyModel.forward, []

    def forward(self, *args, **kwargs):
        calls.append(1)
        out = original(self, *args, **kwargs)
        return out | {"loss": out["loss"] * (math.nan if len(calls) == 6 else 1.0)}

    forward.__signature__ = inspect.signature(original)
    monkeypatch.setattr(ToyModel, "forward", forward)
    with pytest.raises(TrainingError, match="nan at step 6"):
        run(tmp_path, world)
    assert newest(tmp_path).name == "step-00000005"


def test_a_checkpoint_that_is_not_finite_is_neither_written_nor_read(tmp_path, world, monkeypatch):
    """A parameter becomes NaN after the fourth step (its loss is finite); then a whole checkpoint is made bad."""
    questions, features, _ = world
    world = (questions, features, toy_config(checkpoint_minutes=1e-9))
    original, calls = training.AdapterTrainer._save_checkpoint, []

    def save(self, *args):
        calls.append(1)
        if len(calls) == 4:
            self.model.mit.bias.data[2] = math.nan
        return original(self, *args)

    monkeypatch.setattr(training.AdapterTrainer, "_save_checkpoint", save)
    with pytest.raises(TrainingError, match=r"the model at step 4 .*not finite.* in mit\.bias:"):
        run(tmp_path, world)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]

    path = newest(tmp_path)
    tensors = {name: tensor.clone() for name, tensor in load_file(path / training.TENSORS).items()}
    tensors["mit.bias"][0] = math.inf
    save_file(tensors, path / training.TENSORS)
    with pytest.raises(
        CheckpointError, match=rf"{path / training.TENSORS} .*not finite.* in mit\.bias: delete {path} "
    ):
        training.load_tensors(ToyModel(), path)


def test_an_optimizers_state_that_is_not_finite_is_not_gone_on_with(tmp_path, world, monkeypatch):
    questions, features, _ = world
    world = (questions, features, toy_config(checkpoint_minutes=1e-9))
    restore = crash_at(monkeypatch, 4)
    with pytest.raises(Stop):
        run(tmp_path, world)
    restore()
    path = newest(tmp_path)
    state = torch.load(path / "optimizer.pt", weights_only=True)
    state["state"][1]["exp_avg_sq"].view(-1)[0] = math.inf
    torch.save(state, path / "optimizer.pt")
    info = json.loads((path / training.META).read_text())
    info["files"]["optimizer.pt"] = hashlib.sha256((path / "optimizer.pt").read_bytes()).hexdigest()
    (path / training.META).write_text(json.dumps(info))
    with pytest.raises(CheckpointError, match=rf"optimizer\.pt .*not finite.* in 1\.exp_avg_sq: delete {path} "):
        run(tmp_path, world)


def test_logs_and_folder(tmp_path, world, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    questions, features, config = world
    result = train(ToyModel(), questions, features, config, tmp_path)
    stored = pd.read_parquet(tmp_path / "history.parquet")
    pd.testing.assert_frame_equal(stored, result.history)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = {e.step: e.value for e in events.Scalars("train/loss")}
    assert logged[4] == pytest.approx(result.history["loss"].iloc[:4].mean(), rel=1e-6)
    assert f"step {result.steps}/{result.total_steps}" in capsys.readouterr().out
    info = json.loads((newest(tmp_path) / training.META).read_text())
    assert info["step"] == result.steps and info["fingerprint"]["encoder_key"] == "toy"


def test_what_a_training_learnt_is_told_without_the_clock(tmp_path, world, monkeypatch):
    """Equal work tells equal numbers, on a machine as slow as it may be: then equal bundles have equal digests."""
    _, first = run(tmp_path / "first", world)
    clock, slept = time.perf_counter, []
    monkeypatch.setattr(training.history.time, "perf_counter", lambda: slept.append(1) or clock() + 60 * len(slept))
    _, second = run(tmp_path / "second", world)
    assert second.seconds > first.seconds + 60
    assert second.learnt() == first.learnt()
    clocks = {"minutes", "tokens_per_second"}
    assert first.learnt().keys() == first.summary().keys() - clocks and clocks < first.summary().keys()
    assert all(first.summary()[name] != second.summary()[name] for name in clocks)


def test_loss_display_draws_in_place_in_a_notebook(monkeypatch):
    drawn = []
    handle = SimpleNamespace(update=lambda shown: drawn.append(("update", shown)))
    display = pytest.importorskip("IPython.display")
    monkeypatch.setattr(display, "display", lambda shown, display_id: drawn.append(("first", shown)) or handle)
    monkeypatch.setattr(training.history, "_in_kernel", lambda: True)
    history = [{"step": i + 1, "epoch": 0.1, "loss": 1.0 / (i + 1)} for i in range(20)]
    recorder = SimpleNamespace(rows=history, seconds=1.0, table=lambda: pd.DataFrame(history))
    shown = training.LossDisplay(40, 0, interval=0.0)
    shown.update(recorder, 4)
    shown.update(recorder, 4)
    assert [kind for kind, _ in drawn] == ["first", "update"]
    assert drawn[0][1].data.startswith(b"\x89PNG")  # a picture of its own, whatever the kernel can show
    shown.close()
    assert len(drawn) == 2  # a run that was stopped keeps its curve
    seldom = training.LossDisplay(20, 0, interval=3600.0)
    history.pop()
    seldom.update(recorder, 4)
    seldom.update(recorder, 4)
    assert len(drawn) == 3
    history.append({"step": 20, "epoch": 1.0, "loss": 0.05})
    seldom.update(recorder, 4)  # the last step is drawn, however soon it comes
    assert len(drawn) == 4
    seldom.close()
    assert drawn[-1][1].data == ""  # the notebook shows the whole run's curve once, where it sums up
