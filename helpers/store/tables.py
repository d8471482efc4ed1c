"""What the tables on disk share: schemas, keyed Lance tables, and how they are written whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pandas as pd
import pyarrow as pa

from helpers.workspace.disk import whole

CONTRACT_VERSION = 1  # raised by hand when the same GIFs and settings would give other rows
BATCH_GIFS = 64  # GIFs between two commits, hence the most that a killed run does again ...
BATCH_SECONDS = 20.0  # ... unless this time passes first
SORT_GIFS = 128  # rows held in memory while a finished table is written


class StoreError(RuntimeError):
    """A table that cannot be made or read: what is wrong, where, and what to do."""


QUESTION_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("question_id", "gif", "split", "task", "question")),
        ("options", pa.list_(pa.string())),
        ("answer", pa.string()),
        ("label", pa.int64()),
        ("type", pa.string()),
        ("gif_sha256", pa.string()),
    ]
)


def write_questions(questions: pd.DataFrame, path: Path | str) -> None:
    """Write a question table (with `gif_sha256`) as Parquet."""
    write_parquet(questions, Path(path), QUESTION_SCHEMA)


def read_questions(path: Path | str) -> pd.DataFrame:
    """Read a question table written by `write_questions`; `options` are lists again (pandas alone gives arrays)."""
    questions = pd.read_parquet(path)
    return questions.assign(options=[list(options) for options in questions.options])


def write_parquet(table: pd.DataFrame, path: Path, schema: pa.Schema) -> None:
    """Write a table's columns of `schema` as Parquet, whole or not at all."""
    with whole(path) as temporary:
        table[schema.names].to_parquet(temporary, index=False, schema=schema)


def digest_of(value: Any) -> str:
    """Return a short digest of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def open_table(path: Path) -> lance.LanceDataset | None:
    """The table at `path`; None if there is none (a process killed before its first commit leaves only data files)."""
    return lance.dataset(str(path)) if any((path / "_versions").glob("*.manifest")) else None


def write_sorted(source: lance.LanceDataset, order: np.ndarray, schema: pa.Schema, path: Path) -> None:
    """Write the rows of `source` in this order as a new table at `path`, whole or not at all."""

    def batches() -> Iterator[pa.RecordBatch]:
        for start in range(0, len(order), SORT_GIFS):
            yield from source.take(order[start : start + SORT_GIFS], columns=schema.names).to_batches()

    with whole(path) as temporary:
        lance.write_dataset(pa.RecordBatchReader.from_batches(schema, batches()), str(temporary), schema=schema)


def keep(path: Path | str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """The table in `path`; where there is none yet, that of `make`, which is written there at once or not at all."""
    path = Path(path)
    if not path.is_file():
        made = make()
        with whole(path) as temporary:
            made.to_parquet(temporary)
    return pd.read_parquet(path)
