"""A stream whose content takes long: the caller gets the head and comments, and then whatever happens, in order."""

from __future__ import annotations

import asyncio
import gzip
import json

import openai
import pytest
from running import chat
from scripted_upstream import Upstream

from backends.base import Request, Timings
from backends.remote.backend import DashScopeBackend
from backends.remote.stream import COMMENT

pytestmark = pytest.mark.http

HOLD = 0.1
ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
WORDS = b'data: {"choices":[{"index":0,"delta":{"content":"A gate."}}]}\n\n'
END = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
REFUSAL = b'{"error":{"message":"Requests rate limit exceeded for sk-provider","code":"limit_requests"}}'
NATIVE = {"model": "m", "input": {"messages": [{"role": "user", "content": [{"text": "hi"}]}]}}
NATIVE_PATH = "/api/v1/services/aigc/multimodal-generation/generation"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr("backends.remote.backend.HOLD_SECONDS", HOLD)
    monkeypatch.setattr("backends.remote.stream.COMMENT_SECONDS", HOLD)


@pytest.fixture
async def upstream_backend():
    """A provider whose stream has no content, and the backend in front of it."""

    async def script(link, _):
        await link.start_stream()
        for piece in (b": theirs\n\n", ROLE[:20], ROLE[20:]) * 100:
            await asyncio.sleep(HOLD / 3)
            await link.chunk(piece)

    async with Upstream(script) as upstream:
        backend = DashScopeBackend(base_url=f"{upstream.origin}/v1")
        await backend.start()
        yield upstream, backend
        await backend.close()


