"""Run the documents: the shell blocks of each document run in order in one bash, with a simulated provider.

REPLACED lists the texts that are replaced, and NOT_RUN the lines that are left out, each with the reason. Every other
line runs as the document shows it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from real_parts import PARTS, real_part

from sidecar.cli.demo.processes import free_port
from sidecar.cli.main import _MORE, _parser

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
TEXT = {document: document.read_text() for document in DOCUMENTS}
_COMMANDS = r"(?:make|vlm-sidecar|curl|kubectl|pip|podman|docker|python|export|source)\b"
#: Seconds. A session that takes longer is considered to hang.
BOUND = 120.0

#: Text in a line → its replacement: the same with less work, or with the addresses and the provider of this test.
REPLACED = {
    # a free port, the test's provider, a folder for this test
    "127.0.0.1:8100": "127.0.0.1:$SIDECAR_PORT",
    "127.0.0.1:9464": "127.0.0.1:$SIDECAR_ADMIN_PORT",
    "https://dashscope.aliyuncs.com/compatible-mode/v1": "$PROVIDER",
    "/run/secrets/dashscope": "$SCRATCH/key",
    "/tmp/first-day": "$SCRATCH/first-day",  # noqa: S108
    # shorter: the documents' durations are for a real quota
    "seq 200": "seq 60",
    "offer 18 120": "offer 18 1",
    "offer 40 120": "offer 40 1",
    "offer 10 20": "offer 10 1",
    "offer 2 60": "offer 2 1",
    "sleep 90": "sleep 0",
    "sleep 600": "sleep 0",
    "in 10 20 40 60 90": "in 1 2",
    # `cli/test_demo.py` runs the demo faster; `make test` is running this test; `make test-pod` builds the image
    "make demo ": "make --dry-run demo ",
    "make test ": "make --dry-run test ",
    "make image ": "make --dry-run image ",
    # there is no cluster: `tests/k8s` checks the rendered files against the schemas and runs them
    "kubectl apply -k": "kubectl kustomize",
}
#: Lines that cannot run here, with the reason.
NOT_RUN = {
    "kubectl logs deploy/cortex -c cortex -f": "needs a cluster",
    "kubectl port-forward deploy/cortex 9464": "needs a cluster",
    "kubectl exec POD -c vlm-sidecar -- vlm-sidecar check": "needs a cluster",
    "pip install 'vlm-sidecar[local]'": "several GB from a registry",
    "vlm-sidecar serve --backend local --local-model HuggingFaceTB/SmolVLM-256M-Instruct": "needs the weights; "
    "`test_local_sidecar.py` serves a model that it builds itself",
}
#: Starts the sidecar with the document's own line and waits until it is ready. The end of the session stops it.
SERVE = """{line} & SERVED=$!
for _ in $(seq 200); do curl -fs -o /dev/null http://127.0.0.1:$SIDECAR_ADMIN_PORT/readyz && break; sleep 0.1; done
curl -fsS -o /dev/null http://127.0.0.1:$SIDECAR_ADMIN_PORT/readyz"""
_SERVE = re.compile(r"^(vlm-sidecar serve[^&#]*|make run)\s*(?:#.*|& (.*))?$")


def blocks(document: Path, language: str) -> list[str]:
    """Return the document's code blocks in one language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", TEXT[document], re.MULTILINE | re.DOTALL)
    return [block for name, block in found if name == language]


def session(document: Path) -> str:
    """Return the document's commands as one bash script."""
    lines = []
    serves = False
    for line in "".join(blocks(document, "sh")).splitlines():
        if line.partition("  #")[0].strip() in NOT_RUN:
            continue
        for written, instead in REPLACED.items():
            line = f"{line} ".replace(written, instead).rstrip()  # noqa: PLW2901
        if found := _SERVE.match(line):
            line = SERVE.format(line=found[1].rstrip()) + "\n" + (found[2] or "")  # noqa: PLW2901
            line = f"kill $SERVED; wait $SERVED\n{line}" if serves else line  # noqa: PLW2901
            serves = True
        lines.append(line)
    start = "" if serves else SERVE.format(line="vlm-sidecar serve") + "\n"
    return f"set -e\n{start}" + "\n".join(lines) + "\nkill $SERVED 2>/dev/null || true\nwait\n"


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d, "sh")], ids=lambda d: str(d.relative_to(ROOT)))
async def test_the_commands_of_every_document_run(document, provider, tmp_path):
    url, _ = await provider(requests_per_second=15, burst_requests=15, latency_seconds=0.05)
    (tmp_path / "key").write_text("sk-of-a-file\n")
    if "kubectl kustomize" in session(document):
        real_part("kubectl")
    foreign = ("SIDECAR_", "TRIO_", "DASHSCOPE", "CI", "MAKE", "MFLAGS")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | {
        "PATH": f"{Path(sys.executable).parent}:{PARTS}:{os.environ['PATH']}",
        "SIDECAR_PORT": str(free_port()),
        "SIDECAR_ADMIN_PORT": str(free_port()),
        "SIDECAR_DASHSCOPE_URL": url,
        "PROVIDER": url,
        "SCRATCH": str(tmp_path),
    }
    with (tmp_path / "printed").open("wb") as printed:  # not a pipe: a process that outlives bash would keep it open
        bash = await asyncio.create_subprocess_exec(
            "bash", "-c", session(document), cwd=ROOT, env=environ, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=printed, stderr=printed,
        )  # fmt: skip
        try:
            async with asyncio.timeout(BOUND):
                status = await bash.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(bash.pid, signal.SIGKILL)  # bash has its own session: this ends it and its children
            await bash.wait()
    assert status == 0, (tmp_path / "printed").read_text()


