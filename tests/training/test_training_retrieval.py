"""Training of a retrieval head: batches by loops, that it learns, and that it goes on bit for bit."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.sparse import csr_array

from helpers.config import RetrievalConfig
from helpers.models.retrieval.heads import RetrievalHead
from helpers.models.retrieval.losses import info_nce
from helpers.training.checkpoints import CheckpointError
from helpers.training.collective import TrainingError
from helpers.training.engine import AdapterTrainer
from helpers.training.retrieval import (
    BEST,
    MRR,
    Aligner,
    Collator,
    TextVideo,
    calibrate,
    draw_pairs,
    equal_text,
    plan_steps,
    similarity,
    split_videos,
    train_head,
)

SMALL = {"batch_size": 16, "epochs": 8.0, "learning_rate": 3e-3, "heads": 2, "layers": 1, "validation_share": 0.2}


def config(**keys) -> RetrievalConfig:
    return RetrievalConfig(**SMALL | keys)


def world(videos: int = 40, texts: int = 3, *, pooled: bool = True, seed: int = 0) -> TextVideo:
    """Texts and videos that share what they are about, each behind a projection and an offset of its own."""
    maps, rng = np.random.default_rng(7), np.random.default_rng(seed)
    about = rng.normal(size=(videos, 6))
    to_text, to_video = maps.normal(size=(6, 12)), maps.normal(size=(6, 10))
    video_of = np.repeat(np.arange(videos), texts)

    def noise(shape):
        return 0.1 * rng.normal(size=shape)

    text = about[video_of] @ to_text + noise((len(video_of), 12)) + 3
    video = about @ to_video + noise((videos, 10)) - 2
    text, video = text.astype(np.float32), video.astype(np.float32)
    if not pooled:
        text = [np.stack([row] * length) for row, length in zip(text, rng.integers(2, 6, len(text)), strict=True)]
        video = np.stack([video] * 4, axis=1)
    own = csr_array((np.ones(len(video_of), dtype=bool), (np.arange(len(video_of)), video_of)))
    return TextVideo(text, video, video_of, own)


def mrr(data: TextVideo, scores: np.ndarray) -> float:
    """Mean reciprocal rank of each text's own video, counted one by one."""
    total = 0.0
    for text, video in enumerate(data.video_of):
        better = sum(scores[text, other] > scores[text, video] for other in range(len(data.video)))
        equal = sum(scores[text, other] == scores[text, video] for other in range(len(data.video))) - 1
        total += 1 / (1 + better + equal / 2)
    return total / len(data.video_of)


class Stop(Exception):
    """Stands for a crash in the middle of a step."""


@contextmanager
def crash_at(step: int) -> Iterator[None]:
    """Training dies in the middle of this step."""
    original = AdapterTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise Stop
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(AdapterTrainer, "training_step", training_step)
        yield


def test_texts_of_the_same_words_fit_each_others_videos():
    texts, video_of = ["A cat", "a dog", "a  CAT ", "a bird"], [0, 1, 2, 0]
    found = equal_text(texts, np.array(video_of), 3).toarray()
    for row, text in enumerate(texts):
        same = {video_of[i] for i, other in enumerate(texts) if other.lower().split() == text.lower().split()}
        assert set(np.flatnonzero(found[row])) == same
    assert found.dtype == bool


def test_no_video_is_on_both_sides_of_the_split():
    data = world(20, 2)
    trained, held = split_videos(data, 0.25, seed=3)
    assert (len(trained.video), len(held.video), len(trained.text), len(held.text)) == (15, 5, 30, 10)
    rows = [{row.tobytes() for row in part.video} for part in (trained, held)]
    assert not rows[0] & rows[1] and len(rows[0] | rows[1]) == 20
    for part in (trained, held):
        for text, video in enumerate(part.video_of):
            place = [row.tobytes() for row in data.text].index(part.text[text].tobytes())
            assert part.video[video].tobytes() == data.video[data.video_of[place]].tobytes()
            assert part.relevant.toarray()[text].nonzero()[0].tolist() == [video]
    assert split_videos(data, 0.0, seed=3) == (data, None)


def test_pairs_are_as_many_positive_as_negative_and_no_false_negative_is_drawn():
    data = world(6, 3)
    fits = data.relevant.toarray()
    fits[:, 0] = True  # every text is true of the first video
    fits[0, 1] = True
    data = TextVideo(data.text, data.video, data.video_of, csr_array(fits))
    for pairs, mask in ((1, True), (2, True), (5, True), (2, False)):
        drawn = draw_pairs(data, config(loss="mse", pairs=pairs, mask=mask))
        for video in range(6):
            own = [text for text, v, label in drawn if v == video and label]
            other = [text for text, v, label in drawn if v == video and not label]
            assert len(set(own)) == len(own) == min(pairs, 3) and all(data.video_of[text] == video for text in own)
            assert all(data.video_of[text] != video for text in other)
            assert len(other) == (0 if mask and video == 0 else len(own))
            assert not mask or not any(fits[text, video] for text in other)


