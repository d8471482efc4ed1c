"""Heads: what their towers compute, written out, and that padding and other rows change nothing."""

import numpy as np
import pytest
import torch

from helpers.config import RetrievalConfig
from helpers.models.retrieval.heads import RetrievalHead, Standardise


def config(**keys) -> RetrievalConfig:
    return RetrievalConfig(**({"dropout": 0.0, "heads": 2, "layers": 2} | keys))


def test_inputs_are_standardised_on_training_rows():
    rows = np.random.default_rng(0).normal(3, 5, size=(40, 4)).astype(np.float32)
    rows[:, 2] = 7.25  # never varies
    scale = Standardise(4)
    scale.fit(torch.from_numpy(rows))
    assert sorted(scale.state_dict()) == ["deviation", "mean"] and not list(scale.parameters())
    other = np.full((1, 4), 7.0, dtype=np.float32)
    for feature in range(4):
        column = [float(row[feature]) for row in rows]
        mean = sum(column) / len(column)
        deviation = (sum((value - mean) ** 2 for value in column) / len(column)) ** 0.5
        expected = (7.0 - mean) / (deviation if feature != 2 else 1.0)
        assert scale(torch.from_numpy(other))[0, feature].item() == pytest.approx(expected, rel=1e-5)


def test_hidden_layers_are_multiples_of_the_text_width_and_the_last_one_is_the_output():
    deep = RetrievalHead(config(widths=[1, 0.5, 0.25, 0.25, 0.125, 0.125]), 64, 24)
    linear = [m for m in deep.text_tower.layers if isinstance(m, torch.nn.Linear)]
    assert [m.out_features for m in linear] == [64, 32, 16, 16, 8, 8, 8] and linear[0].in_features == 64
    first = deep.video_tower.layers[0]
    assert (first.in_features, first.out_features) == (24, 64)
    only = RetrievalHead(config(head="linear", widths=[2]), 6, 4)
    assert [type(m).__name__ for m in only.text_tower.layers] == ["Linear"] and only.width == 12


@torch.no_grad()
def test_an_mlp_is_linear_relu_layernorm_and_an_output_of_unit_length():
    head = RetrievalHead.build(config(widths=[1]), 5, 3).eval()
    head.text_scale.fit(torch.randn(9, 5))
    x = torch.randn(2, 5)
    first, _, norm, _, last = head.text_tower.layers
    for row, got in zip(x, head.text(x), strict=True):
        row = (row - head.text_scale.mean) / head.text_scale.deviation
        hidden = [max(0.0, float(w @ row + b)) for w, b in zip(first.weight, first.bias, strict=True)]
        mean = sum(hidden) / 5
        spread = (sum((h - mean) ** 2 for h in hidden) / 5 + norm.eps) ** 0.5
        out = last.weight @ torch.tensor([(h - mean) / spread for h in hidden]) + last.bias
        assert torch.allclose(got, out / out.square().sum().sqrt(), atol=1e-6)


@torch.no_grad()
def test_a_transformer_reads_its_cls_and_no_padding():
    head = RetrievalHead.build(config(head="transformer"), 8, 8).eval()
    tokens = torch.randn(1, 3, 8)
    alone = head.text(tokens, torch.ones(1, 3, dtype=torch.bool))
    padded = torch.cat([tokens, torch.full((1, 2, 8), 1e3)], dim=1)
    mask = torch.tensor([[True, True, True, False, False]])
    assert torch.allclose(head.text(padded, mask), alone, atol=1e-6)
    assert not torch.allclose(head.text(padded, torch.ones_like(mask)), alone, atol=1e-2)
    assert torch.allclose(alone.norm(dim=-1), torch.ones(1))
    # the first layer's attention of the CLS, by hand: a softmax over itself and the tokens, head by head
    tower, layer = head.text_tower, head.text_tower.encoder.layers[0]
    x = torch.cat([tower.cls[None], tokens[0]])
    q, k, v = (x @ w.T + b for w, b in zip(layer.self_attn.in_proj_weight.split(8),
                                           layer.self_attn.in_proj_bias.split(8), strict=True))  # fmt: skip
    parts = []
    for own in (slice(0, 4), slice(4, 8)):
        weights = torch.tensor([float(q[0, own] @ k[j, own]) / 2 for j in range(4)]).exp()
        parts.append((weights / weights.sum()) @ v[:, own])
    x = layer.norm1(x[0] + layer.self_attn.out_proj(torch.cat(parts)))
    x = layer.norm2(x + layer.linear2(layer.linear1(x).relu()))
    whole = torch.cat([tower.cls[None], tokens[0]])[None]
    assert torch.allclose(layer(whole)[0, 0], x, atol=1e-5)


def test_weights_are_drawn_by_the_seed_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = RetrievalHead.build(config(), 4, 4).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    two, three = (RetrievalHead.build(config(seed=seed), 4, 4).state_dict() for seed in (0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["text_tower.layers.0.weight"], three["text_tower.layers.0.weight"])


def test_pooled_and_unpooled_input_are_told_apart():
    with pytest.raises(ValueError, match=r"takes pooled embeddings \[B, D\], got \[2, 3, 4\]"):
        RetrievalHead(config(), 4, 4).text(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"takes unpooled embeddings .*, got \[2, 4\]"):
        RetrievalHead(config(head="transformer"), 4, 4).video(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"retrieval.heads is 3: it must divide the embeddings' width, 8"):
        RetrievalHead(config(head="transformer", heads=3), 8, 8)
