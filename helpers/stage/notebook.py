"""`Stage`: what a notebook calls at its start, for its inputs, and at its end."""

import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from helpers.config import Profile, load_profile, nearest
from helpers.stage.attached import take_over
from helpers.stage.lock import LOCK_PATIENCE, hold_lock
from helpers.stage.manifest import (
    check_conflict,
    code_version,
    contents_of,
    damaged_outputs,
    describe_outputs,
    find_stage,
    plain_values,
    read_manifest,
    settings_key,
    stage_settings,
    step_back,
)
from helpers.stage.pace import DeadlineReached, deadline, own_pace
from helpers.stage.suite import StageError, StageSpec, load_suite, needs_gpu, suite_file
from helpers.workspace.disk import clear_leftovers, write_json
from helpers.workspace.faults import refuse_known_bad
from helpers.workspace.machine import machine, package_versions
from helpers.workspace.place import platform, runs_root


def _check_gpu(spec: StageSpec) -> None:
    """Refuse a Kaggle session that would fail, or run for days, in the stage of a full-size profile.

    Raises StageError without a GPU, KnownBad for a GPU or packages that are known to fail.
    """
    import torch

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
        self.parameters = dict(parameters or {})
        self._spec = load_suite(suite_file()).spec(name)
        self.profile: Profile = self._spec.asked_profile(load_profile(profile, dict(overrides or {})), self.parameters)
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
            step_back(self.folder)
            check_conflict(self.folder, self._settings)
            clear_leftovers(self.folder)
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
        if lost := damaged_outputs(folder, manifest):
            own = folder.parent.parent == runs_root()
            advice = f"make it again: ./run_all.sh --from {name}" if own else "attach a whole copy of it"
            raise StageError(f"of {folder} {', '.join(lost)} is lost or damaged; {advice}")
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
        records, digest = describe_outputs(self.folder, self._settings, outputs)
        manifest = {
            "name": self.name,
            "status": status,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(self._before + time.monotonic() - self._began, 1),
            "metrics": plain_values(metrics),
            "outputs": records,
            "contents": contents_of(self.folder, records),
            "settings": self._settings,
            "key": settings_key(self._settings),
            "digest": digest,
            "inputs": self._settings["inputs"],
            "parameters": plain_values(self.parameters),
            "profile": self.profile.model_dump(),
            "versions": {"contract": self._spec.contract, "code": code_version(), "packages": package_versions()},
            "machine": machine(),
        }
        if status == "partial":
            manifest["to_come"] = own_pace(self.folder)  # for who pushed it and has only this file
        write_json(self.folder / "stage.json", manifest)
        return self.folder / "stage.json"
