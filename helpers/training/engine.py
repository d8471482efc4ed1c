"""The one trainer: adapters of any model on the Hugging Face Trainer, over a plan, resumed bit for bit."""

import math
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate.data_loader import prepare_data_loader
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
)

from helpers.models.parts import on_cpu, require_finite
from helpers.stage.pace import note_pace, probe_steps
from helpers.training.checkpoints import (
    HISTORY,
    STATE,
    TENSORS,
    CheckpointError,
    commit_checkpoint,
    find_checkpoint,
    load_tensors,
    trainable,
    write_history,
)
from helpers.training.collective import Shared, TrainingError, any_of, barrier, rank, stop_signals, world
from helpers.training.history import LossDisplay, Recorder
from helpers.training.learning import LearningWatch
from helpers.training.plan import StepPlan
from helpers.workspace.machine import compute_dtype, device

SAVE_MARGIN = 3  # saves that must still fit before the deadline: disks on free machines slow down without warning
CLOCK = ("minutes", "tokens_per_second")  # of a summary
SLOW_DISK = 50e6  # bytes a second, assumed until a save has been timed


@dataclass(frozen=True)
class Job:
    """All that `fit` needs besides the model: what is learnt from, in which order, and by which optimizer."""

    dataset: Dataset
    plan: StepPlan
    collator: Callable[[Sequence[Any]], Any]
    """Rows to a batch, or to a list of batches of which one step takes the mean loss (gradient accumulation)."""
    identity: dict[str, Any]
    """All that decides the run's result: a checkpoint of another one is refused."""
    groups: list[dict[str, Any]]
    """AdamW's parameter groups, each with its `part`, the name under which its learning rate is noted."""
    tokens: np.ndarray
    """Real tokens of each step."""
    warmup: float
    """Share of the steps in which the learning rates rise; they then fall along a half cosine to 0, with `decay`."""
    max_grad_norm: float
    """Gradients are clipped to this norm; 0: not at all."""
    seed: int
    checkpoint_minutes: float
    log_steps: int
    watched: list[Any] = field(default_factory=list)
    """Batches whose mean loss is measured at the end of each epoch."""
    betas: tuple[float, float] = (0.9, 0.999)
    gradient_checkpointing: bool = False
    adapter: str = ""
    """The `part` that must have moved when training ends, unless its learning rate is 0; "": any of them."""
    unit: str = "steps"
    """What the stage's forecast calls the steps of this run."""
    follow: tuple[str, ...] = ()
    """Runs of as many steps that come after it, by their unit."""
    counts: Callable[[Any], int] | None = None
    """What an item of `dataset` counts in a mean loss: its tokens with loss, or 1. Needed to share a batch among
    processes, for `expected` and for `watched`."""
    expected: float | None = None
    """What a step counts in the mean over the run: the loss of a step is then a sum over this, so that its items weigh
    as much as those of any other step. None: a step's loss is the mean over its own items."""
    decay: bool = True
    """False: after the warm-up the learning rates stay what they are."""
    measure: Callable[[list[dict[str, Any]]], dict[str, float]] | None = None
    """Called at the end of each epoch with the history's rows so far; what it returns is noted in the newest one."""


