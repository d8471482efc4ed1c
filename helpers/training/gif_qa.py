"""Training of the GIF model: rows, batches, learning rates, and what identifies a run."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import Dataset

from helpers.config import PACING, Profile, TrainingConfig
from helpers.corpora.schema import RowError, question_row
from helpers.corpora.tasks import MULTIPLE_CHOICE, target_answer
from helpers.models.connectors import video_tokens
from helpers.models.parts import IGNORED, padded_candidates
from helpers.training.checkpoints import CONTRACT, CheckpointError, load_tensors, newest_checkpoint, trainable
from helpers.training.collective import TrainingError, world
from helpers.training.engine import Job, TrainResult, fit
from helpers.training.plan import BatchPlan
from helpers.training.processes import train_in_processes

if TYPE_CHECKING:
    from helpers.models.gif_qa.model import GifQAModel
    from helpers.store.features import FeatureTable


STEPS = "steps"
TWIN = "steps of the blind twin"  # what is trained after the model, on the same batches
ALIGNMENT = "steps of the alignment"  # what is trained before it, with the adapter held still
WORKER = "helpers.training.worker"  # started as a process of its own, so that no face imports it
# What decides nothing of an alignment: a fresh adapter that is held still adds zero to what it adapts, and the captions
# that are learnt from have a digest.
IDLE_IN_ALIGNMENT = {"language_model": {"lora_alpha"}, "training": {"learning_rate_lora", "validation_share"}}
PARTS = {"mit": "learning_rate_mit", "connector": "learning_rate_connector", "language_model": "learning_rate_lora"}


def hold_out(questions: pd.DataFrame, share: float, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Split questions by GIF: those to train on, and those about a random `share` of the GIFs, to watch the loss on."""
    gifs = np.sort(questions["gif_sha256"].unique())
    kept_out = np.random.default_rng(seed).permutation(gifs)[: round(share * len(gifs))]
    held = questions["gif_sha256"].isin(kept_out)
    return questions[~held], questions[held]


class Row(NamedTuple):
    """A question to train on, in tokens; `wrong` are the options that its answer is compared with, if any."""

    prompt: list[int]
    answer: list[int]
    gif: str
    groups: int
    wrong: Sequence[list[int]] = ()


class QADataset(Dataset):
    """Questions in tokens. An item is asked for as (row, groups, epoch): the row, how many groups of 16 frames it sees,
    and the epoch, which with the row decides the order in which a prompt lists its options."""

    def __init__(
        self,
        model: GifQAModel,
        questions: pd.DataFrame,
        *,
        options_in_prompt: bool = False,
        choice: bool = False,
        seed: int = 0,
    ):
        """`model` gives `encode_prompt` and `encode_answer`; `questions` has the columns of the QA table.

        choice: rows bring their wrong options; seed: of the orders of options. Raises TrainingError, naming the
        question, for options that cannot be chosen from, where they are needed.
        """
        if questions.empty:
            raise TrainingError("no questions to train on: the table has no rows (is the split empty?)")
        self.gifs: list[str] = questions["gif_sha256"].tolist()
        self.prompts: list[list[int]] = []  # options in the order of the table
        self.answers: list[list[int]] = []
        self.wrong: list[list[list[int]]] = []
        self.listed: list[tuple[str, ...]] = []
        self.questions: list[str] = questions["question"].tolist()
        self.encode_prompt, self.seed = model.encode_prompt, seed
        known: dict[Any, list[int]] = {}  # many questions and most answers occur again and again

        def answer_tokens(text: str) -> list[int]:
            if text not in known:
                known[text] = model.encode_answer(text)
            return known[text]

        for row in questions.itertuples():
            options: tuple[str, ...] = ()
            if (options_in_prompt or choice) and row.task in MULTIPLE_CHOICE:
                _require_options(row)
                options = tuple(row.options)
            self.listed.append(options if options_in_prompt else ())
            key = (row.question, self.listed[-1])
            if key not in known:
                known[key] = model.encode_prompt(row.question, list(self.listed[-1]) or None)
            self.prompts.append(known[key])
            self.answers.append(answer_tokens(target_answer(row.task, row.answer, row.label)))
            wrong = options[: row.label] + options[row.label + 1 :] if choice else ()
            self.wrong.append([answer_tokens(text) for text in wrong])
        rows = list(zip(self.prompts, self.answers, self.wrong, strict=True))
        self.text_lengths = np.array([len(p) + len(a) + sum(map(len, wrong)) for p, a, wrong in rows])
        self.longest = np.array([len(p) + max(map(len, [a, *wrong])) for p, a, wrong in rows])
        """Tokens of each row's longest sequence: options that are compared do not stand behind each other."""

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, key: tuple[int, int, int]) -> Row:
        row, groups, epoch = key
        prompt, options = self.prompts[row], self.listed[row]
        if options:
            order = np.random.default_rng([self.seed, epoch, row]).permutation(len(options))
            prompt = self.encode_prompt(self.questions[row], [options[i] for i in order])
        return Row(prompt, self.answers[row], self.gifs[row], groups, self.wrong[row])

    def digest(self) -> str:
        """SHA-256 over tokens and GIFs of all rows, in order."""
        state = hashlib.sha256()
        for *row, wrong in zip(self.prompts, self.answers, self.gifs, self.wrong, strict=True):
            state.update(repr((*row, wrong) if wrong else tuple(row)).encode())
        return state.hexdigest()


