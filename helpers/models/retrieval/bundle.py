"""A head as a bundle: its tensors, and what its embeddings are of, written whole and loaded strictly."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors.torch import save_file

from helpers.config import RetrievalConfig, as_now
from helpers.models.parts import BundleError, load_strictly, on_cpu, read_facts, require_finite
from helpers.models.retrieval.heads import RetrievalHead
from helpers.workspace.disk import whole

FORMAT, KIND = 1, "text-video retrieval"
FACTS, TENSORS = "bundle.json", "head.safetensors"
XCLIP = "x-clip"


@dataclass(frozen=True)
class Source:
    """What the embeddings that a head takes are of, and the frozen model by which a new text is embedded.

    encoder_key: of the video encoder; trained: digest of what was trained behind it ("": nothing); layer: "before"
    (what the language model is given), a number, "last", or "x-clip" for X-CLIP's own vectors; pooling; prompt: what
    stands around a text, with {text} in it; start: whether the start token is part of a text; model, revision and
    quantisation of the text's model, and identity, which tells it from others.
    """

    encoder_key: str
    trained: str
    layer: str
    pooling: str
    prompt: str
    start: bool
    model: str
    revision: str | None
    quantisation: str
    identity: dict[str, Any]


@dataclass(frozen=True)
class Match:
    """When something matches: mean and deviation of the scores of texts that fit nothing, and the least good score."""

    mean: float
    deviation: float
    threshold: float

    def above(self, score: float) -> float:
        """How far a score lies above those of texts that fit nothing, in their standard deviations."""
        return (float(score) - self.mean) / max(self.deviation, 1e-9)


@dataclass(frozen=True)
class HeadBundle:
    """What stands in a bundle beside its tensors; widths: of text and video embeddings, None without a head."""

    source: Source
    match: Match | None
    config: RetrievalConfig | None
    widths: tuple[int, int] | None
    info: dict[str, Any]


def save_head(
    folder: Path | str,
    head: RetrievalHead | None,
    source: Source,
    match: Match | None = None,
    info: dict[str, Any] | None = None,
) -> Path:
    """Write a head as a bundle, at once or not at all; one already there is replaced, its index too.

    head: None for an encoder whose own vectors are compared (X-CLIP). info: what else is to be told, for example
    {"metrics": {...}}. Raises BundleError when a tensor is not finite.
    """
    folder = Path(folder)
    facts = {"format": FORMAT, "kind": KIND, "source": asdict(source), "match": match and asdict(match), "head": None}
    if head is not None:
        config = head.config.model_dump(mode="json")
        facts["head"] = {"config": config, "text_width": head.text_width, "video_width": head.video_width}
        require_finite(head.state_dict(), "the head", f"{folder} was not written; train with a lower learning rate")
    with whole(folder) as temporary:
        temporary.mkdir()
        if head is not None:
            save_file(on_cpu(head.state_dict()), temporary / TENSORS)
        text = json.dumps(facts | {"info": info or {}}, indent=2, allow_nan=False)
        (temporary / FACTS).write_text(text + "\n", encoding="utf-8")
    return folder


def read_head(folder: Path | str) -> HeadBundle:
    """Read a bundle's facts. Raises BundleError, naming what is wrong, for none, a damaged one or another kind."""
    path = Path(folder) / FACTS
    if not path.is_file():
        raise BundleError(f"{folder} is no bundle: it has no {FACTS}")
    facts = read_facts(path)
    if (facts.get("format"), facts.get("kind")) != (FORMAT, KIND):
        found = f"{facts.get('kind')!r}, format {facts.get('format')}"
        raise BundleError(f"{path} is {found}; this code reads {KIND!r}, format {FORMAT}")
    _require_keys(facts, ("format", "kind", "source", "match", "head", "info"), path)
    source = _filled(Source, facts["source"], path)
    match = None if facts["match"] is None else _filled(Match, facts["match"], path)
    if (head := facts["head"]) is None:
        return HeadBundle(source, match, None, None, facts["info"])
    _require_keys(head, ("config", "text_width", "video_width"), path)
    try:
        config = RetrievalConfig.model_validate(as_now("retrieval", head["config"]))
    except ValidationError as error:
        raise BundleError(f"{path} describes no head that this code knows: {error}") from error
    return HeadBundle(source, match, config, (head["text_width"], head["video_width"]), facts["info"])


def load_head(folder: Path | str) -> RetrievalHead | None:
    """Load a bundle's head (evaluation mode, nothing trainable); None for a bundle without one.

    Raises BundleError for a broken bundle: a tensor that is missing, extra, of another shape or not finite.
    """
    facts, path = read_head(folder), Path(folder) / TENSORS
    if facts.config is None:
        if path.exists():
            raise BundleError(f"{path} is not expected: {FACTS} beside it says that this bundle has no head")
        return None
    head = RetrievalHead(facts.config, *facts.widths)
    head.load_state_dict(load_strictly(path, head.state_dict()), strict=True)
    return head.eval().requires_grad_(False)


def _require_keys(found: Any, wanted: tuple[str, ...], path: Path) -> None:
    if not isinstance(found, dict) or (differ := found.keys() ^ {*wanted}):
        told = sorted(differ) if isinstance(found, dict) else repr(found)
        raise BundleError(f"{path} is damaged: it must have {', '.join(wanted)}; amiss: {told}")


def _filled(kind: type, values: Any, path: Path) -> Any:
    _require_keys(values, tuple(field.name for field in fields(kind)), path)
    return kind(**values)
