"""Attacks of a hostile caller that must fail. `docs/security.md` lists the claim for each test."""

from __future__ import annotations

import asyncio
import gzip
import hmac
import json
import socket
import struct
import zlib

import pytest
from real_parts import platform_lacks
from running import CHAT, chat

from backends.http1 import accepting

pytestmark = pytest.mark.http

NOT_UTF8 = b"\xff\xfe"


async def raw(port, data: bytes) -> tuple[int, bytes]:
    """Send bytes and read until the server closes. Return the status and the whole answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    return int(answer.split(b" ", 2)[1]), answer


def request(header: bytes, path: bytes = CHAT.encode()) -> bytes:
    body = json.dumps(chat()).encode()
    return b"POST %b HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n%b\r\n\r\n%b" % (
        path, len(body), header, body,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "status"),
    [("Authorization: Bearer ", 401), ("X-Request-Id: ", 400), ("X-Request-Priority: ", 400)],
)
async def test_a_header_with_invalid_text_is_refused_with_its_name(serving, name, status):
    sidecar = await serving(api_key="letmein" if status == 401 else None)
    actual, answer = await raw(sidecar.sidecar.data_port, request(name.encode() + NOT_UTF8))
    assert actual == status, answer
    assert name.partition(":")[0].encode() in answer


@pytest.mark.parametrize("name", [b"traceparent", b"tracestate", b"X-DashScope-Extra", b"User-Agent"])
async def test_a_header_with_invalid_text_is_not_forwarded(serving, scripted, name):
    upstream = await scripted()
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    actual, answer = await raw(sidecar.sidecar.data_port, request(name + b": " + NOT_UTF8))
    assert actual == 200, answer
    assert NOT_UTF8 not in answer
    assert name.decode().lower() not in upstream.seen[0].headers or name == b"User-Agent"


async def test_the_bearer_is_compared_in_constant_time(serving, monkeypatch):
    sidecar = await serving(api_key="letmein")
    compared = []

    def compare(one, other, real=hmac.compare_digest):
        compared.append((one, other))
        return real(one, other)

    monkeypatch.setattr("sidecar.api.server.hmac.compare_digest", compare)
    async with sidecar.post(headers={"Authorization": "Bearer l"}) as response:
        assert response.status == 401
    assert compared == [(b"l", b"letmein")]


@pytest.mark.parametrize("path", [CHAT, "/api/inference/describe"])
async def test_a_compressed_body_is_refused_and_never_unpacked(serving, path):
    sidecar = await serving()
    bomb = gzip.compress(b" " * 50_000_000)
    async with sidecar.client.post(sidecar.url + path, data=bomb, headers={"Content-Encoding": "gzip"}) as response:
        assert response.status == 415
        assert "Content-Encoding" in await response.text()


async def test_a_picture_whose_header_claims_billions_of_pixels_is_not_decoded(serving, provider):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    import base64  # noqa: PLC0415

    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    bomb += chunk(b"IDAT", zlib.compress(b"\0" * 1_000_000)) + chunk(b"IEND", b"")
    sidecar = await serving()
    crop = {"label": "person", "confidence": 0.9, "bbox": [0, 0, 10, 10]}
    body = {"image_b64": base64.b64encode(bomb).decode(), "crops": [crop]}
    async with sidecar.post(body, path="/api/inference/crop-describe") as response:
        assert response.status == 400, await response.text()


@pytest.mark.parametrize("scheme", ["http://127.0.0.1:{port}/frame.jpg", "file:///etc/passwd"])
@pytest.mark.parametrize("upstream", [True, False])
async def test_an_image_url_from_a_caller_is_never_fetched(serving, scripted, scheme, upstream):
    canary, provider = await scripted(), await scripted()
    sidecar = await serving(**({"dashscope_url": f"{provider.origin}/v1"} if upstream else {}))
    url = scheme.format(port=canary.port)
    body = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}
    async with sidecar.post(body) as response:
        assert response.status == 200
        assert "root:" not in await response.text()
    assert canary.links == []


async def test_a_model_name_cannot_forge_a_metric(serving):
    sidecar = await serving()
    async with sidecar.post(chat(model='m",x="y"} 1\nforged_total 9\n')) as response:
        assert response.status == 200
    async with sidecar.client.get(f"{sidecar.admin_url}/metrics") as response:
        text = await response.text()
    assert r"forged_total 9\n" in text  # escaped, within the label
    assert not any(line.startswith("forged_total") for line in text.splitlines())


@pytest.mark.internal_http
async def test_connections_that_send_no_complete_request_are_closed(serving, monkeypatch):
    monkeypatch.setattr(accepting, "FIRST_REQUEST_SECONDS", 0.3)
    sidecar = await serving()
    for port in (sidecar.sidecar.data_port, sidecar.sidecar.admin_port):
        for sent in (b"", b"GET /livez HT", b"GET /livez HTTP/1.1\r\nHost: x\r\nX-A"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            async with asyncio.timeout(5):
                assert await reader.read() == b""
            writer.close()
    async with sidecar.client.get(f"{sidecar.admin_url}/livez") as response:
        await response.read()
        await asyncio.sleep(0.5)  # a connection that has carried a request is kept longer
    connections = len(sidecar.sidecar._admin_listener.connections)
    assert connections == 1


def held_back(names, monkeypatch, maximum=5):
    """Bound the number of connections of both listeners."""
    for name in names:
        monkeypatch.setattr(f"backends.http1.descriptors.{name}", lambda *_: maximum)


@pytest.mark.parametrize(("listener", "path"), [("data", "/health"), ("admin", "/livez")])
async def test_above_its_bound_a_listener_closes_the_connection_that_is_idle_for_the_longest_time(
    serving, monkeypatch, listener, path
):
    held_back(("data_connections", "admin_connections"), monkeypatch)
    sidecar = await serving()
    port = getattr(sidecar.sidecar, f"{listener}_port")
    get = f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    held = []
    for _ in range(5):
        held.append(await asyncio.open_connection("127.0.0.1", port))
        await asyncio.sleep(0.01)
    held[0][1].write(get)  # the first one is now the one that was used last
    await held[0][0].readuntil(b"\r\n\r\n")
    for closed in (1, 2):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(get)
        async with asyncio.timeout(5):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
            assert await held[closed][0].read() == b""
        held.append((reader, writer))
    assert len(getattr(sidecar.sidecar, f"_{listener}_listener").connections) == 5
    for _, writer in held:
        writer.transport.abort()
    await sidecar.until(lambda: not getattr(sidecar.sidecar, f"_{listener}_listener").connections)
    counted = await sidecar.metrics()
    assert counted[f'sidecar_resource_exhausted_total{{resource="{listener}_connections"}}'] == 2


async def test_if_every_connection_is_busy_the_admin_listener_closes_the_oldest_and_the_data_listener_the_new_one(
    serving, scripted, monkeypatch
):
    async def hang(link, _):
        await asyncio.sleep(30)

    held_back(("data_connections", "admin_connections"), monkeypatch, 2)
    upstream = await scripted(hang)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    viewers, callers = [], []
    for _ in range(2):
        viewers.append(await asyncio.open_connection("127.0.0.1", sidecar.sidecar.admin_port))
        viewers[-1][1].write(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await viewers[-1][0].readuntil(b"event: start")
        callers.append(await asyncio.open_connection("127.0.0.1", sidecar.sidecar.data_port))
        callers[-1][1].write(request(b"X-Camera-Id: gate"))
    await sidecar.until(lambda: sidecar.sidecar.data.in_progress == 2)
    async with sidecar.client.get(f"{sidecar.admin_url}/livez") as response:
        assert response.status == 200
    async with asyncio.timeout(5):
        while await viewers[0][0].read(65536):
            pass
        reader, writer = await asyncio.open_connection("127.0.0.1", sidecar.sidecar.data_port)
        assert await reader.read() == b""
    assert sidecar.sidecar.data.in_progress == 2
    for _, other in (*viewers, *callers, (reader, writer)):
        other.transport.abort()
    await sidecar.until(sidecar.at_rest)


async def test_if_every_connection_is_busy_one_whose_body_stalls_is_closed_for_a_new_one(
    serving, scripted, monkeypatch
):
    for module in ("accepting", "server"):
        monkeypatch.setattr(f"backends.http1.{module}.STALLED_SECONDS", 0.2)
    held_back(("data_connections",), monkeypatch, 3)
    sidecar = await serving(dashscope_url=f"{(await scripted()).origin}/v1")
    strangers = []
    for _ in range(3):
        strangers.append(await asyncio.open_connection("127.0.0.1", sidecar.sidecar.data_port))
        strangers[-1][1].write(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{" % CHAT.encode())
    await sidecar.until(lambda: sidecar.sidecar.data.in_progress == 3)
    await asyncio.sleep(0.2)
    async with sidecar.post() as response:
        assert response.status == 200
    async with asyncio.timeout(5):
        assert await strangers[0][0].read() == b""
    assert sidecar.sidecar.data.in_progress == 2
    for _, writer in strangers:
        writer.transport.abort()
    await sidecar.until(sidecar.at_rest)


async def test_a_body_that_is_incomplete_at_the_deadline_is_refused(serving):
    sidecar = await serving(deadline=0.5)
    head = b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{" % CHAT.encode()
    status, answer = await raw(sidecar.sidecar.data_port, head)
    assert (status, b"did not come within" in answer) == (408, True)
    await sidecar.until(sidecar.at_rest)


async def test_drain_is_accepted_only_from_this_machine(serving):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: it only selects the local address
            address = probe.getsockname()[0]
        except OSError:
            platform_lacks("no address except loopback")
    sidecar = await serving(admin_host="0.0.0.0")
    url = f"http://{address}:{sidecar.sidecar.admin_port}"
    async with sidecar.client.post(f"{url}/drain") as response:
        assert (response.status, "loopback" in await response.text()) == (403, True)
    async with sidecar.client.get(f"{url}/readyz") as response:
        assert (response.status, await response.text()) == (200, "ready\n")
