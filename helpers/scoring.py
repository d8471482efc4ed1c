"""Answers for a table of questions, the metrics computed from them, baselines, intervals and calibration.

`predict` asks a model; `join_variants` puts the answers of the model, of its blind twin, with shuffled GIFs and so on
side by side, one row a question. Everything after that (`metrics`, `metric_table`, `breakdown`, `calibration`) reads
that one table, so a saved predictions.parquet is enough to compute every score again.

Conventions are those of TGIF-QA's official evaluator (github.com/YunseokJANG/tgif-qa) and stand in `CONVENTIONS`.
"""

import json
import math
import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from helpers.corpora import MAX_COUNT, MULTIPLE_CHOICE, TASKS, question_form
from helpers.stage import write_json
from helpers.workspace import PACE_FILE, DeadlineReached, probe_steps

COUNTS = tuple(str(number) for number in range(1, MAX_COUNT + 1))

CONVENTIONS = {
    "frameqa_accuracy": "open-ended answer, exact match after lower-casing and stripping",
    "frameqa_accuracy_normalised": "open-ended answer, exact match after VQA-style normalisation of both sides",
    "frameqa_accuracy_vocabulary": "most likely of the training answers, exact match",
    "action_accuracy": "option with the highest summed log-probability, terminator included",
    "action_accuracy_per_token": "option with the highest log-probability per token, terminator included",
    "transition_accuracy": "option with the highest summed log-probability, terminator included",
    "transition_accuracy_per_token": "option with the highest log-probability per token, terminator included",
    "count_mse": "mean squared error against max(label, 1) (lower is better)",
    "count_mse_raw": "mean squared error against the raw label, 0 = once (lower is better)",
    "count_accuracy": "predicted number equals max(label, 1)",
}
CHUNK = 2000  # questions whose answers are kept together: what a killed run repeats at most
DRAWN_AT_ONCE = 4_000_000  # numbers of a bootstrap held in memory at once (32 MB)
HEADLINE = ("frameqa_accuracy", "action_accuracy", "transition_accuracy", "count_mse")

BASE_COLUMNS = [
    "question_id",
    "gif_sha256",
    "gif",
    "num_frames",
    "task",
    "type",
    "question",
    "options",
    "answer",
    "label",
]
RESULT_COLUMNS = ["prediction", "scores", "confidence", "prediction_per_token", "prediction_vocabulary"]


# ---------------------------------------------------------------- asking the model


def expected_count(scores: np.ndarray) -> float:
    """Expectation of the model's own distribution over the numbers 1 to 10: softmax of ten summed log-probabilities."""
    return float(np.dot(_softmax(scores), np.arange(1, MAX_COUNT + 1)))


def round_count(value: float) -> int:
    """Nearest whole number (halves go up, as in HCRN's floor(x + 0.5)), clipped to 1..10."""
    return int(np.clip(np.floor(value + 0.5), 1, MAX_COUNT))


