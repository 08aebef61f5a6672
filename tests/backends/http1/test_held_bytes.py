"""The listener counts every byte that a caller makes it hold, and stops reading its sockets at a bound."""

from __future__ import annotations

import asyncio
import gc
import resource

import pytest

from backends import byte_budget
from backends.http1.errors import RefusedBody
from backends.http1.server import Connection

BOUND = 10.0
MB = 1024 * 1024
#: Bytes that the event loop reads from one socket at once, at most.
ONE_READ = 256 * 1024

pytestmark = pytest.mark.http


def head(length: int, more: str = "") -> bytes:
    return f"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: {length}\r\n{more}\r\n".encode()


async def until(condition):
    async with asyncio.timeout(BOUND):
        while not condition():  # noqa: ASYNC110  what is waited for is no event of ours
            await asyncio.sleep(0.01)


class Bodies:
    """A handler that reads bodies as the API does, and holds them until `may_answer`."""

    def __init__(self):
        self.may_answer = asyncio.Event()
        self.complete = 0
        self.handed_over = 0
        self.stalled = 0
        self.statuses = set()

    async def __call__(self, http):
        body = bytearray()
        status = 200
        try:
            async for piece in http.content.iter_any():
                body += piece
            self.handed_over += http.hand_over()
            self.complete += 1
            await self.may_answer.wait()
        except RefusedBody as error:
            self.stalled += 1
            self.statuses.add(error.status)
            status = error.status
        answer = http.answer(status, {}, length=0)
        answer.write_whole(b"")
        return answer


@pytest.fixture
async def listening(http):
    """Opens a listener and returns it with a function that connects to it."""
    closers = []

    async def start(handler, **bounds):
        listener = http.listener(handler, max_connections=2000, **bounds)
        port = await listener.open("127.0.0.1", 0)
        closers.append(listener.close)

        async def connect():
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            closers.insert(0, lambda: asyncio.sleep(0, writer.transport.abort()))
            return reader, writer

        return listener, connect

    yield start
    for close in closers:
        await close()


async def test_a_byte_is_counted_until_the_request_is_handed_over(listening):
    bodies = Bodies()
    listener, connect = await listening(bodies)
    reader, writer = await connect()
    writer.write(head(1000) + b"x" * 400)
    await until(lambda: listener.held_bytes()["receiving"] > 400)
    writer.write(b"x" * 600)
    await until(lambda: bodies.complete)
    assert listener.budget.held_bytes == 0
    assert 1000 < bodies.handed_over < 3000
    bodies.may_answer.set()
    await reader.readuntil(b"\r\n\r\n")
    await until(lambda: listener.budget.held_bytes == 0)


async def test_a_lost_connection_holds_nothing(listening):
    listener, connect = await listening(Bodies())
    for sent in (b"POST / HT", head(10), head(1000) + b"x" * 400):
        _, writer = await connect()
        writer.write(sent)
        await until(lambda: listener.budget.held_bytes)
        writer.transport.abort()
        await until(lambda: listener.budget.held_bytes == 0)


async def test_at_the_bound_one_body_after_the_other_is_received_and_none_is_refused(listening, http):
    bodies = Bodies()
    listener, connect = await listening(bodies, max_held_bytes=5 * MB)
    callers = [await connect() for _ in range(8)]
    most = 0

    async def send(writer):
        writer.write(head(MB))
        for _ in range(16):
            writer.write(b"x" * (MB // 16))
            await writer.drain()

    async def watch():
        nonlocal most
        while True:
            most = max(most, listener.budget.held_bytes)
            await asyncio.sleep(0)

    watching = asyncio.ensure_future(watch())
    sending = asyncio.gather(*(send(writer) for _, writer in callers))
    await until(lambda: bodies.complete == 8)
    bodies.may_answer.set()
    await sending
    for reader, _ in callers:
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    watching.cancel()
    # The documented implementation can bring one read more for each connection.
    assert most <= 5 * MB + ONE_READ * (1 if http.name == "internal" else len(callers)), most
    await until(lambda: not listener.budget.is_full)


@pytest.mark.internal_http
async def test_the_sockets_that_were_ready_at_the_same_time_are_not_read_over_the_bound(listening):
    listener, connect = await listening(Bodies(), max_held_bytes=MB)
    writers = [(await connect())[1] for _ in range(40)]
    for writer in writers:
        writer.write(head(10 * MB) + b"x" * ONE_READ)  # in one turn of the event loop, so all are ready in the next one
    await until(lambda: listener.budget.is_full)
    await asyncio.sleep(0)
    assert listener.budget.held_bytes <= MB + 2 * ONE_READ


async def test_a_body_that_stalls_at_the_bound_gives_way_and_the_others_are_served(listening, monkeypatch):
    monkeypatch.setattr(byte_budget, "STALLED_SECONDS", 0.2)
    bodies = Bodies()
    bodies.may_answer.set()
    listener, connect = await listening(bodies, max_held_bytes=2 * MB)
    stalled = [await connect() for _ in range(3)]
    for _, writer in stalled:
        writer.write(head(5 * MB) + b"x" * MB)
    await until(lambda: listener.budget.is_full)
    reader, writer = await connect()
    writer.write(head(3 * MB) + b"x" * (3 * MB))
    assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), BOUND)).startswith(b"HTTP/1.1 200")
    await until(lambda: not listener.budget.is_full)


