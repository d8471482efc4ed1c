"""The full-size models on a GPU, with random weights: `python -m tests.benchmarks.full_size [--json FILE]`.

What the suite's own encoder and training loop reach in the shapes of X-CLIP B/16 at 16 frames and of Llama 3.2 3B with
LoRA (in NF4 and unquantised), and how that compares with the arithmetic: GIFs and tokens a second, peak memory, share
of the card's peak rate, and from it the hours for 120,000 GIFs. And a training step of ADEM-VL against one of LoRA with
the image as input tokens, in the shapes of LLaMA-7B in NF4 and CLIP ViT-L/14. Weights do not change the time, so none
is downloaded.
`--small` tries the script out in seconds, also on a CPU; its numbers mean nothing.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, XCLIPConfig, XCLIPModel

from helpers.config import load_profile
from helpers.models.adem_vl.model import AdemVL
from helpers.models.gif_qa.model import GifQAModel
from helpers.models.xclip import FrameEncoder, load_xclip
from helpers.sweeps import step_cost
from helpers.training.gif_qa import train
from helpers.workspace import write_json
from helpers.workspace.machine import compute_dtype, device, free_memory, machine, package_versions
from tests.benchmarks.bench_training import Embeddings
from tests.conftest import save_tiny_tokenizer

GIFS, ORIGINAL_HOURS = 120_000, 15.6  # one epoch of the system that this suite follows
ROWS, TOKENS, VIDEO_TOKENS = 32, 45, 17
# Dense half-precision TFLOP/s by the data sheets, by what the driver calls the card.
PEAK_TFLOPS = {"T4": 65, "P100": 18.7, "L4": 121, "A100": 312, "H100": 989, "H200": 989}


@dataclass(frozen=True)
class Shapes:
    """Model shapes with what one sample costs: GFLOP of a GIF of 16 frames, and of a training row of 45 tokens."""

    vision: dict[str, Any]
    llama: dict[str, Any]
    gflop_gif: float
    gflop_row: float
    batches: int
    steps: int
    science_llama: dict[str, Any]  # of ADEM-VL against LoRA
    science_clip: dict[str, Any]
    science_batch: tuple[int, int]  # problems, and text tokens of each


FULL = Shapes(
    vision={"patch_size": 16, "num_frames": 16, "mit_hidden_size": 512, "mit_intermediate_size": 2048},
    llama={
        "vocab_size": 128_256,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    gflop_gif=564.0,
    # forward 5.64 a token, as much for the gradient of the inputs, LoRA 7 in all; the head (0.79 a token and
    # direction) on the three answer tokens only
    gflop_row=2 * 5.64 * TOKENS + 7 + 2 * 0.79 * 3,
    batches=40,
    steps=60,
    science_llama={
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    science_clip={"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    | {"image_size": 224, "patch_size": 14, "projection_dim": 768},
    science_batch=(4, 160),
)
SMALL = Shapes(
    vision={
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
        "num_frames": 16,
        "mit_hidden_size": 64,
        "mit_intermediate_size": 128,
        "mit_num_attention_heads": 2,
    },
    llama={"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    | {"num_attention_heads": 2, "num_key_value_heads": 2},
    gflop_gif=0.0,
    gflop_row=0.0,
    batches=3,
    steps=6,
    science_llama={"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    | {"num_attention_heads": 2},
    science_clip={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"image_size": 32, "patch_size": 8},
    science_batch=(2, 20),
)


def peak_tflops() -> float | None:
    """The card's dense half-precision peak, or None for an unknown one."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    words = name.replace("-", " ").split()
    return next((peak for card, peak in PEAK_TFLOPS.items() if card in words), None)


def save_models(folder: Path, shapes: Shapes) -> None:
    """Random checkpoints in `folder`: llama/ in half precision, and xclip/."""
    width = shapes.vision.get("mit_hidden_size")
    config = XCLIPConfig(
        vision_config=shapes.vision,
        text_config={"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64},
        projection_dim=width,
    )
    XCLIPModel(config).save_pretrained(folder / "xclip")
    tokenizer = save_tiny_tokenizer(folder / "llama")
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    with torch.device(device()):
        config = LlamaConfig(**shapes.llama, **special, tie_word_embeddings=True, max_position_embeddings=2048)
        config.dtype = torch.bfloat16
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "llama")


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak_gigabytes() -> float | None:
    return round(torch.cuda.max_memory_allocated() / 1e9, 2) if torch.cuda.is_available() else None


def _share(tflops: float) -> float | None:
    peak = peak_tflops()
    return round(tflops / peak, 3) if peak else None


@torch.inference_mode()
def encode(folder: Path, shapes: Shapes, batch: int = 16) -> dict[str, Any]:
    """GIFs a second of 16 frames each through the frozen frame tower, uint8 frames from the host."""
    encoder = FrameEncoder(load_xclip(str(folder / "xclip")), "xclip").eval().to(device(), compute_dtype(device()))
    size = (batch, 16, encoder.image_size, encoder.image_size, 3)
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8))
    lengths = torch.full((batch,), 16)
    for _ in range(3):
        encoder(frames.to(device()), lengths)
    _synchronise()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    for _ in range(shapes.batches):
        encoder(frames.to(device()), lengths).cpu()
    _synchronise()
    rate = shapes.batches * batch / (time.perf_counter() - began)
    return {
        "gifs_per_second": round(rate, 1),
        "tflops": round(rate * shapes.gflop_gif / 1e3, 1),
        "share_of_peak": _share(rate * shapes.gflop_gif / 1e3),
        "peak_gigabytes": _peak_gigabytes(),
        "hours_for_120k": round(GIFS / rate / 3600, 3),
    }


