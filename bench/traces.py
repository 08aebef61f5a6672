"""Print a fingerprint of every scenario in virtual time. Equal lines before and after a change prove equal behaviour.

    python bench/traces.py --seeds 5 >before.txt     # in the tree before the change
    python bench/traces.py --seeds 5 >after.txt      # in the tree after it
    diff before.txt after.txt

A fingerprint is a SHA-256 over the provider's view (time and result of each call) and the callers' view (camera, time
of arrival, seconds until the end, outcome). It contains every bit of each number.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.sim.sweep import drawn
from bench.sim.table import SYSTEMS, TABLE, Result, play


def fingerprint(result: Result) -> str:
    """Return the hash of one run."""
    trace = hashlib.sha256()
    for at, fate in result.provider.history:
        trace.update(f"{(at - result.began).hex()} {fate}\n".encode())
    for run in result.runs:
        for record in run.records:
            arrived, seconds = record.arrived.hex(), record.seconds.hex()
            trace.update(f"{record.camera} {arrived} {seconds} {record.outcome}\n".encode())
    return trace.hexdigest()[:16]


def main() -> None:
    """Print one line for each scenario of the table and each seed, then one line for each randomly drawn provider."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="seeds of each scenario in the table (default: 5)")
    parser.add_argument("--drawn", type=int, default=20, help="providers drawn by chance (default: 20)")
    options = parser.parse_args()
    for scenario in TABLE:
        for seed in range(1, options.seeds + 1):
            result = play(scenario, seed, SYSTEMS["sidecar"])
            print(f"{scenario.number:>4} seed {seed} calls {result.calls:>6} {fingerprint(result)}", flush=True)
    for seed in range(1, options.drawn + 1):
        result = play(drawn(seed), seed, SYSTEMS["sidecar"])
        print(f"drawn {seed:>3} calls {result.calls:>6} {fingerprint(result)}", flush=True)


if __name__ == "__main__":
    main()
