"""A language model's own chat template: what stands around the video, the question and the answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import Any

from helpers.config import LanguageModelConfig
from helpers.models.text import control_tokens

QUESTION, ANSWER = "theaskedquestion", "thegivenanswer"  # words that no template says, trims or looks for
# Some templates write the day into the prompt. A model that learns from one day's prompt is asked another day, so it is
# always this one, which Llama 3.2's template takes by itself where it knows no clock.
DAY = date(2024, 7, 26)
CLOCK = "".join(f'|replace("%{code}", "{DAY.strftime(f"%{code}")}")' for code in "aAbBdHIjmMpSuUwWyY")
STOPPED_CLOCK = "{%- macro strftime_now(format) -%}{{ format" + CLOCK + " }}{%- endmacro -%}"
WAY_OUT = "Name another model, or ask without a template: -p language_model.chat false"


class ChatTemplateError(ValueError):
    """A chat template that a question cannot be asked by; the message names the model and the way out."""


@dataclass(frozen=True)
class ChatFormat:
    """One turn of a chat, cut where the video, the question and the answer stand.

    head: token ids in front of the video, BOS included where the template writes it; opening and closing: the text in
    front of and behind the user's message; gap: spaces in front of an answer; end: the token that ends one.
    """

    head: tuple[int, ...]
    opening: str
    closing: str
    gap: str
    end: int

    def prompt(self, template: str, ask: Callable[[list[str]], list[int]]) -> list[int]:
        """Token ids of the turn that asks by the profile's prompt, from the first one to where the answer begins.

        ask: gives the token ids of the question, and its options, with these texts around it.
        """
        first, *others = template.strip().split("{question}")
        around = [first, *others[:-1], others[-1] + self.closing]
        ids = ask([self.opening + around[0], *around[1:]])
        if tuple(ids[: len(self.head)]) == self.head:
            return ids
        # A token would reach over the place of the video.
        spaces = self.opening[len(self.opening.rstrip(" ")) :]
        return [*self.head, *ask([spaces + around[0], *around[1:]])]

    def told(self) -> str:
        """The turn as text: by it a bundle knows whether it is asked as it was trained."""
        return f"{self.opening}{{question}}{self.closing}{self.gap}{{answer}} {self.end}"


def chat_format(tokenizer: Any, config: LanguageModelConfig) -> ChatFormat | None:
    """The chat format of the profile's language model; None where the profile asks without one.

    No system message is sent: a template that has one of its own writes it, and one without that role has no fault.
    Raises ChatTemplateError if there is no template, it fails, changes what is said, or adds no generation prompt.
    """
    if not config.chat:
        return None
    if not tokenizer.chat_template:
        raise ChatTemplateError(f"{config.model} has no chat template, as base models have none. {WAY_OUT}")
    told = f"the chat template of {config.model}"
    question = {"role": "user", "content": QUESTION}
    asked = _render(tokenizer, told, [question], add_generation_prompt=True)
    answered = _render(tokenizer, told, [question, {"role": "assistant", "content": ANSWER}])
    if any(text.count(QUESTION) != 1 for text in (asked, answered)) or answered.count(ANSWER) != 1:
        raise ChatTemplateError(f"{told} does not say a question and its answer once each, as they are. {WAY_OUT}")
    before, _, after = answered.partition(ANSWER)
    if before.rstrip() != asked.rstrip():  # it may add more than stands in front of a given answer, as an empty thought
        if asked == _render(tokenizer, told, [question]):
            missing = before.partition(QUESTION)[2]
            raise ChatTemplateError(f"{told} adds no generation prompt, as {missing!r} for its own answers. {WAY_OUT}")
        before = asked
    # A space belongs to the word behind it, as tokens have it.
    opening, _, closing = before.partition(QUESTION)
    controls = control_tokens(tokenizer)
    ends = [number for number in _plain_ids(tokenizer, after) if number in controls]
    return ChatFormat(
        head=tuple(_plain_ids(tokenizer, opening.rstrip(" "))),
        opening=opening,
        closing=closing.rstrip(" "),
        gap=" " * (len(closing) - len(closing.rstrip(" "))),
        end=ends[0] if ends else tokenizer.eos_token_id,
    )


def _render(tokenizer: Any, told: str, messages: list[dict[str, str]], **options: Any) -> str:
    """The text of a chat. enable_thinking: a model that can think first is asked to answer at once."""
    try:
        template = STOPPED_CLOCK + tokenizer.get_chat_template()
        options |= {"tokenize": False, "enable_thinking": False}
        return tokenizer.apply_chat_template(messages, chat_template=template, **options)
    except Exception as error:  # a template is a program of the model's maker, and may fail in any way
        raise ChatTemplateError(f"{told} fails: {type(error).__name__}: {error}. {WAY_OUT}") from error


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids
