"""One queue above several upstreams: who gets which permit, and what a retry in the queue is subject to."""

import asyncio
import contextlib
import gc
from inspect import signature
from math import inf
from unittest import mock

import pytest
from steps import count_lines

from bench.sim import clock
from sidecar.admission import (
    AccountClosed,
    Admission,
    CircuitState,
    DeadlineUnreachable,
    Draining,
    QueueFull,
    QuotaClosed,
    StillFailing,
    Superseded,
    Ticket,
    Upstream,
    UpstreamSettings,
    Verdict,
)
from sidecar.admission.gates.concurrency import ConcurrencyGate
from sidecar.admission.gates.rate import RateGate
from sidecar.admission.pool import Pool

MODEL = "m"


class Bench:
    """An admission with its upstreams, and what tests do with tickets. Names of upstreams: "a", "b", …"""

    def __init__(self, *upstreams, **settings):
        self.loop = asyncio.get_running_loop()
        self.admission = Admission(upstreams, **settings)
        self.upstreams = {one.name: one for one in self.admission.pool(MODEL).upstreams}
        for upstream in self.upstreams.values():  # until the first answer, attempts are spaced
            upstream.start(self.loop.time(), self.ticket(), lambda permit: None).report(
                Verdict("accepted", self.loop.time())
            )

    def ticket(self, key="camera", seconds=60.0, model=MODEL, **options):
        now = self.loop.time()
        return Ticket(now=now, deadline=now + seconds, key=key, model=model, **options)

    def enter(self, ticket=None, **options):
        """Enter a ticket; return its permit, or the future of its permit."""
        return self.admission.enter(ticket or self.ticket(**options))

    def at_once(self, ticket=None, **options):
        """Enter a ticket that must get its permit in the same call."""
        entry = self.enter(ticket, **options)
        if isinstance(entry, asyncio.Future):
            assert entry.done(), "it has to wait"
            entry = entry.result()
        return entry

    def report(self, permit, outcome, **details):
        permit.report(Verdict(outcome, self.loop.time(), **details))

    def fail(self, name, state=CircuitState.OUTAGE):
        """Make an upstream's circuit open."""
        self.upstreams[name].circuit.open(self.loop.time(), state, "down")

    def fill(self, name):
        """Occupy every place of an upstream; return the permits."""
        upstream, permits = self.upstreams[name], []
        while upstream.concurrency.in_flight < upstream.concurrency.allowed:
            permits.append(upstream.start(self.loop.time(), self.ticket(), self.admission.pool(MODEL)._ended))
        return permits

    def requeued(self, *tried, seconds=60.0, pause=0.0, **options):
        """A ticket that comes back from an attempt, and must not go to the upstreams in `tried`."""
        ticket = self.ticket(seconds=seconds, **options)
        ticket.requeued, ticket.not_before = True, self.loop.time() + pause
        ticket.tried = tuple(self.upstreams[name] for name in tried)
        return ticket

    def at_rest(self):
        return (self.admission.in_flight(), self.admission.waiting(), self.admission.waiting_bytes()) == (0, 0, 0)


def virtual(test):
    """Run a test on virtual time."""

    def run(**arguments):
        clock.run(test(**arguments))

    run.__name__, run.__doc__, run.__signature__ = test.__name__, test.__doc__, signature(test)
    return run


# -- a ticket that may go only to one upstream -----------------------------------------------------------------------


@virtual
async def test_a_ticket_that_only_a_closed_upstream_may_take_delays_no_other_ticket():
    bench = Bench(UpstreamSettings("a"), UpstreamSettings("b"))
    bench.fail("a", CircuitState.BLACKOUT)
    waiting = bench.enter(bench.requeued("b"))
    assert not waiting.done()
    for number in range(10):
        permit = bench.at_once(key=f"camera-{number}")
        assert permit.upstream is bench.upstreams["b"]
        bench.report(permit, "accepted")
        assert not waiting.done()
    await asyncio.sleep(0.7)
    permit = await waiting  # the half-open probe
    assert permit.upstream is bench.upstreams["a"]
    bench.report(permit, "accepted")
    assert bench.at_rest()


@virtual
async def test_tickets_of_the_same_camera_are_not_delayed_by_it_either():
    bench = Bench(UpstreamSettings("a"), UpstreamSettings("b", concurrency=1))
    bench.fail("a", CircuitState.BLACKOUT)
    waiting = bench.enter(bench.requeued("b"))
    first = bench.at_once()
    entries = [bench.enter() for _ in range(5)]
    bench.report(first, "accepted")
    for entry in entries:
        assert entry.done()  # the freed place went to the next ticket in the same call
        assert entry.result().upstream is bench.upstreams["b"]
        bench.report(entry.result(), "accepted")
    assert not waiting.done()
    bench.admission.pool(MODEL).leave(_ticket_of(bench, waiting))
    assert bench.at_rest()


def _ticket_of(bench, entry):
    pool = bench.admission.pool(MODEL)
    return next(ticket for ticket in pool.waiting.tickets if ticket.permit is entry)


@virtual
async def test_a_ticket_that_may_go_only_to_one_upstream_goes_before_tickets_that_may_go_to_others():
    bench = Bench(UpstreamSettings("a", concurrency=1), UpstreamSettings("b", concurrency=1))
    (a,), (b,) = bench.fill("a"), bench.fill("b")
    anywhere = [bench.enter(key=str(number)) for number in range(3)]
    only_b = bench.enter(bench.requeued("a"))
    bench.report(a, "accepted")
    assert [entry.done() for entry in anywhere] == [True, False, False]
    assert not only_b.done()
    bench.report(b, "accepted")
    assert only_b.done()
    assert only_b.result().upstream is bench.upstreams["b"]


