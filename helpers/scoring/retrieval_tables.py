"""Around retrieval's metrics: hubs, scores corrected at test time, "nothing matches", and TREC's files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from helpers.scoring.retrieval import checked, relevant_pairs, top_items
from helpers.workspace.disk import whole, write_text


def hubness(similarity: Any, k: int = 10) -> dict[str, float]:
    """How unevenly texts find videos: how often each video is among a text's first `k` (its k-occurrence).

    similarity: as of `retrieval_metrics`; `.T` of it for texts that are hubs. Videos that tie for the last places
    share them, so that a text always finds `k` (or all videos, where these are fewer).

    Returns:
        skew of the k-occurrence (third standardised moment, Radovanovic et al. 2010; 0: even), never (videos that no
        text finds), worst (number of the video that is found most often), worst_found (by how many texts) and queries.
    """
    similarity = checked(similarity)
    queries, items = similarity.shape
    k, found = min(k, items), np.zeros(items)
    for top in top_items(similarity, k):
        share = np.minimum((k - top["above"]) / top["equal"], 1)
        found += np.bincount(top["item"], share, minlength=items)
    apart = found - found.mean()
    skew = (apart**3).mean() / (apart**2).mean() ** 1.5 if np.ptp(found) > 0 else 0.0
    worst = int(found.argmax())
    return {
        "skew": float(skew),
        "never": int((found == 0).sum()),
        "worst": worst,
        "worst_found": float(found[worst]),
        "queries": queries,
    }


def dual_softmax(similarity: np.ndarray, temperature: float = 0.01) -> np.ndarray:
    """Logarithm of the softmax over videos times that over texts (after Cheng et al. 2021, arXiv 2109.04290).

    Uses all test queries at once. The product itself would become 0 for most pairs, and these would tie.
    """
    scaled = _matrix(similarity) / temperature
    return 2 * scaled - _logsumexp(scaled, axis=0) - _logsumexp(scaled, axis=1)


def query_bank(similarity: np.ndarray, bank: np.ndarray, temperature: float = 0.01) -> np.ndarray:
    """Logarithm of the inverted softmax: each video's scores over those that the texts of a bank give it.

    QB-Norm without its exception for queries that find no hub (Bogolin et al. 2022, arXiv 2112.12777). bank: [texts of
    the bank, videos]; with training captions no test query is used. It orders videos only: texts of a video stay as
    they were, and for them both matrices are given transposed.
    """
    similarity, bank = _matrix(similarity), _matrix(bank)
    if similarity.shape[1] != bank.shape[1]:
        raise ValueError(f"the bank scores {bank.shape[1]:,} videos, similarity has {similarity.shape[1]:,}.")
    return similarity / temperature - _logsumexp(bank / temperature, axis=0)


def centre_columns(similarity: np.ndarray) -> np.ndarray:
    """Each video's scores less their mean over all texts.

    Uses all test queries at once. It orders videos only, as `query_bank` does.
    """
    similarity = _matrix(similarity)
    return similarity - similarity.mean(axis=0)


def _matrix(similarity: Any) -> np.ndarray:
    return checked(similarity)[:, :].astype(np.float64)


def _logsumexp(values: np.ndarray, axis: int) -> np.ndarray:
    return np.logaddexp.reduce(values, axis=axis, keepdims=True)


def match_auroc(matched: Any, unmatched: Any) -> float:
    """Probability that a caption that fits something scores above one that fits nothing; a tie counts half.

    matched, unmatched: scores, such as each caption's highest similarity. Of a single score it is the share of
    captions that fit nothing above which it lies. ValueError if one side is empty or holds NaN.
    """
    matched, unmatched = _scores(matched, "matched"), _scores(unmatched, "unmatched")
    below = np.searchsorted(unmatched, matched, side="left") + np.searchsorted(unmatched, matched, side="right")
    return float(below.sum() / (2 * len(matched) * len(unmatched)))


def match_threshold(matched: Any, unmatched: Any) -> float:
    """The score from which on something matches: below it the answer is "nothing matches". For validation scores.

    It is the score that most separates the two: share of the matched at or above it, less share of the unmatched
    (Youden 1950); of several the lowest.
    """
    matched, unmatched = _scores(matched, "matched"), _scores(unmatched, "unmatched")
    candidates = np.unique(np.r_[matched, unmatched])
    missed, refused = (
        np.searchsorted(side, candidates, side="left") * n
        for side, n in ((matched, len(unmatched)), (unmatched, len(matched)))
    )
    return float(candidates[(refused - missed).argmax()])


def _scores(values: Any, name: str) -> np.ndarray:
    values = np.sort(np.ravel(np.asarray(values, dtype=np.float64)))
    if not len(values) or np.isnan(values[-1]):
        raise ValueError(f"{name}: there must be scores, and none of them NaN; found {len(values)} scores.")
    return values


def write_run(
    path: str | Path, similarity: Any, texts: Sequence[str], videos: Sequence[str], name: str, depth: int = 1000
) -> None:
    """Write a TREC run, whole or not at all: text, "Q0", video, place, score and the run's name, a line an item.

    texts, videos: ids of the rows and columns of `similarity`; for the other way give its `.T` and both exchanged.
    The first `depth` items of each text; scores in full, since a scorer orders by these and breaks ties its own way.
    ValueError for ids that are empty, hold white space or come twice, and for a number of them that does not fit.
    """
    similarity = checked(similarity)
    texts, videos = _ids(texts, "texts", similarity.shape[0]), _ids(videos, "videos", similarity.shape[1])
    _ids([name], "name of the run", 1)
    with whole(Path(path)) as temporary, temporary.open("w", encoding="utf-8") as file:
        for top in top_items(similarity, depth):
            top = top.assign(place=top.groupby("query").cumcount() + 1)
            for row in top[top["place"] <= depth].itertuples():
                file.write(f"{texts[row.query]} Q0 {videos[row.item]} {row.place} {float(row.score)!r} {name}\n")


def write_qrels(path: str | Path, texts: Sequence[str], videos: Sequence[str], relevance: Any = None) -> None:
    """Write what is relevant as TREC's qrels, whole or not at all: text, "0", video and grade, a line a pair.

    relevance: as of `retrieval_metrics`. The grade is 1 or, where relevance is graded, a percentage, since it must be
    a whole number: then trec_eval is told `-l 100`, so that only what fits in full counts as relevant.
    """
    texts, videos = _ids(texts, "texts", len(texts)), _ids(videos, "videos", len(videos))
    text, video, grade = relevant_pairs(relevance, (len(texts), len(videos)))
    grade = np.rint(grade * (100 if (grade < 1).any() else 1)).astype(int)
    pairs = zip(text, video, grade, strict=True)
    write_text(Path(path), "".join(f"{texts[t]} 0 {videos[v]} {g}\n" for t, v, g in pairs))


def _ids(ids: Sequence[str], name: str, count: int) -> list[str]:
    ids = [str(one) for one in ids]
    if len(ids) != count:
        raise ValueError(f"{name}: {len(ids):,} ids for {count:,} rows or columns.")
    if unfit := [one for one in ids if one.split() != [one]]:
        raise ValueError(f"{name}: {len(unfit):,} ids are empty or hold white space, the first is {unfit[0]!r}.")
    if len(set(ids)) < len(ids):
        raise ValueError(f"{name}: ids come twice, such as {Counter(ids).most_common(1)[0][0]!r}.")
    return ids
