"""`GET /v1/models` is kept for some seconds, and asked for by one call at a time, which is counted like every other."""

from __future__ import annotations

import asyncio
import json

import pytest
from running import BOUND, CHAT, IMAGE_URL, chat

from sidecar.admission import NO_MODEL
from sidecar.dispatch import model_list

LIST = {"object": "list", "data": [{"id": "yard-vl", "object": "model"}]}
IN_FLIGHT = 'sidecar_in_flight_requests{backend="dashscope"}'


@pytest.fixture
def short_times(monkeypatch):
    """Let a list be old after 0.05 s."""
    monkeypatch.setattr(model_list, "FRESH_SECONDS", 0.05)


class Provider:
    """Answers the list of models with `answer`, when `may_answer` is set."""

    def __init__(self) -> None:
        self.answer = (LIST, 200)
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.calls = 0

    async def __call__(self, link, seen):
        if not seen.path.endswith("/models"):
            await link.answer({"choices": [{"message": {"content": "A gate."}, "finish_reason": "stop"}]})
            return
        self.calls += 1
        await self.may_answer.wait()
        body, status = self.answer
        await link.answer(body, status=status)


@pytest.fixture
def provider():
    return Provider()


@pytest.fixture
async def sidecar(serving, scripted, provider):
    upstream = await scripted(provider)
    return await serving(dashscope_url=f"{upstream.origin}/v1")


async def models(sidecar, **headers):
    async with sidecar.client.get(f"{sidecar.url}/v1/models", headers=headers) as response:
        return response.status, json.loads(await response.read())


async def test_many_callers_cause_one_call_which_counts_as_one_in_flight(sidecar, provider):
    provider.may_answer.clear()
    callers = [asyncio.create_task(models(sidecar)) for _ in range(20)]
    await sidecar.until(lambda: provider.calls)
    assert (await sidecar.metrics())[IN_FLIGHT] == 1
    provider.may_answer.set()
    assert await asyncio.gather(*callers) == [(200, LIST)] * 20
    assert await models(sidecar) == (200, LIST)
    async with sidecar.client.head(f"{sidecar.url}/v1/models") as response:
        assert (response.status, await response.read()) == (200, b"")
    assert provider.calls == 1
    metrics = await sidecar.metrics()
    assert metrics[IN_FLIGHT] == 0
    assert metrics['sidecar_upstream_attempts_total{backend="dashscope",result="ok"}'] == 1


async def test_a_caller_who_leaves_does_not_end_the_call_of_the_others(sidecar, provider):
    provider.may_answer.clear()
    get = sidecar.sidecar.parts.models.get
    first, second = (asyncio.create_task(get(BOUND, max_seconds=BOUND)) for _ in range(2))
    await sidecar.until(lambda: provider.calls)
    first.cancel()
    await asyncio.wait([first])
    provider.may_answer.set()
    assert json.loads(await second) == LIST
    assert provider.calls == 1


async def test_an_old_list_is_asked_for_again(sidecar, provider, short_times):
    assert await models(sidecar) == (200, LIST)
    await asyncio.sleep(0.06)
    newer = {"object": "list", "data": []}
    provider.answer = newer, 200
    assert await models(sidecar) == (200, newer)


@pytest.mark.parametrize("status", [429, 500, 401, 404])
async def test_the_last_list_is_given_while_the_upstream_refuses_or_fails(
    sidecar, provider, short_times, monkeypatch, status
):
    monkeypatch.setattr(model_list, "PATIENCE_SECONDS", 0.2)
    assert await models(sidecar) == (200, LIST)
    await asyncio.sleep(0.06)
    provider.answer = {"error": {"message": "not now", "code": "limit_requests" if status == 429 else "x"}}, status
    for _ in range(3):
        assert await models(sidecar) == (200, LIST)
    monkeypatch.setattr(model_list, "STALE_SECONDS", 0.1)
    await asyncio.sleep(0.1)
    async with asyncio.timeout(BOUND):
        found, error = await models(sidecar, **{"X-Request-Timeout": "1"})
    assert found in {429: (503, 504), 500: (502, 504)}.get(status, (status,)), error
    assert error["error"]["message"]


