"""Scores of GIF question answering, from one table of predictions: metrics, intervals, breakdowns, calibration.

`join_variants` puts the answers of the model, of its blind twin, with shuffled GIFs and so on side by side, one row a
question. All else reads that table alone, so a saved predictions.parquet is enough to compute every score again.

Conventions are those of TGIF-QA's official evaluator (github.com/YunseokJANG/tgif-qa) and stand in `CONVENTIONS`.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from helpers.corpora.tasks import MULTIPLE_CHOICE, TASKS, bare
from helpers.scoring.baselines import random_expectation, shuffled_bounds
from helpers.scoring.intervals import bootstrap_interval
from helpers.scoring.text import normalise_vqa

CONVENTIONS = {
    "frameqa_accuracy": "open-ended answer, exact match after lower-casing and stripping",
    "frameqa_accuracy_normalised": "open-ended answer, exact match after VQA-style normalisation of both sides",
    "frameqa_accuracy_vocabulary": "most likely of the training answers, exact match",
    "action_accuracy": "option with the highest summed log-probability, terminator included",
    "action_accuracy_per_token": "option with the highest log-probability per token, terminator included",
    "transition_accuracy": "option with the highest summed log-probability, terminator included",
    "transition_accuracy_per_token": "option with the highest log-probability per token, terminator included",
    "action_consistency": "same answer after the options in the prompt changed places",
    "transition_consistency": "same answer after the options in the prompt changed places",
    "count_mse": "mean squared error against max(label, 1) (lower is better)",
    "count_mse_raw": "mean squared error against the raw label, 0 = once (lower is better)",
    "count_accuracy": "predicted number equals max(label, 1)",
}
BOUNDS = ("shuffled_floor", "shuffled_prior")  # variants that are expectations, see baselines.shuffled_bounds
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


def _prefix(variant: str) -> str:
    return "" if variant == "main" else f"{variant}_"


def variant_names(predictions: pd.DataFrame) -> list[str]:
    """Names of the variants in a predictions table, 'main' first; the bounds of 'shuffled' follow it."""
    names = [
        "main" if c == "prediction" else c.removesuffix("_prediction")
        for c in predictions.columns
        if c == "prediction" or c.endswith("_prediction")
    ]
    if "shuffled_seen_gif_sha256" in predictions:
        at = names.index("shuffled") + 1
        names[at:at] = BOUNDS
    return names


def outcomes(predictions: pd.DataFrame, variant: str = "main") -> dict[str, pd.Series]:
    """Per-question values of every metric of `CONVENTIONS`: 1 or 0 for accuracies, squared errors for MSE.

    A metric is the mean of its series. Questions without a prediction and tasks without questions are left out. Of the
    variants `BOUNDS` there are expectations of the headline metrics.
    """
    if variant in BOUNDS:
        return shuffled_bounds(predictions)[variant]
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

    match("frameqa_accuracy", "frameqa", "prediction", bare)
    match("frameqa_accuracy_normalised", "frameqa", "prediction", normalise_vqa)
    match("frameqa_accuracy_vocabulary", "frameqa", "prediction_vocabulary", bare)
    for task in MULTIPLE_CHOICE:
        match(f"{task}_accuracy", task, "prediction", str)
        match(f"{task}_accuracy_per_token", task, "prediction_per_token", str)
        rows = answered(task, "prediction_reordered")
        if len(rows):
            values[f"{task}_consistency"] = (rows["text"] == rows[prefix + "prediction"]).astype(float)
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


def over_all(predictions: pd.DataFrame, name: str, value: float, n: int, asked: int) -> float:
    """Score over all `asked` questions, of which `n` were answered with the mean `value`.

    A question without an answer is wrong. Of Count it costs what the majority's answer costs in the mean on the
    questions at hand or, without training questions, what a number from 1 to 10 at random does (NaN of the raw labels).
    """
    if n == asked:
        return value
    missing = 0.0
    if name.startswith("count_mse"):
        majority = outcomes(predictions, "majority").get(name)
        guessed = random_expectation(predictions).get(f"random_{name}", np.nan)
        missing = guessed if majority is None else majority.mean()
    return ((value * n if n else 0.0) + missing * (asked - n)) / asked


def coverage_table(predictions: pd.DataFrame, asked: Mapping[str, int] | None = None) -> pd.DataFrame:
    """How much of the test the model answered, and what that does to its score; one row a headline metric.

    asked: task -> all its test questions (`Corpus.asked`), those too that were left out; None: not known.

    Returns:
        indexed by metric: value (headline: over the answered questions; NaN without any), n, of, coverage (n / of),
        over all (see `over_all`). What is not known of `asked` is missing.
    """
    found, asked = outcomes(predictions), asked or {}
    rows = {}
    for name in HEADLINE:
        series, of = found.get(name, pd.Series(dtype=float)), asked.get(_task(name), np.nan)
        if len(series) or of > 0:
            value, n = float(series.mean()), len(series)
            rows[name] = (value, n, of, n / of, over_all(predictions, name, value, n, of))
    columns = ["value", "n", "of", "coverage", "over all"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).astype({"of": "Int64"})


def _task(metric: str) -> str:
    return metric.split("_")[0]


def metrics(predictions: pd.DataFrame, asked: Mapping[str, int] | None = None) -> dict[str, float]:
    """Every metric of every variant under its plain name (main) or `<variant>_<name>`, and `<task>_ece` for main.

    Of the headline metrics also `n_<name>` (questions that the model answered), `of_<name>` (all that are `asked`, by
    task: `Corpus.asked`) and, where these differ, `all_<name>` (see `over_all`).
    """
    values = {
        _prefix(variant) + name: float(series.mean())
        for variant in variant_names(predictions)
        for name, series in outcomes(predictions, variant).items()
    }
    for name, row in coverage_table(predictions, asked).iterrows():
        values[f"n_{name}"] = int(row["n"])
        if pd.notna(row["of"]):
            values[f"of_{name}"] = int(row["of"])
        if row["coverage"] < 1 and np.isfinite(row["over all"]):
            values[f"all_{name}"] = row["over all"]
    for task in TASKS:
        rows = predictions[predictions["task"] == task]
        if len(rows) and rows["confidence"].notna().any():
            values[f"{task}_ece"] = expected_calibration_error(calibration(rows))
    return values


SCORE_COLUMNS = ["metric", "variant", "value", "low", "high", "n", "of", "coverage", "over_all", "gifs", "convention"]


def metric_table(
    predictions: pd.DataFrame, resamples: int, seed: int, asked: Mapping[str, int] | None = None
) -> pd.DataFrame:
    """All metrics with 95 % bootstrap intervals by GIF, over the questions that were answered.

    asked: task -> all its test questions (`Corpus.asked`), those too that were left out; None: not known.

    Returns:
        `SCORE_COLUMNS`: n are the answered questions, of those asked, coverage n / of, over_all the score over them
        all (see `over_all`; none of shuffled GIFs, where a question without a partner is no fault). A task of which
        nothing could be answered has one row, without a value.
    """
    rows, asked = [], asked or {}
    for variant in variant_names(predictions):
        for name, series in outcomes(predictions, variant).items():
            gifs, n, of = predictions.loc[series.index, "gif_sha256"], len(series), asked.get(_task(name), np.nan)
            low, high = bootstrap_interval(series, gifs, resamples, seed)
            every = np.nan if variant.startswith("shuffled") else over_all(predictions, name, series.mean(), n, of)
            told = (gifs.nunique(), CONVENTIONS[name])
            rows.append((name, variant, series.mean(), low, high, n, of, n / of, every, *told))
    lost = coverage_table(predictions, asked).query("n == 0")
    for name, row in lost.iterrows():
        nothing = (np.nan, np.nan, np.nan, 0, row["of"], 0.0, row["over all"], 0)
        rows.append((name, "main", *nothing, CONVENTIONS[name]))
    return pd.DataFrame(rows, columns=SCORE_COLUMNS).astype({"of": "Int64"})


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
