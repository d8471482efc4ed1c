"""The command line: plans, refusals, pauses, skipping, forcing, deadlines, the report, the README's table."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_notebook

from helpers import stage as stages
from helpers.config import ConfigError, load_profile
from helpers.runner import drive, quota
from helpers.runner import run as runner
from helpers.runner.commands import notebook_table, update_readme
from helpers.runner.outcome import PAUSED, REFUSED, Failed, Paused
from helpers.runner.plan import RunPlan, make_plan, parse_deadline, run_parser, without_options
from helpers.runner.quota import budgets, forecasts
from helpers.runner.report import print_scores, score_tables, write_report
from helpers.stage import notebook
from helpers.stage.pace import note_pace
from helpers.suite import main
from helpers.workspace import place as workspace_place
from helpers.workspace.machine import Gpu
from helpers.workspace.place import repo_root

NAMES = ["01_data_sharding", "02_feature_caching", "03_adapter_training", "04_evaluation"]
PARAMETERS = {
    "01_data_sharding": "gifs = ''  # g\nqa = ''  # q\nholdout = 0.2  # h\n",
    "02_feature_caching": "",
    "03_adapter_training": "note = ''  # n\nbundle = ''  # b\n",
    "04_evaluation": "",
}


class World:
    """A suite of four notebooks whose execution is replaced by `act`, so that no kernel is needed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs, self.ran, self.act = folder, folder / "runs", [], {}

    def execute(self, plan, spec):
        """Stand in for the kernel: note the call, then finish the stage as its notebook would."""
        self.ran.append(spec.name)
        action = self.act.get(spec.name, "complete")
        if action == "fail":
            raise Failed(f"{spec.name}, cell [3]: boom")
        if action == "deadline":
            raise Paused("time is up: 3 of 7 GIFs are decoded and kept")
        stage = stages.Stage(spec.name, plan.profile_name, plan.run, plan.overrides, plan.parameters[spec.name])
        (stage.folder / "made.txt").write_text(action)
        stage.finish({"frameqa_accuracy": 0.9, "blind_frameqa_accuracy": 0.3}, ["made.txt"], status=action)
        stages.release_lock(stage.folder / ".lock")

    def run(self, *argv: str) -> int:
        """Run the command line; `ran` then holds the stages that were executed."""
        self.ran.clear()
        return main(list(argv))


@pytest.fixture
def world(tmp_path, monkeypatch):
    """The four stages of the main path with the real inputs and sections, in a temporary folder."""
    suite = yaml.safe_load((repo_root() / "notebooks" / "suite.yaml").read_text())
    suite["stages"] = [entry for entry in suite["stages"] if entry["name"] in NAMES]
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    for name in NAMES:
        common = "profile = ''  # p\nrun = ''  # r\noverrides = {}  # o\n"
        cell = new_code_cell(common + PARAMETERS[name], metadata={"tags": ["parameters"]})
        nbformat.write(new_notebook(cells=[cell]), tmp_path / f"{name}.ipynb")
    monkeypatch.setenv("SUITE_FILE", str(tmp_path / "suite.yaml"))
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path / "runs"))
    monkeypatch.delenv("SUITE_DEADLINE", raising=False)
    stand_in = World(tmp_path)
    monkeypatch.setattr(runner, "execute", stand_in.execute)
    return stand_in


def test_default_run_then_nothing_left_to_do(world, capsys):
    assert world.run("--profile", "tiny") == 0 and world.ran == NAMES
    out = capsys.readouterr().out
    assert "FrameQA accuracy 0.900 0.300" in " ".join(out.split()) and str(world.runs / "tiny" / "report.html") in out
    assert world.run("--profile", "tiny") == 0 and world.ran == []
    assert capsys.readouterr().out.count("already done") == 4


