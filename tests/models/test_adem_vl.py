"""ADEM-VL against loops in float64, and what must hold whatever the weights are."""

import argparse
import copy
import json
import math
import os
import re
import shutil
from statistics import NormalDist

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
)

from helpers.models import adem_vl
from helpers.models.adem_vl.config import AdemVLConfig, AdemVLError, fit_scales
from helpers.models.adem_vl.model import AdemVL
from helpers.models.adem_vl.sequences import NORMALISATION, PromptTooLong, collate, encode

WIDTH, DIM, LAYERS, GRID = 24, 32, 3, 4
SCALES = (16, 4)
LLAMA = {
    "vocab_size": 96,
    "hidden_size": DIM,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 8 * GRID,
    "patch_size": 8,
}


def make_config(vision=None, **changes) -> AdemVLConfig:
    values = {"adapter_dim": 3, "projector_dim": 5, "scales": SCALES, "alpha": 0.5, "beta": 0.7, "drop_ratio": 0.25}
    return AdemVLConfig(LlamaConfig(**LLAMA), vision or CLIPVisionConfig(**VISION), **values | changes)


def make_model(seed: int = 0, vision=None, **changes) -> AdemVL:
    """A model in float64 and evaluation mode whose trained parts all matter: nothing is left at zero."""
    torch.manual_seed(seed)
    model = AdemVL(make_config(vision, **changes))
    with torch.no_grad():
        for name, tensor in model.adapter_tensors().items():
            if name != "thresholds":
                tensor.normal_(0, 0.4)
    return model.double().eval()


