"""Files and disks: room for what comes, hashes and sizes, and writes that are whole or not at all."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LEFTOVERS = ".*.tmp"  # names of what `whole` has not put in its place yet


class DiskFull(OSError):
    """A folder without the room that the next step needs."""


def file_sha256(file: Path) -> str:
    """Return a file's SHA-256 in hexadecimal digits, read piece by piece."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def free_gigabytes(path: Path | str) -> float:
    """Return the free disk space (GB = 1e9 bytes) at `path` or at its nearest existing parent."""
    path = Path(path).resolve()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free / 1e9


def require_disk(path: Path | str, gigabytes: float, what: str) -> None:
    """Raise DiskFull unless `path`'s disk has `gigabytes` (1e9 bytes) free for `what`."""
    free = free_gigabytes(path)
    if free < gigabytes:
        raise DiskFull(
            f"{what} needs about {gigabytes:g} GB at {path}, but only {free:.1f} GB are free. "
            "Free some space, or point RUNS_ROOT to a larger disk."
        )


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path for what is to stand at `path`, file or folder, and put it there when it is all written.

    Readers see the old one or the new one, never a part. The temporary path lies beside `path` and bears this process's
    number, so that processes do not write over each other; `clear_leftovers` removes what one that died left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    remove(temporary)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        put_in_place(temporary, path)
    finally:
        remove(temporary)


def clear_leftovers(folder: Path) -> None:
    """Remove what processes that died in the middle of `whole` left below a folder."""
    for left in folder.rglob(LEFTOVERS):
        writer = left.name.split(".")[-2]
        if writer.isdigit() and not _alive(int(writer)):
            remove(left)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def put_in_place(source: Path, target: Path) -> None:
    """Give a finished file or folder another name, in the place of what bears it now."""
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.is_dir():
        remove(old)
        target.rename(old)
    source.replace(target)
    remove(old)


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all, and force it to disk."""
    with whole(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Force a file or folder to disk, so that a rename after it never outruns its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
