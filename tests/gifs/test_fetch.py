"""Fetching GIFs, against a server on this machine that misbehaves in every way that servers do."""

import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from helpers.gifs.fetch import FetchError, NetworkDown, fetch, fetch_all

GIF = b"GIF89a" + bytes(range(256)) * 20 + b";"
FAST = {"backoff": 0.01, "timeout": 5.0}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"

    def log_message(self, *args):
        pass

    def reply(self, body=GIF, status=200, length=None, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        name = self.path.strip("/").split(".")[0]
        with self.server.lock:
            self.server.seen[name] += 1
            self.server.ranges.append(self.headers.get("Range"))
            count = self.server.seen[name]
        getattr(self, name.split("-")[0])(count)

    def good(self, count):
        self.reply()

    def unsized(self, count):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(GIF)

    def gone(self, count):
        self.reply(b"<html>no</html>", status=404)

    def page(self, count):
        self.reply(b"\n<!DOCTYPE html><html>This post is gone</html>", Content_Type="image/gif")

    def jpeg(self, count):
        self.reply(b"\xff\xd8\xff\xe0" + bytes(100))

    def empty(self, count):
        self.reply(b"")

    def busy(self, count):
        self.reply(b"", status=503) if count < 3 else self.reply()

    def cut(self, count):
        """Half the file at first; the rest, or all of it, when asked again."""
        half = len(GIF) // 2
        if count == 1:
            self.reply(GIF[:half], length=len(GIF), ETag='"one"')
        elif self.headers.get("Range") == f"bytes={half}-" and self.headers.get("If-Range") == '"one"':
            place = f"bytes {half}-{len(GIF) - 1}/{len(GIF)}"
            self.reply(GIF[half:], status=206, Content_Range=place)
        else:
            self.reply()

    def changed(self, count):
        """Half of another file at first, and then this one whole."""
        self.reply(b"GIF87a" + bytes(500), length=5000, ETag='"old"') if count == 1 else self.reply(ETag='"new"')

    def wrongpart(self, count):
        """A range that was not asked for, and then the whole file."""
        if count == 1:
            self.reply(GIF[:100], length=len(GIF), ETag='"one"')
        elif count == 2:
            self.reply(GIF[50:], status=206, Content_Range=f"bytes 50-{len(GIF) - 1}/{len(GIF)}")
        else:
            self.reply()

    def alwayscut(self, count):
        self.reply(GIF[:100], length=len(GIF))

    def silent(self, count):
        self.server.closing.wait(20)

    def drip(self, count):
        self.send_response(200)
        self.end_headers()
        for byte in GIF:
            if self.server.closing.wait(0.05):
                return
            try:
                self.wfile.write(bytes([byte]))
            except OSError:
                return

    def moved(self, count):
        self.reply(b"", status=302, Location="/good.gif")

    def tofile(self, count):
        self.reply(b"", status=302, Location="file:///etc/passwd")

    def toftp(self, count):
        self.reply(b"", status=302, Location="ftp://127.0.0.1/x.gif")


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.lock, server.seen, server.ranges, server.closing = threading.Lock(), Counter(), [], threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("name", ["good", "unsized", "moved", "busy", "cut", "changed", "wrongpart"])
def test_the_whole_gif_arrives(server, name):
    assert fetch(f"{server.url}/{name}.gif", **FAST) == GIF


def test_a_cut_transfer_goes_on_where_it_stopped(server):
    fetch(f"{server.url}/cut.gif", **FAST)
    assert server.ranges == [None, f"bytes={len(GIF) // 2}-"]


@pytest.mark.parametrize(
    ("name", "reason", "transient", "attempts"),
    [
        ("gone", "HTTP status 404", False, 1),
        ("page", "an HTML page", False, 1),
        ("jpeg", "a JPEG image", False, 1),
        ("empty", "not a GIF but an empty file", False, 1),
        ("alwayscut", f"cut short: 100 of {len(GIF):,} bytes", True, 3),
        ("tofile", "HTTP status 302", False, 1),
        ("toftp", "not an http.s. URL", False, 1),
    ],
)
def test_a_bad_answer_is_an_error_with_its_reason(server, name, reason, transient, attempts):
    with pytest.raises(FetchError, match=reason) as caught:
        fetch(f"{server.url}/{name}.gif", attempts=3, **FAST)
    assert caught.value.transient is transient
    assert server.seen[name] == attempts


@pytest.mark.parametrize("name", ["silent", "drip"])
def test_a_slow_server_is_left_after_the_time_given(server, name):
    with pytest.raises(FetchError, match=r"no answer within 0\.3 s") as caught:
        fetch(f"{server.url}/{name}.gif", timeout=0.3, attempts=2, backoff=0.01)
    assert caught.value.transient and server.seen[name] == 2


@pytest.mark.parametrize("name", ["good", "unsized"])
def test_a_file_over_the_limit_is_refused(server, name):
    with pytest.raises(FetchError, match="too large") as caught:
        fetch(f"{server.url}/{name}.gif", max_bytes=len(GIF) - 1, **FAST)
    assert not caught.value.transient
    assert fetch(f"{server.url}/{name}.gif", max_bytes=len(GIF), **FAST) == GIF


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://host/x.gif", "data:image/gif,GIF89a", "x.gif", "http://", "http://h:x/a.gif"]
)
def test_other_schemes_are_refused(url):
    with pytest.raises(FetchError, match=r"not an http\(s\) URL") as caught:
        fetch(url)
    assert not caught.value.transient