def predict(
    model: Any,
    questions: pd.DataFrame,
    features: Any,
    config: Any,
    *,
    groups: int,
    vocabulary: Sequence[str] | None = None,
    shuffle_seed: int | None = None,
    cache: Path | None = None,
    description: str = "scoring",
    deadline: float = math.inf,
    passes: int = 1,
) -> pd.DataFrame:
    """Answer every question with `model`, looking at `groups` groups of 16 frames of its GIF.

    Action and transition: every option is scored as a whole answer (terminator included); the highest sum wins.
    Count: the answers "1".."10" are scored; the prediction is the rounded, clipped expectation. FrameQA: open-ended
    generation, and with `vocabulary` the most likely of its words as a second answer.

    Args:
        model: a `GifQAModel`; one with `video=False` never sees the GIF.
        questions: QA table with `gif_sha256`.
        features: a `FeatureTable`.
        config: the profile's evaluation section (`batch_tokens`, `options_in_prompt`, `num_beams`).
        shuffle_seed: if given, every question is asked about another GIF (see `shuffle_gifs`); a question without a
            partner gets no prediction.
        cache: folder that keeps the answers of every `CHUNK` questions, so that a killed run goes on there. The
            caller names the folder after everything that the answers depend on.
        deadline: seconds from now after which no more batches are answered.
        passes: how often the caller has these questions answered, each time with a folder beside `cache`. Each task's
            pace, and what is left of all passes, are noted beside these folders after every chunk.

    Raises:
        workspace.DeadlineReached: the time was up, or the runner only measures the pace and a chunk of each task was
            answered; the chunks that were done are kept in `cache`.

    Returns:
        one row a question, in the order of `questions`: question_id, seen_gif_sha256 and `RESULT_COLUMNS`. `scores`
        are the summed log-probabilities of the candidates: the options, the numbers 1 to 10, or for FrameQA the
        generated answer; `confidence` is the probability that the model gives its own prediction.
    """
    ends, measured = time.monotonic() + deadline, 0
    questions = questions.reset_index(drop=True)
    seen = questions["gif_sha256"] if shuffle_seed is None else shuffle_gifs(questions, shuffle_seed)["gif_sha256"]
    asked = questions.assign(seen_gif_sha256=seen)
    parts = []
    for task in TASKS:
        rows = asked[(asked["task"] == task) & asked["seen_gif_sha256"].notna()]
        if rows.empty:
            continue
        for start in range(0, len(rows), CHUNK):
            chunk, began = rows[start : start + CHUNK], time.monotonic()
            part = cache / f"{task}-{start}.parquet" if cache is not None else None
            answers = _finished(part, chunk)
            if answers is None:
                told = f"{description}: {task}" + (f" from {start:,}" if len(rows) > CHUNK else "")
                answers = _predict_task(model, chunk, features, config, groups, vocabulary, told, ends)
                if part is not None:
                    save_predictions(answers, part)
                    _note_pace(cache.parent, task, len(chunk), time.monotonic() - began, questions["task"], passes)
                    measured += len(chunk)
            parts.append(answers)
            if measured and math.isfinite(probe_steps()):
                break
    if measured and math.isfinite(probe_steps()):
        raise DeadlineReached(f"the pace of {description} is measured: {measured:,} answers are kept")
    columns = ["question_id", "seen_gif_sha256", *RESULT_COLUMNS]
    answers = pd.concat(parts) if parts else pd.DataFrame(columns=columns)
    return asked[["question_id"]].merge(answers[columns], on="question_id", how="left", validate="one_to_one")


def _note_pace(folder: Path, task: str, done: int, seconds: float, tasks: pd.Series, passes: int) -> None:
    """Write the newest pace of each task, and how many answers of it are still to be given in all passes."""
    file = folder / PACE_FILE
    noted = {pace["unit"]: pace for pace in json.loads(file.read_text())} if file.is_file() else {}
    noted[f"{task} answers"] = {"done": done, "seconds": seconds}
    paces = []
    for name, count in tasks.value_counts().items():
        kept = sum(pq.read_metadata(part).num_rows for part in folder.glob(f"*/{name}-*.parquet"))
        unit = f"{name} answers"
        pace = noted.get(unit, {"done": 0, "seconds": 0.0})
        paces.append(pace | {"unit": unit, "left": max(0, passes * int(count) - kept)})
    write_json(file, paces)


def _finished(part: Path | None, rows: pd.DataFrame) -> pd.DataFrame | None:
    """Answers of an earlier run, or None if there are none or they are of other questions or GIFs."""
    if part is None or not part.is_file():
        return None
    answers = pd.read_parquet(part)
    same = all(answers[name].tolist() == rows[name].tolist() for name in ("question_id", "seen_gif_sha256"))
    return answers if same else None