def dataset_of(model: GifQAModel, questions: pd.DataFrame, profile: Profile) -> QADataset:
    """Questions as the profile asks and trains them."""
    training, in_prompt = profile.training, profile.evaluation.options_in_prompt
    choice = training.choice != "none"
    return QADataset(model, questions, options_in_prompt=in_prompt, choice=choice, seed=training.seed)


def example(model: GifQAModel, questions: pd.DataFrame, profile: Profile) -> str:
    """The first question as it is read in the first epoch, with the answer that is learnt.

    Raises TrainingError if there are none.
    """
    row = dataset_of(model, questions.head(1), profile)[0, profile.training.groups[0], 0]
    return model.text_of(row.prompt, row.answer)


def _require_options(row: Any) -> None:
    """Raise TrainingError, naming the question, unless its answer is one of two or more different options."""
    names = ("question_id", "task", "question")
    try:
        checked = question_row(
            gif="", split="", answer=str(row.label), options=row.options, **{name: getattr(row, name) for name in names}
        )
        if checked["answer"] != row.answer:
            raise RowError(f"the answer {row.answer!r} is not the option {row.label} of {list(row.options)}")
    except RowError as error:
        raise TrainingError(
            f"question {row.question_id} cannot be trained on as a choice: {error}. Mend it or leave it out, "
            "or run 01 again with --force if an earlier version of it took the question in"
        ) from error


class Collator:
    """Rows to one padded batch; the frame embeddings of all its GIFs come from the feature table in one call."""

    def __init__(self, features: FeatureTable | None, pad_token_id: int, *, choice: bool = False):
        """`features=None` makes batches without video, for the blind model; choice: answers are candidates."""
        self.features, self.pad, self.choice = features, pad_token_id, choice

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor | None]:
        """Return input_ids, attention_mask, labels [B, L] (right padded; labels on answers only), frames, lengths.

        With `choice` input_ids are prompts alone, and in place of labels there are candidates [B, K, A]: the right
        answer and the wrong ones.
        """
        answers = [[] if self.choice else row.answer for row in rows]
        size = (len(rows), max(len(row.prompt) + len(answer) for row, answer in zip(rows, answers, strict=True)))
        ids = np.full(size, self.pad, dtype=np.int64)
        mask = np.zeros(size, dtype=np.int64)
        labels = np.full(size, IGNORED, dtype=np.int64)
        for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
            start, end = len(row.prompt), len(row.prompt) + len(answer)
            ids[i, :start], ids[i, start:end], labels[i, start:end], mask[i, :end] = row.prompt, answer, answer, 1
        batch = {"input_ids": ids, "attention_mask": mask}
        if self.choice:
            batch["candidates"] = padded_candidates([[row.answer, *row.wrong] for row in rows])
        else:
            batch["labels"] = labels
        batch = {name: torch.from_numpy(values) for name, values in batch.items()} | {"frames": None, "lengths": None}
        if self.features is not None:
            frames, lengths = self.features.fetch([row.gif for row in rows], [row.groups for row in rows])
            batch |= {"frames": torch.as_tensor(frames), "lengths": torch.as_tensor(lengths)}
        return batch


