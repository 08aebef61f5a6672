"""Bytes of answers are counted while they are held, and at the bound sockets are stopped or given up."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest
from scripted_upstream import BOUND
from test_aiohttp_parts import Transport

from backends import byte_budget
from backends.base import Request, Timings, Unreachable
from backends.http1 import slow_readers
from backends.http1.answer_bytes import AnswerBytes
from backends.http1.slow_readers import SlowReaders
from backends.remote.backend import DashScopeBackend

pytestmark = pytest.mark.internal_http

CHAT = Request(dialect="openai", path="/any/path", body=b"{}", model="m")
STREAM = Request(dialect="openai", path="/any/path", body=b'{"stream":true}', model="m", stream=True)
EVENT = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'


@pytest.fixture
async def connect():
    made = []

    async def start(upstream, max_bytes):
        answers = AnswerBytes(max_bytes)
        backend = DashScopeBackend(base_url=f"{upstream.origin}/v1", answers=answers)
        await backend.start()
        made.append((backend, answers))
        return backend, answers

    yield start
    for backend, answers in made:
        assert (answers.answer_bytes, answers._accounts) == (0, {}), "an answer counts for ever"
        await backend.close()


async def until(condition):
    async with asyncio.timeout(BOUND):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


def responding():
    from backends.http1.aiohttp_parts import ResponseProtocol  # noqa: PLC0415  older releases lack what it imports

    protocol = ResponseProtocol(asyncio.get_running_loop())
    protocol.connection_made(Transport())
    protocol.set_response_params(read_until_eof=True, read_bufsize=1000)
    return protocol


@pytest.mark.parametrize("first", ["the reader", "the bound"])
async def test_a_socket_is_read_again_when_neither_its_reader_nor_the_bound_stops_it(first):
    protocol = responding()
    protocol.data_received(b"HTTP/1.1 200 OK\r\nContent-Length: 9000\r\n\r\n")
    _, content = await protocol.read()
    protocol.data_received(b"x" * 5000)
    assert not protocol.transport.reading
    protocol.set_stopped(stopped=True)
    steps = [content.read_nowait, lambda: protocol.set_stopped(stopped=False)]
    for number, step in enumerate(steps if first == "the reader" else steps[::-1], 1):
        step()
        assert protocol.transport.reading is (number == 2)


async def test_an_upstream_that_stalls_at_the_bound_fails_and_the_others_are_read(connect, scripted, monkeypatch):
    monkeypatch.setattr(byte_budget, "STALLED_SECONDS", 0.2)
    begun = asyncio.Event()

    async def script(link, seen):
        if seen.body == b"stall":
            await link.send(b"HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\n\r\n" + b"x" * 300_000)
            begun.set()
            await link.gone()
        else:
            await link.answer(b"x" * 1_000_000)

    backend, answers = await connect(await scripted(script), 200_000)
    stalls = asyncio.ensure_future(backend.send(Request("openai", "/any", b"stall", "m"), Timings()))
    await begun.wait()
    await until(lambda: answers.answer_bytes > 200_000)
    reply = await asyncio.wait_for(backend.send(CHAT, Timings()), BOUND)
    assert len(reply.body) == 1_000_000
    with pytest.raises(Unreachable):
        await asyncio.wait_for(stalls, BOUND)


async def test_a_connection_that_was_stopped_at_the_bound_is_read_while_it_is_idle(connect, scripted):
    async def script(link, _seen):
        await link.answer(b"x" * 1_000_000)

    upstream = await scripted(script)
    backend, _ = await connect(upstream, 100_000)
    await asyncio.gather(*(backend.send(CHAT, Timings()) for _ in range(3)))
    idle = [connection for origin in backend._origins.values() for connection, _ in origin._idle]
    assert len(idle) == 3
    assert all(connection.transport.is_reading() for connection in idle)


async def test_half_an_event_counts_until_its_end_and_a_whole_one_does_not(connect, scripted):
    steps = asyncio.Queue()

    async def script(link, _seen):
        await link.start_stream()
        await link.chunk(EVENT)
        while (step := await steps.get()) is not None:
            await link.chunk(step)
        await link.chunk(b"")

    backend, answers = await connect(await scripted(script), 1_000_000)
    reply = await backend.send(STREAM, Timings())
    received = bytearray()
    reading = asyncio.ensure_future(reply.deliver(lambda piece: not received.extend(piece)))
    await until(lambda: received == EVENT)
    usage = b'{"usage":{"prompt_tokens":1,"completion_tokens":1},"x":"%b"}' % (b"x" * 100_000)
    begun = b"data: " + b"x" * 100_000
    for data, held in (
        (begun, len(begun)),
        (b"\n\n" + EVENT, 0),
        (EVENT * 1000, 0),
        (b"data: %b\n\n" % usage, len(usage)),  # kept until the end of the stream
    ):
        expected = len(received) + len(data)
        await steps.put(data)
        await until(lambda expected=expected: len(received) == expected)
        assert answers.answer_bytes == held
    await steps.put(None)
    assert await reading
    await reply.aclose()


async def test_a_stream_that_is_not_read_counts(connect, scripted):
    async def script(link, _seen):
        await link.start_stream()
        while True:
            await link.chunk(EVENT * 1000)

    backend, answers = await connect(await scripted(script), 1_000_000)
    reply = await backend.send(STREAM, Timings())
    await reply.deliver(lambda _: False)
    await until(lambda: answers.answer_bytes > 100_000)
    await reply.aclose()


@pytest.mark.parametrize("keeps", [False, True])
async def test_what_is_read_of_a_stream_counts_only_if_its_reader_keeps_it(connect, scripted, keeps):
    async def script(link, _seen):
        await link.start_stream()
        for _ in range(20):
            await link.chunk(EVENT * 1000)
        await link.chunk(b"")

    backend, answers = await connect(await scripted(script), 10_000_000)
    request = Request("openai", "/any", b"{}", "m", stream=True, keeps_stream=keeps)
    reply = await backend.send(request, Timings())
    read = sum([len(piece) async for piece in reply.chunks])
    assert read == 20_000 * len(EVENT)
    assert answers.answer_bytes >= read if keeps else answers.answer_bytes == 0
    await reply.aclose()


async def test_a_large_head_counts_as_long_as_its_stream(connect, scripted):
    headers = "".join(f"X-{number}: {'x' * 1000}\r\n" for number in range(50))

    async def script(link, _seen):
        head = f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n{headers}"
        await link.send(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        await link.chunk(EVENT)
        await link.chunk(b"")

    backend, answers = await connect(await scripted(script), 1_000_000)
    reply = await backend.send(STREAM, Timings())
    assert await reply.deliver(lambda _: True)
    assert answers.answer_bytes > 50_000
    await reply.aclose()


class Reader:
    def __init__(self, closed):
        self.closed = closed

    def abort(self):
        self.closed.append(self)


async def test_above_the_bound_the_callers_that_have_waited_longest_are_closed_at_once():
    closed = []
    readers = [Reader(closed) for _ in range(4)]
    slow = SlowReaders(100, int)
    for reader in readers[:3]:
        slow.add(reader, 30)
    slow.add(readers[0], 20)  # it keeps its place
    assert closed == []
    slow.add(readers[3], 60)
    assert (closed, slow.bytes) == (readers[:2], 90)
    slow.discard(readers[0])
    slow.discard(readers[2])
    slow.add(readers[3], 1000)  # one answer always fits
    assert (closed, slow.bytes) == (readers[:2], 1000)


async def test_a_caller_has_little_time_only_while_memory_is_short(monkeypatch):
    monkeypatch.setattr(slow_readers, "_SHORT_SECONDS", 0.0)
    monkeypatch.setattr(slow_readers, "_LOOK_SECONDS", 0.01)
    closed, looks, elsewhere = [], 0, 0

    def other_bytes():
        nonlocal looks
        looks += 1
        return elsewhere

    slow = SlowReaders(100, other_bytes)
    reader = Reader(closed)
    slow.add(reader, 30)
    await until(lambda: looks > 2)
    assert closed == []
    elsewhere = 80
    await until(lambda: closed == [reader])
    assert slow.bytes == 0


class Socket:
    """The connection on which an answer arrives."""

    stopped = given_up = False

    def set_stopped(self, *, stopped):
        self.stopped = stopped

    def give_up(self):
        self.given_up = True


async def test_a_socket_that_is_opened_at_the_bound_is_stopped_and_a_complete_one_is_free():
    answers, first, second = AnswerBytes(10_000), Socket(), Socket()
    one = answers.open(first)
    one.uncounted_bytes = 20_000
    one.count()
    assert not first.stopped  # it is the oldest
    two = answers.open(second)
    assert second.stopped
    two.complete()
    assert not second.stopped
    two.give_up()
    assert not second.given_up  # another request may be on the connection
    assert answers.answer_bytes == 20_000
    one.close()
    two.close()
    assert (answers.answer_bytes, answers._accounts) == (0, {})


async def test_an_answer_without_a_length_that_is_given_up_is_no_whole_answer():
    protocol = responding()
    protocol.data_received(b"HTTP/1.1 200 OK\r\n\r\nhalf")
    _, content = await protocol.read()
    protocol.give_up()
    protocol.connection_lost(None)
    with pytest.raises(aiohttp.ClientPayloadError):
        await content.readany()


async def test_every_byte_that_a_caller_has_not_read_is_reported():
    from backends.http1.aiohttp_parts import RequestProtocol  # noqa: PLC0415  older releases lack what it imports

    limits = {}
    transport = Transport()
    transport.set_write_buffer_limits = limits.update
    RequestProtocol(asyncio.get_running_loop(), buffer_bytes=1, max_pipelined=1).connection_made(transport)
    assert limits == {"high": 0}
