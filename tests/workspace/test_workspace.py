"""Platform, folders, model lookup, precision and disk, with the platforms' environments faked."""

import errno
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from helpers import install, workspace
from helpers.config import load_profile, parse_override
from helpers.models.gif_qa import GifQAModel
from helpers.models.xclip import load_xclip
from helpers.runner import drive
from helpers.sweeps.adem_vl import grid_of
from helpers.training.adem_vl import build_model
from helpers.workspace import disk, inputs, machine, place


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """No platform's variables, whatever machine the tests run on."""
    for name in list(os.environ):
        if name.startswith(("KAGGLE_", "COLAB_", "SUITE_")) or name in ("RUNS_ROOT", "HF_TOKEN", "HF_HOME"):
            monkeypatch.delenv(name)
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):  # what set_up and share_secrets have set
        del os.environ[name]


def on(monkeypatch, where: str) -> None:
    """Set what the environment of a platform is told by."""
    if where == "kaggle":
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
        monkeypatch.setenv("COLAB_RELEASE_TAG", "x")  # Kaggle's image is built from Colab's
    elif where == "colab":
        monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab-external-images_20260819")


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


@pytest.mark.parametrize(
    ("where", "runs", "scratch"),
    [("kaggle", "/kaggle/working/runs", "/kaggle/temp"), ("colab", "/content/runs", "/content/scratch")],
)
def test_runs_are_kept_and_weights_go_where_they_may_be_lost(monkeypatch, where, runs, scratch):
    on(monkeypatch, where)
    assert str(workspace.runs_root()) == runs and str(workspace.scratch_root()) == scratch
    install.set_up()
    assert os.environ["HF_HOME"] == f"{scratch}/huggingface" and os.environ["CUDA_VISIBLE_DEVICES"] == "0"


def test_locally_weights_stay_in_the_users_own_cache():
    install.set_up()
    assert "HF_HOME" not in os.environ and workspace.session_end() == math.inf


def test_platform_is_known_in_a_child_whose_shell_is_not_colabs(monkeypatch):
    on(monkeypatch, "colab")
    code = "from helpers import workspace; print(workspace.platform(), workspace.default_profile())"
    environment = os.environ | {"PYTHONPATH": str(workspace.repo_root())}
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert child.stdout.split() == ["colab", "colab"]


@pytest.mark.parametrize("where", ["kaggle", "colab"])
def test_session_is_as_old_as_the_machines_first_process(monkeypatch, where):
    on(monkeypatch, where)
    clocks = SimpleNamespace(boot=100_000.0, wall=5e9)
    monkeypatch.setattr(place, "_first_process_began", lambda: 100_000.0 - 2 * 3600)
    monkeypatch.setattr(time, "clock_gettime", lambda clock: clocks.boot)
    monkeypatch.setattr(time, "time", lambda: clocks.wall)
    assert workspace.session_seconds() == 2 * 3600
    assert workspace.session_end() == 5e9 + 10 * 3600 - workspace.MARGIN_SECONDS
    clocks.wall -= 86400.0  # a clock that is set back leaves the session as old as it was
    assert workspace.session_seconds() == 2 * 3600
    assert workspace.session_end() - clocks.wall == 10 * 3600 - workspace.MARGIN_SECONDS


def test_first_process_is_read_as_the_system_tells_it():
    psutil = pytest.importorskip("psutil")
    began = psutil.Process(1).create_time() - psutil.boot_time()
    assert place._first_process_began() == pytest.approx(began, abs=1.1)


def test_children_of_a_session_agree_on_its_name(monkeypatch):
    on(monkeypatch, "kaggle")
    code = "from helpers import workspace; print(workspace.session_name())"
    environment = os.environ | {"PYTHONPATH": str(workspace.repo_root())}
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert child.stdout.strip() == workspace.session_name()
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE")
    monkeypatch.delenv("COLAB_RELEASE_TAG")
    assert child.stdout.strip() != workspace.session_name()


def fake_driver(folder: Path, monkeypatch, answer: str, code: int = 0) -> None:
    """Put a stand-in for the driver's tool on PATH that gives `answer`."""
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{answer}\nEND\nexit {code}\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_gpus_are_told_by_the_driver_whatever_this_process_may_see(monkeypatch, tmp_path):
    fake_driver(tmp_path, monkeypatch, "Tesla T4, 15360, 7.5\nTesla T4, 15360, 7.5")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert workspace.gpus() == [workspace.Gpu("Tesla T4", 15.0, (7, 5))] * 2
    fake_driver(tmp_path, monkeypatch, "NVIDIA-SMI has failed because it couldn't communicate with the driver.", 9)
    assert workspace.gpus() == []
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert workspace.gpus() == []


