"""Every image format that a provider may read passes on every path; what is no image is refused. Source: fault F9."""

from __future__ import annotations

import base64
import json

import pytest
from running import chat
from scripted_upstream import CHAT_ANSWER

GENERATION = "/api/v1/services/aigc/multimodal-generation/generation"
IMAGES = {
    "PPM": b"P6\n2 1\n255\n" + bytes(6),
    "PGM as text": b"P2 1 1 9 5\n",
    "PBM": b"P4\t8 1\n\xff",
    "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40),
    "JPEG 2000 without boxes": b"\xff\x4f\xff\x51" + bytes(40),
    "AVIF": b"\0\0\0\x1cftypavif" + bytes(40),
    "TIFF": b"MM\0*" + bytes(40),
}


def question(path: str, data: bytes) -> dict:
    encoded = base64.b64encode(data).decode()
    url = f"data:image/x-yard;base64,{encoded}"
    if path.startswith("/api/inference"):
        return {"image_b64": encoded, "prompt": "?"}
    if path == GENERATION:
        return {"model": "m", "input": {"messages": [{"role": "user", "content": [{"image": url}]}]}}
    return chat() | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


@pytest.mark.parametrize("path", ["/v1/chat/completions", GENERATION, "/api/inference/describe"])
async def test_all_formats_pass_and_other_bytes_do_not(serving, scripted, path):
    async def script(link, seen):
        await link.answer(CHAT_ANSWER)

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    for name, data in IMAGES.items():
        async with sidecar.post(question(path, data), path=path) as response:
            assert response.status == 200, (name, await response.text())
        assert base64.b64encode(data).decode() in json.dumps(json.loads(upstream.seen[-1].body)), name
    for data in (b"<html>no image</html>", b"P9\n1 1\n", b"\xff\x4f\xff\x00" + bytes(40)):
        async with sidecar.post(question(path, data), path=path) as response:
            assert response.status == 400
    assert len(upstream.seen) == len(IMAGES)
