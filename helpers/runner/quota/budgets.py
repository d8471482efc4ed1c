"""The week's GPU-hours: what the account and the ledger tell of them, and when work must be saved."""

import csv
import math
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from helpers.runner.quota.ledger import FIRST_REFRESH, HOUR, WEEK, Beat, Ledger, open_ledger, when
from helpers.workspace.machine import gpus
from helpers.workspace.place import MARGIN_SECONDS, platform, session_name, session_seconds


class QuotaUnknown(RuntimeError):
    """The account's quota could not be read; the message says why, in words."""


@dataclass(frozen=True)
class Account:
    """What Kaggle says of this week's GPU quota: hours used and allowed, and when it is refreshed (None: unknown)."""

    used: float
    total: float
    refresh: float | None


def timestamp(moment: datetime) -> float:
    """Return seconds since 1970; clients before 2.2.5 leave out the offset of UTC."""
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def parse_account(text: str) -> Account:
    """Read the CSV of `kaggle quota -v`; raises QuotaUnknown if it holds no GPU row that can be read."""
    lines = text.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("resource,")]  # the client may warn first
    rows = csv.DictReader(lines[starts[0] :]) if starts else []
    for row in rows:
        if row["resource"] == "GPU":
            try:
                hours = [float(row[name].removesuffix("h")) for name in ("used", "total")]
                refresh = timestamp(datetime.fromisoformat(row["refreshAt"])) if row["refreshAt"] else None
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise QuotaUnknown(f"`kaggle quota -v` answered what cannot be read ({error}): {row}") from error
            return Account(*hours, refresh)
    raise QuotaUnknown(f"`kaggle quota -v` tells of no GPU: {text.strip()[:200]!r}")


def ask_account(timeout: float = 60.0) -> Account:
    """Ask Kaggle for the account's quota, through its client; raises QuotaUnknown, without a token too."""
    command = [sys.executable, "-c", "from kaggle.cli import main; main()", "quota", "-v"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise QuotaUnknown(f"Kaggle did not answer within {timeout:.0f} s") from error
    told = [line for line in (answer.stdout + answer.stderr).splitlines() if line.strip()]
    if any("Authentication required" in line for line in told):
        raise QuotaUnknown("there is no Kaggle token here (kaggle auth login, or set KAGGLE_API_TOKEN)")
    if "invalid choice: 'quota'" in answer.stderr:  # the client of Kaggle's own image is older
        raise QuotaUnknown("the installed Kaggle client has no `quota` command; version 2.2 has it")
    if answer.returncode:
        raise QuotaUnknown(f"Kaggle's client failed: {told[-1][:200] if told else f'exit code {answer.returncode}'}")
    return parse_account(answer.stdout)


@dataclass(frozen=True)
class Budget:
    """One week's GPU quota in seconds, when the week ends (seconds since 1970), and what is to be said about it."""

    used: float
    total: float
    refresh: float
    source: str = "ledger"
    warnings: tuple[str, ...] = ()

    @property
    def left(self) -> float:
        """GPU seconds that are left this week."""
        return max(0.0, self.total - self.used)

    def sentence(self) -> str:
        """Say the budget in one line."""
        hours = f"{self.used / HOUR:.1f} of {self.total / HOUR:g} GPU-hours used this week ({self.source})"
        return f"{hours}, {self.left / HOUR:.1f} left; refreshed {when(self.refresh)}"


def week(now: float, refresh: float | None = None) -> tuple[float, float]:
    """Return start and end of the quota's week around `now`; `refresh` is any time at which it was or is refreshed."""
    phase = FIRST_REFRESH if refresh is None else refresh
    start = phase + WEEK * math.floor((now - phase) / WEEK)
    return start, start + WEEK


def budget(
    ledger: Ledger,
    weekly_hours: float,
    now: float,
    account: Account | None = None,
    where: str = "kaggle",
    running: Collection[str] = (),
) -> Budget:
    """Return this week's budget: the account's figure or the ledger's, whichever has used more.

    weekly_hours: the hours a week where there is no account to say. running: names of sessions that had not ended when
    the account was asked. It only reserves their time, so what the ledger has of them comes on top of its figure.
    """
    if account is not None and account.refresh is not None:
        ledger.note_refresh(account.refresh)
    start, end = week(now, ledger.refresh)
    used, total, source = ledger.used(start, end, where, now), weekly_hours * HOUR, "ledger"
    if account is not None:
        total, open_ = account.total * HOUR, ledger.used(start, end, where, now, running)
        if account.used * HOUR + open_ >= used:
            used, source = account.used * HOUR + open_, "account and running sessions" if open_ else "account"
    warnings = [*ledger.warnings, ledger.clock_fault(now)]
    return Budget(used, total, end, source, tuple(filter(None, warnings)))


def read_budget(
    weekly_hours: float | None,
    default_hours: float,
    ask: Callable[[], Account] | None = None,
    running: Collection[str] = (),
) -> Budget:
    """Return the budget of the platform at hand, asking Kaggle where that is the platform; failures become warnings.

    weekly_hours: what the user sets, which an account cannot raise; None: the account's, else `default_hours`. ask: how
    to ask for the account's quota, whatever the platform at hand. running: sessions under way besides this one.
    """
    ledger, where, account, warnings = open_ledger(), "kaggle" if ask else counted_platform(), None, ()
    if where == "kaggle":
        try:
            account = (ask or ask_account)()
        except QuotaUnknown as error:
            unknown = f"The account's quota is not known: {error}. Only this workspace's own sessions are counted: "
            warnings = (unknown + "if there were others this week, name fewer hours by --weekly-hours.",)
    if platform() == "kaggle" and gpus():  # a notebook that is run by hand notes nothing
        ledger.beats.append(Beat(session_name(), where, session_seconds(), time.time()))
    found = budget(ledger, weekly_hours or default_hours, time.time(), account, where, {session_name(), *running})
    if weekly_hours is not None:
        found = replace(found, total=min(found.total, weekly_hours * HOUR))
    return replace(found, warnings=(*found.warnings, *warnings))


def counted_platform() -> str:
    """Name the platform whose GPU hours are counted: this one if it has a GPU of its own, else Kaggle."""
    return platform() if platform() == "kaggle" or gpus() else "kaggle"


def limited(weekly_hours: float | None) -> bool:
    """Whether GPU time is to be kept within a budget: with a GPU, on Kaggle or wherever --weekly-hours was given."""
    return bool(gpus()) and (platform() == "kaggle" or weekly_hours is not None)


def deadline(found: Budget, now: float, session_end: float) -> float:
    """Return when work must be saved: the earlier of the session's end and that of the week's hours (since 1970).

    Hours that outlast the week do not end with it: at the refresh there are new ones.
    """
    last = now + found.left
    return min(session_end, (last if last < found.refresh else found.refresh + found.total) - MARGIN_SECONDS)
