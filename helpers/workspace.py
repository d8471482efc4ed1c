"""Where the suite runs: platform, folders, model weights, device, precision and disk."""

import gc
import hashlib
import importlib
import json
import logging
import math
import os
import platform as host
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

KAGGLE_INPUT = Path(os.environ.get("KAGGLE_CACHE_MOUNT_FOLDER", "/kaggle/input"))  # as kagglehub finds it
KAGGLE_WORKING = Path("/kaggle/working")
KAGGLE_SCRATCH = Path("/kaggle/temp")
KAGGLE_IMAGE = Path("/etc")  # holds git_commit and build_date, which name the image
MODEL_DEPTH = 8  # folders between /kaggle/input and a model's config.json: models/owner/name/framework/variation/1
COLAB_CONTENT = Path("/content")
DRIVE = COLAB_CONTENT / "drive" / "MyDrive"
SESSION_HOURS = {"kaggle": 12.0, "colab": 12.0}  # a session's longest life, counted from its start
MARGIN_SECONDS = 900.0  # kept free before a limit: to end the stage, write its figures and hand over the output
IMPORTED = time.monotonic()
SECRETS = ("HF_TOKEN", "KAGGLE_API_TOKEN")  # none is needed: for gated weights, and for the account's GPU quota
SHARED = "SUITE_SECRETS_READ"
SHOWN = "SUITE_VISIBLE_DEVICES"  # what `set_up` put into CUDA_VISIBLE_DEVICES, to tell it from the user's own choice
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


