"""Gates that every committed notebook passes, checked without a kernel; each gate is itself shown to close."""

import ast
import importlib
import importlib.util
import re
import tomllib
from importlib import metadata

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_output
from packaging.requirements import Requirement
from packaging.version import Version

from helpers.runner.commands import README_MARKS, notebook_table
from helpers.runner.plan import read_parameters
from helpers.stage.suite import load_suite
from helpers.workspace.place import repo_root

ROOT = repo_root()
SUITE = load_suite(ROOT / "notebooks" / "suite.yaml")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_BYTES, MAX_LINES, MAX_DEFINITION = 60_000, 25, 10
COMMON = [
    'profile = ""  # profile name or .yaml path; empty: the platform\'s own (tiny on a laptop)',
    'run = ""  # name of the run; empty: the profile\'s name',
    'overrides = {}  # profile keys to change, e.g. {"training.epochs": 2}',
]
SET_UP = """# tested under the packages of Kaggle's image of 2026-05 and of Colab's runtimes 2026-07 and 2026-08
import os
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

here, inputs = Path.cwd(), Path(os.environ.get("KAGGLE_CACHE_MOUNT_FOLDER", "/kaggle/input"))
clones = [path for path in [here, *here.parents, *here.glob("*/")] if (path / "helpers" / "__init__.py").is_file()]
marked = [path.parent for depth in range(1, 6) for path in inputs.glob("*/" * depth + "gif_qa_helpers.json")]
wheels = [wheel for path in [here, *marked] for wheel in sorted(path.glob("gif_question_answering-*.whl"))]
root = clones[0] if clones else tempfile.mkdtemp()
if not clones:
    ways = "open this notebook in a clone of the repository, clone it beside this notebook"
    assert len(wheels) == 1, f"{ways}, or attach the data set with the helpers, once: {wheels}"
    ZipFile(wheels[0]).extractall(root)
sys.path.insert(0, str(root))

from helpers.install import install_missing, set_up

install_missing(wheels[0].parent if wheels else "")
set_up()"""
SECRET = re.compile(
    r"hf_[A-Za-z0-9]{20,}|KGAT_\w+|AKIA[0-9A-Z]{16}|gh[pousr]_\w{20,}|sk-\w{20,}|BEGIN [A-Z ]*PRIVATE KEY"
)
ABSOLUTE = re.compile(r"""["'](/(work|home|root|Users|tmp|mnt)/|[A-Z]:\\)""")


def _import_faults(tree: ast.AST) -> list[str]:
    """Name every import that cannot be resolved; names taken from the suite's own modules must exist there."""
    found = []
    for node in ast.walk(tree):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            modules = [node.module]
        for module in modules:
            if importlib.util.find_spec(module.split(".")[0]) is None or importlib.util.find_spec(module) is None:
                found.append(f"cannot import {module}")
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "helpers" and not found:
            module = importlib.import_module(node.module)
            for alias in node.names:
                inner = hasattr(module, "__path__") and importlib.util.find_spec(f"{node.module}.{alias.name}")
                if not hasattr(module, alias.name) and not inner:
                    found.append(f"{node.module} has no {alias.name}")
    return found


def _cell_faults(cell: NotebookNode) -> list[str]:
    """Return what is wrong with one code cell."""
    found = []
    if cell.outputs or cell.execution_count is not None:
        found.append("has outputs or an execution count")
    if len(cell.source.splitlines()) > MAX_LINES:
        found.append(f"has more than {MAX_LINES} lines")
    try:
        tree = ast.parse(cell.source)
    except SyntaxError as error:
        return [*found, f"is not plain Python: {error}"]
    for node in ast.walk(tree):
        definition = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if definition and node.end_lineno - node.lineno + 1 > MAX_DEFINITION:
            found.append(f"defines {node.name} in more than {MAX_DEFINITION} lines")
    return found + _import_faults(tree)


