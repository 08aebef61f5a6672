"""Draw docs/images/limiting-*.svg: how the sidecar learns a quota, from runs of the real code in virtual time.

    python bench/pictures.py        (about half a minute)

Each picture shows over one time axis: the quota (unknown to the sidecar), the learned limit, the accepted requests, the
refusals, and the learner's state.
"""

from __future__ import annotations

import asyncio
import sys
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import groupby
from math import cos, inf, pi
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backends.simulated import Profile, Provider
from bench.sim import clock
from bench.sim.load import Run, Tokens
from bench.sim.systems import MODEL, Sidecar

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
DAY = 86_400.0


@dataclass(slots=True)
class Picture:
    """One run and how to draw it. Rates are in requests/s or LLM tokens/s, depending on `dimension`."""

    name: str
    title: str
    profile: Profile
    load: Callable[[Run], Awaitable[None]]
    seconds: float
    step: float
    """Width of a bin in seconds; also the interval at which the learned limit is sampled."""
    dimension: str = "requests"
    tokens: Tokens = field(default=lambda random: 300)
    ticks: tuple[tuple[float, str], ...] = ()


@dataclass(slots=True)
class Track:
    """The samples of one run, one value for each step."""

    quota: list[float] = field(default_factory=list)
    learned: list[float] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    state: list[str] = field(default_factory=list)
    calls: int = 0


def record(picture: Picture) -> Track:
    """Run the picture's load on virtual time and take a sample at each step."""

    async def main() -> Track:
        provider = Provider(replace(picture.profile, seed=1), history=1_000_000)
        began = provider.begin()
        system = Sidecar(provider)
        run = Run(system, picture.seconds, tokens=picture.tokens, random=Random(1))
        track = Track()
        load = asyncio.ensure_future(picture.load(run))
        spent = 0.0
        for _ in range(round(picture.seconds / picture.step)):
            await asyncio.sleep(picture.step)
            [upstream] = next(system.admission.status()).upstreams
            gate = upstream.requests if picture.dimension == "requests" else upstream.tokens
            profile = provider.quota(MODEL).profile
            if picture.dimension == "requests":
                track.quota.append(min(profile.requests_per_second, profile.window_requests / profile.window_seconds))
            else:
                track.quota.append(profile.tokens_per_second)
                total = system.metrics.totals().get("simulated", {})
                before, spent = spent, total.get("tokens.input", 0.0) + total.get("tokens.output", 0.0)
                track.sent.append((spent - before) / picture.step)
            track.learned.append(inf if gate.limit is None else gate.limit)
            track.state.append("hold" if upstream.circuit.state else gate.state)
        load.cancel()
        await asyncio.gather(load, return_exceptions=True)
        track.calls = provider.counts.calls
        _count(picture, track, began, list(provider.history))
        return track

    return clock.run(main())


def _count(picture: Picture, track: Track, began: float, history: list[tuple[float, str]]) -> None:
    taken = sorted(at - began for at, fate in history if fate == "accepted")
    refused = sorted(at - began for at, fate in history if fate != "accepted")
    for index in range(len(track.learned)):
        start, end = index * picture.step, (index + 1) * picture.step
        track.refused.append(bisect_right(refused, end) - bisect_right(refused, start))
        if picture.dimension == "requests":
            track.sent.append((bisect_right(taken, end) - bisect_right(taken, start)) / picture.step)


# -- the drawing ------------------------------------------------------------------------------------------------------

WIDTH, LEFT, RIGHT = 800.0, 52.0, 12.0
RATES = (64.0, 270.0)  # top and bottom of each panel
REFUSALS = (296.0, 336.0)
STATES = (344.0, 360.0)
HEIGHT = 392.0

