"""The tables on disk, all in Lance: frame shards (notebook 01), the feature table (notebook 02), their readers."""

from helpers.store.encoding import Cached, GroupPlan, cache_features
from helpers.store.features import FeatureTable, feature_row, feature_schema, upsert_features
from helpers.store.frames import FrameTable, decompressed, frames_key
from helpers.store.shards import FRAME_SCHEMA, JOURNAL_SCHEMA, SOURCE_COLUMNS, Sharded, shard_gifs
from helpers.store.tables import (
    QUESTION_SCHEMA,
    StoreError,
    digest_of,
    keep,
    open_table,
    read_questions,
    write_parquet,
    write_questions,
    write_sorted,
)

__all__ = [
    "FRAME_SCHEMA",
    "JOURNAL_SCHEMA",
    "QUESTION_SCHEMA",
    "SOURCE_COLUMNS",
    "Cached",
    "FeatureTable",
    "FrameTable",
    "GroupPlan",
    "Sharded",
    "StoreError",
    "cache_features",
    "decompressed",
    "digest_of",
    "feature_row",
    "feature_schema",
    "frames_key",
    "keep",
    "open_table",
    "read_questions",
    "shard_gifs",
    "upsert_features",
    "write_parquet",
    "write_questions",
    "write_sorted",
]
