"""Run the examples, as far as that is possible without a registry and a GPU."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import yaml
from real_parts import real_part
from running import BOUND, Process

from sidecar.cli.main import _parser
from sidecar.settings import load

ROOT = Path(__file__).parents[1]


def parsed(words):
    """Parse a command line as `vlm-sidecar` does."""
    return _parser(words[:1]).parse_args(words)


async def test_all_cameras_of_the_cortex_example_get_answers(provider):
    url, simulated = await provider(requests_per_second=20, burst_requests=10, latency_seconds=0.1)
    async with Process("--dashscope-url", url) as process:
        cortex = await asyncio.create_subprocess_exec(
            sys.executable, str(ROOT / "examples" / "cortex.py"), f"{process.url}/v1", "--frames", "2",
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        async with asyncio.timeout(2 * BOUND):
            printed, complaint = await cortex.communicate()
    assert (cortex.returncode, complaint) == (0, b"")
    lines = printed.decode().splitlines()
    assert len(lines) == 20
    assert all("queue;dur=" in line for line in lines)
    assert simulated.counts.ended["answered"] == 20


def test_the_configuration_for_vllm_is_accepted():
    settings, origins = load({}, environ={}, file=ROOT / "examples" / "vllm.toml")
    assert (settings.max_concurrency, settings.backend_names) == (16, ["dashscope"])
    assert len(origins) == 5


def test_the_commands_and_ports_of_compose_exist():
    services = yaml.safe_load((ROOT / "examples" / "compose" / "compose.yaml").read_text())["services"]
    serve = parsed(services["sidecar"]["command"])
    simulate = parsed(services["provider"]["command"])
    assert serve.dashscope_url == f"http://provider:{simulate.port}/v1"
    scraped = yaml.safe_load((ROOT / "examples" / "compose" / "prometheus.yml").read_text())
    assert scraped["scrape_configs"][0]["static_configs"] == [{"targets": ["sidecar:9464"]}]


def test_prometheus_accepts_its_configuration():
    file = ROOT / "examples" / "compose" / "prometheus.yml"
    checked = subprocess.run(
        [real_part("promtool"), "check", "config", str(file)],
        capture_output=True,
        text=True,
        timeout=BOUND,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