@virtual
async def test_an_upstream_for_which_a_large_restricted_ticket_waits_takes_no_small_ticket_before_it():
    bench = Bench(UpstreamSettings("a", concurrency=1), UpstreamSettings("b", tokens_per_second=1000.0))
    (held,) = bench.fill("a")
    large = bench.enter(bench.requeued("a", tokens=5000.0))
    small = bench.enter(key="small", tokens=1.0)  # its LLM tokens would be there sooner
    assert not small.done()
    permit = await large
    assert not small.done()
    for one in (held, permit):
        bench.report(one, "accepted")
    bench.report(await small, "accepted")
    assert bench.at_rest()


@virtual
async def test_an_open_upstream_that_failed_the_ticket_before_does_not_get_it_again_while_the_other_works():
    bench = Bench(UpstreamSettings("a"), UpstreamSettings("b", concurrency=1))
    (permit,) = bench.fill("b")
    entry = bench.enter(bench.requeued("a"))
    await asyncio.sleep(5.0)
    assert not entry.done()
    bench.report(permit, "accepted")
    permit = await entry
    assert permit.upstream is bench.upstreams["b"]
    bench.report(permit, "accepted")
    assert bench.at_rest()


@pytest.mark.parametrize("state", [CircuitState.OUTAGE, CircuitState.CAPACITY, CircuitState.BILLING])
@virtual
async def test_a_ticket_goes_back_to_an_upstream_that_failed_it_while_no_other_can_answer(state):
    bench = Bench(UpstreamSettings("a", concurrency=1), UpstreamSettings("b", concurrency=1))
    bench.fail("b", state)
    permit = bench.at_once(bench.requeued("a"))  # it arrives while b is out
    assert permit.upstream is bench.upstreams["a"]
    bench.report(permit, "accepted")
    bench.report((await _probe(bench, "b")), "accepted")

    (a,), (b,) = bench.fill("a"), bench.fill("b")
    waits_for_b, anywhere = bench.enter(bench.requeued("a")), bench.enter(key="another")
    bench.report(a, "accepted")
    assert anywhere.done()
    bench.fail("b", state)  # it waits for b when b fails
    bench.report(anywhere.result(), "accepted")
    assert waits_for_b.done()
    assert waits_for_b.result().upstream is bench.upstreams["a"]
    bench.report(waits_for_b.result(), "accepted")
    b.release(bench.loop.time())
    assert bench.at_rest()


async def _probe(bench, name):
    """Wait until the upstream may get a probe, and start it."""
    upstream = bench.upstreams[name]
    await asyncio.sleep(upstream.circuit.next_probe - bench.loop.time())
    return upstream.start(bench.loop.time(), bench.ticket(), lambda permit: None)


async def close_account(bench, permit):
    """Refuse the account at the permit's upstream, and then also to the only probe."""
    bench.report(permit, "account", reason="no money")
    permit.ticket.requeued = permit.ticket.doubted = True
    probe = await bench.enter(permit.ticket)
    assert (probe.ticket, probe.upstream) == (permit.ticket, permit.upstream)
    bench.report(probe, "account", reason="no money")


@virtual
async def test_a_failed_ticket_may_be_the_probe_of_another_upstream_and_then_go_back():
    bench = Bench(UpstreamSettings("a"), UpstreamSettings("b"))
    bench.fail("b")
    await asyncio.sleep(5.0)
    permit = bench.at_once(bench.requeued("a"))
    assert permit.upstream is bench.upstreams["b"]
    bench.report(permit, "failed")
    assert bench.admission.pool(MODEL).has_another(permit.ticket, permit.upstream)  # a may be tried again
    assert bench.at_rest()


@virtual
async def test_a_ticket_is_not_sent_away_to_an_upstream_that_refuses_the_account():
    bench = Bench(UpstreamSettings("a"), UpstreamSettings("b"))
    bench.fail("b", CircuitState.BILLING)
    permit = bench.at_once()
    await asyncio.sleep(40.0)  # a probe of b may be sent now, but would hardly be answered
    assert not bench.admission.pool(MODEL).has_another(permit.ticket, permit.upstream)
    bench.report(permit, "accepted")
    assert bench.at_rest()


@virtual
async def test_when_an_upstream_closes_the_tickets_that_waited_for_it_go_to_the_other():
    bench = Bench(UpstreamSettings("a", concurrency=1), UpstreamSettings("b", concurrency=2, tier=2))
    (permit,) = bench.fill("a")
    entries = [bench.enter(key=str(number)) for number in range(2)]
    assert not any(entry.done() for entry in entries)  # a usual wait is no reason to use the higher tier
    bench.report(permit, "refused", named="capacity", reason="no room")
    assert all(entry.done() for entry in entries)
    assert {entry.result().upstream for entry in entries} == {bench.upstreams["b"]}


@virtual
async def test_an_upstream_that_is_not_ready_gets_nothing():
    reasons = {"a": "the model is loading"}
    bench = Bench(UpstreamSettings("a", unready_reason=lambda: reasons.get("a")), UpstreamSettings("b"))
    assert bench.at_once().upstream is bench.upstreams["b"]
    reasons.clear()
    assert bench.at_once().upstream is bench.upstreams["a"]


