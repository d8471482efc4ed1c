"""The GPU quota: the ledger, the account's figure, forecasts, the deadline, and whole plans under a simulated clock."""

import json
import math
import socket
import sys
import time
from dataclasses import replace
from importlib import metadata
from types import SimpleNamespace

import pytest
import yaml
from packaging.version import Version

from helpers import suite
from helpers.config import ConfigError, load_profile
from helpers.runner import quota
from helpers.runner.quota import budgets, forecasts
from helpers.runner.quota.budgets import Budget, budget, deadline, parse_account, week
from helpers.runner.quota.forecasts import Forecast, decide, plan_sessions
from helpers.runner.quota.ledger import HOUR, WEEK, Ledger
from helpers.stage.pace import note_pace
from helpers.stage.suite import load_suite
from helpers.workspace import place
from helpers.workspace.disk import write_json
from helpers.workspace.place import MARGIN_SECONDS, repo_root

NOW = 1_795_000_000.0  # Wed 18 Nov 2026, 12:26:40 UTC
SATURDAY = 1_795_219_200.0  # Sat 21 Nov 2026, 00:00 UTC
SUITE = load_suite(repo_root() / "notebooks" / "suite.yaml")


# -------------------------------------------------------------------------------------------------- the ledger


def test_only_the_last_age_of_a_session_counts_however_many_processes_noted_it(tmp_path):
    ledger = Ledger(tmp_path / "quota.jsonl")
    for seconds in (60, 120, 100, 120, 3600):
        ledger.note("a", "kaggle", seconds, NOW + seconds)
    ledger.note("b", "kaggle", 1800, NOW + 1800)
    ledger.note("c", "local", 9999, NOW + 9999)
    assert len((tmp_path / "quota.jsonl").read_text().splitlines()) == 7
    again = Ledger(tmp_path / "quota.jsonl")
    assert again.used(NOW - WEEK, NOW + WEEK, "kaggle", NOW + WEEK) == 5400 and again.warnings == []


def test_session_across_the_refresh_counts_in_both_weeks(tmp_path):
    ledger = Ledger(tmp_path / "quota.jsonl")
    for hours in (1, 2, 5):
        ledger.note("a", "kaggle", hours * HOUR, SATURDAY + (hours - 2) * HOUR)
    assert ledger.used(SATURDAY - WEEK, SATURDAY, "kaggle", NOW + WEEK) == 2 * HOUR
    assert ledger.used(SATURDAY, SATURDAY + WEEK, "kaggle", NOW + WEEK) == 3 * HOUR


def test_torn_last_line_is_named_and_does_not_spoil_the_next_one(tmp_path):
    path = tmp_path / "quota.jsonl"
    ledger = Ledger(path)
    ledger.note("a", "kaggle", 60, NOW)
    ledger.note("a", "kaggle", 120, NOW + 60)
    whole = path.read_bytes()
    for cut in range(1, len(whole.splitlines()[1])):
        path.write_bytes(whole[: -1 - cut])
        torn = Ledger(path)
        assert torn.used(0, 2 * NOW, "kaggle", NOW + 99) == 60 and len(torn.warnings) == 1
        assert f"{path}, line 2" in torn.warnings[0]
    torn.note("b", "kaggle", 30, NOW + 90)
    again = Ledger(path)
    assert again.used(0, 2 * NOW, "kaggle", NOW + 99) == 90 and len(again.warnings) == 1


@pytest.mark.parametrize("line", ["[1]", "{}", '{"session": 1}', '{"refresh": true}', '{"refresh": NaN}', "\x00\x00"])
def test_foreign_line_is_named(tmp_path, line):
    (tmp_path / "quota.jsonl").write_text(line + "\n")
    ledger = Ledger(tmp_path / "quota.jsonl")
    assert len(ledger.warnings) == 1 and "line 1" in ledger.warnings[0] and ledger.refresh is None


