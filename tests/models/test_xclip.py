"""Frame masks of X-CLIP against the stock Hugging Face model."""

import copy
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import XCLIPModel

from helpers.models.parts import BundleError
from helpers.models.xclip import FrameEncoder, MaskedMIT, attention_implementation, load_xclip, same_encoder

try:  # needs no torchvision; transformers 5.0 has it under the plain name
    from transformers import VideoMAEImageProcessorPil as VideoMAEImageProcessor
except ImportError:
    from transformers import VideoMAEImageProcessor


@pytest.fixture(scope="module")
def xclip(tiny_xclip_dir):
    model = XCLIPModel.from_pretrained(tiny_xclip_dir).eval()
    # Random initial weights give weak messages: stronger ones make a missing mask visible.
    with torch.no_grad():
        for layer in model.vision_model.encoder.layers:
            layer.message_attn.q_proj.weight.mul_(8)
            layer.message_attn.v_proj.weight.mul_(4)
            layer.message_attn.out_proj.weight.mul_(4)
    return model


def random_frames(batch: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 16, 32, 32, 3), dtype=torch.uint8, generator=generator)


def stock_pixels(frames: torch.Tensor) -> torch.Tensor:
    """Frames [T, H, W, 3] through Hugging Face's own processor, set as in microsoft/xclip-*: [1, T, 3, H, W]."""
    processor = VideoMAEImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    return processor(list(frames.numpy()), return_tensors="pt").pixel_values


