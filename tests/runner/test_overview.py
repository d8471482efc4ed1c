"""What notebook 00 tells: known-bad sets with their remedies, attached inputs, the machine, and the GPU-hours."""

from pathlib import Path

import pytest
import torch

from helpers.config import load_profile
from helpers.runner import overview, quota
from helpers.runner.quota import budgets, forecasts
from helpers.stage.manifest import manifest_elsewhere, newest_attached
from helpers.stage.suite import StageError
from helpers.suite import main
from helpers.workspace import faults as workspace_faults
from helpers.workspace import place
from helpers.workspace.disk import write_json
from helpers.workspace.faults import KnownBad, known_faults, refuse_known_bad
from helpers.workspace.machine import Gpu

GOOD = {"peft": "0.21.2", "torchao": "absent"}
CU128 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]  # what torch for CUDA 12.8 is built for


@pytest.mark.parametrize(
    ("versions", "faulty"),
    [
        (GOOD, False),
        ({"peft": "0.19.1", "torchao": "0.10.0"}, True),  # Kaggle's image of May 2026
        ({"peft": "0.20.0", "torchao": "0.10.0"}, True),  # Colab's of August
        ({"peft": "0.18.1", "torchao": "0.10.0"}, False),
        ({"peft": "0.21.2", "torchao": "0.16.0"}, False),
        ({"peft": "absent", "torchao": "0.10.0"}, False),
    ],
)
def test_old_torchao_beside_new_peft_is_refused_with_the_remedy(versions, faulty):
    faults = known_faults(versions, None, [])
    assert bool(faults) == faulty
    assert not faulty or "pip uninstall -y torchao" in faults[0]


@pytest.mark.parametrize(
    ("capability", "architectures", "faulty"),
    [
        ((6, 0), CU128, True),  # a P100 under today's torch
        ((6, 0), ["sm_50", "sm_60", "sm_70"], False),
        ((6, 1), ["sm_60", "sm_70"], False),  # a later minor version of the same family
        ((7, 0), CU128, True),
        ((7, 5), CU128, False),
        ((8, 9), CU128, False),
        ((10, 0), ["sm_90a", "compute_90"], False),  # compiled when it starts
        ((10, 0), ["sm_90a"], True),
    ],
)
def test_gpu_that_torch_has_no_code_for_is_refused(capability, architectures, faulty):
    faults = known_faults(GOOD, capability, architectures)
    assert bool(faults) == faulty
    assert not faulty or ("GPU T4 x2" in faults[0] and "compute capability" in faults[0])


def test_bfloat16_on_a_t4_is_refused_and_elsewhere_not(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert "float16" in known_faults(GOOD, (7, 5), CU128)[0]
    assert known_faults(GOOD, (8, 0), CU128) == [] and known_faults(GOOD, None, []) == []


def test_every_fault_is_told_at_once_before_the_gpu_is_touched(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (6, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CU128)
    monkeypatch.setattr(workspace_faults, "package_versions", lambda names: {"peft": "0.19.1", "torchao": "0.10.0"})
    with pytest.raises(KnownBad) as error:
        refuse_known_bad()
    assert "torchao 0.10.0" in str(error.value) and "6.0" in str(error.value)


def test_this_machine_is_not_known_to_fail():
    assert refuse_known_bad().startswith("No known fault")


def test_attached_inputs_are_found_by_what_they_hold(monkeypatch, tmp_path):
    monkeypatch.setattr(place, "KAGGLE_INPUT", tmp_path)
    assert overview.attached_table().empty
    model = tmp_path / "models" / "metaresearch" / "llama-3.2" / "transformers" / "3b-instruct" / "1"
    stage = tmp_path / "notebooks" / "owner" / "slug" / "runs" / "kaggle" / "02_feature_caching"
    for folder in (model, stage):
        folder.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    write_json(stage / "stage.json", {"status": "partial"})
    assert overview.attached_table().to_dict("records") == [
        {"folder": str(stage.relative_to(tmp_path)), "what": "stage of a run", "status": "partial"},
        {"folder": str(model.relative_to(tmp_path)), "what": "model", "status": ""},
    ]


def test_machine_is_told_with_every_gpu_and_both_disks(monkeypatch, tmp_path):
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path / "not" / "yet"))
    monkeypatch.setattr(overview, "gpus", lambda: [Gpu("Tesla T4", 15.0, (7, 5))] * 2)
    rows = overview.machine_table({"platform": "kaggle", "gpu": "Tesla T4", "disk_free_gb": 1.0})["this machine"]
    assert rows["GPU 1"] == "Tesla T4, 15.0 GiB, capability 7.5" and "gpu" not in rows
    assert rows["disk that is kept"].endswith(f"GB free at {tmp_path}") and "disk that is lost" in rows


