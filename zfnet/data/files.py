"""The images that a command names: files, folders, patterns, and addresses on the web.

A download is limited in size, time and redirects: no server can make a job hang or fill the memory.
"""

from __future__ import annotations

import glob
import http.client
import io
import os
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from zfnet.data.decode import UnreadableImage, is_image, read_image

MAX_BYTES = 50 * 2**20
MAX_SECONDS = 30.0  # for the whole download, redirects included
MAX_REDIRECTS = 5
_SOCKET_TIMEOUT_S = 10.0  # without a byte from the server


@dataclass(frozen=True)
class NamedImage:
    """One image: its path, or its address on the web."""

    name: str

    def read(self) -> Image.Image:
        """Return the image in mode RGB, upright; raise UnreadableImage."""
        return read_image(io.BytesIO(fetch(self.name)) if _is_address(self.name) else self.name)


def find_images(items: Sequence[str]) -> tuple[list[NamedImage], dict[str, str]]:
    """Return the images that `items` name, each once and in their order, and {item: error} for the other items.

    A folder stands for all files below it that have an image's suffix, sorted by name; a pattern (`*`, `?`, `[…]`,
    `**`) for the files that match it.
    """
    names: list[str] = []
    errors: dict[str, str] = {}
    for item in items:
        path = Path(item).expanduser()
        if _is_address(item):
            names.append(item)
        elif path.is_dir():
            files = [os.path.join(folder, name) for folder, _, all_ in os.walk(path) for name in all_]
            names += (images := sorted(file for file in files if is_image(os.path.basename(file))))
            if not images:
                errors[item] = "holds no image files"
        elif path.is_file():
            names.append(str(path))
        elif path.exists():  # a device or a pipe, which might never end
            errors[item] = "is not a regular file"
        elif matches := [m for m in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(m)]:
            names += matches
        else:
            errors[item] = "matches no file" if glob.has_magic(str(path)) else "there is no such file"
    return [NamedImage(name) for name in dict.fromkeys(names)], errors


def _is_address(item: str) -> bool:
    return re.match(r"[A-Za-z][\w+.-]*://", item) is not None


def fetch(address: str) -> bytes:
    """Return the content of an http or https address; raise UnreadableImage where it exceeds the limits or fails."""
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
        except Exception as error:  # UnreadableImage, or a fault of this program: raised below
            results.append(error)

    # in a thread, since neither a name lookup nor headers that trickle in can be given a deadline
    thread = threading.Thread(target=download, daemon=True)
    thread.start()
    thread.join(MAX_SECONDS)
    result = results[0] if results else UnreadableImage(f"took more than {MAX_SECONDS:g} s")
    if isinstance(result, Exception):
        raise result
    return result


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        """A redirect raises HTTPError, so that `_download` checks its target; its own body is never read."""


def _download(address: str, deadline: float) -> bytes:
    opener = urllib.request.build_opener(_NoRedirects)
    for _ in range(MAX_REDIRECTS + 1):
        scheme = urllib.parse.urlsplit(address).scheme.lower()
        if scheme not in ("http", "https"):
            raise UnreadableImage(f"{scheme}: is not fetched, only http and https")
        request = urllib.request.Request(address, headers={"User-Agent": "zfnet"})
        try:
            with opener.open(request, timeout=_SOCKET_TIMEOUT_S) as response:
                return _read(response, deadline)
        except urllib.error.HTTPError as error:
            error.close()
            target = error.headers.get("Location")
            if error.code not in (301, 302, 303, 307, 308) or not target:
                raise
            address = urllib.parse.urljoin(address, target)
    raise UnreadableImage(f"more than {MAX_REDIRECTS} redirects")


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
    content, announced = bytearray(), int(response.headers.get("Content-Length") or 0)
    while announced <= MAX_BYTES and (chunk := response.read1(1 << 16)):
        content += chunk
        announced = max(announced, len(content))
        if time.monotonic() > deadline:  # ends this thread; the caller has gone on
            raise UnreadableImage(f"took more than {MAX_SECONDS:g} s")
    if announced > MAX_BYTES:
        raise UnreadableImage(f"more than {MAX_BYTES / 2**20:g} MB")
    return bytes(content)


def _printable(text: object) -> str:
    """Return what may be a server's words as one short line of plain text."""
    return re.sub(r"[^\x20-\x7e]+|\\x[0-9a-f]{2}", "", str(text))[:80].strip()
