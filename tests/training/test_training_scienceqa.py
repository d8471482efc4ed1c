"""ADEM-VL's runs on ScienceQA: sequences, steps, optimizer, resume, on random backbones."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from helpers import training
from helpers.config import ADEM_PRESETS, ConfigError, load_profile
from helpers.corpora import VALIDATION, diagrams, load_problems, scienceqa
from helpers.corpora.schema import CorpusError
from helpers.corpora.scienceqa import load
from helpers.models.adem_vl.config import AdemVLError, fit_scales
from helpers.sweeps.adem_vl import ablation_rows, changed, grid_of
from helpers.training import adem_vl as science
from helpers.training.checkpoints import CheckpointError
from helpers.training.collective import TrainingError
from helpers.workspace import place


@pytest.fixture(scope="module")
def tiny_clip_dir(tmp_path_factory):
    """A random `CLIPVisionModel` checkpoint: 64 pixels in an 8x8 grid, width 16, three blocks."""
    folder = tmp_path_factory.mktemp("tiny-clip")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**size, image_size=64, patch_size=8)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def make_config(tiny_llama_dir, tiny_clip_dir):
    def make(**changes):
        own = {"language_model": str(tiny_llama_dir), "vision_model": str(tiny_clip_dir), "batch_size": 4, "epochs": 2}
        own |= {"warmup_epochs": 0.5, "projector_dim": 8, "adapter_dim": 2, "max_tokens": 400}
        return load_profile("tiny", {f"adem.{key}": value for key, value in (own | changes).items()}).adem

    return make


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    folder = diagrams.write(tmp_path_factory.mktemp("d") / "w", seed=1, train=22, val=1, test=12)
    return load(folder, splits=("train",), captions=True).problems


def run(folder, problems, config, **options):
    model = science.build_model(config)
    result, skipped = science.train_adem(model, problems, config, folder, progress=False, **options)
    return model, result, skipped


# ---- presets ----


# Every key of the paper's recipe, from its official code (README's command, train.py's defaults) and the specification.
PAPER = {
    "corpus": "scienceqa",
    "world_seed": 0,
    "world_train": 2000,
    "world_test": 400,
    "evaluation_splits": ["test"],
    "protocol": "QCM-A",
    "max_tokens": 512,
    "language_model": "huggyllama/llama-7b",
    "language_revision": None,
    "quantisation": "none",
    "vision_model": "openai/clip-vit-large-patch14",
    "vision_revision": None,
    "normalisation": "imagenet",
    "adapter_dim": 12,
    "projector_dim": 128,
    "scales": [256, 64],
    "alpha": 0.1,
    "beta": 0.01,
    "drop_ratio": 0.1,
    "use_cls": True,
    "cross_attention": "mlp_in_out",
    "phi": "silu",
    "learnable_threshold": False,
    "layer_dropout": 0.0,
    "cross_attention_dropout": 0.0,
    "epochs": 20,
    "warmup_epochs": 2,
    "learning_rate": 9e-3 * 32 / 256,
    "weight_decay": 0.02,
    "max_grad_norm": 0,
    "batch_size": 2,
    "accumulation": 16,
    "gradient_checkpointing": False,
    "seed": 42,
    "checkpoint_minutes": 10,
    "log_steps": 10,
    "evaluation_batch": 4,
}
STUDENT = {"protocol": "released mismatch", "epochs": 5, "warmup_epochs": 0, "weight_decay": 0.05}
T4 = {"quantisation": "nf4", "normalisation": "encoder", "scales": None, "epochs": 8, "warmup_epochs": 1}
T4 |= {"batch_size": 4, "accumulation": 8, "gradient_checkpointing": True, "evaluation_batch": 8}


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("paper", {}),
        ("student", STUDENT),
        ("student_batch4", STUDENT | {"batch_size": 4, "accumulation": 8, "weight_decay": 0.01}),
        ("student_adapter16", STUDENT | {"adapter_dim": 16}),
        ("t4", T4),
    ],
)
def test_presets_are_the_recipes(preset, changes):
    """Every key: the paper's, but for those that make the preset."""
    config = load_profile("tiny", {"adem.preset": preset}).adem
    assert config.model_dump() == PAPER | changes | {"preset": preset}
    assert config.batch_size * config.accumulation == 32 and fit_scales(config.scales, 16) == (256, 64)


