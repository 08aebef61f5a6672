"""The load after something went wrong, on virtual time: providers that a script describes, one real dispatcher."""

import asyncio
import weakref
from collections import Counter
from random import Random

import pytest
from prometheus_client import CollectorRegistry

from backends.base import BackendError, Rejected, Reply, Request, ServerFailed, Throttled, Usage
from bench.sim import clock
from sidecar.admission import Admission, DeadlineUnreachable, NotAdmitted, Ticket, UpstreamSettings
from sidecar.admission.admission import MAX_POOLS
from sidecar.dispatch.dispatcher import DeadlineExceeded, Dispatcher
from sidecar.observe.metrics import Metrics


class Scripted:
    """A backend whose answers a coroutine function decides: it returns, or raises the provider's error."""

    model_id = None
    slots = None

    def __init__(self, name, answer):
        self.name, self.answer, self.calls = name, answer, 0

    def unready_reason(self):
        return None

    async def send(self, request, timings):
        loop = asyncio.get_running_loop()
        timings.work_started = loop.time()
        self.calls += 1
        await self.answer(loop.time())
        timings.first_byte = loop.time()
        return Reply(200, {}, b"{}", usage=Usage(300, 20))


class Load:
    """Poisson arrivals at a dispatcher above scripted backends, in tiers by their order."""

    def __init__(self, *backends, upstreams=None):
        self.loop = asyncio.get_running_loop()
        settings = upstreams or [UpstreamSettings(one.name, tier=tier) for tier, one in enumerate(backends, 1)]
        self.admission = Admission(settings, random=Random(1))
        self.dispatcher = Dispatcher(self.admission, backends, Metrics(CollectorRegistry()))
        self.dispatcher._random.seed(1)
        self.began = self.loop.time()
        self.answered, self.lost = Counter(), 0  # answered: by the 10 s in which they were

    async def ask(self, camera="camera", model="model", seconds=60.0):
        now = self.loop.time()
        ticket = Ticket(now=now, deadline=now + seconds, key=camera, model=model, tokens=300.0)
        try:
            await self.dispatcher.run(ticket, Request("openai", "/x", b"{}", model))
        except (NotAdmitted, BackendError, DeadlineExceeded):
            self.lost += 1
        else:
            self.answered[int((self.loop.time() - self.began) // 10)] += 1

    async def arrive(self, per_second, seconds, *, deadline=60.0, model="model"):
        random, end = Random(1), self.loop.time() + seconds
        async with asyncio.TaskGroup() as tasks:
            while (wait := random.expovariate(per_second)) + self.loop.time() < end:
                await asyncio.sleep(wait)
                tasks.create_task(self.ask(f"camera-{random.randrange(10)}", model, deadline))


@pytest.mark.parametrize("answer_seconds", [1.0, 4.0, 7.0, 12.0])
def test_the_circuit_closes_again_however_long_an_answer_takes(answer_seconds):
    async def main():
        began = asyncio.get_running_loop().time()

        async def answer(now):
            if 20.0 <= now - began < 40.0:
                await asyncio.sleep(0.05)
                raise ServerFailed("down", status=500)
            await asyncio.sleep(answer_seconds)

        load = Load(Scripted("first", answer))
        await load.arrive(4.0, 200.0)
        assert load.lost == 0

    clock.run(main())


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1])
def test_a_few_failures_do_not_keep_the_load_low_after_a_capacity_refusal(share):
    async def main():
        random, began = Random(3), asyncio.get_running_loop().time()

        async def answer(now):
            if 20.0 <= now - began < 23.0:
                await asyncio.sleep(0.05)
                raise Throttled("no capacity", kind="capacity", status=503)
            await asyncio.sleep(1.0)
            if random.random() < share:
                raise ServerFailed("one of many", status=500)

        load = Load(Scripted("first", answer))
        await load.arrive(30.0, 120.0, deadline=20.0)
        assert load.lost <= 10
        assert all(load.answered[ten] >= 250 for ten in range(4, 12))

    clock.run(main())


