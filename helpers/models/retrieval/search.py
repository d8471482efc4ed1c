"""Search: a sentence finds videos by their vectors, or is told that nothing matches."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F

from helpers.models.parts import BundleError
from helpers.models.retrieval.bundle import Match, Source, load_head, read_head
from helpers.models.retrieval.heads import RetrievalHead
from helpers.models.retrieval.queries import text_encoder
from helpers.models.xclip import weights_digest
from helpers.workspace.disk import whole

INDEX = "index.lance"
EXACT_ROWS = 100_000  # above, videos are looked for in some partitions only
PROBED = 0.1  # share of the partitions
RECALLED = 10  # of so many nearest videos it is told how many the index finds


@dataclass(frozen=True)
class Hit:
    """A video that was found; above: how far its score (a cosine) lies above those of captions that fit nothing.

    In standard deviations of these; NaN where no validation told of them.
    """

    video: str
    score: float
    above: float


@dataclass(frozen=True)
class Found:
    """What a sentence finds: `hits`, best first. There are none where nothing matches; `best` is the nearest anyway."""

    best: Hit
    hits: list[Hit] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.hits:
            return f"nothing matches (the nearest is {self.best.video}, {self.best.above:+.1f} deviations)"
        return "\n".join(f"{hit.video}  {hit.score:.3f}  {hit.above:+.1f} deviations" for hit in self.hits)


def nearest(queries: np.ndarray, blocks: Iterable[np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows [Q, k] of highest dot product with queries [Q, E] and these products, best first; ties by row.

    blocks: the vectors [n, E] in order, one part after another. With less than k of them, all.
    """
    rows, scores = np.empty((len(queries), 0), dtype=np.int64), np.empty((len(queries), 0), dtype=np.float32)
    seen = 0
    for block in blocks:
        number = np.broadcast_to(np.arange(seen, seen + len(block)), (len(queries), len(block)))
        rows, scores = np.hstack([rows, number]), np.hstack([scores, queries @ block.T])
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        rows, scores = np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)
        seen += len(block)
    return rows, scores


