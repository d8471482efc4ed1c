"""The plan of a run: its command line, checked in full before any kernel starts."""

import argparse
import ast
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from pprint import pformat
from types import MappingProxyType
from typing import Any

import nbformat
from nbformat import NotebookNode

from helpers.config import (
    ConfigError,
    Profile,
    is_removed,
    load_profile,
    nearest,
    parse_override,
    profile_keys,
    read_typed,
)
from helpers.runner.outcome import EXIT_CODES
from helpers.stage.suite import COMMON_PARAMETERS, StageSpec, Suite, load_suite, model_of, suite_file
from helpers.workspace.names import shown
from helpers.workspace.place import runs_root
from helpers.workspace.weights import ModelNotFound, find_model

HELP = """examples:
  ./run_all.sh                                               the built-in world, on this machine
  ./run_all.sh --gifs my_gifs --qa my_gifs/qa.csv            your own GIFs and questions
  ./run_all.sh --only 03 --run long -p training.epochs 9     one stage, with something changed

other commands (each has its own --help):
  ./run_all.sh test            check style and run the tests
  ./run_all.sh bench [NAME]    the benchmarks, as ratios
  ./run_all.sh quota           GPU-hours used and left this week, and what each stage will take
  ./run_all.sh kaggle          push the stages to Kaggle, watch, fetch and resume them
  ./run_all.sh score           score a result file of ScienceQA, anyone's
  ./run_all.sh make-shapes     write a fresh built-in world as GIF files and a CSV
  ./run_all.sh readme          write the README's table of notebooks from suite.yaml

environment: RUNS_ROOT is the folder of all runs (default: runs/ of this clone)
"""


@dataclass(frozen=True)
class RunPlan:
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

    def copies(self, spec: StageSpec) -> bool:
        """Whether a stage was given what it would make, and so only copies it."""
        return bool(self.parameters[spec.name].get(spec.copies))


def _parameters_cell(book: NotebookNode, name: str) -> NotebookNode:
    tagged = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise ConfigError(f"{name}: expected one cell tagged 'parameters', found {len(tagged)}")
    return tagged[0]


def _assignments(cell: NotebookNode, name: str) -> dict[str, ast.Assign]:
    found = {}
    for node in ast.parse(cell.source).body:
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise ConfigError(f"{name}: the parameters cell may hold only lines like `name = value  # meaning`")
        found[node.targets[0].id] = node
    return found


def read_parameters(notebook: Path) -> dict[str, Any]:
    """Return name and default of each parameter in a notebook's cell tagged `parameters`; nothing is executed."""
    cell = _parameters_cell(nbformat.read(notebook, as_version=4), notebook.name)
    values = {}
    for name, node in _assignments(cell, notebook.name).items():
        try:
            values[name] = ast.literal_eval(node.value)
        except ValueError as error:
            raise ConfigError(f"{notebook.name}: parameter {name} is not a plain value") from error
    return values


def filled_in(notebook: Path, values: Mapping[str, Any]) -> NotebookNode:
    """Return a notebook whose parameters cell holds these values, each line with the comment that explains it.

    papermill itself would add a second cell behind it, so that a reader of the executed notebook meets every parameter
    twice, with two values.
    """
    book = nbformat.read(notebook, as_version=4)
    cell = _parameters_cell(book, notebook.name)
    lines = cell.source.splitlines()
    for name, node in reversed(_assignments(cell, notebook.name).items()):
        if name in values:
            value, last = pformat(values[name], width=100, sort_dicts=False), node.value.end_lineno
            comment = lines[last - 1].encode()[node.value.end_col_offset :].decode()
            lines[node.lineno - 1 : last] = [f"{name} = {value}{comment}"]
    cell.source = "\n".join(lines)
    return book


def _kind(default: Any) -> Any:
    """The type that a notebook's parameter declares by its default; an empty list holds texts, None a missing text."""
    if isinstance(default, list):
        kinds = {type(item) for item in default}
        return list[kinds.pop()] if len(kinds) == 1 else list[str]
    return str | None if default is None else type(default)


