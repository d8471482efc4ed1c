"""A new system is a notebook, an entry in suite.yaml and its own helper: the runner knows nothing of it beforehand."""

import json
import os

import pytest

from helpers.config import load_profile
from helpers.runner import quota
from helpers.runner.outcome import DONE, FAILED, PAUSED
from helpers.runner.plan import make_plan, run_parser
from helpers.stage import load_suite, read_manifest
from helpers.suite import main
from helpers.workspace import repo_root
from tests.kaggle_stand_in import OWNER, DataSet, Fault

NAME = "06_counting"
HELPER = '''
"""Counts words: the only code of this system."""

import json
import time

from helpers.stage import DeadlineReached
from helpers.stage.pace import note_pace, probe_steps
from helpers.workspace import write_json


def count(words, folder, deadline, slowly=0.0):
    """Count letters word by word, each kept at once; goes on where it stopped."""
    file, began, ends = folder / "counted.json", time.monotonic(), time.monotonic() + deadline
    counted = json.loads(file.read_text()) if file.is_file() else {}
    done = 0
    for word in words:
        if word in counted:
            continue
        if done >= probe_steps() or time.monotonic() > ends:
            note_pace(folder, "words", done, time.monotonic() - began, len(words) - len(counted))
            raise DeadlineReached(f"{len(counted)} of {len(words)} words are counted and kept")
        time.sleep(slowly)
        counted[word] = len(word)
        write_json(file, counted)
        done += 1
    return counted
'''
CELLS = (
    """
    import dummy_counting
    words = "one three five seven eleven".split() + [book]
    counted = dummy_counting.count(words, stage.folder, stage.remaining_seconds, slowly)
    """,
    """
    found = {"letters": sum(counted.values()), "longest": max(counted.values()), "blind_letters": 0}
    stage.finish(found, outputs=["counted.json"])
    """,
)
ENTRY = {
    "title": "Counting",
    "about": "Counts letters.",
    "sections": ["evaluation"],
    "options": {"book": "qa"},
    "data": ["book"],
    "gpu": True,
    "probe": True,
    "minutes": {"tiny": 30, "kaggle": 30},
    "scores": {
        "title": "Counting words",
        "rows": {"letters": "letters in all", "longest": "longest word"},
        "columns": {"": "model", "blind_": "blind"},
    },
}


@pytest.fixture
def counting(suite, monkeypatch):
    """The suite of one dummy stage, whose helper is found where it lies."""
    (suite.folder / "dummy_counting.py").write_text(HELPER)
    suite.notebook(NAME, *CELLS, parameters="book = 'dictionary'  # b\nslowly = 0.0  # s\n", **ENTRY)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(repo_root()), str(suite.folder)]))
    return suite


def test_it_is_run_measured_forecast_resumed_and_reported(counting, monkeypatch, capsys):
    spec, profile = load_suite(counting.folder / "suite.yaml").spec(NAME), load_profile("tiny")
    guess = quota.forecast(spec, profile, counting.runs / "tiny")
    assert guess.seconds == 1800 and not guess.measured
    monkeypatch.setenv("SUITE_PROBE_STEPS", "2")
    assert counting.run("-p", "slowly", "0.2") == PAUSED
    assert "2 of 6 words are counted and kept" in capsys.readouterr().out
    told = quota.forecast(spec, profile, counting.runs / "tiny")
    assert told.measured and told.source.startswith("4 words at ")
    assert 0.8 <= told.seconds - quota.START_UP_SECONDS < 60
    assert main(["quota", "--profile", "tiny", "-p", "slowly", "0.2"]) == DONE
    assert "06_counting" in (out := capsys.readouterr().out) and "4 words at " in out
    monkeypatch.delenv("SUITE_PROBE_STEPS")
    before = json.loads((counting.runs / "tiny" / NAME / "counted.json").read_text())
    assert counting.run("-p", "slowly", "0.2") == DONE and list(before) == ["one", "three"]
    out = capsys.readouterr().out
    assert "Counting words" in out and "letters in all 33 0" in " ".join(out.split())
    assert counting.run("-p", "slowly", "0.2") == DONE and "already done" in capsys.readouterr().out
    report = (counting.runs / "tiny" / "report.html").read_text()
    assert "<h2>Counting</h2>" in report and "<h3>Counting words</h3>" in report and "longest word" in report


def test_options_of_the_command_line_fill_its_parameters(counting, tmp_path):
    """--bundle too, of which the runner knows nothing but that it is there."""
    (tmp_path / "gifs").mkdir()
    (tmp_path / "qa.csv").write_text("gif,task,question,answer,options\n")
    line = ["--gifs", str(tmp_path / "gifs"), "--qa", str(tmp_path / "qa.csv")]
    plan = make_plan(run_parser().parse_args(line), line)
    assert plan.parameters[NAME] == {"book": str(tmp_path / "qa.csv"), "slowly": 0.0}
    counting.notebook(NAME, *CELLS, parameters="book = 'dictionary'  # b\n", **ENTRY | {"options": {"book": "bundle"}})
    line = ["--bundle", str(tmp_path / "gifs")]
    assert make_plan(run_parser().parse_args(line), line).parameters[NAME] == {"book": str(tmp_path / "gifs")}


def test_it_is_pushed_to_kaggle_killed_there_and_resumed(counting, site, account, empty_wheels, monkeypatch, capfd):
    monkeypatch.setattr("helpers.runner.kaggle.remote.MEASURED_FROM", 60.0)  # so that it is measured first
    here = {"SUITE_FILE": str(counting.folder / "suite.yaml"), "PYTHONPATH": os.environ["PYTHONPATH"]}
    site.environment |= here
    site.faults["06-counting"] = [Fault("kill", "counted.json")]
    site.gpu_hours = (10.0, 30.0)
    monkeypatch.setattr("helpers.runner.kaggle.push.PROBE_STEPS", 2)
    pushed = ["kaggle", "push", "--profile", "tiny", "--run", "tiny", "--deadline", "3", "--attach", f"{OWNER}/books"]
    resume = ["kaggle", "resume", "--run", "tiny", "--deadline", "3"]
    site.data_sets[f"{OWNER}/books"] = DataSet([{"words.txt": b"x"}])
    codes = [main([*pushed, "-p", "slowly", "0.5"])]
    while codes[-1] != DONE and len(codes) < 4:
        codes.append(main(resume))
    assert codes == [FAILED, DONE], capfd.readouterr()
    runs = site.runs[f"{OWNER}/gifqa-tiny-06-counting"]
    assert f"{OWNER}/books" in runs[0].sources["data"]  # a stage with data gets what is attached
    out = capfd.readouterr().out
    assert "measures its pace first" in out and "06_counting: partly done" in out and "words at " in out
    assert [run.status.name for run in runs] == ["ERROR", "COMPLETE", "COMPLETE"]  # killed, measured, done
    assert f"{OWNER}/gifqa-tiny-06-work" in runs[1].sources["data"]  # what the dead run had counted
    assert "goes on with the work of an earlier session" in runs[1].log and runs[2].sources["kernel"]
    assert "Counting words" in out
    made = read_manifest(account / "tiny" / NAME)
    assert made["status"] == "complete" and made["metrics"]["letters"] == 33
