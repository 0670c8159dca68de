"""Images over HTTP: into the prompt that the engine is given, or refused with a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest

from jaxserve.server.images import ImageReader
from jaxserve.text.chat_template import ChatTemplate
from jaxserve.vision.limits import FetchRules, ImageForm, ImageLimits
from jaxserve.vision.loader import ImageLoader
from tests.fakes import FakeEngine, make_text_tools, open_client
from tests.vision.pictures import draw, encode, list_hostile_urls, make_data_url

IMAGE_ID = 1  # of the byte that stands for an image here
TEMPLATE = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{{ '<\x01>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}{% endfor %}:"
)
LIMITS = ImageLimits(max_per_message=3, max_per_request=4)
URLS = [make_data_url(encode(draw(56, 84, seed))) for seed in range(3)]  # 2 x 3 tokens each


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def seeing(engine) -> Iterator[httpx.Client]:
    loader = ImageLoader(ImageForm(), LIMITS, FetchRules())
    text = replace(
        make_text_tools(),
        chat_template=ChatTemplate(TEMPLATE, "", "", takes_images=True),
        images=ImageReader(loader, IMAGE_ID),
    )
    with open_client(engine, text=text) as client:
        yield client


def chat(client: httpx.Client, *parts: object, **fields: object) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": list(parts)}], "max_tokens": 2, **fields}
    return client.post("/v1/chat/completions", json=body)


def image(url: str, **fields: object) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": url}, **fields}


def text(words: str) -> dict[str, object]:
    return {"type": "text", "text": words}


def test_a_chat_about_two_images(seeing, engine):
    reply = chat(seeing, text("a"), image(URLS[0]), image(URLS[1]), text("b"))
    assert reply.status_code == 200, reply.text
    asked = engine.submitted[-1]
    assert asked.prompt_ids == [*b"a<", *[IMAGE_ID] * 6, *b"><", *[IMAGE_ID] * 6, *b">b:"]
    assert [(placed.offset, placed.end, placed.image.grid) for placed in asked.images] == [
        (2, 8, (1, 4, 6)),
        (10, 16, (1, 4, 6)),
    ]
    assert asked.images[0].image.content_id != asked.images[1].image.content_id
    assert reply.json()["usage"]["prompt_tokens"] == len(asked.prompt_ids)


def test_pixels_are_bounded_by_part_or_by_request(seeing, engine):
    for fields, part in (({"mm_processor_kwargs": {"max_pixels": 3136}}, {}), ({}, {"max_pixels": 3136})):
        assert chat(seeing, image(URLS[0], **part), **fields).status_code == 200
        assert engine.submitted[-1].images[0].image.grid == (1, 2, 4)


def test_generate_takes_image_data_for_placeholders(seeing, engine):
    def generate(**body: object) -> httpx.Response:
        return seeing.post("/generate", json={"sampling_params": {"max_new_tokens": 2}, **body})

    assert generate(text="x\x01y", image_data=URLS[0]).status_code == 200
    assert engine.submitted[-1].prompt_ids == [*b"x", *[IMAGE_ID] * 6, *b"y"]
    assert generate(text="\x01\x01", image_data=URLS[:2]).status_code == 200
    assert len(engine.submitted[-1].images) == 2
    bare = URLS[0].partition(",")[2]
    batch = generate(text=["\x01", "none", "\x01\x01"], image_data=[{"url": bare}, None, URLS[:2]])
    assert batch.status_code == 200, batch.text
    assert [len(asked.images) for asked in engine.submitted[-3:]] == [1, 0, 2]
    lacking = generate(text="no place", image_data=URLS[0])
    assert lacking.status_code == 400
    assert "holds it 0 times, and there are 1 images" in lacking.json()["message"]
    uneven = generate(text=["\x01", "\x01"], image_data=[URLS[0]])
    assert "one entry for each of the 2 prompts" in uneven.json()["message"]


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ([image(URLS[0])] * 4, "at most 3 images on this server, messages[0] holds 4"),
        ([image("http://example.com/a.png")], "which this server does not fetch"),
        ([image(URLS[0]), text("\x01")], "holds it 2 times, and there are 1 images"),
        ([text("\x01")], "holds it 1 times, and there are 0 images"),
        ([image(URLS[0], min_pixels=10**9)], "min_pixels of messages[0].content[0] must be between"),
        ([{"type": "video_url", "video_url": {"url": URLS[0]}}], "does not accept video"),
    ],
)
def test_what_is_refused(seeing, parts, sentence):
    reply = chat(seeing, *parts)
    assert reply.status_code == 400
    assert sentence in reply.json()["message"]


def test_hostile_files_get_400(seeing):
    """Those that JSON can carry; what they are is shown in tests/vision."""
    for url in list(list_hostile_urls(40))[:-1]:
        if url.isprintable():
            reply = chat(seeing, image(url))
            assert (reply.status_code, reply.json()["status"]) == (400, "INVALID_ARGUMENT"), url[:80]


def test_a_text_model_refuses_images(client):
    reply = chat(client, image(URLS[0]))
    assert reply.status_code == 400
    assert "This model does not accept images" in reply.json()["message"]
    reply = client.post("/generate", json={"text": "x", "image_data": URLS[0]})
    assert reply.json()["message"] == "image_data is not supported by this server: the model reads text only."


def test_the_model_is_said_to_see(seeing, client):
    for server, sees in ((seeing, True), (client, False)):
        assert server.get("/model_info").json()["has_image_understanding"] is sees
