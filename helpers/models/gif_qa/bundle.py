"""Bundles of the GIF model: read, compared with their base models, and loaded strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
from transformers import XCLIPConfig, XCLIPModel

from helpers.config import profile_of
from helpers.models.gif_qa.model import BUNDLE_FORMAT, GifQAModel, adapter_tensors
from helpers.models.language import language_model_identity, load_language_model
from helpers.models.parts import BundleError, load_strictly, read_facts, require_same_base, warn_without_digest
from helpers.models.xclip import FrameEncoder, MaskedMIT, attention_implementation, encoder_identity, load_xclip
from helpers.workspace.machine import device as default_device
from helpers.workspace.weights import find_model


def read_bundle(folder: Path | str) -> dict[str, Any]:
    """Read bundle.json. Raises BundleError when there is none, or it is damaged or of another format."""
    path = Path(folder) / "bundle.json"
    if not path.is_file():
        raise BundleError(f"{folder} is no bundle: it has no bundle.json")
    facts = read_facts(path)
    if facts.get("format") != BUNDLE_FORMAT:
        raise BundleError(f"{path} has format {facts.get('format')}; this code reads {BUNDLE_FORMAT}")
    return facts


def _empty_mit(encoder: dict[str, Any]) -> MaskedMIT:
    """An MIT of the encoder's shape without weights: a bundle brings its own."""
    with torch.device("meta"):
        config = XCLIPConfig(vision_config=encoder["vision_config"], projection_dim=encoder["projection_dim"])
        config._attn_implementation = attention_implementation()
        return MaskedMIT(XCLIPModel(config)).to_empty(device="cpu")


def load_bundle(
    folder: Path | str,
    language_model: str | None = None,
    video_model: str | None = None,
    device: torch.device | None = None,
) -> GifQAModel:
    """Load a trained model (evaluation mode, nothing trainable).

    language_model, video_model: id or folder to take the frozen models from, instead of what the bundle names. The
    video encoder itself is not part of the model; `video_model` is only checked. Raises BundleError when either is
    another model than the bundle was trained on (naming both), or a tensor is missing, extra, of another shape or not
    finite.
    """
    folder = Path(folder)
    facts = read_bundle(folder)
    profile = profile_of(facts["profile"])
    device = device or default_device()
    base = {name: facts[name] for name in ("language_model", "encoder") if name in facts}
    ours = base["language_model"]
    found = find_model(language_model or ours["model"], None if language_model else ours["revision"])
    model, tokenizer = load_language_model(profile.language_model, device, found)
    given = language_model_identity(model, tokenizer, found)
    warn_without_digest({part: told["identity"] for part, told in base.items()}, folder)
    require_same_base(ours["identity"], given, "language model", ours["model"], language_model or found)
    if video_model is not None and facts["video"]:
        load_encoder(facts, video_model)

    read_facts(folder / "adapter_config.json")
    config = PeftConfig.from_pretrained(str(folder))
    config.base_model_name_or_path = None  # PEFT would warn that it is a folder now; the models were compared above
    adapted = get_peft_model(model, config)
    tensors = load_strictly(folder / "adapter_model.safetensors", adapter_tensors(adapted))
    set_peft_model_state_dict(adapted, tensors)
    result = GifQAModel(adapted, tokenizer, profile, base)
    if result.chat is not None and (now := result.chat.told()) != (then := ours.get("chat")):
        raise BundleError(
            f"{folder} was trained by the chat template {then!r}; that of {language_model or found} is {now!r} now. "
            "Give the tokenizer that it was trained with (language_model.revision), or train the bundle anew"
        )
    if facts["video"]:
        result.attach_video(_empty_mit(base["encoder"]), base["encoder"]["projection_dim"])
        tensors = load_strictly(folder / "connector.safetensors", result.video_tensors())
        for part in ("connector", "mit"):
            own = {name.split(".", 1)[1]: tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")}
            getattr(result, part).load_state_dict(own, strict=True)
    return result.to(device).eval().requires_grad_(False)


def load_encoder(facts: dict[str, Any], video_model: str | None) -> FrameEncoder:
    """Load the bundle's video encoder from `video_model` or where the bundle says, checked to be the same."""
    ours = facts["encoder"]
    xclip = load_xclip(video_model or ours["model"], None if video_model else ours["revision"])
    given = encoder_identity(xclip)
    require_same_base(ours["identity"], given, "video encoder", ours["model"], video_model or ours["model"])
    encoder = FrameEncoder(xclip, ours["model"], ours["revision"])
    if encoder.key != ours["key"]:
        raise BundleError(
            f"this bundle takes features of the video encoder {ours['key']}, but {video_model or ours['model']} gives "
            f"those of {encoder.key}. Give the video encoder that it was trained on, or train a bundle for this one."
        )
    return encoder
