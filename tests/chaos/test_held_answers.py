"""What upstreams and callers that do not read can make the process hold is counted, bounded, and freed at the end."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest
from running import BOUND, CHAT, Process, chat, samples
from scripted_upstream import CHAT_ANSWER

from backends.base import MAX_ANSWER_BYTES
from backends.http1 import slow_readers

pytestmark = pytest.mark.internal_http
MIB = 1024 * 1024
QUEUE_BYTES = 4 * MIB
#: Bytes that one call of `data_received` can bring.
READ_BYTES = 256 * 1024
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n" + CHUNKED


def chunk(data):
    return b"%x\r\n%b\r\n" % (len(data), data)


#: What a hostile upstream sends: the beginning, then the same piece for ever.
HOSTILE = {
    "a long answer": (OK + b"Content-Length: 60000000\r\n\r\n", b"x" * 65536),
    "blank lines": (SSE, chunk(b"\n" * 65536)),
    "comments": (SSE, chunk(b": wait\n\n" * 8192)),
    "an event without an end": (SSE + chunk(b"data: "), chunk(b"x" * 65536)),
    "a head without an end": (OK, b"X-Header: x\r\n" * 5000),
    "a long line in the head": (OK + b"X-Header: ", b"x" * 65536),
    "an error body without an end": (b"HTTP/1.1 500 X\r\n" + CHUNKED, chunk(b"x" * 65536)),
    "chunks of one byte": (OK + CHUNKED, chunk(b"x") * 10000),
    "long extensions of chunks": (OK + CHUNKED, b"1;" + b"x" * 8000 + b"\r\nx\r\n"),
    "interim answers": (b"", b"HTTP/1.1 103 X\r\nX: x\r\n\r\n" * 1000),
}


def is_hostile(seen):
    return b"hostile" in seen.body


class Peak:
    """The largest number of held bytes, looked at in each turn of the event loop."""

    def __init__(self, sidecar):
        self.answers, self.admission = sidecar.parts.answers, sidecar.admission
        self.bytes = self.in_flight = 0

    async def __aenter__(self):
        self._task = asyncio.create_task(self._look())
        return self

    async def __aexit__(self, *_):
        self._task.cancel()

    async def _look(self):
        while True:
            in_flight = self.admission.bytes_in_flight()
            self.bytes = max(self.bytes, self.answers.held_bytes() + in_flight)
            await asyncio.sleep(0)


def holds_nothing(sidecar):
    answers = sidecar.parts.answers
    return not (answers.held_bytes() or answers._accounts or sidecar.admission.bytes_in_flight())


async def test_answers_without_an_end_hold_no_more_than_the_bound(serving, scripted):
    async def script(link, seen):
        way = next((way for way in HOSTILE if way.encode() in seen.body), None)
        if way is None:
            return await link.answer(CHAT_ANSWER)
        begin, piece = HOSTILE[way]
        await link.send(begin)
        while True:
            await link.send(piece)

    upstream = await scripted(script)
    sidecar = await serving(
        dashscope_url=f"{upstream.origin}/v1", max_concurrency=60, queue_bytes=QUEUE_BYTES, deadline=2.0,
        stream_max=2.0,
    )  # fmt: skip
    async with Peak(sidecar.sidecar) as peak, asyncio.TaskGroup() as group:
        for way in HOSTILE:
            for stream in (False, True, True):
                group.create_task(failing(sidecar, way, stream=stream))
    assert QUEUE_BYTES < peak.bytes <= QUEUE_BYTES + MAX_ANSWER_BYTES + READ_BYTES
    await sidecar.until(sidecar.at_rest)
    assert holds_nothing(sidecar.sidecar)
    await served(sidecar)


async def served(sidecar):
    """Send honest requests until one is answered: the upstream's outage ends with a probe."""
    async with asyncio.timeout(BOUND):
        while True:
            async with sidecar.post() as response:
                if response.status == 200:
                    return
            await asyncio.sleep(0.05)


async def failing(sidecar, way, *, stream):
    async with sidecar.post(chat(way, stream=stream)) as response:
        await response.read()
        assert response.status in (502, 503, 504) or stream, response.status


async def test_whole_answers_of_10_mb_are_all_read_one_after_the_other_at_the_bound(serving, scripted):
    text = json.dumps({"choices": [{"message": {"content": "x" * 10 * MIB}, "finish_reason": "stop"}]}).encode()

    async def script(link, _seen):
        await link.answer(text)

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", max_concurrency=10, queue_bytes=QUEUE_BYTES)

    async def ask():
        async with sidecar.post() as response:
            assert (response.status, await response.read()) == (200, text)

    async with Peak(sidecar.sidecar) as peak, asyncio.TaskGroup() as group:
        for _ in range(10):
            group.create_task(ask())
    # What is being read, and one answer that its caller is reading.
    assert peak.bytes <= QUEUE_BYTES + 2 * len(text) + READ_BYTES
    await sidecar.until(sidecar.at_rest)
    assert holds_nothing(sidecar.sidecar)


async def never_reading(port, data):
    """Send a request and do not read its answer. Return the writer."""
    _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
    writer.write(data)
    return writer