def make_batch(seed: int = 0, images=(True, False, True)) -> dict[str, torch.Tensor]:
    """Rows of 9 tokens, the CLS token at column 2 of those with an image; answers in the last two columns."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 96, (len(images), 9), generator=generator)
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "pixel_values": torch.randn(len(images), 3, 8 * GRID, 8 * GRID, generator=generator),
        "has_image": torch.tensor(images),
        "cls_position": torch.where(torch.tensor(images), 2, -1),
    }


def question(batch):
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


# ---- Size ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dim", "layers", "options", "count"),
    [
        (4096, 32, {}, 4_530_432),
        (4096, 32, {"use_cls": False, "scales": (256,)}, 3_346_560),
        (4096, 32, {"scales": (256,)}, 4_006_144),
        (5120, 40, {}, 5_449_984),
        (2048, 22, {}, 2_691_328),
        (4096, 32, {"learnable_threshold": True}, 4_530_432 + 32),
    ],
)
def test_trainable_parameters_are_the_published_number(dim, layers, options, count):
    llama = LlamaConfig(
        hidden_size=dim, num_hidden_layers=layers, num_attention_heads=dim // 128, intermediate_size=11008
    )
    clip = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
    )
    with torch.device("meta"):
        model = AdemVL(AdemVLConfig(llm_config=llama, vision_config=clip, **options))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    assert sum(t.numel() for t in model.adapter_tensors().values()) == count


def test_defaults_are_the_papers():
    config = AdemVLConfig(LlamaConfig(), CLIPVisionConfig(image_size=224, patch_size=14))
    assert (config.adapter_dim, config.projector_dim, config.scales) == (12, 128, (256, 64))
    assert (config.alpha, config.beta, config.drop_ratio, config.use_cls) == (0.1, 0.01, 0.1, True)
    assert (config.cross_attention, config.phi) == ("mlp_in_out", "silu")
    assert (config.grid, config.positions, config.dropped) == (16, 320, 32)


def test_initial_values_are_the_official_ones():
    torch.manual_seed(0)
    model = AdemVL(make_config(scales=(16,), projector_dim=64))
    assert not model.value_embedding.any() and model.key_embedding.std().item() == pytest.approx(0.02, rel=0.1)
    for adapter in model.clip_adapters:
        assert not adapter.up.weight.any() and adapter.down.bias is None
        assert 0 < adapter.down.weight.abs().max() <= 1 / math.sqrt(WIDTH)
    for layer in (model.projector.fc1, model.projector.fc2, model.cls_projector.fc1):
        bound = math.sqrt(6 / sum(layer.weight.shape))
        assert 0.9 * bound < layer.weight.abs().max() <= bound and not layer.bias.any()


# ---- Formulas by loops ---------------------------------------------------------------------------------------------


def silu(x):
    return x / (1 + math.exp(-x))


LOOP_PHI = {
    "silu": lambda row: [silu(x) for x in row],
    "identity": lambda row: list(row),
    "softmax": lambda row: [math.exp(x) / sum(math.exp(y) for y in row) for x in row],
    "relu": lambda row: [max(x, 0.0) for x in row],
    "elu": lambda row: [x if x > 0 else math.exp(x) - 1 for x in row],
    "silu_positive": lambda row: [silu(x) + 0.27846454276107 for x in row],
}


def loop_attention(queries, keys, values, phi, dropped):
    """X [S][D] of one sample: python lists, a sort for each text position. keys: before phi."""
    keys = [LOOP_PHI[phi](row) for row in keys]
    result = []
    for query in queries:
        query = LOOP_PHI[phi](query)
        scores = [sum(a * b for a, b in zip(query, key, strict=True)) for key in keys]
        bound = sorted(scores)[dropped]
        kept = [(score, value) for score, value in zip(scores, values, strict=True) if not dropped or score >= bound]
        result.append([sum(score * value[d] for score, value in kept) for d in range(len(query))])
    return result


def loop_projector(z, layers):
    for name, layer in layers:
        z = [sum(a * b for a, b in zip(row, z, strict=True)) + bias for row, bias in layer]
        z = [silu(x) for x in z] if name == "fc1" else z
    return z


def weights(projector):
    return [
        (name, list(zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)))
        for name, layer in (("fc1", projector.fc1), ("fc2", projector.fc2))
    ]


def loop_pool(patches, scales):
    """Patches [N][W] to [V][W]: means over square windows, row by row."""
    side, result = math.isqrt(len(patches)), []
    for scale in scales:
        target = math.isqrt(scale)
        window = side // target
        for row in range(target):
            for column in range(target):
                cells = [
                    patches[(row * window + i) * side + column * window + j]
                    for i in range(window)
                    for j in range(window)
                ]
                result.append([sum(cell[w] for cell in cells) / len(cells) for w in range(len(cells[0]))])
    return result


@torch.no_grad()
def reference_logits(model: AdemVL, batch) -> torch.Tensor:
    """Logits with the official arithmetic written out, on the stock modules of both base models."""
    config, llama = model.config, model.language_model.model
    with model._seeing(None, encoding=True):  # with the adapters, which have a test of their own
        hidden_states = model.vision_model(batch["pixel_values"].double(), output_hidden_states=True).hidden_states
    features = model._encoder.post_layernorm(hidden_states[-2])
    place, ask, add = config.cross_attention.split("_")
    logits = []
    for row, sees in enumerate(batch["has_image"].tolist()):
        embedded = [[0.0] * DIM for _ in range(config.positions)]
        ids = batch["input_ids"][row : row + 1]
        x = llama.embed_tokens(ids).clone()
        if sees:
            pooled = loop_pool(features[row, 1:].tolist(), config.scales)
            embedded = [[config.beta * v for v in loop_projector(z, weights(model.projector))] for z in pooled]
            if config.use_cls:
                cls = loop_projector(features[row, 0].tolist(), weights(model.cls_projector))
                x[0, batch["cls_position"][row]] = torch.tensor(cls)
        tables = model.key_embedding[0].tolist(), model.value_embedding[0].tolist()
        keys, values = (
            [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(embedded, table, strict=True)]
            for table in tables
        )

        def seen(query, keys=keys, values=values):
            found = loop_attention(query[0].tolist(), keys, values, config.phi, int(config.drop_ratio * len(keys)))
            return config.alpha * torch.tensor(found, dtype=torch.double)[None]

        def around(module, q, ask=ask, add=add, seen=seen):
            if (ask, add) == ("in", "in"):
                return module(q + seen(q))
            output = module(q)
            return output + seen(q if ask == "in" else output)

        length = ids.shape[1]
        rotary = llama.rotary_emb(x, position_ids=torch.arange(length)[None])
        mask = torch.full((length, length), -1e30, dtype=torch.double).triu(1)[None, None]
        for block in llama.layers:

            def attention(z, block=block, rotary=rotary, mask=mask):
                return block.self_attn(hidden_states=z, position_embeddings=rotary, attention_mask=mask)[0]

            q = block.input_layernorm(x)
            x = x + (around(attention, q) if place == "mhsa" else attention(q))
            q = block.post_attention_layernorm(x)
            x = x + (around(block.mlp, q) if place == "mlp" else block.mlp(q))
        logits.append(model.language_model.lm_head(llama.norm(x)))
    return torch.cat(logits)


@pytest.mark.parametrize("placement", adem_vl.PLACEMENTS)
def test_logits_equal_the_formula_at_every_placement(placement):
    model, batch = make_model(cross_attention=placement), make_batch()
    expected, found = reference_logits(model, batch), model(**question(batch))["logits"]
    # logits are returned in float32
    assert torch.allclose(found.double(), expected, rtol=1e-6, atol=1e-5)
    assert (expected - model.language_model(batch["input_ids"]).logits).abs().max() > 0.1


@pytest.mark.parametrize("phi", [name for name in LOOP_PHI if name != "silu"])
def test_logits_equal_the_formula_for_every_phi(phi):
    model, batch = make_model(phi=phi), make_batch(1, (True, False))
    found = model(**question(batch))["logits"].double()
    assert torch.allclose(found, reference_logits(model, batch), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"drop_ratio": 0.0}, {"drop_ratio": 0.9}, {"use_cls": False}, {"scales": (16,)}, {"scales": (4, 1, 16)}],
    ids=str,
)
def test_logits_equal_the_formula_for_other_sizes(options):
    model, batch = make_model(**options), make_batch(2, (True, False))
    found = model(**question(batch))["logits"].double()
    assert torch.allclose(found, reference_logits(model, batch), rtol=1e-6, atol=1e-5)


def test_all_phi_are_known_to_the_loops():
    assert set(adem_vl.PHI) == set(LOOP_PHI)


def test_pooling_takes_means_of_squares_row_by_row():
    patches = torch.randn(2, 36, 3, dtype=torch.double)
    found = adem_vl.pool_scales(patches, (9, 36, 1, 4))
    expected = torch.tensor([loop_pool(p, (9, 36, 1, 4)) for p in patches.tolist()], dtype=torch.double)
    assert found.shape == (2, 50, 3) and torch.allclose(found, expected, atol=1e-12)


def test_adapters_stand_beside_the_mlp():
    model = make_model()
    block, adapter = model._encoder.encoder.layers[0], model.clip_adapters[0]
    z = torch.randn(1, 2, WIDTH, dtype=torch.double)
    down, up = adapter.down.weight.tolist(), adapter.up.weight.tolist()
    plain = block.mlp(z)[0]
    with model._seeing(None, encoding=True):
        adapted = block.mlp(z)[0]
    for found, row in zip(adapted - plain, z[0].tolist(), strict=True):
        bottleneck = [sum(a * b for a, b in zip(w, row, strict=True)) for w in down]
        bottleneck = [0.5 * h * (1 + math.erf(h / math.sqrt(2))) for h in bottleneck]  # the exact GELU
        added = [0.1 * sum(a * b for a, b in zip(w, bottleneck, strict=True)) for w in up]
        assert found.tolist() == pytest.approx(added, abs=1e-12)


def test_adapter_dropout_is_a_tenth_and_in_training_only():
    adapter = adem_vl.ClipAdapter(1, 4000)
    torch.nn.init.ones_(adapter.down.weight)
    with torch.no_grad():
        adapter.up.weight.copy_(torch.eye(1, 4000).expand(1, -1) * 0 + 1)
    z = torch.ones(200, 1, 1)
    whole = adapter.eval()(z)
    assert torch.equal(whole, adapter(z))
    ratio = adapter.train()(z) / whole
    assert ratio.mean().item() == pytest.approx(1, abs=0.005)
    # the mean of 4000 units, each 0 or 1 / 0.9: variance 0.1 / 0.9 / 4000
    assert ratio.std().item() == pytest.approx(math.sqrt(0.1 / 0.9 / 4000), rel=0.2)


# ---- Adaptive fusion -----------------------------------------------------------------------------------------------


def test_fusion_drops_the_signed_smallest_of_each_row_and_keeps_ties():
    scores = torch.tensor([[3.0, -5.0, 0.5, -0.1], [1.0, 1.0, 1.0, 2.0], [-4.0, -3.0, -3.0, 9.0]])
    assert adem_vl.fuse(scores, 2).tolist() == [[3, 0, 0.5, 0], [1, 1, 1, 2], [0, -3, -3, 9]]
    assert adem_vl.fuse(scores, 0) is scores
    half = torch.randn(50, 20).half()  # coarse enough to have ties
    for row, fused in zip(half.tolist(), adem_vl.fuse(half, 5).tolist(), strict=True):
        bound = sorted(row)[5]
        assert fused == [x if x >= bound else 0 for x in row]


def test_fusion_is_a_constant_mask_to_the_gradient():
    scores = torch.randn(4, 10, requires_grad=True)
    weight = torch.randn(4, 10)
    (adem_vl.fuse(scores, 3) * weight).sum().backward()
    kept = (scores >= scores.sort(-1).values[:, 3:4]).float()
    assert torch.equal(scores.grad, weight * kept)


@pytest.fixture
def recorded(monkeypatch):
    """The scores behind adaptive fusion, block by block, of everything that runs."""
    found, fuse = [], adem_vl.fuse
    monkeypatch.setattr(adem_vl.model, "fuse", lambda *args: found.append(fuse(*args).detach().clone()) or found[-1])
    return found


def test_the_mask_is_the_same_in_training_and_evaluation(recorded):
    model, batch = make_model(), make_batch()
    for adapter in model.clip_adapters:  # their dropout would change the features
        torch.nn.init.zeros_(adapter.up.weight)
    model.eval()(**batch)
    model.train()(**batch)
    assert len(recorded) == 2 * LAYERS
    for evaluated, trained in zip(recorded[:LAYERS], recorded[LAYERS:], strict=True):
        assert evaluated.shape == (3, 9, 20) and torch.equal(evaluated, trained)
        assert ((evaluated == 0).sum(-1) == 5).all()  # int(0.25 * 20), for each text position
    assert not torch.equal(recorded[0] == 0, recorded[1] == 0)  # and chosen anew in each block


def test_nothing_is_sorted_and_keys_are_computed_once_a_forward(monkeypatch):
    model, batch, calls = make_model(), make_batch(), []
    monkeypatch.setitem(adem_vl.PHI, "silu", lambda x: calls.append(tuple(x.shape)) or torch.nn.functional.silu(x))
    for place in (torch, torch.Tensor):
        for name in ("sort", "argsort", "msort"):
            monkeypatch.setattr(place, name, lambda *_, **__: pytest.fail("sorted"))
    model(**question(batch))
    assert calls == [(3, 20, DIM)] + [(3, 9, DIM)] * LAYERS


def test_learnable_threshold_is_a_sigmoid_around_a_standardised_score():
    scores = torch.randn(3, 8, dtype=torch.double)
    found = adem_vl.fuse_softly(scores, torch.tensor(-0.3, dtype=torch.double))
    for row, fused in zip(scores.tolist(), found.tolist(), strict=True):
        mean = sum(row) / 8
        deviation = math.sqrt(sum((x - mean) ** 2 for x in row) / 8)
        gates = [1 / (1 + math.exp(-((x - mean) / deviation + 0.3) / 0.1)) for x in row]
        assert fused == pytest.approx([x * gate for x, gate in zip(row, gates, strict=True)], rel=1e-9)
    constant = torch.full((1, 5), 2.0, requires_grad=True)
    adem_vl.fuse_softly(constant, torch.tensor(-1.0)).sum().backward()
    assert torch.isfinite(constant.grad).all()


def test_learnable_threshold_starts_at_the_drop_ratio_and_is_differentiable():
    start = make_model(learnable_threshold=True, drop_ratio=0.1).thresholds
    assert start.tolist() == pytest.approx([NormalDist().inv_cdf(0.1)] * LAYERS)
    scores = torch.randn(20000, dtype=torch.double)
    gates = adem_vl.fuse_softly(scores, start[0].detach()) / scores
    assert (1 - gates).mean().item() == pytest.approx(0.1, abs=0.01)
    inputs = (torch.randn(2, 6, dtype=torch.double, requires_grad=True), start[0].detach().requires_grad_())
    assert torch.autograd.gradcheck(adem_vl.fuse_softly, inputs)


def test_each_block_learns_its_own_threshold():
    model, batch = make_model(learnable_threshold=True), make_batch()
    model(**batch)["loss"].backward()
    assert model.thresholds.shape == (LAYERS,) and (model.thresholds.grad.abs() > 1e-8).all()
    before = model(**question(batch))["logits"]
    with torch.no_grad():
        model.thresholds[1] += 0.5
    assert not torch.equal(before, model(**question(batch))["logits"])


# ---- Regularisation ------------------------------------------------------------------------------------------------


def attended(model, training, rows=400):
    """alpha * X of block 0 for many rows that are the same."""
    generator = torch.Generator().manual_seed(5)
    visual = [torch.randn(1, 20, DIM, generator=generator, dtype=torch.double).expand(rows, -1, -1) for _ in range(2)]
    query = torch.randn(1, 2, DIM, generator=generator, dtype=torch.double).expand(rows, -1, -1)
    torch.manual_seed(0)
    with torch.no_grad(), model.train(training)._seeing(adem_vl.model._Visual(*visual, None, None)):
        return model._attend(0, query)


def test_layer_dropout_leaves_whole_samples_out():
    plain = attended(make_model(), True)
    model = make_model(layer_dropout=0.4)
    assert torch.equal(attended(model, False), plain)
    found = attended(model, True)
    left_out = (found == 0).all((1, 2))
    assert 0.3 < left_out.double().mean() < 0.5
    assert torch.allclose(found[~left_out], plain[~left_out] / 0.6)


def test_cross_attention_dropout_drops_single_scores():
    plain = attended(make_model(), True, rows=4000)
    model = make_model(cross_attention_dropout=0.3)
    assert torch.equal(attended(model, False, rows=4000), plain)
    found = attended(model, True, rows=4000)
    assert len(found.reshape(len(found), -1)[:, 0].unique()) > 1000  # not whole samples
    error = (found.mean(0) - plain[0]).abs() / found.std(0)
    assert error.max() < 5 / math.sqrt(4000)


# ---- Samples without an image --------------------------------------------------------------------------------------


def test_without_an_image_only_the_tables_are_seen():
    model, batch = make_model(), make_batch()
    visual = model._look(batch["pixel_values"], batch["has_image"], batch["cls_position"])
    expected = torch.tensor([[silu(x) for x in row] for row in model.key_embedding[0].tolist()], dtype=torch.double)
    assert torch.allclose(visual.keys[1], expected) and torch.equal(visual.values[1], model.value_embedding[0])
    assert not torch.equal(visual.values[0], model.value_embedding[0])
    logits = model(**question(batch))["logits"]
    noisy = batch | {"pixel_values": batch["pixel_values"].clone()}
    noisy["pixel_values"][1] = torch.nan
    assert torch.equal(model(**question(noisy))["logits"], logits)
    alone = {name: tensor[1:2] for name, tensor in question(batch).items() if name != "pixel_values"}
    assert torch.allclose(model(**alone)["logits"], logits[1:2], atol=1e-6)


def test_tables_stay_on_without_an_image_and_start_silent():
    model, batch = make_model(), make_batch(images=(False, False))
    plain = model.language_model(batch["input_ids"]).logits.float()
    assert (model(**question(batch))["logits"] - plain).abs().max() > 0.1
    torch.nn.init.zeros_(model.value_embedding)  # as it is before training
    assert torch.allclose(model(**question(batch))["logits"], plain, atol=1e-5)


def test_the_cls_token_takes_its_place_only():
    model, batch = make_model(), make_batch()
    other = batch["input_ids"].clone()
    other[0, 2] = other[0, 2] % 90 + 3  # what stands at the CLS token's place does not matter ...
    assert torch.equal(model(**question(batch))["logits"], model(**question(batch | {"input_ids": other}))["logits"])
    other[1, 2] = other[1, 2] % 90 + 3  # ... where there is one
    changed = model(**question(batch | {"input_ids": other}))["logits"] != model(**question(batch))["logits"]
    assert changed.any((1, 2)).tolist() == [False, True, False]


# ---- Generation ----------------------------------------------------------------------------------------------------


def decode_without_cache(model, batch, steps):
    """Greedy decoding by one whole forward a token."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(steps):
        logits = model(**question(batch) | {"input_ids": ids, "attention_mask": mask})["logits"][:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, mask[:, :1] * 0 + 1], 1)
    return ids


GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@pytest.mark.parametrize("placement", ["mlp_in_out", "mhsa_in_in"])
def test_cached_decoding_gives_what_uncached_gives(placement):
    model, batch = make_model(3, cross_attention=placement), make_batch(3)
    expected = decode_without_cache(model, batch, 6)
    cached = model.generate(**question(batch), **GREEDY, output_logits=True, return_dict_in_generate=True)
    uncached = model.generate(
        **question(batch), **GREEDY, use_cache=False, output_logits=True, return_dict_in_generate=True
    )
    assert cached.sequences.tolist() == uncached.sequences.tolist() == expected.tolist()
    for one, other in zip(cached.logits, uncached.logits, strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-6)
    assert len(set(expected[:, 9:].flatten().tolist())) > 3  # no model that repeats one token


def test_beams_belong_to_their_samples():
    model, batch = make_model(4), make_batch(4)
    options = {**GREEDY, "num_beams": 3}
    together = model.generate(**question(batch), **options)
    for row in range(3):
        alone = model.generate(**{n: t[row : row + 1] for n, t in question(batch).items()}, **options)
        assert together[row].tolist() == alone[0].tolist()


def padded_left(batch, by):
    """`batch` with `by` columns of padding on the left of every row."""
    rows = len(batch["input_ids"])
    shifted = torch.where(batch["cls_position"] >= 0, batch["cls_position"] + by, -1)
    return question(batch) | {
        "input_ids": torch.cat([torch.zeros(rows, by, dtype=torch.long), batch["input_ids"]], 1),
        "attention_mask": torch.cat([torch.zeros(rows, by, dtype=torch.long), batch["attention_mask"]], 1),
        "cls_position": shifted,
    }


