"""The diagnosis of embeddings against loops over pairs and closed forms."""

import math
from itertools import combinations

import numpy as np
import pytest

from helpers.scoring.embeddings import effective_rank, mean_pairwise_cosine, modality_distance


def draw(count: int, dim: int = 6, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(0.4, 1, (count, dim)) * 3).astype(np.float32)


def cosine(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def test_mean_pairwise_cosine_is_a_loop_over_pairs():
    rows = draw(9).tolist()
    pairs = [cosine(a, b) for a, b in combinations(rows, 2)]
    assert mean_pairwise_cosine(draw(9)) == pytest.approx(math.fsum(pairs) / 36, abs=1e-12)
    assert mean_pairwise_cosine(np.eye(5)) == pytest.approx(0, abs=1e-15)
    assert mean_pairwise_cosine(np.outer([1, 5, 0.1], [3.0, 4.0])) == pytest.approx(1)
    assert mean_pairwise_cosine(np.array([[2.0, 0], [-7, 0]])) == pytest.approx(-1)


def test_effective_rank_of_known_spectra():
    turned = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0]
    assert effective_rank(5 * turned) == pytest.approx(8)
    assert effective_rank(np.outer(np.arange(1, 6), np.arange(1, 4))) == pytest.approx(1)
    for values in ([3.0, 1.0], [4.0, 2.0, 1.0, 1.0]):
        shares = [value / sum(values) for value in values]
        product = math.prod(share**-share for share in shares)  # exp of the entropy
        matrix = turned[:, : len(values)] * values @ turned[: len(values)]
        assert effective_rank(matrix) == pytest.approx(product)


def test_modality_distance_is_that_of_the_means_of_unit_vectors():
    videos, texts = draw(7), draw(4, seed=1)
    means = []
    for side in (videos.tolist(), texts.tolist()):
        unit = [[x / math.hypot(*row) for x in row] for row in side]
        means.append([math.fsum(row[d] for row in unit) / len(unit) for d in range(6)])
    assert modality_distance(videos, texts) == pytest.approx(math.dist(*means), abs=1e-12)
    assert modality_distance(videos, videos * 8) == pytest.approx(0, abs=1e-12)
    assert modality_distance([[2.0, 0]], [[-1.0, 0]]) == pytest.approx(2)


def test_embeddings_that_cannot_be_judged_are_refused_by_row():
    bad = draw(4)
    bad[2] = 0
    for judge in (mean_pairwise_cosine, effective_rank, lambda x: modality_distance(draw(3), x)):
        with pytest.raises(ValueError, match="1 of 4 embeddings hold only zeros, the first in row 2"):
            judge(bad)
        with pytest.raises(ValueError, match="hold NaN or infinity, the first in row 0"):
            judge(np.where(bad == 0, np.inf, np.nan))
        with pytest.raises(ValueError, match=r"\[N, D\]"):
            judge(bad[0])
    with pytest.raises(ValueError, match="at least 2"):
        mean_pairwise_cosine(bad[:1])
