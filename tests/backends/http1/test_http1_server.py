"""The listener with pipelining, slow, early and broken callers, for which aiohttp's own server is not used."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest
from real_parts import platform_lacks

from backends.http1 import accepting
from backends.http1.errors import MalformedRequest

BOUND = 10.0

pytestmark = pytest.mark.http
MB = 1024 * 1024


class Line:
    """A listener and one caller's connection to it."""

    def __init__(self, listener, reader, writer):
        self.listener = listener
        self.reader = reader
        self.writer = writer

    async def answers(self, count):
        """Read so many whole answers: head and body of each."""
        found = []
        async with asyncio.timeout(BOUND):
            for _ in range(count):
                head = await self.reader.readuntil(b"\r\n\r\n")
                length = int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0])
                found.append((head, await self.reader.readexactly(length)))
        return found

    async def closed(self):
        """Read to the end of the connection, which must come."""
        async with asyncio.timeout(BOUND):
            return await self.reader.read()


@pytest.fixture
async def line(http):
    """Opens a line to a handler."""
    lines = []

    async def start(handler, **bounds):
        listener = http.listener(handler, max_connections=4, **bounds)
        port = await listener.open("127.0.0.1", 0)
        lines.append(Line(listener, *await asyncio.open_connection("127.0.0.1", port)))
        return lines[-1]

    yield start
    for one in lines:
        one.writer.close()
        await one.listener.close()


async def until(condition):
    async with asyncio.timeout(BOUND):
        while not condition():  # noqa: ASYNC110  what is waited for is no event of ours
            await asyncio.sleep(0.01)


async def echo(http):
    """Answer with the path after reading the body."""
    while await http.content.readany():
        pass
    return await path_of(http)


async def path_of(http):
    """Answer with the path without reading the body."""
    body = http.raw_path.encode()
    http.keep_alive = http.keep_alive and http.content.is_eof()
    answer = http.answer(200, {}, length=len(body))
    answer.write_whole(body)
    await answer.drain()
    return answer


def request(path, headers="", body=b"", version="1.1"):
    return f"POST {path} HTTP/{version}\r\nHost: here\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


async def never_answered(line):
    """Send a request that is never answered. Return its caller, the connection, and the event of its cancellation."""
    cancelled = asyncio.Event()

    async def never(http):
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    caller = await line(never)
    caller.writer.write(request("/first"))
    (connection,) = await _connections(caller)
    await until(lambda: connection.task)
    return caller, connection, cancelled


async def test_pipelined_requests_are_all_answered_in_order(line):
    caller = await line(echo)
    count = 5 * accepting.MAX_PIPELINED
    caller.writer.write(b"".join(request(f"/{number}", body=b"x" * 1000) for number in range(count)))
    assert [body for _, body in await caller.answers(count)] == [f"/{number}".encode() for number in range(count)]


@pytest.mark.internal_http
async def test_a_body_that_arrived_late_leaves_no_place_occupied_in_the_parsers_queue(line):
    caller = await line(echo)
    late = request("/late", body=b"late")
    caller.writer.write(late[:-4])
    (connection,) = await _connections(caller)
    await until(lambda: connection.task)
    caller.writer.write(b"late")
    await caller.answers(1)
    count = 3 * accepting.MAX_PIPELINED
    caller.writer.write(b"".join(request(f"/{number}") for number in range(count)))
    assert [body for _, body in await caller.answers(count)] == [f"/{number}".encode() for number in range(count)]


@pytest.mark.internal_http
async def test_the_pipelined_requests_of_a_caller_that_does_not_read_have_to_wait(line):
    answered = 0

    async def big(http):
        nonlocal answered
        answer = http.answer(200, {}, length=MB)
        answer.write_whole(b"x" * MB)
        await answer.drain()
        answered += 1
        return answer

    caller = await line(big)
    caller.reader._transport.pause_reading()
    for number in range(100):
        caller.writer.write(request(f"/{number}"))
    (connection,) = await _connections(caller)
    await until(lambda: connection.writing_paused)
    assert answered < 50
    assert connection.transport.get_write_buffer_size() <= 2 * MB
    caller.reader._transport.resume_reading()
    assert len(await caller.answers(100)) == 100


