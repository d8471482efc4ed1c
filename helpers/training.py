"""Training on the Hugging Face Trainer: adapters of any model (`fit`), and those of the GIF model (`train`).

The whole run is planned before the first step: a `Plan` lays out the batches of every epoch, and the Trainer walks
through that plan as one pass. A run is therefore resumed by its step number alone, fractions of an epoch are exact, and
a model without video tokens can be trained on the very same batches.
"""

import hashlib
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from accelerate.data_loader import prepare_data_loader
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
)

from helpers.distributed import Shared, any_of, barrier, mean_of, rank, train_in_processes, world
from helpers.workspace import compute_dtype, device, probe_steps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Raised by hand when a run under the same settings would give another result, so that older checkpoints are refused.
CONTRACT = 1
IGNORED = -100  # label of a token without loss, the convention of torch's cross entropy
PARTS = {"mit": "learning_rate_mit", "connector": "learning_rate_connector", "language_model": "learning_rate_lora"}
TENSORS, HISTORY, META, STATE = "trainable.safetensors", "history.parquet", "checkpoint.json", "trainer_state.json"
KEPT_CHECKPOINTS = 2
# Settings that do not change the result (GPUs: up to rounding and the random numbers of dropout).
PACING = {"checkpoint_minutes", "log_steps", "gradient_checkpointing", "gpus"}
SAVE_MARGIN = 3  # saves that must still fit before the deadline: disks on free machines slow down without warning
SLOW_DISK = 50e6  # bytes a second, assumed until a save has been timed


class TrainingError(RuntimeError):
    """Training cannot start or go on; the message says why and what to do."""


class CheckpointError(TrainingError):
    """The checkpoint in the folder belongs to other settings, data or parameters."""


# ---- Rows, batches -------------------------------------------------------------------------------------------------


def target_answer(task: str, answer: str, label: int) -> str:
    """Text that a question is trained on: TGIF-QA's count code 0 ("once") is the number 1, all else is the answer."""
    return str(max(int(label), 1)) if task == "count" else answer


