"""ADEM-VL's configuration: all that decides its shape and arithmetic (arXiv 2410.17779)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, CLIPVisionModel, PreTrainedConfig, SiglipVisionModel

from helpers.config import PLACEMENTS, nearest

NO_CLS = -1  # position of the CLS token in a sequence that has none
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


VISION_MODELS = {"clip_vision_model": CLIPVisionModel, "siglip_vision_model": SiglipVisionModel}


class AdemVLError(ValueError):
    """A configuration, a batch or a file that does not fit the model; the message says which and what to do."""


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
            object.__setattr__(self, name, hf_config(getattr(self, name), name))
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


def hf_config(config: PreTrainedConfig | dict[str, Any], name: str) -> PreTrainedConfig:
    """Return an HF config, also of its dict; of a whole CLIP or SigLIP that of its vision tower."""
    if isinstance(config, dict):
        if "model_type" not in config:
            raise AdemVLError(f"{name} is a dict without model_type; give an HF config or its to_dict()")
        config = AutoConfig.for_model(**config)
    # a whole CLIP or SigLIP names its vision tower's config
    return config.vision_config if name == "vision_config" and hasattr(config, "vision_config") else config
