"""One run of the suite on Kaggle: its stages pushed in order, watched, fetched, handed over and resumed.

Each stage is one Kaggle notebook that attaches the outputs of the stages that it reads, and the helpers as a data set.
Kaggle attaches the newest run without an error, whatever version is asked for; so every stage's manifest is compared
with what was asked of it. A GPU session is only started within the week's GPU-hours. What is known of a run lies in
runs/<run>/kaggle.json, written before and after each step, so that `resume` goes on wherever this program, the network
or a session ended.
"""

import contextlib
import math
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from helpers.config import ConfigError
from helpers.runner import quota
from helpers.runner.kaggle import site as kaggle_site
from helpers.runner.kaggle.files import fetch, names_below
from helpers.runner.kaggle.push import (
    HELPERS,
    build_helpers,
    dataset_metadata,
    kernel_id,
    kernel_metadata,
    lacking,
    next_name,
    slug,
    work_seconds,
    write_kernel,
)
from helpers.runner.kaggle.site import NOT_VALID, UNDER_WAY, EmptyNotebook, Pushed, Site, unknown
from helpers.runner.outcome import DONE, Failed, Paused
from helpers.runner.plan import RunPlan
from helpers.runner.quota.ledger import BEAT_SECONDS
from helpers.stage import attached
from helpers.stage.lock import hold_lock, release_lock
from helpers.stage.manifest import check_outputs, differences, read_manifest, settings_differences, stage_settings
from helpers.stage.suite import StageError, StageSpec
from helpers.workspace.disk import folder_bytes, put_in_place, require_disk, write_json
from helpers.workspace.place import runs_root

CARD = "Tesla T4"  # what the driver calls one of them
MEASURED_FROM, MEASURING_SECONDS = 3600.0, 3600.0  # stages longer than this, and the session that measures their pace
PULLED_GIGABYTES = 5.0  # stages expected to be larger stay on Kaggle unless they are asked for, or their run died
FULL = re.compile(r"Maximum batch \w+ session count of \d+ reached")
NO_HOURS = re.compile(r"\b(GPU|accelerator) quota\b", re.IGNORECASE)  # Maximum weekly GPU quota of 30.00 hours reached
ITSELF = re.compile(r"\b(itself|circular|cyclic|self[- ]referenc)", re.IGNORECASE)  # why it may not attach its output
FULL_POLLS = 2, 20  # polls between two pushes into a house that was full: at first, and at most
NEW_SECONDS = 600.0  # after a push, in which Kaggle may not know of it yet
NAMES = 3  # names at most that a push tries where empty notebooks keep them
ENDED = {"COMPLETE": "complete", "ERROR": "failed", "CANCEL_ACKNOWLEDGED": "cancelled"}


