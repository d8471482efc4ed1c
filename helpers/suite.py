"""The runner behind run_all.sh: runs the notebooks of suite.yaml as stages, in order, and reports what came out."""

import argparse
import ast
import importlib
import json
import logging
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TextIO

import nbformat
import yaml

from helpers import quota
from helpers.config import ConfigError, Profile, load_profile, nearest, parse_override, profile_keys
from helpers.stage import (
    COMMON_PARAMETERS,
    StageError,
    StageSpec,
    Suite,
    check_conflict,
    find_stage,
    hold_lock,
    load_suite,
    read_manifest,
    release_lock,
    settings_key,
    stage_settings,
    suite_file,
)
from helpers.workspace import (
    DeadlineReached,
    DiskFull,
    copy_verified,
    drive_runs,
    gpus,
    repo_root,
    require_disk,
    runs_root,
    session_end,
    session_seconds,
    share_secrets,
)

DONE, FAILED, REFUSED, PAUSED, INTERRUPTED = 0, 1, 2, 75, 130
EXIT_CODES = """exit codes:
  0    done: every stage asked for is complete
  1    a notebook failed; its name, cell and error are printed. A kernel that died (often: out of memory) counts too
  2    refused before the stage's kernel started: bad usage, parameter or profile; another run at work in the
       same workspace; a stage finished with other settings; an upstream stage missing; too little disk
  75   paused: a deadline passed, too few GPU-hours are left, or an upstream stage is only partly done; the command
       that goes on is printed
  130  interrupted by Ctrl-C; the same command goes on"""
COMMANDS = """commands (each has its own --help):
  ./run_all.sh [options]       run the notebooks as below; the default
  ./run_all.sh test [ARGS]     ruff and the test suite; ARGS go to pytest
  ./run_all.sh test --against NAME [ARGS]
                               the fast tests and the tiny notebooks under a platform's packages: kaggle-2026-05,
                               colab-2026-07, colab-2026-08, lowest
  ./run_all.sh bench [NAME]    the benchmarks, as ratios; results also as JSON
  ./run_all.sh quota [options] GPU-hours used and left this week, what each stage will take; --figure draws the weeks
  ./run_all.sh score           score a result file of ScienceQA, anyone's, against gold answers; prints JSON
  ./run_all.sh make-shapes     write a fresh built-in world as GIF files and a CSV
  ./run_all.sh kaggle          push the stages to Kaggle, watch, fetch and resume them
  ./run_all.sh readme          write the README's table of notebooks from suite.yaml

examples:
  ./run_all.sh
  ./run_all.sh --gifs my_gifs --qa my_gifs/qa.csv --holdout 0.2
  ./run_all.sh --gifs my_gifs --qa my_gifs/qa.csv --bundle runs/tiny/03_adapter_training/bundle
  ./run_all.sh --run small-rank --upstream tiny -p language_model.lora_rank 4
"""


class Failed(RuntimeError):
    """A notebook that did not finish its stage."""


class Paused(RuntimeError):
    """A notebook that stopped at the deadline; what it has done is kept."""


@dataclass(frozen=True)
class Plan:
    """All that a run needs, checked before any kernel starts."""

    suite: Suite
    specs: list[StageSpec]
    notebooks: Path
    profile_name: str
    profile: Profile
    overrides: dict[str, Any]
    run: str
    parameters: dict[str, dict[str, Any]]  # by stage: the notebook's own parameters, defaults included
    force: bool = False
    upstream: str = ""
    weekly_hours: float | None = None  # GPU-hours a week that the user allows; None: the account's or the suite's
    again: list[str] = field(default_factory=list)  # the command line that goes on after a pause

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return runs_root() / self.run


# ---------------------------------------------------------------------------------------------- parameters


def read_parameters(notebook: Path) -> dict[str, Any]:
    """Return name and default of each parameter in a notebook's cell tagged `parameters`; nothing is executed."""
    cells = nbformat.read(notebook, as_version=4).cells
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise ConfigError(f"{notebook.name}: expected one cell tagged 'parameters', found {len(tagged)}")
    values = {}
    for node in ast.parse(tagged[0].source).body:
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise ConfigError(
                f"{notebook.name}: the parameters cell may hold only lines like `name = value  # meaning`"
            )
        try:
            values[node.targets[0].id] = ast.literal_eval(node.value)
        except ValueError as error:
            raise ConfigError(f"{notebook.name}: parameter {node.targets[0].id} is not a plain value") from error
    return values


