"""The tables on disk, all in Lance: frame shards (notebook 01), the feature table (notebook 02), and their readers.

Both stages are written for a machine that may die at any moment. Work goes first into an unfinished table that is
appended to, or upserted, in batches keyed by GIF; each write is one atomic commit, so a killed run loses one batch at
most. A finished table is the unfinished one sorted by `gif_sha256`, written beside it and then renamed, and has the
same rows and values as one that was never interrupted.

Lance is not fork-safe: GIFs are decoded in spawned processes, which never open a table.
"""

import copy
import hashlib
import json
import math
import os
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, repeat
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lance
import numpy as np
import pandas as pd
import pyarrow as pa
from tqdm.auto import tqdm

from helpers.corpora import Corpus, reject_table
from helpers.fetch import FetchError, fetch_all
from helpers.gifs import GifRejected, Limits, decode, decode_frames, encode_frames, read_gif
from helpers.stage import write_json
from helpers.workspace import PACE_FILE, DeadlineReached, probe_steps, require_disk

if TYPE_CHECKING:
    import torch

    from helpers.config import DataConfig

CONTRACT_VERSION = 1  # raised by hand when the same GIFs and settings would give other rows
BATCH_GIFS = 64  # GIFs between two commits, hence the most that a killed run does again ...
BATCH_SECONDS = 20.0  # ... unless this time passes first
SORT_GIFS = 128  # rows held in memory while a finished table is written

FRAME_SCHEMA = pa.schema(
    [
        ("gif_sha256", pa.string()),
        ("gif", pa.string()),
        ("num_frames", pa.int32()),
        ("duration_ms", pa.float64()),
        ("status", pa.string()),
        ("frame_indices", pa.list_(pa.int32())),
        ("frame_times_ms", pa.list_(pa.float64())),
        ("frames", pa.list_(pa.binary())),
        ("views", pa.list_(pa.struct([("groups", pa.int8()), ("rows", pa.list_(pa.int16()))]))),
    ]
)
# One row a source, kept or not: `num_frames` is null for a rejected GIF and for a repetition of an earlier one.
JOURNAL_SCHEMA = FRAME_SCHEMA.append(pa.field("reason", pa.string()))
SOURCE_COLUMNS = ["gif", "gif_sha256", "reason"]


class StoreError(RuntimeError):
    """A table that cannot be made or read: what is wrong, where, and what to do."""


@dataclass(frozen=True)
class Sharded:
    """What notebook 01 made.

    questions: the kept rows with `gif_sha256`. rejects: item, where, reason of every GIF and question left out.
    sources: one row a GIF name: gif, gif_sha256, reason (None if kept). gifs: distinct GIFs stored.
    """

    questions: pd.DataFrame
    rejects: pd.DataFrame
    sources: pd.DataFrame
    gifs: int


@dataclass(frozen=True)
class Cached:
    """What notebook 02 made: distinct GIFs and groups in the table, groups encoded by this run, its seconds, and MB."""

    gifs: int
    groups: int
    encoded_groups: int
    seconds: float
    megabytes: float


# ---------------------------------------------------------------------------------------------- frame shards


