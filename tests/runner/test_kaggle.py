"""run_all.sh kaggle: Kaggle's real client against a stand-in on loopback that executes what is pushed."""

import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import requires, version
from pathlib import Path

import pandas as pd
import pytest
from kagglesdk.kaggle_http_client import KaggleHttpClient
from kagglesdk.kernels.services.kernels_api_service import KernelsApiClient
from kagglesdk.kernels.types.kernels_api_service import ApiGetKernelSessionStatusRequest
from kagglesdk.kernels.types.kernels_enums import KernelWorkerStatus
from packaging.requirements import Requirement
from slugify import slugify

from helpers import stage as stages
from helpers.config import ConfigError
from helpers.runner import quota
from helpers.runner.kaggle import commands
from helpers.runner.kaggle import push as kaggle_push
from helpers.runner.kaggle import remote as kaggle_remote
from helpers.runner.kaggle import site as kaggle_site
from helpers.runner.kaggle.push import HELPERS, kernel_id, kernel_metadata
from helpers.runner.outcome import FAILED, INTERRUPTED, PAUSED, REFUSED
from helpers.runner.plan import RunPlan
from helpers.runner.quota import forecasts
from helpers.runner.quota.ledger import HOUR
from helpers.stage import attached
from helpers.stage.pace import note_pace
from helpers.suite import main
from helpers.workspace.place import MARGIN_SECONDS, repo_root
from tests.kaggle_stand_in import OWNER, TOKEN, DataSet, Fault, Refusal, StandIn

SMALL = [
    *("-p", "shapes.train", "40", "-p", "shapes.test", "10", "-p", "data.workers", "1"),
    *("-p", "training.epochs", "1", "-p", "training.checkpoint_minutes", "0.001", "-p", "evaluation.bootstrap", "50"),
    *("-p", "data.groups", "[1]", "-p", "training.groups", "[1]", "-p", "evaluation.groups", "1"),
    *("-p", "adem.world_train", "64", "-p", "adem.world_test", "30", "-p", "adem.epochs", "1"),
]
MAIN_PATH = ["01_data_sharding", "02_feature_caching", "03_adapter_training", "04_evaluation"]


CLIENT = tuple(int(part) for part in version("kaggle").split(".")[:2])
asks_for_quota = pytest.mark.skipif(CLIENT < (2, 2), reason="this Kaggle client has no quota command")


@pytest.fixture
def quick(site, account, empty_wheels, monkeypatch, tmp_path):
    """The stand-in without kernels: pushed stages leave a copy of `made`."""
    site.made = {}
    for name in ("01_data_sharding", "08_demo"):
        monkeypatch.setenv("RUNS_ROOT", str(tmp_path / "made"))
        parameters = {"gifs": "", "qa": "", "holdout": 0.2} if name[:2] == "01" else {"bundle": "", "gallery": ""}
        stage = stages.Stage(name, profile="tiny", parameters=parameters)
        (stage.folder / "made.txt").write_text("made")
        stage.finish({"gifs": 3}, ["made.txt"])
        stages.release_lock(stage.folder / ".lock")
        site.made[name] = stage.folder
    monkeypatch.setenv("RUNS_ROOT", str(account))

    def play(run):
        name = next(name for name in site.made if name.replace("_", "-") in run.request.slug)
        shutil.copytree(site.made[name], run.working / "runs" / "tiny" / name)
        return KernelWorkerStatus.COMPLETE

    site.play = play
    return site


def wait_until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for what the stand-in's threads do."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.05)


def push(*arguments: str, minutes: float = 2) -> int:
    """Push; a test that waits for what never comes ends with PAUSED."""
    return main(["kaggle", "push", "--profile", "tiny", "--run", "tiny", "--deadline", str(minutes), *arguments])


def resume(minutes: float = 2) -> int:
    """Resume, no longer than that."""
    return main(["kaggle", "resume", "--run", "tiny", "--deadline", str(minutes)])


def entry(runs: Path, name: str) -> dict:
    """What the run's state says of a stage."""
    return json.loads((runs / "tiny" / "kaggle.json").read_text())["stages"][name]


def versions(site: StandIn, name: str) -> list[str]:
    """How each run of a stage's notebook ended."""
    return [run.status.name for run in site.runs.get(f"{OWNER}/gifqa-tiny-{name.replace('_', '-')}", [])]


# --------------------------------------------------------------------------------------------- the whole suite


@pytest.mark.slow
def test_whole_suite_through_refusal_deadline_cancellation_and_death_scores_as_if_undisturbed(site, account, capfd):
    site.refuse["01-data-sharding"] = ["Kaggle is under maintenance"]
    site.session_environment["01-data-sharding"] = [{"SUITE_DEADLINE": "1"}]  # no time at all in its first session
    site.faults["03-adapter-training"] = [Fault("cancel", "step-*/checkpoint.json")]
    site.faults["04-evaluation"] = [Fault("kill", "groups_1/*.parquet")]

    assert push(*SMALL, minutes=30) == FAILED
    assert "Kaggle is under maintenance" in capfd.readouterr().err
    assert resume(minutes=30) == PAUSED
    out = capfd.readouterr().out
    assert "03_adapter_training was cancelled" in out and "./run_all.sh kaggle resume --run tiny" in out
    assert "01_data_sharding: partly done" in out
    assert resume(minutes=30) == FAILED
    assert "04_evaluation failed on Kaggle" in capfd.readouterr().err
    assert resume(minutes=30) == 0, capfd.readouterr()
    out = capfd.readouterr().out
    assert "FrameQA accuracy" in out and "report.html" in out

    assert versions(site, "00_start_here") == versions(site, "02_feature_caching") == ["COMPLETE"]
    assert versions(site, "01_data_sharding") == ["COMPLETE", "COMPLETE"]  # partial, then whole
    assert versions(site, "03_adapter_training") == ["CANCEL_ACKNOWLEDGED", "COMPLETE"]
    assert versions(site, "04_evaluation") == ["ERROR", "COMPLETE"]
    assert versions(site, "05_adem_scienceqa") == versions(site, "08_demo") == ["COMPLETE"]
    assert resume(minutes=30) == 0 and sum(len(runs) for runs in site.runs.values()) == 10  # nothing is left to do

    only = [word for name in MAIN_PATH for word in ("--only", name)]
    assert main(["--profile", "tiny", "--run", "here", *only, *SMALL]) == 0, capfd.readouterr()
    scores = [stages.read_manifest(account / run / "04_evaluation")["metrics"] for run in ("tiny", "here")]
    assert scores[0] == scores[1]
    tables = [pd.read_parquet(account / run / "04_evaluation" / "predictions.parquet") for run in ("tiny", "here")]
    pd.testing.assert_frame_equal(*tables)
    assert len(site.data_sets[f"{OWNER}/{HELPERS}"].versions) == 1  # equal wheels are not uploaded again
    handed = site.data_sets[f"{OWNER}/gifqa-tiny-03-work"].versions
    log = site.runs[f"{OWNER}/gifqa-tiny-03-adapter-training"][1].log
    assert len(handed) == 1 and "goes on with the work of an earlier session" in log
    for run in (run for runs in site.runs.values() for run in runs):
        assert run.inputs_before == run.inputs(), "attached inputs cannot be written on Kaggle"
        assert TOKEN not in run.request.text and TOKEN not in run.log
    kept = [path for path in (account / "tiny").rglob("*") if path.is_file()]
    assert not [path for path in kept if TOKEN.encode() in path.read_bytes()]


