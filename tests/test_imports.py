"""Heavy libraries are imported only by the code that needs them: low idle memory is a feature of the sidecar."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import asyncio, sys
import aiohttp, uvloop
from sidecar.app import Sidecar
import sidecar.cli.main
from sidecar.settings import load

async def main():
    ports = {"port": 0, "admin_host": "127.0.0.1", "admin_port": 0}
    sidecar = Sidecar(load({"backend": "dashscope", "dashscope_url": "http://127.0.0.1:9/v1", **ports}, {})[0])
    try:
        await sidecar.start()
        async with aiohttp.ClientSession() as client:
            chat = {"model": "m", "messages": [{"role": "user", "content": "Who is there?"}]}
            for url, body in (
                (f"http://127.0.0.1:{sidecar.data_port}/v1/chat/completions", chat),
                (f"http://127.0.0.1:{sidecar.admin_port}/metrics", None),
            ):
                async with client.request("GET" if body is None else "POST", url, json=body) as response:
                    print(response.status)
    finally:
        await sidecar.close()

uvloop.run(main())
heavy = ("torch", "transformers", "PIL", "numpy", "redis", "onnxruntime", "opentelemetry")
print([name for name in heavy if name in sys.modules])
"""


def test_a_sidecar_for_dashscope_serves_without_importing_heavy_libraries():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split("\n")[:3] == ["502", "200", "[]"], done.stderr