@pytest.mark.internal_http
async def test_a_caller_that_stalls_at_the_bound_gets_its_error(listening, monkeypatch):
    monkeypatch.setattr(byte_budget, "STALLED_SECONDS", 0.2)
    bodies = Bodies()
    listener, connect = await listening(bodies, max_held_bytes=MB)
    reader, writer = await connect()
    writer.write(head(5 * MB) + b"x" * 2 * MB)
    assert (await asyncio.wait_for(reader.read(), BOUND)).startswith(b"HTTP/1.1 408")
    assert listener.budget.held_bytes == 0


async def test_a_body_that_trickles_at_the_bound_gives_way_too(listening, monkeypatch):
    monkeypatch.setattr(byte_budget, "STALLED_SECONDS", 0.2)
    listener, connect = await listening(Bodies(), max_held_bytes=MB)
    _, writer = await connect()
    writer.write(head(5 * MB) + b"x" * 2 * MB)
    await until(lambda: listener.budget.is_full)

    async def trickle():
        while True:
            writer.write(b"x")
            await asyncio.sleep(0.02)

    trickling = asyncio.ensure_future(trickle())
    await until(lambda: not listener.budget.is_full)
    trickling.cancel()


async def test_a_body_is_not_given_up_for_the_time_in_which_it_was_not_read(listening, monkeypatch):
    monkeypatch.setattr(byte_budget, "STALLED_SECONDS", 0.3)
    monkeypatch.setattr(byte_budget, "SMALL_BYTES", 64 * 1024)
    bodies = Bodies()
    bodies.may_answer.set()
    _, connect = await listening(bodies, max_held_bytes=MB // 4)
    callers = [await connect() for _ in range(3)]
    sent = [asyncio.ensure_future(_send_slowly(writer)) for _, writer in callers]
    for reader, _ in callers:
        assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), BOUND)).startswith(b"HTTP/1.1 200")
    await asyncio.gather(*sent)
    assert bodies.stalled == 0


