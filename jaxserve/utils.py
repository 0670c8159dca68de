"""For notebooks: start a server in the background, wait until it answers, stop it.

The module's name is fixed by the quickstart, which imports these four functions from `utils`; nothing
else belongs here. They start and watch processes and know nothing of models; standard library only, so
that a notebook pays nothing for the import.
"""

from __future__ import annotations

import atexit
import contextlib
import html
import http.client
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import Any

PORT_RANGE = (30000, 40000)
POLL_INTERVAL_S = 0.25
REQUEST_TIMEOUT_S = 5.0
TERMINATE_TIMEOUT_S = 10.0  # from SIGTERM to SIGKILL

ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")


def launch_server_cmd(
    command: str, host: str = "0.0.0.0", port: int | None = None
) -> tuple[subprocess.Popen[str], int]:
    """Start `command` in the background and return its process and the port it will listen on.

    `--port N` is added, with a free port of 30000-40000 on `host` unless `port` is given or the command
    names one. No shell is involved: quotes and backslash-newlines are understood, leading NAME=value words
    become environment variables, and a leading `python` or `jaxserve` means those of this interpreter.
    The server's output joins ours, and it ends with this program at the latest. Raises ValueError for an
    empty command or a bad --port, OSError if the program cannot be started.
    """
    words = shlex.split(re.sub(r"\\\r?\n", " ", command))
    environment = dict(os.environ)
    while words and ASSIGNMENT.match(words[0]):
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    if not words:
        raise ValueError(f"command must name a program to start, got {command!r}.")
    named_port = _find_port(words)
    if named_port is None:
        named_port = find_free_port(host) if port is None else port
        words += ["--port", str(named_port)]
    if words[0] in ("python", "python3"):
        words[0] = sys.executable
    elif words[0] == "jaxserve":
        words[:1] = [sys.executable, "-m", "jaxserve"]
    process = subprocess.Popen(
        words, env=environment, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    atexit.register(terminate_process, process)
    return process, named_port


def wait_for_server(
    base_url: str, timeout: float | None = None, process: subprocess.Popen[str] | None = None
) -> None:
    """Return once the server at `base_url` (such as http://localhost:30000) serves its model.

    `timeout` in seconds, None for ever. Raises TimeoutError, or RuntimeError as soon as `process` has
    ended, or ValueError for a URL without http://. A server that asks for a key (401) counts as serving.
    """
    if not base_url.startswith(("http://", "https://")):
        raise ValueError(f"base_url must start with http:// or https://, got {base_url!r}.")
    deadline_s = None if timeout is None else time.monotonic() + timeout
    while not _answers(f"{base_url.rstrip('/')}/v1/models"):
        if process is not None and process.poll() is not None:
            raise RuntimeError(
                f"The server ended with exit status {process.returncode} before it was ready;"
                " its last lines say why."
            )
        if deadline_s is not None and time.monotonic() >= deadline_s:
            raise TimeoutError(f"No server was ready at {base_url} within {timeout:g} seconds.")
        time.sleep(POLL_INTERVAL_S)
    print_highlight(
        "The server is ready. Its log lines and this program's output appear together from here on."
    )


def print_highlight(x: Any) -> None:
    """Print `x`, in bold blue where this is a notebook, so that it stands out among server lines."""
    if not _is_notebook():
        print(x)
        return
    from IPython.core.display import HTML  # present: a notebook runs us
    from IPython.display import display

    style = "color: #1f5fbf; font-weight: bold; white-space: pre-wrap"
    display(HTML(f'<pre style="{style}">{html.escape(str(x))}</pre>'))


def terminate_process(process: subprocess.Popen[str]) -> None:
    """Stop a server and every process it started: politely, then after ten seconds by force.

    Does nothing when it is already gone, so it may be called twice.
    """
    if process.poll() is None:
        leads_group = os.getpgid(process.pid) == process.pid
        process.terminate()
        try:
            process.wait(TERMINATE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            if leads_group:
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()
    if _has_orphans(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def find_free_port(host: str = "127.0.0.1") -> int:
    """A port of 30000-40000 that nobody listens on. Raises OSError when there is none.

    It is not held: the server must be able to bind it, so two programs could in theory draw the same one.
    """
    ports = range(*PORT_RANGE)
    for port in random.sample(ports, k=len(ports)):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server will
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise OSError(f"No port from {PORT_RANGE[0]} to {PORT_RANGE[1]} is free on {host}.")


def _find_port(words: list[str]) -> int | None:
    """The port that a command names itself, if it does."""
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == "--port":
            value = value if equals else "".join(words[index + 1 : index + 2])
            if not value.isdecimal():
                raise ValueError(f"--port must be followed by a number, got {value!r}.")
            return int(value)
    return None


def _answers(url: str) -> bool:
    """Whether a GET gives 200, or 401: up, but it wants a key. Proxies are not asked: this is local."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, headers={"Authorization": "Bearer None"})
    try:
        with opener.open(request, timeout=REQUEST_TIMEOUT_S) as response:
            return response.status == 200
    except urllib.error.HTTPError as error:
        error.close()
        return error.code == 401
    except (OSError, http.client.BadStatusLine):  # nobody listens yet, or not HTTP
        return False


def _has_orphans(group_id: int) -> bool:
    """Whether a process group has outlived the leader it is named after.

    The id of a live group is not given to a new process, so members without a leader are the leader's own.
    """
    try:
        os.killpg(group_id, 0)
    except (ProcessLookupError, PermissionError):
        return False
    try:
        os.kill(group_id, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _is_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return hasattr(shell, "kernel")
