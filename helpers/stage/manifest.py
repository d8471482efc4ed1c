"""A stage's manifest: what it read and made, and when it counts as done.

`runs/<run>/<stage>/stage.json` is written last and by atomic rename, so a stage is done if and only if that file says
`complete` for the settings that are asked for now. Settings are the contract version of `notebooks/suite.yaml`, the
notebook's parameters, the profile sections that the stage uses, and the digests of its upstream stages.
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import warnings
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from helpers.config import PACING, Profile, before_of, deciding
from helpers.stage.attached import attached_stage
from helpers.stage.suite import StageError, StageSpec
from helpers.workspace.disk import read_json, remove
from helpers.workspace.inputs import attached_paths
from helpers.workspace.names import files_below
from helpers.workspace.place import repo_root

HASHED_BYTES = 256_000_000  # a path parameter larger than this is not read whole
CONTENT = "content "  # before the hash that stands for a file or a folder
END_BYTES = 1 << 16  # read at each end of a file in a larger folder


class StageConflict(StageError):
    """The run already holds this stage's work under other settings."""


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return a stage folder's `stage.json`, or None where there is none; raises StageError if it cannot be read."""
    path = folder / "stage.json"
    if not path.is_file():
        return None
    again = f"make it again: ./run_all.sh --from {folder.name} (what is whole is kept)"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StageError(f"{path} is not readable JSON ({error}); {again}") from error
    told = manifest.get("status", manifest.get("settings")) if isinstance(manifest, dict) else None
    if told not in ("complete", "partial") and not isinstance(told, dict):
        raise StageError(f"{path} does not say how far the stage is; {again}")
    return manifest


def manifest_elsewhere(folder: Path, needed: Iterable[str] = ()) -> dict[str, Any] | None:
    """Return the `stage.json` of a run that is only looked at, as `read_manifest` does.

    One that cannot be read, or lacks what is `needed` of it, is warned of and counts as none: what happened to another
    run stops nothing.
    """
    try:
        manifest = read_manifest(folder)
    except (StageError, OSError) as error:
        warnings.warn(f"a stage of another run is passed over: {error}", stacklevel=2)
        return None
    lacking = [name for name in needed if manifest is not None and name not in manifest]
    if lacking:
        told = f"{folder / 'stage.json'} lacks {', '.join(lacking)}"
        warnings.warn(f"a stage of another run is passed over: {told}", stacklevel=2)
        return None
    return manifest


def found_manifest(run_folder: Path, name: str) -> dict[str, Any] | None:
    """Return what is known of stage `name` of a run, for showing it: the run's own manifest, or that of `find_stage`.

    Raises StageError if the run's own cannot be read; another run's is then passed over.
    """
    folder = find_stage(run_folder, name)
    return read_manifest(folder) if folder.parent == run_folder else manifest_elsewhere(folder)


def find_stage(run_folder: Path, name: str) -> Path:
    """Return the folder of stage `name`: the run's own, else that of the run that it builds on, and so forth.

    What none of these runs holds is looked for among attached inputs.
    """
    own, seen = run_folder / name, {run_folder}
    while not (run_folder / name / "stage.json").is_file():
        note = run_folder / "upstream"
        if not note.is_file():
            return attached_stage(own.parent.name, name) or own
        run_folder = run_folder.parent / note.read_text(encoding="utf-8").strip()
        if run_folder in seen:
            return attached_stage(own.parent.name, name) or own
        seen.add(run_folder)
    return run_folder / name


def fingerprint(path: Path) -> str:
    """Hash a file's or a folder's content; above 256 MB names, sizes and each file's ends stand for the content."""
    files = _files(path)
    small = sum(file.stat().st_size for file in files) <= HASHED_BYTES
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        name = file.relative_to(path).as_posix() if path.is_dir() else ""
        digest.update(f"{name}\0{stat.st_size}\0".encode("utf-8", "surrogateescape"))  # names of any bytes
        digest.update(file.read_bytes() if small else _ends(file))
    return digest.hexdigest()[:16]


def _ends(file: Path) -> bytes:
    with file.open("rb") as content:
        start = content.read(END_BYTES)
        content.seek(max(END_BYTES, file.stat().st_size - END_BYTES))
        return start + content.read()


def _parameter(value: Any, names_path: bool) -> Any:
    """Stand in the content's hash for a parameter that names a file or folder, so that moving it changes nothing.

    names_path: whether the stage says so; else a slash in it must tell.
    """
    if isinstance(value, str) and value and (names_path or "/" in value) and "://" not in value:
        path = Path(value).expanduser()
        return _content(path) if path.exists() else value
    return value


