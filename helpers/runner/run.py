"""Runs a plan: its notebooks as stages, in order, within the deadline and the week's GPU-hours."""

import logging
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import nbformat

from helpers.runner import quota
from helpers.runner.drive import keep_on_drive, take_from_drive
from helpers.runner.outcome import DONE, PAUSED, REFUSED, Failed, Paused, fault_of, is_sentence
from helpers.runner.plan import RunPlan, filled_in
from helpers.runner.report import print_scores, write_report
from helpers.stage.lock import hold_lock, release_lock
from helpers.stage.manifest import (
    check_conflict,
    find_stage,
    read_manifest,
    settings_differences,
    settings_key,
    stage_settings,
    step_back,
)
from helpers.stage.pace import DeadlineReached
from helpers.stage.suite import StageError, StageSpec
from helpers.workspace.disk import DiskFull, folder_bytes, put_in_place, require_disk, whole, write_json, write_text
from helpers.workspace.machine import gpus
from helpers.workspace.place import runs_root, session_end, session_seconds, share_secrets


class Progress:
    """Passes a notebook's streams to the terminal: lines as they are, progress bars in place or twice a minute."""

    def __init__(self, out: TextIO) -> None:
        self.out, self.line, self.shown, self.open = out, "", -math.inf, False

    def write(self, text: str) -> None:
        """Take a piece of a stream."""
        for piece in re.split(r"([\r\n])", text):
            if piece == "\n":
                self._end(self.line)
            elif piece == "\r":
                self._draw(self.line)
            else:
                self.line += piece
                continue
            self.line = ""
        self.flush()

    def _draw(self, line: str) -> None:
        every = 0.1 if self.out.isatty() else 30.0
        if line.strip() and time.monotonic() - self.shown >= every:
            self.shown, self.open = time.monotonic(), self.out.isatty()
            width = shutil.get_terminal_size().columns - 1
            self.out.write(f"\r\x1b[K{line.strip()[:width]}" if self.open else f"  {line.strip()}\n")

    def _end(self, line: str) -> None:
        if line.strip():
            self.out.write(("\r\x1b[K" if self.open else "") + f"  {line.rstrip()}\n")
            self.open = False

    def flush(self) -> None:
        """Show what was taken so far."""
        self.out.flush()


class SavedWhole:
    """How papermill saves an executed notebook, after each of its cells: whole or not at all."""

    def write(self, text: str, path: str) -> None:
        """Write the notebook to `path`."""
        write_text(Path(path), text)

    def pretty_path(self, path: str) -> str:
        """What messages call it."""
        return path