def get(path, **headers):
    more = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n{more}\r\n".encode()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(slow_readers, "SLOW_READER_SECONDS", 0.5)
    monkeypatch.setattr(slow_readers, "_SHORT_SECONDS", 0.2)
    monkeypatch.setattr(slow_readers, "_LOOK_SECONDS", 0.05)


@pytest.fixture
async def with_list(scripted):
    """An upstream with a list of models of 3 MB, and whole answers of 10 MB."""
    models = json.dumps({"data": [{"id": "m" * 1000} for _ in range(3000)]}).encode()
    text = json.dumps({"choices": [{"message": {"content": "x" * 10 * MIB}, "finish_reason": "stop"}]}).encode()

    async def script(link, seen):
        await link.answer(models if seen.path.endswith("/models") else text)

    upstream = await scripted(script)
    return upstream, models


async def test_callers_that_never_read_a_list_are_cut_at_the_bound_and_others_get_it(serving, with_list, impatient):
    upstream, models = with_list
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", queue_bytes=16 * MIB)
    port = sidecar.sidecar.data_port
    async with Peak(sidecar.sidecar) as peak:
        writers = [await never_reading(port, get("/v1/models") * 3) for _ in range(100)]
        async with sidecar.client.get(f"{sidecar.url}/v1/models") as response:
            assert await response.read() == models
        await sidecar.until(sidecar.at_rest)
        await sidecar.until(lambda: holds_nothing(sidecar.sidecar))
    assert 0 < peak.bytes <= 16 * MIB
    assert sidecar.sidecar.data.in_progress == 0
    for writer in writers:
        writer.transport.abort()


async def test_callers_that_never_read_whole_answers_hold_no_permit_and_are_cut(serving, with_list, impatient):
    upstream, _ = with_list
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", queue_bytes=16 * MIB, max_concurrency=10)
    body = json.dumps(chat()).encode()
    head = b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    data = head % (CHAT.encode(), len(body)) + body
    async with Peak(sidecar.sidecar) as peak:
        writers = [await never_reading(sidecar.sidecar.data_port, data) for _ in range(10)]
        await sidecar.until(lambda: len(upstream.seen) == 10)
        async with sidecar.post() as response:
            assert response.status == 200
            await response.read()
        await sidecar.until(sidecar.at_rest)
        await sidecar.until(lambda: holds_nothing(sidecar.sidecar))
    assert 0 < peak.bytes <= 16 * MIB + MAX_ANSWER_BYTES + READ_BYTES
    for writer in writers:
        writer.transport.abort()


async def test_a_caller_that_reads_slowly_gets_its_whole_answer(serving, with_list):
    upstream, _ = with_list
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    async with sidecar.post() as response:
        size = 0
        while piece := await response.content.read(300_000):
            size += len(piece)
            await asyncio.sleep(0.002)
    assert size > 10 * MIB
    await sidecar.until(lambda: holds_nothing(sidecar.sidecar))


def status_bytes(pid, name):
    """A number of /proc/PID/status: `VmRSS` is the resident memory, `VmHWM` its peak."""
    with open(f"/proc/{pid}/status") as status:  # noqa: PTH123
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))


@pytest.mark.alone
async def test_the_process_needs_no_more_memory_than_the_bound_and_two_answers(scripted):
    """All of the above at once. Without the bound the process grows by 500 MiB."""
    models = json.dumps({"data": [{"id": "m" * 1000} for _ in range(3000)]}).encode()
    text = json.dumps({"choices": [{"message": {"content": "x" * 10 * MIB}, "finish_reason": "stop"}]}).encode()

    async def script(link, seen):
        if seen.path.endswith("/models"):
            return await link.answer(models)
        way = next((way for way in HOSTILE if way.encode() in seen.body), None)
        if way is None:
            return await link.answer(text if b"unread" in seen.body else CHAT_ANSWER)
        begin, piece = HOSTILE[way]
        await link.send(begin)
        while True:
            await link.send(piece)

    def post(what, **fields):
        body = json.dumps(chat(what, **fields)).encode()
        return b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (CHAT.encode(), len(body), body)

    upstream = await scripted(script)
    options = ("--dashscope-url", f"{upstream.origin}/v1", "--queue-bytes", str(QUEUE_BYTES), "--max-concurrency", "90")
    async with Process(*options, "--deadline", "3", "--stream-max", "3") as process, aiohttp.ClientSession() as client:
        before = status_bytes(process.process.pid, "VmRSS")
        requests = [post(way, stream=stream) for way in HOSTILE for stream in (False, True, True)]
        requests += [post("unread")] * 20 + [get("/v1/models")] * 100
        writers = [await never_reading(process.port, request) for request in requests]
        async with asyncio.timeout(BOUND):
            while not upstream.seen or await _sample(client, process, "sidecar_in_flight_requests"):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        grown = status_bytes(process.process.pid, "VmHWM") - before
        for writer in writers:
            writer.transport.abort()
    assert grown <= QUEUE_BYTES + 2 * MAX_ANSWER_BYTES + 16 * MIB


async def _sample(client, process, name):
    async with client.get(f"{process.admin_url}/metrics") as response:
        return sum(value for key, value in samples(await response.text()).items() if key.startswith(name))
