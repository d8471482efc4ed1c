"""Normalisation of answers before they are compared, shared by scorers."""

import re

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_ARTICLES = {"a", "an", "the"}
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_DIGITS)} | {"none": "0"}
_CONTRACTED = """
ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't oughtn't shan't
shouldn't wasn't weren't won't wouldn't could've might've must've not've should've they've we've what've where've
who've would've you've he'd how'd it'd someone'd something'd there'd they'd where'd who'd you'd how'll it'll
somebody'll someone'll something'll they'll what'll who'll why'll you'll he's how's somebody's someone's that's
there's what's when's where's who's why's there're they're what're why're you're ma'am o'clock 'twas y'all
couldn't've hadn't've mightn't've shouldn't've wouldn't've he'd've it'd've she'd've somebody'd've someone'd've
something'd've there'd've they'd've we'd've who'd've you'd've 'ow's'at y'all'll y'all'd've
"""
# The official table maps each contraction with one of its apostrophes missing to the full one, and one entry backwards.
_CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTED.split() for i, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}


def normalise_vqa(text: str) -> str:
    """Normalise an answer as the official VQA evaluator does (github.com/GT-Vision-Lab/VQA, vqaEval.py).

    For GIF questions it is applied to both sides unconditionally, which makes a "VQA-style normalised exact match",
    not VQA accuracy (that one normalises only where the ten human answers differ).
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    cleaned = text
    for mark in _PUNCTUATION:
        touches_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if touches_space or _COMMA_IN_NUMBER.search(text) else " ")
    words = [_NUMBERS.get(word, word) for word in _PERIOD.sub("", cleaned).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
