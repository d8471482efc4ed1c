"""What the tables on disk share: schemas, keyed Lance tables, and how they are written whole."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from helpers.workspace.disk import remove, sync, whole
from helpers.workspace.names import files_below

CONTRACT_VERSION = 2  # raised by hand when the same GIFs and settings would give other rows
BATCH_GIFS = 64  # GIFs between two commits, hence the most that a killed run does again ...
BATCH_SECONDS = 20.0  # ... unless this time passes first
CLOCK_SECONDS = 5.0  # by which the clock of a mounted disk may differ
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


CAPTION_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("caption_id", "gif_sha256", "split", "caption")),
        ("facts", pa.list_(pa.string())),
    ]
)


def write_captions(captions: pd.DataFrame, path: Path | str) -> None:
    """Write a caption table as Parquet: captions of GIFs, sorted by the unique `caption_id`.

    Columns are those of `CAPTION_SCHEMA`; `facts` lists what the caption states, and is empty where that is unknown.
    """
    write_parquet(captions.sort_values("caption_id", ignore_index=True), Path(path), CAPTION_SCHEMA)


def read_captions(path: Path | str) -> pd.DataFrame:
    """Read a caption table written by `write_captions`; no rows where there is no file, as earlier versions wrote none.

    Raises StoreError for a file that is no such table.
    """
    path = Path(path)
    if not path.exists():
        return CAPTION_SCHEMA.empty_table().to_pandas()
    try:
        table = pq.read_table(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise StoreError(
            f"{path} cannot be read as a table ({_first_line(error)}): run 01 again with --force."
        ) from error
    if not table.schema.equals(CAPTION_SCHEMA):
        found, wanted = (
            ", ".join(f"{field.name} {field.type}" for field in one) for one in (table.schema, CAPTION_SCHEMA)
        )
        raise StoreError(
            f"{path} is no table of captions: its columns are {found}, not {wanted}. Run 01 again with --force."
        )
    captions = table.to_pandas()
    return captions.assign(facts=[list(facts) for facts in captions.facts])


def write_rejects(rejects: pd.DataFrame, path: Path | str) -> None:
    """Write a table of what was left out (item, where, reason) as Parquet."""
    write_parquet(rejects, Path(path), pa.schema([(column, pa.string()) for column in rejects.columns]))


def write_parquet(table: pd.DataFrame, path: Path, schema: pa.Schema) -> None:
    """Write a table's columns of `schema` as Parquet, whole or not at all."""
    with whole(path) as temporary:
        table[schema.names].to_parquet(temporary, index=False, schema=schema)


def digest_of(value: Any) -> str:
    """Return a short digest of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def read_parquet(path: Path) -> pd.DataFrame | None:
    """The Parquet table in `path`; None where there is none. A damaged one is dropped with a warning, and is none."""
    if not path.is_file():
        return None
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        _require_damage(path, error)
        warnings.warn(f"{path} is damaged ({_first_line(error)}): it is dropped and made again", stacklevel=2)
        remove(path)
        return None


def _require_damage(path: Path, error: BaseException) -> None:
    """Raise what failed unless the bytes in `path` are to blame: a fault that may pass is no reason to drop them."""
    newer = "upgrade lance" in str(error).lower()
    if newer or isinstance(error, MemoryError) or getattr(error, "errno", None):
        raise error
    for file in files_below(path) if path.is_dir() else [path]:  # Lance tells the disk's own errors without a number
        with file.open("rb") as content:
            content.read(1)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def open_table(path: Path) -> lance.LanceDataset | None:
    """The table at `path`; None if there is none (a process killed before its first commit leaves only data files)."""
    return lance.dataset(str(path)) if any((path / "_versions").glob("*.manifest")) else None


def recover_table(path: Path, rows: int, what: str) -> lance.LanceDataset | None:
    """The newest version of the table at `path` of which every row can be read; None without any.

    A stop of the machine may leave empty or cut files behind a commit. Versions that need one are dropped with a
    warning, so that the work goes on from the version before. rows, what: how many rows the table is to have in the
    end, and what they are ("GIFs of shard 0"), for that warning.
    """
    if not path.exists():
        return None
    versions = sorted((path / "_versions").glob("*.manifest"), key=_version)
    dropped = ""
    while versions:
        try:
            dataset = lance.dataset(str(path))
            for _ in dataset.to_batches(batch_size=SORT_GIFS):
                pass
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of Lance's Rust code
                raise
            _require_damage(path, error)
            dropped = dropped or _first_line(error)
            remove(versions.pop())
            for hint in (path / "_versions").glob("*hint*"):  # it names the version that is gone
                remove(hint)
            sync(path / "_versions")
        else:
            break
    if dropped:
        kept = dataset.count_rows() if versions else 0
        told = f"{kept:,} of {rows:,} {what} are whole and kept, {rows - kept:,} are done again"
        warnings.warn(f"{path} is damaged ({dropped}): {told}", stacklevel=2)
    if not versions:
        remove(path)
        return None
    return dataset


def _version(manifest: Path) -> int:
    """The number of a manifest's version; Lance's newer names count down from the largest number of 64 bits."""
    number = int(manifest.stem) if manifest.stem.isdigit() else 0
    return 2**64 - 1 - number if number > 2**63 else number


def sync_table(path: Path, since: float) -> None:
    """Force to disk what was written to a table after `since` (seconds since 1970), so that its newest commit stays."""
    written = [file for file in files_below(path) if file.stat().st_mtime >= since - CLOCK_SECONDS]
    for place in [*written, *{file.parent for file in written}, path]:
        sync(place)


def vector_lists(parts: Sequence[np.ndarray], kind: pa.ListType) -> pa.ListArray:
    """A column of lists of vectors, a part [n, D] each row; kind: its type, a list of lists of D numbers."""
    vectors = pa.array(np.concatenate(parts).reshape(-1), kind.value_type.value_type)
    offsets = pa.array(np.cumsum([0] + [len(part) for part in parts]), pa.int32())
    vectors = pa.FixedSizeListArray.from_arrays(vectors, kind.value_type.list_size)
    return pa.ListArray.from_arrays(offsets, vectors).cast(kind)


def upsert(path: Path, rows: pa.Table, on: list[str]) -> None:
    """Insert rows into the table at `path`, or replace those that are the same in the columns `on`, in one commit."""
    began = time.time()
    if (dataset := open_table(path)) is None:
        lance.write_dataset(rows, str(path))
    else:
        dataset.merge_insert(on).when_matched_update_all().when_not_matched_insert_all().execute(rows)
    sync_table(path, began)


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
    if read_parquet(path) is None:
        made = make()
        with whole(path) as temporary:
            made.to_parquet(temporary)
    return pd.read_parquet(path)
