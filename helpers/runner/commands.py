"""The commands beside the run itself: tests, quota, scores of a file, a fresh world, the README's table."""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from helpers.config import ConfigError
from helpers.runner import quota
from helpers.runner.outcome import DONE
from helpers.runner.plan import make_plan, run_parser
from helpers.runner.run import forecast_stage, say_budget
from helpers.scoring import scienceqa
from helpers.stage.suite import Suite, load_suite, suite_file
from helpers.workspace.disk import write_text
from helpers.workspace.machine import gpus
from helpers.workspace.place import repo_root


def run_tests(arguments: Sequence[str]) -> int:
    """Run ruff's two checks and pytest, all three even if one fails; returns the first failing exit code."""
    parser = argparse.ArgumentParser(
        prog="run_all.sh test",
        description="Check style (ruff) and run the tests (pytest). What is not listed here goes to pytest.",
        allow_abbrev=False,
    )
    parser.add_argument("--slow", action="store_true", help="the tests marked slow too")
    sets = "kaggle-2026-05, colab-2026-07, colab-2026-08, lowest"
    words = f"under a platform's packages, in an environment of its own: {sets}; the fast tests and tiny notebooks only"
    parser.add_argument("--against", default="", metavar="NAME", help=words)
    args, rest = parser.parse_known_args(arguments)
    root, python = repo_root(), sys.executable
    if args.against:
        return subprocess.run([python, "-m", "tests.constraints", args.against, *rest], cwd=root).returncode
    marked = ["-m", "slow or not slow"] if args.slow else []
    commands = [
        [python, "-m", "ruff", "check", "."],
        [python, "-m", "ruff", "format", "--check", "."],
        [python, "-m", "pytest", "--durations=15", *marked, *rest],
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
        write_text(readme, new)
    return new != text


def write_readme(arguments: Sequence[str]) -> int:
    """Write the README's table of notebooks from suite.yaml."""
    argparse.ArgumentParser(prog="run_all.sh readme", description=write_readme.__doc__).parse_args(arguments)
    changed = update_readme(repo_root() / "README.md", load_suite(suite_file()))
    print("README.md: table of notebooks", "updated" if changed else "already up to date")
    return DONE


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
    from helpers.corpora.shapes import write_own_gifs

    write_own_gifs(args.out, seed=args.seed, train=args.train, test=args.test)
    print(f"Wrote {args.train + args.test} GIFs and their questions to {args.out}")
    print(f"Use them: ./run_all.sh --gifs {shlex.quote(str(args.out))} --qa {shlex.quote(str(args.out / 'qa.csv'))}")
    return DONE


def show_quota(arguments: Sequence[str]) -> int:
    """Print GPU-hours used and left this week and what each stage of the run will still take."""
    parser = run_parser()
    parser.prog, parser.description, parser.epilog = "run_all.sh quota", show_quota.__doc__, None
    parser.add_argument("--figure", type=Path, default=None, metavar="PNG", help="draw the weeks that the run takes")
    args = parser.parse_args(arguments)
    plan = make_plan(args, arguments)
    print("GPU here:", ", ".join(gpu.name for gpu in gpus()) or "none: what counts is what is pushed to Kaggle")
    found = quota.read_budget(plan.weekly_hours, plan.suite.weekly_hours, running=quota.begun_on_kaggle())
    say_budget(found, set())
    forecasts = [forecast_stage(plan, spec) for spec in plan.specs]
    print(f"\nWhat run {plan.run!r} will still take, profile {plan.profile.name!r}:")
    print(quota.forecast_table(forecasts).to_string(index=False))
    costly, now = [forecast for forecast in forecasts if forecast.gpu], time.time()
    print(f"\n{quota.outlook(costly, found, now)}")
    if args.figure:
        from helpers.plots.look import save_figure  # pyplot takes its time

        pieces = quota.plan_sessions(costly, found, now)
        print("Figure:", save_figure(quota.quota_weeks(pieces, found.total / 3600, found.refresh), args.figure))
    return DONE


def score_file(arguments: Sequence[str]) -> int:
    """Score a result file against gold answers and print one JSON object: accuracy, correct, total, subgroups."""
    parser = argparse.ArgumentParser(prog="run_all.sh score", description=score_file.__doc__, allow_abbrev=False)
    parser.add_argument("corpus", choices=["scienceqa"], help="what the results are of")
    parser.add_argument("results", type=Path, metavar="RESULTS.json", help="results, outputs, or correct and incorrect")
    accepted = "problems.json, LLaVA's list, or a folder with either"
    parser.add_argument("--gold", type=Path, required=True, metavar="GOLD", help=accepted)
    parser.add_argument("--split", default="test", help="the gold's split to score (default: test)")
    args = parser.parse_args(arguments)
    try:
        gold = scienceqa.read_gold(args.gold, args.split)
        print(json.dumps(scienceqa.score_results(scienceqa.read_results(args.results), gold), indent=2))
    except ValueError as error:  # the reader's own errors say which file and what to do
        raise ConfigError(str(error)) from error
    return DONE