def test_no_connection_is_transient(server):
    unused = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port = unused.server_port
    unused.server_close()
    with pytest.raises(FetchError, match="no connection") as caught:
        fetch(f"http://127.0.0.1:{port}/x.gif", attempts=1, **FAST)
    assert caught.value.transient


def test_fetch_all_keeps_the_order_and_gives_reasons(server):
    names = ["good-1", "gone-1", "busy-1", "page-1", "good-2", "cut-1"]
    results = list(fetch_all([(name, f"{server.url}/{name}.gif") for name in names], workers=4, ahead=4, **FAST))
    assert [name for name, _ in results] == names
    assert [str(result) if isinstance(result, FetchError) else result for _, result in results] == [
        GIF,
        "HTTP status 404",
        GIF,
        "not a GIF but an HTML page (an error page in place of the file?)",
        GIF,
        GIF,
    ]


def test_fetch_all_never_runs_further_ahead_than_allowed(server):
    urls = ((f"good-{i}", f"{server.url}/good-{i}.gif") for i in range(40))
    for taken, (_, result) in enumerate(fetch_all(urls, workers=8, ahead=5, **FAST), start=1):
        assert result == GIF
        # the one just yielded is among the five
        assert sum(server.seen.values()) <= taken + 4
    assert taken == 40


def test_fetch_all_can_be_left_early(server):
    urls = ((f"good-{i}", f"{server.url}/good-{i}.gif") for i in range(100))
    results = fetch_all(urls, workers=2, ahead=4, **FAST)
    assert next(results)[0] == "good-0"
    results.close()
    assert sum(server.seen.values()) <= 4


def test_a_lost_network_stops_the_run_and_is_not_taken_for_dead_links(server):
    names = ["good-1", "alwayscut-1", "good-2", *(f"alwayscut-{i}" for i in range(2, 20))]
    fetched = []
    with pytest.raises(NetworkDown, match="3 URLs in a row"):
        for name, result in fetch_all(
            [(name, f"{server.url}/{name}.gif") for name in names], give_up_after=3, attempts=1, **FAST
        ):
            fetched.append((name, isinstance(result, bytes)))
    assert fetched == [
        ("good-1", True),
        ("alwayscut-1", False),
        ("good-2", True),
        ("alwayscut-2", False),
        ("alwayscut-3", False),
    ]


def test_dead_links_in_a_row_do_not_stop_the_run(server):
    urls = [(f"gone-{i}", f"{server.url}/gone-{i}.gif") for i in range(10)]
    assert len(list(fetch_all(urls, give_up_after=3, **FAST))) == 10