def test_from_and_only_choose_stages(world):
    assert world.run("--only", "01") == 0 and world.ran == NAMES[:1]
    assert world.run("--from", "02_feature_caching.ipynb") == 0 and world.ran == NAMES[1:]
    assert world.run("--run", "other", "--only", "01", "--only", "02_f") == 0 and world.ran == NAMES[:2]


def test_missing_upstream_is_refused(world, capsys):
    assert world.run("--from", "03") == REFUSED
    error = capsys.readouterr().err
    assert "03_adapter_training needs 02_feature_caching" in error and "--from 01_data_sharding" in error
    assert world.ran == [] and world.run("--only", "01") == 0 and world.run("--from", "03") == REFUSED
    assert "--from 02_feature_caching" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--profile", "tinny"], "did you mean 'tiny'"),
        (["--only", "05"], "unknown stage '05'"),
        (["--from", "0"], "unknown stage '0'"),
        (["-p", "profile", "x"], "use --profile"),
        (["-p", "epochs", "3"], "did you mean 'alignment.epochs' or 'training.epochs' or 'adem.epochs'"),
        (["-p", "notes", "x"], "did you mean 'note'"),
        (["--deadline", "25:00"], "--deadline '25:00'"),
        (["--deadline", "-5"], "--deadline '-5'"),
        (["--gifs", "."], "belong together"),
        (["--holdout", "0.3"], "--holdout applies"),
        (["--gifs", "nowhere", "--qa", "x.csv"], "--gifs nowhere does not exist"),
        (["--bundle", "."], "holds no bundle.json"),
        (["--upstream", "nothing"], "no such run"),
        (["--run", "../x"], "run name '../x'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_usage_is_refused_before_anything_starts(world, capsys, argv, message):
    try:
        code = world.run(*argv)
    except SystemExit as exit:  # argparse's own refusals
        code = exit.code
    assert code == REFUSED and message in capsys.readouterr().err
    assert world.ran == [] and not world.runs.exists()


def test_other_settings_are_refused_then_forced_or_named(world, capsys):
    world.run()
    assert world.run("-p", "training.epochs", "9") == REFUSED and world.ran == []
    error = capsys.readouterr().err
    assert f"profile.training.epochs: {load_profile('tiny').training.epochs} there, 9 now" in error.replace("9.0", "9")
    assert "--run NAME" in error and "--force" in error
    assert world.run("-p", "training.epochs", "9", "--run", "long") == 0 and world.ran == NAMES
    assert world.run("-p", "training.epochs", "9", "--force", "--from", "03") == 0 and world.ran == NAMES[2:]
    assert world.run("-p", "training.epochs", "9") == 0 and world.ran == []


def test_forced_run_that_fails_has_lost_nothing(world, capsys):
    world.run()
    world.act["03_adapter_training"] = "fail"
    assert world.run("--force", "--only", "03") == 1
    kept = world.runs / "tiny" / "03_adapter_training.previous"
    assert str(kept) in capsys.readouterr().err and (kept / "made.txt").read_text() == "complete"
    (world.runs / "tiny" / "03_adapter_training").mkdir()  # what the failed run left
    assert world.run("--force", "--only", "03") == 1 and (kept / "made.txt").read_text() == "complete"
    del world.act["03_adapter_training"]
    assert world.run("--only", "03") == 0 and not kept.exists()


def test_pause_says_how_to_go_on_and_goes_on(world, capsys):
    world.act["03_adapter_training"] = "partial"
    argv = ["--profile", "tiny", "--force", "--deadline", "600", "-p", "training.epochs", "3"]
    assert world.run(*argv) == PAUSED and world.ran == NAMES[:3]
    assert "To go on: ./run_all.sh --profile tiny -p training.epochs 3\n" in capsys.readouterr().out
    assert world.run("--only", "04", "-p", "training.epochs", "3") == PAUSED and world.ran == []
    world.act.clear()
    assert world.run("-p", "training.epochs", "3") == 0 and world.ran == NAMES[2:]


def test_a_stage_that_met_its_deadline_pauses_the_run(world, capsys):
    world.act["02_feature_caching"] = "deadline"
    assert world.run() == PAUSED and world.ran == NAMES[:2]
    out = capsys.readouterr().out
    assert "02_feature_caching: time is up: 3 of 7 GIFs are decoded and kept" in out and "To go on: ./run_all.sh" in out
    world.act.clear()
    assert world.run() == 0 and world.ran == NAMES[1:]


def test_failure_stops_the_run_and_is_told(world, capsys):
    world.act["02_feature_caching"] = "fail"
    assert world.run() == 1 and world.ran == NAMES[:2]
    assert "Failed: 02_feature_caching, cell [3]: boom" in capsys.readouterr().err


def test_deadline_that_has_passed_starts_nothing(world, capsys):
    plan = make_plan(run_parser().parse_args([]), [])
    assert runner.run(plan, deadline=time.time() - 1) == PAUSED and world.ran == []
    assert "the deadline has passed" in capsys.readouterr().err


class OnKaggle:
    """A faked Kaggle session with two T4s: `hours` are used this week, and what each kernel saw is noted."""

    def __init__(self, world, monkeypatch) -> None:
        self.hours, self.deadlines, self.probes, self.asked = 0.0, [], [], 0
        t4 = Gpu("Tesla T4", 15.0, (7, 5))
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
        for room in (runner, budgets, forecasts):
            monkeypatch.setattr(room, "gpus", lambda: [t4, t4])
        monkeypatch.setattr(budgets, "ask_account", self.account)
        monkeypatch.setattr(notebook, "_check_gpu", lambda spec: None)  # torch has no part in the fake
        act = world.execute

        def execute(plan, spec):
            self.deadlines.append(float(os.environ["SUITE_DEADLINE"]) - time.time())
            self.probes.append(os.environ.get("SUITE_PROBE_STEPS"))
            act(plan, spec)

        monkeypatch.setattr(runner, "execute", execute)

    def account(self):
        self.asked += 1
        return quota.Account(self.hours, 30.0, None)


@pytest.fixture
def new_session(monkeypatch):
    """A session that has just begun, however long this machine has been up."""
    for room in (workspace_place, runner, budgets):
        monkeypatch.setattr(room, "session_seconds", lambda: 0.0)


@pytest.fixture
def on_kaggle(world, new_session, monkeypatch):
    return OnKaggle(world, monkeypatch)


def test_deadline_is_the_sessions_end_then_the_weeks_hours(world, on_kaggle):
    assert world.run("--profile", "tiny", "--only", "01") == 0
    assert on_kaggle.deadlines[0] == pytest.approx(12 * 3600 - 900, abs=60)
    on_kaggle.hours = 27.0
    assert world.run("--profile", "tiny", "--only", "02") == 0
    assert on_kaggle.deadlines[1] == pytest.approx(3 * 3600 - 900, abs=60)
    assert world.run("--profile", "tiny", "--only", "04", "--force") == REFUSED
    assert "SUITE_DEADLINE" not in os.environ


def test_stage_that_no_hours_are_left_for_is_not_started(world, on_kaggle, capsys):
    on_kaggle.hours = 29.9
    assert world.run("--profile", "kaggle") == PAUSED and world.ran == []
    out = capsys.readouterr().out
    assert "29.9 of 30 GPU-hours used this week (account), 0.1 left" in out
    assert "about 1.0 h (suite.yaml's minutes, not measured), 0 min until the deadline: too little to start" in out
    assert "the first from" in out and "Paused. To go on: ./run_all.sh --profile kaggle\n" in out
    assert world.run("--profile", "kaggle", "--weekly-hours", "31") == PAUSED  # the account's hours cannot be raised
    on_kaggle.hours = 0.0
    assert world.run("--profile", "kaggle", "--weekly-hours", "0.2") == PAUSED and world.ran == []


def test_training_is_measured_on_a_few_steps_that_are_kept(world, on_kaggle, capsys):
    folder = world.runs / "kaggle" / "03_adapter_training"
    act, seen = world.execute, []

    def execute(plan, spec):
        if spec.name == "03_adapter_training":
            seen.append((os.environ.get("SUITE_PROBE_STEPS"), (folder / "pace.json").is_file()))
            if "SUITE_PROBE_STEPS" in os.environ:
                folder.mkdir(parents=True)
                note_pace(folder, "steps", 20, 60.0, 9_980, follow=["steps of the twin"])
                world.act[spec.name] = "partial"
            else:
                world.act[spec.name] = "complete"
        act(plan, spec)

    runner.execute = execute  # the fixture's monkeypatch puts the real one back
    on_kaggle.hours = 20.0
    assert world.run("--profile", "kaggle") == 0
    assert seen == [(str(quota.PROBE_STEPS), False), (None, True)]
    out = capsys.readouterr().out
    assert "about 16.7 h (9,980 steps at 0.3 a second, 10,000 steps of the twin at 0.3 a second), 9.7 h until" in out
    assert re.search(r"All of it: about 1\d\.\d GPU-hours in \d sessions", out)  # how many: by the day of the week
    assert len((world.runs / "quota.jsonl").read_text().splitlines()) == 2  # the session's first and last moment
    assert world.run("--profile", "kaggle") == 0 and world.ran == [] and on_kaggle.asked


def test_a_stage_that_ends_within_its_measurement_is_not_run_twice(world, on_kaggle):
    assert world.run("--profile", "tiny") == 0 and world.ran == NAMES
    assert on_kaggle.probes == [None, *[str(quota.PROBE_STEPS)] * 3]


def test_dead_token_or_endpoint_stops_nothing(world, on_kaggle, monkeypatch, capsys):
    def down():
        raise quota.QuotaUnknown("Kaggle's client failed: 401")

    monkeypatch.setattr(budgets, "ask_account", down)
    assert world.run("--profile", "tiny") == 0
    assert capsys.readouterr().err.count("The account's quota is not known: Kaggle's client failed: 401") == 1


def test_colab_keeps_its_stages_on_drive_and_takes_them_back(world, new_session, monkeypatch, capsys):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "x")
    monkeypatch.setattr(drive, "DRIVE", world.folder / "drive")
    (world.folder / "drive").mkdir()
    world.act["03_adapter_training"] = "partial"
    assert world.run("--profile", "tiny") == PAUSED
    shutil.rmtree(world.runs)  # the session has ended
    world.act.clear()
    assert world.run("--profile", "tiny") == 0 and world.ran == NAMES[2:]
    assert "Taking 02_feature_caching from Drive" in capsys.readouterr().out
    kept = world.folder / "drive" / "gif-question-answering" / "runs" / "tiny"
    assert [stages.read_manifest(kept / name)["status"] for name in NAMES] == ["complete"] * 4
    monkeypatch.setattr(drive, "copy_verified", lambda *a: (_ for _ in ()).throw(OSError("errno 107")))
    assert world.run("--profile", "tiny", "--force", "--only", "04") == 0
    assert "04_evaluation is not kept on Drive: errno 107" in capsys.readouterr().err
    shutil.rmtree(world.runs)
    assert world.run("--profile", "tiny", "--only", "01") == 0 and world.ran == NAMES[:1]
    error = capsys.readouterr().err
    assert "01_data_sharding could not be taken from Drive: errno 107" in error and "mount Drive again" in error


