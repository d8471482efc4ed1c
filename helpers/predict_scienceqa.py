"""What a trained ADEM-VL answers to ScienceQA, beside baselines, as one table; and where it looks.

Answers are read in two ways: the letter that the model writes after "The answer is" (the official way: the likeliest
token of the whole vocabulary), and the likeliest of the choices' letters. A written answer that is no letter of a
choice is wrong; nothing is ever guessed.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import CLIPVisionConfig, LlamaConfig

from helpers.config import AdemConfig
from helpers.corpora import reject_table
from helpers.corpora.scienceqa import ANSWER_START, LETTERS, prompt, protocol
from helpers.models.adem_vl import AdemVL, AdemVLConfig, Encoded, collate, fit_scales, letter_tokens
from helpers.scoring_scienceqa import (
    GROUPS,
    WRONG,
    choice_index,
    first_capital,
    first_choice,
    gold_of,
    majority,
    score,
    wilson_interval,
)
from helpers.training_scienceqa import (
    ablation_rows,
    batch_of,
    build_model,
    changed,
    encode_problems,
    grid_of,
    images_for,
    padding_token,
    train_adem,
)
from helpers.workspace import DeadlineReached, find_model, free_memory

STUDENT = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)
"""97.5 % points of Student's t with 1, 2, ... degrees of freedom."""

ANSWER_COLUMNS = ["scores", "generated", "prediction", "likeliest", "too_long"]
SYSTEMS = {
    "": "model, written letter",
    "likelihood": "model, likeliest choice",
    "text_only": "text-only twin",
    "shuffled": "model, shuffled images",
    "first_choice": "first choice",
    "majority": "majority",
}
"""Prefix of a system's columns in the table of predictions -> how it is called."""

PUBLISHED = {
    "paper, LLaMA-7B (20 epochs)": (95.52, 95.39, 89.18, 95.36, 93.95, 90.94, 93.87, 93.80, 93.85),
    "paper, LLaMA-13B (20 epochs)": (96.00, 94.94, 91.27, 95.45, 93.95, 93.03, 94.46, 94.73, 94.55),
    "random choice, by ScienceQA's authors": (*(math.nan,) * 8, 39.83),
    "released weights, run by the student": (*(math.nan,) * 8, 93.61),
    "student, 5 epochs": (*(math.nan,) * 8, 85.81),
    "student, batch 4 x 8, decay 0.01": (*(math.nan,) * 8, 86.4),
    "student, adapter width 16": (*(math.nan,) * 8, 88.4),
}
"""Published accuracies (%) on ScienceQA's 4,241 test problems: the subgroups and the average."""

INTERVAL = ["average, 95 % from", "to"]  # columns of the headline's interval
SIZES = "problems of this run"  # row of the subgroups' sizes


# ---- Answers -------------------------------------------------------------------------------------------------------


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
    seconds from now; DeadlineReached is raised when it has passed.
    """
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
            text, count = model.tokenizer.decode([written]), len(rows[i]["choices"])
            best = int(np.argmax(row[:count]))
            answers[i] = (row[:count], text, choice_index(first_capital(text), count), best)
    return pd.DataFrame(
        [(row["pid"], *a, reasons.get(row["pid"], "")) for row, a in zip(rows, answers, strict=True)],
        columns=["pid", *ANSWER_COLUMNS],
    )


def keep(path: Path | str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """The table in `path`; where there is none yet, that of `make`, which is written there at once or not at all."""
    path = Path(path)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        make().to_parquet(path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    return pd.read_parquet(path)


def shuffle_images(problems: pd.DataFrame, seed: int) -> dict[str, str]:
    """pid -> the image of another problem: of one with the same skill, where there is another, else of any other.

    A random cyclic order within each skill, so that every image is shown once and none at its own problem.
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


# ---- Scores --------------------------------------------------------------------------------------------------------


def _column(system: str, name: str) -> str:
    return name if system == "likelihood" else f"{system}_{name}".lstrip("_")


