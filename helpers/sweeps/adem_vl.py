"""ADEM-VL's ablations: their rows, and the runs that fill them."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import AutoConfig

from helpers.answers.scienceqa import join_predictions, predict
from helpers.config import PHI_NAMES, PLACEMENTS, AdemConfig
from helpers.models.adem_vl.config import fit_scales
from helpers.scoring.scienceqa_tables import scores
from helpers.stage.pace import DeadlineReached
from helpers.store.tables import keep
from helpers.training.adem_vl import build_model, train_adem
from helpers.workspace.machine import free_memory
from helpers.workspace.weights import find_model


def run_ablation(
    name: str,
    train: pd.DataFrame,
    test: pd.DataFrame,
    config: AdemConfig,
    folder: Path | str,
    *,
    seeds: int = 3,
    deadline: float = math.inf,
) -> pd.DataFrame:
    """Train and score every row of an ablation with several seeds: row, seed, accuracy, image (%), parameters, seconds.

    One that is finished is kept in `folder`, so that a killed run goes on; a model is freed before the next is built.
    Raises, before anything is trained, ValueError for an unknown ablation or scales that do not divide a row's patch
    grid and ModelNotFound for missing weights; DeadlineReached when the deadline (in seconds from now) has passed.
    """
    ends, folder = time.perf_counter() + deadline, Path(folder)
    rows = {label: changed(config, values) for label, values in ablation_rows(name, grid_of(config)).items()}
    for own in rows.values():
        fit_scales(own.scales, grid_of(own))
        find_model(own.language_model, own.language_revision, "ADEM-VL")
    found = []
    for label, own in rows.items():
        for seed in range(seeds):
            place = folder / f"{re.sub('[^A-Za-z0-9.]+', '_', label.replace('+', 'plus'))}-{seed}"
            values = _ablation_run(label, train, test, changed(own, {"seed": seed}), place, ends)
            found.append({"row": label, "seed": seed, **values})
            free_memory()
    return pd.DataFrame(found)


def _ablation_run(
    label: str, train: pd.DataFrame, test: pd.DataFrame, config: AdemConfig, place: Path, ends: float
) -> dict[str, float]:
    model = build_model(config)
    result, _ = train_adem(model, train, config, place, deadline=ends - time.perf_counter(), progress=False)
    if result.status != "complete":
        done = f"step {result.steps:,} of {result.total_steps:,}"
        raise DeadlineReached(f"time is up at {label!r}, seed {config.seed}, {done}; run again to go on")

    def answer() -> pd.DataFrame:
        left, description = ends - time.perf_counter(), f"{label}, {config.seed}"
        answers = predict(model, test, config, deadline=left, description=description)
        return join_predictions(test, train, {"": answers})

    scored = scores(keep(place / "predictions.parquet", answer))[""]
    return {
        "accuracy": scored["accuracy"],
        "image": scored.get("IMG", math.nan),
        "parameters": sum(t.numel() for t in model.adapter_tensors().values()),
        "seconds": result.seconds,
    }


def ablation_rows(name: str, grid: int) -> dict[str, dict[str, Any]]:
    """Rows of an ablation: label -> keys of the `adem` section that it sets. grid: side of the encoder's patch grid.

    The paper does not say which attention its "baseline" has; here it is the plain product of query and key (phi
    identity), which gives the paper's parameter counts at every rung. "scales" has the paper's combinations of 256, 64
    and 16 positions, a grid of 16: all patches, a quarter and a sixteenth as many, as far as the grid can be halved.
    "bases" puts other base models in the profile's places, each with its encoder's own normalisation and grid.
    Raises ValueError for an unknown name, and for a grid of odd side, which has no second scale.
    """
    if grid % 2:
        raise ValueError(
            f"ablations need a second scale, but the encoder's {grid}x{grid} patch grid has an odd side and cannot be "
            "halved; choose another adem.vision_model"
        )
    one, half, quarter = grid * grid, grid * grid // 4, grid * grid // 16
    scales = [[one], [half], [one, half]]
    if grid % 4 == 0:
        scales += [[quarter], [half, quarter], [one, quarter], [one, half, quarter]]
    full = {"scales": [one, half], "use_cls": True, "phi": "silu", "drop_ratio": 0.1}
    base = {"scales": [one], "use_cls": False, "phi": "identity", "drop_ratio": 0.0}
    own = full | {"scales": None, "normalisation": "encoder"}
    language = {name: {"language_model": f"meta-llama/{name}"} for name in ("Llama-3.2-1B", "Llama-3.2-3B")}
    vision = {
        "CLIP ViT-L/14 at 336": {"vision_model": "openai/clip-vit-large-patch14-336"},
        "SigLIP B/16": {"vision_model": "google/siglip-base-patch16-224"},
    }
    tables: dict[str, dict[str, dict[str, Any]]] = {
        "ladder": {
            "base": base,
            "+ CLS": base | {"use_cls": True},
            "+ cross-attention (SiLU)": base | {"use_cls": True, "phi": "silu"},
            "+ multiscale": full | {"drop_ratio": 0.0},
            "+ fusion": full,
            "learnable threshold": full | {"learnable_threshold": True},
            "layer dropout 0.1": full | {"layer_dropout": 0.1},
            "attention dropout 0.1": full | {"cross_attention_dropout": 0.1},
        },
        "placements": {place: full | {"cross_attention": place} for place in PLACEMENTS},
        "scales": {"+".join(map(str, s)): full | {"scales": s} for s in scales},
        "drop": {f"drop {share}": full | {"drop_ratio": share} for share in (0.0, 0.1, 0.25, 0.5)},
        "phi": {phi: full | {"phi": phi} for phi in PHI_NAMES},
        "bases": {"the profile's own": own}
        | {label: own | {"language_revision": None} | model for label, model in language.items()}
        | {label: own | {"vision_revision": None} | model for label, model in vision.items()},
    }
    if name not in tables:
        raise ValueError(f"unknown ablation {name!r}; there are {', '.join(tables)}")
    return tables[name]


def changed(config: AdemConfig, values: Mapping[str, Any]) -> AdemConfig:
    """`config` with other values, checked like a profile."""
    return AdemConfig.model_validate(config.model_dump() | dict(values))


def grid_of(config: AdemConfig) -> int:
    """Side of the patch grid of the profile's vision encoder."""
    found = AutoConfig.from_pretrained(find_model(config.vision_model, config.vision_revision, "ADEM-VL"))
    vision = getattr(found, "vision_config", found)
    return vision.image_size // vision.patch_size
