"""What notebook 00 shows: the machine and its faults, packages, attached inputs, GPU-hours, and how far a run is."""

from __future__ import annotations

import shutil
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from packaging.requirements import Requirement
from packaging.version import Version

from helpers.config import Profile
from helpers.runner import quota
from helpers.stage.manifest import found_manifest, manifest_elsewhere
from helpers.stage.suite import load_suite, needs_gpu, suite_file
from helpers.workspace.inputs import attached_name, attached_paths
from helpers.workspace.machine import gpus
from helpers.workspace.place import platform, repo_root, runs_root, scratch_root

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


def machine_table(facts: dict[str, object]) -> pd.DataFrame:
    """Return what `workspace.machine` tells, with every GPU and each disk's free and whole size."""
    rows = {name: value for name, value in facts.items() if name not in ("gpu", "disk_free_gb")}
    for number, gpu in enumerate(gpus()):
        rows[f"GPU {number}"] = f"{gpu.name}, {gpu.memory:.1f} GiB, capability {gpu.capability[0]}.{gpu.capability[1]}"
    for name, folder in (("disk that is kept", runs_root()), ("disk that is lost", scratch_root())):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        usage = shutil.disk_usage(there)
        rows[name] = f"{usage.free / 1e9:.1f} of {usage.total / 1e9:.1f} GB free at {there}"
    told = {name: "-" if value is None else str(value) for name, value in rows.items()}
    return pd.Series(told, name="this machine").to_frame()


def attached_table() -> pd.DataFrame:
    """Return one row an attached model, bundle or stage: its folder under Kaggle's inputs and its status."""
    rows = []
    for marker, kind in load_suite(suite_file()).markers.items():
        for path in attached_paths(marker):
            manifest = manifest_elsewhere(path.parent) if marker == "stage.json" else {"status": ""}
            status = manifest["status"] if manifest else "not readable"
            rows.append((attached_name(path.parent), kind, status))
    return pd.DataFrame(rows, columns=["folder", "what", "status"])


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
    """Return one row a stage of the default run: its state, what it takes and what of that is still to come."""
    rows = {}
    for spec in load_suite(suite_file()).stages:
        if spec.always or not spec.default:
            continue
        manifest = found_manifest(run_folder, spec.name)
        status = manifest["status"] if manifest else ""
        rows[spec.name] = {
            "title": spec.title,
            "state": {"complete": "done", "partial": "partial"}.get(status, "not done"),
            "expected min": spec.minutes.get(profile.name, float("nan")),
            "took min": round(manifest["seconds"] / 60, 1) if manifest else float("nan"),
            "to come": quota.span(quota.forecast(spec, profile, run_folder).seconds),
            "forecast from": quota.forecast(spec, profile, run_folder).source,
            "needs GB": spec.gigabytes.get(profile.name, float("nan")),
            "GPU": "yes" if needs_gpu(spec, profile) else "no",
            "makes": spec.makes,
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def state_page(stages: pd.DataFrame) -> pd.DataFrame:
    """Return what a person reads of `stage_table`: "-" where there is nothing to tell."""
    shown = stages.drop(columns=["expected min", "makes"])
    return shown.astype(object).where(shown.notna(), "-")


def gpu_hours(profile: Profile, run_folder: Path) -> tuple[quota.Budget | None, list[quota.Piece]]:
    """Return this week's budget and the plan of the run's GPU stages over sessions; (None, []) where nothing counts.

    Hours count on Kaggle. Elsewhere a profile that needs a GPU is planned as if it ran there.
    """
    suite = load_suite(suite_file())
    costly = [spec for spec in suite.stages if spec.default and needs_gpu(spec, profile)]
    if not costly and platform() != "kaggle":
        return None, []
    found = quota.read_budget(None, suite.weekly_hours, running=quota.begun_on_kaggle())
    forecasts = [quota.forecast(spec, profile, run_folder) for spec in costly]
    return found, quota.plan_sessions(forecasts, found, time.time())


def plot_way(stages: pd.DataFrame, profile_name: str) -> Figure:
    """Draw the stages one after another over expected minutes, coloured by state."""
    from matplotlib import pyplot as plt  # takes its time, and every command loads this room
    from matplotlib.patches import Patch

    from helpers.plots.look import literal

    minutes = stages["expected min"].fillna(1.0)
    starts = minutes.cumsum() - minutes
    names = [literal(name) for name in stages.index]
    figure, axes = plt.subplots(figsize=(9, 0.6 * len(stages) + 1.6))
    axes.barh(names, minutes, left=starts, color=[STATES[state] for state in stages.state])
    for name, start, length, gpu in zip(names, starts, minutes, stages.GPU, strict=True):
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
    axes.set_title(f"The way ahead, profile {literal(profile_name)}")
    handles = [Patch(color=color, label=state) for state, color in STATES.items()]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 0))
    figure.tight_layout()
    plt.close(figure)  # shown once, by naming it
    return figure
