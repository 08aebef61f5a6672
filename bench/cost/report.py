"""Turn the measurements into figures, tables and a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median

from bench.cost.admission import Size
from bench.cost.figures import Figure
from bench.cost.peers import PEERS
from bench.cost.processes import ROOT
from bench.cost.side_by_side import DIRECT, SIDECAR, Measurement, Rounds

PAGE = ROOT / "docs" / "performance.md"
IMAGES = PAGE.parent / "images"

#: (figure, peer) -> target of the ratio. Only frames have targets, because the product exists for them. The other
#: ratios are only reported.
_TARGETS = {
    ("frame, 16 connections: requests/s", "bare"): 1.0,
    ("frame, 16 connections: requests/s", "vllm-router"): 1.0,
    ("frame, 16 connections: requests/s", "litellm"): 30.0,
    ("frame, 1 connection: p50 added", "bare"): 1.0,
}
_TITLES = {DIRECT: "nothing between", SIDECAR: "**vlm-sidecar** (Python)"} | {p.name: p.title for p in PEERS.values()}


def ratios(rounds: Rounds) -> list[Figure]:
    """Return the ratios of the sidecar to each peer, one value per round: both parts were measured seconds apart."""
    peers = [name for name in rounds["frame", 16] if name not in (DIRECT, SIDECAR)]
    return [figure for peer in peers for figure in _by_peer(rounds, peer)]


def _by_peer(rounds: Rounds, peer: str) -> Iterator[Figure]:
    def figure(name: str, values: list[float], *, at_least: bool = False) -> Figure:
        return Figure(f"{name} ÷ {peer}", tuple(values), "", _TARGETS.get((name, peer)), at_least)

    for (kind, count), seen in rounds.items():
        case = f"{kind}, {count} connection{'s' * (count > 1)}"
        of_sidecar, of_peer, direct = seen[SIDECAR], seen[peer], seen[DIRECT]
        triples = list(zip(of_sidecar, of_peer, direct, strict=True))
        if kind == "stream":
            if count == 1:
                yield figure(
                    f"{case}: first event added", [(s.first - d.first) / (p.first - d.first) for s, p, d in triples]
                )
                yield figure(
                    f"{case}: later events added", [(s.event - d.event) / (p.event - d.event) for s, p, d in triples]
                )
        elif count == 1:
            yield figure(f"{case}: p50 added", [(s.p50 - d.p50) / (p.p50 - d.p50) for s, p, d in triples])
        else:
            yield figure(f"{case}: requests/s", [s.per_second / p.per_second for s, p, _ in triples], at_least=True)
        if count > 1:
            yield figure(f"{case}: processor time", [s.cpu / p.cpu for s, p, _ in triples])


def streams(rounds: Rounds) -> list[Figure]:
    """Return the delays that the sidecar adds to a stream, in milliseconds."""
    pairs = list(zip(rounds["stream", 1][SIDECAR], rounds["stream", 1][DIRECT], strict=True))
    return [
        Figure("stream: added to the first event", tuple((s.first - d.first) * 1e3 for s, d in pairs), " ms", 0.5),
        Figure("stream: added to each later event", tuple((s.event - d.event) * 1e3 for s, d in pairs), " ms", 0.05),
        Figure(
            "stream: processor time of an event", tuple(s.cpu * 1e3 for s in rounds["stream", 16][SIDECAR]), " ms", 0.05
        ),
    ]


def targets_table(figures: list[Figure]) -> str:
    """Return the table of all figures that have a target."""
    lines = ["| figure | target | here | |", "|---|---|---|---|"]
    for figure in figures:
        if figure.target is not None:
            sign = "≥" if figure.at_least else "≤"
            met = "met" if figure.holds else "**missed**"
            target, here = f"{figure.target:g}{figure.unit}", f"{number(figure.value)}{figure.unit}"
            lines.append(f"| {figure.name} | {sign} {target} | {here} | {met} |")
    return "\n".join(lines)


def peers_table(rounds: Rounds, idle: dict[str, float]) -> str:
    """Return the table of the medians of all proxies. Added time is relative to a client without a proxy."""
    lines = [
        "| | small: p50 added, µs | requests/s at 1, at 16 | CPU, µs | frame: p50 added, µs | requests/s at 1, at 16 "
        "| CPU, µs | stream: first event added, µs | each event added, µs | CPU an event, µs | idle MB |",
        "|---" * 11 + "|",
    ]
    for name in rounds["frame", 16]:
        cells = [_TITLES[name]]
        for kind in ("small", "frame"):
            one, many = rounds[kind, 1], rounds[kind, 16]
            cells += [
                _added(one, name, lambda seen: seen.p50),
                ", ".join(f"{_median_of(seen[name], lambda s: s.per_second):,.0f}" for seen in (one, many)),
                _cpu(many, name),
            ]
        one = rounds["stream", 1]
        cells += [_added(one, name, lambda seen: seen.first), _added(one, name, lambda seen: seen.event)]
        cells += [_cpu(rounds["stream", 16], name), f"{idle[name] / 1e6:.0f}" if name in idle else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def admission_table(costs: list[dict[Size, float]]) -> str:
    """Return the table of the cost of admission alone, by the numbers of keys, waiting requests and upstreams."""
    lines = ["| admission alone, in virtual time | µs a request | requests/s |", "|---|---|---|"]
    for size in costs[0]:
        microseconds = median(cost[size] for cost in costs)
        keys, waiting, upstreams = size
        name = f"{keys:,} keys, {waiting:,} waiting, {upstreams} upstream{'s' * (upstreams > 1)}"
        lines.append(f"| {name} | {microseconds:.0f} | {1e6 / microseconds:,.0f} |")
    return "\n".join(lines)


def between(page: str, command: str, made: str) -> str:
    """Return the page with the text `made` between the two comments that name the command."""
    begin, end = f"<!-- {command}: begin -->\n", f"<!-- {command}: end -->"
    before, after = page.partition(begin)[0], page.partition(end)[2]
    return f"{before}{begin}{made}\n{end}{after}"


def number(value: float) -> str:
    """Return the number with three significant digits, or as an integer from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _median_of(seen: list[Measurement], of: Callable[[Measurement], float]) -> float:
    return median(map(of, seen))