@torch.no_grad()
def shorter_model(xclip: XCLIPModel, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The stock model rebuilt for exactly len(frames) frames: embeddings [T, D], MIT tokens [T, D], pooled [D]."""
    model, count = copy.deepcopy(xclip), len(frames)
    for layer in model.vision_model.encoder.layers:
        layer.num_frames = count
    model.mit.position_embedding = torch.nn.Parameter(model.mit.position_embedding[:, :count])
    pixels = stock_pixels(frames)
    embeddings = model.visual_projection(model.vision_model(pixels.flatten(0, 1)).pooler_output)
    mit = model.mit(embeddings[None])
    return embeddings, mit[0][0], mit[1][0]


@pytest.mark.parametrize("length", [1, 2, 5, 15, 16])
@torch.no_grad()
def test_masked_model_equals_the_stock_model_with_fewer_frames(xclip, length):
    frames = random_frames(1)
    embeddings, tokens, pooled = shorter_model(xclip, frames[0, :length])
    ours = FrameEncoder(xclip, "tiny")(frames, torch.tensor([length]))
    our_tokens, our_pooled = MaskedMIT(xclip)(ours, torch.arange(16)[None] < length)
    torch.testing.assert_close(ours[0, :length], embeddings, atol=1e-5, rtol=0)
    torch.testing.assert_close(our_tokens[0, :length], tokens, atol=1e-5, rtol=0)
    torch.testing.assert_close(our_pooled[0], pooled, atol=1e-5, rtol=0)
    assert not ours[0, length:].any()
    assert not our_tokens[0, length:].any()


@torch.no_grad()
def test_full_length_equals_stock_get_video_features(xclip):
    frames = random_frames(2)
    stock = xclip.get_video_features(torch.cat([stock_pixels(video) for video in frames]))
    mask = torch.ones(2, 16, dtype=torch.bool)
    _, pooled = MaskedMIT(xclip)(FrameEncoder(xclip, "tiny")(frames, torch.tensor([16, 16])), mask)
    torch.testing.assert_close(pooled, stock.pooler_output, atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", [1, 6])
@torch.no_grad()
def test_content_of_padding_changes_nothing_at_all(xclip, length):
    frames, other = random_frames(1, seed=1), random_frames(1, seed=2)
    other[:, :length] = frames[:, :length]
    encoder, lengths = FrameEncoder(xclip, "tiny"), torch.tensor([length])
    embeddings = encoder(frames, lengths)
    assert torch.equal(embeddings, encoder(other, lengths))

    mit, mask = MaskedMIT(xclip), torch.arange(16)[None] < length
    noisy = embeddings.clone()
    noisy[:, length:] = 100.0
    for ours, theirs in zip(mit(embeddings, mask), mit(noisy, mask), strict=True):
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_videos_of_mixed_lengths_do_not_touch_each_other(xclip):
    frames, lengths = random_frames(4, seed=3), torch.tensor([16, 1, 7, 12])
    encoder = FrameEncoder(xclip, "tiny")
    together = encoder(frames, lengths)
    alone = torch.cat([encoder(frames[i : i + 1], lengths[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_frames_do_exchange_messages(xclip):
    """The tests above would pass for an encoder that ignores the other frames: this one would not."""
    frames = random_frames(1, seed=4)
    changed = frames.clone()
    changed[:, 3] = 255 - changed[:, 3]
    encoder, lengths = FrameEncoder(xclip, "tiny"), torch.tensor([8])
    difference = (encoder(frames, lengths) - encoder(changed, lengths)).abs().amax(dim=(0, 2))
    assert (difference[:8] > 1e-4).all()


@torch.no_grad()
def test_mit_without_a_valid_frame_is_finite_and_zero(xclip):
    tokens, pooled = MaskedMIT(xclip)(torch.randn(1, 16, 32), torch.zeros(1, 16, dtype=torch.bool))
    assert not tokens.any()
    assert not pooled.any()


@pytest.mark.parametrize(
    ("frames", "lengths"),
    [
        (torch.zeros(2, 8, 32, 32, 3, dtype=torch.uint8), [8, 8]),  # the stock vision model would mix these two
        (torch.zeros(1, 32, 32, 32, 3, dtype=torch.uint8), [32]),
        (torch.zeros(1, 16, 30, 32, 3, dtype=torch.uint8), [16]),
        (torch.zeros(1, 16, 32, 32, 3), [16]),
        (torch.zeros(1, 16, 32, 32, 3, dtype=torch.uint8), [17]),
        (torch.zeros(1, 16, 32, 32, 3, dtype=torch.uint8), [0]),
        (torch.zeros(2, 16, 32, 32, 3, dtype=torch.uint8), [16]),
    ],
)
def test_wrong_shapes_are_refused(xclip, frames, lengths):
    with pytest.raises(ValueError, match="must be"):
        FrameEncoder(xclip, "tiny")(frames, torch.tensor(lengths))


def test_mit_refuses_another_number_of_frames(xclip):
    with pytest.raises(ValueError, match="16"):
        MaskedMIT(xclip)(torch.zeros(1, 8, 32), torch.ones(1, 8, dtype=torch.bool))


def test_stock_model_is_left_as_it_was(xclip):
    pixels = stock_pixels(random_frames(1)[0])
    with torch.no_grad():
        before = xclip.get_video_features(pixels).pooler_output
        FrameEncoder(xclip, "tiny")(random_frames(1), torch.tensor([2]))
        assert torch.equal(before, xclip.get_video_features(pixels).pooler_output)


def test_key_tells_encoders_apart(xclip):
    keys = {FrameEncoder(xclip, "a").key, FrameEncoder(xclip, "b").key, FrameEncoder(xclip, "a", "c0ffee").key}
    assert len(keys) == 3


def test_a_moved_folder_gives_the_same_features_and_other_weights_do_not(xclip):
    key = FrameEncoder(xclip, "/models/a|b", "c0ffee").key
    assert same_encoder(key, FrameEncoder(xclip, "elsewhere/x").key)
    for part in key.rsplit("|", 4)[1:]:  # frames and pixels, preprocessing, weights, contract
        assert not same_encoder(key, key.replace(f"|{part}", "|other"))
    assert same_encoder("toy", "toy") and not same_encoder("toy", "other")


def test_key_tells_weights_apart_and_not_precision(xclip):
    key = FrameEncoder(xclip, "a").key
    other = copy.deepcopy(xclip)
    assert FrameEncoder(other, "a").key == key
    with torch.no_grad():
        other.vision_model.post_layernorm.bias[0] += 1e-3
    assert FrameEncoder(other, "a").key != key


@pytest.mark.parametrize(
    ("gpu", "supported", "chosen"), [(True, True, "sdpa"), (True, False, "eager"), (False, True, "eager")]
)
def test_sdpa_only_where_transformers_has_it_for_xclip(monkeypatch, gpu, supported, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(XCLIPModel, "_supports_sdpa", supported)
    assert attention_implementation() == chosen


def test_a_video_encoder_that_is_not_finite_is_refused(tmp_path, tiny_xclip_dir):
    shutil.copytree(tiny_xclip_dir, tmp_path / "xclip")
    path = tmp_path / "xclip" / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors["vision_model.encoder.layers.1.self_attn.q_proj.weight"][3, 4] = math.nan
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(BundleError, match=rf"{path.parent} .*not finite.*layers\.1\.self_attn\.q_proj\.weight"):
        load_xclip(str(path.parent))
