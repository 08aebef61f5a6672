"""Each account and model learns for itself; `/status` says what was learned, when and why, and which limit binds."""

from __future__ import annotations

import asyncio

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


async def test_one_models_refusals_do_not_slow_another(serving, provider):
    """The provider's quota is each model's own: 5/s, 5 at once."""
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


async def test_status_tells_the_limit_that_binds_what_was_learned_and_why(serving, provider):
    url, simulated = await provider(requests_per_second=5, burst_requests=5, latency_seconds=0.05)
    sidecar = await serving(dashscope_url=url)
    await ask(sidecar, OTHER)
    idle = (await status(sidecar))[OTHER]
    assert (idle["bound_by"], idle["in_words"]) == (None, "idle")
    assert idle["requests"]["changed_why"] == "nothing was refused yet"

    crowd = [asyncio.ensure_future(ask(sidecar, OTHER)) for _ in range(20)]
    pool = sidecar.sidecar.admission.pool(OTHER)
    await sidecar.until(lambda: simulated.counts.refused["request_rate"] and pool.cause == "request_rate")
    bound = (await status(sidecar))[OTHER]
    assert bound["bound_by"] == "request_rate"
    assert "the provider's request limit" in bound["in_words"]
    assert bound["requests"]["learned"] > 0
    assert bound["requests"]["pace"] > 0
    assert bound["requests"]["changed_why"] != idle["requests"]["changed_why"]
    assert bound["requests"]["changed_seconds_ago"] < 5.0
    assert bound["tokens"]["learned"] is None  # no refusal spoke of tokens
    await asyncio.gather(*crowd)


async def test_a_rotated_key_keeps_what_was_learned_and_is_used_at_once(serving, provider, tmp_path):
    """Mostly the new key is one of the same account; where it is not, the limit is found anew from there."""
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
    assert simulated.counts.refused["request_rate"] <= refused + 2  # no second burst: it is paced from the start
    assert "sk-" not in backend.account()
