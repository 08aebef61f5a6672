"""Ten thousand mistyped names of models and cameras do not increase the number of metric series, queues or lanes."""

from __future__ import annotations

import asyncio

import aiohttp
from running import CHAT, Process, samples
from scripted_upstream import CHAT_ANSWER

from sidecar.admission.admission import MAX_POOLS

NAMES = 10_000
CALLERS = 32


async def test_10000_mistyped_models_and_cameras_leave_series_and_status_bounded(scripted):
    async def script(link, seen):
        if b"mistyped-7" in seen.body:  # some providers answer for every model name
            return await link.answer(CHAT_ANSWER)
        return await link.answer({"error": {"message": "no such model", "code": "model_not_found"}}, status=404)

    upstream = await scripted(script)
    numbers = iter(range(NAMES))
    counts = []

    async def caller(client, url):
        for number in numbers:
            body = {"model": f"mistyped-{number}", "messages": [{"role": "user", "content": "x"}]}
            headers = {"X-Camera-Id": f"camera-{number}", "X-Request-Id": f"id-{number}"}
            async with client.post(url + CHAT, json=body, headers=headers) as response:
                await response.read()
                assert response.status == (200 if str(number).startswith("7") else 404)

    async def look(client, process):
        async with client.get(f"{process.admin_url}/metrics") as response:
            series = samples(await response.text())
        async with client.get(f"{process.admin_url}/status") as response:
            status = await response.text()
        counts.append((len(series), len(status)))
        return series, status

    async with (
        Process("--dashscope-url", f"{upstream.origin}/v1") as process,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client,
    ):
        async with asyncio.timeout(90), asyncio.TaskGroup() as group:
            for _ in range(CALLERS):
                group.create_task(caller(client, process.url))
        series, status = await look(client, process)
    assert sum(value for name, value in series.items() if name.startswith("sidecar_requests_total")) == NAMES
    assert len(series) < 500, len(series)
    assert not any("camera-" in name or "id-" in name for name in series)
    assert len({name for name in series if "mistyped" in name}) <= 2 * 20
    assert status.count('"mistyped-') <= MAX_POOLS
    assert "camera-" not in status, "an idle camera is in no queue"