@virtual
async def test_a_ticket_goes_on_when_the_only_upstream_that_is_left_becomes_ready_again():
    reasons = {}
    bench = Bench(UpstreamSettings("a", concurrency=1), UpstreamSettings("b", unready_reason=lambda: reasons.get("b")))
    reasons["b"] = "its worker restarts"
    (held,) = bench.fill("a")
    entry = bench.enter(bench.requeued("a"))
    assert not entry.done()
    await asyncio.sleep(3.0)
    reasons.clear()
    async with asyncio.timeout(1.0):
        permit = await entry
    assert permit.upstream is bench.upstreams["b"]
    held.release(bench.loop.time())


@virtual
async def test_upstreams_of_one_tier_share_by_their_load():
    bench = Bench(UpstreamSettings("a", concurrency=4), UpstreamSettings("b", concurrency=2))
    names = [bench.at_once(key=str(number)).upstream.name for number in range(6)]
    assert (names.count("a"), names.count("b")) == (4, 2)
    assert names[:2] == ["a", "b"]


@virtual
async def test_each_upstream_learns_from_a_delay_by_its_own_gate_only():
    bench = Bench(UpstreamSettings("a", concurrency=1), UpstreamSettings("b", requests_per_second=1.0))
    (permit,) = bench.fill("a")
    entries = [bench.enter(key=str(number)) for number in range(4)]
    assert not entries[-2].done()
    (status,) = bench.admission.status()
    assert status.cause == "request_rate"  # b opens first: the time at which a place of a becomes free is unknown
    with _delays() as delays:
        bench.report(permit, "accepted")  # the next ticket goes to a
        await entries[-1]  # the last one goes to b
    assert delays == {(bench.upstreams["a"], "concurrency"), (bench.upstreams["b"], "request_rate")}


@contextlib.contextmanager
def _delays():
    """Collect the pairs of upstream and gate for which a gate is told that it delayed an attempt."""
    delays, starting = set(), []
    start = Upstream.start

    def watched_start(upstream, *arguments):
        starting.append(upstream)
        return start(upstream, *arguments)

    def watched(reserve):
        def watched_reserve(gate, *arguments, held):
            if held:
                delays.add((starting[-1], gate.name))
            return reserve(gate, *arguments, held=held)

        return watched_reserve

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Upstream, "start", watched_start))
        for kind in (ConcurrencyGate, RateGate):
            stack.enter_context(mock.patch.object(kind, "reserve", watched(kind.reserve)))
        yield delays


# -- a retry is a ticket in the queue --------------------------------------------------------------------------------


@virtual
async def test_a_retry_is_sent_at_its_time_and_delays_nobody_until_then():
    bench = Bench(UpstreamSettings("a"))
    began = bench.loop.time()
    retry = bench.enter(bench.requeued(pause=3.0))
    bench.report(bench.at_once(), "accepted")
    permit = await retry
    assert bench.loop.time() - began == pytest.approx(3.0)
    assert permit.ticket.cause_seconds["hold"] == pytest.approx(3.0)


@virtual
async def test_a_retry_counts_in_the_bounds_of_the_queue():
    bench = Bench(UpstreamSettings("a", concurrency=1), queue_size=1)
    retry = bench.enter(bench.requeued(pause=3.0, size_bytes=500))
    assert (bench.admission.waiting(), bench.admission.waiting_bytes()) == (1, 500)
    with pytest.raises(QueueFull):
        bench.enter()
    (status,) = bench.admission.status()
    assert sum(status.waiting.values()) == 1
    bench.report(await retry, "accepted")
    assert bench.at_rest()
    bench.report(bench.at_once(), "accepted")


@virtual
async def test_the_bytes_of_a_retry_count_in_the_bound_on_bytes():
    bench = Bench(UpstreamSettings("a"), queue_bytes=1000)
    retry = bench.enter(bench.requeued(pause=3.0, size_bytes=600))
    with pytest.raises(QueueFull, match="bytes"):
        bench.enter(size_bytes=600)
    bench.report(await retry, "accepted")
    bench.report(bench.at_once(size_bytes=600), "accepted")


@virtual
async def test_a_newer_frame_supersedes_a_retry():
    bench = Bench(UpstreamSettings("a"))
    retry = bench.enter(bench.requeued(pause=3.0, latest=True))
    other = bench.enter(bench.requeued(pause=3.0, latest=True, key="another camera"))
    await asyncio.sleep(1.0)
    bench.report(bench.at_once(latest=True), "accepted")
    with pytest.raises(Superseded):
        await retry
    assert not other.done()
    bench.report(await other, "accepted")
    assert bench.at_rest()


@virtual
async def test_a_retry_is_refused_at_its_deadline():
    bench = Bench(UpstreamSettings("a"))
    began = bench.loop.time()
    retry = bench.enter(bench.requeued(pause=30.0, seconds=2.0))
    with pytest.raises(DeadlineUnreachable):
        await retry
    assert bench.loop.time() - began == pytest.approx(2.0)
    assert bench.at_rest()


@virtual
async def test_a_retry_that_waits_for_a_closed_upstream_is_refused_at_its_deadline():
    bench = Bench(UpstreamSettings("a", concurrency=1))
    (permit,) = bench.fill("a")
    retry = bench.enter(bench.requeued(pause=1.0, seconds=5.0))
    with pytest.raises(DeadlineUnreachable):
        await retry
    bench.report(permit, "accepted")
    assert bench.at_rest()


@virtual
async def test_while_the_sidecar_drains_a_retry_is_finished_and_a_new_request_is_refused():
    bench = Bench(UpstreamSettings("a"))
    retry = bench.enter(bench.requeued(pause=3.0))
    bench.admission.draining = True
    with pytest.raises(Draining):
        bench.enter()
    bench.report(await retry, "accepted")
    again = bench.enter(bench.requeued(pause=1.0))
    bench.report(await again, "accepted")
    assert bench.at_rest()