@pytest.mark.internal_http
async def test_little_is_read_of_the_requests_behind_one_that_is_being_answered(line):
    may_answer = asyncio.Event()

    async def slow(http):
        await may_answer.wait()
        return await echo(http)

    caller = await line(slow)
    caller.writer.write(request("/first"))
    (connection,) = await _connections(caller)
    await until(lambda: connection.task)
    for number in range(4):
        caller.writer.write(request(f"/{number}", body=b"x" * MB))
    await until(lambda: connection.is_paused)
    assert caller.listener.held_bytes()["pipelined"] <= accepting.MAX_PIPELINED_BYTES + MB // 2
    may_answer.set()
    assert [body for _, body in await caller.answers(5)] == [b"/first", b"/0", b"/1", b"/2", b"/3"]
    assert caller.listener.held_bytes()["pipelined"] == 0


@pytest.mark.internal_http
async def test_a_caller_that_always_has_a_request_behind_is_not_charged_for_answered_ones(line):
    turns = asyncio.Semaphore(0)

    async def slow(http):
        await turns.acquire()
        return await echo(http)

    caller = await line(slow)
    caller.writer.write(request("/0"))
    (connection,) = await _connections(caller)
    for number in range(50):
        caller.writer.write(request(f"/{number + 1}", body=b"x" * 10_000))
        behind = 2 if number else 1
        await until(lambda count=behind: len(connection.waiting) == count and connection.waiting[-1][1].is_eof())
        if number:
            turns.release()
            assert [body for _, body in await caller.answers(1)] == [f"/{number - 1}".encode()]
            assert connection.waiting
            await until(lambda: caller.listener.budget.held_bytes < 2 * 11_000)
    turns.release()
    turns.release()
    await caller.answers(2)
    await until(lambda: caller.listener.budget.held_bytes == 0 == caller.listener.pipelined_bytes)


@pytest.mark.internal_http
async def test_a_request_behind_the_first_one_is_counted_if_both_arrive_together(line):
    may_answer = asyncio.Event()

    async def slow(http):
        await may_answer.wait()
        return await echo(http)

    caller = await line(slow)
    caller.writer.write(request("/first") + request("/second", body=b"x" * 40_000))
    await until(lambda: caller.listener.held_bytes()["pipelined"] >= 40_000)
    may_answer.set()
    assert [body for _, body in await caller.answers(2)] == [b"/first", b"/second"]
    assert caller.listener.held_bytes()["pipelined"] == 0


@pytest.mark.internal_http
async def test_requests_behind_others_are_bounded_on_all_connections_together(line, monkeypatch):
    monkeypatch.setattr(accepting, "MAX_PIPELINED_IN_ALL_BYTES", 1000)
    caller, _, cancelled = await never_answered(line)
    caller.writer.write(request("/second", body=b"x" * 2000))
    with contextlib.suppress(ConnectionError):
        assert await caller.closed() == b""
    async with asyncio.timeout(BOUND):
        await cancelled.wait()
    await until(lambda: caller.listener.pipelined_bytes == 0 == caller.listener.budget.held_bytes)


