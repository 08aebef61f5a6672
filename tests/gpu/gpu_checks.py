"""What only a machine with an NVIDIA GPU can tell of the local backend. Not part of `make test`; run it with

    make .venv/.torch TORCH_INDEX=<an index with a CUDA build>
    SIDECAR_LOCAL_MODEL=<folder or id> .venv/bin/pytest tests/gpu/gpu_checks.py

Without SIDECAR_LOCAL_MODEL a tiny model of random weights is used: that tells of the code, not of your model's memory.
"""
# ruff: noqa: PLC0415 - torch is imported where it is known to be there

from __future__ import annotations

import asyncio
import contextlib
import os

import pytest
from local_calls import ask, chat, various

from backends.base import Unreachable
from backends.local import LocalBackend

BATCH = 8


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    import torch

    from backends.local.tiny import build

    assert torch.cuda.is_available(), "these checks need a CUDA device and a CUDA build of torch"
    if given := os.environ.get("SIDECAR_LOCAL_MODEL"):
        return given
    folder = tmp_path_factory.mktemp("models") / "idefics3"
    build("idefics3", folder)
    return str(folder)


@pytest.fixture
async def backend(model):
    """A started backend on the GPU; `batches` are the sizes of its batches so far."""
    batches = []
    backend = LocalBackend(model, max_batch=BATCH, on_batch=batches.append)
    backend.batches = batches
    await backend.start()
    backend.batches.clear()
    yield backend
    await backend.close()


async def together(backend, requests):
    """Send all at once behind one that keeps the engine busy, so that they share a batch."""
    first = asyncio.create_task(ask(backend, chat(max_tokens=64)))
    while not backend.batches:  # noqa: ASYNC110 - another thread sets it
        await asyncio.sleep(0.001)
    return (await asyncio.gather(first, *(ask(backend, request) for request in requests)))[1:]


async def test_auto_takes_the_gpu_and_a_quick_type_of_number(backend):
    import torch

    model = backend._engine._model
    assert model.device == "cuda"
    wanted = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    assert model._model.dtype == wanted


async def test_batched_answers_are_those_given_one_by_one(backend):
    """Half precision rounds otherwise in another shape, so a late token may differ: the first ones may not."""
    requests = various(BATCH, max_tokens=4)
    alone = [(await ask(backend, request)).text for request in requests]
    assert [answer.text for answer in await together(backend, requests)] == alone


async def test_memory_that_runs_out_halves_the_batch_and_everybody_is_served(backend):
    """Ballast leaves room for a few rows, not for eight."""
    import torch

    requests = various(BATCH, max_tokens=32)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    await together(backend, requests)
    needed = torch.cuda.max_memory_allocated() - before
    backend.batches.clear()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(free - needed * 6 // 10, dtype=torch.uint8, device="cuda")
    try:
        answers = await together(backend, requests)
    finally:
        del ballast
        torch.cuda.empty_cache()
    assert len(answers) == BATCH
    assert backend._engine.max_batch < BATCH
    assert max(backend.batches[-2:]) <= BATCH // 2


async def test_a_batch_leaves_no_memory_behind(backend):
    import torch

    await together(backend, various(BATCH))
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        await together(backend, various(BATCH))
    assert torch.cuda.memory_allocated() <= before


async def test_a_caller_that_hangs_up_stops_its_generation(backend):
    asking = asyncio.create_task(ask(backend, chat(max_tokens=3000)))
    while not backend.batches:  # noqa: ASYNC110 - another thread sets it
        await asyncio.sleep(0.001)
    loop = asyncio.get_running_loop()
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking
    began = loop.time()
    await ask(backend, chat(max_tokens=1))
    assert loop.time() - began < 2


async def test_a_device_that_fails_ends_the_engine_and_says_so(backend, monkeypatch):
    """A failed kernel takes the CUDA context of the whole process with it, so nothing can run on the GPU after this.

    The last of the checks. The engine cannot be started again in this process: the reason must say so until someone
    restarts it, which readiness that stays false makes an orchestrator do.
    """
    import torch

    model = backend._engine._model

    def fail(*_):
        torch.ones(1, device="cuda")[torch.tensor([7], device="cuda")].sum().item()

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(Unreachable, match="engine died"):
        await ask(backend, chat())
    assert backend.ready_reason() is not None