def test_presets_say_what_their_source_does_not_settle():
    """The student's report contradicts itself on weight decay, and its log tells what memory batch 4 takes."""
    for path in sorted(ADEM_PRESETS.glob("student*.yaml")):
        told = path.read_text().partition("corpus:")[0]
        assert "0.05" in told and '"0.02 to 0.01"' in told and "contradicts itself on weight decay" in told
    wide = (ADEM_PRESETS / "student_adapter16.yaml").read_text().partition("corpus:")[0].replace("\n# ", " ")
    assert "Taken here: `student`, so weight decay 0.05 and batch 2 x 16" in wide
    paper = (ADEM_PRESETS / "paper.yaml").read_text().partition("corpus:")[0].replace("\n# ", " ")
    assert "32.8 GB at batch 4" in paper and "24 GB" not in paper


def test_unknown_presets_and_endless_warm_up_are_refused():
    with pytest.raises(ConfigError, match=r"'papr'; did you mean 'paper'"):
        load_profile("tiny", {"adem.preset": "papr"})
    with pytest.raises(ConfigError, match=r"warmup_epochs 9.* must be below"):
        load_profile("tiny", {"adem.warmup_epochs": 9})
    with pytest.raises(ConfigError, match=r"did you mean 'adem.epochs'"):
        load_profile("tiny", {"adem.epoch": 9})
    for splits, fault in ((["val", "val"], "names a split twice"), (["train"], "'val' or 'test'"), ([], "at least 1")):
        with pytest.raises(ConfigError, match=fault):
            load_profile("tiny", {"adem.evaluation_splits": splits})


def test_another_encoder_is_one_key_away(tmp_path, make_config, problems):
    """A SigLIP of another grid: its own normalisation and scales, without another key; the tiny profile's is CLIP's."""
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    SiglipVisionModel(SiglipVisionConfig(**size, image_size=56, patch_size=4)).save_pretrained(tmp_path / "siglip")
    path = problems[problems["image"] != ""]["image"].iloc[0]
    for changes, normalisation, scales, side in (
        ({}, "clip", (64, 16), 64),
        ({"vision_model": str(tmp_path / "siglip")}, "siglip", (196, 49), 56),
        ({"normalisation": "imagenet"}, "imagenet", (64, 16), 64),
    ):
        config = make_config(**changes)
        model = science.build_model(config)
        assert model.config.scales == scales
        assert torch.equal(science.images_for(model, config)(path), science.Images(side, normalisation)(path))


def test_a_trained_model_is_loaded_on_the_profiles_base_models(tmp_path, make_config):
    config = make_config()
    model = science.build_model(config)
    model.save_pretrained(tmp_path / "adem_vl")
    again = science.load_model(config, tmp_path / "adem_vl")
    assert again.tokenizer is not None and again.config.to_dict() == model.config.to_dict()
    assert all(torch.equal(t, again.adapter_tensors()[name]) for name, t in model.adapter_tensors().items())


# ---- batches ----


def test_steps_hold_their_rows_and_every_epoch_has_its_own_order(make_config):
    lengths = np.arange(10, 32)
    plan = science.plan_steps(lengths, make_config(batch_size=2, accumulation=3, epochs=2.5))
    assert [len(batch) for batch in plan.batches] == [6] * 8 and plan.epoch_after[-1] == pytest.approx(8 / 3)
    first, second = (np.concatenate(plan.batches[start : start + 3]).tolist() for start in (0, 3))
    assert len(set(first)) == len(set(second)) == 18 and first != second  # four rows wait for the next epoch
    assert plan.text_tokens.tolist() == [lengths[batch].sum() for batch in plan.batches]
    for batch, padded in zip(plan.batches, plan.padded_tokens, strict=True):
        ordered = sorted(lengths[batch])
        assert padded == sum(2 * max(ordered[i : i + 2]) for i in (0, 2, 4))
    assert plan.epoch_ends == {3, 6, 8}
    assert science.plan_steps(lengths, make_config(batch_size=2, accumulation=3, seed=5)).batches != plan.batches[:6]


