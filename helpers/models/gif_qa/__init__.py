"""The GIF question answering model: its forward passes, its bundles, and one call to ask it."""

from helpers.corpora.tasks import asks_for_count
from helpers.models.gif_qa.ask import Answer, GifQA, check_question
from helpers.models.gif_qa.bundle import load_bundle, load_encoder, read_bundle
from helpers.models.gif_qa.model import (
    BUNDLE_FORMAT,
    CANDIDATE_TOKENS,
    COUNTS,
    MAX_NEW_TOKENS,
    GifQAModel,
    adapter_tensors,
)
from helpers.models.language import adapter_config, load_language_model
from helpers.models.parts import IGNORED, BundleError

__all__ = [
    "BUNDLE_FORMAT",
    "CANDIDATE_TOKENS",
    "COUNTS",
    "IGNORED",
    "MAX_NEW_TOKENS",
    "Answer",
    "BundleError",
    "GifQA",
    "GifQAModel",
    "adapter_config",
    "adapter_tensors",
    "asks_for_count",
    "check_question",
    "load_bundle",
    "load_encoder",
    "load_language_model",
    "read_bundle",
]
