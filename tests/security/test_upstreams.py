"""Attacks and faults of an upstream that must not harm callers, logs, metrics or the admin pages."""

from __future__ import annotations

import aiohttp
import pytest
from running import CHAT, Process, chat

KEY = "sk-the-key-of-the-account"
FORGED = '{"level":"error","message":"forged"}'


async def whole(link, _):
    await link.answer({"error": {"message": f"Incorrect API key provided: {KEY}", "code": "x"}}, status=401)


async def in_200(link, _):
    await link.answer({"error": {"message": f"the key {KEY} is bad", "code": "invalid_api_key"}})


async def in_stream(link, _):
    await link.start_stream()
    await link.chunk(b'data: {"error":{"message":"the key %b is bad","code":"limit"}}\n\n' % KEY.encode())
    await link.chunk(b"")


async def failing(link, _):
    await link.answer({"error": {"message": f"cannot serve {KEY}", "code": "x"}}, status=500)


@pytest.mark.parametrize("script", [whole, in_200, in_stream, failing])
async def test_a_key_in_the_providers_error_is_masked_everywhere(serving, scripted, caplog, script):
    caplog.set_level("DEBUG")
    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", dashscope_api_key=KEY, api_key="letmein")
    headers = {"Authorization": "Bearer letmein", "X-Request-Timeout": "2"}
    async with sidecar.post(chat(stream=script is in_stream), headers=headers) as response:
        text = await response.text() + str(response.headers)
    assert response.status >= 400
    assert upstream.seen[0].headers["authorization"] == f"Bearer {KEY}"
    for path in ("/metrics", "/status", "/readyz"):
        async with sidecar.client.get(sidecar.admin_url + path) as response:
            text += await response.text()
    assert KEY not in text + caplog.text
    assert "letmein" not in text + caplog.text


async def test_only_useful_headers_of_the_upstream_reach_the_caller(serving, scripted):
    async def script(link, _):
        await link.answer(
            {"choices": [{"index": 0, "message": {"role": "assistant", "content": "A gate."}}]},
            headers="Set-Cookie: session=1\r\nServer: nginx/1.2\r\nAlt-Svc: h3=x\r\nKeep-Alive: timeout=5\r\n"
            "Access-Control-Allow-Origin: *\r\nX-Sidecar-Backend: forged\r\nx-ratelimit-remaining-requests: 3\r\n",
        )

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    async with sidecar.post() as response:
        assert response.status == 200
        for name in ("Set-Cookie", "Alt-Svc", "Keep-Alive", "Access-Control-Allow-Origin"):
            assert name not in response.headers
        assert "nginx" not in response.headers.get("Server", "")
        assert response.headers.getall("X-Sidecar-Backend") == ["dashscope"]
        # It is the whole account's: the camera's client would throttle itself by it.
        assert "x-ratelimit-remaining-requests" not in response.headers


async def test_a_message_of_the_provider_cannot_forge_a_log_line(scripted):
    async def script(link, _):
        message = f"down\n{FORGED}\r\x1b[2J{FORGED}"
        await link.answer({"error": {"message": message, "code": f"code\n{FORGED}"}}, status=429)

    upstream = await scripted(script)
    options = ("--dashscope-url", f"{upstream.origin}/v1", "--log-level", "debug", "--access-log")
    async with Process(*options) as process, aiohttp.ClientSession() as client:
        headers = {"X-Request-Timeout": "1.5", "X-Camera-Id": "gate"}
        async with client.post(process.url + CHAT, json=chat(), headers=headers) as response:
            assert response.status >= 500
        process.signal(15)
        await process.ended()
        lines = process.log.splitlines()
        assert not any(line.startswith(FORGED) for line in lines), process.log
        assert "\x1b" not in process.log
