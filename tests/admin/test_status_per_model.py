"""Each account and model has its own learned limits. `/status` reports them, and when and why they changed."""

from __future__ import annotations

import asyncio

import pytest
from running import chat

SMALL, OTHER = "qwen-vl-max", "qwen-vl-plus"


async def ask(sidecar, model):
    loop = asyncio.get_running_loop()
    begun = loop.time()
    async with sidecar.post(chat(model=model)) as response:
        await response.read()
        assert response.status == 200
    return loop.time() - begun


async def status(sidecar):
    async with sidecar.client.get(f"{sidecar.admin_url}/status") as response:
        return {model["model"]: model for model in (await response.json())["backends"][0]["models"]}


@pytest.mark.alone
async def test_refusals_of_one_model_do_not_delay_another(serving, provider):
    """The provider has a separate quota for each model: 5 requests/s, bursts of 5."""
    url, simulated = await provider(requests_per_second=5, burst_requests=5, latency_seconds=0.05)
    sidecar = await serving(dashscope_url=url)
    crowd = [asyncio.ensure_future(ask(sidecar, SMALL)) for _ in range(20)]
    await sidecar.until(lambda: simulated.counts.refused["request_rate"] > 0)
    refused = simulated.counts.refused["request_rate"]
    assert max(await asyncio.gather(*(ask(sidecar, OTHER) for _ in range(3)))) < 1.0
    models = await status(sidecar)
    assert models[SMALL]["waiting"] > 0
    assert models[SMALL]["requests"]["learned"] is not None
    assert models[OTHER]["requests"]["learned"] is None
    assert models[OTHER]["requests"]["state"] == "start"
    await asyncio.gather(*crowd)
    assert simulated.counts.refused["request_rate"] >= refused


async def test_status_reports_the_binding_limit_its_value_and_the_reason_of_the_last_change(serving, provider):
    url, simulated = await provider(requests_per_second=5, burst_requests=5, latency_seconds=0.05)
    sidecar = await serving(dashscope_url=url)
    await ask(sidecar, OTHER)
    idle = (await status(sidecar))[OTHER]
    assert (idle["bound_by"], idle["in_words"]) == (None, "idle")
    assert idle["requests"]["changed_why"] == "nothing was refused yet"

    crowd = [asyncio.ensure_future(ask(sidecar, OTHER)) for _ in range(20)]
    pool = sidecar.sidecar.admission.pool(OTHER)
    await sidecar.until(lambda: simulated.counts.refused["request_rate"] and pool.waiting.cause == "request_rate")
    bound = (await status(sidecar))[OTHER]
    assert bound["bound_by"] == "request_rate"
    assert "the provider's request limit" in bound["in_words"]
    assert bound["requests"]["learned"] > 0
    assert bound["requests"]["pace"] > 0
    assert bound["requests"]["changed_why"] != idle["requests"]["changed_why"]
    assert bound["requests"]["changed_seconds_ago"] < 5.0
    assert bound["tokens"]["learned"] is None  # no refusal named the token rate
    await asyncio.gather(*crowd)


async def test_a_rotated_key_is_used_immediately_and_the_learned_limits_stay(serving, provider, tmp_path):
    """Usually the new key belongs to the same account. If it does not, learning goes on from the old limit."""
    key = tmp_path / "key"
    key.write_text("sk-old")
    url, simulated = await provider(requests_per_second=5, burst_requests=5, latency_seconds=0.05)
    sidecar = await serving(dashscope_url=url, dashscope_api_key_file=str(key))
    [backend] = sidecar.sidecar.parts.backends
    await asyncio.gather(*(ask(sidecar, OTHER) for _ in range(12)))
    learned = (await status(sidecar))[OTHER]["requests"]["learned"]
    refused, account = simulated.counts.refused["request_rate"], backend.account()
    assert learned is not None

    key.with_name("new").write_text("sk-new")
    key.with_name("new").replace(key)
    await sidecar.until(lambda: backend.account() != account)
    assert (await status(sidecar))[OTHER]["requests"]["learned"] == learned
    await asyncio.gather(*(ask(sidecar, OTHER) for _ in range(12)))
    assert simulated.counts.refused["request_rate"] <= refused + 2  # no second burst: the old pace applies
    assert "sk-" not in backend.account()