class RunControl(TrainerCallback):
    """After each step: log, evaluate, and decide whether to save or to stop."""

    def __init__(self, trainer: "AdapterTrainer", job: Job, ends: float, signals: list[int], evaluate: Any):
        self.trainer, self.job, self.signals, self.evaluate = trainer, job, signals, evaluate
        self.ends = ends  # on the clock of time.perf_counter
        self.last_step = len(trainer.recorder.rows) + probe_steps()
        self.saved = self.last = time.perf_counter()
        self.longest_step = 0.0
        size = sum(p.numel() * p.element_size() for p in trainable(trainer.model).values())
        self.save_seconds = 3 * size / SLOW_DISK  # the tensors and Adam's two moments

    def on_step_end(self, args, state, control, **kwargs):
        """Log, evaluate at the end of an epoch, and ask for a save or the end where the clock or a signal wants it."""
        trainer, step = self.trainer, state.global_step
        if step % self.job.log_steps == 0 or step == len(trainer.plan):
            trainer.log_history_so_far(self.job.log_steps)
        if self.evaluate is not None and step in trainer.plan.epoch_ends:
            trainer.recorder.rows[-1]["eval_loss"] = self.evaluate()
        if self.job.measure is not None and step in trainer.plan.epoch_ends:
            trainer.recorder.rows[-1] |= self.job.measure(trainer.recorder.rows)
        now = time.perf_counter()
        self.longest_step, self.last = max(self.longest_step, now - self.last), now
        out_of_time = now + self.longest_step + SAVE_MARGIN * self.save_seconds >= self.ends
        due = now - self.saved >= 60 * self.job.checkpoint_minutes
        flags = (out_of_time or self.signals or step >= self.last_step, due or step == len(trainer.plan))
        stop, save = any_of(flags, trainer.args.device)
        if stop:
            control.should_training_stop = control.should_save = True
        if save:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        """Note how long a save took."""
        now = time.perf_counter()
        self.save_seconds, self.saved, self.last = now - self.last, now, now