def _predict_task(model, rows, features, config, groups, vocabulary, description, ends) -> pd.DataFrame:
    task = rows["task"].iloc[0]
    gifs = rows["seen_gif_sha256"].tolist()
    options = [list(options) for options in rows["options"]]
    shown = options if config.options_in_prompt and task in MULTIPLE_CHOICE else [None] * len(rows)
    prompts = [model.encode_prompt(question, choice) for question, choice in zip(rows["question"], shown, strict=True)]
    candidates = options if task in MULTIPLE_CHOICE else [list(COUNTS)] * len(rows) if task == "count" else None
    tokens = {text: len(model.encode_answer(text)) for texts in candidates or [] for text in texts}
    lengths = np.array([len(prompt) for prompt in prompts])
    if candidates is not None:
        lengths = lengths + [sum(tokens[text] for text in texts) for texts in candidates]
    if model.video:
        lengths = lengths + features.lengths(gifs, groups)
    results: dict[int, dict] = {}
    with tqdm(total=len(rows), desc=description, unit="question") as progress:
        for batch in token_batches(lengths, config.batch_tokens):
            if time.monotonic() > ends:
                raise DeadlineReached(f"time is up in {description}: what was answered before it is kept")
            video = features.fetch([gifs[i] for i in batch], groups) if model.video else (None, None)
            batch_prompts = [prompts[i] for i in batch]
            if candidates is None:
                answers = _answer_openly(model, batch_prompts, video, config.num_beams, vocabulary)
            else:
                texts = [candidates[i] for i in batch]
                answers = map(_choose, model.score(batch_prompts, texts, *video), texts, [task] * len(batch))
            results.update(zip(batch, answers, strict=True))
            progress.update(len(batch))
    answers = pd.DataFrame([results[i] for i in range(len(rows))], columns=RESULT_COLUMNS)
    return pd.concat([rows[["question_id", "seen_gif_sha256"]].reset_index(drop=True), answers], axis=1)


def _choose(scores: np.ndarray, texts: Sequence[str], task: str) -> dict:
    """The chosen candidate of one question from its scores [K, 2] (summed, per token)."""
    summed, per_token = np.asarray(scores, dtype=np.float64).T
    probabilities = _softmax(summed)
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


def _answer_openly(model, prompts, video, num_beams, vocabulary) -> list[dict]:
    generated = model.generate(prompts, *video, num_beams=num_beams)
    closed = model.best_answer(prompts, list(vocabulary), *video) if vocabulary else [None] * len(prompts)
    scores = model.score(prompts, [[text] for text in generated], *video)
    return [
        {
            "prediction": text,
            "scores": [float(s[0, 0])],
            "confidence": float(np.exp(s[0, 0])),
            "prediction_vocabulary": word,
        }
        for text, word, s in zip(generated, closed, scores, strict=True)
    ]


def token_batches(lengths: np.ndarray, budget: int) -> list[list[int]]:
    """Positions of `lengths` (tokens) in batches of like length, longest first, each at most `budget` padded tokens.

    A row that is longer than the budget makes a batch of its own.
    """
    batches: list[list[int]] = []
    widest = 0
    for i in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        if batches and (len(batches[-1]) + 1) * widest <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
            widest = int(lengths[i])
    return batches


def shuffle_gifs(questions: pd.DataFrame, seed: int) -> pd.DataFrame:
    """For every question another GIF that carries the same form of question with a different answer.

    The partner's question has the same text where such a GIF exists, else the same task and type. A GIF that also
    carries that text (or form) with the question's own answer is no partner: the answer could still be right there.

    Returns:
        columns gif_sha256 (None: no partner in the table) and match ('question', 'form' or ''), indexed as `questions`.
        The same seed and rows give the same partners in any order of rows.
    """
    keys = {
        "question": list(zip(questions["task"], questions["question"].map(question_key), strict=True)),
        "form": list(zip(questions["task"], questions["type"], strict=True)),
    }
    answers = [answer_key(row) for row in questions.itertuples()]
    carriers: dict = defaultdict(set)
    same_answer: dict = defaultdict(set)
    for match, values in keys.items():
        for key, answer, gif in zip(values, answers, questions["gif_sha256"], strict=True):
            carriers[match, key].add(gif)
            same_answer[match, key, answer].add(gif)
    eligible: dict = {}
    partners = [(None, "")] * len(questions)
    rng = np.random.default_rng(seed)
    for i in np.argsort(questions["question_id"].to_numpy(dtype=object), kind="stable").tolist():
        draw = rng.random()
        for match, values in keys.items():
            key = (match, values[i], answers[i])
            if key not in eligible:
                eligible[key] = sorted(carriers[match, values[i]] - same_answer[key])
            if eligible[key]:
                partners[i] = (eligible[key][int(draw * len(eligible[key]))], match)
                break
    return pd.DataFrame(partners, columns=["gif_sha256", "match"], index=questions.index)


