"""The README and docs/: every command is parsed or run and every link followed, so that no page becomes false."""

import ast
import importlib.util
import json
import re
import shlex
import shutil
import textwrap
import tomllib
from argparse import ArgumentParser
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import yaml

from helpers.config import REMOVED, SECTIONS, ConfigError, profile_keys
from helpers.corpora import own_gifs
from helpers.runner.commands import update_readme
from helpers.runner.kaggle.commands import main as kaggle_main
from helpers.runner.kaggle.commands import push_parser
from helpers.runner.plan import make_plan, parse_deadline, run_parser
from helpers.runner.quota.budgets import Account
from helpers.stage.suite import StageSpec, load_suite, suite_file
from helpers.suite import main
from helpers.workspace.place import repo_root
from helpers.workspace.weights import find_model
from tests.benchmarks.__main__ import names as benchmarks

ROOT, SUITE = repo_root(), load_suite(suite_file())
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`!?((?:\./run_all\.sh|python -m|\.venv/bin/)[^`]*)`")  # a command within a sentence
LINK = re.compile(r"\]\(([^)\s]+)\)")
PATHS = {"gifs", "qa", "data", "gallery", "science", "bundle", "adapters"}  # parameters that name files
CSV = "gif,task,question,answer\ncat.gif,frameqa,what animal is it ?,cat"
PROBLEM = {"question": "?", "choices": ["a", "b"], "answer": 0, "subject": "natural science", "grade": "grade1"}
BROKEN = """./run_all.sh --profil kaggle
./run_all.sh -p training.epoch 2
./run_all.sh --only 05 -p data NOWHERE
./run_all.sh quota --lifetimes 3
./run_all.sh kaggle push --only 04
./run_all.sh kaggle pull 12
./run_all.sh --help | head
NO_SUCH_SWITCH=1 ./run_all.sh
.venv/bin/python -m tests.benchmarks.full_size --tiny
.venv/bin/voila notebooks/09_demo.ipynb
cp -r runs/tiny/04_evaluation/bundle helpers/assets/tiny
frobnicate my_gifs"""


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return [textwrap.dedent(body) for _, kind, body in FENCE.findall(text) if kind == language]


def commands(text: str) -> list[str]:
    """All commands that a page shows, in blocks and within sentences, each on one line and without its comment."""
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines() + SPAN.findall(FENCE.sub("", text))
    return [" ".join(line.partition(" #")[0].split()) for line in lines if line.strip() and not line.startswith("#")]


def check_plan(parser: ArgumentParser, words: list[str]) -> None:
    """The plan is made as before a real run, and the parameters that name files name some."""
    args = parser.parse_args(words)
    chosen = make_plan(args, words).specs
    assert chosen and (not args.deadline or parse_deadline(args.deadline))
    for name, value in args.parameters:
        assert name not in PATHS or value.startswith("/kaggle/input/") or Path(value).exists(), f"no {value}"
    if hasattr(args, "attach"):  # a push: what a stage reads is pushed with it
        assert {read for spec in chosen for read in spec.inputs} <= {spec.name for spec in chosen}


def check_suite(words: list[str]) -> None:
    """A command of run_all.sh: parsed by its own parser, and run where that is cheap."""
    match words:
        case [*_, "--help"]:
            with pytest.raises(SystemExit, match="0"):
                main(words)
        case ["kaggle", "push", *rest]:
            check_plan(push_parser(), rest)
        case ["kaggle", *rest]:  # parsed, and then refused, as no run was ever pushed
            with pytest.raises(ConfigError, match="was never pushed"):
                kaggle_main(rest)
            assert {word for word in rest if re.fullmatch(r"\d\d", word)} <= {spec.name[:2] for spec in SUITE.stages}
        case ["test", "--against", name]:
            assert (ROOT / "tests" / "constraints" / f"{name}.txt").is_file()
        case ["test", *rest]:
            assert all(word == "--slow" or (ROOT / word).exists() for word in rest)
        case ["bench", "reliability", *rest]:
            source = (ROOT / "tests" / "benchmarks" / "reliability.py").read_text(encoding="utf-8")
            assert all(f'"{word}"' in source for word in rest if word.startswith("-"))
        case ["bench", *rest]:
            assert set(rest) <= set(benchmarks())
        case ["readme"]:
            assert not update_readme(Path(shutil.copy(ROOT / "README.md", "README.md")), SUITE)
        case ["make-shapes", *rest]:
            assert main(["make-shapes", *(re.sub(r"^[1-9]\d+$", "2", word) for word in rest)]) == 0  # fewer GIFs
        case ["quota" | "score", *_]:
            assert main(words) == 0
        case _:
            check_plan(run_parser(), words)


def check(command: str) -> None:
    """Check one command by the rule for its program; one that no rule knows is refused."""
    words = shlex.split(command)
    assert not {"|", "||", "&&", "&", ";", ">", "<"} & {*words}, "one command a line"
    if variable := re.fullmatch(r"([A-Z_]+)=.*", words[0]):
        assert any(f'"{variable[1]}"' in file.read_text(encoding="utf-8") for file in ROOT.glob("helpers/**/*.py"))
        words = words[1:]
    match words:
        case ["./run_all.sh", *rest]:
            check_suite(rest)
        case [".venv/bin/python", "-m", module, *rest]:
            found = importlib.util.find_spec(module)
            assert found, f"there is no module {module}"
            source = Path(found.origin).read_text(encoding="utf-8")
            assert all(f'"{word}"' in source for word in rest if word.startswith("-"))
        case [".venv/bin/pip" | ".venv/bin/pre-commit", "install", *names]:  # what is installed by hand
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            known = {re.split(r"\W", need)[0] for needs in extras.values() for need in needs} | {"pre-commit"}
            assert set(names) <= known and (ROOT / ".pre-commit-config.yaml").is_file()
        case ["git", "clone", address]:
            assert address == SUITE.repository
        case [script, *rest] if script.startswith(".venv/bin/"):
            scripts = {point.name for point in entry_points(group="console_scripts")}
            assert "-".join([Path(script).name, *(word for word in rest if "/" not in word)]) in scripts
            assert all((ROOT / word).exists() for word in rest if "/" in word)
        case _:
            pytest.fail(f"no rule knows {words[0]}")


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A working folder with everything that the commands name."""
    files = "my_gifs/cat.gif my_gifs/qa.csv worlds/seven/qa.csv runs/tiny/asked/SESSION/qa.csv"
    for name in (*files.split(), "tgif-v1.0.tsv", "tgif-qa/dataset/x", "checkpoint_7B_sqa.pth", "FOLDER/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{CSV}\n" if name.endswith("qa.csv") else "")
    bundle = Path(find_model("tiny/llama")).with_name("bundle")
    shutil.copytree(bundle, tmp_path / "runs" / "tiny" / "03_adapter_training" / "bundle")
    gold = json.dumps({"1": PROBLEM | {"split": "test"}, "2": PROBLEM | {"split": "val"}})
    for name in ("FOLDER/problems.json", "problems.json"):
        (tmp_path / name).write_text(gold)
    (tmp_path / "RESULTS.json").write_text(json.dumps({"results": {"1": 0, "2": 1}}))
    monkeypatch.setattr("helpers.runner.quota.budgets.ask_account", lambda: Account(3.0, 30.0, None))
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", sorted({shown for text in TEXTS.values() for shown in commands(text)}), ids=str)
def test_command_that_is_shown_works(house, command):
    if "make-shapes" in command:
        shutil.rmtree("worlds")  # it writes a new folder
    check(command)


@pytest.mark.parametrize("command", BROKEN.splitlines(), ids=str)
def test_broken_command_is_found(house, command):
    with pytest.raises((AssertionError, SystemExit, ConfigError, pytest.fail.Exception)):
        check(command)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text).lower(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_keys_and_lines_of_a_page_are_right(page):
    text = TEXTS[page.name]
    for link in (link for link in LINK.findall(FENCE.sub("", text)) if "://" not in link):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and (not anchor or anchor in anchors(target.read_text(encoding="utf-8"))), link
    named = re.findall(rf"`(?:-p )?((?:{'|'.join(SECTIONS)})\.(?!py\b|md\b|yaml\b)[a-z]\w*)", text)
    removed = {f"{section}.{key}" for section, keys in REMOVED.items() for key in keys}
    assert set(named) <= {*profile_keys()} | removed
    assert [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")] == []


def test_readme_is_short_and_leads_to_every_page():
    assert len(TEXTS["README.md"].splitlines()) <= 150
    assert not [name for name, text in TEXTS.items() if "TODO" in text]
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= set(LINK.findall(TEXTS["README.md"]))
    for page in PAGES[1:]:  # a title, and what most readers came for, stand on the first screen
        first = "\n".join(TEXTS[page.name].splitlines()[:24])
        assert first.startswith("# ") and ("```bash" in first or "\n1. " in first)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_snippets_are_valid(house, text):
    for code in blocks(text, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):
                assert all(hasattr(importlib.import_module(node.module), alias.name) for alias in node.names)
    for entry in (entry for block in blocks(text, "yaml") for entry in yaml.safe_load(block)):
        assert StageSpec(**entry).name not in {spec.name for spec in SUITE.stages}
    for table in blocks(text, "csv"):
        header, *rows = table.splitlines()
        folder, load = Path("my_gifs"), own_gifs.load
        if "task" not in header:  # captions alone, of videos
            folder, load = Path("my_videos"), own_gifs.load_captions
            for video in (folder / row.split(",")[0] for row in rows):
                video.parent.mkdir(parents=True, exist_ok=True)
                video.touch()
        (folder / "qa.csv").write_text(table, encoding="utf-8")
        assert load(folder, folder / "qa.csv", holdout=1).rejects.empty


def test_rooms_of_the_house_are_all_in_the_table():
    rows = re.findall(r"^\| `(\w+)/` \| (.+) \|$", TEXTS["contributing.md"], re.MULTILINE)
    assert len(rows) > 10
    for wing, told in rows:
        files = {path.stem for path in (ROOT / "helpers" / wing).rglob("*.py")} - {"__init__", "__main__"}
        assert files <= set(re.findall(r"\w+", told)), (wing, files - set(re.findall(r"\w+", told)))
