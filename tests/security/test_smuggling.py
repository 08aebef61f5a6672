"""An ambiguous request, which two HTTP parsers could read differently, is refused and its connection is closed.

This holds on both listeners.
"""

from __future__ import annotations

import asyncio

import pytest

pytestmark = pytest.mark.http

HIDDEN = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
CASES = {
    "length and chunked": b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked and length": b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
    "two lengths": b"Content-Length: 0\r\nContent-Length: 37\r\n\r\n",
    "a list of lengths": b"Content-Length: 0, 37\r\n\r\n",
    "a signed length": b"Content-Length: +0\r\n\r\n",
    "a negative length": b"Content-Length: -1\r\n\r\n",
    "a hexadecimal length": b"Content-Length: 0x0\r\n\r\n",
    "an unknown encoding": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked that is not last": b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "two encodings": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "a coding beside chunked": b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "a coding and chunked in two lines": b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a space before the colon": b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "a folded header": b"X-A: b\r\n Transfer-Encoding: chunked\r\n\r\n",
    "a bare line feed": b"X-A: b\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a bare carriage return": b"X-A: b\rTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a NUL": b"X-A: b\x00c\r\n\r\n",
    "a header without a name": b": b\r\n\r\n",
    "an invalid chunk size": b"Transfer-Encoding: chunked\r\n\r\n0x0\r\n\r\n",
    "a negative chunk": b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n",
    "a chunk longer than its size": b"Transfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n",
    "a chunk size with a bare line feed": b"Transfer-Encoding: chunked\r\n\r\n1\na\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("listener", ["data", "admin"])
@pytest.mark.parametrize("case", CASES)
async def test_an_ambiguous_request_is_refused(serving, case, listener):
    sidecar = await serving()
    port = sidecar.sidecar.data_port if listener == "data" else sidecar.sidecar.admin_port
    target = b"/v1/chat/completions" if listener == "data" else b"/drain"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST %b HTTP/1.1\r\nHost: x\r\n" % target + CASES[case] + HIDDEN)
    async with asyncio.timeout(10):
        answer = await reader.read()  # returns only when the server closes the connection
    writer.close()
    assert answer.count(b"HTTP/1.") == 1, answer
    assert answer.split(b" ", 2)[1].startswith(b"4"), answer
    assert b"/smuggled" not in answer
    async with sidecar.client.get(f"{sidecar.admin_url}/readyz") as response:
        assert (response.status, await response.text()) == (200, "ready\n")


@pytest.mark.parametrize("listener", ["data", "admin"])
async def test_a_flood_of_headers_is_refused(serving, listener):
    sidecar = await serving()
    port = sidecar.sidecar.data_port if listener == "data" else sidecar.sidecar.admin_port
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    many = b"".join(b"X-%d: y\r\n" % number for number in range(5000))
    writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n" + many + b"Connection: close\r\n\r\n")
    async with asyncio.timeout(10):
        assert (await reader.read()).split(b" ", 2)[1].startswith(b"4")
    writer.close()
