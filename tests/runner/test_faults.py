"""What the operating system refuses is one sentence with a path: 2 before a kernel starts, 1 after, no traceback."""

import ast
import builtins
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.runner import run as runner
from helpers.runner.outcome import fault_of, is_sentence
from helpers.suite import main
from helpers.workspace.disk import DiskFull
from helpers.workspace.place import repo_root


def full(*_, **__):
    """What a write to a full disk raises: no path in it."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def told(capsys, word: str) -> str:
    """The one line of the error; nothing else is on stderr."""
    error = capsys.readouterr().err
    assert error.startswith(f"{word}: ") and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize(
    ("error", "place", "sentence"),
    [
        (PermissionError(13, "Permission denied", "/a/runs"), None, "/a/runs: Permission denied"),
        (PermissionError(13, "Permission denied", "x.txt"), Path("/a"), "x.txt in /a: Permission denied"),
        (OSError(18, "Invalid link", "/a", None, "/b"), Path("/c"), "/a -> /b: Invalid link"),
        (OSError(28, "No space left on device"), Path("/a/b.ipynb"), "/a/b.ipynb: No space left on device"),
        (OSError(5, "Input/output error"), None, "Input/output error"),
        (DiskFull("01 needs about 5 GB"), Path("/a"), "01 needs about 5 GB"),
        (TimeoutError(), None, "TimeoutError"),
    ],
)
def test_a_fault_is_a_sentence_with_its_path(error, place, sentence):
    assert fault_of(error, place) == sentence


def test_a_runs_folder_that_is_a_file_is_refused(suite, capsys):
    suite.notebook("one", "stage.finish({})")
    suite.runs.write_text("")
    assert suite.run() == 2
    assert str(suite.runs) in told(capsys, "Refused")


def test_a_run_whose_place_is_taken_by_a_file_is_refused(suite, capsys):
    suite.notebook("one", "stage.finish({})")
    suite.runs.mkdir()
    (suite.runs / "tiny").write_text("")
    assert suite.run() == 2
    assert str(suite.runs / "tiny") in told(capsys, "Refused")


def test_a_folder_that_cannot_be_written_is_refused(suite, capsys, monkeypatch):
    """/proc takes no folder, from root neither."""
    suite.notebook("one", "stage.finish({})")
    monkeypatch.setenv("RUNS_ROOT", "/proc/runs")
    assert suite.run() == 2
    assert "/proc/runs" in told(capsys, "Refused")


@pytest.mark.parametrize("what", ["hold_lock", "take_from_drive", "require_disk", "check_conflict", "stage_settings"])
def test_a_full_disk_before_a_kernel_is_refused_with_the_runs_folder(suite, capsys, monkeypatch, what):
    suite.notebook("one", "stage.finish({})")
    monkeypatch.setattr(runner, what, full)
    assert suite.run() == 2
    assert f"{suite.runs / 'tiny'}: No space left on device" in told(capsys, "Refused")


def test_an_upstream_note_that_cannot_be_written_is_refused(suite, capsys, monkeypatch):
    suite.notebook("one", "stage.finish({})")
    for name in ("tiny", "other"):
        (suite.runs / name).mkdir(parents=True)
    monkeypatch.setattr(runner, "write_text", full)
    assert suite.run("--upstream", "other") == 2
    assert str(suite.runs / "tiny") in told(capsys, "Refused")


def test_a_forced_run_that_cannot_move_the_old_result_is_refused(suite, capsys, monkeypatch):
    suite.notebook("one", "stage.finish({})")
    (suite.runs / "tiny" / "one").mkdir(parents=True)
    monkeypatch.setattr(runner, "put_in_place", full)
    assert suite.run("--force") == 2
    assert str(suite.runs / "tiny") in told(capsys, "Refused")


@pytest.mark.parametrize("obstacle", ["folder", "full"])
def test_a_notebook_that_cannot_be_saved_before_its_kernel_is_refused(suite, capsys, monkeypatch, obstacle):
    suite.notebook("one", "stage.finish({})")
    output = suite.runs / "tiny" / "one" / "one.ipynb"
    output.parent.mkdir(parents=True)
    output.mkdir() if obstacle == "folder" else monkeypatch.setattr(runner.nbformat, "write", full)
    assert suite.run() == 2
    assert told(capsys, "Refused").startswith(f"Refused: one cannot start: {output}: ")
    assert suite.manifest("one") is None


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("open('/proc/nothing/here')", "[Errno 2] No such file or directory: '/proc/nothing/here'"),
        ("open('/dev/full', 'w', buffering=1).write('a\\n')", "[Errno 28] No space left on device"),
        ("raise TimeoutError", "TimeoutError"),
    ],
)
def test_files_at_fault_in_a_notebook_are_a_sentence(suite, capsys, fault, sentence):
    suite.notebook("one", fault)
    assert suite.run() == 1
    error = capsys.readouterr().err
    assert error.startswith(f"Failed: one: {sentence}\nNotebook: ") and "Traceback" not in error, error


@pytest.mark.parametrize("obstacle", ["folder", "full"])
def test_a_notebook_that_papermill_cannot_save_is_a_failure(suite, capsys, monkeypatch, obstacle):
    """The disk fills up while the kernel is at work."""
    made = "here = stage.folder / 'one.ipynb'\nhere.unlink()\nhere.mkdir()" if obstacle == "folder" else "here = 1"
    suite.notebook("one", made, "stage.finish({})", "import time")
    write, saved = runner.write_text, []

    def fills_up(path: Path, text: str) -> None:
        saved.append(1)
        full() if len(saved) > 5 else write(path, text)

    if obstacle == "full":
        monkeypatch.setattr(runner, "write_text", fills_up)
    assert suite.run() == 1
    error = capsys.readouterr().err
    output = suite.runs / "tiny" / "one" / "one.ipynb"
    assert f"Failed: one: {output}: " in error and "Traceback" not in error


def test_the_last_cell_of_a_notebook_that_a_full_disk_cut_is_not_known(tmp_path):
    notebook = tmp_path / "one.ipynb"
    assert runner._last_cell(notebook) == "before its first cell"
    for content in ("", '{"cells": [{"cell'):
        notebook.write_text(content)
        assert "cannot be read" in runner._last_cell(notebook)


def test_a_report_that_cannot_be_written_is_a_failure(suite, capsys, monkeypatch):
    suite.notebook("one", "stage.finish({})")
    monkeypatch.setattr(runner, "write_report", full)
    assert suite.run() == 1
    report = suite.runs / "tiny" / "report.html"
    assert told(capsys, "Failed") == f"Failed: the report is not written: {report}: No space left on device\n"
    assert suite.manifest("one")["status"] == "complete"


def test_a_report_shows_saved_figures_where_a_notebook_cannot_be_read(suite):
    suite.notebook("one", "stage.finish({})")
    assert suite.run() == 0
    folder = suite.runs / "tiny" / "one"
    (folder / "one.ipynb").write_text("{")
    (folder / "figures").mkdir()
    (folder / "figures" / "a.png").write_bytes(b"hello")
    assert suite.run() == 0
    assert "data:image/png;base64,aGVsbG8=" in (suite.runs / "tiny" / "report.html").read_text()


@pytest.mark.parametrize(
    "argv",
    [
        ["--profile", "/dev/full/x.yaml"],
        ["score", "scienceqa", "/proc/self/mem", "--gold", "/proc/self/mem"],
        ["make-shapes", "--train", "2", "--test", "0", "--out", "/proc/shapes"],
        ["quota", "--figure", "/proc/figure.png"],
    ],
)
def test_other_commands_refuse_in_a_sentence(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path / "runs"))
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "Refused: " in error and "Traceback" not in error


def test_p06_as_it_was_seen(tmp_path):
    """An ordinary user under a folder that only another one may write, as a process of its own."""
    if not shutil.which("setpriv") or os.getuid():
        pytest.skip("needs setpriv, and root to drop what root may do")
    tmp_path.chmod(0o555)
    os.chown(tmp_path, 12345, -1)
    drop = ["-dac_override,-dac_read_search"]
    command = ["setpriv", f"--bounding-set={drop[0]}", f"--inh-caps={drop[0]}", sys.executable, "-m", "helpers.suite"]
    environment = os.environ | {"RUNS_ROOT": str(tmp_path / "runs"), "PYTHONPATH": str(repo_root())}
    done = subprocess.run([*command, "--only", "00"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"Refused: {tmp_path / 'runs'}: Permission denied")


def test_errors_of_the_suite_and_of_the_system_are_sentences_and_others_are_not():
    classes = {}
    for path in (repo_root() / "helpers").rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text("utf-8")))
        classes |= {node.name: [ast.unparse(base) for base in node.bases] for node in nodes if hasattr(node, "bases")}

    def is_error(name: str) -> bool:
        if name in classes:
            return any(map(is_error, classes[name]))
        return isinstance(found := getattr(builtins, name, None), type) and issubclass(found, BaseException)

    ours = {name for name in classes if is_error(name)}
    assert {"CorpusError", "StageError", "TooLong", "DiskFull"} < ours
    assert all(map(is_sentence, ours | {"OSError", "PermissionError", "TimeoutError"}))
    assert not any(map(is_sentence, ["ValueError", "KeyError", "AssertionError", "OutOfMemoryError", "Error"]))


def test_a_refused_corpus_is_its_sentence_and_what_was_left_out_is_told(suite, capsys):
    """No traceback on the terminal; a stage's word on what it kept out stands behind its status, then and later."""
    suite.notebook("one", "stage.finish({'left_out': '11 of 40 rows and 18 GIFs left out: rejects.parquet'})")
    suite.notebook("two", "from helpers.corpora import CorpusError", "raise CorpusError('qa.csv:\\n  row 3 is empty')")
    for status in ("complete in", "already done"):
        assert suite.run() == 1
        out, error = capsys.readouterr()
        output = suite.runs / "tiny" / "two" / "two.ipynb"
        assert error == f"Failed: two: qa.csv:\n  row 3 is empty\nNotebook: {output}\n"
        line = next(line for line in out.splitlines() if status in line)
        assert line.endswith("; 11 of 40 rows and 18 GIFs left out: rejects.parquet")
