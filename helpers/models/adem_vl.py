"""ADEM-VL (Hao et al., arXiv 2410.17779; code: github.com/Hao840/ADEM-VL) on stock Llama and CLIP.

Both base models are frozen. CLIP's patch features, pooled to several scales, pass a small projector once; every block
of the language model then attends to them by a cross-attention that has no parameters of its own: scores are
phi(query) phi(key)^T without softmax, heads or scale, and the signed-smallest of them are dropped for each text
position (adaptive fusion). The CLS feature becomes one token of the input. Hooks on the blocks' `mlp` or `self_attn`
do it, so that neither model is forked: the same hooks serve training, quantised bases and Hugging Face's `generate`.

Where paper and official code differ, the code is followed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionModel,
)

from helpers.config import nearest
from helpers.models.gif_qa import load_language_model
from helpers.models.xclip import IMAGENET_MEAN, IMAGENET_STD, portable_name
from helpers.workspace import compute_dtype, find_model
from helpers.workspace import device as default_device

FORMAT = 1  # raise when an older folder of save_pretrained can no longer be read
IGNORED = -100  # label of a token that is no part of the answer
NO_CLS = -1  # position of the CLS token in a sequence that has none
ADAPTER_SCALE = 0.1  # of a CLIP adapter's output; a constant of the official code, whatever alpha is
ADAPTER_DROPOUT = 0.1  # inside a CLIP adapter, behind its activation
TEMPERATURE = 0.1  # of the learnable threshold's gate, in standard deviations of a row of scores
SILU_MINIMUM = -0.27846454276107  # of x * sigmoid(x)

PHI: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "identity": lambda x: x,
    "softmax": lambda x: x.softmax(-1),  # over the features of each query and of each key
    "relu": F.relu,
    "elu": F.elu,
    "silu_positive": lambda x: F.silu(x) - SILU_MINIMUM,
}
"""phi of the scores phi(query) phi(key)^T: the paper's choice and its ablations, among them SiLU shifted to >= 0."""

PLACEMENTS = ("mlp_in_out", "mlp_in_in", "mlp_out_out", "mhsa_in_out", "mhsa_in_in", "mhsa_out_out")
"""Module, where the query is taken, where the result is added: "mlp_in_out" asks with the (normalised) input of a
block's MLP and adds to its output; mhsa is the self-attention."""

VISION_MODELS = {"clip_vision_model": CLIPVisionModel, "siglip_vision_model": SiglipVisionModel}
NORMALISATION = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
}
"""Mean and standard deviation of RGB in 0..1; the paper feeds CLIP with ImageNet's on ScienceQA."""


class AdemVLError(ValueError):
    """A configuration, a batch or a file that does not fit the model; the message says which and what to do."""


