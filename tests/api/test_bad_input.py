"""Bad input, bad callers and bad upstreams: each gets the contract's error in the API's format, and nothing leaks."""

from __future__ import annotations

import asyncio
import base64
import json
import socket

import pytest
from running import CHAT, IMAGE_URL, chat

pytestmark = pytest.mark.http


def image(url):
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


BODIES = {
    "not JSON": (b"{", None, "not JSON"),
    "not UTF-8": (b'{"messages": "\xff"}', None, "not JSON"),
    "empty": (b"", None, "not JSON"),
    "a list": (b"[]", None, "must be a JSON object"),
    "no messages": ({}, "messages", "list of at least one"),
    "messages of the wrong type": ({"messages": "hi"}, "messages", "list of at least one"),
    "no message in messages": ({"messages": []}, "messages", "list of at least one"),
    "message of the wrong type": ({"messages": ["hi"]}, "messages[0]", "must be an object"),
    "content of the wrong type": ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content", "a number"),
    "image without URL": (
        {"messages": [{"content": [{"type": "image_url"}]}]}, "messages[0].content[0].image_url.url", "not null",
    ),
    "invalid base64": (image("data:image/png;base64,$$$$"), "messages[0].content[0].image_url.url", "no image"),
    "bytes that are not an image": (
        image("data:image/png;base64," + base64.b64encode(b"just some words").decode()),
        "messages[0].content[0].image_url.url", "no image",
    ),
    "a data URL that is not base64": (image("data:image/png,abc"), "messages[0].content[0].image_url.url", "base64"),
    "model of the wrong type": (chat(model=7), "model", "a string"),
    "stream of the wrong type": (chat(stream="yes"), "stream", "true or false"),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
async def test_a_bad_body_is_refused_with_its_field_and_the_fix(serving, name):
    body, field, words = BODIES[name]
    sidecar = await serving()
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with sidecar.client.post(sidecar.url + CHAT, data=data) as response:
        error = (await response.json())["error"]
        assert (response.status, error["code"], error["param"]) == (400, "invalid_request", field)
        assert error["type"] == "invalid_request_error"
        assert words in error["message"]
    await sidecar.until(sidecar.at_rest)
    metrics = await sidecar.metrics()
    assert metrics['sidecar_requests_total{api="openai",backend="simulated",outcome="invalid"}'] == 1


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("X-Request-Timeout", "soon"),
        ("X-Request-Timeout", "-1"),
        ("X-Request-Timeout", "nan"),
        ("X-Request-Priority", "urgent"),
        ("X-Queue-Policy", "newest"),
        ("X-Camera-Id", "c" * 257),
        ("X-Request-Id", "r" * 129),
    ],
)
async def test_a_bad_header_is_refused_with_its_name(serving, header, value):
    sidecar = await serving()
    async with sidecar.post(headers={header: value}) as response:
        error = (await response.json())["error"]
        assert (response.status, error["code"], error["param"]) == (400, "invalid_request", header)
        assert header in error["message"]


@pytest.mark.parametrize("given", [None, "Bearer wrong", "Basic bGV0bWVpbg==", "letmein", "Bearer "])
async def test_a_wrong_bearer_is_refused_and_never_shown(serving, given):
    sidecar = await serving(api_key="letmein")
    async with sidecar.post(headers={"Authorization": given} if given else {}) as response:
        text = await response.text()
        assert (response.status, json.loads(text)["error"]["code"]) == (401, "unauthorized")
        assert "letmein" not in text
        assert "wrong" not in text
    async with sidecar.post(headers={"Authorization": "Bearer letmein"}) as response:
        assert response.status == 200


