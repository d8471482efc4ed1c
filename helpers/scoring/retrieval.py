"""Text-video retrieval: ranks with ties, metrics both ways, and cosines too many to be held at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from helpers.scoring.cosines import SIDE, Cosines, stripes
from helpers.scoring.intervals import bootstrap_interval

WAYS = ("text_to_video", "video_to_text")
CUTS = (1, 2, 5, 10)
DEPTH = 10  # of nDCG

Similarity = np.ndarray | Cosines


def checked(similarity: Any) -> Similarity:
    """A similarity matrix, [texts, videos], that can be ranked, or `Cosines`; ValueError for a shape or NaN."""
    if isinstance(similarity, Cosines):
        return similarity
    similarity = np.asarray(similarity)
    if similarity.ndim != 2 or not similarity.size or similarity.dtype.kind not in "fiub":
        found = f"{similarity.dtype} of shape {similarity.shape}"
        raise ValueError(f"similarity must be a matrix of numbers, [texts, videos], found {found}.")
    if similarity.dtype.kind != "f":
        return similarity.astype(np.float64)
    if count := np.isnan(similarity).sum():
        row, column = np.unravel_index(np.isnan(similarity).argmax(), similarity.shape)
        raise ValueError(f"similarity has {count:,} NaN, the first at text {row}, video {column}: find what made them.")
    return similarity


def relevant_pairs(relevance: Any, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is relevant to what, as text, video and grade (above 0, at most 1), sorted by text and video.

    relevance: None for text i and video i; a whole number a text, the video that it belongs to (-1: none); or a
    matrix of that shape, dense or of scipy.sparse, of booleans or of grades from 0 to 1. ValueError for another.
    """
    texts, videos = shape
    if relevance is None:
        if texts != videos:
            raise ValueError(
                f"similarity has {texts:,} texts and {videos:,} videos: without `relevance` text i belongs to video i, "
                "which takes as many of both. Give `relevance`."
            )
        relevance = np.arange(texts)
    if hasattr(relevance, "tocsr"):
        sparse = relevance.tocsr().tocoo()  # adds up what is named twice
        found, text, video, grade = sparse.shape, sparse.row, sparse.col, sparse.data
    else:
        relevance = np.asarray(relevance)
        found = relevance.shape
        if found == (texts,) and relevance.dtype.kind in "iu":
            if (outside := (relevance < -1) | (relevance >= videos)).any():
                first = outside.argmax()
                raise ValueError(f"text {first} belongs to video {relevance[first]}, and there are {videos:,} videos.")
            text = np.flatnonzero(relevance >= 0)
            found, video, grade = shape, relevance[text], np.ones(len(text))
        elif found == shape:
            text, video = np.nonzero(relevance)
            grade = relevance[text, video]
    if found != shape:
        raise ValueError(
            f"relevance has shape {found}, similarity {shape}: it is such a matrix, or a video's number a text."
        )
    grade = grade.astype(np.float64)
    if (outside := ~((grade >= 0) & (grade <= 1))).any():
        first = outside.argmax()
        raise ValueError(
            f"relevance is {grade[first]} at text {text[first]}, video {video[first]}: a grade is a share from 0 to 1."
        )
    order = np.lexsort((video, text))
    order = order[grade[order] > 0]
    return text[order].astype(np.int64), video[order].astype(np.int64), grade[order]


