"""Fetching from servers that mean harm: bounded in size, time and redirects, and http(s) only."""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from zfnet.data import fetch as module
from zfnet.data.decode import UnreadableImage
from zfnet.data.fetch import fetch
from zfnet.data.named import find_images


class Hostile(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        kind = self.path.strip("/").split("/")[0]
        getattr(self, f"_{kind}", self._missing)()

    def _good(self) -> None:
        self._answer(200, body=b"pixels")

    def _picture(self) -> None:
        content = io.BytesIO()
        Image.new("RGB", (5, 4), "red").save(content, "PNG")
        self._answer(200, body=content.getvalue())

    def _missing(self) -> None:
        self._answer(404, body=b"no")

    def _hop(self) -> None:
        left = int(self.path.rsplit("/", 1)[1])
        self._answer(302, Location=f"/hop/{left - 1}" if left else "/good")

    def _loop(self) -> None:
        self._answer(301, Location="/loop")

    def _escape(self) -> None:
        self._answer(302, Location="file:///etc/passwd")

    def _announced(self) -> None:
        self._answer(200, **{"Content-Length": str(10**12)})

    def _endless(self) -> None:
        self._answer(200)
        while not self.server.over.wait(0):  # type: ignore[attr-defined]
            self.wfile.write(b"x" * 65536)

    def _drip(self) -> None:
        self._answer(200)
        while not self.server.over.wait(0.02):  # type: ignore[attr-defined]
            self.wfile.write(b"x")

    def _headers(self) -> None:
        self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Slow: ")
        while not self.server.over.wait(0.02):  # type: ignore[attr-defined]
            self.wfile.write(b"x")

    def _noise(self) -> None:
        self.wfile.write(bytes(range(128, 256)) + b"\x1b[31mGIF89a\x00" * 50 + b"\r\n\r\n")

    def _fat(self) -> None:
        """A redirect whose own body never ends: it must not be read."""
        self._answer(302, Location="/good")
        while not self.server.over.wait(0):  # type: ignore[attr-defined]
            self.wfile.write(b"x" * 65536)

    def _answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client had enough, which is what is tested
            super().handle()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "MOST_BYTES", 2**20)
    monkeypatch.setattr(module, "MOST_SECONDS", 0.5)
    with ThreadingHTTPServer(("127.0.0.1", 0), Hostile) as found:
        found.daemon_threads = True
        found.over = threading.Event()  # type: ignore[attr-defined]
        thread = threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{found.server_address[1]}"
        found.over.set()  # type: ignore[attr-defined]
        found.shutdown()


def test_content_and_honest_redirects(server: str) -> None:
    assert fetch(f"{server}/good") == b"pixels"
    assert fetch(f"{server}/hop/4") == b"pixels"
    assert fetch(f"{server}/fat") == b"pixels"


def test_an_address_is_an_image_like_any_other(server: str) -> None:
    images, problems = find_images([f"{server}/picture", f"{server}/good"])
    assert problems == {}
    assert images[0].read().size == (5, 4)
    with pytest.raises(UnreadableImage, match="not an image of a known format"):
        images[1].read()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("missing", "the server answers 404"),
        ("hop/5", "more than 5 redirects"),
        ("loop", "more than 5 redirects"),
        ("escape", "file: is not fetched"),
        ("announced", "more than 1 MB"),
        ("endless", "more than 1 MB"),
        ("drip", "took more than 0.5 s"),
        ("headers", "took more than 0.5 s"),
    ],
)
def test_harm_is_bounded(server: str, path: str, expected: str) -> None:
    started = time.monotonic()
    with pytest.raises(UnreadableImage, match=expected):
        fetch(f"{server}/{path}")
    assert time.monotonic() - started < 5


def test_noise_is_not_repeated(server: str) -> None:
    with pytest.raises(UnreadableImage, match="cannot be fetched") as caught:
        fetch(f"{server}/noise")
    assert str(caught.value).isascii()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 120


@pytest.mark.parametrize("address", ["file:///etc/passwd", "ftp://127.0.0.1/a.png", "data://x", "HtTpX://a"])
def test_other_schemes_are_refused(address: str) -> None:
    with pytest.raises(UnreadableImage, match="only http and https"):
        fetch(address)


@pytest.mark.parametrize(
    "address", ["http://", "http://127.0.0.1:1/a.png", "http://127.0.0.1:x/", "http://a b/", "http://[::/"]
)
def test_impossible_addresses_are_no_crash(address: str, monkeypatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(UnreadableImage, match="cannot be fetched"):
        fetch(address)
