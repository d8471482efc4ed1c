"""Steps that a gradient scaler skips, and an adapter that stands still: one weight whose gradient is known by hand."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from helpers.training import engine
from helpers.training.collective import TrainingError
from helpers.training.engine import Job, fit
from helpers.training.plan import StepPlan

SLOPE = 64.0  # of the loss, d loss / d weight
LARGEST = 128  # float32 overflows at 2 ** 128


class Line(nn.Module):
    """loss = SLOPE * weight; in the steps that `overflow` tells (counted from 1) the gradient is infinite."""

    def __init__(self, overflow=lambda step: False, beside: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.beside = nn.Parameter(torch.ones(())) if beside else None
        self.weight.register_hook(lambda gradient: gradient * (math.inf if overflow(self.steps) else 1.0))
        self.steps = 0

    def forward(self, x):
        self.steps += 1
        loss = (x * self.weight).sum()
        return {"loss": loss if self.beside is None else loss + self.beside}


def job_of(model: Line, steps: int, rate: float = 1e-3, warmup: float = 0.0, adapter: str = "") -> Job:
    ones = np.ones(steps, dtype=np.int64)
    plan = StepPlan(
        [[0]] * steps, text_tokens=ones, video_tokens=0 * ones, padded_tokens=ones, epoch_after=ones.cumsum() / steps
    )
    groups = [{"params": [model.weight], "part": "line", "lr": rate}]
    if model.beside is not None:
        groups.append({"params": [model.beside], "part": "beside", "lr": 1e-3})
    return Job(
        dataset=[SLOPE],
        plan=plan,
        collator=lambda rows: {"x": torch.tensor(rows)},
        identity={},
        groups=groups,
        tokens=ones,
        warmup=warmup,
        max_grad_norm=0.0,
        seed=0,
        checkpoint_minutes=60.0,
        log_steps=5,
        adapter=adapter,
    )


@pytest.fixture
def scaled(monkeypatch):
    """Every trainer gets torch's own gradient scaler, as on a GPU without bfloat16."""
    prepared = engine.AdapterTrainer.__init__

    def with_scaler(self, *args):
        prepared(self, *args)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)

    monkeypatch.setattr(engine.AdapterTrainer, "__init__", with_scaler)


def checkpoints(folder) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_scale_and_skips_stand_in_the_history(tmp_path, scaled):
    """SLOPE * scale must be below 2 ** 128: the scaler halves from 2 ** 127 to 2 ** 121, which takes six skips."""
    model = Line()
    result = fit(model, job_of(model, 20), tmp_path, progress=False)
    skips = 127 + int(math.log2(SLOPE)) - LARGEST + 1
    assert skips == 6 and result.status == "complete"
    assert result.history["skipped"].tolist() == [1] * skips + [0] * (20 - skips)
    assert result.history["scale"].tolist() == [2.0 ** (127 - min(step, skips)) for step in range(20)]
    assert result.summary()["skipped_steps"] == skips
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "history.parquet"), result.history)


def test_without_a_scaler_the_history_is_as_it_was(tmp_path):
    model = Line()
    result = fit(model, job_of(model, 8), tmp_path, progress=False)
    assert list(result.history) == ["step", "epoch", "loss", "eval_loss", "lr_line", "tokens", "seconds"]
    assert "skipped_steps" not in result.summary()


def test_the_history_goes_on_after_a_stop(tmp_path, scaled, monkeypatch):
    def go_on(folder):
        model = Line()
        return fit(model, job_of(model, 20), tmp_path / folder, progress=False)

    whole = go_on("whole")
    monkeypatch.setenv("SUITE_PROBE_STEPS", "4")
    assert go_on("parts").steps == 4
    monkeypatch.delenv("SUITE_PROBE_STEPS")
    parts = go_on("parts")
    kept = ["loss", "scale", "skipped"]
    pd.testing.assert_frame_equal(parts.history[kept], whole.history[kept])


@pytest.mark.parametrize(("warmup", "last"), [(0.0, 35), (0.1, 45)])
def test_a_run_that_skips_every_step_is_stopped(tmp_path, scaled, warmup, last):
    """At the first look (every 5 steps) with 32 steps after the warm-up (a tenth of 100 steps); nothing is saved."""
    model = Line(overflow=lambda step: True)
    with pytest.raises(TrainingError, match=f"32 of the 32 steps up to step {last} were skipped.*bfloat16"):
        fit(model, job_of(model, 100, warmup=warmup), tmp_path, progress=False)
    assert model.steps == last and model.weight.item() == 1.0 and checkpoints(tmp_path) == []


@pytest.mark.parametrize(("each", "stopped"), [(16, False), (17, True)])
def test_most_steps_of_a_window_decide(tmp_path, scaled, each, stopped):
    """The first 16 or 17 of every 32 steps, from step 33 on: after those that the scaler needs to settle."""
    model = Line(overflow=lambda step: step > 32 and (step - 1) % 32 < each)
    job = job_of(model, 128)
    if stopped:
        with pytest.raises(TrainingError, match="17 of the 32 steps up to step 50 were skipped"):
            fit(model, job, tmp_path, progress=False)
    else:
        assert fit(model, job, tmp_path, progress=False).history["skipped"].iloc[32:].sum() == 16 * 3


def test_a_short_run_that_never_moved_has_no_last_checkpoint(tmp_path, scaled):
    """Too short for a window; and it stays refused when it is run again."""
    for _ in range(2):
        model = Line(overflow=lambda step: True)
        with pytest.raises(TrainingError, match=r"after 10 steps no parameter of the model has moved.*\(10 steps were"):
            fit(model, job_of(model, 10), tmp_path, progress=False)
        assert checkpoints(tmp_path) == []


def test_an_adapter_that_stands_still_is_told_without_a_scaler(tmp_path):
    """Its rate is lost in rounding (1 - 1e-12 is 1 in float32), whatever moves beside it; a rate of 0 is a choice."""
    model = Line(beside=True)
    with pytest.raises(TrainingError, match="no parameter of the part line has moved"):
        fit(model, job_of(model, 10, rate=1e-12, adapter="line"), tmp_path / "still", progress=False)
    assert model.beside.item() != 1.0 and checkpoints(tmp_path / "still") == []
    model = Line(beside=True)
    assert fit(model, job_of(model, 10, rate=0.0, adapter="line"), tmp_path / "kept", progress=False).steps == 10