# ---- Configuration -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdemVLConfig:
    """All that decides ADEM-VL's shape and arithmetic; defaults are the paper's.

    Raises AdemVLError for a value that cannot be used.
    """

    llm_config: PreTrainedConfig
    """HF config of the language model (Llama family), or the dict of one."""
    vision_config: PreTrainedConfig
    """HF config of the vision encoder (CLIPVisionConfig or SiglipVisionConfig), or the dict of one."""
    adapter_dim: int = 12
    """Width of the adapters inside the vision encoder."""
    projector_dim: int = 128
    """Hidden width of the two projectors."""
    scales: tuple[int, ...] | None = (256, 64)
    """Visual positions of each scale, as `fit_scales` takes them."""
    alpha: float = 0.1
    """Weight of the cross-attention's result."""
    beta: float = 0.01
    """Weight of the projected visual features."""
    drop_ratio: float = 0.1
    """Share of the visual positions whose scores are dropped for each text position, in [0, 1)."""
    use_cls: bool = True
    """Whether the CLS feature becomes one input token (an encoder without CLS gives the mean of its patches)."""
    cross_attention: str = "mlp_in_out"
    """One of `PLACEMENTS`."""
    phi: str = "silu"
    """One of `PHI`."""
    learnable_threshold: bool = False
    """Instead of dropping a fixed number, weigh scores by a sigmoid around a threshold that each block learns."""
    layer_dropout: float = 0.0
    """Probability that a block's cross-attention is left out for a sample in training."""
    cross_attention_dropout: float = 0.0
    """Dropout on the scores in training."""

    def __post_init__(self) -> None:
        for name in ("llm_config", "vision_config"):
            object.__setattr__(self, name, _hf_config(getattr(self, name), name))
        if self.vision_config.model_type not in VISION_MODELS:
            raise AdemVLError(
                f"vision_config is of {self.vision_config.model_type!r}; it must be one of {', '.join(VISION_MODELS)}"
            )
        object.__setattr__(self, "scales", fit_scales(self.scales, self.grid))
        for name, valid in (("cross_attention", PLACEMENTS), ("phi", tuple(PHI))):
            if getattr(self, name) not in valid:
                raise AdemVLError(f"{name} is {getattr(self, name)!r}; {nearest(str(getattr(self, name)), valid)}")
        for name in ("drop_ratio", "layer_dropout", "cross_attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise AdemVLError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        for name in ("adapter_dim", "projector_dim"):
            if getattr(self, name) < 1:
                raise AdemVLError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.learnable_threshold and not self.drop_ratio:
            raise AdemVLError("learnable_threshold starts where drop_ratio says: drop_ratio must be above 0")

    @property
    def grid(self) -> int:
        """Side of the encoder's square patch grid."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def normalisation(self) -> str:
        """The key of `NORMALISATION` that the encoder was trained with."""
        return self.vision_config.model_type.removesuffix("_vision_model")

    @property
    def positions(self) -> int:
        """Number V of visual positions over all scales."""
        return sum(self.scales)

    @property
    def dropped(self) -> int:
        """Number of visual positions dropped for each text position: int(drop_ratio * V), as in the official code."""
        return int(self.drop_ratio * self.positions)

    def to_dict(self) -> dict[str, Any]:
        """A dict of plain values, from which `AdemVLConfig(**values)` makes an equal configuration."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("llm_config", "vision_config"):
            values[name] = values[name].to_dict()
            for key in ("_name_or_path", "quantization_config"):  # facts of a loaded model; a path may be absolute
                values[name].pop(key, None)
        return values | {"scales": list(self.scales)}


def fit_scales(scales: Sequence[int] | None, grid: int) -> tuple[int, ...]:
    """`scales` as a tuple, for a patch grid of side `grid`; None: every patch, and means of 2 x 2 patches.

    Raises AdemVLError for a scale that is no square whose side divides the grid's, and for None on an odd grid.
    """
    possible = [side * side for side in range(grid, 0, -1) if grid % side == 0]
    wrong = [scale for scale in scales or () if scale not in possible]
    if scales is None and grid % 2 == 0:
        return grid * grid, grid * grid // 4
    if wrong or not scales:
        fault = "the side is odd, so it cannot be halved" if scales is None else wrong or "none are given"
        raise AdemVLError(
            f"scales {'null' if scales is None else list(scales)}: {fault}; the encoder's {grid}x{grid} patch grid can "
            f"be pooled to {', '.join(map(str, possible))} positions (squares whose side divides {grid})"
        )
    return tuple(scales)


def _hf_config(config: PreTrainedConfig | dict[str, Any], name: str) -> PreTrainedConfig:
    if isinstance(config, dict):
        if "model_type" not in config:
            raise AdemVLError(f"{name} is a dict without model_type; give an HF config or its to_dict()")
        config = AutoConfig.for_model(**config)
    # a whole CLIP or SigLIP names its vision tower's config
    return config.vision_config if name == "vision_config" and hasattr(config, "vision_config") else config


# ---- Formulas ------------------------------------------------------------------------------------------------------


def pool_scales(patches: Tensor, scales: Sequence[int]) -> Tensor:
    """Average-pool patch features [B, N, W] (row-major square grid) to each scale; concatenated: [B, sum(scales), W].

    Section 3.3 of the paper; in the official code pooling comes before projection, and CLS takes no part.
    """
    side = math.isqrt(patches.shape[1])
    grid = patches.transpose(1, 2).unflatten(2, (side, side))
    pooled = [
        patches if scale == side * side else F.avg_pool2d(grid, side // math.isqrt(scale)).flatten(2).transpose(1, 2)
        for scale in scales
    ]
    return torch.cat(pooled, dim=1)


def fuse(scores: Tensor, dropped: int) -> Tensor:
    """Adaptive fusion: zero the `dropped` signed-smallest of the scores [..., V] of each row; ties at the bound stay.

    The bound is the (dropped + 1)-th smallest score, selected without sorting. It and the mask are constants to the
    gradient, and the same in training and evaluation.
    """
    if not dropped:
        return scores
    bound = scores.detach().kthvalue(dropped + 1, dim=-1, keepdim=True).values
    return scores.masked_fill(scores < bound, 0)


def fuse_softly(scores: Tensor, threshold: Tensor) -> Tensor:
    """Adaptive fusion with a learnable threshold: scores [..., V] times sigmoid((z - threshold) / `TEMPERATURE`).

    z is the score standardised within its row, so that `threshold` (a scalar) is in standard deviations and its
    gradient does not depend on the scores' size. Differentiable in both arguments.
    """
    wide = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    centred = wide - wide.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()  # rows of equal scores have none
    return scores * ((centred / deviation - threshold) / TEMPERATURE).sigmoid().to(scores.dtype)


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """`layer` in the precision of `x`: trained weights stay float32 beside a half-precision base."""
    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


class ClipAdapter(nn.Module):
    """Bottleneck beside an encoder block's MLP: 0.1 * up(dropout(gelu(down(z)))), no biases; starts as zero."""

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck, bias=False)
        self.up = nn.Linear(bottleneck, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, z: Tensor) -> Tensor:
        """Map the MLP's input [B, N, W] to what is added to its output."""
        hidden = F.dropout(F.gelu(_linear(z, self.down)), ADAPTER_DROPOUT, self.training)
        return ADAPTER_SCALE * _linear(hidden, self.up)


class Projector(nn.Module):
    """Encoder features to the language model's width: fc2(silu(fc1(z))), Xavier-uniform weights, zero biases."""

    def __init__(self, width: int, hidden: int, output: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, output)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, z: Tensor) -> Tensor:
        """Map [..., W] to [..., D]."""
        return _linear(F.silu(_linear(z, self.fc1)), self.fc2)


