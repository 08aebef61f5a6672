"""Every attack at once, with the values that k8s/ ships: the process survives in the memory that its pod gives it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest
from attacks import ATTACKS, HOLDING
from attacks.upstream import Upstream
from cgroups import memory_cgroup
from pod_values import shipped
from real_parts import ROOT
from running import BOUND, CHAT, Process, chat, samples

from backends.base import MAX_ANSWER_BYTES
from backends.picture_memory import MAX_PICTURE_BYTES
from sidecar.settings import load
from sidecar.settings.memory import memory_limit

#: How long all attack, and for how much of it only those that make the process hold bytes.
SECONDS, ALONE_SECONDS = 9.0, 4.5
HELD = 'sidecar_held_bytes{where="%s"}'
KINDS = {
    "of callers": ("heads", "receiving", "pipelined", "waiting"),
    "of answers": ("in_flight", "answers", "slow_readers"),
    "of pictures": ("pictures",),
}


def peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


async def probe(client: aiohttp.ClientSession, url: str) -> str:
    async with client.get(url) as response:
        assert response.status == 200
        return await response.text()


async def held_bytes(client: aiohttp.ClientSession, admin_url: str) -> dict[str, float]:
    now = samples(await probe(client, admin_url + "/metrics"))
    return {kind: sum(now[HELD % place] for place in places) for kind, places in KINDS.items()}


async def attack(process: Process, names: list[str], seconds: float, after: float = 0.0) -> None:
    """Run these attacks in a process of their own, after this number of seconds."""
    await asyncio.sleep(after)
    ports = (str(process.port), str(process.admin_port))
    environ = os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"}
    command = (sys.executable, "-m", "attacks", ",".join(names), *ports, str(seconds))
    child = await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL, env=environ)
    try:
        assert await child.wait() == 0
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


@pytest.mark.alone
async def test_all_attacks_at_once_in_a_pod():
    environ, limit = shipped()
    given, _ = load({}, environ)
    assert limit == memory_limit(given.queue_bytes)
    ours = {"SIDECAR_QUEUE_BYTES": environ["SIDECAR_QUEUE_BYTES"]}
    most = dict.fromkeys(KINDS, 0.0)
    with memory_cgroup(limit) as in_cgroup:
        print("kernel enforces the limit" if in_cgroup else "no cgroup: only VmHWM is compared")  # noqa: T201
        async with (
            Upstream() as upstream,
            Process("--dashscope-url", f"{upstream.origin}/v1", environ=ours, prefix=in_cgroup or ()) as process,
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(force_close=True), timeout=aiohttp.ClientTimeout(BOUND)
            ) as client,
        ):
            holding, others = list(HOLDING), [name for name in ATTACKS if name not in HOLDING]
            attackers = asyncio.gather(
                attack(process, holding[::2], SECONDS),
                attack(process, holding[1::2], SECONDS),
                # These keep the event loop busy, so it could not take what the first two offer.
                attack(process, others, SECONDS - ALONE_SECONDS, after=ALONE_SECONDS),
            )
            try:
                while not attackers.done():
                    assert process.process.returncode is None, f"{process.process.returncode} {process.log[-2000:]}"
                    with contextlib.suppress(aiohttp.ClientError):
                        held = await held_bytes(client, process.admin_url)
                        for kind in held:
                            most[kind] = max(most[kind], held[kind])
                    await asyncio.wait((attackers,), timeout=0.2)
            finally:
                attackers.cancel()
                await asyncio.wait((attackers,))
            await attackers
            assert process.process.returncode is None, f"{process.process.returncode} {process.log[-2000:]}"
            assert await probe(client, process.admin_url + "/livez")
            async with client.post(process.url + CHAT, json=chat()) as response:
                assert response.status == 200, await response.text()
            peak = peak_bytes(process.process.pid)
            print(f"at most {peak / 2**20:.0f} MiB of {limit / 2**20:.0f} MiB were resident; held: {most}")  # noqa: T201
            assert peak < limit
            assert "MemoryError" not in process.log
            assert "defect" not in process.log
    # The oldest message can always be completed, and another one may be taken in the same moment.
    assert 0 < most["of callers"] <= given.queue_bytes + 2 * given.max_body_bytes
    assert 0 < most["of answers"] <= given.queue_bytes + 2 * MAX_ANSWER_BYTES
    assert most["of pictures"] <= MAX_PICTURE_BYTES
