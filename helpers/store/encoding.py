"""The feature table, made: every distinct GIF is encoded once (notebook 02)."""

import copy
import math
import shutil
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from helpers.stage.pace import PACE_FILE, DeadlineReached, note_pace, probe_steps
from helpers.store.features import feature_row, feature_schema, upsert_features
from helpers.store.frames import FrameTable, decompressed
from helpers.store.tables import BATCH_GIFS, BATCH_SECONDS, StoreError, open_table, recover_table, write_sorted
from helpers.workspace.disk import folder_bytes, put_in_place, require_disk

if TYPE_CHECKING:
    import torch

    from helpers.config import DataConfig


@dataclass(frozen=True)
class Cached:
    """What notebook 02 made: distinct GIFs and groups in the table, groups encoded by this run, its seconds, and MB."""

    gifs: int
    groups: int
    encoded_groups: int
    seconds: float
    megabytes: float


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
        DiskFull: the table does not fit.
        DeadlineReached: the time was up before the last GIF was encoded; what is encoded is kept.
    """
    started = time.monotonic()
    table, out = FrameTable(frames_folder), Path(out)
    _require_fit(encoder, table)
    encoders = _copies(encoder, gpus)
    schema = feature_schema(encoder.embed_dim, table.key)
    plan = GroupPlan(table.view_lengths(), encoder.frames_per_group, batch_groups)
    work = out.with_name(f"{out.name}.unfinished")
    stored = _stored_features(out, work, len(table), encoder.key, schema)
    missing = [i for i, sha in enumerate(table.ids) if stored.get(sha) != plan.views[i]]
    if missing or not out.exists():
        frames = sum(sum(views.values()) for views in plan.views)
        gigabytes = 2 * frames * encoder.embed_dim * 2 / 1e9  # fp16, and once more while it is sorted
        require_disk(out.parent, round(gigabytes, 3), f"Caching the features of {len(table):,} GIFs")
        if out.exists():
            put_in_place(out, work)
        _encode_missing(table, plan, missing, encoders, work, schema, data.workers, started + deadline)
        done = open_table(work)
        order = np.argsort(np.array(done.to_table(columns=["gif_sha256"])["gif_sha256"].to_pylist(), dtype=object))
        write_sorted(done, order, schema, out)
    shutil.rmtree(work, ignore_errors=True)
    out.with_name(PACE_FILE).unlink(missing_ok=True)
    return Cached(
        len(table),
        plan.total,
        plan.groups_in(plan.batches_of(missing)),
        time.monotonic() - started,
        folder_bytes(out) / 1e6,
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


def _stored_features(
    out: Path, work: Path, gifs: int, encoder_key: str, schema: pa.Schema
) -> dict[str, dict[int, int]]:
    """{gif_sha256: {groups: frames}} of what is there already; refuses rows that may not be mixed with new ones."""
    if out.exists():  # then `work` can only be what a run killed after its last rename left behind
        shutil.rmtree(work, ignore_errors=True)
    dataset = recover_table(out, gifs, "GIFs")
    if dataset is None:
        dataset = recover_table(work, gifs, "GIFs")
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


class GroupPlan:
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
        """Number of groups in some batches."""
        return sum(len(self.groups(batch)) for batch in batches)

    def gif(self, group: int) -> int:
        """Number of the GIF that a group belongs to."""
        return int(np.searchsorted(self.first, group, side="right")) - 1


def _encode_missing(
    table: FrameTable,
    plan: GroupPlan,
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
                    finished.append(feature_row(row, parts, encoders[0].key))
            progress.update(len(owners))
            if len(finished) >= BATCH_GIFS or time.monotonic() - committed > BATCH_SECONDS:
                upsert_features(path, finished, schema)
                finished, committed = [], time.monotonic()
            if (time.monotonic() > ends or number >= last) and progress.n < progress.total:
                upsert_features(path, finished, schema)
                note_pace(path.parent, "groups", progress.n, time.monotonic() - started, progress.total - progress.n)
                raise DeadlineReached(f"time is up: {progress.n:,} of {progress.total:,} groups are encoded and kept")
        upsert_features(path, finished, schema)


def _encoded_batches(
    table: FrameTable,
    plan: GroupPlan,
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
    stream = zip(gifs, decompressed(table.rows(gifs), workers), strict=True)
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
