"""The figures of a run: their targets, their last committed values, and which of them got worse."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

#: A figure got worse if its median got worse by more than this share, and none of its rounds was as good as the earlier
#: median. On two shared cores, the medians of two runs of the same code differ by less than this. Single rounds differ
#: by more.
TOLERANCE = 0.15


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure, with a value for each round in which it was measured."""

    name: str
    values: tuple[float, ...]
    unit: str = ""
    target: float | None = None
    at_least: bool = False
    """True: a higher value is better. False: a lower value is better."""

    @property
    def value(self) -> float:
        """The median of the rounds."""
        return median(self.values)

    @property
    def best(self) -> float:
        """The best round."""
        return max(self.values) if self.at_least else min(self.values)

    @property
    def holds(self) -> bool:
        """True if the figure reaches its target or has none."""
        return self.target is None or not self.is_worse_than(self.target)

    def is_worse_than(self, value: float, share: float = 0.0) -> bool:
        """Return True if the median is worse than `value` by more than this share."""
        return self.value < value * (1 - share) if self.at_least else self.value > value * (1 + share)


def got_worse(figure: Figure, before: tuple[float, ...]) -> bool:
    """Return True if the figure got worse by more than the usual difference between two runs (`TOLERANCE`)."""
    was = median(before)
    as_good = figure.best >= was if figure.at_least else figure.best <= was
    return figure.is_worse_than(was, TOLERANCE) and not as_good


def compared(figures: list[Figure], committed: dict[str, list[float]]) -> tuple[list[str], list[str]]:
    """Return lines with the old and the new value of each figure: those that got worse, and all others."""
    worse: list[str] = []
    others: list[str] = []
    for figure in figures:
        before = committed.get(figure.name)
        if not before:
            others.append(f"{figure.name}: {figure.value:.3g}{figure.unit}, new")
            continue
        was = median(before)
        change = figure.value / was - 1 if was else 0.0
        line = f"{figure.name}: {was:.3g} → {figure.value:.3g}{figure.unit} ({change:+.0%})"
        (worse if got_worse(figure, tuple(before)) else others).append(line)
    measured = {figure.name for figure in figures}
    others += [f"{name}: not measured this time" for name in committed if name not in measured]
    return worse, others