def test_clock_moved_backwards_makes_no_time_vanish(tmp_path):
    # the session runs for 5 hours of this week; in its middle the clock is set back by ten days
    ledger = Ledger(tmp_path / "quota.jsonl")
    for hours in range(1, 6):
        ledger.note("a", "kaggle", hours * HOUR, NOW + hours * HOUR - (10 * 86400 if hours > 2 else 0))
    start, end = week(NOW)
    assert ledger.used(start, end, "kaggle", NOW + 6 * HOUR) == 5 * HOUR
    back = NOW - 2 * HOUR  # now the clock stands before what was noted
    assert ledger.used(*week(back), "kaggle", back) == 5 * HOUR
    found = budget(ledger, 30, back)
    assert found.used == 5 * HOUR and "The clock moved backwards" in found.warnings[0]
    assert budget(ledger, 30, NOW + 6 * HOUR).warnings == ()


def test_ledgers_of_attached_sessions_are_read_too(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path / "runs"))
    monkeypatch.setattr(place, "KAGGLE_INPUT", tmp_path / "input")
    attached = tmp_path / "input" / "notebooks" / "owner" / "slug" / "runs" / "quota.jsonl"
    for session in ("a", "both"):
        Ledger(attached).note(session, "kaggle", HOUR, NOW)
    for session in ("own", "both"):
        quota.open_ledger().note(session, "kaggle", HOUR, NOW)
    assert quota.open_ledger().used(0, 2 * NOW, "kaggle", NOW) == 3 * HOUR
    assert len((tmp_path / "runs" / "quota.jsonl").read_text().splitlines()) == 2


def test_meter_notes_start_end_and_what_lies_between(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path))
    ages = iter(range(600, 10_000, 60))  # the session was idle for ten minutes before the run began
    beats = SimpleNamespace(count=0)

    def age():
        beats.count += 1
        return float(next(ages))

    with quota.metered(age, interval=0.001) as ledger:
        while beats.count < 4:
            pass
    assert len(ledger.beats) >= 4 and ledger.beats[0].seconds == 600
    last = 600 + 60 * (beats.count - 1)
    assert Ledger(tmp_path / "quota.jsonl").used(0, 9e9, place.platform(), 9e9) == last


# --------------------------------------------------------------------------------------------------- the account

TABLE = "resource,used,remaining,total,refreshAt\n{}TPU,0.00h,20.00h,20.00h,\n"


def test_account_is_read_as_the_client_prints_it():
    text = TABLE.format("GPU,12.50h,17.50h,30.00h,2026-11-21T00:00:00+00:00\n")
    assert parse_account(text) == quota.Account(12.5, 30.0, SATURDAY)
    older = "Warning: an update is available\n" + text.replace("+00:00", "")  # before 2.2.5, and with a word before
    assert parse_account(older) == quota.Account(12.5, 30.0, SATURDAY)
    assert parse_account(TABLE.format("GPU,1h,2h,3,\n")).refresh is None


@pytest.mark.parametrize(
    "text", ["", "No quota information available", TABLE.format(""), TABLE.format("GPU,x,1,2,3\n")]
)
def test_unreadable_account_is_an_error_in_words(text):
    with pytest.raises(quota.QuotaUnknown, match="kaggle quota -v"):
        parse_account(text)


asks_for_quota = pytest.mark.skipif(
    Version(metadata.version("kaggle")) < Version("2.2"), reason="this Kaggle client has no quota command"
)


@asks_for_quota
def test_real_client_prints_what_is_parsed(monkeypatch, capsys):
    from datetime import UTC, datetime, timedelta

    from kaggle.api.kaggle_api_extended import KaggleApi

    gpu = SimpleNamespace(time_used=timedelta(hours=3), total_time_allowed=timedelta(hours=37))
    answer = SimpleNamespace(quota_refresh_time=datetime.fromtimestamp(SATURDAY, UTC), gpu_quota=gpu, tpu_quota=None)
    monkeypatch.setattr(KaggleApi, "quota_view", lambda self: answer)
    KaggleApi().quota_view_cli(csv_display=True)
    assert parse_account(capsys.readouterr().out) == quota.Account(3.0, 37.0, SATURDAY)


