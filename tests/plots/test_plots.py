"""Every figure can be read: titles, labelled axes with units, nothing cut off, the numbers of the table."""

import numpy as np
import pandas as pd
import pytest

from helpers import plots


def table(variants, metrics=("frameqa_accuracy", "action_accuracy", "count_mse"), groups=None) -> pd.DataFrame:
    """Rows as `scoring.metric_table` (groups None) or `scoring.breakdown` make them."""
    rows = []
    for k, variant in enumerate(variants):
        for metric in metrics:
            for j, group in enumerate(groups or [None]):
                value = 3.0 + k if metric == "count_mse" else 0.9 - 0.2 * k - 0.05 * j
                row = {
                    "metric": metric,
                    "variant": variant,
                    "value": value,
                    "n": 12,
                    "of": 12,
                    "coverage": 1.0,
                    "gifs": 6,
                }
                rows.append(row | {"low": value * 0.9, "high": value * 1.05} | ({"group": group} if groups else {}))
    return pd.DataFrame(rows)


def gallery_figure():
    rows = [
        ("count", "how many times does it jump ?", [], "0", 0, "2", False),
        ("action", "what does the $5 note do ?", ["jump", "spin"] * 12, "jump", 0, "spin", False),
        ("frameqa", "what color is it ? " * 20, [], "red", -1, "red", True),
    ]
    columns = ["task", "question", "options", "answer", "label", "prediction", "right"]
    examples = pd.DataFrame(rows, columns=columns).assign(confidence=0.5)
    frames = [np.random.default_rng(n).integers(0, 255, (n, 32, 32, 3), dtype=np.uint8) for n in (1, 5, 40)]
    return plots.gallery(examples, frames)


def reliability_figure():
    bins = pd.DataFrame(
        {"low": [0.2, 0.9], "high": [0.3, 1.0], "n": [4, 9], "confidence": [0.25, 0.95], "accuracy": [0.5, 1.0]}
    )
    return plots.reliability({"frameqa": bins, "count": bins}, {"frameqa": 0.1, "count": 0.2})