# ------------------------------------------------------------------------------------------------- credentials


def test_no_token_is_refused(account, monkeypatch, capfd):
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    assert push("--only", "01") == REFUSED
    error = capfd.readouterr().err
    assert "no token" in error and "KAGGLE_API_TOKEN" in error and not account.exists()


def test_expired_token_is_refused_and_not_printed(quick, account, capfd):
    quick.token = "another"
    assert push("--only", "01") == REFUSED
    out, error = capfd.readouterr()
    assert "expired" in error and TOKEN not in out + error and not (account / "tiny").exists()


def test_token_that_expires_on_the_way_is_refused_and_a_new_one_goes_on(quick, monkeypatch, capfd):
    quick.held.add("01-data-sharding")
    assert push("--only", "01", minutes=0.001) == PAUSED
    true = kaggle_site._sign_in

    def signs_in_last_minute():
        api = true()
        quick.token = "a-newer-token"
        return api

    monkeypatch.setattr(kaggle_site, "_sign_in", signs_in_last_minute)
    assert resume() == REFUSED and "401" in capfd.readouterr().err
    monkeypatch.setattr(kaggle_site, "_sign_in", true)
    monkeypatch.setenv("KAGGLE_API_TOKEN", "a-newer-token")
    quick.held.clear()
    assert resume() == 0 and versions(quick, "01_data_sharding") == ["COMPLETE"]


def test_a_run_of_another_account_is_refused(quick, account, capfd):
    assert push("--only", "01") == 0
    path = account / "tiny" / "kaggle.json"
    path.write_text(path.read_text().replace(f'"owner": "{OWNER}"', '"owner": "someone"'))
    assert resume() == REFUSED and f"belongs to someone, but the token is {OWNER}'s" in capfd.readouterr().err


# ----------------------------------------------------------------------------------------- answers of the platform


def test_a_notebook_that_is_gone_is_told(quick, capfd):
    quick.held.add("01-data-sharding")
    assert push("--only", "01", minutes=0.001) == PAUSED
    quick.runs.clear()
    assert main(["kaggle", "status", "--run", "tiny"]) == REFUSED
    error = capfd.readouterr().err
    assert "404" in error and f"{OWNER}/gifqa-tiny-01-data-sharding" in error


def test_notebooks_wait_until_the_data_set_can_be_attached(quick):
    quick.not_ready = 4
    assert push("--only", "01") == 0
    asked = [name for name in quick.requests if name in ("GetDatasetStatus", "SaveKernel")]
    assert asked.index("SaveKernel") >= quick.not_ready + 1


def test_sources_that_vanish_silently_are_noticed(quick, account, capfd):
    quick.drop["01-data-sharding"] = 1
    quick.held.add("01-data-sharding")
    assert push("--only", "01") == FAILED
    error = capfd.readouterr().err
    assert f"did not attach the dataset {OWNER}/gifqa-helpers" in error and "kaggle resume --run tiny" in error
    assert f"Stop version 1 at https://www.kaggle.com/code/{OWNER}/gifqa-tiny-01-data-sharding" in error
    assert entry(account, "01_data_sharding")["status"] == "failed"
    assert resume() == PAUSED and len(versions(quick, "01_data_sharding")) == 1  # not beside the one without sources
    assert "01_data_sharding still runs without what it needs" in capfd.readouterr().out
    quick.held.clear()
    wait_until(lambda: versions(quick, "01_data_sharding") == ["COMPLETE"])
    assert resume() == 0 and versions(quick, "01_data_sharding") == ["COMPLETE", "COMPLETE"]


@asks_for_quota
def test_a_session_without_its_sources_counts_while_it_runs(quick, capfd):
    quick.gpu_hours = (18.5, 30.0)
    quick.drop["08-demo"] = 1
    quick.held.add("08-demo")
    assert push("--only", "08") == FAILED
    assert push("--run", "other", "--only", "05") == PAUSED and "too little to start" in capfd.readouterr().out
    noted = {beat.session for beat in quota.open_ledger().beats}
    assert noted == {f"{OWNER}/gifqa-tiny-08-demo/1"}
    quick.held.clear()
    wait_until(lambda: versions(quick, "08_demo") == ["COMPLETE"])
    assert resume() == 0
    assert {beat.session for beat in quota.open_ledger().beats} == noted | {f"{OWNER}/gifqa-tiny-08-demo/2"}


def test_sources_that_kaggle_calls_invalid_are_noticed(quick, capfd):
    assert push("--only", "01", "--attach", "someone/gifs") == FAILED
    assert "not valid as sources: data sets: someone/gifs" in capfd.readouterr().err


def test_a_notebook_that_is_filed_under_another_name_is_told_at_once(quick, account, monkeypatch, capfd):
    monkeypatch.setattr(kaggle_site, "READY_SECONDS", 1.0)
    quick.rename["01-data-sharding"] = "gifqa-tiny-01-data-sharding-2"
    quick.play = lambda run: KernelWorkerStatus.COMPLETE
    assert push("--only", "01", minutes=0.05) == FAILED
    error = capfd.readouterr().err
    assert f"filed it as {OWNER}/gifqa-tiny-01-data-sharding-2 instead of {OWNER}/gifqa-tiny-01-data-sharding" in error
    assert entry(account, "01_data_sharding")["status"] == "failed"


def test_attached_data_sets_reach_the_stages_that_read_data(quick):
    quick.data_sets["someone/scienceqa"] = DataSet([{"problems.json": b"{}"}])
    quick.play = lambda run: KernelWorkerStatus.ERROR
    for stage in ("01", "05", "08"):
        assert push("--only", stage, "--run", f"r{stage}", "--attach", "someone/scienceqa") == FAILED
    sources = {ref[-7:]: runs[0].sources["data"][1:] for ref, runs in quick.runs.items()}
    assert sources == {"harding": ["someone/scienceqa"], "ienceqa": ["someone/scienceqa"], "08-demo": []}


@pytest.fixture
def dead(quick, monkeypatch):
    """A large stage whose run was cancelled with two files of work done; `fetched` counts downloads by name."""

    def play(run):
        folder = run.working / "runs" / "tiny" / "01_data_sharding"
        folder.mkdir(parents=True)
        for name in ("started.json", "shard-0", "shard-1"):
            (folder / name).write_text(name)
        return KernelWorkerStatus.CANCEL_ACKNOWLEDGED

    true, quick.play, quick.fetched = quick.play, play, []
    download = kaggle_site.Site.download

    def counting(site, url, path):
        quick.fetched.append(path.name)
        download(site, url, path)

    monkeypatch.setattr(kaggle_site.Site, "download", counting)
    monkeypatch.setattr(kaggle_remote, "PULLED_GIGABYTES", 0.1)
    assert push("--only", "01") == PAUSED
    quick.play = true
    return quick