def test_without_a_gpu_nothing_is_counted_and_nothing_refused(world, monkeypatch):
    for room in (runner, budgets):
        monkeypatch.setattr(room, "gpus", lambda: [])
    assert world.run("--weekly-hours", "0.01") == 0 and world.ran == NAMES
    assert not (world.runs / "quota.jsonl").exists()


@pytest.mark.parametrize("place", ["", "tiny"])
def test_second_run_in_a_workspace_or_on_what_kaggle_fetches_is_refused(world, capsys, place):
    code = (
        "import time; from pathlib import Path; from helpers.stage import hold_lock;"
        f"hold_lock(Path({str(world.runs / place / '.lock')!r}), 'x'); print('held', flush=True); time.sleep(60)"
    )
    environment = os.environ | {"PYTHONPATH": str(repo_root())}
    holder = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        assert world.run() == REFUSED and world.ran == []
        error = capsys.readouterr().err
        assert (f"run {place!r}" if place else f"workspace {world.runs}") in error
        assert f"is in use by another process (pid {holder.pid})" in error
        assert ("use --run NAME" if place else "set RUNS_ROOT to another folder") in error
        assert world.run("--run", "other") == (0 if place else REFUSED)
    finally:
        holder.kill()
        holder.wait()
    assert world.run() == 0 and world.ran == NAMES  # the dead holder's lock file is still there


