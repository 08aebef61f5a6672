"""Randomly drawn providers. No constant was tuned for them."""

from __future__ import annotations

from random import Random
from typing import Any

from backends.simulated import Profile

from .table import Scenario, saturated, usual


def drawn(seed: int) -> Scenario:
    """Return a random provider with a load above its capacity. The same seed gives the same scenario."""
    chance = Random(f"provider {seed}")
    rate = 0.3 * (100 / 0.3) ** chance.random()
    latency = 0.2 * 100 ** chance.random()
    refusal = 0.05 * 30 ** chance.random()
    values: dict[str, Any] = {
        "latency_seconds": latency,
        "latency_sigma": chance.choice((0.0, 0.3)),
        "refusal_latency_seconds": refusal,
        "refusal_latency_spread_seconds": 0.3 * refusal,
    }
    burst = max(1.0, rate * chance.uniform(1, 5))
    kind = chance.choice(("bucket", "bucket", "fixed", "sliding", "tokens", "concurrency", "growth"))
    if kind in {"bucket", "growth"}:
        values |= {"requests_per_second": rate, "burst_requests": burst}
    if kind == "growth":
        values |= {"growth_base_per_second": max(2.0, rate / 3), "growth_factor": 2.0}
    elif kind == "tokens":
        values |= {"tokens_per_second": rate * 400, "burst_tokens": burst * 400}
    elif kind == "concurrency":
        values |= {"concurrency": max(1, round(rate * latency))}
    elif kind in {"fixed", "sliding"}:
        seconds = chance.choice((5.0, 7.0, 20.0, 60.0))
        name = "window" if kind == "fixed" else "sliding"
        values |= {f"{name}_requests": max(1, round(rate * seconds)), f"{name}_seconds": seconds}
    if kind != "concurrency" and chance.random() < 0.4:
        values["others_share"] = chance.uniform(0.05, 0.4)
    if chance.random() < 0.2:
        values["vague_refusals"] = True
    seconds = min(max(300.0, 300.0 / rate), 900.0, 20_000.0 / rate)
    workers = min(round(2 * rate * latency) + 20, 600)
    title = f"{kind}, {rate:.2g}/s, answers {latency:.2g} s, refusals {refusal:.2g} s"
    if "others_share" in values:
        title += f", others {values['others_share']:.0%}"
    return Scenario(
        f"r{seed}",
        title,
        Profile(**values),
        saturated(workers),
        usual(0.9, 12),
        seconds=seconds,
        deadline=600.0,
    )
