"""Two processes that train together (DDP over gloo) against one: same batches, same losses, same weights."""

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from helpers import install
from helpers.corpora import shapes
from helpers.models.gif_qa.model import GifQAModel
from helpers.models.xclip import FrameEncoder, load_xclip
from helpers.stage import lock
from helpers.stage.notebook import Stage
from helpers.store.encoding import _copies, cache_features
from helpers.store.features import FeatureTable
from helpers.store.shards import shard_gifs
from helpers.store.tables import StoreError
from helpers.training import WORKER, collective, processes
from helpers.training.captions import align, caption_rows
from helpers.training.checkpoints import trainable
from helpers.training.collective import TrainingError
from helpers.training.gif_qa import Collator, QADataset, hold_out, train
from helpers.workspace.place import repo_root


@pytest.fixture(scope="module")
def world(tmp_path_factory, make_profile):
    """Questions and features of a small built-in world."""
    folder = tmp_path_factory.mktemp("world")
    profile = make_profile(shapes__seed=3, shapes__train=24, shapes__test=2)
    made = shard_gifs(shapes.load(profile, folder / "gifs"), folder / "01", profile.data)
    encoder = FrameEncoder(load_xclip(profile.encoder.model), profile.encoder.model).eval()
    cache_features(folder / "01" / "frames", folder / "features.lance", encoder, profile.data, 16)
    questions = made.questions[made.questions["split"] == "train"]
    return hold_out(questions, 0.1, 0), FeatureTable(folder / "features.lance")


def run(world, profile, folder, video=True, **options):
    """Train anew; returns the result and the trained tensors."""
    (questions, watched), features = world
    model = GifQAModel.build(profile, torch.device("cpu"), video=video)
    options = {"eval_questions": watched, "progress": False} | options
    result = train(model, questions, features, profile, folder, **options)
    return result, {name: p.detach().clone() for name, p in trainable(model).items()}


def settings(make_profile, **changes):
    keys = {"training__epochs": 2.0, "training__tokens_per_step": 160, "connector__train_mit": True}
    return make_profile(**(keys | changes))


def same(one, two):
    """Losses and weights agree to the rounding of float32 sums in another order."""
    (result, tensors), (other, others) = one, two
    assert result.status == other.status == "complete" and result.steps == other.steps > 10
    for column in ("step", "epoch", "tokens", "lr_connector"):
        np.testing.assert_array_equal(result.history[column], other.history[column])
    for column in ("loss", "eval_loss"):
        np.testing.assert_allclose(result.history[column], other.history[column], rtol=2e-4)
    assert result.history["eval_loss"].notna().sum() == 2
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, others[name], rtol=1e-2, atol=2e-4)


CHOICE = {
    "training__loss": "per_question",
    "training__choice": "beside",
    "training__tokens_per_step": 500,
    "evaluation__options_in_prompt": True,
    "language_model__option_style": "lettered",
    "connector__output_scale": "fixed",
}