def make_rows(model: GifQAModel, rows: int, gifs: int) -> pd.DataFrame:
    """Questions whose sequences have 45 tokens: 17 of video, the rest text; answers take three with the terminator."""
    answer = next(text for text in ("red", "blue", "cat", "ab") if len(model.encode_answer(text)) == 3)
    question = ""
    while len(model.encode_prompt(question)) < TOKENS - VIDEO_TOKENS - 3:
        question += "?"
    return pd.DataFrame(
        {
            "question_id": np.arange(rows).astype(str),
            "gif_sha256": (np.arange(rows) % gifs).astype(str),
            "task": "frameqa",
            "question": question,
            "options": [[] for _ in range(rows)],
            "answer": answer,
            "label": -1,
        }
    )


def training_steps(folder: Path, shapes: Shapes, quantisation: str) -> dict[str, Any]:
    """Steps of `train` on 32 rows of 45 tokens: loader, forward, backward, clipping, AdamW, loss log."""
    overrides = {
        "encoder.model": str(folder / "xclip"),
        "language_model.model": str(folder / "llama"),
        "language_model.quantisation": quantisation,
        "language_model.chat": False,  # the tiny tokenizer has no template
        "training.tokens_per_step": ROWS * TOKENS,
        "training.epochs": 1,
        "training.checkpoint_minutes": 600.0,
        "training.log_steps": 5,
    }
    profile = load_profile("kaggle", overrides)
    model = GifQAModel.build(profile, device())
    dim = model.base["encoder"]["projection_dim"]
    frames = np.random.default_rng(0).normal(size=(256, 16, dim)).astype(np.float16)
    questions = make_rows(model, ROWS * shapes.steps, len(frames))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    run = folder / f"run-{quantisation}"
    result = train(model, questions, Embeddings(model.encoder_key, frames), profile, run, progress=False)
    history, warm = result.history, shapes.steps // 4
    seconds = (history["seconds"].iloc[-1] - history["seconds"].iloc[warm - 1]) / (len(history) - warm)
    tokens = history["tokens"].iloc[warm:].mean()
    rows_a_step = tokens / TOKENS
    tflops = rows_a_step * shapes.gflop_row / seconds / 1e3
    return {
        "rows_a_step": round(float(rows_a_step), 2),
        "milliseconds_a_step": round(1e3 * float(seconds), 1),
        "gifs_per_second": round(float(rows_a_step / seconds), 1),
        "tokens_per_second": round(float(tokens / seconds)),
        "tflops": round(float(tflops), 1),
        "share_of_peak": _share(float(tflops)),
        "peak_gigabytes": _peak_gigabytes(),
        "hours_an_epoch_of_120k": round(float(GIFS / (rows_a_step / seconds) / 3600), 3),
    }


def adem_against_lora(folder: Path, shapes: Shapes, rounds: int = 5) -> dict[str, Any]:
    """A training step of ADEM-VL and of LoRA with image tokens, both on the language model in NF4: time and memory."""
    tokenizer = save_tiny_tokenizer(folder / "science_llama")
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    with torch.device(device()):
        config = LlamaConfig(**shapes.science_llama, **special, dtype=torch.bfloat16)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "science_llama")
    CLIPVisionModel(CLIPVisionConfig(**shapes.science_clip)).save_pretrained(folder / "science_clip")
    free_memory()

    def build() -> AdemVL:
        names = str(folder / "science_llama"), str(folder / "science_clip")
        return AdemVL.build(*names, quantisation="nf4", scales=None)

    models = {"lora": step_cost.PrefixLoRA(build()).train(), "adem": build().train()}
    batch = step_cost.random_batch(models["adem"].config, *shapes.science_batch, device())
    table = step_cost.compare(models, batch, rounds)
    pairs = zip(table.loc["lora", "rounds"], table.loc["adem", "rounds"], strict=True)
    return {
        "setting": f"{step_cost.shapes(models['adem'].config, batch)}, NF4",
        **table.drop(columns="rounds").astype(float).round(1).to_dict(orient="index"),
        "time_lora_over_adem": round(float(np.median([lora / adem for lora, adem in pairs])), 3),
        "memory_lora_over_adem": round(float(table.iloc[0, 1] / table.iloc[1, 1]), 3),
    }


def measure(shapes: Shapes) -> dict[str, Any]:
    """All measurements, and the hours that follow for 120,000 GIFs beside the original's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_models(folder, shapes)
        found = {"encoding": encode(folder, shapes)}
        for quantisation in ("nf4", "none"):
            found[f"training_{quantisation}"] = training_steps(folder, shapes, quantisation)
            free_memory()
        found["adem_against_lora"] = adem_against_lora(folder, shapes)
    once, epoch = found["encoding"]["hours_for_120k"], found["training_nf4"]["hours_an_epoch_of_120k"]
    hours = {"original_first_epoch": ORIGINAL_HOURS, "first_epoch": once + epoch, "three_epochs": once + 3 * epoch}
    return found | {"hours_for_120k": {key: round(value, 3) for key, value in hours.items()}}


def main() -> int:
    """Run the command line; returns 2 where there is no GPU for the full size."""
    parser = argparse.ArgumentParser(description="Measure the full-size models with random weights on a GPU.")
    parser.add_argument("--json", type=Path, default=Path("docs/full_size.json"), help="file to write")
    parser.add_argument("--small", action="store_true", help="small models, to try the script out; writes no file")
    args = parser.parse_args()
    if not args.small and not torch.cuda.is_available():
        print("No GPU here; the full-size models need one. --small tries the script out.", file=sys.stderr)
        return 2
    found = {"machine": machine(), "packages": package_versions(), **measure(SMALL if args.small else FULL)}
    print(json.dumps(found, indent=1))
    if not args.small:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.json, found)
        print(f"Written to {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