def test_a_prompt_can_enter_the_cache_in_pieces():
    model, batch = make_model(8), make_batch(8)
    expected = model(**question(batch))["logits"]
    visual = model._look(batch["pixel_values"], batch["has_image"], batch["cls_position"])
    with torch.no_grad(), model._seeing(visual):
        first = model.language_model(batch["input_ids"][:, :1], use_cache=True)
        second = model.language_model(batch["input_ids"][:, 1:], past_key_values=first.past_key_values)
    found = torch.cat([first.logits, second.logits], 1)
    assert torch.allclose(found.float(), expected, rtol=1e-6, atol=1e-6)


def test_left_padding_changes_nothing():
    model, batch = make_model(5), make_batch(5)
    plain = model(**question(batch))["logits"]
    for columns in (4, 1500):  # so many that absolute positions would show in the rounding
        shifted = model(**padded_left(batch, columns))["logits"][:, columns:]
        assert torch.allclose(shifted, plain, rtol=1e-6, atol=1e-6)
    padded = padded_left(batch, 4)
    generated = model.generate(**padded, **GREEDY)
    assert generated[:, 13:].tolist() == model.generate(**question(batch), **GREEDY)[:, 9:].tolist()


def test_next_logits_are_those_of_the_last_token_on_either_side_of_padding():
    model, batch = make_model(6), make_batch(6)
    expected = model(**question(batch))["logits"][:, -1]
    right = question(batch) | {
        name: torch.cat([batch[name], torch.zeros(3, 4, dtype=torch.long)], 1)
        for name in ("input_ids", "attention_mask")
    }
    for given in (question(batch), padded_left(batch, 4), right):
        assert torch.allclose(model.next_logits(**given), expected, rtol=1e-6, atol=1e-6)
    assert not model.training and model.train().next_logits(**right) is not None and model.training


# ---- Training ------------------------------------------------------------------------------------------------------


def test_loss_is_the_mean_over_answer_tokens():
    model, batch = make_model(), make_batch()
    batch["labels"][0, -1] = -100
    logits = model(**question(batch))["logits"].double()
    losses = [
        -logits[row, column - 1].log_softmax(-1)[batch["labels"][row, column]].item()
        for row, column in [(0, 7), (1, 7), (1, 8), (2, 7), (2, 8)]
    ]
    found = model(**batch)
    assert found["loss"].item() == pytest.approx(sum(losses) / 5, rel=1e-5)
    assert found["logits"].shape == (5, 96)


def test_gradient_reaches_the_trained_parts_and_nothing_else():
    model, batch = make_model(), make_batch()
    model(**batch)["loss"].backward()
    last = f"clip_adapters.{VISION['num_hidden_layers'] - 1}."
    for name, parameter in model.named_parameters():
        if name.startswith(("language_model.", "vision_model.")):
            assert not parameter.requires_grad, name
        elif name.startswith(last):  # the encoder's last block is not run
            assert parameter.requires_grad and parameter.grad is None, name
        else:
            assert parameter.grad.abs().max() > 0, name


def test_gradients_equal_finite_differences():
    model, batch = make_model(drop_ratio=0.0), make_batch()

    def loss():  # in float64 but for the norms of the language model: hence the large steps
        with model._seeing(model._look(batch["pixel_values"], batch["has_image"], batch["cls_position"])):
            hidden = model.language_model.model(batch["input_ids"]).last_hidden_state
        logits = model.language_model.lm_head(hidden[:, -3:-1])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, -2:].flatten())

    loss().backward()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.adapter_tensors().items():
        if parameter.grad is None:
            continue
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.double)
        with torch.no_grad():
            parameter += 1e-3 * direction
            above = loss().item()
            parameter -= 2e-3 * direction
            below = loss().item()
            parameter += 1e-3 * direction
        slope = (above - below) / 2e-3
        assert (parameter.grad * direction).sum().item() == pytest.approx(slope, rel=1e-3, abs=1e-6), name


def test_a_batch_without_images_still_trains_tables_and_projectors():
    model, batch = make_model(), make_batch(images=(False, False))
    model(**batch)["loss"].backward()
    assert model.value_embedding.grad.abs().max() > 0 and model.key_embedding.grad.abs().max() > 0
    for part in (model.projector, model.cls_projector):  # zero, not absent: an optimizer step decays them as ever
        assert all(not p.grad.any() for p in part.parameters())
    assert model.clip_adapters[0].up.weight.grad is None


def test_gradient_checkpointing_changes_no_gradient():
    batches = make_batch(0), make_batch(1)
    grads = []
    for checkpointing in (False, True):
        model = make_model(layer_dropout=0.3, cross_attention_dropout=0.2).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        first, second = (model(**batch)["loss"] for batch in batches)  # the second must not disturb the first
        (first + 2 * second).backward()
        grads.append({name: t.grad for name, t in model.adapter_tensors().items() if t.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], rtol=1e-6, atol=1e-9), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_train_float32_parts(dtype):
    torch.manual_seed(0)
    config = make_config()
    bases = LlamaForCausalLM(config.llm_config).to(dtype), CLIPVisionModel(config.vision_config).to(dtype)
    model, batch = AdemVL(config, *bases), make_batch()
    loss = model(**batch)["loss"]
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    for name, tensor in model.adapter_tensors().items():
        assert tensor.dtype == torch.float32, name
        assert tensor.grad is None or (tensor.grad.dtype == torch.float32 and torch.isfinite(tensor.grad).all()), name
    assert model.projector.fc1.weight.grad.abs().max() > 0
    full = AdemVL(config, *(base.float() for base in bases))
    full.load_state_dict(model.state_dict())
    assert full(**batch)["loss"].item() == pytest.approx(loss.item(), rel=0.05)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"learnable_threshold": True}, {"cross_attention": "mhsa_in_in"}], ids=str)