@virtual
async def test_a_retry_whose_caller_leaves_waits_no_longer():
    bench = Bench(UpstreamSettings("a"))
    task = bench.loop.create_task(bench.admission.permit(bench.requeued(pause=3.0)))
    await asyncio.sleep(1.0)
    assert bench.admission.waiting() == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert bench.at_rest()


@virtual
async def test_a_retry_whose_caller_leaves_in_the_moment_of_its_time_takes_no_permit():
    bench = Bench(UpstreamSettings("a"))
    task = bench.loop.create_task(bench.admission.permit(bench.requeued(pause=3.0)))
    bench.loop.call_later(3.0, task.cancel)  # set before the pool's own timer, for the same time
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(1.0)
    assert bench.at_rest()


@virtual
async def test_a_retry_for_an_account_that_is_refused_meanwhile_is_refused_with_that():
    bench = Bench(UpstreamSettings("a"))
    retry = bench.enter(bench.requeued(pause=3.0))
    await close_account(bench, bench.at_once())
    with pytest.raises(AccountClosed, match="no money"):
        await retry
    assert bench.at_rest()


@virtual
async def test_a_last_retry_goes_only_if_the_upstream_still_fails_other_requests():
    bench = Bench(UpstreamSettings("a"))
    last = bench.requeued(pause=1.0)
    last.only_while_failing = bench.upstreams["a"]
    for outcome, goes in (("failed", True), ("accepted", False)):
        bench.report(bench.at_once(), "failed")
        bench.report(bench.at_once(), outcome)
        last.not_before = bench.loop.time() + 1.0
        entry = bench.enter(last)
        if goes:
            bench.report(await entry, "accepted")
        else:
            with pytest.raises(StillFailing):
                await entry
    assert bench.at_rest()


# -- a newer frame takes the place of an older one ---------------------------------------------------------------------


@virtual
async def test_a_newer_frame_takes_the_place_of_the_older_one_in_a_full_queue():
    bench = Bench(UpstreamSettings("a", concurrency=1), queue_size=1, queue_bytes=1000)
    (permit,) = bench.fill("a")
    older = bench.enter(latest=True, size_bytes=600)
    newer = bench.enter(latest=True, size_bytes=700)
    with pytest.raises(Superseded):
        await older
    assert bench.admission.waiting() == 1
    bench.report(permit, "accepted")
    bench.report(await newer, "accepted")
    assert bench.at_rest()


@virtual
async def test_a_newer_frame_needs_none_of_the_places_that_are_kept_for_returning_callers():
    bench = Bench(UpstreamSettings("a", concurrency=1), queue_size=2)
    (permit,) = bench.fill("a")
    first, older = bench.enter(key="first"), bench.enter(latest=True)
    with pytest.raises(QueueFull):
        bench.enter(key="returns later")
    newer = bench.enter(latest=True)
    with pytest.raises(Superseded):
        await older
    bench.report(permit, "accepted")
    for entry in (first, newer):
        bench.report(await entry, "accepted")
    assert bench.at_rest()


@pytest.mark.parametrize(
    ("why", "options"),
    [(QueueFull, {"size_bytes": 2000}), (DeadlineUnreachable, {"seconds": 0.3})],
    ids=["its body does not fit", "it cannot be answered in time"],
)
@virtual
async def test_a_newer_frame_that_is_refused_leaves_the_older_one_in_its_place(why, options):
    bench = Bench(UpstreamSettings("a", concurrency=1), queue_bytes=1000)
    permit = bench.at_once()
    await asyncio.sleep(5.0)
    bench.report(permit, "accepted")  # a usual answer now takes 0.5 s, because the average is smoothed
    (permit,) = bench.fill("a")
    older, other = bench.enter(latest=True), bench.enter(key="other", size_bytes=100)
    with pytest.raises(why):
        bench.enter(latest=True, **options)
    assert bench.admission.waiting() == 2
    assert not older.done()
    bench.report(permit, "accepted")
    for entry in (older, other):
        bench.report(await entry, "accepted")
    assert bench.at_rest()


@virtual
async def test_an_older_frame_whose_caller_leaves_in_that_moment_does_not_come_back():
    bench = Bench(UpstreamSettings("a", concurrency=2), queue_bytes=1000)
    held = bench.fill("a")
    older = bench.loop.create_task(bench.admission.permit(bench.ticket(latest=True)))
    await asyncio.sleep(0)
    other = bench.enter(key="other", size_bytes=100)
    older.cancel()
    with pytest.raises(QueueFull):
        bench.enter(latest=True, size_bytes=2000)
    for permit in held:
        bench.report(permit, "accepted")
    with pytest.raises(asyncio.CancelledError):
        await older
    bench.report(await other, "accepted")
    assert bench.at_rest()


@virtual
async def test_frames_without_a_key_do_not_supersede_each_other():
    """Fault D2: two cameras that send no X-Camera-Id would take each other's places."""
    bench = Bench(UpstreamSettings("a", concurrency=1))
    (permit,) = bench.fill("a")
    frames = [bench.enter(key="", latest=True) for _ in range(2)]
    bench.report(permit, "accepted")
    for frame in frames:
        bench.report(await frame, "accepted")
    assert bench.at_rest()


# -- what the status shows ---------------------------------------------------------------------------------------------