def test_too_few_problems_are_refused(make_config):
    with pytest.raises(TrainingError, match="3 training problems are fewer than the 4 of one step"):
        science.plan_steps(np.ones(3), make_config())


def test_what_is_learnt_is_the_answer(make_config, problems):
    config = make_config()
    model = science.build_model(config)
    data = science.Problems(model, problems, config)
    images = science.Images(64, "clip")
    pieces = science.Collator(images, science.padding_token(model), 4)([data[i] for i in range(8)])
    assert [len(piece["input_ids"]) for piece in pieces] == [4, 4]
    order = sorted(range(8), key=lambda i: len(data.samples[i].input_ids))
    rows = [(piece, i) for piece in pieces for i in range(4)]
    for row, (piece, i) in zip(order, rows, strict=True):
        problem = problems.iloc[row]
        learnt = piece["labels"][i][piece["labels"][i] != -100].tolist()
        assert learnt[-1] == model.tokenizer.eos_token_id
        assert model.tokenizer.decode(learnt[:-1]).strip() == f"The answer is {'ABCDE'[problem['answer']]}."
        assert bool(piece["has_image"][i]) == bool(problem["image"])


def test_a_prompt_that_is_too_long_is_listed_and_never_cut(make_config, problems):
    long = problems.copy()
    long.at[3, "hint"] = "a very long hint " * 100
    config = make_config()
    data = science.Problems(science.build_model(config), long, config)
    assert data.skipped[["item", "where"]].values.tolist() == [[long.at[3, "pid"], "train"]]
    assert "the window has 400" in data.skipped["reason"].iloc[0]
    assert len(data) == len(long) - 1


def test_the_blind_twin_sees_no_image(make_config, problems):
    config = make_config()
    model = science.build_model(config)
    data = science.Problems(model, problems, config, blind=True)
    assert not any(data.paths) and not any(sample.has_image for sample in data.samples)
    batch = science.batch_of([data[0], data[1]], science.Images(64, "clip"), 0)
    assert "pixel_values" not in batch


def test_images_are_opened_once(make_config, problems, monkeypatch):
    opened = []
    original = science.open_image
    monkeypatch.setattr(science, "open_image", lambda path: opened.append(path) or original(path))
    images = science.Images(64, "clip")
    path = problems[problems["image"] != ""]["image"].iloc[0]
    first, second = images(path), images(path)
    assert opened == [path] and torch.equal(first, second)
    assert not images("").any()


# ---- runs ----


