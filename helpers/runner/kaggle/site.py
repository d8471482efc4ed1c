"""Kaggle as the suite sees it: its own client, with faults of the network retried and refusals told in words."""

import contextlib
import hashlib
import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from helpers.config import ConfigError
from helpers.runner import quota
from helpers.runner.outcome import Failed, Paused
from helpers.workspace.disk import file_sha256, whole

POLL_SECONDS, RETRY_SECONDS, TRIES = 30.0, 5.0, 6
ANSWER_SECONDS = 120.0  # without a byte of an answer, after which a request is given up and sent again
READY_SECONDS = 3600.0  # new data sets took 15 minutes for 228 MB
NOT_VALID = "not valid as sources"  # how the reason begins if a push was taken without some of its sources
NOT_FOUND = re.compile(r"\b(notebook|kernel) not found", re.IGNORECASE)  # of a push: it went to an empty notebook
UNDER_WAY = {"QUEUED", "RUNNING", "CANCEL_REQUESTED", "NEW_SCRIPT"}
CONTENT = "content-{}.txt"  # a file of every data set, named after the digest of the others


class Pushed(str):
    """`owner/name` of a notebook, of which the run of one version is meant. As a text it is the name alone."""

    version: int

    def __new__(cls, ref: str, version: int) -> "Pushed":
        """Name version `version` of the notebook `ref`."""
        found = super().__new__(cls, ref)
        found.version = version
        return found


class EmptyNotebook(ConfigError):
    """A notebook that a refused push left behind: it has no version, takes none, and its name is not free."""

    def __init__(self, ref: str) -> None:
        super().__init__(f"notebook {ref} is there and empty, as a push that Kaggle refused leaves it: resume the run")


class Unanswered(Paused):
    """A request that failed however often it was sent; `code`: the HTTP status that came last, 0 if none came."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@contextlib.contextmanager
def _without(name: str) -> Iterator[None]:
    before = os.environ.pop(name, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before


@contextlib.contextmanager
def _as_known() -> Iterator[None]:
    """Tell in words that the installed client has other names than those used here; every use of it goes through this.

    Some of them are private ones of the SDK, and all may move with an update.
    """
    try:
        yield
    except (ImportError, AttributeError) as error:
        installed = ", ".join(f"{name} {metadata.version(name)}" for name in ("kaggle", "kagglesdk"))
        raise ConfigError(
            f"Kaggle's client as installed ({installed}) is not the one that this suite knows: {error}. Install the "
            "versions in requirements.lock, or newer ones if these are older: pip install --upgrade kaggle kagglesdk"
        ) from error


def _sign_in() -> Any:
    """Return Kaggle's own client, signed in; raises ConfigError if there is no token or it is refused."""
    # The package signs in while it is imported, prints a page of help if it cannot, and does not honour
    # KAGGLE_API_ENVIRONMENT then: without the token that first attempt is none, and the second one below is told apart.
    with _without("KAGGLE_API_TOKEN"), contextlib.redirect_stdout(io.StringIO()):
        with contextlib.suppress(SystemExit):  # what version 2.0 does after its page; the module is there all the same
            import kaggle  # noqa: F401
        from kaggle.api.kaggle_api_extended import KaggleApi
        from kagglesdk import KaggleClient, get_access_token_from_env
        from requests import HTTPError
        from requests.adapters import HTTPAdapter

    class Patient(HTTPAdapter):
        def send(self, request: Any, **options: Any) -> Any:
            """As the parent, which waits for ever where the SDK names no limit: a laptop that slept would hang."""
            return super().send(request, **options | {"timeout": options.get("timeout") or ANSWER_SECONDS})

    class Client(KaggleApi):
        def build_kaggle_client(self) -> KaggleClient:
            """As the parent, which names the production site here; the SDK itself asks KAGGLE_API_ENVIRONMENT."""
            login = {key: self.config_values.get(key) for key in (self.CONFIG_NAME_USER, self.CONFIG_NAME_KEY)}
            client = KaggleClient(
                username=login[self.CONFIG_NAME_USER],
                password=login[self.CONFIG_NAME_KEY],
                api_token=self.config_values.get(self.CONFIG_NAME_TOKEN),
            )
            http = client.http_client()
            http._init_session()
            for scheme in ("https://", "http://"):
                http._session.mount(scheme, Patient())
            return client

    api = Client()
    way = (
        "Make a token at https://www.kaggle.com/settings/api, and put it into the variable KAGGLE_API_TOKEN "
        "or the file ~/.kaggle/access_token."
    )
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            api.authenticate()
    except SystemExit:
        had = get_access_token_from_env()[0]
        raise ConfigError(
            f"{'Kaggle refused the token: it is expired or wrong' if had else 'no token'}. {way}"
        ) from None
    except HTTPError as error:
        if error.response is not None and error.response.status_code == 401:
            raise ConfigError(f"Kaggle refused the token: it is expired or wrong. {way}") from None
        raise
    return api