# ---------------------------------------------------------------------------------------------------- secrets


def kaggle_secrets(monkeypatch, secrets: dict[str, str]) -> list[str]:
    """Stand in for Kaggle's module; returns the list of names that are asked for."""
    asked, module = [], ModuleType("kaggle_secrets")

    class UserSecretsClient:
        def get_secret(self, name):
            asked.append(name)
            if name not in secrets:
                raise RuntimeError(f"No user secrets exist for kernel id 1 and label {name}.")
            return secrets[name]

    module.UserSecretsClient = UserSecretsClient
    monkeypatch.setitem(sys.modules, "kaggle_secrets", module)
    monkeypatch.setenv("KAGGLE_USER_SECRETS_TOKEN", "jwt")
    return asked


def test_kaggles_secrets_are_read_once_and_inherited_and_never_told(monkeypatch, capfd, caplog):
    on(monkeypatch, "kaggle")
    caplog.set_level(logging.DEBUG)
    asked = kaggle_secrets(monkeypatch, {"HF_TOKEN": "hf_very_secret"})
    assert workspace.share_secrets() == ["HF_TOKEN"] and asked == ["HF_TOKEN", "KAGGLE_API_TOKEN"]
    assert workspace.share_secrets() == ["HF_TOKEN"] and len(asked) == 2
    code = "import os, sys; sys.exit(os.environ['HF_TOKEN'] != 'hf_very_secret')"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    told = capfd.readouterr()
    assert "hf_very_secret" not in told.out + told.err + caplog.text and "no secret KAGGLE_API_TOKEN" in caplog.text


def test_what_the_user_has_set_is_not_replaced(monkeypatch):
    on(monkeypatch, "kaggle")
    asked = kaggle_secrets(monkeypatch, {"HF_TOKEN": "other"})
    monkeypatch.setenv("HF_TOKEN", "mine")
    workspace.share_secrets()
    assert os.environ["HF_TOKEN"] == "mine" and "HF_TOKEN" not in asked


def colab_userdata(monkeypatch, shell: type) -> list[str]:
    """Stand in for google.colab's userdata, seen from a kernel of the given shell class."""
    asked, userdata = [], ModuleType("google.colab.userdata")

    class SecretNotFoundError(Exception):
        pass

    def get(name):
        asked.append(name)
        if name != "HF_TOKEN":
            raise SecretNotFoundError(f"Secret {name} does not exist.")
        return "hf_from_colab"

    userdata.get = get
    for name in ("google", "google.colab", "google.colab.userdata"):
        module = userdata if name.endswith("userdata") else ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["google.colab"].userdata = userdata
    ipython = ModuleType("IPython")
    ipython.get_ipython = shell
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    return asked


def test_colabs_secrets_are_asked_for_in_its_own_kernel_only(monkeypatch):
    on(monkeypatch, "colab")
    plain = type("ZMQInteractiveShell", (), {"__module__": "ipykernel.zmqshell"})
    asked = colab_userdata(monkeypatch, plain)  # a child of papermill: the question would only time out
    assert workspace.share_secrets() == [] and asked == []
    monkeypatch.delenv(workspace.SHARED)
    asked = colab_userdata(monkeypatch, type("Shell", (), {"__module__": "google.colab._shell"}))
    assert workspace.share_secrets() == ["HF_TOKEN"] and os.environ["HF_TOKEN"] == "hf_from_colab"
    assert asked == ["HF_TOKEN", "KAGGLE_API_TOKEN"]


# ------------------------------------------------------------------------------------------------ Google Drive