def test_large_work_of_a_dead_run_is_handed_over_too(dead, account, capfd):
    assert resume() == 0
    assert "0.5 GB of the run that ended go through this machine" in capfd.readouterr().out
    (work,) = dead.data_sets[f"{OWNER}/gifqa-tiny-01-work"].versions
    with tarfile.open(fileobj=io.BytesIO(work["work.bin"])) as archive:
        assert sorted(archive.getnames()) == ["shard-0", "shard-1", "started.json"]
    assert dead.runs[f"{OWNER}/gifqa-tiny-01-data-sharding"][1].sources["data"][1:] == [f"{OWNER}/gifqa-tiny-01-work"]
    assert not list((account / "tiny" / "kaggle").glob("01_data_sharding-*"))  # nothing is kept twice


def test_handing_over_goes_on_where_it_was_stopped(dead, monkeypatch):
    def dies(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(attached, "pack", dies)
        assert resume() == INTERRUPTED and sorted(dead.fetched) == ["shard-0", "shard-1", "started.json"]
    dead.fetched.clear()
    assert resume() == 0 and "shard-0" not in dead.fetched and f"{OWNER}/gifqa-tiny-01-work" in dead.data_sets


def test_large_work_is_dropped_if_asked_for(dead, capfd):
    anew = ["kaggle", "resume", "--run", "tiny", "--deadline", "2", "--anew"]
    assert main([*anew, "02"]) == REFUSED and "has no stage 02" in capfd.readouterr().err
    assert main([*anew, "01"]) == 0
    assert not [ref for ref in dead.data_sets if ref.endswith("-work")] and "shard-0" not in dead.fetched
    assert main([*anew, "01"]) == REFUSED and "it is complete; only what died" in capfd.readouterr().err


def test_work_that_kills_whoever_goes_on_with_it_can_be_dropped(dead, account):
    true, dead.play = dead.play, lambda run: KernelWorkerStatus.ERROR
    assert resume() == FAILED
    assert entry(account, "01_data_sharding")["source"] == f"{OWNER}/gifqa-tiny-01-work"
    dead.play = true
    assert main(["kaggle", "resume", "--run", "tiny", "--deadline", "2", "--anew", "01"]) == 0
    assert dead.runs[f"{OWNER}/gifqa-tiny-01-data-sharding"][-1].sources["data"] == [f"{OWNER}/{HELPERS}"]


@pytest.mark.parametrize("change", [{"contract": 0}, {"inputs": {"00_start_here": "digest"}}])
def test_a_run_of_another_version_of_the_suite_is_not_gone_on_with(quick, account, capfd, change):
    assert push("--only", "01") == 0
    path = account / "tiny" / "kaggle.json"
    state = json.loads(path.read_text())
    state["stages"]["01_data_sharding"]["manifest"]["settings"] |= change
    path.write_text(json.dumps(state))
    assert resume() == REFUSED
    error = capfd.readouterr().err
    assert "01_data_sharding of run 'tiny' was made by another version of the suite" in error
    assert next(iter(change)) in error and "--run NAME" in error


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\x17\xff"])
def test_a_damaged_state_of_a_run_is_told_in_a_sentence(quick, account, capfd, content):
    assert push("--only", "01") == 0
    (account / "tiny" / "kaggle.json").write_bytes(content)
    for command in (resume, lambda: push("--only", "01")):
        capfd.readouterr()
        assert command() == REFUSED
        told = capfd.readouterr().err
        assert "tiny/kaggle.json is damaged" in told and "push the run again" in told and "Traceback" not in told


def test_a_damaged_state_of_another_run_stops_no_push(quick, account):
    (account / "other").mkdir(parents=True)
    (account / "other" / "kaggle.json").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"passed over: .*other/kaggle\.json is damaged"):
        assert push("--only", "08", minutes=9) == 0


def test_large_work_that_this_disk_cannot_hold_is_not_dropped_unasked(dead, monkeypatch, account, capfd):
    monkeypatch.setattr("helpers.workspace.disk.free_gigabytes", lambda path: 0.9)
    assert resume() == REFUSED
    assert "--anew 01, needs about 1 GB" in capfd.readouterr().err
    assert entry(account, "01_data_sharding")["status"] == "cancelled" and not dead.fetched


def test_wheels_of_what_the_image_lacks_go_along_if_asked_for(quick):
    assert push("--only", "01", "--wheels") == 0
    (sent,) = quick.data_sets[f"{OWNER}/{HELPERS}"].versions
    wheels = {name.partition("-")[0] for name in sent if name.endswith(".whl")}
    packages = {"bitsandbytes", "pylance", "lance_namespace", "lance_namespace_urllib3_client"}
    assert wheels == packages | {"gif_question_answering"}
    assert json.loads(sent[kaggle_push.MARKER])["files"].keys() == {name for name in sent if name.endswith(".whl")}


def test_wheels_are_those_of_the_lock_and_need_only_what_the_image_has():
    locked = (repo_root() / "requirements.lock").read_text().splitlines()
    wheels = stages.load_suite(stages.suite_file()).kaggle_wheels
    assert set(wheels) <= set(locked)
    names = {Requirement(wheel).name for wheel in wheels}
    on_image = {"torch", "numpy", "packaging", "pyarrow", "pydantic", "python-dateutil", "typing-extensions", "urllib3"}
    for name in names:
        needs = [Requirement(text) for text in requires(name) or []]
        for need in (need for need in needs if not need.marker or need.marker.evaluate({"extra": ""})):
            assert need.name in names | on_image, f"{name} needs {need}"
            if need.name in names:
                assert version(need.name) in need.specifier


def test_a_full_house_is_waited_for(quick, account, capfd):
    quick.cap = 0
    assert push("--only", "08", minutes=0.02) == PAUSED
    assert capfd.readouterr().out.count("08_demo waits: Maximum batch GPU session count of 0 reached") == 1
    assert entry(account, "08_demo")["status"] == "waiting" and not quick.runs
    quick.cap = 1
    assert resume() == 0


def test_lost_requests_and_answers_are_repeated_but_no_notebook_runs_twice(quick, capfd):
    quick.lose_requests = ["GetKernel", "GetDatasetStatus", "ListKernelSessionOutput"]
    quick.lose_answers = ["CreateDataset", "SaveKernel"]
    quick.not_ready = 2
    assert push("--only", "01") == 0
    assert versions(quick, "01_data_sharding") == ["COMPLETE"] and not quick.lose_requests + quick.lose_answers


def test_a_push_whose_gateway_fails_is_not_sent_twice(quick, monkeypatch):
    quick.break_answers = ["SaveKernel"]
    seen, true = [], kaggle_site.Site.version

    def version(site, ref):  # Kaggle shows the version that has arrived only after a while
        seen.append(ref)
        return true(site, ref) if len(seen) > 3 else 0

    monkeypatch.setattr(kaggle_site.Site, "version", version)
    assert push("--only", "01") == 0 and versions(quick, "01_data_sharding") == ["COMPLETE"]
    assert quick.requests.count("SaveKernel") == 1


