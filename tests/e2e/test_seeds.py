"""The two documents that clients are written from: their examples run as printed, replies have the form.

xLLM's online service: every curl line and Python block that is about text, against a served model, with the
host, the port and the line breaks mended, which the page had lost. SGLang's quickstart runs in
test_quickstart.py; here its snippets and replies are held against the page itself. The pages are in seeds/.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests

from tests.e2e import test_quickstart
from tests.e2e.served import Served, serve
from tests.e2e.test_quickstart import assert_same_form
from tests.source_tree import ROOT

SEEDS = ROOT / "tests" / "e2e" / "seeds"
XLLM_PAGE = (SEEDS / "xllm_online_service.txt").read_text(encoding="utf-8")
SGLANG_PAGE = (SEEDS / "sglang_sending_requests.txt").read_text(encoding="utf-8")
MODEL = "Qwen2-7B-Instruct"
TIMEOUT_S = 120

CURL_LINES = re.findall(r"curl http://[^']*'[^']*'", XLLM_PAGE)

PYTHON_BLOCK = """
import requests
import json

url = f"http://localhost:9977/v1/chat/completions"
messages = [ {'role': 'user', 'content': "列出三个国家和他的首都。"}]

request_data = { "model": "Qwen2-7B-Instruct", "messages": messages, "stream": False, "temperature": 0.6, "max_tokens": 2048,}

response = requests.post(url, json=request_data)
if response.status_code != 200:
    print(response.status_code, response.text)
else:
    ans = json.loads(response.text)["choices"]
    print(ans[0]['message'])
"""  # noqa: E501 - as in the original


@pytest.fixture(scope="module")
def served():
    """A model with random weights: it is the formats that are asked about."""
    with serve(
        "--config", "tiny.yaml", "--context-length", "4096", "--served-model-name", MODEL,
        "--log-level", "warning",
    ) as server:  # fmt: skip
        yield server


def run_curl(served: Served, line: str) -> str:
    """What a line of the page prints. Its line breaks are a backslash and a space there."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    line = re.sub(r"http://(localhost|127\.0\.0\.1):9977", served.url, line).replace("\\ -", "\\\n -")
    done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    return done.stdout


def find_curl(*words: str) -> str:
    """The one curl line of the page that holds all of these words."""
    (line,) = [line for line in CURL_LINES if all(word in line for word in words)]
    return line


def read_stream(printed: str) -> list[dict[str, Any]]:
    """The events of a server-sent stream, which has to end with [DONE]."""
    events = [event.removeprefix("data: ") for event in printed.strip().split("\n\n")]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def without_space(text: str) -> str:
    return re.sub(r"\s", "", text)


def test_the_page_has_the_examples_that_are_run_here():
    assert len(CURL_LINES) == XLLM_PAGE.count("curl http") == 5
    assert without_space(PYTHON_BLOCK) in without_space(XLLM_PAGE)


@pytest.mark.slow
def test_chat_stream(served):
    events = read_stream(run_curl(served, find_curl("chat", '"stream": true')))
    for event in events:
        assert_same_form(
            event, {"id": "", "object": "", "created": 0, "model": MODEL, "choices": [{"index": 0}]}
        )
        assert event["object"] == "chat.completion.chunk"
        assert event["model"] == MODEL
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content") or "" for delta in deltas)
    reasons = [event["choices"][0]["finish_reason"] for event in events]
    assert reasons[-1] in ("stop", "length")
    assert reasons[:-1] == [None] * len(reasons[:-1])


@pytest.mark.slow
def test_completions_stream(served):
    events = read_stream(run_curl(served, find_curl("v1/completions", '"stream": true')))
    for event in events:
        assert event["object"] == "text_completion"
        assert (event["model"], event["choices"][0]["index"]) == (MODEL, 0)
    assert "".join(event["choices"][0]["text"] for event in events)
    assert events[-1]["choices"][0]["finish_reason"] in ("stop", "length")


def check_beams(
    choices: list[dict[str, Any]], sums: Sequence[float], lengths: list[int], usage: dict
) -> None:
    """Two hypotheses, the likelier first; their tokens are what is counted."""
    assert [choice["index"] for choice in choices] == [0, 1]
    assert sums == sorted(sums, reverse=True)
    assert [choice["cumulative_logprob"] for choice in choices] == pytest.approx(sums, abs=1e-4)
    assert all(choice["finish_reason"] in ("stop", "length") for choice in choices)
    assert max(lengths) <= 20
    assert usage["completion_tokens"] == sum(lengths)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@pytest.mark.slow
def test_beam_search_in_chat(served):
    reply = json.loads(run_curl(served, find_curl("chat", "beam_width")))
    content = [choice["logprobs"]["content"] for choice in reply["choices"]]
    for position in content[0] + content[1]:
        assert_same_form(
            position, {"token": "", "logprob": -0.1, "bytes": [0], "top_logprobs": [{"token": ""}]}
        )
        assert len(position["top_logprobs"]) == 4
    sums = [sum(position["logprob"] for position in positions) for positions in content]
    check_beams(reply["choices"], sums, list(map(len, content)), reply["usage"])
    assert content[0] != content[1]
    assert all(choice["message"]["role"] == "assistant" for choice in reply["choices"])