def _answered(predictions: pd.DataFrame, system: str) -> dict[str, int]:
    """The answers of a system, without problems that were too long for it."""
    column = "likeliest" if system == "likelihood" else _column(system, "prediction")
    if _column(system, "too_long") in predictions:
        predictions = predictions[predictions[_column(system, "too_long")] == ""]
    return dict(zip(predictions["pid"], predictions[column].astype(int), strict=True))


def too_long(predictions: pd.DataFrame) -> pd.DataFrame:
    """Problems that did not fit a system's window: item, where (the system), reason. They count as wrong."""
    systems = [name for name in systems_in(predictions) if name != "likelihood"]
    columns = [(name, _column(name, "too_long")) for name in systems if _column(name, "too_long") in predictions]
    return reject_table(
        [
            (pid, SYSTEMS[name], reason)
            for name, column in columns
            for pid, reason in zip(predictions["pid"], predictions[column], strict=True)
            if reason
        ]
    )


def systems_in(predictions: pd.DataFrame) -> list[str]:
    """The systems of `SYSTEMS` that a table of predictions has."""
    return [name for name in SYSTEMS if name == "likelihood" or f"{name}_prediction".lstrip("_") in predictions]


def chance(predictions: pd.DataFrame) -> float:
    """Accuracy (%) of a random choice."""
    return 100 * float(np.mean([1 / len(choices) for choices in predictions["choices"]]))