def test_an_answer_that_never_comes_is_given_up(quick, monkeypatch, capfd):
    monkeypatch.setattr(kaggle_site, "ANSWER_SECONDS", 0.5)
    quick.stall = ["GetKernel", "SaveKernel"]
    assert push("--only", "01") == 0 and versions(quick, "01_data_sharding") == ["COMPLETE"]
    assert "no answer (ReadTimeout), trying again" in capfd.readouterr().err


def test_a_platform_that_does_not_answer_pauses_the_run(quick, monkeypatch, capfd):
    monkeypatch.setattr(kaggle_site, "TRIES", 2)
    quick.lose_requests = ["GetKernel"] * 2
    assert push("--only", "01") == PAUSED
    assert "Kaggle did not answer 2 times" in capfd.readouterr().out
    assert resume() == 0


def test_a_push_whose_program_died_is_found_again(quick, account, monkeypatch):
    quick.held.add("01-data-sharding")
    monkeypatch.setattr(kaggle_remote.Remote, "_arrived", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert push("--only", "01") == 130
    assert entry(account, "01_data_sharding")["status"] == "pushing"
    monkeypatch.undo()
    for name, value in {"KAGGLE_API_ENVIRONMENT": "TEST", "KAGGLE_API_TOKEN": TOKEN, "RUNS_ROOT": str(account)}.items():
        monkeypatch.setenv(name, value)
    quick.held.clear()
    assert resume() == 0 and len(versions(quick, "01_data_sharding")) == 1


def test_another_run_of_the_notebook_is_not_taken_for_the_one_that_was_pushed(quick, account, capfd):
    quick.held.add("01-data-sharding")
    assert push("--only", "01", minutes=0.001) == PAUSED
    (mine,) = runs = quick.runs[f"{OWNER}/gifqa-tiny-01-data-sharding"]
    by_hand = replace(mine, number=2, folder=mine.folder.with_name("by-hand"), log=json.dumps([{"data": "by hand"}]))
    by_hand.working.mkdir(parents=True)
    by_hand.status = KernelWorkerStatus.ERROR
    runs.append(by_hand)
    assert main(["kaggle", "status", "--run", "tiny"]) == PAUSED and "QUEUED" in capfd.readouterr().out
    quick.held.clear()
    assert resume() == 0 and (account / "tiny" / "01_data_sharding" / "made.txt").read_text() == "made"
    mine.log = json.dumps([{"data": "as pushed"}])
    capfd.readouterr()
    assert main(["kaggle", "logs", "--run", "tiny", "01"]) == 0 and capfd.readouterr().out == "as pushed\n"
    shutil.rmtree(account / "tiny" / "01_data_sharding")
    assert main(["kaggle", "pull", "--run", "tiny", "01"]) == 0
    assert stages.check_outputs(account / "tiny" / "01_data_sharding")["metrics"] == {"gifs": 3}


def test_a_run_that_kaggle_does_not_know_yet_is_waited_for(quick, monkeypatch, capfd):
    quick.late = {"GetKernel": 4, "GetKernelSessionStatus": 3}
    assert push("--only", "01") == 0 and not any(quick.late.values())
    assert versions(quick, "01_data_sharding") == ["COMPLETE"]
    quick.late = {"GetKernelSessionStatus": 1000}
    monkeypatch.setattr(kaggle_remote, "NEW_SECONDS", 0.5)
    quick.held.add("08-demo")
    assert push("--run", "other", "--only", "08") == REFUSED  # but not for ever
    assert "gifqa-other-08-demo: Kaggle knows no such thing of yours (404)" in capfd.readouterr().err


def test_status_tells_a_run_that_kaggle_does_not_know_yet(quick, capfd):
    quick.held.add("01-data-sharding")
    assert push("--only", "01", minutes=0.001) == PAUSED
    quick.late = {"GetKernelSessionStatus": 1}
    capfd.readouterr()
    assert main(["kaggle", "status", "--run", "tiny"]) == PAUSED and "not there yet" in capfd.readouterr().out


def test_hours_of_a_session_that_kaggle_does_not_know_yet_are_not_given_away(quick, account):
    quick.held.add("08-demo")
    assert push("--only", "08", minutes=0.001) == PAUSED
    plan, state = commands._plan(["--profile", "tiny", "--run", "other", "--only", "05"])
    remote = kaggle_remote.Remote(plan, state, kaggle_site.Site())
    quick.late = {"GetKernelSessionStatus": 1}
    assert [found["kernel"] for found in remote._at_work()] == [f"{OWNER}/gifqa-tiny-08-demo"]


def test_a_machine_in_another_spelling_is_the_same(quick):
    quick.shape = str.upper
    assert push("--only", "08") == 0 and versions(quick, "08_demo") == ["COMPLETE"]


@pytest.mark.parametrize("answer", ["invalid", "dropped", "A notebook cannot use itself as a source"])
def test_work_goes_as_a_data_set_where_no_notebook_may_attach_itself(quick, account, capfd, answer):
    true, work, ref = quick.play, f"{OWNER}/gifqa-tiny-01-work", f"{OWNER}/gifqa-tiny-01-data-sharding"

    def play(run):
        takes_over = 'os.environ["SUITE_TAKES_OVER"] = "1"' in run.request.text.replace('\\"', '"')
        assert takes_over == (run.number > 1)
        change_manifest(quick.made["01_data_sharding"], status="partial" if run.number == 1 else "complete")
        return true(run) if run.number == 1 or work in run.sources["data"] else KernelWorkerStatus.ERROR

    quick.play, quick.attaches_itself = play, answer
    assert push("--only", "01") == 0
    assert "no notebook is attached to itself" in capfd.readouterr().out
    stray = [] if answer.startswith("A") else ["ERROR"]  # it was started without its work, and ended by itself
    assert versions(quick, "01_data_sharding") == ["COMPLETE", *stray, "COMPLETE"]
    (handed,) = quick.data_sets[work].versions
    with tarfile.open(fileobj=io.BytesIO(handed["work.bin"])) as archive:  # that of the first run
        assert json.load(archive.extractfile("stage.json"))["status"] == "partial"
    assert quick.runs[ref][-1].sources == {"data": [f"{OWNER}/{HELPERS}", work], "kernel": []}


def test_a_data_set_that_equals_its_last_version_is_no_failure(quick, account):
    quick.not_ready = 2
    quick.lose_answers = ["CreateDataset"]  # is made, and made again as a version
    quick.refuse["01-data-sharding"] = ["Kaggle is under maintenance"]
    assert push("--only", "01") == FAILED
    path = account / "tiny" / "kaggle.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"helpers": ""}))  # the program died before it noted it
    quick.requests.clear()
    assert resume() == 0
    assert (
        len(quick.data_sets[f"{OWNER}/{HELPERS}"].versions) == 1 and "StartBlobUpload" not in quick.requests
    )  # what is there is not sent


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (KaggleHttpClient, "_init_session"),
        (ApiGetKernelSessionStatusRequest, "version_label"),
        (KernelsApiClient, "get_kernel"),
        ("KaggleApi", "dataset_status"),
    ],
)
def test_a_client_whose_names_have_moved_is_told(quick, monkeypatch, capfd, owner, name):
    if owner == "KaggleApi":
        from kaggle.api.kaggle_api_extended import KaggleApi as owner  # signs in while it is imported
    monkeypatch.delattr(owner, name)
    assert push("--only", "01") == REFUSED
    error = capfd.readouterr().err
    assert f"kaggle {version('kaggle')}, kagglesdk {version('kagglesdk')}" in error
    assert name in error and "requirements.lock" in error


