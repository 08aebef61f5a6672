"""A program: compose or detect each of these pictures as one job after the other, and print the memory of each as JSON.

usage: picture_memory_of.py MAX_BYTES WARM_UPS FILE…
The first WARM_UPS files load the code that later pictures use too.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from functools import partial
from pathlib import Path

from backends.picture_memory import PICTURES
from sidecar.api.errors import InvalidRequest
from sidecar.api.trio.image import compose

CROPS = [{"class": "fox", "bbox": [10 * at, 10, 900 + 100 * at, 1000], "confidence": 0.5} for at in range(4)]


def memory_bytes(name: str) -> int:
    """Return `VmHWM` (the peak) or `VmRSS` (now) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def prepared(file: str) -> bytes:
    """Return the file in base64. The peak of this process begins anew."""
    encoded = base64.b64encode(Path(file).read_bytes())
    Path("/proc/self/clear_refs").write_text("5")
    return encoded


async def main(max_bytes: int, warm_ups: int, files: list[str]) -> None:
    """Print, for each file but the first: the peak above what was held before, what is left
    above what was held after the warm-up, both in bytes, and the result.
    """
    PICTURES.max_bytes = max_bytes
    started = 0
    for at, file in enumerate(files, 1):
        encoded = prepared(file)
        before = memory_bytes("VmRSS")
        try:
            composite = await PICTURES.run("", partial(compose, encoded, CROPS, 4))
            result = "passed on" if composite is None else "composite"
            del composite
        except InvalidRequest as error:
            result = error.message
        peak = memory_bytes("VmHWM") - before
        del encoded
        if at <= warm_ups:
            started = memory_bytes("VmRSS")
        left = memory_bytes("VmRSS") - started
        report = {"peak": peak, "left": left, "result": result, "counted": PICTURES.bytes}
        sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
