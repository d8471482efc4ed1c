"""Notebooks 01's and 02's work killed by -9 at random moments, then resumed: the tables of a run never killed."""

import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import lance
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

from helpers.config import DataConfig
from helpers.corpora.schema import Corpus, question_row, question_table, reject_table
from helpers.store import encoding, shards
from helpers.store.encoding import cache_features
from helpers.store.features import FeatureTable
from helpers.store.shards import shard_gifs

KILLS = 2
# Processes are forked from one that has done the imports and opened no table, so that each starts at once.
SERVER = get_context("forkserver")
SERVER.set_forkserver_preload(["helpers.store", "torch"])


class Encoder(nn.Module):
    key, frames_per_group, image_size, embed_dim = "fake@1", 16, 32, 16

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(32 * 32 * 3, 16)

    def forward(self, frames: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        mask = (torch.arange(16) < lengths[:, None])[..., None]
        return self.linear(frames.flatten(2).float() / 255) * mask


def data_config(workers: int) -> DataConfig:
    return DataConfig(
        corpus="own_gifs",
        shard_size=12,
        image_size=32,
        frame_format="png",
        frame_quality=90,
        groups=[1, 2],
        max_canvas_pixels=100_000,
        max_frames=100,
        max_bytes=1_000_000,
        workers=workers,
    )


def shard(ready: Connection, gifs: Path, folder: Path, workers: int) -> None:
    names = sorted(path.name for path in gifs.iterdir())
    rows = [
        question_row(question_id=name, gif=name, split="train", task="count", question="how many ?", answer="2")
        for name in names
    ]
    corpus = Corpus("own", question_table(rows), {name: str(gifs / name) for name in names}, reject_table([]))
    shards.BATCH_GIFS = 2
    ready.send("begin")
    shard_gifs(corpus, folder, data_config(workers))


def cache(ready: Connection, frames: Path, folder: Path, workers: int) -> None:
    torch.set_num_threads(1)
    encoding.BATCH_GIFS = 2
    encoder = Encoder()
    ready.send("begin")
    cache_features(frames, folder / "features.lance", encoder, data_config(workers), batch_groups=3)


def start(work: Callable, *arguments: object):
    """Start `work` in a process of its own; returns once it begins."""
    receiver, sender = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=work, args=(sender, *arguments))
    process.start()
    sender.close()
    assert receiver.recv() == "begin"
    return process


def run(work: Callable, *arguments: object) -> float:
    """Run `work` to its end; its seconds."""
    process = start(work, *arguments)
    began = time.monotonic()
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - began


def kill_often(seconds: float, work: Callable, *arguments: object) -> int:
    """Start `work` again and again, killing it by -9 at random moments; how many processes died of it."""
    rng = random.Random(0)
    killed = 0
    for _ in range(KILLS):
        process = start(work, *arguments)
        time.sleep(rng.uniform(0.02, 0.4) * seconds)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    return killed


def contents(folder: Path) -> dict[str, list]:
    """All rows and values of all tables under a folder; the files of equal Lance tables differ."""
    tables = {
        str(path.relative_to(folder)): lance.dataset(str(path)).to_table().to_pylist()
        for path in sorted(folder.rglob("*.lance"))
        if path.is_dir()
    }
    parquet = {
        str(path.relative_to(folder)): pq.read_table(path).to_pylist() for path in sorted(folder.rglob("*.parquet"))
    }
    return tables | parquet


@pytest.fixture(scope="module")
def gifs(tmp_path_factory) -> Path:
    """40 files: GIFs of 1 to 50 frames, among them a repetition, and two that are no GIF."""
    folder = tmp_path_factory.mktemp("gifs")
    rng = np.random.default_rng(0)
    for number in range(40):
        pictures = [Image.fromarray(rng.integers(0, 256, (60, 60), dtype=np.uint8)) for _ in range(rng.integers(1, 51))]
        pictures[0].save(folder / f"{number:02d}.gif", save_all=True, append_images=pictures[1:], duration=70)
    (folder / "21.gif").write_bytes((folder / "03.gif").read_bytes())
    (folder / "05.gif").write_bytes(b"no GIF")
    (folder / "30.gif").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, gifs) -> tuple[Path, float]:
    """Notebook 01's tables of a run that nothing disturbed, and the seconds it took."""
    folder = tmp_path_factory.mktemp("whole")
    seconds = run(shard, gifs, folder, 1)
    tables = contents(folder)
    # four shards, what became of their sources, questions, captions, rejects and near-duplicates
    assert len(tables) == 12
    assert sum(len(rows) for name, rows in tables.items() if name.startswith("frames")) == 37
    return folder, seconds


def test_sharding_killed_at_random_moments_ends_with_the_same_tables(tmp_path, gifs, whole):
    folder, seconds = whole
    assert kill_often(seconds, shard, gifs, tmp_path / "cut", 1) > 0
    run(shard, gifs, tmp_path / "cut", 1)
    assert contents(tmp_path / "cut") == contents(folder)


def test_killed_sharding_takes_its_worker_processes_along(tmp_path, gifs, whole):
    process = start(shard, gifs, tmp_path / "cut", 2)
    while not any((tmp_path / "cut").rglob("*.manifest")):  # until a first batch is on disk
        assert process.is_alive()
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(workers) >= 2
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
    run(shard, gifs, tmp_path / "cut", 1)
    assert contents(tmp_path / "cut") == contents(whole[0])


def test_caching_killed_at_random_moments_ends_with_the_same_table(tmp_path, whole):
    frames = whole[0] / "frames"
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    seconds = run(cache, frames, tmp_path / "whole", 2)
    assert kill_often(seconds, cache, frames, tmp_path / "cut", 2) > 0
    run(cache, frames, tmp_path / "cut", 2)
    expected = contents(tmp_path / "whole")
    assert len(expected["features.lance"]) == 37
    assert contents(tmp_path / "cut") == expected
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["features.lance"]
    assert len(FeatureTable(tmp_path / "cut" / "features.lance")) == 37
