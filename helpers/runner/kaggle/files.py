"""Files that a run left on Kaggle: their names, and the way of them into a folder here."""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from tqdm.auto import tqdm

from helpers.runner.kaggle.site import Pushed, Site
from helpers.runner.outcome import Failed

FEW_FILES = 20  # these are fetched without a progress bar


def names_below(site: Site, run: Pushed, prefix: str) -> dict[str, str]:
    """Return the outputs of one run whose names begin with `prefix`: name without it, and address."""
    return {name[len(prefix) :]: url for name, url in site.outputs(run).items() if name.startswith(prefix)}


def fetch(site: Site, files: Mapping[str, str], folder: Path, what: str) -> None:
    """Fetch files (name and address) into a folder; those that are there are not fetched again.

    Raises Failed, naming `what`, if a name would leave the folder; then nothing is fetched.
    """
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name:
            raise Failed(f"{what} left a file that would leave its folder: {name!r}")
    wanted = [name for name in files if PurePosixPath(name).name != ".lock" and not (folder / name).is_file()]
    for name in tqdm(wanted, desc=f"fetching {what}", unit="file", disable=len(wanted) < FEW_FILES):
        site.download(files[name], folder / name)
