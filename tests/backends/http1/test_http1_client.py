"""Unusual answers, early and late ones, and which request may use a connection next."""

from __future__ import annotations

import asyncio
import base64
import gc
import ssl
import subprocess
from typing import cast

import pytest
from real_parts import platform_lacks, real_part
from scripted_upstream import BOUND, CHAT_ANSWER, Link, Seen, Upstream

from backends.base import Rejected, Reply, Request, ServerFailed, Timings, Unreachable
from backends.http1 import implementation as choosing
from backends.http1.client import Response
from backends.remote.backend import DashScopeBackend

pytestmark = pytest.mark.http

CHAT = Request(dialect="openai", path="/any/path", body=b"{}", model="m")
STREAM = Request(dialect="openai", path="/any/path", body=b'{"stream":true}', model="m", stream=True)
BIG = Request(dialect="openai", path="/chat/completions", body=b"x" * 20_000_000, model="m")
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
BODY = b'{"choices": 1}'


def is_internal():
    return choosing._Chosen.implementation.name == "internal"


def idle(backend):
    if not is_internal():
        return []  # it keeps none
    return [connection for origin in backend._origins.values() for connection, _ in origin._idle]


def in_use(backend):
    connector = backend._connector
    if not is_internal():
        return len(connector._session.connector._acquired)
    return len(connector._acquired) - len(idle(backend))


@pytest.fixture
async def connected(caplog):
    """Make started backends. At the end they hold no connection, and nothing was logged (such as a lost exception)."""
    made = []

    async def connect(base_url: str, **options) -> DashScopeBackend:
        backend = DashScopeBackend(base_url=base_url, **options)
        await backend.start()
        made.append(backend)
        return backend

    yield connect
    for backend in made:
        assert not in_use(backend), "a connection was not given back"
        await backend.close()
    assert caplog.text == ""


@pytest.fixture
async def backend(upstream, connected):
    return await connected(f"{upstream.origin}/v1")


@pytest.fixture
async def listening():
    """Serve raw connections: `await listening(script)` gives the port."""
    servers = []

    async def serve(script, host: str = "127.0.0.1", **options) -> int:
        async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await script(reader, writer)
            except (ConnectionError, asyncio.IncompleteReadError):
                pass  # the backend went
            finally:
                writer.close()

        servers.append(await asyncio.start_server(served, host, 0, **options))
        return servers[-1].sockets[0].getsockname()[1]

    yield serve
    for server in servers:
        server.close()


async def send(backend: DashScopeBackend, request: Request = CHAT) -> Reply:
    async with asyncio.timeout(BOUND):
        return await backend.send(request, Timings())


def raw(data: bytes, *, then: str = ""):
    async def script(link: Link, _: Seen) -> None:
        await link.send(data)
        if then:
            await asyncio.sleep(0.02)  # so that the data is read before the end comes
            getattr(link, then)()

    return script


def assert_connections(upstream: Upstream, pooled: list[int]) -> None:
    """The requests used these connections, or each its own if the implementation keeps no connection."""
    expected = pooled if is_internal() else list(range(len(pooled)))
    assert [request.connection for request in upstream.seen] == expected


@pytest.mark.parametrize("together", [True, False], ids=["with the answer", "while it idles"])
async def test_an_unrequested_answer_is_never_used(backend, upstream, together):
    async def twice(link: Link, _: Seen) -> None:
        stray = OK + b'Content-Length: 20\r\n\r\n{"choices": "stray"}'
        if len(upstream.seen) > 1:
            await link.answer({"choices": "mine"})
        elif together:
            await link.send(stray.replace(b"stray", b"first") + stray)
        else:
            await link.answer({"choices": "first"})
            await link.send(stray)

    upstream.script = twice
    assert b"first" in (await send(backend)).body
    async with asyncio.timeout(BOUND):
        while any(not connection.protocol.should_close for connection in idle(backend)):  # noqa: ASYNC110
            await asyncio.sleep(0.001)  # until the stray answer is there
    assert b"mine" in (await send(backend)).body
    assert_connections(upstream, [0, 1])


async def test_an_upstream_that_floods_an_idle_connection_is_cut_off(backend, upstream):
    if not is_internal():
        return  # it keeps no idle connection
    flooded, is_read = asyncio.get_running_loop().create_future(), asyncio.Event()

    async def flood(link: Link, _: Seen) -> None:
        await link.answer({"choices": "mine"})
        await is_read.wait()
        sent = 0
        try:
            while sent < 64 * 1024 * 1024:
                await link.send(b"x" * 65536)
                sent += 65536
        except ConnectionError:
            flooded.set_result(sent)

    upstream.script = flood
    await send(backend)
    is_read.set()
    async with asyncio.timeout(BOUND):
        assert await flooded < 16 * 1024 * 1024  # what fits into the kernel's buffers


