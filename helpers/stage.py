"""A stage: one notebook's work in one run, what it read and made, and when it counts as done.

`runs/<run>/<stage>/stage.json` is written last and by atomic rename, so a stage is done if and only if that file says
`complete` for the settings that are asked for now. Settings are the contract version of `notebooks/suite.yaml`, the
notebook's parameters, the profile sections that the stage uses, and the digests of its upstream stages.
"""

import fcntl
import hashlib
import json
import math
import os
import subprocess
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from helpers.attached import attached_stage, take_over
from helpers.config import Profile, load_profile, nearest
from helpers.workspace import DeadlineReached, machine, package_versions, platform, repo_root, runs_root, session_end

SPEED_ONLY = {  # profile keys that change how fast a stage runs, not what it makes
    "data": {"workers"},
    "encoder": {"batch_groups"},
    "training": {"checkpoint_minutes", "log_steps", "gradient_checkpointing"},
    "evaluation": {"batch_tokens"},
    "adem": {"preset", "checkpoint_minutes", "log_steps", "gradient_checkpointing", "evaluation_batch"},
}
COMMON_PARAMETERS = ("profile", "run", "overrides")
HASHED_BYTES = 256_000_000  # a path parameter larger than this is not read whole
END_BYTES = 1 << 16  # read at each end of a file in a larger folder
LOCK_PATIENCE = 10.0  # seconds; a kernel whose runner was killed needs a moment to notice and end


class StageError(RuntimeError):
    """A stage that cannot start or finish; the message says which, why and what to do."""


class StageConflict(StageError):
    """The run already holds this stage's work under other settings."""


class StageSpec(BaseModel):
    """What `suite.yaml` says about one notebook."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    title: str
    about: str
    needs: str
    makes: str
    inputs: list[str] = Field(default_factory=list)
    sections: list[str] = Field(default_factory=list)
    contract: int
    default: bool = True
    always: bool = False
    gpu: bool = False
    probe: bool = False
    push_if_named: list[str] = Field(default_factory=list)
    minutes: dict[str, float]
    gigabytes: dict[str, float]
    kaggle_sources: list[str] = Field(default_factory=list)


class Suite(BaseModel):
    """The whole of `suite.yaml`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    repository: Annotated[str, Field(pattern=r"^https://github\.com/[\w.-]+/[\w-]+$")] | None
    kaggle_models: dict[str, str] = Field(default_factory=dict)  # by the model's name on the Hugging Face hub
    kaggle_wheels: list[str] = Field(default_factory=list)
    weekly_hours: float = Field(default=30.0, gt=0)
    stages: list[StageSpec]

    def spec(self, name: str) -> StageSpec:
        """Return the entry of stage `name`; raises StageError with the nearest valid name."""
        for spec in self.stages:
            if spec.name == name:
                return spec
        raise StageError(f"unknown stage {name!r}; {nearest(name, [spec.name for spec in self.stages])}")


def needs_gpu(spec: StageSpec, profile: Profile) -> bool:
    """Whether a stage needs a GPU under a profile; the tiny models do without."""
    model = profile.adem.language_model if "adem" in spec.sections else profile.encoder.model
    return spec.gpu and not model.startswith("tiny/")


def suite_file() -> Path:
    """Find `suite.yaml`: SUITE_FILE if set, beside the notebooks, or inside the installed package."""
    if os.environ.get("SUITE_FILE"):
        return Path(os.environ["SUITE_FILE"])
    clone = repo_root() / "notebooks" / "suite.yaml"
    return clone if clone.is_file() else Path(__file__).resolve().parent / "suite.yaml"


@cache
def load_suite(path: Path) -> Suite:
    """Read and check a suite file; raises StageError naming what is wrong in it."""
    try:
        suite = Suite.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise StageError(f"{path}: {error}") from error
    names = [spec.name for spec in suite.stages]
    for position, spec in enumerate(suite.stages):
        read = [*spec.inputs, *spec.kaggle_sources]
        if not set(read) <= set(names[:position]):
            raise StageError(f"{path}: {spec.name} reads {read}, but only earlier stages can be inputs")
    return suite


def write_json(path: Path, content: Any) -> None:
    """Write JSON by atomic rename: after a crash the file is the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return a stage folder's `stage.json`, or None where there is none; raises StageError if it cannot be read."""
    path = folder / "stage.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StageError(f"{path} is not readable JSON ({error}); run the stage again with --force") from error


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
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    small = sum(file.stat().st_size for file in files) <= HASHED_BYTES
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        name = file.relative_to(path).as_posix() if path.is_dir() else ""
        digest.update(f"{name}\0{stat.st_size}\0".encode())
        digest.update(file.read_bytes() if small else _ends(file))
    return digest.hexdigest()[:16]


def _ends(file: Path) -> bytes:
    with file.open("rb") as content:
        start = content.read(END_BYTES)
        content.seek(max(END_BYTES, file.stat().st_size - END_BYTES))
        return start + content.read()