def test_training_under_autocast(base, options):
    torch.manual_seed(0)
    config = make_config(**options)
    bases = LlamaForCausalLM(config.llm_config).to(base), CLIPVisionModel(config.vision_config).to(base)
    model, batch = AdemVL(config, *bases), make_batch()
    plain = model.eval()(**batch)["loss"].item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch)["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(plain, rel=0.05)
    for name, tensor in model.adapter_tensors().items():
        assert tensor.grad is None or torch.isfinite(tensor.grad).all(), name
    assert model.key_embedding.grad.dtype == torch.float32


@pytest.fixture(scope="session")
def tiny_clip_dir(tmp_path_factory):
    """A random CLIP vision checkpoint with the sizes of `VISION`."""
    folder = tmp_path_factory.mktemp("tiny-clip")
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(folder)
    return folder


def build(tiny_llama_dir, tiny_clip_dir, **options) -> AdemVL:
    return AdemVL.build(str(tiny_llama_dir), str(tiny_clip_dir), device=torch.device("cpu"), scales=SCALES, **options)


def test_a_base_in_nf4_trains_and_generates(tiny_llama_dir, tiny_clip_dir, tmp_path):
    model = build(tiny_llama_dir, tiny_clip_dir, quantisation="nf4")
    samples = [encode(model.tokenizer, "what color ?", " red", has_image=image) for image in (True, False)]
    batch = collate(samples, torch.randn(2, 3, 32, 32), model.tokenizer.pad_token_id)
    model.train()(**batch)["loss"].backward()
    assert model.value_embedding.grad.abs().max() > 0
    assert type(model.language_model.model.layers[0].mlp.down_proj).__name__ == "Linear4bit"
    model.save_pretrained(tmp_path / "adem")
    again = AdemVL.from_pretrained(
        tmp_path / "adem", str(tiny_llama_dir), str(tiny_clip_dir), device=torch.device("cpu")
    )
    assert type(again.language_model.model.layers[0].mlp.down_proj).__name__ == "Linear4bit"
    given = question(batch)
    assert torch.equal(again(**given)["logits"], model.eval()(**given)["logits"])


# ---- Other encoders ------------------------------------------------------------------------------------------------


def test_other_grids_and_encoders_without_a_cls_token():
    sizes = {**VISION, "image_size": 48}
    for vision in (CLIPVisionConfig(**sizes), SiglipVisionConfig(**sizes), CLIPConfig(vision_config=sizes)):
        model = make_model(vision=vision, scales=(36, 9))
        batch = make_batch() | {"pixel_values": torch.randn(3, 3, 48, 48)}
        patches, cls = model.visual_features(batch["pixel_values"])
        assert patches.shape == (3, 36, WIDTH) and cls.shape == (3, WIDTH)
        with model._seeing(None, encoding=True):
            hidden = model.vision_model(batch["pixel_values"].double(), output_hidden_states=True).hidden_states[-2]
        normed = model._encoder.post_layernorm(hidden)
        siglip = isinstance(vision, SiglipVisionConfig)
        assert torch.allclose(patches, normed if siglip else normed[:, 1:])
        assert torch.allclose(cls, normed.mean(1) if siglip else normed[:, 0])
        model(**batch)["loss"].backward()
        assert model.clip_adapters[0].down.weight.grad.abs().max() > 0


def test_a_copy_is_a_model_of_its_own():
    model, batch = make_model(), question(make_batch())
    before = model(**batch)["logits"]
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**batch)["logits"], before)
    for part in ("clip_adapters", "projector", "cls_projector"):
        for parameter in getattr(twin, part).parameters():
            torch.nn.init.normal_(parameter)
        changed = twin(**batch)["logits"]
        assert torch.equal(model(**batch)["logits"], before) and not torch.equal(changed, before)
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin(**batch)["logits"], before)


def test_several_models_share_their_base_models():
    one, batch = make_model(), question(make_batch())
    before = one(**batch)["logits"]
    plain = one.vision_model(batch["pixel_values"].double()).last_hidden_state
    twin = copy.deepcopy(one)
    torch.manual_seed(7)
    other = AdemVL(one.config, one.language_model, one.vision_model)
    with torch.no_grad():
        for tensor in other.adapter_tensors().values():
            tensor.normal_()
    other.double().eval()
    assert not torch.equal(other(**batch)["logits"], before)
    assert torch.equal(one(**batch)["logits"], before) and torch.equal(twin(**batch)["logits"], before)
    assert torch.equal(one.vision_model(batch["pixel_values"].double()).last_hidden_state, plain)


# ---- Files ---------------------------------------------------------------------------------------------------------


def same(one: AdemVL, other: AdemVL) -> bool:
    return torch.equal(one(**question(make_batch()))["logits"], other(**question(make_batch()))["logits"])


def test_save_and_load_give_the_same_model(tmp_path):
    model = make_model(learnable_threshold=True, cross_attention="mhsa_in_out", scales=(4, 16)).float()
    folder = model.save_pretrained(tmp_path / "adem")
    again = AdemVL.from_pretrained(folder, device=torch.device("cpu"))
    assert not again.training and same(model, again) and again.config.to_dict() == model.config.to_dict()
    assert again.config.scales == (4, 16)
    assert set(load_file(folder / "adapter.safetensors")) == set(model.adapter_tensors())
    model.save_pretrained(folder)  # replaced
    assert [path.name for path in tmp_path.iterdir()] == ["adem"]


def test_named_bases_are_not_copied_and_no_absolute_path_is_written(tmp_path, tiny_llama_dir, tiny_clip_dir):
    model = build(tiny_llama_dir, tiny_clip_dir).eval()
    folder = model.save_pretrained(tmp_path / "adem")
    assert sorted(path.name for path in folder.iterdir()) == ["adapter.safetensors", "adem_vl.json"]
    assert str(tiny_llama_dir.parent) not in (folder / "adem_vl.json").read_text()
    bases = str(tiny_llama_dir), str(tiny_clip_dir)
    again = AdemVL.from_pretrained(folder, *bases, device=torch.device("cpu"))
    assert same(model, again) and again.tokenizer is not None
    loaded = AdemVL.from_pretrained(folder, again.language_model, again.vision_model, torch.device("cpu"))
    assert same(model, loaded)


