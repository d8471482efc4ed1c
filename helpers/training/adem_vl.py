"""ADEM-VL on ScienceQA: problems to batches, the optimizer of the recipe, and runs on the suite's own trainer.

Recipe: section 4 of the paper (arXiv 2410.17779) as its official code computes it. What differs is said where it does.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.utils.data import Dataset

from helpers.config import PACING, AdemConfig
from helpers.corpora.schema import reject_table
from helpers.corpora.scienceqa import ANSWER_START, open_image, prompt, protocol, target
from helpers.models.adem_vl.model import AdemVL
from helpers.models.adem_vl.sequences import Encoded, PromptTooLong, collate, encode, image_tensor
from helpers.training.checkpoints import CONTRACT, trainable
from helpers.training.collective import TrainingError
from helpers.training.engine import Job, TrainResult, fit
from helpers.training.plan import StepPlan
from helpers.workspace.weights import find_model

SHAPE = (
    "adapter_dim",
    "projector_dim",
    "scales",
    "alpha",
    "beta",
    "drop_ratio",
    "use_cls",
    "cross_attention",
    "phi",
    "learnable_threshold",
    "layer_dropout",
    "cross_attention_dropout",
)
TWIN = "steps of the text-only twin"  # what is trained after the model, on the same problems
BETAS = (0.9, 0.95)  # of AdamW, in the official code


def encode_problems(
    model: AdemVL, problems: pd.DataFrame, config: AdemConfig, *, answers: bool, blind: bool = False
) -> tuple[list[Encoded | None], pd.DataFrame]:
    """Every problem's sequence in order, None for one that is too long, and the table of those (item, where, reason).

    answers: with the answer, for training; else up to "The answer is". blind: as if no problem had an image.
    """
    style = protocol(config.protocol).train if answers else protocol(config.protocol).evaluation
    encoded: list[Encoded | None] = []
    skipped: list[tuple[str, str, str]] = []
    for row in problems.to_dict("records"):
        text, options = prompt(row, style), {"has_image": bool(row["image"]) and not blind}
        options |= {"use_cls": model.config.use_cls, "max_tokens": config.max_tokens}
        try:
            if answers:
                sample = encode(model.tokenizer, text, target(row), **options)
            else:
                sample = encode(model.tokenizer, text + ANSWER_START, **options)
        except PromptTooLong as error:
            sample = None
            skipped.append((row["pid"], row["split"], str(error)))
        encoded.append(sample)
    return encoded, reject_table(skipped)


class Images:
    """Pixels of image files; each file is opened and resized once and kept as uint8."""

    def __init__(self, size: int, normalisation: str) -> None:
        self.size, self.normalisation = size, normalisation
        self._kept: dict[str, Image.Image] = {}

    def __call__(self, path: str) -> torch.Tensor:
        """Normalised pixels [3, size, size]; zeros for "", no image. Raises CorpusError for a broken file."""
        if not path:
            return image_tensor(None, self.size)
        if path not in self._kept:
            self._kept[path] = open_image(path).resize((self.size, self.size), Image.Resampling.BICUBIC)
        return image_tensor(self._kept[path], self.size, self.normalisation)


def images_for(model: AdemVL, config: AdemConfig) -> Images:
    """Images in the size of the model's encoder, normalised as the settings say."""
    own = config.normalisation == "encoder"
    return Images(model.config.vision_config.image_size, model.config.normalisation if own else config.normalisation)


class Problems(Dataset):
    """Problems with their answers, tokenised once; those that are too long are listed in `skipped` and left out."""

    def __init__(self, model: AdemVL, problems: pd.DataFrame, config: AdemConfig, *, blind: bool = False) -> None:
        encoded, self.skipped = encode_problems(model, problems, config, answers=True, blind=blind)
        kept = [i for i, sample in enumerate(encoded) if sample is not None]
        self.samples: list[Encoded] = [encoded[i] for i in kept]
        paths = problems["image"].tolist()
        self.paths = ["" if blind else paths[i] for i in kept]
        self.lengths = np.array([len(sample.input_ids) for sample in self.samples], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, row: int) -> tuple[Encoded, str]:
        return self.samples[row], self.paths[row]

    def digest(self) -> str:
        """SHA-256 over the tokens of all problems and their images' bytes, in order."""
        state = hashlib.sha256()
        for sample, path in zip(self.samples, self.paths, strict=True):
            state.update(repr((sample.input_ids, sample.labels)).encode())
            state.update(Path(path).read_bytes() if path else b"")
        return state.hexdigest()


@dataclass(frozen=True)
class Collator:
    """Problems to the batches of one step: sorted by length, cut into pieces of `batch_size`."""

    images: Images
    padding: int
    batch_size: int

    def __call__(self, rows: Sequence[tuple[Encoded, str]]) -> list[dict[str, torch.Tensor]]:
        """Batches of `AdemVL.forward`; a batch without any image has no pixel_values."""
        rows = sorted(rows, key=lambda row: len(row[0].input_ids))
        pieces = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        return [batch_of(piece, self.images, self.padding) for piece in pieces]