@virtual
async def test_the_longest_queues_count_every_waiting_ticket():
    bench = Bench(UpstreamSettings("a", concurrency=1), UpstreamSettings("b", concurrency=1))
    held = [*bench.fill("a"), *bench.fill("b")]
    began = bench.loop.time()
    await asyncio.sleep(1.0)
    only_b, later = bench.enter(bench.requeued("a", key="x")), bench.enter(bench.requeued(pause=9.0, key="x"))
    await asyncio.sleep(1.0)
    anywhere = [bench.enter(key="x"), bench.enter(key="y")]
    (status,) = bench.admission.status(longest=2)
    assert status.longest_queues == (("x", 3, began + 1.0), ("y", 1, began + 2.0))
    (status,) = bench.admission.status(longest=1)
    assert [key for key, *_ in status.longest_queues] == ["x"]
    for permit in held:
        bench.report(permit, "accepted")
    for entry in (only_b, *anywhere, later):
        bench.report(await entry, "accepted")
    (status,) = bench.admission.status(longest=2)
    assert status.longest_queues == ()


@virtual
async def test_while_only_retries_wait_the_cause_is_a_hold():
    bench = Bench(UpstreamSettings("a"))

    def cause():
        (status,) = bench.admission.status()
        return status.cause

    assert cause() is None
    retry = bench.enter(bench.requeued(pause=3.0))
    assert cause() == "hold"
    bench.report(bench.at_once(), "accepted")
    assert cause() == "hold"
    bench.report(await retry, "accepted")
    assert cause() is None


@virtual
async def test_a_retry_that_leaves_costs_the_same_whether_ten_or_thousands_wait():
    async def cost_of_leaving(count):
        bench = Bench(UpstreamSettings("a"), queue_size=10_000)
        pool, tickets = bench.admission.pool(MODEL), [bench.requeued(pause=9.0, size_bytes=7) for _ in range(count)]
        for ticket in tickets:
            bench.enter(ticket)
        assert (len(pool.waiting), pool.waiting.bytes) == (count, 7 * count)
        lines = count_lines(lambda: [pool.leave(ticket) for ticket in reversed(tickets[5:])])
        assert (len(pool.waiting), pool.waiting.bytes) == (5, 35)
        pool.close()
        return lines / (count - 5)

    assert await cost_of_leaving(2000) < 1.5 * await cost_of_leaving(20)


@virtual
async def test_retries_that_left_stay_in_no_memory():
    bench = Bench(UpstreamSettings("a"))
    pool = bench.admission.pool(MODEL)
    stays = bench.enter(bench.requeued(pause=3.0))

    def tickets():
        gc.collect()
        return sum(isinstance(one, Ticket) for one in gc.get_objects())

    before = tickets()  # other tests may have left some
    for _ in range(500):
        ticket = bench.requeued(pause=9.0)
        bench.enter(ticket)
        pool.leave(ticket)
    assert tickets() < before + 100
    bench.report(await stays, "accepted")


@virtual
async def test_a_retry_that_left_and_comes_back_waits_only_for_its_new_time():
    bench = Bench(UpstreamSettings("a"))
    began = bench.loop.time()
    ticket = bench.requeued(pause=3.0)
    bench.enter(ticket)
    bench.admission.pool(MODEL).leave(ticket)
    ticket.not_before = began + 5.0
    bench.report(await bench.enter(ticket), "accepted")
    assert bench.loop.time() - began == pytest.approx(5.0)
    assert bench.at_rest()


# -- no 503 while another upstream could take it ---------------------------------------------------------------------


@virtual
async def test_a_ticket_whose_tier_hangs_goes_to_the_next_tier_before_its_deadline():
    bench = Bench(UpstreamSettings("a", concurrency=1), UpstreamSettings("b", tier=2))
    permit = bench.at_once()
    await asyncio.sleep(0.5)
    bench.report(permit, "accepted")  # an answer is known to take half a second
    (hung,) = bench.fill("a")
    entry = bench.enter(seconds=10.0)
    got = await entry
    assert got.upstream is bench.upstreams["b"]
    hung.release(bench.loop.time())


@virtual
async def test_a_ticket_goes_to_the_next_tier_while_that_still_has_the_time_to_answer():
    """The higher tier takes longer for an answer than the lower one: only the time of the higher tier counts."""
    bench = Bench(UpstreamSettings("a", concurrency=1), UpstreamSettings("b", tier=2))
    for name, seconds in 50 * [("a", 0.2), ("b", 1.5)]:
        permit = bench.upstreams[name].start(bench.loop.time(), bench.ticket(), lambda permit: None)
        await asyncio.sleep(seconds)
        bench.report(permit, "accepted")
    (hung,) = bench.fill("a")
    ticket = bench.ticket(seconds=10.0)
    permit = await bench.enter(ticket)
    assert permit.upstream is bench.upstreams["b"]
    assert ticket.deadline - bench.loop.time() >= 1.5
    hung.release(bench.loop.time())


@virtual
async def test_a_ticket_behind_the_head_of_the_queue_goes_to_the_next_tier_before_its_deadline():
    bench = Bench(UpstreamSettings("a", concurrency=1), UpstreamSettings("b", tier=2, concurrency=3))
    permit = bench.at_once()
    await asyncio.sleep(0.2)
    bench.report(permit, "accepted")
    (hung,) = bench.fill("a")
    patient = bench.enter(key="patient", seconds=1000.0)
    urgent = bench.enter(key="urgent", seconds=5.0)
    permit = await urgent
    assert permit.upstream is bench.upstreams["b"]
    hung.release(bench.loop.time())
    await patient


