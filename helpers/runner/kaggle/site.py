"""Kaggle as the suite sees it: its own client, with faults of the network retried and refusals told in words."""

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from helpers.config import ConfigError
from helpers.runner import quota
from helpers.runner.outcome import Failed, Paused
from helpers.workspace.disk import whole

POLL_SECONDS, RETRY_SECONDS, TRIES = 30.0, 5.0, 6
ANSWER_SECONDS = 120.0  # without a byte of an answer, after which a request is given up and sent again
READY_SECONDS = 3600.0  # new data sets took 15 minutes for 228 MB
NOT_VALID = "not valid as sources"  # how the reason begins if a push was taken without some of its sources
UNDER_WAY = {"QUEUED", "RUNNING", "CANCEL_REQUESTED", "NEW_SCRIPT"}


@contextlib.contextmanager
def _without(name: str) -> Iterator[None]:
    before = os.environ.pop(name, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before


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


class Site:
    """What the suite asks of Kaggle, through its own client; faults of the network are retried."""

    def __init__(self) -> None:
        self.api = self._call("signing in", _sign_in)
        self.owner: str = self.api.config_values[self.api.CONFIG_NAME_USER]

    def _call(self, what: str, function: Callable[..., Any], *arguments: Any, absent: tuple[int, ...] = ()) -> Any:
        """Call the client; returns None for an HTTP status in `absent`.

        Raises ConfigError where the answer is a refusal, Paused if there was no answer in several attempts.
        """
        import requests

        for attempt in range(TRIES):
            try:
                return function(*arguments)
            except requests.HTTPError as error:
                code = error.response.status_code if error.response is not None else 0
                if code in absent:
                    return None
                if code == 401:
                    raise ConfigError(
                        f"{what}: Kaggle refused the token (401): it is expired; make a new one"
                    ) from None
                if code in (403, 404):
                    raise ConfigError(
                        f"{what}: Kaggle knows no such thing of yours ({code}): check name and owner"
                    ) from None
                if code != 429 and code < 500:
                    raise Failed(f"{what}: {error}") from error
                fault = error
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                fault = error
            print(f"  {what}: no answer ({type(fault).__name__}), trying again", file=sys.stderr)
            time.sleep(RETRY_SECONDS * 2**attempt)
        raise Paused(f"{what}: Kaggle did not answer {TRIES} times; runs that were started go on there")

    def _ask(self, what: str, service: str, method: str, request: Any, absent: tuple[int, ...] = ()) -> Any:
        """Send one request of the SDK: the client's own methods hide the HTTP status, and truncate lists."""

        def send() -> Any:
            with self.api.build_kaggle_client() as client:
                api = client.kernels.kernels_api_client if service == "kernels" else client.datasets.dataset_api_client
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
        from kagglesdk.datasets.types.dataset_api_service import ApiGetDatasetRequest

        request = ApiGetDatasetRequest()
        request.owner_slug, request.dataset_slug = ref.split("/")
        found = self._ask(f"data set {ref}", "datasets", "get_dataset", request, absent=(403, 404))
        return found.current_version_number or 0 if found else 0

    def publish(self, folder: Path, ref: str) -> None:
        """Make the data set, or its next version, of a folder's files, and wait until notebooks can attach it."""
        before = self.data_set_version(ref)
        error = self._make(folder, ref, new=not before)
        if not before and "already in use" in error:  # made by an earlier command, and not to be seen until it is ready
            self._wait(ref, 0)
            before = self.data_set_version(ref)
            error = self._make(folder, ref, new=False)
        if error:
            raise Failed(f"data set {ref} was refused: {error}")
        self._wait(ref, before)
        sent = {path.name for path in folder.iterdir()} - {self.api.DATASET_METADATA_FILE}
        there = {file.name for file in self._call(f"files of {ref}", self.api.dataset_list_files, ref, None, 200).files}
        if not sent <= there:  # the client leaves out a file that failed to upload, and says nothing
            raise Failed(f"data set {ref} lacks {', '.join(sorted(sent - there))}; resume uploads it again")

    def _make(self, folder: Path, ref: str, new: bool) -> str:
        """Send a folder's files as a data set or its next version; returns Kaggle's reason if it was refused."""
        if new:
            answer = self._call(f"data set {ref}", lambda: self.api.dataset_create_new(str(folder), quiet=True))
        else:
            send = self.api.dataset_create_version
            answer = self._call(f"data set {ref}", lambda: send(str(folder), "by run_all.sh", quiet=True))
        if answer is None or (answer.status or "").lower() != "ok":
            return (answer and answer.error) or "no reason given"
        return answer.error or ""

    def _wait(self, ref: str, before: int) -> None:
        until = time.monotonic() + READY_SECONDS
        while not self._ready(ref, before):
            if time.monotonic() > until:
                raise Paused(f"data set {ref} is not ready after {READY_SECONDS / 60:.0f} minutes")
            time.sleep(POLL_SECONDS)

    def _ready(self, ref: str, before: int) -> bool:
        """Whether a version after `before` can be attached; its owner gets 403 until then."""
        status = self._call(f"data set {ref}", self.api.dataset_status, ref, absent=(403, 404))
        if status in ("failed", "deleted"):
            raise Failed(f"data set {ref} is {status} on Kaggle")
        return status == "ready" and self.data_set_version(ref) > before

    def kernel(self, ref: str) -> Any:
        """Return what Kaggle knows of a notebook (its metadata), or None if there is none."""
        from kagglesdk.kernels.types.kernels_api_service import ApiGetKernelRequest

        request = ApiGetKernelRequest()
        request.user_name, request.kernel_slug = ref.split("/")
        found = self._ask(f"notebook {ref}", "kernels", "get_kernel", request, absent=(403, 404))
        return found.metadata if found else None

    def version(self, ref: str) -> int:
        """Return a notebook's newest version number; 0 if there is none."""
        found = self.kernel(ref)
        return found.current_version_number or 0 if found else 0

    def push(self, folder: Path, seconds: float, ref: str, before: int) -> str:
        """Push a notebook; returns Kaggle's reason if it was refused, else "".

        A push whose answer was lost is not sent twice: a version after `before` says that it arrived.
        """
        import requests

        def send() -> str:
            try:
                answer = self.api.kernels_push(str(folder), timeout=str(int(seconds)))
            except requests.RequestException as error:
                if getattr(error.response, "status_code", 500) < 500:
                    raise
                # a gateway may fail after the push arrived, and what arrived may show up late
                for attempt in range(TRIES):
                    if self.version(ref) > before:
                        return ""
                    time.sleep(RETRY_SECONDS * 2**attempt)
                raise
            if answer is None:
                return "no reason given"
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

    def _status(self, ref: str, absent: tuple[int, ...] = ()) -> Any:
        from kagglesdk.kernels.types.kernels_api_service import ApiGetKernelSessionStatusRequest

        request = ApiGetKernelSessionStatusRequest()
        request.user_name, request.kernel_slug = ref.split("/")
        return self._ask(f"notebook {ref}", "kernels", "get_kernel_session_status", request, absent)

    def status(self, ref: str) -> tuple[str, str]:
        """Return the state of a notebook's newest run and Kaggle's message about a failure."""
        found = self._status(ref)
        return found.status.name, found.failure_message or ""

    def under_way(self, ref: str) -> bool:
        """Whether a notebook's newest run has not ended; that of a notebook which is gone has."""
        found = self._status(ref, absent=(403, 404))
        return found is not None and found.status.name in UNDER_WAY

    def _outputs(self, ref: str) -> tuple[dict[str, str], str]:
        from kagglesdk.kernels.types.kernels_api_service import ApiListKernelSessionOutputRequest

        request = ApiListKernelSessionOutputRequest()
        request.user_name, request.kernel_slug = ref.split("/")
        request.page_size = 100
        files: dict[str, str] = {}
        while True:
            page = self._ask(f"files of {ref}", "kernels", "list_kernel_session_output", request)
            files |= {file.file_name: file.url for file in page.files or []}
            if not page.next_page_token:
                return files, page.log or ""
            request.page_token = page.next_page_token

    def outputs(self, ref: str) -> dict[str, str]:
        """Return name and address of each file that a notebook's newest run left, also of one that died."""
        return self._outputs(ref)[0]

    def log(self, ref: str) -> str:
        """Return what a notebook's newest run printed."""
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
