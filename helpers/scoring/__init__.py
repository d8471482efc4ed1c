"""Scores from tables of predictions alone, their baselines and intervals."""

from helpers.corpora.tasks import COUNTS, answer_key, expected_count, question_key, round_count
from helpers.scoring.baselines import majority_by, predict_majority, random_expectation, shuffle_gifs, text_baselines
from helpers.scoring.intervals import DRAWN_AT_ONCE, bootstrap_interval, mean_interval, wilson_interval
from helpers.scoring.text import normalise_vqa
from helpers.scoring.tgif_qa import (
    BASE_COLUMNS,
    CONVENTIONS,
    HEADLINE,
    breakdown,
    calibration,
    correctness,
    difference_table,
    expected_calibration_error,
    gallery_examples,
    join_variants,
    length_bins,
    metric_table,
    metrics,
    outcomes,
    variant_names,
)

__all__ = [
    "BASE_COLUMNS",
    "CONVENTIONS",
    "COUNTS",
    "DRAWN_AT_ONCE",
    "HEADLINE",
    "answer_key",
    "bootstrap_interval",
    "breakdown",
    "calibration",
    "correctness",
    "difference_table",
    "expected_calibration_error",
    "expected_count",
    "gallery_examples",
    "join_variants",
    "length_bins",
    "majority_by",
    "mean_interval",
    "metric_table",
    "metrics",
    "normalise_vqa",
    "outcomes",
    "predict_majority",
    "question_key",
    "random_expectation",
    "round_count",
    "shuffle_gifs",
    "text_baselines",
    "variant_names",
    "wilson_interval",
]