@virtual
async def test_a_ticket_that_the_lowest_tier_would_answer_too_late_goes_to_the_next_tier_at_once():
    bench = Bench(UpstreamSettings("a", concurrency=1), UpstreamSettings("b", tier=2))
    permit = bench.at_once()
    await asyncio.sleep(5.0)
    bench.report(permit, "accepted")  # a usual answer now takes 0.5 s, because the average is smoothed
    (held,) = bench.fill("a")
    patient = [bench.enter(key=f"patient {number}") for number in range(3)]
    assert not any(entry.done() for entry in patient)
    urgent = bench.enter(key="urgent", seconds=1.5)
    await asyncio.sleep(0.1)
    assert urgent.result().upstream is bench.upstreams["b"]
    after = bench.enter(key="after")  # nothing is urgent any more
    await asyncio.sleep(0.1)
    assert not after.done()
    for one in (held, *(entry.result() for entry in (urgent, *patient) if entry.done())):
        bench.report(one, "accepted")
    bench.report(await after, "accepted")


@virtual
async def test_nobody_waits_for_an_upstream_that_is_not_ready_when_the_other_refuses_the_account():
    bench = Bench(UpstreamSettings("a"), UpstreamSettings("b", tier=2, unready_reason=lambda: "the model is broken"))
    await close_account(bench, bench.at_once())
    with pytest.raises(AccountClosed, match="no money"):
        bench.enter()
    assert bench.at_rest()


@virtual
async def test_while_every_account_is_refused_every_waiting_ticket_is_refused_and_new_ones_too():
    bench = Bench(UpstreamSettings("a", concurrency=1), UpstreamSettings("b", concurrency=1))
    (a,), (b,) = bench.fill("a"), bench.fill("b")
    anywhere, only_b, later = bench.enter(), bench.enter(bench.requeued("a")), bench.enter(bench.requeued(pause=9.0))
    await close_account(bench, a)
    assert not anywhere.done()
    assert not only_b.done()
    bench.fail("b", CircuitState.BILLING)
    bench.report(b, "abandoned")
    for entry in (anywhere, only_b, later):
        with pytest.raises(AccountClosed, match="no money"):
            await entry
    with pytest.raises(AccountClosed):
        bench.enter()
    assert bench.at_rest()
    await asyncio.sleep(6.0)
    permit = bench.at_once()  # the half-open probe
    bench.report(permit, "accepted")
    await asyncio.sleep(1.0)  # then the load rises slowly
    assert bench.at_once() is not None


@virtual
async def test_a_ticket_that_waits_for_an_account_that_is_refused_goes_back_to_the_other_upstream():
    bench = Bench(UpstreamSettings("a", concurrency=1), UpstreamSettings("b"))
    (permit,) = bench.fill("a")
    waiting = bench.enter(bench.requeued("b"))
    assert not waiting.done()
    bench.report(permit, "account", reason="no money")
    assert waiting.result().upstream is bench.upstreams["b"]
    bench.report(waiting.result(), "accepted")
    assert bench.at_rest()


# -- an upstream that several models share -----------------------------------------------------------------------------


@virtual
async def test_a_permit_that_becomes_free_reaches_the_queue_of_another_model():
    bench = Bench(
        UpstreamSettings("dashscope"),
        UpstreamSettings("local", tier=2, concurrency=1, paced=False, only_model="local"),
    )
    admission = bench.admission
    first, second = (admission.pool(model).upstreams for model in ("x", "y"))
    assert first[0] is not second[0]
    assert first[1] is second[1]

    def enter(model):
        ticket = bench.ticket(model=model)
        ticket.requeued, ticket.tried = True, (admission.pool(model).upstreams[0],)
        return bench.enter(ticket)

    permit = enter("x")
    if isinstance(permit, asyncio.Future):
        permit = permit.result()
    entries = [enter("y"), enter("x"), enter("y"), enter("x")]
    assert not any(entry.done() for entry in entries)
    served = []
    while entries:
        permit.release(bench.loop.time())
        (entry,) = [entry for entry in entries if entry.done()]
        entries.remove(entry)
        permit = entry.result()
        assert permit.upstream is first[1]
        served.append(permit.ticket.model)
    assert sorted(served[:2]) == sorted(served[2:]) == ["x", "y"]  # in turn
    permit.release(bench.loop.time())
    assert bench.at_rest()


@virtual
async def test_models_that_are_forgotten_let_go_of_the_shared_upstream():
    bench = Bench(UpstreamSettings("dashscope"), UpstreamSettings("local", tier=2, only_model="local"))
    for number in range(200):
        bench.report(bench.at_once(model=f"model-{number}"), "accepted")
    local = bench.admission.pool("model-199").upstreams[1]
    assert len(local.on_end) <= 64
    assert len(list(bench.admission.status())) <= 64
    assert inf > len(bench.admission._upstreams) - 64 <= 1


# -- what nobody else would notice -------------------------------------------------------------------------------------


@virtual
async def test_a_queue_that_grows_behind_a_full_first_tier_spills_without_any_other_event():
    bench = Bench(UpstreamSettings("a", concurrency=10), UpstreamSettings("b", tier=2))
    bench.upstreams["a"].latency = bench.upstreams["a"].concurrency.answer_seconds = 10.0
    held = bench.fill("a")
    first = bench.enter(key="first")
    assert not first.done()  # it is predicted to wait for 1 s only
    more = [bench.enter(key=f"camera-{number}") for number in range(20)]
    await asyncio.sleep(0.5)
    assert any(entry.done() and entry.result().upstream.name == "b" for entry in (first, *more))
    for permit in held:
        bench.report(permit, "accepted")


