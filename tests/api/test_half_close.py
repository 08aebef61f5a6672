"""Callers that shut their sending side after the request (FIN), like `nc -N`. What can be answered at once is answered.

The documented implementation of HTTP closes such connections: its docstring says so.
"""

from __future__ import annotations

import asyncio
import json

import pytest
from running import BOUND, CHAT, Process, chat

pytestmark = [pytest.mark.http, pytest.mark.internal_http]


def request(method: str, path: str, body: bytes = b"") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


async def answers(port: int, data: bytes, *pieces: bytes) -> bytes:
    """Send the data in these pieces, shut the sending side, and read until the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for piece in (data, *pieces):
            writer.write(piece)
            await writer.drain()
        writer.write_eof()
        async with asyncio.timeout(BOUND):
            return await reader.read()
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        (request("GET", "/health"), 200, b"uptime_s"),
        (request("HEAD", "/health"), 200, b"Content-Length"),
        (request("GET", "/v1/models"), 200, b"qwen-vl-plus"),
        (request("GET", "/nothing"), 404, b"not_found"),
        (request("POST", "/health"), 405, b"Allow: GET, HEAD"),
        (request("POST", CHAT, b"{"), 400, b"is not JSON"),
        (request("POST", CHAT, b"{}"), 400, b"messages"),
        (b"NOT HTTP\r\n\r\n", 400, b"not a valid HTTP request"),
    ],
)
async def test_what_can_be_answered_at_once_is_answered(serving, data, status, words):
    sidecar = await serving()
    answer = await answers(sidecar.sidecar.data_port, data)
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer
    assert words in answer


async def test_the_admin_listener_answers_too(serving):
    sidecar = await serving()
    for path, words in (("/metrics", b"sidecar_build_info"), ("/readyz", b"ready"), ("/status", b"uptime_seconds")):
        answer = await answers(sidecar.sidecar.admin_port, request("GET", path))
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert words in answer


async def test_a_list_of_models_that_takes_a_while_is_waited_for(serving, scripted):
    asked, may_answer = asyncio.Event(), asyncio.Event()

    async def script(link, seen):
        asked.set()
        await may_answer.wait()
        await link.answer({"object": "list", "data": [{"id": "late-model"}]})

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    answer = asyncio.create_task(answers(sidecar.sidecar.data_port, request("GET", "/v1/models")))
    await asked.wait()
    may_answer.set()
    assert b"late-model" in await answer


async def test_pipelined_reads_are_all_answered(serving):
    sidecar = await serving()
    answer = await answers(sidecar.sidecar.data_port, request("GET", "/health") * 3)
    assert answer.count(b"HTTP/1.1 200 ") == 3


@pytest.mark.parametrize("stream", [False, True])
async def test_an_inference_request_is_cancelled_in_the_sidecar_and_at_the_provider(serving, scripted, stream):
    gone = asyncio.Event()

    async def script(link, seen):
        if stream:
            await link.start_stream()
            await link.chunk(b'data: {"choices": [{"index": 0, "delta": {"content": "A"}}]}\n\n')
        await link.gone()
        gone.set()

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    data = request("POST", CHAT, json.dumps(chat(stream=stream)).encode())
    reader, writer = await asyncio.open_connection("127.0.0.1", sidecar.sidecar.data_port)
    writer.write(data)
    if stream:
        await reader.readuntil(b"content")
    else:
        await upstream.arrived.wait()
    writer.write_eof()
    async with asyncio.timeout(BOUND):
        rest = await reader.read()
        await gone.wait()
    assert b"HTTP/1.1" not in rest
    writer.close()
    await sidecar.until(sidecar.at_rest)


async def test_an_inference_request_behind_a_read_does_not_begin_after_the_caller_has_left(serving, scripted):
    asked, may_answer = asyncio.Event(), asyncio.Event()

    async def script(link, seen):
        asked.set()
        await may_answer.wait()
        await link.answer({"object": "list", "data": [{"id": "m"}]})

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    data = request("GET", "/v1/models") + request("POST", CHAT, json.dumps(chat()).encode())
    answer = asyncio.create_task(answers(sidecar.sidecar.data_port, data))
    await asked.wait()
    listener = sidecar.sidecar._data_listener
    await sidecar.until(lambda: any(connection.caller_has_left for connection in listener.connections))
    may_answer.set()
    assert (await answer).count(b"HTTP/1.1 200 ") == 1
    assert [seen.path for seen in upstream.seen] == ["/v1/models"]
    await sidecar.until(sidecar.at_rest)


async def test_a_live_view_ends(serving):
    """Its answer is a stream without an end, so the caller is not kept for it."""
    sidecar = await serving()
    reader, writer = await asyncio.open_connection("127.0.0.1", sidecar.sidecar.admin_port)
    writer.write(request("GET", "/events"))
    await reader.readuntil(b"event: start")
    writer.write_eof()
    async with asyncio.timeout(BOUND):
        await reader.read()
    writer.close()


async def test_half_a_body_is_no_request(serving):
    sidecar = await serving()
    data = request("POST", CHAT, json.dumps(chat()).encode())
    assert await answers(sidecar.sidecar.data_port, data[:-5]) == b""
    await sidecar.until(sidecar.at_rest)


async def test_a_process_with_uvloop_does_the_same(scripted):
    gone = asyncio.Event()

    async def script(link, seen):
        await link.gone()
        gone.set()

    upstream = await scripted(script)
    async with Process("--dashscope-url", f"{upstream.origin}/v1") as process:
        answer = await answers(process.port, request("GET", "/health"))
        assert answer.startswith(b"HTTP/1.1 200 ")
        answer = await answers(process.port, request("POST", CHAT, b"[]"))
        assert answer.startswith(b"HTTP/1.1 400 ")
        reader, writer = await asyncio.open_connection("127.0.0.1", process.port)
        writer.write(request("POST", CHAT, json.dumps(chat()).encode()))
        await upstream.arrived.wait()
        writer.write_eof()
        async with asyncio.timeout(BOUND):
            assert await reader.read() == b""
            await gone.wait()
        writer.close()
