"""Where the suite runs: platform, folders, model weights, device, precision and disk."""

import gc
import json
import logging
import os
import platform as host
import re
import shutil
import warnings
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

KAGGLE_INPUT = Path(os.environ.get("KAGGLE_CACHE_MOUNT_FOLDER", "/kaggle/input"))  # as kagglehub finds it
KAGGLE_WORKING = Path("/kaggle/working")
KAGGLE_SCRATCH = Path("/kaggle/temp")
MODEL_DEPTH = 8  # folders between /kaggle/input and a model's config.json: models/owner/name/framework/variation/1
COLAB_CONTENT = Path("/content")
PACKAGES = (  # what a result can depend on; recorded with every stage
    "torch", "transformers", "peft", "bitsandbytes", "accelerate", "tokenizers", "huggingface_hub", "safetensors",
    "numpy", "pandas", "pillow", "albumentations", "pylance", "pyarrow", "pydantic", "papermill", "matplotlib",
)  # fmt: skip


class ModelNotFound(FileNotFoundError):
    """Model weights that no source has; the message lists every way to get them."""


class DiskFull(OSError):
    """A folder without the room that the next step needs."""


class DeadlineReached(RuntimeError):
    """Work that stopped because its time was up; the message tells what is kept. The same call goes on from there."""


def platform() -> str:
    """Tell the platform: 'kaggle', 'colab' or 'local'.

    Kaggle's image is built from Colab's and may carry its variables, so Kaggle is asked first. Environment variables
    only: notebook kernels started by a runner inherit them, while IPython's shell class does not tell there.
    """
    if os.environ.get("KAGGLE_KERNEL_RUN_TYPE"):
        return "kaggle"
    return "colab" if any(name.startswith("COLAB_") for name in os.environ) else "local"


def default_profile() -> str:
    """Name the platform's own profile."""
    return {"kaggle": "kaggle", "colab": "colab", "local": "tiny"}[platform()]


def repo_root() -> Path:
    """Return the folder that holds `helpers/`: the clone, or where the package is installed."""
    return Path(__file__).resolve().parents[1]


def runs_root() -> Path:
    """Return the folder of all runs: RUNS_ROOT if set, else where the platform keeps files."""
    if os.environ.get("RUNS_ROOT"):
        return Path(os.environ["RUNS_ROOT"]).expanduser().resolve()
    return {"kaggle": KAGGLE_WORKING, "colab": COLAB_CONTENT, "local": repo_root()}[platform()] / "runs"


def set_up() -> None:
    """Prepare this process for a notebook; called before torch or transformers are imported.

    Sets quiet, offline-safe library switches, one visible GPU (a 4-bit model must never meet DataParallel), and on
    Kaggle a model cache on scratch disk, so that weights do not fill the 20 GB that are kept.
    """
    switches = {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "CUDA_VISIBLE_DEVICES": "0",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    if platform() == "kaggle":
        switches["HF_HOME"] = str(KAGGLE_SCRATCH / "huggingface")
    for name, value in switches.items():
        os.environ.setdefault(name, value)
    # bitsandbytes looks for a CPU kernel on the hub at import and warns that it is not installed: nothing to act on
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*kernels.*", module="bitsandbytes.*")


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


def machine() -> dict[str, Any]:
    """Describe this machine: platform, system, cores, memory and free disk (GB), GPU."""
    import psutil
    import torch

    facts: dict[str, Any] = {
        "platform": platform(),
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


def free_gigabytes(path: Path | str) -> float:
    """Return the free disk space (GB = 1e9 bytes) at `path` or at its nearest existing parent."""
    path = Path(path).resolve()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free / 1e9


def require_disk(path: Path | str, gigabytes: float, what: str) -> None:
    """Raise DiskFull unless `path`'s disk has `gigabytes` (1e9 bytes) free for `what`."""
    free = free_gigabytes(path)
    if free < gigabytes:
        raise DiskFull(
            f"{what} needs about {gigabytes:g} GB at {path}, but only {free:.1f} GB are free. "
            "Free some space, or point RUNS_ROOT to a larger disk."
        )


@cache
def _attached_configs(folder: Path) -> list[Path]:
    """All config.json files in attached inputs that lie at most eight folders deep, where attached models end."""
    depths = ["/".join(["*"] * depth + ["config.json"]) for depth in range(1, MODEL_DEPTH + 1)]
    return sorted(path for depth in depths for path in folder.glob(depth))


def _attached_model(model_id: str) -> Path | None:
    """Find a model attached on Kaggle: a folder with config.json whose path carries all words of the model's name.

    Paths look like models/metaresearch/llama-3.2/transformers/3b-instruct/1; the mount point has moved before, so only
    words are compared. An instruction-tuned model never stands in for its base model.
    """
    words = set(re.split(r"[^a-z0-9.]+", model_id.split("/")[-1].lower()))
    found = []
    for config in _attached_configs(KAGGLE_INPUT):
        have = set(re.split(r"[^a-z0-9.]+", str(config.parent.relative_to(KAGGLE_INPUT)).lower()))
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


def _hub_model(model_id: str, revision: str | None) -> str:
    """Return the folder of a hub snapshot, from the cache without network if it is complete there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    small = ["*.json", "*.txt", "*.model"]
    for weights in (["*.safetensors"], ["pytorch_model*.bin"]):  # older checkpoints exist in the second form only
        patterns = {"allow_patterns": [*small, *weights], "ignore_patterns": ["*/*"]}
        try:
            folder = snapshot_download(model_id, revision=revision, local_files_only=True, **patterns)
        except LocalEntryNotFoundError:
            folder = None
        if folder is None or not _has_all_weights(Path(folder), weights[0]):
            folder = snapshot_download(model_id, revision=revision, **patterns)
        if _has_all_weights(Path(folder), weights[0]):
            return folder
    raise FileNotFoundError(f"the hub's {model_id} has neither safetensors nor pytorch_model.bin files")


def find_model(model_id: str, revision: str | None = None) -> str:
    """Return the local folder of a model's weights.

    Looked for in this order: the shipped `tiny/*` models, a folder given as `model_id`, a model attached on Kaggle,
    the Hugging Face cache or hub, `models/<name>` in the repository. Raises ModelNotFound with every way out.
    """
    name = model_id.split("/")[-1]
    if model_id.startswith("tiny/"):
        folder = Path(__file__).resolve().parent / "assets" / "tiny" / name
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
        return _hub_model(model_id, revision)
    except Exception as error:  # gated, unknown, offline, no disk: all lead to the same ways out, with the cause named
        local = repo_root() / "models" / name
        if (local / "config.json").is_file():
            return str(local)
        cause = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        at = f" at revision {revision}" if revision else ""
        raise ModelNotFound(
            f"No weights for {model_id}{at}. The hub said: {cause}\nWays out:\n"
            "  1. On Kaggle: attach the model to the notebook (Add Input > Models; Llama asks for its licence there).\n"
            f"  2. Hugging Face: accept the licence at https://huggingface.co/{model_id} if it is gated, then run "
            "`hf auth login` or set HF_TOKEN.\n"
            f"  3. Without network: put config.json, tokenizer and safetensors files into {local}, or give a folder: "
            "-p language_model.model FOLDER (encoder: -p encoder.model FOLDER; in Python the arguments language_model "
            "and video_model).\n"
            "  4. No weights at all: --profile tiny uses the models that ship with the suite."
        ) from error