def join_variants(questions: pd.DataFrame, variants: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """One row a question: `BASE_COLUMNS`, the columns of the variant 'main' as they are, all others prefixed.

    The answers of variant 'blind' become blind_prediction, blind_scores, ...; a column that is empty throughout is
    left out.
    """
    if "main" not in variants:
        raise ValueError(f"no variant named 'main' among {sorted(variants)}")
    if missing := [column for column in BASE_COLUMNS if column not in questions]:
        raise ValueError(f"the questions lack {', '.join(missing)} (num_frames comes from the feature table)")
    table = questions[BASE_COLUMNS].reset_index(drop=True)
    for name, answers in variants.items():
        answers = answers.dropna(axis=1, how="all") if name != "main" else answers
        prefix = _prefix(name)
        answers = answers.rename(columns={c: prefix + c for c in answers.columns if c != "question_id"})
        table = table.merge(answers, on="question_id", how="left", validate="one_to_one")
    return table


def save_predictions(predictions: pd.DataFrame, path: Path) -> None:
    """Write a predictions table as parquet by atomic rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".tmp")
    predictions.to_parquet(scratch, index=False)
    os.replace(scratch, path)


# ---------------------------------------------------------------- metrics from the predictions alone


def _prefix(variant: str) -> str:
    return "" if variant == "main" else f"{variant}_"


def variant_names(predictions: pd.DataFrame) -> list[str]:
    """Names of the variants in a predictions table, 'main' first."""
    return [
        "main" if c == "prediction" else c.removesuffix("_prediction")
        for c in predictions.columns
        if c == "prediction" or c.endswith("_prediction")
    ]


def outcomes(predictions: pd.DataFrame, variant: str = "main") -> dict[str, pd.Series]:
    """Per-question values of every metric of `CONVENTIONS`: 1 or 0 for accuracies, squared errors for MSE.

    A metric is the mean of its series. Questions without a prediction and tasks without questions are left out.
    """
    prefix = _prefix(variant)
    values: dict[str, pd.Series] = {}

    def answered(task: str, column: str) -> pd.DataFrame:
        if prefix + column not in predictions:
            return predictions.iloc[:0].assign(text=[])
        rows = predictions[(predictions["task"] == task) & predictions[prefix + column].notna()]
        return rows.assign(text=rows[prefix + column].astype(str))

    def match(name: str, task: str, column: str, clean) -> None:
        rows = answered(task, column)
        if len(rows):
            values[name] = (rows["text"].map(clean) == rows["answer"].map(clean)).astype(float)

    match("frameqa_accuracy", "frameqa", "prediction", _bare)
    match("frameqa_accuracy_normalised", "frameqa", "prediction", normalise_vqa)
    match("frameqa_accuracy_vocabulary", "frameqa", "prediction_vocabulary", _bare)
    for task in MULTIPLE_CHOICE:
        match(f"{task}_accuracy", task, "prediction", str)
        match(f"{task}_accuracy_per_token", task, "prediction_per_token", str)
    rows = answered("count", "prediction")
    if len(rows):
        number, label = rows["text"].astype(float), rows["label"].astype(float)
        values["count_mse"] = (number - label.clip(lower=1)) ** 2
        values["count_mse_raw"] = (number - label) ** 2
        values["count_accuracy"] = (number == label.clip(lower=1)).astype(float)
    return values


def correctness(predictions: pd.DataFrame, variant: str = "main") -> pd.Series:
    """Whether each answered question was answered right (count: the number exactly), as booleans."""
    series = outcomes(predictions, variant)
    right = [series[f"{task}_accuracy"] for task in TASKS if f"{task}_accuracy" in series]
    return pd.concat(right).astype(bool).sort_index() if right else pd.Series(dtype=bool)


def metrics(predictions: pd.DataFrame) -> dict[str, float]:
    """Every metric of every variant under its plain name (main) or `<variant>_<name>`, and `<task>_ece` for main."""
    values = {
        _prefix(variant) + name: float(series.mean())
        for variant in variant_names(predictions)
        for name, series in outcomes(predictions, variant).items()
    }
    for task in TASKS:
        rows = predictions[predictions["task"] == task]
        if len(rows) and rows["confidence"].notna().any():
            values[f"{task}_ece"] = expected_calibration_error(calibration(rows))
    return values


def metric_table(predictions: pd.DataFrame, resamples: int, seed: int) -> pd.DataFrame:
    """All metrics with 95 % bootstrap intervals by GIF.

    Returns:
        columns metric, variant, value, low, high, n (questions), gifs, convention.
    """
    rows = []
    for variant in variant_names(predictions):
        for name, series in outcomes(predictions, variant).items():
            gifs = predictions.loc[series.index, "gif_sha256"]
            low, high = bootstrap_interval(series, gifs, resamples, seed)
            rows.append((name, variant, series.mean(), low, high, len(series), gifs.nunique(), CONVENTIONS[name]))
    return pd.DataFrame(rows, columns=["metric", "variant", "value", "low", "high", "n", "gifs", "convention"])


def difference_table(
    predictions: pd.DataFrame, pairs: Iterable[tuple[str, str]], resamples: int, seed: int
) -> pd.DataFrame:
    """First variant minus second on the questions that both answered, headline metrics, paired bootstrap by GIF.

    Returns:
        columns metric, variants, difference, low, high, n, gifs.
    """
    rows = []
    for first, second in pairs:
        a, b = outcomes(predictions, first), outcomes(predictions, second)
        for name in HEADLINE:
            if name not in a or name not in b:
                continue
            series = (a[name] - b[name]).dropna()
            gifs = predictions.loc[series.index, "gif_sha256"]
            low, high = bootstrap_interval(series, gifs, resamples, seed)
            rows.append((name, f"{first} - {second}", series.mean(), low, high, len(series), gifs.nunique()))
    return pd.DataFrame(rows, columns=["metric", "variants", "difference", "low", "high", "n", "gifs"])


def breakdown(
    predictions: pd.DataFrame, by: pd.Series, resamples: int, seed: int, variants: Sequence[str] = ("main",)
) -> pd.DataFrame:
    """Headline metrics within each value of `by` (a series indexed as `predictions`), with intervals by GIF.

    Returns:
        columns metric, group, variant, value, low, high, n, gifs; groups in the order of a categorical, else sorted.
    """
    order = list(by.cat.categories) if isinstance(by.dtype, pd.CategoricalDtype) else sorted(by.dropna().unique())
    rows = []
    for variant in variants:
        values = outcomes(predictions, variant)
        for name in (name for name in HEADLINE if name in values):
            for group in order:
                series = values[name][by.loc[values[name].index] == group]
                if series.empty:
                    continue
                gifs = predictions.loc[series.index, "gif_sha256"]
                low, high = bootstrap_interval(series, gifs, resamples, seed)
                rows.append((name, group, variant, series.mean(), low, high, len(series), gifs.nunique()))
    return pd.DataFrame(rows, columns=["metric", "group", "variant", "value", "low", "high", "n", "gifs"])


def length_bins(num_frames: pd.Series, edges: Sequence[int] = (16, 32, 48)) -> pd.Series:
    """Ordered categories of GIF length in frames: '1-16', '17-32', '33-48', '49 or more' for the default edges."""
    starts = [1, *(edge + 1 for edge in edges)]
    labels = [f"{a}-{b}" for a, b in zip(starts, edges, strict=False)] + [f"{starts[-1]} or more"]
    return pd.cut(num_frames, [0, *edges, np.inf], labels=labels)


def bootstrap_interval(
    values: pd.Series | np.ndarray, clusters: pd.Series | np.ndarray, resamples: int, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean of `values`, resampling whole clusters (GIFs) with replacement.

    Questions about one GIF are not independent, so the GIF is what is drawn (Efron and Tibshirani 1993, ch. 13;
    cluster bootstrap). The same seed gives the same interval. A sample in which every value is equal has an interval
    of width zero: that says nothing about how rare the other outcome is.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 0:
        raise ValueError("no values to resample")
    _, index = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
    sums, sizes = np.bincount(index, weights=values), np.bincount(index)
    rng = np.random.default_rng(seed)
    rows = max(1, DRAWN_AT_ONCE // len(sums))
    means = []
    for start in range(0, resamples, rows):
        drawn = rng.integers(0, len(sums), size=(min(rows, resamples - start), len(sums)))
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def calibration(predictions: pd.DataFrame, variant: str = "main", bins: int = 10) -> pd.DataFrame:
    """Confidence against accuracy in equal-width bins (Guo et al. 2017, arXiv 1706.04599, section 2).

    Returns:
        one row a non-empty bin: low, high (right edge belongs to the bin), n, confidence (mean), accuracy.
    """
    right = correctness(predictions, variant)
    confidence = predictions.loc[right.index, _prefix(variant) + "confidence"].astype(float)
    edges = np.linspace(0, 1, bins + 1)
    index = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    rows = []
    for b in np.unique(index):
        chosen = index == b
        rows.append((edges[b], edges[b + 1], chosen.sum(), confidence[chosen].mean(), right[chosen].mean()))
    return pd.DataFrame(rows, columns=["low", "high", "n", "confidence", "accuracy"])


def expected_calibration_error(table: pd.DataFrame) -> float:
    """ECE = sum over bins of n_b / n * |accuracy_b - confidence_b| (Guo et al. 2017, equation 3)."""
    return float((table["n"] * (table["accuracy"] - table["confidence"]).abs()).sum() / table["n"].sum())


def gallery_examples(predictions: pd.DataFrame, each: int, seed: int) -> pd.DataFrame:
    """Up to `each` right and `each` wrong answers of the model for every task, drawn at random.

    Returns:
        rows of `predictions` with the boolean column `right`, right answers of a task before its wrong ones.
    """
    right = correctness(predictions)
    rows = predictions.loc[right.index].assign(right=right).sample(frac=1, random_state=seed)
    rows = rows.groupby(["task", "right"], sort=False).head(each)
    order = rows["task"].map(TASKS.index) * 2 + ~rows["right"]
    return rows.loc[order.sort_values(kind="stable").index]


# ---------------------------------------------------------------- baselines on text alone


def question_key(question: str) -> str:
    """Question text for comparing: lower case, single spaces, no question mark at the end."""
    return " ".join(question.lower().rstrip("? ").split())


def answer_key(row: Any) -> str:
    """Answer for comparing; a count's codes 0 and 1 are the same answer."""
    return str(max(int(row.label), 1)) if row.task == "count" else _bare(row.answer)


def predict_majority(train: pd.DataFrame, questions: pd.DataFrame) -> pd.DataFrame:
    """Answers of a system that knows only how often each answer is right in training.

    FrameQA and count: the commonest training answer of the task. Action and transition: the option that was most
    often the right answer in training. Of equals the first.

    Returns:
        columns question_id and prediction; tasks that `train` lacks get no prediction.
    """
    predictions = pd.Series(None, index=questions.index, dtype=object)
    for task in TASKS:
        right = Counter(answer_key(row) for row in train[train["task"] == task].itertuples())
        rows = questions[questions["task"] == task]
        if not right or rows.empty:
            continue
        if task in MULTIPLE_CHOICE:
            predictions[rows.index] = [max(options, key=lambda o: right[_bare(o)]) for options in rows["options"]]
        else:
            predictions[rows.index] = right.most_common(1)[0][0]
    return pd.DataFrame({"question_id": questions["question_id"], "prediction": predictions})


def majority_by(train: pd.DataFrame, questions: pd.DataFrame, by: str) -> pd.Series:
    """Commonest training answer for the same question form (`by='form'`) or the same text (`by='question'`).

    A text that training does not have falls back to its form, a form to the whole; of equally common answers the
    one that training has first. FrameQA questions only.
    """
    keys = {"question": [question_key, question_form, lambda q: ""], "form": [question_form, lambda q: ""]}
    if by not in keys:
        raise ValueError(f"by={by!r} is not one of {sorted(keys)}")
    counts = [defaultdict(Counter) for _ in keys[by]]
    for question, answer in zip(train["question"], train["answer"], strict=True):
        for table, key in zip(counts, keys[by], strict=True):
            table[key(question)][_bare(answer)] += 1

    def answer(question: str) -> str:
        counted = next(t[k(question)] for t, k in zip(counts, keys[by], strict=True) if t[k(question)])
        return counted.most_common(1)[0][0]

    return questions["question"].map(answer)


def text_baselines(train: pd.DataFrame, questions: pd.DataFrame) -> dict[str, float]:
    """Scores of rules that never see a GIF, by name; those that need training rows which are not there are left out.

    random_*: uniform guessing (see `random_expectation`, over the training answers). form_majority_ and
    question_majority_frameqa_accuracy: see `majority_by`. commonest_index_*: the option position that is most often
    right in training. rounded_mean_count_mse: the rounded mean of the training counts, for every question.
    """
    rows = {task: (train[train["task"] == task], questions[questions["task"] == task]) for task in TASKS}
    rows = {task: (known, asked) for task, (known, asked) in rows.items() if len(known) and len(asked)}
    words = set(rows["frameqa"][0]["answer"].map(_bare)) if "frameqa" in rows else set()
    values = random_expectation(questions, sorted(words))
    for task, (known, asked) in rows.items():
        if task == "frameqa":
            for by in ("form", "question"):
                right = majority_by(known, asked, by) == asked["answer"].map(_bare)
                values[f"{by}_majority_frameqa_accuracy"] = float(right.mean())
        elif task == "count":
            mean = round_count(known["label"].clip(lower=1).mean())
            values["rounded_mean_count_mse"] = float(((mean - asked["label"].clip(lower=1)) ** 2).mean())
        else:
            index = known["label"].mode().iloc[0]
            values[f"commonest_index_{task}_accuracy"] = float((asked["label"] == index).mean())
    return values


def random_expectation(questions: pd.DataFrame, vocabulary: Sequence[str] = ()) -> dict[str, float]:
    """Expected score of uniform guessing: over the options, the numbers 1 to 10, and the answer vocabulary."""
    values = {}
    for task in MULTIPLE_CHOICE:
        rows = questions[questions["task"] == task]
        if len(rows):
            values[f"random_{task}_accuracy"] = float((1 / rows["options"].map(len)).mean())
    labels = questions.loc[questions["task"] == "count", "label"].to_numpy(dtype=float)
    if len(labels):
        errors = (np.arange(1, MAX_COUNT + 1)[None, :] - np.maximum(labels, 1)[:, None]) ** 2
        values["random_count_mse"] = float(errors.mean())
        values["random_count_accuracy"] = 1 / MAX_COUNT
    words = questions.loc[questions["task"] == "frameqa", "answer"].map(_bare)
    if len(words) and vocabulary:
        known = {_bare(word) for word in vocabulary}
        values["random_frameqa_accuracy"] = float(words.isin(known).mean() / len(known))
    return values


# ---------------------------------------------------------------- VQA-style normalisation


_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_ARTICLES = {"a", "an", "the"}
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_DIGITS)} | {"none": "0"}
_CONTRACTED = """
ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't oughtn't shan't
shouldn't wasn't weren't won't wouldn't could've might've must've not've should've they've we've what've where've
who've would've you've he'd how'd it'd someone'd something'd there'd they'd where'd who'd you'd how'll it'll
somebody'll someone'll something'll they'll what'll who'll why'll you'll he's how's somebody's someone's that's
there's what's when's where's who's why's there're they're what're why're you're ma'am o'clock 'twas y'all
couldn't've hadn't've mightn't've shouldn't've wouldn't've he'd've it'd've she'd've somebody'd've someone'd've
something'd've there'd've they'd've we'd've who'd've you'd've 'ow's'at y'all'll y'all'd've
"""
# The official table maps each contraction with one of its apostrophes missing to the full one, and one entry backwards.
_CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTED.split() for i, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}


def _bare(text: str) -> str:
    return str(text).strip().lower()


def normalise_vqa(text: str) -> str:
    """Normalise an answer as the official VQA evaluator does (github.com/GT-Vision-Lab/VQA, vqaEval.py).

    For GIF questions it is applied to both sides unconditionally, which makes a "VQA-style normalised exact match",
    not VQA accuracy (that one normalises only where the ten human answers differ).
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    cleaned = text
    for mark in _PUNCTUATION:
        touches_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if touches_space or _COMMA_IN_NUMBER.search(text) else " ")
    words = [_NUMBERS.get(word, word) for word in _PERIOD.sub("", cleaned).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(np.asarray(scores, dtype=np.float64) - np.max(scores))
    return weights / weights.sum()
