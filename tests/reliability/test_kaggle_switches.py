"""All that `kaggle` turns on and `tiny` does not, in one small run: from GIF files to scores, at random small models.

WebP frames, two numbers of groups, a chat template, NF4, a trained MIT, LoRA's dropout, recomputed activations, and a
T4's float16: weights, autocast and gradient scaler of float16 on the CPU, by the libraries' own paths.
"""

import numpy as np
import pytest
import torch

from helpers.answers import predict
from helpers.config import Profile, load_profile
from helpers.corpora import shapes
from helpers.corpora.captions import world_captions
from helpers.models.gif_qa import GifQA, GifQAModel, load_bundle
from helpers.models.xclip import FrameEncoder, load_xclip
from helpers.scoring import tgif_qa as scoring
from helpers.store.encoding import cache_features
from helpers.store.features import FeatureTable
from helpers.store.shards import shard_gifs
from helpers.training import align, choose_captions, engine, hold_out, train
from helpers.training.checkpoints import trainable

CPU = torch.device("cpu")
# Without dropout, whose random numbers each process draws for its own rows, and at the profile's own learning rates:
# higher ones make more of rounding, since Adam divides a gradient by its own size.
CALM = {
    "language_model__lora_dropout": 0.0,
    "training__learning_rate_lora": 2.0e-4,
    "training__learning_rate_connector": 5.0e-4,
}


@pytest.fixture(scope="module")
def make_kaggle(tiny_xclip_dir, chat_dir):
    """The profile `kaggle` but for its sizes, its corpus and its base models; keys by `section__name`."""
    overrides = {
        "data.corpus": "shapes",
        "data.image_size": 32,
        "data.groups": [1, 2],
        "data.workers": 1,
        "shapes.seed": 3,
        "shapes.train": 8,
        "shapes.test": 2,
        "encoder.model": str(tiny_xclip_dir),
        "language_model.model": str(chat_dir("llama3")),
        "connector.hidden": 32,
        "training.groups": [1, 2],
        "training.epochs": 2,
        "training.tokens_per_step": 700,
        "training.learning_rate_lora": 5.0e-3,
        "training.learning_rate_connector": 5.0e-3,
        "training.validation_share": 0.1,
        "evaluation.bootstrap": 20,
    }

    def make(**changes) -> Profile:
        return load_profile("kaggle", overrides | {key.replace("__", "."): value for key, value in changes.items()})

    return make


@pytest.fixture(scope="module")
def cached(make_kaggle, tmp_path_factory):
    """Notebooks 01 and 02: the questions, a GIF file, and the features."""
    folder, profile = tmp_path_factory.mktemp("kaggle"), make_kaggle()
    corpus = shapes.load(profile, folder / "gifs")
    made = shard_gifs(corpus, folder / "01", profile.data)
    encoder = FrameEncoder(load_xclip(profile.encoder.model), profile.encoder.model).eval()
    cache_features(folder / "01" / "frames", folder / "features.lance", encoder, profile.data, 16)
    gif = next(iter(corpus.gifs.values()))
    return made.questions, gif, FeatureTable(folder / "features.lance")


@pytest.fixture(scope="module")
def t4():
    """The precision of a T4 on the CPU. accelerate has float16 there but for two switches, which are set by hand."""
    prepared = engine.AdapterTrainer.__init__

    def in_float16(self, *arguments):
        prepared(self, *arguments)
        assert self.accelerator.mixed_precision == "fp16"
        self.accelerator.native_amp, self.accelerator.scaler = True, torch.amp.GradScaler("cpu")

    def precise(patch):
        for room in ("training.engine", "models.language", "models.gif_qa.ask"):
            patch.setattr(f"helpers.{room}.compute_dtype", lambda device: torch.float16)
        patch.setattr(engine.AdapterTrainer, "__init__", in_float16)

    return precise


def learn(cached, profile, folder, video=True):
    """Notebook 03's training, captions first; returns the result, the trained tensors and the model."""
    questions, _, features = cached
    rows, watched = hold_out(questions[questions["split"] == "train"], profile.training.validation_share, 0)
    model, aligned = GifQAModel.build(profile, CPU, video=video), None
    if video:
        aligned, known = folder / "alignment", questions.drop_duplicates("gif").set_index("gif")["gif_sha256"]
        told = world_captions(profile.shapes.seed, profile.shapes.train, profile.shapes.test)
        told = told.assign(gif_sha256=told["gif"].map(known), caption_id=told.index.astype(str))
        tested = set(questions.loc[questions["split"] == "test", "gif_sha256"])
        chosen = choose_captions(told, tested, set(watched["gif_sha256"]), features, profile)
        done = align(model, chosen.trained, features, profile, aligned, questions=rows, progress=False)
        assert done.status == "complete"
    options = {"eval_questions": watched, "aligned": aligned, "progress": False}
    result = train(model, rows, features, profile, folder, **options)
    assert result.status == "complete" and result.steps == len(result.history) > 10
    return result.history, {name: p.detach().clone() for name, p in trainable(model).items()}, model