def batch_of(
    rows: Sequence[tuple[Encoded, str]], images: Images, padding: int, left: bool = False
) -> dict[str, torch.Tensor]:
    """One batch of problems (sequence, path of the image); `left` pads on the left, for answers."""
    samples, paths = zip(*rows, strict=True)
    pixels = torch.stack([images(path) for path in paths]) if any(paths) else None
    return collate(samples, pixels, padding, left)


def padding_token(model: AdemVL) -> int:
    """Token that fills up a batch."""
    pad = model.tokenizer.pad_token_id
    return model.tokenizer.eos_token_id if pad is None else pad


def plan_steps(lengths: np.ndarray, config: AdemConfig) -> StepPlan:
    """Lay out the run: each step `batch_size * accumulation` problems, each epoch in an order of its own.

    As in the official code, what does not fill a step at the end of an epoch waits for the next epoch's order. Raises
    TrainingError if there are too few problems for one step.
    """
    size = config.batch_size * config.accumulation
    per_epoch = len(lengths) // size
    if not per_epoch:
        raise TrainingError(
            f"{len(lengths)} training problems are fewer than the {size} of one step: lower adem.batch_size or "
            "adem.accumulation"
        )
    batches: list[list[int]] = []
    for epoch in range(math.ceil(config.epochs)):
        order = np.random.default_rng([config.seed, epoch]).permutation(len(lengths))
        steps = math.ceil(min(1.0, config.epochs - epoch) * per_epoch)
        batches += [order[i * size : (i + 1) * size].tolist() for i in range(steps)]
    real = np.array([lengths[batch].sum() for batch in batches])
    padded = [np.sort(lengths[batch]).reshape(-1, config.batch_size) for batch in batches]
    return StepPlan(
        batches,
        text_tokens=real,
        video_tokens=np.zeros_like(real),
        padded_tokens=np.array([config.batch_size * piece[:, -1].sum() for piece in padded]),
        epoch_after=np.arange(1, len(batches) + 1) / per_epoch,
    )


def build_model(config: AdemConfig) -> AdemVL:
    """An untrained model on the profile's base models. Raises ModelNotFound if weights are missing."""
    return AdemVL.build(
        config.language_model,
        config.vision_model,
        quantisation=config.quantisation,
        revisions=(config.language_revision, config.vision_revision),
        seed=config.seed,
        **{name: getattr(config, name) for name in SHAPE},
    )


def load_model(config: AdemConfig, folder: Path | str) -> AdemVL:
    """What `AdemVL.save_pretrained` wrote to `folder`, on the profile's base models. Raises as `from_pretrained`."""
    language = find_model(config.language_model, config.language_revision, "ADEM-VL")
    vision = find_model(config.vision_model, config.vision_revision, "ADEM-VL")
    return AdemVL.from_pretrained(folder, language, vision)


def parameter_groups(model: AdemVL, config: AdemConfig) -> list[dict[str, Any]]:
    """Two groups at one learning rate: matrices and tables decay, biases and thresholds do not (timm's rule)."""
    parameters = list(trainable(model).values())
    decay = {True: config.weight_decay, False: 0.0}
    groups = {matrix: [p for p in parameters if (p.ndim >= 2) == matrix] for matrix in decay}
    return [
        {"params": params, "part": "adapters", "lr": config.learning_rate, "weight_decay": decay[matrix]}
        for matrix, params in groups.items()
    ]


def run_identity(model: AdemVL, problems: Problems, config: AdemConfig, blind: bool) -> dict[str, Any]:
    """All that decides a run's result: settings, data, base models; not its pace, nor the splits it never sees."""
    shapes = {name: list(p.shape) for name, p in trainable(model).items()}
    return {
        "contract": CONTRACT,
        "blind": blind,
        "adem": config.model_dump(mode="json", exclude={*PACING["adem"], "evaluation_splits"}),
        "parameters": hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest(),
        "problems": problems.digest(),
    }


def train_adem(
    model: AdemVL,
    problems: pd.DataFrame,
    config: AdemConfig,
    folder: Path | str,
    *,
    blind: bool = False,
    deadline: float = math.inf,
    progress: bool = True,
) -> tuple[TrainResult, pd.DataFrame]:
    """Train `model` on `problems` (rows of `PROBLEM_COLUMNS`), or go on with it: see `helpers.training.engine.fit`.

    blind: every problem is shown without its image. Returns the result, and the problems that were too long and left
    out (item, where, reason). Raises CheckpointError if `folder` holds another run, TrainingError if the loss diverges,
    nothing is learnt (see `learning`) or there are too few problems.
    """
    data = Problems(model, problems, config, blind=blind)
    plan = plan_steps(data.lengths, config)
    job = Job(
        dataset=data,
        plan=plan,
        collator=Collator(images_for(model, config), padding_token(model), config.batch_size),
        identity=run_identity(model, data, config, blind),
        groups=parameter_groups(model, config),
        tokens=plan.text_tokens,
        warmup=config.warmup_epochs / config.epochs,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        checkpoint_minutes=config.checkpoint_minutes,
        log_steps=config.log_steps,
        adapter="adapters",
        unit=TWIN if blind else "steps",
        follow=() if blind else (TWIN,),
        betas=BETAS,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    return fit(model, job, folder, deadline=deadline, progress=progress), data.skipped
