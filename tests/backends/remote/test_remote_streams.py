"""Streams: the bytes are forwarded unchanged, refusals inside them are raised, and closing frees the connection."""

from __future__ import annotations

import asyncio
import itertools
import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_upstream import BOUND, CHAT_ANSWER, Link, Seen

from backends.base import BackendError, Rejected, Reply, Request, ServerFailed, Throttled, Timings, Unreachable, Usage
from backends.remote.answers import StreamWatch
from backends.remote.backend import DashScopeBackend


@pytest.fixture
async def backend(upstream):
    made = DashScopeBackend(base_url=f"{upstream.origin}/compatible-mode/v1", key=lambda: "sk-secret")
    await made.start()
    yield made
    await made.close()


OPENAI = Request(dialect="openai", path="/chat/completions", body=b"{}", model="m", stream=True)
NATIVE = Request(
    dialect="native", path="/services/aigc/multimodal-generation/generation", body=b"{}", model="m", stream=True
)


def delta(text: str, **more: object) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, "delta": {"content": text}}], **more}).encode() + b"\n\n"


OPENAI_STREAM = [
    delta("A", usage=None),
    delta('A "gate" with an "error" sign', usage=None),
    b'data: {"choices":[],"usage":{"prompt_tokens":1225,"completion_tokens":30,"total_tokens":1255}}\n\n',
    b"data: [DONE]\n\n",
]


def frame(number: int, text: str, tokens: int, newline: bytes = b"\n", reason: str = "null") -> bytes:
    data = json.dumps({"output": {"choices": [{"finish_reason": reason, "message": {"content": [{"text": text}]}}]},
                       "usage": {"input_tokens": 1225, "output_tokens": tokens}, "request_id": "r"})  # fmt: skip
    lines = [b"id:%d" % number, b"event:result", b":HTTP_STATUS/200", b"data:" + data.encode()]
    return newline.join(lines) + newline * 2


NATIVE_STREAM = [frame(1, "A", 1), frame(2, "A gate", 2), frame(3, "A gate.", 3, reason="stop")]

NATIVE_REFUSAL = (
    b"id:1\nevent:error\n:HTTP_STATUS/429\n"
    b'data:{"code":"Throttling.RateQuota","message":"Requests rate limit exceeded","request_id":"r"}\n\n'
)
OPENAI_REFUSAL = (
    b'data: {"error":{"code":"insufficient_quota","message":"Allocated quota exceeded"},"request_id":"r"}\n\n'
)


def streaming(*pieces: bytes, then: str = "end"):
    async def script(link: Link, _: Seen) -> None:
        await link.start_stream()
        for piece in pieces:
            await link.chunk(piece)
        if then == "end":
            await link.chunk(b"")
        elif then == "wait":
            await link.gone()
        elif then == "reset":
            link.reset()

    return script


async def read_all(reply: Reply) -> bytes:
    assert reply.chunks is not None
    async with asyncio.timeout(BOUND):
        received = b"".join([piece async for piece in reply.chunks])
        await reply.aclose()
    return received


async def pour_all(reply: Reply) -> bytes:
    """Read a stream with `deliver`, and pause it after every second piece."""
    taken: list[bytes] = []

    def take(piece: bytes) -> bool:
        taken.append(piece)
        return len(taken) % 2 == 1

    assert reply.deliver is not None
    async with asyncio.timeout(BOUND):
        while not await reply.deliver(take):
            pass
        await reply.aclose()
    return b"".join(taken)


either_way = pytest.mark.parametrize("read", [read_all, pour_all])


@pytest.mark.parametrize(("request_", "pieces"), [(OPENAI, OPENAI_STREAM), (NATIVE, NATIVE_STREAM)])
async def test_the_bytes_of_a_stream_are_forwarded_unchanged(backend, upstream, request_, pieces):
    upstream.script = streaming(b": ping\n\n", *pieces)
    reply = await backend.send(request_, Timings())
    assert await read_all(reply) == b": ping\n\n" + b"".join(pieces)
    assert reply.headers == {"Content-Type": "text/event-stream"}
    assert reply.body == b""


