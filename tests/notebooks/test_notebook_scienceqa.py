"""Notebook 05 cell by cell, at small size, in a process of its own: what is in memory when, and what is kept."""

import json
import os
import subprocess
import sys
import textwrap

import pandas as pd
import pytest
import torch

from helpers.config import load_profile
from helpers.training.adem_vl import build_model
from helpers.workspace.place import repo_root

SMALL = {"adem.world_train": 40, "adem.world_test": 20, "adem.epochs": 1}
RUN = """
import weakref, json, sys
import nbformat
import matplotlib
matplotlib.use("Agg")
from helpers.answers import regions, scienceqa
from helpers.models import adem_vl
from helpers.sweeps import step_cost

loaded, load_llm, predicted, predict = [], adem_vl.model._load_llm, [], scienceqa.predict

def watched(*args):
    assert not [model for model in loaded if model() is not None], "another base model is still in memory"
    model, tokenizer = load_llm(*args)
    loaded.append(weakref.ref(model))
    return model, tokenizer

def noted(*args, **options):
    predicted.append(options["description"])
    return predict(*args, **options)

adem_vl.model._load_llm, scienceqa.predict = watched, noted
step_cost.step_cost = lambda rounds, original=step_cost.step_cost: original(32, 2, 1, 12, 1)
parameters, spoilt = json.loads(sys.argv[1]), sys.argv[2]
if spoilt:
    def spoil(*args):
        raise RuntimeError("a picture that fails")
    setattr(regions, spoilt, spoil)
space = {}
book = nbformat.read("notebooks/05_adem_scienceqa.ipynb", 4)
try:
    for cell in book.cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, cell.id, "exec"), space)
            if "parameters" in cell.metadata.get("tags", []):
                space |= parameters
finally:
    print(json.dumps({"loaded": len(loaded), "predicted": predicted}), file=sys.stderr)
"""


@pytest.fixture
def execute(tmp_path):
    def execute(spoilt="", **parameters):
        given = {"profile": "tiny", "run": "r", "overrides": SMALL} | parameters
        line = [sys.executable, "-c", textwrap.dedent(RUN), json.dumps(given), spoilt]
        environment = os.environ | {"RUNS_ROOT": str(tmp_path), "PYTHONPATH": str(repo_root()), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(line, cwd=repo_root(), env=environment, capture_output=True, text=True)
        told = [text for text in done.stderr.splitlines() if text.startswith('{"loaded"')]
        return done, json.loads(told[-1]), tmp_path / "r" / "05_adem_scienceqa"

    return execute


def test_one_base_model_at_a_time_and_no_answer_twice(execute):
    done, told, folder = execute(spoilt="worth")
    assert "a picture that fails" in done.stderr and "still in memory" not in done.stderr
    assert told == {"loaded": 4, "predicted": ["text_only", "model", "shuffled"]}
    assert not (folder / "stage.json").exists()  # what lacks a figure is not finished
    scores = json.loads((folder / "scores.json").read_text())  # they were there before the picture
    done, told, folder = execute()
    assert done.returncode == 0, done.stderr[-3000:]
    assert told == {"loaded": 4, "predicted": []}  # every answer was kept
    assert json.loads((folder / "scores.json").read_text()) == scores
    manifest = json.loads((folder / "stage.json").read_text())
    assert manifest["status"] == "complete" and manifest["metrics"]["total"] == 20
    assert (manifest["metrics"]["too_long"], manifest["metrics"]["text_only_too_long"]) == (0, 0)
    assert (folder / "figures" / "regions.png").is_file()


def test_released_adapters_answer_without_training(execute, tmp_path):
    """Saved as the authors saved theirs, by the names of spec and release; asked as their evaluator asks."""
    config = load_profile("tiny").adem
    model = build_model(config).config
    width, dim = model.vision_config.hidden_size, model.llm_config.hidden_size
    shapes = {f"adapter_emb{i}": (1, model.positions, dim) for i in (1, 2)}
    for part in ("adapter_proj", "adapter_proj_cls"):
        shapes |= {f"{part}.fc1.weight": (config.projector_dim, width), f"{part}.fc1.bias": (config.projector_dim,)}
        shapes |= {f"{part}.fc2.weight": (dim, config.projector_dim), f"{part}.fc2.bias": (dim,)}
    for block in range(model.vision_config.num_hidden_layers):
        name = f"backbone.visual.transformer.resblocks.{block}.adapter_mlp"
        shapes |= {f"{name}.fc1.weight": (config.adapter_dim, width), f"{name}.fc2.weight": (width, config.adapter_dim)}
    tensors = {f"module.{name}": torch.full(shape, 0.01) for name, shape in shapes.items()}
    torch.save({"model": tensors}, tmp_path / "checkpoint_7B_sqa.pth")
    done, told, folder = execute(adapters=str(tmp_path / "checkpoint_7B_sqa.pth"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((folder / "scores.json").read_text())["args"]["protocol"] == "QCM-A with captions"
    assert "prompt (adem.protocol): QCM-A with captions" in done.stdout
    assert told["predicted"] == ["model", "shuffled"] and not (folder / "text_only").exists()
    predictions = pd.read_parquet(folder / "predictions.parquet")
    assert len(predictions) == 20 and "text_only_prediction" not in predictions
    assert not list(folder.glob("*/checkpoints"))
