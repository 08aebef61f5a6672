"""The HTTP backend without faults: the requests it sends, the replies it returns, its connections and its key."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
import tracemalloc

import pytest
from real_parts import only_on_linux
from scripted_upstream import BOUND, CHAT_ANSWER, Link, Seen

from backends.base import BackendError, BillingRefused, Rejected, Request, Throttled, Timings, Usage
from backends.remote.backend import DashScopeBackend

NATIVE_PATH = "/services/aigc/multimodal-generation/generation"


@pytest.fixture
async def backend(upstream):
    made = DashScopeBackend(base_url=f"{upstream.origin}/compatible-mode/v1", key=lambda: "sk-secret")
    await made.start()
    yield made
    await made.close()


def chat(body: bytes = b"{}", **fields) -> Request:
    return Request(dialect="openai", path="/chat/completions", body=body, model="qwen-vl-plus", **fields)


def native(body: bytes = b"{}", **fields) -> Request:
    return Request(dialect="native", path=NATIVE_PATH, body=body, model="qwen-vl-plus", **fields)


async def test_the_callers_bytes_reach_the_provider_untouched(backend, upstream):
    body = b'{ "model":"m",\n "unknown_field" : [1.0, 1e3, "\\u00e9"], "messages":[] }  '
    reply = await backend.send(chat(body), Timings())
    assert upstream.seen[0].body == body
    assert upstream.seen[0].method == "POST"
    assert upstream.seen[0].path == "/compatible-mode/v1/chat/completions"
    assert json.loads(reply.body) == CHAT_ANSWER
    assert reply.status == 200


async def test_only_our_key_and_the_callers_headers_are_sent(backend, upstream):
    headers = {"X-DashScope-DataInspection": '{"input":"cip"}', "x-request-id": "r-1", "traceparent": "00-a-b-01"}
    await backend.send(chat(headers=headers), Timings())
    sent = upstream.seen[0].headers
    assert sent.pop("user-agent") == "vlm-sidecar"
    assert sent.pop("connection", "close") == "close"  # the documented implementation keeps no connection
    assert sent == {
        "host": f"127.0.0.1:{upstream.port}",
        "authorization": "Bearer sk-secret",
        "accept": "*/*",
        "accept-encoding": "identity",
        "content-type": "application/json",
        "content-length": "2",
        "x-dashscope-datainspection": '{"input":"cip"}',
        "x-request-id": "r-1",
        "traceparent": "00-a-b-01",
    }


async def test_without_a_key_no_authorization_is_sent(upstream):
    backend = DashScopeBackend(base_url=f"{upstream.origin}/v1")
    await backend.start()
    await backend.send(chat(), Timings())
    await backend.close()
    assert "authorization" not in upstream.seen[0].headers


async def test_only_useful_headers_of_the_provider_are_returned(backend, upstream):
    async def script(link: Link, _: Seen) -> None:
        await link.answer(
            CHAT_ANSWER,
            headers="Set-Cookie: session=1\r\nServer: istio\r\nKeep-Alive: timeout=5\r\nX-Request-Id: up-1\r\n"
            "X-DashScope-Call-Gateway: true\r\nOpenAI-Processing-Ms: 12\r\nX-Internal: y\r\n",
        )

    upstream.script = script
    reply = await backend.send(chat(), Timings())
    assert {name.lower(): value for name, value in reply.headers.items()} == {
        "content-type": "application/json",
        "x-upstream-request-id": "up-1",
        "x-dashscope-call-gateway": "true",
        "openai-processing-ms": "12",
    }
    await backend.send(chat(), Timings())
    assert "cookie" not in upstream.seen[1].headers


async def test_usage_is_read_from_answers_in_both_dialects(backend, upstream):
    assert (await backend.send(chat(), Timings())).usage == Usage(input_tokens=1225, output_tokens=30)

    async def script(link: Link, _: Seen) -> None:
        await link.answer(
            {"output": {"text": "A gate."}, "usage": {"input_tokens": 7, "output_tokens": 2, "image_tokens": 5}}
        )

    upstream.script = script
    assert (await backend.send(native(), Timings())).usage == Usage(input_tokens=7, output_tokens=2)


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": "7"}, {"prompt_tokens": -1}, {"prompt_tokens": 2**63}])
async def test_implausible_usage_is_none(backend, upstream, usage):
    async def script(link: Link, _: Seen) -> None:
        await link.answer({**CHAT_ANSWER, "usage": usage})

    upstream.script = script
    assert (await backend.send(chat(), Timings())).usage is None


async def test_native_requests_go_to_the_native_api_of_the_same_host(backend, upstream):
    await backend.send(native(), Timings())
    assert upstream.seen[0].path == "/api/v1" + NATIVE_PATH
    assert "x-dashscope-sse" not in upstream.seen[0].headers


async def test_an_explicit_native_url_replaces_the_derived_one(upstream):
    backend = DashScopeBackend(base_url=f"{upstream.origin}/compatible-mode/v1", native_url=f"{upstream.origin}/own/")
    await backend.start()
    await backend.send(native(), Timings())
    await backend.close()
    assert upstream.seen[0].path == "/own" + NATIVE_PATH


async def test_native_requests_are_translated_if_the_server_has_no_native_api(upstream):
    backend = DashScopeBackend(base_url=f"{upstream.origin}/v1")
    await backend.start()
    body = b'{"input": {"messages": [{"role": "user", "content": [{"text": "hi"}]}]}}'
    reply = await backend.send(native(body), Timings())
    await backend.close()
    assert upstream.seen[0].path == "/v1/chat/completions"
    assert json.loads(reply.body)["output"]["choices"][0]["message"]["content"] == [{"text": "A gate."}]


async def test_the_wait_timeout_for_dashscope_follows_the_deadline(backend, upstream):
    now = asyncio.get_running_loop().time()
    await backend.send(chat(deadline=now + 30.5), Timings())
    await backend.send(chat(deadline=now + 1000), Timings())
    await backend.send(chat(deadline=now + 2.5), Timings())
    await backend.send(chat(), Timings())
    await backend.send(chat(deadline=now + 30, headers={"x-dashscope-wait-timeout": "9"}), Timings())
    waits = [request.headers.get("x-dashscope-wait-timeout") for request in upstream.seen]
    assert waits[0] in ("30", "29", "28", "27")
    assert waits[1:] == ["120", None, None, "9"]


async def test_other_servers_get_no_wait_timeout(upstream):
    backend = DashScopeBackend(base_url=f"{upstream.origin}/v1")
    await backend.start()
    await backend.send(chat(deadline=asyncio.get_running_loop().time() + 30), Timings())
    await backend.close()
    assert "x-dashscope-wait-timeout" not in upstream.seen[0].headers


@pytest.mark.internal_http
async def test_refusals_are_raised_with_the_providers_body_and_the_connection_stays_usable(backend, upstream):
    answers = [
        (429, {"code": "Throttling.RateQuota", "message": "slow down", "request_id": "r"}, "Retry-After: 2\r\n"),
        (400, {"error": {"code": "data_inspection_failed", "message": "no"}, "request_id": "r"}, ""),
        (400, {"code": "Arrearage", "message": "pay", "request_id": "r"}, ""),
    ]

    async def script(link: Link, _: Seen) -> None:
        status, body, headers = answers[len(upstream.seen) - 1]
        await link.answer(body, status=status, headers=headers)

    upstream.script = script
    with pytest.raises(Throttled) as throttled:
        await backend.send(chat(), Timings())
    assert (throttled.value.kind, throttled.value.retry_after) == ("request_rate", 2.0)
    assert json.loads(throttled.value.body) == answers[0][1]
    with pytest.raises(Rejected) as rejected:
        await backend.send(chat(), Timings())
    assert rejected.value.moderated
    with pytest.raises(BillingRefused):
        await backend.send(chat(), Timings())
    assert len(upstream.links) == 1


async def test_an_error_inside_a_200_is_raised_like_any_other_error(backend, upstream):
    async def script(link: Link, _: Seen) -> None:
        await link.answer(
            {"code": "Throttling.AllocationQuota", "message": "Allocated quota exceeded", "request_id": "r"}
        )

    upstream.script = script
    with pytest.raises(Throttled) as throttled:
        await backend.send(chat(), Timings())
    assert (throttled.value.kind, throttled.value.status) == ("token_rate", 429)


async def test_a_key_that_the_provider_quotes_is_removed_from_the_error(backend, upstream):
    async def script(link: Link, _: Seen) -> None:
        await link.answer({"error": {"message": "Incorrect API key provided: sk-secret", "code": "x"}}, status=401)

    upstream.script = script
    with pytest.raises(Rejected) as rejected:
        await backend.send(chat(), Timings())
    assert "sk-secret" not in str(rejected.value)
    assert b"sk-secret" not in rejected.value.body
    assert rejected.value.status == 401


async def test_the_list_of_models_comes_from_the_provider(backend, upstream):
    async def script(link: Link, _: Seen) -> None:
        await link.answer({"object": "list", "data": [{"id": "qwen-vl-plus"}]})

    upstream.script = script
    assert json.loads(await backend.models()) == {"object": "list", "data": [{"id": "qwen-vl-plus"}]}
    assert (upstream.seen[0].method, upstream.seen[0].path) == ("GET", "/compatible-mode/v1/models")


async def test_a_refused_list_of_models_raises_like_send(backend, upstream):
    async def script(link: Link, _: Seen) -> None:
        await link.answer({"error": {"code": "limit_requests"}}, status=429)

    upstream.script = script
    with pytest.raises(Throttled):
        await backend.models()


async def test_timings_separate_the_wait_for_a_connection_from_the_wait_for_an_answer(backend, upstream):
    released = asyncio.Event()

    async def script(link: Link, _: Seen) -> None:
        await released.wait()
        await link.answer(CHAT_ANSWER)

    upstream.script = script
    timings = Timings()
    started = asyncio.get_running_loop().time()
    sending = asyncio.create_task(backend.send(chat(), timings))
    async with asyncio.timeout(BOUND):
        await upstream.arrived.wait()
    assert timings.work_started is not None
    assert timings.first_byte is None
    answered = asyncio.get_running_loop().time()
    released.set()
    await sending
    assert started <= timings.work_started <= answered
    assert timings.first_byte is not None
    assert timings.first_byte >= answered


async def test_sixty_four_requests_are_in_flight_at_the_same_time(backend, upstream):
    all_have_arrived = asyncio.Barrier(64)

    async def script(link: Link, _: Seen) -> None:
        await all_have_arrived.wait()
        await link.answer(CHAT_ANSWER)

    upstream.script = script
    async with asyncio.timeout(BOUND):
        await asyncio.gather(*(backend.send(chat(), Timings()) for _ in range(64)))
    assert len(upstream.links) == 64


@pytest.mark.internal_http
async def test_sequential_requests_share_a_connection(backend, upstream):
    for _ in range(5):
        await backend.send(chat(), Timings())
    assert len(upstream.links) == 1


async def test_a_ten_megabyte_frame_is_sent_without_a_second_copy():
    frame = os.urandom(5_000_000).hex().encode()
    received = 0

    async def drain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal received
        await reader.readuntil(b"\r\n\r\n")
        while received < len(frame):
            piece = await reader.read(65536)
            received += len(piece)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 28\r\n\r\n")
        writer.write(b'{"choices":[{"message":{}}]}')
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(drain, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    big = DashScopeBackend(base_url=f"http://127.0.0.1:{port}/v1")
    await big.start()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        await big.send(chat(frame), Timings())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        await big.close()
        server.close()
    assert received == len(frame)
    assert peak - before < len(frame) / 2


@pytest.mark.parametrize("path", ["", "/a b", "/a HTTP/1.1\r\nX: y", "/\u00e9", "/\udcff"])
async def test_a_path_that_could_smuggle_a_request_is_not_sent(backend, upstream, path):
    with pytest.raises(Rejected, match="path"):
        await backend.send(Request(dialect="openai", path=path, body=b"{}", model="m"), Timings())
    assert upstream.seen == []


async def test_an_idle_connection_is_closed_before_a_load_balancer_closes_it(upstream, monkeypatch):
    monkeypatch.setattr("backends.http1.connecting.IDLE_SECONDS", 0.05)
    gone = asyncio.Event()

    async def script(link: Link, _: Seen) -> None:
        await link.answer(CHAT_ANSWER)
        await link.gone()
        gone.set()

    upstream.script = script
    backend = DashScopeBackend(base_url=f"{upstream.origin}/v1")
    await backend.start()
    await backend.send(chat(), Timings())
    async with asyncio.timeout(BOUND):
        await gone.wait()
    await backend.close()


@only_on_linux("the socket options have other names elsewhere")
async def test_tcp_keepalive_probes_the_connection_during_the_wait_for_an_answer(upstream, backend, monkeypatch):
    made = []

    class Recorded(socket.socket):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr("backends.http1.connecting.socket.socket", Recorded)
    await backend.send(chat(), Timings())
    client = made[0]
    assert client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
    assert [client.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [60, 30, 3, 45_000]


@pytest.mark.parametrize("url", ["dashscope.aliyuncs.com", "ftp://host/v1", "http://", ""])
def test_an_invalid_base_url_is_refused_and_named(url):
    with pytest.raises(ValueError, match=r"must be an http:// or https:// URL"):
        DashScopeBackend(base_url=url)


def test_a_base_url_with_a_query_is_refused_and_not_quoted():
    with pytest.raises(ValueError, match="no query") as caught:
        DashScopeBackend(base_url="https://host/v1?api_key=secret")
    assert "secret" not in str(caught.value)


async def test_the_proxy_of_the_environment_is_used_as_in_the_official_sdks(upstream, monkeypatch):
    monkeypatch.setenv("http_proxy", upstream.origin)
    monkeypatch.setenv("no_proxy", "direct.example")
    backend = DashScopeBackend(base_url="http://provider.example/v1")
    await backend.start()
    await backend.send(chat(), Timings())
    await backend.close()
    assert upstream.seen[0].path == "http://provider.example/v1/chat/completions"


async def test_requests_to_this_machine_never_use_a_proxy(upstream, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    backend = DashScopeBackend(base_url=f"{upstream.origin}/v1")
    await backend.start()
    await backend.send(chat(), Timings())
    await backend.close()
    assert upstream.seen[0].path == "/v1/chat/completions"


async def test_an_unsupported_proxy_makes_the_start_fail_and_is_named(monkeypatch):
    monkeypatch.setenv("https_proxy", "socks5://127.0.0.1:1080")
    monkeypatch.delenv("no_proxy", raising=False)
    backend = DashScopeBackend(base_url="https://provider.example/v1")
    with pytest.raises(BackendError, match="HTTPS_PROXY"):
        await backend.start()


async def test_a_new_key_is_sent_with_the_next_request(upstream):
    keys = ["sk-1"]
    backend = DashScopeBackend(base_url=f"{upstream.origin}/v1", key=lambda: keys[-1])
    await backend.start()
    await backend.send(chat(), Timings())
    keys.append("sk-2")
    await backend.send(chat(), Timings())
    await backend.close()
    assert [request.headers["authorization"] for request in upstream.seen] == ["Bearer sk-1", "Bearer sk-2"]


@pytest.mark.parametrize("status", [200, 429])
@pytest.mark.parametrize(("offset_ms", "plausible"), [(0, True), (-60_000, False), (60_000, False)])
async def test_reported_limits_and_the_time_of_counting_are_read(backend, upstream, status, offset_ms, plausible):
    async def script(link: Link, _: Seen) -> None:
        arrived = round(time.time() * 1000) + offset_ms
        await asyncio.sleep(0.05)
        headers = f"x-ratelimit-limit-requests: 60\r\nreq-arrive-time: {arrived}\r\n"
        body = CHAT_ANSWER if status == 200 else {"error": {"code": "limit_requests", "message": "Too fast."}}
        await link.answer(body, status=status, headers=headers)

    upstream.script = script
    timings = Timings()
    try:
        answer = await backend.send(chat(), timings)
    except Throttled as refusal:
        answer = refusal
    assert [(one.limit, one.window) for one in answer.limits] == [(60.0, 60.0)]
    if plausible:
        assert timings.work_started <= answer.counted_at <= asyncio.get_running_loop().time() - 0.04
    else:
        assert answer.counted_at is None
