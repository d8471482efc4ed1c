"""The GIF question answering model: its forward passes, its bundles, and one call to ask it."""

from helpers.corpora.tasks import COUNTS, asks_for_count
from helpers.models.gif_qa.ask import HIDDEN_AT_ONCE, Answer, GifQA, check_question
from helpers.models.gif_qa.bundle import load_bundle, load_encoder, read_bundle
from helpers.models.gif_qa.model import (
    BUNDLE_FORMAT,
    CANDIDATE_TOKENS,
    WORDS_AT_ONCE,
    GifQAModel,
    adapter_tensors,
)
from helpers.models.gif_qa.window import MAX_NEW_TOKENS, TooLong, Window, too_long_where_known
from helpers.models.language import FEED_FORWARD_OUTPUTS, adapter_config, load_language_model
from helpers.models.parts import IGNORED, BundleError
from helpers.models.xclip import same_encoder

__all__ = [
    "BUNDLE_FORMAT",
    "CANDIDATE_TOKENS",
    "COUNTS",
    "FEED_FORWARD_OUTPUTS",
    "HIDDEN_AT_ONCE",
    "IGNORED",
    "MAX_NEW_TOKENS",
    "WORDS_AT_ONCE",
    "Answer",
    "BundleError",
    "GifQA",
    "GifQAModel",
    "TooLong",
    "Window",
    "adapter_config",
    "adapter_tensors",
    "asks_for_count",
    "check_question",
    "load_bundle",
    "load_encoder",
    "load_language_model",
    "read_bundle",
    "same_encoder",
    "too_long_where_known",
]