def test_optimizer_decays_matrices_and_tables_only(make_config):
    config = make_config(learnable_threshold=True, learning_rate=0.01, weight_decay=0.3)
    model = science.build_model(config)
    decay = {id(p): g["weight_decay"] for g in science.parameter_groups(model, config) for p in g["params"]}
    assert decay.keys() == {id(p) for p in model.adapter_tensors().values()}
    for name, p in model.adapter_tensors().items():
        assert decay[id(p)] == (0.0 if name.endswith("bias") or name == "thresholds" else 0.3), name


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_a_run_equals_a_plain_loop(tmp_path, make_config, problems, clip):
    """The suite's trainer against AdamW, accumulation, clipping (0: none) and the official schedule written out."""
    config = make_config(batch_size=3, accumulation=2, max_grad_norm=clip)
    model, result, _ = run(tmp_path, problems, config)
    plain = science.build_model(config)
    torch.manual_seed(config.seed)
    data = science.Problems(plain, problems, config)
    plan, images = science.plan_steps(data.lengths, config), science.Images(64, "clip")
    collate = science.Collator(images, science.padding_token(plain), 3)
    decayed = [p for p in plain.adapter_tensors().values() if p.ndim >= 2]
    others = [p for p in plain.adapter_tensors().values() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)
    torch.empty((), dtype=torch.int64).random_()  # a DataLoader draws its workers' seed
    plain.train()
    losses, per_epoch = [], len(plan) // 2
    for step, rows in enumerate(plan.batches):
        epoch = step / per_epoch  # the official schedule counts epochs: 0.5 of warm-up, 2 in all
        warm = math.ceil(0.25 * len(plan)) / per_epoch
        scale = epoch / warm if epoch < warm else 0.5 * (1 + math.cos(math.pi * (epoch - warm) / (2 - warm)))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * scale
        optimizer.zero_grad()
        total = 0.0
        for piece in collate([data[row] for row in rows]):
            loss = plain(**piece)["loss"] / 2
            loss.backward()
            total += loss.item()
        if clip:
            torch.nn.utils.clip_grad_norm_(decayed + others, clip)
        optimizer.step()
        losses.append(total)
    assert result.history["loss"].tolist() == pytest.approx(losses, rel=1e-5)
    for name, tensor in model.adapter_tensors().items():
        assert torch.allclose(tensor, plain.adapter_tensors()[name], rtol=1e-4, atol=1e-7), name
    assert result.status == "complete" and result.epochs == 2.0
    assert result.history["lr_adapters"].iloc[0] == 0.0


