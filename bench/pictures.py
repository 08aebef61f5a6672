"""Draws the pictures of docs/limiting.md from real runs in virtual time: python bench/pictures.py

Each shows the true quota, the learned limit, what was accepted in each second, and when calls were refused.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from math import inf
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backends.simulated import Profile, Provider
from bench.sim import clock
from bench.sim.load import Run
from bench.sim.systems import MODEL, Sidecar

Seen = tuple[list[float], list[float], list[float], list[float]]
FOLDER = Path(__file__).resolve().parent.parent / "docs" / "images"
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 760, 260, 56, 30, 34
BASE = Profile(requests_per_second=10, burst_requests=10, latency_seconds=0.5, refusal_latency_seconds=0.05)
PICTURES = {
    "limiting-step": ("A quota that moves: 10, 4, 16 requests/s", 240.0, 1.0, replace(
        BASE, changes=((80.0, {"requests_per_second": 4}), (160.0, {"requests_per_second": 16})))),
    "limiting-blackout": ("Fixed windows of 20 s with 200 requests each", 240.0, 1.0, replace(
        BASE, requests_per_second=inf, window_requests=200, window_seconds=20)),
    "limiting-tokens": ("Bound by LLM tokens: 6,000/s, frames of 340 to 2,640 tokens", 240.0, 1000.0, replace(
        BASE, requests_per_second=inf, tokens_per_second=6000, burst_tokens=12_000)),
}  # fmt: skip


def record(profile: Profile, seconds: float, unit: float) -> Seen:
    """Run it; gives second by second the quota, the learned limit and what was accepted, and the refusals' times."""

    async def main() -> Seen:
        loop = asyncio.get_running_loop()
        provider = Provider(profile, history=100_000)
        began = provider.begin()
        sidecar = Sidecar(provider)
        run = Run(sidecar, seconds, tokens=(lambda chance: chance.choice((300, 1200, 2600))) if unit > 1 else int_300)
        quota, limit = [], []

        async def watch() -> None:
            while loop.time() < began + seconds:
                limits = sidecar.lane.limits
                learned = limits.tokens.limit if unit > 1 else limits.requests.limit
                quota.append(provider.quota(MODEL).true_rate(loop.time(), unit) * unit)
                limit.append(learned)
                await asyncio.sleep(1.0)

        await asyncio.gather(watch(), run.saturate(40))
        accepted = [0.0] * int(seconds)
        mean = 1407.0 if unit > 1 else 1.0
        refused = []
        for at, fate in provider.history:
            if fate != "accepted":
                refused.append(at - began)
            elif at - began < seconds:
                accepted[int(at - began)] += mean
        return quota, limit, accepted, refused

    return clock.run(main())


def int_300(_: object) -> int:
    return 300


def draw(title: str, seconds: float, seen: Seen) -> str:
    """One picture as SVG."""
    quota, limit, accepted, refused = seen
    top = 1.6 * max(quota)

    def x(at: float) -> float:
        return LEFT + at / seconds * (WIDTH - LEFT - 12)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - min(value, top) / top * (HEIGHT - BOTTOM - TOP)

    def line(values: list[float], colour: str, width: float) -> str:
        points = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in enumerate(values) if value < inf)
        return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}"/>'

    floor = HEIGHT - BOTTOM
    marks = "".join(f'<path d="M{x(at):.1f} {floor}v-9" stroke="#c0392b"/>' for at in refused if at < seconds)
    labels = "".join(
        f'<text x="{x(at):.0f}" y="{HEIGHT - 12}" text-anchor="middle">{at:.0f} s</text>'
        for at in range(0, int(seconds) + 1, 40)
    )
    scale = "".join(
        f'<text x="{LEFT - 6}" y="{y(value) + 4:.0f}" text-anchor="end">{value:,.0f}</text>'
        f'<path d="M{LEFT} {y(value):.1f}H{WIDTH - 12}" stroke="#ddd"/>'
        for value in (0, max(quota) / 2, max(quota))
    )
    legend = "".join(
        f'<tspan fill="{colour}" dx="14">{name}</tspan>'
        for name, colour in (
            ("quota", "#888"), ("accepted a second", "#7fb3d5"), ("learned limit", "#1e8449"), ("refused", "#c0392b"),
        )
    )  # fmt: skip
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="{LEFT}" y="18"><tspan font-weight="bold">{title}</tspan>{legend}</text>'
        f"{scale}{line(accepted, '#7fb3d5', 1)}{line(quota, '#888', 2)}{line(limit, '#1e8449', 2)}"
        f"{marks}{labels}</svg>\n"
    )


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, (title, seconds, unit, profile) in PICTURES.items():
        quota, limit, accepted, refused = record(profile, seconds, unit)
        (FOLDER / f"{name}.svg").write_text(draw(title, seconds, (quota, limit, accepted, refused)))
        print(f"{name}: {sum(accepted):,.0f} accepted, {len(refused)} calls refused")


if __name__ == "__main__":
    main()
