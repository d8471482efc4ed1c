"""The tasks of TGIF-QA, and the rules that go with their questions and answers."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

TASKS = ("count", "action", "transition", "frameqa")
MULTIPLE_CHOICE = ("action", "transition")
TYPES = ("object", "number", "color", "location")  # in the order of TGIF-QA's type codes 0 to 3
MAX_COUNT = 10

COLOR_FORM = re.compile(r"(of |in )?(what|which)( is| are| was| were)?( the)? colou?rs?\b")


class ScoreError(ValueError):
    """Scores that are not finite: whatever they chose would be an accident."""


def question_form(question: str) -> str:
    """The FrameQA type that a question's wording asks for, one of `TYPES`.

    TGIF-QA generated each type from one template ("how many", "what is the color", "where", else an object), so that
    the wording gives the annotated type of all 13,691 test questions.
    """
    text = question.strip().lower()
    if text.startswith("how many"):
        return "number"
    if COLOR_FORM.match(text):
        return "color"
    return "location" if text.startswith("where") else "object"


COUNTS = tuple(str(number) for number in range(1, MAX_COUNT + 1))


def require_finite_scores(scores: np.ndarray, where: str) -> None:
    """Raise ScoreError, naming `where` (a question, a row), if one is NaN or infinite: argmax would still choose."""
    if not np.isfinite(scores).all():
        raise ScoreError(
            f"the scores of {where} are not finite (NaN or infinity), so that no answer can be chosen: the model's "
            "weights or what it was shown are damaged, or its numbers are too large for half precision. Score with "
            "another bundle, or train this one anew with lower learning rates."
        )


def expected_count(scores: np.ndarray) -> float:
    """Expectation of the model's own distribution over the numbers 1 to 10: softmax of ten summed log-probabilities.

    Raises ScoreError as `softmax`.
    """
    return float(np.dot(softmax(scores), np.arange(1, MAX_COUNT + 1)))


def round_count(value: float) -> int:
    """Nearest whole number (halves go up, as in HCRN's floor(x + 0.5)), clipped to 1..10."""
    return int(np.clip(np.floor(value + 0.5), 1, MAX_COUNT))


def question_key(question: str) -> str:
    """Question text for comparing: lower case, single spaces, no question mark at the end."""
    return " ".join(question.lower().rstrip("? ").split())


def answer_key(row: Any) -> str:
    """Answer for comparing; a count's codes 0 and 1 are the same answer."""
    return str(max(int(row.label), 1)) if row.task == "count" else bare(row.answer)


def bare(text: str) -> str:
    """Text of an answer for comparing: lower case, no spaces around it."""
    return str(text).strip().lower()


def softmax(scores: np.ndarray, where: str = "a question") -> np.ndarray:
    """Probabilities of log-probabilities [K], in float64.

    Raises ScoreError, naming `where`, for scores that are not finite.
    """
    require_finite_scores(scores, where)
    weights = np.exp(np.asarray(scores, dtype=np.float64) - np.max(scores))
    return weights / weights.sum()


def target_answer(task: str, answer: str, label: int) -> str:
    """Text that a question is trained on: TGIF-QA's count code 0 ("once") is the number 1, all else is the answer."""
    return str(max(int(label), 1)) if task == "count" else answer


def option_orders(question: str, options: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """Two orders in which a question lists its options, two or more: in the second each stands in another place.

    They are drawn from the seed and the texts alone, so that neither the order in which options are given nor which of
    them is right has a say.
    """
    texts = sorted(options)
    digest = hashlib.sha256(json.dumps([question, texts]).encode()).digest()
    rng = np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])
    first = [texts[i] for i in rng.permutation(len(texts))]
    turn = int(rng.integers(1, len(texts)))
    return first, first[turn:] + first[:turn]


def asks_for_count(question: str) -> bool:
    """Whether a question is TGIF-QA's repetition count by its wording."""
    return question.strip().lower().startswith("how many times")
