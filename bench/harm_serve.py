"""Run `vlm-sidecar serve` and record how much processor time its event loop's longest callbacks take.

`python bench/harm_serve.py FILE PYTHON -m sidecar serve …`: `bench/harm.py` puts the first three words in front of the
command. Writes one line to FILE for each callback over REPORTED_SECONDS: when it ended (`time.monotonic`), the seconds
of processor time of the loop's thread, and the functions that ran. It uses asyncio's own loop, because uvloop's
callbacks cannot be measured from outside.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from sidecar.cli import main

#: Seconds of processor time from which a callback is written down. The bound that `bench/harm.py` checks is above it.
REPORTED_SECONDS = 0.02


def measure(path: Path) -> None:
    """Wrap every callback of asyncio's loop, and look at it from a thread while it runs."""
    run = asyncio.Handle._run
    file = path.open("w", buffering=1)
    loop_thread = threading.get_ident()
    began = 0.0  # time.monotonic, 0 between callbacks
    where = ""
    collecting = 0.0  # seconds of garbage collection in the present callback

    def timed(handle: asyncio.Handle) -> None:
        nonlocal began, where, collecting
        began, where, collecting = time.monotonic(), "", 0.0
        before = time.thread_time()
        run(handle)
        took = time.thread_time() - before
        began = 0.0
        if took > REPORTED_SECONDS:
            file.write(f"{time.monotonic()}\t{took}\t{collecting:.3f} s of it collect garbage; {where}\n")

    def collect(phase: str, _: dict[str, int]) -> None:
        nonlocal collecting
        collecting += time.thread_time() * (1 if phase == "stop" else -1)

    def look() -> None:
        nonlocal where
        while True:
            time.sleep(REPORTED_SECONDS / 2)
            if began and time.monotonic() - began > REPORTED_SECONDS / 2:
                where = _functions(sys._current_frames()[loop_thread])

    gc.callbacks.append(collect)
    threading.Thread(target=look, daemon=True).start()
    asyncio.Handle._run = timed  # type: ignore[assignment, method-assign]
    main._new_loop = asyncio.new_event_loop


def _functions(frame: FrameType | None) -> str:
    """Return the innermost five functions that run."""
    names: list[str] = []
    while frame is not None and len(names) < 5:
        names.append(f"{frame.f_code.co_qualname}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(names)


if __name__ == "__main__":
    measure(Path(sys.argv[1]))
    main.main(sys.argv[5:])