@dataclass
class _Visual:
    """What the hooks add in one forward or one generation."""

    keys: Tensor  # [B, V, D]: phi already applied
    values: Tensor  # [B, V, D]
    cls: Tensor | None  # [B, D]
    cls_position: Tensor | None  # [B]: column of the CLS token, NO_CLS without

    def rows(self, count: int) -> _Visual:
        """For `count` rows: beams stand behind one another for each sample."""
        times, rest = divmod(count, len(self.keys))
        if rest or not times:
            raise AdemVLError(f"{count} rows of text were given for {len(self.keys)} rows of visual features")
        parts = (self.keys, self.values, self.cls, self.cls_position)
        return self if times == 1 else _Visual(*(p if p is None else p.repeat_interleave(times, 0) for p in parts))


# ---- The model -----------------------------------------------------------------------------------------------------


class AdemVL(nn.Module):
    """A frozen language model that looks at images through a frozen vision encoder, with a few trained parameters.

    Trainable: `clip_adapters` (one for each encoder block; the last block is not run, so its adapter counts but is
    never fed and never gets a gradient, as in the release), `projector`, `cls_projector`, `key_embedding`,
    `value_embedding`, and `thresholds` where they are learnable. `AdemVL(config)` makes base models of random weights;
    give `language_model` and `vision_model` for others, of any precision. Called by themselves both base models are
    what they were: the hooks act only inside this model's own calls, so that several models can share them.
    """

    def __init__(
        self,
        config: AdemVLConfig,
        language_model: PreTrainedModel | None = None,
        vision_model: PreTrainedModel | None = None,
        sources: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.tokenizer: Any = None
        self.sources = sources or {}
        vision_class = VISION_MODELS[config.vision_config.model_type]
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.llm_config)
        self.language_model = language_model
        self.vision_model = vision_class(config.vision_config) if vision_model is None else vision_model
        for model in (self.language_model, self.vision_model):
            model.requires_grad_(False)
        if not hasattr(self.language_model.base_model, "layers"):
            raise AdemVLError(f"the language model is a {config.llm_config.model_type!r}; give one of the Llama family")
        width, dim = config.vision_config.hidden_size, config.llm_config.hidden_size
        blocks = self._encoder.encoder.layers
        self.clip_adapters = nn.ModuleList([ClipAdapter(width, config.adapter_dim) for _ in blocks])
        self.projector = Projector(width, config.projector_dim, dim)
        self.cls_projector = Projector(width, config.projector_dim, dim) if config.use_cls else None
        self.key_embedding = nn.Parameter(torch.empty(1, config.positions, dim).normal_(0, 0.02))
        self.value_embedding = nn.Parameter(torch.zeros(1, config.positions, dim))
        self.thresholds = None
        if config.learnable_threshold:
            # where a standard normal distribution leaves the share drop_ratio below
            start = NormalDist().inv_cdf(config.drop_ratio)
            self.thresholds = nn.Parameter(torch.full((config.llm_config.num_hidden_layers,), start))
        self._visual: _Visual | None = None
        self._encoding = False
        self._noted: list[Tensor] | None = None  # scores [B, S, V] of each block, where someone asks for them
        self._install_hooks()

    @classmethod
    def build(
        cls,
        language_model: str,
        vision_model: str,
        *,
        quantisation: str = "none",
        revisions: tuple[str | None, str | None] = (None, None),
        device: torch.device | None = None,
        seed: int = 0,
        **options: Any,
    ) -> AdemVL:
        """Put untrained parts on pretrained base models; sets `tokenizer`.

        language_model, vision_model: hub ids, `tiny/...` assets or folders, with `revisions` of both. quantisation:
        "nf4" (the language model in 4 bits) or "none" (bf16 or fp16 by the GPU, fp32 on a CPU). options: fields of
        `AdemVLConfig`. Raises ModelNotFound when weights are missing.
        """
        device = device or default_device()
        llm, tokenizer = _load_llm(language_model, revisions[0], quantisation, device)
        vision = _load_vision(vision_model, revisions[1], device)
        config = AdemVLConfig(llm.config, vision.config, **options)
        sources = {
            "language_model": {
                "model": portable_name(language_model),
                "revision": revisions[0],
                "quantisation": quantisation,
            },
            "vision_model": {"model": portable_name(vision_model), "revision": revisions[1]},
        }
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            model = cls(config, llm, vision, sources)
        model.tokenizer = tokenizer
        return model.to(device)

    # ---- Structure -------------------------------------------------------------------------------------------------

    @property
    def _encoder(self) -> nn.Module:
        return _inner(self.vision_model)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.key_embedding.device

    def adapter_tensors(self) -> dict[str, Tensor]:
        """The trained parts by name, without the base models: what is saved and loaded."""
        bases = ("language_model.", "vision_model.")
        return {name: tensor for name, tensor in self.named_parameters() if not name.startswith(bases)}

    def _install_hooks(self) -> None:
        self.language_model.base_model.register_forward_pre_hook(self._insert_cls, with_kwargs=True)
        place, query, addition = self.config.cross_attention.split("_")
        for index, block in enumerate(self.language_model.base_model.layers):
            module = block.mlp if place == "mlp" else block.self_attn
            if addition == "in":
                module.register_forward_pre_hook(partial(self._add_to_input, index), with_kwargs=True)
            else:
                hook = partial(self._add_to_output, index, query == "out")
                module.register_forward_hook(hook, with_kwargs=True)
        for index, block in enumerate(self._encoder.encoder.layers):
            block.mlp.register_forward_hook(partial(self._add_adapter, index))

    def gradient_checkpointing_enable(self) -> None:
        """In training, compute both base models' activations again for the backward pass instead of keeping them."""

        def contexts() -> tuple[Any, Any]:
            # A block that is computed again must see what its own forward saw, whatever was looked at since.
            return nullcontext(), self._seeing(self._visual, self._encoding)

        for model in (self.language_model, self.vision_model):
            # the newer name of the same method, where there is one
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False, "context_fn": contexts})

    # ---- Hooks -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _seeing(self, visual: _Visual | None, encoding: bool = False) -> Iterator[None]:
        """Let the hooks of the language model add what is in `visual`, and with `encoding` those of the encoder act."""
        before = self._visual, self._encoding
        self._visual, self._encoding = visual, encoding
        try:
            yield
        finally:
            self._visual, self._encoding = before

    def _insert_cls(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Replace the embeddings at the CLS positions; columns are counted from the beginning of what is cached."""
        ids, past = kwargs.get("input_ids"), kwargs.get("past_key_values")
        if self._visual is None or ids is None:
            return args, kwargs
        self._visual = visual = self._visual.rows(len(ids))
        if visual.cls is None:
            return args, kwargs
        embeddings = module.get_input_embeddings()(ids)
        columns = torch.arange(ids.shape[1], device=ids.device) + (0 if past is None else past.get_seq_length())
        here = columns == visual.cls_position[:, None]
        embeddings = torch.where(here[..., None], visual.cls[:, None].to(embeddings.dtype), embeddings)
        return args, kwargs | {"input_ids": None, "inputs_embeds": embeddings}

    def _attend(self, index: int, query: Tensor) -> Tensor:
        """alpha * X(query) of block `index`: [B, S, D] to [B, S, D]."""
        config, visual = self.config, self._visual
        scores = PHI[config.phi](query) @ visual.keys.to(query.dtype).mT
        if self.thresholds is not None:
            scores = fuse_softly(scores, self.thresholds[index])
        else:
            scores = fuse(scores, config.dropped)
        if self._noted is not None:
            self._noted.append(scores)
        scores = F.dropout(scores, config.cross_attention_dropout, self.training)
        result = config.alpha * (scores @ visual.values.to(query.dtype))
        if self.training and config.layer_dropout:
            kept = torch.rand(len(result), 1, 1, device=result.device) >= config.layer_dropout
            result = result * kept.to(result.dtype) / (1 - config.layer_dropout)
        return result

    def _add_to_input(
        self, index: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        if self._visual is None:
            return args, kwargs
        query = _module_input(args, kwargs)
        changed = query + self._attend(index, query)
        return ((changed, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": changed})

    def _add_to_output(
        self, index: int, of_output: bool, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> Any:
        if self._visual is None:
            return output
        first = output[0] if isinstance(output, tuple) else output
        changed = first + self._attend(index, first if of_output else _module_input(args, kwargs))
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    def _add_adapter(self, index: int, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output + self.clip_adapters[index](args[0]) if self._encoding else output

    # ---- What is seen ----------------------------------------------------------------------------------------------

    def visual_features(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Features of images [M, 3, H, W]: patches [M, N, W] and CLS [M, W].

        The last block is not run; the final layer norm is applied to all tokens, and the output projection is not used.
        An encoder without a CLS token gives the mean of its patches in its place.
        """
        encoder = self._encoder
        hidden = encoder.embeddings(pixel_values.to(self.vision_model.dtype))
        if hasattr(encoder, "pre_layrnorm"):
            hidden = encoder.pre_layrnorm(hidden)
        with self._seeing(None, encoding=True):
            for block in encoder.encoder.layers[:-1]:
                hidden = block(hidden, None)
        hidden = encoder.post_layernorm(hidden)
        if hasattr(encoder.embeddings, "class_embedding"):
            return hidden[:, 1:], hidden[:, 0]
        return hidden, hidden.mean(1)

    def _look(self, pixel_values: Tensor | None, has_image: Tensor, cls_position: Tensor | None) -> _Visual:
        """Keys, values and CLS tokens of a batch. The encoder runs on the rows with an image alone.

        E = beta * projector(pooled features), exactly 0 for a row without an image, where keys and values are the
        embedding tables alone.
        """
        config, rows = self.config, len(has_image)
        width, dtype = config.vision_config.hidden_size, self.vision_model.dtype
        patches = torch.zeros(rows, config.grid**2, width, dtype=dtype, device=self.device)
        cls = torch.zeros(rows, width, dtype=dtype, device=self.device)
        if has_image.any():
            found = self.visual_features(pixel_values[has_image])
            # under autocast the features' precision is not the encoder's
            patches, cls = (
                zeros.to(seen.dtype).index_put((has_image,), seen)
                for zeros, seen in zip((patches, cls), found, strict=True)
            )
        # The projectors run on all rows, so that their parameters have gradients in a batch without images too.
        embedded = config.beta * self.projector(pool_scales(patches, config.scales)) * has_image[:, None, None]
        dtype = self.language_model.get_input_embeddings().weight.dtype
        return _Visual(
            keys=PHI[config.phi](embedded + self.key_embedding).to(dtype),
            values=(embedded + self.value_embedding).to(dtype),
            cls=None if self.cls_projector is None else self.cls_projector(cls),
            cls_position=cls_position,
        )

    def _check(
        self, input_ids: Tensor, pixel_values: Tensor | None, has_image: Tensor | None, cls_position: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """has_image and cls_position of a batch, filled in where they are None. Raises AdemVLError for a misfit."""
        rows = len(input_ids)
        limit = self.config.llm_config.max_position_embeddings
        if input_ids.shape[1] > limit:
            raise AdemVLError(f"a sequence of {input_ids.shape[1]} tokens is over the language model's {limit}")
        if has_image is None:
            has_image = torch.full((rows,), pixel_values is not None, device=self.device)
        has_image = has_image.to(self.device, torch.bool)
        if has_image.shape != (rows,):
            raise AdemVLError(f"has_image is {list(has_image.shape)}; the batch needs [{rows}]")
        if has_image.any():
            size = self.config.vision_config.image_size
            expected = [rows, 3, size, size]
            if pixel_values is None or list(pixel_values.shape) != expected:
                given = "not given" if pixel_values is None else list(pixel_values.shape)
                raise AdemVLError(f"pixel_values are {given}; rows with an image need {expected}")
        if not self.config.use_cls:
            return has_image, None
        if cls_position is None:
            cls_position = torch.full((rows,), NO_CLS, device=self.device)
        cls_position = cls_position.to(self.device)
        wrong = (cls_position >= 0) != has_image
        if wrong.any() or (cls_position >= input_ids.shape[1]).any():
            row = int(wrong.nonzero()[0]) if wrong.any() else int(cls_position.argmax())
            raise AdemVLError(
                f"row {row} has {'an' if has_image[row] else 'no'} image, but its CLS position is "
                f"{int(cls_position[row])} of {input_ids.shape[1]}: encode sequences with has_image as it is"
            )
        return has_image, cls_position

    # ---- Forward and generation ------------------------------------------------------------------------------------

    def _hidden(self, input_ids: Tensor, attention_mask: Tensor | None, visual: _Visual) -> Tensor:
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        with self._seeing(visual):
            return self.language_model.base_model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
                use_cache=False,
            ).last_hidden_state

    def _logits(self, hidden: Tensor) -> Tensor:
        head = self.language_model.get_output_embeddings()
        return head(hidden.to(head.weight.dtype)).float()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        has_image: Tensor | None = None,
        cls_position: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Logits of a batch, and the loss of its answers.

        input_ids, attention_mask, labels [B, S] (labels: -100 where nothing is to be learnt); pixel_values
        [B, 3, H, W], anything in rows without an image; has_image [B] bool (None: all rows if there are pixel_values,
        else none); cls_position [B]: column that the CLS token replaces, -1 without an image. `collate` makes all.
        Without labels: logits [B, S, vocabulary]. With labels: loss, the mean cross-entropy in nats over all answer
        tokens of the batch, and logits [M, vocabulary] of these M tokens in row-major order.
        Raises AdemVLError for inputs that do not fit one another or the model, or labels without an answer token.
        """
        has_image, cls_position = self._check(input_ids, pixel_values, has_image, cls_position)
        hidden = self._hidden(input_ids, attention_mask, self._look(pixel_values, has_image, cls_position))
        if labels is None:
            return {"logits": self._logits(hidden)}
        targets = labels[:, 1:]
        answers = targets != IGNORED
        if not answers.any():
            raise AdemVLError("labels hold no answer token: every label is -100")
        logits = self._logits(hidden[:, :-1][answers])
        return {"loss": F.cross_entropy(logits, targets[answers]), "logits": logits}

    @contextmanager
    def _inference(self) -> Iterator[None]:
        training = self.training
        self.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            self.train(training)

    def next_logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        has_image: Tensor | None = None,
        cls_position: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, vocabulary] of the token after each row, wherever its padding is; arguments as in `forward`.

        The official answer is their argmax; the likelihoods of the letters are their log-softmax at `letter_tokens`.
        """
        with self._inference():
            has_image, cls_position = self._check(input_ids, pixel_values, has_image, cls_position)
            hidden = self._hidden(input_ids, attention_mask, self._look(pixel_values, has_image, cls_position))
            last = (attention_mask * torch.arange(1, attention_mask.shape[1] + 1, device=hidden.device)).argmax(1)
            return self._logits(hidden[torch.arange(len(last), device=hidden.device), last])

    def contributions(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        has_image: Tensor | None = None,
        cls_position: Tensor | None = None,
    ) -> Tensor:
        """How much each visual position adds to the last column: [B, V], arguments as in `forward`, padding left.

        The length of alpha * score * value (section 3.2 of the paper) after adaptive fusion, mean over blocks.
        """
        with self._inference():
            has_image, cls_position = self._check(input_ids, pixel_values, has_image, cls_position)
            visual = self._look(pixel_values, has_image, cls_position)
            self._noted = []
            try:
                self._hidden(input_ids, attention_mask, visual)
                scores = torch.stack([block[:, -1] for block in self._noted]).float()
            finally:
                self._noted = None
            return self.config.alpha * scores.abs().mean(0) * visual.values.float().norm(dim=-1)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        has_image: Tensor | None = None,
        cls_position: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Hugging Face's `generate` (greedy, sampling, beams; cached or not): prompt and new tokens, [B, S + new].

        Rows of unequal length are padded on the left. Arguments as in `forward`; `options` go to `generate` unchanged.
        """
        with self._inference():
            has_image, cls_position = self._check(input_ids, pixel_values, has_image, cls_position)
            with self._seeing(self._look(pixel_values, has_image, cls_position)):
                return self.language_model.generate(input_ids=input_ids, attention_mask=attention_mask, **options)

    # ---- Files -----------------------------------------------------------------------------------------------------

    def _load_strictly(self, tensors: dict[str, Tensor], path: Path, names: dict[str, str] | None = None) -> None:
        """Copy `tensors`, which must be exactly the trained parts in name (through `names`), shape and kind."""
        ours = self.adapter_tensors()
        expected = {(names or {}).get(name, name): tensor for name, tensor in ours.items()}
        faults = [f"missing: {name}" for name in sorted(expected.keys() - tensors.keys())]
        faults += [f"not expected: {name}" for name in sorted(tensors.keys() - expected.keys())]
        for name in sorted(expected.keys() & tensors.keys()):
            given = tensors[name]
            if given.shape != expected[name].shape:
                faults.append(f"{name} is {list(given.shape)}, expected {list(expected[name].shape)}")
            elif not given.is_floating_point():
                faults.append(f"{name} is {given.dtype}, expected floating-point numbers")
        if faults:
            more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
            raise AdemVLError(
                f"{path} does not fit this model: {'; '.join(faults[:8])}{more}. Check adapter_dim, projector_dim, "
                "scales, use_cls and learnable_threshold, and the sizes of both base models"
            )
        with torch.no_grad():
            for name, tensor in expected.items():
                tensor.copy_(tensors[name])

    def save_pretrained(self, folder: Path | str) -> Path:
        """Write the trained parts to `folder`, at once or not at all; one that is already there is replaced.

        adapter.safetensors (trained tensors only) and adem_vl.json (configuration, where the base models came from,
        and what tells them from others). A base model of unknown origin, as of `AdemVL(config)`, is written along.
        """
        folder = Path(folder)
        staging = folder.with_name(f".{folder.name}.{os.getpid()}")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.adapter_tensors().items()}
        save_file(tensors, staging / "adapter.safetensors")
        bases = {}
        for part in ("language_model", "vision_model"):
            model = getattr(self, part)
            source = dict(self.sources.get(part) or {"model": portable_name(model.name_or_path or "")})
            if not source["model"]:
                model.save_pretrained(staging / part)
            bases[part] = source | {"identity": _identity(model, part)}
        facts = {"format": FORMAT, "config": self.config.to_dict(), "base": bases}
        (staging / "adem_vl.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        if folder.exists():
            folder.rename(old)
        staging.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
        return folder

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        language_model: str | PreTrainedModel | None = None,
        vision_model: str | PreTrainedModel | None = None,
        device: torch.device | None = None,
    ) -> AdemVL:
        """Load what `save_pretrained` wrote, on the base models that it names or on those given (loaded, or by name).

        The model is in evaluation mode, and `tokenizer` is set where the language model was loaded by name. Raises
        AdemVLError for a folder that is incomplete or of another format, for a missing, extra or mismatched tensor,
        and for other base models than those it was trained on; ModelNotFound when weights are missing.
        """
        folder, device = Path(folder), device or default_device()
        facts = _read_facts(folder)
        given = {"language_model": language_model, "vision_model": vision_model}
        config, tokenizer = AdemVLConfig(**facts["config"]), None
        for part, model in given.items():
            source = facts["base"][part]
            if not isinstance(model, PreTrainedModel):
                name = model or source["model"] or str(folder / part)
                revision = source.get("revision") if not model else None
                if part == "vision_model":
                    given[part] = _load_vision(name, revision, device)
                elif name == str(folder / part):  # written along, without a tokenizer
                    given[part] = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
                else:
                    given[part], tokenizer = _load_llm(name, revision, source.get("quantisation", "none"), device)
            _require_same(source, given[part], part)
        known = {part: source for part, source in facts["base"].items() if source["model"]}
        for source in known.values():
            del source["identity"]
        model = cls(config, **given, sources=known)
        path = folder / "adapter.safetensors"
        if not path.is_file():
            raise AdemVLError(f"{path} is missing; copy the whole folder")
        model._load_strictly(load_file(path), path)
        model.tokenizer = tokenizer
        return model.to(device).eval()

    def load_released_adapters(self, path: Path | str) -> None:
        """Load the authors' checkpoint-<epoch>.pth (github.com/Hao840/ADEM-VL) into the trained parts, strictly.

        Only tensors and `argparse.Namespace` are unpickled. Raises AdemVLError for any other content, and for a
        missing, extra or mismatched tensor.
        """
        path = Path(path)
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise AdemVLError(
                f"{path} is no readable checkpoint of tensors; it was not loaded: {str(error).splitlines()[0]}"
            ) from error
        tensors = content.get("model") if isinstance(content, dict) else None
        if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
            raise AdemVLError(f"{path} has no `model`, a dict of tensors; give a released checkpoint-<epoch>.pth")
        self._load_strictly(tensors, path, released_names(self.adapter_tensors()))


def _module_input(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def released_names(names: Sequence[str] | dict[str, Tensor]) -> dict[str, str]:
    """The name of each trained tensor in the authors' checkpoints; `thresholds` has none and keeps its own."""
    table = {"key_embedding": "adapter_emb1", "value_embedding": "adapter_emb2"}
    parts = {"projector": "adapter_proj", "cls_projector": "adapter_proj_cls"}
    layers = {"down": "fc1", "up": "fc2"}
    for name in names:
        head, *rest = name.split(".")
        if head in parts:
            table[name] = ".".join([parts[head], *rest])
        elif head == "clip_adapters":
            block, layer, kind = rest
            table[name] = f"backbone.visual.transformer.resblocks.{block}.adapter_mlp.{layers[layer]}.{kind}"
    return {name: table.get(name, name) for name in names}


# ---- Sequences and images ------------------------------------------------------------------------------------------


class PromptTooLong(AdemVLError):
    """A sequence that is longer than the window; neither its answer nor "The answer is" is ever cut."""


@dataclass(frozen=True)
class Encoded:
    """One tokenised sample: input_ids and labels (-100: not learnt) of equal length, and where the CLS token goes."""

    input_ids: list[int]
    labels: list[int]
    has_image: bool
    cls_position: int  # NO_CLS without


def encode(
    tokenizer: Any,
    prompt: str,
    answer: str | None = None,
    *,
    has_image: bool,
    use_cls: bool = True,
    max_tokens: int = 512,
) -> Encoded:
    """Tokenise one sample as the official code lays it out.

    With an image: BOS, "Image: ", the CLS token's place, prompt and answer, EOS; without: BOS, "Image: N/A", prompt and
    answer, EOS. Without `use_cls` the piece about the image is left out in both. The pieces are tokenised apart, prompt
    and answer together. Answer tokens and EOS are learnt; without an answer the sequence ends with the prompt and
    nothing is. Raises PromptTooLong above `max_tokens`, AdemVLError for an empty answer.
    """

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ids, cls_position = [start], NO_CLS
    if use_cls:
        ids += tokens("Image: " if has_image else "Image: N/A")
        if has_image:
            cls_position = len(ids)
            ids.append(start)  # any token: its embedding is replaced
    asked = tokens(prompt)
    if answer is None:
        ids, learnt = ids + asked, 0
    else:
        whole = tokens(prompt + answer)
        # Some tokenisers join the prompt's last character with the answer's first: such a token is learnt too.
        shared = next((i for i, (a, b) in enumerate(zip(asked, whole, strict=False)) if a != b), len(asked))
        learnt = len(whole) - shared + 1
        if learnt < 2:
            raise AdemVLError(f"the answer {answer!r} adds no token to the prompt {prompt[-40:]!r}")
        ids = [*ids, *whole, tokenizer.eos_token_id]
    if len(ids) > max_tokens:
        raise PromptTooLong(f"{len(ids)} tokens; the window has {max_tokens}. Raise max_tokens or leave the sample out")
    labels = [IGNORED] * (len(ids) - learnt) + ids[len(ids) - learnt :]
    return Encoded(ids, labels, has_image, cls_position)


def letter_tokens(tokenizer: Any, prompt: str, letters: Sequence[str]) -> list[int]:
    """The token that begins each letter's answer behind `prompt`, which ends with "The answer is".

    Raises AdemVLError if the tokeniser does not tell the letters apart by their first token: such a language model
    cannot answer with one token.
    """
    asked = tokenizer(prompt, add_special_tokens=False).input_ids
    found = []
    for letter in letters:
        whole = tokenizer(f"{prompt} {letter}.", add_special_tokens=False).input_ids
        if whole[: len(asked)] != asked or len(whole) == len(asked):
            raise AdemVLError(f"the answer {letter!r} changes how the end of the prompt {prompt[-20:]!r} is tokenised")
        found.append(whole[len(asked)])
    if len(set(found)) < len(found):
        raise AdemVLError(f"the letters {', '.join(letters)} do not begin with different tokens: {found}")
    return found


def collate(
    samples: Sequence[Encoded], pixel_values: Tensor | None, padding: int, left: bool = False
) -> dict[str, Tensor]:
    """Pad samples to a batch of `AdemVL.forward`; `left` for generation. padding: the padding token's id.

    pixel_values [B, 3, H, W] (rows without an image hold anything), or None for a batch without images. Returns
    input_ids, attention_mask, labels [B, S], has_image and cls_position [B], and pixel_values where given.
    """
    width = max(len(sample.input_ids) for sample in samples)
    shape = (len(samples), width)
    batch = {
        "input_ids": torch.full(shape, padding),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, IGNORED),
        "has_image": torch.tensor([sample.has_image for sample in samples]),
        "cls_position": torch.full((len(samples),), NO_CLS),
    }
    for row, sample in enumerate(samples):
        first = width - len(sample.input_ids) if left else 0
        span = slice(first, first + len(sample.input_ids))
        batch["input_ids"][row, span] = torch.tensor(sample.input_ids)
        batch["attention_mask"][row, span] = 1
        batch["labels"][row, span] = torch.tensor(sample.labels)
        if sample.cls_position != NO_CLS:
            batch["cls_position"][row] = first + sample.cls_position
    return batch if pixel_values is None else batch | {"pixel_values": pixel_values}


