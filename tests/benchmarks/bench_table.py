"""Reads of the feature table, in rows a second, over the rows a second that a training step consumes.

Run alone with `python -m tests.benchmarks.bench_table`.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from helpers.store.features import FeatureTable, feature_schema, upsert_features

GIFS, FRAMES, DIM, BATCH = 512, 48, 512, 32
HIDDEN, LAYERS, TEXT_TOKENS = 512, 4, 13
ROUNDS, READS = 3, 50


def make_table(path: Path) -> None:
    """A table of random embeddings with views of 16, 32 and 48 frames a GIF."""
    rng = np.random.default_rng(0)
    lengths = [16, 32, FRAMES]
    rows = [
        {
            "gif_sha256": f"{number:064d}",
            "num_frames": 60,
            "encoder_key": "random",
            "groups": [1, 2, 3],
            "lengths": lengths,
            "frame_times_ms": np.zeros(sum(lengths), np.float32),
            "embeddings": rng.standard_normal((sum(lengths), DIM), dtype=np.float32).astype(np.float16),
        }
        for number in range(GIFS)
    ]
    upsert_features(path, rows, feature_schema(DIM, "benchmark"))


class FrozenLanguageModel(nn.Module):
    """A causal transformer with frozen weights behind a trained projection, as in adapter training.

    The gradient flows through all layers to the projection, as it does to a LoRA's first layer; the head is left out,
    so that the step is rather too fast than too slow.
    """

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(DIM, HIDDEN)
        layer = nn.TransformerEncoderLayer(HIDDEN, HIDDEN // 64, 4 * HIDDEN, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS).requires_grad_(False)
        self.text = nn.Parameter(torch.randn(1, TEXT_TOKENS, HIDDEN), requires_grad=False)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        tokens = torch.cat([self.project(frames), self.text.expand(len(frames), -1, -1)], dim=1)
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.layers(tokens, mask=mask, is_causal=True)[:, -1].square().mean()


def read_rate(table: FeatureTable, rng: np.random.Generator) -> float:
    """Rows a second of random batches of 32 at [48, 512]."""
    batches = [[table.ids[i] for i in rng.integers(0, GIFS, BATCH)] for _ in range(READS)]
    start = time.perf_counter()
    for ids in batches:
        frames, _ = table.fetch(ids, 3)
    assert frames.shape == (BATCH, FRAMES, DIM)
    return READS * BATCH / (time.perf_counter() - start)


def step_rate(model: FrozenLanguageModel, frames: torch.Tensor) -> float:
    """Rows a second of forward and backward at batch 32."""
    start = time.perf_counter()
    model.zero_grad(set_to_none=True)
    model(frames).backward()
    return BATCH / (time.perf_counter() - start)


def run() -> dict:
    """Time reads from memory, reads from disk and steps in turn; medians over the rounds."""
    torch.manual_seed(0)
    model = FrozenLanguageModel()
    frames = torch.randn(BATCH, FRAMES, DIM)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.lance"
        make_table(path)
        memory, disk = FeatureTable(path), FeatureTable(path, memory_gb=0)
        rates = []
        for _ in range(ROUNDS + 1):  # the first round warms up, and reads the table into memory
            rng = np.random.default_rng(1)
            rates.append((read_rate(memory, rng), read_rate(disk, rng), step_rate(model, frames)))
    from_memory, from_disk, step = (statistics.median(column) for column in zip(*rates[1:], strict=True))
    return {
        "name": "rows a second read from the feature table over those a training step consumes",
        "ratio": round(from_memory / step, 1),
        "aim": ">= 20",
        "unit": "x rows, higher is better",
        "ratio_from_disk": round(from_disk / step, 1),
        "rows_per_second": round(from_memory),
        "rows_per_second_from_disk": round(from_disk),
        "rows_per_second_of_a_step": round(step, 1),
        "rows": f"{BATCH} random rows of [{FRAMES}, {DIM}] fp16",
        "step": f"hidden {HIDDEN}, {LAYERS} layers, {FRAMES + TEXT_TOKENS} tokens, forward and backward",
    }


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