def plan_batches(dataset: QADataset, features: FeatureTable, profile: Profile) -> BatchPlan:
    """Lay out the run that `profile.training` asks for."""
    ids = dataset.gifs
    frames = {g: np.asarray(features.lengths(ids, [g] * len(ids))) for g in profile.training.groups}
    return BatchPlan(
        dataset.text_lengths,
        {g: video_tokens(profile.connector, n, profile.encoder.frames_per_group) for g, n in frames.items()},
        tokens_per_step=profile.training.tokens_per_step,
        epochs=profile.training.epochs,
        seed=profile.training.seed,
    )


def parameter_groups(model: nn.Module, training: TrainingConfig) -> list[dict[str, Any]]:
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


def run_identity(
    model: GifQAModel, dataset: QADataset, features: FeatureTable, profile: Profile, aligning: bool = False
) -> dict[str, Any]:
    """All that decides a run's result: settings, data and parameter shapes. What only paces it is left out."""
    idle = IDLE_IN_ALIGNMENT if aligning else {}
    shapes = {name: list(p.shape) for name, p in trainable(model).items()}
    return {
        "contract": CONTRACT,
        "encoder_key": features.encoder_key,
        "video": bool(model.video),
        "language_model": profile.language_model.model_dump(mode="json", exclude=idle.get("language_model", set())),
        "connector": profile.connector.model_dump(mode="json"),
        "training": profile.training.model_dump(mode="json", exclude={*PACING["training"], *idle.get("training", ())}),
        "parameters": hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest(),
        "questions": dataset.digest(),
    } | ({"options": "in an order drawn anew each time"} if any(dataset.listed) else {})


@contextmanager
def held_still(module: nn.Module) -> Iterator[None]:
    """Nothing of `module` learns in this block; what learnt before it learns after it."""
    learning = [p for p in module.parameters() if p.requires_grad]
    for p in learning:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learning:
            p.requires_grad_(True)


def start_from_alignment(model: GifQAModel, folder: Path | str) -> dict[str, Any]:
    """Give `model` the connector (and MIT) of the finished alignment in `folder`, as `captions.align` left it there.

    Returns what tells this alignment from others, for the identity of a run that builds on it. Raises CheckpointError
    if it is not finished or does not fit the model.
    """
    found = newest_checkpoint(Path(folder) / "checkpoints")
    if found is None or found[1]["step"] < found[1]["total_steps"]:
        raise CheckpointError(f"{folder} holds no finished alignment to build on: run `align` to its end first")
    path, info = found
    with held_still(model.language_model):
        load_tensors(model, path)
    return {"alignment": info["fingerprint"]["alignment"], "captions": info["fingerprint"]["questions"]}


