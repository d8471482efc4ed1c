"""Downloading GIFs from a list of URLs: verified, retried, and never more than a few of them held at a time.

Nothing is written to disk: the caller keeps what it makes of a GIF and the bytes are gone, so a list of 120,000 URLs
needs the room of a few GIFs. To go on after a stop, pass the URLs that are still wanted.
"""

from __future__ import annotations

import http.client
import socket
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from urllib.parse import quote, urlsplit

from helpers.gifs.kinds import SIGNATURE_BYTES, refusal

HEADERS = {
    "User-Agent": "Mozilla/5.0 (compatible; gif-qa)",
    "Accept": "image/gif",  # Tumblr answers with an HTML page to whoever also accepts one
    "Accept-Encoding": "identity",
}
RETRIED_STATUS = (408, 425, 429, 500, 502, 503, 504)
CHUNK = 1 << 16


class FetchError(Exception):
    """A URL that gave no GIF; its text is the reason.

    transient: the reason lies in the network or the server at this moment (time-out, no connection, status 5xx, a
    transfer cut short), so that another run may succeed. False for dead links and for files that are no GIF.
    """

    def __init__(self, reason: str, transient: bool = False):
        super().__init__(reason)
        self.transient = transient


class NetworkDown(RuntimeError):
    """So many URLs in a row failed to answer that the network is at fault, not the list."""


def _opener() -> urllib.request.OpenerDirector:
    # the default opener would also follow a redirect to ftp://, and open file:// and data: URLs
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


def fetch(
    url: str,
    *,
    timeout: float = 30.0,
    max_bytes: int = 64 << 20,
    attempts: int = 4,
    backoff: float = 1.0,
    stop: Event | None = None,
) -> bytes:
    """The bytes of the GIF at an http(s) URL, complete as far as the server told its length.

    timeout: seconds for one attempt, connection and transfer together. max_bytes: files above are refused.
    attempts: tries in all, with pauses of backoff, 2 x backoff, 4 x backoff, ... seconds. A transfer that was cut
    short goes on where it stopped if the server can (status 206 and an unchanged ETag or Last-Modified).
    stop: set by another thread to end the pauses and make no further attempt.
    Raises `FetchError` with the reason: HTTP status, no connection, time-out, too large, cut short, or the kind of
    content that came instead of a GIF.
    """
    try:
        parts = urlsplit(url)
        known = parts.scheme.lower() in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError as error:  # a bad port or bracket
        raise FetchError(f"not an http(s) URL ({error})") from error
    if not known:
        raise FetchError("not an http(s) URL")
    stop = stop or Event()
    transfer = _Transfer(quote(url, safe="%/:=&?~#+!$,;'@()*[]"), max_bytes)
    for attempt in range(attempts):
        try:
            return transfer.attempt(timeout)
        except FetchError as error:
            if not error.transient or attempt == attempts - 1 or stop.wait(backoff * 2**attempt):
                raise
    raise ValueError(f"attempts must be at least 1; found {attempts}")


