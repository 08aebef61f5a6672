"""Refusals of the account, the key or one request, on virtual time: scripted providers, one real dispatcher."""

import asyncio
from itertools import pairwise
from random import Random

import pytest
from prometheus_client import CollectorRegistry

from backends.base import BackendError, BillingRefused, Rejected, Reply, Request, Throttled, Unauthorized, Usage
from bench.sim import clock
from sidecar.admission import AccountClosed, Admission, KeyClosed, NotAdmitted, QuotaClosed, Ticket, UpstreamSettings
from sidecar.dispatch.dispatcher import DeadlineExceeded, Dispatcher
from sidecar.observe.metrics import Metrics

REFUSALS = {"money": BillingRefused("no money", status=402), "key": Unauthorized("wrong key", status=401)}
CLOSED = {"money": AccountClosed, "key": KeyClosed}
STATES = {"money": "billing", "key": "unauthorized"}


class Scripted:
    """A backend. `refuse` returns the error for a camera and the seconds since the start, or None for an answer."""

    model_id = None
    slots = None

    def __init__(self, name, refuse, answer_seconds=0.3):
        self.name, self.refuse, self.answer_seconds = name, refuse, answer_seconds
        self.began = asyncio.get_running_loop().time()
        self.calls = []  # (seconds, camera)

    def unready_reason(self):
        return None

    async def send(self, request, timings):
        loop = asyncio.get_running_loop()
        timings.work_started = loop.time()
        at = loop.time() - self.began
        self.calls.append((at, request.path))
        error = self.refuse(request.path, at)
        await asyncio.sleep(self.answer_seconds if error is None else 0.05)
        if error is not None:
            raise error.with_traceback(None)  # an error of this module would keep the tickets of all its tracebacks
        timings.first_byte = loop.time()
        return Reply(200, {}, b"{}", usage=Usage(300, 20))


class World:
    """A dispatcher above scripted backends, which are tiers in their order."""

    def __init__(self, *backends, tiers=(1, 2)):
        self.loop = asyncio.get_running_loop()
        self.began = self.loop.time()
        settings = [UpstreamSettings(one.name, tier=tier) for one, tier in zip(backends, tiers, strict=False)]
        self.admission = Admission(settings, random=Random(1))
        self.dispatcher = Dispatcher(self.admission, backends, Metrics(CollectorRegistry()))

    @property
    def circuit(self):
        """The circuit of the first backend."""
        return self.admission.pool("m").upstreams[0].circuit

    async def ask(self, camera="camera", seconds=60.0):
        """Return the error of a request, or None, and the seconds that it took."""
        now = self.loop.time()
        ticket = Ticket(now=now, deadline=now + seconds, key=camera, model="m", tokens=300.0)
        error = None
        try:
            await self.dispatcher.run(ticket, Request("openai", camera, b"{}", "m"))
        except (NotAdmitted, BackendError, DeadlineExceeded) as failure:
            error = failure
        return error, self.loop.time() - now

    async def arrive(self, per_second, seconds, cameras=5, deadline=60.0):
        """Ask at a steady rate for so many seconds; return the results of all requests in order."""
        tasks = []
        for number in range(int(per_second * seconds)):
            tasks.append(asyncio.create_task(self.ask(f"camera-{number % cameras}", deadline)))
            await asyncio.sleep(1.0 / per_second)
        return await asyncio.gather(*tasks)

    async def at(self, seconds):
        """Wait until so many seconds after the start."""
        await asyncio.sleep(self.began + seconds - self.loop.time())

    def at_rest(self):
        return (self.admission.in_flight(), self.admission.waiting()) == (0, 0)


def errors(results):
    return [error for error, _ in results if error is not None]


@pytest.fixture(params=REFUSALS)
def kind(request):
    return request.param


def test_one_refusal_of_the_account_is_seen_by_no_caller(kind):
    async def main():
        said = []

        def refuse(camera, at):
            if at >= 5.0 and not said:
                said.append(at)
                return REFUSALS[kind]
            return None

        backend = Scripted("a", refuse)
        world = World(backend)
        results = await world.arrive(10.0, 10.0)
        assert errors(results) == []
        assert max(seconds for _, seconds in results) <= 3.0
        assert said
        assert world.at_rest()

    clock.run(main())


