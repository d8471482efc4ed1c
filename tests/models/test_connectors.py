"""Connectors: shapes, masks, and what they must not depend on."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.models.connectors import build_connector, video_tokens

KINDS = ["mlp", "qformer"]


def config(kind: str, output_scale: str = "fixed", heads: int = 4) -> SimpleNamespace:
    return SimpleNamespace(kind=kind, hidden=24, queries=5, heads=heads, output_scale=output_scale)


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([16, 1, 7, 0])
    frames, tokens = (torch.randn(4, 16, 12, generator=generator) for _ in range(2))
    return frames, tokens, torch.randn(4, 12, generator=generator), torch.arange(16) < lengths[:, None]


@pytest.mark.parametrize(("kind", "counts"), [("mlp", [17, 2, 8, 0]), ("qformer", [5, 5, 5, 0])])
def test_tokens_and_masks(kind, counts):
    torch.manual_seed(0)
    tokens, mask = build_connector(config(kind), 12, 20)(*inputs())
    assert tokens.shape == (4, mask.shape[1], 20)
    assert mask.sum(1).tolist() == counts
    assert torch.isfinite(tokens).all()


def test_video_tokens_of_mlp_and_qformer():
    frames = np.array([1, 16, 17, 48])
    assert video_tokens(config("mlp"), frames).tolist() == [2, 17, 19, 51]
    assert video_tokens(config("qformer"), frames).tolist() == [5, 5, 10, 15]


@pytest.mark.parametrize("kind", KINDS)
def test_masked_frames_change_no_valid_token(kind):
    torch.manual_seed(0)
    connector = build_connector(config(kind), 12, 20)
    frames, mit_tokens, pooled, mask = inputs()
    noise = torch.randn_like(frames) * 50
    tokens, token_mask = connector(frames, mit_tokens, pooled, mask)
    keep = mask[..., None]
    noisy, _ = connector(torch.where(keep, frames, noise), torch.where(keep, mit_tokens, noise), pooled, mask)
    assert torch.equal(tokens[token_mask], noisy[token_mask])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["frames", "mit_tokens", "pooled"])
def test_every_input_matters(kind, which):
    torch.manual_seed(0)
    connector = build_connector(config(kind), 12, 20)
    arguments = list(inputs())
    before, mask = connector(*arguments)
    arguments[which] = torch.randn_like(arguments[which])
    after, _ = connector(*arguments)
    assert (before[mask] - after[mask]).abs().max() > 1e-3


def test_qformer_knows_the_order_of_frames():
    torch.manual_seed(0)
    connector = build_connector(config("qformer"), 12, 20)
    torch.nn.init.normal_(connector.positions)
    frames, mit_tokens, pooled, mask = inputs()
    forwards, _ = connector(frames[:1], mit_tokens[:1], pooled[:1], mask[:1])
    backwards, _ = connector(frames[:1].flip(1), mit_tokens[:1].flip(1), pooled[:1], mask[:1])
    assert (forwards - backwards).abs().max() > 1e-3


@torch.no_grad()
def test_qformer_is_torchs_decoder_of_learned_queries_over_the_frames_that_are_there():
    """Self-attention, cross-attention and feed-forward in two layers; no masked frame is in the memory at all."""
    torch.manual_seed(0)
    connector = build_connector(config("qformer"), 12, 20)
    for parameter in connector.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    frames, mit_tokens, pooled, mask = inputs()
    tokens, _ = connector(frames, mit_tokens, pooled, mask)
    for group, length in enumerate((16, 1, 7)):
        pair = [connector.frame_norm(frames[group, :length]), connector.mit_norm(mit_tokens[group, :length])]
        seen = connector.frame_input(torch.cat(pair, dim=-1)) + connector.positions[:length]
        whole = connector.group_input(connector.pooled_norm(pooled[group, None]))
        memory, queries = connector.memory_norm(torch.cat([seen, whole])), connector.queries
        for layer in connector.layers:
            queries = torchs_decoder_layer(layer)(queries[None], memory[None])[0]
        expected = connector.output_norm(connector.output(queries))
        torch.testing.assert_close(tokens[group], expected, atol=1e-5, rtol=1e-4)


def torchs_decoder_layer(layer: torch.nn.Module) -> torch.nn.TransformerDecoderLayer:
    """PyTorch's own decoder layer with the weights of a layer of 24 numbers and 4 heads."""
    other = torch.nn.TransformerDecoderLayer(24, 4, 96, 0.0, "gelu", batch_first=True, norm_first=True)
    for theirs, ours in ((other.self_attn, layer.self_attention), (other.multihead_attn, layer.cross_attention)):
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key_value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key_value.bias]))
        theirs.out_proj.load_state_dict(ours.output.state_dict())
    pairs = [(other.norm1, layer.self_norm), (other.norm2, layer.cross_norm), (other.norm3, layer.mlp_norm)]
    for theirs, ours in [*pairs, (other.linear1, layer.mlp[0]), (other.linear2, layer.mlp[2])]:
        theirs.load_state_dict(ours.state_dict())
    return other


@pytest.mark.parametrize("kind", KINDS)
def test_video_tokens_start_at_the_size_of_word_embeddings_either_way(kind):
    outputs = []
    for scale in ("fixed", "learned"):
        torch.manual_seed(0)
        connector = build_connector(config(kind, scale), 12, 20, output_rms=0.05)
        tokens, mask = connector(*inputs())
        assert tokens[mask].pow(2).mean().sqrt().item() == pytest.approx(0.05, rel=0.02)
        outputs.append(tokens)
        assert ("output_norm.rms" in connector.state_dict()) == (scale == "fixed")
        assert torch.equal(connector.output_norm.weight, torch.full((20,), 1.0 if scale == "fixed" else 0.05))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", ["fixed", "learned"])
def test_one_step_of_adam_moves_the_tokens_by_the_same_share_whatever_their_size(kind, scale):
    """Of the size of a 3B model's embeddings and of a tiny one's; a gain that starts at the size moves by another."""
    shares = []
    for rms in (0.02, 1.3):
        torch.manual_seed(0)
        connector = build_connector(config(kind, scale), 12, 20, output_rms=rms)
        optimizer = torch.optim.Adam(connector.parameters(), lr=2e-4, eps=1e-12)
        before, mask = connector(*inputs())
        wanted = torch.randn(20, generator=torch.Generator().manual_seed(1))
        (before[mask] @ wanted).sum().backward()
        optimizer.step()
        moved = (connector(*inputs())[0] - before)[mask]
        shares.append((moved.norm() / before[mask].norm()).item())
    assert shares[1] > 1e-3
    assert (shares[0] == pytest.approx(shares[1], rel=1e-3)) == (scale == "fixed")


def test_unknown_kind_and_impossible_heads_are_refused():
    with pytest.raises(ValueError, match="perceiver"):
        build_connector(config("perceiver"), 12, 20)
    with pytest.raises(ValueError, match="multiple"):
        build_connector(config("qformer", heads=5), 12, 20)