def _count(
    tile: np.ndarray, margin: float, at: np.ndarray, score: np.ndarray, exact: Callable[..., np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Of each pair, a row of the tile and a score, how many items of that row are above the score and equal to it.

    A tile may be off by `margin`: items that near to the score are decided by `exact(rows, items)`.
    """
    above, equal = np.zeros((2, len(at)), dtype=np.int64)
    for part in stripes(len(at), max(1, SIDE * SIDE // tile.shape[1])):
        rows, limit = at[part], score[part]
        run = rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all()  # a view instead of a copy
        items = tile[rows[0] : rows[-1] + 1] if run else tile[rows]
        high = items > (limit + margin).astype(tile.dtype)[:, None]
        low = items >= (limit - margin).astype(tile.dtype)[:, None]
        above[part] = _true(high)
        if not margin:
            equal[part] = _true(low) - above[part]
            continue
        close = low ^ high
        flat = np.flatnonzero(close.ravel(order="K"))  # as it lies in memory: ten times as fast as by two axes
        pair, item = np.unravel_index(flat, close.shape, order="C" if close.flags.c_contiguous else "F")
        values, limits = exact(rows[pair], item), limit[pair]
        above[part] += np.bincount(pair[values > limits], minlength=len(rows))
        equal[part] = np.bincount(pair[values == limits], minlength=len(rows))
    return above, equal


def _true(mask: np.ndarray) -> np.ndarray:
    """How often each row is true: as sums of short numbers, which hold a tile's side, four times as fast."""
    return mask.view(np.uint8).sum(axis=1, dtype=np.uint16).astype(np.int64)


def _decider(similarity: Similarity, rows: slice, columns: slice) -> Callable[..., np.ndarray]:
    """What gives the exact values of pairs of a tile: one by one where they are few, else from all of the tile."""
    whole = functools.cache(lambda: similarity[rows, columns])
    many = (rows.stop - rows.start) * (columns.stop - columns.start) // 64

    def decide(row: np.ndarray, column: np.ndarray) -> np.ndarray:
        if len(row) > many:
            return whole()[row, column]
        return similarity[row + rows.start, column + columns.start]

    return decide


def _swapped(decide: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda column, row: decide(row, column)


def _count_both(similarity: Similarity, text: np.ndarray, video: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each pair of a text and a video, for both ways: items above the pair's score, and equal to it, itself too.

    Every tile is calculated once and counted in along its rows and its columns.
    """
    score = similarity[text, video]
    counts = [np.zeros((2, len(text)), dtype=np.int64) for _ in WAYS]
    orders = [np.argsort(query, kind="stable") for query in (text, video)]
    margin = similarity.margin if isinstance(similarity, Cosines) else 0.0

    def pairs_in(way: int, part: slice) -> np.ndarray:
        bounds = np.searchsorted((text, video)[way][orders[way]], [part.start, part.stop])
        return orders[way][slice(*bounds)]

    of_columns = [(part, pairs_in(1, part)) for part in stripes(similarity.shape[1], SIDE)]
    for rows in stripes(similarity.shape[0], SIDE):
        of_rows = pairs_in(0, rows)
        for columns, of_column in of_columns:
            tile = similarity.rough(rows, columns) if margin else similarity[rows, columns]
            decide = _decider(similarity, rows, columns)
            at = text[of_rows] - rows.start
            counts[0][:, of_rows] += _count(tile, margin, at, score[of_rows], decide)
            at = video[of_column] - columns.start
            counts[1][:, of_column] += _count(tile.T, margin, at, score[of_column], _swapped(decide))
    return counts


def top_items(similarity: Similarity, k: int) -> Iterator[pd.DataFrame]:
    """Rows texts, some at a time: the videos that are among each one's first `k`, and all that tie with the last one.

    Yields columns query, item, score, above (items with a higher score) and equal (with the same one, itself too),
    sorted by query, falling score, and item.
    """
    rows, columns = similarity.shape
    k, margin = min(k, columns), similarity.margin if isinstance(similarity, Cosines) else 0.0
    for part in stripes(rows, max(1, 16 * SIDE * SIDE // columns)):
        block = similarity.rough(part, slice(None)) if margin else similarity[part]
        last = np.partition(block, columns - k, axis=1)[:, columns - k]  # off by `margin` too
        query, item = np.nonzero(block >= (last - 2 * margin).astype(block.dtype)[:, None])
        score = similarity[query + part.start, item] if margin else block[query, item]
        order = np.lexsort((item, -score, query))
        query, item, score = query[order], item[order], score[order]
        above, equal = _among(query, score)
        found = {"query": query + part.start, "item": item, "score": score, "above": above, "equal": equal}
        yield pd.DataFrame(found)[above < k]


def _among(query: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each row of a list sorted by query and falling score: rows of its query with a higher score, and an equal."""
    if not len(query):
        return np.zeros((2, 0), dtype=np.int64)
    first = np.r_[True, query[1:] != query[:-1]]
    new = first | np.r_[True, score[1:] != score[:-1]]
    starts = np.flatnonzero(new)
    sizes = np.diff(np.r_[starts, len(query)])
    above = starts - np.maximum.accumulate(np.where(first, np.arange(len(query)), 0))[starts]
    return np.repeat(above, sizes), np.repeat(sizes, sizes)


def retrieval_ranks(similarity: Any, relevance: Any = None) -> dict[str, pd.DataFrame]:
    """What each query found, for both ways; arguments as of `retrieval_metrics`.

    Returns:
        by way a row a query: rank (1 is best; of ties the middle one), worst (the same, had it lost every tie),
        average_precision and, where relevance is graded, ndcg. NaN for a query without a relevant item.
    """
    similarity = checked(similarity)
    text, video, grade = relevant_pairs(relevance, similarity.shape)
    full = grade == 1
    counts = _count_both(similarity, text[full], video[full])
    scores = similarity[text[full], video[full]].astype(np.float64)
    ranks = {}
    for way, query, queries, (above, equal) in zip(
        WAYS, (text[full], video[full]), similarity.shape, counts, strict=True
    ):
        order = np.lexsort((-scores, query))
        query, above, equal = query[order], above[order], equal[order]
        above_relevant, equal_relevant = _among(query, scores[order])
        above, equal = above - above_relevant, equal - equal_relevant  # the items that are not relevant
        place = _among(query, np.arange(len(query)))[0] + 1
        rank = place + above + 0.5 * equal
        best, size = place == 1, np.bincount(query, minlength=queries)
        table = pd.DataFrame(np.nan, index=range(queries), columns=["rank", "worst", "average_precision"])
        table.loc[query[best], "rank"] = rank[best]
        table.loc[query[best], "worst"] = (place + above + equal)[best]
        found = size > 0
        precision = np.bincount(query, weights=place / rank, minlength=queries)
        table.loc[found, "average_precision"] = precision[found] / size[found]
        ranks[way] = table
    if (grade < 1).any():
        for way, one, pairs in zip(WAYS, (similarity, similarity.T), ((text, video), (video, text)), strict=True):
            ranks[way]["ndcg"] = _ndcg(one, *pairs, grade).where(ranks[way]["rank"].notna())
    return ranks


def _ndcg(similarity: Similarity, query: np.ndarray, item: np.ndarray, grade: np.ndarray) -> pd.Series:
    """nDCG@10 with the grade as gain and 1 / log2(1 + place) as discount (Jarvelin and Kekalainen 2002).

    Items that tie share the mean discount of the places that they fill (McSherry and Najork 2008): the mean over all
    orders. A middle place, as for ranks, would give more than 1 where a tie reaches over the tenth place.
    """
    queries, items = similarity.shape
    discounts = np.r_[0, np.cumsum(1 / np.log2(np.arange(DEPTH) + 2))]  # of the first 0 to 10 places together
    order = np.lexsort((-grade, query))
    place = _among(query[order], np.arange(len(order)))[0]
    gains = grade[order] * np.diff(discounts, append=discounts[-1])[np.minimum(place, DEPTH)]
    ideal = np.bincount(query[order], gains, minlength=queries)
    keys = np.sort(query * items + item)
    grades = grade[np.argsort(query * items + item)]
    gained = np.zeros(queries)
    for top in top_items(similarity, DEPTH):
        above, equal = top["above"].to_numpy(), top["equal"].to_numpy()
        share = (discounts[np.minimum(above + equal, DEPTH)] - discounts[above]) / equal
        wanted = (top["query"] * items + top["item"]).to_numpy()
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        gain = np.where(keys[at] == wanted, grades[at], 0.0)
        gained += np.bincount(top["query"], gain * share, minlength=queries)
    with np.errstate(invalid="ignore"):  # a query without any grade
        return pd.Series(gained / ideal)


def _values(ranks: pd.DataFrame) -> pd.DataFrame:
    """What each metric is the mean of (MdR: the median), a row a query that has a relevant item."""
    ranks = ranks[ranks["rank"].notna()]
    rank = ranks["rank"]
    values = {f"R@{k}": (rank <= k).astype(float) for k in CUTS}
    values |= {"MRR": 1 / rank, "MAP": ranks["average_precision"], "MdR": rank, "MnR": rank}
    return pd.DataFrame(values | ({f"nDCG@{DEPTH}": ranks["ndcg"]} if "ndcg" in ranks else {}))


def _statistic(metric: str) -> str:
    return "median" if metric == "MdR" else "mean"


def retrieval_metrics(similarity: Any, relevance: Any = None) -> dict[str, dict[str, float]]:
    """Metrics of text-video retrieval, both ways; a tie gives its middle rank, so that no order of rows helps.

    similarity: [texts, videos], higher is more alike; or `Cosines` of their embeddings, which are compared in blocks.
    relevance: None (text i belongs to video i), the number of each text's video (-1: none), or a matrix [texts,
    videos], dense or sparse: booleans, or grades from 0 to 1, of which 1 is relevant and lesser ones count in nDCG.

    Returns:
        {"text_to_video": {...}, "video_to_text": {...}}, each with R@1, R@2, R@5, R@10, MRR and MAP (0 to 1), MdR and
        MnR (ranks from 1), nDCG@10 where relevance is graded, and queries, over which these are taken; skipped are
        those without a relevant item. Of several relevant items the best counts, in MAP all do:
        rank of the k-th = k + items that are not relevant and score higher + half of those that score the same.

    Raises ValueError for NaN, for shapes that do not fit, and for a missing `relevance` where the numbers differ.
    """
    return {
        way: {name: float(getattr(column, _statistic(name))()) for name, column in _values(table).items()}
        | {"queries": int(table["rank"].notna().sum()), "skipped": int(table["rank"].isna().sum())}
        for way, table in retrieval_ranks(similarity, relevance).items()
    }


def retrieval_table(ranks: dict[str, pd.DataFrame], videos: Sequence, resamples: int, seed: int) -> pd.DataFrame:
    """Metrics of `retrieval_ranks` with 95 % bootstrap intervals, by video: all captions of a video are drawn at once.

    videos: the video that each text was written about. The items that are searched stay the same in every resample.

    Returns:
        columns way, metric, value, low, high, ties_lost (the value had it lost every tie; not known of MAP and nDCG),
        n (queries), videos (that these belong to).
    """
    if len(videos) != len(ranks[WAYS[0]]):
        raise ValueError(f"{len(videos):,} videos for {len(ranks[WAYS[0]]):,} texts: give the video of each text.")
    rows = []
    for way, owners in zip(WAYS, (np.asarray(videos), np.arange(len(ranks[WAYS[1]]))), strict=True):
        values = _values(ranks[way])
        lost = _values(ranks[way].assign(rank=ranks[way]["worst"], average_precision=np.nan, ndcg=np.nan))
        owners = owners[values.index]
        for name, column in values.items():
            statistic = _statistic(name)
            if len(column):
                low, high = bootstrap_interval(column, owners, resamples, seed, statistic=statistic)
                told = (getattr(lost[name], statistic)(), len(column), len(set(owners.tolist())))
                rows.append((way, name, getattr(column, statistic)(), low, high, *told))
    return pd.DataFrame(rows, columns=["way", "metric", "value", "low", "high", "ties_lost", "n", "videos"])
