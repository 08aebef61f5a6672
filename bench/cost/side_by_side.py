"""Measure all proxies in front of one upstream, in turns, so that other load on the machine affects all alike."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from dataclasses import dataclass

from bench.cost.peers import PEERS, Missing
from bench.cost.processes import NotStarted, awake, cpu_seconds, process, resident_bytes, sidecar, wire
from sidecar.cli.demo.cameras import body_of
from sidecar.cli.demo.frames import frame
from sidecar.cli.demo.processes import free_port

KINDS = ("small", "frame", "stream")
CONNECTIONS = (1, 16)
SECONDS = 0.8
#: Seconds of one measurement of streams on one connection. A stream lasts a fifth of a second, so `SECONDS` would give
#: only four first events.
STREAM_SECONDS = 3.0
ROUNDS = 5
_WARM_UP_SECONDS = 0.3
_SMALL = {"model": "qwen-vl-plus", "messages": [{"role": "user", "content": "Hello."}]}

#: The client sends to the upstream directly. Its latency is the baseline that is subtracted from that of the proxies.
DIRECT = "direct"
SIDECAR = "sidecar"


@dataclass(frozen=True, slots=True)
class Measurement:
    """The measurement of one proxy with one kind of request. Times are in seconds."""

    per_second: float
    p50: float
    cpu: float
    """The proxy's own processor time per request, or per event of a stream."""
    first: float = 0.0
    """Time from the request to the first event of a stream."""
    event: float = 0.0
    """Time from the sending of an event by the upstream to its receipt by the client."""


#: (kind of request, connections) -> name of the proxy -> one measurement per round.
Rounds = dict[tuple[str, int], dict[str, list[Measurement]]]


def bodies() -> dict[str, bytes]:
    """Return the body of each kind of request."""
    return {
        "small": json.dumps(_SMALL).encode(),
        "frame": body_of(frame(0)),
        "stream": json.dumps({"stream": True, **_SMALL}).encode(),
    }


def run(names: list[str]) -> tuple[Rounds, dict[str, float]]:
    """Measure the sidecar and these peers. Returns the rounds, and the idle memory in bytes by name."""
    upstream = free_port()
    with contextlib.ExitStack() as stack:
        stack.enter_context(process(wire("upstream", upstream), upstream))
        targets: dict[str, tuple[int, int | None]] = {DIRECT: (upstream, None)}
        port = free_port()
        targets[SIDECAR] = port, stack.enter_context(process(sidecar(port, upstream), port))
        for name in names:
            port = free_port()
            try:
                command = PEERS[name].command(PEERS[name].prepare(), port, upstream)
                targets[name] = port, stack.enter_context(process(command, port))
            except (Missing, NotStarted) as error:
                print(f"WITHOUT {name}: {error}", file=sys.stderr, flush=True)
        time.sleep(2)
        idle = {name: float(resident_bytes(pid)) for name, (_, pid) in targets.items() if pid is not None}
        return _rounds(targets), idle


def _rounds(targets: dict[str, tuple[int, int | None]]) -> Rounds:
    sent = bodies()
    found: Rounds = {(kind, count): {name: [] for name in targets} for kind in KINDS for count in CONNECTIONS}

    def ask(name: str, kind: str, count: int, seconds: float) -> Measurement:
        try:
            return measure(*targets[name], count, seconds, sent[kind])
        except RuntimeError as error:
            raise SystemExit(f"{name}, {kind}, {count} connections: {error}") from error

    for name in targets:
        for kind in KINDS:
            ask(name, kind, max(CONNECTIONS), _WARM_UP_SECONDS)
    for number in range(ROUNDS):
        for (kind, count), seen in found.items():
            seconds = STREAM_SECONDS if kind == "stream" and count == 1 else SECONDS
            with awake() if count == 1 else contextlib.nullcontext():
                for name in _turned(list(targets), number):
                    seen[name].append(ask(name, kind, count, seconds))
        print(f"round {number + 1} of {ROUNDS}", file=sys.stderr, flush=True)
    return found


def _turned(names: list[str], number: int) -> list[str]:
    """Return the names in rotated order, so that the first proxy of a round is a different one each time."""
    at = number % len(names)
    return names[at:] + names[:at]


def measure(port: int, pid: int | None, connections: int, seconds: float, body: bytes) -> Measurement:
    """Load one proxy for `seconds` seconds and return the measurement. Raises `RuntimeError` if a request fails."""
    before = cpu_seconds(pid) if pid is not None else 0.0
    done = subprocess.run(
        wire("load", port, connections, seconds), input=body, capture_output=True, timeout=seconds + 60, check=False
    )
    used = cpu_seconds(pid) - before if pid is not None else 0.0
    if done.returncode:
        raise RuntimeError(done.stderr.decode().strip().rpartition("\n")[2])
    found = json.loads(done.stdout)
    cpu = used / found.get("events", found["answered"])
    return Measurement(found["per_second"], found["p50"], cpu, found.get("first", 0.0), found.get("event", 0.0))