BINS = ["17-32", "33-48", "49 or more"]
FIGURES = {
    "loss": lambda: plots.loss_curve(pd.DataFrame({"step": [1, 2, 3], "loss": [3.0, 2.0, 1.5]})),
    "loss so far": lambda: plots.loss_curve(pd.DataFrame({"step": [1, 2], "loss": [3.0, 2.0]}), steps=40),
    "scores": lambda: plots.scores_with_baselines(table(["main", "blind", "shuffled", "majority", "groups_1"])),
    "one task": lambda: plots.scores_with_baselines(table(["main", "majority"], ["count_mse"])),
    "types": lambda: plots.accuracy_by_type(table(["main", "blind"], ["frameqa_accuracy"], ["color", "object"])),
    "lengths": lambda: plots.accuracy_by_length(table(["main"], groups=["1-16", *BINS])),
    "groups": lambda: plots.groups_comparison(table(["groups_1", "groups_2"], groups=BINS)),
    "reliability": reliability_figure,
    "gallery": gallery_figure,
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_have_titles_and_axis_labels(name, tmp_path):
    figure = FIGURES[name]()
    title = figure.get_suptitle()
    drawn = [axis for axis in figure.axes if axis.has_data()]
    assert drawn
    for axis in drawn:
        title = title or axis.get_title()
        if name != "gallery":
            assert axis.get_xlabel() or axis.get_subplotspec().rowspan.stop < axis.get_gridspec().nrows, "no x label"
            assert axis.get_ylabel() or axis.get_subplotspec().colspan.start > 0, "no y label"
    assert title
    path = plots.save_figure(figure, tmp_path / "figures" / f"{name}.png")
    assert path.stat().st_size > 3000


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_is_cut_off(name):
    figure = FIGURES[name]()
    figure.draw_without_rendering()
    width, height = figure.bbox.size
    texts = [figure._suptitle] if figure.get_suptitle() else []
    for axis in figure.axes:
        texts += [axis.title, axis._left_title, axis.xaxis.label, axis.yaxis.label]
    for text in (text for text in texts if text.get_text()):
        box = text.get_window_extent()
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, text.get_text()


def test_bars_show_the_values_and_only_known_variants():
    figure = plots.scores_with_baselines(table(["main", "blind", "groups_1"]))
    accuracy, count = figure.axes[:2]
    assert sorted(round(bar.get_height()) for bar in accuracy.patches) == [70, 70, 90, 90]  # percent
    assert [bar.get_height() for bar in count.patches] == [3.0, 4.0]  # squared error, not percent
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["model", "blind (no video)"]


def test_the_floor_crosses_the_bar_of_shuffled_gifs_alone_and_missing_questions_are_told():
    rows = table(["main", "shuffled", "shuffled_floor"], ["action_accuracy"])
    rows.loc[rows["variant"] == "main", ["n", "of", "coverage"]] = [12, 15, 0.8]
    axis = plots.scores_with_baselines(rows).axes[0]
    (floor,) = (c for c in axis.collections if c.get_linestyle()[0][1] is not None)
    ((start, height), (end, _)) = floor.get_segments()[0]
    _, bar = axis.patches
    assert height == pytest.approx(100 * 0.5)  # of the row shuffled_floor
    assert start <= bar.get_x() and bar.get_x() + bar.get_width() <= end < 2 * bar.get_width() + bar.get_x()
    assert len(axis.patches) == 2
    assert axis.get_xticklabels()[0].get_text() == "Action\n(n = 12\nof 15)"


def test_intervals_are_drawn_where_the_table_has_them():
    rows = table(["main"], ["frameqa_accuracy"])
    axis = plots.scores_with_baselines(rows).axes[0]
    segment = next(c for c in axis.collections if len(c.get_segments())).get_segments()[0]
    assert segment[:, 1] == pytest.approx([100 * rows.loc[0, "low"], 100 * rows.loc[0, "high"]])


def test_a_gallery_says_right_or_wrong_and_what_counts_as_the_answer():
    figure = gallery_figure()
    captions = [axis.get_title(loc="left") for axis in figure.axes]
    assert "wrong: says '2' (confidence 0.50), answer '1'" in captions[0]  # the code 0 counts as once
    assert "options: jump | spin" in captions[1] and r"\$5" in captions[1]
    assert "right: says 'red'" in captions[2]
    with pytest.raises(ValueError, match="frames of 1"):
        plots.gallery(pd.DataFrame({"task": ["count", "count"]}), [np.zeros((1, 4, 4, 3), np.uint8)])


def test_nothing_to_draw_is_said():
    empty = table(["main"]).iloc[:0]
    for draw in (
        plots.scores_with_baselines,
        plots.accuracy_by_type,
        plots.accuracy_by_length,
        plots.groups_comparison,
    ):
        with pytest.raises(ValueError, match="nothing to draw"):
            draw(empty)


def test_the_frames_overview_shows_every_gif_and_every_strip():
    info = pd.DataFrame({"num_frames": [3, 20, 60], "duration_ms": [300.0, 2000.0, 6000.0]})
    strips = [np.full((n, 8, 8, 3), n, np.uint8) for n in (3, 60)]
    figure = plots.frames_overview(info, strips, ["short", "costs $5"])
    frames, seconds, first, second = figure.axes
    assert sum(bar.get_height() for bar in frames.patches) == sum(bar.get_height() for bar in seconds.patches) == 3
    assert (frames.get_xlabel(), seconds.get_xlabel()) == ("frames in the file", "duration (s)")
    assert [axis.get_title(loc="left") for axis in (first, second)] == ["short", r"costs \$5"]
    assert first.images[0].get_array().shape[0] == 8
    with pytest.raises(ValueError, match="one name a strip"):
        plots.frames_overview(info, strips, ["short"])


def test_the_features_overview_shows_cosines_without_the_mean_frame():
    values = np.array([[3, 1], [1, 1], [3, 1]], np.float16)  # around their mean: +, -, + along one axis
    figure = plots.features_overview(np.array([3, 16]), [values], [np.array([0.0, 100.0, 2000.0])], ["a"])
    histogram, similarity = figure.axes[:2]
    assert sum(bar.get_height() for bar in histogram.patches) == 2
    expected = [[1, -1, 1], [-1, 1, -1], [1, -1, 1]]
    np.testing.assert_allclose(similarity.images[0].get_array(), expected, atol=1e-6)
    assert [tick.get_text() for tick in similarity.get_xticklabels()] == ["0.0", "0.1", "2.0"]


def test_loss_so_far_stands_on_an_axis_as_long_as_the_run():
    axes = FIGURES["loss so far"]().axes[0]
    assert axes.get_xlim() == (0, 40) and axes.lines[0].get_ydata().tolist() == [3.0, 2.0]
