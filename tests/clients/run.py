"""Run the documented examples of outside clients against `vlm-sidecar serve` and print one line for each.

    python tests/clients/run.py [CLIENT …]

Each client is a program in an environment that `make .venv-clients/.ready` creates. Each runs twice: in front of the
simulated provider, and in front of a scripted one (`provider.py`) that also refuses, fails and streams in unusual ways.
The exit status is 1 if an example failed.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
sys.path.insert(0, str(FOLDER.parent))

from provider import Provider  # noqa: E402
from running import IMAGE_URL, Process, SimulatedProcess  # noqa: E402
from scripted_upstream import Upstream  # noqa: E402

ENVIRONMENT = ROOT / ".venv-clients"
CLIENTS = {
    "openai": (ENVIRONMENT / "bin/python", "of_openai.py"),
    "openai-node": (ENVIRONMENT / "bin/node", "of_openai_node.mjs"),
    "litellm": (ENVIRONMENT / "bin/python", "of_litellm.py"),
    "langchain-openai": (ENVIRONMENT / "bin/python", "of_langchain.py"),
    "dashscope": (ENVIRONMENT / "bin/python", "of_dashscope.py"),
}
#: Seconds. The longest time of all examples of one client.
BOUND = 120.0


async def examples(client: str, provider: str, url: str, origin: str) -> bool:
    """Run the examples of one client in front of one provider. Return whether all passed."""
    program, file = CLIENTS[client]
    began, count, failed = time.monotonic(), 0, False
    key = {"SIDECAR_API_KEY": "of-the-caller"}
    async with Process("--dashscope-url", url, "--passthrough", environ=key) as sidecar:
        process = await asyncio.create_subprocess_exec(
            program, FOLDER / file, stdout=subprocess.PIPE,
            env={
                **os.environ, "BASE": f"{sidecar.url}/v1", "PROVIDER": origin, "PROVIDER_IS": provider,
                "IMAGE": IMAGE_URL, "NODE_PATH": str(ENVIRONMENT / "node_modules"),
                "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            },
        )  # fmt: skip
        assert process.stdout is not None
        try:
            async with asyncio.timeout(BOUND):
                count, failed = await _print_results(f"{client:16}  {provider:9}", process.stdout)
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
            failed = True
    took = time.monotonic() - began
    print(f"{client:16}  {provider:9}  {count} examples, {took:.1f} s, exit status {process.returncode}", flush=True)
    return not failed and count > 0 and process.returncode == 0


async def _print_results(head: str, lines: asyncio.StreamReader) -> tuple[int, bool]:
    """Print the result of each example as it comes. Return their number and whether one failed."""
    count, failed = 0, False
    async for line in lines:
        if line.startswith(b'{"example"'):  # a client prints lines of its own too
            result = json.loads(line)
            print(f"{head}  {result['example']:60}  {result['failure'] or 'ok'}", flush=True)
            count, failed = count + 1, failed or bool(result["failure"])
    return count, failed


async def main() -> int:
    passed = True
    for client in sys.argv[1:] or CLIENTS:
        async with SimulatedProcess() as simulated:
            url = simulated.url
            passed &= await examples(client, "simulated", url, url.removesuffix("/compatible-mode/v1"))
        async with Upstream(Provider()) as upstream:
            passed &= await examples(client, "scripted", f"{upstream.origin}/v1", upstream.origin)
    return not passed


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
