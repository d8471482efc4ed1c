"""Answers of a trained model to a table of questions about GIFs."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from helpers.corpora.tasks import (
    COUNTS,
    MULTIPLE_CHOICE,
    TASKS,
    expected_count,
    option_orders,
    require_finite_scores,
    round_count,
    softmax,
)
from helpers.models.gif_qa.window import WRITTEN_TOKENS
from helpers.models.parts import token_batches
from helpers.scoring.baselines import shuffle_gifs
from helpers.stage.pace import PACE_FILE, DeadlineReached, probe_steps
from helpers.store.tables import read_parquet
from helpers.workspace.disk import read_json, whole, write_json

if TYPE_CHECKING:
    from helpers.config import EvaluationConfig
    from helpers.models.gif_qa.model import GifQAModel
    from helpers.store.features import FeatureTable


CHUNK = 2000  # questions whose answers are kept together: what a killed run repeats at most
RESULT_COLUMNS = ["prediction", "scores", "confidence", "prediction_per_token", "prediction_vocabulary"]
REORDERED = "prediction_reordered"


def predict(
    model: GifQAModel,
    questions: pd.DataFrame,
    features: FeatureTable,
    config: EvaluationConfig,
    *,
    groups: int,
    vocabulary: Sequence[str] | None = None,
    shuffle_seed: int | None = None,
    cache: Path | None = None,
    description: str = "scoring",
    deadline: float = math.inf,
    passes: int = 1,
    reordered: bool = False,
    reordered_passes: int = 0,
) -> pd.DataFrame:
    """Answer every question with `model`, looking at `groups` groups of 16 frames of its GIF.

    Action and transition: every option is scored as a whole answer (terminator included); the highest sum wins. Where
    options stand in the prompt, it lists them in the first of their two orders (`corpora.tasks.option_orders`).
    Count: the answers "1".."10" are scored; the prediction is the rounded, clipped expectation. FrameQA: open-ended
    generation, and with `vocabulary` the most likely of its words, of those as short as what it may write, as a second
    answer.

    Args:
        model: a `GifQAModel`; one with `video=False` never sees the GIF.
        questions: QA table with `gif_sha256`.
        features: a `FeatureTable`.
        config: the profile's evaluation section (`batch_tokens`, `options_in_prompt`, `num_beams`, `seed`).
        shuffle_seed: if given, every question is asked about another GIF (see `shuffle_gifs`); a question without a
            partner gets no prediction.
        cache: folder that keeps the answers of every `CHUNK` questions, so that a killed run goes on there. The
            caller names the folder after everything that the answers depend on.
        deadline: seconds from now after which no more batches are answered.
        passes: how often the caller has these questions answered, each time with a folder beside `cache`. Each task's
            pace, and what is left of all passes, are noted beside these folders after every chunk.
        reordered: where options stand in the prompt, ask with their second order too: the column
            `prediction_reordered`.
        reordered_passes: how many of the caller's passes are `reordered`: there a question is answered twice.

    Raises:
        stage.pace.DeadlineReached: the time was up, or the runner only measures the pace and a chunk of each task was
            answered; the chunks that were done are kept in `cache`.
        corpora.tasks.ScoreError: a question's scores are not finite; it is named.
        models.gif_qa.TooLong: a question is too long for the model's window; it is named.

    Returns:
        one row a question, in the order of `questions`: question_id, seen_gif_sha256 and `RESULT_COLUMNS`. `scores`
        are the summed log-probabilities of the candidates: the options, the numbers 1 to 10, or for FrameQA the
        generated answer; `confidence` is the probability that the model gives its own prediction.
    """
    ends, measured = time.monotonic() + deadline, 0
    vocabulary = [word for word in vocabulary or [] if len(model.encode_answer(word)) <= WRITTEN_TOKENS]
    questions = questions.reset_index(drop=True)
    seen = questions["gif_sha256"] if shuffle_seed is None else shuffle_gifs(questions, shuffle_seed)["gif_sha256"]
    asked = questions.assign(seen_gif_sha256=seen)
    reordered = reordered and config.options_in_prompt
    columns = ["question_id", "seen_gif_sha256", *RESULT_COLUMNS, *([REORDERED] if reordered else [])]
    listed = MULTIPLE_CHOICE if config.options_in_prompt else ()
    to_give = {
        task: number * (passes + (reordered_passes if task in listed else 0))
        for task, number in questions["task"].value_counts().items()
    }
    parts = []
    for task in TASKS:
        rows = asked[(asked["task"] == task) & asked["seen_gif_sha256"].notna()]
        if rows.empty:
            continue
        for start in range(0, len(rows), CHUNK):
            chunk, began = rows[start : start + CHUNK], time.monotonic()
            part = cache / f"{task}-{start}.parquet" if cache is not None else None
            answers = _finished(part, chunk, columns)
            if answers is None:
                told = f"{description}: {task}" + (f" from {start:,}" if len(rows) > CHUNK else "")
                answers = _predict_task(model, chunk, features, config, groups, vocabulary, told, ends, reordered)
                if part is not None:
                    save_predictions(answers, part)
                    _note_pace(cache.parent, task, _answers(part, task), time.monotonic() - began, to_give)
                    measured += len(chunk)
            parts.append(answers)
            if measured and math.isfinite(probe_steps()):
                break
    if measured and math.isfinite(probe_steps()):
        raise DeadlineReached(f"the pace of {description} is measured: {measured:,} answers are kept")
    answers = pd.concat(parts) if parts else pd.DataFrame(columns=columns)
    return asked[["question_id"]].merge(answers[columns], on="question_id", how="left", validate="one_to_one")


def _note_pace(folder: Path, task: str, done: int, seconds: float, to_give: Mapping[str, int]) -> None:
    """Write the newest pace of each task, and how many of the answers to give in all passes are still to come."""
    file = folder / PACE_FILE
    noted = {pace["unit"]: pace for pace in read_json(file) or []}
    noted[f"{task} answers"] = {"done": done, "seconds": seconds}
    paces = []
    for name, number in to_give.items():
        kept = sum(_answers(part, name) for part in folder.glob(f"*/{name}-*.parquet"))
        unit = f"{name} answers"
        pace = noted.get(unit, {"done": 0, "seconds": 0.0})
        paces.append(pace | {"unit": unit, "left": max(0, int(number) - kept)})
    write_json(file, paces)


def _answers(part: Path, task: str) -> int:
    """How many answers a part holds, those by the second order of options too.

    A damaged one, which will be dropped where it is needed, holds none.
    """
    try:
        kept = pq.read_metadata(part)
    except (OSError, ValueError):
        return 0
    twice = task in MULTIPLE_CHOICE and REORDERED in kept.schema.names
    return kept.num_rows * (2 if twice else 1)


def _finished(part: Path | None, rows: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame | None:
    """Answers of an earlier run, or None if there are none, one of the columns lacks, or they are of other rows."""
    answers = None if part is None else read_parquet(part)
    if answers is None or not {*columns} <= {*answers.columns}:
        return None
    same = all(answers[name].tolist() == rows[name].tolist() for name in ("question_id", "seen_gif_sha256"))
    return answers if same else None


def _predict_task(
    model: GifQAModel,
    rows: pd.DataFrame,
    features: FeatureTable,
    config: EvaluationConfig,
    groups: int,
    vocabulary: Sequence[str] | None,
    description: str,
    ends: float,
    reordered: bool,
) -> pd.DataFrame:
    task = rows["task"].iloc[0]
    gifs = rows["seen_gif_sha256"].tolist()
    options = [list(options) for options in rows["options"]]
    listed = config.options_in_prompt and task in MULTIPLE_CHOICE
    prompts = _prompts(model, rows, config, 0 if listed else None)
    others = _prompts(model, rows, config, 1) if listed and reordered else None
    candidates = options if task in MULTIPLE_CHOICE else [list(COUNTS)] * len(rows) if task == "count" else None
    tokens = {text: len(model.encode_answer(text)) for texts in candidates or [] for text in texts}
    lengths = np.array([len(prompt) for prompt in prompts])
    frames = features.lengths(gifs, groups) if model.video else np.zeros_like(lengths)
    window = model.window()
    behind = [WRITTEN_TOKENS] * len(rows) if candidates is None else [max(tokens[t] for t in ts) for ts in candidates]
    for name, needed in zip(rows["question_id"], lengths + window.video(frames) + behind, strict=True):
        window.require_room(needed, f"{task} question {name}")
    lengths = lengths + frames
    if candidates is not None:
        lengths = lengths + [sum(tokens[text] for text in texts) for texts in candidates]
    results: dict[int, dict] = {}
    with tqdm(total=len(rows), desc=description, unit="question") as progress:
        for batch in token_batches(lengths, config.batch_tokens):
            if time.monotonic() > ends:
                raise DeadlineReached(f"time is up in {description}: what was answered before it is kept")
            video = features.fetch([gifs[i] for i in batch], groups) if model.video else (None, None)
            batch_prompts = [prompts[i] for i in batch]
            told = [f"{task} question {rows['question_id'].iloc[i]}" for i in batch]
            if candidates is None:
                answers = _answer_openly(model, batch_prompts, video, config.num_beams, vocabulary, told)
            else:
                texts = [candidates[i] for i in batch]
                answers = map(_choose, model.score(batch_prompts, texts, *video), texts, [task] * len(batch), told)
                if others is not None:
                    again = model.score([others[i] for i in batch], texts, *video)
                    second = map(_choose, again, texts, [task] * len(batch), told)
                    pairs = zip(answers, second, strict=True)
                    answers = [first | {REORDERED: other["prediction"]} for first, other in pairs]
            results.update(zip(batch, answers, strict=True))
            progress.update(len(batch))
    columns = [*RESULT_COLUMNS, *([REORDERED] if reordered else [])]
    answers = pd.DataFrame([results[i] for i in range(len(rows))], columns=columns)
    return pd.concat([rows[["question_id", "seen_gif_sha256"]].reset_index(drop=True), answers], axis=1)


def shown_prompt(model: GifQAModel, questions: pd.DataFrame, config: EvaluationConfig) -> str:
    """A question as `predict` asks it, one with options where any is; empty where there are no questions."""
    rows = questions.sort_values("task", kind="stable").head(1)  # action comes first
    listed = config.options_in_prompt and rows["task"].isin(MULTIPLE_CHOICE).all()
    return "".join(map(model.text_of, _prompts(model, rows, config, 0 if listed else None)))


def _prompts(model: GifQAModel, rows: pd.DataFrame, config: EvaluationConfig, order: int | None) -> list[list[int]]:
    """The prompts of questions; `order`: which of their two orders options are listed in, None: they are not."""
    if order is None:
        return [model.encode_prompt(question) for question in rows["question"]]
    return [
        model.encode_prompt(question, option_orders(question, options, config.seed)[order])
        for question, options in zip(rows["question"], rows["options"], strict=True)
    ]


def _choose(scores: np.ndarray, texts: Sequence[str], task: str, told: str) -> dict[str, Any]:
    """The chosen candidate of one question, called `told`, from its scores [K, 2] (summed, per token)."""
    summed, per_token = np.asarray(scores, dtype=np.float64).T
    probabilities = softmax(summed, told)
    if task == "count":
        index = round_count(expected_count(summed)) - 1
        second = None
    else:
        index = int(np.argmax(summed))
        second = texts[int(np.argmax(per_token))]
    return {
        "prediction": texts[index],
        "scores": summed.tolist(),
        "confidence": float(probabilities[index]),
        "prediction_per_token": second,
    }


def _answer_openly(
    model: GifQAModel,
    prompts: Sequence[Sequence[int]],
    video: tuple[np.ndarray | None, np.ndarray | None],
    num_beams: int,
    vocabulary: Sequence[str] | None,
    told: Sequence[str],
) -> list[dict[str, Any]]:
    generated = model.generate(prompts, *video, num_beams=num_beams)
    scores = model.score(prompts, [[text] for text in generated], *video)
    for score, name in zip(scores, told, strict=True):
        require_finite_scores(score, name)
    closed = model.best_answer(prompts, list(vocabulary), *video) if vocabulary else [None] * len(prompts)
    return [
        {
            "prediction": text,
            "scores": [float(s[0, 0])],
            "confidence": float(np.exp(s[0, 0])),
            "prediction_vocabulary": word,
        }
        for text, word, s in zip(generated, closed, scores, strict=True)
    ]


def save_predictions(predictions: pd.DataFrame, path: Path) -> None:
    """Write a predictions table as parquet by atomic rename."""
    with whole(path) as temporary:
        predictions.to_parquet(temporary, index=False)
