"""GPU time by the week: what was used, what is left, what the stages will take, and when work must stop.

Used time is kept in a ledger of this suite's own sessions. Where a Kaggle token is at hand, the account's own figure
of sessions that have ended stands beside it, and the higher of the two counts. The same functions decide in a real run,
before a push to Kaggle and in `simulate`.
"""

import csv
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from helpers.config import ConfigError, Profile
from helpers.stage import StageSpec, find_stage, read_manifest
from helpers.workspace import (
    KAGGLE_INPUT,
    MARGIN_SECONDS,
    PACE_FILE,
    SESSION_HOURS,
    gpus,
    platform,
    runs_root,
    session_name,
    session_seconds,
)

HOUR, WEEK = 3600.0, 7 * 86400.0
FIRST_REFRESH = 2 * 86400.0  # Saturday 00:00 UTC, assumed until the account has told its own time
BEAT_SECONDS = 60.0  # between two lines of a session: what a death leaves uncounted
USEFUL_SECONDS = 900.0  # less time than this only loads models: a stage that does not fit into it is not started
START_UP_SECONDS = 300.0  # of a stage: a new kernel, imports and models, before its first step
PROBE_STEPS = 20  # of training, or batches of encoding, measured before a stage goes on; of answers a chunk a task
ATTACHED_DEPTH = 6  # folders between /kaggle/input and another session's ledger


class QuotaUnknown(RuntimeError):
    """The account's quota could not be read; the message says why, in words."""


def when(moment: float) -> str:
    """Write a time (seconds since 1970) as a reader wants it: day and time in UTC."""
    return f"{datetime.fromtimestamp(moment, UTC):%a %d %b %H:%M} UTC"


def span(seconds: float) -> str:
    """Write a length of time as a reader wants it: minutes below an hour, else hours."""
    return f"{seconds / HOUR:.1f} h" if seconds >= HOUR else f"{math.ceil(max(0.0, seconds) / 60)} min"


# -------------------------------------------------------------------------------------------------- the ledger


@dataclass(frozen=True)
class Beat:
    """One line of a session: its age (seconds) at a time (seconds since 1970). A session's last beat is its length."""

    session: str
    platform: str
    seconds: float
    at: float