@asks_for_quota
def test_without_a_token_the_ledger_alone_is_used_and_said(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path / "runs"))
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_API_V1_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path))
    monkeypatch.setattr(budgets, "counted_platform", lambda: "kaggle")
    found = quota.read_budget(None, 30)
    assert found.total == 30 * HOUR and found.source == "ledger"
    assert "there is no Kaggle token here" in found.warnings[0]


def test_endpoint_that_is_down_is_a_warning_and_no_stop(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path / "runs"))
    monkeypatch.setenv("KAGGLE_API_TOKEN", "KGAT_secret")
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "TEST")
    monkeypatch.setattr(budgets, "counted_platform", lambda: "kaggle")
    with socket.socket() as silent:  # the client's test port, bound so that nobody listens there
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            silent.bind(("127.0.0.1", 7777))
        except OSError:
            pytest.skip("port 7777 is taken, and Kaggle's client knows no other for tests")
        found = quota.read_budget(12.0, 30)
    assert found.total == 12 * HOUR and "Kaggle's client failed" in found.warnings[0]
    assert "KGAT_secret" not in found.warnings[0]


def test_client_that_never_answers_is_given_up(monkeypatch, tmp_path):
    client = tmp_path / "python"
    client.write_text("#!/bin/sh\nexec sleep 60\n")
    client.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(client))
    began = time.monotonic()
    with pytest.raises(quota.QuotaUnknown, match="did not answer within"):
        quota.ask_account(0.2)
    assert time.monotonic() - began < 30


# ------------------------------------------------------------------------------------------ budget and deadline


def test_week_is_kaggles_and_follows_the_account(tmp_path):
    assert week(NOW) == (SATURDAY - WEEK, SATURDAY) and week(SATURDAY) == (SATURDAY, SATURDAY + WEEK)
    told = SATURDAY + 5 * HOUR + 3 * WEEK
    assert week(NOW, told) == (SATURDAY + 5 * HOUR - WEEK, SATURDAY + 5 * HOUR)
    ledger = Ledger(tmp_path / "quota.jsonl")
    assert budget(ledger, 30, NOW, quota.Account(0, 30, told)).refresh == SATURDAY + 5 * HOUR
    # it is remembered, and once a phase is known another line is not needed
    assert budget(Ledger(tmp_path / "quota.jsonl"), 30, NOW).refresh == SATURDAY + 5 * HOUR
    budget(ledger, 30, NOW, quota.Account(0, 30, told + WEEK))
    assert len((tmp_path / "quota.jsonl").read_text().splitlines()) == 1


def test_whichever_has_counted_more_counts(tmp_path):
    ledger = Ledger(tmp_path / "quota.jsonl")
    ledger.note("a", "kaggle", 10 * HOUR, NOW)
    more = budget(ledger, 30, NOW, quota.Account(12, 37, SATURDAY))
    assert (more.used, more.total, more.source) == (12 * HOUR, 37 * HOUR, "account")
    less = budget(ledger, 30, NOW, quota.Account(4, 37, SATURDAY))  # the running session is not in it yet
    assert (less.used, less.left, less.source) == (10 * HOUR, 27 * HOUR, "ledger")
    assert less.sentence() == "10.0 of 37 GPU-hours used this week (ledger), 27.0 left; refreshed Sat 21 Nov 00:00 UTC"


def test_running_sessions_come_on_top_of_an_account_that_tells_of_ended_ones(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path / "quota.jsonl")
    ledger.note("ended", "kaggle", 8 * HOUR, NOW - 10 * HOUR)
    ledger.note("own", "kaggle", 5 * HOUR, NOW)
    found = budget(ledger, 30, NOW, quota.Account(20, 30, SATURDAY), running={"own"})
    assert (found.used, found.left, found.source) == (25 * HOUR, 5 * HOUR, "account and running sessions")
    assert budget(ledger, 30, NOW, quota.Account(2, 30, SATURDAY), running={"own"}).used == 13 * HOUR
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path))
    for name, value in {"session_name": lambda: "own", "counted_platform": lambda: "kaggle"}.items():
        monkeypatch.setattr(budgets, name, value)
    monkeypatch.setattr(time, "time", lambda: NOW)
    monkeypatch.setattr(budgets, "ask_account", lambda: quota.Account(20, 30, SATURDAY))
    assert quota.read_budget(None, 30).used == 25 * HOUR  # of this session the ledger knows