def test_every_command_is_in_a_block_that_runs():
    """A command in a block that is not marked `sh`, or in a block that is only indented, would never be tested."""
    for document, text in TEXT.items():
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            assert language in ("sh", "text") or not re.search(rf"^{_COMMANDS}", block, re.MULTILINE), (document, block)
        assert not re.search(rf"^ {{4,}}{_COMMANDS}", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE), (
            document
        )


def test_every_entry_of_the_tables_occurs_in_a_document():
    written = "\n".join("".join(blocks(document, "sh")) for document in DOCUMENTS) + " "
    for entry in (*REPLACED, *NOT_RUN):
        assert entry.strip() in written


async def test_the_python_example_of_the_readme_gets_an_answer(serving):
    sidecar = await serving()
    (block,) = blocks(ROOT / "README.md", "python")
    python = await asyncio.create_subprocess_exec(
        sys.executable, "-c", block.replace("http://127.0.0.1:8100", sidecar.url), stdout=subprocess.PIPE
    )
    async with asyncio.timeout(BOUND):
        printed, _ = await python.communicate()
    assert python.returncode == 0
    assert printed.strip()


def test_every_promql_query_is_valid(tmp_path):
    queries = [line for document in DOCUMENTS for line in "".join(blocks(document, "promql")).splitlines() if line]
    rules = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(queries)]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "documents", "rules": rules}]}))
    checked = subprocess.run(
        [real_part("promtool"), "check", "rules", file], capture_output=True, text=True, timeout=BOUND, check=False
    )
    assert queries
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_command_in_running_text_is_valid():
    spans = [span for text in TEXT.values() for span in re.findall(r"`([^`\n]+)`", text)]
    commands = [span for span in spans if re.match(r"vlm-sidecar [a-z]", span)]
    assert commands
    for command in commands:
        words = shlex.split(command.partition("|")[0])[1:]
        if "FILE" not in words and "--help" not in words:
            _parser(words[:1]).parse_args(words)
    targets = set(re.findall(r"^([a-z-]+):|^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    known = {target for one, several in targets for target in (one, *several.split()) if target}
    assert {target for span in spans for target in re.findall(r"^make ([a-z-]+)", span)} <= known


@pytest.mark.parametrize("command", _MORE)
def test_every_example_in_a_help_text_is_valid(command, monkeypatch):
    lines = re.findall(r"^  (?:source <\()?(vlm-sidecar [^)|\n]*)", _MORE[command], re.MULTILINE)
    assert lines
    for line in lines:
        words = shlex.split(re.split(r"  +", line)[0])[1:]
        assert _parser(words[:1]).parse_args(words).run.__name__ == f"_{command}"


async def test_the_table_of_metrics_lists_exactly_the_exported_metrics(serving):
    table = set(re.findall(r"^\| `(sidecar_\w+)` \|", TEXT[ROOT / "docs" / "metrics.md"], re.MULTILINE))
    sidecar = await serving()
    async with sidecar.post() as response:
        assert response.status == 200
    async with sidecar.client.get(f"{sidecar.admin_url}/metrics") as response:
        described = set(re.findall(r"^# HELP (sidecar_\w+) ", await response.text(), re.MULTILINE))
    assert described == table
