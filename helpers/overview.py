"""What notebook 00 shows: packages against their ranges, the profile, and how far a run is."""

from importlib import metadata
from pathlib import Path

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from packaging.requirements import Requirement
from packaging.version import Version

from helpers.config import Profile
from helpers.stage import find_stage, load_suite, read_manifest, suite_file
from helpers.workspace import repo_root

STATES = {"done": "#2a9d57", "partial": "#e9a23b", "not done": "#b8c0c8"}


def _requirements() -> list[Requirement]:
    """Read the supported ranges: requirements.txt of a clone, else the installed package's own metadata."""
    path = repo_root() / "requirements.txt"
    if path.is_file():
        lines = path.read_text(encoding="utf-8").partition("# Development")[0].splitlines()
        return [Requirement(line.split("#")[0].strip()) for line in lines if line.split("#")[0].strip()]
    return [Requirement(line) for line in metadata.requires("gif-question-answering") or []]


def package_table() -> pd.DataFrame:
    """Return one row a required package: installed version, supported range, and whether it fits."""
    rows = {}
    for requirement in _requirements():
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            rows[requirement.name] = ("", str(requirement.specifier), "missing")
            continue
        fits = requirement.specifier.contains(Version(found).base_version)
        rows[requirement.name] = (found, str(requirement.specifier), "ok" if fits else "out of range")
    return pd.DataFrame.from_dict(rows, orient="index", columns=["installed", "supported", "state"])


def profile_table(profile: Profile) -> pd.DataFrame:
    """Return one row a profile key, indexed by section and key."""
    values = {
        (section, key): repr(value)
        for section, keys in profile.model_dump().items()
        if isinstance(keys, dict)
        for key, value in keys.items()
    }
    return pd.Series(values, name=f"profile {profile.name}").to_frame()


def stage_table(profile: Profile, run_folder: Path) -> pd.DataFrame:
    """Return one row a stage of the default run: its state, minutes and GB expected for the profile."""
    rows = {}
    for spec in load_suite(suite_file()).stages:
        if spec.always or not spec.default:
            continue
        manifest = read_manifest(find_stage(run_folder, spec.name))
        status = manifest["status"] if manifest else ""
        rows[spec.name] = {
            "title": spec.title,
            "state": {"complete": "done", "partial": "partial"}.get(status, "not done"),
            "expected min": spec.minutes.get(profile.name, float("nan")),
            "took min": round(manifest["seconds"] / 60, 1) if manifest else float("nan"),
            "needs GB": spec.gigabytes.get(profile.name, float("nan")),
            "GPU": "yes" if spec.gpu and not profile.encoder.model.startswith("tiny/") else "no",
            "makes": spec.makes,
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def plot_way(stages: pd.DataFrame, profile_name: str) -> Figure:
    """Draw the stages one after another over expected minutes, coloured by state."""
    minutes = stages["expected min"].fillna(1.0)
    starts = minutes.cumsum() - minutes
    figure, axes = plt.subplots(figsize=(9, 0.6 * len(stages) + 1.6))
    axes.barh(stages.index, minutes, left=starts, color=[STATES[state] for state in stages.state])
    for name, start, length, gpu in zip(stages.index, starts, minutes, stages.GPU, strict=True):
        axes.annotate(
            f"{length:g} min" + (", GPU" if gpu == "yes" else ""),
            (start + length, name),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
        )
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * minutes.sum())
    axes.set_xlabel("expected time from the start (minutes)")
    axes.set_ylabel("stage")
    axes.set_title(f"The way from GIFs to scores, profile {profile_name}")
    handles = [Patch(color=color, label=state) for state, color in STATES.items()]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 0))
    figure.tight_layout()
    return figure
