"""Retrieval: every number against loops that follow the definition, and blocks against the whole matrix."""

import itertools
import math
import tracemalloc
from collections import Counter
from statistics import fmean, median

import numpy as np
import pytest
from scipy import sparse, stats

from helpers.scoring import Cosines, bootstrap_interval, retrieval_metrics, retrieval_ranks, retrieval_table
from helpers.scoring.retrieval_tables import (
    centre_columns,
    dual_softmax,
    hubness,
    match_auroc,
    match_threshold,
    query_bank,
    write_qrels,
    write_run,
)

# ---------------------------------------------------------------- the definitions, as loops


def looped(similarity, grades) -> dict[str, dict[str, float]]:
    """Ranks and metrics by the definition, one comparison at a time; relevant is what has grade 1."""
    found = {}
    for way, turned in (("text_to_video", False), ("video_to_text", True)):
        s, g = (np.asarray(matrix, np.float64) for matrix in (similarity, grades))
        ranks, precisions, skipped = [], [], 0
        for scores, relevant in zip((s.T if turned else s).tolist(), (g.T if turned else g).tolist(), strict=True):
            pairs = list(zip(scores, relevant, strict=True))
            positives = sorted((score for score, grade in pairs if grade == 1), reverse=True)
            others = [score for score, grade in pairs if grade != 1]
            if not positives:
                skipped += 1
                continue
            places = []
            for k, score in enumerate(positives, 1):
                place = float(k)
                for other in others:
                    place += 1.0 if other > score else 0.5 if other == score else 0.0
                places.append(place)
            ranks.append(places[0])
            precisions.append(sum(k / place for k, place in enumerate(places, 1)) / len(places))
        found[way] = {f"R@{k}": fmean(rank <= k for rank in ranks) for k in (1, 2, 5, 10)}
        found[way] |= {"MRR": fmean(1 / rank for rank in ranks), "MAP": fmean(precisions)}
        found[way] |= {"MdR": median(ranks), "MnR": fmean(ranks), "queries": len(ranks), "skipped": skipped}
    return found


def same(found, expected, but=()):
    assert found.keys() == expected.keys() == {"text_to_video", "video_to_text"}
    for way, values in expected.items():
        left = {name: value for name, value in found[way].items() if name not in but}
        assert left == pytest.approx(values, abs=1e-12)


def drawn(texts, videos, seed=0, kind="random"):
    rng = np.random.default_rng(seed)
    similarity = rng.normal(size=(texts, videos))
    return {
        "random": similarity,
        "tied": np.round(similarity),
        "constant": np.full_like(similarity, 0.3),
        "float16": similarity.astype(np.float16),
        "whole numbers": np.round(3 * similarity).astype(int),
        "infinite": np.where(similarity < 0.5, -np.inf, similarity),
    }[kind]


KINDS = ["random", "tied", "constant", "float16", "whole numbers", "infinite"]


