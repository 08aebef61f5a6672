"""An upstream fails every call for half a minute under a hundred callers: few attempts, and no burst afterwards.

These tests run in virtual time with the real dispatcher, admission and simulated provider.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from random import Random

import pytest
from prometheus_client import CollectorRegistry

from backends.base import BackendError
from backends.simulated import Profile, Provider, SimulatedBackend
from bench.sim import clock
from bench.sim.systems import MODEL, Ask
from bench.sim.table import SYSTEMS, Scenario, play, poisson
from sidecar.admission import Admission, NotAdmitted, Ticket, UpstreamSettings
from sidecar.dispatch.dispatcher import DeadlineExceeded, Dispatcher
from sidecar.observe.metrics import Metrics

CALLERS = 100
FROM, TO, END = 10.0, 40.0, 80.0
#: Seconds from the end of the outage until a probe must have succeeded: the longest interval between two probes plus a
#: fifth.
FOUND_SECONDS = 6.0


class RecordingBackend(SimulatedBackend):
    """Records the time of each call."""

    def __init__(self, provider):
        super().__init__(provider)
        self.calls = []

    async def send(self, request, timings):
        self.calls.append(asyncio.get_running_loop().time())
        return await super().send(request, timings)


async def outage(seed, **profile):
    """Return arrival time and outcome of each request, and the time of each upstream call; times in seconds."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    provider = Provider(Profile(outages=((FROM, TO),), latency_seconds=0.2, latency_sigma=0.3, seed=seed, **profile))
    backend, admission = RecordingBackend(provider), Admission([UpstreamSettings("simulated")], random=Random(seed))
    dispatcher = Dispatcher(admission, [backend], Metrics(CollectorRegistry()))
    requests = []

    async def caller(name):
        while (now := loop.time()) < began + END:
            ticket = Ticket(now=now, deadline=now + 10.0, key=name, model=MODEL, tokens=300.0)
            wait, end = 1.0, "ok"
            try:
                await dispatcher.run(ticket, Ask(name, ticket.deadline).request())
            except (NotAdmitted, BackendError, DeadlineExceeded) as error:
                end = type(error).__name__
                wait = getattr(error, "retry_after", None) or wait
            requests.append((now - began, end))
            await asyncio.sleep(wait)

    async with asyncio.TaskGroup() as group:
        for number in range(CALLERS):
            group.create_task(caller(f"camera-{number}"))
    assert not admission.in_flight()
    assert not admission.waiting()
    return requests, [at - began for at in backend.calls]


def peak(calls, start, end):
    """Return the highest number of calls in a tenth of a second."""
    return max(Counter(int(at * 10) for at in calls if start <= at < end).values())


@pytest.mark.parametrize("limits", [{}, {"requests_per_second": 60, "burst_requests": 20}], ids=["free", "limited"])
@pytest.mark.parametrize("status", [503, 500, 0])
def test_half_a_minute_of_failures_causes_few_attempts_and_no_burst_afterwards(status, limits):
    for seed in range(2):
        requests, calls = clock.run(outage(seed, outage_status=status, **limits))
        assert len(calls) <= 1.2 * len(requests)
        assert sum(FROM + 1.0 <= at < TO for at in calls) <= TO - FROM, "single probes"
        # The queued requests are sent no faster than the first burst to an unknown provider.
        assert peak(calls, TO, END) <= 1.25 * peak(calls, 0.0, FROM)
        ends = Counter(end for at, end in requests if at >= TO + FOUND_SECONDS)
        assert ends["ok"] >= 0.95 * ends.total(), ends
        assert ends["ok"] > CALLERS, ends


def test_the_first_requests_in_an_outage_wait_for_its_end():
    """Their attempts fail first. A request may fail only after an attempt of another request has succeeded."""
    profile = Profile(latency_seconds=0.5, outages=((5.0, 15.0),))
    scenario = Scenario("", "", profile, poisson(5.0), lambda *_: [], seconds=20.0)
    for seed in range(20):
        assert set(play(scenario, seed, SYSTEMS["sidecar"]).runs[0].outcomes()) == {"ok"}
