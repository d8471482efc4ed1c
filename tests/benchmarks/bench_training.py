"""Training by ratios: padding waste, the Trainer's overhead, and an epoch from cache against one that encodes online.

Run alone with `python -m tests.benchmarks.bench_training`.
"""

import csv
import json
import math
import os
import statistics
import tempfile
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, XCLIPConfig, XCLIPModel
from transformers.models.videomae import VideoMAEImageProcessorPil

from helpers.config import load_profile
from helpers.gifs.decode import decode
from helpers.models.gif_qa.model import GifQAModel
from helpers.models.xclip import FrameEncoder, load_xclip
from helpers.training.gif_qa import Collator, QADataset, parameter_groups, plan_batches, train
from helpers.training.plan import BatchPlan
from tests.benchmarks.bench_decode import make_gif
from tests.conftest import save_tiny_tokenizer

TGIF_QA = Path(os.environ.get("SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data")) / "tgif_qa"
TOKENS_PER_WORD, TEMPLATE_TOKENS = 1.25, 6  # Llama 3.2 on this text; BOS, "Question:" and "\nAnswer:"
QUESTION_WORDS = {
    "action": (8.8, 12, 17),
    "count": (9.9, 13, 19),
    "frameqa": (9.8, 15, 27),
    "transition": (10.1, 13, 23),
}
WIDTH, ROUNDS = 512, 3


# ---- Padding -------------------------------------------------------------------------------------------------------


def tgif_lengths() -> tuple[np.ndarray, str]:
    """Text tokens of each TGIF-QA question with its answer, by word counts; synthetic where the files are absent."""

    def tokens(question: np.ndarray, answer: np.ndarray) -> np.ndarray:
        words = np.rint(TOKENS_PER_WORD * question) + np.rint(TOKENS_PER_WORD * answer)
        return words.astype(np.int64) + TEMPLATE_TOKENS + 1

    lengths = []
    for path in sorted(TGIF_QA.glob("T*_question.csv")):
        table = pd.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE, dtype=str, keep_default_na=False)
        answer = table["answer"]
        if "a1" in table:
            answer = pd.Series([row[f"a{int(row['answer']) + 1}"] for row in table.to_dict("records")])
        lengths.append(
            tokens(table["question"].str.split().str.len().to_numpy(), answer.str.split().str.len().to_numpy())
        )
    if lengths:
        return np.concatenate(lengths), "real TGIF-QA text"
    rng = np.random.default_rng(0)
    for mean, high, most in QUESTION_WORDS.values():
        words = np.clip(np.rint(rng.normal(mean, (high - mean) / 1.645, 20_000)), 3, most)
        lengths.append(tokens(words, np.clip(rng.poisson(1.3, 20_000), 1, 9)))
    return np.concatenate(lengths), "text of TGIF-QA's word statistics"


