"""The committed Grafana dashboard equals the output of its script, and every panel has data on a loaded sidecar."""

from __future__ import annotations

import asyncio
import importlib.util

import aiohttp
from real_parts import ROOT, real_packages
from running import CHAT, Process, chat

SCRIPT = ROOT / "k8s" / "monitoring" / "dashboard.py"


def script():
    real_packages("grafana_foundation_sdk", how_to_get_them="`make .venv/.group-k8s` installs it")
    found = importlib.util.spec_from_file_location("dashboard", SCRIPT)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_the_committed_dashboard_is_what_the_script_builds():
    assert SCRIPT.with_suffix(".json").read_text() == script().build(), "make dashboard"


async def test_every_panel_shows_data_of_a_loaded_sidecar(provider, monitored):
    """The load has a quota that refuses, requests that wait for it, and errors, so that every panel has data."""
    url, _ = await provider(latency_seconds=0.1, requests_per_second=8, burst_requests=3, error_share=0.1)
    async with Process("--dashscope-url", url) as sidecar, aiohttp.ClientSession() as sidecar.client:
        monitoring = await monitored(sidecar)
        async with asyncio.TaskGroup() as tasks:
            cameras = [tasks.create_task(camera(sidecar)) for _ in range(12)]
            for query in script().queries():
                await wait_for_data(monitoring, query)
            for task in cameras:
                task.cancel()


async def camera(sidecar):
    while True:
        async with sidecar.client.post(sidecar.url + CHAT, json=chat()) as response:
            await response.read()


async def wait_for_data(monitoring, query):
    """Wait until a panel's query returns a number."""
    for name, value in {"$namespace": ".*", "$backend": ".*", "$__rate_interval": "10s"}.items():
        query = query.replace(name, value)

    async def has_data():
        found = await monitoring.get(f"{monitoring.prometheus}/api/v1/query", query=query)
        assert found["status"] == "success", (query, found)
        return any(series["value"][1] != "NaN" for series in found["data"]["result"])

    try:
        await monitoring.until(has_data)
    except TimeoutError:
        raise AssertionError(f"no data: {query}") from None
