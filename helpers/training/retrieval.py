"""Training of a retrieval head: cached embeddings to batches, false negatives, the best step by held-out videos.

It runs on the suite's engine, which brings checkpoints, resuming bit for bit, deadline, signals, history and the watch
over runs that learn nothing; a loop of its own would have to bring each of them again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.sparse import csr_array
from torch import Tensor, nn
from torch.utils.data import Dataset

from helpers.config import PACING, RetrievalConfig
from helpers.models.parts import inference, on_cpu
from helpers.models.retrieval.bundle import Match
from helpers.models.retrieval.heads import RetrievalHead
from helpers.models.retrieval.losses import RetrievalLoss, constant_loss
from helpers.scoring.retrieval import retrieval_metrics
from helpers.scoring.retrieval_tables import match_threshold
from helpers.training.checkpoints import CONTRACT, CheckpointError, trainable
from helpers.training.collective import TrainingError
from helpers.training.engine import Job, TrainResult, fit
from helpers.training.plan import StepPlan
from helpers.workspace.disk import whole

BEST, MRR = "best.safetensors", "validation_mrr"
AT_ONCE = 256  # embeddings that pass a tower at once
Values = np.ndarray | Sequence[np.ndarray]  # [N, D], or N arrays [L_i, D] that are not pooled


@dataclass(frozen=True)
class TextVideo:
    """Texts and videos as embeddings in memory, and which belong together.

    text, video: [N, D] and [M, D'], or lists of arrays [L_i, D] that are not pooled. video_of [N]: the video that each
    text was written of. relevant: sparse bool [N, M], all videos that a text fits, its own among them; without it,
    those whose texts say the same (`equal_text`). Raises TrainingError for what cannot be trained on.
    """

    text: Values
    video: Values
    video_of: np.ndarray
    relevant: csr_array

    def __post_init__(self) -> None:
        if not (len(self.text) == len(self.video_of) == self.relevant.shape[0] and len(self.text)):
            raise TrainingError(
                f"{len(self.text):,} text embeddings, {len(self.video_of):,} videos that they are of and relevance of "
                f"{self.relevant.shape[0]:,}: there must be as many of each, and some"
            )
        if self.relevant.shape[1] != len(self.video) or not (0 <= min(self.video_of) <= max(self.video_of)):
            raise TrainingError(f"relevance is {list(self.relevant.shape)} for {len(self.video):,} videos")
        if max(self.video_of) >= len(self.video):
            raise TrainingError(f"a text is of video {max(self.video_of)}, and there are {len(self.video):,} videos")
        if {np.ndim(value) for values in (self.text, self.video) for value in values[:1]} not in ({1}, {2}):
            raise TrainingError("text and video embeddings must both be pooled, or neither of them")
        for name, values in (("text", self.text), ("video", self.video)):
            bad = [row for row, value in enumerate(values) if not np.isfinite(value).all()]
            if bad:
                raise TrainingError(f"{len(bad):,} {name} embeddings hold NaN or infinity, the first in row {bad[0]}")

    @cached_property
    def pooled(self) -> bool:
        """Whether there is one vector an item."""
        return np.ndim(self.text[0]) == 1

    @property
    def widths(self) -> tuple[int, int]:
        """Numbers in a vector, of texts and of videos."""
        return self.text[0].shape[-1], self.video[0].shape[-1]

    def of_videos(self, chosen: np.ndarray) -> TextVideo:
        """The part about the videos of these numbers, with their texts."""
        place = np.full(len(self.video), -1)
        place[chosen] = np.arange(len(chosen))
        texts = np.flatnonzero(place[self.video_of] >= 0)
        text, video = (
            values[rows] if isinstance(values, np.ndarray) else [values[row] for row in rows]
            for values, rows in ((self.text, texts), (self.video, chosen))
        )
        return TextVideo(text, video, place[self.video_of[texts]], self.relevant[texts][:, chosen])

    def digest(self) -> str:
        """SHA-256 over all embeddings and what belongs together."""
        state = hashlib.sha256()
        for values in (self.text, self.video):
            for value in values:
                state.update(f"{value.shape} {value.dtype}".encode() + np.ascontiguousarray(value).tobytes())
        state.update(np.ascontiguousarray(self.video_of, dtype=np.int64).tobytes())
        state.update(repr([part.tolist() for part in self.relevant.nonzero()]).encode())
        return state.hexdigest()


def equal_text(texts: Sequence[str], video_of: np.ndarray, videos: int) -> csr_array:
    """Relevance [N, M] where the truth is not known: a text fits the videos of which the same words were said."""
    _, number = np.unique([" ".join(text.lower().split()) for text in texts], return_inverse=True)
    said = csr_array((np.ones(len(number), dtype=bool), (number, video_of)), shape=(number.max() + 1, videos))
    said.sum_duplicates()
    return said[number]


def split_videos(data: TextVideo, share: float, seed: int) -> tuple[TextVideo, TextVideo | None]:
    """What to train on, and a random `share` of the videos, with all their texts, to choose the best step on.

    None where that is no video.
    """
    order = np.random.default_rng(seed).permutation(len(data.video))
    count = round(share * len(order))
    held = data.of_videos(np.sort(order[:count])) if count else None
    return (data.of_videos(np.sort(order[count:])) if count else data), held


def draw_pairs(data: TextVideo, config: RetrievalConfig) -> list[tuple[int, int, bool]]:
    """Pairs (text, video, whether it is of that video), drawn once: `config.pairs` texts a video and as many others.

    A video with fewer texts gives fewer of both. With `config.mask` no text that fits the video is drawn as another's.
    """
    rng, pairs = np.random.default_rng([config.seed, 1]), []
    fits = data.relevant.tocsc()
    for video in range(len(data.video)):
        own = rng.permutation(np.flatnonzero(data.video_of == video))[: config.pairs]
        other = rng.permutation(len(data.text))
        other = other[data.video_of[other] != video]
        if config.mask:
            other = other[~np.isin(other, fits[:, [video]].nonzero()[0])]
        pairs += [(int(text), video, True) for text in own]
        pairs += [(int(text), video, False) for text in other[: len(own)]]
    return pairs


def plan_steps(data: TextVideo, config: RetrievalConfig) -> StepPlan:
    """All steps of a run: lists of (text, video, whether it is of that video), an epoch a pass over all of them."""
    own = [(text, int(video), True) for text, video in enumerate(data.video_of)]
    items = draw_pairs(data, config) if config.pairs else own
    sides = [np.array([1 if data.pooled else len(value) for value in values]) for values in (data.text, data.video)]
    lengths = [side[[item[place] for item in items]] for place, side in enumerate(sides)]
    batches, real, padded, after = [], [], [], []
    for epoch in range(math.ceil(config.epochs)):
        order = np.random.default_rng([config.seed, 2, epoch]).permutation(len(items))
        parts = np.array_split(order, math.ceil(len(order) / config.batch_size))  # of like size: no step of one item
        share = min(1.0, config.epochs - epoch)
        parts = parts[: math.ceil(share * len(parts))]
        for number, rows in enumerate(parts, 1):
            batches.append([items[row] for row in rows])
            real.append([int(side[rows].sum()) for side in lengths])
            padded.append(len(rows) * sum(int(side[rows].max()) for side in lengths))
            after.append(epoch + share * number / len(parts))
    text, video = np.array(real).T
    return StepPlan(batches, text, video, np.array(padded), np.array(after))


class Items(Dataset):
    """A data set whose keys are its items: what they stand for is looked up batch by batch."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: tuple[int, int, bool]) -> tuple[int, int, bool]:
        return key


def _padded(values: Values, rows: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Rows of embeddings as float32, and their mask if they are not pooled."""
    if np.ndim(values[0]) == 1:
        return torch.from_numpy(np.stack([values[row] for row in rows])).float(), None
    parts = [torch.as_tensor(values[row]).float() for row in rows]
    lengths = torch.tensor([len(part) for part in parts])
    padded = nn.utils.rnn.pad_sequence(parts, batch_first=True)
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]


class Collator:
    """Items to one batch of `Aligner.forward`."""

    def __init__(self, data: TextVideo, config: RetrievalConfig) -> None:
        self.data, self.config = data, config

    def __call__(self, items: Sequence[tuple[int, int, bool]]) -> dict[str, Tensor | None]:
        """Embeddings and their masks, and what `matches` says."""
        texts, videos, _ = zip(*items, strict=True)
        batch: dict[str, Tensor | None] = dict(zip(("positive", "counted"), self.matches(items), strict=True))
        batch["text"], batch["text_mask"] = _padded(self.data.text, texts)
        batch["video"], batch["video_mask"] = _padded(self.data.video, videos)
        return batch

    def matches(self, items: Sequence[tuple[int, int, bool]]) -> tuple[Tensor, Tensor]:
        """Bool tensors of the losses, `positive` and `counted`: [B, B] of all against all, or [B] of drawn pairs."""
        texts, videos, own = (list(part) for part in zip(*items, strict=True))
        positive = torch.tensor(own) if self.config.pairs else torch.eye(len(items), dtype=torch.bool)
        if self.config.pairs or not self.config.mask:
            return positive, torch.ones_like(positive)
        return positive, positive | ~torch.from_numpy(self.data.relevant[texts][:, videos].toarray())


class Aligner(nn.Module):
    """A head with its loss, as the engine trains it."""

    def __init__(self, head: RetrievalHead) -> None:
        super().__init__()
        self.head, self.loss = head, RetrievalLoss(head.config.loss)

    def forward(
        self,
        text: Tensor,
        video: Tensor,
        positive: Tensor,
        counted: Tensor,
        text_mask: Tensor | None = None,
        video_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Loss of a `Collator`'s batch."""
        texts, videos = self.head.text(text, text_mask), self.head.video(video, video_mask)
        with torch.autocast(texts.device.type, enabled=False):  # cosines in half precision tie
            similarity = (texts * videos).sum(-1) if positive.ndim == 1 else texts @ videos.T
            return {"loss": self.loss(similarity, positive, counted)}


def vectors(head: RetrievalHead, side: str, values: Values) -> np.ndarray:
    """Unit vectors [N, E] of all texts (side "text") or videos ("video")."""
    place, found = next(head.parameters()).device, []
    with inference(head):
        for start in range(0, len(values), AT_ONCE):
            x, mask = _padded(values, range(start, min(start + AT_ONCE, len(values))))
            found.append(getattr(head, side)(x.to(place), None if mask is None else mask.to(place)).cpu().numpy())
    return np.concatenate(found)


def similarity(data: TextVideo, head: RetrievalHead | None = None) -> np.ndarray:
    """Cosines [N, M] of all texts and videos by a head; without one, of the embeddings' own means.

    Raises TrainingError where these differ in width and so cannot be compared without a head.
    """
    if head is not None:
        return vectors(head, "text", data.text) @ vectors(head, "video", data.video).T
    if len(set(data.widths)) > 1:
        raise TrainingError(f"texts and videos have {data.widths} numbers: they cannot be compared without a head")
    sides = [np.stack([np.atleast_2d(value).mean(0, dtype=np.float64) for value in v]) for v in (data.text, data.video)]
    texts, videos = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in sides)
    return texts @ videos.T


def calibrate(scores: np.ndarray, relevant: csr_array) -> Match | None:
    """When something matches, from cosines [N, M] of validation texts and which videos they fit.

    A text's best score over the videos that it does not fit tells what a text that fits nothing scores; a text without
    a fitting video tells it by itself. The highest of more videos is higher: the threshold is for about as many. None
    where one of the two kinds of score is missing, as with a single video.
    """
    fits = relevant.toarray().astype(bool)
    nothing = np.where(fits, -np.inf, scores).max(1)
    nothing, matched = nothing[~fits.all(1)], scores.max(1)[fits.any(1)]
    if not len(nothing) or not len(matched):
        return None
    return Match(float(nothing.mean()), float(nothing.std()), match_threshold(matched, nothing))


@dataclass(frozen=True)
class HeadResult:
    """A trained head, of its best step, with its run; `constant_loss`: of a head that tells nothing apart."""

    head: RetrievalHead
    run: TrainResult
    best_step: int
    constant_loss: float
    match: Match | None
    """When something matches, from the validation videos; None without enough of them."""


def train_head(
    data: TextVideo,
    config: RetrievalConfig,
    folder: Path | str,
    *,
    encoder_key: str = "",
    deadline: float = math.inf,
    progress: bool = True,
) -> HeadResult:
    """Train a head on `data`, less the videos that are held out, or go on with it: see `helpers.training.engine.fit`.

    At the end of each epoch the held-out videos are searched by their texts; the head of the highest MRR is kept, and
    is the result of a finished run. The history has the columns `validation_mrr` and eval_loss. encoder_key: what the
    embeddings are of, so that a run on others is not gone on with. Raises CheckpointError if `folder` holds another
    run, TrainingError if the loss diverges, nothing is learnt, or the data cannot be trained on.
    """
    folder = Path(folder)
    trained, held = split_videos(data, config.validation_share, config.seed)
    model = Aligner(RetrievalHead.build(config, *data.widths))
    for scale, values in ((model.head.text_scale, trained.text), (model.head.video_scale, trained.video)):
        if config.standardise:
            scale.fit(torch.from_numpy(values if trained.pooled else np.concatenate(values)))
    plan, collator = plan_steps(trained, config), Collator(trained, config)
    job = Job(
        dataset=Items(len(trained.text)),
        plan=plan,
        collator=collator,
        identity=_identity(model, data, config, encoder_key),
        groups=_groups(model, config),
        tokens=plan.text_tokens + plan.video_tokens,
        warmup=config.warmup_ratio,
        decay=config.decay,
        max_grad_norm=0.0,
        seed=config.seed,
        checkpoint_minutes=config.checkpoint_minutes,
        log_steps=config.log_steps,
        measure=None if held is None else _Validation(model, held, config, folder),
    )
    run = fit(model, job, folder, deadline=deadline, progress=progress)
    best = run.steps
    if held is not None and run.status == "complete":
        best = _load_best(model, run.history, folder)
    model.eval().requires_grad_(False)
    epoch = plan.batches[: min(plan.epoch_ends)]
    constant = np.mean([constant_loss(config.loss, *collator.matches(items)) for items in epoch])
    match = None if held is None else calibrate(similarity(held, model.head), held.relevant)
    return HeadResult(model.head, run, best, float(constant), match)


class _Validation:
    """Searches the held-out videos, and keeps the head in the folder whenever it finds more than ever before."""

    def __init__(self, model: Aligner, held: TextVideo, config: RetrievalConfig, folder: Path) -> None:
        self.model, self.held, self.folder = model, held, folder
        plan, collator = plan_steps(held, config.model_copy(update={"epochs": 1.0})), Collator(held, config)
        self.batches = [collator(items) for items in plan.batches]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        scores, losses = similarity(self.held, self.model.head), []
        place = next(self.model.parameters()).device
        with inference(self.model):
            for batch in self.batches:
                batch = {name: None if value is None else value.to(place) for name, value in batch.items()}
                losses.append(float(self.model(**batch)["loss"]))
        mrr = retrieval_metrics(scores, self.held.relevant)["text_to_video"]["MRR"]
        # by the history, not by the file: a run that goes on from before its best step finds that step again
        if not any(mrr <= row.get(MRR, -math.inf) for row in rows):
            with whole(self.folder / BEST) as temporary:
                save_file(on_cpu(trainable(self.model)), temporary, {"step": str(rows[-1]["step"])})
        return {"eval_loss": float(np.mean(losses)), MRR: mrr}


def _load_best(model: Aligner, history: pd.DataFrame, folder: Path) -> int:
    """Give `model` the weights of the step with the highest MRR, and return that step."""
    step = int(history["step"][history[MRR].idxmax()])
    path, expected = folder / BEST, trainable(model)
    advice = f"delete {folder / 'checkpoints'} to train anew"
    if not path.is_file():
        raise CheckpointError(f"{path}, which held the head of the best step, is missing: {advice}")
    with safe_open(path, framework="pt") as file:
        if (file.metadata() or {}).get("step") != str(step) or {*file.keys()} != expected.keys():
            raise CheckpointError(f"{path} is not the head of step {step}, the best of this run: {advice}")
        with torch.no_grad():
            for name, parameter in expected.items():
                parameter.copy_(file.get_tensor(name))
    return step


def _identity(model: Aligner, data: TextVideo, config: RetrievalConfig, encoder_key: str) -> dict[str, Any]:
    shapes = {name: list(p.shape) for name, p in trainable(model).items()}
    return {
        "contract": CONTRACT,
        "encoder_key": encoder_key,
        "retrieval": config.model_dump(mode="json", exclude={*PACING["retrieval"]}),
        "parameters": hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest(),
        "embeddings": data.digest(),
    }


def _groups(model: Aligner, config: RetrievalConfig) -> list[dict[str, Any]]:
    """Matrices decay; biases, norms, temperature and [CLS] do not."""
    parameters = list(trainable(model).values())
    return [
        {"params": [p for p in parameters if (p.ndim >= 2) == matrix], "part": "head", "lr": config.learning_rate}
        | {"weight_decay": config.weight_decay if matrix else 0.0}
        for matrix in (True, False)
    ]
