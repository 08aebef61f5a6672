"""The sidecar reads the same fields from a body whether or not it shortens the images before parsing."""

from __future__ import annotations

import base64
import json

import pytest

from sidecar.api import body as bodies
from sidecar.api import openai
from sidecar.api.errors import InvalidRequest
from sidecar.cli.demo.frames import HEIGHT, WIDTH, frame

JPEG = frame(0)
#: Here the image size comes after 60 KB of EXIF data, as in a photograph with a thumbnail.
PHOTOGRAPH = JPEG[:2] + b"\xff\xe1" + (60_002).to_bytes(2) + bytes(60_000) + JPEG[2:]


def body(*images: bytes, text: str = "Describe.", **fields) -> bytes:
    urls = ["data:image/jpeg;base64," + base64.b64encode(image).decode() for image in images]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    return json.dumps({"messages": messages, "model": "m", **fields}).encode()


@pytest.mark.parametrize("images", [(JPEG,), (JPEG, JPEG), (PHOTOGRAPH,), (JPEG, PHOTOGRAPH, JPEG), ()])
def test_the_size_of_every_image_and_the_fields_after_it_are_read(images):
    chat = openai.parse_chat(body(*images, stream=True))
    assert chat.images == [(WIDTH, HEIGHT)] * len(images)
    assert (chat.model, chat.stream, chat.text_chars) == ("m", True, len("Describe."))


def test_only_the_beginning_of_a_frame_is_parsed(monkeypatch):
    parsed = []
    json_object = bodies.json_object
    monkeypatch.setattr(bodies, "json_object", lambda data: parsed.append(len(data)) or json_object(data))
    openai.parse_chat(body(JPEG, JPEG))
    assert len(parsed) == 1
    assert parsed[0] < 20_000 < len(JPEG)


def test_escaped_quotes_and_slashes_do_not_end_a_string():
    slashed = body(JPEG).replace(b"/", b"\\/")  # PHP escapes slashes in JSON
    assert openai.parse_chat(slashed).images == [(WIDTH, HEIGHT)]
    quoting = 'He said ";base64,' + "A" * 20_000 + '" and "no".'
    chat = openai.parse_chat(body(JPEG, text=quoting))
    assert (chat.images, chat.text_chars) == ([(WIDTH, HEIGHT)], len(quoting))


def test_a_body_that_ends_within_an_image_is_refused_as_not_json():
    with pytest.raises(InvalidRequest, match="the body is not JSON"):
        openai.parse_chat(body(JPEG)[:50_000])


def test_an_error_after_an_image_is_reported():
    with pytest.raises(InvalidRequest, match="stream must be true or false"):
        openai.parse_chat(body(JPEG, stream=0))