@pytest.mark.parametrize(
    ("request_", "pieces", "usage"),
    [
        (OPENAI, OPENAI_STREAM, Usage(1225, 30)),
        (NATIVE, NATIVE_STREAM, Usage(1225, 3)),
        (OPENAI, [*OPENAI_STREAM[:2], OPENAI_STREAM[3]], None),
    ],
)
async def test_the_usage_is_set_at_the_end_of_the_stream(backend, upstream, request_, pieces, usage):
    upstream.script = streaming(*pieces)
    reply = await backend.send(request_, Timings())
    assert reply.usage is None
    await read_all(reply)
    assert reply.usage == usage
    assert reply.failure is None


async def test_native_streams_are_requested_with_dashscopes_header(backend, upstream):
    upstream.script = streaming(*NATIVE_STREAM)
    await read_all(await backend.send(NATIVE, Timings()))
    upstream.script = streaming(*OPENAI_STREAM)
    await read_all(await backend.send(OPENAI, Timings()))
    assert [request.headers.get("x-dashscope-sse") for request in upstream.seen] == ["enable", None]


async def test_send_returns_at_the_first_content_while_the_stream_continues(backend, upstream):
    more = asyncio.Event()

    async def script(link: Link, _: Seen) -> None:
        await link.start_stream()
        await link.chunk(b": ping\n\n")
        await link.chunk(OPENAI_STREAM[0])
        await more.wait()
        for piece in OPENAI_STREAM[1:]:
            await link.chunk(piece)
        await link.chunk(b"")

    upstream.script = script
    async with asyncio.timeout(BOUND):
        reply = await backend.send(OPENAI, Timings())
    more.set()
    assert await read_all(reply) == b": ping\n\n" + b"".join(OPENAI_STREAM)


async def test_a_piece_is_forwarded_as_soon_as_it_arrives(backend, upstream):
    taken = asyncio.Semaphore(0)

    async def script(link: Link, _: Seen) -> None:
        await link.start_stream()
        for piece in OPENAI_STREAM:
            await link.chunk(piece)
            await taken.acquire()
        await link.chunk(b"")

    upstream.script = script
    reply = await backend.send(OPENAI, Timings())
    assert reply.chunks is not None
    received = []
    async with asyncio.timeout(BOUND):
        async for piece in reply.chunks:
            received.append(piece)
            taken.release()
    await reply.aclose()
    assert received == OPENAI_STREAM


@pytest.mark.parametrize(
    ("request_", "refusal", "kind"), [(OPENAI, OPENAI_REFUSAL, "token_rate"), (NATIVE, NATIVE_REFUSAL, "request_rate")]
)
async def test_a_refusal_instead_of_the_first_content_is_raised(backend, upstream, request_, refusal, kind):
    upstream.script = streaming(b": ping\n\n", refusal)
    with pytest.raises(Throttled) as throttled:
        await backend.send(request_, Timings())
    assert (throttled.value.kind, throttled.value.status) == (kind, 429)
    assert json.loads(throttled.value.body)["request_id"] == "r"


async def test_a_moderated_native_stream_is_rejected(backend, upstream):
    upstream.script = streaming(
        b'id:1\nevent:error\n:HTTP_STATUS/400\ndata:{"code":"DataInspectionFailed","message":"no","request_id":"r"}\n\n'
    )
    with pytest.raises(Rejected) as rejected:
        await backend.send(NATIVE, Timings())
    assert rejected.value.moderated
    assert rejected.value.status == 400


@pytest.mark.parametrize(
    ("request_", "content", "refusal"),
    [(OPENAI, OPENAI_STREAM[1], OPENAI_REFUSAL), (NATIVE, NATIVE_STREAM[0], NATIVE_REFUSAL)],
)
async def test_an_error_after_the_first_content_is_forwarded_and_recorded(
    backend, upstream, request_, content, refusal
):
    upstream.script = streaming(content, refusal)
    reply = await backend.send(request_, Timings())
    assert await read_all(reply) == content + refusal
    assert isinstance(reply.failure, Throttled)


