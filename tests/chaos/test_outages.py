"""An upstream that fails every call for half a minute under a hundred callers: few attempts, and no herd after it.

In virtual time, around the real dispatcher, admission and simulated provider.
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
#: Until a probe has found it back: the longest step between two, and a fifth of it.
FOUND_SECONDS = 6.0


class Told(SimulatedBackend):
    """Notes when it was called."""

    def __init__(self, provider):
        super().__init__(provider)
        self.calls = []

    async def send(self, request, timings):
        self.calls.append(asyncio.get_running_loop().time())
        return await super().send(request, timings)


async def outage(seed, **profile):
    """When requests arrived and how they ended, and when calls were made; in seconds."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    provider = Provider(Profile(outages=((FROM, TO),), latency_seconds=0.2, latency_sigma=0.3, seed=seed, **profile))
    backend, admission = Told(provider), Admission([UpstreamSettings("simulated")], random=Random(seed))
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
    """The most calls in a tenth of a second."""
    return max(Counter(int(at * 10) for at in calls if start <= at < end).values())


@pytest.mark.parametrize("limits", [{}, {"requests_per_second": 60, "burst_requests": 20}], ids=["free", "limited"])
@pytest.mark.parametrize("status", [503, 500, 0])
def test_half_a_minute_of_failures_is_not_multiplied_and_no_herd_follows(status, limits):
    for seed in range(2):
        requests, calls = clock.run(outage(seed, outage_status=status, **limits))
        assert len(calls) <= 1.2 * len(requests)
        assert sum(FROM + 1.0 <= at < TO for at in calls) <= TO - FROM, "single probes"
        # What had come together meanwhile goes out no faster than a first burst to an unknown provider does.
        assert peak(calls, TO, END) <= 1.25 * peak(calls, 0.0, FROM)
        ends = Counter(end for at, end in requests if at >= TO + FOUND_SECONDS)
        assert ends["ok"] >= 0.95 * ends.total(), ends
        assert ends["ok"] > CALLERS, ends


def test_the_first_requests_that_an_outage_meets_wait_for_its_end():
    """Their attempts may fail before anybody else's has: they are given up only once it is seen that others' do not."""
    profile = Profile(latency_seconds=0.5, outages=((5.0, 15.0),))
    scenario = Scenario("", "", profile, poisson(5.0), lambda *_: [], seconds=20.0)
    for seed in range(20):
        assert set(play(scenario, seed, SYSTEMS["sidecar"]).runs[0].outcomes()) == {"ok"}
