"""docs/quickstart.ipynb, run from the first cell to the last in a kernel of this interpreter.

The notebook is run as it is committed. After some cells one more is put in that prints what the test wants to
know, since the notebook itself shows replies as HTML.
"""

from __future__ import annotations

import os
import socket

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

from tests.source_tree import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.download]

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
CELL_TIMEOUT_S = 400  # the first start downloads and compiles

# Cell id -> what to print after it, to stdout and with nothing around it.
PROBES = {
    "launch": "print(server_process.pid, port, end='')",
    "curl": "print(response['choices'][0]['message']['content'], end='')",
    "requests": "print(response.json()['choices'][0]['message']['content'], end='')",
    "openai": "print(response.choices[0].message.content, end='')",
    "generate": "print(response.json()['text'], end='')",
    "stop": "print(server_process.poll(), end='')",
}


@pytest.fixture(scope="module")
def cells():
    """The executed cells by id, the probes under "probe-" and the id of the cell before them."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert PROBES.keys() <= {cell.id for cell in notebook.cells}
    with_probes = []
    for cell in notebook.cells:
        with_probes.append(cell)
        if cell.id in PROBES:
            probe = nbformat.v4.new_code_cell(PROBES[cell.id])
            probe.id = f"probe-{cell.id}"
            with_probes.append(probe)
    notebook.cells = with_probes
    # Without folders to look in, the one kernel there is to find is that of this interpreter.
    specs = KernelSpecManager(kernel_dirs=[], ensure_native_kernel=True)
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs)
    client = NotebookClient(
        notebook, km=manager, timeout=CELL_TIMEOUT_S, resources={"metadata": {"path": str(ROOT)}}
    )
    client.execute()
    return {cell.id: cell for cell in notebook.cells}


def printed(cell: NotebookNode) -> str:
    """What a cell wrote to stdout."""
    return "".join(
        output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout"
    )


def highlighted(cell: NotebookNode) -> str:
    """What a cell showed by print_highlight."""
    return "".join(
        output.data["text/html"] for output in cell.outputs if output.output_type == "display_data"
    )


def test_no_cell_fails(cells):
    for cell in cells.values():
        assert [output for output in cell.get("outputs", []) if output.output_type == "error"] == []


def test_replies_are_shown_in_full(cells):
    for name in ("curl", "requests"):
        assert highlighted(cells[name]).startswith("<pre")
        assert "chat.completion" in highlighted(cells[name])
    assert "ChatCompletion(" in highlighted(cells["openai"])
    assert "output_ids" in highlighted(cells["generate"])


def test_curl_and_requests_get_the_same_answer(cells):
    answer = printed(cells["probe-curl"])
    assert answer.strip()
    assert printed(cells["probe-requests"]) == answer


@pytest.mark.parametrize("route", ["openai", "generate"])
def test_a_stream_prints_the_text_of_the_whole_reply(cells, route: str):
    text = printed(cells[f"probe-{route}"])
    assert text.strip()
    assert printed(cells[f"{route}-stream"]) == text


def test_the_server_is_gone(cells):
    pid, port = map(int, printed(cells["probe-launch"]).split())
    assert printed(cells["probe-stop"]) != "None", "the server had not ended when the last cell had"
    with pytest.raises(ProcessLookupError):
        os.killpg(pid, 0)  # neither the server nor anything that it started
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