async def test_unknown_paths_and_wrong_methods(serving):
    sidecar = await serving()
    for method, path, status, code in [
        ("POST", "/v1/chat/completion", 404, "not_found"),
        ("GET", "/", 404, "not_found"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
    ]:
        async with sidecar.client.request(method, sidecar.url + path) as response:
            error = (await response.json())["error"]
            assert (response.status, error["code"]) == (status, code)
            assert path in error["message"]


async def raw(sidecar, data: bytes) -> bytes:
    """Send bytes and read until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", sidecar.sidecar.data_port)
    try:
        writer.write(data)
        async with asyncio.timeout(10):
            return await reader.read()
    finally:
        writer.close()


@pytest.mark.internal_http
@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"NOT HTTP\r\n\r\n", 400, "invalid_request"),
        # the start of a TLS handshake
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "invalid_request"),
        (b"POST /v1/models HTTP/1.1\r\nHost: x\r\nContent-Length: ten\r\n\r\n", 400, "invalid_request"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400, "invalid_request"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nSecret-Key: " + b"s" * 20_000 + b"\r\n\r\n", 431, "headers_too_large"),
        (b"GET /" + b"p" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431, "headers_too_large"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 1000 + b"\r\n", 431, "headers_too_large"),
    ],
    ids=["words", "TLS", "length", "lengths", "header", "path", "headers"],
)
async def test_bytes_that_are_not_http_get_one_json_error_and_a_closed_connection(serving, data, status, code, caplog):
    sidecar = await serving()
    answer = await raw(sidecar, data)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert f" {status} ".encode() in head.splitlines()[0]
    assert b"x-should-retry: false" in head.lower()
    assert json.loads(body)["error"]["code"] == code
    assert "Secret-Key" not in caplog.text


async def test_30_mb_are_refused_before_they_are_read(serving):
    sidecar = await serving()
    size = 30 * 1024 * 1024
    reader, writer = await asyncio.open_connection("127.0.0.1", sidecar.sidecar.data_port)
    writer.write(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (CHAT.encode(), size))
    writer.write(b"x" * 65536)  # the rest is never sent
    async with asyncio.timeout(5):
        head = await reader.readuntil(b"\r\n\r\n")
        assert b" 413 " in head.splitlines()[0]
        assert b"connection: close" in head.lower()
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        error = json.loads(await reader.readexactly(length))["error"]
    assert (error["code"], str(14 * 1024 * 1024) in error["message"]) == ("payload_too_large", True)
    writer.close()


async def test_a_chunked_body_above_the_limit_is_refused(serving):
    sidecar = await serving(max_body_bytes=100_000)

    async def chunks():
        for _ in range(20):
            yield b" " * 10_000

    async with sidecar.client.post(sidecar.url + CHAT, data=chunks()) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (413, "payload_too_large")


async def test_a_caller_that_expects_100_continue_gets_it(serving):
    sidecar = await serving()
    async with sidecar.post(expect100=True) as response:
        assert response.status == 200


async def test_an_http_1_0_client_gets_no_100_continue(serving):
    """An HTTP/1.0 client would read the 100 as the final answer, because HTTP/1.0 has no interim answers."""
    sidecar = await serving()
    body = json.dumps(chat()).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", sidecar.sidecar.data_port)
    writer.write(b"POST %b HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n" % (CHAT.encode(), len(body)))
    writer.write(body)
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.0 200 OK\r\n")


async def test_an_unreachable_upstream_is_502_and_names_the_host(serving):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening, so that no other process gets the port
        sidecar = await serving(dashscope_url=f"http://127.0.0.1:{unused.getsockname()[1]}/v1")
        async with sidecar.post() as response:
            error = (await response.json())["error"]
            assert (response.status, error["code"]) == (502, "upstream_error")
            assert "127.0.0.1" in error["message"]
    await sidecar.until(sidecar.at_rest)


async def answer_html(link, _):
    await link.answer(b"<html>Welcome to nginx</html>", content_type="text/html")


async def cut_the_body(link, _):
    await link.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{")
    link.close()


async def never_answer(link, _):
    await link.gone()


@pytest.mark.parametrize(
    ("script", "status", "code"),
    [
        (answer_html, 502, "upstream_error"),
        (cut_the_body, 502, "upstream_error"),
        (never_answer, 504, "deadline_exceeded"),
    ],
)
async def test_a_faulty_upstream_gives_the_contracts_error(serving, scripted, script, status, code):
    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    async with sidecar.post(headers={"X-Request-Timeout": "1.5"}) as response:
        error = (await response.json())["error"]
        assert (response.status, error["code"], error["type"]) == (status, code, "server_error")
        assert "nginx" not in error["message"]
    await sidecar.until(sidecar.at_rest)
    assert len(upstream.seen) <= 3


async def test_a_billing_refusal_is_sent_once_more_and_then_every_request_fails_with_its_reason(serving, provider):
    url, simulated = await provider(billing_refused=True)
    sidecar = await serving(dashscope_url=url)
    for _ in range(5):
        async with sidecar.post() as response:
            error = (await response.json())["error"]
            assert (response.status, error["code"]) == (502, "upstream_billing")
            assert "(Arrearage): the account has no money" in error["message"]
    assert simulated.counts.calls == 2


async def test_a_moderation_refusal_reaches_the_caller_unchanged_after_one_attempt(serving, provider):
    url, simulated = await provider(moderation_share=1.0)
    sidecar = await serving(dashscope_url=url)
    async with sidecar.post() as response:
        assert response.status == 400
        assert (await response.json())["error"]["code"] == "data_inspection_failed"
    assert simulated.counts.calls == 1
    name = 'sidecar_requests_total{api="openai",backend="dashscope",outcome="moderated"}'
    await sidecar.until(sidecar.at_rest)
    assert (await sidecar.metrics())[name] == 1


async def test_no_error_and_no_log_line_contains_an_image_or_a_prompt(serving, caplog):
    caplog.set_level("DEBUG")
    sidecar = await serving()
    secret = "the prompt nobody may see"
    async with sidecar.post(chat(secret, stream="yes")) as response:
        text = await response.text()
    async with sidecar.post(image("data:image/png;base64," + "QUJD" * 40)) as response:
        text += await response.text()
    for leak in (secret, "QUJDQUJD", IMAGE_URL[30:60]):
        assert leak not in text + caplog.text