def test_a_notebook_that_is_run_by_hand_counts_its_own_session(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path))
    monkeypatch.setattr(budgets, "platform", lambda: "kaggle")
    monkeypatch.setattr(budgets, "gpus", lambda: [SimpleNamespace(name="Tesla T4")])
    monkeypatch.setattr(budgets, "session_seconds", lambda: 5 * HOUR)
    monkeypatch.setattr(budgets, "ask_account", lambda: quota.Account(20, 30, time.time() + 72 * HOUR))
    assert quota.read_budget(None, 30).used == pytest.approx(25 * HOUR)
    assert not [line for line in (tmp_path / "quota.jsonl").read_text().splitlines() if "session" in line]
    monkeypatch.setattr(budgets, "gpus", list)  # a session without a GPU costs nothing
    assert quota.read_budget(None, 30).used == 20 * HOUR


def test_deadline_is_the_sessions_end_or_the_weeks_hours_whichever_is_first():
    end = NOW + 10 * HOUR
    assert deadline(Budget(0, 30 * HOUR, SATURDAY), NOW, end) == end
    assert deadline(Budget(27 * HOUR, 30 * HOUR, SATURDAY), NOW, end) == NOW + 3 * HOUR - MARGIN_SECONDS
    # two hours that are left one hour before the refresh do not end the work, but the new week's hours may
    assert deadline(Budget(28 * HOUR, 30 * HOUR, NOW + HOUR), NOW, end) == end
    assert deadline(Budget(2 * HOUR, 4 * HOUR, NOW + HOUR), NOW, end) == NOW + 5 * HOUR - MARGIN_SECONDS
    assert deadline(Budget(40 * HOUR, 30 * HOUR, SATURDAY), NOW, math.inf) == NOW - MARGIN_SECONDS


def test_decision_starts_what_fits_or_can_be_paused_and_nothing_else():
    work = Forecast("03", 5 * HOUR, "measured")
    assert decide(work, NOW, math.inf).fits
    paused = decide(work, NOW, NOW + 2 * HOUR)
    assert paused.start and not paused.fits and "about 5.0 h (measured), 2.0 h until the deadline" in paused.words
    assert "less than one epoch" not in decide(replace(work, epoch=2 * HOUR), NOW, NOW + 2 * HOUR).words
    short = decide(replace(work, epoch=2 * HOUR), NOW, NOW + HOUR)
    assert short.start and short.words.endswith(
        "1.0 h until the deadline, which is less than one epoch (2.0 h): saved and paused there"
    )
    assert not decide(work, NOW, NOW + 60).start
    assert decide(Forecast("08", 50, "x"), NOW, NOW + 60).fits  # a short stage fits where a long one does not


# ---------------------------------------------------------------------------------------------------- forecasts


