"""The feature table, written row by row and read: random access to cached frame embeddings."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from helpers.store.tables import StoreError, open_table, upsert, vector_lists


def feature_schema(dim: int, frames_key: str) -> pa.Schema:
    """Columns of the feature table for embeddings of `dim` numbers."""
    return pa.schema(
        [
            ("gif_sha256", pa.string()),
            ("num_frames", pa.int32()),
            ("encoder_key", pa.string()),
            ("groups", pa.list_(pa.int8())),
            ("lengths", pa.list_(pa.int16())),
            ("frame_times_ms", pa.list_(pa.float32())),
            ("embeddings", pa.list_(pa.list_(pa.float16(), dim))),
        ],
        metadata={"frames_key": frames_key},
    )


def feature_row(row: dict[str, Any], parts: list[np.ndarray], encoder_key: str) -> dict[str, Any]:
    """One row of the feature table: a frame row's facts and the embeddings of all its views, one after another."""
    times = np.asarray(row["frame_times_ms"], dtype=np.float32)
    return {
        "gif_sha256": row["gif_sha256"],
        "num_frames": row["num_frames"],
        "encoder_key": encoder_key,
        "groups": [view["groups"] for view in row["views"]],
        "lengths": [len(view["rows"]) for view in row["views"]],
        "frame_times_ms": np.concatenate([times[view["rows"]] for view in row["views"]]),
        "embeddings": np.concatenate(parts),
    }