def test_while_the_account_is_in_doubt_a_request_of_another_camera_is_the_only_probe(kind):
    async def main():
        backend = Scripted("a", lambda camera, at: REFUSALS[kind] if at < 5.2 and camera == "first" else None)
        world = World(backend)
        await world.ask("other")
        await world.at(5.0)
        first = asyncio.create_task(world.ask("first"))
        await asyncio.sleep(0.1)
        assert world.circuit.state.value == "account_doubt"
        others = [asyncio.create_task(world.ask(f"other {number}")) for number in range(10)]
        assert errors(await asyncio.gather(first, *others)) == []
        assert [camera for _, camera in backend.calls[1:4]] == ["first", "other 0", "first"]
        second, third = (at for at, _ in backend.calls[2:4])
        assert third >= second + 0.299  # after the answer to the probe

    clock.run(main())


def test_while_no_other_camera_asks_the_refused_request_is_the_probe(kind):
    async def main():
        backend = Scripted("a", lambda camera, at: REFUSALS[kind] if at < 0.2 else None)
        world = World(backend)
        assert (await world.ask("only"))[0] is None
        assert [camera for _, camera in backend.calls] == ["only", "only"]

    clock.run(main())


def test_two_refusals_of_the_account_open_the_circuit_for_all_and_an_accepted_probe_closes_it(kind):
    async def main():
        backend = Scripted("a", lambda camera, at: REFUSALS[kind] if 5.0 <= at < 40.0 else None)
        world = World(backend)
        results = await world.arrive(10.0, 80.0)
        seen = errors(results)
        assert {type(error) for error in seen} == {type(REFUSALS[kind]), CLOSED[kind]}
        assert sum(isinstance(error, BackendError) for error in seen) <= 15  # the probes, and what was in flight
        longest = {"money": 30.0, "key": 5.0}[kind]  # between two probes, plus a jitter of 20 %, plus the probe
        assert errors(results[int(10.0 * (40.0 + 1.2 * longest + 1.0)) :]) == []
        refused = sum(5.0 <= at < 40.0 for at, _ in backend.calls)
        assert refused <= 15
        assert world.at_rest()

    clock.run(main())


def test_one_refused_camera_alone_gets_its_error_and_the_next_camera_is_the_probe(kind):
    async def main():
        backend = Scripted("a", lambda camera, at: REFUSALS[kind] if camera == "poison" else None)
        world = World(backend)
        await world.ask("good")
        await world.at(10.0)
        error, seconds = await world.ask("poison")
        assert error is REFUSALS[kind]
        assert seconds <= 1.0
        assert len(backend.calls) == 3
        assert world.circuit.state.value == STATES[kind]
        if kind == "money":
            await asyncio.sleep(6.0)
        assert (await world.ask("good"))[0] is None
        assert world.circuit.state is None

    clock.run(main())


def test_a_camera_whose_requests_are_always_refused_disturbs_no_other(kind):
    async def main():
        backend = Scripted("a", lambda camera, at: REFUSALS[kind] if camera == "poison" else None, answer_seconds=1.0)
        world = World(backend)
        good = asyncio.create_task(world.arrive(10.0, 60.0))
        await asyncio.sleep(5.0)
        bad = []
        for _ in range(40):
            bad.append(await world.ask("poison"))
            await asyncio.sleep(1.0)
        results = await good
        assert errors(results) == []
        assert max(seconds for _, seconds in results[20:]) <= 4.0
        assert {error for error, _ in bad} == {REFUSALS[kind]}
        calls = len([1 for _, camera in backend.calls if camera == "poison"])
        assert calls <= len(bad) + 4  # once others are answered, one refusal is enough

    clock.run(main())


@pytest.mark.parametrize(("poisoned", "cadence"), [(1, 0.5), (1, 8.0), (2, 0.5), (2, 2.0)])
@pytest.mark.parametrize("starts_at", [0.0, 5.0])
@pytest.mark.parametrize("pause", [0.05, 1.0])
def test_cameras_that_are_always_refused_and_ask_all_the_time_cost_the_others_few_answers(
    kind, pause, poisoned, starts_at, cadence
):
    """`cadence`: seconds between two requests of one of three other cameras. Those wait for 4 s at most."""

    async def main():
        backend = Scripted("a", lambda camera, at: REFUSALS[kind] if camera.startswith("poison") else None)
        world = World(backend)

        async def ask(camera, pause):
            results = []
            while world.loop.time() < world.began + 120.0:
                results.append(await world.ask(camera, 4.0))
                await asyncio.sleep(pause)
            return results

        good = [asyncio.create_task(ask(f"camera-{number}", cadence)) for number in range(3)]
        await asyncio.sleep(starts_at)
        bad = [asyncio.create_task(ask(f"poison-{number % poisoned}", pause)) for number in range(5)]
        results = [one for of_camera in await asyncio.gather(*good) for one in of_camera]
        seen = {type(error) for of_camera in await asyncio.gather(*bad) for error, _ in of_camera}
        assert seen <= {type(REFUSALS[kind]), CLOSED[kind]}
        if poisoned == 1:
            assert errors(results) == []
        else:  # one of them confirms the refusal of the other, until the first probe
            assert len(errors(results)) <= 0.1 * len(results)

    clock.run(main())


