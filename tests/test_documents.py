"""The documents are run: each one's shell blocks, in order, in one bash, beside a simulated provider.

What takes the place of a line, and what cannot run here, stands in the two tables below, with the reason. A line that
is in neither runs as it is written.
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
from running import free_port

from sidecar.cli.main import _EPILOGS, _parser

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
TEXT = {document: document.read_text() for document in DOCUMENTS}
_COMMANDS = r"(?:make|vlm-sidecar|curl|kubectl|pip|podman|docker|python|export|source)\b"
#: A session that takes longer hangs.
BOUND = 120.0

#: What is run in the place of a line, or of a part of one: less of the same, or the same beside this test's provider.
REPLACED = {
    # a free port, this test's provider, a folder of its own
    "127.0.0.1:8100": "127.0.0.1:$SIDECAR_PORT",
    "127.0.0.1:9464": "127.0.0.1:$SIDECAR_ADMIN_PORT",
    "https://dashscope.aliyuncs.com/compatible-mode/v1": "$PROVIDER",
    "/run/secrets/dashscope": "$SCRATCH/key",
    "/tmp/first-day": "$SCRATCH/first-day",  # noqa: S108
    # shorter: the real ones are for a real quota
    "seq 200": "seq 60",
    "offer 18 120": "offer 18 1",
    "offer 40 120": "offer 40 1",
    "offer 10 20": "offer 10 1",
    "offer 2 60": "offer 2 1",
    "sleep 90": "sleep 0",
    "sleep 600": "sleep 0",
    "in 10 20 40 60 90": "in 1 2",
    # `cli/test_demo.py` plays the demo, faster; `make test` is running this; `make test-pod` builds the image
    "make demo ": "make --dry-run demo ",
    "make test ": "make --dry-run test ",
    "make image ": "make --dry-run image ",
    # a clone of this tree with this environment; the other target runs beside these tests, not inside one
    "git clone REPOSITORY vlm-sidecar": "git clone --quiet . $SCRATCH/clone; ln -s $PWD/.venv $SCRATCH/clone/.venv",
    "cd vlm-sidecar": "cd $SCRATCH/clone",
    "make setup ": "make --dry-run setup ",
    "make run & ": "vlm-sidecar serve & ",
    # there is no cluster: `tests/k8s` holds what is rendered against the schemas, and plays it
    "kubectl apply -k": "kubectl kustomize",
}
#: What cannot run here at all.
NOT_RUN = {
    "make check": "the gate runs it beside these tests",
    "kubectl logs deploy/cortex -c cortex -f": "needs a cluster",
    "kubectl port-forward deploy/cortex 9464": "needs a cluster",
    "kubectl exec POD -c vlm-sidecar -- vlm-sidecar check": "needs a cluster",
    "pip install 'vlm-sidecar[local]'": "several GB from a registry",
    "vlm-sidecar serve --backend local --local-model HuggingFaceTB/SmolVLM-256M-Instruct": "needs the weights; "
    "`test_local_sidecar.py` serves a model made on the spot",
}
#: Starts the sidecar as the document says, waits until it is ready, and goes on; it is stopped with the session.
SERVE = """{line} & SERVED=$!
for _ in $(seq 200); do curl -fs -o /dev/null http://127.0.0.1:$SIDECAR_ADMIN_PORT/readyz && break; sleep 0.1; done
curl -fsS -o /dev/null http://127.0.0.1:$SIDECAR_ADMIN_PORT/readyz"""
_SERVE = re.compile(r"^(vlm-sidecar serve[^&#]*|make run)\s*(?:#.*|& (.*))?$")


def blocks(document: Path, language: str) -> list[str]:
    """Its blocks of code in one language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", TEXT[document], re.MULTILINE | re.DOTALL)
    return [block for name, block in found if name == language]


def session(document: Path) -> str:
    """The document's commands as one script for bash."""
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
async def test_its_commands_run(document, provider, tmp_path):
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
    with (tmp_path / "printed").open("wb") as printed:  # a file: what outlives bash would hold a pipe open
        bash = await asyncio.create_subprocess_exec(
            "bash", "-c", session(document), cwd=ROOT, env=environ, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=printed, stderr=printed,
        )  # fmt: skip
        try:
            async with asyncio.timeout(BOUND):
                status = await bash.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(bash.pid, signal.SIGKILL)  # of its own session: it and what it started
            await bash.wait()
    assert status == 0, (tmp_path / "printed").read_text()


def test_nothing_is_typed_outside_of_a_block_that_runs():
    """A command in a block that is not marked `sh`, or one that is only indented, would never be tried."""
    for document, text in TEXT.items():
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            assert language in ("sh", "text") or not re.search(rf"^{_COMMANDS}", block, re.MULTILINE), (document, block)
        assert not re.search(rf"^ {{4,}}{_COMMANDS}", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE), (
            document
        )


def test_the_tables_name_what_is_written():
    written = "\n".join("".join(blocks(document, "sh")) for document in DOCUMENTS) + " "
    for entry in (*REPLACED, *NOT_RUN):
        assert entry.strip() in written


async def test_the_python_of_the_readme_is_answered(serving):
    sidecar = await serving()
    (block,) = blocks(ROOT / "README.md", "python")
    python = await asyncio.create_subprocess_exec(
        sys.executable, "-c", block.replace("http://127.0.0.1:8100", sidecar.url), stdout=subprocess.PIPE
    )
    async with asyncio.timeout(BOUND):
        printed, _ = await python.communicate()
    assert python.returncode == 0
    assert printed.strip()


def test_every_query_is_one(tmp_path):
    queries = [line for document in DOCUMENTS for line in "".join(blocks(document, "promql")).splitlines() if line]
    rules = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(queries)]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "documents", "rules": rules}]}))
    checked = subprocess.run(
        [real_part("promtool"), "check", "rules", file], capture_output=True, text=True, timeout=BOUND, check=False
    )
    assert queries
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_command_in_running_text_is_understood():
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


@pytest.mark.parametrize("command", _EPILOGS)
def test_every_example_in_a_help_is_understood(command, monkeypatch):
    lines = re.findall(r"^  (?:source <\()?(vlm-sidecar [^)|\n]*)", _EPILOGS[command], re.MULTILINE)
    assert lines
    for line in lines:
        words = shlex.split(re.split(r"  +", line)[0])[1:]
        assert _parser(words[:1]).parse_args(words).run.__name__ == f"_{command}"


@pytest.mark.parametrize("page", ["architecture.md", "contributing.md", "glossary.md", "decisions"])
def test_every_file_that_a_page_for_developers_names_exists(page):
    pages = [text for document, text in TEXT.items() if document.is_relative_to(ROOT / "docs" / page)]
    named = set(re.findall(r"`((?:sidecar|backends|tests|bench|k8s|\.ci)/[\w./-]*)", "".join(pages)))
    assert named
    assert {name for name in named if not (ROOT / name).exists()} == set()


async def test_the_table_of_metrics_is_what_a_sidecar_says(serving):
    table = set(re.findall(r"^\| `(sidecar_\w+)` \|", TEXT[ROOT / "docs" / "metrics.md"], re.MULTILINE))
    sidecar = await serving()
    async with sidecar.post() as response:
        assert response.status == 200
    async with sidecar.client.get(f"{sidecar.admin_url}/metrics") as response:
        told = set(re.findall(r"^# HELP (sidecar_\w+) ", await response.text(), re.MULTILINE))
    assert told == table
