"""Run a real Prometheus and Alertmanager beside a sidecar."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest
import yaml
from real_parts import real_part
from rules import spec
from running import free_port

BOUND = 30.0


class Monitored:
    """A Prometheus that scrapes one sidecar, and the Alertmanager that gets its alerts."""

    def __init__(self, sidecar, prometheus, alertmanager):
        self.sidecar = sidecar
        self.prometheus = f"http://127.0.0.1:{prometheus}"
        self.alertmanager = f"http://127.0.0.1:{alertmanager}"

    async def get(self, url, **params):
        async with self.sidecar.client.get(url, params=params, raise_for_status=True) as response:
            return await response.json()

    async def until(self, look):
        """Wait until `look` returns a true value, and return it. Raises `TimeoutError` after `BOUND` seconds."""
        async with asyncio.timeout(BOUND):
            while True:
                try:
                    if found := await look():
                        return found
                except (OSError, aiohttp.ClientResponseError):
                    pass  # the program is still starting
                await asyncio.sleep(0.2)

    async def query(self, text):
        found = (await self.get(f"{self.prometheus}/api/v1/query", query=text))["data"]["result"]
        return float(found[0]["value"][1]) if found else None

    async def alerts(self):
        return {alert["labels"]["alertname"] for alert in await self.get(f"{self.alertmanager}/api/v2/alerts")}


@pytest.fixture
async def monitored(tmp_path):
    """Provide a function that starts both programs beside a sidecar."""
    processes = []

    async def start(sidecar):
        ports = free_port(), free_port()
        rules = spec()
        for group in rules["groups"]:
            group["interval"] = "1s"
            for rule in group["rules"]:
                rule.pop("for", None)
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yaml"],
            "alerting": {"alertmanagers": [{"static_configs": [{"targets": [f"127.0.0.1:{ports[1]}"]}]}]},
            "scrape_configs": [
                {"job_name": "s", "static_configs": [{"targets": [sidecar.admin_url.removeprefix("http://")]}]}
            ],
        }
        routes = {"route": {"receiver": "none", "group_wait": "1s"}, "receivers": [{"name": "none"}]}
        for name, content in (("rules", rules), ("prometheus", config), ("alertmanager", routes)):
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
        commands = (
            [
                real_part("prometheus"), "--config.file=prometheus.yaml", "--storage.tsdb.path=tsdb",
                f"--web.listen-address=127.0.0.1:{ports[0]}", "--rules.alert.resend-delay=1s",
                "--enable-feature=exemplar-storage",
            ],
            [
                real_part("prometheus-alertmanager"), "--config.file=alertmanager.yaml", "--storage.path=am",
                f"--web.listen-address=127.0.0.1:{ports[1]}", "--cluster.listen-address=",
            ],
        )  # fmt: skip
        for command in commands:
            with (tmp_path / f"{Path(command[0]).name}.log").open("wb") as log:
                processes.append(  # immediately: if the next program does not start, this one is still ended
                    await asyncio.create_subprocess_exec(*command, cwd=tmp_path, stdout=log, stderr=log)
                )
        return Monitored(sidecar, *ports)

    yield start
    ended = [process for process in processes if process.returncode is not None]
    for process in processes:
        if process not in ended:
            process.kill()
            await process.wait()
    assert not ended, "\n".join(log.read_text() for log in tmp_path.glob("*.log"))
