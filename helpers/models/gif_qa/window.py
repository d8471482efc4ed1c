"""Room in the language model's window: which questions are too long for it, told before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from transformers import AutoConfig, AutoTokenizer

from helpers.config import Profile
from helpers.corpora.schema import reject_table
from helpers.corpora.tasks import COUNTS, MULTIPLE_CHOICE, target_answer
from helpers.models.chat import ChatFormat, chat_format
from helpers.models.connectors import video_tokens
from helpers.models.text import answer_tokens, prompt_tokens
from helpers.workspace.weights import ModelNotFound, find_model

MAX_NEW_TOKENS = 24  # an answer is a word, a number or a short phrase
WRITTEN_TOKENS = MAX_NEW_TOKENS + 1  # an answer that the model wrote and that is scored, the terminator included


class TooLong(ValueError):
    """A sequence that is longer than the language model's window."""


@dataclass(frozen=True)
class Window:
    """A language model's window and what fills it: its tokenizer, its positions (None: no limit), and the profile."""

    tokenizer: Any
    size: int | None
    profile: Profile

    @classmethod
    def of(cls, profile: Profile) -> Window:
        """The window of the profile's language model, from its configuration and tokenizer; no weights are needed.

        Raises ModelNotFound when these are nowhere to be had, ChatTemplateError for a template that cannot be used.
        """
        config = profile.language_model
        folder = find_model(config.model, config.revision, weights=False)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        chat_format(tokenizer, config)  # told here, before anything is trained
        return cls(tokenizer, window_size(AutoConfig.from_pretrained(folder)), profile)

    def too_long(self, questions: pd.DataFrame, frames: Mapping[str, int]) -> pd.DataFrame:
        """The questions that do not fit, as rejects: question_id, GIF, reason.

        questions: QA table with `gif_sha256`. frames: sampled frames of each GIF's longest view, by gif_sha256. A
        sequence is the prompt, the video tokens, and what may stand behind them: in training the answer, or the longest
        option where the options' scores are compared; in the test the longest option or count, or what the model
        writes. A test question is asked about other GIFs too (shuffled), so that it needs room for the longest of them.
        """
        if self.size is None:
            return reject_table([])
        shown = questions["gif_sha256"].map(frames).to_numpy(dtype=np.int64, copy=True)
        test = (questions["split"] == "test").to_numpy()
        shown[test] = shown[test].max(initial=0)
        video, profile = self.video(shown), self.profile
        chat = chat_format(self.tokenizer, profile.language_model)
        known: dict[Any, int] = {}  # many questions and most answers occur again and again
        rejects = []
        for row, tokens, tested in zip(questions.itertuples(), video.tolist(), test, strict=True):
            closed = row.task in MULTIPLE_CHOICE
            asked = (row.question, tuple(row.options) if closed and profile.evaluation.options_in_prompt else ())
            if asked not in known:
                config = profile.language_model
                known[asked] = len(prompt_tokens(self.tokenizer, config.prompt, *asked, config.option_style, chat))
            behind = self._behind(row, tested, known, chat)
            if known[asked] + tokens + behind > self.size:
                parts = f"{known[asked]} tokens of question and prompt, {tokens} of the GIF, {behind} for the answer"
                rejects.append((row.question_id, row.gif, f"too long: {parts}; the window has {self.size}"))
        return reject_table(rejects)

    def video(self, frames: np.ndarray) -> np.ndarray:
        """Video tokens of so many frames."""
        return video_tokens(self.profile.connector, frames, self.profile.encoder.frames_per_group)

    def _behind(self, row: Any, tested: bool, known: dict[Any, int], chat: ChatFormat | None) -> int:
        """Tokens of the longest answer that may stand behind a question."""
        answers: Iterable[str] = row.options
        if not tested and (row.task not in MULTIPLE_CHOICE or self.profile.training.choice == "none"):
            answers = [target_answer(row.task, row.answer, row.label)]
        elif row.task == "frameqa":
            return WRITTEN_TOKENS
        elif row.task == "count":
            answers = COUNTS
        for text in answers:
            if text not in known:
                known[text] = len(answer_tokens(self.tokenizer, text, chat))
        return max(known[text] for text in answers)

    def require_room(self, needed: int, told: str) -> None:
        """Raise TooLong, naming what is `told` (a question, a row), if `needed` tokens are over the window."""
        if self.size is not None and needed > self.size:
            raise TooLong(
                f"{told} needs {needed} tokens with its GIF and its answer, over the language model's {self.size}: "
                "ask it in fewer words, leave it out, or take a model with a longer window"
            )


def window_size(config: Any) -> int | None:
    """Positions of a language model by its configuration; None where it sets no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def too_long_where_known(profile: Profile, questions: pd.DataFrame, frames: Mapping[str, int]) -> pd.DataFrame:
    """`Window.too_long` of the profile's language model; without its tokenizer, which is said, no reject."""
    try:
        window = Window.of(profile)
    except ModelNotFound:
        name = profile.language_model.model
        print(f"The tokenizer of {name} is not to be had here: 03 and 04 will see whether a question is too long.")
        return reject_table([])
    return window.too_long(questions, frames)
