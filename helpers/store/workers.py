"""Processes that fetch and decode GIFs into rows of a shard."""

import hashlib
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, repeat
from multiprocessing import connection, get_context, parent_process
from typing import TYPE_CHECKING, Any

from helpers.gifs.alike import frames_digest, perceptual_hash
from helpers.gifs.decode import GifRejected, Limits, decode, encode_frames, read_gif
from helpers.gifs.fetch import FetchError, fetch_all

if TYPE_CHECKING:
    from helpers.config import DataConfig


def is_url(source: str) -> bool:
    """Whether a GIF's source is an address to fetch it from."""
    return source.startswith(("http://", "https://"))


def with_bytes(sources: list[tuple[str, str]], data: "DataConfig") -> Iterator[tuple[str, str | bytes, str | None]]:
    """Yield (name, path or bytes, reason it failed) in the order given; URLs are fetched a few ahead.

    What failed for a reason that may pass is tried once more at the end, and given up only then.
    """
    urls = [(name, source) for name, source in sources if is_url(source)]
    fetched = fetch_all(urls, max_bytes=data.max_bytes)
    late: list[tuple[str, str]] = []
    for name, source in sources:
        if not is_url(source):
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


def decode_source(gif: str, source: str | bytes, failure: str | None, settings: dict[str, Any]) -> dict[str, Any]:
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
        "frames_sha256": frames_digest(decoded.frames),
        "perceptual_hash": perceptual_hash(decoded.frames, decoded.frame_times_ms, decoded.duration_ms),
    }


def _start_worker() -> None:
    """Leave interrupts to the parent, and end with it: the pool's own pipes stay open when it is killed by -9."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Decoders:
    """Processes that decode, started when first needed and kept from shard to shard; one worker is this process."""

    def __init__(self, workers: int, settings: dict[str, Any]):
        self.workers = workers
        self.settings = settings
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Decoders":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def rows(self, tasks: Iterable[tuple]) -> Iterator[dict[str, Any]]:
        """Rows of these GIFs in the order given, few in flight.

        A GIF whose process dies (killed for memory, or by a fault in a library) is rejected; the others go on.
        """
        if self.workers == 1:
            for task in tasks:
                yield decode_source(*task, self.settings)
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
            return self._pool.submit(decode_source, *task, self.settings)
        except BrokenProcessPool as error:  # a process died meanwhile: let the result say so
            failed: Future = Future()
            failed.set_exception(error)
            return failed

    def _stop(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
