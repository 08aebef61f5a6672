"""JSON that would become hundreds of megabytes of objects, from a caller or from an upstream, costs no memory."""

from __future__ import annotations

import json

import aiohttp
import pytest
from running import CHAT, Process, chat
from test_memory_near_limit import limit_memory

MIB = 1024 * 1024
SIZE = 13 * MIB
#: Bytes that the process may use in addition to its idle memory: four times the body.
HEADROOM = 4 * SIZE + 16 * MIB


def filled(start: str, piece: str, end: str) -> bytes:
    """Repeat a piece until the text has SIZE bytes."""
    return (start + piece * ((SIZE - len(start) - len(end)) // len(piece)) + end).encode()


CHATS = '{"model":"m","messages":[{"role":"user","content":"hi"}'
BODIES = {
    "objects that nobody reads": filled(CHATS + '],"a":[', "{},", "{}]}"),
    "messages": filled(CHATS, ",{}", "]}"),
    "parts": filled('{"model":"m","messages":[{"role":"user","content":[""', ',""', "]}]}"),
    "keys": filled(CHATS + '],"a":{', '"b":{},', '"b":{}}}'),
    "media": filled('{"model":"m","messages":[{"role":"user","content":["', ';base64,","', '"]}]}'),
}


@pytest.mark.alone
async def test_bodies_of_many_values_are_refused_within_the_memory_of_the_body(scripted):
    upstream = await scripted()
    async with (
        Process("--dashscope-url", f"{upstream.origin}/v1", "--passthrough") as process,
        aiohttp.ClientSession() as client,
    ):
        async with client.post(process.url + CHAT, json=chat()) as response:
            assert response.status == 200
        limit_memory(process.process.pid, HEADROOM)
        for path in (CHAT, "/api/v1/services/aigc/multimodal-generation/generation", "/api/inference/describe"):
            for name, body in BODIES.items():
                async with client.post(
                    process.url + path, data=body, headers={"Content-Type": "application/json"}
                ) as response:
                    answer = await response.text()
                assert (response.status, "more than 100000 JSON values" in answer) == (400, True), (path, name, answer)
                assert len(answer) < 1000
        body = BODIES["objects that nobody reads"]
        async with client.post(
            process.url + "/v1/embeddings", data=body, headers={"Content-Type": "application/json"}
        ) as response:
            assert response.status == 200  # what the sidecar only passes on, it does not judge
        assert "MemoryError" not in process.log
        assert "defect" not in process.log


@pytest.mark.alone
@pytest.mark.parametrize("shape", ["answer", "error", "no answer"])
async def test_an_upstream_cannot_fill_memory_with_values(scripted, shape):
    good = {
        "id": "1",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "a"}}],
    }
    start = json.dumps(good)[:-1] if shape == "answer" else '{"error":{"code":"1"}' if shape == "error" else '{"a":1'
    body = filled(start + ',"b":[', "{},", "{}]}")

    async def script(link, seen):
        await link.answer(body, status=500 if shape == "error" else 200)

    upstream = await scripted(script)
    async with Process("--dashscope-url", f"{upstream.origin}/v1", "--deadline", "5") as process:
        limit_memory(process.process.pid, HEADROOM + 3 * SIZE)
        async with aiohttp.ClientSession() as client, client.post(process.url + CHAT, json=chat()) as response:
            answer = await response.read()
        assert (response.status, answer == body) == ((200, True) if shape == "answer" else (502, False))
        assert "MemoryError" not in process.log
        assert "defect" not in process.log
