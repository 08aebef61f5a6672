"""Admission on virtual time: invariants that hold at whatever moment a caller leaves, and whatever the clock does."""

import asyncio
from contextlib import suppress
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from backends.base import BackendError, ServerFailed
from backends.simulated import Profile, Provider, SimulatedBackend
from bench.sim import clock
from bench.sim.systems import MODEL, Ask, Sidecar
from sidecar.admission import (
    Admission,
    NotAdmitted,
    Permit,
    QueueFull,
    Superseded,
    Ticket,
    UpstreamSettings,
    Verdict,
)
from sidecar.dispatch.dispatcher import DeadlineExceeded, Dispatcher
from sidecar.observe.metrics import Metrics


class TurningLoop(clock.VirtualLoop):
    """A virtual loop that calls `at_turn` before each iteration. Each await that waits lies between two iterations."""

    turns = 0
    at_turn = staticmethod(lambda turn: None)

    def _run_once(self):
        self.turns += 1
        self.at_turn(self.turns)
        super()._run_once()


def end_of_caller_that_leaves_at(turn):
    """Run six callers of an unreliable provider; one leaves at loop iteration `turn` (None: it stays).

    Returns the loop iteration at which that caller ended.
    """

    async def main():
        loop = asyncio.get_running_loop()
        provider = Provider(
            Profile(
                requests_per_second=3,
                burst_requests=2,
                latency_seconds=0.3,
                refusal_latency_seconds=0.05,
                error_share=0.3,
                seed=3,
            )
        )
        provider.begin()
        sidecar = Sidecar(provider, concurrency=2)
        sidecar._dispatcher._random.seed(3)  # each run has the same loop iterations
        began, ended = loop.turns, {}

        async def ask(number):
            try:
                await sidecar.ask(Ask(f"camera-{number % 2}", loop.time() + 60.0))
            finally:
                ended[number] = loop.turns - began

        callers = [loop.create_task(ask(number)) for number in range(6)]
        loop.at_turn = lambda now: callers[2].cancel() if now - began == turn else None
        results = await asyncio.gather(*callers, return_exceptions=True)
        if turn is not None:
            assert isinstance(results.pop(2), asyncio.CancelledError)
        assert all(result is None or isinstance(result, ServerFailed) for result in results), results
        admission = sidecar.admission
        assert (admission.in_flight(), admission.waiting(), admission.waiting_bytes()) == (0, 0, 0)
        return ended.get(2, 0)

    with asyncio.Runner(loop_factory=TurningLoop) as runner:
        return runner.run(main())


def test_a_caller_that_leaves_at_any_await_leaves_no_ticket_or_permit_behind():
    last = end_of_caller_that_leaves_at(None)
    assert last > 10
    for turn in range(1, last + 1):
        assert end_of_caller_that_leaves_at(turn) <= turn


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), concurrency=st.none() | st.integers(1, 4), deadline=st.floats(1.0, 20.0))
def test_the_causes_of_a_wait_sum_to_the_wait_and_the_parts_to_the_whole(seed, concurrency, deadline):
    profile = Profile(
        requests_per_second=4,
        burst_requests=3,
        latency_seconds=0.4,
        latency_sigma=0.3,
        refusal_latency_seconds=0.05,
        error_share=0.2,
        seed=seed,
    )

    async def main():
        loop = asyncio.get_running_loop()
        provider = Provider(profile)
        provider.begin()
        admission = Admission([UpstreamSettings("simulated", concurrency=concurrency)])
        dispatcher = Dispatcher(admission, [SimulatedBackend(provider)], Metrics(CollectorRegistry()))

        async def run_one(number):
            now = loop.time()
            ticket = Ticket(now=now, deadline=now + deadline, key=str(number % 3), model=MODEL, tokens=300.0)
            with suppress(NotAdmitted, BackendError, DeadlineExceeded):
                await dispatcher.run(ticket, Ask(ticket.key, ticket.deadline).request())
            dispatcher.finish(ticket, "openai", "ok")
            parts = ticket.stopwatch.seconds
            assert sum(parts.values()) == pytest.approx(loop.time() - now, abs=2e-3)
            assert sum((ticket.cause_seconds or {}).values()) == pytest.approx(parts["queue"], abs=2e-3)

        async with asyncio.TaskGroup() as tasks:
            for number in range(30):
                tasks.create_task(run_one(number))
                await asyncio.sleep(0.05)

    clock.run(main())


@settings(max_examples=60)
@given(jumps=st.lists(st.tuples(st.floats(0.01, 5.0), st.floats(0.0, 4000.0)), max_size=5))
def test_a_clock_that_jumps_ahead_ends_every_ticket_and_starts_no_burst(jumps):
    async def main():
        loop = asyncio.get_running_loop()
        admission = Admission([UpstreamSettings(requests_per_second=5.0)])
        starts = []

        def jump(seconds):
            loop.now += seconds

        async def run_one(number):
            ticket = Ticket(now=loop.time(), deadline=loop.time() + 60.0, key=str(number % 3), model="m")
            with suppress(NotAdmitted), await admission.permit(ticket) as permit:
                starts.append(permit.sent_at)  # not loop.time(): the clock may jump before this task resumes
                await asyncio.sleep(0.2)
                permit.report(Verdict("accepted", loop.time()))

        for after, seconds in jumps:
            loop.call_later(after, jump, seconds)
        async with asyncio.TaskGroup() as tasks:
            for number in range(60):
                tasks.create_task(run_one(number))
                await asyncio.sleep(0.1)
        assert (admission.in_flight(), admission.waiting()) == (0, 0)
        before = len(starts)
        await run_one(0)
        assert len(starts) == before + 1
        starts.sort()
        for first, interval_start in enumerate(starts):
            for count, at in enumerate(starts[first:], start=1):
                assert count <= 5 + 5.0 * (at - interval_start) + 1e-6

    clock.run(main())


