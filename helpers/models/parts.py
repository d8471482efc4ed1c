"""What every model shares: strict and finite tensors, telling base models apart, answering without a gradient."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

IGNORED = -100  # label of a token without loss, the convention of torch's cross entropy
SHOWN_FAULTS = 8
AGAIN = "copy the bundle again, or train it anew"


class BundleError(ValueError):
    """A bundle or weights that cannot be used: files, tensors, or the models that a bundle was trained on."""


def padded_candidates(rows: Sequence[Sequence[Sequence[int]]]) -> np.ndarray:
    """Token ids of the candidate answers of each row as one array [B, K, A], `IGNORED` where there is none."""
    size = len(rows), max(map(len, rows)), max(len(tokens) for row in rows for tokens in row)
    padded = np.full(size, IGNORED, dtype=np.int64)
    for row, own in zip(padded, rows, strict=True):
        for place, tokens in zip(row, own, strict=False):
            place[: len(tokens)] = tokens
    return padded


def token_batches(lengths: np.ndarray, budget: int) -> list[list[int]]:
    """Positions of `lengths` (tokens) in batches of like length, longest first, each at most `budget` padded tokens.

    A row that is longer than the budget makes a batch of its own.
    """
    batches: list[list[int]] = []
    widest = 0
    for i in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        if batches and (len(batches[-1]) + 1) * widest <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
            widest = int(lengths[i])
    return batches


def tensor_faults(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Say how tensors differ from the expected ones, in name, shape or kind of number; "" if they do not."""
    faults = [f"missing: {name}" for name in sorted(expected.keys() - given.keys())]
    faults += [f"not expected: {name}" for name in sorted(given.keys() - expected.keys())]
    for name in sorted(expected.keys() & given.keys()):
        if given[name].shape != expected[name].shape:
            faults.append(f"{name} is {list(given[name].shape)}, expected {list(expected[name].shape)}")
        elif expected[name].is_floating_point() and not given[name].is_floating_point():
            faults.append(f"{name} is {given[name].dtype}, expected floating-point numbers")
    more = f" and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
    return "; ".join(faults[:SHOWN_FAULTS]) + more


def require_finite(
    tensors: Mapping[str, Tensor], where: Path | str, what_to_do: str, error: type[Exception] = BundleError
) -> None:
    """Raise `error`, naming tensors and `where` they are, if one holds NaN or infinity: no answer would mean anything.

    Of a weight in 4 bits, whose own numbers are always finite, the scales of its blocks are looked at.
    """
    faults = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    if faults:
        more = f" and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
        named = ", ".join(faults[:SHOWN_FAULTS]) + more
        raise error(f"{where} holds numbers that are not finite (NaN or infinity) in {named}: {what_to_do}")


def _is_finite(tensor: Tensor) -> bool:
    if (packed := getattr(tensor, "quant_state", None)) is not None:
        # with double quantisation the scales are packed too: theirs, and the mean that was taken off
        scales = [packed.state2.absmax, packed.offset] if packed.nested else [packed.absmax]
        return all(_is_finite(scale) for scale in scales)
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2 or not tensor.numel():
        return True
    # one pass and no mask in memory: the extremes are NaN where any number is
    return bool(torch.isfinite(torch.stack(tensor.detach().aminmax())).all())


def load_strictly(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read a safetensors file of exactly the expected names and shapes and of finite numbers, or raise BundleError."""
    if not path.is_file():
        raise BundleError(f"{path} is missing; a bundle holds it, copy the whole folder")
    tensors = read_tensors(path)
    if faults := tensor_faults(tensors, expected):
        raise BundleError(f"{path} does not fit this model: {faults}")
    require_finite(tensors, path, AGAIN)
    return tensors


def read_tensors(path: Path, error: type[Exception] = BundleError) -> dict[str, Tensor]:
    """Read a safetensors file of a bundle; raises `error`, in a sentence, if it is damaged."""
    try:
        return load_file(path)
    except SafetensorError as fault:
        raise error(f"{path} is damaged ({fault}): {AGAIN}") from fault


def read_facts(path: Path, error: type[Exception] = BundleError) -> dict[str, Any]:
    """Read a JSON file of a bundle; raises `error`, in a sentence, if it is no object or damaged."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(facts, dict):
            raise ValueError("it is no JSON object")
    except ValueError as fault:  # bytes that are no UTF-8 too
        raise error(f"{path} is damaged ({fault}): {AGAIN}") from fault
    return facts


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors takes them: detached, on the CPU, contiguous."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def same_base(ours: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    """Whether two identities are of one base model: all is equal, but for the precision of the weights' sample."""
    if any(ours[key] != given.get(key) for key in ours if key != "weights"):
        return False
    # bfloat16 keeps 8 bits: a model loaded in another precision is still the same model
    return np.allclose(ours["weights"], given["weights"], rtol=2**-8, atol=1e-6)


def warn_without_digest(identities: Mapping[str, Mapping[str, Any]], where: Path | str) -> None:
    """Warn once of a bundle that was made before layers were digested: its base models are compared by a sample."""
    if old := [part.replace("_", " ") for part, identity in identities.items() if "digest" not in identity]:
        warnings.warn(
            f"{where} was made before bundles told every layer of their base models: of the {' and the '.join(old)} "
            "only a small sample of weights is compared. Train it anew to have all compared.",
            stacklevel=3,
        )


def require_same_base(ours: dict[str, Any], given: dict[str, Any], what: str, name: str, given_name: str) -> None:
    """Raise BundleError, naming both, unless the given base model is the one that the bundle was trained on."""
    if same_base(ours, given):
        return
    detail = "other weights or another tokenizer" if ours["architecture"] == given["architecture"] else ""
    raise BundleError(
        f"this bundle was trained on the {what} {name} ({ours['architecture']}); it does not fit {given_name} "
        f"({detail or given['architecture']}). Give the model that it was trained on, or train a bundle for this one."
    )


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Run what is inside in evaluation mode and without gradients; the model is left in the mode in which it was."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)
