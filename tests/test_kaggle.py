"""run_all.sh kaggle: Kaggle's real client against a stand-in on loopback that executes what is pushed."""

import json
import socket
import time
from pathlib import Path

import pytest

from helpers import kaggle
from helpers.suite import main
from helpers.workspace import repo_root
from tests.kaggle_stand_in import PORT, TOKEN, Fault, StandIn


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
    monkeypatch.setattr(kaggle, "POLL_SECONDS", 0.2)
    monkeypatch.setattr(kaggle, "RETRY_SECONDS", 0.01)
    return tmp_path / "runs"


@pytest.fixture
def site(tmp_path, account):
    """The stand-in, at work."""
    wait_for_port()
    with StandIn(tmp_path / "platform") as stand_in:
        yield stand_in


def test_one_stage(site, account, capfd):
    code = main(
        ["kaggle", "push", "--profile", "tiny", "--only", "01", "-p", "shapes.train", "8", "-p", "shapes.test", "4"]
    )
    print(capfd.readouterr())
    assert code == 0