def test_too_little_disk_is_refused_before_the_stage(world, monkeypatch, capsys):
    monkeypatch.setattr("helpers.workspace.disk.free_gigabytes", lambda path: 0.01)
    assert world.run() == REFUSED and world.ran == []
    assert "01_data_sharding needs about 0.5 GB" in capsys.readouterr().err


def own_gifs(folder: Path, name="My GIFs!") -> list[str]:
    """Write a folder of own GIFs and return its options."""
    data = folder / name
    data.mkdir()
    (data / "a.gif").write_bytes(b"GIF89a")
    (data / "qa.csv").write_text("gif,task,question,answer,options\na.gif,count,How often?,3,\n")
    return ["--gifs", str(data), "--qa", str(data / "qa.csv")]


def plan_of(*argv: str) -> RunPlan:
    return make_plan(run_parser().parse_args(argv), argv)


def test_own_gifs_reach_notebook_01_under_a_run_of_their_own(world):
    plan = plan_of(*own_gifs(world.folder), "--holdout", "0.5")
    assert plan.run == "tiny-my-gifs" and plan.profile.data.corpus == "own_gifs"
    data = str(world.folder / "My GIFs!")
    assert plan.parameters["01_data_sharding"] == {"gifs": data, "qa": f"{data}/qa.csv", "holdout": 0.5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gif,question,answer\na,What?,cat\n", "qa.csv: no column task; the columns found are gif, question, answer."),
        ("a.gif,count,How often?,3\n", "qa.csv has no header"),
        ("gif,task,question,answer\n", "qa.csv has a header but no questions."),
        ("gif,task,question,answer\na,count,'How often?,\"3\n", "qa.csv: not a readable CSV near line 2"),
        (
            "gif,task,question,answer\na,count,?,3\na, Caption ,,\n",
            "row 3 is of the task caption, but there",
        ),
    ],
)
def test_a_csv_that_is_no_table_of_questions_is_refused_before_anything_starts(world, capsys, text, message):
    argv = own_gifs(world.folder)
    (world.folder / "My GIFs!" / "qa.csv").write_text(text)
    assert world.run(*argv) == REFUSED and world.ran == []
    assert message in capsys.readouterr().err
    plan_of(*argv, "--only", "02")  # which reads no CSV
    plan_of(*argv, "-p", "data.corpus", "tgif_qa")  # nor is it one of TGIF-QA