def hold_out(questions: pd.DataFrame, share: float, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Split questions by GIF: those to train on, and those about a random `share` of the GIFs, to watch the loss on."""
    gifs = np.sort(questions["gif_sha256"].unique())
    kept_out = np.random.default_rng(seed).permutation(gifs)[: round(share * len(gifs))]
    held = questions["gif_sha256"].isin(kept_out)
    return questions[~held], questions[held]


class QADataset(Dataset):
    """Questions, tokenised once. An item is asked for as (row, groups): the row, and how many groups of 16 frames."""

    def __init__(self, model: Any, questions: pd.DataFrame, *, options_in_prompt: bool = False):
        """`model` gives `encode_prompt` and `encode_answer`; `questions` has the columns of the QA table."""
        if questions.empty:
            raise TrainingError("no questions to train on: the table has no rows (is the split empty?)")
        self.gifs: list[str] = questions["gif_sha256"].tolist()
        self.prompts: list[list[int]] = []
        self.answers: list[list[int]] = []
        known: dict[Any, list[int]] = {}  # many questions and most answers occur again and again
        for row in questions.itertuples():
            options = tuple(row.options) if options_in_prompt and len(row.options) else None
            key = (row.question, options)
            if key not in known:
                known[key] = model.encode_prompt(row.question, list(options) if options else None)
            self.prompts.append(known[key])
            answer = target_answer(row.task, row.answer, row.label)
            if answer not in known:
                known[answer] = model.encode_answer(answer)
            self.answers.append(known[answer])
        self.text_lengths = np.array([len(p) + len(a) for p, a in zip(self.prompts, self.answers, strict=True)])

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[int], list[int], str, int]:
        row, groups = key
        return self.prompts[row], self.answers[row], self.gifs[row], groups

    def digest(self) -> str:
        """SHA-256 over tokens and GIFs of all rows, in order."""
        state = hashlib.sha256()
        for row in zip(self.prompts, self.answers, self.gifs, strict=True):
            state.update(repr(row).encode())
        return state.hexdigest()


class Collator:
    """Rows to one padded batch; the frame embeddings of all its GIFs come from the feature table in one call."""

    def __init__(self, features: Any | None, pad_token_id: int):
        """`features=None` makes batches without video, for the blind model."""
        self.features, self.pad = features, pad_token_id

    def __call__(self, rows: Sequence[tuple[list[int], list[int], str, int]]) -> dict[str, torch.Tensor | None]:
        """Return input_ids, attention_mask, labels [B, L] (right padded; labels on answers only), frames, lengths."""
        size = (len(rows), max(len(prompt) + len(answer) for prompt, answer, _, _ in rows))
        ids = np.full(size, self.pad, dtype=np.int64)
        mask = np.zeros(size, dtype=np.int64)
        labels = np.full(size, IGNORED, dtype=np.int64)
        for i, (prompt, answer, _, _) in enumerate(rows):
            start, end = len(prompt), len(prompt) + len(answer)
            ids[i, :start], ids[i, start:end], labels[i, start:end], mask[i, :end] = prompt, answer, answer, 1
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        batch = {name: torch.from_numpy(values) for name, values in batch.items()} | {"frames": None, "lengths": None}
        if self.features is not None:
            frames, lengths = self.features.fetch([row[2] for row in rows], [row[3] for row in rows])
            batch |= {"frames": torch.as_tensor(frames), "lengths": torch.as_tensor(lengths)}
        return batch


def video_tokens(connector: Any, frames: np.ndarray, frames_per_group: int = 16) -> np.ndarray:
    """Number of video tokens that the connector makes of `frames` frames, in groups of 16."""
    groups = -(-frames // frames_per_group)
    return groups * connector.queries if connector.kind == "qformer" else frames + groups


def bucket(lengths: np.ndarray, budget: int, rng: np.random.Generator, window: int = 50) -> list[np.ndarray]:
    """Split all rows into batches of at most `budget` padded tokens, each of rows of like length, in random order.

    Rows are shuffled, then sorted by length inside windows of about `window` batches: enough rows to find equals, few
    enough that batches differ from epoch to epoch. A row longer than the budget is a batch of its own.
    """
    order = rng.permutation(len(lengths))
    rows_per_window = max(1, round(window * budget / lengths.mean()))
    batches: list[np.ndarray] = []
    left = order[:0]  # rows that filled no batch: they join the next window
    for start in range(0, len(order), rows_per_window):
        rows = np.concatenate([left, order[start : start + rows_per_window]])
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        first = 0
        for i, length in enumerate(lengths[rows].tolist()):
            if i > first and (i - first + 1) * length > budget:
                batches.append(rows[first:i])
                first = i
        left = rows[first:]
    batches.append(left)
    return [batches[i] for i in rng.permutation(len(batches))]


class Plan(Sampler[list[Any]]):
    """Batch sampler over a whole run: `batches`, lists of keys into a dataset, all epochs one after another."""

    def __init__(
        self,
        batches: list[list[Any]],
        text_tokens: np.ndarray,
        video_tokens: np.ndarray,
        padded_tokens: np.ndarray,
        epoch_after: np.ndarray,
    ):
        """For each batch: its real text and video tokens, its tokens with padding, and the epochs done after it."""
        self.batches, self.text_tokens, self.video_tokens = batches, text_tokens, video_tokens
        self.padded_tokens, self.epoch_after = padded_tokens, epoch_after
        whole = np.floor(self.epoch_after + 1e-9)
        self.epoch_ends = {int(i) + 1 for i in np.flatnonzero(np.diff(whole, prepend=0) > 0)} | {len(self)}

    def __iter__(self) -> Iterator[list[Any]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def waste(self) -> float:
        """Padded tokens over real tokens; 1 is no padding at all."""
        return float(self.padded_tokens.sum() / (self.text_tokens + self.video_tokens).sum())


class BatchPlan(Plan):
    """Batches of (row, groups) that hold a budget of tokens.

    Each epoch draws a group count for each row and buckets the rows by the length that follows, both from the seed and
    the epoch's number alone. The plan does not depend on whether the model will see the video tokens.
    """

    def __init__(
        self,
        text_lengths: np.ndarray,
        video_lengths: dict[int, np.ndarray],
        *,
        tokens_per_step: int,
        epochs: float,
        seed: int,
    ):
        """`text_lengths` [R] and `video_lengths[g]` [R] (video tokens at g groups) in tokens, for each row."""
        if epochs <= 0:
            raise TrainingError(f"training.epochs is {epochs}: it must be above 0")
        self.groups = sorted(video_lengths)
        planned: list[list[tuple[int, int]]] = []
        text, video, padded, epoch_of = [], [], [], []
        table = np.stack([video_lengths[g] for g in self.groups])
        rows_of_epoch = np.arange(len(text_lengths))
        for epoch in range(math.ceil(epochs)):
            rng = np.random.default_rng([seed, epoch])
            drawn = rng.integers(len(self.groups), size=len(text_lengths))
            video_now = table[drawn, rows_of_epoch]
            lengths = video_now + text_lengths
            batches = bucket(lengths, tokens_per_step, rng)
            batches = batches[: math.ceil(min(1.0, epochs - epoch) * len(batches))]
            for i, rows in enumerate(batches):
                planned.append([(int(r), self.groups[drawn[r]]) for r in rows])
                text.append(int(text_lengths[rows].sum()))
                video.append(int(video_now[rows].sum()))
                padded.append(int(lengths[rows].max()) * len(rows))
                epoch_of.append(epoch + (i + 1) / len(batches) * min(1.0, epochs - epoch))
        super().__init__(planned, np.array(text), np.array(video), np.array(padded), np.array(epoch_of))


def plan_batches(dataset: QADataset, features: Any, config: Any) -> BatchPlan:
    """Lay out the run that `config.training` asks for."""
    ids = dataset.gifs
    frames = {g: np.asarray(features.lengths(ids, [g] * len(ids))) for g in config.training.groups}
    return BatchPlan(
        dataset.text_lengths,
        {g: video_tokens(config.connector, n, config.encoder.frames_per_group) for g, n in frames.items()},
        tokens_per_step=config.training.tokens_per_step,
        epochs=config.training.epochs,
        seed=config.training.seed,
    )


# ---- Optimizer -----------------------------------------------------------------------------------------------------


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that learn, by name. TrainingError if there are none or one is not float32."""
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise TrainingError("the model has no trainable parameter: is its adapter attached and the connector unfrozen?")
    for name, p in found.items():
        # Half-precision parameters lose small updates, and the gradient scaler refuses their gradients.
        if p.dtype != torch.float32:
            raise TrainingError(f"trainable parameter {name} is {p.dtype}; keep trainable parameters in float32")
    return found


def parameter_table(model: nn.Module) -> pd.DataFrame:
    """Parameters by part: trainable, all (a packed 4-bit weight counts its logical values), share trained."""
    rows: dict[str, list[int]] = {}
    for name, p in model.named_parameters():
        count = rows.setdefault(name.split(".")[0], [0, 0])
        packed = getattr(p, "quant_state", None)
        size = math.prod(packed.shape) if packed is not None else p.numel()
        count[0] += size * p.requires_grad
        count[1] += size
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["trainable", "all"])
    table.loc["total"] = table.sum()
    return table.assign(share=table["trainable"] / table["all"])


