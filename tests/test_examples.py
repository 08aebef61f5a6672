"""What the documents and examples tell people to type is what the program takes, and what they promise is so."""

from __future__ import annotations

import asyncio
import re
import shlex
import subprocess
import sys
from pathlib import Path

import yaml
from real_parts import real_part
from running import BOUND, Process

from sidecar.cli import _parser
from sidecar.settings import load

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
TEXT = {document: document.read_text() for document in DOCUMENTS}


def blocks(document):
    """The lines of its code blocks, with what a backslash or an open quote continues in one."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", TEXT[document], re.MULTILINE | re.DOTALL):
        if language not in ("", "sh", "bash", "console"):
            continue
        line = ""
        for piece in block.replace("\\\n", " ").splitlines():
            line = f"{line}\n{piece}" if line else piece
            try:
                shlex.split(line, comments=True)
            except ValueError:
                continue  # a quote is open
            yield line.strip()
            line = ""


COMMANDS = [(document.name, line) for document in DOCUMENTS for line in blocks(document)]


def parsed(words):
    """Parse a command line as `vlm-sidecar` does."""
    return _parser(words[:1]).parse_args(words)


def test_every_command_of_ours_in_the_documents_is_understood():
    found = [match[1] for _, line in COMMANDS if (match := re.search(r"(?:^|<\()vlm-sidecar ([^|&)]+)", line))]
    for command in found:
        parsed(shlex.split(command, comments=True))
    assert {"serve", "check", "top", "completion"} <= {command.split()[0] for command in found}


def test_every_make_target_in_the_documents_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {target for text in TEXT.values() for target in re.findall(r"`make ([a-z-]+)", text)}
    named |= {line.split()[1] for _, line in COMMANDS if line.startswith("make ")}
    assert named
    assert named <= targets


async def test_every_curl_in_the_documents_is_answered():
    lines = [line for _, line in COMMANDS if line.startswith("curl ") and ("8100" in line or "9464" in line)]
    assert lines
    async with Process() as process:
        for line in lines:
            here = line.replace(":8100", f":{process.port}").replace(":9464", f":{process.admin_port}")
            curl = await asyncio.create_subprocess_exec(
                *shlex.split(here, comments=True), "--fail", "--silent", "--show-error",
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            async with asyncio.timeout(BOUND):
                printed, _ = await curl.communicate()
            assert curl.returncode == 0, (line, printed)


async def test_the_cameras_of_cortex_are_all_answered(provider):
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


def test_the_configuration_for_vllm_is_taken():
    settings, origins = load({}, environ={}, file=ROOT / "examples" / "vllm.toml")
    assert (settings.max_concurrency, settings.backend_names) == (16, ["dashscope"])
    assert len(origins) == 5


def test_compose_starts_commands_that_exist_and_reaches_ports_that_are_listened_on():
    services = yaml.safe_load((ROOT / "examples" / "compose" / "compose.yaml").read_text())["services"]
    serve = parsed(services["sidecar"]["command"])
    simulate = parsed(services["provider"]["command"])
    assert serve.dashscope_url == f"http://provider:{simulate.port}/v1"
    scraped = yaml.safe_load((ROOT / "examples" / "compose" / "prometheus.yml").read_text())
    assert scraped["scrape_configs"][0]["static_configs"] == [{"targets": ["sidecar:9464"]}]


def test_prometheus_takes_its_configuration():
    file = ROOT / "examples" / "compose" / "prometheus.yml"
    checked = subprocess.run(
        [real_part("promtool"), "check", "config", str(file)],
        capture_output=True,
        text=True,
        timeout=BOUND,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


async def test_the_table_of_metrics_is_what_a_sidecar_says(serving):
    table = set(re.findall(r"^\| `(sidecar_\w+)` \|", TEXT[ROOT / "docs" / "metrics.md"], re.MULTILINE))
    sidecar = await serving()
    async with sidecar.post() as response:
        assert response.status == 200
    async with sidecar.client.get(f"{sidecar.admin_url}/metrics") as response:
        told = set(re.findall(r"^# HELP (sidecar_\w+) ", await response.text(), re.MULTILINE))
    assert told == table
