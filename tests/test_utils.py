"""The notebook functions, with a ten-line HTTP server in the place of ours."""

from __future__ import annotations

import ast
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from pathlib import Path

import pytest

from jaxserve.utils import (
    find_free_port,
    launch_server_cmd,
    print_highlight,
    terminate_process,
    wait_for_server,
)

# Prints its arguments; answers /v1/models with the status and after the delay that the environment names.
FAKE_SERVER = """
import http.server, os, subprocess, sys, time

class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(int(os.environ.get("STATUS", "200")))
        self.end_headers()
        self.wfile.write(repr((sys.executable, sys.argv[1:], os.environ.get("WORD"))).encode())

    def log_message(self, *args):
        pass

if os.environ.get("CHILD"):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    open(os.environ["CHILD"], "w").write(str(child.pid))
if os.environ.get("EXIT"):
    sys.exit(int(os.environ["EXIT"]))
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Answer).serve_forever()
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "fake server.py"
    path.write_text(textwrap.dedent(FAKE_SERVER))
    return path


def is_alive(pid: int) -> bool:
    """Whether `pid` runs. A zombie does not: there may be no init here that collects it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_dead(pid: int) -> bool:
    deadline_s = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return not is_alive(pid)


def test_the_quickstart_form_starts_waits_and_stops(script: Path, capsys: pytest.CaptureFixture[str]):
    process, port = launch_server_cmd(
        rf"""
        WORD=hello python3 "{script}" --model-path m \
        --host 127.0.0.1
        """,
        host="127.0.0.1",
    )
    try:
        wait_for_server(f"http://localhost:{port}", timeout=30, process=process)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
            executable, argv, word = ast.literal_eval(answer.read().decode())
    finally:
        terminate_process(process)
    assert 30000 <= port < 40000
    assert executable == sys.executable, "a leading python3 is this interpreter"
    assert argv == ["--model-path", "m", "--host", "127.0.0.1", "--port", str(port)]
    assert word == "hello"
    assert process.returncode is not None
    assert "ready" in capsys.readouterr().out
    terminate_process(process)  # a second time does nothing


def test_a_port_in_the_command_or_the_call_is_kept(script: Path, free_port: int):
    for extra, port in ((f"--port {free_port}", None), (f"--port={free_port}", None), ("", free_port)):
        process, chosen = launch_server_cmd(f"EXIT=0 python '{script}' {extra}", port=port)
        assert process.wait(30) == 0
        assert chosen == free_port


def test_waiting_tells_when_the_server_has_died(script: Path):
    process, port = launch_server_cmd(f"EXIT=3 python '{script}'", host="127.0.0.1")
    with pytest.raises(RuntimeError, match="exit status 3"):
        wait_for_server(f"http://127.0.0.1:{port}", timeout=30, process=process)


def test_waiting_ends_at_the_timeout_and_a_server_that_is_not_ready_does_not_count(script: Path):
    process, port = launch_server_cmd(f"STATUS=503 python '{script}'", host="127.0.0.1")
    try:
        with pytest.raises(TimeoutError, match="within 1 seconds"):
            wait_for_server(f"http://127.0.0.1:{port}", timeout=1, process=process)
    finally:
        terminate_process(process)


def test_a_server_that_wants_a_key_counts_as_ready(script: Path):
    process, port = launch_server_cmd(f"STATUS=401 python '{script}'", host="127.0.0.1")
    try:
        wait_for_server(f"http://127.0.0.1:{port}", timeout=30, process=process)
    finally:
        terminate_process(process)


@pytest.mark.parametrize("exits", ["", "EXIT=0"])
def test_terminating_takes_the_children_along_even_of_a_server_that_has_ended(
    script: Path, tmp_path: Path, exits: str
):
    noted = tmp_path / "child.pid"
    process, port = launch_server_cmd(f"CHILD={noted} {exits} python '{script}'", host="127.0.0.1")
    if exits:
        process.wait(30)
    else:
        wait_for_server(f"http://127.0.0.1:{port}", timeout=30, process=process)
    child = int(noted.read_text())
    assert is_alive(child)
    terminate_process(process)
    assert wait_until_dead(child)


def test_a_server_does_not_outlive_the_program_that_launched_it(script: Path):
    program = (
        "from jaxserve.utils import launch_server_cmd, wait_for_server\n"
        f"process, port = launch_server_cmd('''python \"{script}\"''', host='127.0.0.1')\n"
        "wait_for_server(f'http://127.0.0.1:{port}', timeout=30, process=process)\n"
        "print(process.pid)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert wait_until_dead(int(done.stdout.split()[-1]))


@pytest.mark.parametrize("command", ["", "  \\\n ", "WORD=1"])
def test_a_command_must_name_a_program(command: str):
    with pytest.raises(ValueError, match="must name a program"):
        launch_server_cmd(command)


def test_mistakes_are_told_at_once():
    with pytest.raises(ValueError, match="--port must be followed by a number"):
        launch_server_cmd("python x.py --port")
    with pytest.raises(ValueError, match="must start with http"):
        wait_for_server("localhost:30000")


def test_free_ports_are_of_the_quickstart_range_and_not_taken():
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", find_free_port()))
        busy.listen()
        assert find_free_port() != busy.getsockname()[1]


def test_highlighted_text_is_plain_outside_a_notebook(capsys: pytest.CaptureFixture[str]):
    print_highlight({"a": "<b>"})
    assert capsys.readouterr().out == "{'a': '<b>'}\n"


def test_highlighted_text_is_blue_and_escaped_in_a_notebook(monkeypatch: pytest.MonkeyPatch):
    ipython = pytest.importorskip("IPython", reason="IPython is not installed")
    import IPython.display

    shown = []
    monkeypatch.setattr(ipython, "get_ipython", lambda: type("Shell", (), {"kernel": object()})())
    monkeypatch.setattr(IPython.display, "display", shown.append)
    print_highlight("1 < 2 & <b>")
    (page,) = shown
    assert "1 &lt; 2 &amp; &lt;b&gt;" in page.data
    assert "color" in page.data


def test_importing_costs_no_dependency():
    script = (
        "import sys, jaxserve.utils; print([m for m in ('jax', 'requests', 'IPython') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