@given(
    size=st.integers(1, 6),
    max_bytes=st.integers(0, 1000),
    bodies=st.lists(st.integers(0, 600), max_size=20),
)
def test_waiting_requests_stay_within_the_bounds(size, max_bytes, bodies):
    async def main():
        loop = asyncio.get_running_loop()
        admission = Admission([UpstreamSettings(concurrency=1)], queue_size=size, queue_bytes=max_bytes)
        occupied = [admission.enter(Ticket(now=loop.time(), deadline=loop.time() + 1e6, model=model)) for model in "01"]
        for number, body in enumerate(bodies):
            ticket = Ticket(
                now=loop.time(), deadline=loop.time() + 1e6, key=str(number), model=str(number % 2), size_bytes=body
            )
            waiting, held = admission.waiting(), admission.waiting_bytes()
            try:
                entry = admission.enter(ticket)
            except QueueFull as refusal:
                kept = size // 2 if "about to come back" in refusal.message else 0  # for refused callers
                assert waiting + kept >= size or (waiting and held + body > max_bytes)
                continue
            assert admission.waiting() <= size
            assert admission.waiting_bytes() <= max(max_bytes, *bodies)
            if isinstance(entry, Permit):
                entry.release(loop.time())
        for permit in occupied:
            permit.release(loop.time())

    clock.run(main())


def test_a_newer_frame_replaces_a_waiting_frame():
    async def main():
        loop = asyncio.get_running_loop()
        admission = Admission([UpstreamSettings(concurrency=1)])

        def enter(key="a", latest=True):
            return admission.enter(
                Ticket(now=loop.time(), deadline=loop.time() + 60.0, key=key, model="m", latest=latest)
            )

        under_way, old, other, plain = enter(), enter(), enter("b"), enter(latest=False)
        new = enter()
        with pytest.raises(Superseded):
            await old
        under_way.release(loop.time())
        for waiting in (plain, other, new):
            (await waiting).release(loop.time())

    clock.run(main())


def test_a_refused_frame_that_returns_is_superseded_by_a_newer_waiting_frame():
    async def main():
        loop = asyncio.get_running_loop()
        admission = Admission([UpstreamSettings(concurrency=1)])
        old = Ticket(now=loop.time(), deadline=loop.time() + 60.0, key="a", model="m", latest=True)
        permit = admission.enter(old)
        await asyncio.sleep(0.1)
        new = admission.enter(Ticket(now=loop.time(), deadline=loop.time() + 60.0, key="a", model="m", latest=True))
        permit.report(Verdict("refused", loop.time(), "capacity", reason="busy"))
        permit.release(loop.time())
        old.requeued = True
        with pytest.raises(Superseded):
            admission.enter(old)
        (await new).release(loop.time())
        assert admission.waiting() == 0

    clock.run(main())


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    down=st.floats(0.5, 20.0),
    window=st.booleans(),
    callers=st.integers(1, 30),
    concurrency=st.none() | st.integers(1, 6),
)
def test_while_the_circuit_is_open_one_probe_at_a_time_starts_and_permits_always_bound_the_attempts(
    seed, down, window, callers, concurrency
):
    profile = Profile(
        requests_per_second=inf if window else 5.0,
        window_requests=20.0 if window else inf,
        window_seconds=7.0,
        outages=((5.0, 5.0 + down),),
        latency_seconds=0.3,
        refusal_latency_seconds=0.1,
        error_share=0.05,
        seed=seed,
    )

    async def main():
        loop = asyncio.get_running_loop()
        provider = Provider(profile)
        provider.begin()
        sidecar = Sidecar(provider, **({} if concurrency is None else {"concurrency": concurrency}))
        (upstream,) = sidecar.admission.pool(MODEL).upstreams
        start, probes = upstream.start, []

        def checked_start(now, ticket, on_end):
            if upstream.circuit.state is not None:
                probes.append(now)
                assert upstream.circuit.may_probe(now)
            else:
                assert upstream.concurrency.in_flight < upstream.concurrency.allowed
            return start(now, ticket, on_end)

        upstream.start = checked_start

        async def run_one(number):
            with suppress(NotAdmitted, BackendError, DeadlineExceeded):
                await sidecar.ask(Ask(str(number % 4), loop.time() + 30.0))

        async with asyncio.TaskGroup() as tasks:
            for number in range(12 * callers):
                tasks.create_task(run_one(number))
                await asyncio.sleep(1.0 / callers)
        assert probes or down < 10.0 or callers < 10  # otherwise this test has tested nothing
        assert (sidecar.admission.in_flight(), sidecar.admission.waiting()) == (0, 0)

    clock.run(main())