def train(
    model: GifQAModel,
    questions: pd.DataFrame,
    features: FeatureTable,
    profile: Profile,
    folder: Path | str,
    *,
    deadline: float = math.inf,
    eval_questions: pd.DataFrame | None = None,
    progress: bool = True,
    aligned: Path | str | None = None,
) -> TrainResult:
    """Train `model` on `questions` (rows of the QA table) from the frame embeddings in `features`, or go on with it.

    `folder` gets checkpoints/, tensorboard/ and history.parquet; a run found there goes on
    exactly where its newest checkpoint stands, and a finished one is only loaded. `deadline` is in seconds from now:
    the run stops before it, saves and returns 'partial', as it does on SIGTERM; on Ctrl-C it saves, then raises
    KeyboardInterrupt. `eval_questions` (if any) get their mean loss measured at the end of each epoch. A model without
    video (`model.video` False) is trained on the same batches as one with video. `aligned` is the folder of a finished
    alignment (see `helpers.training.captions`), from whose connector training starts.

    Raises BundleError if the features are of another encoder than the model's, CheckpointError if `folder` holds a run
    of other settings or data, TooLong for a question that the window cannot hold, TrainingError if the loss diverges or
    nothing is learnt (see `learning`).
    """
    model.check_features(features.encoder_key)
    built_on = start_from_alignment(model, aligned) if aligned else {}
    aligning = not any(p.requires_grad for p in model.language_model.parameters())
    if aligning:
        built_on = {"alignment": profile.alignment.model_dump(mode="json")}
    if profile.training.gpus > 1 and world() == 1:
        options = {"video": model.video, "deadline": deadline, "eval_questions": eval_questions}
        options |= {"aligning": aligning, "aligned": aligned}
        train_in_processes(profile.training.gpus, WORKER, questions, features.path, profile, folder, **options)
        deadline = 0.0  # what the processes left is loaded, no step is added
    training, dataset = profile.training, dataset_of(model, questions, profile)
    _require_room(model, dataset, questions, features, max(training.groups))
    plan = plan_batches(dataset, features, profile)
    pad = model.tokenizer.pad_token_id
    pad = pad if pad is not None else model.tokenizer.eos_token_id
    collator = Collator(features if model.video else None, pad, choice=training.choice != "none")
    watched: list[Any] = []
    if eval_questions is not None and len(eval_questions):
        kept_out = dataset_of(model, eval_questions, profile)
        _require_room(model, kept_out, eval_questions, features, profile.evaluation.groups)
        watched = _watched_batches(kept_out, features, profile)
    per_question = training.loss == "per_question"
    job = Job(
        dataset=dataset,
        plan=plan,
        collator=collator,
        identity=run_identity(model, dataset, features, profile, aligning) | built_on,
        groups=parameter_groups(model, training),
        tokens=plan.text_tokens + (plan.video_tokens if model.video else 0),
        warmup=training.warmup_ratio,
        max_grad_norm=training.max_grad_norm,
        seed=training.seed,
        checkpoint_minutes=training.checkpoint_minutes,
        log_steps=training.log_steps,
        watched=watched,
        gradient_checkpointing=training.gradient_checkpointing,
        adapter="connector" if aligning else "language_model",
        unit=ALIGNMENT if aligning else STEPS if model.video else TWIN,
        follow=(TWIN,) if model.video and not aligning else (),
        counts=(lambda item: 1) if per_question else lambda item: len(item.answer),
        expected=sum(map(len, plan.batches)) / len(plan) if per_question else None,
    )
    return fit(model, job, folder, deadline=deadline, progress=progress, parts=tuple(PARTS))


def _require_room(
    model: GifQAModel, dataset: QADataset, questions: pd.DataFrame, features: FeatureTable, groups: int
) -> None:
    """Raise TooLong, naming the question, for one that the window cannot hold with `groups` groups of its GIF."""
    window, frames = model.window(), features.lengths(dataset.gifs, [groups] * len(dataset))
    for name, needed in zip(questions["question_id"], dataset.longest + window.video(frames), strict=True):
        window.require_room(needed, f"question {name}")


def _watched_batches(rows: QADataset, features: FeatureTable, profile: Profile) -> list[Any]:
    """Batches of `rows` at the headline number of groups."""
    ids, groups = rows.gifs, profile.evaluation.groups
    frames = np.asarray(features.lengths(ids, [groups] * len(ids)))
    lengths = {groups: video_tokens(profile.connector, frames, profile.encoder.frames_per_group)}
    budget = profile.evaluation.batch_tokens
    plan = BatchPlan(rows.text_lengths, lengths, tokens_per_step=budget, epochs=1, seed=0)
    return [[rows[key] for key in batch] for batch in plan]