def scores(predictions: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """System -> `scoring_scienceqa.score` of its answers, from the table of predictions alone.

    What is `missing` was too long for the system; `failed` counts what was answered without a letter of a choice.
    """
    gold = gold_of(predictions)
    return {system: score(_answered(predictions, system), gold) for system in systems_in(predictions)}


def split_by_image(predictions: pd.DataFrame) -> dict[str, dict[str, tuple[int, int, float, float]]]:
    """System -> "image" (problems with one), "text" (without), "all" -> correct, total, and 95 % interval (%)."""
    with_image = predictions["image"].to_numpy(dtype=bool)
    parts = {"image": with_image, "text": ~with_image, "all": np.ones_like(with_image)}
    found: dict[str, dict[str, tuple[int, int, float, float]]] = {}
    for system in systems_in(predictions):
        given = _answered(predictions, system)
        right = np.array([given.get(row.pid, WRONG) == row.answer for row in predictions.itertuples()])
        counts = {part: (int(right[rows].sum()), int(rows.sum())) for part, rows in parts.items()}
        found[system] = {part: (*count, *wilson_interval(*count)) for part, count in counts.items() if count[1]}
    return found


def result_table(scored: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Accuracies (%) by subgroup and the average's 95 % interval: a row a system of this run, then the published ones.

    The first row, `SIZES`, holds the number of this run's problems in each subgroup.
    """
    first = next(iter(scored.values()))
    unknown = [math.nan] * len(INTERVAL)
    rows = {SIZES: [*(first["n"].get(g, 0) for g in GROUPS), first["total"], *unknown]}
    rows |= {
        SYSTEMS[name]: [*(values.get(g, math.nan) for g in GROUPS), values["accuracy"], *values["interval"]]
        for name, values in scored.items()
    }
    rows |= {name: [*values, *unknown] for name, values in PUBLISHED.items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=[*GROUPS, "average", *INTERVAL])


def flat_metrics(scored: Mapping[str, Mapping[str, Any]], predictions: pd.DataFrame) -> dict[str, float]:
    """Numbers of a run by name: accuracy and every subgroup (%), the systems' names in front of all but the model's.

    too_long: problems that did not fit the window, wrong in every score; failed: answers without a choice's letter.
    """
    names = {"accuracy": "accuracy", "correct": "correct", "total": "total", "failed": "failed", "missing": "too_long"}
    names |= {group: group for group in GROUPS}
    found = {
        f"{system}_{name}".lstrip("_"): values[key]
        for system, values in scored.items()
        for key, name in names.items()
        if key in values
    }
    seen = predictions[predictions["image"].astype(bool)]
    return found | ({"chance_IMG": chance(seen)} if len(seen) else {})


def parameter_comparison(model: AdemVL) -> pd.DataFrame:
    """Trained parameters by part: of `model`, and of the paper's LLaMA-7B with CLIP ViT-L/14."""
    with torch.device("meta"):
        llama = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
        size = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        vision = CLIPVisionConfig(**size, image_size=224, patch_size=14)
        paper = AdemVL(AdemVLConfig(llama, vision))
    columns: dict[str, dict[str, int]] = {}
    for name, one in (("this run", model), ("paper, LLaMA-7B", paper)):
        columns[name] = {}
        for tensor_name, tensor in one.adapter_tensors().items():
            part = tensor_name.split(".")[0]
            columns[name][part] = columns[name].get(part, 0) + tensor.numel()
    table = pd.DataFrame(columns).fillna(0).astype(int)
    table.loc["total"] = table.sum()
    return table


# ---- Ablations -----------------------------------------------------------------------------------------------------


def run_ablation(
    name: str,
    train: pd.DataFrame,
    test: pd.DataFrame,
    config: AdemConfig,
    folder: Path | str,
    *,
    seeds: int = 3,
    deadline: float = math.inf,
) -> pd.DataFrame:
    """Train and score every row of an ablation with several seeds: row, seed, accuracy, image (%), parameters, seconds.

    One that is finished is kept in `folder`, so that a killed run goes on; a model is freed before the next is built.
    Raises, before anything is trained, ValueError for an unknown ablation or scales that do not divide a row's patch
    grid and ModelNotFound for missing weights; DeadlineReached when the deadline (in seconds from now) has passed.
    """
    ends, folder = time.perf_counter() + deadline, Path(folder)
    rows = {label: changed(config, values) for label, values in ablation_rows(name, grid_of(config)).items()}
    for own in rows.values():
        fit_scales(own.scales, grid_of(own))
        find_model(own.language_model, own.language_revision)
    found = []
    for label, own in rows.items():
        for seed in range(seeds):
            place = folder / f"{re.sub('[^A-Za-z0-9.]+', '_', label.replace('+', 'plus'))}-{seed}"
            values = _ablation_run(label, train, test, changed(own, {"seed": seed}), place, ends)
            found.append({"row": label, "seed": seed, **values})
            free_memory()
    return pd.DataFrame(found)


def _ablation_run(
    label: str, train: pd.DataFrame, test: pd.DataFrame, config: AdemConfig, place: Path, ends: float
) -> dict[str, float]:
    model = build_model(config)
    result, _ = train_adem(model, train, config, place, deadline=ends - time.perf_counter(), progress=False)
    if result.status != "complete":
        done = f"step {result.steps:,} of {result.total_steps:,}"
        raise DeadlineReached(f"time is up at {label!r}, seed {config.seed}, {done}; run again to go on")

    def answer() -> pd.DataFrame:
        left, description = ends - time.perf_counter(), f"{label}, {config.seed}"
        answers = predict(model, test, config, deadline=left, description=description)
        return join_predictions(test, train, {"": answers})

    scored = scores(keep(place / "predictions.parquet", answer))[""]
    return {
        "accuracy": scored["accuracy"],
        "image": scored.get("IMG", math.nan),
        "parameters": sum(t.numel() for t in model.adapter_tensors().values()),
        "seconds": result.seconds,
    }


def ablation_table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row an ablation's row: mean over seeds of accuracy and image accuracy (%), with Student's 95 % intervals."""
    rows = []
    for label, part in runs.groupby("row", sort=False):
        row: dict[str, Any] = {"row": label, "seeds": len(part), "parameters": int(part["parameters"].iloc[0])}
        for measure in ("accuracy", "image"):
            middle, half = mean_interval(part[measure].to_numpy())
            row |= {measure: middle, f"{measure}_low": middle - half, f"{measure}_high": middle + half}
        rows.append(row)
    return pd.DataFrame(rows)


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t; infinite for a single value."""
    if len(values) < 2:
        return float(values.mean()), math.inf
    freedom = len(values) - 1
    z = NormalDist().inv_cdf(0.975)
    # Beyond the table Fisher's expansion in 1 / degrees of freedom is exact to three digits.
    wide = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    quantile = STUDENT[freedom - 1] if freedom <= len(STUDENT) else wide
    return float(values.mean()), quantile * float(values.std(ddof=1)) / math.sqrt(len(values))


# ---- Where it looks ------------------------------------------------------------------------------------------------


def _sequence(model: AdemVL, problem: Mapping[str, Any], config: AdemConfig) -> Encoded:
    """A problem's sequence up to its answer. Raises ValueError if it has no image, or is too long for the window."""
    if not problem["image"]:
        raise ValueError(f"problem {problem['pid']} has no image to look at")
    (encoded,), left_out = encode_problems(model, pd.DataFrame([problem]), config, answers=False)
    if encoded is None:
        raise ValueError(f"problem {problem['pid']} is too long to be shown: {left_out['reason'].iloc[0]}")
    return encoded


def attended(model: AdemVL, problem: Mapping[str, Any], config: AdemConfig) -> np.ndarray:
    """How much each patch adds to the answer's position: [grid, grid], summing to 1, over all blocks and scales.

    A visual position adds alpha * score * value (section 3.2 of the paper); what counts is the length of that vector
    with the image, the positions of a coarser scale spread evenly over their patches. Raises ValueError for a problem
    without an image, and for one that is too long.
    """
    rows = [(_sequence(model, problem, config), problem["image"])]
    batch = batch_of(rows, images_for(model, config), padding_token(model), left=True)
    weights = model.contributions(**{name: t.to(model.device) for name, t in batch.items() if name != "labels"})[0]
    grid, start = model.config.grid, 0
    total = np.zeros((grid, grid))
    for scale in model.config.scales:
        side = math.isqrt(scale)
        part = weights[start : start + scale].view(side, side).double().cpu().numpy()
        times = grid // side
        total += np.kron(part, np.ones((times, times))) / times**2
        start += scale
    return total / total.sum()


def worth(model: AdemVL, problem: Mapping[str, Any], config: AdemConfig, window: int = 3) -> np.ndarray:
    """What hiding the image around each patch costs the model's own answer: [grid, grid], in nats.

    A square of `window` patches a side, centred at the patch, is filled with the image's mean colour; the answer's
    log-probability with the whole image, less that with the square hidden. Negative: the answer became likelier.
    `evaluation_batch` images are seen at once. Raises ValueError for a problem without an image, and for one that is
    too long.
    """
    sequence = _sequence(model, problem, config)
    pixels = images_for(model, config)(problem["image"])
    grid, side = model.config.grid, model.config.vision_config.patch_size
    reach = window // 2

    def told(places: range) -> torch.Tensor:
        """Log-probabilities [len(places), vocabulary] with each place hidden; the whole image for what is none."""
        shown = pixels.repeat(len(places), 1, 1, 1)
        for image, number in zip(shown, places, strict=True):
            if number < grid * grid:
                top, left = (side * max(0, place - reach) for place in divmod(number, grid))
                bottom, right = (side * (place + reach + 1) for place in divmod(number, grid))
                image[:, top:bottom, left:right] = pixels.mean((1, 2))[:, None, None]
        batch = collate([sequence] * len(places), shown, padding_token(model), left=True)
        logits = model.next_logits(**{name: t.to(model.device) for name, t in batch.items() if name != "labels"})
        return logits.log_softmax(-1).cpu().double()

    places, size = range(grid * grid + 1), config.evaluation_batch  # the last one is the whole image
    answer = int(told(places[-1:])[0].argmax())
    own = torch.cat([told(places[start : start + size])[:, answer] for start in range(0, len(places), size)])
    return (own[-1] - own[:-1]).view(grid, grid).numpy()
