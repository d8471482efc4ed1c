"""ADEM-VL (Hao et al., arXiv 2410.17779): its configuration, layers, sequences and the model itself."""

from helpers.config import PLACEMENTS
from helpers.models.adem_vl.config import (
    NO_CLS,
    PHI,
    SILU_MINIMUM,
    VISION_MODELS,
    AdemVLConfig,
    AdemVLError,
    fit_scales,
    hf_config,
)
from helpers.models.adem_vl.layers import (
    ADAPTER_DROPOUT,
    ADAPTER_SCALE,
    TEMPERATURE,
    ClipAdapter,
    Projector,
    fuse,
    fuse_softly,
    pool_scales,
)
from helpers.models.adem_vl.model import FORMAT, RELEASED, AdemVL, parameter_comparison, released_names
from helpers.models.adem_vl.sequences import (
    NORMALISATION,
    Encoded,
    PromptTooLong,
    collate,
    encode,
    image_tensor,
    letter_tokens,
)
from helpers.models.parts import IGNORED

__all__ = [
    "ADAPTER_DROPOUT",
    "ADAPTER_SCALE",
    "FORMAT",
    "IGNORED",
    "NORMALISATION",
    "NO_CLS",
    "PHI",
    "PLACEMENTS",
    "RELEASED",
    "SILU_MINIMUM",
    "TEMPERATURE",
    "VISION_MODELS",
    "AdemVL",
    "AdemVLConfig",
    "AdemVLError",
    "ClipAdapter",
    "Encoded",
    "Projector",
    "PromptTooLong",
    "collate",
    "encode",
    "fit_scales",
    "fuse",
    "fuse_softly",
    "hf_config",
    "image_tensor",
    "letter_tokens",
    "parameter_comparison",
    "pool_scales",
    "released_names",
]