async def test_content_and_error_in_one_piece_count_as_an_error_after_the_content(backend, upstream):
    upstream.script = streaming(OPENAI_STREAM[1] + OPENAI_REFUSAL)
    reply = await backend.send(OPENAI, Timings())
    assert await read_all(reply) == OPENAI_STREAM[1] + OPENAI_REFUSAL
    assert isinstance(reply.failure, Throttled)


async def test_a_refusal_followed_by_content_in_one_piece_is_still_a_refusal(backend, upstream):
    upstream.script = streaming(OPENAI_REFUSAL + OPENAI_STREAM[1])
    with pytest.raises(Throttled):
        await backend.send(OPENAI, Timings())


@pytest.mark.parametrize("pieces", [[], [b": ping\n\n"], [b"data: [DONE]\n\n"]])
async def test_a_stream_without_content_is_a_server_failure(backend, upstream, pieces):
    upstream.script = streaming(*pieces)
    with pytest.raises(ServerFailed, match="ended before any content"):
        await backend.send(OPENAI, Timings())


async def test_a_refusal_without_an_empty_line_at_its_end_is_found(backend, upstream):
    upstream.script = streaming(NATIVE_REFUSAL.rstrip())
    with pytest.raises(Throttled):
        await backend.send(NATIVE, Timings())


async def test_a_json_answer_to_a_streaming_request_is_read_as_json(backend, upstream):
    async def script(link: Link, _: Seen) -> None:
        answers: list[dict] = [{"code": "Throttling", "message": "", "request_id": "r"}, CHAT_ANSWER]
        await link.answer(answers[len(upstream.seen) - 1])

    upstream.script = script
    with pytest.raises(Throttled):
        await backend.send(NATIVE, Timings())
    reply = await backend.send(OPENAI, Timings())
    assert reply.chunks is None
    assert json.loads(reply.body) == CHAT_ANSWER
    await reply.aclose()


async def test_a_web_page_as_the_answer_to_a_streaming_request_is_a_server_failure(backend, upstream):
    async def script(link: Link, _: Seen) -> None:
        await link.answer(b"<html>login</html>", content_type="text/html")

    upstream.script = script
    with pytest.raises(ServerFailed, match="text/html"):
        await backend.send(OPENAI, Timings())


async def test_endless_pings_before_the_first_content_are_not_all_stored(backend, upstream):
    async def script(link: Link, _: Seen) -> None:
        await link.start_stream()
        while True:
            await link.chunk(b": ping\n\n" * 8192)

    upstream.script = script
    async with asyncio.timeout(BOUND):
        with pytest.raises(ServerFailed, match="no content"):
            await backend.send(OPENAI, Timings())
        await upstream.links[0].gone()


async def test_pour_returns_the_same_stream(backend, upstream):
    upstream.script = streaming(b": ping\n\n", *NATIVE_STREAM, NATIVE_REFUSAL)
    reply = await backend.send(NATIVE, Timings())
    assert await pour_all(reply) == b": ping\n\n" + b"".join(NATIVE_STREAM) + NATIVE_REFUSAL
    assert reply.usage == Usage(1225, 3)
    assert isinstance(reply.failure, Throttled)


@pytest.mark.internal_http
@either_way
async def test_an_exhausted_stream_returns_its_connection_to_the_pool(backend, upstream, read):
    upstream.script = streaming(*OPENAI_STREAM)
    for _ in range(3):
        await read(await backend.send(OPENAI, Timings()))
    assert len(upstream.links) == 1


@pytest.mark.internal_http
async def test_closing_an_exhausted_stream_does_not_disturb_the_next_request_on_its_connection(backend, upstream):
    upstream.script = streaming(*OPENAI_STREAM)
    first = await backend.send(OPENAI, Timings())
    async for _ in first.chunks:
        pass
    second = await backend.send(OPENAI, Timings())
    await first.aclose()
    assert await read_all(second) == b"".join(OPENAI_STREAM)
    assert len(upstream.links) == 1


