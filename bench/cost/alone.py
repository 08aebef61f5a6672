"""Measure the sidecar alone: memory when idle and with a full queue, start time, event-loop lag."""

from __future__ import annotations

import http.client
import json
import subprocess
import time
from dataclasses import dataclass
from itertools import pairwise

from bench.cost.processes import cpu_seconds, process, resident_bytes, sidecar, wire
from bench.cost.side_by_side import bodies
from sidecar.cli.demo.processes import free_port

STARTS = 7
QUEUED = 2_000
LAG_PER_SECOND = 500
LAG_SECONDS = 20.0
_BOUND_SECONDS = 60.0
_LAG = "sidecar_event_loop_lag_seconds"


@dataclass(frozen=True, slots=True)
class Start:
    """One start of the sidecar."""

    seconds: float
    """Seconds from the start of the process until `/readyz` answers 200."""
    cpu: float
    """Processor time until then in seconds. On an otherwise idle machine the start takes about this time."""
    resident: float
    """Resident memory when idle, in bytes."""


def starts() -> list[Start]:
    """Start the sidecar several times. The first start is not counted, because it may compile bytecode."""
    return [_start() for _ in range(STARTS + 1)][1:]


def _start() -> Start:
    port, admin = free_port(), free_port()
    began = time.perf_counter()
    with process(sidecar(port, free_port(), admin=admin), admin) as pid:
        while _ask(admin, "/readyz")[0] != 200:
            time.sleep(0.005)
        seconds, cpu = time.perf_counter() - began, cpu_seconds(pid)
        time.sleep(1.5)
        return Start(seconds, cpu, resident_bytes(pid))


def queue_of_frames() -> float:
    """Return the growth of the sidecar's memory while 2,000 frames wait, divided by the bytes of their bodies."""
    upstream, port, admin = free_port(), free_port(), free_port()
    body = bodies()["frame"]
    with (
        process(wire("silent", upstream), upstream),
        process(sidecar(port, upstream, "--max-concurrency", "1", "--deadline", "600", admin=admin), port) as pid,
        subprocess.Popen(wire("pile", port, QUEUED + 1), stdin=subprocess.PIPE) as pile,
    ):
        try:
            before = resident_bytes(pid)
            assert pile.stdin is not None
            pile.stdin.write(body)
            pile.stdin.close()
            deadline = time.monotonic() + _BOUND_SECONDS
            while (waiting := sum(_samples(admin, "sidecar_queue_requests").values())) < QUEUED:
                if time.monotonic() > deadline or pile.poll() is not None:
                    raise RuntimeError(f"only {waiting:.0f} of {QUEUED} frames wait")
                time.sleep(0.1)
            return (resident_bytes(pid) - before) / (QUEUED * len(body))
        finally:
            pile.kill()


def lag() -> float:
    """Return the event-loop lag in seconds at 500 frames/s: the 99th percentile of the sidecar's own metric."""
    upstream, port, admin = free_port(), free_port(), free_port()
    with (
        process(wire("upstream", upstream), upstream),
        process(sidecar(port, upstream, admin=admin), port),
    ):
        before = _samples(admin, f"{_LAG}_bucket")
        done = subprocess.run(
            wire("pace", port, LAG_PER_SECOND, LAG_SECONDS), input=bodies()["frame"], capture_output=True, check=True
        )
        found = json.loads(done.stdout)
        if found["late"] > 0.01 * LAG_PER_SECOND * LAG_SECONDS:
            raise RuntimeError(f"{found['late']} requests found all connections busy: the rate was not reached")
        after = _samples(admin, f"{_LAG}_bucket")
    return quantile(0.99, {_bound(name): after[name] - before.get(name, 0.0) for name in after})


def quantile(share: float, buckets: dict[float, float]) -> float:
    """Return a quantile of a histogram with cumulative buckets, by linear interpolation in a bucket, as PromQL does."""
    bounds = sorted(buckets)
    rank = share * buckets[bounds[-1]]
    for below, bound in pairwise([0.0, *bounds]):
        under = buckets.get(below, 0.0)
        if buckets[bound] >= rank:
            return (
                below if bound == float("inf") else below + (bound - below) * (rank - under) / (buckets[bound] - under)
            )
    raise ValueError("no observation")


def _bound(sample: str) -> float:
    return float(sample.partition('le="')[2].partition('"')[0])


def _samples(admin: int, name: str) -> dict[str, float]:
    lines = _ask(admin, "/metrics")[1].splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line.startswith(name))
    return {sample: float(value) for sample, value in pairs}


def _ask(admin: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", admin, timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()