def _parameter(value: Any) -> Any:
    """Stand in the content's hash for a parameter that names a file or folder, so that moving it changes nothing."""
    if isinstance(value, str) and "/" in value and "://" not in value and Path(value).exists():
        return f"content {fingerprint(Path(value))}"
    return value


def stage_settings(
    spec: StageSpec, profile: Profile, parameters: Mapping[str, Any], run_folder: Path
) -> dict[str, Any]:
    """Return everything that decides whether a finished stage can stand: compared key by key, and hashed as its key."""
    sections = {}
    for name in spec.sections:
        section, _, key = name.partition(".")
        if section != "shapes" or profile.data.corpus == "shapes":
            values = getattr(profile, section).model_dump(exclude=SPEED_ONLY.get(section))
            sections[name] = values[key] if key else values
    inputs = {}
    for name in spec.inputs:
        manifest = read_manifest(find_stage(run_folder, name))
        if manifest is not None and manifest["status"] == "complete":
            inputs[name] = manifest["digest"]
    return {
        "contract": spec.contract,
        "parameters": {name: _parameter(parameters[name]) for name in sorted(parameters)},
        "profile": sections,
        "inputs": inputs,
    }


def settings_key(settings: Mapping[str, Any]) -> str:
    """Hash settings to a short key."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Name every setting that differs between `old` and `new` with both values."""
    found = []
    for name in sorted({*old, *new}):
        a, b = old.get(name), new.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append(f"{prefix}{name}: {a!r} there, {b!r} now")
    return found


def check_conflict(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise StageConflict if `folder` holds work, finished or not, that was made with other settings."""
    manifest = read_manifest(folder)
    if manifest is not None:
        old, what = manifest["settings"], {"complete": "is finished", "partial": "was paused"}[manifest["status"]]
    else:
        marker, own = folder / "started.json", {"started.json", ".lock", f"{folder.name}.ipynb"}
        if not marker.is_file() or {path.name for path in folder.iterdir()} <= own:
            return
        old, what = json.loads(marker.read_text(encoding="utf-8")), "is unfinished"
    found = differences(old, settings)
    if found:
        raise StageConflict(
            f"{folder.name} {what} in run {folder.parent.name!r} with other settings:\n  "
            + "\n  ".join(found)
            + "\nKeep it and use another run (--run NAME), or replace it (--force)."
        )


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


def deadline() -> float:
    """Return the time (seconds since 1970) at which work is to be saved and stopped; inf if there is none.

    It is the runner's; in a notebook that is run by hand it is the end of the platform's session.
    """
    text = os.environ.get("SUITE_DEADLINE", "")
    try:
        return float(text) if text else session_end()
    except ValueError as error:
        raise StageError(f"SUITE_DEADLINE must be seconds since 1970, found {text!r}") from error


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


def _plain(value: Any) -> Any:
    """Turn numpy numbers, arrays, tuples and paths into JSON's own types; NaN and infinity become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _describe(
    folder: Path, settings: Mapping[str, Any], outputs: Iterable[Path | str]
) -> tuple[list[dict[str, Any]], str]:
    """Return path and size of each output, and the digest that stands for settings and content together."""
    records, contents = [], {}
    for output in outputs:
        path = folder / output
        if not path.exists() or not path.resolve().is_relative_to(folder.resolve()):
            raise StageError(f"{folder.name}: output {output} does not exist inside {folder}")
        relative = path.resolve().relative_to(folder.resolve()).as_posix()
        files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
        records.append({"path": relative, "bytes": sum(file.stat().st_size for file in files)})
        # equal Lance tables are not equal files, and shards are large: there the settings stand for the content
        contents[relative] = "" if ".lance" in {p.suffix for p in (path, *files)} else fingerprint(path)
    key = settings_key(settings)
    return records, hashlib.sha256(json.dumps([key, contents], sort_keys=True).encode()).hexdigest()[:16]


