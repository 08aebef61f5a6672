"""Show where the sidecar spends its time: a flame graph under load, and the share of each package.

    make flame                 (or .venv/bin/python -m bench.cost.flame, with py-spy in .venv-spy)

py-spy samples the running process 250 times per second. A sample counts for the innermost Python frame, so the time of
system calls and C code counts for the Python function that called them.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from bench.cost.processes import ROOT, process, sidecar, wire
from bench.cost.report import IMAGES, PAGE, between
from bench.cost.side_by_side import KINDS, bodies
from sidecar.cli.demo.processes import free_port

SPY = ROOT / ".venv-spy" / "bin" / "py-spy"
SECONDS = 8
CONNECTIONS = 16
#: Pairs of a path prefix and the label of a package ("room"). The first prefix that matches a file's path counts.
ROOMS = (
    ("sidecar/api/", "sidecar/api: read, understand, answer"),
    ("sidecar/admission/", "sidecar/admission: queue, limits"),
    ("sidecar/dispatch/", "sidecar/dispatch: attempts"),
    ("sidecar/observe/", "sidecar/observe: metrics, log, spans"),
    ("prometheus_client/", "sidecar/observe: metrics, log, spans"),
    ("sidecar/", "sidecar: the rest"),
    ("backends/http1/", "backends/http1: HTTP, both ends"),
    ("backends/", "backends: the upstream's protocol"),
    ("aiohttp/web", "aiohttp, server side"),
    ("aiohttp/client", "aiohttp, client side"),
    ("aiohttp/connector", "aiohttp, client side"),
    ("aiohttp/", "aiohttp, both sides: parser, writer, streams"),
    ("", "event loop, sockets and the rest"),
)


def record(pid: int, path: Path, form: str) -> None:
    """Sample a process for `SECONDS` seconds and write the result to `path`."""
    command = [str(SPY), "record", "--pid", str(pid), "--duration", str(SECONDS), "--rate", "250", "--function"]
    subprocess.run([*command, "--format", form, "--output", str(path)], check=True, capture_output=True)


def rooms(raw: str) -> dict[str, float]:
    """Return for each room its share of the samples. A sample counts for the room of the innermost frame.

    Each line of py-spy's raw output is `outer (file);inner (file) count`.
    """
    samples: Counter[str] = Counter()
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        file = stack.rpartition("(")[2].rstrip(")")
        samples[next(room for prefix, room in ROOMS if file.startswith(prefix))] += int(count)
    return {room: count / samples.total() for room, count in samples.most_common()}


def look(kind: str) -> dict[str, float]:
    """Write the flame graph of a sidecar under this kind of request, and return the shares of the rooms."""
    image = IMAGES / f"flame-{kind}.svg"
    upstream, port = free_port(), free_port()
    with (
        tempfile.TemporaryDirectory() as folder,
        process(wire("upstream", upstream), upstream),
        process(sidecar(port, upstream), port) as pid,
        subprocess.Popen(
            wire("load", port, CONNECTIONS, 4 * SECONDS), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        ) as load,
    ):
        try:
            assert load.stdin is not None
            load.stdin.write(bodies()[kind])
            load.stdin.close()
            record(pid, image, "flamegraph")
            image.write_text(image.read_text().replace(f"{ROOT}/", ""))  # the image contains the command line
            record(pid, Path(folder) / "raw", "raw")
            return rooms((Path(folder) / "raw").read_text())
        finally:
            load.kill()


def table(shares: dict[str, dict[str, float]]) -> str:
    """Return the table of the rooms' shares by kind of request, the largest share first."""
    names = sorted({room for of_kind in shares.values() for room in of_kind}, key=lambda r: -shares["frame"].get(r, 0))
    lines = ["| own time | " + " | ".join(f"[{kind}](images/flame-{kind}.svg)" for kind in shares) + " |"]
    lines.append("|---" * (len(shares) + 1) + "|")
    lines += [f"| {room} | " + " | ".join(f"{s.get(room, 0):.0%}" for s in shares.values()) + " |" for room in names]
    return "\n".join(lines)


def main() -> int:
    if not SPY.exists():
        print("py-spy is not there: run it as `make flame`", file=sys.stderr)
        return 2
    made = table({kind: look(kind) for kind in KINDS})
    print(made)
    PAGE.write_text(between(PAGE.read_text(), "make flame", made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