@pytest.fixture
def finished(tmp_path):
    """A stage's folder with a few files."""
    folder = tmp_path / "03_adapter_training"
    (folder / "bundle").mkdir(parents=True)
    for name in ("bundle/connector.safetensors", "history.parquet", "stage.json", ".lock"):
        (folder / name).write_bytes(name.encode() * 1000)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_copy_survives_a_drive_that_drops_out_in_the_middle_of_a_file(monkeypatch, tmp_path, finished):
    copyfile, calls = shutil.copyfile, []

    def fails_twice(source, target):
        calls.append(Path(source).name)
        if len(calls) in (1, 3):
            Path(target).write_bytes(Path(source).read_bytes()[:100])
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
        copyfile(source, target)
        if len(calls) == 4:  # written without an error, and yet not what was written
            Path(target).write_bytes(b"something else")

    monkeypatch.setattr(shutil, "copyfile", fails_twice)
    drive.copy_verified(finished, tmp_path / "drive", wait=0.0)
    expected = files(finished)
    del expected[".lock"]
    assert files(tmp_path / "drive") == expected and calls[-1] == "stage.json" and len(calls) == 6
    calls.clear()
    drive.copy_verified(finished, tmp_path / "drive", wait=0.0)
    assert calls == []  # what is there and equal is not sent again


def test_drive_that_stays_away_is_an_error_and_leaves_nothing_that_looks_done(monkeypatch, tmp_path, finished):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)

    def copyfile(source, target):
        if Path(source).name == "history.parquet":
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
        Path(target).write_bytes(Path(source).read_bytes())

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    with pytest.raises(OSError, match=r"history\.parquet could not be copied .* in 4 attempts.*not connected"):
        drive.copy_verified(finished, tmp_path / "drive", attempts=4, wait=1.0)
    assert pauses == [1.0, 2.0, 4.0] and not (tmp_path / "drive" / "stage.json").exists()


def test_copy_follows_what_was_replaced(tmp_path, finished):
    drive.copy_verified(finished, tmp_path / "drive")
    (finished / "history.parquet").rename(finished / "other.parquet")
    (finished / "stage.json").write_text("{}")
    drive.copy_verified(finished, tmp_path / "drive")
    assert set(files(tmp_path / "drive")) == {"bundle/connector.safetensors", "other.parquet", "stage.json"}
    assert (tmp_path / "drive" / "stage.json").read_text() == "{}"


def test_drive_is_used_on_colab_and_only_if_it_is_mounted(monkeypatch, tmp_path):
    monkeypatch.setattr(drive, "DRIVE", tmp_path)
    assert drive.drive_runs() is None
    on(monkeypatch, "colab")
    assert drive.drive_runs() == tmp_path / "gif-question-answering" / "runs"
    monkeypatch.setattr(drive, "DRIVE", tmp_path / "not mounted")
    assert drive.drive_runs() is None


def test_too_little_disk_is_said_with_both_numbers(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1.5e9))
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
    monkeypatch.setattr(place, "KAGGLE_INPUT", tmp_path)
    small = attach(tmp_path, "models", "metaresearch", "llama-3.2", "transformers", "1b-instruct", "1")
    base = attach(tmp_path, "models", "metaresearch", "llama-3.2", "transformers", "3b", "1")
    large = attach(tmp_path, "models", "metaresearch", "llama-3.2", "transformers", "3b-instruct", "1")
    assert workspace.find_model("meta-llama/Llama-3.2-3B-Instruct") == str(large)
    assert workspace.find_model("meta-llama/Llama-3.2-3B") == str(base)
    assert workspace.find_model("meta-llama/Llama-3.2-1B-Instruct") == str(small)


def test_two_attached_candidates_are_listed_not_guessed(monkeypatch, tmp_path):
    monkeypatch.setattr(place, "KAGGLE_INPUT", tmp_path)
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


def test_without_weights_only_the_small_files_are_fetched(monkeypatch, tmp_path):
    """What a tokenizer and a configuration need; a hub's folder that lacks them is no model."""
    asked = []

    def snapshot_download(*args, allow_patterns, local_files_only=False, **kwargs):
        asked.append(local_files_only)
        small = ["config.json", "tokenizer.json", "spiece.model", "chat_template.jinja"]
        there = [*small, "model.safetensors", "pytorch_model.bin"]
        wanted = [name for name in there if any(fnmatch(name, pattern) for pattern in allow_patterns)]
        assert wanted == small
        if not local_files_only:
            (tmp_path / "config.json").write_text("{}")
            (tmp_path / "tokenizer.json").write_text("{}")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert workspace.find_model("some/model", weights=False) == str(tmp_path) and asked == [True, False]
    assert workspace.find_model("some/model", weights=False) == str(tmp_path) and asked == [True, False, True]


