"""Finding the images that `images=[…]` names, and limits on size, time and redirects of downloads."""

from __future__ import annotations

import contextlib
import io
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from zfnet.data import files
from zfnet.data.decode import UnreadableImage
from zfnet.data.files import LeftOutNames, fetch, find_images, list_images, read_named


def names(items: list[str]) -> list[str]:
    return find_images(items)[0]


def test_find_images_expands_files_folders_patterns_and_addresses(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.png", "a.png", "photos/z.jpg", "photos/deep/y.PNG", "odd[1].png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(name)
    Path("photos/notes.txt").write_text("no image")
    Path("photos/.hidden.png").write_bytes(Path("a.png").read_bytes())
    assert names(["b.png", "a.png"]) == ["b.png", "a.png"]
    assert names(["photos"]) == names(["photos/"]) == ["photos/deep/y.PNG", "photos/z.jpg"]
    assert names(["?.png"]) == ["a.png", "b.png"]
    assert names(["**/*.jpg"]) == ["photos/z.jpg"]
    assert names(["odd[1].png"]) == ["odd[1].png"]  # an existing file, not a pattern
    Path("a.png").rename("~copy.png")  # no user's home
    assert names(["~copy.png"]) == ["~copy.png"]
    Path("~copy.png").rename("a.png")
    assert names(["a.png", "*.png"]) == ["a.png", "b.png", "odd[1].png"]  # no repetitions
    assert names(["https://example.org/x?y=*"]) == ["https://example.org/x?y=*"]


def test_list_images_follows_links_and_ends_loops(tmp_path: Path) -> None:
    """Each folder is read once; otherwise links between folders would double the number of files at each level."""
    for number in range(12):
        folder = tmp_path / f"top/{number}"
        folder.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(folder / "x.png")
        for name in "ab":
            (folder / name).symlink_to(f"../{(number + 1) % 12}")
    (tmp_path / "top/up").symlink_to(".")
    (tmp_path / "top/itself").symlink_to("itself")
    (tmp_path / "far").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "far/y.png")
    (tmp_path / "top/0/c").symlink_to(tmp_path / "far")
    left_out = LeftOutNames()
    found = list_images(tmp_path / "top", left_out)
    assert [os.path.relpath(f, tmp_path / "top") for f in found] == [
        *("0/c/y.png", "0/x.png", "1/x.png", "10/x.png", "11/x.png"),
        *(f"{n}/x.png" for n in range(2, 10)),
    ]
    assert "to folders that were already read" in str(left_out)
    assert "1 file of unknown format (itself)" in str(left_out)


