"""A provider on a real socket reports its limits in OpenAI's headers: the sidecar starts with fewer refusals."""

from __future__ import annotations

import asyncio
import math
import time

import pytest
from running import chat
from scripted_upstream import CHAT_ANSWER

pytestmark = pytest.mark.alone

RATE, BURST = 20.0, 60.0


class Account:
    """A bucket that refuses with OpenAI's words and reports its state in OpenAI's headers, if `reports`."""

    def __init__(self, *, reports):
        self.reports = reports
        self.level, self.at = BURST, time.monotonic()
        self.refusals = self.answers = 0

    async def __call__(self, link, _):
        now = time.monotonic()
        self.level, self.at = min(self.level + RATE * (now - self.at), BURST), now
        accepted = self.level >= 1.0
        self.level -= accepted
        headers = (
            f"x-ratelimit-limit-requests: {BURST:.0f}\r\nx-ratelimit-remaining-requests: {math.floor(self.level)}\r\n"
            f"x-ratelimit-reset-requests: {(BURST - self.level) / RATE:.3f}s\r\n"
        )
        await asyncio.sleep(0.3 if accepted else 0.03)
        if not accepted:
            self.refusals += 1
            body = {"error": {"message": "Rate limit reached for requests", "code": "rate_limit_exceeded"}}
            await link.answer(body, status=429, headers=headers if self.reports else "")
            return
        self.answers += 1
        await link.answer(CHAT_ANSWER, headers=headers if self.reports else "")


async def cold_start(serving, scripted, account, seconds=8.0):
    """Keep 40 callers waiting for `seconds`. Return `/status` of the first second and of the end."""
    upstream = await scripted(account)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    end = asyncio.get_running_loop().time() + seconds

    async def caller(number):
        while asyncio.get_running_loop().time() < end:
            async with sidecar.post(chat(), headers={"X-Camera-Id": f"{number % 10}"}) as response:
                assert response.status == 200
                assert not [name for name in response.headers if "ratelimit" in name.lower()]

    async def rate():
        async with sidecar.client.get(sidecar.admin_url + "/status") as response:
            return (await response.json())["backends"][0]["models"][0]["requests"]

    callers = [asyncio.ensure_future(caller(number)) for number in range(40)]
    await asyncio.sleep(1.0)
    early = await rate()
    await asyncio.gather(*callers)
    return early, await rate()


async def test_a_reported_limit_is_a_ceiling_at_a_cold_start(serving, scripted):
    silent, open_ = Account(reports=False), Account(reports=True)
    nothing, _ = await cold_start(serving, scripted, silent)
    early, late = await cold_start(serving, scripted, open_)
    assert nothing["reported"] is None
    assert early["reported"]["header"] == "x-ratelimit-limit-requests"
    assert early["reported"]["per_second"] == pytest.approx(RATE, rel=0.1)  # `remaining` is a whole number
    assert early["state"] == "start"
    assert early["pace"] <= 1.3 * RATE
    assert late["reported"]["limit"] == BURST
    assert open_.refusals < silent.refusals
    assert open_.answers >= 0.9 * silent.answers