def image_tensor(image: Image.Image | None, size: int, normalisation: str = "clip") -> Tensor:
    """Pixels [3, size, size] of an RGB image: resized to exactly this size (aspect ratio not kept), normalised.

    Bicubic, 0..1, then `NORMALISATION`: "clip" and "siglip" are the encoders' own, "imagenet" is the paper's on
    ScienceQA. None, a sample without an image, gives zeros. Raises AdemVLError for an unknown normalisation.
    """
    if normalisation not in NORMALISATION:
        raise AdemVLError(f"normalisation {normalisation!r}; {nearest(normalisation, list(NORMALISATION))}")
    if image is None:
        return torch.zeros(3, size, size)
    resized = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(resized, dtype=np.float32)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORMALISATION[normalisation])
    return (pixels - mean) / std


# ---- Base models ---------------------------------------------------------------------------------------------------


def _load_llm(name: str, revision: str | None, quantisation: str, device: torch.device) -> tuple[PreTrainedModel, Any]:
    if quantisation not in ("nf4", "none"):
        raise AdemVLError(f"quantisation is {quantisation!r}; it must be 'nf4' or 'none'")
    return load_language_model(SimpleNamespace(model=name, revision=revision, quantisation=quantisation), device)


def _load_vision(name: str, revision: str | None, device: torch.device) -> PreTrainedModel:
    folder = find_model(name, revision)
    config = _hf_config(AutoConfig.from_pretrained(folder), "vision_config")
    if config.model_type not in VISION_MODELS:
        raise AdemVLError(f"{name} is a {config.model_type!r}; the encoder must be one of {', '.join(VISION_MODELS)}")
    return VISION_MODELS[config.model_type].from_pretrained(folder, dtype=compute_dtype(device)).eval().to(device)