STYLE = """
text { font: 12px system-ui, sans-serif; fill: #52514e }
.title { font-size: 14px; font-weight: 600; fill: #0b0b0b }
.grid { stroke: #e4e3df }
.quota { fill: none; stroke: #52514e; stroke-width: 2; stroke-dasharray: 6 4 }
.learned { fill: none; stroke: #2a78d6; stroke-width: 2; stroke-linejoin: round }
.sent { fill: #1baf7a; fill-opacity: .3; stroke: #1baf7a; stroke-width: 1 }
.refused { fill: #e34948 }
.state { fill: #52514e; fill-opacity: .12 }
.hold { fill: #eda100; fill-opacity: .45 }
.probe { fill: #2a78d6; fill-opacity: .3 }
.assess { fill: #52514e; fill-opacity: .32 }
@media (prefers-color-scheme: dark) {
  text { fill: #c3c2b7 } .title { fill: #fff } .grid { stroke: #3a3a38 } .quota { stroke: #c3c2b7 }
  .learned { stroke: #3987e5 } .sent { fill: #199e70; stroke: #199e70 } .refused { fill: #e66767 }
  .state { fill: #c3c2b7 } .assess { fill: #c3c2b7 } .hold { fill: #c98500 } .probe { fill: #3987e5 }
}
"""


def draw(picture: Picture, track: Track) -> str:
    """Return the picture as SVG. It follows the reader's light or dark colour scheme."""
    step = picture.step
    quota = max(track.quota)
    most = min(1.2 * max(quota, *track.sent), 2 * quota)  # a first burst may exceed the picture's upper edge

    def x(seconds: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * seconds / picture.seconds

    def y(rate: float) -> float:
        top, bottom = RATES
        return bottom - (bottom - top) * min(rate / most, 1.0)

    def line(values: list[float]) -> str:
        """Return the path through the values, each at the end of its step. Infinite values are left out."""
        points = [(index, value) for index, value in enumerate(values) if value < inf]
        if not points:
            return ""
        first = points[0]
        return f"M{x(first[0] * step):.1f} {y(first[1]):.1f}" + "".join(
            f"L{x((index + 1) * step):.1f} {y(value):.1f}" for index, value in points
        )

    bars = track.refused
    top, bottom = REFUSALS
    scale = (bottom - top) / max(*bars, 1)
    parts = [
        f'<text class="title" x="{LEFT}" y="20">{picture.title}</text>',
        *_legend(),
        *_grid(most, y),
        f'<path class="sent" d="{line([0.0, *track.sent[1:]])}L{x(picture.seconds):.1f} {y(0):.1f}Z"/>',
        f'<path class="quota" d="{_stairs(track.quota, step, x, y)}"/>',
        f'<path class="learned" d="{line(track.learned)}"/>',
        f'<text x="{LEFT}" y="{top - 6}">refused, at most {max(bars)} in {_seconds(step)}</text>',
        *(
            f'<rect class="refused" x="{x(index * step):.1f}" y="{bottom - scale * count:.1f}" '
            f'width="{max(x(step) - x(0), 2):.1f}" height="{scale * count:.1f}"/>'
            for index, count in enumerate(bars)
            if count
        ),
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>',
        *_states(track.state, step, x),
        *(f'<text x="{x(at):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{text}</text>' for at, text in picture.ticks),
    ]
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" '
        f'aria-label="{picture.title}">\n<style>{STYLE}</style>\n{body}\n</svg>\n'
    )


def _seconds(step: float) -> str:
    return f"{step:.0f} s" if step < 120 else f"{step / 60:.0f} min"


def _stairs(values: list[float], step: float, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    path, at = f"M{x(0):.1f} {y(values[0]):.1f}", 0
    for value, run in groupby(values):
        at += len(list(run))
        path += f"V{y(value):.1f}H{x(at * step):.1f}"
    return path


def _legend() -> Iterable[str]:
    at = LEFT
    for name, text, width in (
        ("quota", "what the provider allows", 190),
        ("learned", "what the sidecar has learned", 210),
        ("sent", "what it sent and was taken", 0),
    ):
        yield f'<path class="{name}" d="M{at} 40h22{"v-8h-22z" if name == "sent" else ""}"/>'
        yield f'<text x="{at + 28}" y="44">{text}</text>'
        at += width


def _grid(most: float, y: Callable[[float], float]) -> Iterable[str]:
    unit = 10.0 ** len(f"{most:.0f}") / 10
    unit = next(unit * share for share in (0.2, 0.5, 1.0, 2.0) if most / (unit * share) <= 6)
    for index in range(int(most / unit) + 1):
        rate = index * unit
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(rate):.1f}" y2="{y(rate):.1f}"/>'
        yield f'<text x="{LEFT - 6}" y="{y(rate) + 4:.1f}" text-anchor="end">{rate:g}/s</text>'