def _first_process_began() -> float:
    """Seconds from the machine's boot to the start of its first process, which a container starts with the session."""
    ticks = Path("/proc/1/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    return int(ticks) / os.sysconf("SC_CLK_TCK")


def session_seconds() -> float:
    """Return the age of this session in seconds, idle time included, by a clock that is never set back.

    A session on Kaggle and Colab begins with the machine's first process, elsewhere with this process.
    """
    if platform() == "local":
        return time.monotonic() - IMPORTED
    return time.clock_gettime(time.CLOCK_BOOTTIME) - _first_process_began()


def session_name() -> str:
    """Return a name that no other session has and that all processes of this one agree on (locally: this process)."""
    began = f"{os.getpid()}-{IMPORTED:.0f}" if platform() == "local" else f"{_first_process_began():.2f}"
    return f"{platform()}-{host.node()}-{began}"


def session_end() -> float:
    """Return when work must be saved because the platform ends the session (seconds since 1970); inf locally."""
    hours = SESSION_HOURS.get(platform(), math.inf)
    return time.time() + 3600 * hours - session_seconds() - MARGIN_SECONDS


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


def repo_root() -> Path:
    """Return the folder that holds `helpers/`: the clone, or where the package is installed."""
    return Path(__file__).resolve().parents[1]


def runs_root() -> Path:
    """Return the folder of all runs: RUNS_ROOT if set, else where the platform keeps files."""
    if os.environ.get("RUNS_ROOT"):
        return Path(os.environ["RUNS_ROOT"]).expanduser().resolve()
    return {"kaggle": KAGGLE_WORKING, "colab": COLAB_CONTENT, "local": repo_root()}[platform()] / "runs"


def scratch_root() -> Path:
    """Return a folder on the disk that is lost with the session; locally one that the system cleans up."""
    return {"kaggle": KAGGLE_SCRATCH, "colab": COLAB_CONTENT / "scratch", "local": Path(tempfile.gettempdir())}[
        platform()
    ]


def set_up() -> None:
    """Prepare this process for a notebook; called before torch or transformers are imported.

    Sets quiet, offline-safe library switches, one visible GPU (a 4-bit model must never meet DataParallel) or as many
    as the notebook's parameters ask for, and on Kaggle and Colab a model cache on scratch disk, so that weights do not
    fill the disk that is kept. Reads secrets. Raises ConfigError if the notebook's profile or overrides are not valid.
    """
    switches = {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    if platform() != "local":
        switches["HF_HOME"] = str(scratch_root() / "huggingface")
    for name, value in switches.items():
        os.environ.setdefault(name, value)
    if os.environ.get("CUDA_VISIBLE_DEVICES") == os.environ.get(SHOWN):  # neither is set, or both by another notebook
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ[SHOWN] = ",".join(map(str, range(_gpus_asked_for())))
    share_secrets()
    # bitsandbytes looks for a CPU kernel on the hub at import and warns that it is not installed: nothing to act on
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*kernels.*", module="bitsandbytes.*")


def _gpus_asked_for() -> int:
    """Return how many GPUs the parameters of the notebook that runs here ask for; 1 where there is no notebook.

    Its first cell has set them. A Stage would know them too late: CUDA reads which GPUs it may use once, and
    bitsandbytes makes it do so when it is imported.
    """
    from helpers.config import load_profile  # which imports this module

    given = vars(sys.modules["__main__"])
    if not isinstance(given.get("overrides"), dict):
        return 1
    profile = load_profile(given.get("profile", ""), given["overrides"])
    return max(profile.encoder.gpus, profile.training.gpus)


def share_secrets() -> list[str]:
    """Read the platform's secrets once, into the environment that child processes inherit; returns the names found.

    What the environment has already is kept. Colab hands secrets to its own kernel only, so a runner started there gets
    them through the environment of the notebook that started it. A secret is never printed and never saved.
    """
    ask = {"kaggle": _kaggle_secret, "colab": _colab_secret, "local": lambda name: None}[platform()]
    for name in SECRETS:
        value = None if os.environ.get(name) or os.environ.get(SHARED) else ask(name)
        if value:
            os.environ[name] = value
    os.environ[SHARED] = "1"  # children need not ask again: each question may take Kaggle's 40 s
    return [name for name in SECRETS if os.environ.get(name)]


def _kaggle_secret(name: str) -> str | None:
    """Ask Kaggle for a secret of the notebook; None where it has none of that name, or no internet."""
    if not os.environ.get("KAGGLE_USER_SECRETS_TOKEN"):
        return None
    from kaggle_secrets import UserSecretsClient

    try:
        return UserSecretsClient().get_secret(name)
    except Exception as error:  # not attached, no such label, no internet: every one means that there is none
        logging.getLogger(__name__).info("no secret %s: %s", name, type(error).__name__)
        return None


def _colab_secret(name: str) -> str | None:
    """Ask Colab for a secret; None where it has none, gives no access, or this is not the notebook's own kernel."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if "google.colab" not in type(shell).__module__:  # elsewhere the answer is a time-out
        return None
    try:
        return importlib.import_module("google.colab.userdata").get(name)
    except Exception as error:  # userdata's own errors: not found, no access, time-out
        logging.getLogger(__name__).info("no secret %s: %s", name, type(error).__name__)
        return None


PACE_FILE = "pace.json"  # beside what a stage that is not done keeps: how fast it was, and what is left


def probe_steps() -> float:
    """Steps after which a stage is to stop and keep what it has, since the runner only measures its pace; else inf."""
    return float(os.environ.get("SUITE_PROBE_STEPS") or math.inf)


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


def drive_runs() -> Path | None:
    """Return the folder on Google Drive that keeps the runs of Colab's sessions; None elsewhere or if not mounted."""
    return DRIVE / "gif-question-answering" / "runs" if platform() == "colab" and DRIVE.is_dir() else None


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _copy_file(source: Path, target: Path, attempts: int, wait: float) -> None:
    """Copy one file under another name, read it back, compare hashes, and only then give it its name."""
    digest, part = _sha256(source), target.with_name(f".{target.name}.part")
    for attempt in range(1, attempts + 1):
        try:
            if target.is_file() and target.stat().st_size == source.stat().st_size and _sha256(target) == digest:
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, part)
            if _sha256(part) != digest:
                raise OSError("what was read back differs from what was written")
            part.replace(target)
            return
        except OSError as error:  # Drive drops its connection (errno 107) and comes back
            if attempt == attempts:
                raise OSError(
                    f"{source.name} could not be copied to {target.parent} in {attempts} attempts: {error}"
                ) from error
            time.sleep(wait * 2 ** (attempt - 1))


def copy_verified(source: Path, target: Path, attempts: int = 5, wait: float = 2.0) -> None:
    """Make folder `target` hold the files of folder `source`, each verified by its hash; for disks that drop out.

    A file that fails is tried again, with pauses of `wait` seconds that double. `stage.json` comes last, so a copy that
    was cut has none and counts as not done. Hidden files are left out; files that `source` lacks are removed. Raises
    OSError if all attempts at a file fail.
    """
    files = [path.relative_to(source) for path in sorted(source.rglob("*")) if path.is_file()]
    files = [file for file in files if not any(part.startswith(".") for part in file.parts)]
    if (target / "stage.json").is_file() and not (source / "stage.json").is_file():
        (target / "stage.json").unlink()
    for file in sorted(files, key=lambda file: file.name == "stage.json"):
        _copy_file(source / file, target / file, attempts, wait)
    for path in [path for path in target.rglob("*") if path.is_file()]:
        if path.relative_to(target) not in files:
            path.unlink()


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
