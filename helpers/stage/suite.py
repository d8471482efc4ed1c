"""What `suite.yaml` says of the stages, one entry a notebook."""

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from helpers.config import Profile, nearest, profile_keys, with_defaults
from helpers.workspace.place import repo_root

OPTIONS = ("gifs", "qa", "holdout", "bundle")  # of the command line, for a person's own files
COMMON_PARAMETERS = ("profile", "run", "overrides")


class StageError(RuntimeError):
    """A stage that cannot start or finish; the message says which, why and what to do."""


class Scores(BaseModel):
    """The table that report and terminal show of a stage's metrics: labels by name, columns by prefix of the names."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    title: str
    rows: dict[str, str]
    columns: dict[str, str] = Field(default={"": "value"})
    note: str = ""


class StageSpec(BaseModel):
    """What `suite.yaml` says about one notebook."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    title: str
    about: str
    needs: str
    makes: str
    inputs: list[str] = Field(default_factory=list)
    sections: list[str] = Field(default_factory=list)
    options: dict[str, str] = Field(default_factory=dict)  # parameter -> the command line's option that fills it
    data: list[str] = Field(default_factory=list)  # parameters that name data, which Kaggle attaches to the stage
    paths: list[str] = Field(default_factory=list)  # further parameters that name a file or a folder
    choices: dict[str, list[str]] = Field(default_factory=dict)  # parameter -> the values that mean something to it
    beside: dict[str, str] = Field(default_factory=dict)  # parameter -> what lies beside its folder and decides, too
    disk_of: str = ""  # parameter whose folder bounds the disk that the stage asks for
    copies: str = ""  # parameter with which the stage only copies what is named, whatever its minutes
    defaults: dict[str, dict[str, Any]] = Field(default_factory=dict)  # parameter -> profile keys, see asked_profile
    models: list[str] = Field(default=["encoder.model"])  # profile keys of its base models, see needs_gpu
    scores: Scores | None = None
    contract: int
    default: bool = True
    always: bool = False
    overview: str = ""  # heading under which it shows how far the run is: the report draws that anew
    prompt: str = ""  # metric that is the prompt which the report shows
    gpu: bool = False
    probe: bool = False
    epochs: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)  # profile key -> trainings, see file
    push_if_named: list[str] = Field(default_factory=list)
    minutes: dict[str, float]
    gigabytes: dict[str, float]
    kaggle_sources: list[str] = Field(default_factory=list)

    def asked_profile(self, profile: Profile, parameters: Mapping[str, Any]) -> Profile:
        """The profile that the stage works by: with the `defaults` of parameters that are filled in."""
        for name, keys in self.defaults.items():
            if parameters.get(name):
                profile = with_defaults(profile, keys)
        return profile


class Suite(BaseModel):
    """The whole of `suite.yaml`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    repository: Annotated[str, Field(pattern=r"^https://github\.com/[\w.-]+/[\w-]+$")] | None
    kaggle_models: dict[str, str] = Field(default_factory=dict)  # by the model's name on the Hugging Face hub
    markers: dict[str, str] = Field(default_factory=dict)  # files that tell what an attached folder holds, in words
    kaggle_wheels: list[str] = Field(default_factory=list)
    weekly_hours: float = Field(default=30.0, gt=0)
    stages: list[StageSpec]

    def spec(self, name: str) -> StageSpec:
        """Return the entry of stage `name`; raises StageError with the nearest valid name."""
        for spec in self.stages:
            if spec.name == name:
                return spec
        raise StageError(f"unknown stage {name!r}; {nearest(name, [spec.name for spec in self.stages])}")


def needs_gpu(spec: StageSpec, profile: Profile) -> bool:
    """Whether a stage needs a GPU under a profile; the tiny models do without."""
    return spec.gpu and not any(model_of(profile, key).startswith("tiny/") for key in spec.models[:1])


def model_of(profile: Profile, key: str) -> str:
    """Return the model that a profile key such as `encoder.model` names."""
    section, _, name = key.partition(".")
    return getattr(getattr(profile, section), name)


def suite_file() -> Path:
    """Find `suite.yaml`: SUITE_FILE if set, beside the notebooks, or inside the installed package."""
    if os.environ.get("SUITE_FILE"):
        return Path(os.environ["SUITE_FILE"])
    clone = repo_root() / "notebooks" / "suite.yaml"
    return clone if clone.is_file() else Path(__file__).resolve().parents[1] / "suite.yaml"


@cache
def load_suite(path: Path) -> Suite:
    """Read and check a suite file; raises StageError naming what is wrong in it."""
    try:
        suite = Suite.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise StageError(f"{path}: {error}") from error
    names = [spec.name for spec in suite.stages]
    for position, spec in enumerate(suite.stages):
        for name in ("models", "epochs"):
            if unknown := sorted({*getattr(spec, name)} - {*profile_keys()}):
                raise StageError(f"{path}: {spec.name}: {name} names {unknown}, which no profile has")
        if unknown := sorted({option.rstrip("/") for option in spec.options.values()} - {*OPTIONS}):
            raise StageError(f"{path}: {spec.name}: options names {unknown}; there are {', '.join(OPTIONS)}")
        read = [*spec.inputs, *spec.kaggle_sources]
        if not set(read) <= set(names[:position]):
            raise StageError(f"{path}: {spec.name} reads {read}, but only earlier stages can be inputs")
    return suite