def test_links_are_passed_on_as_they_are_written(world, capsys):
    _, data, _, table = own_gifs(world.folder, "blob")
    (world.folder / "mine").symlink_to(data)
    (world.folder / "mine.csv").symlink_to(table)
    plan = plan_of("--gifs", str(world.folder / "mine"), "--qa", str(world.folder / "mine.csv"))
    assert plan.run == "tiny-mine"
    given = plan.parameters["01_data_sharding"]
    assert given["gifs"] == str(world.folder / "mine") and given["qa"] == str(world.folder / "mine.csv")
    strange = own_gifs(world.folder, "caf\udce9")
    assert world.run(*strange) == REFUSED and world.ran == []
    assert "caf\\xe9: the name is not UTF-8" in capsys.readouterr().err


def test_folder_of_question_files_keeps_the_profiles_corpus(world):
    (world.folder / "tgif").mkdir()
    folder = str(world.folder / "tgif")
    (world.folder / "list.tsv").write_text("https://host/a.gif\ta cat\n")
    gifs = str(world.folder / "list.tsv")
    plan = plan_of("--profile", "kaggle", "--gifs", gifs, "--qa", folder)
    assert plan.profile.data.corpus == "tgif_qa"
    assert plan.parameters["01_data_sharding"] == {"gifs": gifs, "qa": folder, "holdout": 0.2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video": False, "encoder": None}, "blind bundle"),
        ({"encoder": {"model": "a/b"}}, "encoder a/b, but profile tiny has tiny/xclip"),
        ({"language_model": {"model": "c/d"}}, "language model c/d, but profile tiny has tiny/llama"),
        ({"encoder": None}, "not readable as a bundle's"),
    ],
)
def test_a_bundle_that_cannot_be_scored_is_refused_before_anything_starts(world, capsys, change, message):
    bundle = world.folder / "bundle"
    bundle.mkdir()
    facts = {"video": True, "encoder": {"model": "tiny/xclip"}, "language_model": {"model": "tiny/llama"}}
    (bundle / "bundle.json").write_text(json.dumps(facts | change))
    assert world.run(*own_gifs(world.folder), "--bundle", str(bundle)) == REFUSED
    assert message in capsys.readouterr().err and world.ran == []


