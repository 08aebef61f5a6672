"""Attackers for tests and benchmarks. Each attacks a running `vlm-sidecar serve` through real sockets for some seconds.

`ATTACKS` names them. `python -m attacks NAME PORT ADMIN_PORT SECONDS` runs one as a separate process, at nice 19 on one
core. Attacks that need a hostile provider expect `attacks.upstream` behind the sidecar. An attack needs nothing of the
sidecar, asserts nothing, and ends all that it began. Most rows are in faults.md E, which names the source of each.
"""

from __future__ import annotations

from attacks.attack import Attack, Target
from attacks.callers import BODIES, CONNECTIONS, TURNS
from attacks.readers import READERS, UPSTREAMS

ATTACKS: dict[str, Attack] = BODIES | CONNECTIONS | TURNS | READERS | UPSTREAMS

__all__ = ["ATTACKS", "Attack", "Target"]
