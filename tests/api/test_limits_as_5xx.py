"""Limits that are reported as 5xx, over real sockets: callers see none of it, and the metrics count refusals."""

import asyncio
import json
from collections import Counter

import pytest
from real_parts import real_part
from running import chat, running
from scripted_upstream import CHAT_ANSWER, Upstream

from bench.real.nginx_limit import Answering, nginx, writable_folder

ENVOY = (
    b"upstream connect error or disconnect/reset before headers. reset reason: overflow",
    "text/plain",
    "x-envoy-overloaded: true\r\n",
)
ENVOY_WITHOUT_HEADER = (ENVOY[0], "text/plain", "")
OLLAMA = (
    json.dumps({"error": "server busy, please try again.  maximum pending requests exceeded"}).encode(),
    "application/json",
    "",
)


@pytest.mark.parametrize("refusal", [ENVOY, ENVOY_WITHOUT_HEADER, OLLAMA], ids=["envoy", "envoy's text", "ollama"])
async def test_a_full_server_is_counted_as_refusals_and_no_caller_sees_its_503(refusal):
    body, content_type, headers = refusal
    working = refused = 0

    async def script(link, request):
        nonlocal working, refused
        if working >= 3:
            refused += 1
            await link.answer(body, 503, content_type, headers)
            return
        working += 1
        await asyncio.sleep(0.1)
        working -= 1
        await link.answer(CHAT_ANSWER)

    async def ask():
        async with sidecar.post(chat()) as response:
            await response.read()
            return response.status

    async with Upstream(script) as upstream, running(dashscope_url=f"{upstream.origin}/v1") as sidecar:
        assert set(await asyncio.gather(*(ask() for _ in range(40)))) == {200}
        metrics = await sidecar.metrics()
    assert refused > 0
    assert metrics['sidecar_throttles_total{backend="dashscope",kind="concurrency"}'] == refused
    assert 1 <= metrics['sidecar_limit_concurrency{backend="dashscope"}'] <= 6


async def test_a_real_nginx_with_its_default_status_is_learned_as_a_limit():
    real_part("nginx")
    rate, statuses = 20.0, Counter()

    async def ask():
        async with sidecar.post(chat(), headers={"X-Request-Timeout": "60"}) as response:
            await response.read()
            statuses[response.status] += 1

    answering = await asyncio.start_server(Answering(1, 0.15).serve, "127.0.0.1", 0)
    port = answering.sockets[0].getsockname()[1]
    limit = "limit_req zone=requests burst=4 nodelay;"
    with writable_folder() as folder:
        async with (
            nginx(limit, port, folder, rate=rate) as front,
            running(dashscope_url=f"http://127.0.0.1:{front}/v1") as sidecar,
        ):
            async with asyncio.TaskGroup() as tasks:
                for number in range(200):  # groups of 5 that come at the same time, at 50/s
                    tasks.create_task(ask())
                    if number % 5 == 4:
                        await asyncio.sleep(0.1)
            metrics = await sidecar.metrics()
        refused = (folder / "access").read_text().count(" 503")
    answering.close()
    assert statuses == {200: 200}
    assert refused > 0
    assert 0 < metrics['sidecar_throttles_total{backend="dashscope",kind="unknown"}'] <= refused
    assert metrics['sidecar_limit_requests_per_second{backend="dashscope"}'] > 0.3 * rate
