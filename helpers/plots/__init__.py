"""Figures: one look, titles, labelled axes with units. Every function returns a closed figure."""

from helpers.plots.answers import answer_overview, asked_gif, gallery
from helpers.plots.look import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    STYLE,
    TASK_LABELS,
    image_tag,
    literal,
    save_figure,
)
from helpers.plots.stages import features_overview, frames_overview, loss_curve
from helpers.plots.tgif_qa import (
    TASK_COLORS,
    VARIANT_COLORS,
    VARIANT_LABELS,
    accuracy_by_length,
    accuracy_by_type,
    groups_comparison,
    ladder,
    reliability,
    scores_with_baselines,
)

__all__ = [
    "BLUE",
    "GREEN",
    "GREY",
    "ORANGE",
    "PURPLE",
    "RED",
    "SKY",
    "STYLE",
    "TASK_COLORS",
    "TASK_LABELS",
    "VARIANT_COLORS",
    "VARIANT_LABELS",
    "accuracy_by_length",
    "accuracy_by_type",
    "answer_overview",
    "asked_gif",
    "features_overview",
    "frames_overview",
    "gallery",
    "groups_comparison",
    "image_tag",
    "ladder",
    "literal",
    "loss_curve",
    "reliability",
    "save_figure",
    "scores_with_baselines",
]