@contextmanager
def _environment() -> Iterator[None]:
    """Set what the kernels inherit: quiet libraries, secrets, and a python3 kernel of this very interpreter.

    JUPYTER_PATH comes before a user's own kernel folders, where `python3` may be another environment.
    """
    from ipykernel.kernelspec import get_kernel_dict

    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder) / "kernels" / "python3" / "kernel.json"
        # above errors, since a kernel reports as one the interrupt with which it is shut down; errors of cells come by
        # another way, and a kernel that dies is noticed
        write_json(spec, get_kernel_dict(extra_arguments=["--log-level=50"]))
        before = dict(os.environ)
        os.environ |= {
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "NO_ALBUMENTATIONS_UPDATE": "1",
            "SUITE_HEADLESS": "1",
            "JUPYTER_PATH": os.pathsep.join(filter(None, [folder, before.get("JUPYTER_PATH")])),
        }
        share_secrets()
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def _last_cell(notebook: Path) -> str:
    """Name the last cell that began: after a kernel's death papermill marks cells complete that never ran."""
    if not notebook.is_file():
        return "before its first cell"
    try:
        code = [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    except (OSError, ValueError):  # the disk was full, for one
        return "in a cell that is not known: the executed notebook cannot be read"
    began = [number for number, cell in enumerate(code) if cell.metadata.get("papermill", {}).get("start_time")]
    return f"in cell [{began[-1] + 1}]: {_first_line(code[began[-1]].source)}" if began else "before its first cell"


def _first_line(source: str) -> str:
    return next((line for line in source.splitlines() if line.strip()), "")


def execute(plan: RunPlan, spec: StageSpec) -> None:
    """Run one notebook in a fresh kernel and save it, executed, in the stage's folder; raises Failed or Paused.

    Raises StageError if it cannot be saved before the kernel starts.
    """
    from nbclient.exceptions import DeadKernelError
    from papermill import execute_notebook
    from papermill.exceptions import PapermillExecutionError
    from papermill.iorw import papermill_io

    logging.getLogger("papermill").setLevel(logging.ERROR)
    folder = plan.folder / spec.name
    output, progress = folder / f"{spec.name}.ipynb", Progress(sys.stdout)
    papermill_io.register(str(output), SavedWhole())
    values = {"profile": plan.profile_name, "run": plan.run, "overrides": plan.overrides}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        book = filled_in(plan.notebooks / f"{spec.name}.ipynb", values | plan.parameters[spec.name])
        with whole(output) as temporary:
            nbformat.write(book, temporary)
    except OSError as error:
        raise StageError(f"{spec.name} cannot start: {fault_of(error, output)}") from error
    try:
        execute_notebook(
            book,
            output,
            kernel_name="python3",
            cwd=plan.notebooks,
            progress_bar=False,
            stdout_file=progress,
            stderr_file=progress,
            start_timeout=300,
        )
    except PapermillExecutionError as error:
        if error.ename == DeadlineReached.__name__:
            raise Paused(error.evalue) from error
        if is_sentence(error.ename):
            raise Failed(f"{spec.name}: {error.evalue or error.ename}\nNotebook: {output}") from error
        at = f"cell [{error.exec_count}]: {_first_line(error.source)}"
        trace = "\n".join(re.sub(r"\x1b\[[0-9;]*m", "", line) for line in error.traceback).splitlines()
        shown = "\n".join(trace if len(trace) <= 40 else ["...", *trace[-40:]])
        raise Failed(f"{spec.name}, {at}\n{shown or error.ename}\nNotebook: {output}") from error
    except DeadKernelError as error:
        raise Failed(
            f"{spec.name}: the kernel died (out of memory?) {_last_cell(output)}\n"
            f"Later cells never ran, whatever {output} says. Run the same command again: work that was saved is kept."
        ) from error
    except OSError as error:  # of papermill itself, as in saving the notebook: those of cells come by another way
        raise Failed(f"{spec.name}: {fault_of(error, output)}") from error


def _check_manifest(plan: RunPlan, spec: StageSpec, before: int | None) -> dict[str, Any]:
    """Return the stage.json that the notebook has just written; raises Failed if it wrote none or another one."""
    path = plan.folder / spec.name / "stage.json"
    if not path.is_file() or path.stat().st_mtime_ns == before:
        raise Failed(
            f"{spec.name} ended without finishing its stage: nothing wrote {path}. "
            f"Last it was {_last_cell(path.with_name(f'{spec.name}.ipynb'))}"
        )
    manifest = read_manifest(path.parent)
    key = settings_key(stage_settings(spec, plan.profile, plan.parameters[spec.name], plan.folder))
    if manifest["key"] != key:
        raise Failed(f"{spec.name} finished with other settings than the run's: pass all parameters on to Stage(...)")
    return manifest


def _left_out(manifest: dict[str, Any]) -> str:
    """What a stage says of rows and files that it kept out, to stand behind its status; "" where it says nothing."""
    told = manifest["metrics"].get("left_out", "")
    return f"; {told}" if told else ""


def _set_aside(folder: Path) -> Path:
    """Move a stage's folder aside, so that a forced run that fails has lost nothing.

    What was set aside before makes way for a finished stage only, not for what a failed run left.
    """
    previous = folder.with_name(f"{folder.name}.previous")
    hold_lock(folder / ".lock", f"{folder.name} of run {folder.parent.name!r}")
    release_lock(folder / ".lock")
    if previous.exists():
        manifest = read_manifest(folder)
        if not manifest or manifest["status"] != "complete":
            shutil.rmtree(folder)
            return previous
        shutil.rmtree(previous)
    put_in_place(folder, previous)
    return previous


def _gigabytes(plan: RunPlan, spec: StageSpec) -> float:
    """Return the free disk (GB) that a stage asks for: by profile, less what its folder already holds."""
    need = spec.gigabytes.get(plan.profile.name, 0.0)
    given = plan.parameters[spec.name].get(spec.disk_of) or ""
    if given and Path(given).is_dir():  # what is made of a small folder needs not a data set's disk
        need = min(need, 0.2 + 3 * folder_bytes(Path(given)) / 1e9)
    return round(max(need - folder_bytes(plan.folder / spec.name) / 1e9, 0.05), 2)


def _upstream_gap(plan: RunPlan, spec: StageSpec) -> tuple[int, str] | None:
    """Return exit code and message if an input of `spec` is missing or partly done."""
    for name in spec.inputs:
        manifest = read_manifest(find_stage(plan.folder, name))
        if manifest is None:
            lack = f"{spec.name} needs {name}, which is not done in run {plan.run!r}"
            return REFUSED, f"{lack}: start with --from {_earliest_missing(plan, name)}"
        if manifest["status"] != "complete":
            return PAUSED, f"{spec.name} waits: {name} is only partly done"
    return None


def _earliest_missing(plan: RunPlan, name: str) -> str:
    """Name the stage to begin with so that `name` can be made."""
    for other in plan.suite.spec(name).inputs:
        if read_manifest(find_stage(plan.folder, other)) is None:
            return _earliest_missing(plan, other)
    return name


def run_stage(plan: RunPlan, spec: StageSpec, place: str) -> int:
    """Run one stage unless it is done; returns an exit code. Raises StageError, Failed, or OSError before it starts."""
    folder = plan.folder / spec.name
    gap = _upstream_gap(plan, spec)
    if gap:
        print(gap[1], file=sys.stderr)
        return gap[0]
    settings = stage_settings(spec, plan.profile, plan.parameters[spec.name], plan.folder)
    manifest = read_manifest(folder) if not plan.force else None
    if not plan.force and not spec.always:
        check_conflict(folder, settings)
        if manifest and manifest["status"] == "complete":
            print(f"{place} {spec.name}: already done ({manifest['finished']}), skipped{_left_out(manifest)}")
            return DONE
        found = read_manifest(find_stage(plan.folder, spec.name))
        finished = found is not None and found["status"] == "complete"
        if not manifest and finished and not settings_differences(found["settings"], settings):
            name = find_stage(plan.folder, spec.name).parent.name
            print(f"{place} {spec.name}: taken from run {name!r}{_left_out(found)}")
            return DONE
    require_disk(plan.folder, _gigabytes(plan, spec), spec.name)
    previous = _set_aside(folder) if folder.exists() and (plan.force or spec.always) else None
    minutes = spec.minutes.get(plan.profile.name)
    print(f"{place} {spec.name}: {spec.title}" + (f" (about {minutes:g} min)" if minutes else ""), flush=True)
    path, began = folder / "stage.json", time.monotonic()
    before = path.stat().st_mtime_ns if path.is_file() else None
    try:
        execute(plan, spec)
        manifest = _check_manifest(plan, spec, before)
    except Paused as pause:
        print(f"  {spec.name}: {pause}", flush=True)
        return PAUSED
    except OSError as error:
        raise Failed(f"{spec.name}: {fault_of(error, folder)}") from error
    except (Failed, StageError) as error:
        kept = f"\nThe earlier result is kept in {previous}" if previous and not spec.always else ""
        raise type(error)(f"{error}{kept}") from error
    status = manifest["status"]
    print(f"  {spec.name}: {status} in {time.monotonic() - began:.0f} s{_left_out(manifest)}", flush=True)
    if status == "complete":
        shutil.rmtree(folder.with_name(f"{folder.name}.previous"), ignore_errors=True)
    return DONE if status == "complete" else PAUSED


def forecast_stage(plan: RunPlan, spec: StageSpec) -> quota.Forecast:
    """Forecast a stage of the plan; a forced one begins anew."""
    if plan.force:
        return quota.from_minutes(spec, plan.profile)
    return quota.forecast(spec, plan.profile, plan.folder, copies=plan.copies(spec))


def say_budget(found: quota.Budget, said: set[str]) -> None:
    """Print the budget and the warnings that were not `said` before."""
    print(f"Quota: {found.sentence()}")
    for warning in found.warnings:
        if warning not in said:
            print(f"  Warning: {warning}", file=sys.stderr)
    said.update(found.warnings)


def _within_quota(plan: RunPlan, spec: StageSpec, place: str, deadline: float, said: set[str]) -> int:
    """Run one stage if it, or a useful part of it, fits into the week's GPU-hours; returns an exit code.

    A stage that can stop after a few steps is first measured with them. They are kept, so only its start is paid twice.
    """

    def decide(forecast: quota.Forecast) -> bool:
        found = quota.read_budget(plan.weekly_hours, plan.suite.weekly_hours)
        say_budget(found, said)
        ends = min(deadline, quota.deadline(found, time.time(), session_end()))
        os.environ["SUITE_DEADLINE"] = str(ends)
        decision = quota.decide(forecast, time.time(), ends)
        print(f"  {decision.words}", flush=True)
        if not decision.fits:
            print(f"  {quota.outlook([forecast], found, time.time())}", flush=True)
        return decision.start

    forecast = forecast_stage(plan, spec)
    if forecast.seconds and not decide(forecast):
        return PAUSED
    if spec.probe and forecast.seconds and not forecast.measured:
        print(f"  {spec.name}: measuring its pace first; what it does meanwhile is kept", flush=True)
        os.environ["SUITE_PROBE_STEPS"] = str(quota.PROBE_STEPS)
        try:
            code = run_stage(plan, spec, place)
        finally:
            del os.environ["SUITE_PROBE_STEPS"]
        plan = replace(plan, force=False)  # what was measured is gone on with
        forecast = forecast_stage(plan, spec)
        if code != PAUSED or not forecast.measured:  # done, refused, or out of time before the first step
            return code
        if not decide(forecast):
            return PAUSED
    return run_stage(plan, spec, place)


def run(plan: RunPlan, deadline: float = math.inf) -> int:
    """Run the planned stages in order and write the report; returns the exit code.

    deadline: when to save and stop, in seconds since 1970; the platform's and the quota's own limits come on top.
    Raises StageError for what the operating system refuses before a kernel starts, Failed for what it refuses then.
    """
    try:
        return _run(plan, deadline)
    except DiskFull:
        raise
    except OSError as error:
        told = fault_of(error, plan.folder)
        raise StageError(f"{told} (RUNS_ROOT, if set, names another folder for all runs)") from error


def _run(plan: RunPlan, deadline: float) -> int:
    """Do what `run` says."""
    limited, said = quota.limited(plan.weekly_hours), set()
    locks = [runs_root() / ".lock", plan.folder / ".lock"]  # kaggle's commands share a workspace, but not a run
    try:
        hold_lock(locks[0], f"workspace {runs_root()}", instead="set RUNS_ROOT to another folder")
        hold_lock(locks[1], f"run {plan.run!r}")
        if plan.upstream:
            write_text(plan.folder / "upstream", plan.upstream + "\n")
        for spec in plan.specs if not plan.force else []:
            if (plan.folder / spec.name).is_dir() and not spec.always:
                step_back(plan.folder / spec.name)
        print(f"Run {plan.run!r}, profile {plan.profile.name!r}, in {plan.folder}", flush=True)
        take_from_drive(plan)
        code = DONE
        with _environment(), quota.metered(session_seconds) if gpus() else nullcontext():
            for number, spec in enumerate(plan.specs, 1):
                place, ends = f"[{number}/{len(plan.specs)}]", min(deadline, session_end())
                os.environ["SUITE_DEADLINE"] = str(ends)
                if time.time() >= ends:
                    print(f"{spec.name} waits: the deadline has passed", file=sys.stderr)
                    code = PAUSED
                else:
                    code = _within_quota(plan, spec, place, ends, said) if limited else run_stage(plan, spec, place)
                    keep_on_drive(plan, spec)
                if code:
                    break
        if code == PAUSED:
            print(f"Paused. To go on: {shlex.join(plan.again)}")
        if code == REFUSED:
            return code
        try:
            report = write_report(plan.suite, plan.folder, plan.profile)
        except OSError as error:
            raise Failed(f"the report is not written: {fault_of(error, plan.folder / 'report.html')}") from error
        if code == DONE:
            print_scores(plan.suite, plan.folder)
        print(f"Report: {report}")
        return code
    finally:
        for lock in locks:
            release_lock(lock)