@pytest.mark.slow
def test_beam_search_in_completions(served):
    reply = json.loads(run_curl(served, find_curl("v1/completions", "beam_width")))
    logprobs = [choice["logprobs"] for choice in reply["choices"]]
    form = {"tokens": [""], "token_logprobs": [-0.1]}
    for beam in logprobs:
        assert_same_form(beam, form)
    sums = [sum(beam["token_logprobs"]) for beam in logprobs]
    check_beams(reply["choices"], sums, [len(beam["tokens"]) for beam in logprobs], reply["usage"])


def typical_response() -> dict[str, Any]:
    """The reply that the page prints under its sample request."""
    text = XLLM_PAGE.partition("典型响应:")[2].lstrip()
    return json.JSONDecoder().raw_decode(text)[0]


def assert_same_keys(got: Any, printed: Any) -> None:
    """The printed keys, in their order, and no others."""
    if isinstance(printed, dict):
        assert list(got) == list(printed)
        for key, value in printed.items():
            assert_same_keys(got[key], value)
    elif isinstance(printed, list) and printed:
        for item in got:
            assert_same_keys(item, printed[0])


@pytest.mark.slow
def test_sample(served):
    reply, typical = json.loads(run_curl(served, find_curl("v1/sample"))), typical_response()
    assert_same_form(reply, typical)
    assert_same_keys(reply, typical)
    for name in ("id", "object", "model"):
        assert reply[name] == typical[name]
    prompt = "问题:<emb_0> 是否命中。结论:<emb_0>"
    num_tokens = len(prompt.encode())  # one a byte
    assert reply["usage"] == {
        "prompt_tokens": num_tokens,
        "completion_tokens": 2,
        "total_tokens": num_tokens + 2,
    }
    assert [choice["index"] for choice in reply["choices"]] == [0, 1]
    for choice in reply["choices"]:
        logprobs = choice["logprobs"]
        assert choice["finish_reason"] == "selector_match"
        assert choice["text"] == logprobs["tokens"][0]
        assert [len(values) for values in logprobs.values()] == [5, 5, 5]
        assert logprobs["token_logprobs"] == sorted(logprobs["token_logprobs"], reverse=True)


@pytest.mark.slow
def test_what_the_page_says_of_samples_without_a_match_and_of_errors(served):
    url = f"{served.url}/v1/sample"
    body = {"model": MODEL, "prompt": "no match", "selector": {"type": "literal", "value": "<emb_0>"}}
    none = requests.post(url, json=body, timeout=TIMEOUT_S)
    assert (none.status_code, none.json()["choices"]) == (200, [])
    for name in ("model", "prompt", "selector"):
        lacking = requests.post(url, json={**body, name: None}, timeout=TIMEOUT_S)
        assert (lacking.status_code, lacking.json()["status"]) == (400, "INVALID_ARGUMENT")
    unknown = requests.post(url, json={**body, "model": "another"}, timeout=TIMEOUT_S)
    assert (unknown.status_code, unknown.json()["status"]) == (404, "UNKNOWN")


@pytest.mark.slow
def test_a_sleeping_model_is_unavailable_for_samples_that_match(served):
    url = f"{served.url}/v1/sample"
    body = {"model": MODEL, "prompt": "a<emb_0>", "selector": {"type": "literal", "value": "<emb_0>"}}
    before = requests.post(url, json=body, timeout=TIMEOUT_S).json()
    sleep = {"model_id": MODEL, "master_status": 1}
    assert requests.post(f"{served.url}/sleep", json=sleep, timeout=TIMEOUT_S).status_code == 200
    asleep = requests.post(url, json=body, timeout=TIMEOUT_S)
    none = requests.post(url, json={**body, "prompt": "no match"}, timeout=TIMEOUT_S)
    assert (
        requests.post(f"{served.url}/wakeup", json={"model_id": MODEL}, timeout=TIMEOUT_S).status_code == 200
    )
    assert (asleep.status_code, asleep.json()["status"]) == (503, "UNAVAILABLE")
    assert (none.status_code, none.json()["choices"]) == (200, [])
    assert requests.post(url, json=body, timeout=TIMEOUT_S).json()["choices"] == before["choices"]


@pytest.mark.slow
def test_python_block(served):
    block = PYTHON_BLOCK.replace("localhost:9977", urlsplit(served.url).netloc)
    done = subprocess.run(
        [sys.executable, "-c", block], capture_output=True, text=True, timeout=TIMEOUT_S, check=True
    )
    message = ast.literal_eval(done.stdout)
    assert message["role"] == "assistant"
    assert message["content"]


def without_edits(snippet: str) -> str:
    """A snippet of test_quickstart as the SGLang page has it, which had lost the hosts of some URLs."""
    return without_space(snippet.replace("http://localhost:{port}", "https://:{port}"))


@pytest.mark.parametrize(
    "name", ["CURL", "REQUESTS", "OPENAI", "OPENAI_STREAM", "GENERATE", "GENERATE_STREAM", "TERMINATE"]
)
def test_the_quickstarts_snippets_are_those_of_the_page(name):
    assert without_edits(getattr(test_quickstart, name)) in without_space(SGLANG_PAGE)


def test_the_replies_that_the_quickstart_is_held_to_are_those_of_the_page():
    printed = [
        ast.literal_eval(line) for line in SGLANG_PAGE.splitlines() if line.startswith(("{'id'", "{'text'"))
    ]
    assert len(printed) == 3
    assert printed[0] == test_quickstart.PRINTED_CHAT
    for page, held in zip(
        printed[1:], (test_quickstart.PRINTED_CHAT, test_quickstart.PRINTED_GENERATE), strict=True
    ):
        assert_same_form(held, page)
        assert_same_keys(held, page)
