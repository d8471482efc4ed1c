"""Stages: when they count as done, what their key holds, atomic manifests, locks, refusals."""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch

from helpers import stage as stages
from helpers.config import load_profile
from helpers.stage import lock, notebook, pace
from helpers.stage.manifest import (
    StageConflict,
    check_conflict,
    differences,
    fingerprint,
    read_manifest,
    settings_differences,
    settings_key,
    stage_settings,
)
from helpers.stage.notebook import Stage
from helpers.stage.suite import StageError, load_suite
from helpers.workspace import write_json
from helpers.workspace.faults import KnownBad
from helpers.workspace.place import repo_root

SUITE = """
repository: null
stages:
  - {name: one, title: One, about: a, needs: b, makes: c, sections: [data, shapes], contract: 1,
     minutes: {tiny: 1}, gigabytes: {tiny: 0.01}}
  - {name: two, title: Two, about: a, needs: b, makes: c, inputs: [one],
     sections: [encoder, training, evaluation.options_in_prompt], contract: 1,
     minutes: {tiny: 1}, gigabytes: {tiny: 0.01}}
"""


@pytest.fixture(autouse=True)
def world(monkeypatch, tmp_path):
    """A suite of two stages, and runs in a temporary folder."""
    (tmp_path / "suite.yaml").write_text(SUITE)
    monkeypatch.setenv("SUITE_FILE", str(tmp_path / "suite.yaml"))
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path / "runs"))
    monkeypatch.delenv("SUITE_DEADLINE", raising=False)
    yield tmp_path
    for path in list(lock._held):
        stages.release_lock(path)


def finish_one(text="content", **options):
    """Do stage one with one output file."""
    stage = Stage("one", profile="tiny", **options)
    (stage.folder / "table.txt").write_text(text)
    stage.finish({"rows": 1}, ["table.txt"])
    return stage


def test_manifest_says_what_was_done_with_what():
    stage = finish_one(parameters={"seed": 3}, overrides={"shapes.train": 10})
    manifest = json.loads((stage.folder / "stage.json").read_text())
    assert (manifest["name"], manifest["status"], manifest["metrics"]) == ("one", "complete", {"rows": 1})
    assert manifest["outputs"] == [{"path": "table.txt", "bytes": 7}]
    assert manifest["parameters"] == {"seed": 3} and manifest["profile"]["shapes"]["train"] == 10
    assert manifest["versions"]["packages"]["numpy"] == np.__version__
    assert manifest["machine"]["cores"] == os.cpu_count() and manifest["seconds"] >= 0


def test_metrics_of_numpy_become_json_and_nan_becomes_null():
    stage = Stage("one", profile="tiny")
    path = stage.finish({"a": np.float32(0.5), "b": float("nan"), "c": np.arange(2), "d": {"e": (1, np.int64(2))}})
    assert json.loads(path.read_text())["metrics"] == {"a": 0.5, "b": None, "c": [0, 1], "d": {"e": [1, 2]}}


