"""A limit that refuses with a 5xx and no words, and failures that only look like one: virtual time, real dispatcher."""

import asyncio
from collections import Counter
from math import inf
from random import Random

import pytest
from test_recovery import Load, Scripted

from backends.base import BackendError, Request, ServerFailed
from bench.sim import clock
from sidecar.admission import NotAdmitted, Ticket
from sidecar.dispatch.dispatcher import DeadlineExceeded

#: Seconds until a 5xx comes, and the limit of each world in requests/s.
FAST, LIMIT = 0.005, 10.0


class World(Load):
    """A provider that answers in 0.2 to 1 s. `refuses(now, in_flight)` decides which calls fail fast."""

    def __init__(self, refuses):
        super().__init__(Scripted("first", self._answer))
        self.refuses, self.random, self.in_flight = refuses, Random(1), 0
        self.accepted, self.refused, self.ends = [], [], Counter()
        self.upstream = self.admission.pool("model").upstreams[0]

    async def _answer(self, now):
        if self.refuses(now - self.began, self.in_flight):
            self.refused.append(now - self.began)
            await asyncio.sleep(FAST)
            raise ServerFailed("the provider answered 503: it failed", status=503)
        self.accepted.append(now - self.began)
        self.in_flight += 1
        try:
            await asyncio.sleep(self.random.uniform(0.2, 1.0))
        finally:
            self.in_flight -= 1

    async def ask(self, camera="camera", model="model", seconds=20.0):
        now = self.loop.time()
        ticket = Ticket(now=now, deadline=now + seconds, key=camera, model=model, tokens=300.0)
        try:
            await self.dispatcher.run(ticket, Request("openai", "/x", b"{}", model))
            self.ends["answered"] += 1
        except (NotAdmitted, BackendError, DeadlineExceeded) as error:
            self.ends[type(error).__name__] += 1

    def between(self, start, end):
        """Return the accepted and the refused calls between these seconds."""
        return tuple(sum(start <= at < end for at in times) for times in (self.accepted, self.refused))


class Bucket:
    """A rate limit with this burst."""

    def __init__(self, burst):
        self.burst, self.level, self.at = burst, 0.0, 0.0

    def __call__(self, now, in_flight):
        level = max(0.0, self.level - (now - self.at) * LIMIT)
        if level + 1.0 > self.burst + 1e-9:
            return True
        self.level, self.at = level + 1.0, now
        return False


def six_at_a_time(now, in_flight):
    return in_flight >= 6


@pytest.mark.parametrize("offered", [15.0, 9.0], ids=["above the limit", "below it"])
@pytest.mark.parametrize(
    ("refuses", "share"),
    [(lambda: Bucket(1), 0.9), (lambda: Bucket(6), 0.9), (lambda: six_at_a_time, 0.8)],
    ids=["no burst", "burst", "connections"],
)
def test_a_limit_without_words_is_learned_and_no_caller_sees_its_5xx(refuses, share, offered):
    async def main():
        world = World(refuses())
        await world.arrive(offered, 150.0)
        assert world.upstream.wordless.sure
        assert world.ends["ServerFailed"] == world.ends["Throttled"] == 0
        accepted, refused = world.between(60.0, 150.0)
        assert accepted >= share * min(offered, LIMIT) * 90.0
        assert refused <= 0.01 * (accepted + refused)

    clock.run(main())


@pytest.mark.parametrize("seed", range(3))
def test_failures_by_chance_leave_the_pace_alone(seed):
    async def main():
        chance = Random(seed)
        world = World(lambda now, in_flight: chance.random() < 0.05)
        await world.arrive(20.0, 120.0)
        assert world.upstream.requests.learner.limit == inf
        assert world.ends.keys() <= {"answered", "ServerFailed"}
        assert world.ends["ServerFailed"] <= 2  # by chance, one of 8,000 requests fails three times in a row

    clock.run(main())


