"""Frame shards, made: GIFs become numbered tables of sampled, cropped frames (notebook 01).

Written for a machine that may die at any moment. Work goes first into an unfinished table that is appended to in
batches keyed by GIF; each write is one atomic commit, so a killed run loses one batch at most. A finished table is the
unfinished one sorted by `gif_sha256` and put in its place whole: it has the same rows and values as one that was never
interrupted.
"""

import math
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lance
import numpy as np
import pandas as pd
import pyarrow as pa
from tqdm.auto import tqdm

from helpers.corpora.schema import Corpus, reject_table
from helpers.gifs.alike import NEAR_BITS, nearest_hashes
from helpers.stage.manifest import differences
from helpers.stage.pace import DeadlineReached
from helpers.store.frames import frames_key
from helpers.store.tables import (
    BATCH_GIFS,
    BATCH_SECONDS,
    CONTRACT_VERSION,
    StoreError,
    digest_of,
    open_table,
    read_parquet,
    recover_table,
    sync_table,
    write_captions,
    write_parquet,
    write_questions,
    write_rejects,
    write_sorted,
)
from helpers.store.workers import Decoders, is_url, with_bytes
from helpers.workspace.disk import folder_bytes, read_json, remove, require_disk, write_json

if TYPE_CHECKING:
    from helpers.config import DataConfig


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
# What a GIF shows is told by digests of the frames before they are compressed, kept with the sources.
JOURNAL_SCHEMA = pa.schema(
    [
        *FRAME_SCHEMA,
        ("reason", pa.string()),
        ("frames_sha256", pa.string()),
        ("perceptual_hash", pa.binary()),
    ]
)
SOURCE_COLUMNS = ["gif", "gif_sha256", "reason", "frames_sha256", "perceptual_hash"]
NEAR_COLUMNS = ["gif", "test_gif", "bits", "questions"]


@dataclass(frozen=True)
class Sharded:
    """What notebook 01 made.

    questions: the kept rows with `gif_sha256`. rejects: item, where, reason of every GIF and question left out.
    sources: one row a GIF name: gif, gif_sha256, reason (None if kept), and digests of what it shows (None for a
    repetition of a file's bytes). gifs: distinct GIFs stored. near_duplicates: training GIFs that were kept though they
    look like a test GIF: gif, test_gif, how many of 256 bits differ, and its training questions. captions: the kept
    ones with `gif_sha256`.
    """

    questions: pd.DataFrame
    rejects: pd.DataFrame
    sources: pd.DataFrame
    gifs: int
    near_duplicates: pd.DataFrame
    captions: pd.DataFrame


def shard_gifs(
    corpus: Corpus, folder: Path | str, data: "DataConfig", frames_per_group: int = 16, deadline: float = math.inf
) -> Sharded:
    """Decode the GIFs that a corpus asks or tells about into numbered frame shards; goes on where a killed run stopped.

    deadline: seconds from now after which no more GIFs are decoded.

    Shard k holds the k-th `data.shard_size` of the GIF names in alphabetical order. Files of equal bytes are stored
    once, under the first of their names. Sources that are URLs are fetched and their bytes dropped once decoded.

    Writes under `folder`: frames/shard-00000.lance ... (rows sorted by gif_sha256), frames/settings.json,
    sources/shard-00000.parquet ... (what became of each name), questions.parquet, captions.parquet, rejects.parquet
    and near_duplicates.parquet.

    Raises:
        StoreError: the folder holds shards of other settings or GIFs, or no question is left.
        DiskFull: the estimated size exceeds the free space.
        DeadlineReached: the time was up before the last shard was done; what is decoded is kept.
    """
    folder, ends = Path(folder), time.monotonic() + deadline
    names = sorted({*corpus.questions.gif, *corpus.captions.gif} & set(corpus.gifs))
    if not names:
        raise StoreError(f"The corpus {corpus.name} names no GIF that was found: nothing to shard. See its rejects.")
    remote = any(is_url(corpus.gifs[name]) for name in names)
    settings = _frame_settings(data, frames_per_group, min_frames=2 if remote else 1)
    _claim(folder / "frames", settings | {"shard_size": data.shard_size, "gifs": digest_of(names)})
    shards = [names[start : start + data.shard_size] for start in range(0, len(names), data.shard_size)]
    todo = [k for k, shard in enumerate(shards) if not _is_whole(folder, k, len(shard))]
    _require_frame_space(folder, [len(shards[k]) for k in todo], data, frames_per_group)
    begun = len(names) - sum(len(shards[k]) for k in todo) + sum(_journal_size(folder, k, len(shards[k])) for k in todo)
    with (
        tqdm(total=len(names), initial=begun, desc="decoding GIFs", unit="GIF", mininterval=1) as progress,
        Decoders(data.workers, settings) as decoders,
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
    questions, captions, rejects = _match(corpus, sources)
    near = _near_duplicates(questions, captions, sources)
    return _written(folder, Sharded(questions, rejects, sources, len(known), near, captions))


def leave_out(made: Sharded, folder: Path | str, rejects: pd.DataFrame) -> Sharded:
    """Take questions out of what `shard_gifs` made in `folder`, and list them; its tables are written anew.

    rejects: item (question_id), where, reason. Raises StoreError if no question is left.
    """
    if rejects.empty:
        return made
    questions = made.questions[~made.questions.question_id.isin(rejects.item)].reset_index(drop=True)
    table = pd.concat([made.rejects, rejects], ignore_index=True)
    if questions.empty:
        raise StoreError(f"No question is left. Commonest reasons: {_commonest(table)}.")
    near = _near_duplicates(questions, made.captions, made.sources)
    return _written(Path(folder), replace(made, questions=questions, rejects=table, near_duplicates=near))


def _written(folder: Path, made: Sharded) -> Sharded:
    """Write the tables of questions, captions, rejects and near-duplicates, and give back what was made."""
    write_questions(made.questions, folder / "questions.parquet")
    write_captions(made.captions, folder / "captions.parquet")
    write_rejects(made.rejects, folder / "rejects.parquet")
    kinds = [pa.string(), pa.string(), pa.int64(), pa.int64()]
    schema = pa.schema(list(zip(NEAR_COLUMNS, kinds, strict=True)))
    write_parquet(made.near_duplicates, folder / "near_duplicates.parquet", schema)
    return made


def _commonest(rejects: pd.DataFrame) -> str:
    return "; ".join(f"{why} ({n} times)" for why, n in rejects.reason.value_counts().head(3).items())


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
            "min_frames": min_frames,
        },
    }