class AdapterTrainer(Trainer):
    """Trainer over a `StepPlan`, with checkpoints of the trainable tensors only, written whole or not at all."""

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
        warmup = math.ceil(job.warmup * steps)
        if job.decay:
            schedule = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
        else:
            schedule = get_constant_schedule_with_warmup(optimizer, warmup)
        # The Trainer writes into a `config` as if it were Hugging Face's; AdemVL's is its own and frozen.
        own = model.__dict__.pop("config", None)
        super().__init__(model=model, args=arguments, train_dataset=job.dataset, optimizers=(optimizer, schedule))
        if own is not None:
            model.config = own
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # the model's loss is a mean over its own answers
        self.job, self.plan, self.folder = job, job.plan, folder
        self.pieces = 1  # batches that the present step takes the mean of
        self.share = 1.0  # what this process's loss counts, of several that train together
        self.recorder: Recorder | None = None
        self.display: LossDisplay | None = None
        self.writer: Any = None

    def get_train_dataloader(self) -> DataLoader:
        """The plan's batches. Without `prepare` the Trainer could not skip to a step exactly."""
        job, options = self.job, {"batch_sampler": self.plan, "pin_memory": self.args.dataloader_pin_memory}
        collator = job.collator if job.counts is None else Shared(job.collator, job.counts, job.expected)
        loader = DataLoader(self.train_dataset, collate_fn=collator, **options)
        if world() == 1:
            return self.accelerator.prepare(loader)
        # The collator shares out each batch; accelerate would give whole batches to the processes in turn.
        return prepare_data_loader(loader, self.args.device, num_processes=1, process_index=0, put_on_device=True)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The model's loss, as its share of the step's."""
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        weight = self.share / self.pieces
        return loss if weight == 1 else loss * weight

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One forward and backward pass, or one for each of a list of batches, noted in the history."""
        rates = {group["part"]: group["lr"] for group in self.optimizer.param_groups}
        weight = 1.0  # of this step, beside the mean step
        if self.job.counts is not None:
            self.share, weight = inputs.pop("share"), inputs.pop("weight")
        # What is clipped is the mean gradient of the step's items: a step of many is cut no sooner than one of few.
        self.args.max_grad_norm = self.job.max_grad_norm * weight
        pieces = inputs if isinstance(inputs, list) else [inputs]
        self.pieces = len(pieces)
        loss = sum(super(AdapterTrainer, self).training_step(model, piece, num_items_in_batch) for piece in pieces)
        self.recorder.add(loss.detach() / weight, rates)
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
        means |= {name: value for name, value in last[-1].items() if name.startswith("lr_") or name == "scale"}
        if last[-1]["seconds"] > last[0]["seconds"]:
            seconds = last[-1]["seconds"] - last[0]["seconds"]
            means["tokens_per_second"] = sum(row["tokens"] for row in last[1:]) / seconds
        for name, value in means.items():
            self.writer.add_scalar(f"train/{name}", value, last[-1]["step"])

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the full state to a temporary folder and rename it. Replaces the Trainer's, which saves all weights."""
        self.recorder.flush(scaled=self.args.fp16)
        # Before a file is there, and in every process: what the checkpoint before this one holds is still good.
        advice = "lower the learning rates or raise the warm-up; running again goes on from the last checkpoint"
        require_finite(trainable(self.model), f"the model at step {self.state.global_step}", advice, TrainingError)
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
        save_file(on_cpu(trainable(self.model)), temporary / TENSORS)
        self._save_optimizer_and_scheduler(str(temporary))
        self._save_scaler(str(temporary))
        self.state.save_to_json(str(temporary / STATE))
        history = self.recorder.table()
        history.to_parquet(temporary / HISTORY)
        info = {"fingerprint": self.job.identity, "seconds": self.recorder.seconds, "total_steps": len(self.plan)}
        commit_checkpoint(temporary, folder, step, info)
        left, epochs = len(self.plan) - step, float(self.plan.epoch_after[-1])
        note_pace(self.folder, self.job.unit, step, self.recorder.seconds, left, self.job.follow, epochs)
        write_history(history, self.folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_tensors(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint:
            moments = self.optimizer.state_dict()["state"].items()
            tensors = {f"{number}.{name}": tensor for number, state in moments for name, tensor in state.items()}
            advice = f"delete {checkpoint} to go on from the one before it"
            require_finite(tensors, Path(checkpoint) / "optimizer.pt", advice, CheckpointError)


@torch.no_grad()
def mean_loss(forward: Callable, model: nn.Module, batches: Iterable[tuple[dict[str, Any], int]]) -> float:
    """Mean loss, in nats, over batches with what each of them counts in it, without drawing a random number."""
    model.eval()
    total = count = 0.0
    place = next(model.parameters()).device
    for batch, weight in batches:
        batch = {k: v.to(place) if v is not None else None for k, v in batch.items()}
        total += float(forward(**batch)["loss"]) * weight
        count += weight
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

    def learnt(self) -> dict[str, float]:
        """`summary` without the clock's numbers: equal for equal work."""
        return {name: value for name, value in self.summary().items() if name not in CLOCK}

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
            **({"skipped_steps": int(self.history["skipped"].sum())} if "skipped" in self.history else {}),
        }


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
        if rank() == 0:  # the last that was written before, and so the first that a stop of the machine takes
            write_history(history, folder)
    elif time.perf_counter() < ends:
        if job.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        trainer = AdapterTrainer(model, job, folder)
        trainer.recorder = recorder
        _run(trainer, path, job, ends, progress, folder)
    elif path:
        load_tensors(model, path)
    return _result(plan, recorder, info["seconds"])


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
    evaluate = (lambda: mean_loss(trainer.model_wrapped, trainer.model, _watched(job))) if job.watched else None
    trainer.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1) if rank() == 0 else None
    trainer.display = LossDisplay(len(trainer.plan), done) if progress else None
    try:
        with stop_signals() as signals:
            trainer.add_callback(RunControl(trainer, job, ends, signals, evaluate))
            trainer.add_callback(LearningWatch(trainer, job.warmup, job.adapter))
            trainer.recorder.began = time.perf_counter()
            trainer.train(resume_from_checkpoint=str(path) if path else None)
    finally:
        if trainer.writer is not None:
            trainer.writer.close()
        if trainer.display is not None:
            trainer.display.close()
        # Takes the autocast wrapper off again, so that the model is left as it came.
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        for callback in (RunControl, LearningWatch):  # they refer to the trainer, and so would keep the model in memory
            trainer.remove_callback(callback)
    if signal.SIGINT in signals:
        raise KeyboardInterrupt(f"stopped at step {trainer.state.global_step}; saved, so running again goes on")


def _watched(job: Job) -> Iterator[tuple[dict[str, Any], int]]:
    """The watched batches, collated, one after another, with what each counts."""
    for rows in job.watched:
        yield job.collator(rows), sum(map(job.counts, rows))


def _result(plan: StepPlan, recorder: Recorder, seconds: float) -> TrainResult:
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
