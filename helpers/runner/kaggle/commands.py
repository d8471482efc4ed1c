"""`run_all.sh kaggle`: the suite's stages as Kaggle notebooks, pushed in order, watched, fetched, and resumed."""

import argparse
import contextlib
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from helpers.config import ConfigError
from helpers.runner.kaggle.push import slug
from helpers.runner.kaggle.remote import Remote, alone_in
from helpers.runner.kaggle.site import Site
from helpers.runner.outcome import DONE, FAILED, PAUSED, Failed, Paused
from helpers.runner.plan import RunPlan, add_common, add_weekly_hours, make_plan, parse_deadline
from helpers.runner.quota.ledger import read_state
from helpers.runner.report import print_scores, write_report
from helpers.stage.suite import StageSpec
from helpers.workspace.place import runs_root

PUSH = """Push the stages as Kaggle notebooks, in order, wait for them and fetch what they make. The run is called
kaggle, or kaggle-PROFILE. --from may name no stage that reads an earlier one; stages that suite.yaml
wants named are pushed only where --only or --from names them."""
UNTIL = "stop watching at HH:MM or in so many minutes, with exit code 75"


def push_parser() -> argparse.ArgumentParser:
    """Return the parser of `run_all.sh kaggle push`."""
    parser = argparse.ArgumentParser(prog="run_all.sh kaggle push", description=PUSH, allow_abbrev=False)
    add_common(parser, profile="kaggle")
    add = parser.add_argument
    words = "data set for the stages that read data: GIFs, questions, ScienceQA; may be repeated"
    add("--attach", action="append", default=[], metavar="OWNER/DATASET", help=words)
    add("--wheels", action="store_true", help="send wheels of what Kaggle lacks along: notebooks need no internet")
    add("--session", type=float, default=12.0, metavar="HOURS", help="time limit of each session (default: 12)")
    add("--deadline", default="", metavar="WHEN", help=UNTIL)
    add_weekly_hours(parser, "the account's")
    parser.set_defaults(gifs="", qa="", holdout=None, bundle="", upstream="", force=False)
    return parser


def _plan(argv: Sequence[str]) -> tuple[RunPlan, dict[str, Any]]:
    """Return plan and fresh state of a push's command line; raises ConfigError if it cannot be."""
    args = push_parser().parse_args(argv)
    if args.profile.endswith((".yaml", ".yml")):
        raise ConfigError(
            "Kaggle's notebooks know the suite's own profiles only: take one of these and change it by -p"
        )
    if not 0 < args.session <= 12:
        raise ConfigError(f"--session {args.session:g}: sessions on Kaggle last 12 hours at most")
    for ref in args.attach:
        if not re.fullmatch(r"[\w-]+/[\w-]+", ref):
            raise ConfigError(f"--attach {ref}: give a data set as OWNER/NAME, as in its address")
    if not args.run:  # never the name of a run that was made here
        args.run = "kaggle" if args.profile == "kaggle" else f"kaggle-{args.profile}"
    plan = make_plan(args, argv)
    named = [text.removesuffix(".ipynb") for text in (*args.only, args.start) if text]
    plan = replace(
        plan,
        specs=[
            spec
            for spec in plan.specs
            if plan.profile.name not in spec.push_if_named or any(spec.name.startswith(text) for text in named)
        ],
    )
    for spec in plan.specs:
        absent = {*spec.inputs} - {other.name for other in plan.specs}
        if absent:
            raise ConfigError(f"{spec.name} reads {', '.join(sorted(absent))}, which is not part of this run")
        slug("gifqa", plan.run, spec.name)
    state = {"argv": list(argv), "seconds": 3600 * args.session, "attach": args.attach, "wheels": args.wheels}
    return plan, state


def _read_state(run: str) -> dict[str, Any]:
    folder = runs_root() / run
    if (state := read_state(folder)) is None:
        raise ConfigError(
            f"run {run!r} was never pushed: there is no {folder / 'kaggle.json'}. Start with ./run_all.sh kaggle push"
        )
    return state


