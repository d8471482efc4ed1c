"""What the suite runs on: GPUs, device, precision, packages."""

import gc
import os
import platform as host
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.workspace.disk import free_gigabytes
from helpers.workspace.place import platform, runs_root

if TYPE_CHECKING:
    import torch

KAGGLE_IMAGE = Path("/etc")  # holds git_commit and build_date, which name the image
PACKAGES = (  # what a result can depend on; recorded with every stage
    "torch", "transformers", "peft", "bitsandbytes", "accelerate", "tokenizers", "huggingface_hub", "safetensors",
    "numpy", "pandas", "pillow", "albumentations", "pylance", "pyarrow", "pydantic", "papermill", "matplotlib",
)  # fmt: skip


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver tells of it: memory in GiB, compute capability as (major, minor)."""

    name: str
    memory: float
    capability: tuple[int, int]


def gpus() -> list[Gpu]:
    """Return the machine's GPUs, whether or not this process may use them; asks the driver and loads no torch."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    if shutil.which(query[0]) is None:
        return []
    answer = subprocess.run(query, capture_output=True, text=True)
    if answer.returncode:  # the tool is there, but no driver: a GPU image on a machine without one
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines() if line.strip()]
    return [Gpu(name, float(memory) / 1024, tuple(map(int, cap.split(".")))) for name, memory, cap in rows]


def device() -> "torch.device":
    """Return the GPU if there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def free_memory() -> None:
    """Give back the memory of models that were deleted: a Trainer and its model refer to each other in circles."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compute_dtype(device: "torch.device") -> "torch.dtype":
    """Return the precision to compute in: CUDA capability >= 8.0 bfloat16, below float16, on a CPU float32.

    `torch.cuda.is_bf16_supported()` is not asked: it answers True on a T4, which only emulates bfloat16.
    """
    import torch

    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def package_versions(names: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Return the installed version of each package; "absent" where it is not installed."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


def image() -> str | None:
    """Name the version of the platform's image: Colab's release, Kaggle's commit and date; None locally."""
    where = platform()
    if where == "colab":
        return os.environ.get("COLAB_RELEASE_TAG", "unknown")
    if where == "local":
        return None
    told = [KAGGLE_IMAGE / name for name in ("git_commit", "build_date")]
    return " ".join(file.read_text(encoding="utf-8").strip() for file in told if file.is_file()) or "unknown"


def machine() -> dict[str, Any]:
    """Describe this machine: platform and its image, system, cores, memory and free disk (GB), GPU."""
    import psutil
    import torch

    facts: dict[str, Any] = {
        "platform": platform(),
        "image": image(),
        "system": f"{host.system()} {host.machine()}",
        "python": host.python_version(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "disk_free_gb": round(free_gigabytes(runs_root()), 1),
        "gpu": None,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = properties.name
        facts["gpu_memory_gb"] = round(properties.total_memory / 1e9, 1)
        facts["gpu_capability"] = f"{properties.major}.{properties.minor}"
    return facts