def test_the_other_upstream_takes_the_work_at_once_when_an_account_is_refused(kind):
    async def main():
        first = Scripted("a", lambda camera, at: REFUSALS[kind] if 5.0 <= at < 30.0 else None)
        second = Scripted("b", lambda camera, at: None)
        world = World(first, second)
        results = await world.arrive(10.0, 50.0)
        assert errors(results) == []
        assert max(seconds for _, seconds in results) <= 1.5
        assert sum(5.0 <= at < 30.0 for at, _ in first.calls) <= 14
        assert sum(at >= 46.0 for at, _ in first.calls) > 10  # used again
        assert world.at_rest()

    clock.run(main())


def test_the_first_camera_with_a_refused_key_costs_the_others_no_answer():
    async def main():
        backend = Scripted("a", lambda camera, at: REFUSALS["key"] if camera == "poison" else None, answer_seconds=1.0)
        world = World(backend)
        poison = asyncio.create_task(world.ask("poison"))
        results = await world.arrive(10.0, 20.0)
        assert errors(results) == []
        assert (await poison)[0] is REFUSALS["key"]

    clock.run(main())


def test_long_answers_prolong_no_doubt(kind):
    async def main():
        said = []

        def refuse(camera, at):
            if not said:
                said.append(at)
                return REFUSALS[kind]
            return None

        world = World(Scripted("a", refuse, answer_seconds=20.0))
        results = await world.arrive(1.0, 10.0)
        assert errors(results) == []
        assert max(seconds for _, seconds in results) <= 20.0 + 15.0  # the doubt, and the slow rise after it

    clock.run(main())


def test_a_caller_that_leaves_during_the_doubt_does_not_keep_the_others_waiting(kind):
    async def main():
        backend = Scripted("a", lambda camera, at: REFUSALS[kind] if camera == "first" else None)
        world = World(backend)
        first = asyncio.create_task(world.ask("first"))
        await asyncio.sleep(0.1)
        other = asyncio.create_task(world.ask("other"))
        await asyncio.sleep(0.1)
        first.cancel()
        error, seconds = await other
        assert error is None
        assert seconds <= 1.5
        assert world.at_rest()

    clock.run(main())


def test_a_caller_without_time_for_a_second_attempt_gets_the_error_of_the_first(kind):
    async def main():
        world = World(Scripted("a", lambda camera, at: REFUSALS[kind]))
        assert (await world.ask(seconds=0.3))[0] is REFUSALS[kind]
        assert world.at_rest()

    clock.run(main())


# -- a wait without words ----------------------------------------------------------------------------------------------


def throttled(retry_after, kind="unknown"):
    return Throttled("refused", kind=kind, retry_after=retry_after, status=503 if kind == "capacity" else 429)


@pytest.mark.parametrize("kind", ["unknown", "capacity"])
def test_a_reported_end_of_tomorrow_becomes_a_used_up_quota_after_a_minute(kind):
    async def main():
        backend = Scripted("a", lambda camera, at: throttled(86_400.0 - at, kind) if at >= 5.0 else None)
        world = World(backend)
        results = await world.arrive(2.0, 120.0, deadline=120.0)
        seen = errors(results)
        assert {type(error) for error in seen} == {QuotaClosed}
        assert max(seconds for _, seconds in results) <= 105.0
        late = results[220:]
        assert all(isinstance(error, QuotaClosed) and seconds == 0.0 for error, seconds in late)
        assert late[0][0].retry_after == pytest.approx(86_400.0 - 110.0, abs=1.0)
        assert sum(at >= 75.0 for at, _ in backend.calls) <= 2
        assert world.at_rest()

    clock.run(main())


def test_the_rate_is_used_again_soon_after_such_a_quota_has_ended():
    async def main():
        end = 300.0
        backend = Scripted("a", lambda camera, at: throttled(end - at) if 5.0 <= at < end else None)
        world = World(backend)
        results = await world.arrive(5.0, 400.0, deadline=20.0)
        assert errors(results[int(5.0 * (end + 30.0)) :]) == []
        assert min(at for at, _ in backend.calls if at >= end) <= end + 6.0
        assert sum(at >= end + 30.0 for at, _ in backend.calls) >= 0.9 * 5.0 * 70.0

    clock.run(main())