def shard_gifs(
    corpus: Corpus, folder: Path | str, data: "DataConfig", frames_per_group: int = 16, deadline: float = math.inf
) -> Sharded:
    """Decode the GIFs that a corpus asks about into numbered frame shards; goes on where a killed run stopped.

    deadline: seconds from now after which no more GIFs are decoded.

    Shard k holds the k-th `data.shard_size` of the GIF names in alphabetical order. Files of equal bytes are stored
    once, under the first of their names. Sources that are URLs are fetched and their bytes dropped once decoded.

    Writes under `folder`: frames/shard-00000.lance ... (rows sorted by gif_sha256), frames/settings.json,
    sources/shard-00000.parquet ... (what became of each name), questions.parquet and rejects.parquet.

    Raises:
        StoreError: the folder holds shards of other settings or GIFs, or no question is left.
        workspace.DiskFull: the estimated size exceeds the free space.
        workspace.DeadlineReached: the time was up before the last shard was done; what is decoded is kept.
    """
    folder, ends = Path(folder), time.monotonic() + deadline
    names = sorted(set(corpus.questions.gif) & set(corpus.gifs))
    if not names:
        raise StoreError(f"The corpus {corpus.name} names no GIF that was found: nothing to shard. See its rejects.")
    remote = any(_is_url(corpus.gifs[name]) for name in names)
    settings = _frame_settings(data, frames_per_group, min_frames=2 if remote else 1)
    _claim(folder / "frames", settings | {"shard_size": data.shard_size, "gifs": _digest(names)})
    shards = [names[start : start + data.shard_size] for start in range(0, len(names), data.shard_size)]
    todo = [k for k in range(len(shards)) if not _shard_path(folder, k).exists()]
    _require_frame_space(folder, [len(shards[k]) for k in todo], data, frames_per_group)
    begun = len(names) - sum(len(shards[k]) for k in todo) + sum(_journal_size(folder, k) for k in todo)
    with (
        tqdm(total=len(names), initial=begun, desc="decoding GIFs", unit="GIF", mininterval=1) as progress,
        _Decoders(data.workers, settings) as decoders,
    ):
        known: set[str] = set()
        for k, shard in enumerate(shards):
            if k in todo:
                sources = {name: corpus.gifs[name] for name in shard}
                _fill_journal(_journal_path(folder, k), sources, data, decoders, known, progress, ends)
                _finish_shard(folder, k)
                _require_measured_space(folder, shards, k)
            else:
                shutil.rmtree(_journal_path(folder, k), ignore_errors=True)  # a run killed just after its last rename
            known.update(_read_sources(folder, k).gif_sha256.dropna())
    shutil.rmtree(folder / "unfinished", ignore_errors=True)
    sources = pd.concat([_read_sources(folder, k) for k in range(len(shards))], ignore_index=True)
    questions, rejects = _match_questions(corpus, sources)
    write_questions(questions, folder / "questions.parquet")
    _write_parquet(rejects, folder / "rejects.parquet", pa.schema([(c, pa.string()) for c in rejects.columns]))
    return Sharded(questions, rejects, sources, len(known))


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
    _write_parquet(questions, Path(path), QUESTION_SCHEMA)


def read_questions(path: Path | str) -> pd.DataFrame:
    """Read a question table written by `write_questions`; `options` are lists again (pandas alone gives arrays)."""
    questions = pd.read_parquet(path)
    return questions.assign(options=[list(options) for options in questions.options])


def _write_parquet(table: pd.DataFrame, path: Path, schema: pa.Schema) -> None:
    temporary = path.with_name(f".{path.name}")
    table[schema.names].to_parquet(temporary, index=False, schema=schema)
    os.replace(temporary, path)


def _is_url(source: str) -> bool:
    return source.startswith(("http://", "https://"))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _frame_settings(data: "DataConfig", frames_per_group: int, min_frames: int) -> dict[str, Any]:
    """Everything that the value of a stored row depends on, beside the GIF itself."""
    return {
        "contract": CONTRACT_VERSION,
        "image_size": data.image_size,
        "frames_per_group": frames_per_group,
        "groups": sorted(set(data.groups)),
        "frame_format": data.frame_format,
        "frame_quality": data.frame_quality if data.frame_format == "webp" else None,
        "limits": {
            "max_canvas_pixels": data.max_canvas_pixels,
            "max_frames": data.max_frames,
            "max_bytes": data.max_bytes,
            "decode_seconds": data.decode_seconds,
            "min_frames": min_frames,
        },
    }


