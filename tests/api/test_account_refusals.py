"""What callers and operators see when a provider refuses the account, the key, or one request; from end to end."""

from __future__ import annotations

import asyncio
import json

import pytest
from running import chat
from scripted_upstream import CHAT_ANSWER

from sidecar.admission import own_fault
from sidecar.admission.gates import reported_waits

pytestmark = pytest.mark.http

MONEY = (403, {"error": {"code": "WalletEmpty", "message": "Your credit balance is too low, please recharge."}})
KEY = (401, {"error": {"code": "invalid_api_key", "message": "Incorrect API key provided."}})
TOKENS = (429, {"error": {"code": "rate_limit_exceeded", "message": "Rate limit reached for tokens per minute (TPM)."}})
WORDLESS: tuple[int, dict[str, str]] = (429, {})


class Provider:
    """Answers with `answer` if it is set, at most `times` times, otherwise with a chat completion."""

    def __init__(self):
        self.answer = None
        self.times = 1_000
        self.headers = ""
        self.calls = 0

    async def __call__(self, link, seen):
        self.calls += 1
        if self.answer is None or self.times == 0:
            await link.answer(CHAT_ANSWER)
            return
        self.times -= 1
        status, body = self.answer
        await link.answer(body, status=status, headers=self.headers)


@pytest.fixture
async def pair(serving, scripted):
    """A sidecar, and the provider that it asks."""
    provider = Provider()
    upstream = await scripted(provider)
    return await serving(dashscope_url=f"{upstream.origin}/v1"), provider


async def ask(sidecar, **options):
    """Return status, error code, message and headers."""
    async with sidecar.post(chat(), **options) as response:
        error = json.loads(await response.read()).get("error", {})
        return response.status, error.get("code"), error.get("message", ""), response.headers


async def circuit_of(sidecar):
    """Return the state of the open circuit as `/metrics` shows it; None while it is closed."""
    states = [name for name, value in (await sidecar.metrics()).items() if value and 'dimension="hold"' in name]
    return states[0].partition('state="')[2].partition('"')[0] if states else None


@pytest.mark.parametrize("refusal", [MONEY, KEY], ids=["money", "key"])
async def test_one_refusal_is_seen_by_nobody(pair, refusal):
    sidecar, provider = pair
    provider.answer, provider.times = refusal, 1
    cameras = [ask(sidecar, headers={"X-Camera-Id": str(number)}) for number in range(8)]
    assert [status for status, *_ in await asyncio.gather(*cameras)] == [200] * 8
    assert provider.calls == 9
    assert await circuit_of(sidecar) is None


async def test_a_second_refusal_for_money_closes_the_account_for_all_callers(pair):
    sidecar, provider = pair
    provider.answer = MONEY
    first, *others = [await ask(sidecar) for _ in range(4)]
    assert first[:2] == (502, "upstream_billing")
    assert "credit balance" in first[2]  # only this caller gets the provider's words
    for status, code, message, headers in others:
        assert (status, code) == (502, "upstream_billing")
        assert "WalletEmpty" in message
        assert "credit balance" not in message
        assert int(headers["Retry-After"]) <= 6
        assert headers["X-Should-Retry"] == "false"
    assert provider.calls == 2
    assert await circuit_of(sidecar) == "billing"
    assert (await sidecar.metrics())['sidecar_throttles_total{backend="dashscope",kind="billing"}'] == 2


async def test_a_refused_key_is_passed_on_to_the_probes_and_names_the_setting_to_the_others(pair):
    sidecar, provider = pair
    provider.answer = KEY
    first, probe, *others = [await ask(sidecar) for _ in range(4)]
    assert first[:2] == probe[:2] == (401, "invalid_api_key")
    for status, code, message, _ in others:
        assert (status, code) == (502, "upstream_error")
        assert "SIDECAR_DASHSCOPE_API_KEY" in message
        assert "invalid_api_key" in message
        assert "Incorrect" not in message
    assert provider.calls == 3
    assert await circuit_of(sidecar) == "unauthorized"
    assert (await sidecar.metrics())['sidecar_throttles_total{backend="dashscope",kind="unauthorized"}'] == 3
    async with sidecar.client.get(f"{sidecar.admin_url}/status") as response:
        status = await response.text()
    assert "unauthorized" in status
    assert "Incorrect" not in status


async def test_the_same_far_end_without_words_becomes_a_used_up_quota(pair, monkeypatch):
    monkeypatch.setattr(reported_waits, "QUOTA_SECONDS", 1.0)
    monkeypatch.setattr(reported_waits, "LITTLE_TRUST", 0.2)
    sidecar, provider = pair
    provider.answer, provider.headers = WORDLESS, "Retry-After: 86400\r\n"
    for _ in range(2):  # the second is answered on arrival
        status, code, message, headers = await ask(sidecar)
        assert (status, code) == (503, "upstream_quota_used_up")
        assert "the same end" in message
        assert 86_300 <= int(headers["Retry-After"]) <= 86_400
    calls = provider.calls
    await ask(sidecar)
    assert provider.calls == calls
    assert await circuit_of(sidecar) == "quota_period"


async def test_a_503_with_a_wait_is_not_sent_again_within_it(pair):
    sidecar, provider = pair
    provider.answer, provider.headers = (503, b"<html>busy</html>"), "Retry-After: 120\r\n"
    status, code, *_ = await ask(sidecar, headers={"X-Request-Timeout": "2"})
    assert (status, code) == (503, "deadline_unreachable")
    assert provider.calls == 1
    assert await circuit_of(sidecar) == "capacity"


async def test_a_request_that_is_larger_than_the_limit_gets_the_providers_error_as_413(pair, monkeypatch):
    monkeypatch.setattr(own_fault, "TOKEN_WINDOW_SECONDS", 0.3)
    sidecar, provider = pair
    assert (await ask(sidecar))[0] == 200
    await asyncio.sleep(0.35)
    provider.answer = TOKENS
    status, code, message, _ = await ask(sidecar)
    assert (status, code, message) == (413, "rate_limit_exceeded", TOKENS[1]["error"]["message"])
    assert provider.calls == 3
    provider.answer = None
    assert (await ask(sidecar))[0] == 200