@pytest.mark.parametrize("answer_seconds", [1.0, 3.0])
@pytest.mark.parametrize("refused_seconds", [0.5, 95.0])
def test_refusals_for_concurrency_of_every_call_leave_no_limit_behind(answer_seconds, refused_seconds):
    async def main():
        began = asyncio.get_running_loop().time()

        async def answer(now):
            await asyncio.sleep(0.05)
            if now - began < refused_seconds:
                raise Throttled("too many at once", kind="concurrency")
            await asyncio.sleep(answer_seconds)

        load = Load(Scripted("first", answer))
        await load.arrive(10.0, refused_seconds + 60.0, deadline=20.0)
        ten = int((refused_seconds + 30.0) // 10)
        assert load.answered[ten] + load.answered[ten + 1] >= 100  # half of the rate after 30 s

    clock.run(main())


def test_a_remembered_concurrency_of_one_is_only_a_guess():
    async def main():
        async def answer(now):
            await asyncio.sleep(1.0)

        load = Load(Scripted("first", answer))
        load.admission.recall("first", {"model": {"concurrency": {"limit": 1}}}, 1.0)
        await load.arrive(10.0, 60.0, deadline=20.0)
        assert load.lost == 0
        assert load.answered[3] >= 50

    clock.run(main())


@pytest.mark.parametrize("hangs", [False, True], ids=["is down", "hangs"])
def test_a_second_provider_that_is_out_makes_no_failure_of_the_first_fatal(hangs):
    async def main():
        random = Random(3)

        async def first(now):
            await asyncio.sleep(0.5)
            if random.random() < 0.05:
                raise ServerFailed("one of many", status=500)

        async def second(now):
            await asyncio.sleep(1e6 if hangs else 0.05)
            raise ServerFailed("down", status=500)

        load = Load(Scripted("first", first), Scripted("second", second))
        await load.arrive(8.0, 100.0, deadline=30.0)
        assert load.lost <= (20 if hangs else 6)  # of about 800: the probes of the second one

    clock.run(main())


@pytest.mark.parametrize(
    ("told", "error"),
    [
        (ServerFailed("down", status=500), ServerFailed),
        (Throttled("busy", kind="request_rate"), DeadlineUnreachable),
    ],
    ids=["a failure", "a refusal"],
)
def test_at_the_deadline_the_caller_gets_the_last_failure_but_never_the_last_refusal(told, error):
    async def main():
        failing = False

        async def answer(now):
            await asyncio.sleep(0.1)
            if failing:
                raise told

        load = Load(Scripted("first", answer))
        await asyncio.gather(*(load.ask() for _ in range(3)))
        failing = True
        others = [asyncio.ensure_future(load.ask(seconds=20.0)) for _ in range(10)]  # so that it is an outage
        ticket = Ticket(now=load.loop.time(), deadline=load.loop.time() + 8.0, model="model", tokens=300.0)
        with pytest.raises(error):
            await load.dispatcher.run(ticket, Request("openai", "/x", b"{}", "model"))
        await asyncio.gather(*others)

    clock.run(main())


@pytest.mark.parametrize("idle", [0, 5, 60])
def test_models_that_share_an_upstream_take_turns_however_many_are_idle(idle):
    async def main():
        async def answer(now):
            await asyncio.sleep(0.25)

        upstreams = [
            UpstreamSettings("local", concurrency=2, paced=False, only_model="it"),
            UpstreamSettings("other", tier=2, unready_reason=lambda: "it is down"),
        ]
        local, other = Scripted("local", answer), Scripted("other", answer)
        load = Load(local, other, upstreams=upstreams)
        load.admission.pool("a")
        for number in range(idle):
            load.admission.pool(f"idle-{number}")
        served = Counter()

        async def work(model):
            end = load.loop.time() + 60.0
            while load.loop.time() < end:
                await load.ask(model, model)
                served[model] += 1

        await asyncio.gather(*(work(model) for model in "ab" for _ in range(20)))
        assert 0.8 <= served["a"] / served["b"] <= 1.25

    clock.run(main())


def test_model_names_do_not_fill_the_memory_while_a_shared_upstream_is_busy():
    async def main():
        upstreams = [UpstreamSettings("own"), UpstreamSettings("local", tier=2, paced=False, only_model="it")]
        admission = Admission(upstreams)
        now = asyncio.get_running_loop().time()
        admission.recall("own", {"kept": {"requests": {"limit": 3.0, "burst": 1.0, "uncertainty": 0.1}}}, 1.0)
        first = admission.pool("first")
        ticket = Ticket(now=now, deadline=now + 60.0, model="first")
        permit = first._start(first.upstreams[1], ticket, now)
        for number in range(1000):
            admission.pool(f"model-{number}")
        models = [pool.model for pool in admission.status()]
        assert len(models) == MAX_POOLS
        assert {"first", "kept"} <= set(models)
        assert len(first.upstreams[1].on_end) == MAX_POOLS
        permit.release(now)

    clock.run(main())


def test_a_probe_that_is_answered_with_a_refusal_of_its_request_closes_the_circuit():
    """A public report of another proxy (getnora-io/nora #585): a probe answered with 404 kept its breaker half-open."""

    async def main():
        began = asyncio.get_running_loop().time()

        async def answer(now):
            await asyncio.sleep(0.1)
            if 10.0 <= now - began < 20.0:
                raise ServerFailed("down")
            if 20.0 <= now - began < 26.0:
                raise Rejected("no such model", status=404)

        load = Load(Scripted("only", answer))
        await load.arrive(5.0, 40.0)
        (status,) = load.admission.status()
        assert not status.upstreams[0].circuit.state
        assert load.answered[3] > 0.8 * 50

    clock.run(main())


def test_no_further_attempt_goes_to_a_provider_whose_circuit_the_first_attempt_has_opened():
    """A public report of another router (deltawi/deltallm #247): its attempts were A, A, A, B although A was out."""

    async def main():
        began = asyncio.get_running_loop().time()

        async def fails(now):
            await asyncio.sleep(0.1)
            if now - began > 5.0:
                raise Throttled("no room", kind="capacity", status=503)

        async def answers(now):
            await asyncio.sleep(0.1)

        first, second = Scripted("first", fails), Scripted("second", answers)
        load = Load(first, second, upstreams=[UpstreamSettings("first"), UpstreamSettings("second")])
        await load.arrive(5.0, 5.0)
        calls = first.calls
        await load.arrive(5.0, 10.0)
        assert load.lost == 0
        assert first.calls - calls <= 12  # the calls in flight, then single probes

    clock.run(main())


class Part:
    """What has arrived of an answer."""


def broken(parts):
    part = Part()
    parts.append(weakref.ref(part))
    raise ConnectionResetError  # its traceback refers to `part`


def test_a_request_that_waits_for_its_next_attempt_keeps_nothing_of_the_answer_that_broke():
    parts, failures, kept = [], [], []

    async def answer(_now):
        if failures:
            kept.append((parts[0]() is not None, len(failures[0].body)))
            return
        try:
            broken(parts)
        except ConnectionResetError as error:
            failures.append(ServerFailed("the connection broke", body=b"x" * 1_000_000))
            raise failures[0] from error

    async def main():
        load = Load(Scripted("a", answer))
        await load.ask()
        assert load.answered.total() == 1

    clock.run(main())
    assert kept == [(False, 0)]
