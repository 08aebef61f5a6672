"""Requests with ids through many faults: each gets exactly one answer, its own, and the records of both ends agree."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections import Counter

import aiohttp
from running import CHAT, Process, samples
from scripted_upstream import Upstream
from wire import GARBAGE, Fault, Wire

SCALE = float(os.environ.get("CHAOS_SCALE", "1"))
REQUESTS = int(20_000 * SCALE)
CALLERS = 48


def id_of(body: bytes) -> str:
    return json.loads(body)["messages"][0]["content"]


def content_of(body: bytes, status: int, ident: str) -> str:
    """The content of an answer; `ident` where the wire put its garbage within the body's stated length.

    HTTP has no checksum: a proxy cannot tell such a body from a whole one, and passes on what the provider sent.
    """
    if GARBAGE[:1] in body:  # a byte that no JSON contains
        return ident
    content: str = json.loads(body)["choices"][0]["message"]["content"] if status == 200 else ""
    return content


async def test_every_request_gets_its_own_answer_once_and_every_upstream_call_is_counted():
    rng = random.Random(20)

    async def script(link, seen):
        outcome = rng.random()
        if outcome < 0.0003:  # this answer closes admission for half a second
            await link.answer({"error": {"message": "no room", "code": "ModelUnavailable"}}, status=503)
        elif outcome < 0.01:
            await link.answer({"error": {"message": "it broke"}}, status=500)
        elif outcome < 0.02:
            await link.answer({"error": {"message": "bad image", "code": "invalid_parameter"}}, status=400)
        else:
            content = {"role": "assistant", "content": id_of(seen.body)}
            await link.answer({"choices": [{"index": 0, "message": content, "finish_reason": "stop"}]})

    def choose():
        if rng.random() < 0.3:
            return None
        return Fault(rng.choice(["reset", "close", "garbage", "stall"]), int(rng.expovariate(1 / 5_000)))

    answers: dict[str, tuple[int, str, int]] = {}
    left: set[str] = set()
    async with (
        Upstream(script) as upstream,
        Wire(upstream.port, choose) as wire,
        Process("--dashscope-url", wire.url, "--max-concurrency", "32") as process,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client,
    ):
        numbers = iter(range(REQUESTS))

        async def caller(name):
            for number in numbers:
                ident = f"request-{number}"
                body = {"model": "qwen-vl-plus", "messages": [{"role": "user", "content": ident}]}
                timeout_seconds = 0.004 if number % 50 == 7 else None
                headers = {"X-Camera-Id": name, "X-Request-Id": ident}
                try:
                    async with (
                        asyncio.timeout(timeout_seconds),
                        client.post(process.url + CHAT, json=body, headers=headers) as response,
                    ):
                        body_bytes = await response.read()
                        assert ident not in answers
                        assert response.headers["X-Request-Id"] == ident
                        content = content_of(body_bytes, response.status, ident)
                        answers[ident] = response.status, content, int(response.headers["X-Sidecar-Attempts"])
                except TimeoutError:
                    left.add(ident)

        async with asyncio.timeout(max(240 * SCALE, 60)), asyncio.TaskGroup() as group:
            for number in range(CALLERS):
                group.create_task(caller(f"camera-{number % 10}"))
        async with client.get(f"{process.admin_url}/metrics") as response:
            metrics = samples(await response.text())
        assert "defect" not in process.log

    assert len(answers) + len(left) == REQUESTS
    assert wire.faults > REQUESTS / 200, "there must be many faults"
    assert all(content == ident for ident, (status, content, _) in answers.items() if status == 200)
    statuses = Counter(status for status, _, _ in answers.values())
    assert set(statuses) <= {200, 400, 502, 503, 504}, statuses
    assert statuses[200] > 0.9 * REQUESTS, statuses

    outcomes: Counter[str] = Counter()
    attempts = 0
    for name, value in metrics.items():
        if name.startswith("sidecar_requests_total"):
            outcomes[name.partition('outcome="')[2].partition('"')[0]] += int(value)
        if name.startswith("sidecar_upstream_attempts_total"):
            attempts += int(value)
    # Each request has ended once. The request of a caller that left may have been answered just then, or may not have
    # arrived yet.
    assert statuses[200] <= outcomes["ok"] <= statuses[200] + len(left)
    assert statuses[400] <= outcomes["rejected_upstream"] <= statuses[400] + len(left)
    assert REQUESTS - len(left) <= sum(outcomes.values()) <= REQUESTS

    # The upstream saw each answered request as often as the answer's attempts, or once more for each dead connection.
    seen = Counter(id_of(request.body) for request in upstream.seen)
    for ident, (status, _, tried) in answers.items():
        if status in (200, 400):
            assert 1 <= seen[ident] <= 2 * tried, (ident, status, seen[ident], tried)
    assert abs(sum(seen.values()) - attempts) <= wire.faults + len(left)