def _strip_deadline(argv: Sequence[str]) -> tuple[list[str], float]:
    """Split `--deadline WHEN`, which is of one command, from the words that describe the run."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--deadline", default="")
    known, rest = parser.parse_known_args(argv)
    return rest, parse_deadline(known.deadline) if known.deadline else math.inf


def _alone(run: str) -> contextlib.AbstractContextManager[None]:
    """Keep other commands away from the run's folder, those that run notebooks here among them; raises StageError.

    What the folder tells is read after this only: another command may have gone on with the run until now.
    """
    return alone_in(runs_root() / run / ".lock", f"run {run!r}")


def _push(argv: Sequence[str]) -> int:
    """Push the stages as Kaggle notebooks, in order, wait for them and fetch what they make."""
    argv, deadline = _strip_deadline(argv)
    plan, state = _plan(argv)
    site = Site()
    with _alone(plan.run):
        if (plan.folder / "kaggle.json").is_file():
            before = _read_state(plan.run)
            if before["argv"] != state["argv"]:
                options = " ".join(before["argv"]) or "none"
                raise ConfigError(f"run {plan.run!r} was pushed with other options ({options}): use --run NAME")
            state = before
        elif made := [spec.name for spec in plan.specs if (plan.folder / spec.name).exists()]:
            raise ConfigError(f"run {plan.run!r} was made here ({', '.join(made)}): use --run NAME")
        return _go(plan, state, site, deadline)


def _resume(argv: Sequence[str]) -> int:
    """Go on with a run that was pushed: what died is pushed again with the work that it left."""
    argv, deadline = _strip_deadline(argv)
    parser = _run_parser("resume", _resume.__doc__)
    parser.add_argument("--deadline", default="", metavar="WHEN", help=UNTIL)
    words = "drop what a dead run of this stage left; may be repeated"
    parser.add_argument("--anew", action="append", default=[], metavar="STAGE", help=words)
    args = parser.parse_args(argv)
    _read_state(args.run)  # refuses a run that is none
    site = Site()
    with _alone(args.run):
        state = _read_state(args.run)
        return _go(_plan(state["argv"])[0], state, site, deadline, args.anew)


def _go(plan: RunPlan, state: dict[str, Any], site: Site, deadline: float, anew: Sequence[str] = ()) -> int:
    again = f"To go on: ./run_all.sh kaggle resume --run {plan.run}"
    try:
        remote = Remote(plan, state, site)
        remote.recover(_chosen(remote, anew) if anew else ())
        code = remote.follow(deadline)
    except Paused as pause:
        print(f"Paused: {pause}\n{again}")
        return PAUSED
    except Failed as error:
        raise Failed(f"{error}\n{again}") from error
    print_scores(plan.suite, plan.folder)
    print(f"Report: {write_report(plan.suite, plan.folder, plan.profile)}")
    return code


def _run_parser(command: str, text: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"run_all.sh kaggle {command}", description=text, allow_abbrev=False)
    parser.add_argument("--run", default="kaggle", metavar="NAME", help="name of the run (default: kaggle)")
    return parser


def _open(run: str) -> Remote:
    state = _read_state(run)
    return Remote(_plan(state["argv"])[0], state, Site())


def _status(argv: Sequence[str]) -> int:
    """Print how each stage stands, here and on Kaggle."""
    remote = _open(_run_parser("status", _status.__doc__).parse_args(argv).run)
    for spec in remote.plan.specs:
        entry = remote.state["stages"][spec.name]
        there = ""
        if entry["status"] == "running":
            there = ": ".join(filter(None, remote.standing(spec) or ("not there yet",)))
        print(f"{spec.name:24} {entry['status']:10} {there or entry.get('message', '')}".rstrip())
    states = {remote.status(spec) for spec in remote.plan.specs}
    return DONE if states == {"complete"} else FAILED if "failed" in states else PAUSED


def _stage_argument(parser: argparse.ArgumentParser, many: str | None) -> None:
    parser.add_argument("stages", nargs=many, metavar="STAGE", help="a stage, e.g. 03")


def _chosen(remote: Remote, words: Sequence[str]) -> list[StageSpec]:
    chosen = [spec for spec in remote.plan.specs if any(spec.name.startswith(word) for word in words)]
    if not chosen:
        raise ConfigError(f"run {remote.plan.run!r} has no stage {' or '.join(words)}")
    return chosen


def _logs(argv: Sequence[str]) -> int:
    """Print what the run of a stage that was pushed last printed on Kaggle."""
    parser = _run_parser("logs", _logs.__doc__)
    _stage_argument(parser, "+")
    args = parser.parse_args(argv)
    remote = _open(args.run)
    for spec in _chosen(remote, args.stages):
        print(remote.log(spec))
    return DONE


def _pull(argv: Sequence[str]) -> int:
    """Fetch the files of finished stages into runs/<run>, large ones too, and check them against their manifests."""
    parser = _run_parser("pull", _pull.__doc__)
    _stage_argument(parser, "*")
    args = parser.parse_args(argv)
    _read_state(args.run)  # refuses a run that is none
    with _alone(args.run):
        remote = _open(args.run)
        specs = _chosen(remote, args.stages) if args.stages else remote.plan.specs
        done = [spec for spec in specs if remote.status(spec) == "complete"]
        for spec in done:
            print(f"{spec.name}: {remote.pull(spec)}", flush=True)
    for spec in specs:
        if spec not in done:
            print(f"{spec.name}: {remote.status(spec)}, nothing to fetch")
    return DONE if len(done) == len(specs) else PAUSED


COMMANDS = {"push": _push, "status": _status, "logs": _logs, "pull": _pull, "resume": _resume}


def main(argv: Sequence[str]) -> int:
    """Run `run_all.sh kaggle COMMAND ...`; returns its exit code, raises ConfigError, StageError or Failed."""
    parser = argparse.ArgumentParser(
        prog="run_all.sh kaggle",
        description=__doc__,
        epilog="\n".join(f"  {name:8} {function.__doc__}" for name, function in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=COMMANDS)
    args = parser.parse_args(argv[:1])
    try:
        return COMMANDS[args.command](argv[1:])
    except Paused as pause:
        print(f"Paused: {pause}", file=sys.stderr)
        return PAUSED
