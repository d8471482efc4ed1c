"""Where the suite runs: the platform, its folders, its session and its secrets."""

import importlib
import logging
import math
import os
import platform as host
import sys
import tempfile
import time
from pathlib import Path

KAGGLE_INPUT = Path(os.environ.get("KAGGLE_CACHE_MOUNT_FOLDER", "/kaggle/input"))  # as kagglehub finds it
KAGGLE_WORKING = Path("/kaggle/working")
KAGGLE_SCRATCH = Path("/kaggle/temp")
COLAB_CONTENT = Path("/content")
SESSION_HOURS = {"kaggle": 12.0, "colab": 12.0}  # a session's longest life, counted from its start
MARGIN_SECONDS = 900.0  # kept free before a limit: to end the stage, write its figures and hand over the output
IMPORTED = time.monotonic()
SECRETS = ("HF_TOKEN", "KAGGLE_API_TOKEN")  # none is needed: for gated weights, and for the account's GPU quota
SHARED = "SUITE_SECRETS_READ"


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


def repo_root() -> Path:
    """Return the folder that holds `helpers/`: the clone, or where the package is installed."""
    return Path(__file__).resolve().parents[2]


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