# ---------------------------------------------------------------------------------- what refused pushes leave behind

FULL_HOUSE, NO_HOURS = (
    "Maximum batch GPU session count of 2 reached.",
    "Maximum weekly GPU quota of 30.00 hours reached.",
)


@pytest.mark.parametrize("reason", [FULL_HOUSE, NO_HOURS])
def test_an_empty_notebook_is_deleted_and_the_stage_pushed_again(quick, account, capfd, reason):
    quick.leaves_empty = True
    quick.refuse["08-demo"] = [reason, reason]
    for _ in range(2):  # the notebook that is deleted comes back with the next refusal
        assert push("--only", "08", minutes=0.001) == PAUSED
        assert quick.empty == {f"{OWNER}/gifqa-tiny-08-demo"} and not quick.runs
    assert resume() == 0 and not quick.empty
    assert "gifqa-tiny-08-demo, which a refused push had left empty, is deleted" in capfd.readouterr().out
    assert versions(quick, "08_demo") == ["COMPLETE"] and quick.requests.count("DeleteKernel") == 2


@pytest.mark.parametrize(("code", "asked"), [(500, 1), (404, 1), (200, 0)])
def test_where_an_empty_notebook_stays_the_next_name_is_taken_for_good(quick, account, capfd, code, asked):
    """Metadata of it are broken, absent, or those of a draft that was made by hand, which is never deleted."""
    quick.unknown_code, quick.deletes = code, code == 200
    old, new = f"{OWNER}/gifqa-tiny-01-data-sharding", f"{OWNER}/gifqa-tiny-01-data-sharding-2"
    quick.empty = {old}
    quick.made["02_feature_caching"] = None
    true = quick.play

    def play(run):
        if "02-feature" in run.request.slug:
            return KernelWorkerStatus.ERROR
        change_manifest(quick.made["01_data_sharding"], status="partial" if run.number == 1 else "complete")
        return true(run)

    quick.play = play
    assert push("--only", "01", "--only", "02") == FAILED  # in 02
    out = capfd.readouterr().out
    assert f"{old} is empty" in out and f"goes on as {new}" in out and f"https://www.kaggle.com/code/{old}" in out
    assert quick.requests.count("DeleteKernel") == asked and quick.empty == {old}
    assert entry(account, "01_data_sharding")["kernel"] == new
    _, second = quick.runs[new]
    assert second.sources["kernel"] == [new]  # its own earlier work
    (reader,) = quick.runs[f"{OWNER}/gifqa-tiny-02-feature-caching"]
    assert reader.sources["kernel"] == [new]
    assert second.request.new_title == "gifqa tiny 01 data sharding 2" and slugify(second.request.new_title) in new
    assert resume() == FAILED and len(quick.runs[new]) == 2
    assert main(["kaggle", "status", "--run", "tiny"]) == FAILED
    assert re.search("01_data_sharding +complete", capfd.readouterr().out)


def test_names_are_not_tried_for_ever(quick, capfd):
    quick.empty = {f"{OWNER}/gifqa-tiny-01-data-sharding{ending}" for ending in ("", "-2", "-3", "-4")}
    quick.deletes = False
    assert push("--only", "01") == FAILED and quick.requests.count("DeleteKernel") == 3
    assert "Kaggle makes no notebook of any of the names" in capfd.readouterr().err


def test_a_notebook_that_was_never_there_is_no_empty_one(quick):
    assert push("--only", "01") == 0
    assert "DeleteKernel" not in quick.requests and list(quick.runs) == [f"{OWNER}/gifqa-tiny-01-data-sharding"]


def test_a_platform_that_is_down_is_no_empty_notebook(quick, monkeypatch):
    monkeypatch.setattr(kaggle_site, "TRIES", 2)
    true = quick.answer

    def down(name, body):
        if name in ("GetKernel", "GetKernelSessionStatus"):
            raise Refusal(500, "down")
        return true(name, body)

    quick.answer = down
    assert push("--only", "01") == PAUSED and "DeleteKernel" not in quick.requests


def test_a_notebook_that_ran_here_is_never_deleted(quick, capfd):
    quick.play = lambda run: KernelWorkerStatus.ERROR
    assert push("--only", "01") == FAILED
    quick.empty = {f"{OWNER}/gifqa-tiny-01-data-sharding"}
    true = quick.answer

    def gone(name, body):
        if name == "GetKernelSessionStatus":
            raise Refusal(404, "Not found")
        return true(name, body)

    quick.answer = gone
    assert resume() == FAILED and "the notebook of its earlier runs no more" in capfd.readouterr().err
    assert "DeleteKernel" not in quick.requests


def test_a_push_without_an_answer_is_no_empty_notebook_until_it_had_time_to_show_up(quick, account, capfd):
    quick.refuse["01-data-sharding"] = ["Kaggle is under maintenance"]
    assert push("--only", "01") == FAILED
    path = account / "tiny" / "kaggle.json"
    state = json.loads(path.read_text())
    state["stages"]["01_data_sharding"] |= {"status": "pushing", "before": 0, "began": time.time()}
    path.write_text(json.dumps(state))
    quick.empty = {f"{OWNER}/gifqa-tiny-01-data-sharding"}
    assert resume() == PAUSED and "was pushed just now and is not to be seen yet" in capfd.readouterr().out
    assert "DeleteKernel" not in quick.requests
    state["stages"]["01_data_sharding"]["began"] -= HOUR
    path.write_text(json.dumps(state))
    assert resume() == 0 and quick.requests.count("DeleteKernel") == 1


def test_a_push_without_hours_is_not_sent_again_while_others_run(quick, capfd):
    quick.refuse["08-demo"] = [NO_HOURS] * 99
    quick.held.add("01-data-sharding")
    assert push("--only", "01", "--only", "08", minutes=0.02) == PAUSED
    assert len(quick.refuse["08-demo"]) == 98


def test_a_full_house_is_asked_less_and_less_often(quick):
    quick.cap = 0
    assert push("--only", "08", minutes=0.03) == PAUSED  # 36 polls
    assert quick.requests.count("SaveKernel") <= 6


