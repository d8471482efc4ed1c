"""What is attached to a session on Kaggle: the one search below the folder of its inputs.

Attached inputs have been mounted in other places before (<slug>, notebooks/<owner>/<slug>, models/<owner>/<model>/...),
so things are found by the names of their own files and never by the name of a notebook, model or data set.
"""

from pathlib import Path

from helpers.workspace import place
from helpers.workspace.names import is_leftover

DEPTH = 8  # folders above a model's config.json: models/owner/name/framework/variation/1 and two to spare


def attached_paths(pattern: str, depth: int = DEPTH) -> list[Path]:
    """Return what matches a glob pattern below the inputs' folder, under 1 to `depth` folders, sorted; no leftovers."""
    found = {path for folders in range(1, depth + 1) for path in place.KAGGLE_INPUT.glob("*/" * folders + pattern)}
    return sorted(path for path in found if not is_leftover(path.relative_to(place.KAGGLE_INPUT)))


def attached_name(path: Path) -> str:
    """Write an attached path as a person knows it: without the inputs' folder."""
    return path.relative_to(place.KAGGLE_INPUT).as_posix()