def test_find_images_ends_loops_of_patterns(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a/b").mkdir(parents=True)
    Path("a/.hidden").mkdir()
    for name in ("a/b/x.png", "a/.hidden/x.png", "a/y.jpg"):
        Image.new("RGB", (4, 4)).save(name)
    for name in ("1", "2"):
        Path("a/b", name).symlink_to("..")
    assert names(["**/*.png"]) == names(["a/**/x.png"]) == names(["a/**/b/*.png"]) == ["a/b/x.png"]
    assert names(["a/**"]) == ["a/b/x.png", "a/y.jpg"]
    assert names(["a/**.jpg"]) == ["a/y.jpg"]


def test_find_images_counts_what_a_folder_holds_beside_images(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos/.ipynb_checkpoints").mkdir(parents=True)
    for name in ("photos/a.png", "photos/.ipynb_checkpoints/a.png"):
        Image.new("RGB", (4, 4)).save(name)
    for name in ("photos/b.heic", "photos/c\n.txt"):
        Path(name).write_bytes(b"")
    assert names(["photos"]) == ["photos/a.png"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        "photos: left out: 1 hidden folder (.ipynb_checkpoints), 2 files of unknown format (.heic, .txt); "
        "to read .heic, convert them to .jpg or .png"
    )
    Path("photos/a.png").unlink()
    assert find_images(["photos"])[1]["photos"].startswith("contains no image files; left out: 1 hidden folder")


def test_find_images_reports_what_names_no_image(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    os.mkfifo("pipe")
    images, errors = find_images(["empty", "none.png", "*.jpg", "pipe"])
    assert images == []
    assert errors == {
        "empty": "contains no image files",
        "none.png": "there is no such file",
        "*.jpg": "matches no file",
        "pipe": "is not a regular file",
    }


class Hostile(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        action = self.path.strip("/").split("/")[0]
        getattr(self, f"_{action}", self._missing)()

    def _good(self) -> None:
        self._respond(200, body=b"pixels")

    def _picture(self) -> None:
        content = io.BytesIO()
        Image.new("RGB", (5, 4), "red").save(content, "PNG")
        self._respond(200, body=content.getvalue())

    def _missing(self) -> None:
        self._respond(404, body=b"no")

    def _hop(self) -> None:
        left = int(self.path.rsplit("/", 1)[1])
        self._respond(302, Location=f"/hop/{left - 1}" if left else "/good")

    def _loop(self) -> None:
        self._respond(301, Location="/loop")

    def _escape(self) -> None:
        self._respond(302, Location="file:///etc/passwd")

    def _away(self) -> None:
        self._respond(302, Location=self.path.removeprefix("/away/"))

    def _named(self) -> None:
        """Return the requested path as the body."""
        self._respond(200, body=self.path.encode())

    def _latin(self) -> None:
        self._respond(302, Location="/named/gr\xf6\xdfe x".encode().decode("latin-1"))

    def _short(self) -> None:
        self._respond(200, body=b"pix", **{"Content-Length": "6"})

    def _cut(self) -> None:
        self._respond(200, body=b"6\r\npix", **{"Transfer-Encoding": "chunked"})

    def _announced(self) -> None:
        self._respond(200, **{"Content-Length": str(10**12)})

    def _endless(self) -> None:
        self._respond(200)
        while not self.server.over.wait(0):  # type: ignore[attr-defined]
            self.wfile.write(b"x" * 65536)

    def _drip(self) -> None:
        self._respond(200)
        while not self.server.over.wait(0.02):  # type: ignore[attr-defined]
            self.wfile.write(b"x")

    def _headers(self) -> None:
        self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Slow: ")
        while not self.server.over.wait(0.02):  # type: ignore[attr-defined]
            self.wfile.write(b"x")

    def _noise(self) -> None:
        self.wfile.write(bytes(range(128, 256)) + b"\x1b[31mGIF89a\x00" * 50 + b"\r\n\r\n")

    def _fat(self) -> None:
        """Send a redirect with an endless body, which must not be read."""
        self._respond(302, Location="/good")
        while not self.server.over.wait(0):  # type: ignore[attr-defined]
            self.wfile.write(b"x" * 65536)

    def _respond(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client is expected to close the connection
            super().handle()

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serving() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hostile) as http_server:
        http_server.daemon_threads = True
        http_server.over = threading.Event()  # type: ignore[attr-defined]
        thread = threading.Thread(target=http_server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http_server.server_address[1]}"
        http_server.over.set()  # type: ignore[attr-defined]
        http_server.shutdown()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(files, "MAX_BYTES", 2**20)
    monkeypatch.setattr(files, "MAX_SECONDS", 0.5)
    with serving() as address:
        yield address


def test_fetch_returns_content_and_follows_redirects(server: str) -> None:
    assert fetch(f"{server}/good") == b"pixels"
    assert fetch(f"{server}/hop/4") == b"pixels"
    assert fetch(f"{server}/fat") == b"pixels"


def test_find_images_takes_addresses(server: str) -> None:
    images, errors = find_images([f"{server}/picture", f"{server}/good"])
    assert errors == {}
    assert read_named(images[0], 20, 0).size == (5, 4)
    with pytest.raises(UnreadableImage, match="not an image of a known format"):
        read_named(images[1], 20, 0)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("missing", "the server returned 404"),
        ("hop/5", "more than 5 redirects"),
        ("loop", "more than 5 redirects"),
        ("escape", "file: is not supported"),
        ("announced", "more than 1 MB"),
        ("short", "the connection ended after 3 of 6 bytes"),
        ("cut", r"cannot be fetched \(IncompleteRead"),
        ("endless", "more than 1 MB"),
        ("drip", "took more than 0.5 s"),
        ("headers", "took more than 0.5 s"),
    ],
)
def test_fetch_stays_within_its_limits(server: str, path: str, expected: str) -> None:
    started = time.monotonic()
    with pytest.raises(UnreadableImage, match=expected):
        fetch(f"{server}/{path}")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("10.1.2.3", True),
        ("172.16.0.1", True),
        ("192.168.0.1", True),
        ("169.254.169.254", True),
        ("100.64.0.1", True),
        ("0.0.0.0", True),
        ("::1", True),
        ("fe80::1%eth0", True),
        ("fd00::1", True),
        ("::ffff:127.0.0.1", True),
        ("::ffff:8.8.8.8", False),
        ("93.184.216.34", False),
        ("2606:2800:220:1::1", False),
    ],
)
def test_addresses_of_the_local_network(address: str, local: bool) -> None:
    assert files._is_local((address, 80)) is local


