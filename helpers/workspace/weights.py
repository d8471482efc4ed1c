"""Finds the weights of a model: shipped, given, attached, in the hub or its cache."""

import json
import re
from pathlib import Path

from helpers.workspace.inputs import attached_name, attached_paths
from helpers.workspace.place import repo_root


class ModelNotFound(FileNotFoundError):
    """Model weights that no source has; the message lists every way to get them."""


def _attached_model(model_id: str) -> Path | None:
    """Find a model attached on Kaggle: a folder with config.json whose path carries all words of the model's name.

    Paths look like models/metaresearch/llama-3.2/transformers/3b-instruct/1; the mount point has moved before, so only
    words are compared. An instruction-tuned model never stands in for its base model.
    """
    words = set(re.split(r"[^a-z0-9.]+", model_id.split("/")[-1].lower()))
    found = []
    for config in attached_paths("config.json"):
        have = set(re.split(r"[^a-z0-9.]+", attached_name(config.parent).lower()))
        if words <= have and ("instruct" in have) == ("instruct" in words):
            found.append(config.parent)
    if len(found) > 1:
        listing = "\n  ".join(map(str, found))
        raise ModelNotFound(f"Several attached folders look like {model_id}; detach all but one:\n  {listing}")
    return found[0] if found else None


def _has_all_weights(folder: Path, pattern: str) -> bool:
    """Whether the weights are there, and all of them where an index names several: a download may have been cut."""
    index = next(folder.glob(f"{pattern}.index.json"), None)
    if index is None:
        return any(folder.glob(pattern))
    return all((folder / name).is_file() for name in set(json.loads(index.read_text())["weight_map"].values()))


def _has_small_files(folder: Path) -> bool:
    """Whether a configuration and a tokenizer are there."""
    return (folder / "config.json").is_file() and any(any(folder.glob(name)) for name in TOKENIZERS)


def _hub_model(model_id: str, revision: str | None, weights: bool, fetch: bool) -> str:
    """Return the folder of a hub snapshot, from the cache without network if it is complete there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    kinds = ["*.safetensors", "pytorch_model*.bin"]  # older checkpoints exist in the second form only
    for kind in kinds if weights else [None]:
        patterns = {"allow_patterns": [*SMALL, *([kind] if kind else [])], "ignore_patterns": ["*/*"]}

        def complete(folder: str, kind: str | None = kind) -> bool:
            return _has_all_weights(Path(folder), kind) if kind else _has_small_files(Path(folder))

        try:
            folder = snapshot_download(model_id, revision=revision, local_files_only=True, **patterns)
        except LocalEntryNotFoundError:
            folder = None
        if fetch and (folder is None or not complete(folder)):
            folder = snapshot_download(model_id, revision=revision, **patterns)
        if folder is not None and complete(folder):
            return folder
    lacks = "neither safetensors nor pytorch_model.bin files" if weights else "no config.json or no tokenizer"
    raise FileNotFoundError(f"the hub's {model_id} has {lacks}")


SMALL = ("*.json", "*.txt", "*.model", "*.jinja")
TOKENIZERS = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt")
"""Names of a model's files beside its weights, and those that hold a tokenizer."""

WAYS = {
    "GIFs": (
        "-p language_model.model FOLDER (video encoder: -p encoder.model FOLDER; in Python the arguments "
        "language_model and video_model)",
        "the small ones that ship with the suite: -p language_model.model tiny/llama -p language_model.chat false "
        "-p encoder.model tiny/xclip -p data.image_size 64",
    ),
    "ADEM-VL": (
        "-p adem.language_model FOLDER (image encoder: -p adem.vision_model FOLDER)",
        "the small ones that ship with the suite: -p adem.language_model tiny/science_llama "
        "-p adem.vision_model tiny/science_clip -p adem.scales null",
    ),
}
"""By system that asks for weights: how a folder is named, and what needs no weights."""


def find_model(
    model_id: str, revision: str | None = None, system: str = "GIFs", *, weights: bool = True, fetch: bool = True
) -> str:
    """Return the local folder of a model's weights; system: the one of `WAYS` that asks, whose ways out are told.

    weights: without, nothing but configuration and tokenizer need be there, and nothing else is fetched.
    fetch: without, nothing at all is fetched, and the network is not asked.
    Looked for in this order: the shipped `tiny/*` models, a folder given as `model_id`, a model attached on Kaggle,
    the Hugging Face cache or hub, `models/<name>` in the repository. Raises ModelNotFound with every way out.
    """
    name = model_id.split("/")[-1]
    if model_id.startswith("tiny/"):
        folder = Path(__file__).resolve().parents[1] / "assets" / "tiny" / name
        if not (folder / "config.json").is_file():
            raise ModelNotFound(
                f"The shipped model {model_id} is missing: {folder} has no config.json; check the clone."
            )
        return str(folder)
    if (Path(model_id).expanduser() / "config.json").is_file():
        return str(Path(model_id).expanduser().resolve())
    if attached := _attached_model(model_id):
        return str(attached)
    try:
        return _hub_model(model_id, revision, weights, fetch)
    except Exception as error:  # gated, unknown, offline, no disk: all lead to the same ways out, with the cause named
        local = repo_root() / "models" / name
        if (local / "config.json").is_file():
            return str(local)
        cause = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        folder, shipped = WAYS[system]
        at = f" at revision {revision}" if revision else ""
        raise ModelNotFound(
            f"No weights for {model_id}{at}. The hub said: {cause}\nWays out:\n"
            "  1. On Kaggle: attach the model to the notebook (Add Input > Models; Llama asks for its licence there).\n"
            f"  2. Hugging Face: accept the licence at https://huggingface.co/{model_id} if it is gated, then run "
            "`hf auth login` or set HF_TOKEN.\n"
            f"  3. Without network: put config.json, tokenizer and safetensors files into {local}, or give a folder: "
            f"{folder}.\n"
            f"  4. No weights at all: {shipped}."
        ) from error