def test_room_that_an_own_stage_leaves_is_used_at_once(quick, monkeypatch):
    monkeypatch.setattr(kaggle_remote, "FULL_POLLS", (10**6, 10**6))  # else in days
    quick.cap, true, save = 1, quick.play, quick.answer
    quick.held.add("05-adem-scienceqa")

    def play(run):
        if "08-demo" in run.request.slug:
            return true(run)
        stage = stages.Stage("05_adem_scienceqa", profile="tiny", run="made", parameters={"data": ""})
        (stage.folder / "made.txt").write_text("made")
        stage.finish({"steps": 9}, ["made.txt"])
        stages.release_lock(stage.folder / ".lock")
        shutil.move(stage.folder, run.working / "runs" / "tiny" / "05_adem_scienceqa")
        return KernelWorkerStatus.COMPLETE

    def answer(name, body):
        found = save(name, body)
        if name == "SaveKernel" and found.error:
            quick.held.clear()
        return found

    quick.play, quick.answer = play, answer
    assert push("--only", "05", "--only", "08") == 0 and quick.requests.count("SaveKernel") == 3


@pytest.mark.parametrize(
    ("name", "following"),
    [("a-08-demo", "a-08-demo-2"), ("a-08-demo-2", "a-08-demo-3"), ("a" * 39 + "-08-demo-xx", "a" * 39 + "-08-demo-2")],
)
def test_the_next_name_is_one_that_kaggle_takes(name, following):
    assert kaggle_push.next_name(f"{OWNER}/{name}") == f"{OWNER}/{following}" and len(following) <= 50


# ------------------------------------------------------------------------------------------- the week's GPU-hours


def kernel_seconds(run) -> float:
    """How long a pushed notebook is to work, by its first cell."""
    return float(re.search(r"time\.time\(\) \+ (\d+)", run.request.text)[1])


@asks_for_quota
def test_a_gpu_session_is_as_short_as_what_is_left_of_the_week(quick, capfd):
    quick.gpu_hours = (25.0, 30.0)
    assert push("--only", "01", "--only", "08") == 0
    out = capfd.readouterr().out
    assert "25.0 of 30 GPU-hours used this week (account), 5.0 left" in out and "All of it: about" in out
    (free,), (costly,) = (quick.runs[f"{OWNER}/gifqa-tiny-{name}"] for name in ("01-data-sharding", "08-demo"))
    left = 5 * HOUR - MARGIN_SECONDS
    assert costly.request.session_timeout_seconds == pytest.approx(left, abs=60)
    assert kernel_seconds(costly) == pytest.approx(0.9 * left, abs=60)
    assert kernel_seconds(free) == 11.5 * HOUR  # without a GPU nothing counts


@asks_for_quota
def test_fewer_hours_can_be_kept_to(quick, capfd):
    quick.gpu_hours = (4.0, 30.0)
    assert push("--only", "08", "--weekly-hours", "4.1") == PAUSED
    assert "4.0 of 4.1 GPU-hours used this week" in capfd.readouterr().out and not versions(quick, "08_demo")


@asks_for_quota
def test_a_stage_that_nobody_has_measured_gets_a_short_session_and_then_a_forecast(quick, monkeypatch, capfd):
    """Within one command: what is told before the long session is what the short one measured."""
    monkeypatch.setattr(kaggle_remote, "MEASURED_FROM", 60.0)
    quick.gpu_hours = (10.0, 30.0)

    def play(run):
        stage = stages.Stage("05_adem_scienceqa", profile="tiny", run="tiny", parameters={"data": ""})
        own = run.working / "runs" / "tiny" / "05_adem_scienceqa"
        (stage.folder / "made.txt").write_text("made")
        if 'os.environ["SUITE_PROBE_STEPS"] = "20"' in run.request.text.replace('\\"', '"'):
            (stage.folder / "main").mkdir()
            note_pace(stage.folder / "main", "steps", 20, 60.0, 9_980, follow=["steps of the twin"])
            stage.finish({"steps": 20}, ["made.txt"], status="partial")
        else:
            stage.finish({"steps": 10_000}, ["made.txt"])
        stages.release_lock(stage.folder / ".lock")
        shutil.move(stage.folder, own)
        return KernelWorkerStatus.COMPLETE

    quick.play = play
    assert push("--only", "05") == 0
    first, second = quick.runs[f"{OWNER}/gifqa-tiny-05-adem-scienceqa"]
    assert first.request.session_timeout_seconds == 3600 and second.request.session_timeout_seconds > 11 * HOUR
    assert second.sources["kernel"] == [f"{OWNER}/gifqa-tiny-05-adem-scienceqa"] and "PROBE" not in second.request.text
    out = capfd.readouterr().out
    assert out.count("a short session measures its pace first") == 1
    assert "about 16.7 h (9,980 steps at 0.3 a second, 10,000 steps of the twin at 0.3 a second)" in out


@asks_for_quota
def test_without_hours_free_stages_end_and_the_rest_waits(quick, account, capfd):
    quick.gpu_hours = (29.9, 30.0)
    assert push("--only", "01", "--only", "08") == PAUSED
    out = capfd.readouterr().out
    assert "08_demo waits for GPU-hours" in out and "too little to start" in out and "the first from" in out
    assert "kaggle resume --run tiny" in out and not versions(quick, "08_demo")
    assert [entry(account, name)["status"] for name in ("01_data_sharding", "08_demo")] == ["complete", "waiting"]
    quick.gpu_hours = (0.0, 30.0)
    assert resume() == 0


@asks_for_quota
def test_hours_that_a_running_session_may_use_are_not_given_away_twice(quick, account, capfd):
    quick.gpu_hours = (29.0, 30.0)
    quick.held.add("05-adem-scienceqa")
    quick.play = lambda run: KernelWorkerStatus.ERROR  # when the test is over
    assert push("--only", "05", "--only", "08", minutes=0.02) == PAUSED
    assert versions(quick, "05_adem_scienceqa") == ["QUEUED"] and not versions(quick, "08_demo")
    assert entry(account, "08_demo")["status"] == "waiting" and "still running on Kaggle" in capfd.readouterr().out


@asks_for_quota
def test_hours_of_another_runs_session_are_not_given_away_twice(quick, account, capfd):
    """Five hours ago another run's session began, 15 h were used before it, and it may go on for seven."""
    quick.gpu_hours = (15.0, 30.0)
    quick.held.add("08-demo")
    assert push("--only", "08", minutes=0.001) == PAUSED
    path = account / "tiny" / "kaggle.json"
    state = json.loads(path.read_text())
    state["stages"]["08_demo"] |= {"began": time.time() - 5 * HOUR, "seconds": 12 * HOUR}
    path.write_text(json.dumps(state))
    quick.play = lambda run: KernelWorkerStatus.ERROR
    assert push("--run", "other", "--only", "05", minutes=0.001) == PAUSED
    (run,) = quick.runs[f"{OWNER}/gifqa-other-05-adem-scienceqa"]
    assert run.request.session_timeout_seconds == pytest.approx(3 * HOUR - MARGIN_SECONDS, abs=60)
    assert "20.0 of 30 GPU-hours used this week (account and running sessions)" in capfd.readouterr().out
    quick.held.clear()  # it ends, unseen: from now on the account tells of it
    wait_until(lambda: quick.runs[f"{OWNER}/gifqa-tiny-08-demo"][0].status is KernelWorkerStatus.ERROR)
    quick.gpu_hours = (29.9, 30.0)
    assert push("--run", "third", "--only", "05", minutes=0.001) == PAUSED
    assert "29.9 of 30 GPU-hours used this week (account)" in capfd.readouterr().out


