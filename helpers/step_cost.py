"""What a training step costs: ADEM-VL against LoRA with the image as input tokens, time and memory in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM

from helpers.models.adem_vl import IGNORED, AdemVL, AdemVLConfig, Projector

ANSWER = 7  # tokens of "The answer is B." and its end
VOCABULARY = 512


def kept_bytes(forward: Callable[[], Tensor], resident: Iterable[Tensor]) -> int:
    """Bytes of the tensors that a forward keeps for its backward, each storage once and `resident` tensors not at all.

    Those are there in any case: weights, above all.
    """
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()  # alive while the storages are counted, so that no address is used twice
    del result
    there = {tensor.untyped_storage().data_ptr() for tensor in resident}
    return sum(size for address, size in found.items() if address not in there)


def seconds(step: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


class PrefixLoRA(nn.Module):
    """The usual way: every patch is projected to a token in front of the text, and LoRA adapts the language model."""

    def __init__(self, llama: LlamaConfig, encoder: AdemVL) -> None:
        super().__init__()
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        self.language_model = get_peft_model(LlamaForCausalLM(llama), lora)
        self.see = encoder.visual_features
        self.projector = Projector(encoder.config.vision_config.hidden_size, 128, llama.hidden_size)

    def forward(self, input_ids: Tensor, labels: Tensor, pixel_values: Tensor, **_: Tensor) -> dict[str, Tensor]:
        """Loss of the answers, of logits at answer positions alone, as ADEM-VL computes it."""
        with torch.no_grad():
            patches, _ = self.see(pixel_values)
        base = self.language_model.get_base_model()
        tokens = torch.cat([self.projector(patches), base.get_input_embeddings()(input_ids)], dim=1)
        hidden = base.model(inputs_embeds=tokens, use_cache=False).last_hidden_state[:, patches.shape[1] :]
        answers = labels[:, 1:] != IGNORED
        logits = base.lm_head(hidden[:, :-1][answers])
        return {"loss": nn.functional.cross_entropy(logits, labels[:, 1:][answers])}


def step_cost(hidden: int = 512, blocks: int = 6, rows: int = 2, text: int = 160, rounds: int = 5) -> pd.DataFrame:
    """A training step (forward, backward, AdamW) of both, on the same batch and base models of random weights.

    hidden, blocks: of the language model; rows, text: problems and text tokens of a batch; 256 patches, as tokens or
    as 320 visual positions. LoRA's encoder is frozen; ADEM-VL also goes back through its encoder, where its adapters
    are. Rounds alternate. Returns a row a way, "lora" and "adem": milliseconds (median), megabytes kept for the
    backward pass, trained parameters; and the time of each round in milliseconds, a list.
    """
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=blocks,
        num_attention_heads=8,
    )
    clip = CLIPVisionConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4)
    clip.image_size, clip.patch_size = 224, 14
    models = {
        "lora": PrefixLoRA(llama, AdemVL(AdemVLConfig(llama, clip))).train(),
        "adem": AdemVL(AdemVLConfig(llama, clip)).train(),
    }
    ids = torch.randint(0, VOCABULARY, (rows, text))
    labels = torch.full_like(ids, IGNORED)
    labels[:, -ANSWER:] = ids[:, -ANSWER:]
    batch = {
        "input_ids": ids,
        "labels": labels,
        "pixel_values": torch.randn(rows, 3, 224, 224),
        "cls_position": torch.full((rows,), 4),
    }
    steps: dict[str, Callable[[], None]] = {}
    facts: dict[str, dict[str, float]] = {}
    for name, model in models.items():
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)

        def step(model=model, optimizer=optimizer) -> None:
            optimizer.zero_grad()
            model(**batch)["loss"].backward()
            optimizer.step()

        step()
        kept = kept_bytes(lambda model=model: model(**batch)["loss"], model.parameters())
        steps[name], facts[name] = step, {"megabytes": kept / 1e6, "trained": float(sum(p.numel() for p in trained))}
    took: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            took[name].append(1e3 * seconds(step))
    table = pd.DataFrame.from_dict(facts, orient="index")
    table.insert(0, "milliseconds", [statistics.median(took[name]) for name in table.index])
    return table.assign(rounds=[took[name] for name in table.index])