def parameter_groups(model: nn.Module, training: Any) -> list[dict[str, Any]]:
    """Optimizer groups: three learning rates (MIT, connector, adapter), no decay on biases, norms and IA3 scales."""
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, p in trainable(model).items():
        part = name.split(".")[0]
        if part not in PARTS:
            raise TrainingError(f"trainable parameter {name} is in none of the parts {', '.join(PARTS)}")
        groups.setdefault((part, p.ndim >= 2 and "ia3_" not in name), []).append(p)
    return [
        {
            "params": params,
            "part": part,
            "lr": getattr(training, PARTS[part]),
            "weight_decay": training.weight_decay if decay else 0.0,
        }
        for (part, decay), params in sorted(groups.items(), key=lambda item: item[0])
    ]


# ---- Checkpoints ---------------------------------------------------------------------------------------------------


def fingerprint(model: nn.Module, dataset: QADataset, features: Any, config: Any) -> dict[str, Any]:
    """All that decides a run's result: settings, data and parameter shapes. What only paces it is left out."""
    shapes = {name: list(p.shape) for name, p in trainable(model).items()}
    return {
        "contract": CONTRACT,
        "encoder_key": features.encoder_key,
        "video": bool(model.video),
        "language_model": config.language_model.model_dump(mode="json"),
        "connector": config.connector.model_dump(mode="json"),
        "training": config.training.model_dump(mode="json", exclude=PACING),
        "parameters": hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest(),
        "questions": dataset.digest(),
    }


def _differences(theirs: Any, ours: Any, path: str = "") -> list[str]:
    """Names and both values of all leaves in which two nested dictionaries differ."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = sorted(theirs.keys() | ours.keys())
        return [d for k in keys for d in _differences(theirs.get(k), ours.get(k), f"{path}.{k}".lstrip("."))]
    return [] if theirs == ours else [f"{path}: {theirs!r} in the checkpoint, {ours!r} now"]


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Force a file or folder to disk, so that a rename after it never outruns its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _step_folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def commit_checkpoint(temporary: Path, folder: Path, step: int, info: dict[str, Any]) -> Path:
    """Seal the files in `temporary` with their hashes, rename it to `folder`/step-N, and keep the newest two."""
    files = sorted(p for p in temporary.iterdir() if p.is_file())
    info = info | {"step": step, "files": {p.name: _file_sha256(p) for p in files}}
    (temporary / META).write_text(json.dumps(info, indent=1))
    for path in [*files, temporary / META, temporary]:
        _sync(path)
    final = folder / f"step-{step:08d}"
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    _sync(folder)
    for old in _step_folders(folder)[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(old)
    return final


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint's description and check every file against it. ValueError or OSError if it is torn."""
    info = json.loads((path / META).read_text())
    for name, digest in info["files"].items():
        if _file_sha256(path / name) != digest:
            raise ValueError(f"{name} does not match its hash")
    return info