def test_forecast_is_measured_from_the_stages_own_steps(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path))
    spec, profile, run = SUITE.spec("03_adapter_training"), load_profile("kaggle"), tmp_path / "r"
    (run / spec.name / "blind_run").mkdir(parents=True)
    guess = quota.forecast(spec, profile, run)
    assert guess.seconds == 60 * spec.minutes["kaggle"] and "not measured" in guess.source and not guess.measured
    # one of captions, three of questions, and the blind twin's three; no epoch is in the five minutes of starting
    assert guess.epoch == (60 * spec.minutes["kaggle"] - 300) / 7
    short = quota.forecast(spec, load_profile("kaggle", {"alignment.epochs": 0, "training.epochs": 0.25}), run)
    assert short.epoch == short.seconds - 300
    adem = quota.from_minutes(SUITE.spec("05_adem_scienceqa"), load_profile("kaggle", {"adem.epochs": 20}))
    assert adem.epoch == (60 * SUITE.spec("05_adem_scienceqa").minutes["kaggle"] - 300) / 40  # 20, and its twin's
    note_pace(run / spec.name, "steps", 20, 40.0, 980, follow=["steps of the twin"])
    told = quota.forecast(spec, profile, run)
    assert told.measured and told.seconds == 2.0 * 980 + 2.0 * 1000 + quota.START_UP_SECONDS
    assert told.source == "980 steps at 0.5 a second, 1,000 steps of the twin at 0.5 a second"
    note_pace(run / spec.name, "steps", 1000, 2000.0, 0, follow=["steps of the twin"])
    assert quota.forecast(spec, profile, run).seconds == 2000 + quota.START_UP_SECONDS
    note_pace(run / spec.name / "blind_run", "steps of the twin", 400, 400.0, 600)
    told = quota.forecast(spec, profile, run)
    assert told.seconds == 600 + quota.START_UP_SECONDS and told.source == "600 steps of the twin at 1.0 a second"
    note_pace(run / spec.name / "blind_run", "steps of the twin", 1000, 900.0, 0)
    assert quota.forecast(spec, profile, run) == guess  # what comes after training is not measured


def test_an_epoch_is_one_of_what_the_stage_is_at(tmp_path, monkeypatch):
    """Two epochs of captions in 400 steps, then three of questions in 1,500, and as many of the blind twin."""
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path))
    spec, profile, stage = (
        SUITE.spec("03_adapter_training"),
        load_profile("kaggle"),
        tmp_path / "r" / "03_adapter_training",
    )
    folders = {name: stage / name for name in ("alignment", "main", "blind_run")}
    for folder in folders.values():
        folder.mkdir(parents=True)

    def epoch():
        return quota.forecast(spec, profile, tmp_path / "r").epoch

    note_pace(folders["alignment"], "steps", 0, 0.0, 1500, ["steps of the twin"], 3.0)
    assert epoch() == (60 * spec.minutes["kaggle"] - 300) / 7  # nothing is measured yet
    note_pace(folders["alignment"], "steps of the alignment", 20, 30.0, 380, epochs=2.0)
    assert epoch() == 200 * 1.5
    note_pace(folders["alignment"], "steps of the alignment", 400, 600.0, 0, epochs=2.0)
    assert epoch() == 500 * 1.5  # of questions, of whose pace no more is known
    note_pace(folders["main"], "steps", 20, 60.0, 1480, ["steps of the twin"], 3.0)
    assert epoch() == 500 * 3.0
    note_pace(folders["main"], "steps", 1500, 4500.0, 0, ["steps of the twin"], 3.0)
    note_pace(folders["blind_run"], "steps of the twin", 100, 200.0, 1400, epochs=3.0)
    told = quota.forecast(spec, profile, tmp_path / "r")
    assert told.epoch == 500 * 2.0 and told.seconds == 1400 * 2.0 + quota.START_UP_SECONDS
    room = decide(told, NOW, NOW + 960)
    assert "16 min until the deadline, which is less than one epoch (17 min)" in room.words
    note_pace(folders["blind_run"], "answers", 10, 10.0, 5)  # what is no training has no epochs
    note_pace(folders["blind_run"], "steps of the twin", 1500, 3000.0, 0, epochs=3.0)
    assert epoch() == 0


def test_forecast_of_a_pushed_stage_comes_from_its_sessions_there(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path))
    (tmp_path / "r").mkdir()

    def told(**manifest):
        stages = {"03_adapter_training": {"manifest": {"status": "partial", "seconds": HOUR} | manifest}}
        write_json(tmp_path / "r" / "kaggle.json", {"stages": stages})
        return quota.forecast(SUITE.spec("03_adapter_training"), load_profile("kaggle"), tmp_path / "r")

    found = told(to_come=[7200.0, "3.00 s a step"])
    assert found.measured and (found.seconds, found.source, found.epoch) == (7200.0, "3.00 s a step", 0.0)
    assert told(to_come=[7200.0, "3.00 s a step", 900.0]) == replace(found, epoch=900.0)
    minutes = SUITE.spec("03_adapter_training").minutes["kaggle"]
    assert told().seconds == 60 * minutes - HOUR and not told().measured
    assert told(seconds=600.0 * minutes).seconds == quota.USEFUL_SECONDS  # it took longer than was thought
    assert told(status="complete").seconds == 0  # though its files stay there


