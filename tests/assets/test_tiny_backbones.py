"""The gate before the shipped backbones: every attribute of the world is there, before anything is aligned."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import helpers
from helpers.assets import make_tiny
from helpers.corpora.shapes import make_world
from helpers.models.xclip import load_xclip

TINY = Path(helpers.__file__).parent / "assets" / "tiny"
BAR = 0.95


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY / "llama")


def test_small_safetensors_only():
    files = [path for path in TINY.rglob("*") if path.is_file()]
    backbones = [path for path in files if path.parent.name in ("llama", "xclip")]
    assert sum(path.stat().st_size for path in backbones) <= 6_000_000
    assert {path.suffix for path in files} == {".safetensors", ".json"}


def test_tokenizer_spells_any_text(tokenizer):
    text = "Größe? 猫 0x7f\t~ \U0001f600 What does the zebra do 12 times ?"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_end_token_is_the_last_one_for_xclips_pooling(tokenizer):
    assert tokenizer.eos_token_id == len(tokenizer) - 1
    assert load_xclip("tiny/xclip").config.text_config.vocab_size == len(tokenizer)


@pytest.mark.slow
def test_language_model_reads_every_attribute_from_captions(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(TINY / "llama", dtype="float32")
    accuracy = make_tiny.gate_language_model(model, tokenizer, scenes=300)
    assert set(accuracy["caption"]) == {"object", "color", "number", "location", "action", "transition", "count"}
    assert min(accuracy["caption"].values()) >= BAR, accuracy
    # The same told frame by frame, in words and in positions that hold several words, as a video token does.
    assert min(accuracy["storyboard"].values()) >= BAR and min(accuracy["bags"].values()) >= BAR, accuracy


@pytest.fixture(scope="module")
def encoder_gate():
    scenes, _ = make_world(make_tiny.GATE_SEED, 300, "gate")
    tokenizer = AutoTokenizer.from_pretrained(TINY / "xclip")
    return make_tiny.gate_encoder(load_xclip("tiny/xclip"), tokenizer, scenes, make_tiny.render(scenes, workers=1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "attribute",
    [
        "object",
        "color",
        "number",
        "item object",
        "item color",
        "location",
        "order",
        "motion",
        "count",
    ],
)
def test_encoder_tells_attribute_apart_among_hard_negatives(encoder_gate, attribute):
    assert encoder_gate[attribute] >= BAR, encoder_gate
