"""Measure what limit headers change, true ones and wrong ones, against the same provider without headers.

    python -m bench.headers                # all variants, five seeds, 180 s each, in virtual time
    python -m bench.headers --seconds 60 --seeds 3

Prints the refusals and the answers of each variant. Marks a variant (MISS) if its mean of refusals is above that
without headers, if one seed has over 3 refusals more, or if more than 1 % of the answers are lost (8 % if the headers
are ten times too low).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from backends.simulated.profile import LIMIT_HEADERS, Profile
from bench.sim.table import SYSTEMS, Scenario, play, saturated, usual

#: Times in seconds after which the headers vanish, in the variant of that name.
_VANISH_SECONDS = 30.0
VARIANTS = (*LIMIT_HEADERS, "vanishing")
_USUAL = {"latency_seconds": 0.5, "latency_sigma": 0.3, "refusal_latency_seconds": 0.05}
#: Accounts that allow more at once than the callers send, so the headers come before the first refusal.
PROVIDERS = {
    name: Profile(**_USUAL, **limits)  # type: ignore[arg-type]
    for name, limits in {
        "10/s, burst 60": {"requests_per_second": 10, "burst_requests": 60},
        "10/s, burst 600": {"requests_per_second": 10, "burst_requests": 600},
        "1/s, burst 60": {"requests_per_second": 1, "burst_requests": 60},
        "600 per 60 s": {"window_requests": 600, "window_seconds": 60},
        "600 sliding": {"sliding_requests": 600, "sliding_seconds": 60},
        "100 per 10 s": {"window_requests": 100, "window_seconds": 10},
        "100 sliding": {"sliding_requests": 100, "sliding_seconds": 10},
        "45 per 15 s": {"window_requests": 45, "window_seconds": 15},
        "45 sliding": {"sliding_requests": 45, "sliding_seconds": 15},
    }.items()
}
#: The most refusals that one seed may have more with headers than without.
_MORE_REFUSALS = 3


@dataclass(frozen=True, slots=True)
class Outcome:
    """The figures of one provider and variant, one value for each seed."""

    refusals: tuple[int, ...]
    cold: tuple[int, ...]
    """Refusals in the first 30 s."""
    answers: tuple[int, ...]

    def compared(self, without: Outcome, variant: str) -> list[str]:
        """Return what is worse than without headers."""
        worse = []
        if statistics.mean(self.refusals) > statistics.mean(without.refusals):
            worse.append("more refusals")
        if any(a > b + _MORE_REFUSALS for a, b in zip(self.refusals, without.refusals, strict=True)):
            worse.append("a seed with many more refusals")
        if sum(self.answers) < (0.92 if variant == "x0.1" else 0.99) * sum(without.answers):
            worse.append("fewer answers")
        return worse


def outcome(profile: Profile, variant: str, seeds: Sequence[int], seconds: float) -> Outcome:
    """Run one provider with one variant of headers; empty: without headers."""
    if variant == "vanishing":
        profile = replace(profile, limit_headers="true", headers_vanish_seconds=_VANISH_SECONDS)
    else:
        profile = replace(profile, limit_headers=variant)
    scenario = Scenario("headers", variant, profile, saturated(), usual(0.9, 12), seconds=seconds)
    results = [play(scenario, seed, SYSTEMS["sidecar"]) for seed in seeds]
    return Outcome(
        tuple(result.refused for result in results),
        tuple(result.refusals(0.0, 30.0) for result in results),
        tuple(result.ok for result in results),
    )


def main() -> int:
    """Print the table. Return 1 if a variant is worse than no headers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=180.0)
    options = parser.parse_args()
    seeds, misses = range(1, options.seeds + 1), 0
    print(f"{'provider':<16}{'headers':<15}{'refusals':<24}{'first 30 s':<24}{'answers':>8}")
    for name, profile in PROVIDERS.items():
        without = outcome(profile, "", seeds, options.seconds)
        _line(name, "none", without, "")
        for variant in VARIANTS:
            one = outcome(profile, variant, seeds, options.seconds)
            worse = one.compared(without, variant)
            misses += bool(worse)
            _line("", variant, one, f"  MISS: {', '.join(worse)}" if worse else "")
    return bool(misses)


def _line(name: str, variant: str, one: Outcome, end: str) -> None:
    refusals, cold = " ".join(map(str, one.refusals)), " ".join(map(str, one.cold))
    print(f"{name:<16}{variant:<15}{refusals:<24}{cold:<24}{sum(one.answers):>8}{end}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