def test_an_epoch_passes_over_every_item_once_in_batches_of_like_size():
    data = world(11, 3)
    plan = plan_steps(data, config(epochs=2.5))
    sizes = [len(batch) for batch in plan]
    assert sizes == [11, 11, 11] * 2 + [11, 11] and plan.epoch_ends == {3, 6, 8}
    for start in (0, 3):
        seen = [item for batch in plan.batches[start : start + 3] for item in batch]
        assert sorted(seen) == [(text, int(video), True) for text, video in enumerate(data.video_of)]
    assert plan.batches[0] != plan.batches[3] and plan.epoch_after[-1] == 2.5 and plan.waste == 1
    ragged = world(4, 2, pooled=False)
    [batch] = plan_steps(ragged, config(epochs=1.0)).batches
    lengths = [len(ragged.text[text]) for text, _, _ in batch]
    assert plan_steps(ragged, config(epochs=1.0)).padded_tokens.tolist() == [8 * (max(lengths) + 4)]


@torch.no_grad()
def test_a_batch_is_all_against_all_with_false_negatives_left_out():
    data = world(5, 2)
    fits = data.relevant.toarray()
    fits[3, 4] = True
    data = TextVideo(data.text, data.video, data.video_of, csr_array(fits))
    items = [(0, 0, True), (3, 1, True), (8, 4, True), (9, 4, True)]
    batch = Collator(data, config())(items)
    expected = [[i == j or not fits[text, other] for j, (_, other, _) in enumerate(items)]
                for i, (text, _, _) in enumerate(items)]  # fmt: skip
    assert batch["counted"].tolist() == expected and not expected[1][2] and not expected[2][3]
    assert batch["positive"].tolist() == np.eye(4, dtype=bool).tolist()
    assert Collator(data, config(mask=False))(items)["counted"].all()
    model = Aligner(RetrievalHead.build(config(), *data.widths).eval())
    texts, videos = model.head.text(batch["text"]), model.head.video(batch["video"])
    cosines = torch.tensor([[float(t @ v) for v in videos] for t in texts])
    loss = info_nce(cosines, batch["positive"], batch["counted"], 1 / 0.07)
    assert model(**batch)["loss"].item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    "keys", [{"head": "linear"}, {"widths": [4.0]}, {"head": "transformer", "learning_rate": 2e-3, "epochs": 12.0}]
)
def test_infonce_finds_what_belongs_together(tmp_path, keys):
    pooled = keys.get("head") != "transformer"
    data, test = world(80, 3, pooled=pooled), world(40, 2, pooled=pooled, seed=1)
    settings = config(**{"epochs": 15.0, "dropout": 0.0} | keys)
    result = train_head(data, settings, tmp_path, progress=False)
    untrained = train_head(data, settings, tmp_path / "none", deadline=0, progress=False).head
    before, after = mrr(test, similarity(test, untrained)), mrr(test, similarity(test, result.head))
    assert before < 0.3 and after > 3 * before and after > 0.6 and result.run.status == "complete"
    assert result.run.history["loss"].iloc[-5:].mean() < 0.6 * result.constant_loss
    assert result.constant_loss == pytest.approx(math.log(16), rel=0.05)


def test_pairs_with_mse_are_told_apart_and_the_constant_is_a_quarter(tmp_path):
    result = train_head(world(), config(loss="mse", pairs=3, decay=False), tmp_path, progress=False)
    assert result.constant_loss == pytest.approx(0.25, abs=0.01)
    assert result.run.history["loss"].iloc[-3:].mean() < 0.15
    rates = result.run.history["lr_head"]
    assert rates.iloc[-1] == rates.max() == SMALL["learning_rate"]
    cosine = train_head(world(), config(epochs=1.0), tmp_path / "cosine", progress=False).run.history["lr_head"]
    assert cosine.iloc[-1] < 0.2 * SMALL["learning_rate"]


def test_the_best_step_is_kept_by_the_mrr_of_held_out_videos(tmp_path):
    data = world()
    settings = config(learning_rate=0.1, epochs=6.0, decay=False)  # so high that it is not best at the end
    result = train_head(data, settings, tmp_path, progress=False)
    history = result.run.history
    ends = history[history[MRR].notna()]
    assert len(ends) == 6 and ends["eval_loss"].notna().all()
    assert result.best_step == ends["step"][ends[MRR].idxmax()] < len(history)
    _, held = split_videos(data, 0.2, seed=0)
    assert mrr(held, similarity(held, result.head)) == pytest.approx(ends[MRR].max(), abs=1e-9)
    last = load_file(sorted((tmp_path / "checkpoints").glob("step-*"))[-1] / "trainable.safetensors")
    best = load_file(tmp_path / BEST)
    assert any(not torch.equal(best[name], last[name]) for name in last)
    (tmp_path / BEST).unlink()
    with pytest.raises(CheckpointError, match=r"best\.safetensors, which held the head of the best step, is missing"):
        train_head(data, settings, tmp_path, progress=False)


