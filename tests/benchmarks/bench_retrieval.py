"""Ranks of text-video retrieval from embeddings in blocks, against counting and sorting the whole matrix.

Run alone with `python -m tests.benchmarks.bench_retrieval`. The whole matrix is float32, as one would write it, and
ties in it are left to rounding; the blocks decide them exactly.
"""

import json
import statistics
import time
import tracemalloc

import numpy as np

from helpers.scoring import Cosines, retrieval_ranks

DIM, ROUNDS = 512, 3
GIB = 2**30


def make_embeddings(number: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Texts near their videos, but not nearest: float32 [number, dim] of each."""
    rng = np.random.default_rng(0)
    videos = rng.standard_normal((number, dim), dtype=np.float32)
    return videos + 3 * rng.standard_normal((number, dim), dtype=np.float32), videos


def whole_matrix(texts: np.ndarray, videos: np.ndarray) -> np.ndarray:
    """All cosines at once."""
    texts, videos = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (texts, videos))
    return texts @ videos.T


def counted(similarity: np.ndarray) -> list[np.ndarray]:
    """Middle ranks both ways, by comparing the whole matrix with its diagonal."""
    own, ranks = similarity.diagonal(), []
    for axis, mine in ((1, own[:, None]), (0, own[None])):
        above, equal = (np.count_nonzero(mask, axis=axis) for mask in (similarity > mine, similarity == mine))
        ranks.append(1 + above + 0.5 * (equal - 1))
    return ranks


def sorted_twice(similarity: np.ndarray) -> list[np.ndarray]:
    """Ranks both ways, by the place that each item has in the order of its row or column."""
    return [np.argsort(np.argsort(-way, axis=1), axis=1).diagonal() + 1 for way in (similarity, similarity.T)]


def in_blocks(texts: np.ndarray, videos: np.ndarray) -> list[np.ndarray]:
    """Middle ranks both ways, by the suite."""
    return [table["rank"].to_numpy() for table in retrieval_ranks(Cosines(texts, videos)).values()]


def speed(number: int, rounds: int) -> list[dict]:
    """Time the three ways in turn (sorting once, since it takes long); medians over the rounds."""
    texts, videos = make_embeddings(number, DIM)
    ways = {
        "counted": lambda: counted(whole_matrix(texts, videos)),
        "blocks": lambda: in_blocks(texts, videos),
        "sorted": lambda: sorted_twice(whole_matrix(texts, videos)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    in_blocks(texts[:1000], videos[:1000])  # warms up
    for turn in range(rounds):
        ranks = {}
        for name, way in ways.items():
            if name == "sorted" and turn:
                continue
            start = time.perf_counter()
            ranks[name] = way()
            seconds[name].append(time.perf_counter() - start)
        for name, found in ranks.items():  # rounding moves an item past a neighbour here and there
            apart = max(np.abs(a - b).max() for a, b in zip(found, ranks["blocks"], strict=True))
            if apart > 2:
                raise AssertionError(f"{name}: a rank differs by {apart} from that of the blocks")
    taken = {name: statistics.median(found) for name, found in seconds.items()}
    common = {
        "unit": "x time, higher is better",
        "seconds": {name: round(value, 2) for name, value in taken.items()},
        "setting": f"{number:,} texts and videos of {DIM} numbers, product included",
    }
    return [
        {
            "name": "retrieval ranks: counting over the whole matrix, over blocks",
            "ratio": round(taken["counted"] / taken["blocks"], 2),
            "aim": ">= 1",
            **common,
        },
        {
            "name": "retrieval ranks: sorting the whole matrix twice, over blocks",
            "ratio": round(taken["sorted"] / taken["blocks"], 1),
            "aim": ">= 5",
            **common,
        },
    ]


def memory(number: int, dim: int) -> dict:
    """What ranking holds beyond the embeddings, at its highest."""
    texts, videos = make_embeddings(number, dim)
    tracemalloc.start()
    start = time.perf_counter()
    in_blocks(texts, videos)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "name": f"memory to rank {number:,} x {number:,} beyond the embeddings, over 1 GiB",
        "ratio": round(peak / GIB, 3),
        "aim": "<= 1",
        "unit": "x bytes, lower is better",
        "megabytes": round(peak / 1e6),
        "whole_matrix_gigabytes": round(4 * number**2 / 1e9, 1),
        "seconds": round(time.perf_counter() - start),
        "setting": f"embeddings of {dim} numbers",
    }


def run(number: int = 10_000, many: int = 100_000, rounds: int = ROUNDS) -> list[dict]:
    """Speed at `number` texts and videos, memory at `many`."""
    return [*speed(number, rounds), memory(many, 128)]


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