@pytest.fixture(scope="module")
def as_on_a_t4(cached, make_kaggle, t4, tmp_path_factory):
    """Trained in float16: as the profile says, with activations kept instead of computed again, and the blind twin."""
    folder, keeping = tmp_path_factory.mktemp("t4"), make_kaggle(training__gradient_checkpointing=False)
    with pytest.MonkeyPatch.context() as patch:
        t4(patch)
        return {
            "main": learn(cached, make_kaggle(), folder / "main"),
            "keeping": learn(cached, keeping, folder / "keeping"),
            "blind": learn(cached, make_kaggle(), folder / "blind", video=False),
        }


@pytest.fixture(scope="module")
def alone(cached, make_kaggle, tmp_path_factory):
    """Trained by one process in float32."""
    return learn(cached, make_kaggle(**CALM), tmp_path_factory.mktemp("alone"))


def test_the_switches_are_those_of_kaggle(make_kaggle):
    profile = make_kaggle()
    assert profile.data.frame_format == "webp" and profile.language_model.quantisation == "nf4"
    assert profile.language_model.chat and profile.language_model.lora_dropout > 0
    assert profile.connector.train_mit and profile.training.gradient_checkpointing
    assert profile.training.loss == "per_question" and profile.connector.output_scale == "fixed"
    assert profile.training.choice != "none" and profile.evaluation.options_in_prompt
    assert profile.language_model.option_style == "lettered" and profile.alignment.epochs == 1


def test_every_part_learns_in_float16(as_on_a_t4, make_kaggle):
    start = trainable(GifQAModel.build(make_kaggle(), CPU))
    tensors = as_on_a_t4["main"][1]
    for part in ("language_model.", "connector.", "mit."):
        names = [name for name in tensors if name.startswith(part)]
        assert names and any(not torch.equal(tensors[name], start[name]) for name in names), part
    for history, _, _ in as_on_a_t4.values():
        assert (history["scale"] > 1).all() and history["skipped"].sum() < len(history) / 4
        assert history["loss"].tail(3).mean() < 0.9 * history["loss"].head(3).mean()
        assert history["eval_loss"].notna().sum() == 2


def test_recomputed_activations_change_no_loss(as_on_a_t4):
    """With dropout: what is computed again draws the same numbers, in the same precision."""
    (history, tensors, _), (other, others, _) = as_on_a_t4["main"], as_on_a_t4["keeping"]
    np.testing.assert_array_equal(history["loss"], other["loss"])
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name


def test_float16_gives_the_loss_of_float32_but_for_its_rounding(as_on_a_t4, alone):
    """Of the first step, in which LoRA adds nothing yet, so that dropout does not tell."""
    half, exact = as_on_a_t4["main"][0]["loss"].iloc[0], alone[0]["loss"].iloc[0]
    assert half == pytest.approx(exact, rel=1e-2) and half != exact


def test_two_processes_do_what_one_does(cached, make_kaggle, alone, tmp_path):
    history, tensors, _ = learn(cached, make_kaggle(training__gpus=2, **CALM), tmp_path)
    for column in ("loss", "eval_loss"):
        np.testing.assert_allclose(history[column], alone[0][column], rtol=2e-4)
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, alone[1][name], rtol=1e-2, atol=1e-3)


def test_the_bundles_are_loaded_scored_and_asked(cached, make_kaggle, as_on_a_t4, t4, monkeypatch, tmp_path):
    (questions, gif, features), profile = cached, make_kaggle()
    t4(monkeypatch)
    test, answers = questions[questions["split"] == "test"], {}
    for name in ("main", "blind"):
        as_on_a_t4[name][2].save_bundle(tmp_path / name)
        loaded = load_bundle(tmp_path / name, language_model=profile.language_model.model)
        assert loaded.language_model.get_input_embeddings().weight.dtype == torch.float16
        answers[name] = predict(loaded, test, features, profile.evaluation, groups=1, vocabulary=["red", "blue"])
        assert answers[name]["prediction"].notna().all() and len(answers[name]) == len(test) == 14
    table = scoring.join_variants(test.assign(num_frames=20), answers)
    metrics, open_ended = scoring.metrics(table), table[table["task"] == "frameqa"]
    assert metrics["frameqa_accuracy"] == (open_ended["prediction"] == open_ended["answer"]).mean()
    assert np.isfinite([metrics["count_mse"], metrics["blind_count_mse"], metrics["blind_action_accuracy"]]).all()
    models = {"language_model": profile.language_model.model, "video_model": profile.encoder.model}
    answer = GifQA.from_pretrained(tmp_path / "main", **models).answer(gif, "what color is it ?", ["red", "blue"])
    assert answer.text in ("red", "blue") and 0.5 <= answer.confidence <= 1 and len(answer.relevance) > 1
