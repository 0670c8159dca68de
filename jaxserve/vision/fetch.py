"""Fetches an image from an http(s) URL, if the server allows that: public addresses only, bounded, pinned.

A server that fetches what it is told to is a way into its network. So a name is resolved once, all its
addresses must be public, and the connection goes to one that was checked; a redirect is a new URL that is
held to the same. Runs on a thread of the HTTP process. Knows nothing of image files.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable
from urllib.parse import SplitResult, urljoin, urlsplit

from jaxserve.vision.limits import FetchRules
from jaxserve.vision.sources import ImageFaultError

SCHEMES = {"http": 80, "https": 443}
REDIRECTS = (301, 302, 303, 307, 308)
READ_BYTES = 1 << 16
Resolve = Callable[[str, int], list[str]]  # host and port to addresses


def is_remote(url: str) -> bool:
    return url[:8].lower().startswith(("http://", "https://"))


def resolve_host(host: str, port: int) -> list[str]:
    """All addresses of a host. Raises OSError."""
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def fetch_image(url: str, rules: FetchRules, max_bytes: int, resolve: Resolve = resolve_host) -> bytes:
    """The bytes behind a URL. Raises ImageFaultError for whatever stands in the way."""
    if not rules.is_allowed:
        raise ImageFaultError(
            "is an http URL, which this server does not fetch (--allow-image-urls); send the image itself "
            "as a data URL",
        )
    deadline_s = time.monotonic() + rules.timeout_s
    for _ in range(rules.max_redirects + 1):
        try:
            found = _request(url, rules, max_bytes, deadline_s, resolve)
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            is_late = isinstance(error, TimeoutError) or time.monotonic() >= deadline_s
            reason = f"no answer within {rules.timeout_s:g} s" if is_late else type(error).__name__
            raise ImageFaultError(f"could not be fetched: {reason}") from error
        if isinstance(found, bytes):
            return found
        url = urljoin(url, found)
    raise ImageFaultError(f"could not be fetched: more than {rules.max_redirects} redirects")


def _request(
    url: str,
    rules: FetchRules,
    max_bytes: int,
    deadline_s: float,
    resolve: Resolve,
) -> bytes | str:
    """One request: the body, or where it was moved to."""
    parts = _split(url)
    host, port = parts.hostname or "", parts.port or SCHEMES[parts.scheme]
    _check_host(host, rules)
    address = _choose_address(host, port, resolve)
    connection = http.client.HTTPConnection(host, port)
    raw = socket.create_connection((address, port), timeout=_left_s(deadline_s))
    # A timeout of the socket is for each piece, and pieces may be of one byte.
    ending = threading.Timer(_left_s(deadline_s), _shut, (raw,))
    ending.start()
    try:
        is_secret = parts.scheme == "https"
        connection.sock = (
            ssl.create_default_context().wrap_socket(raw, server_hostname=host) if is_secret else raw
        )
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers={"User-Agent": "jaxserve", "Accept": "image/*"})
        response = connection.getresponse()
        if response.status in REDIRECTS:
            return response.headers.get("Location") or ""
        if response.status != 200:
            raise ImageFaultError(f"could not be fetched: status {response.status}")
        return _read_body(response, max_bytes, deadline_s)
    finally:
        ending.cancel()
        connection.close()
        raw.close()


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        is_good = parts.scheme in SCHEMES and parts.hostname and parts.port != 0 and parts.username is None
    except ValueError:
        is_good = False
    is_plain = url.isascii() and url.isprintable() and " " not in url
    if not is_good or not is_plain:
        raise ImageFaultError("could not be fetched: its URL is not a plain http or https URL")
    return parts


def _check_host(host: str, rules: FetchRules) -> None:
    host = host.lower().rstrip(".")
    allowed = [name.lower() for name in rules.allowed_hosts]
    is_listed = any(host.endswith(name) if name.startswith(".") else host == name for name in allowed)
    if allowed and not is_listed:
        raise ImageFaultError("could not be fetched: its host is not on this server's list")


def _choose_address(host: str, port: int, resolve: Resolve) -> str:
    """An address of the host, all of which must be public: one that is not could be meant next time."""
    addresses = resolve(host, port)
    for text in addresses:
        address = ipaddress.ip_address(text.partition("%")[0])
        mapped = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None)
        for found in (address, mapped):
            if found is not None and (not found.is_global or found.is_multicast):
                raise ImageFaultError("could not be fetched: its host has an address that is not public")
    if not addresses:
        raise OSError("no address")
    return addresses[0]


def _read_body(response: http.client.HTTPResponse, max_bytes: int, deadline_s: float) -> bytes:
    body = bytearray()
    while piece := response.read1(READ_BYTES):
        body += piece
        if len(body) > max_bytes:
            raise ImageFaultError(f"is larger than {max_bytes} bytes, the most that this server takes")
    _left_s(deadline_s)
    return bytes(body)


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _left_s(deadline_s: float) -> float:
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return left_s
