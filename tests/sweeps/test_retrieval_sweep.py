"""The ten experiments by the report's own numbers, the changed factors, and a sweep that goes on where it was."""

import math

import numpy as np
import pytest

from helpers.config import RetrievalConfig
from helpers.models.retrieval.heads import RetrievalHead
from helpers.stage.pace import DeadlineReached
from helpers.sweeps import retrieval as sweep
from helpers.sweeps.retrieval import MEASURES, Row, changed, factors, presets, run_heads
from helpers.sweeps.runs import ablation_table
from helpers.training.retrieval import TextVideo, similarity
from tests.training.test_training_retrieval import mrr, world

# layers, learning rate, batch size, epochs, precision as the report prints them; pairs, loss and where as it says
REPORT = [
    ([4096, 4096], 0.001, 32, 30, 64, 1, "mse", "before"),
    ([4096, 4096], 0.001, 32, 30, 64, 20, "mse", "before"),
    ([4096, 2048, 1024, 1024, 512, 512], 0.001, 32, 100, 32, 20, "mse", "before"),
    ([4096, 2048, 1024, 1024, 512, 512], 0.001, 32, 500, 32, 20, "mse", "before"),
    ((6, 8), 0.001, 32, 10, 64, 1, "mse", "before"),
    ((6, 8), 0.001, 32, 10, 64, 20, "mse", "before"),
    ((6, 8), 0.001, 32, 100, 64, 20, "mse", "before"),
    ((6, 8), 0.001, 32, 5, 64, 20, "margin", "before"),
    ((6, 8), 0.00001, 32, 5, 64, 20, "margin", "before"),
    ((6, 8), 0.00001, 32, 5, 64, 20, "margin", "after"),
]


def test_the_presets_are_the_reports_ten():
    rows = presets()
    assert [int(label.split()[0]) for label in rows] == list(range(1, 11))
    for row, (layers, rate, batch, epochs, bits, pairs, loss, read) in zip(rows.values(), REPORT, strict=True):
        config = changed(RetrievalConfig(), row.values)
        assert (config.learning_rate, config.batch_size, config.epochs) == (rate, batch, epochs)
        assert (config.pairs, config.loss, row.read, row.told["study_bits"]) == (pairs, loss, read, bits)
        assert not config.decay and config.warmup_ratio == 0
        if isinstance(layers, tuple):
            assert config.head == "transformer" and (config.layers, config.heads) == layers
        else:
            assert config.head == "mlp" and [4096 * times for times in config.widths] == layers
            small = RetrievalHead(config, 256, 256).text_tower.layers
            assert [m.in_features for m in small if hasattr(m, "in_features")] == [256, *(n // 16 for n in layers)]


def test_one_factor_is_changed_at_a_time():
    config = RetrievalConfig(epochs=16.0)
    rows = factors(config)
    assert [label for label, row in rows.items() if not row.values] == ["own"]
    assert {"loss: mse", "loss: margin, 1:1 pairs", "batch: 32", "standardised: False", "masked: False"} < {*rows}
    for label, row in rows.items():
        own = changed(config, row.values)
        moved = {key for key, value in own.model_dump().items() if value != getattr(config, key)}
        beside = {"batch": {"epochs"}, "loss": {"pairs"}}.get(label.split(":")[0], set())
        assert len(moved - beside) == (label != "own"), label
    assert rows["batch: 32"].values == {"batch_size": 32, "epochs": 2.0}  # as many steps


def load(read: str, pooled: bool) -> tuple[TextVideo, TextVideo]:
    return world(20, 2, pooled=pooled), world(12, 2, pooled=pooled, seed=1)


def test_a_sweep_is_measured_before_and_after_and_goes_on(tmp_path, monkeypatch):
    rows = {
        "1 pairs": Row({"loss": "mse", "pairs": 2, "epochs": 30.0}, told={"study_bits": 64}),
        "own": Row({}),
    }
    config = RetrievalConfig(epochs=2.0, batch_size=16, learning_rate=3e-3)
    seen, real = [], sweep.train_head

    def train_head(data, own, place, **options):
        seen.append(place.name)
        monkeypatch.setenv("SUITE_PROBE_STEPS", "1" if len(seen) == 2 else "inf")
        return real(data, own, place, **options)

    monkeypatch.setattr(sweep, "train_head", train_head)
    with pytest.raises(DeadlineReached, match=r"time is up at 'own', seed 0, step 1 of 6; run again to go on"):
        run_heads(rows, load, config, tmp_path, most_epochs=3)
    table, histories = run_heads(rows, load, config, tmp_path, most_epochs=3)
    assert seen == ["1_pairs-0", "own-0"] * 2
    assert table["row"].tolist() == ["1 pairs", "own"] and table["study_bits"].tolist()[0] == 64
    assert table[["epochs_run", "epochs_asked"]].values.tolist() == [[3, 30], [2, 2]]
    test = load("before", True)[1]
    for place, row in zip(("1_pairs-0", "own-0"), table.itertuples(), strict=True):
        result = real(load("", True)[0], changed(config, rows[row.row].values | {"epochs": row.epochs_run}),
                      tmp_path / place, progress=False)  # fmt: skip
        assert mrr(test, similarity(test, result.head)) == pytest.approx(row.MRR)
        assert row.constant_loss == result.constant_loss and len(histories[f"{row.row}, 0"]) == row.steps
        assert math.isnan(row.before_MRR)  # the widths differ
    assert len(ablation_table(table, MEASURES)) == 2


def test_before_is_the_cosine_of_the_embeddings_themselves():
    data = world(12, 2)
    same = TextVideo(data.text[:, :10], data.video, data.video_of, data.relevant)
    cosines = [[np.dot(t, v) / np.linalg.norm(t) / np.linalg.norm(v) for v in same.video] for t in same.text]
    assert sweep.measure(similarity(same), same)["MRR"] == pytest.approx(mrr(same, np.array(cosines)))
