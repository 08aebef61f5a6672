"""The wall clock jumps back or ahead while requests wait. No deadline, wait, pace or state file may depend on it."""

from __future__ import annotations

import asyncio
import signal
import time
from email.utils import formatdate

import aiohttp
import orjson
import pytest
from real_parts import real_library
from running import CHAT, Process, chat, samples
from scripted_upstream import CHAT_ANSWER

DAY = 86_400.0


@pytest.fixture
def wall(monkeypatch):
    """Return the error of the wall clock in seconds, as a list with one number that tests change."""
    offset = [0.0]
    real = time.time
    monkeypatch.setattr("time.time", lambda: real() + offset[0])
    return offset


@pytest.mark.alone
@pytest.mark.parametrize("jump", [-DAY, DAY], ids=["back", "ahead"])
async def test_a_jump_of_the_wall_clock_does_not_change_how_waiting_requests_are_served(
    serving, provider, wall, jump, tmp_path
):
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

    tasks = [asyncio.ensure_future(one()) for _ in range(24)]
    await sidecar.until(lambda: len(timings) >= 6)
    wall[0] = jump
    await asyncio.gather(*tasks)
    assert [status for status, _, _ in timings] == [200] * 24
    assert all(0 <= took - reported < 1.0 for _, reported, took in timings)
    await sidecar.until(sidecar.at_rest)
    state_file = sidecar.sidecar.parts.state_file
    state_file.save()
    assert orjson.loads(path.read_bytes())["limits"][0]["learned_at"] == pytest.approx(time.time(), abs=5.0)
    # A limit that was learned "in the future" must be ignored and must not cause an error.
    wall[0] = jump - DAY
    again = await serving(dashscope_url=url, state_file=path)
    async with again.post() as response:
        assert response.status == 200


async def test_the_clock_of_a_process_jumps_and_no_wait_limit_or_promise_changes(tmp_path, provider):
    """The real clock of a real process, through libfaketime: ahead by a day, then back by two, while requests wait."""
    clock, path = tmp_path / "clock", tmp_path / "limits.json"
    clock.write_text("+0")
    environ = {
        "LD_PRELOAD": str(real_library("*/faketime/libfaketimeMT.so.1")),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",  # the wall clock jumps; the monotonic clock never does
    }
    url, _ = await provider(requests_per_second=20, burst_requests=5, latency_seconds=0.02)
    options = ("--dashscope-url", url, "--state-file", str(path))
    async with Process(*options, environ=environ) as process, aiohttp.ClientSession() as client:

        async def ask():
            began = time.monotonic()
            async with client.post(process.url + CHAT, json=chat()) as response:
                assert response.status == 200, await response.text()
                reported = float(response.headers["Server-Timing"].rpartition("dur=")[2]) / 1e3
            took = time.monotonic() - began
            assert 0 <= took - reported < 2.0, (took, reported)
            return took

        async def limit():
            async with client.get(f"{process.admin_url}/metrics") as response:
                return samples(await response.text())['sidecar_limit_requests_per_second{backend="dashscope"}']

        for jump in ("+1d", "-1d"):
            tasks = [asyncio.ensure_future(ask()) for _ in range(20)]
            await asyncio.sleep(0.3)
            clock.write_text(jump)
            assert 0.3 < max(await asyncio.gather(*tasks)) < 8.0
        before = await limit()
        clock.write_text("+1d")
        await asyncio.sleep(0.3)
        assert await limit() == pytest.approx(before, rel=0.01)
        clock.write_text("-1d")
        process.signal(signal.SIGTERM)
        assert await process.ended() == 0
    for entry in orjson.loads(path.read_bytes())["limits"]:
        assert entry["learned_at"] == pytest.approx(time.time() - DAY, abs=60.0)


@pytest.mark.parametrize("wrong", [-DAY, DAY], ids=["back", "ahead"])
@pytest.mark.parametrize("dated", [True, False], ids=["with a Date", "without"])
async def test_a_retry_after_with_a_date_does_not_cause_a_wait_of_a_day(serving, scripted, wall, wrong, dated):
    """The date refers to the provider's clock, which `Date` shows. Without `Date`, a wrong clock costs only seconds."""
    refusals = iter(range(2))

    async def script(link, _):
        if next(refusals, None) is None:
            return await link.answer(CHAT_ANSWER)
        now = time.time() - wall[0]
        header = f"Retry-After: {formatdate(now + 1, usegmt=True)}\r\n"
        header += f"Date: {formatdate(now, usegmt=True)}\r\n" if dated else ""
        return await link.answer({"error": {"code": "ModelUnavailable", "message": "busy"}}, 503, headers=header)

    upstream = await scripted(script)
    wall[0] = wrong
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    began = asyncio.get_running_loop().time()
    async with sidecar.post() as response:
        assert response.status == 200, await response.text()
    assert asyncio.get_running_loop().time() - began < 13.0