class Slow:
    """A provider that sends `before` at once and each of `after` when `more` is released."""

    def __init__(self, *before, after=(), content_type="text/event-stream", answer_later=False):
        self.before, self.after, self.content_type = before, after, content_type
        self.more = asyncio.Semaphore(0)
        self.left = asyncio.Event()

    async def __call__(self, link, _):
        await link.start_stream(self.content_type)
        for piece in self.before:
            await link.chunk(piece)
        gone = asyncio.ensure_future(link.gone())
        for piece in self.after:
            more = asyncio.ensure_future(self.more.acquire())
            await asyncio.wait([gone, more], return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                more.cancel()
                self.left.set()
                return
            await link.chunk(piece)
        gone.cancel()
        await asyncio.wait([gone])
        link.close()


async def start(serving, scripted, slow, **settings):
    upstream = await scripted(slow)
    settings = {"dashscope_url": f"{upstream.origin}/v1", "dashscope_api_key": "sk-provider", **settings}
    return await serving(**settings), upstream


def without_comments(text):
    text = text.replace(COMMENT, b"")
    return b"".join(part + b"\n\n" for part in text.split(b"\n\n") if part and not part.startswith(b":"))


async def until_comments(response, count):
    """Read until `count` comments have come, and return everything that has come."""
    text = b""
    while text.count(b": the upstream is working") < count:
        text += await response.content.readany()
    return text


async def test_the_head_and_comments_come_while_the_content_takes_long(serving, scripted):
    slow = Slow(b": theirs\n\n", ROLE[:20], after=[ROLE[20:], WORDS, END, b""])
    sidecar, upstream = await start(serving, scripted, slow)
    async with sidecar.post(chat(stream=True)) as response:
        assert (response.status, response.content_type) == (200, "text/event-stream")
        text = await until_comments(response, 3)
        assert ROLE[:20] not in text, "an event that is not complete is not passed on: a comment could split it"
        for _ in slow.after:
            slow.more.release()
        text += await response.read()
    assert b": theirs\n\n" in text
    assert without_comments(text) == ROLE + WORDS + END
    assert len(upstream.seen) == 1
    await sidecar.until(sidecar.at_rest)
    metrics = await sidecar.metrics()
    assert metrics['sidecar_requests_total{api="openai",backend="dashscope",outcome="ok"}'] == 1


async def test_the_official_client_reads_a_stream_that_was_kept_alive(serving, scripted):
    slow = Slow(after=[ROLE, WORDS, END, b""])
    sidecar, _ = await start(serving, scripted, slow)
    async with openai.AsyncOpenAI(base_url=f"{sidecar.url}/v1", api_key="unused", max_retries=0) as client:
        stream = await client.chat.completions.create(**chat(stream=True))  # returns with the head
        for _ in slow.after:
            slow.more.release()
        assert [piece.choices[0].delta.content async for piece in stream] == ["", "A gate.", None]


@pytest.mark.parametrize(
    "pieces", [[b"data: " + REFUSAL + b"\n\n"], [b"data: " + REFUSAL[:30], REFUSAL[30:] + b"\n\n"]]
)
async def test_a_refusal_after_the_head_is_one_error_event_and_is_still_learned(serving, scripted, pieces):
    slow = Slow(ROLE, after=[*pieces, b""])
    sidecar, upstream = await start(serving, scripted, slow)
    async with sidecar.post(chat(stream=True)) as response:
        text = await until_comments(response, 1)
        for _ in slow.after:
            slow.more.release()
        text += await response.read()
    role, error = without_comments(text).split(b"\n\n")[:-1]
    assert role + b"\n\n" == ROLE
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "upstream_error"
    assert b"sk-provider" not in text
    assert len(upstream.seen) == 1
    await sidecar.until(sidecar.at_rest)
    metrics = await sidecar.metrics()
    assert metrics['sidecar_throttles_total{backend="dashscope",kind="request_rate"}'] == 1
    assert metrics['sidecar_upstream_attempts_total{backend="dashscope",result="throttled"}'] == 1
    assert metrics['sidecar_requests_total{api="openai",backend="dashscope",outcome="error"}'] == 1
    assert not any(name.startswith(("sidecar_retries_total", "sidecar_tokens_total")) for name in metrics)


async def test_the_official_client_raises_a_refusal_that_comes_after_the_head(serving, scripted):
    slow = Slow(after=[b"data: " + REFUSAL + b"\n\n", b""])
    sidecar, _ = await start(serving, scripted, slow)
    async with openai.AsyncOpenAI(base_url=f"{sidecar.url}/v1", api_key="unused", max_retries=0) as client:
        stream = await client.chat.completions.create(**chat(stream=True))
        slow.more.release()
        with pytest.raises(openai.APIError, match="limit of requests"):
            await anext(aiter(stream))


@pytest.mark.parametrize("answer", [REFUSAL, b'{"error": "down"}', b"<html>\n\nno\n\n</html>", b""])
async def test_what_is_no_stream_after_all_is_an_error_event(serving, scripted, answer):
    slow = Slow(after=[answer, b""] if answer else [b""])
    sidecar, _ = await start(serving, scripted, slow)
    async with sidecar.post(chat(stream=True)) as response:
        text = await until_comments(response, 1)
        for _ in slow.after:
            slow.more.release()
        text += await response.read()
    assert text.count(b'"code":"upstream_error"') == 1


async def test_a_stream_without_a_label_is_held_until_it_shows_what_it_is(serving, scripted):
    slow = Slow(content_type="application/json", after=[REFUSAL, b""])
    sidecar, upstream = await start(serving, scripted, slow)
    task = asyncio.ensure_future(sidecar.post(chat(stream=True), headers={"X-Request-Timeout": "5"}).__aenter__())
    await upstream.arrived.wait()
    done, _ = await asyncio.wait([task], timeout=4 * HOLD)
    assert not done, "it may be a whole answer or a refusal"
    slow.more.release()
    slow.more.release()
    await sidecar.until(lambda: len(upstream.seen) == 2)  # an ordinary refusal: the request is sent again
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_without_content_a_stream_that_is_kept_alive_ends_at_its_deadline(serving, scripted):
    slow = Slow(after=[b""])
    sidecar, _ = await start(serving, scripted, slow, deadline=5 * HOLD)
    async with sidecar.post(chat(stream=True)) as response:
        text = await response.read()
    *_, last = without_comments(text).split(b"\n\n")[:-1]
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "deadline_exceeded"
    assert text.count(b": the upstream is working") >= 2
    await asyncio.wait_for(slow.left.wait(), 5)
    await sidecar.until(sidecar.at_rest)
    metrics = await sidecar.metrics()
    assert metrics['sidecar_requests_total{api="openai",backend="dashscope",outcome="deadline"}'] == 1


@pytest.mark.parametrize("refused", [False, True])
async def test_a_native_caller_of_an_openai_upstream_is_kept_alive_too(serving, scripted, refused):
    slow = Slow(ROLE, after=[b"data: " + REFUSAL + b"\n\n", b""] if refused else [WORDS, END, b""])
    sidecar, _ = await start(serving, scripted, slow)
    async with sidecar.post(NATIVE, NATIVE_PATH, headers={"X-DashScope-SSE": "enable"}) as response:
        text = await until_comments(response, 2)
        for _ in slow.after:
            slow.more.release()
        text += await response.read()
    frames = without_comments(text).split(b"\n\n")[:-1]
    if refused:
        [frame] = frames
        assert frame.startswith(b"event:error\nstatus:502\n:HTTP_STATUS/502\ndata:")
        assert json.loads(frame.partition(b"data:")[2])["code"] == "upstream_error"
        assert b"sk-provider" not in text
    else:
        assert [frame.partition(b"\n")[0] for frame in frames] == [b"id:1", b"id:2"]
        assert b"A gate." in frames[0]


@pytest.mark.parametrize("pieces", [(), (b": theirs\n\n",), (ROLE,), (ROLE[:9],)])
async def test_a_caller_that_leaves_a_waiting_stream_ends_it_at_the_provider(serving, scripted, pieces):
    slow = Slow(*pieces, after=[b""])
    sidecar, _ = await start(serving, scripted, slow)
    response = await sidecar.post(chat(stream=True))
    await until_comments(response, 1)
    response.close()
    await asyncio.wait_for(slow.left.wait(), 5)
    await sidecar.until(sidecar.at_rest)
    metrics = await sidecar.metrics()
    assert metrics['sidecar_requests_total{api="openai",backend="dashscope",outcome="cancelled"}'] == 1
    assert metrics['sidecar_upstream_attempts_total{backend="dashscope",result="cancelled"}'] == 1


async def test_comments_come_while_the_provider_sends_half_events(serving, scripted):
    halves = [b": a", b" comment", b" that", b" never", b" ends"] * 3
    slow = Slow(after=[*halves, b"\n\n", WORDS, END, b""])
    sidecar, _ = await start(serving, scripted, slow)

    async def feed():
        for _ in slow.after:
            await asyncio.sleep(HOLD / 3)
            slow.more.release()

    async with sidecar.post(chat(stream=True)) as response:
        feeding = asyncio.ensure_future(feed())
        text = await until_comments(response, 3)
        assert not feeding.done()
        text += await response.read()
        await feeding
    assert b"".join(halves) + b"\n\n" in text
    assert without_comments(text) == WORDS + END


@pytest.mark.parametrize("steps", range(0, 60, 3))
@pytest.mark.internal_http
async def test_wherever_a_waiting_stream_is_cancelled_its_connection_is_closed(upstream_backend, steps):
    upstream, backend = upstream_backend
    request = Request("openai", "/chat/completions", b"{}", "m", stream=True)

    async def read():
        reply = await backend.send(request, Timings())
        try:
            async for _ in reply.chunks:
                pass
        finally:
            await reply.aclose()

    task = asyncio.ensure_future(read())
    for _ in range(steps):
        await asyncio.sleep(0 if steps < 30 else HOLD / 20)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    if upstream.links:
        await asyncio.wait_for(upstream.links[0].gone(), 5)


async def test_while_a_ticket_waits_in_the_sidecar_nothing_is_sent(serving, scripted):
    slow = Slow(after=[WORDS, END, b""])
    sidecar, upstream = await start(serving, scripted, slow, max_concurrency=1)
    async with sidecar.post(chat(stream=True)) as first:
        await until_comments(first, 1)
        second = asyncio.ensure_future(sidecar.post(chat(stream=True)).__aenter__())
        await sidecar.until(lambda: sidecar.sidecar.admission.waiting() == 1)
        done, _ = await asyncio.wait([second], timeout=3 * HOLD)
        assert not done
        for _ in range(6):
            slow.more.release()
        await first.read()
    async with await second as response:
        assert await response.read() == WORDS + END
    assert len(upstream.seen) == 2


@pytest.mark.parametrize("encoding", ["gzip", "br"])
async def test_a_refusal_in_an_encoding_that_nobody_asked_for_is_still_a_refusal(serving, scripted, encoding):
    async def script(link, _):
        if len(upstream.seen) == 1:
            body = gzip.compress(REFUSAL) if encoding == "gzip" else b"\x0b\x02\x80no-brotli"
            await link.answer(body, 429, headers=f"Content-Encoding: {encoding}\r\n")
        else:
            await link.start_stream()
            await link.chunk(WORDS + END)
            await link.chunk(b"")

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    async with sidecar.post(chat(stream=True)) as response:
        assert await response.read() == WORDS + END
    await sidecar.until(sidecar.at_rest)
    metrics = await sidecar.metrics()
    kind = "request_rate" if encoding == "gzip" else "unknown"
    assert metrics[f'sidecar_throttles_total{{backend="dashscope",kind="{kind}"}}'] == 1
