"""The stand-in for Kaggle, and an account on it."""

import socket
import time
import zipfile
from pathlib import Path

import pytest

from helpers.runner.kaggle import push as kaggle_push
from helpers.runner.kaggle import site as kaggle_site
from tests.kaggle_stand_in import PORT, TOKEN, StandIn


def wait_for_port(seconds: float = 60.0) -> None:
    """Skip the test if another program keeps the port on which the client looks for its test server."""
    until = time.monotonic() + seconds
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", PORT))
                return
            except OSError:
                if time.monotonic() > until:
                    pytest.skip(f"port {PORT} is taken, and Kaggle's client knows no other for tests")
        time.sleep(0.5)


@pytest.fixture
def account(tmp_path, monkeypatch):
    """A home without credentials, the stand-in's token, a runs folder, and no patience."""
    for name in ("KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_KERNEL_RUN_TYPE", "SUITE_DEADLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "TEST")
    monkeypatch.setenv("KAGGLE_API_TOKEN", TOKEN)
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path / "runs"))
    monkeypatch.setattr(kaggle_site, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(kaggle_site, "RETRY_SECONDS", 0.01)
    return tmp_path / "runs"


@pytest.fixture
def site(tmp_path, account):
    """The stand-in, at work."""
    wait_for_port()
    with StandIn(tmp_path / "platform") as stand_in:
        yield stand_in


@pytest.fixture
def empty_wheels(monkeypatch) -> None:
    """Wheels are empty archives, made in a moment."""

    def pip(*arguments: str) -> None:
        if arguments[0] == "download":
            folder = Path(arguments[arguments.index("--dest") + 1])
            wanted = [word.replace("-", "_").replace("==", "-") for word in arguments if "==" in word]
            names = [f"{name}-py3-none-any.whl" for name in wanted]
        else:
            folder = Path(arguments[arguments.index("--wheel-dir") + 1])
            names = ["gif_question_answering-0.1.0-py3-none-any.whl"]
        for name in names:
            zipfile.ZipFile(folder / name, "w").close()

    monkeypatch.setattr(kaggle_push, "_pip", pip)