@virtual
async def test_many_tickets_with_one_deadline_are_refused_with_one_look_at_the_queue():
    bench = Bench(UpstreamSettings("a", concurrency=1))
    (held,) = bench.fill("a")
    deadline = bench.loop.time() + 5.0
    entries = []
    for number in range(100):
        ticket = bench.ticket(key=f"camera-{number}")
        ticket.deadline = deadline
        entries.append(bench.enter(ticket))
    pool = bench.admission.pool(MODEL)
    with mock.patch.object(Pool, "admit", autospec=True, side_effect=Pool.admit) as admit:
        await asyncio.sleep(4.999 - bench.upstreams["a"].latency)
        before = admit.call_count
        await asyncio.sleep(0.002)
        assert all(entry.done() for entry in entries)
        assert admit.call_count - before <= 3
    assert not pool.waiting.tickets
    for entry in entries:
        with pytest.raises(DeadlineUnreachable):
            entry.result()
    bench.report(held, "accepted")


@virtual
async def test_a_gate_that_delayed_a_ticket_is_not_to_blame_when_that_ticket_went_elsewhere():
    bench = Bench(UpstreamSettings("a", requests_per_second=0.2), UpstreamSettings("b", concurrency=1))
    (held,) = bench.fill("b")
    while not isinstance(entry := bench.enter(), asyncio.Future):
        bench.report(entry, "accepted")
    bench.report(held, "accepted")
    assert (await entry).upstream.name == "b"
    bench.report(entry.result(), "accepted")
    assert bench.upstreams["a"]._delayed_by is None


@virtual
async def test_an_older_frame_stays_in_its_place_whatever_goes_wrong_with_the_newer_one():
    bench = Bench(UpstreamSettings("a", concurrency=1))
    (held,) = bench.fill("a")
    older = bench.enter(latest=True)
    with (
        mock.patch.object(Pool, "enter", side_effect=ZeroDivisionError),
        pytest.raises(ZeroDivisionError),
    ):
        bench.enter(latest=True)
    bench.report(held, "accepted")
    bench.report(await older, "accepted")
    assert bench.at_rest()


@pytest.mark.parametrize(("ends_in", "retry_after"), [(7200.0, 7100.0), (None, 20.0)], ids=["reported", "not reported"])
@virtual
async def test_while_a_quota_is_used_up_a_ticket_is_refused_with_the_true_time(ends_in, retry_after):
    bench = Bench(UpstreamSettings("a"))
    for key in ("first", "second"):
        permit = bench.at_once(key=key)
        bench.report(permit, "account", named="quota_period", retry_after=ends_in, reason="no more today")
    await asyncio.sleep(40.0 if ends_in is None else 100.0)
    if ends_in is not None:  # a probe was due after a minute, and was refused
        assert bench.upstreams["a"].circuit.may_probe(bench.loop.time())
        bench.report(bench.at_once(), "account", named="quota_period", retry_after=ends_in - 100.0, reason="no more")
    with pytest.raises(QuotaClosed) as refused:
        bench.enter()
    jitter = 0.2 * 60.0 if ends_in is None else 0.0
    assert retry_after <= refused.value.retry_after <= retry_after + jitter


@virtual
async def test_another_upstream_takes_the_tickets_while_a_quota_is_used_up():
    bench = Bench(UpstreamSettings("a"), UpstreamSettings("b", tier=2))
    for key in ("first", "second"):
        bench.report(bench.at_once(key=key), "account", named="quota_period", retry_after=7200.0)
    for _ in range(3):
        permit = bench.at_once()
        assert permit.upstream.name == "b"
        bench.report(permit, "accepted")


async def test_the_bodies_in_flight_are_bounded_in_all_pools_together():
    bench = Bench(UpstreamSettings("a", paced=False), queue_bytes=1000, bytes_in_flight=100)
    first = bench.at_once(size_bytes=60)
    second = bench.at_once(size_bytes=40)
    waits = bench.enter(size_bytes=1)
    elsewhere = bench.enter(model="other", size_bytes=50)
    assert not (waits.done() or elsewhere.done())
    assert bench.admission.bytes_in_flight() == 100
    first.report(Verdict("accepted", bench.loop.time()))
    assert waits.done()
    async with asyncio.timeout(1.0):
        (await elsewhere).release(bench.loop.time())
    second.release(bench.loop.time())
    (await waits).release(bench.loop.time())
    assert bench.admission.bytes_in_flight() == 0


async def test_a_body_that_is_larger_than_the_bound_is_sent_alone():
    bench = Bench(UpstreamSettings("a", paced=False), queue_bytes=1000, bytes_in_flight=100)
    bench.at_once(size_bytes=500).release(bench.loop.time())


MIB = 1024 * 1024


def bench_with_room_for_60_mib_of_large_bodies():
    return Bench(UpstreamSettings("a", paced=False), queue_bytes=1000 * MIB, bytes_in_flight=90 * MIB)


async def test_a_large_body_for_which_there_is_no_room_delays_no_frame():
    bench = bench_with_room_for_60_mib_of_large_bodies()
    first = bench.at_once(size_bytes=40 * MIB)
    large = bench.enter(size_bytes=30 * MIB)
    frames = [bench.enter(size_bytes=MIB, key=f"camera {number}") for number in range(45)]
    assert all(frame.done() for frame in frames)
    assert not large.done()
    assert bench.admission.bytes_in_flight() == 85 * MIB
    waits = [bench.enter(size_bytes=MIB, key=f"camera {number}") for number in range(6)]
    assert [frame.done() for frame in waits] == [True] * 5 + [False]
    frames[0].result().release(bench.loop.time())
    assert waits[5].done()
    first.report(Verdict("accepted", bench.loop.time()))
    (await large).release(bench.loop.time())
    for frame in (*frames[1:], *waits):
        frame.result().release(bench.loop.time())
    assert bench.at_rest()
    assert bench.admission.bytes_in_flight() == 0


