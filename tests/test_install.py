"""The set-up cell: finds the helpers wherever they are and installs only what an image lacks."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest

from helpers import install
from helpers import install as helpers_install
from helpers.install import install_missing, missing_packages
from helpers.workspace.place import repo_root

SET_UP = nbformat.read(repo_root() / "notebooks" / "00_start_here.ipynb", as_version=4).cells[2].source
LACKING = "gifqa-nothing-real"  # a requirement that no environment and no index has


def make_wheel(folder: Path, name: str, files: dict[str, str], requires: str = "") -> Path:
    """Write a wheel of pure Python."""
    stem, records = f"{name.replace('-', '_')}-1.0", []
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    metadata += f"Requires-Dist: {requires}\n" if requires else ""
    info = {"METADATA": metadata, "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        for path, text in {**files, **{f"{stem}.dist-info/{key}": text for key, text in info.items()}}.items():
            wheel.writestr(path, text)
            records.append(f"{path},,\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "".join(records))
    return folder / f"{stem}-py3-none-any.whl"


def helpers_wheel(folder: Path) -> Path:
    """A wheel of the helpers that the set-up cell uses, which states a requirement that is not installed."""
    root = repo_root() / "helpers"
    paths = [root / f"{name}.py" for name in ("__init__", "install", "config")]
    paths += [*sorted((root / "workspace").glob("*.py")), *sorted((root / "profiles").rglob("*.yaml"))]
    files = {f"helpers/{path.relative_to(root).as_posix()}": path.read_text() for path in paths}
    return make_wheel(folder, "gif-question-answering", files, LACKING)


def run_cell(here: Path, inputs: Path, *after: str, **environment: str) -> subprocess.CompletedProcess:
    """Run the set-up cell, and lines after it, in a Python of its own."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("KAGGLE", "PYTHONPATH"))}
    variables |= {"KAGGLE_CACHE_MOUNT_FOLDER": str(inputs), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""} | environment
    here.mkdir(parents=True, exist_ok=True)
    line = [sys.executable, "-c", "\n".join([SET_UP, *after])]
    return subprocess.run(line, cwd=here, env=variables, capture_output=True, text=True)


def test_helpers_and_what_is_missing_come_from_an_attached_data_set_without_internet(tmp_path):
    data_set, site = tmp_path / "input" / "datasets" / "owner" / "helpers", tmp_path / "site"
    helpers_wheel(data_set)
    make_wheel(data_set, LACKING, {"gifqa_nothing_real.py": "value = 7"})
    (data_set / "gif_qa_helpers.json").write_text("{}")
    lines = ["sys.path.append(os.environ['PIP_TARGET'])", "import gifqa_nothing_real, helpers"]
    done = run_cell(
        tmp_path / "working",
        tmp_path / "input",
        *lines,
        "print(gifqa_nothing_real.value, helpers.__file__)",
        PIP_TARGET=str(site),
    )
    assert done.returncode == 0, done.stderr
    assert f"Installing {LACKING}" in done.stdout and "\n7 " in done.stdout
    assert str(repo_root()) not in done.stdout.splitlines()[-1]


def test_what_can_be_had_nowhere_is_told_with_the_ways_out(tmp_path):
    data_set = tmp_path / "input" / "helpers"
    helpers_wheel(data_set)
    (data_set / "gif_qa_helpers.json").write_text("{}")
    done = run_cell(tmp_path / "working", tmp_path / "input")
    assert done.returncode and f"RuntimeError: {LACKING} could not be installed" in done.stderr
    assert "kaggle push --wheels" in done.stderr


def test_a_wheel_uploaded_beside_the_notebook_does(tmp_path):
    helpers_wheel(tmp_path / "here")
    make_wheel(tmp_path / "here", LACKING, {"gifqa_nothing_real.py": ""})
    done = run_cell(tmp_path / "here", tmp_path / "none", PIP_TARGET=str(tmp_path / "site"))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("where", ["clone/notebooks", "beside"])
def test_a_clone_around_or_beside_the_notebook_does(tmp_path, where):
    clone = tmp_path / ("clone" if where.startswith("clone") else "beside/clone")
    clone.mkdir(parents=True)
    (clone / "helpers").symlink_to(repo_root() / "helpers")
    done = run_cell(tmp_path / where, tmp_path / "none", "print(sys.path[0])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(clone)


def test_no_helpers_and_two_of_them_are_refused_with_a_listing(tmp_path):
    assert "open this notebook in a clone" in run_cell(tmp_path / "empty", tmp_path / "none").stderr
    for name in ("one", "two"):
        helpers_wheel(tmp_path / "input" / name)
        (tmp_path / "input" / name / "gif_qa_helpers.json").write_text("{}")
    error = run_cell(tmp_path / "working", tmp_path / "input").stderr
    assert "AssertionError" in error and "input/one" in error and "input/two" in error


def test_nothing_is_missing_in_the_environment_of_the_clone():
    assert missing_packages() == []


def test_torch_numpy_and_pillow_are_pinned_and_an_old_torchao_goes(monkeypatch):
    calls = []
    installed = {"torch": "2.8.0", "numpy": "2.0.2", "pillow": "11.3.0", "torchao": "0.10.0"}
    monkeypatch.setattr(helpers_install, "_installed", installed.__contains__)
    monkeypatch.setattr(install.metadata, "version", installed.__getitem__)
    monkeypatch.setattr(helpers_install, "missing_packages", lambda: ["bitsandbytes>=0.49"])
    kept = []

    def pip(*arguments):
        calls.append(arguments)
        if arguments[0] == "install":
            kept.append(Path(arguments[2]).read_text())

    monkeypatch.setattr(helpers_install, "_pip", pip)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    install_missing("/wheels")
    assert calls[0] == ("uninstall", "--yes", "torchao")
    assert calls[1][:2] == ("install", "--constraint") and kept == ["torch==2.8.0\nnumpy==2.0.2\npillow==11.3.0\n"]
    assert calls[1][3:] == ("--no-index", "--find-links", "/wheels", "bitsandbytes>=0.49")
    assert len(calls) == 2
