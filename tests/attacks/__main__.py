"""Run attacks as a separate process: `python -m attacks NAME PORT ADMIN_PORT SECONDS`; `all` runs all at once.

Prints a line when it begins. It runs at nice 19 on the machine's last core, so that what it changes at the target is
not a lack of processor time.
"""

from __future__ import annotations

import asyncio
import os
import sys

from attacks import ATTACKS, Target


def main() -> None:
    name, port, admin_port, seconds = sys.argv[1:]
    os.nice(19)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    print("begins", flush=True)  # noqa: T201
    asyncio.run(run(list(ATTACKS) if name == "all" else [name], Target(int(port), int(admin_port)), float(seconds)))


async def run(names: list[str], target: Target, seconds: float) -> None:
    async with asyncio.TaskGroup() as group:
        for name in names:
            group.create_task(ATTACKS[name].run(target, seconds))


if __name__ == "__main__":
    main()
