"""Baselines of GIF question answering: majority, shuffled GIFs, guessing and rules that read the text alone."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import pandas as pd

from helpers.corpora.tasks import (
    MAX_COUNT,
    MULTIPLE_CHOICE,
    TASKS,
    answer_key,
    bare,
    question_form,
    question_key,
    round_count,
)


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
            predictions[rows.index] = [max(options, key=lambda o: right[bare(o)]) for options in rows["options"]]
        else:
            predictions[rows.index] = right.most_common(1)[0][0]
    return pd.DataFrame({"question_id": questions["question_id"], "prediction": predictions})


LENGTH_BINS = 5  # quintiles: some hundred training questions a bin and task even in the built-in world


def predict_from_length(train: pd.DataFrame, questions: pd.DataFrame) -> pd.DataFrame:
    """Answers of a system that knows how many frames a GIF's file has, and nothing else of it.

    Count: the least-squares line of the training counts over `num_frames`, rounded. The other tasks: what
    `predict_majority` says with the training questions about GIFs of like length alone, in `LENGTH_BINS` quantiles of
    the training lengths; where such a bin is empty, with all of them.

    Returns:
        columns question_id and prediction; tasks that `train` lacks get no prediction.
    """
    predictions = pd.Series(None, index=questions.index, dtype=object)
    for task in TASKS:
        known, asked = train[train["task"] == task], questions[questions["task"] == task]
        if known.empty or asked.empty:
            continue
        if task == "count":
            design = np.stack([np.ones(len(known)), known["num_frames"]], axis=1)
            start, slope = np.linalg.lstsq(design, known["label"].clip(lower=1).to_numpy(float), rcond=None)[0]
            predictions[asked.index] = [str(round_count(start + slope * frames)) for frames in asked["num_frames"]]
            continue
        edges = np.quantile(known["num_frames"], np.arange(1, LENGTH_BINS) / LENGTH_BINS)
        bins, of_known = (np.searchsorted(edges, rows["num_frames"]) for rows in (asked, known))
        for number in np.unique(bins):
            rows, alike = asked[bins == number], known[of_known == number]
            answers = predict_majority(alike if len(alike) else known, rows)["prediction"]
            predictions[rows.index] = answers
    return pd.DataFrame({"question_id": questions["question_id"], "prediction": predictions})


def shuffled_bounds(predictions: pd.DataFrame) -> dict[str, dict[str, pd.Series]]:
    """What two systems without the right GIF score per shuffled question, in expectation.

    A partner has another answer (`shuffle_gifs`), so that shuffling does not lead to chance: who reads the wrong GIF
    well is wrong for that very reason.

    predictions: a table with `shuffled_seen_gif_sha256`, the partners.

    Returns:
        by system and headline metric a series over the questions with a partner.
        "shuffled_floor" says what is true of the partner: its answer to the same text or, without one, form of
        question; where that answer is none of the options, one of them at random.
        "shuffled_prior" sees no GIF: it says one of the answers that the table's questions of that text or form have,
        each as often as it occurs (choices: of those among the options).
        Accuracies are probabilities of the right answer, count_mse is the expected squared error.
    """
    counted: dict[tuple, Counter] = defaultdict(Counter)
    rows = predictions.assign(key=predictions["question"].map(question_key))
    for row in rows.itertuples():
        for gif in (row.gif_sha256, None):  # None: whatever the GIF
            counted["text", row.task, row.key, gif][answer_key(row)] += 1
            counted["form", row.task, row.type, gif][answer_key(row)] += 1
    values: dict[str, dict[str, dict]] = {"shuffled_floor": defaultdict(dict), "shuffled_prior": defaultdict(dict)}
    for row in rows[rows["shuffled_seen_gif_sha256"].notna()].itertuples():
        partner, own, options = row.shuffled_seen_gif_sha256, answer_key(row), {bare(o) for o in row.options}
        key = ("text", row.task, row.key)
        if (*key, partner) not in counted:
            key = ("form", row.task, row.type)
        told, prior = counted[*key, partner], counted[*key, None]
        if row.task == "count":
            name, floor, blind = "count_mse", _mean_squared_error(told, own), _mean_squared_error(prior, own)
        elif row.task in MULTIPLE_CHOICE:
            name, unoffered = f"{row.task}_accuracy", sum(told[answer] for answer in told if answer not in options)
            floor = unoffered / told.total() / len(row.options)
            blind = prior[own] / sum(prior[option] for option in options)
        else:
            name, floor, blind = "frameqa_accuracy", 0.0, prior[own] / prior.total()
        values["shuffled_floor"][name][row.Index] = floor
        values["shuffled_prior"][name][row.Index] = blind
    return {
        system: {name: pd.Series(found, dtype=float) for name, found in by_metric.items()}
        for system, by_metric in values.items()
    }


def _mean_squared_error(counted: Counter, own: str) -> float:
    return sum(n * (float(answer) - float(own)) ** 2 for answer, n in counted.items()) / counted.total()


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
            table[key(question)][bare(answer)] += 1

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
    words = set(rows["frameqa"][0]["answer"].map(bare)) if "frameqa" in rows else set()
    values = random_expectation(questions, sorted(words))
    for task, (known, asked) in rows.items():
        if task == "frameqa":
            for by in ("form", "question"):
                right = majority_by(known, asked, by) == asked["answer"].map(bare)
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
    words = questions.loc[questions["task"] == "frameqa", "answer"].map(bare)
    if len(words) and vocabulary:
        known = {bare(word) for word in vocabulary}
        values["random_frameqa_accuracy"] = float(words.isin(known).mean() / len(known))
    return values
