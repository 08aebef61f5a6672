"""Every attack at once, with the values that k8s/ ships: the process survives in the memory that its pod gives it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections import Counter
from pathlib import Path

import aiohttp
import pytest
from attacks import ATTACKS
from attacks.upstream import Upstream
from cgroups import memory_cgroup
from pod_values import shipped
from real_parts import ROOT
from running import BOUND, CHAT, Process, chat, samples

from backends.base import MAX_ANSWER_BYTES
from sidecar.settings import load
from sidecar.settings.memory import memory_limit

SECONDS = 10.0
HELD = 'sidecar_held_bytes{where="%s"}'
OF_CALLERS = ("heads", "receiving", "pipelined", "waiting")
OF_ANSWERS = ("in_flight", "answers", "slow_readers")


def peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


async def probe(client: aiohttp.ClientSession, url: str) -> str:
    async with client.get(url) as response:
        assert response.status == 200
        return await response.text()


@pytest.mark.alone
async def test_all_attacks_at_once_in_a_pod():
    environ, limit = shipped()
    given, _ = load({}, environ)
    assert limit == memory_limit(given.queue_bytes)
    ours = {"SIDECAR_QUEUE_BYTES": environ["SIDECAR_QUEUE_BYTES"]}
    most: Counter[str] = Counter()
    with memory_cgroup(limit) as in_cgroup:
        print("kernel enforces the limit" if in_cgroup else "no cgroup: only VmHWM is compared")  # noqa: T201
        async with (
            Upstream() as upstream,
            Process("--dashscope-url", f"{upstream.origin}/v1", environ=ours, prefix=in_cgroup or ()) as process,
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(BOUND)) as client,
        ):
            attackers = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "attacks", "all", str(process.port), str(process.admin_port), str(SECONDS),
                env=os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"},
            )  # fmt: skip
            ended = asyncio.ensure_future(attackers.wait())
            try:
                while not ended.done():
                    assert process.process.returncode is None, f"{process.process.returncode} {process.log[-2000:]}"
                    with contextlib.suppress(aiohttp.ClientError):
                        for name, value in samples(await probe(client, process.admin_url + "/metrics")).items():
                            most[name] = max(most[name], int(value))
                    await asyncio.wait((ended,), timeout=0.2)
                assert attackers.returncode == 0
            finally:
                if attackers.returncode is None:
                    attackers.kill()
                await ended
            assert await probe(client, process.admin_url + "/livez")
            async with client.post(process.url + CHAT, json=chat()) as response:
                assert response.status == 200, await response.text()
            assert peak_bytes(process.process.pid) < limit, f"{peak_bytes(process.process.pid) / 2**20:.0f} MiB"
            assert "MemoryError" not in process.log
            assert "defect" not in process.log
    assert sum(most[HELD % where] for where in OF_CALLERS) <= given.queue_bytes + given.max_body_bytes, most
    assert sum(most[HELD % where] for where in OF_ANSWERS) <= given.queue_bytes + MAX_ANSWER_BYTES, most
    assert {HELD % where for where in (*OF_CALLERS, *OF_ANSWERS, "pictures")} <= most.keys()
    assert len(ATTACKS) > 20
