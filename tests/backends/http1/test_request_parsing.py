"""The requests of a connection: garbage behind good ones, and chunked bodies with and without trailers."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from aiohttp.http import HttpProcessingError

from backends.http1.errors import MalformedRequest

pytestmark = [pytest.mark.http, pytest.mark.internal_http]

HEAD = b" HTTP/1.1\r\nHost: here\r\n"
GET = b"GET /get" + HEAD + b"\r\n"
POST = b"POST /post" + HEAD + b"Content-Length: 5\r\n\r\nhello"
CHUNKED = b"POST /chunked" + HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n"
PLAIN = CHUNKED + b"\r\n"
EMPTY = b"POST /empty" + HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
TRAILERS = b"X-Camera-Id: another\r\nX-0: 0\r\n"
GARBAGE = b"\x16\x03\x01 garbage\r\n\r\n"
BAD_CHUNK = b"POST /bad" + HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nZZ\r\n"


@pytest.fixture
def parts():
    from backends.http1 import aiohttp_parts  # noqa: PLC0415  older releases lack what it imports

    return aiohttp_parts


def pieces(data, *cuts):
    """Cut data at these positions, those above its length left out."""
    ends = sorted({cut for cut in cuts if 0 < cut < len(data)})
    return [data[start:end] for start, end in zip([0, *ends], [*ends, len(data)], strict=True)]


class Caller:
    """A connection with a handler that reads each body and notes its path, headers and text."""

    def __init__(self, http):
        self.seen = []
        self._http = http

    async def __aenter__(self):
        self._listener = self._http.listener(self._handle, max_connections=4)
        port = await self._listener.open("127.0.0.1", 0)
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", port)
        return self

    async def __aexit__(self, *_):
        self.writer.close()
        await self._listener.close()

    async def _handle(self, http):
        status, body = 200, b""
        try:
            while piece := await http.content.readany():
                body += piece
        except MalformedRequest:
            status = 400
        self.seen.append((http.raw_path, dict(http.headers), body))
        http.keep_alive = http.keep_alive and http.content.is_eof()
        answer = http.answer(status, {}, length=0)
        answer.write_whole(b"")
        return answer

    async def statuses(self, *parts):
        """Send the parts, each in a packet of its own. Return the status of each answer until the connection ends."""
        for part in parts:
            self.writer.write(part)
            await asyncio.sleep(0)
        found = []
        async with asyncio.timeout(10):
            with contextlib.suppress(asyncio.IncompleteReadError):
                while head := await self.reader.readuntil(b"\r\n\r\n"):
                    found.append(int(head.split()[1]))
                    length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
                    await self.reader.readexactly(int(length))
        return found


@pytest.mark.parametrize("good", [GET, POST, PLAIN, EMPTY, GET + POST + GET, PLAIN + POST, GET * 40])
async def test_good_requests_get_their_answers_and_garbage_behind_them_its_400(http, good):
    async with Caller(http) as caller:
        expected = 1 if good.startswith(b"POST /chunked") and len(good) > len(PLAIN) else good.count(b" HTTP/1.1")
        statuses = await caller.statuses(good + GARBAGE)
        assert statuses[:expected] == [200] * expected
        # A connection with data behind a chunked body is closed: the data could contain trailers.
        assert statuses[expected:] == ([400] if not good.startswith((PLAIN, EMPTY)) else [])


async def test_garbage_in_a_later_packet_takes_no_answer_away(http):
    for at in range(1, len(GET)):
        async with Caller(http) as caller:
            assert await caller.statuses(POST + GET[:at], GET[at:] + GARBAGE) == [200, 200, 400]


async def test_garbage_inside_a_body_takes_no_answer_from_the_request_before(http):
    for cut in (0, 10, len(GET), len(GET) + 60, len(GET + BAD_CHUNK) - 3):
        async with Caller(http) as caller:
            assert await caller.statuses(*pieces(GET + BAD_CHUNK, cut)) == [200, 400]


async def test_a_connection_takes_requests_after_chunked_bodies_without_trailers(http):
    async with Caller(http) as caller:
        for data in (PLAIN, EMPTY, POST, PLAIN, *(PLAIN for _ in range(len(PLAIN) // 7))):
            number = len(caller.seen)
            for part in pieces(data, 7 * number, 11 * number):
                caller.writer.write(part)
                await asyncio.sleep(0)
            async with asyncio.timeout(10):
                head = await caller.reader.readuntil(b"\r\n\r\n")
            assert b"connection: close" not in head.lower()
        assert {body for path, _, body in caller.seen if path != "/empty"} == {b"hello"}


def parse(protocol, parts):
    """Feed the parts. Return each message with whether the connection could take a request after it."""
    messages = []
    for part in parts:
        with contextlib.suppress(HttpProcessingError):
            messages += protocol.feed(part)[0]
    return [(message, protocol.without_trailers is body) for message, body in messages]


@pytest.mark.parametrize("behind", [b"", GET, POST[:-5] + b"\n0\r\n\r", PLAIN, EMPTY, b"\r\n" + GET])
async def test_no_trailer_becomes_a_header_of_a_request_that_is_answered(http, parts, behind):
    for data in (CHUNKED + TRAILERS + b"\r\n" + behind, EMPTY[:-2] + TRAILERS + b"\r\n" + behind):
        for first in range(1, len(data)):
            for second in (first, first + 1, first + 7):
                protocol = parts.RequestProtocol(asyncio.get_running_loop(), buffer_bytes=1 << 18, max_pipelined=4)
                found = parse(protocol, pieces(data, first, second))
                assert len(found) >= 1
                assert not found[0][1], pieces(data, first, second)


async def test_the_end_of_a_chunked_body_without_trailers_is_found_however_it_arrives(http, parts):
    for data in (PLAIN, EMPTY):
        for first in range(1, len(data) + 1):
            for second in (first, first + 1, first + 3):
                if data.index(b"\r\n\r\n") + 3 in (first, second):
                    continue  # the last line feed of the head came alone: then the connection may be closed
                protocol = parts.RequestProtocol(asyncio.get_running_loop(), buffer_bytes=1 << 18, max_pipelined=4)
                assert parse(protocol, pieces(data, first, second))[0][1], pieces(data, first, second)
