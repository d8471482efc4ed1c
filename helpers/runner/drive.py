"""Keeps the runs of Colab's sessions on Google Drive, and takes them from there."""

import shutil
import sys
import time
from pathlib import Path

from helpers.runner.plan import RunPlan
from helpers.stage.suite import StageSpec
from helpers.workspace.disk import file_sha256, folder_bytes, require_disk, whole
from helpers.workspace.names import files_below
from helpers.workspace.place import COLAB_CONTENT, platform

DRIVE = COLAB_CONTENT / "drive" / "MyDrive"


def drive_runs() -> Path | None:
    """Return the folder on Google Drive that keeps the runs of Colab's sessions; None elsewhere or if not mounted."""
    return DRIVE / "gif-question-answering" / "runs" if platform() == "colab" and DRIVE.is_dir() else None


def _copy_file(source: Path, target: Path, attempts: int, wait: float) -> None:
    """Copy one file under another name, read it back, compare hashes, and only then give it its name."""
    digest = file_sha256(source)
    for attempt in range(1, attempts + 1):
        try:
            if target.is_file() and target.stat().st_size == source.stat().st_size and file_sha256(target) == digest:
                return
            with whole(target) as part:
                shutil.copyfile(source, part)
                if file_sha256(part) != digest:
                    raise OSError("what was read back differs from what was written")
            return
        except OSError as error:  # Drive drops its connection (errno 107) and comes back
            if attempt == attempts:
                raise OSError(
                    f"{source.name} could not be copied to {target.parent} in {attempts} attempts: {error}"
                ) from error
            time.sleep(wait * 2 ** (attempt - 1))


def copy_verified(source: Path, target: Path, attempts: int = 5, wait: float = 2.0) -> None:
    """Make folder `target` hold the files of folder `source`, each verified by its hash; for disks that drop out.

    A file that fails is tried again, with pauses of `wait` seconds that double. `stage.json` comes last, so a copy that
    was cut has none and counts as not done. Hidden files are left out; files that `source` lacks are removed. Raises
    OSError if all attempts at a file fail.
    """
    files = [path.relative_to(source) for path in files_below(source)]
    files = [file for file in files if not any(part.startswith(".") for part in file.parts)]
    if (target / "stage.json").is_file() and not (source / "stage.json").is_file():
        (target / "stage.json").unlink()
    for file in sorted(files, key=lambda file: file.name == "stage.json"):
        _copy_file(source / file, target / file, attempts, wait)
    for path in files_below(target):
        if path.relative_to(target) not in files:
            path.unlink()


def take_from_drive(plan: RunPlan) -> None:
    """On Colab, take the run's stages that an earlier session kept on Drive; a failure is told and stops nothing."""
    kept = drive_runs()
    for folder in sorted((kept / plan.run).glob("*/")) if kept else []:
        if not (plan.folder / folder.name / "stage.json").is_file() and (folder / "stage.json").is_file():
            print(f"Taking {folder.name} from Drive", flush=True)
            try:
                copy_verified(folder, plan.folder / folder.name)
            except OSError as error:
                print(
                    f"  Warning: {folder.name} could not be taken from Drive: {error}. It is made anew; to keep what "
                    "Drive has, stop now, mount Drive again and repeat the command.",
                    file=sys.stderr,
                    flush=True,
                )


def keep_on_drive(plan: RunPlan, spec: StageSpec) -> None:
    """On Colab, keep a stage on Drive that is complete or was paused; a failure is told and stops nothing.

    A session's own disk is lost with it, so that a paused stage could not go on in the next one.
    """
    kept, folder = drive_runs(), plan.folder / spec.name
    if kept is None or not (folder / "stage.json").is_file():
        return
    try:
        require_disk(kept, folder_bytes(folder) / 1e9, f"keeping {spec.name} on Drive")
        copy_verified(folder, kept / plan.run / spec.name)
    except OSError as error:
        print(f"  Warning: {spec.name} is not kept on Drive: {error}. The same command tries again.", file=sys.stderr)
