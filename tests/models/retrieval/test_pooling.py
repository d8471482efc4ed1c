"""Pooling and centring against loops over the tokens that a mask takes."""

import math

import numpy as np
import pytest
import torch

from helpers.models.retrieval.pooling import POOLINGS, centred, pool

MASKS = {
    "right padding": [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]],
    "left padding": [[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]],
    "holes": [[0, 1, 0, 1, 0], [1, 0, 1, 1, 1]],
    "none": [[1] * 5, [1] * 5],
}
BY_HAND = {
    "first": lambda column: column[0],
    "last": lambda column: column[-1],
    "max": max,
    "mean": lambda column: math.fsum(column) / len(column),
    "sum": math.fsum,
}


def hidden(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)) - 2).to(dtype)  # mostly negative


@pytest.mark.parametrize("rubbish", [0.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("how", BY_HAND)
def test_pooling_is_a_loop_over_the_tokens_that_count(how, masked, rubbish):
    mask = torch.tensor(MASKS[masked])
    values = hidden().masked_fill(mask[..., None] == 0, rubbish)
    rows = [[row[i] for i in range(5) if keep[i]] for row, keep in zip(values.tolist(), MASKS[masked], strict=True)]
    expected = [[BY_HAND[how]([token[d] for token in row]) for d in range(3)] for row in rows]
    torch.testing.assert_close(pool(values, mask, how), torch.tensor(expected))
    none = pool(values, mask, "none")
    assert [own.tolist() for own in none] == rows


def test_sum_and_mean_have_one_direction_and_half_precision_is_added_up_in_full():
    mask = torch.tensor(MASKS["right padding"])
    summed, mean = (pool(hidden(), mask, how) for how in ("sum", "mean"))
    torch.testing.assert_close(torch.cosine_similarity(summed, mean), torch.ones(2), atol=1e-6, rtol=0)
    large = torch.full((1, 100, 1), 1000.0, dtype=torch.float16)  # the sum is beyond half precision
    assert pool(large, torch.ones(1, 100), "sum").tolist() == [[100_000.0]]
    assert pool(large, torch.ones(1, 100), "mean").tolist() == [[1000.0]]


def test_what_cannot_be_pooled_is_refused():
    mask = torch.tensor([[1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    for how in POOLINGS:
        with pytest.raises(ValueError, match="row 1 has no vector"):
            pool(hidden(), mask, how)
    with pytest.raises(ValueError, match="'median'; it must be one of first, last"):
        pool(hidden(), mask, "median")
    with pytest.raises(ValueError, match=r"\[2, 5, 3\] and \[2, 4\]"):
        pool(hidden(), mask[:, :4], "mean")


def test_each_modality_is_centred_by_its_training_items_alone():
    rng = np.random.default_rng(0)
    training, test = rng.normal(3, 1, (7, 4)).astype(np.float32), rng.normal(3, 1, (5, 4)).astype(np.float32)
    expected = [[x - math.fsum(row[d] for row in training.tolist()) / 7 for d, x in enumerate(row)] for row in test]
    assert centred(test, training) == pytest.approx(np.array(expected), abs=1e-6)
    assert centred(test, training).dtype == np.float32
    for values, others in ((test, training[:, :3]), (test, training[:0]), (test[0], training)):
        with pytest.raises(ValueError, match="centred takes"):
            centred(values, others)