@pytest.mark.parametrize("keys", [{}, {"loss": "mse", "pairs": 2}, {"head": "transformer"}])
def test_killed_and_resumed_to_the_same_bytes(tmp_path, keys):
    """Whole checkpoints at every step; the best step may lie before or behind the crash."""
    data = world(16, pooled=keys.get("head") != "transformer")
    settings = config(epochs=3.0, checkpoint_minutes=1e-9, **keys)
    whole = train_head(data, settings, tmp_path / "whole", progress=False)
    for crash in (1, whole.run.steps // 3 + 1, whole.run.steps - 1):
        folder = tmp_path / str(crash)
        with crash_at(crash):
            train_head(data, settings, folder, progress=False)
        torch.manual_seed(99)  # a new process starts with another state
        resumed = train_head(data, settings, folder, progress=False)
        assert resumed.run.history["loss"].tolist() == whole.run.history["loss"].tolist()
        assert (folder / BEST).read_bytes() == (tmp_path / "whole" / BEST).read_bytes()
        one, other = (sorted((part / "checkpoints").glob("step-*"))[-1] for part in (folder, tmp_path / "whole"))
        names = "trainable.safetensors"
        assert (one / names).read_bytes() == (other / names).read_bytes()
        assert resumed.best_step == whole.best_step and resumed.match == whole.match


def test_a_deadline_stops_it_and_other_settings_or_embeddings_are_refused(tmp_path, monkeypatch):
    data = world()
    monkeypatch.setenv("SUITE_PROBE_STEPS", "3")
    part = train_head(data, config(), tmp_path, encoder_key="one", progress=False).run
    assert (part.status, part.steps) == ("partial", 3)
    monkeypatch.delenv("SUITE_PROBE_STEPS")
    assert train_head(data, config(), tmp_path, encoder_key="one", deadline=0, progress=False).run.steps == 3
    with pytest.raises(CheckpointError, match=r"retrieval\.loss: 'infonce' in the checkpoint, 'sigmoid' now"):
        train_head(data, config(loss="sigmoid"), tmp_path, encoder_key="one", progress=False)
    with pytest.raises(CheckpointError, match=r"encoder_key: 'one' in the checkpoint, 'other' now"):
        train_head(data, config(), tmp_path, encoder_key="other", progress=False)
    with pytest.raises(CheckpointError, match="embeddings: "):
        train_head(world(seed=2), config(), tmp_path, encoder_key="one", progress=False)
    assert train_head(data, config(log_steps=7), tmp_path, encoder_key="one", progress=False).run.status == "complete"


def test_a_text_matches_nothing_below_the_threshold():
    """Two texts fit a video each, one fits none: best scores elsewhere are 0.3, 0.2 and 0.4."""
    scores = np.array([[0.9, 0.3], [0.2, 0.8], [0.4, 0.1]])
    match = calibrate(scores, csr_array(np.array([[True, False], [False, True], [False, False]])))
    nothing = [0.3, 0.2, 0.4]
    mean = sum(nothing) / 3
    assert match.mean == pytest.approx(mean)
    assert match.deviation == pytest.approx((sum((x - mean) ** 2 for x in nothing) / 3) ** 0.5)
    assert 0.4 < match.threshold <= 0.8
    assert calibrate(np.array([[0.9], [0.8]]), csr_array(np.array([[True], [True]]))) is None


def test_what_cannot_be_trained_on_is_named():
    data = world(4, 2)
    broken = data.text.copy()
    broken[5, 0] = np.nan
    with pytest.raises(TrainingError, match="1 text embeddings hold NaN or infinity, the first in row 5"):
        TextVideo(broken, data.video, data.video_of, data.relevant)
    with pytest.raises(TrainingError, match="a text is of video 9, and there are 4 videos"):
        TextVideo(data.text, data.video, np.array([9, *data.video_of[1:]]), data.relevant)
    with pytest.raises(TrainingError, match="7 text embeddings, 8 videos that they are of and relevance of 8"):
        TextVideo(data.text[:7], data.video, data.video_of, data.relevant)
    with pytest.raises(TrainingError, match="must both be pooled, or neither"):
        TextVideo(data.text, world(4, 2, pooled=False).video, data.video_of, data.relevant)
    with pytest.raises(TrainingError, match=r"\(12, 10\) numbers: they cannot be compared without a head"):
        similarity(data)


def test_without_a_head_the_means_are_compared():
    data = world(3, 2, pooled=False)
    same = TextVideo([row[:, :10] for row in data.text], data.video, data.video_of, data.relevant)
    found = similarity(same)
    for i, text in enumerate(same.text):
        for j, video in enumerate(same.video):
            t, v = np.mean(text, axis=0), np.mean(video, axis=0)
            assert found[i, j] == pytest.approx(t @ v / math.sqrt((t @ t) * (v @ v)), rel=1e-6)