def _claim(frames: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a new shard folder, or refuse a folder that was begun with others."""
    path = frames / "settings.json"
    if (theirs := read_json(path)) is None:  # of shards that lost theirs, what each was made with is compared later
        write_json(path, settings)
        return
    if changed := differences(theirs, settings):
        raise StoreError(
            f"{frames} holds shards made with other settings or of other GIFs ({'; '.join(changed)}). "
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
        per_gif = folder_bytes(_shard_path(folder, done)) / 1e9 / len(shards[done])
        require_disk(folder, round(per_gif * (sum(rest) + max(rest)), 3), f"Sharding the last {sum(rest):,} GIFs")


def _is_whole(folder: Path, k: int, names: int) -> bool:
    """Whether shard k, of so many names, and its sources can be read; what cannot is dropped, and made again."""
    shard, sources = _shard_path(folder, k), _sources_path(folder, k)
    if not shard.exists():
        return False
    key = frames_key(folder / "frames")
    table = recover_table(shard, names, f"GIFs of shard {k}")
    other = table is not None and (table.schema.metadata or {}).get(b"frames_key", key.encode()) != key.encode()
    if table is None or other or read_parquet(sources) is None:
        remove(shard)
        return False
    return True


def _sources_path(folder: Path, k: int) -> Path:
    return folder / "sources" / f"shard-{k:05d}.parquet"


def _shard_path(folder: Path, k: int) -> Path:
    return folder / "frames" / f"shard-{k:05d}.lance"


def _journal_path(folder: Path, k: int) -> Path:
    return folder / "unfinished" / f"shard-{k:05d}.lance"


def _read_sources(folder: Path, k: int) -> pd.DataFrame:
    table = pd.read_parquet(_sources_path(folder, k)).reindex(columns=SOURCE_COLUMNS).astype(object)
    return table.where(table.notna(), None)  # earlier shards lack the digests of what is shown


def _journal_size(folder: Path, k: int, names: int) -> int:
    journal = recover_table(_journal_path(folder, k), names, f"GIFs of shard {k}")
    return 0 if journal is None else journal.count_rows()


def _fill_journal(
    path: Path,
    sources: dict[str, str],
    data: "DataConfig",
    decoders: "Decoders",
    known: set[str],
    progress: tqdm,
    ends: float,
) -> None:
    """Decode what a shard's journal lacks, in the order of names, so that the first of equal files is stored."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done: set[str] = set()
    stored = set(known)
    if (journal := open_table(path)) is not None and journal.schema.names != JOURNAL_SCHEMA.names:
        shutil.rmtree(path)  # of an earlier version: its GIFs are decoded again
    elif journal is not None:
        table = journal.to_table(columns=["gif", "gif_sha256"])
        done = set(table["gif"].to_pylist())
        stored.update(table["gif_sha256"].drop_null().to_pylist())
    rows: list[dict[str, Any]] = []
    committed = time.monotonic()

    def commit() -> None:
        mode, began = "append" if open_table(path) is not None else "create", time.time()
        lance.write_dataset(pa.Table.from_pylist(rows, schema=JOURNAL_SCHEMA), str(path), mode=mode)
        sync_table(path, began)

    todo = [(name, source) for name, source in sources.items() if name not in done]
    for row in decoders.rows(with_bytes(todo, data)):
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
    journal = open_table(_journal_path(folder, k))
    table = journal.to_table(columns=[*SOURCE_COLUMNS, "num_frames"])
    (folder / "sources").mkdir(exist_ok=True)
    fates = table.select(SOURCE_COLUMNS).to_pandas().sort_values("gif", ignore_index=True)
    schema = pa.schema([JOURNAL_SCHEMA.field(column) for column in SOURCE_COLUMNS])
    write_parquet(fates, _sources_path(folder, k), schema)
    kept = np.flatnonzero(table["num_frames"].is_valid().to_numpy())
    order = kept[np.argsort(np.array(table["gif_sha256"].to_pylist(), dtype=object)[kept])]
    metadata = {"frames_key": frames_key(folder / "frames")}
    write_sorted(journal, order, FRAME_SCHEMA.with_metadata(metadata), _shard_path(folder, k))
    shutil.rmtree(_journal_path(folder, k))


def _match(corpus: Corpus, sources: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Questions and captions with their GIF's sha, and the table of what is left out.

    Left out is what has no usable GIF, or would leak a test GIF into training. Of GIFs with the same bytes a caption
    that both have is kept once.
    """
    sha = dict(zip(sources.gif, sources.gif_sha256, strict=True))
    reason = dict(zip(sources.gif, sources.reason, strict=True))
    rejects = [(gif, corpus.gifs[gif], why) for gif, why in reason.items() if why is not None]

    def with_gif(table: pd.DataFrame, key: str) -> pd.DataFrame:
        matched = table.assign(gif_sha256=[sha.get(gif) for gif in table.gif])
        usable = matched.gif_sha256.map(lambda found: isinstance(found, str)).astype(bool)
        rejects.extend(
            (row[key], row["gif"], "its GIF was rejected" if row["gif"] in reason else "its GIF was not found")
            for row in matched[~usable].to_dict("records")
        )
        return matched[usable].reset_index(drop=True)

    questions, captions = with_gif(corpus.questions, "question_id"), with_gif(corpus.captions, "caption_id")
    leaks = _leaks(_shown(questions, captions), sources)
    leaked = [table[(table.split == "train") & table.gif.isin(leaks)] for table in (questions, captions)]
    asked, told = (table.gif.value_counts() for table in leaked)
    for gif in sorted({*asked.index, *told.index}):
        lost = [f"{asked[gif]} training questions"] if gif in asked else []
        lost += [f"{told[gif]} captions"] if gif in told else []
        rejects.append((gif, "train split", f"{leaks[gif]}: its {' and '.join(lost)} left out"))
    questions, captions = (
        table.drop(out.index).reset_index(drop=True) for table, out in zip((questions, captions), leaked, strict=True)
    )
    table = pd.concat([corpus.rejects, reject_table(rejects)], ignore_index=True)
    if questions.empty:
        reasons = _commonest(table)
        raise StoreError(f"No question of the corpus {corpus.name} has a usable GIF. Commonest reasons: {reasons}.")
    return questions, captions.drop_duplicates(["gif_sha256", "caption"], ignore_index=True), table


def _shown(questions: pd.DataFrame, captions: pd.DataFrame) -> pd.DataFrame:
    """What is shown in which split: gif, split and gif_sha256 of every question and caption."""
    columns = ["gif", "split", "gif_sha256"]
    return pd.concat([questions[columns], captions[columns]], ignore_index=True)


def _leaks(uses: pd.DataFrame, sources: pd.DataFrame) -> dict[str, str]:
    """By name, the training GIFs that are a test GIF, by their bytes or by what they show, and why."""
    told = sources.dropna(subset="frames_sha256").drop_duplicates("gif_sha256")
    shows = told.set_index("gif_sha256").frames_sha256
    digests = {"bytes": uses.gif_sha256, "frames": uses.gif_sha256.map(shows)}
    names = uses.drop_duplicates("gif").gif
    found: dict[str, str] = {}
    for what, digest in digests.items():
        test = uses.assign(digest=digest)[uses.split == "test"].dropna(subset="digest")
        first = dict(zip(test.digest[::-1], test.gif[::-1], strict=True))
        for gif, own in zip(names, digest[names.index], strict=True):
            if own in first:
                found.setdefault(gif, f"same {what} as the test GIF {first[own]}")
    return found


def _near_duplicates(questions: pd.DataFrame, captions: pd.DataFrame, sources: pd.DataFrame) -> pd.DataFrame:
    """The training GIFs that look like a test GIF, each with the one that it is nearest to."""
    told = sources[sources.perceptual_hash.map(bool)].drop_duplicates("gif_sha256")
    hashes = told.set_index("gif_sha256").perceptual_hash
    uses = _shown(questions, captions)
    hashed = uses[uses.gif_sha256.isin(hashes.index)]
    train, test = (hashed[hashed.split == split].drop_duplicates("gif_sha256") for split in ("train", "test"))
    if train.empty or test.empty:
        return pd.DataFrame(columns=NEAR_COLUMNS)
    nearest, bits = nearest_hashes(hashes[train.gif_sha256].tolist(), hashes[test.gif_sha256].tolist())
    asked = questions[questions.split == "train"].gif_sha256.value_counts().reindex(train.gif_sha256, fill_value=0)
    columns = [train.gif.to_numpy(), test.gif.to_numpy()[nearest], bits, asked.to_numpy()]
    table = pd.DataFrame(dict(zip(NEAR_COLUMNS, columns, strict=True)))
    return table[table.bits <= NEAR_BITS].sort_values(["bits", "gif"], ignore_index=True)
