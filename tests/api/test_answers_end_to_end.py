"""What a caller of each API gets for an odd answer of the provider, and how often the provider is called for it.

These are the faults A3, F8 and the header `X-Sidecar-Attempts`, from the caller to the provider and back.
"""

from __future__ import annotations

import json

import pytest
from running import IMAGE_URL, chat
from scripted_upstream import CHAT_ANSWER

GENERATION = "/api/v1/services/aigc/multimodal-generation/generation"
NATIVE = {"model": "m", "input": {"messages": [{"role": "user", "content": [{"text": "?"}]}]}}
TRIO = {"image_b64": IMAGE_URL.partition(",")[2], "prompt": "?"}
TEXT = json.dumps(CHAT_ANSWER)
ODD = {
    "byte order mark": b"\xef\xbb\xbf" + TEXT.encode(),
    "UTF-16": TEXT.encode("utf-16"),
    "NaN": TEXT.replace("1225", "NaN").encode(),
    "minus infinity": TEXT.replace('"index": 0', '"index": 0, "logprob": -Infinity').encode(),
    "half a surrogate pair": TEXT.replace("A gate.", r"A gate.\ud83d").encode(),
}


@pytest.mark.parametrize("body", ODD.values(), ids=ODD)
@pytest.mark.parametrize("api", ["openai", "native", "trio"])
async def test_an_odd_whole_answer_is_passed_on_and_asked_for_once(serving, scripted, api, body):
    async def script(link, seen):
        await link.answer(body)

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    question, path = {
        "openai": (chat(), "/v1/chat/completions"),
        "native": (NATIVE, GENERATION),
        "trio": (TRIO, "/api/inference/describe"),
    }[api]
    async with sidecar.post(question, path=path) as response:
        raw = await response.read()
        assert response.status == 200, raw
    assert len(upstream.seen) == 1
    if api == "openai":
        assert raw == body
        return
    answer = json.loads(raw)
    text = answer["description"] if api == "trio" else answer["output"]["choices"][0]["message"]["content"][0]["text"]
    assert text.rstrip("\ud83d") == "A gate."


async def test_an_odd_native_answer_passes_unchanged(serving, scripted):
    native = json.dumps({"output": {"choices": [{"finish_reason": "stop", "message": {"content": [{"text": "A"}]}}]}})
    odd = b"\xef\xbb\xbf" + native.encode()

    async def script(link, seen):
        await link.answer(odd)

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/compatible-mode/v1")
    async with sidecar.post(NATIVE, path=GENERATION) as response:
        assert (response.status, await response.read()) == (200, odd)
    assert len(upstream.seen) == 1


async def test_attempts_include_a_request_that_was_sent_again_because_its_connection_had_died(serving, scripted):
    async def script(link, seen):
        if link.number == 0 and len(upstream.seen) > 1:  # the pooled connection dies under the second request
            link.reset()
        else:
            await link.answer(CHAT_ANSWER)

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    attempts = []
    for _ in range(3):
        async with sidecar.post() as response:
            assert response.status == 200
            attempts.append(response.headers["X-Sidecar-Attempts"])
    assert attempts == ["1", "2", "1"]
    assert len(upstream.seen) == 4
