"""Locks that die with their process: one process at a time works on a stage, a run, a workspace."""

import fcntl
import os
import time
from pathlib import Path
from typing import Any

from helpers.stage.suite import StageError

LOCK_PATIENCE = 10.0  # seconds; a kernel whose runner was killed needs a moment to notice and end


_held: dict[Path, Any] = {}  # lock files stay open, and so locked, until this process ends


def hold_lock(path: Path, what: str, patience: float = 0.0, instead: str = "use --run NAME") -> None:
    """Lock `path` for this process until it ends, by any cause; raises StageError if another process holds it.

    The lock is the operating system's and dies with its process, so a lock file that was left behind locks nothing.
    """
    path = path.resolve()
    if path in _held:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+", encoding="utf-8")
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() >= until:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                file.close()
                raise StageError(
                    f"{what} is in use by another process (pid {holder}). Wait for it, stop it, or {instead}."
                ) from None
            time.sleep(0.2)
    file.truncate(0)
    file.write(f"{os.getpid()}")
    file.flush()
    _held[path] = file


def release_lock(path: Path) -> None:
    """Give back a lock of `hold_lock` before this process ends."""
    file = _held.pop(path.resolve(), None)
    if file is not None:
        file.close()
