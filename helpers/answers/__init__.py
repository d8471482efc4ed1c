"""What trained models say to a table of questions; `predict` is GIF question answering's."""

from helpers.answers.captions import score_captions, write_captions_of
from helpers.answers.tgif_qa import CHUNK, RESULT_COLUMNS, predict, save_predictions, shown_prompt

__all__ = [
    "CHUNK",
    "RESULT_COLUMNS",
    "predict",
    "save_predictions",
    "score_captions",
    "shown_prompt",
    "write_captions_of",
]