def test_forecast_of_a_finished_stage_of_its_twin_in_another_run_and_of_a_given_bundle(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path))
    monkeypatch.setattr(forecasts, "gpus", lambda: [SimpleNamespace(name="Tesla T4"), SimpleNamespace(name="Tesla T4")])
    spec, profile = SUITE.spec("02_feature_caching"), load_profile("kaggle")
    folder = tmp_path / "old" / spec.name
    folder.mkdir(parents=True)
    manifest = {"status": "complete", "profile": {"name": "kaggle"}, "machine": {"gpu": "Tesla T4"}, "seconds": 1234.0}
    write_json(folder / "stage.json", manifest)
    other = quota.forecast(spec, profile, tmp_path / "new")
    assert other.seconds == 1234 and other.source == "measured in run 'old'"
    assert quota.forecast(spec, profile, tmp_path / "old").seconds == 0
    monkeypatch.setattr(forecasts, "gpus", lambda: [SimpleNamespace(name="NVIDIA L4")])
    assert "not measured" in quota.forecast(spec, profile, tmp_path / "new").source
    given = quota.forecast(SUITE.spec("03_adapter_training"), profile, tmp_path / "new", copies=True)
    assert given.seconds < HOUR and given.source == "the given bundle is only copied"


# ----------------------------------------------------------------------------------------- sessions and weeks


