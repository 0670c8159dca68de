"""A small Hugging Face hub on loopback: the endpoints that huggingface_hub calls to fetch a model.

Tests tell it to break in the ways a hub does: cut a connection, refuse, go away. Knows nothing of the code
under test.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """What is served, and what goes wrong. `requests` logs method and path."""

    repo_id: str
    folder: Path
    url: str = ""
    gated: bool = False
    cut_file: str | None = None  # its first download stops half way, later ones are answered with 503
    is_down: bool = False
    requests: list[str] = field(default_factory=list)

    def downloads_of(self, file_name: str) -> int:
        return sum(line.startswith("GET ") and line.endswith(f"/{file_name}") for line in self.requests)


@contextlib.contextmanager
def serve_fake_hub(repo_id: str, folder: Path) -> Iterator[FakeHub]:
    hub = FakeHub(repo_id, folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            answer(self, hub)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def answer(request: BaseHTTPRequestHandler, hub: FakeHub) -> None:
    path = unquote(urlsplit(request.path).path)
    hub.requests.append(f"{request.command} {path}")
    if hub.is_down:
        send(request, HTTPStatus.SERVICE_UNAVAILABLE, b"down")
        return
    parts = path.removeprefix("/api/models").strip("/").split("/")
    repo_id, rest = "/".join(parts[:2]), parts[2:]
    if repo_id.lower() != hub.repo_id.lower():
        send(request, HTTPStatus.UNAUTHORIZED, b"", {"X-Error-Message": "Invalid username or password."})
    elif repo_id != hub.repo_id:
        location = request.path.replace(repo_id, hub.repo_id)
        send(request, HTTPStatus.TEMPORARY_REDIRECT, b"", {"Location": location})
    elif hub.gated:
        send(request, HTTPStatus.FORBIDDEN, b"", {"X-Error-Code": "GatedRepo"})
    elif rest[:1] == ["resolve"]:
        send_file(request, hub, rest[1], "/".join(rest[2:]))
    elif rest and rest[1] not in ("main", COMMIT):
        send(request, HTTPStatus.NOT_FOUND, b"", {"X-Error-Code": "RevisionNotFound"})
    elif rest[:1] == ["tree"]:
        send_json(request, [{"type": "file", **entry} for entry in list_files(hub)])
    else:
        siblings = [{"rfilename": entry["path"], "size": entry["size"]} for entry in list_files(hub)]
        send_json(request, {"id": hub.repo_id, "modelId": hub.repo_id, "sha": COMMIT, "siblings": siblings})


def list_files(hub: FakeHub) -> list[dict[str, object]]:
    return [
        {"path": str(path.relative_to(hub.folder)), "size": path.stat().st_size, "oid": etag_of(path)}
        for path in sorted(hub.folder.rglob("*"))
        if path.is_file()
    ]


def etag_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:40]


def send_file(request: BaseHTTPRequestHandler, hub: FakeHub, revision: str, file_name: str) -> None:
    path = hub.folder / file_name
    if revision not in ("main", COMMIT) or not path.is_file():
        send(request, HTTPStatus.NOT_FOUND, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        return
    body, status = path.read_bytes(), HTTPStatus.OK
    headers = {"ETag": f'"{etag_of(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
    wanted = request.headers.get("Range")
    if wanted:
        start = int(wanted.removeprefix("bytes=").split("-")[0])
        headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        body, status = body[start:], HTTPStatus.PARTIAL_CONTENT
    if hub.cut_file != file_name or request.command != "GET":
        send(request, status, body, headers)
    elif hub.downloads_of(file_name) == 1:
        send(request, status, body, headers, num_sent=len(body) // 2)
        request.close_connection = True
    else:
        send(request, HTTPStatus.SERVICE_UNAVAILABLE, b"down")


def send_json(request: BaseHTTPRequestHandler, value: object) -> None:
    send(request, HTTPStatus.OK, json.dumps(value).encode(), {"Content-Type": "application/json"})


def send(
    request: BaseHTTPRequestHandler,
    status: HTTPStatus,
    body: bytes,
    headers: dict[str, str] | None = None,
    num_sent: int | None = None,
) -> None:
    request.send_response(status)
    for name, value in (headers or {}).items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    if request.command == "GET":
        request.wfile.write(body[:num_sent])
