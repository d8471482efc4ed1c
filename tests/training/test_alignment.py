"""Stage one on random backbones: what moves, what its loss is, what it goes on with, and what builds on it."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from helpers.models.gif_qa.model import GifQAModel
from helpers.stage.pace import START_UP_SECONDS, own_pace
from helpers.training import (
    AdapterTrainer,
    CheckpointError,
    TrainingError,
    align,
    caption_rows,
    choose_captions,
    train,
)
from helpers.workspace import repo_root
from tests.toy_features import Features

GIFS = [f"gif{n}" for n in range(8)]
CAPTIONS = pd.DataFrame(
    {
        "caption_id": [f"{gif}-{n}" for gif in GIFS for n in range(2)],
        "gif_sha256": [gif for gif in GIFS for _ in range(2)],
        "split": "train",
        "caption": [f"a small {color} star{end}" for color in ("red", "blue") * 4 for end in ("", " spins")],
    }
)
OLDER = repo_root() / "tests/reliability/made_before/paused/03_adapter_training/checkpoints/step-00000002"


def toy_features(encoder_key):
    """Random embeddings; each GIF has 5 to 12 frames."""
    rng = np.random.default_rng(0)
    return Features({gif: rng.normal(size=(5 + n, 32)).astype(np.float16) for n, gif in enumerate(GIFS)}, encoder_key)


@pytest.fixture(scope="module")
def profile(make_profile):
    keys = {"connector__train_mit": True, "language_model__lora_dropout": 0.1, "alignment__epochs": 2.0}
    return make_profile(training__epochs=1.0, training__tokens_per_step=150, training__warmup_ratio=0.0, **keys)


@pytest.fixture(scope="module")
def features(profile):
    return toy_features(GifQAModel.build(profile).encoder_key)


QUESTIONS = pd.DataFrame(
    {
        "question_id": GIFS,
        "gif_sha256": GIFS,
        "task": "frameqa",
        "question": "what color is the star ?",
        "options": [[] for _ in GIFS],
        "answer": ["red", "blue"] * 4,
        "label": -1,
    }
)


def stage_one(profile, features, folder, captions=CAPTIONS, **options):
    model = GifQAModel.build(profile)
    rows = caption_rows(captions, profile.alignment.prompt)
    return model, align(model, rows, features, profile, folder, questions=QUESTIONS, progress=False, **options)


def stage_two(profile, features, folder, **options):
    model = GifQAModel.build(profile)
    return model, train(model, QUESTIONS, features, profile, folder, progress=False, **options)


@pytest.fixture(scope="module")
def aligned(profile, features, tmp_path_factory):
    """A finished stage one: its model, its result and its folder; not to be changed."""
    folder = tmp_path_factory.mktemp("aligned")
    return *stage_one(profile, features, folder), folder


def learning(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def newest(folder):
    return sorted((folder / "checkpoints").glob("step-*"))[-1]


def fingerprint(folder):
    return json.loads((newest(folder) / "checkpoint.json").read_text())["fingerprint"]


def test_connector_and_mit_move_and_nothing_else(profile, aligned):
    model, result, _ = aligned
    assert result.status == "complete" and result.epochs == 2.0 and result.steps > 4
    fresh = GifQAModel.build(profile)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in fresh.parameters()]
    before = dict(fresh.named_parameters())
    moved = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"connector", "mit"}
    assert {name: result.history[f"lr_{name}"].iloc[0] for name in ("connector", "mit", "language_model")} == {
        "connector": profile.alignment.learning_rate_connector,
        "mit": profile.training.learning_rate_mit,
        "language_model": 0.0,
    }


def test_every_caption_is_used_once_an_epoch(profile, features, aligned, monkeypatch, tmp_path):
    seen = []
    original = GifQAModel.forward

    def forward(self, input_ids, attention_mask, labels, frames=None, lengths=None):
        seen.extend(self.tokenizer.decode(row[row != -100]) for row in labels)
        return original(self, input_ids, attention_mask, labels, frames, lengths)

    monkeypatch.setattr(GifQAModel, "forward", forward)
    stage_one(profile, features, tmp_path)
    assert sorted(seen) == sorted(2 * [f" {caption}<|eos|>" for caption in CAPTIONS["caption"]])


@torch.no_grad()
def test_the_loss_is_that_of_one_caption_at_a_time_behind_its_gif(profile, features, tmp_path):
    """Sequences are put together by hand; captions of equal length make every way to take the mean the same."""
    captions = CAPTIONS[CAPTIONS["caption"].isin(["a small red star"])]
    keys = {"tokens_per_step": 10**6, "learning_rate_mit": 0.0}
    one = profile.model_copy(update={"training": profile.training.model_copy(update=keys)})
    model = GifQAModel.build(one)
    embed = model.language_model.get_input_embeddings()
    losses = []
    for row in captions.itertuples():
        frames, mask = torch.zeros(1, 16, 32), torch.zeros(1, 16, dtype=torch.bool)
        own = torch.from_numpy(features.frames[row.gif_sha256]).float()
        frames[0, : len(own)], mask[0, : len(own)] = own, True
        tokens, token_mask = model.connector(frames, *model.mit(frames, mask), mask)
        asked = f"Question: {one.alignment.prompt}\nAnswer:"
        asked, said = (model.tokenizer(text).input_ids for text in (asked, f" {row.caption}"))
        said = [*said, model.tokenizer.eos_token_id]
        ids = torch.tensor([model.tokenizer.bos_token_id, *asked, *said])
        embeddings = torch.cat([embed(ids[:1]), tokens[token_mask], embed(ids[1:])])[None]
        logits = model.language_model.eval()(inputs_embeds=embeddings).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits[-len(said) - 1 : -1], torch.tensor(said)).item())
    with torch.enable_grad():
        _, result = stage_one(one, features, tmp_path, captions=captions)
    assert result.history["loss"].iloc[0] == pytest.approx(np.mean(losses), rel=1e-5)


class Stop(Exception):
    """Stands for a crash in the middle of a step."""


@pytest.mark.parametrize(("step", "recompute"), [(0, False), (3, True)])
def test_stopped_and_gone_on_with_equals_never_stopped(
    profile, features, aligned, tmp_path, monkeypatch, step, recompute
):
    """Also when activations are computed twice, which a frozen language model must pass gradients through."""
    keys = {"checkpoint_minutes": 1e-9, "gradient_checkpointing": recompute}
    often = profile.model_copy(update={"training": profile.training.model_copy(update=keys)})
    original = AdapterTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise Stop
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(AdapterTrainer, "training_step", training_step)
        with pytest.raises(Stop):
            stage_one(often, features, tmp_path)
    torch.manual_seed(99)  # a new process starts with another state
    _, result = stage_one(often, features, tmp_path)
    one, other = (load_file(newest(folder) / "trainable.safetensors") for folder in (tmp_path, aligned[2]))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert result.history["loss"].tolist() == aligned[1].history["loss"].tolist()


def test_a_finished_stage_is_loaded_and_never_done_again(profile, features, aligned, monkeypatch):
    model, first, folder = aligned
    monkeypatch.setattr(AdapterTrainer, "training_step", None)
    again, second = stage_one(profile, features, folder)
    assert (second.status, second.seconds) == ("complete", first.seconds)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_questions_start_from_what_stage_one_left(profile, features, aligned, tmp_path):
    model, result = stage_two(profile, features, tmp_path / "stopped", aligned=aligned[2], deadline=0)
    assert result.steps == 0
    for name, tensor in learning(aligned[0]).items():
        assert torch.equal(dict(model.named_parameters())[name], tensor), name
    # in one go: the model that stage one trained is the one that goes on
    go_on = GifQAModel.build(profile)
    go_on.load_state_dict(aligned[0].state_dict())
    at_once = train(go_on, QUESTIONS, features, profile, tmp_path / "at once", progress=False, aligned=aligned[2])
    resumed, whole = stage_two(profile, features, tmp_path / "stopped", aligned=aligned[2])
    assert whole.history["loss"].tolist() == at_once.history["loss"].tolist()
    assert all(torch.equal(p, q) for p, q in zip(go_on.parameters(), resumed.parameters(), strict=True))
    _, without = stage_two(profile, features, tmp_path / "without")
    assert without.history["loss"].iloc[0] != whole.history["loss"].iloc[0]


def test_training_without_stage_one_is_identified_as_it_was(profile, features, tmp_path):
    """Whatever the profile says of it: an earlier version's checkpoint has the same keys."""
    stage_two(profile, features, tmp_path)
    assert fingerprint(tmp_path).keys() == json.loads((OLDER / "checkpoint.json").read_text())["fingerprint"].keys()