def test_a_filled_parameter_brings_defaults_that_give_way_to_what_the_person_set(world):
    """Released ADEM-VL weights are asked as their authors ask, unless a prompt is named; the settings say which."""
    (world / "suite.yaml").write_text((repo_root() / "notebooks" / "suite.yaml").read_text())
    name, weights = "05_adem_scienceqa", {"adapters": "checkpoint_7B_sqa.pth"}
    own = world / "own.yaml"
    own.write_text((repo_root() / "helpers" / "profiles" / "tiny.yaml").read_text().replace("name: tiny", "name: own"))
    spec, cases = stages.load_suite(world / "suite.yaml").spec(name), iter(range(99))

    def asked(overrides=None, parameters=weights, profile="tiny"):
        run = f"r{next(cases)}"
        stage = Stage(name, profile=profile, run=run, overrides=overrides, parameters=parameters)
        # what the runner and the fetching from Kaggle expect of the stage's manifest
        planned = stage_settings(spec, load_profile(profile, overrides or {}), parameters, world / "runs" / run)
        manifest = json.loads(stage.finish({}).read_text())
        assert manifest["settings"] == planned and manifest["key"] == stages.settings_key(planned)
        assert planned["profile"]["adem"]["protocol"] == stage.profile.adem.protocol
        return stage.profile.adem.protocol

    assert asked(parameters={"adapters": ""}) == "QCM-A"
    assert asked() == asked(profile=str(own)) == "QCM-A with captions"
    assert asked({"adem.preset": "student", "adem.epochs": 3}) == "QCM-A with captions"
    for chosen in ("QCM-A", "CQM-A", "released mismatch"):  # the preset's own among them
        assert asked({"adem.protocol": chosen}) == chosen
    text = own.read_text()
    own.write_text(text.replace("\nadem:", "\nadem:\n  protocol: QCM-A"))
    assert asked(profile=str(own)) == "QCM-A"
    assert asked({"adem.preset": "student"}, {"adapters": ""}) == "released mismatch"


def test_run_folder_is_named_after_the_profile_unless_told(world):
    assert Stage("one", profile="tiny").folder == world / "runs" / "tiny" / "one"
    assert Stage("one", profile="tiny", run="mine").folder == world / "runs" / "mine" / "one"


def test_input_is_refused_when_absent_partial_or_damaged():
    with pytest.raises(StageError, match="two needs one, which is not done in run 'tiny'"):
        Stage("two", profile="tiny").input("one")
    stage = Stage("one", profile="tiny")
    (stage.folder / "table.txt").write_text("x")
    stage.finish({}, ["table.txt"], status="partial")
    with pytest.raises(StageError, match="only partly done"):
        Stage("two", profile="tiny").input("one")
    stage.finish({}, ["table.txt"])
    assert Stage("two", profile="tiny").input("one") == stage.folder
    (stage.folder / "table.txt").unlink()
    with pytest.raises(StageError, match=r"of .* table\.txt"):
        Stage("two", profile="tiny").input("one")


def test_only_declared_inputs_can_be_read():
    with pytest.raises(StageError, match="does not declare 'one'"):
        Stage("one", profile="tiny").input("one")


def test_unknown_stage_names_the_nearest():
    with pytest.raises(StageError, match=r"unknown stage 'oen'; did you mean 'one'\?"):
        Stage("oen", profile="tiny")


@pytest.mark.parametrize("output", ["missing.txt", "../outside.txt", "/etc/hostname"])
def test_outputs_must_exist_inside_the_stage(output, world):
    stage = Stage("one", profile="tiny")
    (stage.folder.parent / "outside.txt").write_text("x")
    with pytest.raises(StageError, match="does not exist inside"):
        stage.finish({}, [output])
    assert not (stage.folder / "stage.json").exists()


def test_finished_stage_refuses_other_settings_and_names_them():
    stage = finish_one(parameters={"seed": 3})
    before = (stage.folder / "stage.json").read_bytes()
    finish_one(parameters={"seed": 3})  # the same settings may come again
    with pytest.raises(StageConflict, match=r"parameters\.seed: 3 there, 4 now(.|\n)*shapes\.train: 2000 there, 5 now"):
        Stage("one", profile="tiny", parameters={"seed": 4}, overrides={"shapes.train": 5})
    assert json.loads(before)["key"] == json.loads((stage.folder / "stage.json").read_text())["key"]


def test_only_what_decides_the_result_is_compared():
    spec = stages.load_suite(stages.suite_file()).spec("two")
    folder = finish_one().folder.parent

    def settings(overrides):
        return stage_settings(spec, load_profile("tiny", overrides), {}, folder)

    plain = settings({})
    for key, value in [
        ("training.log_steps", 1),
        ("encoder.batch_groups", 1),
        ("data.workers", 1),
        ("shapes.seed", 9),
        ("evaluation.seed", 9),
    ]:
        assert settings({key: value}) == plain
    changed = {"training.epochs": 9, "encoder.revision": "x", "evaluation.options_in_prompt": True}
    for key, value in changed.items():
        assert settings({key: value}) != plain


