"""The report of a run: one HTML file with scores, figures, settings and environment, readable without network."""

import base64
import html
import io
import math
from numbers import Integral
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd

from helpers.config import Profile
from helpers.runner import overview
from helpers.stage.manifest import find_stage, found_manifest
from helpers.stage.suite import Suite
from helpers.workspace.disk import whole

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; border: 0; margin: 1rem 0; overflow-x: auto;
  display: block; width: fit-content; max-width: 100%; }
th, td { border: 1px solid #ccc; padding: .25rem .6rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; } pre { background: #f4f4f4; padding: .6rem; overflow-x: auto; }
h1, h2, h3 { line-height: 1.2; }
"""


def score_tables(suite: Suite, run_folder: Path) -> dict[str, pd.DataFrame]:
    """Return the scores of a run by title: one row a measure, one column a way of answering; nothing unmeasured.

    A column of whole numbers alone, as of questions, stays one of whole numbers. Which metrics of which stage these
    are, suite.yaml says.
    """
    tables = {}
    for spec in suite.stages:
        manifest = found_manifest(run_folder, spec.name) if spec.scores else None
        if not manifest:
            continue
        metrics = manifest["metrics"]
        rows = {
            label: {column: metrics.get(prefix + name) for prefix, column in spec.scores.columns.items()}
            for name, label in spec.scores.rows.items()
        }
        table = pd.DataFrame.from_dict(rows, orient="index").astype(float)
        table = table.dropna(axis=0, how="all").dropna(axis=1, how="all")
        if len(table):
            found = {column: {type(row[column]) for row in rows.values()} - {type(None)} for column in table}
            whole_numbers = [column for column, kinds in found.items() if kinds == {int}]
            tables[spec.scores.title] = table.astype(dict.fromkeys(whole_numbers, "Int64"))
    return tables


def print_scores(suite: Suite, run_folder: Path) -> None:
    """Print the scores of a run, if there are any."""
    for title, table in score_tables(suite, run_folder).items():
        print(f"\n{title}\n{_in_words(table).to_string()}")
    print()


def _in_words(table: pd.DataFrame) -> pd.DataFrame:
    """Scores with three decimals, whole numbers with their thousands apart, "-" for what was not measured."""

    def word(value: Any) -> str:
        return "-" if pd.isna(value) else f"{value:,}" if isinstance(value, Integral) else f"{value:.3f}"

    return table.astype(object).map(word)


def _text(value: Any) -> str:
    """Escape a value for HTML; numbers get four significant digits."""
    nothing = value is None or (isinstance(value, float) and math.isnan(value))
    return html.escape("-" if nothing else f"{value:.4g}" if isinstance(value, float) else str(value))


def _pairs(values: dict[str, Any]) -> str:
    rows = (f"<tr><td>{_text(name)}</td><td>{_text(value)}</td></tr>" for name, value in values.items())
    return f"<table>{''.join(rows)}</table>"


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _figures(notebook: Path, without: str = "") -> list[str]:
    """Return the pictures and tables of an executed notebook as HTML, each under the heading that stands before it.

    without: a heading whose pictures and tables are left out. A stage that came without its notebook, as from Kaggle,
    or whose notebook cannot be read, shows the figures that it saved.
    """
    from helpers.plots.look import image_tag  # pyplot takes its time, and every command loads this room

    parts, heading = [], ""
    try:
        cells = nbformat.read(notebook, as_version=4).cells
    except (OSError, ValueError):
        saved = sorted((notebook.parent / "figures").glob("*.png"))
        return [image_tag(path.read_bytes(), path.stem.replace("_", " "), "png") for path in saved]
    for cell in cells:
        if cell.cell_type == "markdown":
            titles = [line.lstrip("# ") for line in cell.source.splitlines() if line.startswith("## ")]
            heading = titles[-1] if titles else heading
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            kind = next((kind for kind in ("image/png", "image/jpeg") if kind in data), None)
            if kind:
                parts.append((heading, image_tag(base64.b64decode(data[kind]), heading, kind.partition("/")[2])))
            elif any(tag in data.get("text/html", "") for tag in ("<table", "<img")):
                parts.append((heading, data["text/html"]))
    shown, last = [], ""
    for heading, part in parts:
        if heading == without:
            continue
        if heading != last:
            shown.append(f"<h3>{html.escape(heading)}</h3>")
        last = heading
        shown.append(part)
    return shown


def _state(profile: Profile, run_folder: Path) -> list[str]:
    """How far the run is now, as HTML: notebook 00 itself was executed at the beginning."""
    from helpers.plots.look import image_tag

    stages = overview.stage_table(profile, run_folder)
    picture = io.BytesIO()
    overview.plot_way(stages, profile.name).savefig(picture, format="png", bbox_inches="tight")
    return [overview.state_page(stages).to_html(), image_tag(picture.getvalue(), "the stages and their states", "png")]


def write_report(suite: Suite, run_folder: Path, profile: Profile) -> Path:
    """Write `report.html` into the run's folder and return its path.

    Figures and tables are those of the executed notebooks, embedded, so that the one file can be sent to someone.
    """
    scores = score_tables(suite, run_folder)
    stages = {}
    for spec in suite.stages:
        folder = find_stage(run_folder, spec.name)
        manifest = found_manifest(run_folder, spec.name)
        if manifest is not None:
            stages[spec.name] = (spec, folder, manifest)
    body = [f"<h1>Run {_text(run_folder.name)}</h1>"]
    body.append(f"<p>Profile {_text(profile.name)}.</p><h2>Scores</h2>")
    for title, table in scores.items():
        body.append(f"<h3>{html.escape(title)}</h3>{_in_words(table).to_html()}")
    notes = dict.fromkeys(spec.scores.note for spec in suite.stages if spec.scores and spec.scores.title in scores)
    body += [f"<p>{html.escape(note)}</p>" for note in notes if note]
    if not scores:
        body.append("<p>Not evaluated yet.</p>")
    body.append("<h2>Stages</h2><table><tr><th>stage</th><th>status</th><th>seconds</th><th>finished</th></tr>")
    for name, (_, folder, manifest) in stages.items():
        link = f"{folder.name}/{name}.ipynb" if folder.parent == run_folder else f"../{folder.parent.name}/{name}"
        cells = (manifest["status"], manifest["seconds"], manifest["finished"])
        body.append(f'<tr><td><a href="{html.escape(link)}">{name}</a></td>')
        body.append("".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>")
    body.append("</table>")
    for name, (spec, folder, manifest) in stages.items():
        body.append(f"<h2>{html.escape(spec.title)}</h2><p>{html.escape(spec.about)}</p>")
        if spec.overview:  # executed at the beginning, but read at the end
            body += _state(profile, run_folder)
        body += _figures(folder / f"{name}.ipynb", without=spec.overview)
        if prompt := manifest["metrics"].get(spec.prompt):
            body.append(f"<h3>Prompt</h3><pre>{_text(prompt)}</pre>")
        body.append(f"<details><summary>All metrics</summary>{_pairs(_flat(manifest['metrics']))}</details>")
    body.append(f"<h2>Profile</h2>{_pairs(_flat(profile.model_dump()))}")
    if stages:
        last = list(stages.values())[-1][2]
        body.append(f"<h2>Environment</h2>{_pairs(last['machine'] | _flat(last['versions']))}")
    page = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_text(run_folder.name)}</title>'
    path = run_folder / "report.html"
    with whole(path) as temporary:
        text = f"{page}<style>{STYLE}</style></head><body>{''.join(body)}</body></html>"
        temporary.write_text(text, encoding="utf-8")
    return path