def _inner(model: PreTrainedModel) -> nn.Module:
    """The vision transformer itself; some versions of transformers keep it one level deeper."""
    return getattr(model, "vision_model", model)


def _identity(model: PreTrainedModel, part: str) -> dict[str, Any]:
    """What tells a base model from others, whatever folder or precision it was loaded from."""
    config = model.config
    vision = part == "vision_model"
    table = _inner(model).embeddings.position_embedding.weight if vision else model.get_input_embeddings().weight
    return {
        "architecture": f"{config.model_type}, {config.num_hidden_layers} layers of {config.hidden_size}",
        "weights": table[:8, :8].detach().float().flatten().tolist(),
    }


def _require_same(source: dict[str, Any], model: PreTrainedModel, part: str) -> None:
    ours, theirs = source["identity"], _identity(model, part)
    # bfloat16 keeps 8 bits: a model loaded in another precision is still the same model
    if ours["architecture"] == theirs["architecture"] and np.allclose(
        ours["weights"], theirs["weights"], rtol=2**-8, atol=1e-6
    ):
        return
    raise AdemVLError(
        f"these adapters were trained on the {part.replace('_', ' ')} {source['model'] or 'written beside them'} "
        f"({ours['architecture']}); the one given is another ({theirs['architecture']}, or other weights)"
    )


def _read_facts(folder: Path) -> dict[str, Any]:
    path = folder / "adem_vl.json"
    if not path.is_file():
        raise AdemVLError(f"{folder} holds no adem_vl.json; give the folder that save_pretrained wrote")
    facts = json.loads(path.read_text(encoding="utf-8"))
    if facts.get("format") != FORMAT:
        raise AdemVLError(f"{path} is of format {facts.get('format')!r}; this version reads format {FORMAT}")
    return facts
