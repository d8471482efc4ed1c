"""Training killed by -9 at a random step and started again equals a run never killed, bit for bit, in real processes.

A real model on random checkpoints: NF4, LoRA with dropout, trained MIT, two epochs, evaluation after each. Before it,
or not, an epoch on captions.
"""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

REPO = Path(__file__).resolve().parents[2]

SCRIPT = """
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd

from helpers.config import load_profile
from helpers.models.gif_qa import GifQAModel
from helpers.training import align, caption_rows, train

xclip, llama, folder, captions, killed, moment = sys.argv[1:]


def die():
    # a little after checkpoint `moment`: in a step, a save or an evaluation, wherever the process is then
    while not any(int(p.name[5:]) >= int(moment) for p in Path(killed, "checkpoints").glob("step-*")):
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.05))
    os.kill(os.getpid(), signal.SIGKILL)


if int(moment):
    threading.Thread(target=die, daemon=True).start()
profile = load_profile("tiny", {
    "encoder.model": xclip, "language_model.model": llama, "data.image_size": 32,
    "language_model.quantisation": "nf4", "language_model.lora_dropout": 0.1,
    "connector.hidden": 32, "connector.train_mit": True, "training.epochs": 2, "training.tokens_per_step": 400,
    "training.checkpoint_minutes": 1e-9, "training.log_steps": 5, "alignment.epochs": 1,
})
model = GifQAModel.build(profile)


class Features:
    encoder_key = model.encoder_key
    frames = np.random.default_rng(0).integers(6, 49, 30)

    def lengths(self, ids, groups):
        return np.array([min(self.frames[int(i)], 16 * g) for i, g in zip(ids, groups)])

    def fetch(self, ids, groups):
        lengths = self.lengths(ids, groups)
        out = np.zeros((len(ids), lengths.max(), 32), np.float16)
        for row, (i, n) in enumerate(zip(ids, lengths)):
            out[row, :n] = np.random.default_rng(int(i)).normal(size=(n, 32))
        return out, lengths


def questions(rows, seed):
    rng = np.random.default_rng(seed)
    answers = rng.choice(["red", "green", "small star"], rows)
    return pd.DataFrame({
        "question_id": [str(row) for row in range(rows)],
        "gif_sha256": rng.integers(30, size=rows).astype(str), "task": "frameqa", "answer": answers, "label": -1,
        "question": ["what color is the " + "small " * n + "circle ?" for n in rng.integers(0, 6, rows)],
        "options": [[] for _ in range(rows)],
    })


rows, watched, aligned = questions(70, 1), questions(20, 2), Path(folder, "alignment") if int(captions) else None
if aligned:
    table = rows.assign(caption_id=rows["question_id"], split="train", caption="a " + rows["answer"])
    described = caption_rows(table, profile.alignment.prompt)
    options = {"questions": rows, "eval_captions": described[::9], "progress": False}
    assert align(model, described, Features(), profile, aligned, **options).status == "complete"
options = {"eval_questions": watched, "progress": False, "aligned": aligned}
result = train(model, rows, Features(), profile, folder, **options)
assert result.status == "complete", result
"""


@pytest.fixture
def start(tmp_path, tiny_xclip_dir, tiny_llama_dir):
    """Start a training process on a folder; all of them are gone after the test."""
    script = tmp_path / "training_run.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = []

    def launch(folder: Path, captions: bool = False, kill: tuple[str, int] = ("", 0)) -> subprocess.Popen:
        """kill: the run inside `folder` and the step after which the process is killed."""
        kill = [folder / kill[0], str(kill[1])]
        command = [sys.executable, script, tiny_xclip_dir, tiny_llama_dir, folder, str(int(captions)), *kill]
        log = (tmp_path / f"{folder.name}-{len(started)}.log").open("w")
        started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path))
        return started[-1]

    yield launch
    for process in started:
        process.kill()
        process.wait()


HANG = 600  # seconds after which a process counts as hung, however busy the machine


def finish(process: subprocess.Popen, tmp_path: Path) -> None:
    if process.wait(timeout=HANG) != 0:
        logs = "\n".join(path.read_text()[-3000:] for path in sorted(tmp_path.glob("*.log")))
        pytest.fail(f"training ended with {process.returncode}:\n{logs}")


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))


def test_killed_and_resumed_equals_never_killed(start, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    moment = random.randint(2, 17)  # of 23 steps; 12 in the first epoch
    reference, victim = start(whole), start(killed, kill=("", moment))
    assert victim.wait(timeout=HANG) == -signal.SIGKILL, f"not killed after step {moment}"
    reached = steps(killed)[-1]
    finish(reference, tmp_path)
    finish(start(killed), tmp_path)

    assert moment <= reached < steps(whole)[-1] == steps(killed)[-1], f"killed at {reached}"
    same_run(whole, killed)
    history = pd.read_parquet(killed / "history.parquet")
    assert history["eval_loss"].notna().sum() == 2 and history["epoch"].iloc[-1] == 2.0


def test_killed_in_stage_one_and_between_the_stages(start, tmp_path):
    """One run, killed twice: inside stage one, and when the last checkpoint of that is there."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    reference = start(whole, captions=True)
    inside = random.randint(1, 4)
    assert start(killed, True, ("alignment", inside)).wait(timeout=HANG) == -signal.SIGKILL
    finish(reference, tmp_path)
    last = steps(whole / "alignment")[-1]
    assert inside <= steps(killed / "alignment")[-1] < last
    assert start(killed, True, ("alignment", last)).wait(timeout=HANG) == -signal.SIGKILL
    assert not steps(killed) or steps(killed)[-1] < steps(whole)[-1]
    finish(start(killed, True), tmp_path)
    same_run(whole / "alignment", killed / "alignment")
    same_run(whole, killed)


def same_run(whole: Path, killed: Path) -> None:
    """Tensors, Adam's moments and the history are equal, bit for bit."""
    a, b = (sorted((folder / "checkpoints").glob("step-*"))[-1] for folder in (whole, killed))
    x, y = load_file(a / "trainable.safetensors"), load_file(b / "trainable.safetensors")
    parts = {"mit", "connector"} | ({"language_model"} if whole.name != "alignment" else set())
    assert {name.split(".")[0] for name in x} == parts and x.keys() == y.keys()
    assert [name for name in x if not torch.equal(x[name], y[name])] == []
    p, q = (torch.load(path / "optimizer.pt", weights_only=True) for path in (a, b))
    assert p["param_groups"] == q["param_groups"]
    for i, state in p["state"].items():
        assert all(torch.equal(value, q["state"][i][key]) for key, value in state.items())
    p, q = (pd.read_parquet(folder / "history.parquet").drop(columns="seconds") for folder in (whole, killed))
    pd.testing.assert_frame_equal(p, q, check_exact=True)
    assert not list(killed.glob("checkpoints/saving-*"))
