"""Requests and cameras that the provider never answers take nothing from the others: in virtual time, over sockets."""

import asyncio
import json
from random import Random
from statistics import median

import pytest
from prometheus_client import CollectorRegistry
from running import chat, running
from scripted_upstream import CHAT_ANSWER, Upstream

from backends.base import BackendError, QuotaUsedUp, Reply, Request, ServerFailed, Throttled, Usage
from bench.sim import clock
from sidecar.admission import Admission, NotAdmitted, Ticket, UpstreamSettings
from sidecar.dispatch.dispatcher import DeadlineExceeded, Dispatcher
from sidecar.observe.metrics import Metrics

SECONDS, PER_SECOND = 60.0, 10.0

REFUSALS = {
    "a day's quota": lambda: QuotaUsedUp("used up", status=429),
    "overloaded": lambda: Throttled("overloaded", kind="capacity", status=503),
    "overloaded for an hour": lambda: Throttled("overloaded", kind="capacity", status=503, retry_after=3600.0),
    "wait an hour": lambda: Throttled("wait", kind="unknown", retry_after=3600.0),
    "tokens": lambda: Throttled("too many tokens", kind="token_rate"),
    "requests": lambda: Throttled("too many requests", kind="request_rate"),
    "concurrency": lambda: Throttled("too many at once", kind="concurrency"),
}


class World:
    """A provider that answers in about a second, except that it fails each request whose path is `bad`."""

    model_id = None
    slots = None
    name = "first"

    def __init__(self, error, fail_seconds=0.05):
        self.error, self.fail_seconds, self.random = error, fail_seconds, Random(2)
        self.loop = asyncio.get_running_loop()
        self.calls, self.seconds, self.lost = [], [], 0
        admission = Admission([UpstreamSettings("first")], random=Random(2))
        self.dispatcher = Dispatcher(admission, [self], Metrics(CollectorRegistry()))
        self.dispatcher._random.seed(2)

    def unready_reason(self):
        return None

    async def send(self, request, timings):
        timings.work_started = self.loop.time()
        self.calls.append(request.path)
        if request.path == "bad":
            await asyncio.sleep(self.fail_seconds)
            raise self.error()
        await asyncio.sleep(self.random.uniform(0.7, 1.3))
        timings.first_byte = self.loop.time()
        return Reply(200, {}, b"{}", usage=Usage(300, 20))

    async def ask(self, camera, path):
        now = self.loop.time()
        ticket = Ticket(now=now, deadline=now + 30.0, key=camera, model="m", tokens=300.0)
        try:
            await self.dispatcher.run(ticket, Request("openai", path, b"{}", "m"))
            self.seconds.append(self.loop.time() - now)
        except (NotAdmitted, BackendError, DeadlineExceeded):
            self.lost += path != "bad"

    async def arrive(self, share, *, camera=None, quiet=10.0):
        """Random arrivals of ten cameras. After `quiet` seconds, `share` of them are bad, all of `camera` if given."""
        began = self.loop.time()
        async with asyncio.TaskGroup() as tasks:
            while self.loop.time() < began + SECONDS:
                await asyncio.sleep(self.random.expovariate(PER_SECOND))
                is_bad = self.random.random() < share and self.loop.time() > began + quiet
                one = f"camera-{self.random.randrange(10)}"
                path = "bad" if is_bad else "good"
                tasks.create_task(self.ask(camera if is_bad and camera else one, path))


@pytest.mark.parametrize("camera", [None, "one"], ids=["of all cameras", "of one camera"])
@pytest.mark.parametrize("fail_seconds", [0.05, 0.9])
@pytest.mark.parametrize("share", [0.1])
def test_requests_that_always_fail_take_no_answer_from_the_others(share, fail_seconds, camera):
    async def main():
        world = World(lambda: ServerFailed("it failed", status=500), fail_seconds)
        await world.arrive(share, camera=camera)
        assert world.lost == 0
        assert median(world.seconds) <= 1.5

    clock.run(main())


@pytest.mark.parametrize("error", REFUSALS.values(), ids=REFUSALS)
def test_a_camera_that_is_always_refused_takes_no_answer_from_the_others(error):
    async def main():
        world = World(error)
        await world.arrive(0.05, camera="one")
        assert world.lost == 0
        assert median(world.seconds) <= 1.5

    clock.run(main())


def test_a_quota_that_is_used_up_for_all_costs_few_calls():
    async def main():
        world = World(REFUSALS["a day's quota"])
        await world.arrive(1.0)
        assert world.calls.count("bad") <= 4

    clock.run(main())


DAY = json.dumps({"error": {"message": "Rate limit reached for requests per day (RPD)", "code": "rate_limit_exceeded"}})
OVERLOADED = json.dumps({"error": {"message": "The model is overloaded", "code": "overloaded"}})
ARREARS = json.dumps({"error": {"message": "Insufficient balance", "code": "Arrearage"}})
WRONG_KEY = json.dumps({"error": {"message": "no", "code": "invalid_api_key"}})
CRASH = json.dumps({"error": {"message": "internal error", "type": "server_error"}})


@pytest.mark.parametrize(
    ("status", "refusal"), [(429, DAY), (503, OVERLOADED), (500, CRASH), (400, ARREARS), (401, WRONG_KEY)]
)
async def test_over_sockets_one_camera_that_is_never_answered_takes_no_answer_from_the_others(status, refusal):
    async def script(link, request):
        if b"poison" in request.body:
            await link.answer(refusal.encode(), status)
            return
        await asyncio.sleep(0.05)
        await link.answer(CHAT_ANSWER)

    async def ask(camera, text, seconds):
        headers = {"X-Camera-Id": camera, "X-Request-Timeout": str(seconds)}
        async with sidecar.post(chat(text), headers=headers) as response:
            await response.read()
            return response.status

    async def frames(camera):
        return [await ask(camera, "a frame", 10.0) for _ in range(20)]

    async def poison():
        while True:
            await ask("poisoned", "poison", 1.0)

    async with Upstream(script) as upstream, running(dashscope_url=f"{upstream.origin}/v1") as sidecar:
        assert await ask("camera", "a frame", 10.0) == 200
        poisoning = [asyncio.create_task(poison()) for _ in range(3)]
        answers = await asyncio.gather(*(frames(f"camera-{number}") for number in range(6)))
        for task in poisoning:
            task.cancel()
        await asyncio.gather(*poisoning, return_exceptions=True)
    assert {status for statuses in answers for status in statuses} == {200}
