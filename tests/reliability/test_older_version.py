"""Runs, checkpoints and bundles of an earlier version stand, go on and answer as they did, also when keys come and go.

`made_before` was made when today's backbones were shipped. finished: `run_all.sh --run finished --only 01 --only 02
--only 03 --only 04` with `SETTINGS`; paused: the same with training stopped after two steps (SUITE_PROBE_STEPS=2); of
both what is read here was kept, and of the finished one's files no `contents`. `LOSSES` are those of the finished run.
answers.json: what the shipped bundle said to a small world.
"""

import io
import json
import shutil
from pathlib import Path
from typing import Annotated

import pytest
import yaml
from pydantic import Field, create_model

from helpers import config
from helpers.config import ConnectorConfig, Key, Profile, Section, TrainingConfig
from helpers.corpora.shapes import make_world, write_gif
from helpers.models.gif_qa import GifQA, GifQAModel
from helpers.runner.outcome import DONE, REFUSED
from helpers.stage.manifest import settings_differences
from helpers.store import FeatureTable, read_questions
from helpers.suite import main
from helpers.training import CheckpointError, hold_out, train
from helpers.workspace import repo_root

MADE = Path(__file__).parent / "made_before"
SETTINGS = {
    "shapes.train": 8,
    "shapes.test": 4,
    "alignment.epochs": 0,
    "training.epochs": 1,
    "training.tokens_per_step": 400,
    "language_model.lora_rank": 1,
    "connector.hidden": 16,
    "evaluation.bootstrap": 50,
    "evaluation.batch_tokens": 600,
}
OPTIONS = [word for key, value in SETTINGS.items() for word in ("-p", key, str(value))]
STAGES = ["--only", "01", "--only", "02", "--only", "03", "--only", "04"]
LOSSES = [6.674498, 2.446776, 2.628104, 2.445109, 2.554567, 2.783566, 2.350446, 2.623433]


@pytest.fixture(params=["as it was", "a key came and a key went"])
def profile(request, tmp_path, monkeypatch) -> str:
    """The tiny profile of this version, or of a later one: it has training.sharpness, and no connector.queries."""
    if request.param == "as it was":
        return "tiny"
    rest = {name: (field.annotation, field) for name, field in ConnectorConfig.model_fields.items()}
    del rest["queries"]
    connector = create_model("ConnectorConfig", __base__=Section, **rest)
    came = Annotated[int, Field(ge=0), Key(before=3)]
    training = create_model("TrainingConfig", __base__=TrainingConfig, sharpness=(came, 3))
    later = create_model("Profile", __base__=Profile, connector=(connector, ...), training=(training, ...))
    monkeypatch.setattr(config, "Profile", later)
    monkeypatch.setitem(config.REMOVED, "connector", frozenset({"queries"}))
    values = yaml.safe_load((config.PROFILES / "tiny.yaml").read_text())
    del values["connector"]["queries"]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    return str(tmp_path / "tiny.yaml")


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """The folder of both runs, to be changed."""
    shutil.copytree(MADE, tmp_path / "runs")
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path / "runs"))
    monkeypatch.delenv("SUITE_DEADLINE", raising=False)
    return tmp_path / "runs"


def test_finished_run_stands(runs, profile, capsys):
    line = ["--profile", profile, "--run", "finished", *OPTIONS, *STAGES[2:]]
    line += ["-p", "data.decode_seconds", "5"]  # a key that went
    for pace in ([], ["-p", "training.gpus", "2", "-p", "encoder.gpus", "2"], ["-p", "data.workers", "7"]):
        assert main([*line, *pace]) == DONE
        assert capsys.readouterr().out.count("already done") == 3
    assert main([*line, "-p", "connector.hidden", "32"]) == REFUSED
    assert "profile.connector.hidden: 16 there, 32 now" in capsys.readouterr().err
    if profile != "tiny":
        assert main([*line, "-p", "training.sharpness", "4"]) == REFUSED
        assert "profile.training.sharpness: 3 there, 4 now" in capsys.readouterr().err


def test_key_that_came_is_filled_in_where_a_stage_names_it_alone(profile):
    old, new = {"profile": {}}, {"profile": {"training.sharpness": 3}}
    if profile != "tiny":
        assert settings_differences(old, new) == []
    new["profile"]["training.sharpness"] = 4
    there = "None" if profile == "tiny" else "3"
    assert settings_differences(old, new) == [f"profile.training.sharpness: {there} there, 4 now"]


def test_paused_training_goes_on_as_if_it_had_never_stopped(runs, profile):
    folder = runs / "paused" / "03_adapter_training"
    settings = config.load_profile(profile, {**SETTINGS, "training.checkpoint_minutes": 99})
    questions = read_questions(runs / "paused" / "02_feature_caching" / "questions.parquet")
    features = FeatureTable(runs / "paused" / "02_feature_caching" / "features.lance")
    rows, watched = hold_out(questions[questions["split"] == "train"], settings.training.validation_share, 0)
    assert settings.training.seed == 0
    if profile != "tiny":
        other = config.load_profile(profile, {**SETTINGS, "training.sharpness": 4})
        with pytest.raises(CheckpointError, match=r"training\.sharpness: 3 in the checkpoint, 4 now"):
            train(GifQAModel.build(other), rows, features, other, folder, eval_questions=watched, progress=False)
    model = GifQAModel.build(settings)
    result = train(model, rows, features, settings, folder, eval_questions=watched, progress=False)
    assert result.status == "complete"
    assert result.history["loss"].tolist() == pytest.approx(LOSSES, rel=1e-3)


def test_bundle_answers_as_it_did(profile):
    qa = GifQA.from_pretrained(repo_root() / "helpers" / "assets" / "tiny" / "bundle")
    files = {}
    for scene in make_world(61, 4, "old")[0]:
        write_gif(scene, content := io.BytesIO())
        files[scene.name] = content.getvalue()
    for told in json.loads((MADE / "answers.json").read_text())[::5]:
        answer = qa.answer(files[told["gif"]], told["question"], told["options"] or None)
        assert answer.text == told["text"] and answer.confidence == pytest.approx(told["confidence"], abs=1e-3)
