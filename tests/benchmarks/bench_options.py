"""Multiple choice: five options scored behind one shared prefix, against one prompt per option.

Run alone with `python -m tests.benchmarks.bench_options`.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, XCLIPConfig, XCLIPModel

from helpers.config import load_profile
from helpers.models.gif_qa.model import GifQAModel
from tests.conftest import save_tiny_tokenizer

HIDDEN, LAYERS, ROUNDS = 512, 4, 7
QUESTIONS, OPTIONS = 8, 5
# TGIF-QA's action and transition rows at 1.25 tokens a word: about 9.5 words a question and the template; 2 to 3 an
# option, and the terminator
PROMPT_TOKENS, OPTION_TOKENS = 19, (3, 4, 4, 4, 6)


def build_model(folder: Path) -> GifQAModel:
    """A random Llama of hidden size 512 behind a random connector, unquantised."""
    tokenizer = save_tiny_tokenizer(folder / "llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    mit = {f"mit_{key}": value for key, value in small.items()}
    vision = {**small, **mit, "num_frames": 16, "image_size": 32, "patch_size": 16}
    XCLIPModel(XCLIPConfig(vision_config=vision, text_config=small, projection_dim=64)).save_pretrained(
        folder / "xclip"
    )
    overrides = {
        "language_model.model": str(folder / "llama"),
        "language_model.quantisation": "none",
        "encoder.model": str(folder / "xclip"),
    }
    return GifQAModel.build(load_profile("tiny", overrides), torch.device("cpu")).eval()


def run() -> dict:
    """Time both ways in turn; the ratio is the median over rounds of one prompt per option over the shared prefix."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        model = build_model(Path(folder))
    prompts = [
        model.encode_prompt("what ?")[:1] + rng.integers(3, 300, PROMPT_TOKENS).tolist() for _ in range(QUESTIONS)
    ]
    answers = [[[*rng.integers(3, 300, n - 1).tolist(), 1] for n in OPTION_TOKENS] for _ in prompts]
    video = model._frames(rng.normal(size=(QUESTIONS, 16, 64)), np.full(QUESTIONS, 16))
    repeated = tuple(tensor.repeat_interleave(OPTIONS, 0) for tensor in video)

    def shared() -> np.ndarray:
        return np.stack(model._score(prompts, answers, video))[..., 0]

    def separate() -> np.ndarray:
        each = [prompt for prompt in prompts for _ in range(OPTIONS)]
        scores = model._score(each, [[option] for options in answers for option in options], repeated)
        return np.stack(scores).reshape(QUESTIONS, OPTIONS, 2)[..., 0]

    ratios = []
    with torch.inference_mode():
        difference = np.abs(shared() - separate()).max()
        if difference > 1e-3:
            raise AssertionError(f"the two ways disagree by {difference} nats")
        for _ in range(ROUNDS):
            seconds = []
            for way in (separate, shared):
                start = time.perf_counter()
                way()
                seconds.append(time.perf_counter() - start)
            ratios.append(seconds[0] / seconds[1])
    return {
        "name": "one prompt per option over options from a shared prefix",
        "ratio": round(statistics.median(ratios), 3),
        "aim": ">= 2.5",
        "unit": "x time, higher is better",
        "rounds": [round(ratio, 2) for ratio in sorted(ratios)],
        "setting": f"{QUESTIONS} questions of {OPTIONS} options, 16 frames, Llama of hidden {HIDDEN}",
        "largest_difference_nats": float(difference),
    }


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
