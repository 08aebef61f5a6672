"""The bytes of an answer: it must end where the caller's parser expects the end."""

import asyncio

import pytest

BOUND = 10.0

pytestmark = pytest.mark.http


@pytest.fixture
async def wire(http):
    """Start a listener with a handler of the test, send requests, and read until the connection is closed."""
    listeners = []

    async def ask(handler, *requests):
        listener = http.listener(handler, max_connections=4)
        listeners.append(listener)
        port = await listener.open("127.0.0.1", 0)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"".join(requests))
        async with asyncio.timeout(BOUND):
            received = await reader.read()
        writer.close()
        return received

    yield ask
    for listener in listeners:
        await listener.close()


async def whole(http):
    answer = http.answer(int(http.raw_path[1:]), {"Content-Type": "text/plain"}, length=5)
    answer.write_whole(b"hello")
    return answer


async def pieces(http):
    answer = http.answer(200, {"Content-Type": "text/event-stream"}, length=None)
    for piece in (b"one", b"two"):
        answer.write(piece)
        await answer.drain()
    answer.write_eof()
    return answer


def request(method, path, version="1.1", headers=""):
    return f"{method} {path} HTTP/{version}\r\nHost: here\r\n{headers}\r\n".encode()


LAST = "Connection: close\r\n"


async def test_a_whole_answer_states_its_length_and_the_connection_stays_open(wire):
    received = await wire(whole, request("GET", "/200"), request("GET", "/404", headers=LAST))
    first, second, _ = received.split(b"hello")
    assert first.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"Content-Length: 5\r\n" in first and b"Connection: close" not in first
    assert second.startswith(b"HTTP/1.1 404 Not Found\r\n") and b"Connection: close\r\n" in second


async def test_data_after_a_whole_answer_is_not_sent_before_the_next_answer(wire):
    async def talkative(http):
        answer = await whole(http)
        answer.write(b"data: an error that came too late\n\n")
        answer.write_eof()
        return answer

    received = await wire(talkative, request("GET", "/200"), request("GET", "/201", headers=LAST))
    assert b"too late" not in received
    assert received.count(b"HTTP/1.1 ") == received.count(b"hello") == 2


@pytest.mark.parametrize(("method", "path", "length"), [("HEAD", "/200", True), ("GET", "/204", False)])
async def test_an_answer_without_a_body_sends_none(wire, method, path, length):
    received = await wire(whole, request(method, path, headers=LAST))
    assert received.endswith(b"\r\n\r\n") and b"hello" not in received
    assert (b"Content-Length: 5\r\n" in received) is length


async def test_a_205_says_that_it_has_no_body_and_the_next_answer_is_read(wire):
    async def in_pieces(http):
        answer = http.answer(205, {}, length=None)
        answer.write(b"hello")
        answer.write_eof()
        await answer.drain()
        return answer

    for handler in (whole, in_pieces):
        received = await wire(handler, request("GET", "/205"), request("GET", "/205", headers=LAST))
        assert received.count(b"HTTP/1.1 205 ") == received.count(b"Content-Length: 0\r\n") == 2
        assert b"hello" not in received and b"chunked" not in received


async def test_pieces_are_sent_as_chunks_and_the_connection_stays_open(wire):
    received = await wire(pieces, request("GET", "/"), request("GET", "/", headers=LAST))
    assert received.count(b"Transfer-Encoding: chunked\r\n") == 2
    assert received.count(b"\r\n\r\n3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n") == 2


async def test_for_http_1_0_the_end_of_the_connection_ends_an_answer_in_pieces(wire):
    received = await wire(pieces, request("GET", "/", "1.0", "Connection: keep-alive\r\n"))
    assert received.startswith(b"HTTP/1.0 200 OK\r\n") and received.endswith(b"\r\n\r\nonetwo")
    assert b"chunked" not in received and b"keep-alive" not in received
