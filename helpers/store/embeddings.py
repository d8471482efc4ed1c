"""Embeddings of videos and texts on disk: one keyed table for all kinds, and the .npy files of the 2023 study."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pyarrow as pa

from helpers.store.tables import StoreError, open_table, upsert, vector_lists
from helpers.workspace.disk import whole
from helpers.workspace.names import folded


@dataclass(frozen=True)
class EmbeddingKind:
    """What embeddings are of; those of two kinds are never compared.

    modality: "video" or "text"; layer: "before", a number, or "last"; pooling; prompt: what was asked, if anything;
    encoder_key; language_model and trained: digests of the frozen language model and of what was trained.
    """

    modality: str
    layer: str
    pooling: str
    prompt: str = ""
    encoder_key: str = ""
    language_model: str = ""
    trained: str = ""


KIND = [field.name for field in fields(EmbeddingKind)]


def embedding_schema(dim: int, pooled: bool) -> pa.Schema:
    """Columns of a table of embeddings of `dim` numbers: one vector a row or, where not pooled, a list of them."""
    vector = pa.list_(pa.float32(), dim)
    column = pa.field("embedding", vector if pooled else pa.list_(vector))
    return pa.schema([*((name, pa.string()) for name in ("key", *KIND)), column])


def write_embeddings(
    path: Path | str, keys: Sequence[str], values: np.ndarray | Sequence[np.ndarray], kind: EmbeddingKind
) -> None:
    """Write embeddings of one kind to a Lance table, which may hold other kinds; the same keys of this one give way.

    values: [N, D], or N arrays [L_i, D] that are not pooled, of the items `keys`. Raises StoreError, naming what is
    wrong, for another number of keys, a key that comes twice, numbers that are not finite, and embeddings that the
    table cannot hold: of another size than its own, or pooled where its own are not.
    """
    path = Path(path)
    if not len(keys) or len(keys) != len(values):
        raise StoreError(f"{len(keys):,} keys for {len(values):,} embeddings: give one each, and one at least.")
    if twice := [key for key, count in Counter(keys).items() if count > 1]:
        raise StoreError(f"{len(twice):,} keys come twice, the first: {twice[0]!r}. Give one embedding each.")
    parts = [np.asarray(value, np.float32) for value in values]
    if bad := [key for key, part in zip(keys, parts, strict=True) if not np.isfinite(part).all()]:
        raise StoreError(f"{len(bad):,} embeddings hold NaN or infinity, the first of {bad[0]!r}: leave them out.")
    shapes = {(part.ndim, part.shape[-1]) for part in parts}
    if len(shapes) > 1 or not {ndim for ndim, _ in shapes} <= {1, 2}:
        raise StoreError(f"embeddings must be one vector each, or one matrix each, of one size; got {sorted(shapes)}.")
    pooled, dim = parts[0].ndim == 1, parts[0].shape[-1]
    schema = embedding_schema(dim, pooled)
    if (dataset := open_table(path)) is not None and not dataset.schema.equals(schema):
        held = dataset.schema.field("embedding").type if "embedding" in dataset.schema.names else "no embeddings"
        raise StoreError(f"{path} holds {held}, not {schema.field('embedding').type}: write these to another table.")
    if pooled:
        column = pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(parts)), dim)
        column = column.cast(schema.field("embedding").type)
    else:
        column = vector_lists(parts, schema.field("embedding").type)
    facts = [pa.array([value] * len(keys), pa.string()) for value in asdict(kind).values()]
    rows = pa.Table.from_arrays([pa.array(keys, pa.string()), *facts, column], schema=schema)
    upsert(path, rows, ["key", *KIND])


def read_embeddings(path: Path | str, **wanted: str) -> tuple[EmbeddingKind, list[str], np.ndarray | list[np.ndarray]]:
    """The embeddings of one kind, with their keys in sorted order, from a table of `write_embeddings`.

    wanted: fields of `EmbeddingKind`, as many as tell the kind from the others that the table holds. Returns the kind,
    the keys, and float32 [N, D], or arrays [L_i, D] where they are not pooled. Raises StoreError where there is no such
    table, and where none or several of its kinds are meant, naming those that it holds.
    """
    path = Path(path)
    if (dataset := open_table(path)) is None:
        raise StoreError(f"There is no table of embeddings at {path}: write one by write_embeddings.")
    table = dataset.to_table(columns=["key", *KIND]).to_pandas()
    chosen = table
    for name, value in wanted.items():
        chosen = chosen[chosen[name] == value]
    kinds = [EmbeddingKind(*row) for row in chosen[KIND].drop_duplicates().itertuples(index=False)]
    if len(kinds) != 1:
        held = kinds or [EmbeddingKind(*row) for row in table[KIND].drop_duplicates().itertuples(index=False)]
        told = "\n".join(f"  {kind}" for kind in held)
        raise StoreError(f"{path} holds {len(kinds)} kinds of embeddings with {wanted}; name one of\n{told}")
    chosen = chosen.sort_values("key")
    column = dataset.take(chosen.index.to_numpy(), columns=["embedding"])["embedding"].combine_chunks()
    vectors = column if pa.types.is_fixed_size_list(column.type) else column.flatten()
    values = np.array(vectors.flatten()).reshape(-1, vectors.type.list_size)
    if vectors is not column:
        values = np.split(values, np.cumsum(column.value_lengths().to_numpy())[:-1])
    return kinds[0], chosen["key"].tolist(), values


def caption_names(videos: Sequence[str]) -> list[str]:
    """Names of captions by the video that each is of: video7890-1, video7890-2, ... in the order in which they come."""
    count: Counter[str] = Counter()
    names = []
    for video in videos:
        count[video] += 1
        names.append(f"{video}-{count[video]}")
    return names


def write_npy(folder: Path | str, names: Sequence[str], values: np.ndarray | Sequence[np.ndarray]) -> None:
    """Write each embedding to `folder` as NAME.npy, as the 2023 study keeps them: all of them or none.

    names: the videos' own ("video7890"), or `caption_names` ("video7890-1"). A folder is for one pooling, so that one
    with anything in it is refused. Raises StoreError for that, for another number of names, for a name that is no plain
    name of a file, and for two that some disk takes for one.
    """
    folder = Path(folder)
    if len(names) != len(values):
        raise StoreError(f"{len(names):,} names for {len(values):,} embeddings: give one each.")
    for name in names:
        if not name or "\0" in name or any(path(name).name != name for path in (PurePosixPath, PureWindowsPath)):
            raise StoreError(f"{name!r} cannot be the name of a file: name embeddings without folders.")
    if twice := [name for name, count in Counter(map(folded, names)).items() if count > 1]:
        raise StoreError(f"{len(twice):,} names are those of several embeddings, the first: {twice[0]!r}.")
    if folder.exists() and any(folder.iterdir()):
        raise StoreError(f"{folder} is not empty: write each pooling to a folder of its own.")
    with whole(folder) as temporary:
        temporary.mkdir()
        for name, value in zip(names, values, strict=True):
            np.save(temporary / f"{name}.npy", np.asarray(value))
