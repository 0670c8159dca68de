"""The library with a model that sees: the messages of the chat route, and transformers' tokens."""

from __future__ import annotations

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.errors import InvalidRequestError
from tests import tiny_vl
from tests.goldens.read import GOLDENS_DIR, read_vl_facts
from tests.vision.pictures import make_data_url


def test_a_chat_about_a_picture(tmp_path):
    golden = read_vl_facts()["chat"]
    url = make_data_url((GOLDENS_DIR / "picture.png").read_bytes())
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": golden["text"]}]
    greedy = SamplingParams(temperature=0, max_new_tokens=32, ignore_eos=True)
    with LLM(
        str(tiny_vl.write_tiny_vl_checkpoint(tmp_path / "vl")),
        dtype="float32",
        max_total_tokens=1024,
        max_running_requests=2,
        max_image_pixels=50176,
        log_level="warning",
        compilation_cache_dir=str(tmp_path / "programs"),
    ) as llm:
        answer = llm.chat([{"role": "user", "content": parts}], greedy)
        assert answer["output_ids"] == golden["greedy_ids"]
        assert answer["meta_info"]["prompt_tokens"] == len(golden["prompt_ids"])
        parts[0] = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
        with pytest.raises(
            InvalidRequestError, match=r"The image at messages\[0\]\.content\[0\] cannot be read"
        ):
            llm.chat([{"role": "user", "content": parts}], greedy)