def test_given_bundle_is_scored_and_nothing_is_trained(world):
    bundle = world.folder / "bundle"
    bundle.mkdir()
    facts = {"video": True, "encoder": {"model": "tiny/xclip"}, "language_model": {"model": "tiny/llama"}}
    (bundle / "bundle.json").write_text(json.dumps(facts))
    argv = [*own_gifs(world.folder), "--bundle", str(bundle)]
    plan = plan_of(*argv)
    assert plan.run == "tiny-my-gifs-scored"
    assert plan.parameters["01_data_sharding"]["holdout"] == 1.0
    assert plan.parameters["03_adapter_training"] == {"note": "", "bundle": str(bundle)}


def test_edited_csv_is_noticed(world, capsys):
    argv = own_gifs(world.folder)
    assert world.run(*argv) == 0
    (world.folder / "My GIFs!" / "qa.csv").write_text("gif,task,question,answer,options\na.gif,count,How often?,2,\n")
    assert world.run(*argv) == REFUSED and world.ran == []
    assert "parameters.qa" in capsys.readouterr().err


def test_upstream_run_lends_equal_stages_only(world, capsys):
    world.run()
    argv = ["--run", "rank", "--upstream", "tiny", "-p", "language_model.lora_rank", "4"]
    assert world.run(*argv) == 0 and world.ran == NAMES[2:]
    assert capsys.readouterr().out.count("taken from run 'tiny'") == 2
    argv = ["--run", "frames", "--upstream", "tiny", "-p", "shapes.train", "7"]
    assert world.run(*argv) == 0 and world.ran == NAMES


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("profile = ''\nrun = ''\n", "lacks overrides"),
        ("profile = ''\nrun = ''\noverrides = {}\nimport os\n", "only lines like"),
        ("profile = ''\nrun = ''\noverrides = dict()\n", "not a plain value"),
    ],
)
def test_unusable_parameters_cell_is_refused(world, capsys, source, message):
    cell = new_code_cell(source, metadata={"tags": ["parameters"]})
    nbformat.write(new_notebook(cells=[cell]), world.folder / "02_feature_caching.ipynb")
    assert world.run() == REFUSED and message in capsys.readouterr().err