def test_no_redirect_leads_from_a_public_address_to_the_local_network(server: str, monkeypatch) -> None:
    """One of two servers simulates the public internet; the address that the user typed is always fetched."""
    with serving() as public:
        number = int(public.rpartition(":")[2])
        monkeypatch.setattr(files, "_is_local", lambda peer: peer[1] != number)
        assert fetch(f"{public}/good") == fetch(f"{server}/good") == b"pixels"
        assert fetch(f"{server}/away/{public}/good") == b"pixels"
        assert fetch(f"{server}/away/{server}/good") == b"pixels"
        for path in (f"away/{server}/good", f"away/{public}/away/{server}/good"):
            with pytest.raises(UnreadableImage, match="redirects from a public address to the local network"):
                fetch(f"{public}/{path}")
        with pytest.raises(UnreadableImage, match="redirects from a public address to the local network"):
            fetch(f"{server}/away/{public}/away/{server}/good")  # nor through a detour


def test_addresses_may_hold_spaces_and_any_letters(server: str) -> None:
    assert (
        fetch(f"{server}/named/größe 1 (2).png?a=ü b&c=%20")
        == b"/named/gr%C3%B6%C3%9Fe%201%20(2).png?a=%C3%BC%20b&c=%20"
    )
    assert fetch(f"{server}/latin") == b"/named/gr%C3%B6%C3%9Fe%20x"
    assert (
        files._in_ascii("https://user@bücher.example:81/ü#ß") == "https://user@xn--bcher-kva.example:81/%C3%BC#%C3%9F"
    )
    assert files._in_ascii("http://[::1]:80/%41?x=[1]") == "http://[::1]:80/%41?x=[1]"


def test_fetch_does_not_repeat_a_servers_noise(server: str) -> None:
    with pytest.raises(UnreadableImage, match="cannot be fetched") as caught:
        fetch(f"{server}/noise")
    assert str(caught.value).isascii()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 120


@pytest.mark.parametrize("address", ["file:///etc/passwd", "ftp://127.0.0.1/a.png", "data://x", "HtTpX://a"])
def test_fetch_refuses_other_schemes(address: str) -> None:
    with pytest.raises(UnreadableImage, match="only http and https"):
        fetch(address)


@pytest.mark.parametrize(
    "address", ["http://", "http://127.0.0.1:1/a.png", "http://127.0.0.1:x/", "http://a b/", "http://[::/"]
)
def test_fetch_reports_impossible_addresses(address: str, monkeypatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(UnreadableImage, match="cannot be fetched"):
        fetch(address)
