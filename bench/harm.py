"""Measure what attackers change for everybody else: `make harm`.

    PYTHONPATH=tests python bench/harm.py                        # every attack, four minutes
    PYTHONPATH=tests python bench/harm.py --only "tiny objects"  # one of them
    PYTHONPATH=tests python bench/harm.py --short --factor 3     # some attacks, three times the bounds: .ci/run

For each attack it starts one `vlm-sidecar serve` and measures it twice: alone, and under the attack, which runs in
another process at nice 19 on one core. Exit status 1: a bound was missed. The bounds:

* `/livez` is answered within LIVEZ_SECONDS
* the p50 of a well-behaved camera is below TIMES its p50 without the attack
* no callback takes more than CALLBACK_SECONDS of the loop thread's own processor time

`--factor` multiplies these three. In addition, resident memory stays below the limit that k8s/ ships, the process is
still there, and its log reports no defect.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from attacks import ATTACKS, Attack
from attacks.bodies import MODEL
from pod_values import shipped
from running import CHAT, Process, chat

HERE = Path(__file__).parent
ROOT = HERE.parent
LIVEZ_SECONDS = 0.2
TIMES = 2.0
CALLBACK_SECONDS = 0.05
#: Bytes, as k8s/ ships them.
QUEUE_BYTES, MEMORY_BYTES = shipped()[0]["SIDECAR_QUEUE_BYTES"], shipped()[1]
#: Seconds between two probes of `/livez`.
PROBE_STEP = 0.05
#: Seconds of an attack before the measurement begins, so that the attackers have connected.
RISE_SECONDS = 1.0
#: Seconds. A request of the well-behaved camera, or a probe, that takes longer counts as lost.
PATIENCE = 10.0
#: The attacks of `--short`: each of them has stopped the process once, or kept it from its other callers.
SHORT = (
    "tiny objects",
    "invalid bodies of 13 MB",
    "pipelined bodies",
    "whole answers that are never read",
    "streams of blank lines",
)


@dataclass
class Measured:
    """What a well-behaved camera and a prober saw. A request without a 200 counts as infinitely slow."""

    camera: list[float] = field(default_factory=list)
    livez: list[float] = field(default_factory=list)

    @property
    def p50(self) -> float:
        return statistics.median(self.camera) if self.camera else float("inf")

    @property
    def lost(self) -> float:
        return self.camera.count(float("inf")) / max(len(self.camera), 1)


async def timed(session: aiohttp.ClientSession, method: str, url: str, **options: object) -> float:
    began = time.monotonic()
    try:
        async with session.request(method, url, **options) as response:  # type: ignore[arg-type]
            await response.read()
            return time.monotonic() - began if response.status == 200 else float("inf")
    except (aiohttp.ClientError, TimeoutError):
        return float("inf")


async def measure(process: Process, seconds: float) -> Measured:
    """Ask as a well-behaved camera, one frame after the other, and probe as kubelet does, for some seconds."""
    found = Measured()
    until = time.monotonic() + seconds
    timeout = aiohttp.ClientTimeout(PATIENCE)

    async def camera() -> None:
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while time.monotonic() < until:
                headers = {"X-Camera-Id": "well-behaved"}
                took = await timed(session, "POST", process.url + CHAT, json=chat(model=MODEL), headers=headers)
                found.camera.append(took)
                if took == float("inf"):
                    await asyncio.sleep(PROBE_STEP)

    async def prober() -> None:
        while time.monotonic() < until:
            async with aiohttp.ClientSession(timeout=timeout) as session:  # kubelet opens a connection for each probe
                found.livez.append(await timed(session, "GET", process.admin_url + "/livez"))
            await asyncio.sleep(PROBE_STEP)

    await asyncio.gather(camera(), prober())
    return found


@contextlib.asynccontextmanager
async def child(*arguments: str, begin: Callable[[], None] | None = None) -> AsyncIterator[asyncio.StreamReader]:
    """Run a module of the tests in a process that first calls `begin`, until the block ends. Yields its output."""
    environ = os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", *arguments, stdout=asyncio.subprocess.PIPE, env=environ, preexec_fn=begin
    )
    assert process.stdout is not None
    try:
        yield process.stdout
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def humbly() -> None:
    """Leave every core but the last to others, and that one to everybody else who wants it.

    So what changes for others is what the attack does to the sidecar, not a lack of processor time.
    """
    os.nice(19)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def peak_bytes(pid: int) -> int:
    """Return the largest resident memory that the process has had."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 if "VmHWM:" in status else 0