@pytest.mark.parametrize("pieces_read", [0, 1])
async def test_closing_an_unfinished_stream_closes_its_connection(backend, upstream, pieces_read):
    gone = asyncio.Event()

    async def script(link: Link, _: Seen) -> None:
        await link.start_stream()
        await link.chunk(OPENAI_STREAM[0])
        await link.gone()
        gone.set()

    upstream.script = script
    reply = await backend.send(OPENAI, Timings())
    for _ in range(pieces_read):
        await anext(reply.chunks)
    await reply.aclose()
    async with asyncio.timeout(BOUND):
        await gone.wait()


async def test_a_cancelled_reader_that_closes_the_stream_closes_its_connection(backend, upstream):
    gone = asyncio.Event()

    async def script(link: Link, _: Seen) -> None:
        await link.start_stream()
        await link.chunk(OPENAI_STREAM[0])
        await link.gone()
        gone.set()

    upstream.script = script
    reply = await backend.send(OPENAI, Timings())
    await anext(reply.chunks)
    reading = asyncio.ensure_future(anext(reply.chunks))
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await reply.aclose()
    async with asyncio.timeout(BOUND):
        await gone.wait()


async def test_a_send_that_is_cancelled_before_the_first_content_closes_the_connection(backend, upstream):
    gone = asyncio.Event()
    started = asyncio.Event()

    async def script(link: Link, _: Seen) -> None:
        await link.start_stream()
        await link.chunk(b": ping\n\n")
        started.set()
        await link.gone()
        gone.set()

    upstream.script = script
    sending = asyncio.create_task(backend.send(OPENAI, Timings()))
    async with asyncio.timeout(BOUND):
        await started.wait()
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        await gone.wait()


@either_way
async def test_a_stream_that_breaks_raises_and_keeps_the_usage_so_far(backend, upstream, read):
    broken = asyncio.Event()

    async def script(link: Link, _: Seen) -> None:
        await link.start_stream()
        await link.chunk(NATIVE_STREAM[0])
        await link.chunk(NATIVE_STREAM[1])
        await broken.wait()
        link.reset()

    upstream.script = script
    reply = await backend.send(NATIVE, Timings())
    # The delay lets the reader read the received data first: a reset discards unread data.
    asyncio.get_running_loop().call_later(0.05, broken.set)
    with pytest.raises(Unreachable):
        await read(reply)
    assert reply.usage == Usage(1225, 2)
    await reply.aclose()


async def test_pour_keeps_the_order_of_a_burst_and_returns_all_its_bytes(backend, upstream):
    """The burst is larger than the read-ahead buffer: more data arrives while the callback gets the buffered data."""
    sent = b"".join(delta(f"{number} " + "x" * 5000) for number in range(240))
    begun, done = asyncio.Event(), asyncio.get_running_loop().create_future()
    taken = bytearray()

    async def script(link: Link, _: Seen) -> None:
        await link.start_stream()
        await link.chunk(delta("first"))
        await begun.wait()
        for start in range(0, len(sent), 50_000):
            await link.chunk(sent[start : start + 50_000])
        await link.gone()  # no end of the stream, because it would also flush bytes that `deliver` left behind

    def take(piece: bytes) -> bool:
        taken.extend(piece)
        if len(taken) == len(delta("first")) + len(sent):
            done.set_result(None)
        return True

    upstream.script = script
    reply = await backend.send(OPENAI, Timings())
    assert reply.deliver is not None
    delivering = asyncio.ensure_future(reply.deliver(take))
    begun.set()
    async with asyncio.timeout(BOUND):
        await done
    assert taken == delta("first") + sent
    delivering.cancel()
    await reply.aclose()