@pytest.mark.parametrize("seed", range(3))
def test_cameras_whose_requests_always_fail_take_no_answer_from_the_others(seed):
    """Three requests in 100 fail each time. Several such requests wait at any moment, so each sees others fail too."""

    async def main():
        chance, world = Random(seed), World(lambda *_: False)
        backend, attempts = world.dispatcher.backends["first"], Counter()
        send = backend.send

        async def answer_or_fail(request, timings):
            attempts[request.path] += 1
            if request.path == "/x":
                return await send(request, timings)
            await asyncio.sleep(FAST)
            raise ServerFailed("the provider answered 500: it failed", status=500)

        async def ask_in_vain():
            now = world.loop.time()
            key = f"broken {chance.randrange(5)}"
            ticket = Ticket(now=now, deadline=now + 20.0, key=key, model="model", tokens=300.0)
            with pytest.raises((ServerFailed, NotAdmitted)):
                await world.dispatcher.run(ticket, Request("openai", "/broken", b"{}", "model"))

        backend.send = answer_or_fail
        tasks, broken = [], 0
        for number in range(1200):
            is_broken = chance.random() < 0.03
            broken += is_broken
            tasks.append(asyncio.create_task(ask_in_vain() if is_broken else world.ask(f"camera-{number % 5}")))
            await asyncio.sleep(chance.expovariate(10.0))
        await asyncio.gather(*tasks)
        assert world.ends["answered"] >= 0.98 * (1200 - broken)
        assert attempts["/broken"] <= 5 * broken
        assert world.upstream.requests.learner.limit == inf

    clock.run(main())


def test_an_outage_behind_a_known_limit_is_an_outage_and_leaves_the_limit():
    async def main():
        bucket = Bucket(6)
        world = World(lambda now, in_flight: 60.0 <= now < 75.0 or bucket(now, in_flight))
        load = asyncio.ensure_future(world.arrive(9.0, 120.0))
        await asyncio.sleep(59.0)
        before = world.upstream.requests.learner.limit
        await asyncio.sleep(10.0)
        assert world.upstream.circuit.state == "outage"
        await load
        assert sum(world.between(65.0, 75.0)) <= 10
        assert world.upstream.requests.learner.limit > 0.6 * before

    clock.run(main())


@pytest.mark.parametrize("refuses", [lambda: Bucket(6), lambda: lambda *_: False], ids=["a known limit", "no limit"])
def test_a_request_that_always_fails_ends_with_its_5xx_and_leaves_the_limit(refuses):
    async def main():
        world = World(refuses())
        load = asyncio.ensure_future(world.arrive(12.0, 90.0))
        await asyncio.sleep(60.0)
        before = world.upstream.requests.learner.limit
        now = world.loop.time()
        ticket = Ticket(now=now, deadline=now + 30.0, key="other", model="model", tokens=300.0)
        send = world.dispatcher.backends["first"].send

        async def failing(request, timings):
            if request.path == "/x":
                return await send(request, timings)
            await asyncio.sleep(FAST)
            raise ServerFailed("the provider answered 500: it failed", status=500)

        world.dispatcher.backends["first"].send = failing
        with pytest.raises(ServerFailed):
            await world.dispatcher.run(ticket, Request("openai", "/poisoned", b"{}", "model"))
        assert ticket.attempts <= 8
        assert world.upstream.requests.learner.limit >= 0.9 * before
        await load

    clock.run(main())


def test_after_an_outage_without_a_known_limit_the_pace_opens_slowly():
    """A circuit that fast 5xx opened: at first no more is sent than was accepted before."""

    async def main():
        world = World(lambda now, in_flight: 20.0 <= now < 30.0)
        await world.arrive(10.0, 60.0, deadline=30.0)
        closed = min(at for at in world.accepted if at >= 30.0)
        assert sum(world.between(closed, closed + 1.0)) <= 10
        assert sum(world.between(closed, closed + 2.0)) <= 20

    clock.run(main())