@dataclass(frozen=True)
class Row:
    name: str
    alone: Measured
    under: Measured
    callback: float
    culprit: str
    peak: int
    wrong: tuple[str, ...]


async def attacked(name: str, attack: Attack, origin: str, seconds: float, factor: float) -> Row:
    """Measure one attack. `factor` multiplies every bound."""
    with tempfile.TemporaryDirectory() as folder:
        callbacks = Path(folder) / "callbacks"
        options = ("--dashscope-url", f"{origin}/v1", "--queue-bytes", QUEUE_BYTES, *attack.options)
        prefix = (sys.executable, str(HERE / "harm_serve.py"), str(callbacks))
        async with Process(*options, environ={"PYTHONPATH": str(ROOT)}, prefix=prefix) as process:
            pid = process.process.pid
            await measure(process, 0.5)  # the first requests import and fill caches
            alone = await measure(process, min(seconds, 2.0))
            from_ = time.monotonic()
            ports = (str(process.port), str(process.admin_port))
            async with child("attacks", name, *ports, str(seconds + RISE_SECONDS + PATIENCE), begin=humbly) as output:
                await output.readline()
                await asyncio.sleep(RISE_SECONDS)
                under = await measure(process, seconds)
            peak = peak_bytes(pid)
            ended = process.process.returncode
        longest, culprit = longest_callback(callbacks, from_)
    wrong = []
    if max(under.livez) > LIVEZ_SECONDS * factor:
        wrong.append(f"/livez took {max(under.livez):.2f} s")
    if under.p50 > TIMES * factor * alone.p50:
        wrong.append(f"p50 is {under.p50 / alone.p50:.1f} times the p50 without the attack")
    if longest > CALLBACK_SECONDS * factor:
        wrong.append(f"a callback took {longest:.3f} s: {culprit}")
    if peak > MEMORY_BYTES:
        wrong.append(f"{peak / 2**20:.0f} MiB of memory, and the pod has {MEMORY_BYTES / 2**20:.0f} MiB")
    if ended is not None:
        wrong.append(f"the process ended with {ended}")
    if "defect" in process.log or "Traceback" in process.log or "MemoryError" in process.log:
        wrong.append("the log reports a defect: " + process.log[-600:])
    return Row(name, alone, under, longest, culprit, peak, tuple(wrong))


def longest_callback(path: Path, from_: float) -> tuple[float, str]:
    """Return the processor seconds and the name of the longest callback that ended after `from_`."""
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    found = [(float(took), name) for at, took, name in lines if float(at) > from_]
    return max(found, default=(0.0, ""))


def table(row: Row) -> str:
    alone, under = row.alone, row.under
    return (
        f"{row.name:34} {ATTACKS[row.name].row:7} {max(under.livez) * 1e3:7.0f} ms {under.p50 / alone.p50:6.2f} x "
        f"({alone.p50 * 1e3:.1f} → {under.p50 * 1e3:.1f} ms) {row.callback * 1e3:7.0f} ms {row.peak / 2**20:6.0f} MiB  "
        f"{under.lost:4.0%}  {'MISSED' if row.wrong else 'met'}"
    )


async def run(names: list[str], seconds: float, factor: float) -> int:
    missed = []
    print(f"{'attack':34} {'row':7} {'/livez':>10} {'p50':>8} {'':18} {'callback':>10} {'peak':>10} {'lost':>5}")
    async with child("attacks.upstream") as output:
        origin = (await output.readline()).decode().strip()
        for name in names:
            row = await attacked(name, ATTACKS[name], origin, seconds, factor)
            print(table(row), flush=True)
            for line in row.wrong:
                print(f"    {line}", flush=True)
            if row.wrong:
                missed.append(name)
    print(f"missed: {', '.join(missed)}" if missed else f"all {len(names)} attacks stay within the bounds")
    return int(bool(missed))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=ATTACKS, help="an attack; may be given several times")
    parser.add_argument("--short", action="store_true", help="some attacks only, each for a shorter time")
    parser.add_argument("--factor", type=float, default=1.0, help="multiplies every bound")
    parser.add_argument("--seconds", type=float, default=3.0, help="duration of each measurement")
    given = parser.parse_args()
    names = given.only or list(SHORT if given.short else ATTACKS)
    return asyncio.run(run(names, 2.0 if given.short else given.seconds, given.factor))


if __name__ == "__main__":
    sys.exit(main())
