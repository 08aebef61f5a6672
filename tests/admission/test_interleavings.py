"""Random interleavings of many tickets over several upstreams: each reservation is settled once, and nothing stays."""

import asyncio
from dataclasses import dataclass

from hypothesis import example, given, settings
from hypothesis import strategies as st
from ledger import counting

from bench.sim import clock
from sidecar.admission import Admission, NotAdmitted, StillFailing, Ticket, UpstreamSettings, Verdict

VERDICTS = (
    "accepted", "accepted", "accepted", "request_rate", "token_rate", "growth", "concurrency", "capacity", "unknown",
    "failed", "timed_out", "account", "abandoned", "none",
)  # fmt: skip


@dataclass(frozen=True)
class Caller:
    """One request: when it comes, what its attempts are told, and when its caller leaves."""

    after: float
    """Seconds after the request before."""
    verdicts: tuple[str, ...]
    """Of its attempts; when they are used up, the next is accepted."""
    seconds: float
    """Of each attempt."""
    leaves_after: float | None
    deadline: float
    latest: bool
    pause: float
    """Seconds before a retry."""
    model: str


#: Times on a grid, so that many things happen at the same instant.
GRID = st.integers(0, 20).map(lambda steps: steps / 4)

CALLERS = st.lists(
    st.builds(
        Caller,
        after=st.just(0.0) | GRID.map(lambda seconds: seconds / 5),
        verdicts=st.lists(st.sampled_from(VERDICTS), max_size=4).map(tuple),
        seconds=GRID,
        leaves_after=st.none() | GRID,
        deadline=st.sampled_from((0.5, 2.0, 8.0, 60.0)),
        latest=st.booleans(),
        pause=GRID,
        model=st.sampled_from("mn"),
    ),
    max_size=40,
)
UPSTREAMS = st.lists(
    st.builds(
        UpstreamSettings,
        tier=st.sampled_from((1, 1, 2)),
        concurrency=st.sampled_from((None, 1, 3)),
        requests_per_second=st.sampled_from((float("inf"), 4.0)),
        paced=st.sampled_from((True, True, False)),
        only_model=st.sampled_from((None, None, "m")),
    ),
    min_size=1,
    max_size=3,
)


def verdict_of(name, now):
    if name in ("accepted", "failed", "timed_out", "account", "abandoned"):
        return Verdict(name, now, usage=(100, 20) if name == "accepted" else None, reason=name)
    return Verdict("refused", now, None if name == "unknown" else name, retry_after=1.0, reason=name)


async def call(admission, number, caller, ends):
    """Bring a request through as `Dispatcher.run` does: a refused or failed attempt goes back to the queue."""
    loop = asyncio.get_running_loop()
    ticket = Ticket(
        now=loop.time(), deadline=loop.time() + caller.deadline, key=f"camera-{number % 3}", model=caller.model,
        tokens=100.0 * (number % 5), size_bytes=1000, latest=caller.latest,
    )  # fmt: skip
    pool = admission.pool(caller.model)
    verdicts = [*caller.verdicts, "accepted"]
    try:
        for verdict in verdicts:
            with await admission.permit(ticket) as permit:
                assert permit.ticket is ticket
                assert permit.upstream in pool.upstreams
                assert permit.sent_at <= loop.time()
                await asyncio.sleep(caller.seconds)
                if verdict != "none":
                    permit.report(verdict_of(verdict, loop.time()))
            if verdict in ("accepted", "abandoned", "none"):
                break
            ticket.requeued, ticket.only_while_failing = True, None
            ticket.not_before = loop.time()
            if verdict in ("failed", "timed_out", "account"):
                if pool.has_another(ticket, permit.upstream):
                    ticket.tried = (*ticket.tried, permit.upstream)
                else:
                    ticket.not_before += caller.pause
                    ticket.only_while_failing = permit.upstream if number % 4 == 3 else None
        ends.append("through")
    except StillFailing:
        assert ticket.only_while_failing
        ends.append("refused")
    except NotAdmitted:
        ends.append("refused")
    except asyncio.CancelledError:
        ends.append("cancelled")
        raise
    finally:
        ticket.stopwatch.stop(loop.time())
        waited = sum((ticket.cause_seconds or {}).values())
        assert abs(waited) <= ticket.stopwatch.seconds["queue"] + ticket.stopwatch.seconds["lock"] + 1e-6


def named(settings):
    """Give each upstream a name of its own, in the order of the tiers, as assembly does."""
    ordered = sorted(settings, key=lambda one: one.tier)
    return [
        UpstreamSettings(
            f"upstream-{number}",
            tier=one.tier,
            concurrency=one.concurrency,
            requests_per_second=one.requests_per_second,
            paced=one.paced,
            only_model=one.only_model,
        )
        for number, one in enumerate(ordered)
    ]


@settings(max_examples=300)
@given(upstreams=UPSTREAMS, callers=CALLERS)
@example(  # the caller of a retry leaves in the loop iteration in which the time of the retry comes
    upstreams=[UpstreamSettings()],
    callers=[Caller(0.0, ("failed",), 0.25, 0.75, 60.0, latest=False, pause=0.5, model="m")],
)
def test_whatever_happens_every_reservation_is_settled_once_and_nothing_stays(upstreams, callers):
    async def main():
        loop = asyncio.get_running_loop()
        admission = Admission(named(upstreams), queue_size=20, queue_bytes=15_000)
        with counting() as ledger:
            ledger.upstreams_of = lambda ticket: admission.pool(ticket.model).upstreams
            ends, tasks = [], []
            for number, caller in enumerate(callers):
                await asyncio.sleep(caller.after)
                task = loop.create_task(call(admission, number, caller, ends))
                if caller.leaves_after is not None:
                    loop.call_later(caller.leaves_after, task.cancel)
                tasks.append(task)
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert not [result for result in results if isinstance(result, Exception)]
            never_ran = sum(isinstance(r, asyncio.CancelledError) for r in results) - ends.count("cancelled")
            assert len(ends) + never_ran == len(callers)
            assert (admission.in_flight(), admission.waiting(), admission.waiting_bytes()) == (0, 0, 0)
            ledger.check({one for model in "mn" for one in admission.pool(model).upstreams})
            for pool in admission.status():
                assert (sum(pool.waiting.values()), pool.waiting_bytes) == (0, 0)
            # Nothing is left that could hold the next request longer than a circuit does.
            ticket = Ticket(now=loop.time() + 200.0, deadline=loop.time() + 400.0, model="m")
            await asyncio.sleep(200.0)
            with await admission.permit(ticket) as permit:
                permit.report(Verdict("accepted", loop.time()))
            ledger.check({permit.upstream})

    clock.run(main())
