"""The result of the demo as text: a table of the measurements, and a summary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from statistics import fmean

from sidecar.cli.demo.cameras import Answered, Result


@dataclass(frozen=True, slots=True)
class Row:
    """The result of one sender in one scenario."""

    sender: str
    result: Result
    refusals: int
    """Number of 429 answers that the provider sent."""


def table(title: str, rows: list[Row]) -> str:
    """Return the table of one scenario. Times are in seconds, and only of described frames."""
    head = f"{'':16}{'frames':>7}{'lost':>6}{'429s':>6}{'mean':>9}{'p50':>8}{'p99':>8}"
    lines = [title, f"{head}   of the mean:{'queue':>8}{'lock':>7}{'upstream':>10}"]
    for row in rows:
        answered = row.result.answered
        totals = sorted(answer.total for answer in answered)
        times = [_mean(totals), percentile(totals, 0.5), percentile(totals, 0.99)]
        parts: list[Callable[[Answered], float]] = [lambda a: a.queue, lambda a: a.lock, lambda a: a.upstream]
        where = [_mean([part(answer) for answer in answered]) for part in parts]
        cells = [_seconds(value, width) for value, width in zip(times, (9, 8, 8), strict=True)]
        cells += [" " * 15, *(_seconds(value, width) for value, width in zip(where, (8, 7, 10), strict=True))]
        counts = f"{row.result.sent:>7}{row.result.lost:>6}{row.refusals:>6}"
        lines.append(f"{row.sender:16}{counts}{''.join(cells)}")
    return "\n".join(lines)


def summary(no_quota: list[Row], with_quota: list[Row]) -> str:
    """Return a summary with one line per sender.

    `no_quota` and `with_quota` have the same senders in the same order, the sidecar last.
    """
    lines = []
    for row, under_quota in zip(no_quota, with_quota, strict=True):
        mean = _mean([answer.total for answer in row.result.answered])
        shown = "no frame described" if mean is None else f"{mean:.2f} s a frame"
        lost, sent = under_quota.result.lost, under_quota.result.sent
        lines.append(f"{row.sender}: {shown}, and {lost or 'none'} of {sent} frames lost once there is a quota.")
    return "\n".join([*lines, "The semaphores' numbers were chosen by hand; the sidecar was told none."])


def percentile(ordered: list[float], share: float) -> float | None:
    """Return the percentile of ordered values by nearest rank; None if there are no values. `share`: 0 to 1."""
    return ordered[ceil(share * len(ordered)) - 1] if ordered else None


def _mean(values: list[float]) -> float | None:
    return fmean(values) if values else None


def _seconds(value: float | None, width: int) -> str:
    return f"{'-' if value is None else f'{value:.2f}':>{width}}"
