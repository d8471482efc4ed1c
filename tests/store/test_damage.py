"""What a stop of the machine leaves, files emptied, cut or full of noise, one after another: a calm run's tables."""

import shutil
import warnings
from pathlib import Path

import lance
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch import nn

from helpers.config import load_profile
from helpers.corpora.schema import Corpus, question_row, question_table, reject_table
from helpers.store import encoding, features, keep, shards, tables

DAMAGE = {
    "emptied": lambda data: b"",
    "halved": lambda data: data[: len(data) // 2],
    "noise": lambda data: b"\x17" * len(data),
}
KEYS = {"workers": 1, "shard_size": 4, "image_size": 32, "groups": [1], "frame_format": "png"}
DATA = load_profile("tiny").data.model_copy(update=KEYS)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    folder = tmp_path_factory.mktemp("gifs")
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 255, (3, 8, 8, 3), dtype=np.uint8)
        pictures = [Image.fromarray(frame) for frame in pixels]
        pictures[0].save(folder / f"{number}.gif", save_all=True, append_images=pictures[1:], duration=70)
    names = [f"{number}.gif" for number in range(6)]
    rows = [
        question_row(question_id=name, gif=name, split="train", task="count", question="how many ?", answer="2")
        for name in names
    ]
    return Corpus("own", question_table(rows), {name: str(folder / name) for name in names}, reject_table([]))


class Encoder(nn.Module):
    key, frames_per_group, image_size, embed_dim = "fake@1", 16, 32, 4

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, frames: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return frames.float().mean((2, 3))[..., :1] / 255 * self.scale


def stop_after(monkeypatch, room, name: str, commits: int) -> None:
    """Let the call of `name` in `room` that follows `commits` of them be a stop of the machine."""
    true, done = getattr(room, name), []

    def stopping(*args, **options):
        if len(done) == commits:
            raise KeyboardInterrupt
        done.append(1)
        return true(*args, **options)

    monkeypatch.setattr(room, name, stopping)


def tables_below(folder: Path) -> dict[str, list]:
    found = {
        path.name: lance.dataset(str(path)).to_table().to_pylist()
        for path in sorted(folder.rglob("*.lance"))
        if path.is_dir()
    }
    return found | {path.name: pd.read_parquet(path).map(repr).to_dict("list") for path in folder.rglob("*.parquet")}


def each_damage(folder: Path, work, expected: dict[str, list], place: Path) -> int:
    """Damage each file below `folder` in each way, in a copy of its own, and let `work` go on there; how many."""
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    for number, (file, how) in enumerate((file, how) for file in files for how in DAMAGE):
        copy = place / str(number)
        shutil.copytree(folder, copy)
        (copy / file).write_bytes(DAMAGE[how]((copy / file).read_bytes()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            work(copy)
        assert tables_below(copy) == expected, f"{file} {how}"
        shutil.rmtree(copy)
    return len(files)


@pytest.mark.parametrize("stopped", [True, False])
def test_damaged_shards_and_journals_end_as_calm_ones(tmp_path, corpus, monkeypatch, stopped):
    monkeypatch.setattr(shards, "BATCH_GIFS", 1)
    shards.shard_gifs(corpus, tmp_path / "calm", DATA)
    expected = tables_below(tmp_path / "calm")
    assert sum(len(rows) for name, rows in expected.items() if name.endswith(".lance")) == 6
    before = tmp_path / "calm"
    if stopped:  # in the second shard's second commit, of two: the first shard is done
        before = tmp_path / "before"
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_after(patch, shards.lance, "write_dataset", 4 + 1 + 1)
            shards.shard_gifs(corpus, before, DATA)
        assert list(before.glob("unfinished/*.lance"))
    assert each_damage(before, lambda folder: shards.shard_gifs(corpus, folder, DATA), expected, tmp_path) > 5


def test_an_empty_manifest_loses_one_commit_and_is_told(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(shards, "BATCH_GIFS", 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, shards.lance, "write_dataset", 3)
        shards.shard_gifs(corpus, tmp_path, DATA)
    journal = tmp_path / "unfinished" / "shard-00000.lance"
    newest = sorted((journal / "_versions").glob("*.manifest"))[0]  # Lance counts down
    newest.write_bytes(b"")
    decoded, decode = [], shards.Decoders.rows
    monkeypatch.setattr(
        shards.Decoders, "rows", lambda self, tasks: decode(self, (decoded.append(task[0]) or task for task in tasks))
    )
    with pytest.warns(UserWarning, match=r"shard-00000\.lance is damaged .*: 2 of 4 GIFs of shard 0 are whole"):
        made = shards.shard_gifs(corpus, tmp_path, DATA)
    assert made.gifs == 6 and decoded == ["2.gif", "3.gif", "4.gif", "5.gif"]


@pytest.mark.parametrize("stopped", [True, False])
def test_damaged_features_end_as_calm_ones(tmp_path, corpus, monkeypatch, stopped):
    monkeypatch.setattr(encoding, "BATCH_GIFS", 1)
    shards.shard_gifs(corpus, tmp_path / "shards", DATA)

    def cache(folder: Path) -> None:
        encoding.cache_features(tmp_path / "shards" / "frames", folder / "features.lance", Encoder(), DATA, 2)

    (tmp_path / "calm").mkdir()
    cache(tmp_path / "calm")
    before = tmp_path / "calm"
    if stopped:
        before = tmp_path / "before"
        before.mkdir()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_after(patch, encoding, "upsert_features", 3)
            cache(before)
    assert each_damage(before, cache, tables_below(tmp_path / "calm"), tmp_path) > 2
    assert len(features.FeatureTable(tmp_path / "calm" / "features.lance")) == 6


def test_a_kept_table_that_was_emptied_is_made_again(tmp_path):
    made = pd.DataFrame({"a": [1, 2]})
    keep(tmp_path / "table.parquet", lambda: made)
    (tmp_path / "table.parquet").write_bytes(b"")
    with pytest.warns(UserWarning, match="dropped and made again"):
        assert keep(tmp_path / "table.parquet", lambda: made).equals(made)


@pytest.mark.parametrize("fault", [OSError(5, "Input/output error"), PermissionError(13, "Permission denied")])
def test_a_fault_of_the_disk_is_no_damage(tmp_path, monkeypatch, fault):
    """A drive that went away for a moment must not cost what lies on it."""
    tables.write_parquet(pd.DataFrame({"a": [1, 2]}), tmp_path / "a.parquet", pa.schema([("a", pa.int64())]))
    lance.write_dataset(pa.table({"a": [1, 2]}), str(tmp_path / "a.lance"))
    before = sorted(path for path in tmp_path.rglob("*"))

    def failing(*args, **options):
        raise fault

    with monkeypatch.context() as patched:
        patched.setattr(tables.pd, "read_parquet", failing)
        patched.setattr(tables.lance, "dataset", failing)
        with pytest.raises(type(fault)):
            tables.read_parquet(tmp_path / "a.parquet")
        with pytest.raises(type(fault)):
            tables.recover_table(tmp_path / "a.lance", 2, "rows")
    with monkeypatch.context() as patched:  # Lance tells it without a number: the file itself cannot be opened
        patched.setattr(tables.lance, "dataset", lambda *_: (_ for _ in ()).throw(OSError("LanceError(IO): ...")))
        patched.setattr(tables.Path, "open", failing)
        with pytest.raises(type(fault)):
            tables.recover_table(tmp_path / "a.lance", 2, "rows")
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert tables.recover_table(tmp_path / "a.lance", 2, "rows").count_rows() == 2