@pytest.mark.parametrize("kind", KINDS)
def test_one_video_a_text(kind):
    similarity = drawn(37, 37, kind=kind)
    same(retrieval_metrics(similarity), looped(similarity, np.eye(37)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [5, 1024])
def test_many_captions_a_video_and_some_without_one(monkeypatch, kind, side):
    """60 texts of 23 videos, in tiles of 5 too; texts without a video and videos without a text are skipped."""
    monkeypatch.setattr("helpers.scoring.retrieval.SIDE", side)
    similarity = drawn(60, 23, 1, kind)
    owner = np.random.default_rng(2).integers(-1, 20, 60)
    expected = looped(similarity, owner[:, None] == np.arange(23))
    assert expected["text_to_video"]["skipped"] and expected["video_to_text"]["skipped"]
    same(retrieval_metrics(similarity, owner), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [5, 1024])
def test_relevance_of_any_form(monkeypatch, kind, side):
    """A caption that fits several videos: as booleans, numbers, or sparse with a pair that is named twice."""
    monkeypatch.setattr("helpers.scoring.retrieval.SIDE", side)
    similarity = drawn(31, 44, 3, kind)
    relevant = np.random.default_rng(4).random((31, 44)) < 0.15
    expected = looped(similarity, relevant)
    for form in (relevant, relevant.astype(np.float32), relevant.tolist(), sparse.csr_matrix(relevant)):
        same(retrieval_metrics(similarity, form), expected)
    text, video = np.nonzero(relevant)
    twice = sparse.coo_array((np.full(2 * len(text), 0.5), (np.tile(text, 2), np.tile(video, 2))), relevant.shape)
    same(retrieval_metrics(similarity, twice), expected)


def test_with_one_relevant_item_map_is_mrr():
    for kind in KINDS:
        for values in retrieval_metrics(drawn(83, 83, 5, kind)).values():
            assert abs(values["MAP"] - values["MRR"]) <= 1e-12


@pytest.mark.parametrize(("number", "relevant"), [(100, 1), (7, 1), (12, 3), (3, 1)])
def test_a_constant_scorer_gets_what_its_ties_deserve(number, relevant):
    """The k-th of c relevant items among N that all tie has rank k + (N - c) / 2."""
    grades = sparse.csr_matrix(sum(np.roll(np.eye(number), shift, axis=1) for shift in range(relevant)))
    places = [k + (number - relevant) / 2 for k in range(1, relevant + 1)]
    expected = {f"R@{k}": float(places[0] <= k) for k in (1, 2, 5, 10)}
    expected |= {"MRR": 1 / places[0], "MAP": fmean(k / place for k, place in enumerate(places, 1))}
    expected |= {"MdR": places[0], "MnR": places[0], "queries": number, "skipped": 0}
    for values in retrieval_metrics(np.zeros((number, number)), grades).values():
        assert values == pytest.approx(expected, abs=1e-12)
    worst = retrieval_ranks(np.zeros((number, number)), grades)["text_to_video"]["worst"]
    assert (worst == 1 + number - relevant).all()


def test_nothing_relevant_gives_no_number():
    for values in retrieval_metrics(np.ones((2, 3)), [-1, -1]).values():
        assert math.isnan(values["MRR"]) and math.isnan(values["MdR"]) and values["queries"] == 0
    assert values["skipped"] == 3


def test_ndcg_is_its_mean_over_all_orders_of_ties(monkeypatch):
    """Depth 3 of 5 items, all 120 orders of them: those that sort the scores count, whatever they do with ties."""
    monkeypatch.setattr("helpers.scoring.retrieval.DEPTH", 3)
    rng = np.random.default_rng(6)
    similarity, grades = rng.integers(0, 3, (9, 5)), rng.integers(0, 4, (9, 5)) / 3
    grades[:2] = [[0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]
    expected = []
    for scores, gains in zip(similarity.tolist(), grades.tolist(), strict=True):
        ideal = sum(gain / math.log2(place + 2) for place, gain in enumerate(sorted(gains, reverse=True)[:3]))
        orders = [
            sum(gains[item] / math.log2(place + 2) for place, item in enumerate(order[:3]))
            for order in itertools.permutations(range(5))
            if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
        ]
        expected.append(fmean(orders) / ideal if 1 in gains else math.nan)
    metrics = retrieval_metrics(similarity, grades)
    same(metrics, looped(similarity, grades), but=["nDCG@3"])
    assert retrieval_ranks(similarity, grades)["text_to_video"]["ndcg"].tolist() == pytest.approx(expected, nan_ok=True)
    assert metrics["text_to_video"]["nDCG@3"] == pytest.approx(np.nanmean(expected), abs=1e-12)
    assert retrieval_metrics(similarity.T, grades.T)["text_to_video"] == metrics["video_to_text"]
    assert "nDCG@3" not in retrieval_metrics(similarity, grades == 1)["text_to_video"]


def test_ndcg_of_a_list_by_hand():
    """Grades 1, 1/2, 1 and 0 found in this order, of which 1, 1, 1/2 is the best."""
    found = retrieval_metrics([[4.0, 3.0, 2.0, 1.0]], [[1, 0.5, 1, 0]])["text_to_video"]["nDCG@10"]
    assert found == pytest.approx((1 + 0.5 / math.log2(3) + 1 / 2) / (1 + 1 / math.log2(3) + 0.5 / 2))


# ---------------------------------------------------------------- embeddings


def normalised(vectors):
    vectors = np.asarray(vectors, np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def embeddings(texts, videos, size, seed=0):
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(videos, size))
    owner = rng.integers(0, videos, texts)
    return base[owner] + rng.normal(size=(texts, size)), base, owner


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("side", [16, 1024])
def test_blocks_are_the_whole_matrix(monkeypatch, dtype, side):
    for room in ("retrieval", "cosines"):
        monkeypatch.setattr(f"helpers.scoring.{room}.SIDE", side)
    texts, videos, owner = embeddings(90, 41, 24)
    texts, videos = texts.astype(dtype), (1000 * videos).astype(dtype)
    matrix = normalised(texts) @ normalised(videos).T
    cosines = Cosines(texts, videos)
    assert cosines[:, :] == pytest.approx(matrix, abs=5e-8)
    assert (cosines.T[:, :] == cosines[:, :].T).all()
    assert np.abs(cosines.rough(slice(3, 80), slice(2, 40)) - matrix[3:80, 2:40]).max() < cosines.margin < 1e-5
    same(retrieval_metrics(cosines, owner), looped(matrix, owner[:, None] == np.arange(41)))
    grades = np.random.default_rng(1).integers(0, 4, matrix.shape) / 3
    for way, values in retrieval_metrics(cosines, grades).items():
        assert values == pytest.approx(retrieval_metrics(matrix, grades)[way], abs=1e-12)
    assert hubness(cosines) == pytest.approx(hubness(matrix))


@pytest.mark.parametrize("others", [3000, 0])
def test_what_float32_cannot_tell_apart_is_told_apart(others):
    """Videos 1.4e-7 apart as texts see them, among others (decided one by one) or alone (decided as a block)."""
    rng = np.random.default_rng(7)
    along, aside = np.linalg.qr(rng.normal(size=(512, 2)))[0].T
    steps = rng.permutation(40)
    videos = np.concatenate([along + 2e-7 * steps[:, None] * aside, rng.normal(size=(others, 512))])
    texts = np.outer(rng.uniform(1, 9, 40), along + aside)  # the further aside the more alike
    far = rng.normal(size=(200, 512))  # without which all texts would be alike
    for cosines, way in (
        (Cosines(np.concatenate([texts, far]), np.concatenate([videos, far])), "text_to_video"),
        (Cosines(np.concatenate([videos, far]), np.concatenate([texts, far])), "video_to_text"),
    ):
        assert cosines.margin > 1.4e-7 * 40
        relevance = np.zeros(cosines.shape)
        relevance[range(40), range(40)] = 1
        assert retrieval_ranks(cosines, relevance)[way]["rank"][:40].tolist() == (40 - steps).tolist()
    hubs = hubness(Cosines(texts, videos, allow_alike=True))  # every text finds the ten that are furthest aside
    assert (hubs["never"], hubs["worst_found"], steps[hubs["worst"]] >= 30) == (30 + others, 40, True)


def test_a_block_may_be_off_by_its_margin(monkeypatch):
    """Noise as large as a margin of 0.2 on every block changes no rank, no nDCG and no hub."""
    texts, videos, owner = embeddings(60, 40, 24, 19)
    grades = np.random.default_rng(1).integers(0, 4, (60, 40)) / 3
    calm, noisy = Cosines(texts, videos), Cosines(texts, videos)
    expected = retrieval_metrics(calm, owner), retrieval_metrics(calm, grades), hubness(calm, 3)
    noisy.margin, noise = 0.2, np.random.default_rng(2)

    def rough(self, rows, columns):
        block = self[rows, columns]
        return (block + noise.uniform(-0.199, 0.199, block.shape)).astype(np.float32)

    monkeypatch.setattr(Cosines, "rough", rough)
    assert (retrieval_metrics(noisy, owner), retrieval_metrics(noisy, grades), hubness(noisy, 3)) == expected


def test_equal_embeddings_tie_wherever_they_stand(monkeypatch):
    """Every text twice and every video thrice, one of them longer: each rank is the middle of its ties, in any tile."""
    rng = np.random.default_rng(8)
    videos, texts = rng.normal(size=(50, 100)), rng.normal(size=(50, 100))
    once = normalised(texts) @ normalised(videos).T
    thrice, twice = np.concatenate([videos, 3.7 * videos, videos]), np.concatenate([texts, texts])
    expected = looped(np.tile(once, (2, 3)), np.tile(np.eye(50), (2, 3)))
    for side in (13, 64, 1024):
        for room in ("retrieval", "cosines"):
            monkeypatch.setattr(f"helpers.scoring.{room}.SIDE", side)
        for dtype in (np.float32, np.float64):
            cosines = Cosines(twice.astype(dtype), thrice.astype(dtype))
            same(retrieval_metrics(cosines, np.tile(np.eye(50), (2, 3))), expected)
    own = retrieval_ranks(cosines, np.tile(np.arange(50), 2))["text_to_video"]
    assert (own["worst"] - own["rank"] == 1).all()  # the two copies of the own video tie with it


def test_a_constant_token_is_at_chance():
    """What the first token of every text gives: each video is at some rank, the same for all; both ways by formula."""
    videos = np.random.default_rng(3).normal(size=(200, 32))
    found = retrieval_metrics(Cosines(np.ones((200, 32), np.float32), videos, allow_alike=True))
    assert found["text_to_video"]["MRR"] == pytest.approx(sum(1 / rank for rank in range(1, 201)) / 200)
    assert found["text_to_video"]["MdR"] == found["video_to_text"]["MdR"] == 100.5
    assert found["video_to_text"]["MRR"] == pytest.approx(1 / 100.5)


def test_memory_does_not_grow_with_the_matrix():
    """6,000 x 6,000 are 144 MB of float32; a tile of 1,024 x 1,024 is 4, and a few of its kind are held."""
    rng = np.random.default_rng(9)
    texts, videos = rng.normal(size=(2, 6000, 8)).astype(np.float32)
    tracemalloc.start()
    retrieval_metrics(Cosines(texts, videos))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6


VECTORS = np.random.default_rng(0).normal(size=(6, 4))


def broken(row, value):
    vectors = VECTORS.copy()
    vectors[row] = value
    return vectors


@pytest.mark.parametrize(
    ("texts", "videos", "told"),
    [
        (broken(2, [1, math.nan, 0, 0]), VECTORS, "1 of 6 texts hold NaN.* first is row 2"),
        (VECTORS, broken(slice(1, 3), math.inf), "2 of 6 videos hold NaN, infinity.* first is row 1"),
        (VECTORS, broken(5, 0), "1 of 6 videos have a norm of zero.* first is row 5"),
        (VECTORS, VECTORS[:, :3], "texts have 4 numbers each and videos 3"),
        ([[1, 2], [1, 2, 3]], VECTORS, r"texts have embeddings of several shapes: \[\(2,\), \(3,\)\]"),
        (VECTORS[0], VECTORS, r"texts must be .*shape \(4,\)"),
        (VECTORS, VECTORS[:0], r"videos must be .*shape \(0, 4\)"),
        (VECTORS, 1 + 1e-3 * VECTORS, "videos have a mean cosine of 1.0.* are the weights loaded"),
        (np.ones((3, 4)), VECTORS, "texts have a mean cosine of 1.0.* are the weights loaded"),
    ],
)
def test_embeddings_that_cannot_be_compared(texts, videos, told):
    with pytest.raises(ValueError, match=told):
        Cosines(texts, videos)


def test_alike_is_judged_by_the_mean_over_pairs():
    """Mean cosine of other vectors, by loops, on both sides of 0.999."""
    for spread, refused in ((0.02, True), (0.05, False)):
        vectors = 1 + spread * np.random.default_rng(1).normal(size=(20, 16))
        unit = normalised(vectors)
        mean = fmean(float(a @ b) for a, b in itertools.permutations(unit, 2))
        assert (mean > 0.999) == refused
        if refused:
            with pytest.raises(ValueError, match=f"{mean:.6f}"):
                Cosines(vectors, VECTORS)
        else:
            assert Cosines(vectors, vectors).shape == (20, 20)


@pytest.mark.parametrize(
    ("similarity", "relevance", "told"),
    [
        ([[1.0, math.nan], [math.nan, 0]], None, "2 NaN, the first at text 0, video 1"),
        (np.ones((3, 5)), None, "3 texts and 5 videos: without `relevance`"),
        (np.ones(3), None, r"shape \(3,\)"),
        (np.ones((0, 3)), None, r"shape \(0, 3\)"),
        ([["a"]], None, "matrix of numbers"),
        (np.ones((2, 2)), np.ones((2, 3)), r"relevance has shape \(2, 3\), similarity \(2, 2\)"),
        (np.ones((2, 2)), sparse.csr_matrix(np.ones((3, 2))), r"relevance has shape \(3, 2\)"),
        (np.ones((2, 2)), [0.0, 1.0], r"relevance has shape \(2,\)"),
        (np.ones((2, 2)), [0, 2], "text 1 belongs to video 2, and there are 2"),
        (np.ones((2, 2)), [0, -2], "text 1 belongs to video -2"),
        (np.ones((2, 2)), [[0, 1], [3, 0]], "relevance is 3.0 at text 1, video 0"),
        (np.ones((2, 2)), [[0, math.nan], [1, 0]], "relevance is nan at text 0, video 1"),
    ],
)
def test_what_cannot_be_ranked_is_said(similarity, relevance, told):
    with pytest.raises(ValueError, match=told):
        retrieval_metrics(similarity, relevance)


# ---------------------------------------------------------------- intervals


def test_intervals_draw_videos_with_all_their_captions():
    """Against drawing one video at a time and pooling its captions, mean and median."""
    similarity, owner = drawn(40, 9, 10, "tied"), np.random.default_rng(11).integers(0, 8, 40)
    ranks = retrieval_ranks(similarity, owner)
    names = np.array([f"v{number}" for number in owner])
    table = retrieval_table(ranks, names, 300, 12).set_index(["way", "metric"])
    rank = ranks["text_to_video"]["rank"]
    draws, known = np.random.default_rng(12), sorted(set(names))
    pooled = [
        np.concatenate([rank[names == known[k]] for k in draws.integers(0, len(known), len(known))]) for _ in range(300)
    ]
    for metric, statistic in (
        ("R@2", lambda one: np.mean(one <= 2)),
        ("MRR", lambda one: np.mean(1 / one)),
        ("MnR", np.mean),
        ("MdR", np.median),
    ):
        row = table.loc["text_to_video", metric]
        assert row["value"] == pytest.approx(statistic(rank))
        low, high = np.quantile([statistic(one) for one in pooled], [0.025, 0.975])
        assert (row["low"], row["high"]) == pytest.approx((low, high))
        assert (row["n"], row["videos"]) == (40, len(known))
        assert row["ties_lost"] == pytest.approx(statistic(ranks["text_to_video"]["worst"]))
    assert table.loc["video_to_text", "MRR"][["n", "videos"]].tolist() == [len(known), len(known)]
    with pytest.raises(ValueError, match="9 videos for 40 texts"):
        retrieval_table(ranks, np.arange(9), 10, 0)


def test_the_median_of_a_resample_is_that_of_its_pooled_values():
    """One resample at a time, so that both ends are its median: of values counted many times or not at all."""
    values, clusters = np.random.default_rng(20).random(11), np.arange(11) // 2
    for seed in range(20):
        drawn_clusters = np.random.default_rng(seed).integers(0, 6, 6)
        pooled = np.concatenate([values[clusters == k] for k in drawn_clusters])
        found = bootstrap_interval(values, clusters, 1, seed, statistic="median")
        assert found == pytest.approx((np.median(pooled), np.median(pooled)), abs=1e-12)


# ---------------------------------------------------------------- hubs and scores that were corrected


def test_hubs_by_hand_and_ties_share_the_last_places():
    rng = np.random.default_rng(13)
    similarity = np.round(rng.normal(size=(50, 30)) + 2 * rng.normal(size=30))  # some videos are found often
    found = Counter()
    for scores in similarity.tolist():
        for item, score in enumerate(scores):
            above, equal = sum(other > score for other in scores), scores.count(score)
            found[item] += min(max(4 - above, 0), equal) / equal
    occurrences = [found[item] for item in range(30)]
    assert sum(occurrences) == pytest.approx(4 * 50)
    hubs = hubness(similarity, 4)
    assert hubs["skew"] == pytest.approx(stats.skew(occurrences)) and hubs["skew"] > 0.5
    assert hubs["never"] == occurrences.count(0) > 0
    assert hubs["worst"] == np.argmax(occurrences) and hubs["worst_found"] == pytest.approx(max(occurrences))
    assert hubs["queries"] == 50


def test_without_preference_there_is_no_hub():
    even = {"skew": 0, "never": 0, "worst": 0, "queries": 7}
    assert hubness(np.ones((7, 30))) == even | {"worst_found": pytest.approx(7 / 3)}
    assert hubness(np.random.default_rng(0).random((7, 4))) == even | {"worst_found": 7}  # fewer videos than 10


def test_corrections_follow_their_formulas():
    rng = np.random.default_rng(14)
    similarity, bank, temperature = rng.normal(size=(6, 5)), rng.normal(size=(9, 5)), 0.7
    dual, inverted = dual_softmax(similarity, temperature), query_bank(similarity, bank, temperature)
    for i, j in itertools.product(range(6), range(5)):
        own = math.exp(similarity[i, j] / temperature)
        over_videos = own / sum(math.exp(similarity[i, b] / temperature) for b in range(5))
        over_texts = own / sum(math.exp(similarity[a, j] / temperature) for a in range(6))
        assert dual[i, j] == pytest.approx(math.log(over_videos * over_texts))
        over_bank = own / sum(math.exp(bank[a, j] / temperature) for a in range(9))
        assert inverted[i, j] == pytest.approx(math.log(over_bank))
        assert centre_columns(similarity)[i, j] == pytest.approx(similarity[i, j] - fmean(similarity[:, j]))
    steep = dual_softmax(similarity, 1e-4)  # where the product itself would be 0 nearly everywhere
    assert np.isfinite(steep).all() and len(np.unique(steep)) == 30
    with pytest.raises(ValueError, match="bank scores 4 videos, similarity has 5"):
        query_bank(similarity, bank[:, :4])


def test_a_correction_undoes_a_hub():
    """A video whose scores are all higher is every text's first, until its mean is taken off."""
    similarity = np.eye(20) + 0.02 * np.random.default_rng(15).normal(size=(20, 20))
    similarity[:, 3] += 1.5
    assert retrieval_metrics(similarity)["text_to_video"]["R@1"] == 0.05
    bank = 0.02 * np.random.default_rng(16).normal(size=(40, 20)) + [1.5 * (video == 3) for video in range(20)]
    for corrected in (dual_softmax(similarity, 0.1), query_bank(similarity, bank, 0.1), centre_columns(similarity)):
        assert retrieval_metrics(corrected)["text_to_video"]["R@1"] == 1


# ---------------------------------------------------------------- nothing matches


def test_auroc_and_threshold_against_all_pairs():
    rng = np.random.default_rng(17)
    for decimals in (0, 1, 8):
        matched = np.round(rng.normal(1, 1, 60), decimals)
        unmatched = np.round(rng.normal(0, 1, 35), decimals)
        pairs = [(a > b) + 0.5 * (a == b) for a in matched for b in unmatched]
        assert match_auroc(matched, unmatched) == pytest.approx(fmean(pairs), abs=1e-12)
        best = match_threshold(matched, unmatched)

        def separated(limit, matched=matched, unmatched=unmatched):
            return fmean(matched >= limit) - fmean(unmatched >= limit)

        candidates = sorted({*matched.tolist(), *unmatched.tolist()})
        assert separated(best) == pytest.approx(max(map(separated, candidates)))
        assert all(separated(lower) < separated(best) - 1e-12 for lower in candidates if lower < best)
    assert match_auroc([1, 1, 1], [1, 1]) == 0.5 and match_auroc([2, 3], [1]) == 1 and match_auroc(0, [1, 2]) == 0
    assert match_auroc(0.5, [0.1, 0.5, 0.7, 0.2]) == pytest.approx(2.5 / 4)
    assert match_threshold([2, 3], [0, 1]) == 2


@pytest.mark.parametrize("function", [match_auroc, match_threshold])
@pytest.mark.parametrize(("matched", "unmatched", "told"), [([], [1], "^matched"), ([1], [2, math.nan], "^unmatched")])
def test_scores_that_decide_nothing(function, matched, unmatched, told):
    with pytest.raises(ValueError, match=told):
        function(matched, unmatched)


# ---------------------------------------------------------------- TREC's files


def test_the_files_hold_what_trec_eval_reads(tmp_path):
    similarity = np.array([[0.25, 0.5, 0.125], [1 / 3, -1.0, 2.0]])
    write_run(tmp_path / "run", similarity, ["t1", "t2"], ["v1", "v2", "v3"], "ours", depth=2)
    assert (tmp_path / "run").read_text().splitlines() == [
        "t1 Q0 v2 1 0.5 ours",
        "t1 Q0 v1 2 0.25 ours",
        "t2 Q0 v3 1 2.0 ours",
        "t2 Q0 v1 2 0.3333333333333333 ours",
    ]
    write_qrels(tmp_path / "qrels", ["t1", "t2"], ["v1", "v2", "v3"], [2, -1])
    assert (tmp_path / "qrels").read_text() == "t1 0 v3 1\n"
    write_qrels(tmp_path / "qrels", ["t1", "t2"], ["v1", "v2", "v3"], [[0, 1, 1 / 3], [0.004, 0, 0.5]])
    assert (tmp_path / "qrels").read_text() == "t1 0 v2 100\nt1 0 v3 33\nt2 0 v1 0\nt2 0 v3 50\n"


def test_others_score_the_files_alike(tmp_path):
    """Average precision from the two files alone, both ways, as TREC defines it: embeddings, many captions."""
    texts, videos, owner = embeddings(50, 12, 16, 18)
    cosines = Cosines(texts, videos)
    text_ids, video_ids = [f"t{n}" for n in range(50)], [f"v{n}" for n in range(12)]
    relevance = owner[:, None] == np.arange(12)
    for way, s, rows, columns, relevant in (
        ("text_to_video", cosines, text_ids, video_ids, relevance),
        ("video_to_text", cosines.T, video_ids, text_ids, relevance.T),
    ):
        write_run(tmp_path / "run", s, rows, columns, "x")
        write_qrels(tmp_path / "qrels", rows, columns, relevant)
        wanted = {(query, item) for query, _, item, _ in map(str.split, (tmp_path / "qrels").open())}
        lists = {}
        for query, _, item, _, score, _ in map(str.split, (tmp_path / "run").open()):
            lists.setdefault(query, []).append((float(score), item))
        precisions = []
        for query in {query for query, _ in wanted}:
            hits = [(query, item) in wanted for _, item in sorted(lists[query], reverse=True)]
            places = [place for place, hit in enumerate(hits, 1) if hit]
            precisions.append(fmean(k / place for k, place in enumerate(places, 1)))
        assert retrieval_metrics(cosines, owner)[way]["MAP"] == pytest.approx(fmean(precisions), abs=1e-12)


@pytest.mark.parametrize(
    ("ids", "name", "told"),
    [
        (["a", "b c"], "x", "texts: 1 ids are empty or hold white space, the first is 'b c'"),
        (["a", ""], "x", "texts: 1 ids are empty"),
        (["a", "a"], "x", "texts: ids come twice, such as 'a'"),
        (["a"], "x", "texts: 1 ids for 2"),
        (["a", "b"], "my run", "name of the run: 1 ids .* 'my run'"),
    ],
)
def test_ids_that_trec_eval_would_misread(tmp_path, ids, name, told):
    with pytest.raises(ValueError, match=told):
        write_run(tmp_path / "run", np.eye(2), ids, ["v1", "v2"], name)
    assert not list(tmp_path.iterdir())
