"""What a training step costs: ADEM-VL against LoRA with the image as input tokens, time and memory in one run.

On a GPU memory is what a step adds at its peak to what lies there before it: activations, gradients, scratch. A CPU
has no such meter; there it is the bytes of the tensors that the forward pass keeps for the backward pass.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping

import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig

from helpers.models.adem_vl.config import AdemVLConfig
from helpers.models.adem_vl.layers import Projector
from helpers.models.adem_vl.model import AdemVL
from helpers.models.parts import IGNORED
from helpers.workspace.machine import device as default_device

ANSWER = 7  # tokens of "The answer is B." and its end
VOCABULARY = 512
KEPT, PEAK = "MB kept for the backward pass", "MB added at a step's peak"  # memory on a CPU, on a GPU


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


def peak_bytes(step: Callable[[], object]) -> int:
    """Bytes that a step has on the GPU at its peak, less what was there before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def seconds(step: Callable[[], object]) -> float:
    """Wall time of one call, with all that it set off on the GPU, if there is one."""
    start = _now()
    step()
    return _now() - start


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class PrefixLoRA(nn.Module):
    """The usual way: every patch is projected to a token in front of the text, and LoRA adapts the language model.

    base: gives its language model, into which LoRA is put, and its encoder; it is no ADEM-VL any more.
    """

    def __init__(self, base: AdemVL) -> None:
        super().__init__()
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        self.language_model = get_peft_model(base.language_model, lora)
        self.see = base.eval().visual_features
        width, dim = base.config.vision_config.hidden_size, base.config.llm_config.hidden_size
        self.projector = Projector(width, base.config.projector_dim, dim).to(base.device)

    def forward(self, input_ids: Tensor, labels: Tensor, pixel_values: Tensor, **_: Tensor) -> dict[str, Tensor]:
        """Loss of the answers, of logits at answer positions alone, as ADEM-VL computes it."""
        with torch.no_grad():
            patches, _ = self.see(pixel_values)
        base = self.language_model.get_base_model()
        text = base.get_input_embeddings()(input_ids)
        tokens = torch.cat([self.projector(patches).to(text.dtype), text], dim=1)
        hidden = base.model(inputs_embeds=tokens, use_cache=False).last_hidden_state[:, patches.shape[1] :]
        answers = labels[:, 1:] != IGNORED
        logits = base.lm_head(hidden[:, :-1][answers].to(base.lm_head.weight.dtype)).float()
        return {"loss": nn.functional.cross_entropy(logits, labels[:, 1:][answers])}


def random_batch(config: AdemVLConfig, rows: int, text: int, device: torch.device) -> dict[str, Tensor]:
    """A batch of `AdemVL.forward` with an image in every row and random tokens; the last `ANSWER` are learnt."""
    ids = torch.randint(0, config.llm_config.vocab_size, (rows, text))
    labels = torch.full_like(ids, IGNORED)
    labels[:, -ANSWER:] = ids[:, -ANSWER:]
    size = config.vision_config.image_size
    pixels, cls = torch.randn(rows, 3, size, size), torch.full((rows,), 4)
    batch = {"input_ids": ids, "labels": labels, "pixel_values": pixels, "cls_position": cls}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def compare(models: Mapping[str, nn.Module], batch: Mapping[str, Tensor], rounds: int) -> pd.DataFrame:
    """A training step (forward, backward, AdamW) of each model on the same batch, in alternating rounds.

    Returns a row a model: milliseconds (median); memory, `PEAK` where the batch is on a GPU, else `KEPT`; trained
    parameters; and the time of each round in milliseconds, a list.
    """
    on_gpu = batch["input_ids"].is_cuda
    steps: dict[str, Callable[[], None]] = {}
    facts: dict[str, dict[str, float]] = {}
    for name, model in models.items():
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)

        def step(model=model, optimizer=optimizer) -> None:
            model(**batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        if on_gpu:
            memory = {PEAK: peak_bytes(step) / 1e6}
        else:
            memory = {KEPT: kept_bytes(lambda model=model: model(**batch)["loss"], model.parameters()) / 1e6}
        steps[name], facts[name] = step, memory | {"trained": float(sum(p.numel() for p in trained))}
    took: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            took[name].append(1e3 * seconds(step))
    table = pd.DataFrame.from_dict(facts, orient="index")
    table.insert(0, "milliseconds", [statistics.median(took[name]) for name in table.index])
    return table.assign(rounds=[took[name] for name in table.index])


def shapes(config: AdemVLConfig, batch: Mapping[str, Tensor]) -> str:
    """In words: the sizes of both base models and of the batch, and where it is."""
    llm, vision = config.llm_config, config.vision_config
    rows, text = batch["input_ids"].shape
    return (
        f"language model {llm.num_hidden_layers} x {llm.hidden_size}, encoder {vision.num_hidden_layers} x "
        f"{vision.hidden_size}, {rows} x {text} text tokens, {config.grid**2} image tokens (lora) or "
        f"{config.positions} visual positions (adem), {batch['input_ids'].device.type}"
    )


def step_cost(
    hidden: int = 512,
    blocks: int = 6,
    rows: int = 2,
    text: int = 160,
    rounds: int = 5,
    device: torch.device | None = None,
) -> tuple[pd.DataFrame, str]:
    """`compare` of "lora" and "adem" on base models of random weights in float32, and the `shapes` that it holds for.

    hidden, blocks: of the language model; rows, text: problems and text tokens of a batch; 256 patches, as tokens or
    as 320 visual positions. device: the GPU if there is one. LoRA's encoder is frozen; ADEM-VL also goes back through
    its encoder, where its adapters are.
    """
    device = device or default_device()
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
    config = AdemVLConfig(llama, clip)
    models = {"lora": PrefixLoRA(AdemVL(config).to(device)).train(), "adem": AdemVL(config).to(device).train()}
    batch = random_batch(config, rows, text, device)
    return compare(models, batch, rounds), shapes(config, batch)