def _added(seen: dict[str, list[Measurement]], name: str, of: Callable[[Measurement], float]) -> str:
    base = _median_of(seen[DIRECT], of)
    value = _median_of(seen[name], of)
    return f"({base * 1e6:,.0f})" if name == DIRECT else f"{(value - base) * 1e6:,.0f}"


def _cpu(seen: dict[str, list[Measurement]], name: str) -> str:
    return "" if name == DIRECT else f"{_median_of(seen[name], lambda one: one.cpu) * 1e6:,.0f}"


# -- the picture -------------------------------------------------------------------------------------------------------

_WIDTH, _LEFT, _ROW, _HEAD = 800, 210, 22, 30
_STYLE = """
text { font: 12px system-ui, sans-serif; fill: #52514e } .title { font-weight: 600; fill: #0b0b0b }
rect { fill: #b9b7b0 } .ours { fill: #2a78d6 } .best { font-weight: 600 }
@media (prefers-color-scheme: dark) {
  text { fill: #c3c2b7 } .title { fill: #fff } rect { fill: #5c5b57 } .ours { fill: #3987e5 }
}
"""


def picture(rounds: Rounds, idle: dict[str, float]) -> str:
    """Return bar charts of the main figures as SVG, for light and dark colour schemes.

    LiteLLM is left out: its bars would make all others too short to compare.
    """
    names = [name for name in rounds["frame", 16] if name not in (DIRECT, "litellm")]
    one, many, stream = rounds["frame", 1], rounds["frame", 16], rounds["stream", 1]

    def added(seen: dict[str, list[Measurement]], name: str, of: Callable[[Measurement], float]) -> float:
        return (_median_of(seen[name], of) - _median_of(seen[DIRECT], of)) * 1e6

    panels: list[tuple[str, Callable[[str], float]]] = [
        ("100 KB frames a second, 16 connections", lambda name: _median_of(many[name], lambda s: s.per_second)),
        ("added to a frame's p50, 1 connection, µs", lambda name: added(one, name, lambda s: s.p50)),
        ("processor time of a frame, µs", lambda name: _median_of(many[name], lambda s: s.cpu) * 1e6),
        ("added to a stream's first event, µs", lambda name: added(stream, name, lambda s: s.first)),
        ("idle memory, MB", lambda name: idle[name] / 1e6),
    ]
    parts, at = [], 0
    for title, value in panels:
        most = max(map(value, names))
        parts.append(f'<text class="title" x="0" y="{at + 16}">{title}</text>')
        at += _HEAD
        for name in names:
            width = max(value(name), 0) / most * (_WIDTH - _LEFT - 70)
            ours = ' class="ours"' if name == SIDECAR else ""
            parts.append(
                f'<text x="{_LEFT - 8}" y="{at + 12}" text-anchor="end">{_TITLES[name].replace("*", "")}</text>'
            )
            parts.append(f'<rect{ours} x="{_LEFT}" y="{at}" width="{width:.1f}" height="{_ROW - 6}"/>')
            parts.append(f'<text x="{_LEFT + width + 6:.1f}" y="{at + 12}">{value(name):,.0f}</text>')
            at += _ROW
        at += 12
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {at}" role="img" '
        f'aria-label="What each proxy costs">\n<style>{_STYLE}</style>\n{body}\n</svg>\n'
    )
