"""Losses against loops over single pairs, with and without false negatives, and what a constant scorer gets."""

import math

import numpy as np
import pytest
import torch

from helpers.models.retrieval.losses import (
    MARGIN,
    RetrievalLoss,
    constant_loss,
    info_nce,
    margin_contrastive,
    mse,
    sigmoid,
)

RNG = np.random.default_rng(0)
S = RNG.uniform(-1, 1, size=(5, 5))
OWN = np.eye(5, dtype=bool)
COUNTED = np.ones((5, 5), dtype=bool)
COUNTED[0, 3] = COUNTED[2, 1] = COUNTED[4, 0] = False
PAIRS = [(i, j) for i in range(5) for j in range(5)]


@pytest.fixture(params=["all pairs", "false negatives left out"])
def counted(request):
    return np.ones((5, 5), dtype=bool) if request.param == "all pairs" else COUNTED


def tensors(*arrays):
    return [torch.tensor(array) for array in arrays]


def test_mse_and_margin_are_means_over_single_pairs(counted):
    kept = [(i, j) for i, j in PAIRS if counted[i, j]]
    squares = [(S[i, j] - (1.0 if i == j else 0.0)) ** 2 for i, j in kept]
    assert mse(*tensors(S, OWN, counted)).item() == pytest.approx(sum(squares) / len(kept), rel=1e-12)
    hinges = [1 - S[i, j] if i == j else max(0.0, S[i, j] - 0.3) for i, j in kept]
    assert margin_contrastive(*tensors(S, OWN, counted), margin=0.3).item() == pytest.approx(
        sum(hinges) / len(kept), rel=1e-12
    )


def test_margin_is_torchs_cosine_embedding_loss():
    x, y, sign = torch.randn(12, 6), torch.randn(12, 6), torch.tensor([1, -1] * 6)
    ours = margin_contrastive(torch.cosine_similarity(x, y), sign > 0, torch.ones(12, dtype=torch.bool))
    assert ours.item() == pytest.approx(torch.nn.CosineEmbeddingLoss(margin=MARGIN)(x, y, sign).item(), rel=1e-6)


def test_infonce_is_the_mean_cross_entropy_of_rows_and_columns(counted):
    scale, terms = 7.0, []
    for i in range(5):
        row = sum(math.exp(scale * S[i, j]) for j in range(5) if counted[i, j])
        column = sum(math.exp(scale * S[j, i]) for j in range(5) if counted[j, i])
        own = math.exp(scale * S[i, i])
        terms.append(-math.log(own / row) / 2 - math.log(own / column) / 2)
    assert info_nce(*tensors(S, OWN, counted), scale).item() == pytest.approx(sum(terms) / 5, rel=1e-12)


def test_sigmoid_is_siglips_sum_over_rows(counted):
    total = 0.0
    for i, j in PAIRS:
        if counted[i, j]:
            z = 1 if i == j else -1
            total -= math.log(1 / (1 + math.exp(z * (-3.0 * S[i, j] + 0.5))))
    assert sigmoid(*tensors(S, OWN, counted), 3.0, -0.5).item() == pytest.approx(total / 5, rel=1e-12)


@pytest.mark.parametrize("name", ["mse", "margin", "infonce", "sigmoid"])
def test_a_false_negative_has_no_gradient(name):
    similarity = torch.tensor(S, dtype=torch.float32, requires_grad=True)
    RetrievalLoss(name)(similarity, *tensors(OWN, COUNTED)).backward()
    assert (similarity.grad[~torch.tensor(COUNTED)] == 0).all()
    assert torch.isfinite(similarity.grad).all() and (similarity.grad.diagonal() < 0).all()


def test_temperature_and_bias_are_learnt_from_where_the_papers_start():
    clip, siglip = RetrievalLoss("infonce"), RetrievalLoss("sigmoid")
    assert clip.log_scale.exp().item() == pytest.approx(1 / 0.07)
    assert (siglip.log_scale.exp().item(), siglip.bias.item()) == (pytest.approx(10), -10)
    batch = tensors(S.astype(np.float32), OWN, COUNTED)
    assert clip(*batch).item() == pytest.approx(info_nce(*batch, 1 / 0.07).item(), rel=1e-5)
    assert siglip(*batch).item() == pytest.approx(sigmoid(*batch, 10.0, -10.0).item(), rel=1e-5)
    for loss in (clip, siglip):
        loss(*batch).backward()
        assert all(p.grad is not None and p.grad != 0 for p in loss.parameters())
    with torch.no_grad():
        clip.log_scale.fill_(9.0)
    assert clip(*batch).item() == pytest.approx(info_nce(*batch, 100.0).item(), rel=1e-5)
    assert not list(RetrievalLoss("mse").parameters()) + list(RetrievalLoss("margin").parameters())


def test_the_constant_predictions_loss_is_the_least_of_all_constants(counted):
    grid = np.linspace(-1, 1, 20001)
    own, mask = tensors(OWN, counted)
    lowest = {
        "mse": min(mse(torch.full((5, 5), c), own, mask).item() for c in grid[::20]),
        "margin": min(margin_contrastive(torch.full((5, 5), c), own, mask).item() for c in grid[::20]),
        "infonce": info_nce(torch.full((5, 5), 0.4), own, mask, 9.0).item(),
        "sigmoid": min(sigmoid(torch.zeros(5, 5), own, mask, 1.0, b).item() for b in np.linspace(-4, 4, 4001)),
    }
    for name, value in lowest.items():
        assert constant_loss(name, own, mask) == pytest.approx(value, rel=1e-4), name
    half = torch.tensor([True, False] * 16)
    assert constant_loss("mse", half, torch.ones_like(half)) == 0.25
