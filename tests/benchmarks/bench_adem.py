"""ADEM-VL: its cross-attention against the formula transcribed literally, and a step against LoRA with image tokens.

Run alone with `python -m tests.benchmarks.bench_adem`.
"""

import json
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig

from helpers.models.adem_vl.config import AdemVLConfig
from helpers.models.adem_vl.model import AdemVL, _Visual
from helpers.sweeps.step_cost import KEPT, kept_bytes, seconds, step_cost

ROUNDS = 5
# A training step of the paper in its own shapes, but for the number of blocks: 2 rows of ScienceQA's usual length
ROWS, TEXT, WIDTH, BLOCKS = 2, 160, 4096, 4


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


def against_lora() -> list[dict]:
    """A training step of both on the same batch and base models: time and memory."""
    costs, setting = step_cost(rows=ROWS, text=TEXT, rounds=ROUNDS, device=torch.device("cpu"))
    ratios = sorted(a / b for a, b in zip(costs.loc["lora", "rounds"], costs.loc["adem", "rounds"], strict=True))
    common = {"setting": f"{setting}, fp32", "trained": costs["trained"].astype(int).to_dict()}
    return [
        {
            "name": "a training step of LoRA with 256 image tokens over one of ADEM-VL",
            "ratio": round(statistics.median(ratios), 3),
            "aim": ">= 1.2",
            "unit": "x time, higher is better",
            "rounds": [round(ratio, 2) for ratio in ratios],
            "milliseconds": costs["milliseconds"].round().to_dict(),
            **common,
        },
        {
            "name": "memory kept for the backward pass: LoRA with 256 image tokens over ADEM-VL",
            "ratio": round(costs.loc["lora", KEPT] / costs.loc["adem", KEPT], 3),
            "aim": ">= 1",
            "unit": "x bytes, higher is better",
            "megabytes": costs[KEPT].round(1).to_dict(),
            **common,
        },
    ]


def run() -> list[dict]:
    """Both comparisons: time and memory of each."""
    return cross_attention() + against_lora()


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