def test_pushed_gpu_sessions_are_noted_in_the_ledger_and_others_not(quick, account, monkeypatch):
    monkeypatch.setattr(kaggle_remote, "BEAT_SECONDS", 0.0)
    quick.held |= {"08-demo", "01-data-sharding"}
    assert push("--only", "01", "--only", "08", minutes=0.01) == PAUSED
    noted = {beat.session for beat in quota.open_ledger().beats}
    assert noted == {f"{OWNER}/gifqa-tiny-08-demo/1"}  # while it runs
    finished = datetime.fromtimestamp(time.time() + HOUR, UTC).isoformat(timespec="seconds")
    change_manifest(quick.made["08_demo"], finished=finished)  # long before it is looked at again
    quick.held.clear()
    assert resume() == 0
    used = quota.open_ledger().used(0, 9e9, "kaggle", 9e9)
    assert used == pytest.approx(HOUR, abs=60)


def test_a_dead_gpu_session_is_noted_no_longer_than_it_could_last(quick, account, monkeypatch):
    quick.play = lambda run: KernelWorkerStatus.ERROR
    assert push("--only", "08", "--session", "0.5") == FAILED
    path = account / "tiny" / "kaggle.json"
    state = json.loads(path.read_text())
    state["stages"]["08_demo"] |= {"status": "running", "began": time.time() - 90 * HOUR}  # seen days later
    path.write_text(json.dumps(state))
    assert resume() == FAILED
    assert quota.open_ledger().used(0, 9e9, "kaggle", 9e9) == 0.5 * HOUR


@asks_for_quota
def test_sessions_too_short_for_any_progress_go_on_in_the_next_week(quick, monkeypatch, capfd):
    change_manifest(quick.made["08_demo"], status="partial")
    monkeypatch.setattr(forecasts, "USEFUL_SECONDS", 0.0)
    quick.gpu_hours = (29.0, 30.0)
    play = quick.play

    def plays(run):
        quick.gpu_hours = (29.0 if run.number == 1 else 30.0, 30.0)
        return play(run)

    quick.play = plays
    assert push("--only", "08") == PAUSED and versions(quick, "08_demo") == ["COMPLETE"] * 2
    assert "08_demo waits for GPU-hours" in capfd.readouterr().out


def test_kaggles_own_refusal_for_want_of_hours_is_a_pause(quick, account, capfd):
    quick.refuse["08-demo"] = ["Maximum weekly GPU quota of 30.00 hours reached."]
    assert push("--only", "08") == PAUSED
    assert "08_demo was not pushed: Maximum weekly GPU quota" in capfd.readouterr().out
    assert entry(account, "08_demo")["status"] == "waiting" and resume() == 0


def test_unknown_quota_is_a_warning_and_this_workspaces_own_sessions_count(quick, capfd):
    quota.open_ledger().note("mine", "kaggle", 29.9 * HOUR, time.time())
    quota.open_ledger().note_refresh(time.time() + 72 * HOUR)
    quick.answer = lambda name, body, true=quick.answer: refused(name) or true(name, body)
    assert push("--only", "08") == PAUSED
    out = capfd.readouterr().out
    assert "The account's quota is not known" in out and "29.9 of 30 GPU-hours used this week (ledger)" in out


def refused(name: str) -> None:
    if name == "GetAcceleratorQuotaStatistics":
        raise Refusal(500, "down")


def test_the_full_size_science_stage_is_pushed_only_if_it_is_named():
    names = [spec.name for spec in plan_of().specs]
    assert "04_evaluation" in names and "05_adem_scienceqa" not in names
    assert "05_adem_scienceqa" in [spec.name for spec in plan_of("--profile", "tiny").specs]
    assert [spec.name for spec in plan_of("--only", "05").specs] == ["05_adem_scienceqa"]
    costly = [quota.from_minutes(spec, plan_of().profile).seconds for spec in plan_of().specs if spec.gpu]
    assert sum(costly) <= 25 * HOUR  # of the week's 30


# -------------------------------------------------------------------------------------------------- what is made


def change_manifest(folder: Path, **values) -> None:
    path = folder / "stage.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_notebook_that_finishes_nothing_has_failed(quick, capfd):
    (quick.made["01_data_sharding"] / "stage.json").unlink()  # as after sys.exit(0)
    assert push("--only", "01") == FAILED
    assert "it left no stage.json" in capfd.readouterr().err


def test_a_result_of_other_settings_is_not_taken(quick, capfd):
    folder = quick.made["01_data_sharding"]
    manifest = stages.read_manifest(folder)
    manifest["settings"]["profile"]["shapes"]["seed"] = 5
    change_manifest(folder, settings=manifest["settings"])
    assert push("--only", "01") == FAILED
    assert "profile.shapes.seed: 5 there, 0 now" in capfd.readouterr().err


def test_files_that_changed_on_the_way_are_not_taken(quick, account, capfd):
    (quick.made["01_data_sharding"] / "made.txt").write_text("MADE")
    assert push("--only", "01") == FAILED
    assert "did not come whole" in capfd.readouterr().err and not (account / "tiny" / "01_data_sharding").exists()


def test_names_from_outside_stay_in_their_folder(quick, account, monkeypatch, capfd):
    true = kaggle_site.Site.outputs

    def outputs(site, ref):
        files = true(site, ref)
        return files | {"runs/tiny/01_data_sharding/../../../../evil.txt": next(iter(files.values()))}

    monkeypatch.setattr(kaggle_site.Site, "outputs", outputs)
    assert push("--only", "01") == FAILED
    assert "would leave its folder" in capfd.readouterr().err
    assert not list(account.parents[0].rglob("evil.txt"))


def test_a_session_without_progress_is_not_repeated_for_ever(quick, capfd):
    change_manifest(quick.made["01_data_sharding"], status="partial")
    assert push("--only", "01") == FAILED
    assert "no progress" in capfd.readouterr().err and len(versions(quick, "01_data_sharding")) == 2


def test_another_result_here_is_not_overwritten_and_pull_fetches_again(quick, account, capfd):
    mine = account / "tiny" / "01_data_sharding"
    mine.mkdir(parents=True)
    (mine / "mine.txt").write_text("mine")
    assert push("--only", "01") == REFUSED and not quick.runs
    assert "was made here (01_data_sharding): use --run NAME" in capfd.readouterr().err
    shutil.rmtree(mine)
    quick.held.add("01-data-sharding")
    assert push("--only", "01", minutes=0.001) == PAUSED
    mine.mkdir()
    (mine / "mine.txt").write_text("mine")
    quick.held.clear()
    assert resume() == REFUSED
    assert "holds another result" in capfd.readouterr().err and (mine / "mine.txt").is_file()
    shutil.rmtree(mine)
    assert resume() == 0 and (mine / "made.txt").read_text() == "made"
    shutil.rmtree(mine)
    assert main(["kaggle", "pull", "--run", "tiny", "01"]) == 0 and stages.check_outputs(mine)["metrics"] == {"gifs": 3}


