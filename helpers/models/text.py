"""Text to tokens: what a person wrote stays text, even where it spells a control token."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from helpers.models.chat import ChatFormat

MARK_UP = re.compile(r"\W*[<\[{(].*[>\]})]\W*", re.DOTALL)
"""An added token like [INST] or <tool_call>: it controls too, though a tokenizer may not call it special."""


def control_tokens(tokenizer: Any) -> dict[int, str]:
    """The control tokens of a tokenizer: id and how it is spelt."""
    return _controls(tokenizer, len(tokenizer))


@lru_cache(maxsize=8)
def _controls(tokenizer: Any, size: int) -> dict[int, str]:
    """The control tokens of a tokenizer of `size` tokens, which may grow."""
    added = {number: (token.content, token.special) for number, token in tokenizer.added_tokens_decoder.items()}
    found = {number: text for number, (text, special) in added.items() if special or MARK_UP.fullmatch(text)}
    return found | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


@lru_cache(maxsize=64)
def _ids_around(tokenizer: Any, size: int, around: tuple[str, ...]) -> list[int]:
    """Token ids of what stands around a text, part by part: the same for all questions."""
    return [number for part in around for number in tokenizer(part, add_special_tokens=False).input_ids]


def text_tokens(tokenizer: Any, text: str, around: Sequence[str] = ("", "")) -> list[int]:
    """Token ids of what is `around` with the text in its gaps, without BOS and EOS.

    A control token that stands around the text is that token; one that the text spells is encoded like other text.
    """
    ids = tokenizer(text.join(around), add_special_tokens=False).input_ids
    controls = control_tokens(tokenizer)
    if tokenizer.unk_token and tokenizer.unk_token not in text:
        # what a vocabulary lacks is unknown, whoever wrote it
        controls = {number: name for number, name in controls.items() if number != tokenizer.unk_token_id}
    if controls.keys().isdisjoint(ids):
        return ids
    ours = _ids_around(tokenizer, len(tokenizer), tuple(around))
    if [number for number in ids if number in controls] == [number for number in ours if number in controls]:
        return ids
    names = sorted(controls.values(), key=len, reverse=True)
    spelt = re.compile("(" + "|".join(map(re.escape, names)) + ")")
    parts = spelt.split(around[0])
    for piece in around[1:]:
        first, *rest = spelt.split(piece)
        parts = [*parts[:-1], parts[-1] + text + first, *rest]
    numbers = {name: number for number, name in controls.items()}
    found: list[int] = []
    for place, part in enumerate(parts):  # every second one is a control token
        found += [numbers[part]] if place % 2 else _plain(tokenizer, part, controls)
    return found


def _plain(tokenizer: Any, text: str, controls: dict[int, str]) -> list[int]:
    """Token ids by the tokenizer's own steps, without the one that looks for added tokens."""
    if not tokenizer.is_fast:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    steps = tokenizer.backend_tokenizer
    if not text:
        return []
    if steps.normalizer is not None:
        text = steps.normalizer.normalize_str(text)
    words = [text] if steps.pre_tokenizer is None else [word for word, _ in steps.pre_tokenizer.pre_tokenize_str(text)]
    return [number for word in words for number in _word(steps.model, word, controls)]


def _word(model: Any, word: str, controls: dict[int, str]) -> list[int]:
    """Token ids of one word; where the vocabulary itself holds a control token, it is spelt in two pieces."""
    ids: list[int] = []
    for token in model.tokenize(word):
        if token.id in controls and len(token.value) > 1 and token.value in word:
            start = word.index(token.value)
            first, rest = word[: start + 1], word[start + 1 :]
            return _word(model, first, controls) + _word(model, rest, controls)
        ids.append(token.id)
    return ids


def prompt_tokens(
    tokenizer: Any,
    template: str,
    question: str,
    options: Sequence[str] | None = None,
    style: str = "listed",
    chat: ChatFormat | None = None,
) -> list[int]:
    """Token ids of BOS and the profile's prompt, or of a chat's turn that asks by it.

    Options, where given, stand behind the question (see `with_options`); style: 'lettered' or 'listed'.
    """

    def ask(around: Sequence[str]) -> list[int]:
        if options:
            return with_options(tokenizer, question, around, options, style)
        return text_tokens(tokenizer, question, around)

    if chat is not None:
        return chat.prompt(template, ask)
    return [start_token(tokenizer), *ask(template.split("{question}"))]


def with_options(tokenizer: Any, question: str, around: Sequence[str], options: Sequence[str], style: str) -> list[int]:
    """Token ids of what is `around` with the question in its gaps, and its options behind the last one.

    lettered: a line for each option, after (A), (B), ...; listed: all in one line, with semicolons between them. Each
    is encoded by itself: it is spelt alike wherever it stands, and a prompt is as long in every order.
    """
    lettered = style == "lettered"
    marks = [f"\n({_letter(place)})" if lettered else ";" if place else "" for place in range(len(options))]
    size = len(tokenizer)
    pieces = [piece for mark, option in zip(marks, options, strict=True) for piece in (mark, f" {option}")]
    return [
        *text_tokens(tokenizer, question, [*around[:-1], "\nOptions:"]),
        *(token for piece in pieces for token in _piece_tokens(tokenizer, piece, size)),
        *text_tokens(tokenizer, "", [around[-1], ""]),
    ]


def _letter(place: int) -> str:
    return ascii_uppercase[place] if place < len(ascii_uppercase) else str(place + 1)


@lru_cache(maxsize=1 << 14)
def _piece_tokens(tokenizer: Any, text: str, size: int) -> list[int]:
    """Token ids of an option or of its mark, by a tokenizer of `size` tokens: each comes again and again."""
    return text_tokens(tokenizer, text)


def answer_tokens(tokenizer: Any, answer: str, chat: ChatFormat | None = None) -> list[int]:
    """Token ids of " answer" and the terminator (EOS), in a chat as its template has both.

    An empty answer is the terminator alone.
    """
    text = answer.strip()
    gap, end = (" ", tokenizer.eos_token_id) if chat is None else (chat.gap, chat.end)
    return [*(text_tokens(tokenizer, gap + text) if text else []), end]


def start_token(tokenizer: Any) -> int:
    """What a sequence begins with: BOS, or EOS for a tokenizer that has none."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
