"""The bundle that the demo shows, and where it was found."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from helpers.config import Profile
from helpers.models.gif_qa.ask import GifQA
from helpers.models.gif_qa.bundle import read_bundle
from helpers.models.parts import BundleError
from helpers.stage.manifest import find_stage, newest_attached
from helpers.workspace.inputs import attached_name
from helpers.workspace.place import platform, repo_root
from helpers.workspace.weights import ModelNotFound, find_model

SHIPPED_BUNDLE = Path(__file__).resolve().parents[1] / "assets" / "tiny" / "bundle"


@dataclass(frozen=True)
class FoundBundle:
    """A trained bundle and, in words, where it comes from."""

    folder: Path
    origin: str

    @property
    def blind(self) -> Path | None:
        """The folder of its blind twin, which notebook 03 writes beside it; None if it was not kept."""
        twin = self.folder.parent / "blind"
        return twin if (twin / "bundle.json").is_file() else None


def interactive() -> bool:
    """Whether a person has this notebook open: as a page of Voila, in Jupyter, or on Kaggle or Colab by hand."""
    if "SUITE_HEADLESS" in os.environ:  # set by the runner, which may itself be called from an open notebook
        return False
    as_page = os.environ.get("SERVER_SOFTWARE", "").startswith("voila")
    by_hand = os.environ.get("KAGGLE_KERNEL_RUN_TYPE") == "Interactive" or platform() == "colab"
    return as_page or by_hand or "JPY_SESSION_NAME" in os.environ


def find_bundle(run_folder: Path, given: str = "") -> FoundBundle:
    """The bundle to show: the one given, else this run's, else the newest attached one, else the shipped one.

    Raises BundleError if the one given is no bundle or takes no video, or if there is none at all.
    """
    if given:
        folder = given_folder(given)
        if not read_bundle(folder)["video"]:
            raise BundleError(f"{given} is a blind bundle, which sees no GIF: give the `bundle` folder beside it")
        return FoundBundle(folder, "given by the parameter `bundle`")
    own = find_stage(run_folder, "03_adapter_training") / "bundle"
    if (own / "bundle.json").is_file():
        return FoundBundle(own, f"trained in the run {own.parents[1].name}")
    if attached := newest_attached("bundle.json", _sees):
        return FoundBundle(attached, f"attached: {attached_name(attached)}")
    if (SHIPPED_BUNDLE / "bundle.json").is_file():
        return FoundBundle(SHIPPED_BUNDLE, "the small one that ships with the suite; it knows only shapes")
    raise BundleError(
        f"there is no trained bundle: none in {run_folder}, none attached, none shipped in {SHIPPED_BUNDLE}. Run "
        "notebooks 01 to 03 first (./run_all.sh), or give the parameter `bundle` a bundle's folder."
    )


def given_folder(given: Path | str) -> Path:
    """A folder as typed: from where the notebook runs, or from the repository's root, where run_all.sh is called."""
    path = Path(given).expanduser()
    return (path if path.exists() else repo_root() / path).resolve()


def _sees(folder: Path) -> bool:
    """Whether a folder is a bundle that takes video."""
    try:
        return read_bundle(folder)["video"]
    except (ValueError, KeyError, AttributeError):  # another program's file of the same name, or an older format
        return False


def load_qa(folder: Path, profile: Profile) -> GifQA:
    """Load a bundle with the base models that it names; where those are not to be had, with the profile's.

    Raises BundleError if the profile's are other models, ModelNotFound with every way out if there are none.
    """
    try:
        return GifQA.from_pretrained(folder)
    except ModelNotFound:
        language, video = profile.language_model, profile.encoder
        return GifQA.from_pretrained(
            folder, find_model(language.model, language.revision), find_model(video.model, video.revision)
        )
