"""What notebook 00 tells: known-bad sets with their remedies, attached inputs, the machine, and the GPU-hours."""

import pytest
import torch

from helpers.config import load_profile
from helpers.runner import overview
from helpers.runner.quota import budgets
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