def padding_waste() -> dict:
    """Padded over real tokens in the batches of one epoch, 17 video tokens a GIF as in the original system."""
    text, source = tgif_lengths()
    rng = np.random.default_rng(1)
    plan = BatchPlan(text, {1: np.full(len(text), 17)}, tokens_per_step=1600, epochs=1, seed=0)
    frames = np.clip(np.rint(rng.lognormal(3.7, 0.45, len(text))), 6, 200)  # 20 to 80 frames, as in TGIF
    views = {g: np.minimum(frames, 16 * g).astype(np.int64) for g in (1, 2, 3)}
    views = {g: n + -(-n // 16) for g, n in views.items()}
    mixed = BatchPlan(text, views, tokens_per_step=1600, epochs=1, seed=0)
    lengths, rows = text + 17, round(len(text) / len(plan))
    order = rng.permutation(len(lengths))[: len(lengths) // rows * rows].reshape(-1, rows)
    return {
        "name": "padding waste (padded over real tokens)",
        "ratio": round(plan.waste, 4),
        "aim": "<= 1.02",
        "unit": "x tokens, lower is better",
        "text": f"{len(text)} rows of {source}",
        "rows_a_batch": rows,
        "with_1_to_3_groups": round(mixed.waste, 4),
        "random_batches": round(float((lengths[order].max(1) * rows).sum() / lengths[order].sum()), 3),
        "fixed_128_and_16_frames": round(float(144 * len(lengths) / lengths.sum()), 2),
    }


# ---- Models and data of the timed benchmarks -----------------------------------------------------------------------


def save_models(folder: Path, layers: int, image_size: int, vision: tuple[int, int]) -> dict[str, str]:
    """Random checkpoints: a Llama of hidden size 512 and an X-CLIP of (width, layers); returns profile overrides."""
    torch.manual_seed(0)
    tokenizer = save_tiny_tokenizer(folder / "llama")
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    LlamaForCausalLM(llama).save_pretrained(folder / "llama")
    width, depth = vision
    xclip = XCLIPConfig(
        vision_config={
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": depth,
            "num_attention_heads": 4,
            "image_size": image_size,
            "patch_size": 32,
            "num_frames": 16,
            "mit_hidden_size": 128,
            "mit_intermediate_size": 256,
            "mit_num_attention_heads": 4,
        },
        text_config={"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64},
        projection_dim=128,
        prompt_num_attention_heads=2,
    )
    XCLIPModel(xclip).save_pretrained(folder / "xclip")
    return {
        "encoder.model": str(folder / "xclip"),
        "data.image_size": image_size,
        "language_model.model": str(folder / "llama"),
        "training.groups": [1],
        "training.epochs": 1,
        "training.checkpoint_minutes": 60.0,
    }


class Embeddings:
    """The feature table's interface over arrays in memory, one 16-frame view a GIF."""

    def __init__(self, key: str, frames: np.ndarray):
        self.encoder_key, self.frames = key, frames

    def lengths(self, ids, groups):
        return np.full(len(ids), 16)

    def fetch(self, ids, groups):
        return self.frames[[int(i) for i in ids]], self.lengths(ids, groups)


def make_questions(rows: int, gif_count: int) -> pd.DataFrame:
    """Questions of varied length; with 17 video tokens a sequence has about 45 tokens."""
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "gif_sha256": (np.arange(rows) % gif_count).astype(str),
            "task": "frameqa",
            "question": [f"what color is the {'small ' * n}circle ?" for n in rng.integers(0, 4, rows)],
            "options": [[] for _ in range(rows)],
            "answer": rng.choice(["red", "green", "blue"], rows),
            "label": -1,
        }
    )


def _seconds(function, *args, **kwargs) -> float:
    start = time.perf_counter()
    function(*args, **kwargs)
    return time.perf_counter() - start


def _forward_backward(model, batch) -> None:
    model.zero_grad()
    model(**batch)["loss"].backward()


# ---- Overhead of the training step ---------------------------------------------------------------------------------


def step_over_bare(folder: Path) -> dict:
    """Steps of `train` (sampler, collator, clipping, AdamW, log) over forward and backward of the same batches."""
    overrides = save_models(folder, layers=2, image_size=64, vision=(64, 1))
    profile = load_profile("tiny", overrides | {"training.log_steps": 2})
    questions = make_questions(200, 50)
    model = GifQAModel.build(profile, torch.device("cpu"))
    features = Embeddings(model.encoder_key, np.random.default_rng(0).normal(size=(50, 16, 128)).astype(np.float16))
    dataset = QADataset(model, questions)
    plan = plan_batches(dataset, features, profile)
    collate = Collator(features, model.tokenizer.pad_token_id)
    batches = [collate([dataset[key] for key in keys]) for keys in plan.batches]
    ratios, ours = [], []
    for number in range(ROUNDS):
        result = train(model, questions, features, profile, folder / f"run-{number}", progress=False)
        # A step's time of record is taken before its optimizer update, so differences span one whole cycle each.
        ours.append(result.history["seconds"].diff().iloc[1:].sum())
        model.train()
        bare = [_seconds(_forward_backward, model, batch) for batch in batches]
        ratios.append(ours[-1] / sum(bare[1:]))
    return {
        "name": "training step over bare forward + backward of the same batch",
        "ratio": round(statistics.median(ratios), 3),
        "aim": "<= 1.15",
        "unit": "x time, lower is better",
        "rounds": [round(r, 3) for r in ratios],
        "milliseconds_a_step": round(1e3 * statistics.median(ours) / (len(batches) - 1)),
        "language_model": f"hidden {WIDTH}, 2 layers, NF4 + LoRA; {profile.training.tokens_per_step} tokens a step",
    }


# ---- From cache against online -------------------------------------------------------------------------------------


def decode_stock(data: bytes, processor) -> torch.Tensor:
    """All frames by Pillow, 16 at uniform intervals through the stock processor: [16, 3, 224, 224]."""
    image, frames = Image.open(BytesIO(data)), []
    for index in range(image.n_frames):
        image.seek(index)
        frames.append(np.asarray(image.convert("RGB")))
    chosen = [frames[i] for i in np.linspace(0, len(frames) - 1, 16).astype(int)]
    return processor(chosen, return_tensors="pt")["pixel_values"][0]


@torch.no_grad()
def encode_stock(xclip: XCLIPModel, pixels: torch.Tensor) -> torch.Tensor:
    """Projected frame embeddings [16, D] of one GIF."""
    return xclip.visual_projection(xclip.vision_model(pixels).pooler_output)


def online_step(model, optimizer, rows, files, xclip, processor) -> None:
    """One step as the original system did it: decode and encode each row's GIF, pad the text to 128 tokens."""
    frames = torch.stack([encode_stock(xclip, decode_stock(files[int(row[2])], processor)) for row in rows])
    ids = torch.full((len(rows), 128), model.tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for i, (prompt, answer, _, _) in enumerate(rows):
        ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    # Padding counted as text: the model would else drop it, and the original computed it.
    lengths = torch.full((len(rows),), 16)
    _forward_backward(
        model,
        {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": labels,
            "frames": frames,
            "lengths": lengths,
        },
    )
    optimizer.step()


@torch.no_grad()
def encode_once(encoder: FrameEncoder, files: list[bytes]) -> np.ndarray:
    """The suite's one pass over distinct GIFs: decode, crop and encode; [GIFs, 16, D] fp16."""
    frames = [torch.from_numpy(decode(data, image_size=encoder.image_size).frames) for data in files]
    full = torch.full((1,), 16)
    return torch.cat([encoder(f[None], full) for f in frames]).half().numpy()


def epoch_from_cache(folder: Path) -> dict:
    """An epoch online over an epoch from cache, encoder and language model costing about the same FLOPs a sample."""
    overrides = save_models(folder, layers=4, image_size=224, vision=(192, 4))
    profile = load_profile("tiny", overrides | {"language_model.quantisation": "none", "training.tokens_per_step": 500})
    files = [make_gif(seed) for seed in range(4)] * 4  # 16 GIFs; the copies are decoded and encoded all the same
    questions = make_questions(2 * len(files), len(files))  # TGIF-QA asks 2.3 questions a GIF
    model = GifQAModel.build(profile, torch.device("cpu"))
    xclip = load_xclip(overrides["encoder.model"])
    encoder = FrameEncoder(xclip, overrides["encoder.model"], None)
    encode_once(encoder, files[:1])
    start = time.perf_counter()
    features = Embeddings(model.encoder_key, encode_once(encoder, files))
    encoding = time.perf_counter() - start

    dataset = QADataset(model, questions)
    plan = plan_batches(dataset, features, profile)
    collate, processor = Collator(features, model.tokenizer.pad_token_id), VideoMAEImageProcessorPil()
    optimizer = torch.optim.AdamW(parameter_groups(model, profile.training), fused=True)
    cached = train(model, questions, features, profile, folder / "run", progress=False).history["seconds"].diff()
    cached = cached.mean() * len(plan)  # the first step, which warms up, counts as an average one
    batches = [[dataset[key] for key in keys] for keys in plan.batches]
    model.train()
    online = sum(_seconds(online_step, model, optimizer, rows, files, xclip, processor) for rows in batches)

    sample = collate(batches[0])
    with FlopCounterMode(display=False) as language:
        _forward_backward(model, sample)
    with FlopCounterMode(display=False) as vision:
        encode_stock(xclip, decode_stock(files[0], processor))
    flops = vision.get_total_flops() * len(sample["labels"]) / language.get_total_flops()
    return {
        "name": "an epoch online (decode, encode, pad to 128) over an epoch from cache",
        "ratio": round(online / cached, 2),
        "aim": ">= 3",
        "unit": "x time, higher is better",
        "break_even_epochs": math.ceil(encoding / (online - cached)) if online > cached else None,
        "break_even_exact": round(encoding / (online - cached), 2),
        "encoder_to_language_model_flops": round(flops, 2),
        "tokens_a_sample": round(float((plan.text_tokens + plan.video_tokens).sum() / len(questions)), 1),
        "seconds": {"online": round(online, 1), "cached": round(cached, 1), "encoding_once": round(encoding, 1)},
        "language_model": f"hidden {WIDTH}, 4 layers, LoRA; X-CLIP width 192, 4 layers, 224 pixels, patch 32",
    }


def run() -> list[dict]:
    """All three, in a folder that is gone afterwards."""
    results = [padding_waste()]
    for benchmark in (step_over_bare, epoch_from_cache):
        with tempfile.TemporaryDirectory() as folder:
            results.append(benchmark(Path(folder)))
    return results


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