def gpu_hours_by_week(pieces) -> dict[int, float]:
    """Count each week's GPU-hours minute by minute from when sessions were open, knowing nothing of the planner."""
    hours = {}
    for opened, closed in {(piece.opened, piece.closed) for piece in pieces}:
        minute = opened
        while minute < closed:
            number = int((minute - SATURDAY) // WEEK)
            hours[number] = hours.get(number, 0) + min(60.0, closed - minute) / HOUR
            minute += 60
    return hours


def full_plan() -> list[Forecast]:
    """The GPU stages of 120,000 GIFs as suite.yaml expects them."""
    profile = load_profile("kaggle")
    return [quota.from_minutes(spec, profile) for spec in SUITE.stages if spec.gpu]


LONG = [Forecast("02", 15.6 * HOUR, "x"), Forecast("03", 93.6 * HOUR, "x"), Forecast("04", 6 * HOUR, "x")]


@pytest.mark.parametrize("hours", [30, 8])
@pytest.mark.parametrize("plan", [full_plan(), LONG], ids=["suite.yaml", "the original's hours"])
@pytest.mark.parametrize("day", range(7))
def test_plan_never_exceeds_the_quota_and_does_all_the_work(plan, day, hours):
    pieces = plan_sessions(plan, Budget(0, hours * HOUR, SATURDAY), SATURDAY - WEEK + day * 86400 + 1)
    used = gpu_hours_by_week(pieces)
    assert max(used.values()) <= hours
    assert all(piece.closed - piece.opened <= 12 * HOUR for piece in pieces)
    sessions = {piece.session: piece for piece in pieces}
    assert all(a.closed <= b.opened for a, b in zip(list(sessions.values()), list(sessions.values())[1:], strict=False))
    for work in plan:
        own = [piece for piece in pieces if piece.stage == work.stage]
        worked = sum(max(0.0, piece.ended - piece.began - quota.START_UP_SECONDS) for piece in own)
        assert worked == pytest.approx(work.seconds)
        assert [piece.done for piece in own] == [False] * (len(own) - 1) + [True]
    order = [piece.stage for piece in sorted(pieces, key=lambda piece: piece.began)]
    assert list(dict.fromkeys(order)) == [work.stage for work in plan]
    assert len(used) >= sum(work.seconds for work in plan) / HOUR / hours


@pytest.mark.parametrize("before", [0.4, 3, 6])
def test_session_across_the_refresh_keeps_to_both_weeks(before):
    pieces = plan_sessions(LONG[:1], Budget(0, 8 * HOUR, SATURDAY), SATURDAY - before * HOUR)
    assert pieces[0].closed > SATURDAY and max(gpu_hours_by_week(pieces).values()) <= 8


def test_a_week_that_is_used_up_is_waited_for():
    pieces = plan_sessions(LONG[:1], Budget(29.9 * HOUR, 30 * HOUR, SATURDAY), NOW)
    assert pieces[0].opened == SATURDAY
    with pytest.raises(ConfigError, match="12 min of GPU time a week are too few"):
        plan_sessions(LONG, Budget(0, 0.2 * HOUR, SATURDAY), NOW)


def test_outlook_tells_sessions_and_weeks():
    free, spent = Budget(0, 30 * HOUR, SATURDAY), Budget(30 * HOUR, 30 * HOUR, SATURDAY)
    work = [Forecast("a", HOUR, "x")]
    assert "Nothing is left" in quota.outlook([Forecast("a", 0, "done")], free, NOW)
    assert quota.outlook(work, free, NOW).endswith("in 1 session over 1 week.")
    assert quota.outlook(work, spent, NOW).endswith("over 1 week, the first from Sat 21 Nov 00:00 UTC.")
    long = quota.outlook([Forecast("a", 40 * HOUR, "x")], free, SATURDAY - 30 * HOUR)
    assert long.endswith("in 4 sessions over 2 weeks.")
    assert "never be done" in quota.outlook(work, Budget(0, 60, SATURDAY), NOW)


# ------------------------------------------------------------------------------------------------ the command line


def test_quota_command_tells_forecast_and_draws_the_weeks(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path / "runs"))
    monkeypatch.setattr(budgets, "ask_account", lambda: quota.Account(28.0, 30.0, SATURDAY))
    monkeypatch.setattr(time, "time", lambda: NOW)
    figure = tmp_path / "weeks.png"
    assert suite.main(["quota", "--profile", "kaggle", "--figure", str(figure)]) == 0
    out = capsys.readouterr().out
    assert "28.0 of 30 GPU-hours used this week (account), 2.0 left" in out and "over 3 weeks" in out
    assert "03_adapter_training  21.7 h yes suite.yaml's minutes, not measured" in out
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_quota_command_counts_what_was_pushed_and_still_runs(tmp_path, monkeypatch, capsys):
    """Two sessions of five hours: the account's 20 hours hold the one that has ended, and not the other."""
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path / "runs"))
    monkeypatch.setattr(budgets, "ask_account", lambda: quota.Account(20.0, 30.0, SATURDAY))
    monkeypatch.setattr(time, "time", lambda: NOW)
    entries = {
        "03": {"status": "running", "kernel": "me/a", "version": 2},
        "04": {"status": "complete", "kernel": "me/b", "version": 1},
        "05": {"status": "waiting", "kernel": "me/c"},
    }
    (tmp_path / "runs" / "pushed").mkdir(parents=True)
    write_json(tmp_path / "runs" / "pushed" / "kaggle.json", {"owner": "me", "stages": entries})
    for session in ("me/a/2", "me/b/1"):
        quota.open_ledger().note(session, "kaggle", 5 * HOUR, NOW)
    assert suite.main(["quota", "--profile", "kaggle"]) == 0
    assert "25.0 of 30 GPU-hours used this week (account and running sessions)" in capsys.readouterr().out


@pytest.mark.parametrize("hours", ["0", "-1", "200", "nan", "x"])
def test_senseless_weekly_hours_are_refused(hours, capsys):
    with pytest.raises(SystemExit):
        suite.main(["quota", "--weekly-hours", hours])
    assert "--weekly-hours" in capsys.readouterr().err


def test_suite_file_sets_the_weekly_hours(tmp_path):
    text = yaml.safe_load((repo_root() / "notebooks" / "suite.yaml").read_text())
    (tmp_path / "suite.yaml").write_text(json.dumps(text | {"weekly_hours": 12.5}))
    assert load_suite(tmp_path / "suite.yaml").weekly_hours == 12.5