def upsert_features(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    """Insert rows, or replace those of the same gif_sha256, in one commit."""
    if not rows:
        return
    embeddings = [row["embeddings"] for row in rows]
    column = vector_lists(embeddings, schema.field("embeddings").type)
    columns = [pa.array([row[name] for row in rows], schema.field(name).type) for name in schema.names[:-1]]
    upsert(path, pa.Table.from_arrays([*columns, column], schema=schema), ["gif_sha256"])


class FeatureTable:
    """Random access to cached frame embeddings, by gif_sha256.

    Tables of up to `memory_gb` are read into memory once, at the first fetch (sequentially, which suits the slow
    network mounts that hosted notebooks read their inputs from); larger ones are read from disk row by row.
    """

    def __init__(self, path: Path | str, memory_gb: float = 4.0):
        """Open the table. Raises StoreError if there is none, or if it mixes encoders."""
        self.path = Path(path)
        self._dataset = open_table(self.path)
        if self._dataset is None:
            raise StoreError(f"There is no feature table at {path}: run notebook 02 first.")
        table = self._dataset.to_table(columns=["gif_sha256", "num_frames", "encoder_key", "groups", "lengths"])
        keys = set(table["encoder_key"].to_pylist())
        if len(keys) != 1:
            raise StoreError(f"{path} should hold features of one encoder, not of {len(keys)}: {sorted(keys)}.")
        self.encoder_key: str = keys.pop()
        self.dim: int = self._dataset.schema.field("embeddings").type.value_type.list_size
        self.ids: list[str] = table["gif_sha256"].to_pylist()
        self.num_frames: np.ndarray = table["num_frames"].to_numpy()  # of the GIF files, int32, in the order of `ids`
        self._row = {sha: row for row, sha in enumerate(self.ids)}
        self._length, self._offset = _view_tables(table["groups"].to_pylist(), table["lengths"].to_pylist())
        frames = np.array([sum(lengths) for lengths in table["lengths"].to_pylist()])
        self._start = np.concatenate([[0], np.cumsum(frames)])
        self._in_memory = self._start[-1] * self.dim * 2 <= memory_gb * 1e9
        self._embeddings: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def longest_views(self) -> dict[str, int]:
        """Frames of each GIF's longest view, by gif_sha256."""
        return dict(zip(self.ids, self._length.max(axis=1).tolist(), strict=True))

    def lengths(self, ids: Sequence[str], groups: int | Sequence[int]) -> np.ndarray:
        """Valid frames of each GIF's largest view of at most `groups` groups (one number, or one a GIF): int64 [B].

        Raises StoreError for an unknown GIF, or a group count below its smallest view.
        """
        return self._find(ids, groups)[1]

    def fetch(self, ids: Sequence[str], groups: int | Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings of the views that `lengths` tells of, float16 [B, max N, D] padded with 0, and lengths int64 [B].

        Frames n of a row belong to group n // frames_per_group. Raises StoreError as `lengths` does, and for
        embeddings that are not finite, naming the GIF.
        """
        rows, lengths, offsets = self._find(ids, groups)
        out = np.zeros((len(rows), int(lengths.max(initial=0)), self.dim), dtype=np.float16)
        for place, (source, length, offset) in enumerate(zip(self._sources(rows), lengths, offsets, strict=True)):
            out[place, :length] = source[offset : offset + length]
        return out, lengths

    def _find(self, ids: Sequence[str], groups: int | Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row, length and offset (inside the row) of each view asked for."""
        if unknown := [sha for sha in ids if sha not in self._row]:
            raise StoreError(f"{len(unknown)} GIFs are not in the feature table, the first: {unknown[0]}.")
        rows = np.array([self._row[sha] for sha in ids], dtype=np.int64)
        asked = np.broadcast_to(np.asarray(groups, dtype=np.int64), rows.shape)
        column = np.clip(asked, 0, self._length.shape[1] - 1)
        lengths = self._length[rows, column]
        if len(rows) and not lengths.all():
            place = int(np.argmin(lengths))
            raise StoreError(
                f"GIF {ids[place]} has no cached view of {asked[place]} groups or fewer: "
                f"add {asked[place]} to data.groups and run 01 and 02 again."
            )
        return rows, lengths, self._offset[rows, column]

    def _sources(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """All embeddings [frames of all views, D] of each row."""
        if not self._in_memory:
            distinct, place = np.unique(rows, return_inverse=True)
            taken = self._dataset.take(distinct, columns=["embeddings"])["embeddings"].combine_chunks()
            ends, values = taken.offsets.to_numpy(), self._values(taken)
            self._require_finite(values, ends, distinct)
            return (values[ends[i] - ends[0] : ends[i + 1] - ends[0]] for i in place)
        if self._embeddings is None:
            embeddings = np.empty((self._start[-1], self.dim), dtype=np.float16)
            position = 0
            for batch in self._dataset.to_batches(columns=["embeddings"]):
                values = self._values(batch["embeddings"])
                embeddings[position : position + len(values)] = values
                position += len(values)
            self._require_finite(embeddings, self._start, np.arange(len(self)))
            self._embeddings = embeddings
        return (self._embeddings[self._start[row] : self._start[row + 1]] for row in rows)

    def _require_finite(self, values: np.ndarray, ends: np.ndarray, rows: np.ndarray) -> None:
        """Raise StoreError if one of the embeddings [n, D] of these rows, row i's up to ends[i + 1], is not finite."""
        finite = np.isfinite(values)
        if not finite.all():
            place = ends[0] + int(finite.all(1).argmin())
            sha = self.ids[rows[np.searchsorted(ends, place, side="right") - 1]]
            raise StoreError(
                f"{self.path} holds embeddings that are not finite (NaN or infinity), the first of GIF {sha}: "
                "delete this table and run notebook 02 again."
            )

    def _values(self, column: pa.ListArray) -> np.ndarray:
        return column.flatten().flatten().to_numpy(zero_copy_only=True).reshape(-1, self.dim)


def _view_tables(groups: list[list[int]], lengths: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """[row, g] -> length, and offset among the row's embeddings, of the largest view of at most g groups (0: none)."""
    largest = max((row[-1] for row in groups), default=0)
    length = np.zeros((len(groups), largest + 1), dtype=np.int64)
    offset = np.zeros_like(length)
    for row, (counts, frames) in enumerate(zip(groups, lengths, strict=True)):
        start = 0
        for count, number in zip(counts, frames, strict=True):
            length[row, count:] = number
            offset[row, count:] = start
            start += number
    return length, offset
