"""Models built on the random checkpoints."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from helpers.models.gif_qa.model import GifQAModel


@pytest.fixture(scope="session")
def tiny_gpt2_dir(tmp_path_factory, tiny_llama_dir):
    """A random `GPT2LMHeadModel` checkpoint (hidden 64, 2 layers, 128 positions) with the tiny Llama's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-gpt2")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_llama_dir)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=128,
        initializer_range=0.2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_model(make_profile):
    """A model whose adapter, unlike a fresh one, changes the language model's output."""

    def make(video=True, **changes):
        model = GifQAModel.build(make_profile(**changes), torch.device("cpu"), video=video)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.2, generator=generator)
                elif "ia3" in name:
                    parameter.normal_(1, 0.2, generator=generator)
        return model.eval()

    return make