@pytest.mark.parametrize("tiers", [(1, 1), (1, 2)])
@pytest.mark.parametrize("kind", ["unknown", "capacity"])
def test_the_other_upstream_takes_the_work_while_one_reports_an_end_of_tomorrow(kind, tiers):
    async def main():
        first = Scripted("a", lambda camera, at: throttled(86_400.0 - at, kind) if at >= 5.0 else None)
        second = Scripted("b", lambda camera, at: None)
        world = World(first, second, tiers=tiers)
        results = await world.arrive(5.0, 120.0)
        assert errors(results) == []
        assert max(seconds for _, seconds in results[50:]) <= 3.0
        assert world.circuit.state.value == "quota_period"
        assert sum(at >= 75.0 for at, _ in first.calls) <= 2

    clock.run(main())


def test_a_lack_of_capacity_for_two_minutes_is_probed_a_few_times_only():
    async def main():
        backend = Scripted("a", lambda camera, at: throttled(120.0, "capacity") if 5.0 <= at < 305.0 else None)
        world = World(backend)
        await world.arrive(2.0, 400.0, deadline=60.0)
        refused = [at for at, _ in backend.calls if 5.0 <= at < 305.0]
        opened = refused[0]
        assert sum(opened + 0.2 < at <= opened + 60.0 for at in refused) <= 5
        times = [at for at, _ in backend.calls if at >= opened]
        assert max(later - earlier for earlier, later in pairwise(times)) <= 30.0 * 1.2
        assert sum(at >= 345.0 for at in times) >= 100  # used again

    clock.run(main())


# -- a request that is larger than the limit ---------------------------------------------------------------------------


def play_large_requests(*, others, retry_after=None):
    """Ask for a large request after 100 s, with or without others beside it. Return its results and the backend."""

    async def main():
        refusal = throttled(retry_after, "token_rate")
        backend = Scripted("a", lambda camera, at: refusal if camera == "large" else None)
        world = World(backend)
        await world.ask("small")
        await world.at(100.0)
        beside = asyncio.create_task(world.arrive(others, 40.0)) if others else None
        await asyncio.sleep(0.5)
        result = await world.ask("large", 20.0)
        limit = world.admission.pool("m").upstreams[0].tokens.learner.limit
        if beside is not None:
            await beside
        assert world.at_rest()
        return result, [at for at, camera in backend.calls if camera == "large"], limit

    return clock.run(main())


@pytest.mark.parametrize(("retry_after", "seconds"), [(None, 1.0), (4.0, 4.0)])
def test_a_request_that_is_refused_for_tokens_twice_while_nothing_else_is_sent_is_too_large(retry_after, seconds):
    (error, took), calls, limit = play_large_requests(others=0, retry_after=retry_after)
    assert isinstance(error, Rejected)
    assert (error.status, error.above_limit) == (413, True)
    assert len(calls) == 2
    assert took == pytest.approx(seconds + 0.1, abs=0.01)
    assert limit == float("inf")  # nothing was learned from it


def test_a_request_that_is_refused_for_tokens_beside_others_may_fit_later():
    (error, _), calls, _ = play_large_requests(others=2.0)
    assert not isinstance(error, Rejected)
    assert len(calls) > 2


def test_a_request_that_is_refused_for_tokens_right_after_the_start_may_fit_later():
    async def main():
        backend = Scripted("a", lambda camera, at: throttled(None, "token_rate") if at < 8.0 else None)
        world = World(backend)
        assert (await world.ask("large"))[0] is None

    clock.run(main())


@pytest.mark.parametrize("tiers", [(1, 1), (1, 2)], ids=["same tier", "higher tier"])
def test_a_request_that_is_too_large_for_one_upstream_goes_to_another_at_once(tiers):
    async def main():
        first = Scripted(
            "first",
            lambda _, at: Throttled("too many tokens", kind="token_rate", retry_after=30.0) if at > 50.0 else None,
        )
        second = Scripted("second", lambda *_: None)
        world = World(first, second, tiers=tiers)
        await world.ask()
        await asyncio.sleep(100.0)
        error, seconds = await world.ask()
        return error, seconds, len(first.calls), len(second.calls)

    error, seconds, first, second = clock.run(main())
    assert error is None
    assert seconds < 1.0
    assert (first, second) == (2, 1)
