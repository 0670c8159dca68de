"""Which host this is: from flags, from the environment of a TPU slice, or from its metadata server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from jaxserve.config import ServerConfig
from jaxserve.errors import ConfigError
from jaxserve.hosts import seat
from jaxserve.hosts.seat import Slice, find_slice, read_address, take_seat

SLICE = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "worker-0.pool,worker-1.pool"}
ATTRIBUTES = {
    "agent-worker-number": "2",
    "worker-network-endpoints": "a:0:10.0.0.7,b:1:10.0.0.8,c:2:10.0.0.9",
}


def test_one_host_is_what_nobody_speaks_of(monkeypatch):
    for name in SLICE:
        monkeypatch.delenv(name, raising=False)
    config = take_seat(ServerConfig(model_path="m"))
    assert (config.nnodes, config.node_rank, config.dist_init_addr) == (1, 0, None)


def test_several_hosts_serve_one_copy_of_the_model():
    with pytest.raises(ConfigError, match="dp_size above 1 is served on one host, and these 2 share"):
        take_seat(ServerConfig(model_path="m", dp_size=2, nnodes=2, dist_init_addr="a:1"))


def test_a_tpu_slice_tells_in_the_environment_and_flags_win(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "")
    for name, value in SLICE.items():
        monkeypatch.setenv(name, value)
    config = take_seat(ServerConfig(model_path="m", tp_size=8))
    assert (config.nnodes, config.node_rank, config.dist_init_addr) == (2, 1, "worker-0.pool:20000")
    with pytest.raises(
        ConfigError, match=r"must be a multiple of them, got 1\. To serve from this host alone"
    ):
        take_seat(ServerConfig(model_path="m"))
    assert take_seat(ServerConfig(model_path="m", nnodes=1)).node_rank == 0


@pytest.fixture
def metadata_server() -> Iterator[str]:
    """Google's, as far as we ask it; its address."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            value = ATTRIBUTES.get(self.path.removeprefix("/computeMetadata/v1/instance/attributes/"))
            is_known = value is not None and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if is_known else 404)
            self.end_headers()
            self.wfile.write((value or "").encode())

        def log_message(self, format: str, *_args: object) -> None:
            """Nothing: tests are quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_tpu_vm_asks_its_metadata_server(metadata_server, monkeypatch, tmp_path):
    environ = {"GCE_METADATA_IP": metadata_server}
    assert find_slice(environ) is None  # no TPU, no question
    (tmp_path / "accel0").touch()
    monkeypatch.setattr(seat, "TPU_FILES", (f"{tmp_path}/accel*",))
    assert find_slice(environ) == Slice(rank=2, addresses=("10.0.0.7", "10.0.0.8", "10.0.0.9"))
    monkeypatch.setitem(ATTRIBUTES, "worker-network-endpoints", "host-a,host-b,host-c")
    found = find_slice(environ)
    assert found is not None
    assert found.addresses == ("host-a", "host-b", "host-c")
    assert find_slice({**environ, "JAX_PLATFORMS": "cpu"}) is None
    monkeypatch.delitem(ATTRIBUTES, "agent-worker-number")
    assert find_slice(environ) is None


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"nnodes": 2, "node_rank": 2, "dist_init_addr": "a:1"}, "node_rank must be below nnodes, 2"),
        ({"node_rank": 1}, "node_rank must be below nnodes, 1"),
        ({"nnodes": 2, "tp_size": 2}, "need --dist-init-addr HOST:PORT"),
        ({"nnodes": 2, "tp_size": 3, "dist_init_addr": "a:1"}, "must be a multiple of them, got 3"),
        ({"nnodes": 2, "tp_size": 2, "dist_init_addr": "10.0.0.1"}, "must be HOST:PORT"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        take_seat(ServerConfig(model_path="m", **settings))


def test_addresses():
    assert read_address("[fd00::1]:20000") == ("fd00::1", 20000)
    assert read_address("host-0.pool:1") == ("host-0.pool", 1)
    for text in ("host", ":1", "host:", "host:0", "host:65535", "host:x"):
        with pytest.raises(ConfigError, match=r"such as 10\.0\.0\.1:20000"):
            read_address(text)