def find_checkpoint(folder: Path, ours: dict[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """Newest whole checkpoint in `folder` with its description, or None. Torn ones are passed over with a warning.

    Raises CheckpointError if the checkpoint belongs to a run with other settings, data or parameters.
    """
    for path in reversed(_step_folders(folder)):
        try:
            info = _read_checkpoint(path)
            theirs = info["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warnings.warn(f"checkpoint {path.name} is damaged ({error}); trying the one before it", stacklevel=2)
            continue
        differences = _differences(theirs, ours)
        if differences:
            raise CheckpointError(
                f"the checkpoint {path} is of another run:\n  "
                + "\n  ".join(differences)
                + f"\nSet these back, give the run another name, or delete {folder} to train anew."
            )
        return path, info
    return None


def load_tensors(model: nn.Module, path: Path) -> None:
    """Copy a checkpoint's tensors into the trainable parameters. CheckpointError names a missing or surplus one."""
    tensors, parameters = load_file(path / TENSORS), trainable(model)
    odd = tensors.keys() ^ parameters.keys()
    odd |= {n for n in tensors.keys() & parameters.keys() if tensors[n].shape != parameters[n].shape}
    if odd:
        raise CheckpointError(f"{path / TENSORS} and the model differ in: {', '.join(sorted(odd))}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


# ---- History and its display ---------------------------------------------------------------------------------------


class Recorder:
    """History of a run, a row for each step. Losses stay on the device until they are needed, to spare a sync."""

    def __init__(
        self, plan: Plan, tokens: np.ndarray, parts: Sequence[str], history: pd.DataFrame | None, seconds: float
    ):
        """`tokens`: real tokens of each step; `parts`: those of the model that have a learning rate of their own."""
        self.rows: list[dict[str, Any]] = [] if history is None else history.to_dict("records")
        self.pending: list[torch.Tensor] = []
        self.plan, self.before, self.began = plan, seconds, time.perf_counter()
        self.tokens, self.parts = tokens, list(parts)

    @property
    def seconds(self) -> float:
        """Training time of all sessions so far, in seconds."""
        return self.before + time.perf_counter() - self.began

    def add(self, loss: torch.Tensor, rates: dict[str, float]) -> None:
        """Note one step: its loss (a scalar, left where it is) and the learning rates that it used."""
        step = len(self.rows)
        self.pending.append(loss)
        row = {"step": step + 1, "epoch": float(self.plan.epoch_after[step]), "loss": math.nan, "eval_loss": math.nan}
        rates = {f"lr_{part}": rates.get(part, 0.0) for part in self.parts}
        self.rows.append(row | rates | {"tokens": int(self.tokens[step]), "seconds": self.seconds})

    def flush(self, scaled: bool) -> None:
        """Fetch the pending losses. TrainingError on a loss that is not finite.

        A gradient scaler (`scaled`) skips such steps: with one, it is an error only if all pending losses are so.
        """
        if not self.pending:
            return
        first = len(self.rows) - len(self.pending)
        losses = mean_of(torch.stack(self.pending).float()).tolist()
        self.pending.clear()
        for i, loss in enumerate(losses):
            self.rows[first + i]["loss"] = loss
        finite = [math.isfinite(loss) for loss in losses]
        if not (any(finite) if scaled else all(finite)):
            bad = finite.index(False)
            raise TrainingError(
                f"the loss became {losses[bad]} at step {first + bad + 1}. Lower the learning rates or raise "
                "the warm-up; running again goes on from the last checkpoint, which is before this step."
            )

    def table(self) -> pd.DataFrame:
        """The history so far, a row a step; eval_loss is NaN but at the ends of epochs, seconds are cumulative."""
        columns = ["step", "epoch", "loss", "eval_loss", *(f"lr_{part}" for part in self.parts), "tokens", "seconds"]
        return pd.DataFrame(self.rows, columns=columns)


def _in_kernel() -> bool:
    """Whether this process is a notebook's kernel."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


class LossDisplay:
    """Shows a run as it goes: a bar, and in a notebook a loss curve redrawn in place, elsewhere a line of text."""

    def __init__(self, total_steps: int, done: int, interval: float = 10.0):
        """`interval`: least number of seconds between two drawings."""
        self.bar = tqdm(total=total_steps, initial=done, unit="step", mininterval=1.0)
        self.interval, self.drawn, self.handle = interval, -math.inf, None

    def update(self, recorder: Recorder, window: int) -> None:
        """Show the state after the newest step; the loss is averaged over the last `window` steps."""
        last = recorder.rows[-window:]
        loss = float(np.mean([row["loss"] for row in last]))
        self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        self.bar.update(last[-1]["step"] - self.bar.n)
        if not _in_kernel():
            line = f"step {last[-1]['step']}/{self.bar.total}  epoch {last[-1]['epoch']:.2f}  loss {loss:.4f}"
            self.bar.write(f"{line}  {recorder.seconds:.0f} s")
        elif last[-1]["step"] == self.bar.total or time.perf_counter() - self.drawn >= self.interval:
            self.draw(recorder.table(), window)
            self.drawn = time.perf_counter()

    def draw(self, history: pd.DataFrame, window: int) -> None:
        """Draw the loss curve into this cell's output, over the one before."""
        from IPython.display import Image, display

        picture = BytesIO()  # a bare figure is shown only where pyplot has set up the kernel
        self.curve(history, window).savefig(picture, format="png")
        shown = Image(picture.getvalue(), format="png", alt="training loss by step")
        if self.handle is None:
            self.handle = display(shown, display_id=True)
        else:
            self.handle.update(shown)

    def curve(self, history: pd.DataFrame, window: int) -> "Figure":
        """Loss of each step and its mean over `window` steps, on an axis as long as the whole run."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 3), layout="constrained")
        axes = figure.subplots()
        axes.plot(history["step"], history["loss"], color="0.8", linewidth=0.8, label="each step")
        axes.plot(history["step"], history["loss"].rolling(window, min_periods=1).mean(), label=f"mean of {window}")
        axes.set(title="Training loss", xlabel="step", ylabel="loss (nats a token)", xlim=(0, self.bar.total))
        axes.legend()
        return figure

    def close(self) -> None:
        """End the bar."""
        self.bar.close()


# ---- The Trainer ---------------------------------------------------------------------------------------------------


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT instead of dying by them, so that a step can end and be saved (main thread only)."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    names = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(name, lambda number, frame: received.append(number)) for name in names]
    try:
        yield received
    finally:
        for name, handler in zip(names, before, strict=True):
            signal.signal(name, handler)


@dataclass(frozen=True)
class Job:
    """All that `fit` needs besides the model: what is learnt from, in which order, and by which optimizer."""

    dataset: Dataset
    plan: Plan
    collator: Callable[[Sequence[Any]], Any]
    """Rows to a batch, or to a list of batches of which one step takes the mean loss (gradient accumulation)."""
    identity: dict[str, Any]
    """All that decides the run's result: a checkpoint of another one is refused."""
    groups: list[dict[str, Any]]
    """AdamW's parameter groups, each with its `part`, the name under which its learning rate is noted."""
    tokens: np.ndarray
    """Real tokens of each step."""
    warmup: float
    """Share of the steps in which the learning rates rise; they then fall along a half cosine to 0."""
    max_grad_norm: float
    """Gradients are clipped to this norm; 0: not at all."""
    seed: int
    checkpoint_minutes: float
    log_steps: int
    watched: list[Any] = field(default_factory=list)
    """Batches whose mean loss is measured at the end of each epoch."""
    betas: tuple[float, float] = (0.9, 0.999)
    gradient_checkpointing: bool = False
    answer_tokens: Callable[[Any], int] | None = None
    """Number of tokens with loss of an item of `dataset`; needed to share a batch among processes."""


class RunControl(TrainerCallback):
    """After each step: log, evaluate, and decide whether to save or to stop."""

    def __init__(self, trainer: "AdapterTrainer", job: Job, ends: float, signals: list[int], evaluate: Any):
        self.trainer, self.training, self.signals, self.evaluate = trainer, job, signals, evaluate
        self.ends = ends  # on the clock of time.perf_counter
        self.last_step = len(trainer.recorder.rows) + probe_steps()
        self.saved = self.last = time.perf_counter()
        self.longest_step = 0.0
        size = sum(p.numel() * p.element_size() for p in trainable(trainer.model).values())
        self.save_seconds = 3 * size / SLOW_DISK  # the tensors and Adam's two moments

    def on_step_end(self, args, state, control, **kwargs):
        trainer, step = self.trainer, state.global_step
        if step % self.training.log_steps == 0 or step == len(trainer.plan):
            trainer.log_history_so_far(self.training.log_steps)
        if self.evaluate is not None and step in trainer.plan.epoch_ends:
            trainer.recorder.rows[-1]["eval_loss"] = self.evaluate()
        now = time.perf_counter()
        self.longest_step, self.last = max(self.longest_step, now - self.last), now
        out_of_time = now + self.longest_step + SAVE_MARGIN * self.save_seconds >= self.ends
        due = now - self.saved >= 60 * self.training.checkpoint_minutes
        flags = (out_of_time or self.signals or step >= self.last_step, due or step == len(trainer.plan))
        stop, save = any_of(flags, trainer.args.device)
        if stop:
            control.should_training_stop = control.should_save = True
        if save:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self.save_seconds, self.saved, self.last = now - self.last, now, now


class AdapterTrainer(Trainer):
    """Trainer over a `Plan`, with checkpoints of the trainable tensors only, written whole or not at all."""

    def __init__(self, model: nn.Module, job: Job, folder: Path):
        place, dtype = device(), compute_dtype(device())
        arguments = TrainingArguments(
            output_dir=str(folder / "checkpoints"),
            num_train_epochs=1,  # the plan holds all epochs
            max_grad_norm=job.max_grad_norm,
            seed=job.seed,
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            use_cpu=place.type == "cpu",
            ddp_backend="gloo" if place.type == "cpu" and world() > 1 else None,
            save_strategy="no",  # RunControl saves by the clock
            logging_strategy="no",  # and Recorder logs, without a sync each step
            logging_nan_inf_filter=False,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=place.type == "cuda",
        )
        # Setting up the devices counts the GPUs. More than one would mean DataParallel, which fails on 4-bit weights.
        if arguments.device.type == "cuda":
            arguments._n_gpu = 1
        steps = len(job.plan)
        fused = place.type in ("cpu", "cuda")
        optimizer = torch.optim.AdamW(job.groups, betas=job.betas, fused=fused)
        schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(job.warmup * steps), steps)
        # The Trainer writes into a `config` as if it were Hugging Face's; AdemVL's is its own and frozen.
        own = model.__dict__.pop("config", None)
        super().__init__(model=model, args=arguments, train_dataset=job.dataset, optimizers=(optimizer, schedule))
        if own is not None:
            model.config = own
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # the model's loss is the mean over its own answer tokens
        self.plan, self.collator, self.folder, self.identity = job.plan, job.collator, folder, job.identity
        self.answer_tokens = job.answer_tokens
        self.pieces = 1  # batches that the present step takes the mean of
        self.share = 1.0  # what this process's loss counts, of several that train together
        self.recorder: Recorder | None = None
        self.display: LossDisplay | None = None
        self.writer: Any = None

    def get_train_dataloader(self) -> DataLoader:
        """The plan's batches. Without `prepare` the Trainer could not skip to a step exactly."""
        options = {"batch_sampler": self.plan, "pin_memory": self.args.dataloader_pin_memory}
        if world() == 1:
            return self.accelerator.prepare(DataLoader(self.train_dataset, collate_fn=self.collator, **options))
        # The collator shares out each batch; accelerate would give whole batches to the processes in turn.
        shared = DataLoader(self.train_dataset, collate_fn=Shared(self.collator, self.answer_tokens), **options)
        return prepare_data_loader(shared, self.args.device, num_processes=1, process_index=0, put_on_device=True)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The model's loss, as its share of the step's."""
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        weight = self.share / self.pieces
        return loss if weight == 1 else loss * weight

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One forward and backward pass, or one for each of a list of batches, noted in the history."""
        rates = {group["part"]: group["lr"] for group in self.optimizer.param_groups}
        if world() > 1:
            self.share = inputs.pop("share")
        pieces = inputs if isinstance(inputs, list) else [inputs]
        self.pieces = len(pieces)
        loss = sum(super(AdapterTrainer, self).training_step(model, piece, num_items_in_batch) for piece in pieces)
        self.recorder.add(loss.detach(), rates)
        return loss

    def log_history_so_far(self, window: int) -> None:
        """Show and write the mean over the last `window` steps."""
        self.recorder.flush(scaled=self.args.fp16)
        if rank():
            return
        if self.display is not None:
            self.display.update(self.recorder, window)
        last = self.recorder.rows[-window:]
        means = {"loss": np.mean([row["loss"] for row in last])}
        means |= {name: value for name, value in last[-1].items() if name.startswith("lr_")}
        if last[-1]["seconds"] > last[0]["seconds"]:
            seconds = last[-1]["seconds"] - last[0]["seconds"]
            means["tokens_per_second"] = sum(row["tokens"] for row in last[1:]) / seconds
        for name, value in means.items():
            self.writer.add_scalar(f"train/{name}", value, last[-1]["step"])

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the full state to a temporary folder and rename it. Replaces the Trainer's, which saves all weights."""
        self.recorder.flush(scaled=self.args.fp16)
        step, folder = self.state.global_step, self.folder / "checkpoints"
        temporary = folder / f"saving-{step}"
        if rank() == 0:
            temporary.mkdir(parents=True)
        barrier()
        self._save_rng_state(str(temporary))  # one file a process
        barrier()
        if rank() == 0:
            self._write_checkpoint(temporary, folder, step)
        barrier()

    def _write_checkpoint(self, temporary: Path, folder: Path, step: int) -> None:
        tensors = {name: p.detach().cpu().contiguous() for name, p in trainable(self.model).items()}
        save_file(tensors, temporary / TENSORS)
        self._save_optimizer_and_scheduler(str(temporary))
        self._save_scaler(str(temporary))
        self.state.save_to_json(str(temporary / STATE))
        history = self.recorder.table()
        history.to_parquet(temporary / HISTORY)
        info = {"fingerprint": self.identity, "seconds": self.recorder.seconds, "total_steps": len(self.plan)}
        commit_checkpoint(temporary, folder, step, info)
        write_history(history, self.folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_tensors(self.model, Path(resume_from_checkpoint))


def write_history(history: pd.DataFrame, folder: Path) -> None:
    """Write `folder`/history.parquet at once or not at all."""
    temporary = folder / f".{HISTORY}.{os.getpid()}"
    history.to_parquet(temporary)
    temporary.replace(folder / HISTORY)


@torch.no_grad()
def mean_loss(forward: Callable, model: nn.Module, loader: Any) -> float:
    """Mean loss over all answer tokens of `loader`'s batches, in nats a token, without drawing a random number."""
    model.eval()
    total = count = 0.0
    place = next(model.parameters()).device
    for batch in loader:
        batch = {k: v.to(place) if v is not None else None for k, v in batch.items()}
        tokens = int((batch["labels"] != IGNORED).sum())
        total += float(forward(**batch)["loss"]) * tokens
        count += tokens
    return total / count


@dataclass(frozen=True)
class TrainResult:
    """What a call of `train` leaves: how far the run is, and its history over all calls."""

    status: str  # 'complete' or 'partial'
    steps: int
    total_steps: int
    epochs: float
    seconds: float  # of training, over all calls
    tokens: int  # real tokens seen
    history: pd.DataFrame
    waste: float  # padded over real tokens of the whole plan

    def summary(self) -> dict[str, float]:
        """Numbers for a table or a bundle; losses (nats) are means over the first and last twentieth of the steps."""
        part = max(1, self.steps // 20)
        watched = self.history["eval_loss"].dropna()
        return {
            "steps": self.steps,
            "epochs": round(self.epochs, 3),
            "minutes": round(self.seconds / 60, 2),
            "tokens": self.tokens,
            "tokens_per_second": round(self.tokens / self.seconds) if self.seconds else 0,
            "padding_waste": round(self.waste, 4),
            "first_loss": float(self.history["loss"].iloc[:part].mean()),
            "last_loss": float(self.history["loss"].iloc[-part:].mean()),
            **({"validation_loss": float(watched.iloc[-1])} if len(watched) else {}),
        }


def train(
    model: nn.Module,
    questions: pd.DataFrame,
    features: Any,
    config: Any,
    folder: Path | str,
    *,
    deadline: float = math.inf,
    eval_questions: pd.DataFrame | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train `model` on `questions` (rows of the QA table) from the frame embeddings in `features`, or go on with it.

    `config` is the profile. `folder` gets checkpoints/, tensorboard/ and history.parquet; a run found there goes on
    exactly where its newest checkpoint stands, and a finished one is only loaded. `deadline` is in seconds from now:
    the run stops before it, saves and returns 'partial', as it does on SIGTERM; on Ctrl-C it saves, then raises
    KeyboardInterrupt. `eval_questions` (if any) get their mean loss measured at the end of each epoch. A model without
    video (`model.video` False) is trained on the same batches as one with video.

    Raises BundleError if the features are of another encoder than the model's, CheckpointError if `folder` holds a run
    of other settings or data, TrainingError if the loss diverges.
    """
    model.check_features(features.encoder_key)
    if config.training.gpus > 1 and world() == 1:
        options = {"video": model.video, "deadline": deadline, "eval_questions": eval_questions}
        train_in_processes(config.training.gpus, questions, features.path, config, folder, **options)
        deadline = 0.0  # what the processes left is loaded, no step is added
    training, in_prompt = config.training, config.evaluation.options_in_prompt
    dataset = QADataset(model, questions, options_in_prompt=in_prompt)
    plan = plan_batches(dataset, features, config)
    pad = model.tokenizer.pad_token_id
    collator = Collator(features if model.video else None, pad if pad is not None else model.tokenizer.eos_token_id)
    watched: list[Any] = []
    if eval_questions is not None and len(eval_questions):
        watched = _watched_batches(QADataset(model, eval_questions, options_in_prompt=in_prompt), features, config)
    job = Job(
        dataset=dataset,
        plan=plan,
        collator=collator,
        identity=fingerprint(model, dataset, features, config),
        groups=parameter_groups(model, training),
        tokens=plan.text_tokens + (plan.video_tokens if model.video else 0),
        warmup=training.warmup_ratio,
        max_grad_norm=training.max_grad_norm,
        seed=training.seed,
        checkpoint_minutes=training.checkpoint_minutes,
        log_steps=training.log_steps,
        watched=watched,
        gradient_checkpointing=training.gradient_checkpointing,
        answer_tokens=lambda item: len(item[1]),
    )
    return fit(model, job, folder, deadline=deadline, progress=progress, parts=tuple(PARTS))


def fit(
    model: nn.Module,
    job: Job,
    folder: Path | str,
    *,
    deadline: float = math.inf,
    progress: bool = True,
    parts: Sequence[str] = (),
) -> TrainResult:
    """Train what is trainable of `model` as `job` says, or go on with it; folder, deadline and signals as in `train`.

    The model's forward takes a collated batch as keywords and returns a dict with `loss`. parts: names under which the
    history notes learning rates (none given: those of the job's groups).
    """
    folder, ends = Path(folder), time.perf_counter() + deadline
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    for left in (folder / "checkpoints").glob("saving-*") if rank() == 0 else []:
        shutil.rmtree(left)  # of a process that died while saving
    plan = job.plan
    found = find_checkpoint(folder / "checkpoints", job.identity)
    path, info = found if found else (None, {"seconds": 0.0, "step": 0})
    history = pd.read_parquet(path / HISTORY) if path else None
    parts = parts or list(dict.fromkeys(group["part"] for group in job.groups))
    recorder = Recorder(plan, job.tokens, parts, history, info["seconds"])

    if path and info["step"] == len(plan):
        load_tensors(model, path)
    elif time.perf_counter() < ends:
        if job.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        trainer = AdapterTrainer(model, job, folder)
        trainer.recorder = recorder
        _run(trainer, path, job, ends, progress, folder)
    elif path:
        load_tensors(model, path)
    return _result(plan, recorder, info["seconds"])


def _watched_batches(rows: QADataset, features: Any, config: Any) -> list[Any]:
    """Batches of `rows` at the headline number of groups."""
    ids, groups = rows.gifs, config.evaluation.groups
    frames = np.asarray(features.lengths(ids, [groups] * len(ids)))
    lengths = {groups: video_tokens(config.connector, frames, config.encoder.frames_per_group)}
    budget = config.evaluation.batch_tokens
    plan = BatchPlan(rows.text_lengths, lengths, tokens_per_step=budget, epochs=1, seed=0)
    return [[rows[key] for key in batch] for batch in plan]


def _run(
    trainer: AdapterTrainer,
    path: Path | None,
    job: Job,
    ends: float,
    progress: bool,
    folder: Path,
) -> None:
    """Train from checkpoint `path` (or the start) until its end, time `ends` or a signal."""
    from torch.utils.tensorboard import SummaryWriter  # imports slowly

    done = len(trainer.recorder.rows)
    # `model_wrapped` is the model as prepared by accelerate: it casts as the training step does.
    evaluate = (lambda: mean_loss(trainer.model_wrapped, trainer.model, _pieces(job))) if job.watched else None
    trainer.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1) if rank() == 0 else None
    trainer.display = LossDisplay(len(trainer.plan), done) if progress else None
    try:
        with stop_signals() as signals:
            trainer.add_callback(RunControl(trainer, job, ends, signals, evaluate))
            trainer.recorder.began = time.perf_counter()
            trainer.train(resume_from_checkpoint=str(path) if path else None)
    finally:
        if trainer.writer is not None:
            trainer.writer.close()
        if trainer.display is not None:
            trainer.display.close()
        # Takes the autocast wrapper off again, so that the model is left as it came.
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        trainer.remove_callback(RunControl)  # it refers back to the trainer, and so would keep the model in memory
    if signal.SIGINT in signals:
        raise KeyboardInterrupt(f"stopped at step {trainer.state.global_step}; saved, so running again goes on")


def _pieces(job: Job) -> Iterator[dict[str, Any]]:
    """The watched batches, collated, one after another."""
    for rows in job.watched:
        batch = job.collator(rows)
        yield from batch if isinstance(batch, list) else [batch]


def _result(plan: Plan, recorder: Recorder, seconds: float) -> TrainResult:
    steps = len(recorder.rows)
    return TrainResult(
        status="complete" if steps == len(plan) else "partial",
        steps=steps,
        total_steps=len(plan),
        epochs=float(plan.epoch_after[steps - 1]) if steps else 0.0,
        seconds=recorder.rows[-1]["seconds"] if steps else seconds,
        tokens=int(recorder.tokens[:steps].sum()),
        history=recorder.table(),
        waste=plan.waste,
    )