async def test_the_last_list_is_given_soon_while_the_upstream_hangs(sidecar, provider, short_times, monkeypatch):
    monkeypatch.setattr(model_list, "PATIENCE_SECONDS", 0.1)
    assert await models(sidecar) == (200, LIST)
    await asyncio.sleep(0.06)
    provider.may_answer.clear()
    for _ in range(3):
        assert await models(sidecar) == (200, LIST)
    assert provider.calls == 2
    async with sidecar.post(chat()) as response:
        assert response.status == 200


async def test_a_refused_list_is_asked_for_again_and_no_caller_sees_the_refusal(serving, scripted):
    async def script(link, seen):
        if len(upstream.seen) == 1:
            await link.answer({"error": {"code": "limit_requests", "message": "slow down"}}, status=429)
        else:
            await link.answer(LIST)

    upstream = await scripted(script)
    assert await models(await serving(dashscope_url=f"{upstream.origin}/v1")) == (200, LIST)
    assert len(upstream.seen) == 2


async def test_refusals_of_the_list_do_not_slow_the_generations(sidecar, provider):
    provider.answer = {"error": {"code": "limit_requests", "message": "slow down"}}, 429
    refused = asyncio.create_task(models(sidecar, **{"X-Request-Timeout": "2"}))
    await sidecar.until(lambda: provider.calls)
    for _ in range(20):
        async with sidecar.post(chat()) as response:
            assert response.status == 200
            assert response.headers["X-Sidecar-Attempts"] == "1"
    assert "sidecar_limit_requests_per_second" not in "".join(await sidecar.metrics())
    status, error = await refused
    assert status in (503, 504), error
    assert provider.calls < 12


async def test_a_caller_with_little_time_gets_504_and_the_call_goes_on(sidecar, provider):
    provider.may_answer.clear()
    status, error = await models(sidecar, **{"X-Request-Timeout": "0.1"})
    assert (status, error["error"]["code"]) == (504, "deadline_exceeded")
    provider.may_answer.set()
    assert await models(sidecar) == (200, LIST)
    assert provider.calls == 1


async def test_a_sidecar_that_closes_ends_the_call(scripted, provider):
    from running import running  # noqa: PLC0415

    provider.may_answer.clear()
    upstream = await scripted(provider)
    async with running(dashscope_url=f"{upstream.origin}/v1") as sidecar:
        caller = asyncio.create_task(models(sidecar))
        await sidecar.until(lambda: provider.calls)
        caller.cancel()
        await asyncio.wait([caller])
        assert sidecar.sidecar.admission.in_flight() == 1
    assert sidecar.sidecar.admission.in_flight() == 0
    assert not [task for task in asyncio.all_tasks() if "ModelList" in repr(task)]


async def test_the_list_has_an_entry_of_its_own_behind_the_models_of_status(sidecar):
    async with sidecar.post(chat()) as response:
        assert response.status == 200
    await models(sidecar)
    async with sidecar.client.get(f"{sidecar.admin_url}/status") as response:
        [backend] = (await response.json())["backends"]
    assert [model["model"] for model in backend["models"]] == ["qwen-vl-plus", "(no model)"]


@pytest.mark.parametrize("path", [CHAT, "/v1/embeddings", "/api/inference/describe"])
async def test_no_caller_gets_into_the_pool_of_requests_without_a_model(serving, scripted, path):
    """It has no rates, so the operator's ceiling would not hold there."""
    upstream = await scripted()
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", passthrough=True)
    body = {**chat(model=NO_MODEL), "input": "x", "prompt": "x", "image_b64": IMAGE_URL.partition(",")[2]}
    async with sidecar.client.post(sidecar.url + path, json=body) as response:
        is_passed_on = path == "/v1/embeddings"  # without the name: the provider decides
        assert response.status == 200 if is_passed_on else response.status in (400, 422)
    assert len(upstream.seen) == is_passed_on
    async with sidecar.client.get(f"{sidecar.admin_url}/status") as response:
        [backend] = (await response.json())["backends"]
    assert NO_MODEL not in [model["model"] for model in backend["models"]]
