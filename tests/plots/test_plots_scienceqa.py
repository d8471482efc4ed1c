"""Figures of notebook 05: titles, labelled axes, and what they show."""

import numpy as np
import pandas as pd
import pytest

from helpers.corpora import diagrams
from helpers.corpora.scienceqa import load
from helpers.plots import scienceqa as figures


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    return load(diagrams.write(tmp_path_factory.mktemp("d") / "w", seed=2, train=1, val=1, test=12)).problems


def texts(figure):
    return " ".join(text.get_text() for axis in figure.axes for text in [*axis.texts, axis.title])


def test_the_drawing_names_the_numbers():
    figure = figures.architecture((64, 16), 4, 0.1)
    assert "64 + 16 positions" in texts(figure) and "4 blocks" in texts(figure) and "drops 10%" in texts(figure)
    assert "drops nothing" in texts(figures.architecture((64,), 4, 0.0))


def test_examples_show_question_choices_and_the_right_one(problems):
    figure = figures.example_questions(problems.head(5))
    assert len(figure.axes) == 10
    for row, axis in zip(problems.head(5).to_dict("records"), figure.axes[5:], strict=True):
        shown = axis.texts[0].get_text()
        right = next(line for line in shown.splitlines() if line.endswith("<- right"))
        assert right.startswith(f"({'ABCDE'[row['answer']]}) {row['choices'][row['answer']]}")
    with pytest.raises(ValueError, match="no problems"):
        figures.example_questions(problems.head(0))


def test_bars_are_the_accuracies():
    scored = {
        "": {"image": (9, 10, 60.0, 98.0), "text": (4, 5, 40.0, 96.0), "all": (13, 15, 62.0, 96.0)},
        "text_only": {"image": (4, 10, 17.0, 69.0), "text": (5, 5, 57.0, 100.0), "all": (9, 15, 36.0, 80.0)},
    }
    figure = figures.accuracy_bars(scored, {"": "model", "text_only": "twin"}, 40.0)
    axis = figure.axes[0]
    assert [round(bar.get_height(), 1) for bar in axis.patches] == [90.0, 80.0, 86.7, 40.0, 100.0, 60.0]
    assert axis.get_title() and axis.get_xlabel() and "(%)" in axis.get_ylabel()
    assert "n = 10" in axis.get_xticklabels()[0].get_text()


def test_ablation_shows_means_and_intervals():
    table = pd.DataFrame({"row": ["base", "+ CLS"], "seeds": [3, 3], "parameters": [1, 2]})
    table = table.assign(accuracy=[50.0, 60.0], image=[40.0, 55.0], image_low=[35.0, 50.0], image_high=[45.0, 60.0])
    axis = figures.ablation(table, "ladder").axes[0]
    line, _, bars = axis.containers[0]
    assert line.get_xdata().tolist() == [40.0, 55.0]
    assert bars[0].get_segments()[0][:, 0].tolist() == [35.0, 45.0]
    assert "ladder" in axis.get_title() and "(%)" in axis.get_xlabel() and axis.get_ylabel()
    with pytest.raises(ValueError, match="no rows"):
        figures.ablation(table.head(0), "ladder")


def test_regions_are_drawn_over_the_image_at_its_size(problems):
    seen = problems[problems["image"] != ""].head(2)
    looks, worth = [np.full((8, 8), 1 / 64), np.eye(8) / 8], [np.zeros((8, 8)), 0.5 * np.tri(8) - 0.1]
    figure = figures.regions_over_images(seen, looks, worth, ["north", "fox"])
    for axis, expected in ((figure.axes[3], 100 * np.eye(8) / 8), (figure.axes[5], 100 * np.tri(8))):
        overlay = axis.images[1]
        assert tuple(overlay.get_extent()) == (0, 64, 64, 0)
        assert np.allclose(overlay.get_array(), expected)
    assert all(axis.get_xlabel() == "pixels" for axis in figure.axes[:6])
    assert all("%" in axis.get_ylabel() for axis in figure.axes[6:])
    assert "0.00 nats" in figure.axes[4].get_title() and "0.40 nats" in figure.axes[5].get_title()
    shaken = figures.regions_over_images(seen, looks, [0.002 * np.eye(8), np.eye(8)], ["north", "fox"])
    assert [shaken.axes[i].images[1].get_array().max() for i in (4, 5)] == pytest.approx([20, 100])
    with pytest.raises(ValueError, match="no problem has an image"):
        figures.regions_over_images(seen.head(0), [], [], [])
