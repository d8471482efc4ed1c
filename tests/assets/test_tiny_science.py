"""The gate before the tiny backbones of the diagram world: each knows it all, before anything is aligned."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel

import helpers
from helpers.assets import make_tiny_science
from helpers.corpora.diagrams import VALUES
from helpers.models.adem_vl.sequences import letter_tokens

TINY = Path(helpers.__file__).parent / "assets" / "tiny"
BAR = 0.95


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY / "science_llama")


def test_small_safetensors_only():
    files = [path for folder in ("science_llama", "science_clip") for path in (TINY / folder).iterdir()]
    assert sum(path.stat().st_size for path in files) <= 3_000_000
    assert {path.suffix for path in files} == {".safetensors", ".json"}


def test_letters_and_values_are_single_tokens_and_any_text_can_be_spelt(tokenizer):
    assert len(set(letter_tokens(tokenizer, "Response:The answer is", "ABCDE"))) == 5
    for word in [*"ABCDE", *(value for values in VALUES.values() for value in values)]:
        assert len(tokenizer(f" {word}", add_special_tokens=False).input_ids) == 1, word
    text = "Größe? 猫 0x7f\t~ \U0001f600 Which of these is not an amphibian?"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


@pytest.mark.slow
def test_language_model_answers_from_a_written_description(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(TINY / "science_llama", dtype="float32")
    accuracy = make_tiny_science.gate_llama(model, tokenizer)
    # told in a hint, told by a position that holds several words at once, and what words mean
    assert set(accuracy) == {"words", *(f"{how}: {fact}" for how in ("hint", "bag") for fact in VALUES)}
    assert min(accuracy.values()) >= BAR, accuracy


@pytest.mark.slow
def test_encoder_tells_every_fact_where_adem_vl_reads():
    accuracy = make_tiny_science.gate_clip(CLIPVisionModel.from_pretrained(TINY / "science_clip", dtype="float32"))
    for where in ("cls", "patches"):
        assert set(accuracy[where]) == {*VALUES, "kind"}
        assert min(accuracy[where].values()) >= BAR, accuracy
