"""X-CLIP (Ni et al., arXiv 2208.02816; code: microsoft/VideoX, folder X-CLIP) with real frame masks.

Frames of one video meet in three places only: the message attention of every vision layer, the attention of the
multi-frame integration transformer (MIT), and the mean over frames behind it. A GIF with fewer frames than the model
was built for is padded, and the padding is masked in all three, which equals running the model with fewer frames.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import XCLIPModel

from helpers.models.digests import module_digest
from helpers.models.parts import require_finite
from helpers.workspace.weights import find_model


def encoder_identity(xclip: XCLIPModel) -> dict[str, Any]:
    """What tells a video encoder from others, whatever folder or precision it was loaded from."""
    vision = xclip.config.vision_config
    return {
        "architecture": f"x_clip, {vision.num_hidden_layers} layers of {vision.hidden_size}, {vision.num_frames} frames"
        f" of {vision.image_size} px in patches of {vision.patch_size}, projection {xclip.config.projection_dim}",
        "weights": xclip.visual_projection.weight.flatten()[:64].float().tolist(),
        "digest": module_digest({name: getattr(xclip, name) for name in ("vision_model", "visual_projection", "mit")}),
    }


CONTRACT_VERSION = 2  # raise when the embeddings of the same frames would differ
MASKED = -30000.0  # added to the attention score of a masked key
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Frames come resized with their short side straight to the model's size, as Hugging Face's processor does; VideoX's
# own test pipeline resizes to 256 and crops 224. The choice changes the embeddings, so it is part of the key.
PREPROCESSING = "short-side-resize,centre-crop,imagenet-norm"


def attention_implementation() -> str:
    """Which of transformers' attentions to use: on a CPU the plain one is faster at X-CLIP's short sequences.

    Transformers before 5.8 have no other for X-CLIP and refuse to load it when asked for one.
    """
    return "sdpa" if torch.cuda.is_available() and XCLIPModel._supports_sdpa else "eager"


def weights_digest(module: nn.Module) -> str:
    """Hash of all tensors of a module with their names: tells models apart that bear the same name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()[:12]


def load_xclip(model_id: str, revision: str | None = None) -> XCLIPModel:
    """Load a stock `XCLIPModel` (fp32, evaluation mode); `model_id` is a hub id, a `tiny/...` asset or a folder.

    Raises: `helpers.workspace.weights.ModelNotFound` when the weights are nowhere to be had, BundleError when a number
    of them is not finite.
    """
    folder = find_model(model_id, revision)
    model = XCLIPModel.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention_implementation())
    require_finite(dict(model.named_parameters()), folder, "fetch these weights again, or name another encoder.model")
    return model.eval().requires_grad_(False)


def portable_name(model_id: str) -> str:
    """Return a model's id as it may stand in a file: of a folder given by an absolute path, its name only."""
    path = Path(model_id).expanduser()
    return path.name if os.path.isabs(path) else model_id


def same_encoder(key: str, other: str) -> bool:
    """Whether features of these `FrameEncoder.key`s are alike: the weights' digest decides, not the model's name."""
    return key.rsplit("|", 4)[-4:] == other.rsplit("|", 4)[-4:]


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a boolean mask (True: attend) into one that is added to attention scores, of the same shape.

    Finite, so that the softmax stays defined where nothing may be attended to; fit for fp16 under autocast, and low
    enough that a masked key's weight is exactly 0.
    """
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, MASKED)


class FrameEncoder(nn.Module):
    """Frames to projected frame embeddings, before the MIT (X-CLIP's cross-frame communication transformer)."""

    def __init__(self, xclip: XCLIPModel, name: str, revision: str | None = None) -> None:
        super().__init__()
        self.vision_model = xclip.vision_model
        self.visual_projection = xclip.visual_projection
        config = xclip.config.vision_config
        self.frames_per_group: int = config.num_frames
        self.image_size: int = config.image_size
        self.embed_dim: int = xclip.config.projection_dim
        self.key = (
            f"{portable_name(name)}@{revision or 'main'}|{self.frames_per_group}x{self.image_size}px|{PREPROCESSING}"
            f"|{weights_digest(self)}|v{CONTRACT_VERSION}"
        )

    @contextmanager
    def _masked_messages(self, mask: Tensor, dtype: torch.dtype) -> Iterator[None]:
        # Hugging Face gives message attention no mask argument; a pre-hook adds one without a fork of the model.
        attention_mask = additive_mask(mask, dtype)[:, None, None]

        def add_mask(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            return args, {**kwargs, "attention_mask": attention_mask}

        layers = self.vision_model.encoder.layers
        hooks = [layer.message_attn.register_forward_pre_hook(add_mask, with_kwargs=True) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """Embed groups of frames.

        frames: uint8 [B, T, H, W, 3], T == frames_per_group, H == W == image_size; lengths: int [B], 1..T valid frames
        at the start of each group. Returns [B, T, embed_dim] in the model's dtype; rows at and past a length are 0.
        Raises ValueError for any other frame count, size or dtype: the stock vision model, given another T, would
        silently mix the frames of different videos.
        """
        size = (self.frames_per_group, self.image_size, self.image_size, 3)
        if frames.dtype != torch.uint8 or tuple(frames.shape[1:]) != size:
            raise ValueError(
                f"frames must be uint8 [B, {', '.join(map(str, size))}] for {self.key}; "
                f"got {frames.dtype} {list(frames.shape)}. Pad or regroup the frames, and resize them first."
            )
        lengths = lengths.to(frames.device)
        if lengths.shape != frames.shape[:1] or not bool(((lengths >= 1) & (lengths <= self.frames_per_group)).all()):
            raise ValueError(
                f"lengths must be [{frames.shape[0]}] numbers from 1 to {self.frames_per_group}; got {lengths.tolist()}"
            )
        batch, count = frames.shape[:2]
        mask = torch.arange(count, device=frames.device) < lengths[:, None]
        dtype = self.visual_projection.weight.dtype
        # Pixels are 0..255: the division by 255 is folded into mean and deviation, which half precision would round.
        mean, std = (
            255 * torch.tensor(values, device=frames.device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD)
        )
        pixels = ((frames.flatten(0, 1).permute(0, 3, 1, 2) - mean) / std).to(dtype)
        with self._masked_messages(mask, dtype):
            pooled = self.vision_model(pixel_values=pixels).pooler_output
        embeddings = self.visual_projection(pooled).view(batch, count, -1)
        return embeddings * mask[..., None]


class MaskedMIT(nn.Module):
    """X-CLIP's multi-frame integration transformer with masked attention and a masked mean (paper section 3.2)."""

    def __init__(self, xclip: XCLIPModel) -> None:
        super().__init__()
        self.position_embedding = xclip.mit.position_embedding
        self.encoder = xclip.mit.encoder

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Relate the frames of each group.

        x: frame embeddings [B, T, D] with T the model's number of frames; mask: bool [B, T], True where a frame is
        valid (holes are allowed). Returns tokens [B, T, D] (0 where masked) and their masked mean [B, D].
        Raises ValueError when T is another number.
        """
        frames = self.position_embedding.shape[1]
        if x.shape[1] != frames or mask.shape != x.shape[:2]:
            raise ValueError(f"this MIT takes [B, {frames}, D] with a mask [B, {frames}]; got {list(x.shape)}")
        attention_mask = additive_mask(mask, x.dtype)[:, None, None]
        hidden = self.encoder(inputs_embeds=x + self.position_embedding, attention_mask=attention_mask)[0]
        tokens = (hidden + x) * mask[..., None]
        pooled = tokens.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return tokens, pooled