async def _send_slowly(writer):
    """Send 1 MB so that it takes longer than `STALLED_SECONDS`, without a pause."""
    writer.write(head(MB))
    for _ in range(8):
        await asyncio.sleep(0.06)
        writer.write(b"x" * (MB // 8))
        await writer.drain()


async def test_small_bodies_pass_while_large_ones_have_filled_their_part(listening):
    bodies = Bodies()
    bodies.may_answer.set()
    listener, connect = await listening(bodies, max_held_bytes=8 * MB)
    large = [await connect() for _ in range(3)]
    for _, writer in large:
        writer.write(head(10 * MB) + b"x" * (2 * MB))
    await until(lambda: listener.budget.is_full)
    for _ in range(30):
        reader, writer = await connect()
        writer.write(head(MB // 4) + b"x" * (MB // 4))
        assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), BOUND)).startswith(b"HTTP/1.1 200")
    assert listener.budget.is_full
    assert bodies.stalled == 0


@pytest.mark.internal_http
@pytest.mark.parametrize("pieces", [1, 20], ids=["at once", "in pieces"])
async def test_a_head_of_many_long_headers_is_refused(listening, pieces):
    _, connect = await listening(Bodies())
    reader, writer = await connect()
    long = head(0, "".join(f"Name{number}: {'v' * 5000}\r\n" for number in range(20)))
    answer = asyncio.ensure_future(reader.read())
    for at in range(pieces):
        if not answer.done():  # it may be refused before its end
            writer.write(long[at * len(long) // pieces : (at + 1) * len(long) // pieces])
            await asyncio.sleep(0.01)
    assert (await asyncio.wait_for(answer, BOUND)).startswith(b"HTTP/1.1 431")


@pytest.mark.internal_http
async def test_the_beginning_of_a_head_behind_a_request_is_counted(listening):
    bodies = Bodies()
    listener, connect = await listening(bodies)
    reader, writer = await connect()
    writer.write(head(5) + b"12345" + b"GET / HTTP/1.1\r\nLong: " + b"x" * 7000)
    await until(lambda: bodies.complete)
    assert listener.held_bytes()["pipelined"] >= 7000
    bodies.may_answer.set()
    await reader.readuntil(b"\r\n\r\n")
    await asyncio.sleep(0)
    assert listener.budget.held_bytes >= 7000
    writer.write(b"\r\n\r\n")
    await reader.readuntil(b"\r\n\r\n")
    await until(lambda: listener.budget.held_bytes == 0)


@pytest.mark.internal_http
@pytest.mark.alone
async def test_heads_of_many_short_headers_take_no_more_memory_than_is_counted(listening):
    bodies = Bodies()
    _, connect = await listening(bodies)
    many = head(0, "".join(f"a{number}: b\r\n" for number in range(120)))
    gc.collect()
    before = _resident()
    for _ in range(600):
        _, writer = await connect()
        writer.write(many)
    await until(lambda: bodies.complete == 600)
    # Each connection takes something of its own too: caller and listener are in this process.
    assert _resident() - before < bodies.handed_over + 600 * 30_000


def _resident() -> int:
    with open("/proc/self/statm") as statm:  # noqa: PTH123
        return int(statm.read().split()[1]) * resource.getpagesize()


@pytest.mark.internal_http
async def test_a_body_in_tiny_chunks_is_refused_and_one_in_small_chunks_is_not(listening):
    bodies = Bodies()
    bodies.may_answer.set()
    _, connect = await listening(bodies)
    for chunk, status in ((b"1\r\nx\r\n", b"400"), (b"8\r\nxxxxxxxx\r\n", b"200")):
        reader, writer = await connect()
        answer = asyncio.ensure_future(reader.read())
        writer.write(b"POST / HTTP/1.1\r\nHost: here\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(chunk * 40_000 + b"0\r\n\r\n")
        assert (await asyncio.wait_for(answer, BOUND)).split(b" ", 2)[1] == status


@pytest.mark.internal_http
async def test_a_closed_connection_leaves_no_reference_cycle(listening):
    bodies = Bodies()
    bodies.may_answer.set()
    _, connect = await listening(bodies)
    gc.collect()
    gc.disable()
    try:
        for more in ("", "Connection: close\r\n"):
            reader, writer = await connect()
            writer.write(head(5, more) + b"12345")
            await reader.readuntil(b"\r\n\r\n")
            writer.close()
        _, writer = await connect()
        writer.write(head(5) + b"123")
        await asyncio.sleep(0)
        writer.close()
        await until(lambda: not [one for one in gc.get_objects() if isinstance(one, Connection)])
    finally:
        gc.enable()


@pytest.mark.internal_http
async def test_large_bodies_that_begin_all_at_once_do_not_stop_the_small_ones(listening):
    bodies = Bodies()
    bodies.may_answer.set()
    listener, connect = await listening(bodies, max_held_bytes=4 * MB)
    large = [await connect() for _ in range(150)]
    for _, writer in large:
        writer.write(head(10 * MB) + b"x" * ONE_READ)
    await until(lambda: bodies.stalled >= 20)  # refused with a 503: their first bytes alone are over the bound
    assert listener.budget.held_bytes < 4 * MB + ONE_READ
    reader, writer = await connect()
    writer.write(head(1000) + b"x" * 1000)
    assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), BOUND)).startswith(b"HTTP/1.1 200")
    assert bodies.statuses == {503}