@pytest.mark.internal_http
@pytest.mark.parametrize("way", ["close", "reset"])
async def test_a_caller_that_leaves_while_it_is_not_read_is_noticed(line, monkeypatch, way):
    if not hasattr(socket, "TCP_INFO"):
        platform_lacks("TCP_INFO is an option of Linux")
    monkeypatch.setattr(accepting, "LOOK_FOR_END_SECONDS", 0.02)
    caller, connection, cancelled = await never_answered(line)
    # The end of a connection that is closed follows behind its data, for which the kernel must have room.
    caller.writer.write(request("/second", body=b"x" * (MB if way == "reset" else MB // 5)))
    await until(lambda: connection.is_paused)
    assert not cancelled.is_set()
    if way == "reset":
        raw = caller.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        caller.writer.transport.abort()
    else:
        caller.writer.close()
    async with asyncio.timeout(BOUND):
        await cancelled.wait()


async def test_a_caller_that_does_not_read_its_answer_is_cut_off(line, monkeypatch):
    for name in ("KEEPALIVE_SECONDS", "FIRST_REQUEST_SECONDS"):
        monkeypatch.setattr(accepting, name, 0.3)
    ended = []

    async def endless(http):
        answer = http.answer(200, {}, length=None)
        try:
            while True:
                answer.write(b"x" * MB)
                await answer.drain()
        finally:
            ended.append(http)

    caller = await line(endless)
    caller.reader._transport.pause_reading()
    caller.writer.write(request("/"))
    await until(lambda: ended)
    await until(lambda: not caller.listener.connections)


async def test_a_connection_is_not_idle_while_its_answer_is_being_made(line, monkeypatch):
    for name in ("KEEPALIVE_SECONDS", "FIRST_REQUEST_SECONDS"):
        monkeypatch.setattr(accepting, name, 0.1)

    async def slow(http):
        await asyncio.sleep(0.5)
        return await path_of(http)

    caller = await line(slow)
    caller.writer.write(request("/slow"))
    assert (await caller.answers(1))[0][1] == b"/slow"
    assert await caller.closed() == b""  # and now it is idle


async def test_an_early_answer_reaches_a_caller_that_is_still_sending(line):
    caller = await line(path_of)
    caller.writer.write(request("/early", body=b"x" * (30 * MB)) + request("/never"))
    ((head, body),) = await caller.answers(1)
    assert body == b"/early" and b"Connection: close" in head
    assert await caller.closed() == b""


async def test_a_connection_is_closed_after_a_chunked_body_so_that_no_trailer_becomes_a_header(line):
    """aiohttp's parser adds the trailers to the headers of the next request, which may be another caller's."""
    seen = []

    async def handler(http):
        seen.append(dict(http.headers))
        return await echo(http)

    caller = await line(handler)
    chunked = b"POST /first HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n"
    for part in (chunked, b"5\r\nhe", b"llo\r\n", b"0\r\nX-Camera-Id: other\r\n\r\n" + request("/second")):
        caller.writer.write(part)
        await asyncio.sleep(0.01)
    head, body = (await caller.answers(1))[0]
    assert body == b"/first"
    assert b"connection: close" in head.lower()
    assert await caller.closed() == b""
    assert [headers for headers in seen if "X-Camera-Id" in headers] == []


@pytest.mark.internal_http
async def test_the_reader_of_a_body_gets_an_error_for_a_malformed_chunk(line):
    broken = []

    async def reads(http):
        try:
            return await echo(http)
        except MalformedRequest:
            broken.append(http)
            return await path_of(http)

    caller = await line(reads)
    caller.writer.write(b"POST / HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n")
    (connection,) = await _connections(caller)
    await until(lambda: connection.task)
    caller.writer.write(b"nonsense\r\n")
    assert (await caller.answers(1))[0][1] == b"/"
    assert await caller.closed() == b""
    assert len(broken) == 1


async def test_a_request_for_another_protocol_is_answered_and_nothing_after_it_is_parsed(line):
    caller = await line(echo)
    caller.writer.write(request("/first", "Connection: Upgrade\r\nUpgrade: websocket\r\n") + request("/second"))
    ((head, body),) = await caller.answers(1)
    assert body == b"/first" and b"Connection: close" in head
    assert await caller.closed() == b""


async def test_a_reset_cancels_the_handler(line):
    begun, ends = asyncio.Event(), []

    async def waits(http):
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ends.append(http.is_gone)
            raise

    caller = await line(waits)
    caller.writer.write(request("/"))
    await begun.wait()
    linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"  # on, for no second: closing sends a reset
    caller.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    caller.writer.close()
    await until(lambda: ends)
    assert ends == [True]
    await until(lambda: not caller.listener.connections)


async def test_close_waits_for_an_answer_in_progress(line):
    begun = asyncio.Event()

    async def slow(http):
        begun.set()
        await asyncio.sleep(0.1)
        return await path_of(http)

    caller = await line(slow)
    caller.writer.write(request("/last"))
    await begun.wait()
    await caller.listener.close()
    assert (await caller.answers(1))[0][1] == b"/last"
    assert await caller.closed() == b""


async def _connections(caller):
    await until(lambda: caller.listener.connections)
    return caller.listener.connections
