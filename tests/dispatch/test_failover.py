"""`SIDECAR_BACKEND=dashscope,simulated`: the second backend serves while the first cannot, and no request is lost."""

from __future__ import annotations

import asyncio

import pytest
from running import chat
from scripted_upstream import CHAT_ANSWER


class Provider:
    """A scripted upstream. The test changes its behaviour by setting `act`."""

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
    """A sidecar with a scripted provider as its first backend and the simulated one as its second."""
    provider = Provider()
    upstream = await scripted(provider)

    async def start(**settings):
        return await serving(backend="dashscope,simulated", dashscope_url=upstream.origin + "/v1", **settings), provider

    return start


async def ask(sidecar, body=None, **options):
    """Send a request; return its status and the backend that answered."""
    async with sidecar.post(body, **options) as response:
        await response.read()
        return response.status, response.headers["X-Sidecar-Backend"]


async def test_an_outage_loses_no_request_and_traffic_returns_afterwards(pair):
    sidecar, provider = await pair()
    assert await ask(sidecar) == (200, "dashscope")
    provider.act = provider.be_down
    answers = await asyncio.gather(*(ask(sidecar, headers={"X-Camera-Id": str(at)}) for at in range(12)))
    assert answers == [(200, "simulated")] * 12
    before = provider.asked
    assert await asyncio.gather(*(ask(sidecar) for _ in range(20))) == [(200, "simulated")] * 20
    assert provider.asked - before <= 2  # half-open probes
    provider.act = provider.answer
    async with asyncio.timeout(10):
        while await ask(sidecar) != (200, "dashscope"):  # noqa: ASYNC110  only a request can probe the provider
            await asyncio.sleep(0.05)
    assert await asyncio.gather(*(ask(sidecar) for _ in range(5))) == [(200, "dashscope")] * 5
    metrics = await sidecar.metrics()
    assert metrics['sidecar_requests_total{api="openai",backend="dashscope",outcome="ok"}'] >= 7
    assert metrics['sidecar_requests_total{api="openai",backend="simulated",outcome="ok"}'] >= 32
    assert not any(
        value
        for name, value in metrics.items()
        if name.startswith("sidecar_requests_total") and 'outcome="ok"' not in name
    )


async def test_the_second_backend_serves_if_the_first_never_answered(pair):
    sidecar, provider = await pair()
    provider.act = provider.be_down
    assert await ask(sidecar) == (200, "simulated")


@pytest.mark.parametrize(
    ("status", "code"), [(400, "Arrearage"), (401, "invalid_api_key")], ids=["out of money", "no key"]
)
async def test_a_backend_that_refuses_the_account_gets_no_more_requests(pair, status, code):
    sidecar, provider = await pair()
    provider.refuse(status, code)
    assert await ask(sidecar) == (200, "simulated")
    asked = provider.asked
    assert await asyncio.gather(*(ask(sidecar) for _ in range(5))) == [(200, "simulated")] * 5
    assert provider.asked == asked


async def test_without_a_second_backend_the_caller_gets_the_401(serving, scripted):
    provider = Provider()
    provider.refuse(401, "invalid_api_key")
    upstream = await scripted(provider)
    sidecar = await serving(dashscope_url=upstream.origin + "/v1")
    assert await ask(sidecar) == (401, "dashscope")
    provider.act = provider.answer  # the key was rotated
    assert await ask(sidecar) == (200, "dashscope")


async def test_tickets_that_wait_when_a_hold_begins_move_to_the_other_backend(pair):
    sidecar, provider = await pair(max_concurrency=1)
    out_of_room = asyncio.Event()

    async def act(link):
        await out_of_room.wait()
        await link.answer({"error": {"code": "ModelServingError", "message": "Too many requests"}}, 503)

    provider.act = act
    asking = [asyncio.create_task(ask(sidecar)) for _ in range(4)]
    await sidecar.until(lambda: sidecar.sidecar.admission.waiting() == 3)
    out_of_room.set()
    assert await asyncio.gather(*asking) == [(200, "simulated")] * 4
    assert provider.asked == 1
    assert sidecar.at_rest()


async def test_a_request_that_would_miss_its_deadline_goes_to_the_other_backend(pair):
    sidecar, provider = await pair(max_concurrency=1)
    go_on = asyncio.Event()

    async def act(link):
        await asyncio.sleep(0.5)
        await link.answer(CHAT_ANSWER)

    provider.act = act
    assert await ask(sidecar) == (200, "dashscope")  # from now on the sidecar expects answers after 0.5 s

    async def wait(link):
        await go_on.wait()
        await link.answer(CHAT_ANSWER)

    provider.act = wait
    busy = asyncio.create_task(ask(sidecar))
    await sidecar.until(lambda: sidecar.sidecar.admission.in_flight() == 1)
    assert await ask(sidecar, headers={"X-Request-Timeout": "0.8"}) == (200, "simulated")
    patient = asyncio.create_task(ask(sidecar))
    await sidecar.until(lambda: sidecar.sidecar.admission.waiting() == 1)
    go_on.set()
    assert await asyncio.gather(busy, patient) == [(200, "dashscope")] * 2


async def test_throttling_moves_no_request_that_has_time_to_wait(pair):
    sidecar, provider = await pair()
    assert await ask(sidecar) == (200, "dashscope")
    provider.refuse(429, "Throttling.RateQuota")
    asking = [asyncio.create_task(ask(sidecar)) for _ in range(3)]
    await sidecar.until(lambda: provider.asked >= 5)
    provider.act = provider.answer
    assert await asyncio.gather(*asking) == [(200, "dashscope")] * 3


async def test_a_stream_that_has_begun_stays_at_its_backend(pair):
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


async def test_an_invalid_request_gets_its_error_and_no_second_backend(pair):
    sidecar, provider = await pair()
    provider.refuse(400, "InvalidParameter")
    assert await ask(sidecar) == (400, "dashscope")


async def test_the_list_of_models_comes_from_the_first_backend_that_answers(pair):
    sidecar, provider = await pair()
    provider.act = provider.be_down
    async with sidecar.client.get(f"{sidecar.url}/v1/models") as response:
        assert response.status == 200
        assert (await response.json())["object"] == "list"


async def test_cancelling_while_a_request_changes_backends_leaves_nothing_behind(pair):
    sidecar, provider = await pair(max_concurrency=1)
    provider.act = provider.be_down
    for turns in range(40):
        asking = [asyncio.create_task(ask(sidecar)) for _ in range(3)]
        for _ in range(turns):
            await asyncio.sleep(0)
        for task in asking:
            task.cancel()
        await asyncio.wait(asking)
    await sidecar.until(sidecar.at_rest)
    assert (await ask(sidecar))[0] == 200