@pytest.mark.parametrize("apart", [True, False])
async def test_interim_answers_are_skipped(backend, upstream, apart):
    async def script(link: Link, _: Seen) -> None:
        for interim in (b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"):
            await link.send(interim)
            if apart:
                await asyncio.sleep(0.005)
        await link.answer(CHAT_ANSWER)

    upstream.script = script
    for _ in range(2):
        assert (await send(backend)).status == 200
    assert_connections(upstream, [0, 0])


@pytest.mark.internal_http
async def test_interim_answers_without_end_are_a_failure(backend, upstream):
    async def script(link: Link, _: Seen) -> None:
        while link.is_open:
            await link.send(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 20)

    upstream.script = script
    with pytest.raises(Unreachable, match="broke before the answer"):
        await send(backend)


async def test_a_request_is_not_sent_again_after_an_interim_answer(backend, upstream):
    await send(backend)
    upstream.script = raw(b"HTTP/1.1 103 Early Hints\r\n\r\n", then="close")
    with pytest.raises(Unreachable, match="broke before the answer"):
        await send(backend)
    assert_connections(upstream, [0, 0])


async def test_a_request_is_not_sent_again_if_its_connection_breaks_late(backend, upstream, monkeypatch):
    monkeypatch.setattr("backends.http1.client._DIED_IDLE_SECONDS", 0.01)
    await send(backend)
    upstream.script = raw(b"", then="close")
    with pytest.raises(Unreachable, match="before the answer"):
        await send(backend)
    assert_connections(upstream, [0, 0])


async def test_a_switch_of_protocols_is_a_failure_and_ends_the_connection(backend, upstream):
    upstream.script = raw(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nabc")
    for _ in range(2):
        with pytest.raises(ServerFailed, match="101: it would speak another protocol"):
            await send(backend)
    assert_connections(upstream, [0, 1])


@pytest.mark.parametrize(
    ("method", "status", "length"),
    [
        ("HEAD", b"200 OK", b"Content-Length: 5\r\n"),
        ("DELETE", b"204 No Content", b""),
        ("DELETE", b"204 No Content", b"Content-Length: 5\r\n"),
    ],
)
async def test_an_answer_without_a_body_ends_with_its_head(backend, upstream, method, status, length):
    upstream.script = raw(b"HTTP/1.1 " + status + b"\r\n" + length + b"\r\n")
    for _ in range(2):
        reply = await send(backend, Request(dialect="openai", path="/files/1", body=b"", model="m", method=method))
        assert (reply.status, reply.body) == (int(status[:3]), b"")
    assert_connections(upstream, [0, 0])


async def test_a_head_without_its_body_is_followed_by_an_answer_with_one(backend, upstream):
    """An empty line between answers, which some servers send, is ignored."""
    head = OK + b"Content-Length: %d\r\n\r\n" % len(BODY)
    for method, sent, body in (
        ("GET", head + BODY + b"\r\n", BODY),
        ("HEAD", head, b""),
        ("GET", head + BODY, BODY),
        ("GET", head + BODY, BODY),
    ):
        upstream.script = raw(sent)
        reply = await send(backend, Request(dialect="openai", path="/files", body=b"", model="m", method=method))
        assert reply.body == body
    assert_connections(upstream, [0, 0, 0, 0])


async def test_trailers_and_chunk_extensions_are_ignored(backend, upstream):
    head = OK + b"Trailer: X-T\r\nTransfer-Encoding: chunked\r\n\r\n"
    upstream.script = raw(head + b"E;ext=1\r\n" + BODY + b"\r\n0\r\nX-T: v\r\nX-U: w\r\n\r\n")
    for _ in range(2):
        assert (await send(backend)).body == BODY
    assert_connections(upstream, [0, 0])


@pytest.mark.parametrize("trailers", [b"X-Request-Id: first's\r\n", b"Content-Encoding: gzip\r\nX-T: v\r\n"])
async def test_a_trailer_does_not_become_a_header_of_the_next_answer(backend, upstream, trailers):
    head = OK + b"Transfer-Encoding: chunked\r\n\r\n"
    upstream.script = raw(head + b"E\r\n" + BODY + b"\r\n0\r\n" + trailers + b"\r\n")
    assert (await send(backend)).body == BODY
    upstream.script = raw(OK + b"Content-Length: 14\r\n\r\n" + BODY)
    reply = await send(backend)
    assert reply.body == BODY
    assert "X-Request-Id" not in reply.headers
    assert_connections(upstream, [0, 0])


@pytest.mark.internal_http
@pytest.mark.parametrize("request_", [CHAT, STREAM], ids=["whole", "stream"])
async def test_the_reader_of_a_body_that_stops_being_http_gets_an_error(connected, listening, request_):
    async def broken(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        kind = b"text/event-stream" if request_ is STREAM else b"application/json"
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: " + kind + b"\r\nTransfer-Encoding: chunked\r\n\r\n")
        event = b'data: {"choices":[1]}\n\n'
        writer.write(b"%x\r\n%b\r\n" % (len(event), event))
        await asyncio.sleep(0.02)  # so that it is read before the rest comes
        writer.write(b"zz\r\n")
        await reader.read()

    backend = await connected(f"http://127.0.0.1:{await listening(broken)}/v1")
    with pytest.raises(Unreachable, match="before the answer was whole"):
        async with asyncio.timeout(BOUND):
            reply = await send(backend, request_)
            try:
                await reply.deliver(lambda _: True)
            finally:
                await reply.aclose()


async def test_a_stream_that_is_dropped_leaves_nothing_for_the_garbage_collector(backend, upstream):
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    event = b'data: {"choices":[1]}\n\n'
    upstream.script = raw(head + b"%x\r\n%b\r\n" % (len(event), event) * 100)
    gc.collect()
    gc.disable()
    try:
        reply = await send(backend, STREAM)
        assert reply.deliver is not None
        assert not await reply.deliver(lambda _: False)
        await reply.aclose()
        del reply
        await asyncio.sleep(0)
        assert [one for one in gc.get_objects() if isinstance(one, Response)] == []
    finally:
        gc.enable()


async def test_an_answer_without_a_length_is_complete_when_the_connection_is_closed(backend, upstream):
    upstream.script = raw(OK + b"\r\n" + BODY, then="close")
    for _ in range(2):
        assert (await send(backend)).body == BODY
    assert_connections(upstream, [0, 1])


@pytest.mark.internal_http
async def test_an_answer_without_a_length_that_ends_with_a_reset_is_incomplete(backend, upstream):
    upstream.script = raw(OK + b"\r\n" + BODY, then="reset")
    with pytest.raises(Unreachable, match="before the answer was whole"):
        await send(backend)


@pytest.mark.internal_http
async def test_a_stream_without_a_length_that_ends_with_a_reset_is_incomplete(backend, upstream):
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    upstream.script = raw(head + b'data: {"choices":[1]}\n\n', then="reset")
    reply = await send(backend, STREAM)
    assert reply.chunks is not None
    assert await anext(reply.chunks) == b'data: {"choices":[1]}\n\n'
    with pytest.raises(Unreachable, match="before the answer was whole"):
        await anext(reply.chunks)
    await reply.aclose()


@pytest.mark.parametrize("request_", [CHAT, BIG], ids=["small", "big"])
async def test_an_answer_before_the_end_of_the_upload_is_used(connected, listening, request_):
    async def too_large(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 X\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")

    backend = await connected(f"http://127.0.0.1:{await listening(too_large)}/v1")
    for _ in range(3):
        with pytest.raises(Rejected, match="413"):
            await send(backend, request_)


@pytest.mark.parametrize("way", ["close", "abort"])
async def test_an_interrupted_upload_raises_an_error(connected, listening, way):
    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        getattr(writer.transport, way)()

    backend = await connected(f"http://127.0.0.1:{await listening(cut)}/v1")
    for _ in range(3):
        with pytest.raises(Unreachable):
            await send(backend, BIG)


async def test_a_stream_that_begins_before_the_upload_ends_and_is_reset_with_it(connected, listening):
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        writer.write(head + b'17\r\ndata: {"choices":[1]}\n\n\r\n')
        cast("asyncio.Transport", writer.transport).pause_reading()
        await begun.wait()
        writer.transport.abort()  # with unread bytes of the upload: a reset
        ended.set()

    begun, ended = asyncio.Event(), asyncio.Event()
    backend = await connected(f"http://127.0.0.1:{await listening(script)}/v1")
    reply = await send(backend, Request(dialect="openai", path=CHAT.path, body=BIG.body, model="m", stream=True))
    begun.set()
    await ended.wait()
    assert reply.chunks is not None
    await anext(reply.chunks)
    if is_internal():
        async with asyncio.timeout(BOUND):
            await reply.chunks._response._sending  # whose exception nobody else would fetch: it has none
    with pytest.raises(Unreachable):
        await anext(reply.chunks)
    await reply.aclose()


@pytest.mark.parametrize("way", ["close", "abort"])
async def test_a_server_that_closes_each_new_connection_is_unreachable(connected, listening, way):
    async def drop(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        getattr(writer.transport, way)()

    backend = await connected(f"http://127.0.0.1:{await listening(drop)}/v1")
    failed = await asyncio.gather(*(send(backend) for _ in range(100)), return_exceptions=True)
    assert {type(error) for error in failed} == {Unreachable}


async def test_a_server_that_sends_first_is_not_http(connected, listening):
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.2\r\n")
        await reader.read(1)

    backend = await connected(f"http://127.0.0.1:{await listening(greet)}/v1")
    for _ in range(20):
        with pytest.raises(ServerFailed, match="not HTTP"):
            await send(backend)


async def test_a_slow_reader_does_not_delay_other_answers(backend, upstream):
    big = b'data: {"choices":["' + b"x" * 300_000 + b'"]}\n\n'
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % len(big)

    async def script(link: Link, seen: Seen) -> None:
        await (link.send(head + big) if b"stream" in seen.body else link.answer({"choices": "y" * 1_000_000}))

    upstream.script = script
    slow = await send(backend, STREAM)
    assert slow.chunks is not None
    for _ in range(3):
        assert len((await send(backend)).body) > 1_000_000
    assert b"".join([piece async for piece in slow.chunks]) == big
    await slow.aclose()


@pytest.mark.parametrize("size", [10, 1_000_000])
@pytest.mark.parametrize("reused", [False, True])
async def test_a_request_that_is_cancelled_at_any_turn_of_the_loop_leaves_nothing_behind(
    upstream, connected, size, reused
):
    backend = await connected(f"http://localhost:{upstream.port}/v1")
    request = Request(dialect="openai", path=CHAT.path, body=b"x" * size, model="m")
    for turns in range(200):
        if reused:
            await send(backend)
        sending = asyncio.create_task(backend.send(request, Timings()))
        for _ in range(turns):
            await asyncio.sleep(0)
        if sending.done():
            break
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        assert not in_use(backend)
    assert sending.done() and turns > 3
    assert (await send(backend)).status == 200
    assert not any("_send_slices" in repr(task) for task in asyncio.all_tasks())


async def test_an_address_of_ipv6_is_reached_and_named(connected, listening):
    seen = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(OK + b"Content-Length: 14\r\nConnection: close\r\n\r\n" + BODY)

    try:
        port = await listening(answer, "::1")
    except OSError:
        platform_lacks("no IPv6")
    backend = await connected(f"http://[::1]:{port}/v1")
    assert (await send(backend)).body == BODY
    assert f"\r\nHost: [::1]:{port}\r\n".encode() in seen[0]


@pytest.mark.parametrize(("key", "sent"), [(None, "Basic bWU6cEBzcw=="), ("sk-1", "Bearer sk-1")])
async def test_a_name_and_a_password_in_the_base_url_are_sent_where_there_is_no_key(upstream, connected, key, sent):
    backend = await connected(f"http://me:p%40ss@127.0.0.1:{upstream.port}/v1", key=lambda: key)
    for _ in range(2):
        await send(backend)
    assert [request.headers["authorization"] for request in upstream.seen] == [sent, sent]


def basic(text: bytes) -> str:
    return "Basic " + base64.b64encode(text).decode()


async def test_a_proxy_gets_its_own_password_with_every_request(upstream, connected, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://u:p%40w@127.0.0.1:{upstream.port}")
    monkeypatch.delenv("no_proxy", raising=False)
    backend = await connected("http://me:pw@provider.example:81/v1")
    for _ in range(2):
        await send(backend)
    for request in upstream.seen:
        assert request.path == "http://provider.example:81/v1/any/path"
        assert request.headers["host"] == "provider.example:81"
        assert request.headers["proxy-authorization"] == basic(b"u:p@w")
        assert request.headers["authorization"] == basic(b"me:pw")
    assert_connections(upstream, [0, 0])


async def test_a_proxy_that_refuses_to_tunnel_gets_no_key_and_its_status_is_reported(upstream, connected, monkeypatch):
    monkeypatch.setenv("https_proxy", f"http://u:p%40w@127.0.0.1:{upstream.port}")
    monkeypatch.delenv("no_proxy", raising=False)
    upstream.script = raw(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
    backend = await connected("https://provider.example/v1", key=lambda: "sk-secret")
    with pytest.raises(Unreachable, match=r"proxy on the way to provider\.example .*407"):
        await send(backend)
    (request,) = upstream.seen
    assert (request.method, request.path) == ("CONNECT", "provider.example:443")
    assert request.headers["proxy-authorization"] == basic(b"u:p@w")
    assert "authorization" not in request.headers


@pytest.fixture
def untrusted(tmp_path):
    """A TLS context whose certificate no authority has signed."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    openssl = real_part("openssl", "install the package openssl")
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1",
         "-subj", "/CN=localhost", "-keyout", key, "-out", certificate], check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    return context


async def test_an_untrusted_certificate_ends_the_connection_before_the_key_is_sent(connected, listening, untrusted):
    received = []

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.append(await reader.read(1))

    port = await listening(listen, ssl=untrusted)
    backend = await connected(f"https://localhost:{port}/v1", key=lambda: "sk-secret")
    for _ in range(2):
        with pytest.raises(Unreachable, match="the certificate of localhost is not to be trusted"):
            await send(backend)
    assert b"".join(received) == b""
