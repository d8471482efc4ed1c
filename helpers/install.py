"""Installs what an image lacks, before anything is imported; only the standard library is used here."""

import importlib
import logging
import os
import re
import subprocess
import sys
import tempfile
import warnings
from importlib import metadata
from pathlib import Path

from helpers.workspace.place import platform, repo_root, scratch_root, share_secrets

SHOWN = "SUITE_VISIBLE_DEVICES"  # what `set_up` put into CUDA_VISIBLE_DEVICES, to tell it from the user's own choice


def set_up() -> None:
    """Prepare this process for a notebook; called before torch or transformers are imported.

    Sets quiet, offline-safe library switches, one visible GPU (a 4-bit model must never meet DataParallel) or as many
    as the notebook's parameters ask for, and on Kaggle and Colab a model cache on scratch disk, so that weights do not
    fill the disk that is kept. Reads secrets. Raises ConfigError if the notebook's profile or overrides are not valid.
    """
    switches = {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin at barriers starve each other where a core is taken
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
    from helpers.config import load_profile  # pydantic may not be there before install_missing

    given = vars(sys.modules["__main__"])
    if not isinstance(given.get("overrides"), dict):
        return 1
    profile = load_profile(given.get("profile", ""), given["overrides"])
    return max(getattr(section, "gpus", 1) for _, section in profile)


PACKAGE = "gif-question-answering"  # the wheel in which the helpers come
NEVER_TOUCHED = ("torch", "torchvision", "numpy", "pillow")  # built into the image for each other
NOT_IN_A_KERNEL = {"jupyter", "kaggle", "nbclient", "nbformat", "papermill", "ipykernel"}  # of use outside only


def missing_packages() -> list[str]:
    """Return what a notebook needs and the environment lacks, with the supported ranges."""
    clone = repo_root() / "requirements.txt"
    if clone.is_file():
        lines = clone.read_text(encoding="utf-8").partition("# Development")[0].splitlines()
        stated = [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]
    else:
        stated = metadata.requires(PACKAGE) or []
    names = {line: re.match(r"[A-Za-z0-9._-]+", line)[0].lower() for line in stated}
    return [line for line, name in names.items() if name not in NOT_IN_A_KERNEL and not _installed(name)]


def install_missing(wheels: Path | str = "") -> None:
    """Install what is missing, from the folder `wheels` alone where all of it lies there, else from PyPI.

    torch, numpy and Pillow stay as the image has them. On Kaggle and Colab torchao goes: peft refuses the old version
    there, and the suite does not use it. Raises RuntimeError with pip's own words if something cannot be installed.
    """
    if platform() != "local" and _installed("torchao"):
        _pip("uninstall", "--yes", "torchao")
    missing = missing_packages()
    if not missing:
        return
    print(f"Installing {', '.join(missing)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "kept.txt"
        kept.write_text("".join(f"{name}=={metadata.version(name)}\n" for name in NEVER_TOUCHED if _installed(name)))
        ways = [["--no-index", "--find-links", str(wheels)]] if wheels else []
        faults = []
        for way in [*ways, []]:
            try:
                _pip("install", "--constraint", str(kept), *way, *missing)
                break
            except RuntimeError as error:
                faults.append(str(error))
        else:
            raise RuntimeError(
                f"{', '.join(missing)} could not be installed. Switch the notebook's internet on, or attach the wheels "
                "(./run_all.sh kaggle push --wheels). pip said, from the wheels first where there are any:\n"
                + "\n".join(faults)
            )
    importlib.invalidate_caches()


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _pip(*arguments: str) -> None:
    line = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-2000:])