def check_outputs(folder: Path) -> dict[str, Any]:
    """Return the manifest of a stage's folder that came from elsewhere, after comparing its files with it.

    Raises StageError if there is no manifest, or an output is missing, has another size or another content.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise StageError(f"{folder} holds no stage.json")
    records, digest = _describe(folder, manifest["settings"], [output["path"] for output in manifest["outputs"]])
    if records != manifest["outputs"] or digest != manifest["digest"]:
        raise StageError(f"{folder} is not what its stage.json says: files were lost or changed on the way")
    return manifest


def _check_gpu(spec: StageSpec) -> None:
    """Refuse a Kaggle session that would fail, or run for days, in the stage of a full-size profile.

    Raises StageError without a GPU, KnownBad for a GPU or packages that are known to fail.
    """
    import torch

    from helpers.overview import refuse_known_bad  # which imports this module

    if not torch.cuda.is_available() and not spec.always:  # the demo's shipped models do without one
        raise StageError(
            f"{spec.name} needs a GPU, and this session has none: choose the accelerator GPU T4 x2, or the profile tiny"
        )
    refuse_known_bad()


def _end_green(stage: "Stage") -> None:
    """Let a deadline that is reached end this notebook as `partial` and without an error.

    Kaggle attaches outputs of runs without an error only. The error is taken off the cell's result after its message
    was shown, and the cells after it do nothing.
    """
    from IPython import get_ipython

    shell = get_ipython()
    if shell is None:
        return

    def forgive(result: Any) -> None:
        result.error_in_exec = None

    def pause(shell: Any, kind: type, error: Exception, trace: Any, tb_offset: int | None = None) -> None:
        stage.finish({"paused": str(error)}, status="partial")
        shell.input_transformers_cleanup.append(lambda lines: [])
        shell.events.register("post_run_cell", forgive)
        print(f"{stage.name}: {error}")

    shell.set_custom_exc((DeadlineReached,), pause)


class Stage:
    """One notebook's work in one run.

    name: the notebook's name without ending, as in suite.yaml. profile, run, overrides: the notebook's parameters of
    the same names. parameters: all its other parameters, by name. Raises ConfigError for a bad profile, StageConflict
    if the run holds this stage with other settings, StageError if another process works on it. On Kaggle a stage that
    needs a GPU is refused where there is none (StageError) or where it is known to fail (KnownBad).
    """

    def __init__(
        self,
        name: str,
        profile: str = "",
        run: str = "",
        overrides: Mapping[str, Any] | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.profile: Profile = load_profile(profile, dict(overrides or {}))
        self.parameters = dict(parameters or {})
        self._spec = load_suite(suite_file()).spec(name)
        if platform() == "kaggle" and needs_gpu(self._spec, self.profile):
            _check_gpu(self._spec)
        self._run_folder = runs_root() / (run or self.profile.name)
        self.folder = self._run_folder / name
        self._settings = stage_settings(self._spec, self.profile, self.parameters, self._run_folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if platform() == "kaggle":
            if take_over(self._run_folder.name, name, self.folder):
                print(f"{name} goes on with the work of an earlier session")
            _end_green(self)
        if not self._spec.always:  # what only shows the present state may be open several times at once
            hold_lock(self.folder / ".lock", f"{name} of run {self._run_folder.name!r}", LOCK_PATIENCE)
            check_conflict(self.folder, self._settings)
        if set(self._settings["inputs"]) == set(self._spec.inputs):
            write_json(self.folder / "started.json", self._settings)
        self._before = (read_manifest(self.folder) or {"seconds": 0.0})["seconds"]
        self._began = time.monotonic()

    def input(self, name: str) -> Path:
        """Return the folder of the upstream stage `name`.

        Raises StageError if it is absent, only partly done, or has lost one of its output files.
        """
        if name not in self._spec.inputs:
            raise StageError(f"{self.name} does not declare {name!r} as an input; {nearest(name, self._spec.inputs)}")
        folder = find_stage(self._run_folder, name)
        manifest = read_manifest(folder)
        if manifest is None:
            raise StageError(
                f"{self.name} needs {name}, which is not done in run {self._run_folder.name!r}: "
                f"run notebooks/{name}.ipynb first (./run_all.sh --from {name})"
            )
        if manifest["status"] != "complete":
            raise StageError(
                f"{self.name} needs {name}, which is only partly done in run {self._run_folder.name!r}: "
                f"run it again and it goes on from where it stopped (./run_all.sh --from {name})"
            )
        lost = [output["path"] for output in manifest["outputs"] if not (folder / output["path"]).exists()]
        if lost:
            raise StageError(f"{folder} has lost {', '.join(lost)}; make it again: ./run_all.sh --only {name} --force")
        return folder

    @property
    def remaining_seconds(self) -> float:
        """Seconds until the runner's deadline; inf if there is none, negative once it has passed."""
        return deadline() - time.time()

    def finish(self, metrics: Mapping[str, Any], outputs: Iterable[Path | str] = (), status: str = "complete") -> Path:
        """Write `stage.json`, last and atomically, and return its path.

        metrics: numbers by name. outputs: files and folders inside the stage's folder that others read; each must
        exist. status: "complete", or "partial" if a deadline stopped the work and the next run goes on with it.
        """
        if status not in ("complete", "partial"):
            raise StageError(f"status must be 'complete' or 'partial', found {status!r}")
        records, digest = _describe(self.folder, self._settings, outputs)
        manifest = {
            "name": self.name,
            "status": status,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(self._before + time.monotonic() - self._began, 1),
            "metrics": _plain(metrics),
            "outputs": records,
            "settings": self._settings,
            "key": settings_key(self._settings),
            "digest": digest,
            "inputs": self._settings["inputs"],
            "parameters": _plain(self.parameters),
            "profile": self.profile.model_dump(),
            "versions": {"contract": self._spec.contract, "code": code_version(), "packages": package_versions()},
            "machine": machine(),
        }
        if status == "partial":
            from helpers.quota import own_pace  # which imports this module

            manifest["to_come"] = own_pace(self.folder)  # for who pushed it and has only this file
        write_json(self.folder / "stage.json", manifest)
        return self.folder / "stage.json"
