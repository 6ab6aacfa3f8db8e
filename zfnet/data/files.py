"""Find and read the images that a command names: files, folders, patterns and web addresses.

Training and prediction list a folder in the same way, and count the files that they leave out.

A download is limited in size, time and redirects. No server can make a job hang, fill its memory, or redirect it from
the public internet to the local network.
"""

import contextlib
import glob
import http.client
import io
import ipaddress
import os
import re
import string
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import deque
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from PIL import Image

from zfnet.config.errors import log, printable
from zfnet.data.decode import UnreadableImage, is_image, read_image

MAX_BYTES = 50 * 2**20
MAX_SECONDS = 30.0  # for the whole download, including redirects
MAX_REDIRECTS = 5
_SOCKET_TIMEOUT_S = 10.0  # longest wait for the server's next byte
_LEFT_OUT_FOLDERS = ("__MACOSX", "@eaDir")  # created by macOS and network drives; skipped like hidden folders
_CONVERTIBLE = (".heic", ".heif", ".jxl", ".avif", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".svg", ".pdf", ".psd")
_NAMES_SHOWN = 4


def read_named(name: str, max_pixels: int, draft: int) -> Image.Image:
    """Read the image at a path or a web address with `read_image`; raise UnreadableImage."""
    return read_image(io.BytesIO(fetch(name)) if _is_address(name) else name, max_pixels, draft)


class LeftOutNames:
    """The names that a listing of folders leaves out, by kind; `str()` gives the counts in one line."""

    FORMAT = "file{s} of unknown format"
    HIDDEN_FILE, HIDDEN_FOLDER = "hidden file{s}", "hidden folder{s}"
    UNREADABLE = "folder{s} that cannot be read"
    LINK = "link{s} to folders that were already read"
    LOOSE, BESIDE = "file{s} outside the class folders", "folder{s} next to the splits"

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {}

    def add(self, kind: str, name: str) -> None:
        self.names.setdefault(kind, []).append(name)

    def __str__(self) -> str:
        parts = []
        for kind, names in self.names.items():
            shown = list(dict.fromkeys(names))
            more = " …" if len(shown) > _NAMES_SHOWN else ""
            listed = ", ".join(map(printable, shown[:_NAMES_SHOWN]))
            parts.append(f"{len(names):,} {kind.format(s='s' * (len(names) > 1))} ({listed}{more})")
        if convertible := sorted({*self.names.get(self.FORMAT, ())} & {*_CONVERTIBLE}):
            parts[-1] += f"; to read {' and '.join(convertible)}, convert them to .jpg or .png"
        return ", ".join(parts)


def is_hidden(name: str) -> bool:
    """Return whether a folder of this name is skipped."""
    return name.startswith(".") or name in _LEFT_OUT_FOLDERS


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether this is a folder or a link to a folder; False for a broken link and for a loop of links."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def list_images(folder: Path, left_out: LeftOutNames, above: Sequence[Path] = ()) -> list[str]:
    """Return the paths of the image files below `folder`, in a fixed order, and count the others in `left_out`.

    Links are followed. Each folder is read once: further links to it, or to a folder in `above`, are skipped.
    """
    files: list[str] = []
    seen = {_folder_id(path) for path in above}
    folders, links = deque([str(folder)]), deque[str]()
    while folders or links:
        at = (folders or links).popleft()
        try:
            place = _folder_id(at)
            with os.scandir(at) if place not in seen else contextlib.nullcontext(()) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            left_out.add(LeftOutNames.UNREADABLE, f"{at}: {error.strerror}")
            continue
        if place in seen:
            left_out.add(LeftOutNames.LINK, os.path.basename(at))
        seen.add(place)
        for entry in entries:
            if is_folder(entry) and is_hidden(entry.name):
                left_out.add(LeftOutNames.HIDDEN_FOLDER, entry.name)
            elif is_folder(entry):
                (links if entry.is_symlink() else folders).append(entry.path)
            elif is_image(entry.name):
                files.append(entry.path)
            elif is_hidden(entry.name):
                left_out.add(LeftOutNames.HIDDEN_FILE, entry.name)
            else:
                left_out.add(LeftOutNames.FORMAT, os.path.splitext(entry.name)[1].lower() or entry.name)
    return sorted(files, key=lambda file: file.split(os.sep))