def test_status_and_logs(quick, capfd):
    quick.held.add("01-data-sharding")
    assert push("--only", "01", minutes=0.001) == PAUSED
    capfd.readouterr()
    assert main(["kaggle", "status", "--run", "tiny"]) == PAUSED
    assert capfd.readouterr().out.split() == ["01_data_sharding", "running", "QUEUED"]
    quick.runs[f"{OWNER}/gifqa-tiny-01-data-sharding"][0].log = json.dumps([{"data": "3 GIFs\n"}, {"data": "done"}])
    assert main(["kaggle", "logs", "--run", "tiny", "01"]) == 0
    assert capfd.readouterr().out == "3 GIFs\ndone\n"
    assert main(["kaggle", "logs", "--run", "tiny", "02"]) == REFUSED


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["push", "--session", "13"], "12 hours at most"),
        (["push", "--profile", "mine.yaml"], "the suite's own profiles only"),
        (["push", "--attach", "nothing"], "give a data set as OWNER/NAME"),
        (["push", "--only", "00", "--run", "r" * 40], "shorten --run"),
        (["push", "-p", "epochs", "3"], "did you mean 'alignment.epochs' or 'training.epochs' or 'adem.epochs'"),
        (["resume", "--run", "never"], "was never pushed"),
        (["fly"], "invalid choice: 'fly'"),
        ([], "the following arguments are required"),
    ],
)
def test_bad_usage(quick, capfd, argv, message):
    try:
        code = main(["kaggle", *argv])
    except SystemExit as exit:  # argparse's own refusals
        code = exit.code
    assert code == REFUSED and message in capfd.readouterr().err and not quick.runs


def test_runs_there_have_names_of_their_own():
    assert plan_of("--profile", "tiny").run == "kaggle-tiny" and plan_of().run == "kaggle"


def test_a_run_is_not_pushed_again_with_other_options(quick, capfd):
    assert push("--only", "01") == 0 and push("--only", "01") == 0
    assert len(versions(quick, "01_data_sharding")) == 1
    assert push("--only", "01", "-p", "shapes.seed", "4") == REFUSED
    assert "was pushed with other options" in capfd.readouterr().err


@pytest.mark.parametrize("other", ["TINY_", "tiny-", "tiny.-"])
def test_a_run_that_would_share_anothers_notebook_is_refused(quick, account, capfd, other):
    mine = f"{OWNER}/gifqa-tiny-01-data-sharding"
    assert push("--only", "01") == 0
    assert push("--only", "01", "--run", other) == REFUSED
    told = capfd.readouterr().err
    assert f"run '{other}' would be pushed to the notebook of run 'tiny', {mine}" in told
    assert "--run NAME" in told and "kaggle resume --run tiny" in told
    assert len(quick.runs[mine]) == 1 and not (account / other / "kaggle.json").exists()
    push("--only", "08", "--run", other)  # a notebook that the other run has not
    push("--only", "01", "--run", "else")
    assert {*quick.runs} == {mine, f"{OWNER}/gifqa-tiny-08-demo", f"{OWNER}/gifqa-else-01-data-sharding"}
    assert resume() == 0


def test_an_input_that_the_run_does_not_hold_is_refused(quick, capfd):
    assert push("--only", "00", "--only", "02") == REFUSED and not quick.runs
    assert "02_feature_caching reads 01_data_sharding, which is not part of this run" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------ two commands at once


def test_what_another_command_has_done_until_the_lock_was_free_is_not_done_again(quick, monkeypatch):
    quick.refuse["01-data-sharding"] = ["Kaggle is under maintenance"]
    assert push("--only", "01") == FAILED
    true = kaggle_remote.hold_lock

    def hold_lock(*arguments):
        monkeypatch.setattr(kaggle_remote, "hold_lock", true)
        assert resume() == 0  # the other command
        true(*arguments)

    monkeypatch.setattr(kaggle_remote, "hold_lock", hold_lock)
    assert resume() == 0 and versions(quick, "01_data_sharding") == ["COMPLETE"]


@pytest.mark.parametrize("command", ["resume", "pull"])
def test_a_run_that_another_command_writes_to_is_refused(quick, account, capfd, command):
    assert push("--only", "01") == 0
    code = (  # as `run_all.sh --run tiny` does
        "import sys, time, pathlib; from helpers.stage import hold_lock\n"
        "hold_lock(pathlib.Path(sys.argv[1]), 'x'); print('held', flush=True); time.sleep(60)"
    )
    line = [sys.executable, "-c", code, str(account / "tiny" / ".lock")]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=repo_root()) as other:
        assert other.stdout.readline() == "held\n"
        assert main(["kaggle", command, "--run", "tiny"]) == REFUSED
        assert f"run 'tiny' is in use by another process (pid {other.pid})" in capfd.readouterr().err
        other.kill()
    assert main(["kaggle", command, "--run", "tiny"]) == 0


# ------------------------------------------------------------------------------------------- made from suite.yaml


def plan_of(*argv: str) -> RunPlan:
    return commands._plan(argv)[0]


def test_metadata_of_every_stage_comes_from_the_suite_file():
    plan = plan_of("--profile", "kaggle")
    for spec in plan.suite.stages:
        metadata = kernel_metadata(plan, spec, OWNER)
        owner, _, name = metadata["id"].partition("/")
        assert (owner, slugify(metadata["title"])) == (OWNER, name) and len(metadata["title"]) >= 5
        assert metadata.get("machine_shape") == ("NvidiaTeslaT4" if spec.gpu else None)
        assert metadata["enable_gpu"] == spec.gpu and metadata["enable_internet"] is True
        assert metadata["dataset_sources"] == [f"{OWNER}/gifqa-helpers"]
        before = {kernel_id(OWNER, "kaggle", other) for other in [*spec.inputs, *spec.kaggle_sources]}
        assert set(metadata["kernel_sources"]) == before
        reads_llama = spec.name[:2] in ("03", "04", "08")
        assert metadata["model_sources"] == ["metaresearch/llama-3.2/transformers/3b-instruct/1"] * reads_llama
    training = kernel_metadata(plan, plan.suite.spec("03_adapter_training"), OWNER)
    assert training["kernel_sources"] == [kernel_id(OWNER, "kaggle", "02_feature_caching")]  # and no frames
    again = kernel_metadata(plan, plan.suite.spec("03_adapter_training"), OWNER, ["x/work"], own_output=True)
    assert again["id"] in again["kernel_sources"] and again["dataset_sources"][1:] == ["x/work"]


def test_no_model_is_attached_that_the_run_does_not_use():
    plan = plan_of("--profile", "kaggle", "-p", "language_model.model", "openai-community/gpt2-large")
    assert kernel_metadata(plan, plan.suite.spec("04_evaluation"), OWNER)["model_sources"] == []


def test_data_set_metadata_is_what_kaggle_takes():
    metadata = kaggle_push.dataset_metadata(f"{OWNER}/{HELPERS}")
    assert slugify(metadata["title"]) == metadata["id"].partition("/")[2] and 6 <= len(metadata["title"]) <= 50
    assert len(metadata["licenses"]) == 1
    with pytest.raises(ConfigError, match="at most 50 characters"):
        kaggle_push.slug("gifqa", "x" * 50)
