"""Attached inputs on Kaggle: stages of other notebooks, and one's own work of an earlier session."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from helpers.stage import attached
from helpers.stage.attached import AttachedError, attached_stage, holds_work, pack, take_over
from helpers.workspace import file_sha256, place

RUN, NAME = "tiny", "03_adapter_training"


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """An empty folder of attached inputs."""
    folder = tmp_path / "input"
    folder.mkdir()
    monkeypatch.setattr(place, "KAGGLE_INPUT", folder)
    return folder


def stage(source: Path, name: str = NAME, *, done: bool = True) -> Path:
    """What a notebook's output carries of a stage: one checkpoint, and its manifest if it was finished."""
    folder = source / "runs" / RUN / name
    (folder / "checkpoints" / "step-1").mkdir(parents=True)
    (folder / "checkpoints" / "step-1" / "tensors").write_bytes(bytes(range(256)))
    (folder / "started.json").write_text("{}")
    (folder / ".lock").write_text("7")
    if done:
        (folder / "stage.json").write_text("{}")
    return folder


@pytest.mark.parametrize("mount", ["a-notebook", "notebooks/owner/a-notebook"])
def test_stage_is_found_where_kaggle_mounted_and_mounts_notebooks(inputs, mount):
    folder = stage(inputs / mount)
    assert attached_stage(RUN, NAME) == folder
    assert attached_stage("other", NAME) is None and attached_stage(RUN, "04_evaluation") is None


def test_without_attached_inputs_nothing_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr(place, "KAGGLE_INPUT", tmp_path / "nowhere")
    assert attached_stage(RUN, NAME) is None and not take_over(RUN, NAME, tmp_path)


def test_two_sources_of_one_stage_are_listed_not_guessed(inputs):
    folders = [stage(inputs / "notebooks" / "owner" / name) for name in ("one", "two")]
    with pytest.raises(AttachedError) as error:
        attached_stage(RUN, NAME)
    assert all(str(folder) in str(error.value) for folder in folders)


def test_own_output_is_copied_once_and_without_its_lock(inputs, tmp_path):
    source, mine = stage(inputs / "notebooks" / "owner" / "own"), tmp_path / "mine"
    mine.mkdir()
    assert take_over(RUN, NAME, mine)
    copied = (mine / "checkpoints" / "step-1" / "tensors").read_bytes()
    assert copied == (source / "checkpoints" / "step-1" / "tensors").read_bytes()
    assert not (mine / ".lock").exists()
    (mine / "checkpoints" / "step-1" / "tensors").write_bytes(b"newer")
    assert not take_over(RUN, NAME, mine)  # a second start in the same session keeps what the first one did
    assert (mine / "checkpoints" / "step-1" / "tensors").read_bytes() == b"newer"


def test_work_of_a_dead_session_comes_back_from_a_data_set(inputs, tmp_path):
    dead, mine = stage(tmp_path / "dead", done=False), tmp_path / "mine"
    mine.mkdir()
    pack(RUN, NAME, dead, inputs / "datasets" / "owner" / "work")
    assert all(path.is_file() for path in (inputs / "datasets" / "owner" / "work").iterdir())  # no sub-folders
    assert not take_over(RUN, "04_evaluation", mine) and take_over(RUN, NAME, mine)
    assert (mine / "checkpoints" / "step-1" / "tensors").read_bytes() == bytes(range(256))
    assert holds_work(mine) and not (mine / ".lock").exists()


def test_a_session_that_was_pushed_to_go_on_begins_nothing_anew(inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("SUITE_TAKES_OVER", "1")
    with pytest.raises(AttachedError, match="earlier work of 03_adapter_training of run 'tiny' is not attached"):
        take_over(RUN, NAME, tmp_path)
    stage(inputs / "own")
    assert take_over(RUN, NAME, tmp_path) and not take_over(RUN, NAME, tmp_path)  # it is there: run again by hand


def test_a_damaged_archive_is_refused(inputs, tmp_path):
    folder = inputs / "datasets" / "owner" / "work"
    pack(RUN, NAME, stage(tmp_path / "dead"), folder)
    archive = folder / json.loads((folder / attached.HANDOVER).read_text())["archive"]
    archive.write_bytes(archive.read_bytes()[:-1024])
    with pytest.raises(AttachedError, match="missing or damaged"):
        take_over(RUN, NAME, tmp_path / "mine")


def test_an_archive_never_leaves_its_folder(inputs, tmp_path):
    folder = inputs / "datasets" / "owner" / "work"
    pack(RUN, NAME, stage(tmp_path / "dead"), folder)
    with tarfile.open(folder / "work.bin", "w") as archive:
        member = tarfile.TarInfo("../evil.txt")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"evil"))
    note = json.loads((folder / attached.HANDOVER).read_text())
    (folder / attached.HANDOVER).write_text(json.dumps(note | {"sha256": file_sha256(folder / "work.bin")}))
    with pytest.raises(tarfile.OutsideDestinationError):
        take_over(RUN, NAME, tmp_path / "mine")
    assert not (tmp_path / "evil.txt").exists()


def test_a_folder_that_was_only_begun_holds_no_work(tmp_path):
    (tmp_path / "started.json").write_text("{}")
    (tmp_path / ".lock").write_text("7")
    assert not holds_work(tmp_path)
    (tmp_path / "part").write_text("x")
    assert holds_work(tmp_path)