@pytest.mark.parametrize("there", [None, ["config.json"], ["config.json", "tokenizer.json"]])
def test_what_must_not_be_fetched_is_only_looked_for(monkeypatch, tmp_path, there):
    from huggingface_hub.errors import LocalEntryNotFoundError

    only_here = []

    def snapshot_download(*args, local_files_only=False, **kwargs):
        only_here.append(local_files_only)
        if there is None:
            raise LocalEntryNotFoundError("not in the cache")
        return str(tmp_path)

    for name in there or []:
        (tmp_path / name).write_text("{}")
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    if there and len(there) == 2:
        assert workspace.find_model("some/model", weights=False, fetch=False) == str(tmp_path)
    else:
        with pytest.raises(workspace.ModelNotFound):
            workspace.find_model("some/model", weights=False, fetch=False)
    assert only_here == [True]


def test_attached_data_is_not_searched_to_its_depths(monkeypatch, tmp_path):
    monkeypatch.setattr(place, "KAGGLE_INPUT", tmp_path)
    near = attach(tmp_path, "models", "owner", "name", "transformers", "3b", "1") / "config.json"
    attach(tmp_path, *"123456789")
    attach(tmp_path, "data", ".Trash-0", "3b")
    assert inputs.attached_paths("config.json") == [near]


