"""Platform, folders, model lookup, precision and disk, with the platforms' environments faked."""

import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch

from helpers import workspace
from helpers.config import load_profile


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """No platform's variables, whatever machine the tests run on."""
    for name in list(os.environ):
        if name.startswith(("KAGGLE_", "COLAB_")) or name == "RUNS_ROOT":
            monkeypatch.delenv(name)


def test_platform_is_told_by_environment_and_kaggle_comes_first(monkeypatch):
    assert workspace.platform() == "local" and load_profile().name == "tiny"
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab-20261001")
    assert workspace.platform() == "colab" and load_profile().name == "colab"
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert workspace.platform() == "kaggle" and load_profile().name == "kaggle"


def test_runs_stay_where_the_platform_keeps_files(monkeypatch, tmp_path):
    assert workspace.runs_root() == workspace.repo_root() / "runs"
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    assert str(workspace.runs_root()) == "/kaggle/working/runs"
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path))
    assert workspace.runs_root() == tmp_path


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_precision_follows_compute_capability_not_the_bf16_answer(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args: True)  # what a T4 says
    assert workspace.compute_dtype(torch.device("cuda")) is dtype
    assert workspace.compute_dtype(torch.device("cpu")) is torch.float32


def test_too_little_disk_is_said_with_both_numbers(monkeypatch, tmp_path):
    monkeypatch.setattr(workspace.shutil, "disk_usage", lambda path: SimpleNamespace(free=1.5e9))
    workspace.require_disk(tmp_path / "not" / "yet", 1.4, "01")
    with pytest.raises(workspace.DiskFull, match=r"01 needs about 16 GB .* only 1\.5 GB are free"):
        workspace.require_disk(tmp_path / "not" / "yet", 16, "01")


def attach(folder, *parts):
    """Put a model's config.json under a faked Kaggle input folder."""
    target = folder.joinpath(*parts)
    target.mkdir(parents=True)
    (target / "config.json").write_text("{}")
    return target


def test_attached_kaggle_model_is_found_by_words(monkeypatch, tmp_path):
    monkeypatch.setattr(workspace, "KAGGLE_INPUT", tmp_path)
    small = attach(tmp_path, "models", "metaresearch", "llama-3.2", "transformers", "1b-instruct", "1")
    base = attach(tmp_path, "models", "metaresearch", "llama-3.2", "transformers", "3b", "1")
    large = attach(tmp_path, "models", "metaresearch", "llama-3.2", "transformers", "3b-instruct", "1")
    assert workspace.find_model("meta-llama/Llama-3.2-3B-Instruct") == str(large)
    assert workspace.find_model("meta-llama/Llama-3.2-3B") == str(base)
    assert workspace.find_model("meta-llama/Llama-3.2-1B-Instruct") == str(small)


def test_two_attached_candidates_are_listed_not_guessed(monkeypatch, tmp_path):
    monkeypatch.setattr(workspace, "KAGGLE_INPUT", tmp_path)
    for version in "12":
        attach(tmp_path, "llama-3.2", "transformers", "3b-instruct", version)
    with pytest.raises(workspace.ModelNotFound, match=r"3b-instruct/1\n.*3b-instruct/2"):
        workspace.find_model("meta-llama/Llama-3.2-3B-Instruct")


def test_local_folder_is_taken_as_it_is(tmp_path):
    assert workspace.find_model(str(attach(tmp_path, "my-model"))) == str(tmp_path / "my-model")


def test_cached_snapshot_is_used_without_network(monkeypatch, tmp_path):
    import huggingface_hub.constants as constants

    repo = tmp_path / "models--some--model"
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert workspace.find_model("some/model") == str(snapshot)


def test_cut_download_is_not_taken_for_a_model(monkeypatch, tmp_path):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    asked = []

    def snapshot_download(*args, local_files_only=False, **kwargs):
        asked.append(local_files_only)
        if not local_files_only:
            (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert workspace.find_model("some/model") == str(tmp_path) and asked == [True, False]
    assert workspace.find_model("some/model") == str(tmp_path) and asked == [True, False, True]


def test_attached_data_is_not_searched_to_its_depths(tmp_path):
    near = attach(tmp_path, "models", "owner", "name", "transformers", "3b", "1") / "config.json"
    attach(tmp_path, *"123456789")
    assert workspace._attached_configs(tmp_path) == [near]


def test_gated_model_is_one_error_with_every_way_out(monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError("403 Client Error: access to this gated model is restricted")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(workspace.ModelNotFound) as error:
        workspace.find_model("meta-llama/Llama-3.2-3B-Instruct", "main")
    text = str(error.value)
    for part in ("gated", "at revision main", "Kaggle", "HF_TOKEN", "models/Llama-3.2-3B-Instruct", "--profile tiny"):
        assert part in text


def test_unknown_tiny_model_is_named():
    with pytest.raises(workspace.ModelNotFound, match="tiny/nothing"):
        workspace.find_model("tiny/nothing")


def test_set_up_keeps_what_the_user_has_set(monkeypatch):
    for name in ("HF_HOME", "PYTORCH_CUDA_ALLOC_CONF", "TOKENIZERS_PARALLELISM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    before = dict(os.environ)
    workspace.set_up()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    assert os.environ["HF_HOME"].startswith("/kaggle/temp")
    for name in set(os.environ) - set(before):
        monkeypatch.delenv(name)


def test_machine_and_versions_are_plain_json():
    facts = json.loads(json.dumps(workspace.machine() | workspace.package_versions()))
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["torch"] == torch.__version__
    assert workspace.package_versions(("no-such-package",)) == {"no-such-package": "absent"}
