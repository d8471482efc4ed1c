"""Whole plans pushed to a simulated Kaggle under a simulated clock: weeks, deaths, hand-overs, two runs at once."""

import json
import math
import random
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from helpers.runner import quota
from helpers.runner.kaggle import commands
from helpers.runner.kaggle import remote as kaggle_remote
from helpers.runner.kaggle import site as kaggle_site
from helpers.runner.kaggle.push import HELPERS, kernel_id
from helpers.runner.outcome import Failed, Paused
from helpers.runner.plan import RunPlan
from helpers.runner.quota import budgets, ledger
from helpers.runner.quota.ledger import HOUR, WEEK
from helpers.stage import manifest as stages

NOW = 1_795_000_000.0  # Wed 18 Nov 2026, 12:26:40 UTC
REFRESH = 1_795_219_200.0  # Sat 21 Nov 2026, 00:00 UTC
CHECKPOINT, START_UP = 900.0, 240.0
# hours of work that the stages really take: training almost five times what suite.yaml says
HOURS = {"01": 1.5, "02": 1.2, "03": 40.0, "04": 3.0, "05": 20.0, "08": 0.1, "00": 0.01}


@dataclass
class Session:
    """One run of a notebook; start and progress: seconds of work that it went on with, and that a later one can."""

    ref: str
    run: str
    stage: str
    gpu: bool
    began: float
    ended: float
    status: str
    start: float
    progress: float
    seconds: float
    measured: bool
    metadata: dict

    def under_way(self, now: float) -> bool:
        return now < self.ended


class Platform:
    """What `kaggle_site.Site` offers, played by rules: sessions work, save, die, and cost hours until they end."""

    owner = "me"

    def __init__(self, seed: int, lifetime: float) -> None:
        self.now, self.chance, self.lifetime = NOW, random.Random(seed), lifetime
        self.sessions: list[Session] = []
        self.plans: dict[str, RunPlan] = {}
        self.handed: dict[str, float] = {}

    # -- the clock

    def time(self) -> float:
        return self.now

    monotonic = time

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    # -- what the suite asks

    def _of(self, ref: str) -> list[Session]:
        return [session for session in self.sessions if session.ref == ref]

    def account(self) -> quota.Account:
        start, end = quota.week(self.now, REFRESH)
        return quota.Account(self.gpu_hours(start, end, ended=self.now), 30.0, end)

    def gpu_hours(self, start: float, end: float, ended: float = math.inf) -> float:
        told = [session for session in self.sessions if session.gpu and session.ended <= ended]
        return sum(max(0.0, min(s.ended, end) - max(s.began, start)) for s in told) / HOUR

    def version(self, ref: str) -> int:
        return len(self._of(ref))

    def kernel(self, ref: str):
        if not self._of(ref):
            return None
        data = self._of(ref)[-1].metadata
        return SimpleNamespace(
            current_version_number=self.version(ref),
            dataset_data_sources=data["dataset_sources"],
            kernel_data_sources=data["kernel_sources"],
            model_data_sources=data["model_sources"],
            machine_shape=data.get("machine_shape"),
        )

    def push(self, folder: Path, seconds: float, ref: str, before: int) -> str:
        data = json.loads((folder / "kernel-metadata.json").read_text())
        clock = nbformat.read(folder / data["code_file"], as_version=4).cells[0].source
        if data["enable_gpu"] and sum(s.gpu and s.under_way(self.now) for s in self.sessions) >= 2:
            return "Maximum batch GPU session count of 2 reached."
        stage = data["code_file"].removesuffix(".ipynb")
        run = next(run for run in self.plans if ref == kernel_id(self.owner, run, stage))
        # what it can go on with is what is attached, and nothing else
        attached = [self.handed[name] for name in data["dataset_sources"] if name in self.handed]
        green = [s.progress for s in self._of(ref) if s.status == "COMPLETE"]
        known = (attached or ([green[-1]] if ref in data["kernel_sources"] else [])) or [0.0]
        measured = "SUITE_PROBE_STEPS" in clock
        need = 60.0 if measured else HOURS[stage[:2]] * HOUR - known[0]
        end = self.now + START_UP + need  # by itself
        stop = self.now + float(clock.split("time.time() + ")[1].split(")")[0])  # in time
        death = self.now + self.chance.expovariate(1 / (self.lifetime * HOUR))
        ended = min(end, stop, death, self.now + seconds)
        worked = max(0.0, ended - self.now - START_UP)
        lost = 0.0 if ended in (end, stop) else (known[0] + worked) % CHECKPOINT
        status = "COMPLETE" if ended in (end, stop) else self.chance.choice(["ERROR", "CANCEL_ACKNOWLEDGED"])
        earlier = self._of(ref)[-1].seconds if ref in data["kernel_sources"] else 0.0
        self.sessions.append(
            Session(
                *(ref, run, stage, data["enable_gpu"], self.now, ended, status, known[0], known[0] + worked - lost),
                *(earlier + ended - self.now, measured, data),
            )
        )
        return ""

    def status(self, ref: str) -> tuple[str, str]:
        last = self._of(ref)[-1]
        return ("RUNNING" if last.under_way(self.now) else last.status), ""

    def under_way(self, ref: str) -> bool:
        return self._of(ref)[-1].under_way(self.now)

    def outputs(self, ref: str) -> dict[str, str]:
        last = self._of(ref)[-1]
        names = ("started.json", "made.txt", *(["stage.json"] if last.status == "COMPLETE" else []))
        return {f"runs/{last.run}/{last.stage}/{name}": f"{ref} {name}" for name in names}

    def log(self, ref: str) -> str:
        return ""

    def publish(self, folder: Path, ref: str) -> None:
        note = json.loads((folder / "handover.json").read_text())
        self.handed[ref] = self._of(kernel_id(self.owner, *note["stage"]))[-1].progress
        self.now += 600

    def download(self, url: str, path: Path) -> None:
        ref, name = url.split()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.manifest(self._of(ref)[-1], path)) if name == "stage.json" else name)

    def manifest(self, session: Session, path: Path) -> dict:
        plan = self.plans[session.run]
        spec = plan.suite.spec(session.stage)
        left = HOURS[session.stage[:2]] * HOUR - session.progress
        settings = stages.stage_settings(spec, plan.profile, {}, path.parent)
        state = json.loads((plan.folder / "kaggle.json").read_text())["stages"]
        settings["inputs"] = {name: state[name]["manifest"]["digest"] for name in spec.inputs}
        (path.parent / "made.txt").write_text("made.txt")
        records, digest = stages.describe_outputs(path.parent, settings, ["made.txt"])
        return {
            "name": session.stage,
            "status": "partial" if left > 1e-6 else "complete",
            "settings": settings,
            "outputs": records,
            "digest": digest,
            "metrics": {"progress": session.progress},
            "seconds": session.seconds,
            "finished": datetime.fromtimestamp(session.ended, UTC).isoformat(),
            "to_come": [left + quota.START_UP_SECONDS, "measured there"] if left > 1e-6 and spec.probe else None,
        }


