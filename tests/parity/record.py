"""`make parity`: asks trio-core every case, keeps what it answers, and prints where the sidecar is different."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import aiohttp

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from cases import DETECTOR_ROWS, DIFFERENCES, Case, every  # noqa: E402
from comparing import Provider, outcomes  # noqa: E402
from running import running  # noqa: E402
from tiny_onnx import yolov10  # noqa: E402

EXPECTED = HERE / "expected.json"


async def main(python: str) -> None:
    cases = every()
    with tempfile.TemporaryDirectory() as folder:
        detector = yolov10(Path(folder) / "detector.onnx", DETECTOR_ROWS)
        await _record(python, str(detector), cases)


async def _record(python: str, detector: str, cases: list[Case]) -> None:
    async with Provider() as provider:
        trio_core = await _start(python, f"{provider.origin}/v1", detector)
        try:
            theirs = await outcomes(trio_core.url, provider, cases)
        finally:
            trio_core.process.terminate()
            trio_core.process.wait(10)
        async with running(dashscope_url=f"{provider.origin}/v1", detector_model=detector) as sidecar:
            ours = await outcomes(sidecar.url, provider, cases)
    recorded = {case.name: {"digest": case.digest, **theirs[case.name]} for case in cases}
    lines = (f"{json.dumps(name)}: {json.dumps(value, sort_keys=True)}" for name, value in recorded.items())
    EXPECTED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    different = [case for case in cases if ours[case.name] != theirs[case.name]]
    for case in different:
        print(f"{case.name}: {DIFFERENCES.get(case.differs, 'NOT MEANT')}")
        for name, outcome in (("trio-core", theirs), ("sidecar", ours)):
            print(f"  {name:9} {json.dumps(outcome[case.name])[:600]}")
    meant = {case.name for case in cases if case.differs}
    unmeant = {case.name for case in different} ^ meant
    print(f"{len(cases)} requests, {len(different)} answered differently, {len(unmeant)} of them not as listed")
    sys.exit(bool(unmeant))


class _Process:
    def __init__(self, process: subprocess.Popen[bytes], url: str) -> None:
        self.process = process
        self.url = url


async def _start(python: str, provider_url: str, detector: str) -> _Process:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = f"from trio_core.api.inference_server import main; main('127.0.0.1', {port}, 'critical')"
    settings = {"REMOTE_VLM_URL": provider_url, "YOLO_MODEL": detector, "MODEL": "none", "AUTO_OPTIMIZE": "0"}
    environ = {**os.environ, **{f"TRIO_{name}": value for name, value in settings.items()}}
    process = subprocess.Popen([python, "-c", code], env=environ, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    async with asyncio.timeout(60), aiohttp.ClientSession() as client:
        while True:
            try:
                async with client.get(f"{url}/health") as response:
                    if response.status == 200:
                        return _Process(process, url)
            except aiohttp.ClientError:
                await asyncio.sleep(0.1)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
