"""Cosines of many embeddings, calculated block by block, with ties that no rounding breaks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

SIDE = 1024  # rows and columns of a tile of similarities: 4 MB of float32, which stays in a processor's cache
SAME = 0.999  # mean cosine above which embeddings say nothing
GRID = 2.0**26  # an exact cosine's components are whole multiples of 1 / GRID


class Cosines:
    """Cosines of texts (rows) and videos (columns), calculated when asked for: stands where a matrix of them would.

    `cosines[rows, columns]` of two slices is a float64 block, of two lists of numbers the cosines of those pairs.
    They do not depend on the block, the order of summation or the threads: components of unit vectors are rounded to
    multiples of 2^-26 (which moves a cosine by about 1e-8), so that every partial sum of products is a float64 without
    rounding (below 2, a multiple of 2^-52). Equal embeddings thus tie, always.

    texts, videos: [N, D] and [M, D] numbers; they are kept as they are, and normalised here. ValueError for rows of
    several lengths, NaN, infinity, a norm of zero, and a mean cosine above 0.999 among the texts or the videos, unless
    they are allowed to be alike (a constant token, scored to show that it is at chance).
    """

    def __init__(self, texts: Any, videos: Any, allow_alike: bool = False):
        self._texts, self._videos = (
            _Embeddings(name, vectors, allow_alike) for name, vectors in (("texts", texts), ("videos", videos))
        )
        sizes = [side.vectors.shape[1] for side in (self._texts, self._videos)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"texts have {sizes[0]} numbers each and videos {sizes[1]}: compare embeddings of one model."
            )
        # what float32 may be off by: D + 1 roundings of a sum of products, of its factors, and of the grid
        self.margin = (sizes[0] + sizes[0] ** 0.5 + 16) * 2.0**-24

    @property
    def shape(self) -> tuple[int, int]:
        return len(self._texts.vectors), len(self._videos.vectors)

    @property
    def T(self) -> Cosines:
        """The same with videos as rows and texts as columns."""
        turned = copy.copy(self)
        turned._texts, turned._videos = self._videos, self._texts
        return turned

    def __getitem__(self, where: tuple[Any, Any]) -> np.ndarray:
        rows, columns = where
        if isinstance(rows, slice):
            return self._block(rows, columns, _Embeddings.exact, np.float64)
        values, step = np.empty(len(rows)), max(1, SIDE * SIDE // self._texts.vectors.shape[1])
        for part in stripes(len(rows), step):
            sides = self._texts.exact(rows[part]), self._videos.exact(columns[part])
            values[part] = np.einsum("pd,pd->p", *sides)
        return values

    def rough(self, rows: slice, columns: slice) -> np.ndarray:
        """A float32 block, twice as fast; off by `margin` at most."""
        return self._block(rows, columns, _Embeddings.rough, np.float32)

    def _block(self, rows: slice, columns: slice, units: Callable[..., np.ndarray], dtype: type) -> np.ndarray:
        start, stop, _ = columns.indices(self.shape[1])
        left = units(self._texts, rows)
        block = np.empty((len(left), stop - start), dtype)
        for part in stripes(stop - start, SIDE):  # many columns are not all normalised at once
            np.matmul(left, units(self._videos, slice(start + part.start, start + part.stop)).T, out=block[:, part])
        return block


class _Embeddings:
    """One side of `Cosines`: vectors as given, and their norms."""

    def __init__(self, name: str, vectors: Any, allow_alike: bool):
        if not hasattr(vectors, "shape") and len(sizes := sorted({np.shape(vector) for vector in vectors})) > 1:
            raise ValueError(
                f"{name} have embeddings of several shapes: {sizes}. They must be of one model and pooled."
            )
        self.vectors = vectors = np.asarray(vectors)
        if vectors.ndim != 2 or not vectors.size or vectors.dtype.kind not in "fiu":
            raise ValueError(f"{name} must be [number, size] numbers, found {vectors.dtype} of shape {vectors.shape}.")
        count, size = vectors.shape
        self.norms, total = np.empty(count), np.zeros(size)
        with np.errstate(all="ignore"):  # what is wrong is told below
            for part in stripes(count, SIDE):
                block = vectors[part].astype(np.float64)
                self.norms[part] = np.sqrt(np.einsum("nd,nd->n", block, block))
                total += (block / self.norms[part, None]).sum(axis=0)
        limits = np.finfo(np.float32)
        for told, bad in (
            ("hold NaN, infinity or numbers too large", ~(self.norms < limits.max)),
            ("have a norm of zero: leave out what could not be encoded", self.norms < limits.tiny),
        ):
            if bad.any():
                raise ValueError(f"{bad.sum():,} of {count:,} {name} {told}; the first is row {bad.argmax()}.")
        mean = (total @ total - count) / (count * (count - 1)) if count > 1 else 0.0
        if mean > SAME and not allow_alike:
            raise ValueError(
                f"The {name} have a mean cosine of {mean:.6f} with each other: are the weights loaded? "
                "Load the model strictly, look at what it was given, or say `allow_alike` to score them all the same."
            )

    def exact(self, index: Any) -> np.ndarray:
        unit = self.vectors[index] / self.norms[index, None]
        unit *= GRID
        np.rint(unit, out=unit)
        unit /= GRID
        return unit

    def rough(self, index: Any) -> np.ndarray:
        dtype = np.result_type(self.vectors.dtype, np.float32)
        unit = self.vectors[index].astype(dtype, copy=False) / self.norms[index, None].astype(dtype)
        return unit.astype(np.float32, copy=False)


def stripes(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