def changed(profile, **keys):
    return profile.model_copy(update={"alignment": profile.alignment.model_copy(update=keys)})


def test_alignments_are_never_mixed_up(profile, features, aligned, tmp_path, monkeypatch):
    monkeypatch.setenv("SUITE_PROBE_STEPS", "1")
    stage_two(profile, features, tmp_path / "questions", aligned=aligned[2])
    other = tmp_path / "other captions"
    with pytest.raises(CheckpointError, match="other captions holds no finished alignment"):
        stage_two(profile, features, tmp_path / "questions", aligned=other)
    assert stage_one(profile, features, other, captions=CAPTIONS[2:])[1].status == "partial"
    with pytest.raises(CheckpointError, match="other captions holds no finished alignment"):
        stage_two(profile, features, tmp_path / "questions", aligned=other)
    monkeypatch.delenv("SUITE_PROBE_STEPS")
    stage_one(profile, features, other, captions=CAPTIONS[2:])
    with pytest.raises(CheckpointError, match="is of another run:\n  captions: '"):
        stage_two(profile, features, tmp_path / "questions", aligned=other)
    with pytest.raises(CheckpointError, match=r"\n  alignment: \{.*\} in the checkpoint, None now\n  captions: "):
        stage_two(profile, features, tmp_path / "questions")
    with pytest.raises(CheckpointError, match=r"alignment\.epochs: 2\.0 in the checkpoint, 3\.0 now"):
        stage_one(changed(profile, epochs=3.0), features, other, captions=CAPTIONS[2:])
    with pytest.raises(CheckpointError, match="questions: '"):
        stage_one(profile, features, other)