def _stage_faults(name: str, code: list[NotebookNode], parameters: set[str]) -> list[str]:
    """Check that the notebook makes its own stage with all its parameters and finishes it once."""
    calls = [node for cell in code for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Call)]
    made = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "Stage"]
    finished = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "finish"]
    if len(made) != 1 or not finished:
        return ["needs one Stage(...) and a stage.finish(...)"]
    found = []
    if ast.literal_eval(made[0].args[0]) != name:
        found.append("Stage(...) bears another name")
    given = {keyword.arg: keyword.value for keyword in made[0].keywords}
    for common in ("profile", "run", "overrides"):
        if not (isinstance(given.get(common), ast.Name) and given[common].id == common):
            found.append(f"Stage(...) does not get {common}={common}")
    passed = given.get("parameters")
    if isinstance(passed, ast.Name):  # a dict that was named first
        assigned = [n for cell in code for n in ast.parse(cell.source).body if isinstance(n, ast.Assign)]
        passed = next((n.value for n in assigned if ast.unparse(n.targets[0]) == passed.id), None)
    names = {ast.literal_eval(key) for key in passed.keys} if isinstance(passed, ast.Dict) else set()
    if names != parameters:
        found.append(f"Stage(...) gets the parameters {sorted(names)}, the parameters cell has {sorted(parameters)}")
    return found


def faults(book: NotebookNode, name: str, title: str) -> list[str]:
    """Return everything that is wrong with a notebook, as sentences."""
    found = []
    try:
        nbformat.validate(book)
    except nbformat.ValidationError as error:
        found.append(f"not a valid notebook: {error.message}")
    if (book.nbformat, book.nbformat_minor) != (4, 5) or book.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("must be nbformat 4.5 with the kernel python3")
    if not book.cells[0].source.startswith(f"# {name[:2]} {title}\n") or "**Needs**" not in book.cells[0].source:
        found.append(f"the first cell must be the title '# {name[:2]} {title}' with what it needs and makes")
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    for number, cell in enumerate(book.cells):
        text = "".join(cell.source)
        if SECRET.search(text):
            found.append(f"cell {number} looks as if it held a secret")
        if ABSOLUTE.search(text):
            found.append(f"cell {number} names an absolute path")
        if cell.cell_type == "code":
            found += [f"cell {number} {fault}" for fault in _cell_faults(cell)]
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    if tagged != code[:1]:
        return [*found, "the first code cell, and no other, must be tagged 'parameters'"]
    lines = tagged[0].source.splitlines()
    if lines[:3] != COMMON or any(not re.fullmatch(r"\w+ = .+  # \S.*", line) for line in lines):
        found.append("the parameters cell must begin with the three common lines and explain every line")
    if code[1].source != SET_UP:
        found.append("the second code cell must be the set-up cell, the same everywhere")
    if not any("is not plain Python" in fault for fault in found):
        own = {line.split(" = ")[0] for line in lines[3:]}
        found += _stage_faults(name, code, own)
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_passes_every_gate(path):
    book = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    assert faults(book, path.stem, SUITE.spec(path.stem).title) == []
    assert path.stat().st_size <= MAX_BYTES
    read_parameters(path)


def test_suite_file_lists_exactly_the_notebooks_that_there_are():
    assert [spec.name for spec in SUITE.stages] == [path.stem for path in NOTEBOOKS]


def test_readme_table_is_the_generated_one():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    start, end = README_MARKS
    assert readme.split(start)[1].split(end)[0].strip() == notebook_table(SUITE), "run: ./run_all.sh readme"


def spoil(number: int, old: str, new: str):
    """Return a change that replaces text in a cell."""

    def change(book):
        assert old in book.cells[number].source
        book.cells[number].source = book.cells[number].source.replace(old, new, 1)

    return change


def add(source: str, **options):
    """Return a change that adds a code cell."""
    return lambda book: book.cells.append(new_code_cell(source, **options))


