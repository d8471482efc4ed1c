"""Notebooks 01's and 02's work killed by -9 at random moments, then resumed: the tables of a run never killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import lance
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from helpers.store import FeatureTable

ROOT = Path(__file__).resolve().parents[2]
KILLS = 4

# Runs one stage over the GIFs of a folder; says when the imports are done and the work begins.
SCRIPT = """
import sys
from pathlib import Path

import torch

from helpers import store
from helpers.config import DataConfig
from helpers.corpora import Corpus, question_row, question_table, reject_table


class Encoder(torch.nn.Module):
    key, frames_per_group, image_size, embed_dim = "fake@1", 16, 32, 16

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(32 * 32 * 3, 16)

    def forward(self, frames, lengths):
        mask = (torch.arange(16) < lengths[:, None])[..., None]
        return self.linear(frames.flatten(2).float() / 255) * mask


def main():
    stage, gifs, folder, workers = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    store.BATCH_GIFS = 2
    data = DataConfig(
        corpus="own_gifs", shard_size=12, image_size=32, frame_format="png", jpeg_quality=90, groups=[1, 2],
        max_canvas_pixels=100_000, max_frames=100, max_bytes=1_000_000, decode_seconds=20.0, workers=workers,
    )
    print("ready", flush=True)
    if stage == "features":
        store.cache_features(gifs, folder / "features.lance", Encoder(), data, batch_groups=3)
        return
    names = sorted(path.name for path in gifs.iterdir())
    rows = [
        question_row(question_id=name, gif=name, split="train", task="count", question="how many ?", answer="2")
        for name in names
    ]
    corpus = Corpus("own", question_table(rows), {name: str(gifs / name) for name in names}, reject_table([]))
    store.shard_gifs(corpus, folder, data)


if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("script") / "stage.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture(scope="module")
def gifs(tmp_path_factory) -> Path:
    """40 GIFs of 1 to 50 frames, among them a repetition and two files that are no GIF."""
    folder = tmp_path_factory.mktemp("gifs")
    rng = np.random.default_rng(0)
    for number in range(40):
        pictures = [Image.fromarray(rng.integers(0, 256, (60, 60), dtype=np.uint8)) for _ in range(rng.integers(1, 51))]
        pictures[0].save(folder / f"{number:02d}.gif", save_all=True, append_images=pictures[1:], duration=70)
    (folder / "21.gif").write_bytes((folder / "03.gif").read_bytes())
    (folder / "05.gif").write_bytes(b"no GIF")
    (folder / "30.gif").write_bytes(b"")
    return folder


def start(script: Path, *arguments: object) -> subprocess.Popen:
    """Start a stage and return once its imports are done."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *map(str, arguments)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    if process.stdout.readline() != "ready\n":
        pytest.fail(process.communicate()[1])
    return process


def run(script: Path, *arguments: object) -> float:
    """Run a stage to its end; seconds of its work."""
    process = start(script, *arguments)
    began = time.monotonic()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return time.monotonic() - began


def kill_often(script: Path, seconds: float, *arguments: object) -> int:
    """Start a stage again and again, each time killing it (not its children) by -9; how many runs died of it."""
    rng = random.Random(0)
    killed = 0
    for _ in range(KILLS):
        process = start(script, *arguments)
        time.sleep(rng.uniform(0.05, 0.5) * seconds)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)  # ends only once its children, which hold its pipes, have ended too
        killed += process.returncode == -signal.SIGKILL
    return killed


def contents(folder: Path) -> dict[str, list]:
    """All rows and values of all tables under a folder; Lance files differ, their rows may not."""
    tables = {
        str(path.relative_to(folder)): lance.dataset(str(path)).to_table().to_pylist()
        for path in sorted(folder.rglob("*.lance"))
        if path.is_dir()
    }
    parquet = {
        str(path.relative_to(folder)): json.loads(pd.read_parquet(path).to_json(orient="records"))
        for path in sorted(folder.rglob("*.parquet"))
    }
    return tables | parquet


@pytest.mark.parametrize("workers", [1, 2])
def test_sharding_killed_at_random_moments_ends_with_the_same_tables(tmp_path, script, gifs, workers):
    seconds = run(script, "shards", gifs, tmp_path / "whole", workers)
    killed = kill_often(script, seconds, "shards", gifs, tmp_path / "cut", workers)
    run(script, "shards", gifs, tmp_path / "cut", workers)
    assert killed > 0
    expected = contents(tmp_path / "whole")
    assert len(expected) == 10 and sum(len(rows) for name, rows in expected.items() if "frames" in name) == 37
    assert contents(tmp_path / "cut") == expected


def test_caching_killed_at_random_moments_ends_with_the_same_table(tmp_path, script, gifs):
    run(script, "shards", gifs, tmp_path / "01", 1)
    frames = tmp_path / "01" / "frames"
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    seconds = run(script, "features", frames, tmp_path / "whole", 2)
    killed = kill_often(script, seconds, "features", frames, tmp_path / "cut", 2)
    run(script, "features", frames, tmp_path / "cut", 2)
    assert killed > 0
    expected = contents(tmp_path / "whole")
    assert len(expected["features.lance"]) == 37
    assert contents(tmp_path / "cut") == expected
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["features.lance"]
    assert len(FeatureTable(tmp_path / "cut" / "features.lance")) == 37