class Remote:
    """One run of the suite on Kaggle, as runs/<run>/kaggle.json knows it."""

    def __init__(self, plan: RunPlan, state: dict[str, Any], site: Site) -> None:
        self.plan, self.state, self.site = plan, state, site
        self.told: set[str] = set()  # what was said about the week's GPU-hours
        self.noted: dict[str, float] = {}  # when each running session was last noted in the ledger
        self.full: dict[bool, tuple[float, int]] = {}  # with a GPU and without: until when, and polls till then
        self.no_hours: tuple[float, str] = (0.0, "")  # until when Kaggle gives no GPU-hours, in its words
        if state.setdefault("owner", self.site.owner) != self.site.owner:
            raise ConfigError(f"run {plan.run!r} belongs to {state['owner']}, but the token is {self.site.owner}'s")
        stages = state.setdefault("stages", {})
        for spec in plan.specs:
            if spec.name not in stages:
                kernel = kernel_id(self.site.owner, plan.run, spec.name)
                self._refuse_anothers(kernel)
                stages[spec.name] = {"status": "waiting", "kernel": kernel, "source": ""}

    def _refuse_anothers(self, kernel: str) -> None:
        """Raise ConfigError if another run holds this notebook: Kaggle's names tell `a_b` and `A.B` not apart."""
        for folder in self._other_runs():
            if kernel in (entry.get("kernel") for entry in quota.pushed_elsewhere(folder).values()):
                raise ConfigError(
                    f"run {self.plan.run!r} would be pushed to the notebook of run {folder.name!r}, {kernel}: Kaggle "
                    "knows only small letters, digits and hyphens in names. Push it under a name that differs in "
                    f"these (--run NAME), or go on with the other: ./run_all.sh kaggle resume --run {folder.name}"
                )

    def _other_runs(self) -> list[Path]:
        return sorted({file.parent for file in runs_root().glob("*/kaggle.json")} - {self.plan.folder})

    def save(self) -> None:
        """Write the state, whole or not at all."""
        self.plan.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.plan.folder / "kaggle.json", self.state)

    def note(self, spec: StageSpec, **values: Any) -> None:
        """Change a stage's entry and save the state."""
        self.state["stages"][spec.name] |= values
        self.save()

    def status(self, spec: StageSpec) -> str:
        """Return waiting, pushing, running, complete, failed or cancelled."""
        return self.state["stages"][spec.name]["status"]

    # -- going on

    def recover(self, anew: Sequence[StageSpec] = ()) -> None:
        """Make what an earlier command left ready to go on: pushes without an answer, dead and refused runs.

        anew: stages whose dead runs are not handed over. Raises DiskFull if one is too large to go through this
        machine, Paused if a run that was started without its sources is still at work.
        """
        self._check_version()
        self.save()
        for spec in anew:
            if self.status(spec) not in ("failed", "cancelled"):
                raise ConfigError(f"--anew {spec.name}: it is {self.status(spec)}; only what died can begin anew")
        for spec in self.plan.specs:
            entry = self.state["stages"][spec.name]
            if entry.get("stray") and entry["status"] == "failed":
                at_work = self._under_way(entry)
                if spec.gpu:
                    self._meter(entry, time.time())
                if at_work:
                    raise Paused(f"{spec.name} still runs without what it needs. {self._how_to_stop(spec)}")
                self.note(spec, stray=False)
            if entry["status"] == "pushing":
                if self._has_arrived(entry):
                    self._confirm(spec, "")
                else:
                    self.note(spec, status="waiting")
            elif entry["status"] in ("failed", "cancelled"):
                if spec in anew:
                    shutil.rmtree(self._fetched(spec, entry.get("version", 0)), ignore_errors=True)
                    entry.pop("manifest", None)
                    self.note(spec, source="")
                elif entry.get("ran"):
                    self._hand_over(spec, entry["version"])
                self.note(spec, status="waiting", ran=False)

    def _has_arrived(self, entry: dict[str, Any]) -> bool:
        """Whether a push whose answer was not seen arrived; raises Paused while that cannot be told."""
        try:
            return self.site.version(entry["kernel"]) > entry["before"]
        except EmptyNotebook as error:
            if _is_new(entry):
                raise Paused(f"{entry['kernel']} was pushed just now and is not to be seen yet") from error
            return False

    def _check_version(self) -> None:
        """Raise ConfigError if a stage was made by a version of the suite that made something else."""
        for spec in self.plan.specs:
            made = self.state["stages"][spec.name].get("manifest")
            if made is not None:
                now = {"contract": spec.contract, "inputs": sorted(spec.inputs)}
                then = {"contract": made["settings"]["contract"], "inputs": sorted(made["settings"]["inputs"])}
                if now != then:
                    words = "\n  ".join(differences(then, now))
                    raise ConfigError(
                        f"{spec.name} of run {self.plan.run!r} was made by another version of the suite:\n  {words}\n"
                        "Go on with that version, or push another run (--run NAME)"
                    )

    def _hand_over(self, spec: StageSpec, version: int) -> None:
        """Save the unfinished work of a run in a data set, since Kaggle does not attach it: it died, or is the own one.

        It goes through this machine. What was fetched stays here until it was sent, so that it is fetched once.
        """
        run, ref = self.plan.run, f"{self.site.owner}/{slug('gifqa', self.plan.run, spec.name[:2], 'work')}"
        folder = self._fetched(spec, version)
        data_set = folder.with_name(f"{spec.name}-work")
        shutil.rmtree(data_set, ignore_errors=True)
        if self._stays_there(spec):
            most, leave_out = spec.gigabytes[self.plan.profile.name], f"--anew {spec.name[:2]}"
            print(
                f"{spec.name}: up to {most:g} GB of the run that ended go through this machine, since Kaggle attaches "
                f"nothing of it. `kaggle resume {leave_out}` drops them, and the stage begins anew",
                flush=True,
            )
            here = folder_bytes(folder) / 1e9
            room = round(max(2 * most - here, here), 1)  # for the files and for their archive
            require_disk(self.plan.folder, room, f"Handing {spec.name} over, unless you resume with {leave_out},")
        self._fetch(spec, version)
        if attached.holds_work(folder):
            attached.pack(run, spec.name, folder, data_set)
            write_json(data_set / "dataset-metadata.json", dataset_metadata(ref))
            print(f"{spec.name}: the work of the run that ended is handed over as {ref}", flush=True)
            self.site.publish(data_set, ref)
            self.note(spec, source=ref)
            shutil.rmtree(data_set)
        shutil.rmtree(folder)

    def follow(self, deadline: float) -> int:
        """Push what can be pushed and watch what runs until all is complete; returns the exit code.

        Raises Failed for the first stage that fails and Paused when a run was cancelled, the deadline passed, or
        nothing runs any more and the week's GPU-hours do not suffice for what is next.
        """
        self._publish_helpers()
        self._say_week()
        while True:
            self.short = ""
            for spec in self.plan.specs:
                if self.status(spec) == "running":
                    self._look(spec)
                if self.status(spec) == "waiting" and all(
                    self.status(other) == "complete" for other in self._before(spec)
                ):
                    self._push(spec)
            if all(self.status(spec) == "complete" for spec in self.plan.specs):
                return DONE
            if self.short and not any(self.status(spec) == "running" for spec in self.plan.specs):
                raise Paused(self.short)
            if time.time() >= deadline:
                raise Paused("still running on Kaggle")
            time.sleep(kaggle_site.POLL_SECONDS)

    # -- the week's GPU-hours

    def _at_work(self) -> list[dict[str, Any]]:
        """Return the entries of this account's GPU sessions that are under way, those of other runs among them."""
        costly = {spec.name for spec in self.plan.suite.stages if spec.gpu}
        stages = [self.state["stages"], *map(quota.pushed_elsewhere, self._other_runs())]
        entries = [entry for run in stages for name, entry in run.items() if name in costly]
        mine = [entry for entry in entries if entry["kernel"].startswith(f"{self.site.owner}/")]
        return [
            entry
            for entry in mine
            if entry["status"] == "pushing"  # whose answer may have been lost
            # another command may have left its run long ago, without seeing its end
            or (quota.begun(entry) and self._under_way(entry))
        ]

    def _under_way(self, entry: dict[str, Any]) -> bool:
        """Whether a stage's run has not ended; one that Kaggle does not know has, unless it was pushed just now."""
        found = self.site.status(_pushed(entry))
        return found[0] in UNDER_WAY if found else _is_new(entry)

    def _meter(self, entry: dict[str, Any], ended: float | None = None) -> str:
        """Note a GPU session's age in the ledger, now and then while it runs, or when it `ended`; returns its name."""
        name, now = quota.session_on_kaggle(entry), time.time()
        if ended is not None or now - self.noted.get(name, -math.inf) >= BEAT_SECONDS:
            seconds = min(max(0.0, (ended or now) - entry["began"]), entry["seconds"])
            quota.open_ledger().note(name, "kaggle", seconds, entry["began"] + seconds)
            self.noted[name] = now
        return name

    def _budget(self) -> quota.Budget:
        """Return the week's budget, with all that running sessions may still use taken as used; prints it once."""
        entries = self._at_work()
        running = {self._meter(entry) for entry in entries if entry["status"] != "pushing"}
        default = self.plan.suite.weekly_hours
        found = quota.read_budget(self.plan.weekly_hours, default, self.site.account, running)
        for line in (f"Quota: {found.sentence()}", *(f"  Warning: {warning}" for warning in found.warnings)):
            self._say_once(line, line)
        held = sum(max(0.0, entry["began"] + entry["seconds"] - time.time()) for entry in entries)
        return replace(found, used=found.used + held)

    def _forecast(self, spec: StageSpec) -> quota.Forecast:
        """Forecast what a stage will still take on Kaggle's GPUs."""
        return quota.forecast(spec, self.plan.profile, self.plan.folder, self.plan.copies(spec), {CARD})

    def _to_measure(self, spec: StageSpec) -> bool:
        """Whether a stage that would take long, as nobody has measured, gets a short session for its first steps."""
        guess = quota.from_minutes(spec, self.plan.profile)
        return spec.probe and guess.seconds >= MEASURED_FROM and self._forecast(spec) == guess

    def _say_week(self) -> None:
        """Print what the GPU stages that are left will take, beside what is left of the week."""
        costly = [spec for spec in self.plan.specs if spec.gpu and self.status(spec) != "complete"]
        if costly:
            found, forecasts = self._budget(), [self._forecast(spec) for spec in costly]
            print(quota.forecast_table(forecasts).to_string(index=False))
            print(quota.outlook(forecasts, found, time.time()), flush=True)

    def _affordable(self, spec: StageSpec) -> float:
        """Return how many seconds a GPU stage's session may last; 0 if the week has too little left, told in `short`.

        Hours that running sessions may still use are not given away a second time.
        """
        now, found, forecast = time.time(), self._budget(), self._forecast(spec)
        seconds = quota.deadline(found, now, now + self.state["seconds"]) - now
        decision = quota.decide(forecast, now, now + work_seconds(seconds))
        if not decision.start:
            self.short = f"{spec.name} waits for GPU-hours. {decision.words}. {quota.outlook([forecast], found, now)}"
            return 0.0
        self._say_once(f"  {spec.name}, {forecast.source}", f"  {decision.words}")
        return seconds

    def _say_once(self, what: str, words: str) -> None:
        """Print a line about `what`, however often it would be: a stage may wait for long, and be asked about again."""
        if what not in self.told:
            print(words, flush=True)
            self.told.add(what)

    # -- pushing and watching

    def _before(self, spec: StageSpec) -> list[StageSpec]:
        return [other for other in self.plan.specs if other.name in {*spec.inputs, *spec.kaggle_sources}]

    def _publish_helpers(self) -> None:
        if all(self.status(spec) in ("complete", "running") for spec in self.plan.specs):
            return
        ref, folder = f"{self.site.owner}/{HELPERS}", self.plan.folder / "kaggle" / "helpers"
        digest = build_helpers(folder, ref, self.plan.suite.kaggle_wheels if self.state["wheels"] else ())
        if self.state.get("helpers") != digest:
            print(f"Helpers: {ref}", flush=True)
            self.site.publish(folder, ref)
            self.state["helpers"] = digest
            self.save()

    def _metadata(self, spec: StageSpec) -> dict[str, Any]:
        """Return kernel-metadata.json with the sources that the stage's state asks for."""
        source = self.state["stages"][spec.name]["source"]
        data_sets = [*self.state["attach"]] if spec.data else []
        data_sets += [source] if "/" in source else []
        names = {name: entry["kernel"] for name, entry in self.state["stages"].items()}
        return kernel_metadata(self.plan, spec, self.site.owner, data_sets, own_output=source == "own", names=names)

    def _push(self, spec: StageSpec) -> None:
        """Push one stage; raises Failed if Kaggle refuses it or attaches other sources than it was given."""
        entry = self.state["stages"][spec.name]
        if self._refused_lately(spec) or self._waits_for_stray(spec):
            return
        if entry["source"] == "own" and not self.state.get("attaches_itself", True):
            self._hand_over(spec, entry.get("worked", entry["version"]))
        cleared: list[str] = []
        while True:
            try:
                refusal = self._send(spec)
                break
            except EmptyNotebook:
                self._clear_away(spec, cleared)
        if refusal is None:
            return
        if FULL.search(refusal):
            if entry.get("message") != refusal:
                print(f"{spec.name} waits: {refusal}", flush=True)
            polls = min(FULL_POLLS[1], max(FULL_POLLS[0], 2 * self.full.get(spec.gpu, (0.0, 0))[1]))
            self.full[spec.gpu] = (time.time() + polls * kaggle_site.POLL_SECONDS, polls)
            self.note(spec, status="waiting", message=refusal)
            return
        self.full.pop(spec.gpu, None)
        if spec.gpu and NO_HOURS.search(refusal):
            self.no_hours = (self._budget().refresh, refusal)
            self.note(spec, status="waiting", message=refusal)
            self._refused_lately(spec)
            return
        self._confirm(spec, refusal)

    def _refused_lately(self, spec: StageSpec) -> bool:
        """Whether a push would be refused again: no hours are left this week, or the house was full moments ago."""
        until, words = self.no_hours
        if spec.gpu and time.time() < until:
            self.short = f"{spec.name} was not pushed: {words}"
            return True
        return time.time() < self.full.get(spec.gpu, (0.0, 0))[0]

    def _waits_for_stray(self, spec: StageSpec) -> bool:
        """Whether a run that was started without its own earlier work, and ends by itself, has not ended yet."""
        entry = self.state["stages"][spec.name]
        if entry.get("stray") and not self._under_way(entry):
            if spec.gpu:
                self._meter(entry, time.time())
            self.note(spec, stray=False)
        return bool(entry.get("stray"))

    def _send(self, spec: StageSpec) -> str | None:
        """Push one stage; returns why Kaggle refused it, else "", None if it is not the time; raises EmptyNotebook."""
        entry, folder = self.state["stages"][spec.name], self.plan.folder / "kaggle" / spec.name
        before = self.site.version(entry["kernel"])
        with alone_in(runs_root() / ".kaggle.lock", "the week's account", patience=kaggle_site.READY_SECONDS):
            seconds = self._affordable(spec) if spec.gpu else self.state["seconds"]
            if not seconds:
                return None
            measure = spec.gpu and self._to_measure(spec)
            if measure:
                seconds = min(seconds, MEASURING_SECONDS)
                line = f"  {spec.name}: a short session measures its pace first; what it does is kept"
                self._say_once(line, line)
            self.note(spec, status="pushing", before=before, began=time.time(), seconds=seconds)
        write_kernel(folder, self.plan, spec, self._metadata(spec), seconds, measure, takes_over=bool(entry["source"]))
        try:
            return self.site.push(folder, seconds, entry["kernel"], before)
        except EmptyNotebook:
            self.note(spec, status="waiting")
            raise

    def _clear_away(self, spec: StageSpec, cleared: list[str]) -> None:
        """Make room for a stage whose notebook is there and empty: delete it, else take the next name.

        cleared: what this has been done to since the last push that was taken. Only what was never run here and cannot
        be read is deleted. Raises Failed where no name helps.
        """
        entry = self.state["stages"][spec.name]
        ref = entry["kernel"]
        where = f"https://www.kaggle.com/code/{ref}"
        if "version" in entry:
            gone = f"Kaggle finds the notebook of its earlier runs no more: look at {where}"
            raise Failed(f"{spec.name}: {gone}. If it was deleted, push anew under another name: --run NAME")
        if ref not in cleared and self._holds_nothing(ref) and self.site.delete(ref):
            cleared.append(ref)
            print(f"{spec.name}: {ref}, which a refused push had left empty, is deleted and pushed anew", flush=True)
            return
        cleared.append(ref)
        if len({*cleared}) >= NAMES:
            raise Failed(f"{spec.name}: Kaggle makes no notebook of any of the names {', '.join(sorted({*cleared}))}")
        self.note(spec, kernel=next_name(ref))
        print(
            f"{spec.name}: {ref} is empty, as a refused push leaves it, and takes no version; the stage goes on as "
            f"{entry['kernel']}. The empty one can be deleted at {where}",
            flush=True,
        )

    def _holds_nothing(self, ref: str) -> bool:
        try:
            return self.site.kernel(ref) is None
        except EmptyNotebook:
            return True

    def _confirm(self, spec: StageSpec, refusal: str) -> None:
        """Compare a push with what Kaggle made of it: with sources that are not valid it runs the rest nevertheless."""
        entry = self.state["stages"][spec.name]
        accepted = not refusal or refusal.startswith(NOT_VALID)  # then the rest of it runs
        arrived = self._arrived(entry["kernel"], entry["before"], patient=accepted)
        lacks = lacking(self._metadata(spec), arrived) if arrived else []
        if entry["source"] == "own" and self._own_alone(spec, refusal, lacks):
            self.state["attaches_itself"] = False
            ends = f"; version {arrived.current_version_number} ends by itself" if arrived else ""
            print(
                f"{spec.name}: no notebook is attached to itself, its work goes as a data set{ends}",
                flush=True,
            )
            self.note(spec, status="waiting", **_stray(arrived))
            return
        if refusal or lacks:
            reason = refusal or f"Kaggle did not attach {', '.join(lacks)}"
            self.note(spec, status="failed", message=reason, ran=False)
            if arrived:  # it runs nevertheless
                self.note(spec, **_stray(arrived))
                reason += f". {self._how_to_stop(spec)}"
            raise Failed(f"{spec.name} was not pushed as asked: {reason}")
        self.note(spec, status="running", version=arrived.current_version_number, message="", ran=True)
        print(f"{spec.name}: pushed, version {entry['version']} of {entry['kernel']}", flush=True)

    def _own_alone(self, spec: StageSpec, refusal: str, lacks: Sequence[str]) -> bool:
        """Whether all that a push was refused for, or lacks, is the notebook itself among its sources."""
        ref = self.state["stages"][spec.name]["kernel"]
        if refusal.startswith(NOT_VALID):
            named = {name.strip().lower() for name in re.findall(r"[\w-]+/[\w/-]+", refusal)}
            return named == {ref.lower()}
        return bool(ITSELF.search(refusal)) if refusal else list(lacks) == [f"the kernel {ref}"]

    def _how_to_stop(self, spec: StageSpec) -> str:
        entry = self.state["stages"][spec.name]
        return f"Stop version {entry['version']} at https://www.kaggle.com/code/{entry['kernel']}, then resume"

    def _arrived(self, ref: str, before: int, patient: bool) -> Any:
        """Return a pushed notebook as Kaggle has it; without it the state of the version before would be taken for it.

        Raises Paused if `patient` waiting was in vain.
        """
        until = time.monotonic() + kaggle_site.READY_SECONDS
        while True:
            try:
                found = self.site.kernel(ref)
            except EmptyNotebook:
                found = None
            if found and (found.current_version_number or 0) > before:
                return found
            if not patient:
                return None
            if time.monotonic() > until:
                raise Paused(f"{ref}: the version that was pushed does not show up on Kaggle")
            time.sleep(kaggle_site.POLL_SECONDS)

    def standing(self, spec: StageSpec) -> tuple[str, str] | None:
        """Return state and message of the run that was pushed; None while Kaggle does not know of it yet.

        Raises ConfigError if it does not although it had time to, or if the notebook is gone.
        """
        entry = self.state["stages"][spec.name]
        found = self.site.status(_pushed(entry))
        if found is None and not (_is_new(entry) and self.site.kernel(entry["kernel"])):
            raise ConfigError(unknown(f"notebook {entry['kernel']}", 404))
        return found

    def log(self, spec: StageSpec) -> str:
        """Return what the run that was pushed printed."""
        return self.site.log(_pushed(self.state["stages"][spec.name]))

    def _look(self, spec: StageSpec) -> None:
        """Ask how a run stands, and take over what it made when it ended."""
        entry = self.state["stages"][spec.name]
        found = self.standing(spec)
        if found is None:
            return
        status, message = found
        if status in UNDER_WAY:
            if spec.gpu:
                self._meter(entry)
            return
        if status not in ENDED:
            raise Failed(f"{spec.name}: Kaggle tells an unknown status {status!r}")
        outcome = ENDED[status]
        self.full.pop(spec.gpu, None)  # there is room again
        self.note(spec, message=message)
        if outcome == "complete":
            self._take(spec)
            return
        if spec.gpu:
            self._meter(entry, time.time())
        self.note(spec, status=outcome)
        if outcome == "cancelled":
            raise Paused(f"{spec.name} was cancelled on Kaggle, at its time limit or by hand")
        tail = "\n".join(self.log(spec).rstrip().splitlines()[-20:])
        raise Failed(f"{spec.name} failed on Kaggle: {message or 'no reason given'}\n{tail}")

    def _take(self, spec: StageSpec) -> None:
        """Check the manifest of a run that ended without an error, and fetch its files."""
        entry = self.state["stages"][spec.name]
        try:
            manifest = self._manifest(spec)
        except Failed as error:
            if spec.gpu:
                self._meter(entry, time.time())
            self.note(spec, status="failed", message=str(error), ran=False)  # nothing of it is handed over
            raise
        if spec.gpu:  # Kaggle's clock against this one's, but never less than it has worked
            worked = manifest["seconds"] - entry.get("manifest", {"seconds": 0.0})["seconds"]
            self._meter(entry, max(datetime.fromisoformat(manifest["finished"]).timestamp(), entry["began"] + worked))
        if manifest["status"] == "partial":
            cut = entry["seconds"] < self.state["seconds"] - 1  # to what was left of the week
            if entry.get("manifest", {}).get("metrics") == manifest["metrics"] and not cut:
                self.note(spec, status="failed", message="no progress", ran=False)
                raise Failed(f"{spec.name} made no progress in a whole session: give it longer (--session HOURS)")
            print(f"{spec.name}: partly done, it goes on in another session", flush=True)
            self.note(spec, status="waiting", source="own", worked=entry["version"], manifest=manifest)
            return
        self.note(spec, manifest=manifest)
        if not self._stays_there(spec):
            self.pull(spec)
        self.note(spec, status="complete", source="")
        print(f"{spec.name}: complete in {manifest['seconds']:.0f} s", flush=True)

    # -- files

    def _stays_there(self, spec: StageSpec) -> bool:
        return spec.gigabytes.get(self.plan.profile.name, 0.0) > PULLED_GIGABYTES

    def _names(self, spec: StageSpec, version: int) -> dict[str, str]:
        """Return the files of the stage's folder among the outputs of one run: relative name and address."""
        entry = self.state["stages"][spec.name]
        return names_below(self.site, Pushed(entry["kernel"], version), f"runs/{self.plan.run}/{spec.name}/")

    def _fetched(self, spec: StageSpec, version: int) -> Path:
        """Return the folder for files of one run of the stage on their way."""
        return self.plan.folder / "kaggle" / f"{spec.name}-{version}"

    def _fetch(self, spec: StageSpec, version: int) -> Path:
        """Fetch the stage's files of one run and return their folder; files that are there are not fetched."""
        folder = self._fetched(spec, version)
        for other in {*folder.parent.glob(f"{spec.name}-*")} - {folder}:
            shutil.rmtree(other)
        folder.mkdir(parents=True, exist_ok=True)
        fetch(self.site, self._names(spec, version), folder, spec.name)
        return folder

    def _manifest(self, spec: StageSpec) -> dict[str, Any]:
        """Fetch and check a stage's manifest: is it of this stage, these settings and these inputs?"""
        url = self._names(spec, self.state["stages"][spec.name]["version"]).get("stage.json")
        if url is None:
            raise Failed(f"{spec.name} ended on Kaggle without finishing its stage: it left no stage.json")
        with tempfile.TemporaryDirectory() as scratch:
            self.site.download(url, Path(scratch) / "stage.json")
            manifest = read_manifest(Path(scratch))
        wanted = self._settings(spec)
        lacks = settings_differences({key: manifest["settings"].get(key) for key in wanted}, wanted)
        if manifest["name"] != spec.name or manifest["status"] not in ("complete", "partial") or lacks:
            raise Failed(
                f"{spec.name} was run on Kaggle with other settings or inputs than this run's:\n  " + "\n  ".join(lacks)
            )
        return manifest

    def _settings(self, spec: StageSpec) -> dict[str, Any]:
        """Return what a manifest must say; parameters may name files that are only on Kaggle, and are left out."""
        profile = spec.asked_profile(self.plan.profile, self.plan.parameters[spec.name])
        settings = stage_settings(spec, profile, {}, self.plan.folder)
        inputs = {name: self.state["stages"][name]["manifest"]["digest"] for name in spec.inputs}
        return {"contract": settings["contract"], "profile": settings["profile"], "inputs": inputs}

    def pull(self, spec: StageSpec) -> Path:
        """Fetch a stage's files into runs/<run>/<stage>, checked against its manifest before they are put there.

        Raises StageError if another result of the stage lies there, Failed if what came is not what was made.
        """
        folder, wanted = self.plan.folder / spec.name, self.state["stages"][spec.name]["manifest"]
        there = read_manifest(folder)
        if there is not None and there["digest"] == wanted["digest"]:
            return folder
        if folder.exists():
            raise StageError(f"{folder} holds another result of {spec.name}: move it away, or use --run NAME")
        scratch = self._fetch(spec, self.state["stages"][spec.name]["version"])
        try:
            manifest = check_outputs(scratch)
        except StageError as error:
            shutil.rmtree(scratch)
            raise Failed(f"{spec.name} did not come whole from Kaggle: {error}") from error
        if manifest["digest"] != wanted["digest"]:
            shutil.rmtree(scratch)
            raise Failed(f"{spec.name} was run again on Kaggle since: resume this run")
        put_in_place(scratch, folder)
        return folder


def _pushed(entry: Mapping[str, Any]) -> Pushed:
    """Name the run of a stage that was pushed last, whatever was run of its notebook since."""
    return Pushed(entry["kernel"], entry["version"])


def _is_new(entry: Mapping[str, Any]) -> bool:
    """Whether a stage was pushed so lately that Kaggle may not know of it yet."""
    return time.time() - entry["began"] < NEW_SECONDS


def _stray(arrived: Any) -> dict[str, Any]:
    """Return what is noted of a run that was started without some of its sources; nothing if none was started."""
    return {"version": arrived.current_version_number, "stray": True} if arrived else {}


@contextlib.contextmanager
def alone_in(lock: Path, what: str, patience: float = 0.0) -> Iterator[None]:
    """Hold a lock while what is inside runs; raises StageError if another process keeps it beyond `patience`."""
    hold_lock(lock, what, patience)
    try:
        yield
    finally:
        release_lock(lock)