def test_contract_version_of_the_suite_file_undoes_a_finished_stage(world):
    finish_one()
    (world / "suite.yaml").write_text(SUITE.replace("contract: 1", "contract: 2", 1))
    stages.load_suite.cache_clear()
    with pytest.raises(StageConflict, match="contract: 1 there, 2 now"):
        Stage("one", profile="tiny")


def test_another_result_upstream_undoes_the_stage_below():
    finish_one("content")
    Stage("two", profile="tiny").finish({})
    finish_one("content")  # made again, the same: nothing below changes
    Stage("two", profile="tiny")
    finish_one("other content")
    with pytest.raises(StageConflict, match=r"inputs\.one"):
        Stage("two", profile="tiny")


def test_unfinished_work_of_other_settings_is_not_mixed_in():
    first = Stage("one", profile="tiny", parameters={"seed": 1})
    Stage("one", profile="tiny", parameters={"seed": 2})  # nothing was made yet: nothing to protect
    (first.folder / "half.txt").write_text("x")
    with pytest.raises(StageConflict, match=r"unfinished(.|\n)*parameters\.seed: 2 there, 3 now"):
        Stage("one", profile="tiny", parameters={"seed": 3})
    Stage("one", profile="tiny", parameters={"seed": 2})


def test_path_parameters_count_by_content(world):
    for name in ("here", "moved"):
        (world / name).mkdir()
        (world / name / "a.gif").write_bytes(b"GIF89a")
    finish_one(parameters={"gifs": str(world / "here")})
    finish_one(parameters={"gifs": str(world / "moved")})
    (world / "moved" / "a.gif").write_bytes(b"GIF89b")
    with pytest.raises(StageConflict, match=r"parameters\.gifs"):
        Stage("one", profile="tiny", parameters={"gifs": str(world / "moved")})


def test_fingerprint_of_large_content_uses_sizes_and_ends(world, monkeypatch):
    path = world / "big.bin"
    path.write_bytes(b"abc")
    exact = fingerprint(path)
    os.utime(path, (1, 1))
    assert fingerprint(path) == exact
    monkeypatch.setattr("helpers.stage.manifest.HASHED_BYTES", 2)
    rough = fingerprint(path)
    os.utime(path, (2, 2))
    assert fingerprint(path) == rough  # a copy on another disk is still the same input
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert fingerprint(path) != rough


def test_upstream_run_lends_its_stages(world):
    lent = finish_one().folder
    (world / "runs" / "second").mkdir()
    (world / "runs" / "second" / "upstream").write_text("tiny\n")
    assert Stage("two", profile="tiny", run="second").input("one") == lent
    (world / "runs" / "third").mkdir()
    (world / "runs" / "third" / "upstream").write_text("second\n")
    assert Stage("two", profile="tiny", run="third").input("one") == lent
    (world / "runs" / "tiny" / "upstream").write_text("third\n")  # round in a circle
    assert stages.find_stage(world / "runs" / "third", "two") == world / "runs" / "third" / "two"


def test_seconds_add_up_over_a_pause():
    stage = Stage("one", profile="tiny")
    stage._began -= 100
    stage.finish({}, status="partial")
    stage = Stage("one", profile="tiny")
    stage._began -= 50
    assert json.loads(stage.finish({}).read_text())["seconds"] == pytest.approx(150, abs=5)


def test_deadline_comes_from_the_runner(monkeypatch):
    stage = Stage("one", profile="tiny")
    assert stage.remaining_seconds == math.inf
    monkeypatch.setenv("SUITE_DEADLINE", str(time.time() + 60))
    assert stage.remaining_seconds == pytest.approx(60, abs=5)
    monkeypatch.setenv("SUITE_DEADLINE", "tomorrow")
    with pytest.raises(StageError, match="tomorrow"):
        _ = stage.remaining_seconds