def test_gated_model_is_one_error_with_every_way_out(monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError("403 Client Error: access to this gated model is restricted")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(workspace.ModelNotFound) as error:
        workspace.find_model("meta-llama/Llama-3.2-3B-Instruct", "main")
    text = str(error.value)
    for part in ("gated", "at revision main", "Kaggle", "HF_TOKEN", "models/Llama-3.2-3B-Instruct"):
        assert part in text


def test_weights_of_the_gif_model_are_asked_for_by_its_own_keys(monkeypatch):
    """Whatever the profile in use is, none is advised; what is advised instead can be built."""

    def refuse(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    for profile in ("tiny", "kaggle", "datacenter"):
        tiny = {"language_model.model": "tiny/llama", "encoder.model": "tiny/xclip"}
        for key in tiny:
            with pytest.raises(workspace.ModelNotFound) as error:
                GifQAModel.build(load_profile(profile, tiny | {"language_model.chat": False, key: "nobody/none"}))
            text = str(error.value)
            assert "-p language_model.model FOLDER" in text and "-p encoder.model FOLDER" in text
            assert not any(wrong in text for wrong in ("--profile", "adem."))
            advised = dict(re.findall(r"-p ((?:language_model|encoder|data)\.\w+) (tiny/\w+|\d+|false)", text))
            assert advised.items() > tiny.items()
        asked = load_profile(profile, {key: parse_override(key, value) for key, value in advised.items()})
        GifQAModel.build(asked)
        assert load_xclip(asked.encoder.model).config.vision_config.image_size == asked.data.image_size


def test_weights_of_adem_vl_are_asked_for_by_its_own_keys(monkeypatch):
    """Whatever the profile in use is, none is advised; what is advised instead can be built."""

    def refuse(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    for profile in ("tiny", "kaggle", "datacenter"):
        for key, call in (("language_model", build_model), ("vision_model", build_model), ("vision_model", grid_of)):
            tiny = {"adem.language_model": "tiny/science_llama", "adem.vision_model": "tiny/science_clip"}
            config = load_profile(profile, tiny | {"adem.scales": None, f"adem.{key}": "nobody/none"}).adem
            with pytest.raises(workspace.ModelNotFound) as error:
                call(config)
            text = str(error.value)
            assert "adem.language_model FOLDER" in text and "adem.vision_model FOLDER" in text
            assert not any(wrong in text for wrong in ("--profile", "-p language_model.model", "-p encoder.model"))
            advised = dict(re.findall(r"-p (adem\.\w+) (tiny/\w+|null)", text))
            assert advised == tiny | {"adem.scales": "null"}


def test_unknown_tiny_model_is_named():
    with pytest.raises(workspace.ModelNotFound, match="tiny/nothing"):
        workspace.find_model("tiny/nothing")


def test_set_up_keeps_what_the_user_has_set(monkeypatch):
    for name in ("HF_HOME", "PYTORCH_CUDA_ALLOC_CONF", "TOKENIZERS_PARALLELISM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    install.set_up()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    assert os.environ["HF_HOME"].startswith("/kaggle/temp")


def test_image_is_named_as_each_platform_tells_it(monkeypatch, tmp_path):
    assert machine.machine()["image"] is None
    on(monkeypatch, "colab")
    assert machine.machine()["image"] == "release-colab-external-images_20260819"
    monkeypatch.setattr(machine, "KAGGLE_IMAGE", tmp_path)
    on(monkeypatch, "kaggle")
    assert workspace.image() == "unknown"
    (tmp_path / "git_commit").write_text("0123abc\n")
    (tmp_path / "build_date").write_text("20260514-060047\n")
    assert machine.machine()["image"] == "0123abc 20260514-060047"


def test_machine_and_versions_are_plain_json():
    facts = json.loads(json.dumps(machine.machine() | workspace.package_versions()))
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["torch"] == torch.__version__
    assert workspace.package_versions(("no-such-package",)) == {"no-such-package": "absent"}


def test_what_was_written_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """The order of a folder's write: every file, the folders, the rename, the parent."""
    told, sync, replace = [], os.fsync, Path.replace
    name = "/proc/self/fd/{}".format
    monkeypatch.setattr(os, "fsync", lambda handle: (told.append(os.readlink(name(handle))), sync(handle)))
    monkeypatch.setattr(Path, "replace", lambda self, to: (told.append(f"replace {to}"), replace(self, to)))
    with disk.whole(tmp_path / "made") as temporary:
        (temporary / "inner").mkdir(parents=True)
        (temporary / "inner" / "file").write_text("x")
        (temporary / "other").write_text("y")
    place = tmp_path / "made"
    order = [name.replace(str(temporary), "T") for name in told]
    assert sorted(order[:4]) == ["T", "T/inner", "T/inner/file", "T/other"]
    assert order.index("T/inner/file") < order.index("T/inner") < order.index("T")
    assert order[4:] == [f"replace {place}", str(tmp_path)]


def test_no_two_writes_share_a_name_and_only_the_dead_ones_go(tmp_path):
    """Writes of one process at once, of a process that is gone, of a number that another process has now."""
    target = tmp_path / "table"
    with disk.whole(target) as one, disk.whole(target) as two:
        assert one != two
        one.write_text("1"), two.write_text("2")
        mine = one.name.split(".")[-2].split("-")
        gone, reused, elsewhere = (
            one.with_name(f".table.{'-'.join(words)}.tmp")
            for words in (
                [mine[0], "999999999", "0" * 8, "a"],
                [mine[0], mine[1], "0" * 8, "a"],
                ["0" * 8, mine[1], mine[2], "a"],
            )
        )
        for left in (gone, reused, elsewhere):
            left.write_text("part")
        disk.clear_leftovers(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([one, two, elsewhere])
        os.utime(elsewhere, (1, 1))
        disk.clear_leftovers(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([one, two])
    assert target.read_text() == "1"


def test_damaged_json_is_dropped_with_a_warning(tmp_path):
    """What a stop of the machine makes of a note counts as none, once."""
    disk.write_json(tmp_path / "note.json", {"a": 1})
    assert disk.read_json(tmp_path / "note.json") == {"a": 1}
    for damaged in (b"", b'{\n "a', b"\xff\x00"):
        (tmp_path / "note.json").write_bytes(damaged)
        with pytest.warns(UserWarning, match=r"note\.json is damaged"):
            assert disk.read_json(tmp_path / "note.json") is None
        assert not (tmp_path / "note.json").exists()


def test_a_file_never_takes_the_place_of_a_folder_nor_the_other_way_round(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "kept").write_text("x")
    with pytest.raises(OSError, match="here"):
        disk.write_text(tmp_path / "here", "y")
    with pytest.raises(OSError, match="kept"), disk.whole(tmp_path / "here" / "kept") as temporary:
        temporary.mkdir()
    assert (tmp_path / "here" / "kept").read_text() == "x" and len(list(tmp_path.rglob("*"))) == 2


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_link_in_a_targets_place_points_to_is_left_alone(kind, tmp_path):
    kept, made, target = tmp_path / "kept", tmp_path / "made", tmp_path / "out" / "target"
    target.parent.mkdir()
    for path, content in ((kept, "old"), (made, "new")):
        if kind == "folder":
            path.mkdir()
        (path / "a.txt" if kind == "folder" else path).write_text(content)
    target.symlink_to(kept)
    disk.put_in_place(made, target)
    told = [(path / "a.txt" if kind == "folder" else path).read_text() for path in (kept, target)]
    assert told == ["old", "new"] and not target.is_symlink() and [*target.parent.iterdir()] == [target]