def _folder_id(path: str | Path) -> tuple[int, int]:
    """Return a folder's (device, inode), which is the same for every path to the folder."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def find_images(items: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the images that `items` name, in order and without repetitions, and {item: error} for the other items.

    A folder stands for all files below it that have an image's suffix, sorted by path. A pattern (`*`, `?`, `[…]`,
    `**`) stands for the files that match it. The files that folders leave out are logged.
    """
    names: list[str] = []
    errors: dict[str, str] = {}
    for item in items:
        path = Path(os.path.expanduser(item))
        if _is_address(item):
            names.append(item)
        elif os.path.isdir(path):  # Path.is_dir raises if the name is too long
            left_out = LeftOutNames()
            names += (images := list_images(path, left_out))
            if not images:
                errors[item] = f"contains no image files{f'; left out: {left_out}' if left_out.names else ''}"
            elif left_out.names:
                log.warning("%s: left out: %s", printable(item), left_out)
        elif os.path.isfile(path):
            names.append(str(path))
        elif os.path.exists(path):  # reading a device or a pipe might never end
            errors[item] = "is not a regular file"
        elif matches := _matches(str(path)):
            names += matches
        else:
            errors[item] = "matches no file" if glob.has_magic(str(path)) else "there is no such file"
    return list(dict.fromkeys(names)), errors


def _matches(pattern: str) -> list[str]:
    """Return the files that match a pattern; with `**`, only image files that `list_images` finds."""
    start, recursive, end = pattern.partition("**")
    if not recursive or end[:1] not in ("", os.sep):
        return [m for m in sorted(glob.glob(pattern)) if os.path.isfile(m)]
    folders = [Path(m) for m in sorted(glob.glob(start or ".")) if os.path.isdir(m)]
    files = [file for folder in folders for file in list_images(folder, LeftOutNames())]
    return [str(path) for path in map(PurePath, files) if path.match(end.strip(os.sep) or "*")]


def _is_address(item: str) -> bool:
    return re.match(r"[A-Za-z][\w+.-]*://", item) is not None


def fetch(address: str) -> bytes:
    """Return the content of an http or https address; raise UnreadableImage if it exceeds the limits or fails."""
    results: list[bytes | Exception] = []

    def download() -> None:
        try:
            results.append(_download(address, time.monotonic() + MAX_SECONDS))
        except urllib.error.HTTPError as error:
            text = f"the server returned {error.code} {_printable(error.reason)}"
            results.append(UnreadableImage(text.strip()))
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            text = _printable(reason) or type(reason).__name__
            results.append(UnreadableImage(f"cannot be fetched ({text})"))
        except Exception as error:  # UnreadableImage or a bug; the calling thread raises it
            results.append(error)

    # use a thread, because name lookups and slowly arriving headers cannot be given a deadline
    thread = threading.Thread(target=download, daemon=True)
    thread.start()
    thread.join(MAX_SECONDS)
    result = results[0] if results else UnreadableImage(f"took more than {MAX_SECONDS:g} s")
    if isinstance(result, Exception):
        raise result
    return result


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        """Return None, so that a redirect raises HTTPError and `_download` checks its target; its body is not read."""


