"""`vlm-sidecar demo --html FILE`: the measurements as one page with plots. It needs no other file and no network."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path
from statistics import fmean

from sidecar.cli.demo.table import Row, percentile, summary, table

_STYLE = Path(__file__).parents[2] / "admin" / "page" / "page.css"
_EXTRA_STYLE = (
    "svg { height: auto } pre { overflow-x: auto; font-size: .75rem } figure { margin: 1rem 0 } "
    "p { white-space: pre-line }"
)
_PARTS = (("queue", "orange"), ("lock", "purple"), ("upstream", "blue"))
_COLOURS = ("red", "orange", "green")
_WIDTH, _LEFT, _RIGHT, _BAR, _HEIGHT = 640, 130, 70, 34, 220


def report(scenarios: list[tuple[str, list[Row]]]) -> str:
    """Return the page. A scenario is a title and its rows. All scenarios have the same senders in the same order."""
    sections = "".join(
        f"<section><h2>{escape(title)}</h2>{_bars(rows)}{_shares(rows)}<pre>{escape(_figures(rows))}</pre></section>"
        for title, rows in scenarios
    )
    heading = escape(summary(scenarios[0][1], scenarios[-1][1]))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>vlm-sidecar demo</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><style>{_STYLE.read_text()}{_EXTRA_STYLE}</style></head>'
        f"<body><h1>vlm-sidecar demo</h1><p>{heading}</p>{sections}</body></html>\n"
    )


def _figures(rows: list[Row]) -> str:
    return table("", rows).removeprefix("\n")


def _bars(rows: list[Row]) -> str:
    """Draw how the mean time of a described frame is divided: one bar per sender."""
    means = [[_mean(row, part) for part, _ in _PARTS] for row in rows]
    longest = max((sum(parts) for parts in means), default=0.0) or 1.0
    scale = (_WIDTH - _LEFT - _RIGHT) / longest

    def drawn() -> Iterator[str]:
        for at, (row, parts) in enumerate(zip(rows, means, strict=True)):
            y, x = at * _BAR, float(_LEFT)
            yield f'<text x="{_LEFT - 8}" y="{y + 20}" text-anchor="end">{escape(row.sender)}</text>'
            for seconds, (_, colour) in zip(parts, _PARTS, strict=True):
                yield f'<rect class="area {colour}" x="{x:.1f}" y="{y + 6}" width="{seconds * scale:.1f}" height="20"/>'
                x += seconds * scale
            shown = f"{sum(parts):.2f} s" if row.result.answered else "none described"
            yield f'<text x="{x + 6:.1f}" y="{y + 20}">{shown}</text>'

    return _figure("Mean time of a described frame", list(_PARTS), "".join(drawn()), _BAR * len(rows))


def _shares(rows: list[Row]) -> str:
    """Draw the share of sent frames that were described within a given time, as a function of that time.

    Lost frames count as sent but never as described.
    """
    longest = max((answer.total for row in rows for answer in row.result.answered), default=1.0)
    bottom = _HEIGHT - 24

    def x(seconds: float) -> float:
        return 40 + (_WIDTH - 60) * seconds / longest

    def y(share: float) -> float:
        return bottom - (bottom - 10) * share

    def drawn() -> Iterator[str]:
        for share in (0.0, 0.5, 1.0):
            yield f'<line class="grid" x1="40" x2="{_WIDTH - 20}" y1="{y(share):.1f}" y2="{y(share):.1f}"/>'
            yield f'<text x="34" y="{y(share) + 4:.1f}" text-anchor="end">{share:.0%}</text>'
        yield f'<text x="40" y="{_HEIGHT - 6}">0 s</text>'
        yield f'<text x="{_WIDTH - 20}" y="{_HEIGHT - 6}" text-anchor="end">{longest:.1f} s</text>'
        for row, colour in zip(rows, _COLOURS, strict=True):
            path, share = f"M{x(0):.1f},{y(0):.1f}", 0.0
            for number, seconds in enumerate(sorted(answer.total for answer in row.result.answered), 1):
                path += f"H{x(seconds):.1f}"
                share = number / row.result.sent
                path += f"V{y(share):.1f}"
            yield f'<path class="line {colour}" d="{path}H{x(longest):.1f}"/>'

    legend = [
        (f"{row.sender}: p99 {_p99(row)}, {row.result.lost} lost", colour)
        for row, colour in zip(rows, _COLOURS, strict=True)
    ]
    return _figure("Frames described within so many seconds of being taken", legend, "".join(drawn()), _HEIGHT)


def _figure(title: str, legend: list[tuple[str, str]], drawn: str, height: int) -> str:
    entries = "".join(f'<li class="{colour}"><i></i>{escape(text)}</li>' for text, colour in legend)
    picture = f'<svg role="img" aria-label="{escape(title)}" viewBox="0 0 {_WIDTH} {height}">{drawn}</svg>'
    return f'<figure><figcaption>{escape(title)}</figcaption>{picture}<ul class="legend">{entries}</ul></figure>'


def _mean(row: Row, part: str) -> float:
    return fmean([getattr(answer, part) for answer in row.result.answered] or [0.0])


def _p99(row: Row) -> str:
    value = percentile(sorted(answer.total for answer in row.result.answered), 0.99)
    return "-" if value is None else f"{value:.2f} s"
