"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    XCLIPConfig,
    XCLIPModel,
)

from helpers.config import load_profile
from helpers.workspace import repo_root
from tests.chats import FAMILIES, save_chat_model
from tests.throwaway import Throwaway


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real files (SHARED_DATA or ../shared/data); tests that need it skip where it is absent."""
    folder = Path(os.environ.get("SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}")
    return folder


SENTENCES = [
    "Question: what color is the circle ? Answer: red",
    "Question: how many times does the square jump ? Answer: 3",
    "what does the triangle do after it spins ? it moves left",
    "a small blue star moves to the right in front of a green star",
]


def save_tiny_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (every text can be spelt) on a few sentences and save it to `folder`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|bos|>", "<|eos|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="session")
def tiny_xclip_dir(tmp_path_factory) -> Path:
    """A random `XCLIPModel` checkpoint: 16 frames of 32 x 32 pixels, width and projection 32, 1-layer MIT."""
    folder = tmp_path_factory.mktemp("tiny-xclip")
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = XCLIPConfig(
        vision_config={
            **size,
            "image_size": 32,
            "patch_size": 16,
            "num_frames": 16,
            "mit_hidden_size": 32,
            "mit_intermediate_size": 64,
            "mit_num_hidden_layers": 1,
            "mit_num_attention_heads": 2,
        },
        text_config={**size, "vocab_size": 64, "max_position_embeddings": 16},
        projection_dim=32,
        prompt_num_attention_heads=2,
    )
    XCLIPModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory) -> Path:
    """A random `LlamaForCausalLM` checkpoint (hidden 64, 2 layers) with a byte-level BPE tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = save_tiny_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chat_dir(tmp_path_factory, tiny_llama_dir):
    """The folder of a random checkpoint of one of the `FAMILIES` of chat templates, made once."""

    def make(name: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / f"tiny-{name}"
        if not folder.is_dir():
            save_chat_model(tiny_llama_dir, FAMILIES[name], folder)
        return folder

    return make


@pytest.fixture(scope="session")
def make_profile(tiny_xclip_dir, tiny_llama_dir):
    """The tiny profile on the random checkpoints, unquantised and by the plain recipe; keys by `section__name`."""

    def make(**changes):
        overrides = {
            "encoder.model": str(tiny_xclip_dir),
            "data.image_size": 32,
            "language_model.model": str(tiny_llama_dir),
            "language_model.quantisation": "none",
            "connector.hidden": 32,
            "connector.queries": 4,
            "connector.output_scale": "learned",
            "alignment.epochs": 0.0,
            "training.loss": "per_token",
        }
        return load_profile("tiny", overrides | {key.replace("__", "."): value for key, value in changes.items()})

    return make


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """An empty throwaway suite; its kernels find this repository's helpers."""
    monkeypatch.setenv("SUITE_FILE", str(tmp_path / "suite.yaml"))
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path / "runs"))
    monkeypatch.setenv("PYTHONPATH", str(repo_root()))
    monkeypatch.delenv("SUITE_DEADLINE", raising=False)
    return Throwaway(tmp_path)
