"""What the makers of the tiny backbones share: a tokenizer, an optimiser and its schedule, progress by CPU time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast


def train_tokenizer(texts: list[str], vocabulary: int, controls: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `vocabulary` tokens learnt from `texts`; the end token has the highest id.

    controls: further special tokens, such as those of a chat template.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 1, special_tokens=["<pad>", "<bos>", *controls], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(["<eos>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def learning_rate(peak: float, step: int, done: float) -> float:
    """Learning rate after 200 steps of warm-up and a share `done` of a cosine to 1 % of the peak."""
    return peak * min(1, (step + 1) / 200) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizer(parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """AdamW over those that are trained; vectors do not decay."""
    parameters = [p for p in parameters if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05}]
    groups.append({"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))


def update(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
    """One step down the loss, with gradients clipped to norm 1."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


class Progress:
    """Share of the CPU minutes that is spent, and a line with recent accuracies every so many steps."""

    def __init__(self, name: str, minutes: float, every: int) -> None:
        self.name, self.seconds, self.every = name, 60 * minutes, every
        self.started, self.step, self.done = time.process_time(), 0, 0.0
        self.shown: dict[str, list[float]] = {}

    def note(self, kind: str, right: Tensor) -> None:
        if right.numel():
            self.shown.setdefault(kind, []).append(right.float().mean().item())

    def advance(self, loss: Tensor) -> None:
        self.step, self.done = self.step + 1, (time.process_time() - self.started) / self.seconds
        if self.step % self.every == 0:
            accuracy = {k: round(float(np.mean(v[-self.every :])), 3) for k, v in sorted(self.shown.items())}
            print(
                f"{self.name}: {100 * self.done:3.0f} %, step {self.step}, loss {loss.item():.3f}, {accuracy}",
                flush=True,
            )


def aspect_loss(
    pictures: Tensor, bank: Tensor, targets: Tensor, scale: Tensor, progress: Progress, aspect: str
) -> Tensor:
    """Cross-entropy of the right caption of each picture over all captions of an aspect; a target of -1: none."""
    keep = targets >= 0
    logits = scale * pictures[keep] @ bank.T
    progress.note(aspect, logits.argmax(-1) == targets[keep])
    return F.cross_entropy(logits, targets[keep])


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """fp16 weights as safetensors, config and tokenizer."""
    model.half().save_pretrained(folder, safe_serialization=True)
    model.float()
    tokenizer.save_pretrained(folder)
