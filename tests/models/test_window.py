"""Questions that are too long for the window, against what the stock model is fed and what the model itself refuses."""

import numpy as np
import pandas as pd
import pytest
from transformers import AutoTokenizer

from helpers.corpora.schema import question_row, question_table
from helpers.models.gif_qa import GifQA, TooLong, Window, too_long_where_known

FRAMES = {"short": 3, "long": 40}


def asked(task: str, question: str, split: str, gif: str = "short", **more) -> pd.DataFrame:
    """One question, and another test question about the long GIF."""
    rows = [
        {"question_id": "q", "gif": gif, "task": task, "question": question, "split": split, **more},
        {"question_id": "other", "gif": "long", "task": "frameqa", "question": "what ?", "split": "test"},
    ]
    rows[1] |= {"answer": "cat", "type": "object"}
    table = question_table(question_row(**row) for row in rows)
    return table.assign(gif_sha256=table.gif)


def options(longest: str) -> dict:
    return {"options": ["red", longest], "answer": "0"}


CASES = [
    # task, split, fields, the texts of which the longest must fit (None: 24 written tokens and the end), frames
    ("frameqa", "train", {"answer": "a small blue star"}, ["a small blue star"], 3),
    ("frameqa", "test", {"answer": "a"}, None, 40),
    ("count", "train", {"answer": "10"}, ["10"], 3),
    ("count", "test", {"answer": "1"}, list(map(str, range(1, 11))), 40),
    ("action", "train", options("a small blue star in front"), ["red"], 3),
    ("action", "test", options("a small blue star in front"), ["red", "a small blue star in front"], 40),
]


@pytest.mark.parametrize(("task", "split", "fields", "behind", "frames"), CASES)
@pytest.mark.parametrize("in_prompt", [False, True])
@pytest.mark.parametrize("choice", ["none", "instead"])
@pytest.mark.parametrize(("kind", "chat"), [("mlp", False), ("qformer", False), ("mlp", True)])
def test_the_longest_sequence_decides_to_the_token(
    make_profile, chat_dir, task, split, fields, behind, frames, in_prompt, kind, chat, choice
):
    """Counted from the texts by the stock tokenizer: with exactly that room a question is kept, with one less not.

    Where options are compared in training, the longest of them needs room too; where they are lettered, so do letters.
    """
    style = "lettered" if choice == "instead" else "listed"
    keys = {"training__choice": choice, "language_model__option_style": style}
    keys |= {"language_model__model": str(chat_dir("gemma")), "language_model__chat": True} if chat else {}
    profile = make_profile(evaluation__options_in_prompt=in_prompt, connector__kind=kind, **keys)
    if choice == "instead" and "options" in fields:
        behind = fields["options"]
    tokenizer = AutoTokenizer.from_pretrained(profile.language_model.model)
    question = "what color is the circle ? " * 9
    table = asked(task, question, split, **fields)
    listed = ""
    if in_prompt and "options" in fields:
        shown = fields["options"]
        lines = [f"\n({letter}) {option}" for letter, option in zip("AB", shown, strict=True)]
        listed = "\nOptions:" + ("".join(lines) if style == "lettered" else " " + "; ".join(shown))
    text = f"Question: {question}{listed}\nAnswer:"
    text = f"<bos><turn>user\n{text}</turn>\n<turn>model\n" if chat else f"<|bos|>{text}"
    space, end = ("", "</turn>") if chat else (" ", "<|eos|>")
    groups = (frames + 15) // 16
    needed = len(tokenizer.tokenize(text)) + (frames + groups if kind == "mlp" else 4 * groups)
    needed += max(len(tokenizer.tokenize(f"{space}{t}{end}")) for t in behind) if behind else 24 + 1
    assert Window(tokenizer, needed, profile).too_long(table, FRAMES).empty
    found = Window(tokenizer, needed - 1, profile).too_long(table, FRAMES)
    assert found[["item", "where"]].values.tolist() == [["q", "short"]]
    assert f"the window has {needed - 1}" in found.reason[0]


def test_what_is_kept_can_be_asked_and_what_is_left_out_cannot(make_model, tiny_gpt2_dir):
    """GPT-2's 128 positions are a table: the stock model has no place for a longer sequence."""
    changes = {"language_model__model": str(tiny_gpt2_dir), "language_model__target_modules": ["c_attn"]}
    model = make_model(**changes)
    assert model.window().size == 128 == Window.of(model.profile).size
    frames = np.random.default_rng(0).normal(size=(1, 40, 32)).astype(np.float32)
    answer = "a" * 24  # a letter a token
    assert len(model.encode_answer(answer)) == 25
    verdicts = []
    for letters in range(20, 70):
        question = "q" * letters
        fits = model.window().too_long(asked("frameqa", question, "test", gif="long", answer="x"), FRAMES).empty
        verdicts.append(fits)
        prompt = model.encode_prompt(question)
        if verdicts[-2:] == [True, False]:
            with pytest.raises(ValueError, match=r"a sequence needs 129 tokens .* over the language model's 128"):
                model.score([prompt], [[answer]], frames, [40])
            model.score([model.encode_prompt(question[1:])], [[answer]], frames, [40])
            model.generate([model.encode_prompt(question[1:])], frames, [40])
    assert verdicts == sorted(verdicts, reverse=True) and len(set(verdicts)) == 2


def test_asking_names_the_question(make_model, tiny_gpt2_dir):
    changes = {"language_model__model": str(tiny_gpt2_dir), "language_model__target_modules": ["c_attn"]}
    model = make_model(**changes, video=False)
    with pytest.raises(
        TooLong, match=r"the question 'is it red or is it blue[a-z ]* \[\.\.\.\]' needs \d+ tokens .* model's 128"
    ):
        GifQA(model, None).answer(None, "is it red or is it blue" + " and green" * 200)


def test_without_a_tokenizer_nothing_is_left_out_and_that_is_said(make_profile, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise PermissionError("403 Client Error: access to this gated model is restricted")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    profile = make_profile(language_model__model="nobody/gated")
    table = asked("frameqa", "long " * 9999, "train", answer="x")
    assert too_long_where_known(profile, table, FRAMES).empty
    assert capsys.readouterr().out.startswith("The tokenizer of nobody/gated is not to be had here: 03 and 04 ")