def test_deadline_is_minutes_or_the_next_time_of_day():
    now = datetime(2026, 11, 20, 17, 30, 15)
    assert parse_deadline("90", now) == now.timestamp() + 5400
    assert parse_deadline("0.5", now) == now.timestamp() + 30
    assert parse_deadline("18:00", now) == datetime(2026, 11, 20, 18, 0).timestamp()
    assert parse_deadline("17:30", now) == datetime(2026, 11, 21, 17, 30).timestamp()
    for text in ("", "soon", "24:00", "17:60", "0", "1h"):
        with pytest.raises(ConfigError, match="--deadline"):
            parse_deadline(text, now)


def test_progress_keeps_lines_and_thins_out_bars():
    out = io.StringIO()
    progress = runner.Progress(out)
    for text in ("read", "ing\n", "\r 1%", "\r 2%", "\r 3%\n", "done\n", "\n"):
        progress.write(text)
    assert out.getvalue() == "  reading\n  1%\n   3%\n  done\n"


def test_help_is_complete(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0
    options = "--profile --run --from --only --force -p --upstream --gifs --qa --holdout --bundle --deadline"
    for part in [
        *options.split(),
        "--weekly-hours",
        "test",
        "bench",
        "quota",
        "score",
        "make-shapes",
        "readme",
        "75",
        "130",
    ]:
        assert part in text, part


def test_package_set_that_is_not_there_is_refused_with_those_that_are(capfd):
    assert main(["test", "--against", "kaggle-2025-01"]) == REFUSED
    assert "kaggle-2026-05" in capfd.readouterr().err


def test_make_shapes_refuses_half_a_pair(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["make-shapes", "--test", "3", "--out", str(tmp_path / "new")])
    assert "must be even" in capsys.readouterr().err


def test_make_shapes_refuses_a_folder_with_files(tmp_path, capsys):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(SystemExit):
        main(["make-shapes", "--out", str(tmp_path)])
    assert "is not an empty folder" in capsys.readouterr().err and (tmp_path / "x").read_text() == "mine"


def test_report_holds_scores_figures_and_no_markup_of_the_data(tmp_path, world):
    world.run()
    book = nbformat.read(world.folder / "04_evaluation.ipynb", 4)
    image = nbformat.v4.new_output("display_data", {"image/png": "aGVsbG8="})
    book.cells += [nbformat.v4.new_markdown_cell("## Scores & <b>all</b>"), new_code_cell("1", outputs=[image])]
    nbformat.write(book, world.runs / "tiny" / "04_evaluation" / "04_evaluation.ipynb")
    manifest = world.runs / "tiny" / "04_evaluation" / "stage.json"
    told = json.loads(manifest.read_text())
    told["metrics"]["prompt"] = "<|bos|>[video tokens]<script>alert(1)</script> what ?\nAnswer:"
    manifest.write_text(json.dumps(told))
    profile = load_profile("tiny")
    page = write_report(stages.load_suite(stages.suite_file()), world.runs / "tiny", profile).read_text()
    assert "0.900" in page and "data:image/png;base64,aGVsbG8=" in page and "Scores &amp; &lt;b&gt;all" in page
    assert "<pre>&lt;|bos|&gt;[video tokens]&lt;script&gt;alert(1)&lt;/script&gt; what ?\nAnswer:</pre>" in page
    assert "<script>" not in page and "http" not in page.replace("http-equiv", "")


def test_a_stage_that_came_without_its_notebook_is_shown_with_its_saved_figures(tmp_path, world):
    """As stages from Kaggle do: what is pulled are their outputs."""
    world.run()
    folder = world.runs / "tiny" / "04_evaluation"
    (folder / "04_evaluation.ipynb").unlink(missing_ok=True)
    (folder / "figures").mkdir()
    (folder / "figures" / "count_errors.png").write_bytes(b"hello")
    page = write_report(stages.load_suite(stages.suite_file()), world.runs / "tiny", load_profile("tiny")).read_text()
    assert '<img alt="count errors" src="data:image/png;base64,aGVsbG8=">' in page


def test_scores_leave_out_what_was_not_measured(tmp_path, capsys):
    run = tmp_path / "run"
    suite = stages.load_suite(repo_root() / "notebooks" / "suite.yaml")
    assert score_tables(suite, run) == {}
    measured = {
        "04_evaluation": {
            "count_mse": 0.4,
            "majority_count_mse": 5.0,
            "blind_count_mse": None,
            "n_count_mse": 1590,
            "of_count_mse": 1600,
            "n_action_accuracy": 0,
            "of_action_accuracy": 7,
        },
        "05_adem_scienceqa": {"accuracy": 93.0, "IMG": 89.8, "text_only_IMG": 42.0, "SOC": 1.0},
    }
    for name, metrics in measured.items():
        (run / name).mkdir(parents=True)
        (run / name / "stage.json").write_text(json.dumps({"status": "complete", "metrics": metrics}))
    gifs, science = score_tables(suite, run).values()
    count, action = gifs.loc["Count MSE (lower is better)"], gifs.loc["Action accuracy"]
    assert count.to_dict() == {"n": 1590, "of": 1600, "model": 0.4, "majority": 5.0}
    assert action[["n", "of"]].tolist() == [0, 7] and action[["model", "majority"]].isna().all()  # all GIFs are dead
    assert gifs.index.tolist() == ["Action accuracy", "Count MSE (lower is better)"]
    assert science.loc["with an image"].to_dict() == {"model": 89.8, "text-only twin": 42.0}
    assert science.index.tolist() == ["all problems", "with an image"]
    print_scores(suite, run)
    assert "ScienceQA, accuracy (%)" in (out := capsys.readouterr().out) and "89.800" in out
    assert re.search(r"Count MSE \(lower is better\) +1,590 +1,600 +0\.400 +5\.000", out)


def test_readme_table_is_made_between_its_marks(tmp_path, world):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- notebooks:start -->\nold\n<!-- notebooks:end -->\nafter\n")
    suite = stages.load_suite(stages.suite_file())
    assert update_readme(readme, suite) and not update_readme(readme, suite)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert all(f"(notebooks/{name}.ipynb)" in text for name in NAMES)
    readme.write_text("no marks")
    with pytest.raises(ConfigError, match="once each"):
        update_readme(readme, suite)


def test_badges_and_clone_command_appear_with_the_repository(tmp_path, world):
    suite = stages.load_suite(stages.suite_file())
    assert "badge" not in notebook_table(suite) and "git clone" not in notebook_table(suite)
    entries = yaml.safe_load(stages.suite_file().read_text())
    for address, good in {"https://github.com/someone/a-suite": True, "github.com/someone": False}.items():
        path = tmp_path / f"{good}.yaml"
        path.write_text(yaml.safe_dump(entries | {"repository": address}))
        if not good:
            with pytest.raises(stages.StageError, match="repository"):
                stages.load_suite(path)
            continue
        table = notebook_table(stages.load_suite(path))
        assert "git clone https://github.com/someone/a-suite\n" in table
        rows = [line for line in table.splitlines() if line.startswith("|")]
        assert len({row.count(" | ") for row in rows if "---" not in row}) == 1
        for name in NAMES:
            file = f"github.com/someone/a-suite/blob/main/notebooks/{name}.ipynb"
            colab = file.replace("github.com", "https://colab.research.google.com/github", 1)
            assert f"({colab})" in table and f"(https://www.kaggle.com/notebooks/welcome?src=https://{file})" in table


def test_options_of_one_session_are_dropped_from_the_command_that_goes_on():
    argv = ["--force", "--deadline", "5", "--deadline=5", "-p", "a", "b"]
    assert without_options(argv, {"--force": 0, "--deadline": 1}) == ["-p", "a", "b"]
