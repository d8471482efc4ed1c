"""The script for GPUs must run where a GPU is dear: tried out here with small models."""

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, XCLIPConfig, XCLIPModel

from helpers.models.adem_vl.config import AdemVLConfig
from helpers.models.adem_vl.model import AdemVL
from helpers.sweeps import step_cost
from tests.benchmarks import full_size


def test_small_models_go_through_all_measurements():
    found = full_size.measure(full_size.SMALL)
    for name in ("training_nf4", "training_none"):
        step = found[name]
        assert step["rows_a_step"] == full_size.ROWS
        assert step["tokens_per_second"] == pytest.approx(full_size.TOKENS * step["gifs_per_second"], rel=0.01)
    hours = found["hours_for_120k"]
    once, epoch = found["encoding"]["hours_for_120k"], found["training_nf4"]["hours_an_epoch_of_120k"]
    assert hours["three_epochs"] == pytest.approx(once + 3 * epoch, abs=1e-3)
    pair = found["adem_against_lora"]
    assert "16 image tokens (lora) or 20 visual positions (adem)" in pair["setting"] and "NF4" in pair["setting"]
    memory = step_cost.PEAK if torch.cuda.is_available() else step_cost.KEPT
    for name in ("lora", "adem"):
        assert pair[name].keys() == {"milliseconds", memory, "trained"} and pair[name][memory] > 0
    assert pair["memory_lora_over_adem"] == pytest.approx(pair["lora"][memory] / pair["adem"][memory], rel=0.2)


def test_full_shapes_are_those_of_the_published_models():
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(**full_size.FULL.llama, tie_word_embeddings=True))
        xclip = XCLIPModel(XCLIPConfig(vision_config=full_size.FULL.vision, projection_dim=512))
    assert sum(p.numel() for p in llama.parameters()) == 3_212_749_824  # Llama 3.2 3B
    patches = (224 // 16) ** 2
    assert xclip.vision_model.embeddings.position_embedding.weight.shape == (patches + 1, 768)
    assert sum(p.numel() for p in xclip.mit.parameters()) == pytest.approx(3e6, rel=0.1)
    assert xclip.config.vision_config.num_hidden_layers == 12


def test_the_science_pair_has_the_papers_shapes():
    with torch.device("meta"):
        llama, clip = LlamaConfig(**full_size.FULL.science_llama), CLIPVisionConfig(**full_size.FULL.science_clip)
        model = AdemVL(AdemVLConfig(llama, clip, scales=None))
    assert sum(p.numel() for p in model.language_model.parameters()) == 6_738_415_616  # LLaMA-7B
    assert sum(t.numel() for t in model.adapter_tensors().values()) == 4_530_432
