"""ADEM-VL: its cross-attention against the formula transcribed literally, and a step against LoRA with image tokens.

Run alone with `python -m tests.benchmarks.bench_adem`.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM

from helpers.models.adem_vl import AdemVL, AdemVLConfig, Projector, _Visual

ROUNDS = 5
# A training step of the paper in its own shapes, but for the number of blocks: 2 rows of ScienceQA's usual length
ROWS, TEXT, WIDTH, BLOCKS = 2, 160, 4096, 4


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


# ---- Cross-attention -----------------------------------------------------------------------------------------------


def literal(queries: list[Tensor], embedded: Tensor, tables: tuple[Tensor, Tensor], dropped: int, alpha: float):
    """Every block by itself: keys and values anew, all scores sorted, the mask multiplied."""
    results = []
    for query in queries:
        scores = F.silu(query) @ F.silu(embedded + tables[0]).mT
        bound = scores.detach().sort(dim=-1).values[..., dropped : dropped + 1]
        results.append(alpha * ((scores * (scores >= bound)) @ (embedded + tables[1])))
    return results


def cross_attention() -> list[dict]:
    """Forward and backward of all blocks' cross-attention in both ways."""
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=32,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=BLOCKS,
        num_attention_heads=32,
        head_dim=8,
    )
    clip = CLIPVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    clip.image_size, clip.patch_size = 224, 14
    config = AdemVLConfig(llama, clip)
    model = AdemVL(config)
    queries = [torch.randn(ROWS, TEXT, WIDTH, requires_grad=True) for _ in range(BLOCKS)]
    embedded = (config.beta * torch.randn(ROWS, config.positions, WIDTH)).requires_grad_()
    tables = model.key_embedding, model.value_embedding
    with torch.no_grad():
        tables[1].normal_(0, 0.02)

    def ours() -> list[Tensor]:
        visual = _Visual(F.silu(embedded + tables[0]), embedded + tables[1], None, None)
        with model._seeing(visual):
            return [model._attend(index, query) for index, query in enumerate(queries)]

    def transcribed() -> list[Tensor]:
        return literal(queries, embedded, tables, config.dropped, config.alpha)

    def total(way: Callable[[], list[Tensor]]) -> Tensor:
        return torch.stack([result.sum() for result in way()]).sum()

    with torch.no_grad():
        pairs = list(zip(ours(), transcribed(), strict=True))
    difference = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    if difference > 1e-4:
        raise AssertionError(f"the two ways disagree by {difference} of the largest value")
    ratios = []
    for _ in range(ROUNDS):
        took = [seconds(lambda way=way: total(way).backward()) for way in (transcribed, ours)]
        ratios.append(took[0] / took[1])
    sizes = {
        name: kept_bytes(lambda way=way: total(way), [*queries, embedded, *tables])
        for name, way in (("literal", transcribed), ("ours", ours))
    }
    setting = f"{BLOCKS} blocks of width {WIDTH}, {ROWS} x {TEXT} text and {config.positions} visual positions, fp32"
    common = {"setting": setting, "largest_relative_difference": difference}
    return [
        {
            "name": "ADEM-VL's cross-attention: sorted, keys in every block, over selected, keys once",
            "ratio": round(statistics.median(ratios), 3),
            "aim": ">= 1.1",
            "unit": "x time of forward and backward, higher is better",
            "rounds": [round(ratio, 2) for ratio in sorted(ratios)],
            **common,
        },
        {
            "name": "ADEM-VL's cross-attention: memory kept for the backward pass, the same two ways",
            "ratio": round(sizes["literal"] / sizes["ours"], 3),
            "aim": ">= 2",
            "unit": "x bytes, higher is better",
            "megabytes": {name: round(size / 1e6, 1) for name, size in sizes.items()},
            "megabytes_saved_a_block": round((sizes["literal"] - sizes["ours"]) / 1e6 / BLOCKS, 1),
            **common,
        },
    ]


# ---- Against LoRA with the image as input tokens -------------------------------------------------------------------


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
        answers = labels[:, 1:] != -100
        logits = base.lm_head(hidden[:, :-1][answers])
        return {"loss": F.cross_entropy(logits, labels[:, 1:][answers])}


def against_lora() -> list[dict]:
    """A training step (forward, backward, AdamW) of both on the same batch and base models.

    LoRA's encoder is frozen; ADEM-VL also goes back through its encoder, where its adapters are.
    """
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1376, num_hidden_layers=6, num_attention_heads=8
    )
    clip = CLIPVisionConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4)
    clip.image_size, clip.patch_size = 224, 14
    adem = AdemVL(AdemVLConfig(llama, clip)).train()
    lora = PrefixLoRA(llama, AdemVL(AdemVLConfig(llama, clip))).train()
    ids = torch.randint(0, 512, (ROWS, TEXT))
    labels = torch.full_like(ids, -100)
    labels[:, -7:] = ids[:, -7:]
    batch = {
        "input_ids": ids,
        "labels": labels,
        "pixel_values": torch.randn(ROWS, 3, 224, 224),
        "cls_position": torch.full((ROWS,), 4),
    }
    steps, sizes, counts = {}, {}, {}
    for name, model in (("lora", lora), ("adem", adem)):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)

        def step(model=model, optimizer=optimizer) -> None:
            optimizer.zero_grad()
            model(**batch)["loss"].backward()
            optimizer.step()

        step()
        steps[name], sizes[name] = step, kept_bytes(lambda model=model: model(**batch)["loss"], model.parameters())
        counts[name] = sum(p.numel() for p in trained)
    took = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            took[name].append(seconds(step))
    ratios = sorted(a / b for a, b in zip(took["lora"], took["adem"], strict=True))
    setting = f"Llama of hidden {llama.hidden_size}, {llama.num_hidden_layers} blocks; {ROWS} x {TEXT} text tokens"
    common = {"setting": f"{setting}, 256 patches as tokens or 320 visual positions, fp32", "trained": counts}
    return [
        {
            "name": "a training step of LoRA with 256 image tokens over one of ADEM-VL",
            "ratio": round(statistics.median(ratios), 3),
            "aim": ">= 1.2",
            "unit": "x time, higher is better",
            "rounds": [round(ratio, 2) for ratio in ratios],
            "milliseconds": {name: round(1e3 * statistics.median(values)) for name, values in took.items()},
            **common,
        },
        {
            "name": "memory kept for the backward pass: LoRA with 256 image tokens over ADEM-VL",
            "ratio": round(sizes["lora"] / sizes["adem"], 3),
            "aim": ">= 1",
            "unit": "x bytes, higher is better",
            "megabytes": {name: round(size / 1e6, 1) for name, size in sizes.items()},
            **common,
        },
    ]


def run() -> list[dict]:
    """Both comparisons: time and memory of each."""
    return cross_attention() + against_lora()


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
