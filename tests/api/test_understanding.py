"""What the sidecar reads from a body is the same whether or not it skips the bulk of an image."""

from __future__ import annotations

import base64
import json

import pytest

from sidecar.api import body as bodies
from sidecar.api import openai
from sidecar.api.errors import InvalidRequest
from sidecar.cli.demo.frames import HEIGHT, WIDTH, frame

JPEG = frame(0)
#: The size stands behind 60 KB of EXIF data, as in a photograph with a thumbnail.
PHOTOGRAPH = JPEG[:2] + b"\xff\xe1" + (60_002).to_bytes(2) + bytes(60_000) + JPEG[2:]


def body(*images: bytes, text: str = "Describe.", **fields) -> bytes:
    urls = ["data:image/jpeg;base64," + base64.b64encode(image).decode() for image in images]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    return json.dumps({"messages": messages, "model": "m", **fields}).encode()


@pytest.mark.parametrize("images", [(JPEG,), (JPEG, JPEG), (PHOTOGRAPH,), (JPEG, PHOTOGRAPH, JPEG), ()])
def test_every_image_is_measured_and_what_stands_behind_it_is_read(images):
    asked = openai.parse_chat(body(*images, stream=True))
    assert asked.images == [(WIDTH, HEIGHT)] * len(images)
    assert (asked.model, asked.stream, asked.text_chars) == ("m", True, len("Describe."))


def test_of_a_frame_only_its_beginning_is_parsed(monkeypatch):
    parsed = []
    json_object = bodies.json_object
    monkeypatch.setattr(bodies, "json_object", lambda data: parsed.append(len(data)) or json_object(data))
    openai.parse_chat(body(JPEG, JPEG))
    assert len(parsed) == 1
    assert parsed[0] < 20_000 < len(JPEG)


def test_escaped_quotes_and_slashes_are_no_end_of_a_string():
    slashed = body(JPEG).replace(b"/", b"\\/")  # as PHP writes JSON
    assert openai.parse_chat(slashed).images == [(WIDTH, HEIGHT)]
    quoting = 'He said ";base64,' + "A" * 20_000 + '" and "no".'
    asked = openai.parse_chat(body(JPEG, text=quoting))
    assert (asked.images, asked.text_chars) == ([(WIDTH, HEIGHT)], len(quoting))


def test_a_body_that_is_cut_off_within_an_image_is_no_json():
    with pytest.raises(InvalidRequest, match="the body is not JSON"):
        openai.parse_chat(body(JPEG)[:50_000])


def test_errors_are_told_of_the_whole_body():
    with pytest.raises(InvalidRequest, match="max_tokens must be a whole number"):
        openai.parse_chat(body(JPEG, max_tokens=0))