def unknown(what: str, code: int) -> str:
    """Say that Kaggle answered 403 or 404 to a question."""
    return f"{what}: Kaggle knows no such thing of yours ({code}): check name and owner"


class Site:
    """What the suite asks of Kaggle, through its own client; faults of the network are retried."""

    def __init__(self) -> None:
        self.api = self._call("signing in", _sign_in)
        with _as_known():
            self.owner: str = self.api.config_values[self.api.CONFIG_NAME_USER]
            self._description: str = self.api.DATASET_METADATA_FILE  # of the files of a data set

    def _call(self, what: str, function: Callable[[], Any], absent: tuple[int, ...] = ()) -> Any:
        """Call the client; returns None for an HTTP status in `absent`.

        Raises ConfigError where the answer is a refusal, Paused if there was no answer in several attempts.
        """
        import requests

        fault, code = Exception(), 0
        for attempt in range(TRIES):
            if attempt:
                print(f"  {what}: no answer ({type(fault).__name__}), trying again", file=sys.stderr)
                time.sleep(RETRY_SECONDS * 2 ** (attempt - 1))
            try:
                with _as_known():
                    return function()
            except requests.HTTPError as error:
                code = error.response.status_code if error.response is not None else 0
                if code in absent:
                    return None
                if code == 401:
                    raise ConfigError(
                        f"{what}: Kaggle refused the token (401): it is expired; make a new one"
                    ) from None
                if code in (403, 404):
                    raise ConfigError(unknown(what, code)) from None
                if code != 429 and code < 500:
                    raise Failed(f"{what}: {error}") from error
                fault = error
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                fault, code = error, 0
        raise Unanswered(f"{what}: Kaggle did not answer {TRIES} times; runs that were started go on there", code)

    def _ask(self, what: str, method: str, kind: str, absent: tuple[int, ...] = (), **fields: Any) -> Any:
        """Send one request of the SDK: the client's own methods hide the HTTP status, and truncate lists.

        kind: the type of the request, by name. A field that this SDK lacks is told; it would leave it out in silence.
        """

        def send() -> Any:
            from kagglesdk.datasets.types import dataset_api_service
            from kagglesdk.kernels.types import kernels_api_service

            of_data_sets = hasattr(dataset_api_service, kind)
            request = getattr(dataset_api_service if of_data_sets else kernels_api_service, kind)()
            for name, value in fields.items():
                getattr(request, name)
                setattr(request, name, value)
            with self.api.build_kaggle_client() as client:
                api = client.datasets.dataset_api_client if of_data_sets else client.kernels.kernels_api_client
                return getattr(api, method)(request)

        return self._call(what, send, absent=absent)

    def account(self) -> quota.Account:
        """Return the account's GPU quota; raises QuotaUnknown where Kaggle or its client does not tell."""
        import requests

        if not hasattr(self.api, "quota_view"):
            raise quota.QuotaUnknown("the installed Kaggle client cannot ask for it; version 2.2 can")
        try:
            told = self.api.quota_view()
        except requests.RequestException as error:
            raise quota.QuotaUnknown(f"Kaggle does not tell ({type(error).__name__})") from error
        if told.gpu_quota is None:
            raise quota.QuotaUnknown("Kaggle tells of no GPU")
        hours = [told.gpu_quota.time_used, told.gpu_quota.total_time_allowed]
        refresh = told.quota_refresh_time
        return quota.Account(*(span.total_seconds() / 3600 for span in hours), refresh and quota.timestamp(refresh))

    def data_set_version(self, ref: str) -> int:
        """Return the newest version's number; 0 while there is none that can be read."""
        owner, name = ref.split("/")
        fields = {"owner_slug": owner, "dataset_slug": name}
        found = self._ask(f"data set {ref}", "get_dataset", "ApiGetDatasetRequest", absent=(403, 404), **fields)
        return found.current_version_number or 0 if found else 0

    def publish(self, folder: Path, ref: str) -> None:
        """Make the data set, or its next version, of a folder's files, and wait until notebooks can attach it.

        Nothing is sent where the newest version holds just these files. Raises Failed if Kaggle refuses them, Paused if
        they are not ready in time.
        """
        hashes = {path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.name != self._description}
        content = CONTENT.format(hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:16])
        (folder / content).touch()
        before = self.data_set_version(ref)
        if before and {*hashes, content} <= self._files(ref):
            return
        error = self._make(folder, ref, new=not before)
        if not before and "already in use" in error:  # made by an earlier command, and not to be seen until it is ready
            self._wait(ref, 0, content)
            before = self.data_set_version(ref)
            error = self._make(folder, ref, new=False)
        if error:
            raise Failed(f"data set {ref} was refused: {error}")
        self._wait(ref, before, content)
        lacks = {*hashes, content} - self._files(ref)
        if lacks:  # the client leaves out a file that failed to upload, and says nothing
            raise Failed(f"data set {ref} lacks {', '.join(sorted(lacks))}; resume uploads it again")

    def _make(self, folder: Path, ref: str, new: bool) -> str:
        """Send a folder's files as a data set or its next version; returns Kaggle's reason if it was refused."""

        def send() -> Any:
            if new:
                return self.api.dataset_create_new(str(folder), quiet=True)
            return self.api.dataset_create_version(str(folder), "by run_all.sh", quiet=True)

        answer = self._call(f"data set {ref}", send)
        if answer is None or (answer.status or "").lower() != "ok":
            return (answer and answer.error) or "no reason given"
        return answer.error or ""

    def _files(self, ref: str) -> set[str]:
        """Return the names of the newest version's files; a data set takes fifty."""
        found = self._call(f"files of {ref}", lambda: self.api.dataset_list_files(ref, None, 200))
        return {file.name for file in found.files}

    def _wait(self, ref: str, before: int, content: str) -> None:
        until = time.monotonic() + READY_SECONDS
        while not self._ready(ref, before, content):
            if time.monotonic() > until:
                raise Paused(f"data set {ref} is not ready after {READY_SECONDS / 60:.0f} minutes")
            time.sleep(POLL_SECONDS)

    def _ready(self, ref: str, before: int, content: str) -> bool:
        """Whether what was sent can be attached; its owner gets 403 until then.

        It is a version after `before`, or, where Kaggle makes none of files that equal the last one's, that one.
        """
        status = self._call(f"data set {ref}", lambda: self.api.dataset_status(ref), absent=(403, 404))
        if status in ("failed", "deleted"):
            raise Failed(f"data set {ref} is {status} on Kaggle")
        return status == "ready" and (self.data_set_version(ref) > before or content in self._files(ref))

    def kernel(self, ref: str) -> Any:
        """Return what Kaggle knows of a notebook (its metadata), or None if there is none.

        Raises EmptyNotebook where it answers 500 however often it is asked, and has never run the notebook.
        """
        try:
            found = self._ask_kernel(ref, "get_kernel", "ApiGetKernelRequest", absent=(403, 404))
        except Unanswered as error:
            if error.code == 500 and self.status(ref) is None:
                raise EmptyNotebook(ref) from error
            raise
        return found.metadata if found else None

    def version(self, ref: str) -> int:
        """Return a notebook's newest version number, 0 if there is none; raises EmptyNotebook."""
        found = self.kernel(ref)
        return found.current_version_number or 0 if found else 0

    def delete(self, ref: str) -> bool:
        """Delete a notebook with all its versions; returns whether Kaggle did."""
        answer = self._ask_kernel(ref, "delete_kernel", "ApiDeleteKernelRequest", absent=(400, 403, 404, 409, 500))
        return answer is not None and not answer.error_message

    def push(self, folder: Path, seconds: float, ref: str, before: int) -> str:
        """Push a notebook; returns Kaggle's reason if it was refused, else "".

        A push whose answer was lost is not sent twice: a version after `before` says that it arrived. Raises
        EmptyNotebook if Kaggle finds no notebook to make a version of, under a name that it keeps all the same.
        """
        import requests

        def send() -> str:
            try:
                answer = self.api.kernels_push(str(folder), timeout=str(int(seconds)))
            except requests.RequestException as error:
                code = getattr(error.response, "status_code", 500)
                if code == 404:
                    raise EmptyNotebook(ref) from error
                if code < 500:
                    raise
                # a gateway may fail after the push arrived, and what arrived may show up late
                for attempt in range(TRIES):
                    with contextlib.suppress(EmptyNotebook):
                        if self.version(ref) > before:
                            return ""
                    time.sleep(RETRY_SECONDS * 2**attempt)
                raise
            if answer is None:
                return "no reason given"
            if NOT_FOUND.search(answer.error or ""):
                raise EmptyNotebook(ref)
            filed = (answer.ref or "").strip("/").removeprefix("code/")
            if not answer.error and filed and filed.lower() != ref.lower():
                return (
                    f"Kaggle filed it as {filed} instead of {ref}, where its results are looked for: stop and delete "
                    "it there, and any notebook of that title, or use --run NAME"
                )
            kinds = {"data sets": answer.invalid_dataset_sources, "notebooks": answer.invalid_kernel_sources}
            kinds["models"] = answer.invalid_model_sources
            invalid = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names)
            return answer.error or (f"{NOT_VALID}: {invalid}" if invalid else "")

        return self._call(f"push of {ref}", send)

    def _ask_kernel(self, ref: str, method: str, kind: str, absent: tuple[int, ...] = (), **fields: Any) -> Any:
        """Ask about a notebook, of the version that `ref` means, else of the newest."""
        fields["user_name"], fields["kernel_slug"] = ref.split("/")
        if isinstance(ref, Pushed):
            fields["version_label"] = f"v{ref.version}"  # the bare number is answered 404
        return self._ask(f"notebook {ref}", method, kind, absent, **fields)

    def status(self, ref: str) -> tuple[str, str] | None:
        """Return the state of a notebook's run and Kaggle's message about a failure; None if Kaggle knows no run."""
        kind = "ApiGetKernelSessionStatusRequest"
        found = self._ask_kernel(ref, "get_kernel_session_status", kind, absent=(403, 404))
        return (found.status.name, found.failure_message or "") if found else None

    def _outputs(self, ref: str) -> tuple[dict[str, str], str]:
        files: dict[str, str] = {}
        fields: dict[str, Any] = {"page_size": 100}
        while True:
            kind = "ApiListKernelSessionOutputRequest"
            page = self._ask_kernel(ref, "list_kernel_session_output", kind, **fields)
            files |= {file.file_name: file.url for file in page.files or []}
            if not page.next_page_token:
                return files, page.log or ""
            fields["page_token"] = page.next_page_token

    def outputs(self, ref: str) -> dict[str, str]:
        """Return name and address of each file that a notebook's run left, also of one that died."""
        return self._outputs(ref)[0]

    def log(self, ref: str) -> str:
        """Return what a notebook's run printed."""
        text = self._outputs(ref)[1]
        try:
            return "".join(event.get("data", "") for event in json.loads(text))
        except (ValueError, AttributeError, TypeError):  # not the list of events that it is now
            return text

    def download(self, url: str, path: Path) -> None:
        """Fetch one file, whole or not at all."""
        import requests

        def fetch() -> None:
            with whole(path) as temporary:
                with requests.get(url, stream=True, timeout=120) as answer:
                    answer.raise_for_status()
                    with temporary.open("wb") as file:
                        for block in answer.iter_content(1 << 20):
                            file.write(block)
                expected = answer.headers.get("Content-Length")
                if expected and "Content-Encoding" not in answer.headers and temporary.stat().st_size != int(expected):
                    raise requests.ConnectionError(f"{path.name} came short")

        self._call(f"download of {path.name}", fetch)