def test_loading_is_strict(tmp_path):
    folder = make_model().float().save_pretrained(tmp_path / "adem")
    path = folder / "adapter.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}  # not mapped to the file written below
    wrong = {
        "missing: value_embedding": {k: v for k, v in tensors.items() if k != "value_embedding"},
        "not expected: extra": tensors | {"extra": torch.zeros(1)},
        r"key_embedding is \[1, 20, 31\], expected \[1, 20, 32\]": tensors
        | {"key_embedding": tensors["key_embedding"][..., :31].contiguous()},
        "expected floating-point": tensors | {"value_embedding": torch.zeros(1, 20, 32, dtype=torch.long)},
    }
    for fault, content in wrong.items():
        save_file(content, path)
        with pytest.raises(AdemVLError, match=fault):
            AdemVL.from_pretrained(folder, device=torch.device("cpu"))
    path.unlink()
    with pytest.raises(AdemVLError, match=r"adapter\.safetensors is missing"):
        AdemVL.from_pretrained(folder, device=torch.device("cpu"))
    facts = json.loads((folder / "adem_vl.json").read_text())
    (folder / "adem_vl.json").write_text(json.dumps(facts | {"format": 0}))
    with pytest.raises(AdemVLError, match="format 0"):
        AdemVL.from_pretrained(folder)
    with pytest.raises(AdemVLError, match=r"no adem_vl\.json"):
        AdemVL.from_pretrained(tmp_path)


@pytest.mark.parametrize("left", [0.0, 0.5])
@pytest.mark.parametrize("file", ["adapter.safetensors", "adem_vl.json"])
def test_damaged_files_are_named_with_what_to_do(tmp_path, file, left):
    path = make_model().float().save_pretrained(tmp_path / "adem") / file
    os.truncate(path, int(left * path.stat().st_size))
    with pytest.raises(AdemVLError, match=rf"{path} is damaged .*: copy the bundle again, or train it anew"):
        AdemVL.from_pretrained(path.parent, device=torch.device("cpu"))


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_trained_parts_that_are_not_finite_are_refused_by_name(tmp_path, number):
    """In the folder of save_pretrained, in the authors' file (under their name), and when a model is saved."""
    folder = make_model().float().save_pretrained(tmp_path / "adem")
    path = folder / "adapter.safetensors"
    kept = path.read_bytes()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors["projector.fc2.bias"][-1] = number
    save_file(tensors, path)
    with pytest.raises(AdemVLError, match=rf"{path} .*not finite.* in projector\.fc2\.bias:"):
        AdemVL.from_pretrained(folder, device=torch.device("cpu"))

    model, content = make_model().float(), released()
    content["adapter_proj.fc2.bias"][-1] = number
    authors = save_released(tmp_path / "checkpoint-19.pth", content)
    with pytest.raises(AdemVLError, match=rf"{authors} .*not finite.* in adapter_proj\.fc2\.bias:"):
        model.load_released_adapters(authors)

    path.write_bytes(kept)
    with torch.no_grad():
        model.key_embedding[0, 0, 0] = number
    with pytest.raises(AdemVLError, match=r"not finite.* in key_embedding: .*adem was not written"):
        model.save_pretrained(folder)
    assert path.read_bytes() == kept


@pytest.mark.parametrize("part", ["language_model", "vision_model"])
def test_base_models_that_are_not_finite_are_refused(tmp_path, part):
    folder = make_model().float().save_pretrained(tmp_path / "adem")
    path = folder / part / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    name = next(name for name in sorted(tensors) if "layers.1." in name)
    tensors[name].view(-1)[-1] = math.nan
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(AdemVLError, match=rf"{path.parent}.* not finite.* in \S*{re.escape(name[-20:])}"):
        AdemVL.from_pretrained(folder, device=torch.device("cpu"))


def test_other_base_models_are_refused(tmp_path):
    model = make_model().float()
    folder = model.save_pretrained(tmp_path / "adem")
    other = make_model(seed=1).float()
    for name in ("language_model", "vision_model"):
        with pytest.raises(AdemVLError, match=f"the {name.replace('_', ' ')}"):
            AdemVL.from_pretrained(folder, **{name: getattr(other, name)}, device=torch.device("cpu"))
    half = LlamaForCausalLM.from_pretrained(folder / "language_model", dtype=torch.bfloat16)
    AdemVL.from_pretrained(folder, half, device=torch.device("cpu"))  # the same model in fewer bits


# ---- The authors' checkpoints --------------------------------------------------------------------------------------


def released(seed: int = 0, use_cls: bool = True) -> dict[str, torch.Tensor]:
    """Tensors named as in the release, for the sizes used here."""
    positions = sum(SCALES)
    shapes = {"adapter_emb1": (1, positions, DIM), "adapter_emb2": (1, positions, DIM)}
    for part in ["adapter_proj"] + ["adapter_proj_cls"] * use_cls:
        shapes |= {f"{part}.fc1.weight": (5, WIDTH), f"{part}.fc1.bias": (5,)}
        shapes |= {f"{part}.fc2.weight": (DIM, 5), f"{part}.fc2.bias": (DIM,)}
    for block in range(3):
        prefix = f"backbone.visual.transformer.resblocks.{block}.adapter_mlp"
        shapes |= {f"{prefix}.fc1.weight": (3, WIDTH), f"{prefix}.fc2.weight": (WIDTH, 3)}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def save_released(path, tensors):
    extras = {
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95)}]},
        "epoch": 19,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(adapter_dim=12, down_sample_num=[256, 64], use_cls=True),
    }
    torch.save({"model": tensors, **extras}, path)
    return path


def test_released_checkpoints_are_loaded_to_where_they_belong(tmp_path):
    tensors = released()
    model = make_model().float()
    model.load_released_adapters(save_released(tmp_path / "checkpoint-19.pth", tensors))
    assert torch.equal(model.key_embedding, tensors["adapter_emb1"])
    assert torch.equal(model.value_embedding, tensors["adapter_emb2"])
    for part, name in ((model.projector, "adapter_proj"), (model.cls_projector, "adapter_proj_cls")):
        for layer in ("fc1", "fc2"):
            assert torch.equal(getattr(part, layer).weight, tensors[f"{name}.{layer}.weight"])
            assert torch.equal(getattr(part, layer).bias, tensors[f"{name}.{layer}.bias"])
    for block, adapter in enumerate(model.clip_adapters):
        prefix = f"backbone.visual.transformer.resblocks.{block}.adapter_mlp"
        assert torch.equal(adapter.down.weight, tensors[f"{prefix}.fc1.weight"])
        assert torch.equal(adapter.up.weight, tensors[f"{prefix}.fc2.weight"])
    assert all(tensor.requires_grad for tensor in model.adapter_tensors().values())
    without = make_model(use_cls=False)
    without.load_released_adapters(save_released(tmp_path / "no_cls.pth", released(use_cls=False)))