def parse_parameter(name: str, text: str, default: Any) -> Any:
    """Read the command line's `text` as a value of `default`'s type, which decides: 007 and 1e-4 are safe."""
    kind = type(default)
    wrong = ConfigError(f"parameter {name}: {text!r} is not a valid {kind.__name__} (default: {default!r})")
    if kind is str:
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise wrong
        return text.lower() == "true"
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise wrong from None
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise wrong from None
    if default is not None and not isinstance(value, kind):
        raise wrong
    return value


def sort_parameters(
    pairs: Sequence[tuple[str, str]], declared: dict[str, dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Split -p pairs into profile overrides and parameters by stage; `declared` holds each notebook's defaults.

    Raises ConfigError for an unknown name, with the nearest valid one, and for a value of the wrong type.
    """
    overrides: dict[str, Any] = {}
    parameters = {stage: dict(defaults) for stage, defaults in declared.items()}
    own = sorted({name for defaults in declared.values() for name in defaults})
    keys = [key for key in profile_keys() if "." in key]
    for name, text in pairs:
        if name in COMMON_PARAMETERS:
            raise ConfigError(f"-p {name}: use --profile, --run, or -p SECTION.KEY VALUE")
        if name in keys:
            overrides[name] = parse_override(name, text)
        elif name in own:
            for stage, defaults in declared.items():
                if name in defaults:
                    parameters[stage][name] = parse_parameter(name, text, defaults[name])
        else:
            short = [key for key in keys if key.rpartition(".")[2] == name]
            hint = f"did you mean {short[0]!r}?" if short else nearest(name, own + keys)
            raise ConfigError(f"unknown parameter {name!r}; {hint}")
    return overrides, parameters


# ---------------------------------------------------------------------------------------------------- plan


def _select(suite: Suite, only: list[str], start: str) -> list[StageSpec]:
    """Choose the stages to run; names may be shortened to a unique beginning such as `03`."""

    def resolve(text: str) -> str:
        names = [spec.name for spec in suite.stages]
        found = [name for name in names if name.startswith(text.removesuffix(".ipynb"))]
        if len(found) != 1:
            raise ConfigError(f"unknown stage {text!r}; {nearest(text, names)}")
        return found[0]

    if only:
        chosen = {resolve(text) for text in only}
        return [spec for spec in suite.stages if spec.name in chosen]
    default = [spec for spec in suite.stages if spec.default]
    if not start:
        return default
    first = resolve(start)
    names = [spec.name for spec in default]
    if first not in names:
        raise ConfigError(f"{first} is not part of the default run; run it with --only {first}")
    return default[names.index(first) :]


def _slug(text: str) -> str:
    """Turn a folder's name into a part of a run's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "gifs"


def _existing(text: str, what: str) -> str:
    """Return `text` as an absolute path; raises ConfigError if there is nothing there."""
    path = Path(text).expanduser().resolve()
    if not path.exists():
        raise ConfigError(f"{what} {text} does not exist")
    return str(path)


def _user_inputs(args: argparse.Namespace) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Turn --gifs, --qa, --holdout and --bundle into parameters by stage and profile overrides, as text."""
    parameters: dict[str, dict[str, str]] = {}
    overrides: dict[str, str] = {}
    if args.holdout is not None and not args.qa:
        raise ConfigError("--holdout applies to your own questions: give --gifs FOLDER and --qa FILE.csv too")
    if bool(args.gifs) != bool(args.qa):
        raise ConfigError("--gifs and --qa belong together: --gifs FOLDER --qa FILE.csv")
    if args.gifs:
        data = {"gifs": _existing(args.gifs, "--gifs"), "qa": _existing(args.qa, "--qa")}
        if Path(data["qa"]).is_file():  # a folder of question files belongs to the profile's own corpus
            overrides["data.corpus"] = "own_gifs"
        if args.bundle and args.holdout is None:
            data["holdout"] = "1.0"
        elif args.holdout is not None:
            data["holdout"] = args.holdout
        parameters["01_data_sharding"] = data
        if Path(data["gifs"]).is_dir():
            parameters["08_demo"] = {"gallery": data["gifs"]}
    if args.bundle:
        parameters["03_adapter_training"] = {"bundle": _existing(args.bundle, "--bundle")}
    return parameters, overrides


def _require_bundle(folder: Path, profile: Profile) -> None:
    """Refuse a bundle that this run cannot score; weights themselves are compared when they are loaded."""
    try:
        facts = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
        video = facts["video"]
        trained = {part: facts[part]["model"] for part in ("encoder", "language_model") if video}
    except OSError as error:
        raise ConfigError(f"--bundle {folder} holds no bundle.json; give the folder that notebook 03 made") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--bundle {folder}: bundle.json is not readable as a bundle's ({error!r})") from error
    if not video:
        raise ConfigError(f"--bundle {folder} is a blind bundle, which sees no GIF: give the `bundle` folder beside it")
    for part, name in trained.items():
        ours = getattr(profile, part).model
        if name != (Path(ours).name if Path(ours).is_absolute() else ours):
            raise ConfigError(
                f"--bundle {folder} was trained on the {part.replace('_', ' ')} {name}, but profile {profile.name} has "
                f"{ours}: choose its profile, or -p {part}.model {name}"
            )


def make_plan(args: argparse.Namespace, argv: Sequence[str]) -> Plan:
    """Check everything that can be checked before a kernel starts; raises ConfigError or StageError."""
    suite = load_suite(suite_file())
    notebooks = suite_file().parent
    specs = _select(suite, args.only, args.start)
    declared = {}
    for spec in specs:
        notebook = notebooks / f"{spec.name}.ipynb"
        if not notebook.is_file():
            raise ConfigError(f"{spec.name} is listed in {suite_file().name}, but {notebook} does not exist")
        declared[spec.name] = read_parameters(notebook)
        missing = [name for name in COMMON_PARAMETERS if name not in declared[spec.name]]
        if missing:
            raise ConfigError(f"{spec.name}: the parameters cell lacks {', '.join(missing)}")
    own = {
        stage: {name: value for name, value in defaults.items() if name not in COMMON_PARAMETERS}
        for stage, defaults in declared.items()
    }
    overrides, parameters = sort_parameters(args.parameters, own)
    given, texts = _user_inputs(args)
    overrides |= {key: parse_override(key, text) for key, text in texts.items() if key not in overrides}
    for stage, values in given.items():
        for name, text in values.items() if stage in own else ():
            if name not in own[stage]:
                raise ConfigError(f"{stage} has no parameter {name!r}")
            parameters[stage][name] = parse_parameter(name, text, own[stage][name])
    profile_name = str(Path(args.profile).resolve()) if args.profile.endswith((".yaml", ".yml")) else args.profile
    profile = load_profile(profile_name, overrides)
    if args.bundle:
        _require_bundle(Path(args.bundle).expanduser(), profile)
    run = args.run or profile.name
    if not args.run and args.gifs:
        run += f"-{_slug(Path(args.gifs).name)}"
    if not args.run and args.bundle:
        run += "-scored"
    for name in filter(None, (run, args.upstream)):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise ConfigError(f"run name {name!r}: use letters, digits, dot, dash and underscore")
    if args.upstream and not (runs_root() / args.upstream).is_dir():
        raise ConfigError(f"--upstream {args.upstream}: there is no such run in {runs_root()}")
    return Plan(
        suite=suite,
        specs=specs,
        notebooks=notebooks,
        profile_name=profile_name,
        profile=profile,
        overrides=overrides,
        run=run,
        parameters=parameters,
        force=args.force,
        upstream=args.upstream,
        weekly_hours=args.weekly_hours,
        again=["./run_all.sh", *_without(argv, {"--force": 0, "--deadline": 1})],
    )


def _without(argv: Sequence[str], drop: dict[str, int]) -> list[str]:
    """Return the command line without the options in `drop` (option: number of values)."""
    kept, skip = [], 0
    for word in argv:
        if skip:
            skip -= 1
        elif word in drop:
            skip = drop[word]
        elif word.partition("=")[0] not in drop:
            kept.append(word)
    return kept


def parse_deadline(text: str, now: datetime | None = None) -> float:
    """Turn minutes from now, or HH:MM (the next time the local clock shows it), into seconds since 1970."""
    now = now or datetime.now()
    if match := re.fullmatch(r"(\d{1,2}):(\d{2})", text):
        hour, minute = int(match[1]), int(match[2])
        if hour < 24 and minute < 60:
            then = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
            return (then if then > now else then + timedelta(days=1)).timestamp()
    elif re.fullmatch(r"\d+(\.\d+)?", text) and float(text) > 0:
        return now.timestamp() + 60 * float(text)
    raise ConfigError(f"--deadline {text!r}: give minutes from now (90) or a time of day (17:30)")


# --------------------------------------------------------------------------------------------------- running


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


@contextmanager
def _environment() -> Iterator[None]:
    """Set what the kernels inherit: quiet libraries, secrets, and a python3 kernel of this very interpreter.

    JUPYTER_PATH comes before a user's own kernel folders, where `python3` may be another environment.
    """
    from ipykernel.kernelspec import get_kernel_dict

    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder) / "kernels" / "python3" / "kernel.json"
        spec.parent.mkdir(parents=True)
        # above errors, since a kernel reports as one the interrupt with which it is shut down; errors of cells come by
        # another way, and a kernel that dies is noticed
        spec.write_text(json.dumps(get_kernel_dict(extra_arguments=["--log-level=50"])))
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
    code = [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    began = [number for number, cell in enumerate(code) if cell.metadata.get("papermill", {}).get("start_time")]
    return f"in cell [{began[-1] + 1}]: {_first_line(code[began[-1]].source)}" if began else "before its first cell"


def _first_line(source: str) -> str:
    return next((line for line in source.splitlines() if line.strip()), "")


def execute(plan: Plan, spec: StageSpec) -> None:
    """Run one notebook in a fresh kernel and save it, executed, in the stage's folder; raises Failed or Paused."""
    from nbclient.exceptions import DeadKernelError
    from papermill import execute_notebook
    from papermill.exceptions import PapermillExecutionError

    logging.getLogger("papermill").setLevel(logging.ERROR)
    folder = plan.folder / spec.name
    folder.mkdir(parents=True, exist_ok=True)
    output, progress = folder / f"{spec.name}.ipynb", Progress(sys.stdout)
    values = {"profile": plan.profile_name, "run": plan.run, "overrides": plan.overrides}
    try:
        execute_notebook(
            plan.notebooks / f"{spec.name}.ipynb",
            output,
            values | plan.parameters[spec.name],
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
        at = f"cell [{error.exec_count}]: {_first_line(error.source)}"
        trace = "\n".join(re.sub(r"\x1b\[[0-9;]*m", "", line) for line in error.traceback).splitlines()
        shown = "\n".join(trace if len(trace) <= 40 else ["...", *trace[-40:]])
        raise Failed(f"{spec.name}, {at}\n{shown or error.ename}\nNotebook: {output}") from error
    except DeadKernelError as error:
        raise Failed(
            f"{spec.name}: the kernel died (out of memory?) {_last_cell(output)}\n"
            f"Later cells never ran, whatever {output} says. Run the same command again: work that was saved is kept."
        ) from error


def _check_manifest(plan: Plan, spec: StageSpec, before: int | None) -> dict[str, Any]:
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
    folder.rename(previous)
    return previous


def _gigabytes(plan: Plan, spec: StageSpec) -> float:
    """Return the free disk (GB) that a stage asks for: by profile, less what its folder already holds."""
    need = spec.gigabytes.get(plan.profile.name, 0.0)
    gifs = plan.parameters[spec.name].get("gifs", "")
    if plan.profile.data.corpus == "own_gifs" and gifs:  # frames of a small folder need not a data set's disk
        need = min(need, 0.2 + 3 * _bytes(Path(gifs)) / 1e9)
    return round(max(need - _bytes(plan.folder / spec.name) / 1e9, 0.05), 2)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _upstream_gap(plan: Plan, spec: StageSpec) -> tuple[int, str] | None:
    """Return exit code and message if an input of `spec` is missing or partly done."""
    for name in spec.inputs:
        manifest = read_manifest(find_stage(plan.folder, name))
        if manifest is None:
            lack = f"{spec.name} needs {name}, which is not done in run {plan.run!r}"
            return REFUSED, f"{lack}: start with --from {_earliest_missing(plan, name)}"
        if manifest["status"] != "complete":
            return PAUSED, f"{spec.name} waits: {name} is only partly done"
    return None


def _earliest_missing(plan: Plan, name: str) -> str:
    """Name the stage to begin with so that `name` can be made."""
    for other in plan.suite.spec(name).inputs:
        if read_manifest(find_stage(plan.folder, other)) is None:
            return _earliest_missing(plan, other)
    return name


def run_stage(plan: Plan, spec: StageSpec, place: str) -> int:
    """Run one stage unless it is done; returns an exit code. Raises StageError, DiskFull or Failed."""
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
            print(f"{place} {spec.name}: already done ({manifest['finished']}), skipped")
            return DONE
        found = read_manifest(find_stage(plan.folder, spec.name))
        if not manifest and found and found["status"] == "complete" and found["key"] == settings_key(settings):
            print(f"{place} {spec.name}: taken from run {find_stage(plan.folder, spec.name).parent.name!r}")
            return DONE
    require_disk(plan.folder, _gigabytes(plan, spec), spec.name)
    previous = _set_aside(folder) if folder.exists() and (plan.force or spec.always) else None
    minutes = spec.minutes.get(plan.profile.name)
    print(f"{place} {spec.name}: {spec.title}" + (f" (about {minutes:g} min)" if minutes else ""), flush=True)
    path, began = folder / "stage.json", time.monotonic()
    before = path.stat().st_mtime_ns if path.is_file() else None
    try:
        execute(plan, spec)
        status = _check_manifest(plan, spec, before)["status"]
    except Paused as pause:
        print(f"  {spec.name}: {pause}", flush=True)
        return PAUSED
    except Failed as error:
        kept = f"\nThe earlier result is kept in {previous}" if previous and not spec.always else ""
        raise Failed(f"{error}{kept}") from error
    print(f"  {spec.name}: {status} in {time.monotonic() - began:.0f} s", flush=True)
    if status == "complete":
        shutil.rmtree(folder.with_name(f"{folder.name}.previous"), ignore_errors=True)
    return DONE if status == "complete" else PAUSED


def _forecast(plan: Plan, spec: StageSpec) -> quota.Forecast:
    """Forecast a stage of the plan; a forced one begins anew."""
    if plan.force:
        return quota.from_minutes(spec, plan.profile)
    bundle = bool(plan.parameters[spec.name].get("bundle"))
    return quota.forecast(spec, plan.profile, plan.folder, given_bundle=bundle)


def _say_budget(found: quota.Budget, said: set[str]) -> None:
    """Print the budget and the warnings that were not `said` before."""
    print(f"Quota: {found.sentence()}")
    for warning in found.warnings:
        if warning not in said:
            print(f"  Warning: {warning}", file=sys.stderr)
    said.update(found.warnings)


def _within_quota(plan: Plan, spec: StageSpec, place: str, deadline: float, said: set[str]) -> int:
    """Run one stage if it, or a useful part of it, fits into the week's GPU-hours; returns an exit code.

    A stage that can stop after a few steps is first measured with them. They are kept, so only its start is paid twice.
    """

    def decide(forecast: quota.Forecast) -> bool:
        found = quota.read_budget(plan.weekly_hours, plan.suite.weekly_hours)
        _say_budget(found, said)
        ends = min(deadline, quota.deadline(found, time.time(), session_end()))
        os.environ["SUITE_DEADLINE"] = str(ends)
        decision = quota.decide(forecast, time.time(), ends)
        print(f"  {decision.words}", flush=True)
        if not decision.fits:
            print(f"  {quota.outlook([forecast], found, time.time())}", flush=True)
        return decision.start

    forecast = _forecast(plan, spec)
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
        forecast = _forecast(plan, spec)
        if code != PAUSED or not forecast.measured:  # done, refused, or out of time before the first step
            return code
        if not decide(forecast):
            return PAUSED
    return run_stage(plan, spec, place)


def _from_drive(plan: Plan) -> None:
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


def _to_drive(plan: Plan, spec: StageSpec) -> None:
    """On Colab, keep a stage on Drive that is complete or was paused; a failure is told and stops nothing.

    A session's own disk is lost with it, so that a paused stage could not go on in the next one.
    """
    kept, folder = drive_runs(), plan.folder / spec.name
    if kept is None or not (folder / "stage.json").is_file():
        return
    try:
        require_disk(kept, _bytes(folder) / 1e9, f"keeping {spec.name} on Drive")
        copy_verified(folder, kept / plan.run / spec.name)
    except OSError as error:
        print(f"  Warning: {spec.name} is not kept on Drive: {error}. The same command tries again.", file=sys.stderr)


def run(plan: Plan, deadline: float = math.inf) -> int:
    """Run the planned stages in order and write the report; returns the exit code.

    deadline: when to save and stop, in seconds since 1970; the platform's and the quota's own limits come on top.
    """
    from helpers.report import print_scores, write_report

    limited, said = quota.limited(plan.weekly_hours), set()
    locks = [runs_root() / ".lock", plan.folder / ".lock"]  # kaggle's commands share a workspace, but not a run
    try:
        hold_lock(locks[0], f"workspace {runs_root()}", instead="set RUNS_ROOT to another folder")
        hold_lock(locks[1], f"run {plan.run!r}")
        if plan.upstream:
            (plan.folder / "upstream").write_text(plan.upstream + "\n", encoding="utf-8")
        print(f"Run {plan.run!r}, profile {plan.profile.name!r}, in {plan.folder}", flush=True)
        _from_drive(plan)
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
                    _to_drive(plan, spec)
                if code:
                    break
        if code == PAUSED:
            print(f"Paused. To go on: {shlex.join(plan.again)}")
        if code == REFUSED:
            return code
        report = write_report(plan.suite, plan.folder, plan.profile)
        if code == DONE:
            print_scores(plan.folder)
        print(f"Report: {report}")
        return code
    finally:
        for lock in locks:
            release_lock(lock)


# -------------------------------------------------------------------------------------------- other commands


def run_tests(arguments: Sequence[str]) -> int:
    """Run ruff's two checks and pytest, all three even if one fails; returns the first failing exit code.

    `--against NAME` runs the fast tests under the package set of a platform instead, in an environment of its own.
    """
    root, python = repo_root(), sys.executable
    if arguments[:1] == ["--against"]:
        return subprocess.run([python, "-m", "tests.constraints", *arguments[1:]], cwd=root).returncode
    commands = [
        [python, "-m", "ruff", "check", "."],
        [python, "-m", "ruff", "format", "--check", "."],
        [python, "-m", "pytest", "--durations=15", *arguments],
    ]
    codes = []
    for command in commands:
        print("$", shlex.join(command[2:]), flush=True)
        codes.append(subprocess.run(command, cwd=root).returncode)
    return next((code for code in codes if code), 0)


README_MARKS = ("<!-- notebooks:start -->", "<!-- notebooks:end -->")
BRANCH = "main"  # the one that badges open


def badges(repository: str, notebook: str) -> str:
    """Return the badges that open a notebook of a GitHub repository on Colab and on Kaggle."""
    blob = f"{repository}/blob/{BRANCH}/notebooks/{notebook}.ipynb"
    colab = blob.replace("https://github.com/", "https://colab.research.google.com/github/")
    return (
        f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab}) "
        f"[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]"
        f"(https://www.kaggle.com/notebooks/welcome?src={blob})"
    )


def notebook_table(suite: Suite) -> str:
    """Return what the README takes from suite.yaml: the table of notebooks and, of a public repository, the way to it.

    Badges and the clone command need the repository's address and are left out while it is not set.
    """
    repository = suite.repository
    head = ["Notebook", "What it does", "Needs", "Makes", "GPU", "Minutes: tiny", "kaggle"]
    head += ["Open"] if repository else []
    lines = ["```bash", f"git clone {repository}", "```", ""] if repository else []
    lines += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for spec in suite.stages:
        cells = [
            f"[{spec.name}](notebooks/{spec.name}.ipynb)",
            spec.about,
            spec.needs,
            spec.makes,
            "yes" if spec.gpu else "no",
            *(f"{spec.minutes[profile]:g}" for profile in ("tiny", "kaggle")),
            *([badges(repository, spec.name)] if repository else []),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def update_readme(readme: Path, suite: Suite) -> bool:
    """Write the table of notebooks between the README's markers; returns whether the file changed."""
    text = readme.read_text(encoding="utf-8")
    start, end = README_MARKS
    if text.count(start) != 1 or text.count(end) != 1:
        raise ConfigError(f"{readme} must hold {start} and {end} once each")
    head, tail = text.split(start)[0], text.split(end)[1]
    new = f"{head}{start}\n{notebook_table(suite)}\n{end}{tail}"
    if new != text:
        readme.write_text(new, encoding="utf-8")
    return new != text


def make_shapes(arguments: Sequence[str]) -> int:
    """Write a fresh built-in world in the own-GIFs format (GIF files and qa.csv)."""
    parser = argparse.ArgumentParser(prog="run_all.sh make-shapes", description=make_shapes.__doc__)
    parser.add_argument("--seed", type=int, default=1, help="another seed, another world (default: 1)")
    parser.add_argument("--train", type=int, default=2000, help="training GIFs, an even number (default: 2000)")
    parser.add_argument("--test", type=int, default=400, help="test GIFs, an even number (default: 400)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; it must be new or empty")
    args = parser.parse_args(arguments)
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        parser.error(f"--out {args.out} is not an empty folder")
    if args.seed < 0 or args.train < 0 or args.test < 0 or args.train + args.test == 0:
        parser.error("--seed, --train and --test must not be negative, and there must be at least one GIF")
    if args.train % 2 or args.test % 2:
        parser.error("--train and --test must be even: GIFs come in pairs that answer the same questions differently")
    write_own_gifs = importlib.import_module("helpers.corpora.shapes").write_own_gifs
    write_own_gifs(args.out, seed=args.seed, train=args.train, test=args.test)
    print(f"Wrote {args.train + args.test} GIFs and their questions to {args.out}")
    print(f"Use them: ./run_all.sh --gifs {shlex.quote(str(args.out))} --qa {shlex.quote(str(args.out / 'qa.csv'))}")
    return DONE


def show_quota(arguments: Sequence[str]) -> int:
    """Print GPU-hours used and left this week and what each stage of the run will still take."""
    parser = run_parser()
    parser.prog, parser.description, parser.epilog = "run_all.sh quota", show_quota.__doc__, None
    parser.add_argument("--figure", type=Path, default=None, metavar="PNG", help="draw the weeks that the run takes")
    parser.add_argument(
        "--lifetime",
        type=parse_hours,
        default=math.inf,
        metavar="H",
        help="draw it with sessions that die after H hours in the mean",
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed, other deaths (default: 0)")
    args = parser.parse_args(arguments)
    plan = make_plan(args, arguments)
    print("GPU here:", ", ".join(gpu.name for gpu in gpus()) or "none: what counts is what is pushed to Kaggle")
    found = quota.read_budget(plan.weekly_hours, plan.suite.weekly_hours, running=quota.begun_on_kaggle())
    _say_budget(found, set())
    forecasts = [_forecast(plan, spec) for spec in plan.specs]
    print(f"\nWhat run {plan.run!r} will still take, profile {plan.profile.name!r}:")
    print(quota.forecast_table(forecasts).to_string(index=False))
    costly, now = [forecast for forecast in forecasts if forecast.gpu], time.time()
    print(f"\n{quota.outlook(costly, found, now)}")
    if args.figure:
        from helpers.plots import quota_weeks, save_figure

        pieces = quota.plan_sessions(costly, found, now, args.lifetime, args.seed)
        print("Figure:", save_figure(quota_weeks(pieces, found.total / 3600, found.refresh), args.figure))
    return DONE


def score(arguments: Sequence[str]) -> int:
    """Score a result file against gold answers and print one JSON object: accuracy, correct, total, subgroups."""
    parser = argparse.ArgumentParser(prog="run_all.sh score", description=score.__doc__, allow_abbrev=False)
    parser.add_argument("corpus", choices=["scienceqa"], help="what the results are of")
    parser.add_argument("results", type=Path, metavar="RESULTS.json", help="results, outputs, or correct and incorrect")
    accepted = "problems.json, LLaVA's list, or a folder with either"
    parser.add_argument("--gold", type=Path, required=True, metavar="GOLD", help=accepted)
    parser.add_argument("--split", default="test", help="the gold's split to score (default: test)")
    args = parser.parse_args(arguments)
    scienceqa = importlib.import_module("helpers.scoring_scienceqa")
    try:
        gold = scienceqa.read_gold(args.gold, args.split)
        print(json.dumps(scienceqa.score_results(scienceqa.read_results(args.results), gold), indent=2))
    except ValueError as error:  # the reader's own errors say which file and what to do
        raise ConfigError(str(error)) from error
    return DONE


def parse_hours(text: str) -> float:
    """Read a number of hours of a week; raises ValueError if it is none."""
    hours = float(text)
    if not 0 < hours <= 168:
        raise ValueError
    return hours


def run_parser() -> argparse.ArgumentParser:
    """Return the parser of the default command."""
    parser = argparse.ArgumentParser(
        prog="run_all.sh",
        description="Run the notebooks in order, headless: from raw GIFs to scored answers. Finished stages are "
        "skipped; a run that was stopped, by whatever, goes on with the same command.",
        epilog=COMMANDS + "\n" + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--profile", default="", metavar="NAME", help="tiny, kaggle, colab, datacenter or a .yaml file")
    add("--run", default="", metavar="NAME", help="name of the run, its folder in runs/ (default: the profile's name)")
    add("--from", dest="start", default="", metavar="STAGE", help="first stage to look at, e.g. 03 (earlier: as found)")
    add("--only", action="append", default=[], metavar="STAGE", help="run this stage only; may be repeated")
    add("--force", action="store_true", help="run the chosen stages again and replace what they made")
    add(
        "-p",
        dest="parameters",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="set a notebook parameter, or a profile key such as training.epochs; may be repeated",
    )
    add(
        "--upstream",
        default="",
        metavar="RUN",
        help="take stages that were done with the same settings from another run",
    )
    add("--gifs", default="", metavar="FOLDER", help="your own GIFs (with --qa)")
    add("--qa", default="", metavar="CSV", help="your questions: columns gif,task,question,answer,options[,split]")
    add("--holdout", default=None, metavar="F", help="share of your GIFs kept for the test if there is no split column")
    add("--bundle", default="", metavar="DIR", help="a trained bundle: nothing is trained, it is only scored")
    add("--deadline", default="", metavar="WHEN", help="HH:MM or minutes from now: save, pause and exit 75 by then")
    add(
        "--weekly-hours",
        type=parse_hours,
        default=None,
        metavar="H",
        help="GPU-hours a week to keep within (default: on Kaggle the account's, elsewhere no limit)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        match argv[:1]:
            case ["test"]:
                return run_tests(argv[1:])
            case ["bench"]:
                return subprocess.run([sys.executable, "-m", "tests.benchmarks", *argv[1:]], cwd=repo_root()).returncode
            case ["quota"]:
                return show_quota(argv[1:])
            case ["score"]:
                return score(argv[1:])
            case ["make-shapes"]:
                return make_shapes(argv[1:])
            case ["kaggle"]:
                return importlib.import_module("helpers.kaggle").main(argv[1:])
            case ["readme"]:
                changed = update_readme(repo_root() / "README.md", load_suite(suite_file()))
                print("README.md: table of notebooks", "updated" if changed else "already up to date")
                return DONE
        args = run_parser().parse_args(argv)
        deadline = parse_deadline(args.deadline) if args.deadline else math.inf
        return run(make_plan(args, argv), deadline)
    except (ConfigError, StageError, DiskFull) as error:
        print(f"Refused: {error}", file=sys.stderr)
        return REFUSED
    except Failed as error:
        print(f"Failed: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on.", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
