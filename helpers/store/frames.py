"""Frame shards, read: random access to the frames of a GIF."""

import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pandas as pd
import pyarrow as pa

from helpers.gifs.decode import decode_frames
from helpers.store.tables import StoreError, digest_of


def frames_key(frames: Path) -> str:
    """What the frames of this folder depend on, without the choice of GIFs and their split into shards."""
    settings = json.loads((frames / "settings.json").read_text())
    return digest_of({key: value for key, value in settings.items() if key not in ("shard_size", "gifs")})


class FrameTable:
    """Random access to the frames of a folder of shards (`frames` of notebook 01's folder), by gif_sha256."""

    def __init__(self, folder: Path | str):
        """Open all shards. Raises StoreError if there are none."""
        folder = Path(folder)
        self._shards = [lance.dataset(str(path)) for path in sorted(folder.glob("shard-*.lance"))]
        if not self._shards:
            raise StoreError(f"No frame shards in {folder}: run notebook 01 first.")
        self.settings: dict[str, Any] = json.loads((folder / "settings.json").read_text())
        self.key = frames_key(folder)
        tables = [shard.to_table(columns=["gif_sha256", "num_frames"]) for shard in self._shards]
        self.ids: list[str] = [sha for table in tables for sha in table["gif_sha256"].to_pylist()]
        self._first = np.cumsum([0] + [len(table) for table in tables])  # number of each shard's first row
        self._number = {sha: number for number, sha in enumerate(self.ids)}

    def __len__(self) -> int:
        return len(self.ids)

    def info(self) -> pd.DataFrame:
        """gif_sha256, gif, num_frames, duration_ms and status of every GIF, in the order of `ids`."""
        columns = ["gif_sha256", "gif", "num_frames", "duration_ms", "status"]
        return pa.concat_tables([shard.to_table(columns=columns) for shard in self._shards]).to_pandas()

    def view_lengths(self) -> list[dict[int, int]]:
        """For each GIF in the order of `ids`: {group count: frames} of its distinct views."""
        tables = [shard.to_table(columns=["views"]) for shard in self._shards]
        return [
            {view["groups"]: len(view["rows"]) for view in views} for t in tables for views in t["views"].to_pylist()
        ]

    def longest_views(self) -> dict[str, int]:
        """Frames of each GIF's longest view, by gif_sha256."""
        return {sha: max(views.values()) for sha, views in zip(self.ids, self.view_lengths(), strict=True)}

    def rows(self, numbers: Sequence[int], batch: int = 32) -> Iterator[dict[str, Any]]:
        """Stored rows (frames still compressed) by ascending number in `ids`, read `batch` at a time."""
        numbers = np.asarray(numbers)
        for k, shard in enumerate(self._shards):
            inside = numbers[(numbers >= self._first[k]) & (numbers < self._first[k + 1])] - self._first[k]
            for start in range(0, len(inside), batch):
                yield from shard.take(inside[start : start + batch]).to_pylist()

    def frames(self, sha: str, groups: int) -> tuple[np.ndarray, np.ndarray]:
        """Frames of one GIF at its largest view of at most `groups` groups.

        Returns uint8 [T, H, W, 3], T <= 16 x groups, and the time at which each frame starts, float64 [T] in ms.
        Raises StoreError if the GIF, or a view that small, is not there.
        """
        if sha not in self._number:
            raise StoreError(f"GIF {sha} is not among the {len(self.ids)} GIFs of these shards.")
        row = next(self.rows([self._number[sha]]))
        views = [view for view in row["views"] if view["groups"] <= groups]
        if not views:
            raise StoreError(f"GIF {sha} has no view of {groups} groups: add {groups} to data.groups and run 01 again.")
        chosen = views[-1]["rows"]
        return decode_frames([row["frames"][i] for i in chosen]), np.asarray(row["frame_times_ms"])[chosen]


def decompressed(rows: Iterable[dict[str, Any]], workers: int) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Yield rows without `frames`, and those frames as uint8 [S, H, W, 3], decompressed by threads a few rows ahead."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[tuple[dict[str, Any], Future[np.ndarray]]] = deque()
        for row in rows:
            waiting.append((row, pool.submit(decode_frames, row.pop("frames"))))
            if len(waiting) > 4 * workers:
                row, future = waiting.popleft()
                yield row, future.result()
        for row, future in waiting:
            yield row, future.result()