def _claim(frames: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a new shard folder, or refuse a folder that was begun with others."""
    path = frames / "settings.json"
    if not path.exists():
        frames.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(".settings.json")
        temporary.write_text(json.dumps(settings, indent=1, sort_keys=True))
        os.replace(temporary, path)
        return
    theirs = json.loads(path.read_text())
    changed = [key for key in sorted({*theirs, *settings}) if theirs.get(key) != settings.get(key)]
    if changed:
        listed = "; ".join(f"{key}: {theirs.get(key)!r} there, {settings.get(key)!r} now" for key in changed)
        raise StoreError(
            f"{frames} holds shards made with other settings or of other GIFs ({listed}). "
            "Use another run name, or run this stage with --force to make them anew."
        )


def _bytes_per_pixel(data: "DataConfig") -> float:
    """Mean bytes of a stored pixel: measured at 224 pixels on filmed GIFs, and a tenth more."""
    if data.frame_format == "png":
        return 1.6
    return float(
        np.interp(data.frame_quality, [50, 75, 80, 85, 90, 95, 100], [0.10, 0.13, 0.16, 0.19, 0.25, 0.36, 0.68])
    )


def _require_frame_space(folder: Path, sizes: list[int], data: "DataConfig", frames_per_group: int) -> None:
    """Refuse to begin without room for the shards still to be made, and for one more while it is sorted."""
    if not sizes:
        return
    frames = min(frames_per_group * max(data.groups), 40)  # TGIF's GIFs have about 40 frames; shorter ones store fewer
    gigabytes = (sum(sizes) + max(sizes)) * frames * data.image_size**2 * _bytes_per_pixel(data) / 1e9
    require_disk(folder, round(gigabytes, 3), f"Sharding {sum(sizes):,} GIFs ({data.frame_format}, {frames} frames)")


def _require_measured_space(folder: Path, shards: list[list[str]], done: int) -> None:
    """The same check for the rest, from the size of the shard just made."""
    rest = [len(shard) for shard in shards[done + 1 :]]
    if rest:
        per_gif = _megabytes(_shard_path(folder, done)) / 1000 / len(shards[done])
        require_disk(folder, round(per_gif * (sum(rest) + max(rest)), 3), f"Sharding the last {sum(rest):,} GIFs")


def _shard_path(folder: Path, k: int) -> Path:
    return folder / "frames" / f"shard-{k:05d}.lance"


def _journal_path(folder: Path, k: int) -> Path:
    return folder / "unfinished" / f"shard-{k:05d}.lance"


def _read_sources(folder: Path, k: int) -> pd.DataFrame:
    table = pd.read_parquet(folder / "sources" / f"shard-{k:05d}.parquet").astype(object)
    return table.where(table.notna(), None)


def _open(path: Path) -> lance.LanceDataset | None:
    """The table at `path`; None if there is none (a process killed before its first commit leaves only data files)."""
    return lance.dataset(str(path)) if any((path / "_versions").glob("*.manifest")) else None


def _journal_size(folder: Path, k: int) -> int:
    journal = _open(_journal_path(folder, k))
    return 0 if journal is None else journal.count_rows()


def _fill_journal(
    path: Path,
    sources: dict[str, str],
    data: "DataConfig",
    decoders: "_Decoders",
    known: set[str],
    progress: tqdm,
    ends: float,
) -> None:
    """Decode what a shard's journal lacks, in the order of names, so that the first of equal files is stored."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done: set[str] = set()
    stored = set(known)
    if (journal := _open(path)) is not None:
        table = journal.to_table(columns=["gif", "gif_sha256"])
        done = set(table["gif"].to_pylist())
        stored.update(table["gif_sha256"].drop_null().to_pylist())
    rows: list[dict[str, Any]] = []
    committed = time.monotonic()

    def commit() -> None:
        mode = "append" if _open(path) is not None else "create"
        lance.write_dataset(pa.Table.from_pylist(rows, schema=JOURNAL_SCHEMA), str(path), mode=mode)

    todo = [(name, source) for name, source in sources.items() if name not in done]
    for row in decoders.rows(_with_bytes(todo, data)):
        if row.get("reason") is None and row["gif_sha256"] in stored:
            row = {"gif": row["gif"], "gif_sha256": row["gif_sha256"]}
        elif row.get("reason") is None:
            stored.add(row["gif_sha256"])
        rows.append(row)
        progress.update()
        if len(rows) >= BATCH_GIFS or time.monotonic() - committed > BATCH_SECONDS:
            commit()
            rows, committed = [], time.monotonic()
        if time.monotonic() > ends:
            if rows:
                commit()
            raise DeadlineReached(f"time is up: {progress.n:,} of {progress.total:,} GIFs are decoded and kept")
    if rows:
        commit()


def _finish_shard(folder: Path, k: int) -> None:
    """Turn a full journal into shard k: its sources' fates, then its frames sorted by sha; the rename comes last."""
    journal = _open(_journal_path(folder, k))
    table = journal.to_table(columns=[*SOURCE_COLUMNS, "num_frames"])
    (folder / "sources").mkdir(exist_ok=True)
    fates = table.select(SOURCE_COLUMNS).to_pandas().sort_values("gif", ignore_index=True)
    schema = pa.schema([(column, pa.string()) for column in SOURCE_COLUMNS])
    _write_parquet(fates, folder / "sources" / f"shard-{k:05d}.parquet", schema)
    kept = np.flatnonzero(table["num_frames"].is_valid().to_numpy())
    order = kept[np.argsort(np.array(table["gif_sha256"].to_pylist(), dtype=object)[kept])]
    metadata = {"frames_key": _frames_key(folder / "frames")}
    _write_sorted(journal, order, FRAME_SCHEMA.with_metadata(metadata), _shard_path(folder, k))
    shutil.rmtree(_journal_path(folder, k))


def _write_sorted(source: lance.LanceDataset, order: np.ndarray, schema: pa.Schema, path: Path) -> None:
    """Write the rows of `source` in this order as a new table, beside `path`, and rename it there."""
    temporary = path.with_name(f".{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)

    def batches() -> Iterator[pa.RecordBatch]:
        for start in range(0, len(order), SORT_GIFS):
            yield from source.take(order[start : start + SORT_GIFS], columns=schema.names).to_batches()

    lance.write_dataset(pa.RecordBatchReader.from_batches(schema, batches()), str(temporary), schema=schema)
    os.replace(temporary, path)


def _with_bytes(sources: list[tuple[str, str]], data: "DataConfig") -> Iterator[tuple[str, str | bytes, str | None]]:
    """Yield (name, path or bytes, reason it failed) in the order given; URLs are fetched a few ahead.

    What failed for a reason that may pass is tried once more at the end, and given up only then.
    """
    urls = [(name, source) for name, source in sources if _is_url(source)]
    fetched = fetch_all(urls, max_bytes=data.max_bytes)
    late: list[tuple[str, str]] = []
    for name, source in sources:
        if not _is_url(source):
            yield name, source, None
            continue
        _, result = next(fetched)
        if isinstance(result, FetchError) and result.transient:
            late.append((name, source))
        else:
            yield _fetched(name, result)
    for name, result in fetch_all(late, max_bytes=data.max_bytes, give_up_after=len(late) + 1):
        yield _fetched(name, result)


def _fetched(name: str, result: bytes | FetchError) -> tuple[str, bytes, str | None]:
    return (name, b"", str(result)) if isinstance(result, FetchError) else (name, result, None)


def _decode_source(gif: str, source: str | bytes, failure: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    """One row of the journal: the frames of a GIF, or the reason why there are none."""
    if failure is not None:
        return {"gif": gif, "reason": failure}
    limits = Limits(**settings["limits"])
    try:
        content = read_gif(source, limits.max_bytes)
        decoded = decode(
            content,
            image_size=settings["image_size"],
            groups=settings["groups"],
            frames_per_group=settings["frames_per_group"],
            limits=limits,
        )
    except GifRejected as error:
        return {"gif": gif, "reason": error.reason}
    except OSError as error:  # a fault of the disk or of a mounted drive
        return {"gif": gif, "reason": f"cannot read it: {error}"}
    quality = {"quality": settings["frame_quality"]} if settings["frame_quality"] else {}
    return {
        "gif": gif,
        "gif_sha256": hashlib.sha256(content).hexdigest(),
        "num_frames": decoded.num_frames,
        "duration_ms": decoded.duration_ms,
        "status": decoded.status,
        "frame_indices": decoded.frame_indices,
        "frame_times_ms": decoded.frame_times_ms,
        "frames": encode_frames(decoded.frames, settings["frame_format"], **quality),
        "views": decoded.views,
    }


def _start_worker() -> None:
    """Leave interrupts to the parent, and end with it: the pool's own pipes stay open when it is killed by -9."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Decoders:
    """Processes that decode, started when first needed and kept from shard to shard; one worker is this process."""

    def __init__(self, workers: int, settings: dict[str, Any]):
        self.workers = workers
        self.settings = settings
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "_Decoders":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def rows(self, tasks: Iterable[tuple]) -> Iterator[dict[str, Any]]:
        """Rows of these GIFs in the order given, few in flight.

        A GIF whose process dies (killed for memory, or by a fault in a library) is rejected; the others go on.
        """
        if self.workers == 1:
            for task in tasks:
                yield _decode_source(*task, self.settings)
            return
        waiting: deque[tuple[tuple, Future]] = deque()
        for task in chain(tasks, repeat(None)):
            if task is not None:
                waiting.append((task, self._submit(task, self.workers)))
                if len(waiting) < 4 * self.workers:
                    continue
            elif not waiting:
                return
            try:
                row = waiting[0][1].result()
            except BrokenProcessPool:  # any GIF in flight may be the cause
                self._stop()
                suspects = [task for task, _ in waiting]
                waiting.clear()
                yield from self._singly(suspects)
            else:
                waiting.popleft()
                yield row

    def _singly(self, tasks: list[tuple]) -> Iterator[dict[str, Any]]:
        """Rows of these GIFs, one in flight at a time, so that the one whose process dies is known."""
        for task in tasks:
            try:
                yield self._submit(task, 1).result()
            except BrokenProcessPool:
                self._stop()
                why = "the process that decoded it died (out of memory, or a fault in a library)"
                yield {"gif": task[0], "reason": why}
        self._stop()

    def _submit(self, task: tuple, workers: int) -> Future:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker)
        try:
            return self._pool.submit(_decode_source, *task, self.settings)
        except BrokenProcessPool as error:  # a process died meanwhile: let the result say so
            failed: Future = Future()
            failed.set_exception(error)
            return failed

    def _stop(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def _match_questions(corpus: Corpus, sources: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Give questions their GIF's sha, and leave out those without a GIF or that would leak a test GIF into training."""
    questions = corpus.questions
    sha = dict(zip(sources.gif, sources.gif_sha256, strict=True))
    reason = dict(zip(sources.gif, sources.reason, strict=True))
    rejects = [(gif, corpus.gifs[gif], why) for gif, why in reason.items() if why is not None]
    unusable = [(row.question_id, row.gif) for row in questions.itertuples() if not isinstance(sha.get(row.gif), str)]
    rejects += [
        (question_id, gif, "its GIF was rejected" if gif in reason else "its GIF was not found")
        for question_id, gif in unusable
    ]
    kept = questions.assign(gif_sha256=[sha.get(gif) for gif in questions.gif])
    kept = kept[~kept.question_id.isin([question_id for question_id, _ in unusable])]
    test_names = kept[kept.split == "test"].drop_duplicates("gif_sha256").set_index("gif_sha256").gif
    leaked = (kept.split == "train") & kept.gif_sha256.isin(test_names.index)
    rejects += [
        (gif, "train split", f"same bytes as the test GIF {test_names[sha[gif]]}: its {n} training questions left out")
        for gif, n in kept[leaked].gif.value_counts().sort_index().items()
    ]
    kept = kept[~leaked].reset_index(drop=True)
    table = pd.concat([corpus.rejects, reject_table(rejects)], ignore_index=True)
    if kept.empty:
        reasons = "; ".join(f"{why} ({n} times)" for why, n in table.reason.value_counts().head(3).items())
        raise StoreError(f"No question of the corpus {corpus.name} has a usable GIF. Commonest reasons: {reasons}.")
    return kept, table


def _frames_key(frames: Path) -> str:
    """What the frames of this folder depend on, without the choice of GIFs and their split into shards."""
    settings = json.loads((frames / "settings.json").read_text())
    return _digest({key: value for key, value in settings.items() if key not in ("shard_size", "gifs")})


def _megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


# ---------------------------------------------------------------------------------------------- frames, read


class FrameTable:
    """Random access to the frames of a folder of shards (`frames` of notebook 01's folder), by gif_sha256."""

    def __init__(self, folder: Path | str):
        """Open all shards. Raises StoreError if there are none."""
        folder = Path(folder)
        self._shards = [lance.dataset(str(path)) for path in sorted(folder.glob("shard-*.lance"))]
        if not self._shards:
            raise StoreError(f"No frame shards in {folder}: run notebook 01 first.")
        self.settings: dict[str, Any] = json.loads((folder / "settings.json").read_text())
        self.key = _frames_key(folder)
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


# ---------------------------------------------------------------------------------------------- feature table


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


def cache_features(
    frames_folder: Path | str,
    out: Path | str,
    encoder: "torch.nn.Module",
    data: "DataConfig",
    batch_groups: int,
    deadline: float = math.inf,
    gpus: int = 1,
) -> Cached:
    """Encode every view of every distinct GIF once, and keep the frame embeddings in the table `out`.

    Groups of frames fill batches of `batch_groups` across GIFs; they go to the encoder's device as uint8. Which groups
    share a batch depends only on the shards, never on where a killed run stopped: batches of another make-up could
    change the last bit of an embedding.

    encoder: .key, .embed_dim, .frames_per_group, .image_size and
        forward(uint8 [B, F, H, W, 3], lengths [B]) -> [B, F, D], on the device and in the dtype to compute with.
    data: `workers` threads decompress frames ahead of the encoder.
    deadline: seconds from now after which no more batches are encoded.
    gpus: how many take the batches in turn, each with a copy of the encoder; which one encodes a batch changes nothing.

    Raises:
        StoreError: the encoder does not fit the frames, an embedding is not finite, too few GPUs, or `out` holds
            rows of another encoder or of other frames.
        workspace.DiskFull: the table does not fit.
        workspace.DeadlineReached: the time was up before the last GIF was encoded; what is encoded is kept.
    """
    started = time.monotonic()
    table, out = FrameTable(frames_folder), Path(out)
    _require_fit(encoder, table)
    encoders = _copies(encoder, gpus)
    schema = feature_schema(encoder.embed_dim, table.key)
    plan = _BatchPlan(table.view_lengths(), encoder.frames_per_group, batch_groups)
    work = out.with_name(f"{out.name}.unfinished")
    stored = _stored_features(out, work, encoder.key, schema)
    missing = [i for i, sha in enumerate(table.ids) if stored.get(sha) != plan.views[i]]
    if missing or not out.exists():
        frames = sum(sum(views.values()) for views in plan.views)
        gigabytes = 2 * frames * encoder.embed_dim * 2 / 1e9  # fp16, and once more while it is sorted
        require_disk(out.parent, round(gigabytes, 3), f"Caching the features of {len(table):,} GIFs")
        if out.exists():
            os.replace(out, work)
        _encode_missing(table, plan, missing, encoders, work, schema, data.workers, started + deadline)
        done = _open(work)
        order = np.argsort(np.array(done.to_table(columns=["gif_sha256"])["gif_sha256"].to_pylist(), dtype=object))
        _write_sorted(done, order, schema, out)
    shutil.rmtree(work, ignore_errors=True)
    out.with_name(PACE_FILE).unlink(missing_ok=True)
    return Cached(
        len(table), plan.total, plan.groups_in(plan.batches_of(missing)), time.monotonic() - started, _megabytes(out)
    )


def _require_fit(encoder: "torch.nn.Module", table: FrameTable) -> None:
    for name in ("image_size", "frames_per_group"):
        if getattr(encoder, name) != table.settings[name]:
            raise StoreError(
                f"The frames were stored with {name} {table.settings[name]}, the encoder {encoder.key} takes "
                f"{getattr(encoder, name)}: make the profile's data and encoder sections agree and run 01 again."
            )
    if not len(table):
        raise StoreError("The frame shards hold no GIF: nothing to encode.")


def _copies(encoder: "torch.nn.Module", gpus: int) -> list["torch.nn.Module"]:
    """The encoder, and copies of it on the next GPUs (beside it, where it is on the CPU)."""
    import torch

    found = torch.cuda.device_count()
    if next(encoder.parameters()).device.type != "cuda":
        return [encoder, *(copy.deepcopy(encoder) for _ in range(gpus - 1))]
    if gpus > found:
        raise StoreError(f"encoder.gpus is {gpus}, but this machine has {found}: set it to {found}")
    return [encoder, *(copy.deepcopy(encoder).to(f"cuda:{number}") for number in range(1, gpus))]


def _stored_features(out: Path, work: Path, encoder_key: str, schema: pa.Schema) -> dict[str, dict[int, int]]:
    """{gif_sha256: {groups: frames}} of what is there already; refuses rows that may not be mixed with new ones."""
    if out.exists():  # then `work` can only be what a run killed after its last rename left behind
        shutil.rmtree(work, ignore_errors=True)
    dataset = _open(out if out.exists() else work)
    if dataset is None:
        return {}
    rows = dataset.to_table(columns=["gif_sha256", "encoder_key", "groups", "lengths"]).to_pylist()
    if other := {row["encoder_key"] for row in rows} - {encoder_key}:
        raise StoreError(
            f"{out} holds features of the encoder {sorted(other)[0]!r}; this run's encoder is {encoder_key!r}. "
            "They cannot be mixed: use another run name, or run this stage with --force."
        )
    if dataset.schema.metadata != schema.metadata:
        raise StoreError(f"{out} was made from frames of other settings: use another run name, or --force.")
    return {row["gif_sha256"]: dict(zip(row["groups"], row["lengths"], strict=True)) for row in rows}


class _BatchPlan:
    """Which group of which GIF goes into which batch: all groups of all views of all GIFs in a row, cut evenly."""

    def __init__(self, views: list[dict[int, int]], frames_per_group: int, batch_groups: int):
        self.views = views
        self.batch_groups = batch_groups
        counts = [sum(-(-length // frames_per_group) for length in lengths.values()) for lengths in views]
        self.first = np.cumsum([0, *counts])  # number of each GIF's first group
        self.total = int(self.first[-1])

    def batches_of(self, gifs: Sequence[int]) -> list[int]:
        """Numbers of the batches that hold a group of one of these GIFs."""
        spans = ((self.first[i] // self.batch_groups, (self.first[i + 1] - 1) // self.batch_groups) for i in gifs)
        return sorted({batch for start, stop in spans for batch in range(start, stop + 1)})

    def groups(self, batch: int) -> range:
        """Numbers of the groups in one batch."""
        return range(batch * self.batch_groups, min((batch + 1) * self.batch_groups, self.total))

    def groups_in(self, batches: Sequence[int]) -> int:
        return sum(len(self.groups(batch)) for batch in batches)

    def gif(self, group: int) -> int:
        """Number of the GIF that a group belongs to."""
        return int(np.searchsorted(self.first, group, side="right")) - 1


def _encode_missing(
    table: FrameTable,
    plan: _BatchPlan,
    missing: list[int],
    encoders: list["torch.nn.Module"],
    path: Path,
    schema: pa.Schema,
    workers: int,
    ends: float,
) -> None:
    """Encode the batches that hold a missing GIF and upsert its rows, `BATCH_GIFS` to a commit."""
    batches = plan.batches_of(missing)
    wanted = set(missing)
    meta: dict[int, dict[str, Any]] = {}  # rows of GIFs begun and not finished, without their frames
    outputs: dict[int, list[np.ndarray]] = {}
    finished: list[dict[str, Any]] = []
    started = committed = time.monotonic()
    last = probe_steps()
    with tqdm(total=plan.groups_in(batches), desc="encoding frames", unit="group", mininterval=1) as progress:
        encoded = _encoded_batches(table, plan, batches, encoders, meta, workers)
        for number, (owners, embeddings) in enumerate(encoded, 1):
            for group, values in zip(owners, embeddings, strict=True):
                gif = plan.gif(group)
                outputs.setdefault(gif, []).append(values)
                if group != plan.first[gif + 1] - 1:
                    continue
                row, parts = meta.pop(gif), outputs.pop(gif)
                if gif in wanted:  # a neighbour that shared its batch is there already
                    finished.append(_feature_row(row, parts, encoders[0].key))
            progress.update(len(owners))
            if len(finished) >= BATCH_GIFS or time.monotonic() - committed > BATCH_SECONDS:
                upsert_features(path, finished, schema)
                finished, committed = [], time.monotonic()
            if (time.monotonic() > ends or number >= last) and progress.n < progress.total:
                upsert_features(path, finished, schema)
                pace = {"unit": "groups", "done": progress.n, "seconds": time.monotonic() - started}
                write_json(path.with_name(PACE_FILE), [pace | {"left": progress.total - progress.n}])
                raise DeadlineReached(f"time is up: {progress.n:,} of {progress.total:,} groups are encoded and kept")
        upsert_features(path, finished, schema)


def _encoded_batches(
    table: FrameTable,
    plan: _BatchPlan,
    batches: list[int],
    encoders: list["torch.nn.Module"],
    meta: dict[int, dict[str, Any]],
    workers: int,
) -> Iterator[tuple[range, list[np.ndarray]]]:
    """Yield each batch's group numbers and the fp16 embeddings [length, D] of its groups; fills `meta` on the way.

    While the devices work, each on one batch, the next one is put together.
    """
    import torch

    encoder = encoders[0]
    size, per_group = encoder.image_size, encoder.frames_per_group
    gifs = sorted({plan.gif(group) for batch in batches for group in plan.groups(batch)})
    stream = zip(gifs, _decompressed(table.rows(gifs), workers), strict=True)
    parts: dict[int, list[np.ndarray]] = {}  # the groups of the GIFs in the batch at hand
    running: deque[tuple[range, list[int], torch.Tensor]] = deque()

    def collect(numbers: range, lengths: list[int], result: "torch.Tensor") -> tuple[range, list[np.ndarray]]:
        values = result.to(torch.float16).cpu().numpy()
        if not np.isfinite(values).all():
            shas = sorted(
                {table.ids[plan.gif(n)] for n, v in zip(numbers, values, strict=True) if not np.isfinite(v).all()}
            )
            raise StoreError(f"{encoder.key} gave embeddings that are not finite in fp16 for {', '.join(shas)}.")
        return numbers, [value[:length] for value, length in zip(values, lengths, strict=True)]

    for turn, batch in enumerate(batches):
        numbers = plan.groups(batch)
        frames = np.zeros((len(numbers), per_group, size, size, 3), dtype=np.uint8)
        lengths = []
        for slot, group in enumerate(numbers):
            gif = plan.gif(group)
            while gif not in parts:
                number, (row, pictures) = next(stream)
                parts[number] = [
                    pictures[view["rows"][start : start + per_group]]
                    for view in row["views"]
                    for start in range(0, len(view["rows"]), per_group)
                ]
                meta[number] = row
            part = parts[gif][group - plan.first[gif]]
            frames[slot, : len(part)] = part
            lengths.append(len(part))
        for gif in [gif for gif in parts if plan.first[gif + 1] <= numbers.stop]:
            del parts[gif]
        chosen = encoders[turn % len(encoders)]
        device = next(chosen.parameters()).device
        with torch.inference_mode():
            result = chosen(torch.from_numpy(frames).to(device), torch.tensor(lengths, device=device))
        running.append((numbers, lengths, result))
        if len(running) > len(encoders):
            yield collect(*running.popleft())
    while running:
        yield collect(*running.popleft())


def _decompressed(rows: Iterable[dict[str, Any]], workers: int) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
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


def _feature_row(row: dict[str, Any], parts: list[np.ndarray], encoder_key: str) -> dict[str, Any]:
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
    values = pa.array(np.concatenate(embeddings).reshape(-1), pa.float16())
    offsets = pa.array(np.cumsum([0] + [len(part) for part in embeddings]), pa.int32())
    column = pa.ListArray.from_arrays(offsets, pa.FixedSizeListArray.from_arrays(values, embeddings[0].shape[1]))
    columns = [pa.array([row[name] for row in rows], schema.field(name).type) for name in schema.names[:-1]]
    table = pa.Table.from_arrays([*columns, column.cast(schema.field("embeddings").type)], schema=schema)
    if (dataset := _open(path)) is None:
        lance.write_dataset(table, str(path))
    else:
        dataset.merge_insert("gif_sha256").when_matched_update_all().when_not_matched_insert_all().execute(table)


class FeatureTable:
    """Random access to cached frame embeddings, by gif_sha256.

    Tables of up to `memory_gb` are read into memory once, at the first fetch (sequentially, which suits the slow
    network mounts that hosted notebooks read their inputs from); larger ones are read from disk row by row.
    """

    def __init__(self, path: Path | str, memory_gb: float = 4.0):
        """Open the table. Raises StoreError if there is none, or if it mixes encoders."""
        self.path = Path(path)
        self._dataset = _open(self.path)
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

    def lengths(self, ids: Sequence[str], groups: int | Sequence[int]) -> np.ndarray:
        """Valid frames of each GIF's largest view of at most `groups` groups (one number, or one a GIF): int64 [B].

        Raises StoreError for an unknown GIF, or a group count below its smallest view.
        """
        return self._find(ids, groups)[1]

    def fetch(self, ids: Sequence[str], groups: int | Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings of the views that `lengths` tells of, float16 [B, max N, D] padded with 0, and lengths int64 [B].

        Frames n of a row belong to group n // frames_per_group. Raises StoreError as `lengths` does.
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
            return (values[ends[i] - ends[0] : ends[i + 1] - ends[0]] for i in place)
        if self._embeddings is None:
            embeddings = np.empty((self._start[-1], self.dim), dtype=np.float16)
            position = 0
            for batch in self._dataset.to_batches(columns=["embeddings"]):
                values = self._values(batch["embeddings"])
                embeddings[position : position + len(values)] = values
                position += len(values)
            self._embeddings = embeddings
        return (self._embeddings[self._start[row] : self._start[row + 1]] for row in rows)

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