async def test_pour_passes_on_nothing_during_a_pause_or_after_an_error(backend, upstream):
    """Nothing is passed on after a pause, after an error of the callback, and after a cancellation."""
    more = asyncio.Semaphore(0)

    async def script(link: Link, _: Seen) -> None:
        await link.start_stream()
        for number in range(4):
            await link.chunk(delta(f"{number}"))
            await more.acquire()
        await link.gone()

    async def next_one() -> None:
        more.release()
        await asyncio.sleep(0.05)

    taken: list[bytes] = []

    def take_one(piece: bytes) -> bool:
        taken.append(piece)
        return False

    def fail(piece: bytes) -> bool:
        raise ConnectionResetError("the caller hung up")

    upstream.script = script
    reply = await backend.send(OPENAI, Timings())
    assert reply.deliver is not None
    assert not await reply.deliver(take_one)
    await next_one()
    assert taken == [delta("0")]
    assert not await reply.deliver(take_one)
    assert taken == [delta("0"), delta("1")]

    delivering = asyncio.ensure_future(reply.deliver(take_one))
    await asyncio.sleep(0)
    delivering.cancel()
    await next_one()
    assert delivering.cancelled()
    assert taken == [delta("0"), delta("1")]

    with pytest.raises(ConnectionResetError):
        await reply.deliver(fail)
    await next_one()
    assert not await reply.deliver(take_one)
    assert taken == [delta("0"), delta("1"), delta("3")]
    await reply.aclose()


async def test_a_slow_reader_slows_down_the_provider(backend, upstream):
    sent = 0
    piece = delta("x" * 60_000)

    async def script(link: Link, _: Seen) -> None:
        nonlocal sent
        await link.start_stream()
        try:
            async with asyncio.timeout(0.5):
                while sent < 400_000_000:
                    await link.chunk(piece)
                    sent += len(piece)
        except TimeoutError:
            stalled.set()
            await link.gone()

    stalled = asyncio.Event()
    upstream.script = script
    reply = await backend.send(OPENAI, Timings())
    async with asyncio.timeout(BOUND):
        await stalled.wait()
    await reply.aclose()
    assert sent < 40_000_000  # as much as fits into the kernel's buffers and ours, not the whole 400 MB


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges) if end > start]


STREAMS = [
    (b"".join(OPENAI_STREAM), Usage(1225, 30), None),
    (b"".join(NATIVE_STREAM), Usage(1225, 3), None),
    (b"".join(frame(i, "é\n\n", i, newline=b"\r\n") for i in range(4)), Usage(1225, 3), None),
    (b"".join(NATIVE_STREAM) + NATIVE_REFUSAL, Usage(1225, 3), "request_rate"),
    (b"".join(OPENAI_STREAM[:2]) + OPENAI_REFUSAL, None, "token_rate"),
    (OPENAI_STREAM[1] + b'data: {"object":"error","message":"died","code":500}\n\n', None, ""),
    (b"".join(NATIVE_STREAM).rstrip(), Usage(1225, 3), None),
]


@given(stream=st.sampled_from(STREAMS), cuts=st.lists(st.integers(0, 10_000), max_size=60))
def test_a_stream_is_understood_wherever_the_network_splits_it(stream, cuts):
    data, usage, kind = stream
    watch = StreamWatch()
    for piece in pieces_of(data, cuts):
        watch.feed(piece)
    watch.end()
    assert watch.has_content
    assert watch.usage == usage
    if kind is None:
        assert watch.failure is None
    else:
        assert isinstance(watch.failure, BackendError)
        assert getattr(watch.failure, "kind", "") == kind


@given(
    pieces=st.lists(
        st.binary(max_size=50) | st.sampled_from([b"\n\n", b"data:", b'"usage"', b"event:error", b'{"error"'])
    )
)
def test_the_watch_accepts_all_bytes(pieces):
    watch = StreamWatch()
    for piece in pieces:
        watch.feed(piece)
    watch.end()
    assert watch.usage is None or isinstance(watch.usage, Usage)


def test_an_endless_event_is_not_stored():
    watch = StreamWatch()
    tracemalloc.start()
    for _ in range(1000):
        watch.feed(b"x" * 10_000)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 1_000_000
    watch.feed(b"\n\n" + OPENAI_REFUSAL)
    assert isinstance(watch.failure, Throttled), "the event after the long one is read"
