"""What is attached to a notebook on Kaggle: other notebooks' stages, and this stage's own work of an earlier session.

Attached inputs cannot be written and have moved before (inputs/<slug>, inputs/notebooks/<owner>/<slug>), so things are
found by their marker files and never by the name of a notebook or data set.
"""

import json
import os
import shutil
import tarfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from helpers.workspace.disk import LEFTOVERS, copy, file_sha256, write_json
from helpers.workspace.inputs import attached_paths
from helpers.workspace.names import files_below

MOUNT_DEPTH = 3  # folders at most between the inputs' folder and what one source carries: notebooks/owner/slug
HANDOVER = "handover.json"  # marks a data set that carries the unfinished work of a run which died
TAKES_OVER = "SUITE_TAKES_OVER"  # set where a session was pushed to go on with earlier work, and not to begin anew
BEGUN = "started.json"
NOT_WORK = (BEGUN, ".lock")  # what every stage's folder holds from its first second on


class AttachedError(RuntimeError):
    """Attached inputs that contradict each other; the message lists them."""


def _find(pattern: str) -> list[Path]:
    return [path.parent for path in attached_paths(pattern, MOUNT_DEPTH)]


def _only(found: list[Path], what: str) -> Path | None:
    if len(found) > 1:
        listing = "\n  ".join(map(str, found))
        raise AttachedError(f"Several attached inputs carry {what}; detach all but one:\n  {listing}")
    return found[0] if found else None


def attached_stage(run: str, name: str) -> Path | None:
    """Return the attached folder of stage `name` of `run`, or None; raises AttachedError if several carry it."""
    return _only(_find(f"runs/{run}/{name}/stage.json"), f"{name} of run {run!r}")


def _read_handover(folder: Path) -> dict[str, Any]:
    return json.loads((folder / HANDOVER).read_text(encoding="utf-8"))


def take_over(run: str, name: str, folder: Path) -> bool:
    """Copy this stage's own work of an earlier session into its empty `folder`; returns whether there was any.

    Found as this notebook's own attached output, which a session that ended in time leaves, or as an attached data set
    made of the files of a session that died. Raises AttachedError if there are several, if an archive is damaged, or if
    there is none and this session was started to go on with it.
    """
    if (folder / BEGUN).is_file():
        return False
    own = _find(f"runs/{run}/{name}/{BEGUN}")
    handed = [path for path in _find(HANDOVER) if _read_handover(path)["stage"] == [run, name]]
    source = _only(own + handed, f"earlier work of {name} of run {run!r}")
    if source is None:
        if TAKES_OVER in os.environ:
            raise AttachedError(f"The earlier work of {name} of run {run!r} is not attached; it is not begun anew")
        return False
    if source in own:
        # what tells that it was taken over comes last: a copy that was cut is begun again
        late = shutil.ignore_patterns(".lock", LEFTOVERS, BEGUN)
        shutil.copytree(source, folder, dirs_exist_ok=True, ignore=late)
        copy(source / BEGUN, folder / BEGUN)
        return True
    note = _read_handover(source)
    archive = source / Path(note["archive"]).name
    if not archive.is_file() or file_sha256(archive) != note["sha256"]:
        raise AttachedError(f"{archive} is missing or damaged: attach the newest version of that data set")
    with tarfile.open(archive) as content:
        members = sorted(content, key=lambda member: member.name == BEGUN)
        content.extractall(folder, members, filter="data")  # refuses members that would leave the folder
    return True


def holds_work(folder: Path) -> bool:
    """Whether a stage's folder holds anything that a later session could go on with."""
    return (folder / BEGUN).is_file() and any(path.name not in NOT_WORK for path in files_below(folder))


def _passing(path: Path) -> bool:
    """Whether a file is of one process only: its lock, or what it has not written to the end."""
    return path.name == ".lock" or any(fnmatch(part, LEFTOVERS) for part in path.parts)


def pack(run: str, name: str, folder: Path, target: Path) -> None:
    """Write a stage's unfinished work as the files of a data set that `take_over` understands into `target`.

    One archive, under an ending that Kaggle does not unpack, since a data set takes fifty files and no sub-folders.
    """
    target.mkdir(parents=True, exist_ok=True)
    archive = target / "work.bin"
    with tarfile.open(archive, "w") as content:
        for path in [path for path in files_below(folder) if not _passing(path)]:
            content.add(path, path.relative_to(folder).as_posix(), recursive=False)
    note = {"stage": [run, name], "archive": archive.name, "sha256": file_sha256(archive)}
    write_json(target / HANDOVER, note)