def test_gpu_hours_are_planned_for_profiles_that_need_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path))
    monkeypatch.setattr(budgets, "ask_account", lambda: budgets.Account(1.0, 37.0, None))
    assert overview.gpu_hours(load_profile("tiny"), tmp_path / "tiny") == (None, [])
    found, plan = overview.gpu_hours(load_profile("kaggle"), tmp_path / "kaggle")
    assert found.total == 37 * 3600
    assert list(dict.fromkeys(piece.stage for piece in plan))[:2] == ["02_feature_caching", "03_adapter_training"]
    assert plan[-1].done


# What a power cut, another program or an older version may leave in the place of a stage.json.
TORN = ["", "{", "[]", "null", "{}", '{"status": "sleeping"}', "\xe9\x00"]


def ruin(folder, content):
    """Write `content` as the stage.json of a stage's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stage.json").write_text(content, encoding="latin-1")


@pytest.mark.parametrize("content", [*TORN, '{"status": "complete"}'])
def test_an_unreadable_stage_of_another_run_is_passed_over(content, monkeypatch, tmp_path, capsys):
    """Forecast, table of stages and quota go on to the next run that was measured."""
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path))
    monkeypatch.setattr(forecasts, "gpus", lambda: [Gpu("Tesla T4", 15.0, (7, 5))])
    name, profile = "02_feature_caching", load_profile("tiny")
    ruin(tmp_path / "a_torn_one" / name, content)
    good = {"status": "complete", "profile": {"name": "tiny"}, "machine": {"gpu": "Tesla T4"}, "seconds": 1234.0}
    write_json(tmp_path / "old" / name / "stage.json", good)
    with pytest.warns(UserWarning, match=f"passed over: {tmp_path}/a_torn_one/{name}/stage.json"):
        table = overview.stage_table(profile, tmp_path / "new")
    assert table.loc[name, "forecast from"] == "measured in run 'old'" and table.loc[name, "state"] == "not done"
    with pytest.warns(UserWarning, match="a_torn_one"):
        assert main(["quota", "--profile", "tiny", "--run", "new"]) == 0
    assert "measured in run 'old'" in capsys.readouterr().out


@pytest.mark.parametrize("content", TORN)
def test_an_unreadable_stage_of_the_run_itself_stays_an_error(content, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path))
    ruin(tmp_path / "new" / "02_feature_caching", content)
    with pytest.raises(StageError, match=r"new/02_feature_caching/stage\.json .*--from 02_feature_caching"):
        overview.stage_table(load_profile("tiny"), tmp_path / "new")
    assert main(["quota", "--profile", "tiny", "--run", "new"]) == 2
    assert "Refused: " in capsys.readouterr().err


def test_an_unreadable_stage_of_the_run_that_is_built_on_is_not_shown(monkeypatch, tmp_path):
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path))
    ruin(tmp_path / "base" / "02_feature_caching", "")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "upstream").write_text("base\n")
    with pytest.warns(UserWarning, match="base/02_feature_caching"):
        table = overview.stage_table(load_profile("tiny"), tmp_path / "new")
    assert table.loc["02_feature_caching", "state"] == "not done"


def test_a_stage_that_may_not_be_read_is_passed_over(monkeypatch, tmp_path):
    """Root reads everything: the operating system's refusal is played."""
    write_json(tmp_path / "stage.json", {"status": "complete"})
    monkeypatch.setattr(Path, "read_text", lambda *a, **k: (_ for _ in ()).throw(PermissionError(13, "denied", "x")))
    with pytest.warns(UserWarning, match="passed over"):
        assert manifest_elsewhere(tmp_path) is None


def test_unreadable_attached_stages_are_told_and_passed_over(monkeypatch, tmp_path):
    monkeypatch.setattr(place, "KAGGLE_INPUT", tmp_path)
    for name, content in (("torn", ""), ("whole", '{"status": "complete", "finished": "2020-01-01T00:00:00+00:00"}')):
        ruin(tmp_path / name / "runs" / "r" / "03", content)
        (tmp_path / name / "runs" / "r" / "03" / "bundle").mkdir()
        (tmp_path / name / "runs" / "r" / "03" / "bundle" / "bundle.json").write_text("{}")
    with pytest.warns(UserWarning, match="torn"):
        table = overview.attached_table().set_index("folder")["status"]
    assert table["torn/runs/r/03"] == "not readable" and table["whole/runs/r/03"] == "complete"
    with pytest.warns(UserWarning, match="torn"):
        assert newest_attached("bundle.json", lambda folder: True) is not None


@pytest.mark.parametrize("content", ["", "[]", "{", '{"stages": []}'])
def test_what_another_run_pushed_is_passed_over_where_it_cannot_be_read(content, monkeypatch, tmp_path):
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path))
    entry = {"status": "running", "kernel": "me/k", "version": 3}
    write_json(tmp_path / "old" / "kaggle.json", {"stages": {"02": entry}})
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "kaggle.json").write_text(content)
    with pytest.warns(UserWarning, match=r"torn/kaggle\.json"):
        assert quota.begun_on_kaggle() == {"me/k/3"}