class _Transfer:
    """One URL over several attempts: keeps what has come so far and goes on from there where that is safe."""

    def __init__(self, url: str, max_bytes: int):
        self.url = url
        self.max_bytes = max_bytes
        self.data = bytearray()
        self.validator: str | None = None  # ETag or Last-Modified: what tells that the file is still the same

    def attempt(self, timeout: float) -> bytes:
        deadline = time.monotonic() + timeout
        headers = dict(HEADERS)
        if self.data and self.validator:
            headers |= {"Range": f"bytes={len(self.data)}-", "If-Range": self.validator}
        request = urllib.request.Request(self.url, headers=headers)
        try:
            with _opener().open(request, timeout=timeout) as response:
                return self._receive(response, deadline)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416:
                self.data.clear()  # what we hold is not a part of the file: begin anew
            raise FetchError(f"HTTP status {error.code}", error.code in (*RETRIED_STATUS, 416)) from error
        except TimeoutError as error:
            raise FetchError(f"no answer within {timeout:g} s", transient=True) from error
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            raise self._connection_error(error, timeout) from error
        except ValueError as error:  # a host name that no encoding allows
            raise FetchError(f"not an http(s) URL ({error})") from error

    def _connection_error(self, error: Exception, timeout: float) -> FetchError:
        cause = getattr(error, "reason", error)
        if isinstance(cause, TimeoutError):
            return FetchError(f"no answer within {timeout:g} s", transient=True)
        if isinstance(cause, socket.gaierror):
            return FetchError(f"host {urlsplit(self.url).hostname} not found", transient=True)
        if isinstance(cause, str):  # a redirect to another scheme, or a URL that cannot be sent
            return FetchError(f"not an http(s) URL ({cause})")
        transient = not isinstance(cause, http.client.InvalidURL)
        return FetchError(f"no connection ({type(cause).__name__}: {cause})", transient=transient)

    def _receive(self, response: http.client.HTTPResponse, deadline: float) -> bytes:
        if response.status == 206:
            self._check_continuation(response)
        else:
            self.data.clear()
            self.validator = response.headers.get("ETag") or response.headers.get("Last-Modified")
            if (self.validator or "").startswith("W/"):
                self.validator = None  # a weak ETag does not promise the same bytes
        length = response.headers.get("Content-Length", "")
        total = len(self.data) + int(length) if length.isdecimal() else None
        if (total or 0) > self.max_bytes:
            raise FetchError(f"too large: {total:,} bytes, the limit is {self.max_bytes:,}")
        checked = False
        while chunk := response.read1(CHUNK):
            self.data += chunk
            if not checked and len(self.data) >= SIGNATURE_BYTES:
                self._check_content()  # early, so that what is not read is not loaded to its end
                checked = True
            if len(self.data) > self.max_bytes:
                raise FetchError(f"too large: more than {self.max_bytes:,} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError
        if total is not None and len(self.data) < total:
            raise FetchError(f"cut short: {len(self.data):,} of {total:,} bytes came", transient=True)
        self._check_content()
        return bytes(self.data)

    def _check_continuation(self, response: http.client.HTTPResponse) -> None:
        place = response.headers.get("Content-Range", "none")
        if not self.data or not place.startswith(f"bytes {len(self.data)}-"):
            self.data.clear()
            raise FetchError(f"the server sent another part than asked for ({place})", transient=True)

    def _check_content(self) -> None:
        if reason := refusal(bytes(self.data[:SIGNATURE_BYTES])):
            raise FetchError(reason)


def fetch_all(
    urls: Iterable[tuple[str, str]],
    *,
    workers: int = 8,
    ahead: int = 32,
    give_up_after: int = 50,
    timeout: float = 30.0,
    max_bytes: int = 64 << 20,
    attempts: int = 4,
    backoff: float = 1.0,
) -> Iterator[tuple[str, bytes | FetchError]]:
    """Fetch (name, url) pairs concurrently; yields (name, bytes) or (name, FetchError) in the order given.

    ahead: at most this many GIFs are held in memory, the one last yielded among them.
    give_up_after: raise `NetworkDown` after this many transient failures in a row, so that a lost network does not
    turn a whole list into rejects. The other parameters are those of `fetch`.
    A caller that keeps a list of rejects should not keep transient ones for good: they may succeed another time.
    """
    if workers < 1 or ahead < 1:
        raise ValueError(f"workers and ahead must be at least 1; found {workers} and {ahead}")
    remaining = iter(urls)
    waiting: deque[tuple[str, Future[bytes]]] = deque()
    stop = Event()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="fetch")
    options = {"timeout": timeout, "max_bytes": max_bytes, "attempts": attempts, "backoff": backoff, "stop": stop}
    failures = 0

    def submit_next() -> None:
        for name, url in remaining:
            waiting.append((name, pool.submit(fetch, url, **options)))
            return

    try:
        for _ in range(ahead):
            submit_next()
        while waiting:
            name, future = waiting.popleft()
            try:
                result: bytes | FetchError = future.result()
            except FetchError as error:
                result = error
            del future  # it holds the bytes for as long as it is referred to
            failures = failures + 1 if isinstance(result, FetchError) and result.transient else 0
            if failures >= give_up_after:
                raise NetworkDown(
                    f"{failures} URLs in a row gave no answer (the last: {name}, {result}). "
                    "Look at the network and run again: what was fetched is kept."
                )
            yield name, result
            del result
            submit_next()
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
