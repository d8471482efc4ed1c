"""What papermill lets pass must not fool the runner: each trap is set with a real notebook and a real kernel."""

import json
import sys

import nbformat
import papermill
import pytest

from helpers.workspace.disk import write_json


def test_unknown_parameter_is_refused_before_any_kernel(suite, capsys):
    suite.notebook("one", "stage.finish({})", parameters="learning_rate = 0.1  # step\n")
    assert suite.run("-p", "learning_rat", "0.2") == 2
    assert "unknown parameter 'learning_rat'; did you mean 'learning_rate'?" in capsys.readouterr().err
    assert not suite.runs.exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [("steps", "1.5"), ("steps", "true"), ("rate", "fast"), ("flag", "1"), ("names", "a"), ("training.seed", "1.5")],
)
def test_ill_typed_parameter_is_refused_before_any_kernel(suite, capsys, name, text):
    parameters = "steps = 3  # s\nrate = 0.1  # r\nflag = False  # f\nnames = []  # n\n"
    suite.notebook("one", "stage.finish({})", parameters=parameters)
    assert suite.run("-p", name, text) == 2
    assert name in capsys.readouterr().err and not suite.runs.exists()


def test_numbers_arrive_with_the_type_of_the_parameter(suite):
    # papermill's own -y turns 1e-4 into text and its -p turns 007 into 7
    suite.notebook(
        "one",
        "stage.finish({'rate': rate, 'tag': tag, 'steps': steps, 'lora': stage.profile.training.learning_rate_lora})",
        parameters="rate = 0.1  # r\ntag = ''  # t\nsteps = 1  # s\n",
    )
    given = ["-p", "rate", "1e-4", "-p", "tag", "007", "-p", "steps", "3", "-p", "training.learning_rate_lora", "1e-5"]
    assert suite.run(*given) == 0
    metrics = suite.manifest("one")["metrics"]
    assert metrics == {"rate": 1e-4, "tag": "007", "steps": 3, "lora": 1e-5}
    assert type(metrics["rate"]) is float


def test_killed_kernel_is_a_failure_although_papermill_marks_its_cells_completed(suite, capsys):
    suite.notebook("one", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "stage.finish({})")
    assert suite.run() == 1
    error = capsys.readouterr().err
    assert "one: the kernel died (out of memory?) in cell [3]: import os, signal" in error
    cells = nbformat.read(suite.runs / "tiny" / "one" / "one.ipynb", 4).cells
    assert cells[-1].metadata.papermill.status == "completed"  # the trap itself: this cell never ran
    assert suite.manifest("one") is None


def test_sys_exit_zero_is_no_success(suite, capsys):
    suite.notebook("one", "import sys; sys.exit(0)", "stage.finish({})")
    assert suite.run() == 1
    assert "one ended without finishing its stage" in capsys.readouterr().err


def test_sys_exit_zero_after_a_pause_does_not_pass_for_another_pause(suite, capsys):
    suite.notebook("one", "stage.finish({}, status='partial')")
    assert suite.run() == 75
    suite.notebook("one", "import sys; sys.exit(0)")
    assert suite.run() == 1
    assert "ended without finishing" in capsys.readouterr().err


def test_exception_is_told_with_notebook_cell_and_error(suite, capsys):
    suite.notebook("one", "values = [1, 2]", "total = 1 / 0", "stage.finish({})")
    suite.notebook("two", "stage.finish({})", inputs=["one"])
    assert suite.run() == 1
    error = capsys.readouterr().err
    assert "one, cell [4]: total = 1 / 0" in error and "ZeroDivisionError: division by zero" in error
    assert "\x1b" not in error
    assert suite.manifest("two") is None


def test_notebook_that_drops_a_parameter_is_found_out(suite, capsys):
    suite.notebook("one", "stage.finish({})", parameters="seed = 0  # s\n")
    book = nbformat.read(suite.folder / "one.ipynb", 4)
    book.cells[1].source = book.cells[1].source.replace("{'seed': seed}", "{}")
    nbformat.write(book, suite.folder / "one.ipynb")
    assert suite.run() == 1
    assert "pass all parameters on to Stage" in capsys.readouterr().err


def test_kernel_is_this_interpreter_even_if_the_user_has_another_python3_kernel(suite, monkeypatch):
    spec = suite.folder / "home" / "kernels" / "python3"
    spec.mkdir(parents=True)
    write_json(spec / "kernel.json", {"argv": ["/bin/false"], "display_name": "Other", "language": "python"})
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(suite.folder / "home"))
    suite.notebook("one", "import sys; stage.finish({'prefix': sys.prefix})")
    assert suite.run() == 0
    assert suite.manifest("one")["metrics"]["prefix"] == sys.prefix


def test_papermill_still_has_the_trap_of_unknown_parameters(suite):
    # if this ever fails, papermill has become strict and the check before the kernel could go
    suite.notebook("one", parameters="rate = 0.1  # r\n")
    book = papermill.execute_notebook(
        suite.folder / "one.ipynb", None, {"rat": 0.2}, kernel_name="python3", prepare_only=True, progress_bar=False
    )
    assert "rat = 0.2" in json.dumps(book)