def _download(address: str, deadline: float) -> bytes:
    address = _in_ascii(address)
    opener = urllib.request.build_opener(_NoRedirects, *_guarded_handlers())
    for _ in range(MAX_REDIRECTS + 1):
        scheme = urllib.parse.urlsplit(address).scheme.lower()
        if scheme not in ("http", "https"):
            raise UnreadableImage(f"{scheme}: is not supported, only http and https")
        request = urllib.request.Request(address, headers={"User-Agent": "zfnet"})
        try:
            with opener.open(request, timeout=_SOCKET_TIMEOUT_S) as response:
                return _read(response, deadline)
        except urllib.error.HTTPError as error:
            error.close()
            target = error.headers.get("Location")
            if error.code not in (301, 302, 303, 307, 308) or not target:
                raise
            # http.client decodes headers as Latin-1; `quote` restores their bytes
            target = urllib.parse.quote(target.strip(), encoding="iso-8859-1", safe=string.punctuation)
            address = urllib.parse.urljoin(address, target)
    raise UnreadableImage(f"more than {MAX_REDIRECTS} redirects")


def _in_ascii(address: str) -> str:
    """Return an address in ASCII: the host in Punycode; spaces and non-ASCII letters elsewhere percent-encoded."""
    scheme, place, *rest = urllib.parse.urlsplit(address)
    if not place.isascii():
        user, at, server = place.rpartition("@")
        host, colon, port = server.partition(":")
        place = urllib.parse.quote(user, safe=string.punctuation) + at + host.encode("idna").decode() + colon + port
    rest = [urllib.parse.quote(part, safe=string.punctuation) for part in rest]
    return urllib.parse.urlunsplit((scheme, place, *rest))


def _guarded_handlers() -> tuple[urllib.request.BaseHandler, ...]:
    """Return handlers that refuse to connect to the local network after they connected to a public address.

    They check the address of the open socket, because a second lookup of the name can give another address. With a
    proxy, the proxy connects and applies its own rules.
    """
    reached_public = False

    def check(connection: http.client.HTTPConnection, proxied: bool) -> None:
        nonlocal reached_public
        local = not proxied and _is_local(connection.sock.getpeername())
        if local and reached_public:
            connection.close()
            raise UnreadableImage("redirects from a public address to the local network")
        reached_public = not local

    def guarded(kind: type[http.client.HTTPConnection], request: urllib.request.Request) -> Any:
        proxied = request.has_proxy() or bool(getattr(request, "_tunnel_host", None))

        class Guarded(kind):  # type: ignore[valid-type, misc]
            def connect(self) -> None:
                super().connect()
                check(self, proxied)

        return Guarded

    class Http(urllib.request.HTTPHandler):
        def http_open(self, request: urllib.request.Request) -> Any:
            return self.do_open(guarded(http.client.HTTPConnection, request), request)

    class Https(urllib.request.HTTPSHandler):
        def https_open(self, request: urllib.request.Request) -> Any:
            return self.do_open(guarded(http.client.HTTPSConnection, request), request)

    return Http(), Https()


def _is_local(peer: Sequence[Any]) -> bool:
    """Return whether a socket's peer (address, port, …) is this machine or in a private network."""
    address = ipaddress.ip_address(peer[0])
    return not (getattr(address, "ipv4_mapped", None) or address).is_global


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
    content, announced = bytearray(), response.length or 0  # unknown for a chunked body
    while announced <= MAX_BYTES and len(content) <= MAX_BYTES and (chunk := response.read1(1 << 16)):
        content += chunk
        if time.monotonic() > deadline:  # end this thread; the caller has stopped waiting
            raise UnreadableImage(f"took more than {MAX_SECONDS:g} s")
    if max(announced, len(content)) > MAX_BYTES:
        raise UnreadableImage(f"more than {MAX_BYTES / 2**20:g} MB")
    if len(content) < announced:
        raise UnreadableImage(f"the connection ended after {len(content)} of {announced} bytes")
    return bytes(content)


def _printable(text: object) -> str:
    """Return text that can come from a server as one short line of printable ASCII."""
    return re.sub(r"[^\x20-\x7e]+|\\x[0-9a-f]{2}", "", str(text))[:80].strip()
