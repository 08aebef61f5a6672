"""Measure the cost of the sidecar in comparison with other proxies, as ratios within one run on one machine.

make bench                               # all usual peers; writes docs/performance.md, its picture and the ratios
make bench PEERS="bare nginx litellm"    # LiteLLM is measured only if it is named
make bench-check                         # compare a new run with the committed ratios; exit status 1: got worse
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

from bench.cost import admission, alone, report, side_by_side
from bench.cost.figures import TOLERANCE, Figure, compared
from bench.cost.peers import PEERS, USUAL
from bench.cost.processes import ROOT

RATIOS = Path(__file__).with_name("ratios.json")
#: The figures of how the cost of admission grows, and their numbers of upstreams.
GROWTH = (
    ("admission: 10 → 10,000 keys, 10 → 2,000 queued", 1),
    ("the same, and 1 → 8 upstreams", 8),
)
PICTURE = report.IMAGES / "performance.svg"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", default=USUAL, help=f"of: {', '.join(PEERS)}")
    parser.add_argument("--check", action="store_true", help="compare with the committed ratios, and write nothing")
    options = parser.parse_args()
    if unknown := set(options.peers) - set(PEERS):
        parser.error(f"no such peer: {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends the child processes, as Ctrl-C does
    busy = os.getloadavg()[0]
    rounds, idle = side_by_side.run(list(options.peers))
    costs = [admission.one_round() for _ in range(admission.ROUNDS)]
    figures = [
        *report.ratios(rounds),
        *report.streams(rounds),
        *_alone(),
        *(
            Figure(name, tuple(admission.growth(cost, count) for cost in costs), " times", 1.5)
            for name, count in GROWTH
        ),
    ]
    made = [report.targets_table(figures), report.peers_table(rounds, idle), report.admission_table(costs)]
    print(*made, sep="\n\n", end="\n\n")
    before = json.loads(RATIOS.read_text())
    if before["machine"] != _machine():
        print(f"the committed run was on another machine ({before['machine']}): milliseconds do not carry over")
    asked = {name: values for name, values in before["figures"].items() if _is_asked(name, options.peers)}
    worse, others = compared(figures, asked)
    print("\n".join(others))
    print(f"\ngot worse by more than {TOLERANCE:.0%}, in every round:" if worse else "\nnothing got worse")
    print("\n".join(worse))
    if options.check:
        return bool(worse)
    _write(figures, made, report.picture(rounds, idle), busy)
    return 0


def _is_asked(figure: str, peers: list[str]) -> bool:
    """Return True for a figure that is a ratio to one of these peers, or no ratio to a peer at all."""
    peer = figure.rpartition(" ÷ ")[2]
    return peer not in PEERS or peer in peers


def _alone() -> list[Figure]:
    starts = alone.starts()
    return [
        Figure("idle memory (RSS)", tuple(start.resident / 1e6 for start in starts), " MB", 56.0),
        Figure("start to ready", tuple(start.seconds for start in starts), " s", 0.8),
        Figure("start to ready: processor time", tuple(start.cpu for start in starts), " s", 0.8),
        Figure("memory of 2,000 queued frames ÷ their bodies", (alone.queue_of_frames(),), "", 1.3),
        Figure("event-loop lag p99 at 500 frames/s", (alone.lag() * 1e3,), " ms", 10.0),
    ]


def _write(figures: list[Figure], made: list[str], picture: str, busy: float) -> None:
    commit = subprocess.run(
        ("git", "describe", "--always"), cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()
    values_by_name = {figure.name: [round(value, 4) for value in figure.values] for figure in figures}
    data = {"machine": _machine(), "commit": commit, "figures": values_by_name}
    RATIOS.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    PICTURE.write_text(picture)
    head = (
        f"`make bench` on {_machine()}, at commit {commit}; medians of {side_by_side.ROUNDS} rounds. "
        f"The load average before the run was {busy:.1f}, from other work. The run had nice value {os.nice(0)}."
    )
    page = "\n\n".join([head, *made, "![What each proxy costs](images/performance.svg)"])
    report.PAGE.write_text(report.between(report.PAGE.read_text(), "make bench", page))
    print(f"wrote {', '.join(str(path.relative_to(ROOT)) for path in (RATIOS, PICTURE, report.PAGE))}", file=sys.stderr)


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.machine()
    return f"{processor}, {os.cpu_count()} cores, Python {platform.python_version()}"


if __name__ == "__main__":
    sys.exit(main())