def test_checkpoints_saved_from_a_ddp_object_are_loaded_too(tmp_path):
    """As the released file is: the official code saves `named_parameters()` of the DDP object, "module." in front."""
    tensors, plain = released(), make_model()
    plain.load_released_adapters(save_released(tmp_path / "plain.pth", tensors))
    prefixed = {f"module.{name}": tensor for name, tensor in tensors.items()}
    model, path = make_model(seed=1), tmp_path / "checkpoint_7B_sqa.pth"
    model.load_released_adapters(save_released(path, prefixed))
    loaded = model.adapter_tensors()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in plain.adapter_tensors().items())
    untouched = make_model(seed=2)
    before = {name: tensor.clone() for name, tensor in untouched.adapter_tensors().items()}
    first = next(iter(tensors))
    cases = {
        "mixes names with and without 'module.'.*checkpoint_7B_sqa.pth, of the release tagged `checkpoint`": prefixed
        | {"adapter_emb2": tensors["adapter_emb2"]},
        "mixes names": {first: tensors[first]} | {k: v for k, v in prefixed.items() if k != f"module.{first}"},
        "missing: adapter_emb2": {k: v for k, v in prefixed.items() if k != "module.adapter_emb2"},
        "missing: adapter_emb1": {f"module.{name}": tensor for name, tensor in prefixed.items()},
        r"adapter_emb1 is \[1, 16, 32\]": prefixed | {"module.adapter_emb1": torch.zeros(1, 16, 32)},
    }
    for fault, content in cases.items():
        with pytest.raises(AdemVLError, match=fault):
            untouched.load_released_adapters(save_released(path, content))
    assert all(torch.equal(before[name], tensor) for name, tensor in untouched.adapter_tensors().items())


def test_released_names_at_full_size():
    llama = LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008)
    clip = CLIPVisionConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, patch_size=14)
    with torch.device("meta"):
        model = AdemVL(AdemVLConfig(llama, clip))
    names = adem_vl.released_names(model.adapter_tensors())
    shapes = {names[name]: tuple(tensor.shape) for name, tensor in model.adapter_tensors().items()}
    expected = {"adapter_emb1": (1, 320, 4096), "adapter_emb2": (1, 320, 4096)}
    for part in ("adapter_proj", "adapter_proj_cls"):
        expected |= {f"{part}.fc1.weight": (128, 1024), f"{part}.fc1.bias": (128,)}
        expected |= {f"{part}.fc2.weight": (4096, 128), f"{part}.fc2.bias": (4096,)}
    for block in range(24):
        prefix = f"backbone.visual.transformer.resblocks.{block}.adapter_mlp"
        expected |= {f"{prefix}.fc1.weight": (12, 1024), f"{prefix}.fc2.weight": (1024, 12)}
    assert shapes == expected
    # Shapes do not tell these. Officially the first embedding is added to the keys, the second to the values.
    by_hand = {
        "key_embedding": "adapter_emb1",
        "value_embedding": "adapter_emb2",
        "projector.fc1.weight": "adapter_proj.fc1.weight",
        "cls_projector.fc2.bias": "adapter_proj_cls.fc2.bias",
        "clip_adapters.7.down.weight": "backbone.visual.transformer.resblocks.7.adapter_mlp.fc1.weight",
    }
    assert by_hand.items() <= names.items()


def test_released_checkpoints_are_loaded_strictly_and_safely(tmp_path):
    model, path = make_model(), tmp_path / "checkpoint-19.pth"
    before = {name: tensor.clone() for name, tensor in model.adapter_tensors().items()}
    tensors = released()
    cases = {
        "missing: adapter_emb2": {k: v for k, v in tensors.items() if k != "adapter_emb2"},
        "not expected: adapter_emb3": tensors | {"adapter_emb3": torch.zeros(1)},
        r"adapter_emb1 is \[1, 16, 32\]": tensors | {"adapter_emb1": torch.zeros(1, 16, 32)},
    }
    for fault, content in cases.items():
        with pytest.raises(AdemVLError, match=fault):
            model.load_released_adapters(save_released(path, content))
    torch.save(tensors, path)
    with pytest.raises(AdemVLError, match=r"no `model`.*checkpoint_7B_sqa\.pth, of the release tagged `checkpoint`"):
        model.load_released_adapters(path)

    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"model": tensors, "args": Harmful()}, path)
    with pytest.raises(AdemVLError, match="not loaded"):
        model.load_released_adapters(path)
    assert not (tmp_path / "harm").exists()
    path.write_bytes(b"no checkpoint")
    with pytest.raises(AdemVLError, match="not loaded"):
        model.load_released_adapters(path)
    with pytest.raises(FileNotFoundError):
        model.load_released_adapters(tmp_path / "absent.pth")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.adapter_tensors().items())


# ---- Bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"drop_ratio": 1.0}, "drop_ratio is 1.0"),
        ({"drop_ratio": -0.1}, "drop_ratio is -0.1"),
        ({"layer_dropout": 1.0}, "layer_dropout"),
        ({"cross_attention_dropout": 1.5}, "cross_attention_dropout"),
        ({"scales": (16, 9)}, r"\[9\].*4x4 patch grid can be pooled to 16, 4, 1"),
        ({"scales": (64,)}, r"\[64\]"),
        ({"scales": (8,)}, r"\[8\]"),
        ({"scales": ()}, "none are given"),
        ({"cross_attention": "mlp_in_ou"}, "did you mean 'mlp_in_out'"),
        ({"phi": "gelu"}, "did you mean|valid"),
        ({"adapter_dim": 0}, "adapter_dim is 0"),
        ({"projector_dim": 0}, "projector_dim is 0"),
        ({"learnable_threshold": True, "drop_ratio": 0.0}, "drop_ratio must be above 0"),
        ({"vision": LlamaConfig(**LLAMA)}, "vision_config is of 'llama'"),
        ({"vision": {"hidden_size": 3}}, "without model_type"),
    ],
)
def test_configurations_that_cannot_be_are_refused(changes, fault):
    with pytest.raises(AdemVLError, match=fault):
        make_config(**changes)


def test_scales_of_none_are_the_grid_and_its_half():
    assert fit_scales(None, 16) == (256, 64) and fit_scales(None, 24) == (576, 144)
    assert fit_scales([16, 4], 8) == (16, 4)
    with pytest.raises(AdemVLError, match=r"scales null: the side is odd.*27x27 .* 729, 81, 9, 1 positions"):
        fit_scales(None, 27)


def test_encoders_name_their_own_normalisation():
    llama = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    for vision, name in ((CLIPVisionConfig(image_size=32, patch_size=8), "clip"), (SiglipVisionConfig(), "siglip")):
        config = AdemVLConfig(llama, vision, scales=None)
        assert config.normalisation == name in NORMALISATION
        assert AdemVLConfig(**config.to_dict()).scales == config.scales


def test_other_language_models_are_refused():
    vision = CLIPVisionConfig(**VISION)
    with pytest.raises(AdemVLError, match="'gpt2'; give one of the Llama family"):
        AdemVL(AdemVLConfig(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1), vision, scales=SCALES))


def test_batches_that_do_not_fit_are_refused():
    model, batch = make_model(), make_batch()
    given = question(batch)
    cases = {
        "row 0 has an image, but its CLS position is -1": {"cls_position": torch.tensor([-1, -1, 2])},
        "row 1 has no image, but its CLS position is 2": {"cls_position": torch.tensor([2, 2, 2])},
        "CLS position is 9 of 9": {"cls_position": torch.tensor([2, -1, 9])},
        r"pixel_values are \[3, 3, 16, 16\]; rows with an image need \[3, 3, 32, 32\]": {
            "pixel_values": torch.zeros(3, 3, 16, 16)
        },
        "pixel_values are not given": {"pixel_values": None},
        "sequence of 2049 tokens is over the language model's 2048": {"input_ids": torch.zeros(3, 2049).long()},
        r"has_image is \[2\]": {"has_image": torch.tensor([True, False])},
    }
    for fault, changes in cases.items():
        with pytest.raises(AdemVLError, match=fault):
            model(**given | changes)
    with pytest.raises(AdemVLError, match="no answer token"):
        model(**batch | {"labels": torch.full((3, 9), -100)})


