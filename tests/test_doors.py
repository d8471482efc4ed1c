"""The doors of the house: which file of `helpers` may import which, read from the code itself.

Every import counts, those inside functions too; only what stands under `TYPE_CHECKING` does not. A fault is told with
file, line and rule. The rules are those of docs/contributing.md.
"""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import helpers

ROOT = Path(helpers.__file__).resolve().parents[1]

# A wing imports itself and the wings of the groups before its own.
ORDER = [
    {"workspace"},
    {"config", "install"},
    {"stage", "corpora", "gifs"},
    {"store", "models", "scoring", "plots"},
    {"training"},
    {"answers"},
    {"sweeps", "demo", "assets"},
    {"runner"},
    {"suite"},
]
LEVEL = {wing: level for level, wings in enumerate(ORDER) for wing in wings}
# Files (or folders) named after a system or a data set, as scienceqa_tables is, never import each other inside a wing,
SYSTEMS = {"tgif_qa", "own_gifs", "shapes", "scienceqa", "diagrams", "gif_qa", "adem_vl"}
SYSTEMS |= {"retrieval", "alignment", "msrvtt", "experts", "vqa"}
# except that a world may use the writer of the format in which it is written.
ALLOWED_SIBLINGS = {
    ("helpers/corpora/shapes.py", "helpers/corpora/tgif_qa.py"),
    ("helpers/corpora/shapes.py", "helpers/corpora/own_gifs.py"),
}
IMPORTS_BY_NAME = {"helpers/workspace/place.py"}  # asks Colab for secrets by a module that is there only
WITHOUT_TORCH = ("scoring", "corpora", "stage", "config")
STANDARD_LIBRARY_ALONE = ("workspace", "install")

MOVES = {"os.replace", "os.rename", "os.renames", "shutil.move", "path.replace", "path.rename"}
WRITES = {"helpers/workspace/disk.py"}
UNFINISHED = {"temporary", "staging"}  # how a path is called that has not got its name yet
# One asks for a path to write to, the other writes into a folder that goes again, by the standard library alone.
WRITES_PLAINLY = WRITES | {"helpers/corpora/shapes.py", "helpers/install.py"}
SEARCHES = WRITES | {"helpers/workspace/inputs.py", "helpers/workspace/names.py"}


@dataclass(frozen=True)
class Import:
    """One imported name: where the line stands, the file it comes from, and the name itself ('' for a module)."""

    file: str
    line: int
    target: str
    name: str
    in_function: bool

    def fault(self, rule: str) -> str:
        """Say file, line and rule."""
        return f"{self.file}:{self.line}: {rule}: imports {self.name or 'all'} of {self.target}"