def test_torn_manifest_is_said_not_taken_for_done():
    stage = finish_one()
    (stage.folder / "stage.json").write_text('{"name": "one", "sta')
    with pytest.raises(StageError, match=r"stage\.json is not readable"):
        check_conflict(stage.folder, {})


def test_failed_write_leaves_the_old_manifest(world):
    path = world / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": float("inf")})
    assert json.loads(path.read_text()) == {"a": 1}


def test_differences_name_nested_settings():
    assert differences({"a": {"b": 1, "c": 2}, "d": 1}, {"a": {"b": 1, "c": 3}}) == [
        "a.c: 2 there, 3 now",
        "d: 1 there, None now",
    ]


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("inputs: [one]", "inputs: [three]", "only earlier stages"),
        ("contract: 1", "contracts: 1", "contracts"),
        ("title: One, ", "", "title"),
    ],
)
def test_suite_file_is_strict(world, old, new, match):
    path = world / "bad.yaml"
    path.write_text(SUITE.replace(old, new))
    with pytest.raises(StageError, match=match):
        stages.load_suite(path)


def start_holder(world):
    """Start a process that works on stage one of run tiny until it is killed; return it once it holds the lock."""
    code = """
        import time
        from helpers.stage import Stage
        stage = Stage("one", profile="tiny")
        print("holding", flush=True)
        time.sleep(60)
    """
    environment = os.environ | {"PYTHONPATH": str(repo_root())}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "holding\n"
    return process


def test_second_worker_is_refused_and_a_killed_one_leaves_no_lock(world, monkeypatch):
    monkeypatch.setattr(notebook, "LOCK_PATIENCE", 0.0)
    holder = start_holder(world)
    try:
        with pytest.raises(StageError, match=rf"in use by another process \(pid {holder.pid}\)"):
            Stage("one", profile="tiny")
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert (world / "runs" / "tiny" / "one" / ".lock").read_text() == str(holder.pid)  # left behind, and harmless
    Stage("one", profile="tiny")


def test_lock_of_a_killed_process_does_not_live_on_in_its_children(world):
    code = """
        import subprocess, sys, time
        from pathlib import Path
        from helpers.stage import hold_lock
        hold_lock(Path(sys.argv[1]), "x")
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print(child.pid, flush=True)
        time.sleep(60)
    """
    path, environment = world / "lock", os.environ | {"PYTHONPATH": str(repo_root())}
    command = [sys.executable, "-c", textwrap.dedent(code), str(path)]
    holder = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(StageError, match=rf"pid {holder.pid}"):
            stages.hold_lock(path, "x")
        holder.kill()
        holder.wait()
        stages.hold_lock(path, "x")  # the child still runs
        os.kill(child, 0)
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)
        stages.release_lock(path)


def test_notebook_run_by_hand_stops_before_the_platforms_session_ends(monkeypatch):
    monkeypatch.delenv("SUITE_DEADLINE", raising=False)
    monkeypatch.setattr(pace, "session_end", lambda: 123.0)
    assert stages.deadline() == 123.0
    monkeypatch.setenv("SUITE_DEADLINE", "45.0")
    assert stages.deadline() == 45.0


@pytest.fixture
def gpu_stages(world, monkeypatch):
    """On Kaggle, stages that need a GPU: `three`, and the demo-like `four`."""
    more = """
  - {name: three, title: T, about: a, needs: b, makes: c, contract: 1, gpu: true, minutes: {}, gigabytes: {}}
  - {name: four, title: F, about: a, needs: b, makes: c, contract: 1, gpu: true, always: true, minutes: {},
     gigabytes: {}}
"""
    (world / "suite.yaml").write_text(SUITE + more)
    stages.load_suite.cache_clear()
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setattr(notebook, "_end_green", lambda stage: None)
    yield
    stages.load_suite.cache_clear()


