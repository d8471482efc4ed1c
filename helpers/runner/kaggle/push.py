"""What is pushed to Kaggle: notebooks, metadata and the helpers' data set, made from suite.yaml."""

import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat

from helpers.config import ConfigError
from helpers.runner.outcome import Failed
from helpers.runner.plan import RunPlan, filled_in
from helpers.runner.quota.forecasts import PROBE_STEPS
from helpers.stage.attached import TAKES_OVER
from helpers.stage.manifest import code_version
from helpers.stage.suite import StageSpec, model_of
from helpers.workspace.disk import file_sha256, write_json
from helpers.workspace.place import repo_root

GPU = "NvidiaTeslaT4"  # two T4s, the only GPUs for everyone; enable_gpu alone no longer says which GPU comes
HELPERS, MARKER = "gifqa-helpers", "gif_qa_helpers.json"  # the data set, and the file by which notebooks know it
LICENCE = "apache-2.0"  # Kaggle's name of it; data sets must state exactly one
SESSION_MARGIN_SECONDS = 1800.0  # a session stops its own work this long before Kaggle would cancel it
SLUG_LENGTH = 50
# wheels that any Python from 3.12 on takes, as the image's version moves; pip matches a platform by its exact name
GLIBC = (17, 24, 27, 28, 31, 34, 35)
WHEEL_TAGS = ("--python-version=3.12", *(f"--platform=manylinux_2_{minor}_x86_64" for minor in GLIBC))


def slug(*parts: str) -> str:
    """Join words to a name as Kaggle makes it of a title; raises ConfigError if it is too long."""
    name = re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")
    if len(name) > SLUG_LENGTH:
        raise ConfigError(
            f"Kaggle's names have at most {SLUG_LENGTH} characters, {name} has {len(name)}: shorten --run"
        )
    return name


def kernel_id(owner: str, run: str, stage: str) -> str:
    """Return `owner/name` of a stage's notebook on Kaggle."""
    return f"{owner}/{slug('gifqa', run, stage)}"


def next_name(ref: str) -> str:
    """Return the name to take where that of a notebook, `owner/name`, cannot be used: name-2, name-3 and so on."""
    owner, _, name = ref.partition("/")
    stem, _, number = name.rpartition("-")
    if not number.isdigit():  # no stage's name ends in a number
        stem, number = name, "1"
    ending = f"-{int(number) + 1}"
    return f"{owner}/{stem[: SLUG_LENGTH - len(ending)].rstrip('-')}{ending}"


def kernel_metadata(
    plan: RunPlan,
    spec: StageSpec,
    owner: str,
    data_sets: Sequence[str] = (),
    own_output: bool = False,
    names: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return the content of kernel-metadata.json, made from suite.yaml.

    data_sets: further data sets than the helpers'. own_output: attach what the notebook's last run left. names: by
    stage, notebooks (`owner/name`) that do not bear the name of `kernel_id`.
    """
    run = [other for other in plan.specs if other.name in {*spec.inputs, *spec.kaggle_sources}]
    refs = {other.name: kernel_id(owner, plan.run, other.name) for other in (spec, *run)} | dict(names or {})
    name, sources = refs[spec.name], [refs[other.name] for other in run]
    models = {model_of(plan.profile, key) for other in (spec, *run) for key in other.models}
    return {
        "id": name,
        "title": name.partition("/")[2].replace("-", " "),  # its slug must be the id
        "code_file": f"{spec.name}.ipynb",
        "language": "python",
        "kernel_type": "notebook",
        "is_private": True,
        "enable_gpu": spec.gpu,
        "enable_tpu": False,
        "enable_internet": True,  # always written: client and documentation disagree about the default
        **({"machine_shape": GPU} if spec.gpu else {}),
        "dataset_sources": [f"{owner}/{HELPERS}", *data_sets],
        "competition_sources": [],
        "kernel_sources": [*sources, name] if own_output else sources,
        "model_sources": [there for model, there in plan.suite.kaggle_models.items() if model in models],
    }


def dataset_metadata(ref: str) -> dict[str, Any]:
    """Return the content of dataset-metadata.json for the data set `owner/name`."""
    return {"title": ref.partition("/")[2].replace("-", " "), "id": ref, "licenses": [{"name": LICENCE}]}


def work_seconds(seconds: float) -> float:
    """Return how long a session of `seconds` works before it saves and stops by itself."""
    return seconds - min(SESSION_MARGIN_SECONDS, 0.1 * seconds)


def write_kernel(
    folder: Path,
    plan: RunPlan,
    spec: StageSpec,
    metadata: dict[str, Any],
    seconds: float,
    measure: bool = False,
    takes_over: bool = False,
) -> None:
    """Write the two files of a push: the notebook with its parameters and its deadline, and the metadata.

    seconds: how long the session may last. measure: it is to stop after a few steps. takes_over: it is to end at once
    where the work of an earlier session is not attached.
    """
    common = {"profile": plan.profile_name, "run": plan.run, "overrides": plan.overrides}
    book = filled_in(plan.notebooks / f"{spec.name}.ipynb", common | plan.parameters[spec.name])
    # a session's own limit, where one is set, comes first
    ends = f"time.time() + {work_seconds(seconds):.0f}"
    clock = f'import os\nimport time\n\nos.environ.setdefault("SUITE_DEADLINE", str({ends}))'
    if measure:
        clock += f'\nos.environ["SUITE_PROBE_STEPS"] = "{PROBE_STEPS}"'
    if takes_over:
        clock += f'\nos.environ["{TAKES_OVER}"] = "1"'
    book.cells.insert(0, nbformat.v4.new_code_cell(clock))
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(book, folder / metadata["code_file"])
    write_json(folder / "kernel-metadata.json", metadata)


def build_helpers(folder: Path, ref: str, packages: Sequence[str] = ()) -> str:
    """Write the data set with the helpers' wheel and, where asked, wheels of `packages`; returns a hash of all files.

    Raises Failed with pip's own words.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # the build tool is part of the environment of run_all.sh; elsewhere pip fetches it
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    _pip("wheel", "--no-deps", *isolation, "--wheel-dir", str(folder), str(repo_root()))
    if packages:
        _pip("download", "--no-deps", "--only-binary=:all:", *WHEEL_TAGS, "--dest", str(folder), *packages)
    files = {path.name: file_sha256(path) for path in sorted(folder.glob("*.whl"))}
    write_json(folder / MARKER, {"code": code_version(), "files": files})
    write_json(folder / "dataset-metadata.json", dataset_metadata(ref))
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _pip(*arguments: str) -> None:
    line = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"pip {arguments[0]}: {done.stderr.strip()[-2000:]}")


def lacking(wanted: dict[str, Any], found: Any) -> list[str]:
    """Name every source and setting that a pushed notebook should have and, as Kaggle tells, has not."""
    lacks = []
    kinds = {
        "dataset": found.dataset_data_sources,
        "kernel": found.kernel_data_sources,
        "model": found.model_data_sources,
    }
    for kind, names in kinds.items():
        there = {name.lower() for name in names or []}
        lacks += [
            f"the {kind} {name}"
            for name in wanted[f"{kind}_sources"]
            if not any(other == name.lower() or other.startswith(f"{name.lower()}/") for other in there)
        ]
    shape = (found.machine_shape or "").lower()
    if wanted["enable_gpu"] and shape and shape != wanted["machine_shape"].lower():
        lacks.append(f"the GPU {wanted['machine_shape']}")
    return lacks