LONG = "def f():\n" + "    x = 1\n" * 10
SPOILERS = [
    (spoil(0, "# 00 Start here", "# Start"), "must be the title"),
    (spoil(1, "  # name of the run; empty: the profile's name", ""), "explain every line"),
    (spoil(1, "overrides = {}", "override = {}"), "three common lines"),
    (spoil(2, "set_up()", "set_up(1)"), "must be the set-up cell"),
    (spoil(3, '"00_start_here"', '"01_data_sharding"'), "bears another name"),
    (spoil(3, "run=run", "run=''"), "does not get run=run"),
    (spoil(3, "parameters={}", "parameters={'seed': 1}"), "gets the parameters"),
    (lambda book: book.cells.pop(1), "must be tagged 'parameters'"),
    (add("x = 1\n" * 26), "more than 25 lines"),
    (add(LONG), "defines f in more than 10 lines"),
    (add("!pip install x"), "not plain Python"),
    (add("import no_such_package"), "cannot import no_such_package"),
    (add("from helpers.stage import nothing"), "helpers.stage has no nothing"),
    (add("1", execution_count=1), "execution count"),
    (add("1", outputs=[new_output("stream", text="x")]), "has outputs"),
    (add("token = 'hf_" + "a" * 30 + "'"), "held a secret"),
    (add("path = '/home/me/gifs'"), "absolute path"),
    (lambda book: book.metadata.pop("kernelspec"), "kernel python3"),
    (lambda book: book.update(nbformat_minor=4), "nbformat 4.5"),
]


@pytest.mark.parametrize(("change", "fault"), SPOILERS, ids=[fault for _, fault in SPOILERS])
def test_each_gate_closes(change, fault):
    book = nbformat.read(ROOT / "notebooks" / "00_start_here.ipynb", as_version=nbformat.NO_CONVERT)
    assert faults(book, "00_start_here", "Start here") == []
    change(book)
    assert any(fault in found for found in faults(book, "00_start_here", "Start here"))


def _ranges(text: str) -> list[Requirement]:
    return [Requirement(line.split("#")[0].strip()) for line in text.splitlines() if line.split("#")[0].strip()]


def test_requirements_agree_with_each_other():
    text = (ROOT / "requirements.txt").read_text()
    locked = {r.name: str(r.specifier).removeprefix("==") for r in _ranges((ROOT / "requirements.lock").read_text())}
    for requirement in _ranges(text):
        version = locked[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(version), f"{requirement} against {version} in requirements.lock"
    runtime = {str(requirement) for requirement in _ranges(text.partition("# Development")[0])}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {str(Requirement(line)) for line in project["dependencies"]} == runtime


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "constraints").glob("*.txt")), ids=lambda path: path.stem)
def test_package_sets_of_the_platforms_are_supported(path):
    supported = {r.name: r.specifier for r in _ranges((ROOT / "requirements.txt").read_text())}
    pinned = {r.name: r.specifier for r in _ranges(path.read_text())}
    image, _, release = path.stem.partition("-")
    named = SET_UP.splitlines()[0]  # what every notebook tells of itself
    assert path.stem == "lowest" or (image.capitalize() in named and release in named)
    assert "torch" not in pinned and {"transformers", "peft", "accelerate"} <= set(pinned)
    for name in set(pinned) & set(supported):
        version = str(pinned[name]).removeprefix("==")
        assert supported[name].contains(version), f"{name} {version} against {supported[name]}"
        if path.stem == "lowest":
            lower = next(bound.version for bound in supported[name] if bound.operator == ">=")
            assert Version(version) == Version(lower), name


def test_every_import_of_the_code_is_a_stated_requirement():
    stated = {r.name.lower().replace("_", "-") for r in _ranges((ROOT / "requirements.txt").read_text())}
    carried = {"packaging", "ipython", "opencv-python-headless", "requests", "kagglesdk"}  # come with what is stated
    providers = metadata.packages_distributions()
    for path in sorted((ROOT / "helpers").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module]
            for top in {module.split(".")[0] for module in modules}:
                packages = {name.lower().replace("_", "-") for name in providers.get(top, [])}
                assert not packages or packages & (stated | carried), f"{path.name} imports {top}: state it"
