"""Ten cameras use a model in the sidecar's own process: one request at a time, as in trio-core, then in batches of 8.

make demo-local                          # with a tiny model of random weights: noise as answers, but every step is real
python examples/local.py FOLDER          # with your own model
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import re
from io import BytesIO
from pathlib import Path
from statistics import mean

import aiohttp
from PIL import Image

from sidecar.app import Sidecar
from sidecar.settings import load

CAMERAS, ROUNDS = 10, 5


def frame(camera: int) -> dict[str, object]:
    file = BytesIO()
    Image.effect_noise((320 + 32 * camera, 240), 60).convert("RGB").save(file, "JPEG")
    url = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Describe the street."}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 40}


async def ask(client: aiohttp.ClientSession, url: str, camera: int) -> dict[str, float]:
    headers = {"X-Camera-Id": f"camera {camera}"}
    async with client.post(url, json=frame(camera), headers=headers) as response:
        response.raise_for_status()
        await response.read()
        found = re.findall(r"(\w+);dur=([\d.]+)", response.headers["Server-Timing"])
    return {part: float(milliseconds) for part, milliseconds in found}


async def run(folder: Path, batch: int) -> None:
    given = {"backend": "local", "local_model": str(folder), "local_max_batch": batch, "max_concurrency": CAMERAS}
    ports = {"port": 0, "admin_host": "127.0.0.1", "admin_port": 0}
    sidecar = Sidecar(load({**given, **ports}, environ={})[0])
    try:
        await sidecar.start()
        async with aiohttp.ClientSession() as client:
            url = f"http://127.0.0.1:{sidecar.data_port}/v1/chat/completions"
            await ask(client, url, 0)
            began = asyncio.get_running_loop().time()
            timings = []
            for _ in range(ROUNDS):
                timings += await asyncio.gather(*(ask(client, url, camera) for camera in range(CAMERAS)))
            took = asyncio.get_running_loop().time() - began
    finally:
        await sidecar.close()
    means = [mean(timing[part] for timing in timings) for part in ("total", "queue", "lock", "upstream")]
    longest = max(timing["total"] for timing in timings)
    shown = "".join(f"{value:>11.0f}" for value in (means[0], longest, *means[1:]))
    print(f"{'batches of ' + str(batch):<14}{shown}{len(timings) / took:>13.1f}")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of a transformers vision-language model")
    folder = parser.parse_args().folder
    print(f"{CAMERAS} cameras at once, {ROUNDS} times; milliseconds, means but for the longest\n")
    print(f"{'':<14}{'total':>11}{'longest':>11}{'queue':>11}{'lock wait':>11}{'model':>11}{'answers/s':>13}")
    for batch in (1, 8):
        await run(folder, batch)
    print(f"\nTo serve it: .venv/bin/vlm-sidecar serve --backend local --local-model {folder}")


if __name__ == "__main__":
    asyncio.run(main())
