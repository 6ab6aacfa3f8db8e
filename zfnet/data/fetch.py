"""One file from the web, within limits: nothing that a server answers can make a job hang or fill the memory."""

from __future__ import annotations

import http.client
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

from zfnet.data.decode import UnreadableImage

MOST_BYTES = 50 * 2**20
MOST_SECONDS = 30.0  # from the first word to the last byte, over all redirects
MOST_REDIRECTS = 5
_SILENCE_S = 10.0  # of a server, at one time
_REDIRECTS = (301, 302, 303, 307, 308)


def fetch(address: str) -> bytes:
    """Return what an http or https address holds; raise UnreadableImage where it cannot be had within the limits."""
    deadline = time.monotonic() + MOST_SECONDS
    answer: list[bytes | Exception] = []

    def work() -> None:
        try:
            answer.append(_follow(address, deadline))
        except Exception as error:  # handed over to the caller below
            answer.append(error)

    # a thread, since neither looking up a name nor reading headers that drip in heeds a deadline
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(MOST_SECONDS)
    if not answer:
        raise UnreadableImage(f"took more than {MOST_SECONDS:g} s")
    found = answer[0]
    if isinstance(found, bytes):
        return found
    if isinstance(found, UnreadableImage):
        raise found
    if isinstance(found, urllib.error.HTTPError):
        raise UnreadableImage(f"the server answers {found.code} {_plain(found.reason)}".strip()) from found
    if isinstance(found, (OSError, http.client.HTTPException, ValueError)):
        reason = getattr(found, "reason", None) or found
        raise UnreadableImage(f"cannot be fetched ({_plain(reason) or type(reason).__name__})") from found
    raise found


def _plain(said: object) -> str:
    """Return what may be the words of a server in so far as they are a line of text."""
    return re.sub(r"[^\x20-\x7e]+|\\x[0-9a-f]{2}", "", str(said))[:80].strip()


def _follow(address: str, deadline: float) -> bytes:
    """Fetch, redirect by redirect, each checked like the first address; a redirect's own body is never read."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
    ):  # no redirect handler, and none for file: or ftp:
        opener.add_handler(handler)
    for _ in range(MOST_REDIRECTS + 1):
        scheme = urllib.parse.urlsplit(address).scheme.lower()
        if scheme not in ("http", "https"):
            raise UnreadableImage(f"{scheme}: is not fetched, only http and https")
        request = urllib.request.Request(address, headers={"User-Agent": "zfnet"})
        try:
            with opener.open(request, timeout=_SILENCE_S) as response:
                return _read(response, deadline)
        except urllib.error.HTTPError as error:
            target = error.headers.get("Location")
            error.close()
            if error.code not in _REDIRECTS or not target:
                raise
            address = urllib.parse.urljoin(address, target)
    raise UnreadableImage(f"more than {MOST_REDIRECTS} redirects")


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
    too_large = UnreadableImage(f"more than {MOST_BYTES / 2**20:g} MB")
    if int(response.headers.get("Content-Length") or 0) > MOST_BYTES:
        raise too_large
    content = bytearray()
    while piece := response.read1(1 << 16):
        content += piece
        if len(content) > MOST_BYTES:
            raise too_large
        if time.monotonic() > deadline:
            raise UnreadableImage(f"took more than {MOST_SECONDS:g} s")
    return bytes(content)
