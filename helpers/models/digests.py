"""What tells frozen weights from others by content: a digest over slices of every layer, read before quantisation."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

SLICES = 4  # rows of each tensor that are read: some MB of a model of 3 billion numbers
TINY = 2.0**-17  # fp16 keeps smaller numbers only roughly, so they count as 0
# from a layer's number on, whatever stands before it: the same weights are saved with and without a prefix
LAYER = re.compile(r"(?:^|\.)((?:layers|h|blocks)\.\d+\..+)$")
BUFFERS = re.compile(r"(^|\.)(inv_freq|masked_bias|position_ids|attn\.bias)$")  # older files hold some, newer do not
HEADS = ("lm_head.weight", "embed_out.weight")  # in a file or not, where they are the embedding once more


def layers_digest(tensors: Iterable[tuple[str, Any]]) -> str:
    """Digest over slices of these tensors: the same whatever folder, file or precision (fp32, bf16, fp16) holds them.

    tensors: names with tensors, or with safetensors' lazy slices of them. Numbers count as rounded to bfloat16, so that
    a copy in 16 bits is the same model, but for one rounded from fp32 to fp16.
    """
    found = {}
    for name, tensor in tensors:
        shape = list(tensor.get_shape() if hasattr(tensor, "get_shape") else tensor.shape)
        if not shape or not shape[0] or BUFFERS.search(name):
            continue
        rows = [0] if len(shape) == 1 else sorted({i * (shape[0] - 1) // (SLICES - 1) for i in range(SLICES)})
        values = torch.cat([(tensor[:] if len(shape) == 1 else tensor[row : row + 1]).flatten() for row in rows])
        values = values.detach().float().cpu().bfloat16().float()
        values = torch.where(values.abs() <= TINY, 0.0, values)
        found[f"{name} {shape}"] = hashlib.sha256(values.contiguous().numpy()).hexdigest()
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:32]


def module_digest(parts: Mapping[str, nn.Module]) -> str:
    """`layers_digest` of modules in memory, which must not be quantised."""
    return layers_digest(
        (f"{part}.{name}", tensor) for part, module in parts.items() for name, tensor in module.state_dict().items()
    )


def language_model_digest(folder: Path | str, tied: bool) -> str:
    """`layers_digest` of a language model's files: the same under 4-bit and not, and no layer is read whole.

    tied: whether its head is its embedding (tie_word_embeddings), so that the file may hold it or not.
    """
    with ExitStack() as stack:
        return layers_digest(language_tensors(_stored(Path(folder), stack), tied))


def language_tensors(tensors: Iterable[tuple[str, Any]], tied: bool) -> Iterator[tuple[str, Any]]:
    """A language model's tensors under names that a file and a module share, without a head that is the embedding."""
    for name, tensor in tensors:
        if not (tied and name.endswith(HEADS)):
            layer = LAYER.search(name)
            yield layer[1] if layer else ".".join(name.split(".")[-2:]), tensor


def _stored(folder: Path, stack: ExitStack) -> Iterator[tuple[str, Any]]:
    """Every tensor in a model's files, not yet read."""
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    for path in files:
        file = stack.enter_context(safe_open(path, framework="pt"))
        yield from ((name, file.get_slice(name)) for name in file.keys())  # noqa: SIM118, a file is no mapping
    for path in [] if files else sorted(folder.glob("pytorch_model*.bin")):
        yield from torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)).items()
