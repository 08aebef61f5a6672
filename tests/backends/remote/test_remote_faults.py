"""The HTTP backend with faults: each fault raises the right error once, and leaves no open connection."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace
from typing import cast

import pytest
from real_parts import only_on_linux
from scripted_upstream import BOUND, CHAT_ANSWER, Link, Seen, Upstream

from backends.base import BackendError, Request, ServerFailed, Throttled, Timings, Unreachable
from backends.remote.backend import DashScopeBackend

CHAT = Request(dialect="openai", path="/chat/completions", body=b'{"prompt":"p-secret"}', model="m")


@pytest.fixture
async def upstream():
    async with Upstream() as running:
        yield running


@pytest.fixture
async def connected():
    """Create and start backends. They are closed at the end of the test."""
    made = []

    async def connect(base_url: str) -> DashScopeBackend:
        backend = DashScopeBackend(base_url=base_url, key=lambda: "sk-secret")
        await backend.start()
        made.append(backend)
        return backend

    yield connect
    for backend in made:
        await backend.close()


@pytest.fixture
async def backend(upstream, connected):
    return await connected(f"{upstream.origin}/v1")


async def failure_of(backend: DashScopeBackend, kind: type[BackendError], request: Request = CHAT) -> str:
    """Send a request and return the message of its error.

    The error must be of exactly this type, and must not contain a secret.
    """
    async with asyncio.timeout(BOUND):
        with pytest.raises(kind) as caught:
            await backend.send(request, Timings())
    assert type(caught.value) is kind
    shown = f"{caught.value} {caught.value.body!r} {dict(caught.value.headers)}"
    assert "secret" not in shown
    return str(caught.value)


def raw(data: bytes, *, then: str = "close"):
    async def script(link: Link, _: Seen) -> None:
        await link.send(data)
        if then == "close":
            link.close()
        elif then == "reset":
            link.reset()

    return script


async def test_a_refused_connection_is_unreachable(connected):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        backend = await connected(f"http://127.0.0.1:{taken.getsockname()[1]}/v1")
        assert "no connection to 127.0.0.1: " in await failure_of(backend, Unreachable)


async def test_a_name_that_does_not_resolve_is_unreachable_and_named(connected, monkeypatch):
    async def no_such_name(*_: object, **__: object) -> list[object]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr("aiohttp.resolver.ThreadedResolver.resolve", no_such_name)
    monkeypatch.setattr("aiohttp.connector.DefaultResolver.resolve", no_such_name)
    backend = await connected("http://provider.example/v1")
    assert "the name provider.example cannot be resolved" in await failure_of(backend, Unreachable)


async def test_a_server_without_tls_is_unreachable(connected):
    plain_answer = b"HTTP/1.1 400 Bad Request\r\n\r\n"

    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(plain_answer)
        writer.close()

    server = await asyncio.start_server(plain, "127.0.0.1", 0)
    backend = await connected(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
    assert "127.0.0.1" in await failure_of(backend, Unreachable)
    server.close()


@only_on_linux("only Linux drops connections when the accept queue is full")
async def test_a_connection_that_is_never_accepted_times_out(connected, monkeypatch):
    monkeypatch.setattr("backends.http1.connecting.CONNECT_SECONDS", 0.2)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for client in waiting:  # fill the accept queue; later connections are dropped, as by a firewall
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        backend = await connected(f"http://127.0.0.1:{listener.getsockname()[1]}/v1")
        timings = Timings()
        async with asyncio.timeout(BOUND):
            with pytest.raises(Unreachable, match=r"no connection to 127\.0\.0\.1 within 0\.2 s"):
                await backend.send(CHAT, timings)
        assert timings.work_started is None
        for client in waiting:
            client.close()


@pytest.mark.parametrize("then", ["close", "reset"])
async def test_a_request_on_a_new_connection_that_breaks_before_the_answer_is_not_sent_again(backend, upstream, then):
    upstream.script = raw(b"", then=then)
    assert "broke before the answer" in await failure_of(backend, Unreachable)
    assert len(upstream.seen) == 1


@pytest.mark.internal_http
@pytest.mark.parametrize("then", ["close", "reset"])
async def test_a_reused_connection_that_breaks_before_the_answer_is_replaced_once(backend, upstream, then):
    async def script(link: Link, request: Seen) -> None:
        if len(upstream.seen) == 2:
            await raw(b"", then=then)(link, request)
        else:
            await link.answer(CHAT_ANSWER)

    upstream.script = script
    await backend.send(CHAT, Timings())
    timings = Timings()
    reply = await backend.send(CHAT, timings)
    assert reply.status == 200
    assert [request.connection for request in upstream.seen] == [0, 0, 1]
    assert upstream.seen[1].body == upstream.seen[2].body == CHAT.body
    assert timings.work_started is not None


@pytest.mark.internal_http
async def test_the_replacement_is_a_new_connection_even_if_the_pool_has_idle_ones(backend, upstream):
    together = asyncio.Barrier(4)

    async def fill_the_pool(link: Link, _: Seen) -> None:
        await together.wait()
        await link.answer(CHAT_ANSWER)

    upstream.script = fill_the_pool
    await asyncio.gather(*(backend.send(CHAT, Timings()) for _ in range(4)))

    async def reset_pooled_connections(link: Link, _: Seen) -> None:
        if link.number < 4:
            link.reset()
        else:
            await link.answer(CHAT_ANSWER)

    upstream.script = reset_pooled_connections
    async with asyncio.timeout(BOUND):
        assert (await backend.send(CHAT, Timings())).status == 200
    assert len(upstream.seen) == 6
    assert upstream.seen[-1].connection == 4


@pytest.mark.internal_http
async def test_a_request_is_sent_again_only_once(backend, upstream):
    async def script(link: Link, _: Seen) -> None:
        if len(upstream.seen) == 1:
            await link.answer(CHAT_ANSWER)
        else:
            link.reset()

    upstream.script = script
    await backend.send(CHAT, Timings())
    await failure_of(backend, Unreachable)
    assert [request.connection for request in upstream.seen] == [0, 0, 1]


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n",
    ],
)
@pytest.mark.parametrize("then", ["close", "reset"])
@pytest.mark.parametrize("reused", [False, True])
async def test_an_answer_cut_short_is_unreachable_and_never_sent_again(backend, upstream, answer, then, reused):
    if reused:
        await backend.send(CHAT, Timings())
    before = len(upstream.seen)
    upstream.script = raw(answer, then=then)
    assert "broke before the answer" in await failure_of(backend, Unreachable)
    if b"\r\n\r\n" in answer and then == "close":
        assert len(upstream.seen) == before + 1


async def test_a_request_is_not_sent_again_if_its_reused_connection_breaks_within_the_headers(backend, upstream):
    await backend.send(CHAT, Timings())
    upstream.script = raw(b"HTTP/1.1 200 OK\r\nContent-Type: applic")
    await failure_of(backend, Unreachable)
    assert len(upstream.seen) == 2


@pytest.mark.parametrize("garbage", [b"SSH-2.0-OpenSSH_9.2\r\n\r\n", b"HTTP/1.1 two hundred\r\n\r\n", b"\x00" * 5000])
async def test_an_answer_that_is_not_http_is_a_server_failure(backend, upstream, garbage):
    upstream.script = raw(garbage)
    assert "not HTTP" in await failure_of(backend, ServerFailed)


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"<html>login</html>", "text/html"),
        (b"", "application/json"),
        (b'{"a":', "application/json"),
        (b"[]", "text/plain"),
    ],
)
async def test_a_200_without_json_is_a_server_failure(backend, upstream, body, content_type):
    async def script(link: Link, _: Seen) -> None:
        await link.answer(body, content_type=content_type)

    upstream.script = script
    assert f"200 with {content_type}, which is not JSON" in await failure_of(backend, ServerFailed)


async def test_a_list_of_models_without_json_is_a_server_failure(backend, upstream):
    async def script(link: Link, _: Seen) -> None:
        await link.answer(b"<html>", content_type="text/html")

    upstream.script = script
    with pytest.raises(ServerFailed, match="not JSON"):
        await backend.models()


async def test_other_paths_may_return_other_content_types(backend, upstream):
    async def script(link: Link, _: Seen) -> None:
        await link.answer(b"RIFF....", content_type="audio/wav")

    upstream.script = script
    reply = await backend.send(Request(dialect="openai", path="/audio/speech", body=b"{}", model="m"), Timings())
    assert (reply.body, reply.headers["Content-Type"], reply.usage) == (b"RIFF....", "audio/wav", None)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_a_redirect_is_not_followed(backend, upstream, status):
    async def script(link: Link, _: Seen) -> None:
        await link.answer(b"", status=status, headers=f"Location: {upstream.origin}/elsewhere?token=secret\r\n")

    upstream.script = script
    assert "redirect" in await failure_of(backend, ServerFailed)
    assert len(upstream.seen) == 1


async def test_a_cancelled_wait_for_an_answer_closes_the_connection_at_the_provider(backend, upstream):
    gone = asyncio.Event()

    async def never_answers(link: Link, _: Seen) -> None:
        await link.gone()
        gone.set()

    upstream.script = never_answers
    sending = asyncio.create_task(backend.send(CHAT, Timings()))
    async with asyncio.timeout(BOUND):
        await upstream.arrived.wait()
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        await gone.wait()


async def test_a_deadline_that_passes_during_the_body_closes_the_connection(backend, upstream):
    gone = asyncio.Event()

    async def stalls(link: Link, _: Seen) -> None:
        await link.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
        await link.gone()
        gone.set()

    upstream.script = stalls
    timings = Timings()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await backend.send(CHAT, timings)
    async with asyncio.timeout(BOUND):
        await gone.wait()


async def test_a_cancelled_upload_to_a_provider_that_does_not_read_closes_the_connection_at_once(connected):
    connection = asyncio.get_running_loop().create_future()

    async def never_reads(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        cast("asyncio.Transport", writer.transport).pause_reading()
        connection.set_result((reader, writer))

    server = await asyncio.start_server(never_reads, "127.0.0.1", 0)
    backend = await connected(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
    big = Request(dialect="openai", path="/chat/completions", body=b"x" * 50_000_000, model="m")
    sending = asyncio.create_task(backend.send(big, Timings()))
    async with asyncio.timeout(BOUND):
        reader, writer = await connection
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        writer.transport.resume_reading()
        received = 0
        try:
            while piece := await reader.read(1 << 20):
                received += len(piece)
        except ConnectionError:
            pass
    assert received < 50_000_000
    writer.close()
    server.close()


async def test_every_cancelled_request_closes_its_connection_and_the_backend_continues(backend, upstream):
    gone = 0
    all_gone = asyncio.Event()
    all_have_arrived = asyncio.Barrier(21)

    async def never_answers(link: Link, _: Seen) -> None:
        nonlocal gone
        await all_have_arrived.wait()
        await link.gone()
        gone += 1
        if gone == 20:
            all_gone.set()

    upstream.script = never_answers
    sending = [asyncio.create_task(backend.send(CHAT, Timings())) for _ in range(20)]
    async with asyncio.timeout(BOUND):
        await all_have_arrived.wait()
        for task in sending:
            task.cancel()
        await asyncio.gather(*sending, return_exceptions=True)
        await all_gone.wait()

    async def answers(link: Link, _: Seen) -> None:
        await link.answer(CHAT_ANSWER)

    upstream.script = answers
    assert (await backend.send(CHAT, Timings())).status == 200
    assert upstream.seen[-1].connection == 20


async def test_a_refusal_with_an_endless_body_is_still_a_refusal(backend, upstream, monkeypatch):
    monkeypatch.setattr("backends.remote.backend._ERROR_BODY_SECONDS", 0.05)
    gone = asyncio.Event()

    async def stalls(link: Link, _: Seen) -> None:
        await link.send(b"HTTP/1.1 429 Too Many\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
        await link.gone()
        gone.set()

    upstream.script = stalls
    await failure_of(backend, Throttled)
    async with asyncio.timeout(BOUND):
        await gone.wait()


async def test_a_refusal_with_an_incomplete_body_is_still_a_refusal(backend, upstream):
    upstream.script = raw(b"HTTP/1.1 429 Too Many\r\nContent-Length: 100\r\n\r\n{")
    await failure_of(backend, Throttled)


async def test_only_a_part_of_an_enormous_error_body_is_read(backend, upstream):
    sent = 0

    async def script(link: Link, _: Seen) -> None:
        nonlocal sent
        await link.send(b"HTTP/1.1 503 X\r\nContent-Type: text/html\r\nContent-Length: 1000000000\r\n\r\n")
        while True:
            await link.send(b"x" * 65536)
            sent += 65536

    upstream.script = script
    await failure_of(backend, ServerFailed)
    assert sent < 40_000_000


async def test_only_a_part_of_an_enormous_answer_is_read(backend, upstream):
    async def script(link: Link, _: Seen) -> None:
        await link.answer(b"[" + b"1," * 600_000 + b"1]")

    upstream.script = script
    request = replace(CHAT, max_answer_bytes=1_000_000)
    assert "longer than 1000000 bytes" in await failure_of(backend, ServerFailed, request)


async def test_an_answer_before_the_end_of_the_request_is_used_and_its_connection_closed(connected):
    closed = asyncio.Queue[int]()

    async def too_large(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 429 X\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")
        received = 0
        try:
            while piece := await reader.read(1 << 20):
                received += len(piece)
        except ConnectionError:
            pass
        closed.put_nowait(received)
        writer.transport.abort()

    server = await asyncio.start_server(too_large, "127.0.0.1", 0)
    backend = await connected(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
    big = Request(dialect="openai", path="/chat/completions", body=b"x" * 50_000_000, model="m")
    for _ in range(2):
        await failure_of(backend, Throttled, big)
        async with asyncio.timeout(BOUND):
            assert await closed.get() < 50_000_000
    server.close()
