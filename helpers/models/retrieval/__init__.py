"""Text-video retrieval: embeddings out of a video-language model, heads that bring both into one space, and search."""

from helpers.models.retrieval.embed import (
    BEFORE,
    LAST,
    all_layers,
    embed_texts,
    embed_videos,
    embedding_facts,
    text_answer_states,
    token_states,
    video_answer_states,
    video_positions,
)
from helpers.models.retrieval.pooling import POOLINGS, centred, pool

__all__ = [
    "BEFORE",
    "LAST",
    "POOLINGS",
    "all_layers",
    "centred",
    "embed_texts",
    "embed_videos",
    "embedding_facts",
    "pool",
    "text_answer_states",
    "token_states",
    "video_answer_states",
    "video_positions",
]