async def test_frames_cannot_hold_a_large_body_back_for_ever():
    bench = bench_with_room_for_60_mib_of_large_bodies()
    first = bench.at_once(size_bytes=60 * MIB)
    large = bench.enter(size_bytes=50 * MIB)
    frames = [bench.at_once(size_bytes=MIB, key="another") for _ in range(30)]
    first.report(Verdict("accepted", bench.loop.time()))
    assert large.done()  # the frames use the other part
    for permit in (large.result(), *frames):
        permit.release(bench.loop.time())


async def test_smaller_large_bodies_do_not_pass_a_parked_one_for_ever():
    bench = bench_with_room_for_60_mib_of_large_bodies()
    flying = [bench.at_once(size_bytes=10 * MIB) for _ in range(6)]
    largest = bench.enter(size_bytes=50 * MIB, key="camera")
    for number in range(20):
        behind = bench.enter(size_bytes=10 * MIB, key=f"other {number}")
        if largest.done():
            break
        flying.pop(0).release(bench.loop.time())
        if behind.done():
            flying.append(behind.result())
        if not flying:
            break
    assert largest.done()


async def test_a_parked_body_starts_when_the_pool_before_it_needs_no_bytes_any_more():
    bench = bench_with_room_for_60_mib_of_large_bodies()
    first = bench.at_once(size_bytes=60 * MIB)
    other = bench.enter(model="other", size_bytes=6 * MIB)
    assert not other.done()
    first.report(Verdict("failed", bench.loop.time()))
    async with asyncio.timeout(5.0):
        (await other).release(bench.loop.time())


async def test_the_models_take_turns_with_their_large_bodies():
    bench = bench_with_room_for_60_mib_of_large_bodies()
    first, second = (bench.at_once(size_bytes=30 * MIB) for _ in range(2))
    largest = bench.enter(size_bytes=50 * MIB)
    others = [bench.enter(model=f"model-{number}", size_bytes=10 * MIB) for number in range(3)]
    first.report(Verdict("accepted", bench.loop.time()))
    assert not (largest.done() or any(one.done() for one in others))  # 30 MiB are free, and belong to the largest one
    second.report(Verdict("accepted", bench.loop.time()))
    assert largest.done()
    assert [one.done() for one in others] == [True, False, False]
    largest.result().report(Verdict("accepted", bench.loop.time()))
    assert all(one.done() for one in others)  # without waiting for the next look
    for one in others:
        one.result().release(bench.loop.time())
    assert bench.admission.bytes_in_flight() == 0


async def test_other_models_do_not_wait_for_a_large_body_whose_caller_has_left():
    bench = bench_with_room_for_60_mib_of_large_bodies()
    first = bench.at_once(size_bytes=40 * MIB)
    large = bench.ticket(size_bytes=50 * MIB)
    waits = asyncio.ensure_future(bench.admission.permit(large))
    await asyncio.sleep(0)
    other = bench.enter(model="other", size_bytes=10 * MIB)
    assert not other.done()
    waits.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waits
    assert other.done()
    bench.at_once(model="another", size_bytes=10 * MIB).release(bench.loop.time())
    for permit in (first, other.result()):
        permit.release(bench.loop.time())


async def test_large_bodies_that_wait_leave_room_for_frames():
    bench = Bench(UpstreamSettings("a", concurrency=1), queue_bytes=30 * MIB)
    occupied = bench.at_once()
    waits = [bench.enter(size_bytes=10 * MIB) for _ in range(2)]
    with pytest.raises(QueueFull, match="10485760 more do not fit into the 20971520"):
        bench.enter(size_bytes=10 * MIB)
    frames = [bench.enter(size_bytes=MIB, key="camera") for _ in range(10)]
    with pytest.raises(QueueFull):
        bench.enter(size_bytes=MIB, key="camera")
    occupied.release(bench.loop.time())
    for _ in range(12):
        done = next(one for one in (*waits, *frames) if one.done())
        (waits if done in waits else frames).remove(done)
        done.result().release(bench.loop.time())


async def test_an_attempt_starts_only_while_answers_and_slow_readers_leave_room():
    held = 0
    bench = Bench(UpstreamSettings("a", paced=False), queue_bytes=1000, bytes_in_flight=100, answer_bytes=lambda: held)
    first = bench.at_once(size_bytes=50)
    held = 40
    waits = bench.enter(size_bytes=20)
    assert not waits.done()
    held = 10
    async with asyncio.timeout(1.0):
        (await waits).release(bench.loop.time())
    first.release(bench.loop.time())
    held = 1000
    bench.at_once(size_bytes=50).release(bench.loop.time())  # one body always fits


async def test_a_ticket_that_waits_for_room_for_its_body_can_leave():
    bench = Bench(UpstreamSettings("a", paced=False), queue_bytes=100)
    first = bench.at_once(size_bytes=100)
    gone, behind = bench.ticket(size_bytes=90), bench.ticket(size_bytes=1)
    waits = asyncio.ensure_future(bench.admission.permit(gone))
    other = asyncio.ensure_future(bench.admission.permit(behind))
    await asyncio.sleep(0)
    waits.cancel()
    first.report(Verdict("accepted", bench.loop.time()))
    (await other).release(bench.loop.time())
    assert bench.admission.bytes_in_flight() == 0