def files_of(root: Path) -> dict[str, Path]:
    """Every Python file of `helpers` by its dotted name; a package is its __init__.py."""
    found = {}
    for path in sorted((root / "helpers").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _statements(node: ast.AST, in_function: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        if _type_checking(child):
            yield from _statements(ast.Module(child.orelse, []), in_function)
            continue
        yield child, in_function
        inside = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _statements(child, inside)


def imports_of(root: Path) -> list[Import]:
    """Every import of a file of `helpers` in a file of `helpers`."""
    files = files_of(root)
    found = []
    for module, path in files.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for node, in_function in _statements(ast.parse(path.read_text(encoding="utf-8"))):
            pairs: list[tuple[str, str]] = []
            if isinstance(node, ast.Import):
                pairs = [(alias.name, "") for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                base = ".".join([*above, *filter(None, [node.module])])
                pairs = [(base, alias.name) for alias in node.names]
            for base, name in pairs:
                target, name = (f"{base}.{name}", "") if f"{base}.{name}" in files else (base, name)
                if target in files:
                    here, there = (p.relative_to(root).as_posix() for p in (path, files[target]))
                    found.append(Import(here, node.lineno, there, name, in_function))
    return found


def wing(file: str) -> str:
    """The wing of a file: the folder below `helpers`, or the file itself where it stands in none."""
    return "".join(file.split("/")[1:2]).removesuffix(".py")


def system(file: str) -> str:
    """The system or data set that a file is named after within its wing; "" for one that serves all."""
    name = "".join(file.split("/")[2:3]).removesuffix(".py")
    return max((known for known in SYSTEMS if name == known or name.startswith(f"{known}_")), key=len, default="")


def circles(imports: list[Import]) -> list[str]:
    """Rule 1: no circle of files. One fault a circle, told by one of its imports."""
    graph: dict[str, dict[str, Import]] = {}
    for found in imports:
        if found.file != found.target:
            graph.setdefault(found.file, {}).setdefault(found.target, found)
    faults, done, path = [], set(), []

    def visit(file: str) -> None:
        path.append(file)
        for target, found in graph.get(file, {}).items():
            if target in path:
                way = [*path[path.index(target) :], target]
                faults.append(found.fault(f"rule 1, no circle of files ({' -> '.join(way)})"))
            elif target not in done:
                visit(target)
        done.add(path.pop())

    for file in sorted(graph):
        if file not in done:
            visit(file)
    return faults


def wrong_doors(imports: list[Import]) -> Iterator[str]:
    """Rules 2, 4, 5 and 6, import by import."""
    for found in imports:
        here, there = wing(found.file), wing(found.target)
        if here == "__init__" or there == "__init__":
            yield found.fault("rule 2, helpers itself imports nothing and hands nothing on")
            continue
        if here not in LEVEL or there not in LEVEL:
            yield found.fault(f"rule 2, {here if here not in LEVEL else there} is no wing of the house")
        elif here == "install" and there == "config":
            if not found.in_function:
                yield found.fault("rule 2, install imports config inside a function only")
        elif here != there and LEVEL[there] >= LEVEL[here]:
            beside = "stands before" if LEVEL[here] < LEVEL[there] else "stands beside"
            yield found.fault(f"rule 2, {here} {beside} {there}")
        if there == "runner" and here not in ("runner", "suite"):
            yield found.fault("rule 4, only suite.py, notebook 00 and runner import runner")
        if here == "plots" and there in ("runner", "models"):
            yield found.fault("rule 4, plots imports neither runner nor models")
        ours, theirs = system(found.file), system(found.target)
        siblings = here == there and ours and theirs and ours != theirs
        if siblings and (found.file, found.target) not in ALLOWED_SIBLINGS:
            yield found.fault("rule 5, files named after systems or data sets do not import each other")
        own_face = found.target == f"helpers/{here}/__init__.py" and not found.file.endswith("/__init__.py")
        if here == there and own_face:
            yield found.fault("rule 5, a room takes names from rooms, not from the face of its own wing")
        if found.name.startswith("_"):
            yield found.fault("rule 6, no name with a leading underscore crosses a file")


def _private(tree: ast.Module) -> set[str]:
    """Names with a leading underscore that a file defines, of methods and attributes too."""
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    return {name for name in names if re.match("_(?!_)", name)}


def hidden_imports(root: Path) -> Iterator[str]:
    """Rule 6: no import by a computed name, no bare `import helpers`, and no underscore name through an object."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files_of(root).values()}
    private = {path: _private(tree) for path, tree in trees.items()}
    for path, tree in trees.items():
        here = path.relative_to(root).as_posix()
        elsewhere = set().union(*(names for other, names in private.items() if other != path)) - private[path]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func).rpartition(".")[2]
                if called in ("import_module", "__import__", "run_module") and here not in IMPORTS_BY_NAME:
                    yield f"{here}:{node.lineno}: rule 6, no {called}: it hides what is imported"
            elif isinstance(node, ast.Import) and any(alias.name == "helpers" for alias in node.names):
                yield f"{here}:{node.lineno}: rule 6, import a room of helpers, not helpers"
            elif isinstance(node, ast.ImportFrom) and "import_module" in [alias.name for alias in node.names]:
                yield f"{here}:{node.lineno}: rule 6, no import_module: it hides what is imported"
            elif isinstance(node, ast.Attribute) and node.attr in elsewhere:
                owner = ast.unparse(node.value)
                if owner not in ("self", "cls", "super()"):
                    yield f"{here}:{node.lineno}: rule 6, {owner}.{node.attr} crosses a file"


def full_faces(root: Path) -> Iterator[str]:
    """A face only hands names on: it defines nothing but what it hands on."""
    for path in files_of(root).values():
        if path.name != "__init__.py" or path.parent.name == "models":  # it quietens the libraries for all models
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            handed = isinstance(node, ast.ImportFrom) or ast.unparse(node).startswith("__all__ = ")
            if not handed and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
                yield f"{path.relative_to(root).as_posix()}:{node.lineno}: a face only hands names on"


def _root(node: ast.expr) -> str:
    """The name that a path is made from: `folder` of `(folder / "a").with_suffix(".b")`."""
    while not isinstance(node, ast.Name):
        inner = {ast.Attribute: "value", ast.BinOp: "left", ast.Call: "func", ast.Subscript: "value"}.get(type(node))
        if inner is None:
            return ""
        node = getattr(node, inner)
    return node.id


def _plain_write(call: ast.Call) -> ast.expr | None:
    """The path that a call writes to, from the beginning of the file on; None if it does no such thing."""
    words = {keyword.arg: keyword.value for keyword in call.keywords}
    if isinstance(call.func, ast.Attribute) and call.func.attr in ("write_text", "write_bytes"):
        return call.func.value
    if isinstance(call.func, ast.Attribute) and call.func.attr in ("to_parquet", "to_csv"):
        return call.args[0] if call.args else words.get("path", words.get("path_or_buf"))
    if isinstance(call.func, ast.Attribute) and call.func.attr == "open":
        path, mode = call.func.value, [*call.args[:1], *filter(None, [words.get("mode")])]
    elif isinstance(call.func, ast.Name) and call.func.id == "open" and call.args:
        path, mode = call.args[0], [*call.args[1:2], *filter(None, [words.get("mode")])]
    else:
        return None
    return path if any(isinstance(m, ast.Constant) and re.match("[wx]", str(m.value)) for m in mode) else None


def own_writes(root: Path) -> Iterator[str]:
    """Rule 7: what gets a name on disk gets it in workspace/disk, whole and forced to disk; what is searched for below
    a folder of inputs is found by workspace/inputs or workspace/names.

    A `.replace` of one argument is a path's (a text's has two), as is a `.rename` of one that is no keyword. A file is
    written plainly only where it has no name yet.
    """
    for path in files_of(root).values():
        here = path.relative_to(root).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module in ("os", "shutil"):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = ast.unparse(node.func.value)
                alone = owner not in ("os", "shutil") and len(node.args) == 1 and not node.keywords
                names = [f"{'path' if alone else owner}.{node.func.attr}"]
            path = _plain_write(node) if isinstance(node, ast.Call) else None
            if path is not None and _root(path) not in UNFINISHED and here not in WRITES_PLAINLY:
                yield f"{here}:{node.lineno}: rule 7, {ast.unparse(node.func)}: write it whole, by workspace/disk"
            for name in names:
                if name in MOVES and here not in WRITES:
                    yield f"{here}:{node.lineno}: rule 7, {name}: only workspace/disk puts files in their place"
                if (name in ("os.walk", "os.fwalk") or name.endswith(".rglob")) and here not in SEARCHES:
                    yield f"{here}:{node.lineno}: rule 7, {name}: only disk, inputs and names of workspace search"


def faults_of(root: Path) -> list[str]:
    """Every fault that can be read from the code under `root`."""
    imports = imports_of(root)
    return [*circles(imports), *wrong_doors(imports), *hidden_imports(root), *full_faces(root), *own_writes(root)]


def test_no_import_breaks_a_rule():
    """The house as it stands."""
    assert len(imports_of(ROOT)) > 200
    faults = faults_of(ROOT)
    assert not faults, "\n" + "\n".join(faults)


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        ("rule 1", {"store/a.py": "def f():\n    import helpers.store.b", "store/b.py": "from . import a"}),
        ("rule 2", {"stage/lock.py": "from helpers.store.tables import keep", "store/tables.py": "keep = 1"}),
        ("rule 2", {"scoring/text.py": "from helpers.models.parts import x", "models/parts.py": "x = 1"}),
        ("rule 2", {"install.py": "from helpers.config import x", "config.py": "x = 1"}),
        ("rule 2", {"attic/old.py": "from helpers.config import x", "config.py": "x = 1"}),
        ("rule 4", {"demo/page.py": "from helpers.runner.run import run", "runner/run.py": "run = 1"}),
        ("rule 4", {"plots/look.py": "from helpers.models.parts import x", "models/parts.py": "x = 1"}),
        ("rule 5", {"models/gif_qa/ask.py": "import helpers.models.adem_vl.model", "models/adem_vl/model.py": ""}),
        ("rule 6", {"store/a.py": "from helpers.store.b import _x", "store/b.py": "_x = 1"}),
        ("rule 6", {"store/a.py": "from helpers.store import b\nb._x", "store/b.py": "_x = 1"}),
        ("rule 2", {"__init__.py": "from helpers.runner.run import run", "runner/run.py": "run = 1"}),
        ("rule 5", {"scoring/scienceqa.py": "from helpers.scoring import x", "scoring/tgif_qa.py": "x = 1"}),
        ("rule 5", {"scoring/scienceqa_tables.py": "import helpers.scoring.tgif_qa", "scoring/tgif_qa.py": ""}),
        ("rule 6", {"store/a.py": "import helpers.store.b as b\nb._x", "store/b.py": "_x = 1"}),
        ("rule 6", {"store/a.py": "def f(model):\n    model._x()", "store/b.py": "class B:\n    def _x(self): pass"}),
        ("rule 6", {"store/a.py": "import helpers\nhelpers.runner"}),
        ("rule 6", {"suite.py": "import importlib\nimportlib.import_module('helpers.store')"}),
        ("rule 6", {"suite.py": "from importlib import import_module as find\nfind('helpers.store')"}),
        ("rule 7", {"store/a.py": "import os\nos.replace('a', 'b')"}),
        ("rule 7", {"store/a.py": "import shutil\nshutil.move('a', 'b')"}),
        ("rule 7", {"store/a.py": "from shutil import move\nmove('a', 'b')"}),
        ("rule 7", {"store/a.py": "def f(path, other):\n    path.rename(other)"}),
        ("rule 7", {"store/a.py": "def f(path, other):\n    path.replace(other)"}),
        ("rule 7", {"store/a.py": "def f(path):\n    return list(path.rglob('*'))"}),
        ("rule 7", {"store/a.py": "import os\n\n\ndef f(path):\n    return list(os.walk(path))"}),
        ("rule 7", {"store/a.py": "def f(path):\n    (path / 'a').write_text('b')"}),
        ("rule 7", {"store/a.py": "def f(table, path):\n    table.to_parquet(path / 'a')"}),
        ("rule 7", {"store/a.py": "def f(table, path):\n    table.to_csv(path_or_buf=path)"}),
        ("rule 7", {"store/a.py": "def f(path):\n    with path.open('wb') as file:\n        file.write(b'')"}),
        ("rule 7", {"store/a.py": "def f(path):\n    return open(path, mode='w')"}),
        ("a face", {"store/__init__.py": "def f(): pass"}),
    ],
)  # fmt: skip
def test_a_fault_is_told_with_its_rule(tmp_path, rule, code):
    """Each rule, broken in a house of a few files, is told with file and line; a house under TYPE_CHECKING is not."""
    for name, text in code.items():
        path = tmp_path / "helpers" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for folder in [path.parent, *path.parent.parents]:
            if folder != tmp_path and tmp_path in folder.parents:
                (folder / "__init__.py").touch()
    told = faults_of(tmp_path)
    assert any(f": {rule}" in fault for fault in told), told
    assert all(fault.startswith("helpers/") and fault.split(":")[1].isdigit() for fault in told)
    if rule in ("rule 6", "rule 7", "a face"):  # these look at more than imports
        return
    for name, text in code.items():
        hidden = "if TYPE_CHECKING:\n    " + (text or "pass").replace("\n", "\n    ")
        (tmp_path / "helpers" / name).write_text(hidden)
    assert not [fault for fault in faults_of(tmp_path) if ": rule" in fault]


def _loaded_by(code: str, *options: str) -> set[str]:
    """Top-level names of the modules that a fresh interpreter has after running `code`."""
    code = (
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}\nprint(*{{n.partition('.')[0] for n in sys.modules}})"
    )
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_only_the_first_notebook_imports_the_runner():
    """Rule 4: notebook 00 tells how far a run is; all others know nothing of who runs them."""
    found = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        found[path.stem] = any("helpers.runner" in "".join(cell["source"]) for cell in cells)
    assert found.pop("00_start_here") and found and not any(found.values())


def test_every_file_says_what_it_is_for():
    """A reader must be able to guess the file from the question: each has a first line of its own."""
    first = {}
    for path in files_of(ROOT).values():
        told = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
        assert told and "TODO" not in told, path
        assert told not in first, f"{path} and {first.get(told)} say the same"
        first[told] = path


def test_tables_and_settings_load_no_torch():
    """Rule 3: scores, corpora, stages and profiles are read without torch, so that a command line answers at once."""
    names = [name for name in files_of(ROOT) if wing(name.replace(".", "/")) in WITHOUT_TORCH]
    loaded = _loaded_by("\n".join(f"import {name}" for name in names))
    assert "pandas" in loaded
    assert "torch" not in loaded and "transformers" not in loaded


def test_the_first_rooms_need_the_standard_library_alone():
    """Rule 3: what runs before anything is installed finds nothing but Python itself."""
    names = [name for name in files_of(ROOT) if wing(name.replace(".", "/")) in STANDARD_LIBRARY_ALONE]
    loaded = _loaded_by("\n".join(f"import {name}" for name in names), "-I", "-S")
    assert loaded - {"helpers"} <= {*sys.stdlib_module_names, "__main__"}