@pytest.fixture
def platform(tmp_path, monkeypatch, request):
    """A platform whose sessions die after seven hours in the mean, and the workspace that pushes to it."""
    found = Platform(request.param, lifetime=7.0)
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path / "runs"))
    for room in (kaggle_remote, budgets, ledger):
        monkeypatch.setattr(room, "time", found)
    monkeypatch.setattr(kaggle_site, "POLL_SECONDS", 300.0)
    monkeypatch.setattr(kaggle_remote, "build_helpers", lambda *_: "wheel")
    monkeypatch.setattr(kaggle_remote, "require_disk", lambda *_: None)
    monkeypatch.setattr(Platform, "publish", publishes(Platform.publish))
    return found


def publishes(true):
    """The helpers' data set is there at once."""
    return lambda site, folder, ref: None if ref.endswith(HELPERS) else true(site, folder, ref)


def command(platform: Platform, run: str, argv: list[str]) -> bool:
    """One `kaggle push` or `resume`, by someone who closes the laptop after some hours; returns whether all is done."""
    plan, state = commands._plan(["--run", run, *argv])
    platform.plans[run] = plan
    file = plan.folder / "kaggle.json"
    remote = kaggle_remote.Remote(plan, json.loads(file.read_text()) if file.is_file() else state, platform)
    try:
        remote.recover()
        remote.follow(platform.now + platform.chance.uniform(0.5, 14) * HOUR)
    except (Paused, Failed):
        platform.now += platform.chance.uniform(0.1, 3) * HOUR
        return False
    return True


@pytest.mark.parametrize("platform", range(4), indirect=True)
def test_two_runs_with_deaths_end_within_every_weeks_hours_and_redo_what_no_checkpoint_held(platform, capsys):
    """The plan for 120,000 GIFs and, beside it, notebook 05: through the code that pushes, watches and hands over."""
    runs = {"gifs": ["--from", "00"], "adem": ["--only", "05"]}
    while runs:
        for run, argv in list(runs.items()):
            if command(platform, run, argv):
                del runs[run]
        assert platform.now < NOW + 12 * WEEK, "it never ends"
    sessions, out = platform.sessions, capsys.readouterr().out
    for number in range(-1, 12):
        start = REFRESH + number * WEEK
        assert platform.gpu_hours(start, start + WEEK) <= 30.0
    assert all(session.ended - session.began <= 12 * HOUR for session in sessions)
    for ref in {session.ref for session in sessions}:
        own = [session for session in sessions if session.ref == ref]
        assert all(a.ended <= b.began for a, b in pairwise(own))  # never twice at once
        # each session goes on with all that the one before it kept: work is lost since its last checkpoint only
        assert [session.start for session in own] == [0.0, *(session.progress for session in own[:-1])]
        assert own[-1].progress == pytest.approx(HOURS[own[0].stage[:2]] * HOUR)
    assert any(session.status != "COMPLETE" and session.progress > 0 for session in sessions)
    # a short session measured what takes long, before hours were spent on it; from then on its pace is told
    for stage in ("03_adapter_training", "05_adem_scienceqa"):
        assert next(session.measured for session in sessions if session.stage == stage)
    assert "03_adapter_training  40." in out or "03_adapter_training: about 40." in out
