"""Attackers for tests and benchmarks. Each attacks a running `vlm-sidecar serve` through real sockets for some seconds.

`ATTACKS` names them, and `python -m attacks` runs them as a separate process. Attacks that need a hostile provider
expect `attacks.upstream` behind the sidecar. An attack needs nothing of the sidecar, asserts nothing, and ends all that
it began. Most rows are in faults.md E, which names the source of each.
"""

from __future__ import annotations

from attacks.attack import Attack, Target
from attacks.callers import HELD, READ, TURNS
from attacks.readers import READERS, UPSTREAMS

#: What can make the process hold bytes; the others take its time, or the turns of other callers.
HOLDING: dict[str, Attack] = HELD | READERS | UPSTREAMS
ATTACKS: dict[str, Attack] = READ | TURNS | HOLDING

__all__ = ["ATTACKS", "HOLDING", "Attack", "Target"]
