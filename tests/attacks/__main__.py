"""Run attacks as a separate process: `python -m attacks NAME[,NAME…] PORT ADMIN_PORT SECONDS`, several at once.

Prints a line when it begins.
"""

from __future__ import annotations

import asyncio
import sys

from attacks import ATTACKS, Target


def main() -> None:
    names, port, admin_port, seconds = sys.argv[1:]
    print("begins", flush=True)  # noqa: T201
    asyncio.run(run(names.split(","), Target(int(port), int(admin_port)), float(seconds)))


async def run(names: list[str], target: Target, seconds: float) -> None:
    async with asyncio.TaskGroup() as group:
        for name in names:
            group.create_task(ATTACKS[name].run(target, seconds))


if __name__ == "__main__":
    main()
