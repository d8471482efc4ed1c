"""Files and disks: room for what comes, hashes and sizes, and writes that are whole or not at all."""

import errno
import hashlib
import json
import os
import platform
import secrets
import shutil
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

LEFTOVERS = ".*.tmp"  # names of what `whole` has not put in its place yet
ABANDONED_SECONDS = 86400.0  # without a write, after which what another machine left is its no more
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # mounted drives that cannot sync a folder say so


class DiskFull(OSError):
    """A folder without the room that the next step needs."""


def file_sha256(file: Path) -> str:
    """Return a file's SHA-256 in hexadecimal digits, read piece by piece."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file below a folder, by its path there, but of hidden ones."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    hidden = {name for name in files if any(part.startswith(".") for part in name.split("/"))}
    return {name: file_sha256(path) for name, path in files.items() if name not in hidden}


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

    Readers see the old one or the new one, never a part, a power cut between two moments included: all that was
    written is forced to disk before it gets its name. The temporary path lies beside `path` and bears the name of this
    write alone, so that threads, processes and machines on one disk do not write over each other;
    `clear_leftovers` removes what one that died left behind.
    """
    temporary = _beside(path)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        put_in_place(temporary, path)
    finally:
        remove(temporary)


def _beside(path: Path) -> Path:
    """A hidden path beside `path` that no other write has: its machine, process, that process's start, and chance."""
    writer = f"{_machine()}-{os.getpid()}-{_started(os.getpid())}"
    return path.with_name(f".{path.name[:100]}.{writer}-{secrets.token_hex(4)}.tmp")


@cache
def _machine() -> str:
    return hashlib.sha256(f"{platform.node()} {uuid.getnode()}".encode()).hexdigest()[:8]


def _started(process: int) -> str:
    """What tells a process from another of the same number, before or after a restart of the machine; "" if dead."""
    if Path("/proc/self/stat").is_file():
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text()
            ticks = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
        except OSError:
            return ""
        return hashlib.sha256(f"{boot} {ticks}".encode()).hexdigest()[:8]
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:  # another user's
        pass
    return "0"


def clear_leftovers(folder: Path) -> None:
    """Remove what processes that died in the middle of `whole` left below a folder.

    Of another machine's processes nothing is known: what they left goes once nothing was written to it for a day.
    """
    for left in folder.rglob(LEFTOVERS):
        writer = left.name.split(".")[-2].split("-")
        if len(writer) == 4 and writer[0] != _machine():
            dead = time.time() - left.stat().st_mtime > ABANDONED_SECONDS
        else:  # a name of one number is of an earlier version
            process = writer[0] if len(writer) == 1 else writer[1]
            found = _started(int(process)) if process.isdigit() else None
            dead = found == "" or (len(writer) == 4 and found != writer[2])
        if dead:
            remove(left)


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def put_in_place(source: Path, target: Path) -> None:
    """Give a finished file or folder another name, in the place of what bears it now; all of it is on disk then.

    OSError if a file is to take a folder's place, or a folder a file's: nothing of another kind is removed unasked.
    """
    if target.is_dir() and not source.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    if source.is_dir():
        for path in sorted(source.rglob("*"), reverse=True):  # what lies in a folder comes before it
            if not path.is_symlink():
                sync(path)
    sync(source)
    if target.is_dir():
        old = _beside(target)
        target.rename(old)
        source.replace(target)
        remove(old)
    else:
        source.replace(target)
    sync(target.parent)
    if source.parent != target.parent:
        sync(source.parent)


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all. ValueError for a number that is not finite."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False))


def read_json(path: Path) -> Any:
    """What `write_json` wrote to `path`; None where there is none. A damaged one is dropped with a warning: None."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # bytes that are no UTF-8 too
        warnings.warn(f"{path} is damaged ({error}): it is dropped", stacklevel=2)
        remove(path)
        return None


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all, in UTF-8."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def copy(source: Path, target: Path) -> None:
    """Copy a file or a folder to `target`, whole or not at all; a folder that is already there is replaced."""
    with whole(target) as temporary:
        if source.is_dir():
            shutil.copytree(source, temporary)
        else:
            shutil.copyfile(source, temporary)


def sync(path: Path) -> None:
    """Force a file or folder to disk, so that a rename after it never outruns its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in NO_SYNC):
            raise
    finally:
        os.close(handle)


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
