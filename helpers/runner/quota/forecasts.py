"""What the stages will still take, whether one may start, and how many sessions and weeks all of it needs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path

import pandas as pd

from helpers.config import ConfigError, Profile
from helpers.runner.quota.budgets import Budget, deadline
from helpers.runner.quota.ledger import HOUR, WEEK, pushed, span, when
from helpers.stage.manifest import found_manifest, manifest_elsewhere
from helpers.stage.pace import START_UP_SECONDS, ToCome, epoch_of, own_pace
from helpers.stage.suite import StageSpec
from helpers.workspace.machine import gpus
from helpers.workspace.place import MARGIN_SECONDS, SESSION_HOURS, runs_root

USEFUL_SECONDS = 900.0  # less time than this only loads models: a stage that does not fit into it is not started
PROBE_STEPS = 20  # of training, or batches of encoding, measured before a stage goes on; of answers a chunk a task


@dataclass(frozen=True)
class Forecast:
    """What a stage will still take, in seconds, and how that is known."""

    stage: str
    seconds: float
    source: str
    gpu: bool = True
    measured: bool = False  # by this stage's own steps
    epoch: float = 0.0  # seconds of one pass over what it trains on next, where that is known


@dataclass(frozen=True)
class Decision:
    """Whether to start a stage now, whether it will end before the deadline, and why, in words."""

    start: bool
    fits: bool
    words: str


def decide(forecast: Forecast, now: float, ends: float) -> Decision:
    """Decide whether a stage may start `now` when work must be saved at `ends` (seconds since 1970)."""
    room, need = ends - now, forecast.seconds
    told = f"{forecast.stage}: about {span(need)} ({forecast.source})"
    if need <= room:
        return Decision(True, True, told)
    told += f", {span(room)} until the deadline"
    if 0 < room < forecast.epoch:
        told += f", which is less than one epoch ({span(forecast.epoch)})"
    if room < USEFUL_SECONDS:
        return Decision(False, False, f"{told}: too little to start")
    return Decision(True, False, f"{told}: saved and paused there")


def _measured(spec: StageSpec, profile: Profile, names: set[str]) -> tuple[float, str] | None:
    """Find how long the stage took in a finished run of the same profile on the same GPUs; unreadable ones are left."""
    for file in sorted(runs_root().glob(f"*/{spec.name}/stage.json")):
        manifest = manifest_elsewhere(file.parent, ["profile", "machine", "seconds"])
        if manifest is None or manifest["status"] != "complete":
            continue
        if manifest["profile"]["name"] == profile.name and {manifest["machine"].get("gpu")} == names:
            return manifest["seconds"], f"measured in run {file.parent.parent.name!r}"
    return None


def forecast(
    spec: StageSpec, profile: Profile, run_folder: Path, copies: bool = False, cards: set[str] | None = None
) -> Forecast:
    """Forecast what a stage will still take in a run.

    In this order: nothing if it is done; its own steps, here or in its last session on Kaggle; a finished run of the
    profile on the same GPU; the minutes of suite.yaml, which nobody has measured. copies: the stage was given what it
    would make, and only copies it. cards: names of the GPUs that the stage will run on; None: of those that are here.
    """
    folder, there = run_folder / spec.name, pushed(run_folder).get(spec.name, {})
    manifest = found_manifest(run_folder, spec.name) or there.get("manifest")
    if manifest and manifest["status"] == "complete" and not spec.always:
        return Forecast(spec.name, 0.0, "done", spec.gpu)
    if copies:
        return Forecast(spec.name, START_UP_SECONDS, f"the given {spec.copies} is only copied", spec.gpu)
    told = there.get("manifest", {"seconds": 0.0})
    if found := own_pace(folder) or told.get("to_come"):
        found = ToCome(*found)  # as a list in a manifest, in which an earlier version told of no epoch
        return Forecast(spec.name, found.seconds, found.told, spec.gpu, measured=True, epoch=found.epoch)
    if found := _measured(spec, profile, {gpu.name for gpu in gpus()} if cards is None else cards):
        whole = _with_epoch(Forecast(spec.name, *found, spec.gpu), spec, profile)
    else:
        whole = from_minutes(spec, profile)
    # a forecast that was not measured may be too short: what is left of it is never nothing
    left = max(whole.seconds - told["seconds"], USEFUL_SECONDS)
    return replace(whole, seconds=left) if told["seconds"] else whole


def from_minutes(spec: StageSpec, profile: Profile) -> Forecast:
    """Forecast a whole stage from the minutes of suite.yaml, the longest ones for a profile that is not listed."""
    minutes = spec.minutes.get(profile.name, max(spec.minutes.values()))
    whole = Forecast(spec.name, 60 * minutes, "suite.yaml's minutes, not measured", spec.gpu)
    return _with_epoch(whole, spec, profile)


def _with_epoch(whole: Forecast, spec: StageSpec, profile: Profile) -> Forecast:
    """The forecast of a whole stage with what one of its epochs takes of it, if all of them take the same."""
    epochs = sum(trainings * attrgetter(key)(profile) for key, trainings in spec.epochs.items())
    work = max(whole.seconds - START_UP_SECONDS, 0.0)
    return replace(whole, epoch=epoch_of(work, epochs)) if spec.epochs else whole


def forecast_table(forecasts: Sequence[Forecast]) -> pd.DataFrame:
    """Return one row a stage: the time to come, whether it needs a GPU, and how the forecast was made."""
    rows = [(f.stage, span(f.seconds), "yes" if f.gpu else "no", f.source) for f in forecasts]
    return pd.DataFrame(rows, columns=["stage", "to come", "GPU", "forecast from"])


@dataclass(frozen=True)
class Piece:
    """Work on one stage within one session, in seconds since 1970."""

    session: int
    stage: str
    began: float
    ended: float
    done: bool
    opened: float = 0.0  # when the session began
    closed: float = 0.0  # and when it ended: all of it is GPU time


def session_hours(pieces: Sequence[Piece], start: float, end: float) -> float:
    """Return the GPU-hours of all sessions between two times: whole sessions, start-up and idle time included."""
    spans = {piece.session: (piece.opened, piece.closed) for piece in pieces}
    return sum(max(0.0, min(closed, end) - max(opened, start)) for opened, closed in spans.values()) / HOUR


def plan_sessions(forecasts: Sequence[Forecast], found: Budget, now: float) -> list[Piece]:
    """Divide the stages over sessions and weeks from `now` on, sessions as long as their own and the week's hours let.

    The functions that decide in a real run decide here. Raises ConfigError if a whole week is too short to get
    anywhere.
    """
    pieces: list[Piece] = []
    todo = [work for work in forecasts if work.seconds > 0]
    session = 0
    while todo:
        ends = deadline(found, now, now + SESSION_HOURS["kaggle"] * HOUR - MARGIN_SECONDS)
        clock, own = now, []
        while todo and decide(_with_start(todo[0]), clock, ends).start:
            stop = min(clock + _with_start(todo[0]).seconds, ends)
            left = todo[0].seconds - max(0.0, stop - clock - START_UP_SECONDS)
            done = left < 1e-6
            own.append(Piece(session + 1, todo[0].stage, clock, stop, done, now))
            todo[:1] = [] if done else [replace(todo[0], seconds=left)]
            clock = stop
        if own:
            session += 1
            pieces += [replace(piece, closed=clock) for piece in own]
            found, now = _after(found, now, clock), clock
        elif found.used:
            found, now = _after(found, now, found.refresh), found.refresh
        else:
            raise ConfigError(f"{span(found.total)} of GPU time a week are too few to get anywhere")
    return pieces


def _with_start(work: Forecast) -> Forecast:
    return replace(work, seconds=work.seconds + START_UP_SECONDS)


def _after(found: Budget, began: float, ended: float) -> Budget:
    """The budget after a session; of one that reached into a new week, that week counts what is its own."""
    if ended < found.refresh:
        return replace(found, used=found.used + ended - began)
    return replace(found, used=ended - found.refresh, refresh=found.refresh + WEEK)


def outlook(forecasts: Sequence[Forecast], found: Budget, now: float) -> str:
    """Say how many sessions and weeks the stages need within the budget."""
    try:
        pieces = plan_sessions(forecasts, found, now)
    except ConfigError as error:
        return f"It will never be done: {error}."
    if not pieces:
        return "Nothing is left to do."
    hours = sum(piece.ended - piece.began for piece in pieces) / HOUR
    weeks = {math.floor((piece.began - found.refresh) / WEEK) for piece in pieces}
    sessions = pieces[-1].session
    first = "" if pieces[0].began < found.refresh else f", the first from {when(found.refresh)}"
    return (
        f"All of it: about {hours:.1f} GPU-hours in {sessions} session{'s' * (sessions > 1)} "
        f"over {len(weeks)} week{'s' * (len(weeks) > 1)}{first}."
    )
