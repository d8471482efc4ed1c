"""The report of a run: one HTML file with scores, figures, settings and environment, readable without network."""

import base64
import html
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd

from helpers.config import Profile
from helpers.stage import Suite, find_stage, read_manifest

SCORES = {
    "frameqa_accuracy": "FrameQA accuracy",
    "action_accuracy": "Action accuracy",
    "transition_accuracy": "Transition accuracy",
    "count_mse": "Count MSE (lower is better)",
    "count_accuracy": "Count accuracy",
}
SCIENCE = {"accuracy": "all problems", "IMG": "with an image", "TXT": "with a hint", "NO": "with neither"}
SCIENCE_COLUMNS = {"": "model", "text_only_": "text-only twin", "shuffled_": "shuffled images", "majority_": "majority"}
COLUMNS = {"": "model", "blind_": "blind", "shuffled_": "shuffled", "majority_": "majority"}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; border: 0; margin: 1rem 0; overflow-x: auto;
  display: block; width: fit-content; max-width: 100%; }
th, td { border: 1px solid #ccc; padding: .25rem .6rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; } pre { background: #f4f4f4; padding: .6rem; overflow-x: auto; }
h1, h2, h3 { line-height: 1.2; }
"""


def score_tables(run_folder: Path) -> dict[str, pd.DataFrame]:
    """Return the scores of a run by title: one row a measure, one column a way of answering; nothing unmeasured."""
    wanted = {
        "GIF question answering": ("04_evaluation", SCORES, COLUMNS),
        "ScienceQA, accuracy (%)": ("05_adem_scienceqa", SCIENCE, SCIENCE_COLUMNS),
    }
    tables = {}
    for title, (stage, names, columns) in wanted.items():
        manifest = read_manifest(find_stage(run_folder, stage))
        metrics = manifest["metrics"] if manifest else {}
        rows = {
            label: {column: metrics.get(prefix + name) for prefix, column in columns.items()}
            for name, label in names.items()
            if metrics.get(name) is not None
        }
        if rows:
            tables[title] = pd.DataFrame.from_dict(rows, orient="index").astype(float).dropna(axis=1, how="all")
    return tables


def print_scores(run_folder: Path) -> None:
    """Print the scores of a run, if there are any."""
    for title, table in score_tables(run_folder).items():
        print(f"\n{title}\n{table.to_string(na_rep='-', float_format=lambda value: f'{value:.3f}')}")
    print()


def _text(value: Any) -> str:
    """Escape a value for HTML; numbers get four significant digits."""
    return html.escape(f"{value:.4g}" if isinstance(value, float) else str(value))


def _pairs(values: dict[str, Any]) -> str:
    rows = (f"<tr><td>{_text(name)}</td><td>{_text(value)}</td></tr>" for name, value in values.items())
    return f"<table>{''.join(rows)}</table>"


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _image(alt: str, kind: str, data: bytes) -> str:
    return f'<img alt="{html.escape(alt)}" src="data:{kind};base64,{base64.b64encode(data).decode()}">'


def _figures(notebook: Path) -> list[str]:
    """Return the pictures and tables of an executed notebook as HTML, each under the heading that stands before it.

    A stage that came without its notebook, as from Kaggle, shows the figures that it saved.
    """
    parts, heading = [], ""
    if not notebook.is_file():
        saved = sorted((notebook.parent / "figures").glob("*.png"))
        return [_image(path.stem.replace("_", " "), "image/png", path.read_bytes()) for path in saved]
    for cell in nbformat.read(notebook, as_version=4).cells:
        if cell.cell_type == "markdown":
            titles = [line.lstrip("# ") for line in cell.source.splitlines() if line.startswith("## ")]
            heading = titles[-1] if titles else heading
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            kind = next((kind for kind in ("image/png", "image/jpeg") if kind in data), None)
            if kind:
                parts.append((heading, _image(heading, kind, base64.b64decode(data[kind]))))
            elif any(tag in data.get("text/html", "") for tag in ("<table", "<img")):
                parts.append((heading, data["text/html"]))
    shown, last = [], ""
    for heading, part in parts:
        if heading != last:
            shown.append(f"<h3>{html.escape(heading)}</h3>")
        last = heading
        shown.append(part)
    return shown


def write_report(suite: Suite, run_folder: Path, profile: Profile) -> Path:
    """Write `report.html` into the run's folder and return its path.

    Figures and tables are those of the executed notebooks, embedded, so that the one file can be sent to someone.
    """
    scores = score_tables(run_folder)
    stages = {}
    for spec in suite.stages:
        folder = find_stage(run_folder, spec.name)
        manifest = read_manifest(folder)
        if manifest is not None:
            stages[spec.name] = (spec, folder, manifest)
    body = [f"<h1>GIF question answering: run {_text(run_folder.name)}</h1>"]
    body.append(f"<p>Profile {_text(profile.name)}, corpus {_text(profile.data.corpus)}.</p><h2>Scores</h2>")
    for title, table in scores.items():
        body.append(f"<h3>{html.escape(title)}</h3>{table.to_html(float_format='%.3f', na_rep='-')}")
    body.append(
        "<p>Blind, text-only: the same model trained without the video or image. Shuffled: each replaced by another "
        "one. Majority: the commonest answer. A model that looks stands well clear of all three.</p>"
        if scores
        else "<p>Not evaluated yet.</p>"
    )
    body.append("<h2>Stages</h2><table><tr><th>stage</th><th>status</th><th>seconds</th><th>finished</th></tr>")
    for name, (_, folder, manifest) in stages.items():
        link = f"{folder.name}/{name}.ipynb" if folder.parent == run_folder else f"../{folder.parent.name}/{name}"
        cells = (manifest["status"], manifest["seconds"], manifest["finished"])
        body.append(f'<tr><td><a href="{html.escape(link)}">{name}</a></td>')
        body.append("".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>")
    body.append("</table>")
    for name, (spec, folder, manifest) in stages.items():
        body.append(f"<h2>{html.escape(spec.title)}</h2><p>{html.escape(spec.about)}</p>")
        body += _figures(folder / f"{name}.ipynb")
        body.append(f"<details><summary>All metrics</summary>{_pairs(_flat(manifest['metrics']))}</details>")
    body.append(f"<h2>Prompt</h2><pre>{html.escape(profile.language_model.prompt)}</pre>")
    body.append(f"<h2>Profile</h2>{_pairs(_flat(profile.model_dump()))}")
    if stages:
        last = list(stages.values())[-1][2]
        body.append(f"<h2>Environment</h2>{_pairs(last['machine'] | _flat(last['versions']))}")
    page = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_text(run_folder.name)}</title>'
    path = run_folder / "report.html"
    temporary = path.with_suffix(".html.tmp")
    temporary.write_text(f"{page}<style>{STYLE}</style></head><body>{''.join(body)}</body></html>", encoding="utf-8")
    temporary.replace(path)
    return path
