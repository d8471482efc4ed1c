"""The tables on disk, all in Lance: frame shards (notebook 01), the feature table (notebook 02), their readers."""

from helpers.store.encoding import Cached, GroupPlan, cache_features
from helpers.store.features import FeatureTable, feature_schema, upsert_features
from helpers.store.frames import FrameTable, decompressed, frames_key
from helpers.store.shards import FRAME_SCHEMA, JOURNAL_SCHEMA, SOURCE_COLUMNS, Sharded, leave_out, shard_gifs
from helpers.store.tables import (
    BATCH_GIFS,
    BATCH_SECONDS,
    CAPTION_SCHEMA,
    CONTRACT_VERSION,
    QUESTION_SCHEMA,
    SORT_GIFS,
    StoreError,
    keep,
    read_captions,
    read_questions,
    write_captions,
    write_questions,
    write_rejects,
)

__all__ = [
    "BATCH_GIFS",
    "BATCH_SECONDS",
    "CAPTION_SCHEMA",
    "CONTRACT_VERSION",
    "FRAME_SCHEMA",
    "JOURNAL_SCHEMA",
    "QUESTION_SCHEMA",
    "SORT_GIFS",
    "SOURCE_COLUMNS",
    "Cached",
    "FeatureTable",
    "FrameTable",
    "GroupPlan",
    "Sharded",
    "StoreError",
    "cache_features",
    "decompressed",
    "feature_schema",
    "frames_key",
    "keep",
    "leave_out",
    "read_captions",
    "read_questions",
    "shard_gifs",
    "upsert_features",
    "write_captions",
    "write_questions",
    "write_rejects",
]
