"""Tickets pass through a real pool on virtual time: each ticket ends exactly once, and every permit is released."""

import asyncio
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from bench.sim import clock
from sidecar.admission import Admission, NotAdmitted, Ticket, UpstreamSettings, Verdict

VERDICTS = (
    "accepted", "request_rate", "token_rate", "growth", "concurrency", "capacity", "unknown", "failed", "timed_out",
    "none",
)  # fmt: skip

USAGES = (None, (120, 30), (0, 0), (10_000_000, 10_000_000))


async def run_ticket(admission, number, verdict, seconds, ends):
    loop = asyncio.get_running_loop()
    ticket = Ticket(now=loop.time(), deadline=loop.time() + 5.0, key=f"camera-{number % 3}", model="m", tokens=100.0)
    try:
        with await admission.permit(ticket) as permit:
            (pool,) = admission.status()
            if pool.upstreams[0].circuit.state:
                assert pool.upstreams[0].concurrency.in_flight >= 1
            await asyncio.sleep(seconds)
            if verdict == "accepted":
                permit.report(Verdict("accepted", loop.time(), usage=USAGES[number % len(USAGES)]))
            elif verdict in ("failed", "timed_out"):
                permit.report(Verdict(verdict, loop.time(), reason="broken"))
            elif verdict != "none":
                named = None if verdict == "unknown" else verdict
                permit.report(Verdict("refused", loop.time(), named, retry_after=3.0, reason="refused"))
        ends.append("through")
    except NotAdmitted:
        ends.append("refused")
    except asyncio.CancelledError:
        ends.append("cancelled")
        raise
    finally:
        ticket.stopwatch.stop(loop.time())
        waited = sum((ticket.cause_seconds or {}).values())
        assert abs(waited) <= ticket.stopwatch.seconds["queue"] + 1e-6


TICKETS = st.lists(
    st.tuples(
        st.floats(0.0, 0.5),  # seconds after the previous ticket
        st.sampled_from(VERDICTS),
        st.floats(0.0, 2.0),  # seconds that its attempt takes
        st.one_of(st.none(), st.floats(0.0, 3.0)),  # its caller leaves after this many seconds, or never
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(tickets=TICKETS, concurrency=st.one_of(st.none(), st.integers(1, 4)))
def test_every_ticket_ends_once_and_every_permit_is_released_whenever_callers_leave(tickets, concurrency):
    async def main():
        loop = asyncio.get_running_loop()
        admission = Admission([UpstreamSettings(concurrency=concurrency)])
        ends, tasks = [], []
        for number, (gap, verdict, seconds, leaves_after) in enumerate(tickets):
            await asyncio.sleep(gap)
            task = loop.create_task(run_ticket(admission, number, verdict, seconds, ends))
            if leaves_after is not None:
                loop.call_later(leaves_after, task.cancel)
            tasks.append(task)
            assert concurrency is None or admission.in_flight() <= concurrency
        results = await asyncio.gather(*tasks, return_exceptions=True)
        wrong = [r for r in results if isinstance(r, Exception)]
        assert not wrong
        never_ran = sum(isinstance(r, asyncio.CancelledError) for r in results) - ends.count("cancelled")
        assert len(ends) + never_ran == len(tickets)
        assert admission.in_flight() == 0
        assert admission.waiting() == 0
        assert admission.waiting_bytes() == 0

    clock.run(main())


def test_a_provider_that_reports_zero_tokens_but_refuses_by_token_rate_breaks_nothing():
    async def main():
        loop = asyncio.get_running_loop()
        admission = Admission()
        for number in range(30):
            ticket = Ticket(now=loop.time(), deadline=loop.time() + 600.0, model="m")
            with await admission.permit(ticket) as permit:
                await asyncio.sleep(0.1)
                if number in (10, 20):
                    permit.report(Verdict("refused", loop.time(), "token_rate", reason="refused"))
                else:
                    permit.report(Verdict("accepted", loop.time(), usage=(0, 0)))
        (pool,) = admission.status()
        assert pool.upstreams[0].tokens.limit > 0

    clock.run(main())


def test_while_every_attempt_fails_only_one_probe_is_sent_at_a_time():
    """During an outage of a minute, only single probes are sent, at most one per half second."""

    async def main():
        loop = asyncio.get_running_loop()
        admission = Admission()
        attempts = []

        async def caller(number):
            while loop.time() < 1060.0:
                ticket = Ticket(now=loop.time(), deadline=loop.time() + 90.0, key=str(number), model="m")
                with await admission.permit(ticket) as permit:
                    attempts.append(loop.time())
                    await asyncio.sleep(0.05)
                    permit.report(Verdict("failed", loop.time(), reason="down"))
                await asyncio.sleep(0.01)

        tasks = [loop.create_task(caller(number)) for number in range(5)]
        await asyncio.sleep(60.0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        probes = [at for at in attempts if at > 1001.0]
        assert 8 <= len(probes) <= 30
        assert min(b - a for a, b in pairwise(probes)) > 0.4

    clock.run(main())