def _states(states: list[str], step: float, x: Callable[[float], float]) -> Iterable[str]:
    at = 0
    top, bottom = STATES
    for state, run in groupby(states):
        start, at = at, at + len(list(run))
        width = x(at * step) - x(start * step)
        kind = state if state in {"hold", "probe", "assess"} else "state"
        yield (
            f'<rect class="{kind}" x="{x(start * step):.1f}" y="{top}" width="{width:.1f}" height="{bottom - top}">'
            f"<title>{state}</title></rect>"
        )
        if width > 9 * len(state):
            yield f'<text x="{x(start * step) + 4:.1f}" y="{bottom - 4}">{state}</text>'


# -- the runs ---------------------------------------------------------------------------------------------------------


async def day(run: Run) -> None:
    """Run ten cameras that send little at night, and more than the quota around noon."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    async with asyncio.TaskGroup() as tasks:
        while (at := loop.time() - begun) < run.seconds:
            tasks.create_task(run.send_one(f"camera-{run.random.randrange(10)}"))
            rate = 0.85 - 0.75 * cos(2 * pi * at / DAY)
            await asyncio.sleep(run.random.expovariate(rate))


def _images(random: Random) -> int:
    return random.choice((300, 1200, 2600))


def _every(step: float, end: float, unit: float, name: str) -> tuple[tuple[float, str], ...]:
    count = round(end / step)
    return tuple((index * step, f"{index * step / unit:g} {name}") for index in range(1, count))


_B10 = Profile(requests_per_second=10, burst_requests=10, latency_seconds=0.5, refusal_latency_seconds=0.05)
PICTURES = [
    Picture(
        "step",
        "A quota of 10 requests/s becomes 4 and then 16, and 40 callers always wait",
        replace(_B10, changes=((120.0, {"requests_per_second": 4.0}), (240.0, {"requests_per_second": 16.0}))),
        lambda run: run.saturate(40),
        seconds=360.0,
        step=2.0,
        ticks=_every(60.0, 360.0, 1.0, "s"),
    ),
    Picture(
        "blackout",
        "200 requests in each window of 20 s: once they are used up, all is refused until the next",
        replace(_B10, requests_per_second=inf, window_requests=200, window_seconds=20),
        lambda run: run.saturate(40),
        seconds=180.0,
        step=1.0,
        ticks=_every(20.0, 180.0, 1.0, "s"),
    ),
    Picture(
        "tokens",
        "A day bound by LLM tokens: 100,000 a minute, from 14:00 on 120,000; frames of three sizes",
        Profile(
            requests_per_second=20, burst_requests=20, tokens_per_second=100_000 / 60, burst_tokens=8_333,
            latency_seconds=1.3, latency_sigma=0.3, refusal_latency_seconds=0.05,
            changes=((14 * 3600.0, {"tokens_per_second": 120_000 / 60}),),
        ),
        day,
        seconds=DAY,
        step=600.0,
        dimension="tokens",
        tokens=_images,
        ticks=_every(3 * 3600.0, DAY, 3600.0, "h"),
    ),
]  # fmt: skip


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    for picture in PICTURES:
        track = record(picture)
        path = IMAGES / f"limiting-{picture.name}.svg"
        path.write_text(draw(picture, track))
        print(f"{path.name}: {sum(track.refused)} refused of {track.calls}")


if __name__ == "__main__":
    main()
