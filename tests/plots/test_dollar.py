"""Dollar signs of people and models are drawn as they stand, in every figure that takes their texts."""

import ast
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from PIL import Image

from helpers import plots
from helpers.plots import scienceqa
from helpers.runner import overview, quota

TEXTS = ["a $5 apple or a $10 pear ?", "costs 5 $", r"$\frac{", r"\$5 or $x^$"]
FRAMES = np.zeros((4, 16, 16, 3), np.uint8)


def problems(text: str, folder: Path) -> pd.DataFrame:
    """One problem of ScienceQA that is all `text`."""
    image = folder / "red.png"
    Image.new("RGB", (32, 32), "red").save(image)
    row = {"image": str(image), "question": text, "subject": text, "grade": text, "choices": [text, text], "hint": text}
    return pd.DataFrame([row | {"answer": 0}])


def gallery(text, folder):
    row = {"task": "action", "question": text, "options": [text, "spin"], "answer": text, "label": 0}
    return plots.gallery(pd.DataFrame([row | {"prediction": text, "right": True, "confidence": 0.5}]), [FRAMES])


def types(text, folder):
    row = {"metric": "frameqa_accuracy", "variant": "main", "value": 0.5, "n": 4, "gifs": 2, "low": 0.4, "high": 0.6}
    return plots.accuracy_by_type(pd.DataFrame([row | {"group": text}]))


def ablation(text, folder):
    row = {"row": text, "seeds": 3, "accuracy": 50.0, "image": 40.0, "image_low": 35.0, "image_high": 45.0}
    return scienceqa.ablation(pd.DataFrame([row]), text)


def way(text, folder):
    row = {"expected min": 1.0, "state": "done", "GPU": "no"}
    return overview.plot_way(pd.DataFrame([row], index=[text]), text)


def weeks(text, folder):
    return quota.quota_weeks([quota.Piece(1, text, 0.0, 60.0, True, 0.0, 60.0)], 30.0, 0.0)


# figure: how it is drawn with a text, and how many times that text stands in it
FIGURES = {
    "gallery": (gallery, 4),
    "answer": (
        lambda text, folder: plots.answer_overview(
            text, [(text, 0.6), ("no", 0.4)], text, FRAMES, [0, 1, 2, 3], [0.1, 0.2, 0.3, 0.4], blind=(text, 0.5)
        ),
        4,
    ),
    "frames": (
        lambda text, folder: plots.frames_overview(
            pd.DataFrame({"num_frames": [3], "duration_ms": [300.0]}), [FRAMES], [text]
        ),
        1,
    ),
    "features": (
        lambda text, folder: plots.features_overview(
            np.array([4]), [np.eye(4, dtype=np.float16)], [np.arange(4)], [text]
        ),
        1,
    ),
    "types": (types, 1),
    "problems": (lambda text, folder: scienceqa.example_questions(problems(text, folder)), 6),
    "regions": (
        lambda text, folder: scienceqa.regions_over_images(
            problems(text, folder), [np.full((4, 4), 1 / 16)], [np.zeros((4, 4))], [text]
        ),
        2,
    ),
    "bars": (
        lambda text, folder: scienceqa.accuracy_bars({"": {"all": (1, 2, 10.0, 90.0)}}, {"": text}, 40.0),
        1,
    ),
    "ablation": (ablation, 1),
    "way": (way, 2),
    "weeks": (weeks, 1),
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", FIGURES)
def test_dollar_signs_are_drawn_as_they_stand(name, text, tmp_path, monkeypatch):
    """What reaches the renderer is the text itself, and none of it as mathematics."""
    drawn = []

    def draw_text(self, gc, x, y, s, prop, angle, ismath=False, mtext=None):
        drawn.append((s, ismath))

    draw, times = FIGURES[name]
    figure = draw(text, tmp_path)
    monkeypatch.setattr(RendererAgg, "draw_text", draw_text)
    monkeypatch.setattr(RendererAgg, "draw_mathtext", lambda *a, **k: pytest.fail("mathematics"))
    FigureCanvasAgg(figure).draw()
    assert not [s for s, ismath in drawn if ismath]
    page = "".join(s for s, _ in drawn).replace(" ", "")  # lines of a wrapped text are drawn one by one
    page = page.replace("\\\\", "\\")  # a quoted answer doubles its backslashes
    assert page.count(text[:19].replace(" ", "")) >= times, page  # long answers are cut there
    assert "\\" in text or "\\" not in page  # no sign of escaping is left


def test_dollar_signs_are_escaped_in_one_room():
    """No other file of helpers knows how matplotlib wants a dollar sign."""
    helpers = Path(plots.__file__).resolve().parents[1]
    found = {
        path.relative_to(helpers).as_posix()
        for path in helpers.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "replace" and node.args
        if getattr(node.args[0], "value", "") == "$"
    }
    assert found == {"plots/look.py"}
