"""Run seven of the scenarios over real sockets: `vlm-sidecar serve` as a process, and a provider with a hidden quota.

    make live                        (or .venv/bin/python bench/live.py --only 1 14)

Each scenario is shortened to about 30 s of real time (the scenario with three quotas: 30 s for each quota). They run at
the same time, each with its own provider and sidecar. The table also shows each figure of the same shortened scenario
in virtual time. If the two differ, the real sockets or the real clock are the cause. The target is that of the full
scenario.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from random import Random

import aiohttp
import orjson

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backends.base import ServerFailed, Throttled, Unreachable
from backends.simulated import Provider, serve
from bench.sim.load import Run
from bench.sim.systems import Ask
from bench.sim.table import SYSTEMS, TABLE, Check, Result, Scenario, at_least, at_most, play, settled, share
from sidecar.admission import NotAdmitted
from sidecar.dispatch.dispatcher import DeadlineExceeded

SEED = 1
SECONDS = 30.0
START_SECONDS = 20.0


def steps(result: Result, oracle: Result) -> list[Check]:
    """Judge scenario 4 with 30 s for each quota."""
    return [
        at_least("goodput", share(result, oracle), 0.92),
        at_most("s down", settled(result, SECONDS, 2 * SECONDS, lambda rate: rate >= 3.6, 4.0), 10.0),
        at_most("s up", settled(result, 2 * SECONDS, 3 * SECONDS, lambda rate: rate >= 14.4, 16.0), 60.0),
        at_most("visible", result.visible, 0),
    ]


def shortened() -> list[Scenario]:
    whole = {scenario.number: scenario for scenario in TABLE}
    quotas = tuple((at, {"requests_per_second": rate}) for at, rate in ((SECONDS, 4.0), (2 * SECONDS, 16.0)))
    return [
        replace(whole["1"], seconds=SECONDS),
        replace(whole["2"], seconds=SECONDS),
        replace(whole["3"], seconds=SECONDS, deadline=6.0),
        replace(
            whole["4"], seconds=3 * SECONDS, profile=replace(whole["4"].profile, changes=quotas), judge=steps
        ),
        replace(whole["9"], seconds=SECONDS, deadline=6.0),
        replace(whole["13"], seconds=SECONDS),
        replace(whole["14"], seconds=SECONDS),
    ]  # fmt: skip


class Live:
    """A running sidecar, used through its socket."""

    def __init__(self, client: aiohttp.ClientSession, url: str) -> None:
        self._client = client
        self._url = url
        self._clock = asyncio.get_running_loop().time

    async def ask(self, ask: Ask) -> None:
        headers = {"X-Camera-Id": ask.camera, "X-Request-Timeout": f"{ask.deadline - self._clock():.3f}"}
        try:
            async with self._client.post(self._url, data=ask.request().body, headers=headers) as response:
                body = await response.read()
        except aiohttp.ClientError as error:
            raise Unreachable(str(error)) from error
        if response.status == 200:
            return
        problem = orjson.loads(body)["error"]
        message = f"{response.status} {problem['code']}: {problem['message']}"
        match response.status:
            case 429:
                raise Throttled(message, kind="unknown")
            case 503:
                raise NotAdmitted(message)
            case 504:
                raise DeadlineExceeded(message)
        raise ServerFailed(message)


@contextlib.asynccontextmanager
async def serving(upstream: str) -> AsyncIterator[str]:
    """Run `vlm-sidecar serve` on free ports. Yields the URL of its chat completions."""
    command = [sys.executable, "-m", "sidecar", "serve", "--port", "0", "--admin-port", "0", "--log-format", "human"]
    process = await asyncio.create_subprocess_exec(
        *command, "--admin-host", "127.0.0.1", "--dashscope-url", upstream, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(START_SECONDS):
            while (line := await process.stderr.readline()) and b"probes and metrics on" not in line:
                pass
        found = re.search(rb"serves \S+ on (\S+),", line)
        if found is None:
            raise RuntimeError("vlm-sidecar serve did not start")
        rest = asyncio.create_task(_drop(process.stderr))
        yield f"http://{found[1].decode()}/v1/chat/completions"
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    await rest


async def _drop(stream: asyncio.StreamReader) -> None:
    """Read and discard the log, so that its pipe never becomes full."""
    while await stream.readline():
        pass


async def play_live(scenario: Scenario) -> Result:
    """Run a scenario once in real time."""
    provider = Provider(replace(scenario.profile, seed=SEED), history=1_000_000)
    runner = await serve(provider)
    try:
        host, port = runner.addresses[0][:2]
        client = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        async with serving(f"http://{host}:{port}/v1") as url, client:
            provider.change(provider.profile)  # the times in the profile start now
            run = Run(Live(client, url), scenario.seconds, scenario.deadline, scenario.tokens, Random(f"{SEED} 0"))
            began = provider.begin()
            await scenario.load(run)
        return Result([run], provider, run.system, began)
    finally:
        await runner.cleanup()


async def play_all(scenarios: list[Scenario]) -> list[Result]:
    return await asyncio.gather(*(play_live(scenario) for scenario in scenarios))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], metavar="N", help="scenarios by number")
    options = parser.parse_args()
    chosen = [scenario for scenario in shortened() if not options.only or scenario.number in options.only]
    misses = 0
    print(f"{'':57} {'figure':<16} {'live':>8} {'virtual':>8}    target", flush=True)
    for scenario, result in zip(chosen, asyncio.run(play_all(chosen)), strict=True):
        oracle = play(scenario, SEED, SYSTEMS["oracle"])
        virtual = scenario.judge(play(scenario, SEED, SYSTEMS["sidecar"]), oracle)
        title = f"{scenario.number:>3} {scenario.name}, {scenario.seconds:.0f} s"
        for check, beside in zip(scenario.judge(result, oracle), virtual, strict=True):
            misses += not check.holds
            target = f"{'≥' if check.at_least else '≤'} {check.target:g}"
            miss = "" if check.holds else "   <-- MISS"
            print(f"{title:<57} {check.name:<16} {check.value:8.3f} {beside.value:8.3f}  {target}{miss}")
            title = ""
        print(f"{'':57} {result.calls} calls, {result.refused} refused; {dict(result.runs[0].outcomes())}")
    print(f"\n{misses} figures miss their target")


if __name__ == "__main__":
    main()
