"""The list of models of several backends: the first that answers gives it, and one in this process waits for nobody."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry

from backends.base import Unreachable
from sidecar.admission import NO_MODEL, Admission, QuotaClosed, Ticket, UpstreamSettings, Verdict
from sidecar.admission.admission import MAX_POOLS
from sidecar.dispatch import model_list
from sidecar.dispatch.model_list import ModelList
from sidecar.observe.metrics import Metrics


def backend(name, models, *, in_process=False):
    return SimpleNamespace(name=name, model_id=name if in_process else None, models=models)


def listing(*backends):
    settings = [UpstreamSettings(one.name, tier, only_model=one.model_id) for tier, one in enumerate(backends, 1)]
    admission = Admission(settings)
    return admission, ModelList(admission, backends, Metrics(CollectorRegistry()))


async def down():
    raise Unreachable("no connection")


async def hang():
    await asyncio.Event().wait()


async def local():
    return b"local"


@pytest.mark.parametrize("remote", [down, hang])
async def test_a_list_in_this_process_replaces_that_of_an_upstream_that_does_not_answer(remote, monkeypatch):
    monkeypatch.setattr(model_list, "PATIENCE_SECONDS", 0.05)
    admission, models = listing(backend("dashscope", remote), backend("local", local, in_process=True))
    assert await models.get(5.0, max_seconds=5.0) == b"local"
    await models.close()
    assert admission.in_flight() == 0
    assert not admission.waiting()


async def test_a_first_backend_in_this_process_is_asked_at_once_and_no_upstream_is(monkeypatch):
    admission, models = listing(backend("local", local, in_process=True), backend("dashscope", hang))
    assert await models.get(5.0, max_seconds=5.0) == b"local"
    assert list(admission.status()) == []
    await models.close()


async def test_of_two_upstreams_the_first_that_answers_gives_the_list():
    async def second():
        return b"second"

    _, models = listing(backend("dashscope", down), backend("simulated", second))
    assert await models.get(5.0, max_seconds=5.0) == b"second"


async def test_a_failed_call_that_nobody_waits_for_leaves_no_message(caplog):
    async def slow():
        await asyncio.sleep(0.02)
        return await down()

    _, models = listing(backend("dashscope", slow))
    caller = asyncio.create_task(models.get(5.0, max_seconds=0.1))
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.wait([caller])
    await asyncio.sleep(0.2)
    await models.close()
    assert caplog.text == ""


async def test_requests_without_a_model_use_no_place_of_a_backend_in_this_process_and_pools_stay_bounded():
    admission, _ = listing(backend("dashscope", down), backend("local", local, in_process=True))
    assert [upstream.name for upstream in admission.pool(NO_MODEL).upstreams] == ["dashscope"]
    for number in range(3 * MAX_POOLS):
        now = admission.loop.time()
        with await admission.permit(Ticket(now=now, deadline=now + 1.0, model=f"m-{number}")):
            pass
    assert len(list(admission.status())) == MAX_POOLS
    assert len(admission._upstreams) <= 2 * MAX_POOLS


async def test_a_flood_of_names_does_not_make_the_sidecar_forget_an_account_without_quota():
    admission, _ = listing(backend("dashscope", down))
    now = admission.loop.time()
    for key in ("first", "second"):
        permit = await admission.permit(Ticket(now=now, deadline=now + 1.0, model="in use", key=key))
        permit.report(Verdict("account", now, "quota_period", reason="the day's quota is used up"))
    for number in range(3 * MAX_POOLS):
        with await admission.permit(Ticket(now=now, deadline=now + 1.0, model=f"m-{number}")):
            pass
    with pytest.raises(QuotaClosed):
        await admission.permit(Ticket(now=now, deadline=now + 1.0, model="in use"))
