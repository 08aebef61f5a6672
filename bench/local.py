"""Measure the gain of batching in the local backend, and its effect on the event loop, with a tiny real model.

    python bench/local.py [--family idefics3] [--tokens 40] [--rounds 5] [--seconds 5]

Prints ratios and milliseconds. Only the ratios are valid on other machines. The peer works as trio-core 1.1.5 does:
one thread for each request, and one `threading.Lock` around `generate`.
"""

# ruff: noqa: PLC0415 - torch and transformers are imported inside functions: the child process imports them itself

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial
from io import BytesIO
from pathlib import Path

from backends.base import Request, Timings
from backends.local import LocalBackend


def picture(at: int) -> bytes:
    from PIL import Image

    file = BytesIO()
    Image.effect_noise((320 + 40 * at, 240), 60).convert("RGB").save(file, "JPEG")
    return file.getvalue()


def chat(at: int, tokens: int) -> Request:
    url = "data:image/jpeg;base64," + base64.b64encode(picture(at)).decode()
    text = "Describe the street. " * (1 + at % 4)
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": tokens}
    return Request("openai", "/chat/completions", json.dumps(body).encode(), "tiny")


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


async def seconds(rounds: int, work: Callable[[], Awaitable[object]]) -> float:
    """Return the median duration of `work` in seconds over `rounds` rounds."""
    took = []
    for _ in range(rounds):
        began = time.perf_counter()
        await work()
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def plain_lock(folder: Path, tokens: int) -> Callable[[int], None]:
    """Return the peer: a function that answers one request in the calling thread, under the lock."""
    import torch
    import transformers
    from PIL import Image

    processor = transformers.AutoProcessor.from_pretrained(folder)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    lock = threading.Lock()

    def answer(at: int) -> None:
        part = [{"type": "image"}, {"type": "text", "text": "Describe the street. " * (1 + at % 4)}]
        text = processor.apply_chat_template([{"role": "user", "content": part}], add_generation_prompt=True)
        with lock, torch.inference_mode():
            image = Image.open(BytesIO(picture(at))).convert("RGB")
            inputs = processor(text=[text], images=[[image]], return_tensors="pt")
            out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
            processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer


async def throughput(folder: Path, tokens: int, rounds: int) -> None:
    requests = [chat(at, tokens) for at in range(10)]
    backend = LocalBackend(str(folder))
    await backend.start()

    async def together(count: int) -> None:
        await asyncio.gather(*(backend.send(request, Timings()) for request in requests[:count]))

    await together(8)
    alone = await seconds(rounds, lambda: together(1))
    print(f"\none request alone: {alone * 1e3:.0f} ms ({tokens} LLM tokens)")
    print(f"{'at once':>8} {'time / one':>11} {'requests/s':>11} {'plain lock: time / one':>24}")
    peer = plain_lock(folder, tokens)
    await asyncio.to_thread(peer, 0)
    lock_alone = await seconds(rounds, lambda: asyncio.to_thread(peer, 0))
    for count in (1, 2, 4, 8, 10):
        took = await seconds(rounds, partial(together, count))

        async def locked(count: int = count) -> None:
            await asyncio.gather(*(asyncio.to_thread(peer, at) for at in range(count)))

        lock_took = await seconds(rounds, locked)
        print(f"{count:>8} {took / alone:>11.2f} {count / took:>11.1f} {lock_took / lock_alone:>24.2f}")
    await backend.close()


async def lock_waits(folder: Path, tokens: int) -> None:
    print("\nlock wait of ten at once, ms (arrival in the mailbox until the engine takes the row up)")
    for max_batch in (1, 8):
        backend = LocalBackend(str(folder), max_batch=max_batch)
        await backend.start()
        requests = [chat(at, tokens) for at in range(10)]
        await backend.send(requests[0], Timings())
        timings = [Timings() for _ in requests]
        began = asyncio.get_running_loop().time()
        await asyncio.gather(*(backend.send(*pair) for pair in zip(requests, timings, strict=True)))
        waits = sorted(timing.work_started - began for timing in timings if timing.work_started is not None)
        print(f"  batch of {max_batch}:", " ".join(f"{wait * 1e3:.0f}" for wait in waits))
        await backend.close()


async def lag(for_seconds: float) -> str:
    """Measure the event-loop lag a hundred times per second; return its quantiles in milliseconds as text."""
    loop = asyncio.get_running_loop()
    late = []
    end = loop.time() + for_seconds
    while (now := loop.time()) < end:
        await asyncio.sleep(0.01)
        late.append((loop.time() - now - 0.01) * 1e3)
    return " ".join(f"{percentile(late, share):>8.2f}" for share in (0.5, 0.99, 0.999))


async def keep_busy(backend: LocalBackend) -> None:
    requests = [chat(at, 200) for at in range(8)]
    while True:
        await asyncio.gather(*(backend.send(request, Timings()) for request in requests))


def generate_forever(folder: str, started: threading.Event) -> None:
    """Run in the child process: its own engine that generates without pause."""

    async def run() -> None:
        backend = LocalBackend(folder)
        await backend.start()
        started.set()
        await keep_busy(backend)

    asyncio.run(run())


async def lags(folder: Path, for_seconds: float) -> None:
    print(f"\nevent-loop lag, ms {'p50':>15} {'p99':>8} {'p99.9':>8}")
    print(f"{'idle':<25}", await lag(for_seconds))
    backend = LocalBackend(str(folder))
    await backend.start()
    generating = asyncio.create_task(keep_busy(backend))
    await asyncio.sleep(0.5)  # then the pictures have been made and the first batch runs
    print(f"{'engine in a thread':<25}", await lag(for_seconds))
    generating.cancel()
    await asyncio.wait([generating])
    await backend.close()
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    child = context.Process(target=generate_forever, args=(str(folder), started))
    child.start()
    try:
        await asyncio.to_thread(started.wait)
        print(f"{'engine in a process':<25}", await lag(for_seconds))
    finally:
        child.kill()
        child.join()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", default="idefics3")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5)
    options = parser.parse_args()
    from backends.local.tiny import build

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / options.family
        build(options.family, folder)
        await throughput(folder, options.tokens, options.rounds)
        await lock_waits(folder, options.tokens)
        await lags(folder, options.seconds)


if __name__ == "__main__":
    asyncio.run(main())
