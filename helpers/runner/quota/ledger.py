"""The ledger: GPU time of this suite's own sessions, one line a beat."""

import json
import math
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from helpers.config import ConfigError
from helpers.workspace.inputs import attached_paths
from helpers.workspace.place import platform, runs_root, session_name

HOUR, WEEK = 3600.0, 7 * 86400.0
FIRST_REFRESH = 2 * 86400.0  # Saturday 00:00 UTC, assumed until the account has told its own time
BEAT_SECONDS = 60.0  # between two lines of a session: what a death leaves uncounted


def when(moment: float) -> str:
    """Write a time (seconds since 1970) as a reader wants it: day and time in UTC."""
    return f"{datetime.fromtimestamp(moment, UTC):%a %d %b %H:%M} UTC"


def span(seconds: float) -> str:
    """Write a length of time as a reader wants it: minutes below an hour, else hours."""
    return f"{seconds / HOUR:.1f} h" if seconds >= HOUR else f"{math.ceil(max(0.0, seconds) / 60)} min"


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
    return Ledger(runs_root() / "quota.jsonl", attached_paths("quota*.jsonl"))


def pushed(run_folder: Path) -> dict[str, dict[str, Any]]:
    """Return what is known of each stage of a run that was pushed from here; {} of a run that was not."""
    return (read_state(run_folder) or {}).get("stages", {})


def pushed_elsewhere(run_folder: Path) -> dict[str, dict[str, Any]]:
    """What `pushed` tells of a run that is only looked at: one that cannot be read is passed over with a warning."""
    try:
        return pushed(run_folder)
    except (OSError, ConfigError) as error:
        warnings.warn(f"a run is passed over: {error}", stacklevel=2)
        return {}


def read_state(run_folder: Path) -> dict[str, Any] | None:
    """What is known of a run that was pushed from here; None of one that was not. ConfigError if it cannot be read."""
    file = run_folder / "kaggle.json"
    if not file.is_file():
        return None
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(state, dict) or not isinstance(state.get("stages", {}), dict):
            raise ValueError("it tells of no stages")
    except ValueError as error:  # bytes that are no UTF-8 too
        raise ConfigError(
            f"{file} is damaged ({error}): what run {run_folder.name!r} has on Kaggle is no longer known here. "
            "Move the file away and push the run again, under another name if its sessions still run."
        ) from error
    return state


def session_on_kaggle(entry: Mapping[str, Any]) -> str:
    """Name a pushed stage's newest session in the ledger."""
    return f"{entry['kernel']}/{entry['version']}"


def begun(entry: Mapping[str, Any]) -> bool:
    """Whether a pushed stage's session began and its end has not been seen; stray ones run without their sources."""
    return entry["status"] == "running" or bool(entry.get("stray"))


def begun_on_kaggle() -> set[str]:
    """Return the names of all sessions that were pushed from here and whose end has not been seen."""
    entries: list[Mapping[str, Any]] = []
    for file in runs_root().glob("*/kaggle.json"):
        entries += pushed_elsewhere(file.parent).values()
    return {session_on_kaggle(entry) for entry in entries if begun(entry)}


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
            with suppress(OSError):  # the next beat tells all that this one would have
                beat()

    beat()
    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield ledger
    finally:
        over.set()
        thread.join()
        try:
            beat()
        except OSError as error:  # work that is done is not lost with it
            print(f"  Warning: this session's last minutes are not noted in {ledger.path}: {error}", file=sys.stderr)