def set_keys(profile, keys):
    for key, value in keys.items():
        section, name = key.split(".")
        profile = profile.model_copy(update={section: getattr(profile, section).model_copy(update={name: value})})
    return profile


def same_as_learnt(model, other):
    theirs = dict(other.named_parameters())
    return all(torch.equal(p, theirs[name]) for name, p in learning(model).items())


UNDECIDING = {
    "training.learning_rate_lora": 0.5,
    "training.learning_rate_connector": 0.5,  # of the questions
    "training.epochs": 7.0,
    "training.choice": "instead",
    "training.validation_share": 0.4,
    "language_model.lora_alpha": 64,
    "evaluation.options_in_prompt": True,
}


def test_what_decides_nothing_of_stage_one_leaves_it_valid(profile, features, aligned, tmp_path, monkeypatch):
    """A stage one trained anew with other values gives the same numbers, and the finished one is taken for theirs."""
    other = set_keys(profile, UNDECIDING)
    anew, _ = stage_one(other, features, tmp_path)
    assert same_as_learnt(aligned[0], anew)
    monkeypatch.setattr(AdapterTrainer, "training_step", None)
    again, result = stage_one(other, features, aligned[2])
    assert (result.status, result.seconds) == ("complete", aligned[1].seconds) and same_as_learnt(aligned[0], again)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.learning_rate_mit", 1e-3),
        ("training.loss", "per_question"),
        ("training.tokens_per_step", 120),
        ("training.seed", 1),
        ("language_model.lora_rank", 3),  # the adapter's first weights are drawn before the connector's
    ],
)
def test_what_decides_stage_one_asks_for_it_again(profile, features, aligned, tmp_path, key, value):
    other = set_keys(profile, {key: value})
    anew, _ = stage_one(other, features, tmp_path)
    assert not same_as_learnt(aligned[0], anew)
    with pytest.raises(CheckpointError, match=rf"is of another run:(.|\n)*{key}: "):
        stage_one(other, features, aligned[2])


