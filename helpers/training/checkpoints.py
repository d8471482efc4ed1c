"""Checkpoints: trainable tensors and state, written whole or not at all, found and compared."""

import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file
from torch import nn

from helpers.config import deciding
from helpers.models.parts import require_finite, tensor_faults
from helpers.stage.manifest import differences
from helpers.training.collective import TrainingError
from helpers.workspace.disk import file_sha256, put_in_place, whole

# Raised by hand when a run under the same settings would give another result, so that older checkpoints are refused.
CONTRACT = 1
TENSORS, HISTORY, META, STATE = "trainable.safetensors", "history.parquet", "checkpoint.json", "trainer_state.json"
KEPT_CHECKPOINTS = 2


class CheckpointError(TrainingError):
    """The checkpoint in the folder belongs to other settings, data or parameters, or cannot be used."""


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that learn, by name. TrainingError if there are none or one is not float32."""
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise TrainingError("the model has no trainable parameter: is its adapter attached and the connector unfrozen?")
    for name, p in found.items():
        # Half-precision parameters lose small updates, and the gradient scaler refuses their gradients.
        if p.dtype != torch.float32:
            raise TrainingError(f"trainable parameter {name} is {p.dtype}; keep trainable parameters in float32")
    return found


def parameter_table(model: nn.Module) -> pd.DataFrame:
    """Parameters by part: trainable, all (a packed 4-bit weight counts its logical values), share trained."""
    rows: dict[str, list[int]] = {}
    for name, p in model.named_parameters():
        count = rows.setdefault(name.split(".")[0], [0, 0])
        packed = getattr(p, "quant_state", None)
        size = math.prod(packed.shape) if packed is not None else p.numel()
        count[0] += size * p.requires_grad
        count[1] += size
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["trainable", "all"])
    table.loc["total"] = table.sum()
    return table.assign(share=table["trainable"] / table["all"])


def _step_folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def commit_checkpoint(temporary: Path, folder: Path, step: int, info: dict[str, Any]) -> Path:
    """Seal the files in `temporary` with their hashes, rename it to `folder`/step-N, and keep the newest two."""
    files = sorted(p for p in temporary.iterdir() if p.is_file())
    info = info | {"step": step, "files": {p.name: file_sha256(p) for p in files}}
    (temporary / META).write_text(json.dumps(info, indent=1))
    final = folder / f"step-{step:08d}"
    put_in_place(temporary, final)
    for old in _step_folders(folder)[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(old)
    return final


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint's description and check every file against it. ValueError or OSError if it is torn."""
    info = json.loads((path / META).read_text())
    for name, digest in info["files"].items():
        if file_sha256(path / name) != digest:
            raise ValueError(f"{name} does not match its hash")
    return info


def newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Newest whole checkpoint in `folder` with its description, or None. Torn ones are passed over with a warning."""
    for path in reversed(_step_folders(folder)):
        try:
            info = _read_checkpoint(path)
            info["fingerprint"].keys()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warnings.warn(f"checkpoint {path.name} is damaged ({error}); trying the one before it", stacklevel=3)
            continue
        return path, info
    return None


def find_checkpoint(folder: Path, ours: dict[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """`newest_checkpoint` of a run of this identity.

    Raises CheckpointError if it belongs to a run with other settings, data or parameters.
    """
    found = newest_checkpoint(folder)
    if found:
        path, info = found
        other = differences(deciding(info["fingerprint"]), deciding(ours), there="in the checkpoint")
        if other:
            raise CheckpointError(
                f"the checkpoint {path} is of another run:\n  "
                + "\n  ".join(other)
                + f"\nSet these back, give the run another name, or delete {folder} to train anew."
            )
    return found


def load_tensors(model: nn.Module, path: Path) -> None:
    """Copy a checkpoint's tensors into the trainable parameters. CheckpointError names one that is amiss."""
    tensors, parameters = load_file(path / TENSORS), trainable(model)
    if faults := tensor_faults(tensors, parameters):
        raise CheckpointError(f"{path / TENSORS} does not fit this model: {faults}")
    require_finite(tensors, path / TENSORS, f"delete {path} to go on from the one before it", CheckpointError)
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


def write_history(history: pd.DataFrame, folder: Path) -> None:
    """Write `folder`/history.parquet at once or not at all."""
    with whole(folder / HISTORY) as temporary:
        history.to_parquet(temporary)
