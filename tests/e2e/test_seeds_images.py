"""xLLM's page about images: its two Python blocks run as printed, and the answers are transformers' own.

The server is what `jaxserve launch` makes of a tiny random Qwen2.5-VL; greedy, as the reference was. In the
blocks the address is filled in, and that of the image, which the page leaves empty; line breaks are those
that the page had lost.
"""

from __future__ import annotations

import ast
import functools
import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import requests

from tests import tiny_vl
from tests.e2e.served import Served, serve
from tests.e2e.test_seeds import TIMEOUT_S, XLLM_PAGE, without_space
from tests.goldens.read import GOLDENS_DIR, read_vl_facts
from tests.vision.pictures import draw, encode, list_hostile_urls, make_data_url

MODEL = "Qwen2.5-VL-7B-Instruct"
HOST = "localhost:12345"

REQUESTS_BLOCK = """
import base64
import requests

api_url = "http://localhost:12345/v1/chat/completions"
image_url = ""

def encode_image(url: str) -> str:
    with requests.get(url) as response:
        response.raise_for_status()
        result = base64.b64encode(response.content).decode("utf-8")

    return result

image_base64 = encode_image(image_url)
payload = {
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "介绍下这张图片"},
                {
                    "type": "image_url",
                    "image_url": {"url": f"data:image/jpeg;base64,{image_base64}"},
                },
            ],
        }
    ],
    "model": "Qwen2.5-VL-7B-Instruct",
    "max_completion_tokens": 128,
}

response = requests.post(
    api_url,
    json=payload,
    headers={"Content-Type": "application/json"}
)
print(response.json())
"""

OPENAI_BLOCK = """
from openai import OpenAI
import base64
import requests

openai_api_key = "EMPTY"
openai_api_base = "http://localhost:12345/v1"
image_url = ""

client = OpenAI(
    api_key=openai_api_key,
    base_url=openai_api_base,
)

def encode_image(url: str) -> str:
    with requests.get(url) as response:
        response.raise_for_status()
        result = base64.b64encode(response.content).decode("utf-8")

    return result

image_base64 = encode_image(image_url)
chat_completion = client.chat.completions.create(
    messages=[
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "介绍下这张图片"},
                {
                    "type": "image_url",
                    "image_url": {"url": f"data:image/jpeg;base64,{image_base64}"},
                },
            ],
        }
    ],
    model="Qwen2.5-VL-7B-Instruct",
    max_completion_tokens=128,
)

result = chat_completion.choices[0].message.content
print("Chat completion output:", result)
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("models") / "vl"
    tiny_vl.write_tiny_vl_checkpoint(folder)
    with serve(
        "--model-path", str(folder), "--served-model-name", MODEL, "--dtype", "float32",
        "--preferred-sampling-params", '{"temperature": 0}', "--max-running-requests", "8",
        "--max-total-tokens", "8k", "--max-image-pixels", "50176", "--log-level", "warning",
    ) as server:  # fmt: skip
        yield server


@pytest.fixture(scope="module")
def picture_url() -> Iterator[str]:
    """A web server that has the picture of the goldens."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(GOLDENS_DIR))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/picture.png"
    server.shutdown()
    server.server_close()


def run_block(block: str, served: Served, picture_url: str) -> str:
    block = block.replace(HOST, served.url.removeprefix("http://"))
    block = block.replace('image_url = ""', f'image_url = "{picture_url}"')
    done = subprocess.run(
        [sys.executable, "-c", block], capture_output=True, text=True, timeout=TIMEOUT_S, check=True
    )
    return done.stdout


@pytest.mark.parametrize("block", [REQUESTS_BLOCK, OPENAI_BLOCK])
def test_the_blocks_are_those_of_the_page(block):
    assert without_space(block) in without_space(XLLM_PAGE)


@pytest.mark.slow
def test_the_block_with_requests(served, picture_url):
    reply = ast.literal_eval(run_block(REQUESTS_BLOCK, served, picture_url))
    golden = read_vl_facts()["page"]
    (choice,) = reply["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == golden["greedy_text"]
    assert choice["finish_reason"] == "stop"
    assert (reply["object"], reply["model"]) == ("chat.completion", MODEL)
    assert reply["usage"]["prompt_tokens"] == len(golden["prompt_ids"])
    assert reply["usage"]["completion_tokens"] == len(golden["greedy_ids"])


@pytest.mark.slow
def test_the_block_with_openais_client(served, picture_url):
    printed = run_block(OPENAI_BLOCK, served, picture_url)
    assert printed == f"Chat completion output: {read_vl_facts()['page']['greedy_text']}\n"


def ask(served: Served, url: str, **fields: object) -> requests.Response:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 4, **fields}
    return requests.post(f"{served.url}/v1/chat/completions", json=body, timeout=TIMEOUT_S)


@pytest.mark.slow
def test_hostile_files_are_all_refused_and_the_server_goes_on(served):
    for url in list_hostile_urls(200):
        if "\ud800" not in url:  # which is not JSON
            reply = ask(served, url)
            assert reply.status_code == 400, (url[:60], reply.text)
            assert reply.json()["message"].endswith(".")
    assert ask(served, make_data_url(encode(draw(60, 60)))).status_code == 200


@pytest.mark.slow
def test_the_same_image_is_a_hit_and_another_is_not(served):
    def count_cached(seed: int) -> int:
        reply = ask(served, make_data_url(encode(draw(168, 168, seed))), return_cached_tokens_details=True)
        return reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [count_cached(seed) for seed in (50, 50, 51)] == [0, 48, 0]
