"""A provider that is a process of its own dies or hangs under load: no request is lost while another can answer."""

from __future__ import annotations

import asyncio
import signal
from statistics import median

from running import SimulatedProcess

#: Seconds that an answer of the provider takes.
LATENCY = 0.25


class Load:
    """Requests at even intervals, each with its arrival, its duration, its status and who answered."""

    def __init__(self, sidecar, per_second=20.0):
        self.sidecar = sidecar
        self.pause = 1.0 / per_second
        self.loop = asyncio.get_running_loop()
        self.answers = []

    async def one(self, number, options):
        began = self.loop.time()
        headers = {"X-Camera-Id": f"camera-{number % 10}", **options}
        async with self.sidecar.post(headers=headers) as response:
            await response.read()
            backend = response.headers.get("X-Sidecar-Backend", "")
            self.answers.append((began, self.loop.time() - began, response.status, backend))

    async def run(self, seconds, **options):
        """Send for so many seconds; return when all are answered. Return the answers."""
        first, end = len(self.answers), self.loop.time() + seconds
        async with asyncio.TaskGroup() as tasks:
            number = 0
            while self.loop.time() < end:
                tasks.create_task(self.one(number, options))
                number += 1
                await asyncio.sleep(self.pause)
        return self.answers[first:]

    async def until_answered_by(self, backend, seconds):
        """Send one request after the other until this backend answers one."""
        async with asyncio.timeout(seconds):
            while True:
                await self.one(0, {})
                if self.answers[-1][3] == backend:
                    return
                await asyncio.sleep(0.05)

    @property
    def lost(self):
        return [answer for answer in self.answers if answer[2] != 200]


async def test_a_provider_that_is_killed_under_load_loses_no_request(serving):
    async with SimulatedProcess("--port", "0", "--latency", str(LATENCY)) as provider:
        sidecar = await serving(backend="dashscope,simulated", dashscope_url=provider.url)
        load = Load(sidecar)
        asyncio.get_running_loop().call_later(1.5, provider.signal, signal.SIGKILL)
        await load.run(3.5)
        assert not load.lost
        assert {backend for *_, backend in load.answers} == {"dashscope", "simulated"}
        assert max(seconds for _, seconds, *_ in load.answers) <= LATENCY + 2.0
        port = str(provider.port)
    later = await load.run(1.0)
    assert not load.lost
    assert max(seconds for _, seconds, *_ in later) <= 2.0
    async with SimulatedProcess("--port", port, "--latency", str(LATENCY)):
        await load.until_answered_by("dashscope", 7.0)  # within the longest pause between two probes
        answers = await load.run(1.0)
        assert not load.lost
        assert {backend for *_, backend in answers} == {"dashscope"}
    assert sidecar.at_rest()


async def test_a_provider_that_hangs_under_load_loses_no_request(serving):
    async with SimulatedProcess("--port", "0", "--latency", str(LATENCY)) as provider:
        sidecar = await serving(backend="dashscope,simulated", dashscope_url=provider.url)
        load = Load(sidecar)
        await load.run(2.0)
        assert {backend for *_, backend in load.answers} == {"dashscope"}
        stopped = asyncio.get_running_loop().time()
        provider.signal(signal.SIGSTOP)
        try:
            await load.run(9.0)
            assert not load.lost
            # An attempt without a byte is given up after 5 s: the answers take less than a third of that.
            assert max(seconds for _, seconds, *_ in load.answers) <= 5.0 + LATENCY + 2.0
            later = [answer for answer in load.answers if answer[0] >= stopped + 5.5]
            assert len(later) >= 30
            slow = [answer for answer in later if answer[1] >= 2.0]
            assert len(slow) <= 2  # the half-open probes
            assert median(seconds for _, seconds, *_ in later) <= 0.5
        finally:
            provider.signal(signal.SIGCONT)
        await load.until_answered_by("dashscope", 12.0)
        await load.run(1.0)
        assert not load.lost
        await sidecar.until(sidecar.at_rest)


async def test_a_provider_that_hangs_loses_no_request_of_callers_that_allow_three_seconds(serving):
    async with SimulatedProcess("--port", "0", "--latency", str(LATENCY)) as provider:
        sidecar = await serving(backend="dashscope,simulated", dashscope_url=provider.url)
        load = Load(sidecar)
        await load.run(2.0)
        provider.signal(signal.SIGSTOP)
        try:
            await load.run(6.0, **{"X-Request-Timeout": "3"})
            assert not load.lost
        finally:
            provider.signal(signal.SIGCONT)
        await sidecar.until(sidecar.at_rest)
