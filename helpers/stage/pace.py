"""How fast a stage is, how long it may go on, and what that makes of what is left."""

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from helpers.stage.suite import StageError
from helpers.workspace.disk import read_json, write_json
from helpers.workspace.place import session_end


class DeadlineReached(RuntimeError):
    """Work that stopped because its time was up; the message tells what is kept. The same call goes on from there."""


PACE_FILE = "pace.json"  # beside what a stage that is not done keeps: how fast it was, and what is left


def probe_steps() -> float:
    """Steps after which a stage is to stop and keep what it has, since the runner only measures its pace; else inf."""
    return float(os.environ.get("SUITE_PROBE_STEPS") or math.inf)


def deadline() -> float:
    """Return the time (seconds since 1970) at which work is to be saved and stopped; inf if there is none.

    It is the runner's; in a notebook that is run by hand it is the end of the platform's session.
    """
    text = os.environ.get("SUITE_DEADLINE", "")
    try:
        return float(text) if text else session_end()
    except ValueError as error:
        raise StageError(f"SUITE_DEADLINE must be seconds since 1970, found {text!r}") from error


START_UP_SECONDS = 300.0  # of a stage: a new kernel, imports and models, before its first step


class ToCome(NamedTuple):
    """What a stage still takes (seconds), in words, and seconds of an epoch of what it is at; 0 where that has none."""

    seconds: float
    told: str
    epoch: float = 0.0


def note_pace(
    folder: Path,
    unit: str,
    done: int,
    seconds: float,
    left: int,
    follow: Iterable[str] = (),
    epochs: float = 0.0,
) -> None:
    """Write into `folder` how fast a unit of work was done (`done` in `seconds`), and how many are `left`.

    Other units in the file stay. follow: units of as many pieces (`done` and `left` together) that come after it.
    epochs: how many all these pieces are, of the unit and of each that follows, where they train.
    """
    file = folder / PACE_FILE
    paces = {pace["unit"]: pace for pace in read_json(file) or []}
    paces[unit] = {"unit": unit, "done": done, "seconds": seconds, "left": left, "epochs": epochs}
    for name in follow:
        paces.setdefault(name, {"unit": name, "done": 0, "seconds": 0.0, "left": done + left, "epochs": epochs})
    write_json(file, list(paces.values()))


def epoch_of(whole: float, epochs: float) -> float:
    """What one epoch takes of `whole`, which is so many; all of it where it is less than one."""
    return whole / max(epochs, 1.0)


def _speed(seconds: float) -> str:
    """Say how fast pieces are that take so many seconds each."""
    return f"at {1 / seconds:.1f} a second" if seconds <= 10 else f"of {seconds:.0f} s each"


def own_pace(folder: Path) -> ToCome | None:
    """Forecast what a stage still takes from the steps that it has done.

    It reads the paces that the stage's work wrote, wherever in its folder: of a unit that several files tell of, the
    newest counts. None without any, and where all of it is done: what comes after it is not measured.
    """
    files = [*folder.glob(PACE_FILE), *folder.glob(f"*/{PACE_FILE}"), *folder.glob(f"parts/*/{PACE_FILE}")]
    paces: dict[str, dict[str, Any]] = {}
    for file in sorted(files, key=lambda file: file.stat().st_mtime_ns):
        for pace in read_json(file) or []:
            if pace["done"] or pace["unit"] not in paces:
                paces[pace["unit"]] = pace
    known = {unit: pace["seconds"] / pace["done"] for unit, pace in paces.items() if pace["done"]}
    if not known or not any(pace["left"] for pace in paces.values()):
        return None
    slowest = max(known.values())  # of a unit that has not begun no more is known
    told = [
        f"{pace['left']:,} {unit} {_speed(known.get(unit, slowest))}" for unit, pace in paces.items() if pace["left"]
    ]
    seconds = sum(pace["left"] * known.get(unit, slowest) for unit, pace in paces.items())
    now = min((pace for pace in paces.values() if pace["left"]), key=lambda pace: not pace["done"])  # begun before not
    epochs, whole = now.get("epochs", 0.0), (now["done"] + now["left"]) * known.get(now["unit"], slowest)
    return ToCome(seconds + START_UP_SECONDS, ", ".join(told), epoch_of(whole, epochs) if epochs else 0.0)