def test_a_full_size_stage_on_kaggle_is_refused_without_a_gpu(gpu_stages, world, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(StageError, match="three needs a GPU, and this session has none: choose the accelerator"):
        Stage("three", profile="kaggle")
    assert not (world / "runs" / "kaggle").exists()
    for name, profile in (("three", "tiny"), ("one", "kaggle"), ("four", "kaggle")):
        Stage(name, profile=profile)
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE")
    Stage("three", profile="kaggle")


@pytest.mark.parametrize("name", ["three", "four"])
def test_a_full_size_stage_on_kaggle_is_refused_on_a_p100(gpu_stages, monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (6, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    with pytest.raises(KnownBad, match="GPU T4 x2"):
        Stage(name, profile="kaggle")


def test_what_needs_a_gpu_is_told_by_the_model_of_the_stage():
    suite = stages.load_suite(repo_root() / "notebooks" / "suite.yaml")
    full, tiny = load_profile("kaggle"), load_profile("kaggle", {"adem.preset": "tiny"})
    names = [spec.name[:2] for spec in suite.stages if stages.needs_gpu(spec, full)]
    assert names == ["02", "03", "04", "05", "08"]
    assert not stages.needs_gpu(suite.spec("05_adem_scienceqa"), tiny)
    assert not any(stages.needs_gpu(spec, load_profile("tiny")) for spec in suite.stages)


def _write_forever(path):
    while True:
        write_json(path, {"rows": list(range(2000))})


def test_manifest_is_whole_whenever_the_writer_is_killed(world):
    path = world / "stage.json"
    for _ in range(5):
        process = multiprocessing.get_context("fork").Process(target=_write_forever, args=(path,))
        process.start()
        while not path.exists():
            time.sleep(0.001)
        time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert len(json.loads(path.read_text())["rows"]) == 2000


def real_settings(name, parameters=None, **overrides):
    spec = load_suite(repo_root() / "notebooks" / "suite.yaml").spec(name)
    return stage_settings(spec, load_profile("tiny", overrides), parameters or {}, repo_root() / "no_run")


def test_equal_settings_written_differently_have_one_key():
    pairs = [
        ("01_data_sharding", "data.groups", [3, 1, 2, 3], [1, 2, 3]),
        ("03_adapter_training", "language_model.target_modules", ["v_proj", "q_proj"], ["q_proj", "v_proj"]),
        ("03_adapter_training", "training.epochs", 3, 3.0),
    ]
    for name, key, one, other in pairs:
        written = [real_settings(name, **{key: value}) for value in (one, other)]
        assert settings_key(written[0]) == settings_key(written[1])
    ours = real_settings("03_adapter_training", **{"language_model.target_modules": ["q_proj", "v_proj"]})
    old = json.loads(json.dumps(ours))
    old["profile"]["language_model"]["target_modules"] = ["v_proj", "q_proj"]
    assert settings_differences(old, ours) == []


def test_a_section_that_came_is_filled_in_and_one_that_is_off_decides_nothing(world):
    none, on = {"alignment.epochs": 0}, {"alignment.epochs": 1}
    old, off, aligned = (real_settings("03_adapter_training", **keys) for keys in (none, none, on))
    del old["profile"]["alignment"]  # as earlier versions wrote it
    assert settings_differences(old, off) == []
    assert settings_differences(old, aligned)[0] == "profile.alignment.epochs: 0.0 there, 1.0 now"
    asked = {"alignment.prompt": "What happens?"}
    assert settings_key(off) == settings_key(real_settings("03_adapter_training", **none, **asked))
    assert settings_differences(aligned, real_settings("03_adapter_training", **on, **asked)) == [
        "profile.alignment.prompt: 'Describe this GIF.' there, 'What happens?' now"
    ]


def test_base_models_in_a_folder_count_by_content(world):
    for name in ("one", "moved"):
        (world / name).mkdir()
        (world / name / "config.json").write_text("{}")
        (world / name / "model.safetensors").write_bytes(b"weights")

    def settings(name):
        return real_settings("02_feature_caching", **{"encoder.model": str(world / name)})

    before = settings("one")
    assert settings_key(before) == settings_key(settings("moved"))
    old = json.loads(json.dumps(before))
    old["profile"]["encoder"]["model"] = str(world / "one")  # as earlier versions wrote it
    assert settings_differences(old, before) == []
    (world / "one" / "model.safetensors").write_bytes(b"changed")
    assert settings_key(before) != settings_key(settings("one"))
    [told] = settings_differences(before, settings("one"))
    assert told.startswith("profile.encoder.model: 'content ")


def test_a_path_parameter_counts_by_content_however_it_is_written(world, monkeypatch):
    (world / "gifs").mkdir()
    (world / "gifs" / "a.gif").write_bytes(b"GIF89a")
    (world / "link").symlink_to(world / "gifs")
    monkeypatch.setenv("HOME", str(world))
    monkeypatch.chdir(world)
    written = ["gifs", "./gifs", "gifs/", "~/gifs", str(world / "gifs"), str(world / "link")]
    settings = [real_settings("01_data_sharding", {"gifs": text, "qa": "", "holdout": 0.2}) for text in written]
    assert len({settings_key(one) for one in settings}) == 1
    assert settings[0]["parameters"]["gifs"].startswith("content ")


def test_the_blind_twin_beside_a_given_bundle_decides_too(world):
    for name in ("bundle", "blind"):
        (world / name).mkdir()
        (world / name / "bundle.json").write_text(name)
    given = {"bundle": str(world / "bundle")}
    before = real_settings("03_adapter_training", given)
    old = {name: value for name, value in before.items() if name != "beside"}
    assert settings_differences(old, before) == []
    (world / "blind" / "bundle.json").write_text("another twin")
    [told] = settings_differences(before, real_settings("03_adapter_training", given))
    assert told.startswith("beside.bundle: ")


@pytest.mark.parametrize("damage", [b"", b"x", b"yy"])
def test_a_finished_stage_whose_output_is_damaged_is_made_again(damage):
    stage = Stage("one", profile="tiny")
    (stage.folder / "table.txt").write_text("xx")
    stage.finish({}, ["table.txt"])
    Stage("one", profile="tiny")
    assert read_manifest(stage.folder)["status"] == "complete"  # whole, it stands
    (stage.folder / "table.txt").write_bytes(damage)
    with pytest.raises(StageError, match=r"table\.txt is lost or damaged; make it again: ./run_all.sh --from one"):
        Stage("two", profile="tiny").input("one")
    with pytest.warns(UserWarning, match=r"table\.txt is lost or damaged: one is made again"):
        Stage("one", profile="tiny")
    assert read_manifest(stage.folder) is None


def test_what_is_put_beside_the_files_of_a_finished_stage_is_no_damage():
    stage = Stage("one", profile="tiny")
    (stage.folder / "bundle").mkdir()
    (stage.folder / "bundle" / "weights.txt").write_text("xx")
    stage.finish({}, ["bundle"])
    (stage.folder / "bundle" / "README.md").write_text("for the upload")
    Stage("one", profile="tiny")
    manifest = read_manifest(stage.folder)
    assert manifest["status"] == "complete" and Stage("two", profile="tiny").input("one") == stage.folder
    (stage.folder / "bundle" / "weights.txt").write_text("yy")
    with pytest.warns(UserWarning, match="bundle is lost or damaged"):
        Stage("one", profile="tiny")


def test_a_stage_with_a_damaged_manifest_is_made_again():
    stage = Stage("one", profile="tiny")
    stage.finish({})
    (stage.folder / "stage.json").write_bytes(b"")
    with pytest.warns(UserWarning, match="one is made again"):
        Stage("one", profile="tiny").finish({})
    assert read_manifest(stage.folder)["status"] == "complete"
