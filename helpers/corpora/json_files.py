"""A data set's JSON file, read strictly: what cannot be trusted is an error that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.corpora.schema import CorpusError


def read_json(path: str | Path) -> Any:
    """The content of a JSON file. Raises `CorpusError` if it is missing, not UTF-8, not JSON, or repeats a key."""
    path = Path(path)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise CorpusError(f"{path}: the key {next(k for k in keys if keys.count(k) > 1)!r} occurs twice.")
        return found

    if not path.is_file():
        raise CorpusError(f"There is no file {path}.")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CorpusError(f"{path} is not readable as JSON: {error}.") from error