def _content(path: Path) -> str:
    return f"{CONTENT}{fingerprint(path)}"


def _model(name: Any) -> Any:
    """Stand in the content's hash for a base model that is a folder; names of the hub and shipped ones stay."""
    if isinstance(name, str) and (Path(name).expanduser() / "config.json").is_file():
        return _content(Path(name).expanduser())
    return name


def stage_settings(
    spec: StageSpec, profile: Profile, parameters: Mapping[str, Any], run_folder: Path
) -> dict[str, Any]:
    """Return everything that decides whether a finished stage can stand: compared key by key, and hashed as its key."""
    profile, sections = spec.asked_profile(profile, parameters), {}
    for name in spec.sections:
        section, _, key = name.partition(".")
        if section != "shapes" or profile.data.corpus == "shapes":
            values = getattr(profile, section).model_dump(exclude=set(PACING.get(section, ())))
            sections[name] = values[key] if key else values
    sections = deciding(sections)
    for name in spec.models:
        section, _, key = name.partition(".")
        if section in sections:
            sections[section][key] = _model(sections[section][key])
    inputs = {}
    for name in spec.inputs:
        manifest = read_manifest(find_stage(run_folder, name))
        if manifest is not None and manifest["status"] == "complete":
            inputs[name] = manifest["digest"]
    paths = {*spec.data, *spec.options, *spec.paths}
    settings = {
        "contract": spec.contract,
        "parameters": {name: _parameter(parameters[name], name in paths) for name in sorted(parameters)},
        "profile": sections,
        "inputs": inputs,
    }
    if spec.beside:
        places = {name: Path(parameters.get(name) or "").expanduser() for name in spec.beside}
        found = {name: place.resolve().parent / spec.beside[name] for name, place in places.items() if place.name}
        settings["beside"] = {name: _content(path) for name, path in found.items() if path.exists()}
    return settings


def settings_key(settings: Mapping[str, Any]) -> str:
    """Hash settings to a short key."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "", there: str = "there") -> list[str]:
    """Name every leaf that differs between two nested mappings, with both values; there: where the old one stands."""
    found = []
    for name in sorted({*old, *new}):
        a, b = old.get(name), new.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{name}.", there)
        elif a != b:
            found.append(f"{prefix}{name}: {a!r} {there}, {b!r} now")
    return found


def settings_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Name every setting that differs and decides the result; `old` may be of an earlier version of the suite."""
    ours, theirs = (deciding(settings.get("profile") or {}) for settings in (new, old))
    for name in ours.keys() - theirs.keys():  # a key that a stage names alone, or a section, that did not exist then
        theirs |= {name: before_of(name)} if "." in name else deciding({name: {}})
    for section, values in ours.items():
        if isinstance(values, Mapping) and isinstance(theirs.get(section), dict):
            of_content = [key for key, value in values.items() if isinstance(value, str) and value.startswith(CONTENT)]
            theirs[section] |= {key: _model(theirs[section].get(key)) for key in of_content}  # once, folders' names
    new = {name: value for name, value in new.items() if name in old or name != "beside"}
    given = {name: dict(settings.get("parameters") or {}) for name, settings in (("old", old), ("new", new))}
    given["old"] = dict.fromkeys(given["new"], "") | given["old"]  # a parameter that did not exist then was not given
    theirs, ours = {"profile": theirs, "parameters": given["old"]}, {"profile": ours, "parameters": given["new"]}
    return differences({**old, **theirs}, {**new, **ours})


