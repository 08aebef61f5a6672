"""Two simulated providers behind one pool, on virtual time, without sockets."""

import asyncio
from dataclasses import dataclass, replace
from random import Random

from prometheus_client import CollectorRegistry

from backends.base import BackendError, Timings
from backends.simulated import Profile, Provider, SimulatedBackend
from bench.sim.systems import MODEL, Ask
from sidecar.admission import Admission, NotAdmitted, Ticket, UpstreamSettings
from sidecar.dispatch.dispatcher import DeadlineExceeded, Dispatcher
from sidecar.observe.metrics import Metrics


class Place(SimulatedBackend):
    """A simulated provider with a name of its own, that can hang: then no byte comes, whatever was sent before."""

    def __init__(self, name, **profile):
        super().__init__(Provider(Profile(**profile), history=100_000))
        self.name = name
        self.going = asyncio.Event()
        self.going.set()

    def calls(self, start=0.0, end=1e9):
        """Count the calls that arrived between these seconds from the start."""
        began = self.provider.begin()
        return sum(start <= at - began < end for at, _ in self.provider.history)

    async def send(self, request, timings):
        inner = Timings()
        timings.work_started = asyncio.get_running_loop().time()
        await self.going.wait()
        reply = await super().send(request, inner)
        await self.going.wait()
        timings.first_byte = asyncio.get_running_loop().time()
        return reply


@dataclass(frozen=True)
class Answer:
    """How one request ended."""

    camera: str
    at: float
    """Seconds from the start to its arrival."""
    seconds: float
    backend: str
    error: Exception | None
    attempts: int


class Pair:
    """A dispatcher above two providers. `tiers` are theirs."""

    def __init__(self, first, second, tiers=(1, 1), **settings):
        self.loop = asyncio.get_running_loop()
        self.places = [first, second]
        self.began = self.loop.time()
        for place in self.places:
            place.provider.begin()
        upstreams = [UpstreamSettings(one.name, tier=tier) for one, tier in zip(self.places, tiers, strict=True)]
        self.admission = Admission(upstreams, random=Random(1), **settings)
        self.dispatcher = Dispatcher(self.admission, self.places, Metrics(CollectorRegistry()))
        self.dispatcher._random.seed(1)
        self.answers = []

    async def ask(self, camera="camera", seconds=60.0):
        """Send one request and note how it ended."""
        now = self.loop.time()
        ticket = Ticket(now=now, deadline=now + seconds, key=camera, model=MODEL, tokens=300.0)
        error = None
        try:
            request = replace(Ask(camera, ticket.deadline).request(), headers={"X-Camera-Id": camera})
            await self.dispatcher.run(ticket, request)
        except (NotAdmitted, BackendError, DeadlineExceeded) as failure:
            error = failure
        answer = Answer(camera, now - self.began, self.loop.time() - now, ticket.backend, error, ticket.attempts)
        self.answers.append(answer)
        return answer

    async def arrive(self, per_second, seconds, *, deadline=60.0, cameras=10, seed=1):
        """Send Poisson arrivals for so many seconds, and wait for all answers."""
        random, end = Random(seed), self.loop.time() + seconds
        async with asyncio.TaskGroup() as tasks:
            while (wait := random.expovariate(per_second)) + self.loop.time() < end:
                await asyncio.sleep(wait)
                tasks.create_task(self.ask(f"camera-{random.randrange(cameras)}", deadline))

    async def saturate(self, workers, seconds, *, deadline=60.0, cameras=10):
        """Keep so many requests waiting or in flight."""
        end = self.loop.time() + seconds

        async def work(number):
            while self.loop.time() < end:
                await self.ask(f"camera-{number % cameras}", deadline)

        await asyncio.gather(*map(work, range(workers)))

    @property
    def lost(self):
        """The requests that got no answer."""
        return [one for one in self.answers if one.error is not None]

    def at_rest(self):
        return (self.admission.in_flight(), self.admission.waiting()) == (0, 0)