def parse_parameter(name: str, text: str, default: Any) -> Any:
    """Read the command line's `text` as a value of `default`'s type, which decides: 007 and 1e-4 are safe."""
    try:
        return read_typed(text, _kind(default))
    except ValueError as error:
        kind = type(default).__name__
        raise ConfigError(
            f"parameter {name}: {text!r} is not a valid {kind} (default: {default!r}): {error}"
        ) from error


def sort_parameters(
    pairs: Sequence[tuple[str, str]],
    declared: dict[str, dict[str, Any]],
    choices: Mapping[str, Mapping[str, Sequence[str]]] = MappingProxyType({}),
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Split -p pairs into profile overrides and parameters by stage; `declared` holds each notebook's defaults.

    choices: by stage, the values of a parameter that are its own: another one is for the other stages that have the
    parameter. Raises ConfigError for an unknown name or choice, with the nearest valid one, and for a value of the
    wrong type.
    """
    overrides: dict[str, Any] = {}
    parameters = {stage: dict(defaults) for stage, defaults in declared.items()}
    own = sorted({name for defaults in declared.values() for name in defaults})
    keys = [key for key in profile_keys() if "." in key]
    for name, text in pairs:
        if name in COMMON_PARAMETERS:
            raise ConfigError(f"-p {name}: use --profile, --run, or -p SECTION.KEY VALUE")
        if name in keys or is_removed(name):
            overrides[name] = parse_override(name, text)
        elif name in own:
            stages = [stage for stage, defaults in declared.items() if name in defaults]
            known = {stage: choices[stage][name] for stage in stages if name in choices.get(stage, {})}
            takers = [stage for stage in stages if not text or text in known.get(stage, [text])]
            if not takers:
                valid = sorted(value for values in known.values() for value in values)
                raise ConfigError(f"unknown {name} {text!r}; {nearest(text, valid)}")
            for stage in takers:
                parameters[stage][name] = parse_parameter(name, text, declared[stage][name])
        else:
            short = [key for key in keys if key.rpartition(".")[2] == name]
            hint = f"did you mean {' or '.join(map(repr, short))}?" if short else nearest(name, own + keys)
            raise ConfigError(f"unknown parameter {name!r}; {hint}")
    return overrides, parameters


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


def _absolute(text: str) -> str:
    """Return a path as written, from where the command was given: notebooks run elsewhere. Links stay what they are."""
    return os.path.abspath(os.path.expanduser(text))


def _existing(text: str, what: str) -> str:
    """Return `text` as an absolute path; raises ConfigError if there is nothing there."""
    path = _absolute(text)  # as written: a link of the Hugging Face cache leads to a nameless blob
    if shown(path) != path:
        raise ConfigError(f"{what} {shown(text)}: the name is not UTF-8. Rename the folder or file, or link to it")
    if not Path(path).exists():
        raise ConfigError(f"{what} {text} does not exist")
    return path


def _from_here(spec: StageSpec, parameters: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stage's parameters with absolute paths: those that suite.yaml calls paths, and others that exist.

    Defaults are the notebook's own words and stay as they are.
    """
    paths = {*spec.data, *spec.options, *spec.paths}

    def read(name: str, value: Any) -> Any:
        if not isinstance(value, str) or value in ("", defaults[name]) or "://" in value:
            return value
        return _absolute(value) if name in paths or ("/" in value and os.path.exists(_absolute(value))) else value

    return {name: read(name, value) for name, value in parameters.items()}


def _own_models(suite: Suite, profile: Profile) -> dict[str, str]:
    """Return the base models that are folders named from where the command was given, absolute, by profile key.

    Shipped models (tiny/...) and names of the hub stay as they are.
    """
    named = {key: model_of(profile, key) for spec in suite.stages for key in spec.models}
    return {
        key: _absolute(name)
        for key, name in named.items()
        if not name.startswith("tiny/")
        and name != _absolute(name)
        and os.path.isfile(os.path.join(_absolute(name), "config.json"))
    }


def _user_inputs(args: argparse.Namespace) -> tuple[dict[str, str], dict[str, str]]:
    """Return what --gifs, --qa, --holdout and --bundle say, by option, and the profile keys that follow, as text."""
    given: dict[str, str] = {}
    overrides: dict[str, str] = {}
    if args.holdout is not None and not args.qa:
        raise ConfigError("--holdout applies to your own questions: give --gifs FOLDER and --qa FILE.csv too")
    if bool(args.gifs) != bool(args.qa):
        raise ConfigError("--gifs and --qa belong together: --gifs FOLDER --qa FILE.csv")
    if args.gifs:
        given = {"gifs": _existing(args.gifs, "--gifs"), "qa": _existing(args.qa, "--qa")}
        if Path(given["qa"]).is_file():  # a folder of question files belongs to the profile's own corpus
            overrides["data.corpus"] = "own_gifs"
        if args.bundle and args.holdout is None:
            given["holdout"] = "1.0"
        elif args.holdout is not None:
            given["holdout"] = args.holdout
    if args.bundle:
        given["bundle"] = _existing(args.bundle, "--bundle")
    return given, overrides


def _filled(spec: StageSpec, given: Mapping[str, str]) -> dict[str, str]:
    """Return the parameters of a stage that the command line's options fill, as suite.yaml says."""
    wanted = {name: option for name, option in spec.options.items() if option.rstrip("/") in given}
    texts = {name: given[option.rstrip("/")] for name, option in wanted.items()}
    return {name: text for name, text in texts.items() if not wanted[name].endswith("/") or Path(text).is_dir()}


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


def _require_chat_template(profile: Profile) -> None:
    """Refuse a language model whose chat template cannot be used, where its tokenizer is at hand: 01 fetches others."""
    from transformers import AutoTokenizer

    from helpers.models.chat import ChatTemplateError, chat_format

    config = profile.language_model
    try:
        folder = find_model(config.model, config.revision, weights=False, fetch=False)
    except ModelNotFound:
        return
    try:
        chat_format(AutoTokenizer.from_pretrained(folder), config)
    except ChatTemplateError as error:
        raise ConfigError(str(error)) from error
    except Exception as error:  # a damaged file makes the tokenizers library raise just that
        raise ConfigError(f"language_model.model {config.model}: no tokenizer can be read: {error}") from error


def _require_table(file: Path) -> None:
    """Refuse a CSV of one's own questions of which notebook 01 could read no row."""
    from helpers.corpora.own_gifs import read_table
    from helpers.corpora.schema import CorpusError

    try:
        read_table(file)
    except CorpusError as error:
        raise ConfigError(str(error)) from error


def make_plan(args: argparse.Namespace, argv: Sequence[str]) -> RunPlan:
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
    overrides, parameters = sort_parameters(args.parameters, own, {spec.name: spec.choices for spec in specs})
    given, texts = _user_inputs(args)
    overrides |= {key: parse_override(key, text) for key, text in texts.items() if key not in overrides}
    for spec in specs:
        for name, text in _filled(spec, given).items():
            if name not in own[spec.name]:
                raise ConfigError(f"{spec.name} has no parameter {name!r}")
            parameters[spec.name][name] = parse_parameter(name, text, own[spec.name][name])
    parameters = {spec.name: _from_here(spec, parameters[spec.name], own[spec.name]) for spec in specs}
    file = args.profile.endswith((".yaml", ".yml")) or "/" in args.profile
    profile_name = _absolute(args.profile) if file else args.profile
    profile = load_profile(profile_name, overrides)
    if models := _own_models(suite, profile):
        overrides |= models
        profile = load_profile(profile_name, overrides)
    if profile.language_model.chat and any("language_model.model" in spec.models for spec in specs):
        _require_chat_template(profile)
    readers = [spec for spec in specs if "data" in spec.sections and "qa" in spec.options.values()]
    if readers and "qa" in given and profile.data.corpus == "own_gifs":
        _require_table(Path(given["qa"]))
    if any(spec.options.get(spec.copies) == "bundle" for spec in specs if args.bundle):
        _require_bundle(Path(args.bundle).expanduser(), profile)
    run = args.run or profile.name
    if not args.run and args.gifs:
        run += f"-{_slug(Path(args.gifs).name)}"
    if not args.run and args.bundle:
        run += "-scored"
    for name in filter(None, (run, args.upstream)):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise ConfigError(f"run name {name!r}: use letters, digits, dot, dash and underscore")
    near = [path.name for path in runs_root().glob("*") if path.name.casefold() == run.casefold() and path.is_dir()]
    if near and run not in near:
        raise ConfigError(
            f"run name {run!r}: there is a run {near[0]!r}, and names that differ by letter case only share a place on "
            f"Kaggle, macOS and Windows. Go on with it (--run {near[0]}), or take another name"
        )
    if args.upstream and not (runs_root() / args.upstream).is_dir():
        raise ConfigError(f"--upstream {args.upstream}: there is no such run in {runs_root()}")
    return RunPlan(
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
        again=["./run_all.sh", *without_options(argv, {"--force": 0, "--deadline": 1})],
    )


def without_options(argv: Sequence[str], drop: dict[str, int]) -> list[str]:
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


def parse_hours(text: str) -> float:
    """Read a number of hours of a week; raises ValueError if it is none."""
    hours = float(text)
    if not 0 < hours <= 168:
        raise ValueError
    return hours


def add_common(parser: argparse.ArgumentParser, profile: str = "") -> None:
    """Give a parser what every command about a run takes: profile, run, stages and -p."""
    add = parser.add_argument
    words = f"(default: {profile})" if profile else "or a .yaml file (default: the platform's own, here tiny)"
    add("--profile", default=profile, metavar="NAME", help=f"size: tiny, kaggle, colab, datacenter {words}")
    add("--run", default="", metavar="NAME", help="name of the run, its folder in runs/ (default: the profile's name)")
    add("--from", dest="start", default="", metavar="STAGE", help="first stage to look at, e.g. 03 (earlier: as found)")
    add("--only", action="append", default=[], metavar="STAGE", help="only this stage; may be repeated")
    words = "set a notebook parameter, or a profile key such as training.epochs; may be repeated"
    pair = ("NAME", "VALUE")
    add("-p", dest="parameters", nargs=2, action="append", default=[], metavar=pair, help=words)


def add_weekly_hours(parser: argparse._ActionsContainer, default: str) -> None:
    """Give a parser the option that limits a week's GPU-hours."""
    words = f"GPU-hours a week to keep within (default: {default})"
    parser.add_argument("--weekly-hours", type=parse_hours, default=None, metavar="H", help=words)


def run_parser() -> argparse.ArgumentParser:
    """Return the parser of the default command."""
    parser = argparse.ArgumentParser(
        prog="run_all.sh",
        description="Run the notebooks in order, headless: from raw GIFs to scored answers. Finished stages are "
        "skipped; a run that was stopped, by whatever, goes on with the same command.",
        epilog=HELP + "\n" + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_common(parser)
    add = parser.add_argument_group("your own files").add_argument
    add("--gifs", default="", metavar="FOLDER", help="your own GIFs (with --qa)")
    add("--qa", default="", metavar="CSV", help="your questions: columns gif,task,question,answer,options[,split]")
    add("--holdout", default=None, metavar="F", help="share of your GIFs kept for the test if there is no split column")
    add("--bundle", default="", metavar="DIR", help="a trained bundle: nothing is trained, it is only scored")
    group = parser.add_argument_group("long and repeated runs")
    add = group.add_argument
    add("--force", action="store_true", help="run the chosen stages again and replace what they made")
    add("--upstream", default="", metavar="RUN", help="take stages done with the same settings from another run")
    add("--deadline", default="", metavar="WHEN", help="HH:MM or minutes from now: save, pause and exit 75 by then")
    add_weekly_hours(group, "on Kaggle the account's, elsewhere no limit")
    return parser