class Stop(Exception):
    """Stands for a crash in the middle of a step."""


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resume_equals_uninterrupted(tmp_path, make_config, problems, monkeypatch, accumulation):
    config = make_config(batch_size=4 // accumulation, accumulation=accumulation, checkpoint_minutes=1e-9)
    whole, expected, _ = run(tmp_path / "whole", problems, config)
    original = training.AdapterTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 7:
            raise Stop
        return original(self, *args, **kwargs)

    monkeypatch.setattr(training.AdapterTrainer, "training_step", training_step)
    with pytest.raises(Stop):
        run(tmp_path / "killed", problems, config)
    monkeypatch.undo()
    torch.manual_seed(99)
    model, resumed, _ = run(tmp_path / "killed", problems, config)
    assert resumed.history["loss"].tolist() == expected.history["loss"].tolist()
    for name, tensor in whole.adapter_tensors().items():
        assert torch.equal(tensor, model.adapter_tensors()[name]), name


def test_checkpoints_hold_adapters_only_and_refuse_other_runs(tmp_path, make_config, problems):
    config = make_config(epochs=1, warmup_epochs=0)
    model, _, _ = run(tmp_path, problems, config)
    newest = sorted((tmp_path / "checkpoints").glob("step-*"))[-1]
    assert load_file(newest / training.TENSORS).keys() == model.adapter_tensors().keys()
    assert json.loads((newest / training.META).read_text())["fingerprint"]["blind"] is False
    with pytest.raises(CheckpointError, match=r"blind: False in the checkpoint, True now"):
        run(tmp_path, problems, config, blind=True)
    with pytest.raises(CheckpointError, match=r"adem.alpha"):
        run(tmp_path, problems, make_config(epochs=1, warmup_epochs=0, alpha=0.2))
    assert run(tmp_path, problems, make_config(epochs=1, warmup_epochs=0, log_steps=3))[1].status == "complete"


def test_a_deadline_leaves_a_partial_run(tmp_path, make_config, problems):
    _, result, _ = run(tmp_path, problems, make_config(), deadline=0.0)
    assert (result.status, result.steps) == ("partial", 0)


# ---- data and ablations ----


def test_the_world_or_a_folder_of_yours(tmp_path, make_config):
    config = make_config(world_train=6, world_test=4)
    found = load_problems(config, tmp_path / "world")
    assert found.problems["split"].value_counts().to_dict() == {"train": 6, "test": 4}
    both = load_problems(make_config(evaluation_splits=["val", "test"]), tmp_path / "u", tmp_path / "world")
    assert both.problems["split"].value_counts().to_dict() == {"val": VALIDATION, "train": 6, "test": 4}
    own = load_problems(make_config(corpus="scienceqa"), tmp_path / "unused", tmp_path / "world")
    pd.testing.assert_frame_equal(own.problems, found.problems)
    assert not (tmp_path / "unused").exists()


def test_scienceqa_that_is_nowhere_names_the_way_out(tmp_path, make_config, monkeypatch):
    monkeypatch.setattr(place, "KAGGLE_INPUT", tmp_path)
    nowhere = dict.fromkeys(scienceqa.TEXTS, "http://127.0.0.1:9/none")
    monkeypatch.setattr(scienceqa, "TEXTS", nowhere)
    with pytest.raises(CorpusError, match=r"could not be fetched .* attach a copy on Kaggle.* -p data FOLDER"):
        load_problems(make_config(corpus="scienceqa"), tmp_path / "w")
    for name in ("a", "b"):
        world = diagrams.write(tmp_path / name / "deep", seed=1, train=2, val=1, test=1)
        if name == "a":
            assert load_problems(make_config(corpus="scienceqa"), tmp_path / "w").problems.shape[0] == 3
    with pytest.raises(CorpusError, match="several"):
        load_problems(make_config(corpus="scienceqa"), world)


def test_ablation_rows_are_models_that_can_be_built(make_config):
    config = make_config()
    assert grid_of(config) == 8
    for name in ("ladder", "placements", "scales", "drop", "phi"):
        rows = ablation_rows(name, 8)
        counts = {}
        for label, values in rows.items():
            model = science.build_model(changed(config, values))
            counts[label] = sum(t.numel() for t in model.adapter_tensors().values())
        if name == "ladder":
            assert list(rows)[:5] == ["base", "+ CLS", "+ cross-attention (SiLU)", "+ multiscale", "+ fusion"]
            assert counts["base"] < counts["+ CLS"] == counts["+ cross-attention (SiLU)"] < counts["+ multiscale"]
            assert [rows[label]["phi"] for label in list(rows)[1:3]] == ["identity", "silu"]
            assert counts["+ multiscale"] == counts["+ fusion"] < counts["learnable threshold"]
    with pytest.raises(ValueError, match="there are ladder"):
        ablation_rows("laddr", 8)


def test_scales_are_the_papers_as_far_as_the_grid_goes():
    paper = [(256,), (64,), (16,), (64, 16), (256, 16), (256, 64), (256, 64, 16)]
    assert sorted(tuple(row["scales"]) for row in ablation_rows("scales", 16).values()) == sorted(paper)
    assert list(ablation_rows("scales", 14)) == ["196", "49", "196+49"]
    with pytest.raises(ValueError, match="27x27 patch grid has an odd side"):
        ablation_rows("scales", 27)


def test_other_base_models_bring_their_own_normalisation_and_grid(make_config):
    config = make_config(language_revision="abc", vision_revision="def")
    rows = {label: changed(config, values) for label, values in ablation_rows("bases", 8).items()}
    assert all(row.scales is None and row.normalisation == "encoder" for row in rows.values())
    models = [
        (row.language_model, row.language_revision, row.vision_model, row.vision_revision) for row in rows.values()
    ]
    llama, clip = config.language_model, config.vision_model
    assert models == [
        (llama, "abc", clip, "def"),
        ("meta-llama/Llama-3.2-1B", None, clip, "def"),
        ("meta-llama/Llama-3.2-3B", None, clip, "def"),
        (llama, "abc", "openai/clip-vit-large-patch14-336", None),
        (llama, "abc", "google/siglip-base-patch16-224", None),
    ]


def test_values_that_cannot_be_are_refused_when_the_model_is_built(make_config):
    with pytest.raises(AdemVLError, match="scales"):
        science.build_model(make_config(scales=[50]))
