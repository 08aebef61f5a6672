"""`SIDECAR_BACKEND=dashscope,simulated`: a later backend takes over, nothing is lost meanwhile, and traffic returns."""

from __future__ import annotations

import asyncio

import pytest
from running import chat
from scripted_upstream import CHAT_ANSWER


class Provider:
    """What a scripted upstream does at present, changed by the test as it goes."""

    def __init__(self):
        self.asked = 0
        self.act = self.answer

    async def __call__(self, link, seen):
        self.asked += 1
        await self.act(link)

    async def answer(self, link):
        await link.answer(CHAT_ANSWER)

    async def be_down(self, link):
        link.reset()

    def refuse(self, status, code):
        async def act(link):
            await link.answer({"error": {"code": code, "message": code, "type": "error"}}, status)

        self.act = act


@pytest.fixture
async def pair(serving, scripted):
    """A sidecar with a scripted provider first and the simulated one behind it."""
    provider = Provider()
    upstream = await scripted(provider)

    async def start(**settings):
        return await serving(backend="dashscope,simulated", dashscope_url=upstream.origin + "/v1", **settings), provider

    return start


async def who(sidecar, body=None, **options):
    """Ask; gives the status and who answered."""
    async with sidecar.post(body, **options) as response:
        await response.read()
        return response.status, response.headers["X-Sidecar-Backend"]


async def test_an_outage_loses_nothing_and_traffic_returns_by_itself(pair):
    sidecar, provider = await pair()
    assert await who(sidecar) == (200, "dashscope")
    provider.act = provider.be_down
    answers = await asyncio.gather(*(who(sidecar, headers={"X-Camera-Id": str(at)}) for at in range(12)))
    assert answers == [(200, "simulated")] * 12
    before = provider.asked
    assert await asyncio.gather(*(who(sidecar) for _ in range(20))) == [(200, "simulated")] * 20
    assert provider.asked - before <= 2  # single probes
    provider.act = provider.answer
    async with asyncio.timeout(10):
        while await who(sidecar) != (200, "dashscope"):  # noqa: ASYNC110  it is asking that finds it back
            await asyncio.sleep(0.05)
    assert await asyncio.gather(*(who(sidecar) for _ in range(5))) == [(200, "dashscope")] * 5
    metrics = await sidecar.metrics()
    assert metrics['sidecar_requests_total{api="openai",backend="dashscope",outcome="ok"}'] >= 7
    assert metrics['sidecar_requests_total{api="openai",backend="simulated",outcome="ok"}'] >= 32
    assert not any(
        value
        for name, value in metrics.items()
        if name.startswith("sidecar_requests_total") and 'outcome="ok"' not in name
    )


async def test_a_provider_that_was_never_there_is_taken_over_from_too(pair):
    sidecar, provider = await pair()
    provider.act = provider.be_down
    assert await who(sidecar) == (200, "simulated")


@pytest.mark.parametrize(
    ("status", "code"), [(400, "Arrearage"), (401, "invalid_api_key")], ids=["out of money", "no key"]
)
async def test_an_account_that_is_refused_is_left_alone(pair, status, code):
    sidecar, provider = await pair()
    provider.refuse(status, code)
    assert await who(sidecar) == (200, "simulated")
    asked = provider.asked
    assert await asyncio.gather(*(who(sidecar) for _ in range(5))) == [(200, "simulated")] * 5
    assert provider.asked == asked


async def test_without_a_second_backend_a_wrong_key_is_told(serving, scripted):
    provider = Provider()
    provider.refuse(401, "invalid_api_key")
    upstream = await scripted(provider)
    sidecar = await serving(dashscope_url=upstream.origin + "/v1")
    assert await who(sidecar) == (401, "dashscope")
    provider.act = provider.answer  # the key was rotated
    assert await who(sidecar) == (200, "dashscope")


async def test_what_waits_when_a_hold_closes_moves_on(pair):
    sidecar, provider = await pair(max_concurrency=1)
    out_of_room = asyncio.Event()

    async def act(link):
        await out_of_room.wait()
        await link.answer({"error": {"code": "ModelServingError", "message": "Too many requests"}}, 503)

    provider.act = act
    asking = [asyncio.create_task(who(sidecar)) for _ in range(4)]
    await sidecar.until(lambda: sidecar.sidecar.admission.waiting() == 3)
    out_of_room.set()
    assert await asyncio.gather(*asking) == [(200, "simulated")] * 4
    assert provider.asked == 1
    assert sidecar.at_rest()


async def test_a_request_that_would_wait_past_its_deadline_goes_where_it_need_not(pair):
    sidecar, provider = await pair(max_concurrency=1)
    go_on = asyncio.Event()

    async def act(link):
        await asyncio.sleep(0.5)
        await link.answer(CHAT_ANSWER)

    provider.act = act
    assert await who(sidecar) == (200, "dashscope")  # it takes half a second, as is known from now on

    async def wait(link):
        await go_on.wait()
        await link.answer(CHAT_ANSWER)

    provider.act = wait
    busy = asyncio.create_task(who(sidecar))
    await sidecar.until(lambda: sidecar.sidecar.admission.in_flight() == 1)
    assert await who(sidecar, headers={"X-Request-Timeout": "0.8"}) == (200, "simulated")
    patient = asyncio.create_task(who(sidecar))
    await sidecar.until(lambda: sidecar.sidecar.admission.waiting() == 1)
    go_on.set()
    assert await asyncio.gather(busy, patient) == [(200, "dashscope")] * 2


async def test_throttling_alone_moves_nothing_that_can_wait(pair):
    sidecar, provider = await pair()
    assert await who(sidecar) == (200, "dashscope")
    provider.refuse(429, "Throttling.RateQuota")
    asking = [asyncio.create_task(who(sidecar)) for _ in range(3)]
    await sidecar.until(lambda: provider.asked >= 5)
    provider.act = provider.answer
    assert await asyncio.gather(*asking) == [(200, "dashscope")] * 3


async def test_a_stream_that_has_begun_is_not_moved(pair):
    sidecar, provider = await pair()

    async def act(link):
        await link.start_stream()
        await link.chunk(b'data: {"choices": [{"index": 0, "delta": {"content": "A "}}]}\n\n')
        link.close()

    provider.act = act
    async with sidecar.post(chat(stream=True)) as response:
        raw = await response.read()
    assert (response.status, response.headers["X-Sidecar-Backend"]) == (200, "dashscope")
    assert b'"A "' in raw
    assert b"upstream_error" in raw
    assert provider.asked == 1


async def test_a_request_at_fault_is_told_and_not_moved(pair):
    sidecar, provider = await pair()
    provider.refuse(400, "InvalidParameter")
    assert await who(sidecar) == (400, "dashscope")


async def test_the_list_of_models_comes_from_whoever_gives_one(pair):
    sidecar, provider = await pair()
    provider.act = provider.be_down
    async with sidecar.client.get(f"{sidecar.url}/v1/models") as response:
        assert response.status == 200
        assert (await response.json())["object"] == "list"


async def test_cancelling_on_the_way_between_backends_leaves_nothing_behind(pair):
    sidecar, provider = await pair(max_concurrency=1)
    provider.act = provider.be_down
    for turns in range(40):
        asking = [asyncio.create_task(who(sidecar)) for _ in range(3)]
        for _ in range(turns):
            await asyncio.sleep(0)
        for task in asking:
            task.cancel()
        await asyncio.wait(asking)
    await sidecar.until(sidecar.at_rest)
    assert (await who(sidecar))[0] == 200