class VideoIndex:
    """Vectors of videos by name, in a Lance table; exact up to `EXACT_ROWS` of them, else by a vector index.

    Attributes: path, ids, made_of (what the vectors are made of, as `head_facts` says), exact.
    """

    def __init__(self, path: Path | str) -> None:
        """Open an index. Raises BundleError where there is none."""
        self.path = Path(path)
        if not (self.path / "_versions").is_dir():
            raise BundleError(f"there is no index of videos at {path}: make one by VideoIndex.build")
        self._table = lance.dataset(str(self.path))
        told = self._table.schema.metadata or {}
        self.made_of: dict[str, str] = json.loads(told.get(b"made_of", b"{}"))
        self.exact: bool = json.loads(told.get(b"exact", b"true"))
        self.ids: list[str] = self._table.to_table(columns=["video"])["video"].to_pylist()
        self._row = {name: row for row, name in enumerate(self.ids)}
        self._vectors = np.concatenate([*self._blocks(EXACT_ROWS)]) if self.exact else None

    @classmethod
    def build(
        cls,
        path: Path | str,
        ids: Sequence[str],
        vectors: np.ndarray,
        made_of: dict[str, str],
        *,
        exact_rows: int = EXACT_ROWS,
    ) -> VideoIndex:
        """Write unit vectors [N, E] of videos as an index, whole or not at all; one already there is replaced.

        Raises ValueError, naming a video, for a name that comes twice, NaN, or a vector that is not of unit length.
        """
        if len(ids) != len(vectors) or not len(ids):
            raise ValueError(f"{len(ids):,} names for {len(vectors):,} vectors: give as many of both, and some")
        if twice := [name for name, count in Counter(ids).items() if count > 1]:
            raise ValueError(f"{len(twice):,} videos are named twice, the first: {twice[0]!r}")
        lengths = np.linalg.norm(vectors, axis=1)
        if (bad := ~(np.abs(lengths - 1) < 1e-3)).any():  # NaN too
            raise ValueError(
                f"{bad.sum():,} vectors are not of unit length, the first of {ids[int(bad.argmax())]!r} "
                f"({lengths[bad.argmax()]:g})"
            )
        width = vectors.shape[1]
        column = pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors, np.float32).ravel()), width)
        told = {"made_of": json.dumps(made_of), "exact": json.dumps(len(ids) <= exact_rows)}
        schema = pa.schema([("video", pa.string()), ("vector", column.type)], told)
        rows = pa.Table.from_arrays([pa.array(ids, pa.string()), column], schema=schema)
        with whole(Path(path)) as temporary:
            table = lance.write_dataset(rows, str(temporary))
            if len(ids) > exact_rows:
                parts = round(math.sqrt(len(ids)))
                table.create_index("vector", index_type="IVF_FLAT", metric="cosine", num_partitions=parts)
        return cls(path)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers [Q, k] of the videos nearest to unit vectors [Q, E], best first, and their cosines [Q, k].

        Raises ValueError for k below 1 or above the number of videos, BundleError for vectors of another width.
        """
        if not 1 <= k <= len(self.ids):
            raise ValueError(f"k is {k}: it must be from 1 to {len(self.ids):,}, the number of videos in the index")
        width = self._table.schema.field("vector").type.list_size
        if queries.shape[1] != width:
            raise BundleError(f"a query has {queries.shape[1]} numbers, the vectors of {self.path} have {width}")
        if self.exact:
            return nearest(queries, [self._vectors], k)
        probed = max(1, round(PROBED * math.sqrt(len(self.ids))))
        rows, scores = [], []
        for query in queries.astype(np.float32):
            wanted = {"column": "vector", "q": query, "k": k, "nprobes": probed}
            found = self._table.to_table(columns=["video", "_distance"], nearest=wanted)
            rows.append([self._row[name] for name in found["video"].to_pylist()])
            scores.append(1 - found["_distance"].to_numpy())
        return np.stack(rows), np.stack(scores)

    def recall(self, queries: np.ndarray, k: int = RECALLED) -> float:
        """Share of the k truly nearest videos of unit vectors [Q, E] that `search` finds; 1 where it is exact."""
        if self.exact:
            return 1.0
        found, _ = self.search(queries, k)
        true, _ = nearest(queries, self._blocks(EXACT_ROWS), k)
        return float(np.mean([len({*one} & {*other}) / k for one, other in zip(found, true, strict=True)]))

    def _blocks(self, rows: int) -> Iterable[np.ndarray]:
        for batch in self._table.to_batches(columns=["vector"], batch_size=rows):
            values = batch["vector"]
            yield values.flatten().to_numpy().reshape(len(values), -1)


class Retriever:
    """Finds videos by a sentence: a text encoder, a head if there is one, and an index of videos."""

    def __init__(
        self,
        encode: Callable[[Sequence[str]], torch.Tensor],
        head: RetrievalHead | None,
        index: VideoIndex,
        match: Match | None = None,
    ) -> None:
        """encode: texts to embeddings [N, D]; match: when something matches, None: whatever is nearest does."""
        self.encode, self.head, self.index, self.match = encode, head, index, match

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        index: Path | str | None = None,
        model: str | None = None,
        device: torch.device | None = None,
    ) -> Retriever:
        """Load a head's bundle, the model that embeds its texts, and an index of videos.

        index: the one in the bundle, if not given. model: id or folder to take the text's model from instead of what
        the bundle names. Raises BundleError for a broken bundle, another model than the bundle's, and an index of
        another encoder or head; ModelNotFound where weights are missing.
        """
        facts, head = read_head(folder), load_head(folder)
        found = VideoIndex(index or Path(folder) / INDEX)
        require_same_source(found, head_facts(facts.source, head))
        return cls(text_encoder(facts.source, model, device), head, found, facts.match)

    def search(self, text: str, k: int = 5) -> Found:
        """The k videos that fit a sentence best, or none of them where its best score is that of a misfit.

        Raises ValueError for an empty sentence, and for k below 1 or above the number of videos.
        """
        if not text.strip():
            raise ValueError("the query is empty; type what is to be seen, for example: a red star jumps")
        rows, scores = self.index.search(self.vectors([text.strip()]), k)
        hits = [
            Hit(self.index.ids[row], float(score), self.match.above(score) if self.match else math.nan)
            for row, score in zip(rows[0], scores[0], strict=True)
        ]
        fits = self.match is None or hits[0].score >= self.match.threshold
        return Found(hits[0], hits if fits else [])

    @torch.no_grad()
    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors [N, E] of texts."""
        embedded = self.encode(texts).float().cpu()  # where the head is
        return (F.normalize(embedded, dim=-1) if self.head is None else self.head.text(embedded)).numpy()


def head_facts(source: Source, head: RetrievalHead | None) -> dict[str, str]:
    """What the vectors of an index are made of: what a head's bundle and an index of it must agree in."""
    told = {name: str(getattr(source, name)) for name in ("trained", "layer", "pooling", "prompt", "start")}
    encoder = "|".join(source.encoder_key.rsplit("|", 4)[-4:])  # without its name: see `same_encoder`
    text = source.identity.get("digest", "")
    return told | {"encoder": encoder, "text model": text, "head": "" if head is None else weights_digest(head)}


def require_same_source(index: VideoIndex, ours: dict[str, str]) -> None:
    """Raise BundleError, saying in what, where an index was made of other embeddings or by another head."""
    other = [
        f"{name} is {index.made_of.get(name)!r} in the index and {value!r} in the bundle"
        for name, value in ours.items()
        if index.made_of.get(name) != value
    ]
    if other:
        raise BundleError(
            f"the index {index.path} is of another encoder or head: {'; '.join(other)}. "
            "Make the index anew from this bundle's embeddings, or give the bundle that it was made by"
        )