def test_a_connector_that_stands_still_is_told_whatever_moves_beside_it(profile, features, tmp_path):
    with pytest.raises(TrainingError, match="no parameter of the part connector has moved"):
        stage_one(changed(profile, learning_rate_connector=1e-60), features, tmp_path)


def test_all_three_runs_count_in_the_forecast(profile, features, tmp_path, monkeypatch):
    """After two steps of stage one: what it has left, and twice the questions' steps, at its pace."""
    (tmp_path / "03").mkdir()
    whole = stage_two(profile, features, tmp_path / "elsewhere")[1].total_steps
    monkeypatch.setenv("SUITE_PROBE_STEPS", "2")
    _, part = stage_one(profile, features, tmp_path / "03" / "alignment")
    seconds, told, epoch = own_pace(tmp_path / "03")
    [noted] = [p for p in json.loads((tmp_path / "03/alignment/pace.json").read_text()) if p["done"]]
    left = part.total_steps - 2 + 2 * whole
    assert part.steps == 2 and seconds == pytest.approx(START_UP_SECONDS + left * noted["seconds"] / 2)
    assert epoch == pytest.approx(part.total_steps / profile.alignment.epochs * noted["seconds"] / 2)
    asked = [p["epochs"] for p in json.loads((tmp_path / "03/alignment/pace.json").read_text()) if not p["done"]]
    assert asked == [profile.training.epochs] * 2  # of the questions, and of the twin's
    assert f"{part.total_steps - 2} steps of the alignment" in told and f"{whole} steps of the blind twin" in told


def test_captions_of_watched_gifs_are_held_out_and_test_captions_never_seen(profile, features):
    table = pd.concat([CAPTIONS, CAPTIONS[:2].assign(split="test", gif_sha256="tested", caption_id=["t0", "t1"])])
    chosen = choose_captions(table, {"tested"}, {"gif1", "gif3"}, features, profile)
    assert set(chosen.held["gif_sha256"]) == {"gif1", "gif3"} and len(chosen.held) == 4
    assert sorted(chosen.trained["gif_sha256"].unique()) == [gif for gif in GIFS if gif not in ("gif1", "gif3")]
    assert chosen.told == "12 captions of 6 GIFs to train on, 4 captions of 2 GIFs held out"
    validation = CAPTIONS[:1].assign(split="val", gif_sha256="validation", caption_id="v0")
    with_val = pd.concat([table, validation])  # as MSR-VTT has it
    assert choose_captions(with_val, (), {"gif1", "gif3"}, features, profile).trained.equals(chosen.trained)
    # of test GIFs that have captions alone no question tells
    assert choose_captions(table, (), {"gif1", "gif3"}, features, profile).trained.equals(chosen.trained)
    both = pd.concat([table, CAPTIONS[:1].assign(split="test", gif_sha256="gif5", caption_id="t2")])
    for told, tested in ((table, {"tested", "gif5"}), (both, {"tested"})):
        with pytest.raises(TrainingError, match=r"1 GIFs of captions to train on occur in the test .*gif5"):
            choose_captions(told, tested, set(), features, profile)


def test_where_there_is_nothing_to_learn_from_it_is_said(profile, features):
    assert (
        "alignment.epochs is 0" in choose_captions(CAPTIONS, set(), set(), features, changed(profile, epochs=0.0)).told
    )
    for table, watched in ((CAPTIONS[:0], set()), (CAPTIONS.assign(split="test"), set()), (CAPTIONS, set(GIFS))):
        chosen = choose_captions(table, set(), watched, features, profile)
        assert chosen.trained.empty and "there is no caption of a GIF to train on" in chosen.told


def test_a_caption_that_the_window_cannot_hold_is_left_out(profile, features, tiny_llama_dir):
    size = json.loads((tiny_llama_dir / "config.json").read_text())["max_position_embeddings"]
    long = CAPTIONS[:1].assign(caption_id="long", caption="star " * size)
    chosen = choose_captions(pd.concat([CAPTIONS, long]), set(), set(), features, profile)
    assert len(chosen.trained) == 16 and "long" not in set(chosen.trained["question_id"])
    assert chosen.told.endswith(", 1 too long and left out.")
