"""What a trained ADEM-VL answers to ScienceQA, beside baselines, as one table.

Answers are read in two ways: the letter that the model writes after "The answer is" (the official way: the likeliest
token of the whole vocabulary), and the likeliest of the choices' letters. A written answer that is no letter of a
choice is wrong; nothing is ever guessed.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from helpers.config import AdemConfig
from helpers.corpora.scienceqa import ANSWER_START, LETTERS, prompt, protocol
from helpers.corpora.tasks import require_finite_scores
from helpers.models.adem_vl.model import AdemVL
from helpers.models.adem_vl.sequences import letter_tokens
from helpers.scoring.scienceqa import WRONG, choice_index, first_capital, first_choice, gold_of, majority
from helpers.stage.pace import DeadlineReached
from helpers.training.adem_vl import batch_of, encode_problems, images_for, padding_token

ANSWER_COLUMNS = ["scores", "generated", "prediction", "likeliest", "too_long"]


def predict(
    model: AdemVL,
    problems: pd.DataFrame,
    config: AdemConfig,
    *,
    blind: bool = False,
    images: Mapping[str, str] | None = None,
    deadline: float = math.inf,
    description: str = "answers",
    progress: bool = True,
) -> pd.DataFrame:
    """One row a problem, in order: pid and `ANSWER_COLUMNS`.

    scores: log-probability of each choice's letter among the whole vocabulary; generated: the written token's text;
    prediction: index of its letter, `WRONG` if it is none of the choices'; likeliest: index of the best score;
    too_long: "", or why a problem does not fit the window: it has no scores and an empty text, and both are `WRONG`.
    blind: problems are shown without their images. images: other images by pid (see `shuffle_images`). deadline: in
    seconds from now; DeadlineReached is raised when it has passed, and ScoreError, naming the problem, for scores that
    are not finite.
    """
    if problems.empty:
        return pd.DataFrame(columns=["pid", *ANSWER_COLUMNS])
    ends = time.perf_counter() + deadline
    encoded, left_out = encode_problems(model, problems, config, answers=False, blind=blind)
    reasons = dict(zip(left_out["item"], left_out["reason"], strict=True))
    paths = [(images or {}).get(row.pid, row.image) if not blind else "" for row in problems.itertuples()]
    pixels = images_for(model, config)
    rows = problems.to_dict("records")
    last = prompt(rows[0], protocol(config.protocol).evaluation) + ANSWER_START
    letters = letter_tokens(model.tokenizer, last, LETTERS)
    order = sorted((i for i, sample in enumerate(encoded) if sample), key=lambda i: -len(encoded[i].input_ids))
    answers: list[tuple[list[float], str, int, int]] = [([], "", WRONG, WRONG)] * len(rows)
    size = config.evaluation_batch
    for start in tqdm(
        range(0, len(order), size), desc=description, unit="batch", mininterval=2.0, disable=not progress
    ):
        if time.perf_counter() > ends:
            raise DeadlineReached(f"time is up in {description}; run again to go on")
        chosen = order[start : start + size]
        batch = batch_of([(encoded[i], paths[i]) for i in chosen], pixels, padding_token(model), left=True)
        del batch["labels"]
        logits = model.next_logits(**{name: tensor.to(model.device) for name, tensor in batch.items()})
        scores = logits.log_softmax(-1)[:, letters].cpu()
        for i, written, row in zip(chosen, logits.argmax(-1).tolist(), scores.tolist(), strict=True):
            require_finite_scores(row, f"problem {rows[i]['pid']}")
            text, count = model.tokenizer.decode([written]), len(rows[i]["choices"])
            best = int(np.argmax(row[:count]))
            answers[i] = (row[:count], text, choice_index(first_capital(text), count), best)
    return pd.DataFrame(
        [(row["pid"], *a, reasons.get(row["pid"], "")) for row, a in zip(rows, answers, strict=True)],
        columns=["pid", *ANSWER_COLUMNS],
    )


def shuffle_images(problems: pd.DataFrame, seed: int) -> dict[str, str]:
    """pid -> the image of another problem: of one with the same skill, where there is another, else of any other.

    A random cyclic order within each skill, and among the problems that are alone in theirs, so that every image is
    shown once and none at its own problem. If a single problem is alone in its skill, it is shown any other's image,
    and its own is not shown. The only image of all stays where it is, with a warning.
    """
    seen = problems[problems["image"] != ""]
    rng = np.random.default_rng(seed)
    sizes = seen.groupby("skill")["pid"].transform("size")
    groups = [group for _, group in seen[sizes > 1].groupby("skill", sort=True)]
    found: dict[str, str] = {}
    for group in [*groups, seen[sizes == 1]]:
        order = rng.permutation(len(group))
        pids, paths = group["pid"].to_numpy()[order], group["image"].to_numpy()[order]
        found |= dict(zip(pids.tolist(), np.roll(paths, 1).tolist(), strict=True))
    alone = seen[sizes == 1]
    if len(seen) == 1:
        warnings.warn(f"{alone['pid'].iloc[0]} is the only problem with an image: it keeps its own", stacklevel=2)
    elif len(alone) == 1:
        found[alone["pid"].iloc[0]] = str(rng.choice(seen["image"][sizes > 1]))
    return found


def join_predictions(test: pd.DataFrame, train: pd.DataFrame, answers: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The table of predictions, one row a problem: what it is, and what every system answered.

    answers: tables of `predict` by system ("" is the model). Columns: pid, question, choices, answer (index), image
    and hint (bool), subject, grade, skill; `ANSWER_COLUMNS` with the system's name and "_" in front; and the
    baselines' `first_choice_prediction` and `majority_prediction`.
    """
    gold = gold_of(test)
    table = test[["pid", "question", "choices", "answer", "subject", "grade", "skill"]].reset_index(drop=True)
    table = table.assign(image=(test["image"] != "").to_numpy(), hint=(test["hint"] != "").to_numpy())
    for system, answered in answers.items():
        if answered["pid"].tolist() != table["pid"].tolist():
            raise ValueError(f"the answers of {system or 'the model'!r} are to other problems than the test's")
        for column in ANSWER_COLUMNS:
            table[f"{system}_{column}".lstrip("_")] = answered[column].to_numpy()
    for name, baseline in (("first_choice", first_choice(gold)), ("majority", majority(gold_of(train).values(), gold))):
        table[f"{name}_prediction"] = [baseline[pid] for pid in table["pid"]]
    return table