def check_conflict(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise StageConflict if `folder` holds work, finished or not, that was made with other settings."""
    manifest = read_manifest(folder)
    if manifest is not None:
        old, what = manifest["settings"], {"complete": "is finished", "partial": "was paused"}[manifest["status"]]
    else:
        marker, own = folder / "started.json", {"started.json", ".lock", f"{folder.name}.ipynb"}
        if not marker.is_file() or {path.name for path in folder.iterdir()} <= own:
            return
        old, what = read_json(marker), "is unfinished"
        if old is None:  # every piece of the work is compared with the settings by itself
            return
    found = settings_differences(old, settings)
    if found:
        raise StageConflict(
            f"{folder.name} {what} in run {folder.parent.name!r} with other settings:\n  "
            + "\n  ".join(found)
            + "\nKeep it and use another run (--run NAME), or replace it (--force)."
        )


@cache
def code_version() -> str:
    """Return the git commit of the code, with `+` if files were changed since; "" outside a clone."""
    git = ["git", "-C", str(repo_root())]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return commit.stdout.strip()[:12] + ("+" if changed.stdout.strip() else "") if commit.returncode == 0 else ""


def plain_values(value: Any) -> Any:
    """Turn numpy numbers, arrays, tuples and paths into JSON's own types; NaN and infinity become null."""
    if isinstance(value, Mapping):
        return {str(key): plain_values(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain_values(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def describe_outputs(
    folder: Path, settings: Mapping[str, Any], outputs: Iterable[Path | str]
) -> tuple[list[dict[str, Any]], str]:
    """Return path and size of each output, and the digest that stands for settings and content together."""
    records, contents = [], {}
    for output in outputs:
        path = folder / output
        if not path.exists() or not path.resolve().is_relative_to(folder.resolve()):
            raise StageError(f"{folder.name}: output {output} does not exist inside {folder}")
        relative = path.resolve().relative_to(folder.resolve()).as_posix()
        records.append({"path": relative, "bytes": _bytes(path)})
        # equal Lance tables are not equal files, and shards are large: there the settings stand for the content
        contents[relative] = "" if _holds_tables(path) else fingerprint(path)
    key = settings_key(settings)
    return records, hashlib.sha256(json.dumps([key, contents], sort_keys=True).encode()).hexdigest()[:16]


def _files(path: Path) -> list[Path]:
    return files_below(path) if path.is_dir() else [path]


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in _files(path))


def _holds_tables(path: Path) -> bool:
    """Whether an output is a Lance table or holds some."""
    parts = (part for file in (path, *_files(path)) for part in file.relative_to(path.parent).parts)
    return any(part.endswith(".lance") for part in parts)


def contents_of(folder: Path, outputs: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Return the hash of each file of each output, by the output's path, for `damaged_outputs`; none of tables."""
    found = {}
    for name in (output["path"] for output in outputs):
        path = folder / name
        files = [] if _holds_tables(path) else _files(path)
        found[name] = {file.relative_to(path).as_posix(): fingerprint(file) for file in files}
    return found


def damaged_outputs(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Return the paths of a finished stage's outputs that are lost, or not what they were when it was finished.

    What was put beside them since is no damage. Of Lance tables the size decides. The manifest of an earlier version
    tells no contents, and stands.
    """
    found = []
    for output in manifest["outputs"] if "contents" in manifest else []:
        path, files = folder / output["path"], manifest["contents"].get(output["path"], {})
        lost = not path.exists() or _bytes(path) < output["bytes"]
        if lost or any(not (path / n).is_file() or fingerprint(path / n) != told for n, told in files.items()):
            found.append(output["path"])
    return found


def step_back(folder: Path) -> None:
    """Let a stage of this run that was finished, and whose files were damaged since, count as unfinished.

    It is told in a warning. The stage's work then goes on from what of it is whole.
    """
    try:
        manifest = read_manifest(folder)
        damaged = damaged_outputs(folder, manifest) if manifest and manifest["status"] == "complete" else []
        told = f"of {folder} {', '.join(damaged)} is lost or damaged" if damaged else ""
    except StageError as error:
        told = str(error).partition(";")[0]
    if told:
        warnings.warn(f"{told}: {folder.name} is made again from what is whole", stacklevel=2)
        remove(folder / "stage.json")


def check_outputs(folder: Path) -> dict[str, Any]:
    """Return the manifest of a stage's folder that came from elsewhere, after comparing its files with it.

    Raises StageError if there is no manifest, or an output is missing, has another size or another content.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise StageError(f"{folder} holds no stage.json")
    records, digest = describe_outputs(folder, manifest["settings"], [output["path"] for output in manifest["outputs"]])
    if records != manifest["outputs"] or digest != manifest["digest"]:
        raise StageError(f"{folder} is not what its stage.json says: files were lost or changed on the way")
    return manifest


def newest_attached(name: str, wanted: Callable[[Path], bool]) -> Path | None:
    """The attached folder with a file `name` that was finished last, of those that are `wanted`; None without one.

    The time is its stage's, or its file's where it came without stage.json.
    """
    found = []
    for path in attached_paths(name):
        if not wanted(path.parent):
            continue
        manifest = manifest_elsewhere(path.parents[1], ["finished"])
        written = datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat()
        found.append((manifest["finished"] if manifest else written, path.parent))
    return max(found)[1] if found else None
