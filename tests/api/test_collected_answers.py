"""What a caller gets for each collected answer in `../shared/vocabulary.jsonl`, through a whole sidecar.

`tests/backends/remote/test_vocabulary.py` shows how they are read. The file is not a part of this repository.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from real_parts import platform_lacks
from running import CHAT, chat, running
from scripted_upstream import CHAT_ANSWER, Upstream

FILE = Path(__file__).parents[3] / "shared" / "vocabulary.jsonl"
LIMITS = frozenset({"request_rate", "token_rate", "growth", "concurrency", "capacity", "unknown"})
DELTA = {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}]}
END = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
EVENTS = [f"data: {json.dumps(event)}\n\n".encode() for event in (DELTA, END)] + [b"data: [DONE]\n\n"]
#: Sidecars that run at once. Most of the time they wait.
AT_ONCE = 12
#: The share of the answers that must have the right effect.
SHARE = 0.95


def entries() -> list[dict[str, Any]]:
    if not FILE.exists():
        platform_lacks("../shared/vocabulary.jsonl is not beside this checkout")
    return [json.loads(line) for line in FILE.read_text().splitlines()]


class Trial:
    """One sidecar in front of a provider that sends a collected answer, `times` times, and then good ones."""

    def __init__(self, entry: dict[str, Any], times: int) -> None:
        self.entry = entry
        self.left = times
        self.in_stream = entry.get("where") == "stream"
        body = entry["body"] if isinstance(entry["body"], str) else json.dumps(entry["body"], ensure_ascii=False)
        self.body = body.encode()
        self.calls = 0

    async def script(self, link, _):
        self.calls += 1
        bad, self.left = self.left > 0, self.left - 1
        if self.in_stream:
            await link.start_stream()
            for event in [self.body] if bad else EVENTS:
                await link.chunk(event)
            await link.chunk(b"")
        elif bad:
            headers = {
                name: value
                for name, value in self.entry["headers"].items()
                if name.lower() not in ("content-type", "content-length")
            }
            kind = "text/html" if self.body.lstrip().startswith(b"<") else "application/json"
            lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            await link.answer(self.body, status=self.entry["status"], content_type=kind, headers=lines)
        else:
            await link.answer(CHAT_ANSWER)

    async def run(self, requests: int) -> tuple[list[int], list[str], dict[str, float]]:
        """Send requests one after the other. Return their statuses, their codes and the metrics at the end."""
        async with (
            Upstream(self.script) as upstream,
            running(dashscope_url=f"{upstream.origin}/v1", deadline=15.0) as sidecar,
        ):
            statuses, codes = [], []
            for _ in range(requests):
                async with sidecar.client.post(sidecar.url + CHAT, json=chat(stream=self.in_stream)) as response:
                    body = await response.read()
                statuses.append(response.status)
                codes.append(_code(body) if response.status >= 400 else "")
            return statuses, codes, await sidecar.metrics()


def _code(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return body[:80].decode(errors="replace")


async def failures(chosen, check, *, times: int, requests: int) -> list[str]:
    """Try each chosen answer. Return one line for each that has another effect than `check` wants."""
    lines, turn = [], asyncio.Semaphore(AT_ONCE)

    async def attempt(entry):
        async with turn:
            trial = Trial(entry, times)
            statuses, codes, metrics = await trial.run(requests)
            if not check(trial, statuses, codes, metrics):
                lines.append(f"{entry['id']}: {statuses} {codes} after {trial.calls} calls")

    await asyncio.gather(*map(attempt, chosen))
    return lines


def throttles(metrics) -> float:
    return sum(value for name, value in metrics.items() if name.startswith("sidecar_throttles_total{"))


async def test_a_limit_is_waited_for_and_the_caller_sees_only_the_answer():
    chosen = [entry for entry in entries() if entry["want"]["kind"] in LIMITS]
    lines = await failures(
        chosen,
        lambda trial, statuses, codes, metrics: statuses == [200, 200] and throttles(metrics) == 1 and trial.calls == 3,
        times=1,
        requests=2,
    )
    assert len(lines) <= (1 - SHARE) * len(chosen), "\n".join(lines)


async def test_a_used_up_quota_is_reported_at_once_and_the_provider_is_asked_once():
    # A number alone may first be read as another limit: see `tests/admission/gates/test_circuit.py`.
    chosen = [entry for entry in entries() if entry["want"]["kind"] == "quota_period" and not entry["want"]["also_ok"]]
    lines = await failures(
        chosen,
        lambda trial, statuses, codes, _: (
            statuses == [503] * 3 and set(codes) == {"upstream_quota_used_up"} and trial.calls == 1
        ),
        times=99,
        requests=3,
    )
    assert len(lines) <= (1 - SHARE) * len(chosen), "\n".join(lines)


async def test_a_lack_of_money_is_never_a_fault_of_the_caller_or_a_reason_to_ask_less_often():
    chosen = [entry for entry in entries() if entry["want"]["kind"] == "billing"]
    lines = await failures(
        chosen,
        lambda trial, statuses, codes, _: (
            statuses == [502] * 3 and set(codes) == {"upstream_billing"} and trial.calls <= 2
        ),
        times=99,
        requests=3,
    )
    assert len(lines) <= (1 - SHARE) * len(chosen), "\n".join(lines)


async def test_an_error_inside_a_200_is_never_an_answer():
    chosen = [entry for entry in entries() if entry["status"] < 400]
    assert chosen
    lines = await failures(
        chosen,
        lambda trial, statuses, codes, _: statuses[-1] == 200 and (statuses[0] >= 400 or trial.calls == 3),
        times=1,
        requests=2,
    )
    assert not lines, "\n".join(lines)