@pytest.mark.parametrize("keys", [{}, CHOICE], ids=["likelihood", "choice"])
def test_two_processes_do_what_one_does(tmp_path, world, make_profile, keys):
    """Also when stopped after a few steps and gone on with, by two processes and then by one."""
    alone = run(world, settings(make_profile, **keys), tmp_path / "alone")
    two = settings(make_profile, training__gpus=2, **keys)
    same(alone, run(world, two, tmp_path / "together"))
    assert sorted(p.name for p in (tmp_path / "together").iterdir()) == [
        "checkpoints",
        "history.parquet",
        "pace.json",
        "tensorboard",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUITE_PROBE_STEPS", "4")
        for done in (4, 8):
            part, _ = run(world, two, tmp_path / "parts")
            assert (part.status, part.steps) == ("partial", done)
    same(alone, run(world, settings(make_profile, **keys), tmp_path / "parts"))


def test_a_choice_goes_on_bit_for_bit(tmp_path, world, make_profile, monkeypatch):
    """Stopped every five steps: the orders of options, losses and weights are those of a run never stopped."""
    profile = settings(make_profile, **CHOICE, language_model__lora_dropout=0.1)
    whole, tensors = run(world, profile, tmp_path / "whole")
    monkeypatch.setenv("SUITE_PROBE_STEPS", "5")
    parts = [run(world, profile, tmp_path / "parts") for _ in range(-(-whole.total_steps // 5))]
    assert parts[0][0].status == "partial" and len(parts) > 3
    for column in ("loss", "eval_loss"):
        np.testing.assert_array_equal(whole.history[column], parts[-1][0].history[column])
    assert all(torch.equal(tensor, parts[-1][1][name]) for name, tensor in tensors.items())


def test_a_loss_by_question_is_watched_by_question(tmp_path, world, make_profile):
    """Each held-out row alone, by hand: its own loss, whatever the batch; all rows weigh the same."""
    profile = settings(make_profile, **CHOICE, training__epochs=0.1)
    (questions, watched), features = world
    model = GifQAModel.build(profile, torch.device("cpu"))
    result = train(model, questions, features, profile, tmp_path, eval_questions=watched, progress=False)
    rows, collate = QADataset(model, watched, options_in_prompt=True, choice=True), Collator(features, 0, choice=True)
    groups = profile.evaluation.groups
    with torch.no_grad():
        losses = [float(model(**collate([rows[(i, groups, 0)]]))["loss"]) for i in range(len(rows))]
    assert result.history["eval_loss"].iloc[-1] == pytest.approx(np.mean(losses), rel=1e-4)


@pytest.mark.parametrize("keys", [{}, CHOICE | {"training__tokens_per_step": 160}], ids=["likelihood", "choice"])
def test_stage_one_and_the_questions_on_top_of_it(tmp_path, world, make_profile, keys):
    """Two processes hold the adapter still as one does, and all of them start the questions from what it left."""
    (questions, watched), features = world
    captions, held = (
        pd.DataFrame({"caption_id": rows["question_id"], "gif_sha256": rows["gif_sha256"], "split": "train"})
        .assign(caption=[f"a picture of {answer}" for answer in rows["answer"]])
        .pipe(caption_rows, "Describe this GIF.")
        for rows in (questions[::8], watched)
    )
    keys = {"training__epochs": 1.0, "alignment__epochs": 2.0} | keys
    found = []
    for gpus in (1, 2):
        profile = settings(make_profile, **keys, training__gpus=gpus)
        model = GifQAModel.build(profile, torch.device("cpu"))
        adapter = {name: p.detach().clone() for name, p in trainable(model.language_model).items()}
        folder = tmp_path / f"aligned by {gpus}"
        options = {"questions": questions, "eval_captions": held, "progress": False}
        result = align(model, captions, features, profile, folder, **options)
        assert all(torch.equal(p, adapter[name]) for name, p in trainable(model.language_model).items())
        found.append((result, {name: p.detach().clone() for name, p in trainable(model).items()}))
    same(*found)
    begun = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUITE_PROBE_STEPS", "4")
        for gpus in (1, 2):
            profile = settings(make_profile, **keys, training__gpus=gpus)
            begun.append(run(world, profile, tmp_path / f"by {gpus}", aligned=tmp_path / "aligned by 1")[0])
        begun.append(run(world, settings(make_profile, **keys), tmp_path / "without")[0])
    one, two, without = (result.history["loss"] for result in begun)
    np.testing.assert_allclose(one, two, rtol=2e-4)
    assert abs(one[0] - without[0]) > 1e-2


def test_the_blind_twin_in_four_bits(tmp_path, world, make_profile):
    keys = {"language_model__quantisation": "nf4", "training__epochs": 1.0}
    one, two = (settings(make_profile, training__gpus=n, **keys) for n in (1, 2))
    alone, together = (run(world, p, tmp_path / str(p.training.gpus), video=False) for p in (one, two))
    np.testing.assert_allclose(alone[0].history["loss"], together[0].history["loss"], rtol=2e-4)


def test_a_process_that_fails_is_told_with_its_reason(tmp_path, world, make_profile, monkeypatch):
    monkeypatch.setattr(processes, "TAIL", 60)
    profile = settings(make_profile, training__gpus=2, training__learning_rate_lora=1e30)
    with pytest.raises(TrainingError, match=r"(?s)process failed.*the loss became"):
        run(world, profile, tmp_path)


def test_nothing_outlives_the_notebook_that_started_it():
    """A process whose parent is gone ends by itself."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    code = f"from helpers.training.worker import _end_with; _end_with({gone.pid})"
    assert subprocess.run([sys.executable, "-c", code], cwd=repo_root(), timeout=60).returncode == 1


def test_more_gpus_than_there_are_are_refused(tmp_path, world, make_profile, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(TrainingError, match=r"training\.gpus is 2, but this machine has 1"):
        processes.train_in_processes(2, WORKER, world[0][0], "f", make_profile(), tmp_path, video=True)


@pytest.fixture
def two_t4s(monkeypatch, tmp_path):
    """A Kaggle notebook's process with two T4s: as CUDA does, torch reads which ones it may see once, when first asked.

    Returns a function that sets up and does what imports do: bitsandbytes asks for the GPUs.
    """
    for name in ("CUDA_VISIBLE_DEVICES", install.SHOWN, "HF_HOME"):
        monkeypatch.setenv(name, "")  # so that what set_up sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path / "runs"))
    monkeypatch.setattr(install, "share_secrets", list)
    seen = []

    def device_count():
        seen.extend([] if seen else [len(os.environ["CUDA_VISIBLE_DEVICES"].split(","))])
        return min(seen[0], 2)

    def begin(overrides):
        monkeypatch.setattr(sys.modules["__main__"], "profile", "tiny", raising=False)
        monkeypatch.setattr(sys.modules["__main__"], "overrides", overrides, raising=False)
        install.set_up()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: device_count() > 0)
        monkeypatch.setattr(torch.cuda, "device_count", device_count)
        torch.cuda.is_available()
        return Stage("02_feature_caching", profile="tiny", overrides=overrides).profile

    yield begin
    for path in list(lock._held):
        lock.release_lock(path)


class OnGpu:
    """As much of an encoder as tells where it is, and where its copies go."""

    place = "cuda"

    def parameters(self):
        return iter([type("P", (), {"device": torch.device(self.place)})()])

    def to(self, place):
        self.place = place
        return self


def test_a_notebook_that_asks_for_two_gpus_gets_them_for_encoding_and_for_training(two_t4s, tmp_path, monkeypatch):
    profile = two_t4s({"encoder.gpus": 2, "training.gpus": 2})
    assert [encoder.place for encoder in _copies(OnGpu(), profile.encoder.gpus)] == ["cuda", "cuda:1"]
    started = []

    class Processes(subprocess.Popen):
        def __init__(self, line, env, **options):
            started.append(env)
            super().__init__(["true"], env=env, **options)

    monkeypatch.setattr(subprocess, "Popen", Processes)
    count = profile.training.gpus
    processes.train_in_processes(count, WORKER, pd.DataFrame({"a": [1]}), "f", profile, tmp_path / "work", video=True)
    assert [env["CUDA_VISIBLE_DEVICES"] for env in started] == ["0,1"]


def test_a_notebook_that_asks_for_nothing_sees_one_gpu(two_t4s):
    profile = two_t4s({})
    assert profile.encoder.gpus == profile.training.gpus == torch.cuda.device_count() == 1
    with pytest.raises(StoreError, match=r"encoder\.gpus is 2, but this machine has 1"):
        _copies(OnGpu(), 2)


def test_gpus_that_an_earlier_notebook_set_are_not_taken_for_the_users_choice(two_t4s, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv(install.SHOWN, "0")  # inherited: a notebook's set-up cell ran, then !./run_all.sh
    two_t4s({"training.gpus": 2})
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


# ---- Shares --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answers", [[3, 1, 1, 2, 5], [2], [1, 1]])
def test_shares_by_question_sum_the_rows_by_the_mean_step(monkeypatch, answers):
    """Losses of made-up rows: the mean of the processes' weighted means is the sum over all rows by 2.5 of them."""
    losses, weighted = [10.0 + number for number in range(len(answers))], []
    for rank in range(2):
        monkeypatch.setattr(collective, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(collective, "world", lambda: 2)
        shared = collective.Shared(lambda rows: {"rows": list(rows)}, lambda row: 1, expected=2.5)
        batch = shared(range(len(answers)))
        weighted.append(batch["share"] * np.mean([losses[row] for row in batch["rows"]]))
        assert batch["weight"] == len(answers) / 2.5
    assert sum(weighted) / 2 == pytest.approx(sum(losses) / 2.5)


@pytest.mark.parametrize("answers", [[3, 1, 1, 2, 5], [2], [1, 1]])
def test_shares_make_the_mean_over_processes_that_over_all_tokens(monkeypatch, answers):
    """Losses of made-up tokens: the mean of the processes' weighted means is the mean over every token."""
    losses = [[float(10 * row + token) for token in range(count)] for row, count in enumerate(answers)]
    weighted = []
    for rank in range(2):
        monkeypatch.setattr(collective, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(collective, "world", lambda: 2)
        batch = collective.Shared(lambda rows: {"rows": list(rows)}, lambda row: answers[row])(range(len(answers)))
        own = [loss for row in batch["rows"] for loss in losses[row]]
        weighted.append(batch["share"] * sum(own) / len(own))
    every = [loss for row in losses for loss in row]
    assert sum(weighted) / 2 == pytest.approx(sum(every) / len(every))


# ---- Encoding ------------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """The parts of an encoder that the cache asks for; notes on which copy each batch was encoded."""

    key, embed_dim, frames_per_group, image_size = "counting", 4, 16, 32

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
        self.batches: list[int] = []
        self.copies = [self.batches]

    def __deepcopy__(self, memo):
        twin = Counting()
        self.copies.append(twin.batches)
        return twin

    def forward(self, frames, lengths):
        self.batches.append(len(frames))
        return (frames.float() / 255).mean((2, 3)) @ self.weight


def test_two_encoders_take_turns_and_give_the_same_table(tmp_path, world, make_profile):
    folder, data = world[1].path.parent / "01" / "frames", make_profile().data
    one, two = Counting(), Counting()
    cache_features(folder, tmp_path / "one.lance", one, data, 5)
    cache_features(folder, tmp_path / "two.lance", two, data, 5, gpus=2)
    first, second = (FeatureTable(tmp_path / name) for name in ("one.lance", "two.lance"))
    for groups in (1, 2, 3):
        for a, b in zip(first.fetch(first.ids, groups), second.fetch(second.ids, groups), strict=True):
            np.testing.assert_array_equal(a, b)
    counts = [len(batches) for batches in two.copies]
    assert len(counts) == 2 and sum(counts) == len(one.batches) and max(counts) - min(counts) <= 1


def test_more_gpus_to_encode_on_than_there_are_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(StoreError, match=r"encoder\.gpus is 2, but this machine has 1"):
        _copies(OnGpu(), 2)