# ---- Sequences and images ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tokenizer(tiny_llama_dir):
    return AutoTokenizer.from_pretrained(tiny_llama_dir)


def test_sequences_are_laid_out_as_officially(tokenizer):
    def tokens(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    prompt, answer = "what color ?\nResponse:", "The answer is B."
    seen = encode(tokenizer, prompt, answer, has_image=True)
    lead = [bos, *tokens("Image: ")]
    assert seen.cls_position == len(lead) and seen.has_image
    assert [*seen.input_ids[: len(lead)], *seen.input_ids[len(lead) + 1 :]] == [*lead, *tokens(prompt + answer), eos]
    blind = encode(tokenizer, prompt, answer, has_image=False)
    assert blind.input_ids == [bos, *tokens("Image: N/A"), *tokens(prompt + answer), eos]
    assert (blind.cls_position, blind.has_image) == (-1, False)
    for image in (True, False):
        plain = encode(tokenizer, prompt, answer, has_image=image, use_cls=False)
        assert plain.input_ids == [bos, *tokens(prompt + answer), eos] and plain.cls_position == -1
    for sample in (seen, blind):
        learnt = [token for token in sample.labels if token != -100]
        assert learnt == sample.input_ids[-len(learnt) :] and learnt[-1] == eos
        assert tokenizer.decode(learnt[:-1]).endswith(answer)
    asked = encode(tokenizer, prompt + "The answer is", has_image=True)
    assert asked.input_ids == seen.input_ids[: len(asked.input_ids)] and set(asked.labels) == {-100}


class Splitter:
    """What a tokenizer has beside its way to split a text."""

    bos_token_id, eos_token_id, unk_token = 1, 2, None
    all_special_ids, all_special_tokens, added_tokens_decoder = [1, 2], ["<bos>", "<eos>"], {}

    def __len__(self):
        return 1000


def test_a_token_across_the_boundary_is_learnt():
    class Pairs(Splitter):
        """Two characters a token: where the answer begins depends on the prompt's length."""

        def __call__(self, text, add_special_tokens):
            ids = [100 + sum(map(ord, text[i : i + 2])) for i in range(0, len(text), 2)]
            return argparse.Namespace(input_ids=ids)

    even = encode(Pairs(), "abcd", "xy", has_image=False, use_cls=False)
    assert even.labels == [-100] * 3 + even.input_ids[3:] and len(even.input_ids) == 5
    odd = encode(Pairs(), "abc", "xyz", has_image=False, use_cls=False)
    assert odd.labels == [-100] * 2 + odd.input_ids[2:] and len(odd.input_ids) == 5


def test_too_long_is_refused_and_never_cut(tokenizer):
    length = len(encode(tokenizer, "what color ?", "red", has_image=True).input_ids)
    assert len(encode(tokenizer, "what color ?", "red", has_image=True, max_tokens=length).input_ids) == length
    with pytest.raises(PromptTooLong, match=f"{length} tokens; the window has {length - 1}"):
        encode(tokenizer, "what color ?", "red", has_image=True, max_tokens=length - 1)
    with pytest.raises(PromptTooLong):
        encode(tokenizer, "what color ?", has_image=False, max_tokens=3)
    with pytest.raises(AdemVLError, match="adds no token"):
        encode(tokenizer, "what color ?", "", has_image=False)


def test_letters_are_told_apart_by_their_first_token(tokenizer):
    class Words(Splitter):
        """A token a word, with the space before it; a full stop is one of its own."""

        def __call__(self, text, add_special_tokens):
            return argparse.Namespace(input_ids=[hash(word) for word in re.findall(r" ?\w+|\W", text)])

    class Whole(Splitter):
        """A text is one token."""

        def __call__(self, text, add_special_tokens):
            return argparse.Namespace(input_ids=[len(text)])

    prompt = "Options: (A) x (B) y\nResponse:The answer is"
    assert adem_vl.letter_tokens(Words(), prompt, ["A", "B"]) == [hash(" A"), hash(" B")]
    with pytest.raises(AdemVLError, match="do not begin with different tokens"):
        adem_vl.letter_tokens(tokenizer, prompt, "ABC")  # a space is a token of its own
    with pytest.raises(AdemVLError, match="changes how the end"):
        adem_vl.letter_tokens(Whole(), prompt, "AB")


def test_collating_pads_on_either_side(tokenizer):
    samples = [
        encode(tokenizer, "what color is the circle ?", "red", has_image=True),
        encode(tokenizer, "why", "no", has_image=False),
    ]
    pixels = torch.randn(2, 3, 32, 32)
    right, left = (collate(samples, pixels, 2, left=left) for left in (False, True))
    lengths = [len(sample.input_ids) for sample in samples]
    width, short = max(lengths), min(lengths)
    assert right["attention_mask"].sum(1).tolist() == left["attention_mask"].sum(1).tolist() == lengths
    assert right["input_ids"][1, :short].tolist() == left["input_ids"][1, width - short :].tolist()
    assert (right["input_ids"][1, short:] == 2).all() and (right["labels"][1, short:] == -100).all()
    assert left["labels"][1, width - short :].tolist() == samples[1].labels
    assert right["cls_position"].tolist() == left["cls_position"].tolist() == [samples[0].cls_position, -1]
    swapped = collate(samples[::-1], None, 2, left=True)
    assert "pixel_values" not in swapped and swapped["cls_position"].tolist() == [-1, samples[0].cls_position]
    alone = collate([samples[1], samples[0]], pixels, 2, left=True)["has_image"]
    assert alone.dtype == torch.bool and alone.tolist() == [False, True]


def test_images_are_resized_without_their_aspect_and_normalised():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    found = adem_vl.image_tensor(image, 6, "imagenet")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for channel in range(3):
        assert found[channel, 4, 1].item() == pytest.approx(
            (pixels[4, 1, channel] / 255 - mean[channel]) / std[channel], rel=1e-5
        )
    wide = Image.new("L", (40, 10), 255)
    assert adem_vl.image_tensor(wide, 8).shape == (3, 8, 8)
    assert torch.allclose(adem_vl.image_tensor(wide, 8, "siglip"), torch.ones(3, 8, 8))
    assert not adem_vl.image_tensor(None, 8).any()
    with pytest.raises(AdemVLError, match="did you mean 'imagenet'"):
        adem_vl.image_tensor(wide, 8, "image_net")


def test_a_folder_can_be_moved(tmp_path):
    model = make_model().float()
    model.save_pretrained(tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert same(model, AdemVL.from_pretrained(tmp_path / "there", device=torch.device("cpu")))
