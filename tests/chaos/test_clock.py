"""The wall clock jumps, back and ahead, while requests wait: no deadline, wait, pace or memory goes by it."""

from __future__ import annotations

import asyncio
import time
from email.utils import formatdate

import orjson
import pytest
from scripted_upstream import CHAT_ANSWER

DAY = 86_400.0


@pytest.fixture
def wall(monkeypatch):
    """What the wall clock is wrong by, in seconds."""
    wrong = [0.0]
    real = time.time
    monkeypatch.setattr("time.time", lambda: real() + wrong[0])
    return wrong


@pytest.mark.parametrize("jump", [-DAY, DAY], ids=["back", "ahead"])
async def test_requests_that_wait_are_served_as_if_nothing_had_been(serving, provider, wall, jump, tmp_path):
    path = tmp_path / "limits.json"
    url, _ = await provider(requests_per_second=40, burst_requests=4, latency_seconds=0.02)
    sidecar = await serving(dashscope_url=url, state_file=path, deadline=20.0)
    timings = []

    async def one():
        began = asyncio.get_running_loop().time()
        async with sidecar.post() as response:
            await response.read()
            total = float(response.headers["Server-Timing"].rpartition("dur=")[2]) / 1e3
            timings.append((response.status, total, asyncio.get_running_loop().time() - began))

    asked = [asyncio.ensure_future(one()) for _ in range(24)]
    await sidecar.until(lambda: len(timings) >= 6)
    wall[0] = jump
    await asyncio.gather(*asked)
    assert [status for status, _, _ in timings] == [200] * 24
    assert all(0 <= took - told < 1.0 for _, told, took in timings)
    await sidecar.until(sidecar.at_rest)
    memory = sidecar.sidecar.parts.state_file
    memory.save()
    assert orjson.loads(path.read_bytes())["limits"][0]["learned_at"] == pytest.approx(time.time(), abs=5.0)
    # A limit that was learned "in the future" is none to go by, and nothing to fall over.
    wall[0] = jump - DAY
    again = await serving(dashscope_url=url, state_file=path)
    async with again.post() as response:
        assert response.status == 200


@pytest.mark.parametrize("wrong", [-DAY, DAY], ids=["back", "ahead"])
@pytest.mark.parametrize("dated", [True, False], ids=["with a Date", "without"])
async def test_a_retry_after_that_is_a_date_keeps_nobody_waiting_for_a_day(serving, scripted, wall, wrong, dated):
    """It is meant by the provider's clock, which its Date tells; without one a wrong clock costs seconds."""
    refusals = iter(range(2))

    async def script(link, _):
        if next(refusals, None) is None:
            return await link.answer(CHAT_ANSWER)
        now = time.time() - wall[0]
        told = f"Retry-After: {formatdate(now + 1, usegmt=True)}\r\n"
        told += f"Date: {formatdate(now, usegmt=True)}\r\n" if dated else ""
        return await link.answer({"error": {"code": "ModelUnavailable", "message": "busy"}}, 503, headers=told)

    upstream = await scripted(script)
    wall[0] = wrong
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    began = asyncio.get_running_loop().time()
    async with sidecar.post() as response:
        assert response.status == 200, await response.text()
    assert asyncio.get_running_loop().time() - began < 13.0
