"""The real notebooks, from GIF files to scores, through the command line, at small size."""

import json
import os
import shutil
import subprocess
import sys

import nbformat
import pandas as pd
import pytest

from helpers.workspace.place import repo_root

SMALL = ["-p", "training.epochs", "0.5", "-p", "evaluation.bootstrap", "50", "-p", "data.workers", "1"]
SMALL += ["-p", "alignment.epochs", "1"]
SMALL += ["-p", "adem.world_train", "64", "-p", "adem.world_test", "30", "-p", "adem.epochs", "1"]
DONE_ONCE = ["01_data_sharding", "02_feature_caching", "03_adapter_training", "04_evaluation", "05_adem_scienceqa"]
STAGES = ["00_start_here", *DONE_ONCE, "08_demo"]


def command(runs, *arguments):
    """Runs the suite's command line in a process of its own; returns exit code and output."""
    environment = os.environ | {"RUNS_ROOT": str(runs)}
    line = [sys.executable, "-m", "helpers.suite", *map(str, arguments)]
    done = subprocess.run(line, cwd=repo_root(), env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def manifest(runs, run, stage):
    return json.loads((runs / run / stage / "stage.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A runs folder with one finished run of the built-in world."""
    folder = tmp_path_factory.mktemp("runs")
    code, output = command(folder, "--run", "small", "-p", "shapes.train", "40", "-p", "shapes.test", "20", *SMALL)
    assert code == 0, output[-3000:]
    return folder


def test_scores_of_every_task_beside_every_baseline(runs):
    metrics = manifest(runs, "small", "04_evaluation")["metrics"]
    names = ["frameqa_accuracy", "action_accuracy", "transition_accuracy", "count_mse", "count_accuracy"]
    assert {prefix + name for prefix in ("", "majority_", "blind_", "shuffled_") for name in names} <= set(metrics)
    predictions = pd.read_parquet(runs / "small" / "04_evaluation" / "predictions.parquet")
    columns = ["gif_sha256", "gif", "task", "question", "options", "answer", "prediction", "scores", "confidence"]
    assert set(columns) <= set(predictions)
    assert len(predictions) == 20 * 7
    frameqa = predictions[predictions["task"] == "frameqa"]
    assert metrics["frameqa_accuracy"] == pytest.approx((frameqa["prediction"] == frameqa["answer"]).mean())


def test_adem_vl_is_scored_on_diagrams_beside_every_baseline(runs):
    metrics = manifest(runs, "small", "05_adem_scienceqa")["metrics"]
    assert {f"{system}accuracy" for system in ("", "likelihood_", "text_only_", "shuffled_")} <= set(metrics)
    predictions = pd.read_parquet(runs / "small" / "05_adem_scienceqa" / "predictions.parquet")
    assert len(predictions) == 30 and predictions["pid"].is_unique
    right = (predictions["prediction"] == predictions["answer"]).mean()
    assert metrics["accuracy"] == pytest.approx(100 * right, abs=0.01)


def test_captions_are_learnt_before_the_questions(runs):
    """Of 40 training GIFs, one (2 %) is held out to watch."""
    folder = runs / "small" / "03_adapter_training"
    metrics = manifest(runs, "small", "03_adapter_training")["metrics"]
    captions = pd.read_parquet(runs / "small" / "01_data_sharding" / "captions.parquet")
    written = pd.read_parquet(folder / "held_out_captions.parquet")
    trained = captions[(captions["split"] == "train") & ~captions["gif_sha256"].isin(written["gif_sha256"])]
    assert len(written) == 1 and metrics["alignment_captions"] == len(trained) > 0 and metrics["alignment_epochs"] == 1
    assert {"alignment_BLEU-4", "alignment_CIDEr", "alignment_validation_loss"} <= set(metrics)
    told = json.loads((folder / "bundle" / "bundle.json").read_text())
    assert told["metrics"]["alignment_captions"] == len(trained) and told["metrics"]["alignment_epochs"] == 1
    assert told["profile"]["alignment"]["epochs"] == 1 and (folder / "figures" / "loss_alignment.png").is_file()


def test_executed_notebooks_end_with_a_picture_and_a_table_and_no_warning(runs):
    for stage in STAGES:
        book = nbformat.read(runs / "small" / stage / f"{stage}.ipynb", 4)
        outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
        kinds = {kind for output in outputs for kind in output.get("data", {})}
        assert {"image/png", "text/html"} <= kinds, stage
        assert not [o for o in outputs if o.output_type == "error"]
        # What every viewer shows; JupyterLab alone also shows image/gif. Else one sees a picture's name instead of it.
        shown = {"text/html", "image/png", "image/jpeg", "application/vnd.jupyter.widget-view+json"}
        plain = [o.data["text/plain"] for o in outputs if "data" in o and not shown & set(o.data)]
        assert not [text for text in plain if text.startswith("<")], stage
        told = "".join(o.text for o in outputs if o.output_type == "stream")
        assert "Warning" not in told, f"{stage}: {told[-2000:]}"


def test_a_second_run_does_nothing_again(runs):
    before = {stage: (runs / "small" / stage / "stage.json").stat().st_mtime_ns for stage in DONE_ONCE}
    code, output = command(runs, "--run", "small", "-p", "shapes.train", "40", "-p", "shapes.test", "20", *SMALL)
    assert code == 0, output[-3000:]
    assert before == {stage: (runs / "small" / stage / "stage.json").stat().st_mtime_ns for stage in DONE_ONCE}


def test_a_damaged_stage_is_made_again_and_what_was_made_of_it_stands(runs):
    """Its checkpoints are lost too, so that it is trained anew: equal work has an equal digest, whatever the clock."""
    folder = runs / "small" / "03_adapter_training"
    before = {stage: manifest(runs, "small", stage) for stage in DONE_ONCE}
    shutil.rmtree(folder / "checkpoints")
    shutil.rmtree(folder / "blind_run")
    os.truncate(folder / "bundle" / "connector.safetensors", 0)
    code, output = command(runs, "--run", "small", "-p", "shapes.train", "40", "-p", "shapes.test", "20", *SMALL)
    assert code == 0, output[-3000:]
    assert "bundle is lost or damaged: 03_adapter_training is made again" in output
    after = {stage: manifest(runs, "small", stage) for stage in DONE_ONCE}
    made_again = [stage for stage in DONE_ONCE if after[stage]["finished"] != before[stage]["finished"]]
    assert made_again == ["03_adapter_training"]
    assert {stage: told["digest"] for stage, told in after.items()} == {s: told["digest"] for s, told in before.items()}


def test_a_bundle_scores_a_world_of_another_seed(runs, tmp_path):
    world = tmp_path / "world"
    code, output = command(runs, "make-shapes", "--seed", 5, "--train", 0, "--test", 10, "--out", world)
    assert code == 0, output
    bundle = runs / "small" / "03_adapter_training" / "bundle"
    own = ["--gifs", world, "--qa", world / "qa.csv", "--bundle", bundle, "--run", "scored"]
    only = [word for number in ("01", "02", "03", "04") for word in ("--only", number)]
    code, output = command(runs, *own, *only, *SMALL)
    assert code == 0, output[-3000:]
    metrics = manifest(runs, "scored", "04_evaluation")["metrics"]
    assert {"frameqa_accuracy", "action_accuracy", "transition_accuracy", "count_mse"} <= set(metrics)
    assert not (runs / "scored" / "03_adapter_training" / "checkpoints").exists()
    assert len(pd.read_parquet(runs / "scored" / "04_evaluation" / "predictions.parquet")) == 10 * 7


def test_real_gifs_run_through(runs, shared_data):
    folder = shared_data / "gifs" / "natural"
    code, output = command(runs, "--gifs", folder, "--qa", folder / "qa.csv", "--run", "natural", *SMALL)
    assert code == 0, output[-3000:]
    metrics = manifest(runs, "natural", "04_evaluation")["metrics"]
    assert 0 <= metrics["frameqa_accuracy"] <= 1
    assert "no caption of a GIF to train on" in manifest(runs, "natural", "03_adapter_training")["metrics"]["alignment"]
    assert manifest(runs, "natural", "08_demo")["parameters"]["gallery"] == str(folder)
    assert (runs / "natural" / "report.html").is_file()
