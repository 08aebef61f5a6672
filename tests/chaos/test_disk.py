"""The disk is full or missing under load: serving continues, one log line reports it, no half-written file remains."""

from __future__ import annotations

import asyncio
import resource
import signal

import aiohttp
from running import CHAT, Process, chat


async def ask(client, url):
    async with client.post(url + CHAT, json=chat()) as response:
        await response.read()
        return response.status


async def test_a_full_disk_loses_only_the_learned_limits(tmp_path, provider):
    """No file can grow, as on a full disk, so the learned limits cannot be saved when the process stops."""
    path = tmp_path / "limits.json"
    url, simulated = await provider(requests_per_second=20, burst_requests=5, latency_seconds=0.02)
    async with (
        Process("--dashscope-url", url, "--state-file", str(path)) as process,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client,
    ):
        resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, (0, 0))
        tasks = [asyncio.ensure_future(ask(client, process.url)) for _ in range(40)]
        async with asyncio.timeout(10):
            while simulated.counts.ended["answered"] < 20:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        process.signal(signal.SIGTERM)
        assert await asyncio.gather(*tasks) == [200] * 40
        assert await process.ended() == 0
    assert process.log.count("SIDECAR_STATE_FILE") == 1, process.log
    assert "cannot be written: File too large" in process.log
    assert list(tmp_path.iterdir()) == []


async def test_a_missing_folder_that_appears_under_load_gets_the_state_file(tmp_path, serving, provider, monkeypatch):
    monkeypatch.setattr("sidecar.state_file.SAVE_EVERY_SECONDS", 0.02)
    folder = tmp_path / "state"
    path = folder / "limits.json"
    url, _ = await provider(requests_per_second=10, burst_requests=2, latency_seconds=0.02)
    sidecar = await serving(dashscope_url=url, state_file=path)
    saving = asyncio.create_task(sidecar.sidecar.parts.state_file.run())
    statuses = set()

    async def caller():
        while not path.exists():
            async with sidecar.post() as response:
                await response.read()
                statuses.add(response.status)

    callers = [asyncio.ensure_future(caller()) for _ in range(10)]
    await asyncio.sleep(0.5)
    folder.mkdir()
    async with asyncio.timeout(20):
        await asyncio.gather(*callers)
    assert statuses == {200}
    assert not saving.done()
    saving.cancel()
    await asyncio.gather(saving, return_exceptions=True)
