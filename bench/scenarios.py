"""Measure how well the sidecar learns: every scenario of docs/limiting.md in virtual time, compared with an oracle.

    make scenarios                                  # = python bench/scenarios.py
    python bench/scenarios.py --only 1 4 15c --seeds 5 --systems sidecar,semaphore,cubic
    python bench/scenarios.py --sweep 100           # randomly drawn providers; each seed gives the same provider

Two other clients can run in place of the sidecar: a semaphore and CUBIC. The program prints the median and the worst
value of each figure over the seeds beside its target, and marks missed targets. Below the figures it prints the error
of the sidecar's predicted waits. The sidecar refuses requests because of these predictions, and sends the predictions
as Retry-After.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.sim.sweep import drawn
from bench.sim.systems import Sidecar
from bench.sim.table import SYSTEMS, TABLE, Check, Scenario, play


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], metavar="N", help="scenarios by number")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--systems", default="sidecar", help="which, of: " + ", ".join(SYSTEMS))
    parser.add_argument("--sweep", type=int, default=0, metavar="N", help="instead: so many providers drawn by chance")
    options = parser.parse_args()
    chosen = [
        s for s in TABLE if not options.only or s.number in options.only or s.number.rstrip("abcde") in options.only
    ]
    if options.sweep:
        sweep(options.sweep)
        return
    misses = 0
    for name in options.systems.split(","):
        print(f"\n{name}")
        for scenario in chosen:
            misses += show(scenario, name, range(1, options.seeds + 1))
    print(f"\n{misses} figures miss their target")


def sweep(count: int) -> None:
    """Print one line for each randomly drawn provider, then median, deciles, minimum and maximum of the figures."""
    figures: dict[str, list[float]] = defaultdict(list)
    for seed in range(1, count + 1):
        scenario = drawn(seed)
        oracle, result = play(scenario, seed, SYSTEMS["oracle"]), play(scenario, seed, SYSTEMS["sidecar"])
        goodput, refusals = (check.value for check in scenario.judge(result, oracle)[:2])
        figures["goodput"].append(goodput)
        figures["refusals/1000"].append(refusals)
        print(f"{scenario.number:>5} {scenario.name:<64} {goodput:6.3f} {refusals:7.1f}/1000", flush=True)
    for name, values in figures.items():
        ordered = sorted(values)
        print(
            f"{name:<14} median {statistics.median(values):8.3f}   a tenth below {ordered[len(ordered) // 10]:8.3f}"
            f"   a tenth above {ordered[-1 - len(ordered) // 10]:8.3f}   {ordered[0]:.3f} to {ordered[-1]:.3f}"
        )


def show(scenario: Scenario, name: str, seeds: range) -> int:
    """Print one line for each figure; return the number of missed targets."""
    begun = time.perf_counter()
    figures: dict[str, list[Check]] = defaultdict(list)
    waits: list[tuple[float, float]] = []
    for seed in seeds:
        oracle = play(scenario, seed, SYSTEMS["oracle"])
        result = play(scenario, seed, SYSTEMS[name])
        for check in scenario.judge(result, oracle):
            figures[check.name].append(check)
        if isinstance(result.system, Sidecar):
            waits += result.system.waits
    misses = 0
    title = f"{scenario.number:>4} {scenario.name}"
    for label, checks in figures.items():
        first = checks[0]
        values = [check.value for check in checks]
        median = statistics.median(values)
        worst = min(values) if first.at_least else max(values)
        sign = "≥" if first.at_least else "≤"
        holds = Check(label, median, first.target, first.at_least).holds
        misses += not holds
        print(
            f"{title:<54} {label:<24} {median:9.3f} worst {worst:9.3f}   {sign} {first.target:g}"
            + ("" if holds else "   <-- MISS")
        )
        title = ""
    if waits:
        errors = sorted(predicted - real for predicted, real in waits)
        off = sorted(abs(error) for error in errors)
        print(
            f"{'':54} predicted wait - real: median {statistics.median(errors):+.2f} s, 9 of 10 within "
            f"{off[int(0.9 * len(off))]:.2f} s; real {statistics.mean(real for _, real in waits):.1f} s"
        )
    print(f"{'':54} ({time.perf_counter() - begun:.1f} s)", flush=True)
    return misses


if __name__ == "__main__":
    main()