class Ledger:
    """The GPU sessions of this workspace, one JSON line a beat, only ever appended to.

    path: the file to write. also: ledgers of other sessions to read with it. A session that is in several files, or
    that several processes noted, counts once. `warnings` names what could not be read.
    """

    def __init__(self, path: Path, also: Iterable[Path] = ()) -> None:
        self.path, self.warnings = path, []
        self.beats: list[Beat] = []
        self.refresh: float | None = None  # a time at which the quota was, or will be, refreshed
        for file in {path, *also}:
            self._read(file)

    def _read(self, file: Path) -> None:
        if not file.is_file():
            return
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                if "refresh" in record:
                    self.refresh = _finite(record["refresh"])
                    continue
                beat = Beat(record["session"], record["platform"], _finite(record["seconds"]), _finite(record["at"]))
                self.beats.append(beat)
            except (ValueError, KeyError, TypeError) as error:
                self.warnings.append(f"{file}, line {number}: not readable ({error}), left out: {line[:60]!r}")

    def _append(self, record: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
            torn = end > 0 and file.read(1) != b"\n"  # a writer died in the middle of its line
            file.write((b"\n" if torn else b"") + json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def note(self, session: str, where: str, seconds: float, at: float) -> None:
        """Append the age of a session: it has used `seconds` of GPU time at time `at`, idle time included."""
        beat = Beat(session, where, seconds, at)
        self._append(beat.__dict__)
        self.beats.append(beat)

    def note_refresh(self, at: float) -> None:
        """Keep the time at which the account's quota is refreshed, so that the week is known without a token too."""
        if self.refresh is None or (at - self.refresh) % WEEK:
            self._append({"refresh": at})
            self.refresh = at

    def used(self, start: float, end: float, where: str, now: float, sessions: Collection[str] | None = None) -> float:
        """Return the GPU seconds of `sessions` (None: of all) on platform `where` between two times.

        Lengths come from a clock that is never set, but for sessions that were only watched from outside. The week that
        they belong to depends on the wall clock: where that moved backwards, time counts as late as it may have been,
        so that too much rather than too little is used.
        """
        total = 0.0
        found: dict[str, list[Beat]] = {}
        for beat in self.beats:
            if beat.platform == where and (sessions is None or beat.session in sessions):
                found.setdefault(beat.session, []).append(beat)
        for beats in found.values():
            seconds, latest = 0.0, -math.inf
            for beat in sorted(beats, key=lambda beat: beat.seconds):
                latest = max(latest, min(beat.at, now))
                piece, seconds = beat.seconds - seconds, beat.seconds
                total += max(0.0, min(latest, end) - max(latest - piece, start))
        return total

    def clock_fault(self, now: float) -> str:
        """Say so if the clock has moved backwards: a line was written at a time that has not come yet; else ""."""
        ahead = max((beat.at for beat in self.beats), default=now) - now
        if ahead <= BEAT_SECONDS:
            return ""
        return f"The clock moved backwards by {span(ahead)}: what was noted after this moment counts as used now"


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a number")
    return float(value)


def open_ledger() -> Ledger:
    """Return this workspace's ledger, read together with those of attached sessions."""
    patterns = ["/".join(["*"] * depth + ["quota*.jsonl"]) for depth in range(1, ATTACHED_DEPTH + 1)]
    also = [file for pattern in patterns for file in KAGGLE_INPUT.glob(pattern)]
    return Ledger(runs_root() / "quota.jsonl", also)


# ------------------------------------------------------------------------------------ what was pushed to Kaggle


def pushed(run_folder: Path) -> dict[str, dict[str, Any]]:
    """Return what is known of each stage of a run that was pushed from here; {} of a run that was not."""
    file = run_folder / "kaggle.json"
    return json.loads(file.read_text(encoding="utf-8")).get("stages", {}) if file.is_file() else {}


def session_on_kaggle(entry: Mapping[str, Any]) -> str:
    """Name a pushed stage's newest session in the ledger."""
    return f"{entry['kernel']}/{entry['version']}"


def begun(entry: Mapping[str, Any]) -> bool:
    """Whether a pushed stage's session began and its end has not been seen; stray ones run without their sources."""
    return entry["status"] == "running" or bool(entry.get("stray"))


def begun_on_kaggle() -> set[str]:
    """Return the names of all sessions that were pushed from here and whose end has not been seen."""
    entries = [entry for file in runs_root().glob("*/kaggle.json") for entry in pushed(file.parent).values()]
    return {session_on_kaggle(entry) for entry in entries if begun(entry)}


# ------------------------------------------------------------------------------------------- the account's figure


@dataclass(frozen=True)
class Account:
    """What Kaggle says of this week's GPU quota: hours used and allowed, and when it is refreshed (None: unknown)."""

    used: float
    total: float
    refresh: float | None


def timestamp(moment: datetime) -> float:
    """Return seconds since 1970; clients before 2.2.5 leave out the offset of UTC."""
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def parse_account(text: str) -> Account:
    """Read the CSV of `kaggle quota -v`; raises QuotaUnknown if it holds no GPU row that can be read."""
    lines = text.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("resource,")]  # the client may warn first
    rows = csv.DictReader(lines[starts[0] :]) if starts else []
    for row in rows:
        if row["resource"] == "GPU":
            try:
                hours = [float(row[name].removesuffix("h")) for name in ("used", "total")]
                refresh = timestamp(datetime.fromisoformat(row["refreshAt"])) if row["refreshAt"] else None
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise QuotaUnknown(f"`kaggle quota -v` answered what cannot be read ({error}): {row}") from error
            return Account(*hours, refresh)
    raise QuotaUnknown(f"`kaggle quota -v` tells of no GPU: {text.strip()[:200]!r}")


def ask_account(timeout: float = 60.0) -> Account:
    """Ask Kaggle for the account's quota, through its client; raises QuotaUnknown, without a token too."""
    command = [sys.executable, "-c", "from kaggle.cli import main; main()", "quota", "-v"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise QuotaUnknown(f"Kaggle did not answer within {timeout:.0f} s") from error
    told = [line for line in (answer.stdout + answer.stderr).splitlines() if line.strip()]
    if any("Authentication required" in line for line in told):
        raise QuotaUnknown("there is no Kaggle token here (kaggle auth login, or set KAGGLE_API_TOKEN)")
    if "invalid choice: 'quota'" in answer.stderr:  # the client of Kaggle's own image is older
        raise QuotaUnknown("the installed Kaggle client has no `quota` command; version 2.2 has it")
    if answer.returncode:
        raise QuotaUnknown(f"Kaggle's client failed: {told[-1][:200] if told else f'exit code {answer.returncode}'}")
    return parse_account(answer.stdout)


# --------------------------------------------------------------------------------------------- budget and deadline


@dataclass(frozen=True)
class Budget:
    """One week's GPU quota in seconds, when the week ends (seconds since 1970), and what is to be said about it."""

    used: float
    total: float
    refresh: float
    source: str = "ledger"
    warnings: tuple[str, ...] = ()

    @property
    def left(self) -> float:
        """GPU seconds that are left this week."""
        return max(0.0, self.total - self.used)

    def sentence(self) -> str:
        """Say the budget in one line."""
        hours = f"{self.used / HOUR:.1f} of {self.total / HOUR:g} GPU-hours used this week ({self.source})"
        return f"{hours}, {self.left / HOUR:.1f} left; refreshed {when(self.refresh)}"


def week(now: float, refresh: float | None = None) -> tuple[float, float]:
    """Return start and end of the quota's week around `now`; `refresh` is any time at which it was or is refreshed."""
    phase = FIRST_REFRESH if refresh is None else refresh
    start = phase + WEEK * math.floor((now - phase) / WEEK)
    return start, start + WEEK


def budget(
    ledger: Ledger,
    weekly_hours: float,
    now: float,
    account: Account | None = None,
    where: str = "kaggle",
    running: Collection[str] = (),
) -> Budget:
    """Return this week's budget: the account's figure or the ledger's, whichever has used more.

    weekly_hours: the hours a week where there is no account to say. running: names of sessions that had not ended when
    the account was asked. It only reserves their time, so what the ledger has of them comes on top of its figure.
    """
    if account is not None and account.refresh is not None:
        ledger.note_refresh(account.refresh)
    start, end = week(now, ledger.refresh)
    used, total, source = ledger.used(start, end, where, now), weekly_hours * HOUR, "ledger"
    if account is not None:
        total, open_ = account.total * HOUR, ledger.used(start, end, where, now, running)
        if account.used * HOUR + open_ >= used:
            used, source = account.used * HOUR + open_, "account and running sessions" if open_ else "account"
    warnings = [*ledger.warnings, ledger.clock_fault(now)]
    return Budget(used, total, end, source, tuple(filter(None, warnings)))


def read_budget(
    weekly_hours: float | None,
    default_hours: float,
    ask: Callable[[], Account] | None = None,
    running: Collection[str] = (),
) -> Budget:
    """Return the budget of the platform at hand, asking Kaggle where that is the platform; failures become warnings.

    weekly_hours: what the user sets, which an account cannot raise; None: the account's, else `default_hours`. ask: how
    to ask for the account's quota, whatever the platform at hand. running: sessions under way besides this one.
    """
    ledger, where, account, warnings = open_ledger(), "kaggle" if ask else counted_platform(), None, ()
    if where == "kaggle":
        try:
            account = (ask or ask_account)()
        except QuotaUnknown as error:
            unknown = f"The account's quota is not known: {error}. Only this workspace's own sessions are counted: "
            warnings = (unknown + "if there were others this week, name fewer hours by --weekly-hours.",)
    if platform() == "kaggle" and gpus():  # a notebook that is run by hand notes nothing
        ledger.beats.append(Beat(session_name(), where, session_seconds(), time.time()))
    found = budget(ledger, weekly_hours or default_hours, time.time(), account, where, {session_name(), *running})
    if weekly_hours is not None:
        found = replace(found, total=min(found.total, weekly_hours * HOUR))
    return replace(found, warnings=(*found.warnings, *warnings))


def counted_platform() -> str:
    """Name the platform whose GPU hours are counted: this one if it has a GPU of its own, else Kaggle."""
    return platform() if platform() == "kaggle" or gpus() else "kaggle"


def limited(weekly_hours: float | None) -> bool:
    """Whether GPU time is to be kept within a budget: with a GPU, on Kaggle or wherever --weekly-hours was given."""
    return bool(gpus()) and (platform() == "kaggle" or weekly_hours is not None)


def deadline(found: Budget, now: float, session_end: float) -> float:
    """Return when work must be saved: the earlier of the session's end and that of the week's hours (since 1970).

    Hours that outlast the week do not end with it: at the refresh there are new ones.
    """
    last = now + found.left
    return min(session_end, (last if last < found.refresh else found.refresh + found.total) - MARGIN_SECONDS)


# ------------------------------------------------------------------------------------------- forecast and decision


@dataclass(frozen=True)
class Forecast:
    """What a stage will still take, in seconds, and how that is known."""

    stage: str
    seconds: float
    source: str
    gpu: bool = True
    measured: bool = False  # by this stage's own steps


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
    if room < USEFUL_SECONDS:
        return Decision(False, False, f"{told}: too little to start")
    return Decision(True, False, f"{told}: saved and paused there")


def _pace(folder: Path) -> tuple[float, int, int] | None:
    """Return seconds a step, steps done and steps in all from the newest checkpoint of a training folder."""
    for file in sorted(folder.glob("checkpoints/step-*/checkpoint.json"), reverse=True):
        try:
            info = json.loads(file.read_text(encoding="utf-8"))
            if info["step"]:
                return info["seconds"] / info["step"], info["step"], info["total_steps"]
        except (ValueError, KeyError):  # torn: training passes over it too, with a warning
            continue
    return None


def own_pace(folder: Path) -> tuple[float, str] | None:
    """Forecast the seconds that a stage still takes from the steps that it has done, in words too; None without any."""
    return _trained(folder) or _paced(folder)


def _trained(folder: Path) -> tuple[float, str] | None:
    """Forecast training and its blind twin from their checkpoints (notebook 05 keeps both in folders)."""
    main = _pace(folder) or _pace(folder / "main")
    blind = _pace(folder / "blind_run") or _pace(folder / "blind")
    if main is None or (blind and main[1] == main[2] and blind[1] == blind[2]):  # what comes after it is not measured
        return None
    pace, done, steps = main
    seconds = pace * (steps - done)
    # a twin that has not begun sees no video tokens: the model's own pace is more than it will take
    seconds += blind[0] * (blind[2] - blind[1]) if blind else pace * steps
    return seconds + START_UP_SECONDS, f"{pace:.2f} s a step, {done:,} of {steps:,} steps done, and the blind twin"


def _paced(folder: Path) -> tuple[float, str] | None:
    """Forecast what is left to encode, or to answer, from the pace of the newest session that stopped early."""
    files = [*folder.glob(PACE_FILE), *folder.glob(f"parts/*/{PACE_FILE}")]
    if not files:
        return None
    paces = json.loads(max(files, key=lambda file: file.stat().st_mtime).read_text(encoding="utf-8"))
    known = {pace["unit"]: pace["seconds"] / pace["done"] for pace in paces if pace["done"]}
    each = {pace["unit"]: known.get(pace["unit"], max(known.values())) for pace in paces}  # unknown: as the slowest
    told = [f"{pace['left']:,} {pace['unit']} at {1 / each[pace['unit']]:.1f} a second" for pace in paces]
    return sum(pace["left"] * each[pace["unit"]] for pace in paces) + START_UP_SECONDS, ", ".join(told)


def _measured(spec: StageSpec, profile: Profile, names: set[str]) -> tuple[float, str] | None:
    """Find how long the stage took in a finished run of the same profile on the same GPUs."""
    for file in sorted(runs_root().glob(f"*/{spec.name}/stage.json")):
        manifest = read_manifest(file.parent)
        same = manifest["profile"]["name"] == profile.name and {manifest["machine"].get("gpu")} == names
        if manifest["status"] == "complete" and same:
            return manifest["seconds"], f"measured in run {file.parent.parent.name!r}"
    return None


def forecast(
    spec: StageSpec, profile: Profile, run_folder: Path, given_bundle: bool = False, cards: set[str] | None = None
) -> Forecast:
    """Forecast what a stage will still take in a run.

    In this order: nothing if it is done; its own steps, here or in its last session on Kaggle; a finished run of the
    profile on the same GPU; the minutes of suite.yaml, which nobody has measured. given_bundle: nothing is trained, a
    bundle is only copied. cards: names of the GPUs that the stage will run on; None: of those that are here.
    """
    folder, there = run_folder / spec.name, pushed(run_folder).get(spec.name, {})
    manifest = read_manifest(find_stage(run_folder, spec.name)) or there.get("manifest")
    if manifest and manifest["status"] == "complete" and not spec.always:
        return Forecast(spec.name, 0.0, "done", spec.gpu)
    if given_bundle and spec.name == "03_adapter_training":
        return Forecast(spec.name, START_UP_SECONDS, "the given bundle is only copied", spec.gpu)
    told = there.get("manifest", {"seconds": 0.0})
    if found := own_pace(folder) or told.get("to_come"):
        return Forecast(spec.name, *found, spec.gpu, measured=True)
    if found := _measured(spec, profile, {gpu.name for gpu in gpus()} if cards is None else cards):
        whole = Forecast(spec.name, *found, spec.gpu)
    else:
        whole = from_minutes(spec, profile)
    # a forecast that was not measured may be too short: what is left of it is never nothing
    left = max(whole.seconds - told["seconds"], USEFUL_SECONDS)
    return replace(whole, seconds=left) if told["seconds"] else whole


def from_minutes(spec: StageSpec, profile: Profile) -> Forecast:
    """Forecast a whole stage from the minutes of suite.yaml, the longest ones for a profile that is not listed."""
    minutes = spec.minutes.get(profile.name, max(spec.minutes.values()))
    return Forecast(spec.name, 60 * minutes, "suite.yaml's minutes, not measured", spec.gpu)


def forecast_table(forecasts: Sequence[Forecast]) -> pd.DataFrame:
    """Return one row a stage: the time to come, whether it needs a GPU, and how the forecast was made."""
    rows = [(f.stage, span(f.seconds), "yes" if f.gpu else "no", f.source) for f in forecasts]
    return pd.DataFrame(rows, columns=["stage", "to come", "GPU", "forecast from"])


# ---------------------------------------------------------------------------------------------------- the meter


@contextmanager
def metered(session_seconds: Callable[[], float], interval: float = BEAT_SECONDS) -> Iterator[Ledger]:
    """Note this session's age in the ledger now, at the end, and every `interval` seconds between them.

    session_seconds: a function that returns the session's age, idle time included.
    """
    ledger, over = Ledger(runs_root() / "quota.jsonl"), threading.Event()

    def beat() -> None:
        ledger.note(session_name(), platform(), session_seconds(), time.time())

    def go_on() -> None:
        while not over.wait(interval):
            beat()

    beat()
    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield ledger
    finally:
        over.set()
        thread.join()
        beat()


# ------------------------------------------------------------------------------------------------- the simulation


@dataclass(frozen=True)
class Piece:
    """Work on one stage within one session, in seconds since 1970. lost: seconds of work since the last checkpoint."""

    session: int
    stage: str
    began: float
    ended: float
    done: bool
    lost: float = 0.0
    opened: float = 0.0  # when the session began
    closed: float = 0.0  # and when it ended: all of it is GPU time


def _told(pieces: Sequence[Piece], weekly_hours: float, ledger: Ledger, now: float) -> Account:
    """Return what the account would tell of sessions that have all ended."""
    start, end = week(now, ledger.refresh)
    return Account(session_hours(pieces, start, end), weekly_hours, end)


def simulate(
    forecasts: Sequence[Forecast],
    ledger: Ledger,
    weekly_hours: float,
    now: float,
    *,
    spent: Budget | None = None,
    session_hours: float = SESSION_HOURS["kaggle"],
    checkpoint_seconds: float = 900.0,
    lifetime_hours: float = math.inf,
    rest_seconds: float = 0.0,
    seed: int = 0,
    asked: bool = False,
) -> list[Piece]:
    """Play the stages through sessions and weeks with the functions that decide in a real run.

    The ledger is written to as a real one. spent: a budget whose used hours come on top in its own week.
    lifetime_hours: sessions die at random after this long in the mean (an exponential distribution) and lose what was
    done since their last checkpoint; of their age the ledger keeps the last beat. rest_seconds: between two sessions.
    asked: whether the account is asked before each session, which knows how long dead ones were. Raises ConfigError if
    none ever gets anywhere.
    """
    chance, pieces, session = random.Random(seed), [], 0
    todo = [work for work in forecasts if work.seconds > 0]
    while todo:
        found = budget(ledger, weekly_hours, now, _told(pieces, weekly_hours, ledger, now) if asked else None)
        if spent is not None and now < spent.refresh:
            found = replace(found, used=found.used + spent.used)
        ends = deadline(found, now, now + session_hours * HOUR - MARGIN_SECONDS)
        if not decide(replace(todo[0], seconds=todo[0].seconds + START_UP_SECONDS), now, ends).start:
            if not found.used:
                raise ConfigError(f"{span(found.total)} of GPU time a week are too few to get anywhere")
            now = found.refresh
            continue
        session, clock = session + 1, now
        death = now + chance.expovariate(1 / (lifetime_hours * HOUR)) if math.isfinite(lifetime_hours) else math.inf
        own: list[Piece] = []
        while todo and clock < death:
            need = todo[0].seconds + START_UP_SECONDS
            if not decide(replace(todo[0], seconds=need), clock, ends).start:
                break
            stop = min(clock + need, ends, death)
            worked = max(0.0, stop - clock - START_UP_SECONDS)
            lost = worked % checkpoint_seconds if stop == death else 0.0
            todo[0] = replace(todo[0], seconds=todo[0].seconds - worked + lost)
            done = todo[0].seconds < 1e-6
            own.append(Piece(session, todo[0].stage, clock, stop, done, lost, now))
            clock = stop
            if done:
                todo.pop(0)
        closed = min(death, clock)
        age = closed - now if closed < death else BEAT_SECONDS * ((closed - now) // BEAT_SECONDS)
        ledger.note(f"simulated-{session}", "kaggle", age, now + age)  # stands for its beats: the last one counts
        pieces += [replace(piece, closed=closed) for piece in own]
        now = closed + rest_seconds
    return pieces


def session_hours(pieces: Sequence[Piece], start: float, end: float) -> float:
    """Return the GPU-hours of all sessions between two times: whole sessions, start-up and idle time included."""
    spans = {piece.session: (piece.opened, piece.closed) for piece in pieces}
    return sum(max(0.0, min(closed, end) - max(opened, start)) for opened, closed in spans.values()) / HOUR


def plan_sessions(
    forecasts: Sequence[Forecast], found: Budget, now: float, lifetime_hours: float = math.inf, seed: int = 0
) -> list[Piece]:
    """Lay the stages out over sessions and weeks from `now` on; lifetime_hours and seed: as of `simulate`."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "plan.jsonl")
        ledger.note_refresh(found.refresh)
        return simulate(
            forecasts, ledger, found.total / HOUR, now, spent=found, lifetime_hours=lifetime_hours, seed=seed
        )


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
