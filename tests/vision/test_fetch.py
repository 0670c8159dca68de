"""Fetching from URLs: off unless allowed, and then only from public addresses, in bounded time and size."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator

import pytest

from jaxserve.vision import fetch
from jaxserve.vision.fetch import fetch_image
from jaxserve.vision.limits import FetchRules
from jaxserve.vision.sources import ImageFaultError

ALLOWED = FetchRules(is_allowed=True, timeout_s=2.0)
MAX_BYTES = 1000


class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/slow":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            for _ in range(100):
                time.sleep(0.1)
                self.wfile.write(b"X-Pad: 1\r\n")
        elif self.path.startswith("/to="):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
        else:
            self.send_response(404 if self.path == "/none" else 200)
            self.end_headers()
            self.wfile.write(b"x" * 5000 if self.path == "/large" else self.headers["Host"].encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.fixture
def pinned(port, monkeypatch) -> int:
    """Any host is at a public address, which stands for the test's own server."""
    connect = fetch.socket.create_connection

    def create_connection(address: tuple[str, int], timeout: float):
        assert address[0] == "93.184.215.14", "the connection goes elsewhere than to the address checked"
        return connect(("127.0.0.1", port), timeout=timeout)

    monkeypatch.setattr(fetch.socket, "create_connection", create_connection)
    return port


def resolve(host: str, _port: int) -> list[str]:
    return {
        "private.test": ["10.0.0.1"],
        "mixed.test": ["93.184.215.14", "127.0.0.1"],
        "mapped.test": ["::ffff:169.254.169.254"],
        "127.0.0.1": ["127.0.0.1"],
    }.get(host, ["93.184.215.14"])


def get(url: str, rules: FetchRules = ALLOWED) -> bytes:
    return fetch_image(url, rules, MAX_BYTES, resolve)


def test_off_by_default():
    with pytest.raises(ImageFaultError, match="does not fetch"):
        get("http://public.test/a.png", FetchRules())


def test_the_body_comes_from_the_address_that_was_checked(pinned):
    assert get("http://public.test:81/a.png") == b"public.test:81"
    assert get("http://public.test/to=http://other.test/a.png") == b"other.test"


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("http://private.test/", "not public"),
        ("http://mixed.test/", "not public"),
        ("http://mapped.test/", "not public"),
        ("http://127.0.0.1:80/", "not public"),
        ("http://public.test/to=http://private.test/", "not public"),
        ("http://public.test/to=file:///etc/passwd", "not a plain http"),
        ("http://public.test/to=/to=/to=/to=/to=/", "more than 3 redirects"),
        ("http://user:word@public.test/", "not a plain http"),
        ("http://public.test/a\r\nHost: x", "not a plain http"),
        ("http://public.test/none", "status 404"),
        ("http://public.test/large", "larger than 1000 bytes"),
    ],
)
def test_what_is_refused(pinned, url, sentence):
    with pytest.raises(ImageFaultError, match=sentence):
        get(url)


def test_an_answer_in_drops_ends_in_time(pinned):
    start_s = time.monotonic()
    with pytest.raises(ImageFaultError, match=r"no answer within 0\.5 s"):
        get("http://public.test/slow", FetchRules(is_allowed=True, timeout_s=0.5))
    assert time.monotonic() - start_s < 3


def test_only_hosts_on_the_list(pinned):
    rules = FetchRules(is_allowed=True, allowed_hosts=("good.test", ".more.test"))
    assert get("http://good.test/", rules) == b"good.test"
    assert get("http://a.more.test/", rules) == b"a.more.test"
    for host in ("bad.test", "notgood.test", "more.test.bad.test"):
        with pytest.raises(ImageFaultError, match="not on this server's list"):
            get(f"http://{host}/", rules)
