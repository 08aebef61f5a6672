"""Checks of the local backend that need a machine with an NVIDIA GPU. Not part of `make test`. Run them with

    make .venv/.group-test .venv/.local
    SIDECAR_LOCAL_MODEL=<folder or id> .venv/bin/pytest tests/gpu/gpu_checks.py

Without SIDECAR_LOCAL_MODEL they use a tiny model of random weights. This tests the code, but not whether your model
fits into the GPU's memory.
"""
# ruff: noqa: PLC0415 - torch is imported inside functions, because it may be missing

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


async def send_together(backend, requests):
    """Send all requests at once while another request keeps the engine busy, so that they share a batch."""
    first = asyncio.create_task(ask(backend, chat(max_tokens=64)))
    while not backend.batches:  # noqa: ASYNC110 - another thread sets it
        await asyncio.sleep(0.001)
    return (await asyncio.gather(first, *(ask(backend, request) for request in requests)))[1:]


async def test_auto_selects_the_gpu_and_half_precision(backend):
    import torch

    model = backend._engine._model
    assert model.device == "cuda"
    wanted = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    assert model._model.dtype == wanted


async def test_batched_answers_equal_the_answers_to_single_requests(backend):
    """Half precision rounds differently in another batch shape. So a late token may differ, but the first may not."""
    requests = various(BATCH, max_tokens=4)
    alone = [(await ask(backend, request)).text for request in requests]
    assert [answer.text for answer in await send_together(backend, requests)] == alone


async def test_out_of_memory_halves_the_batch_and_every_request_is_answered(backend):
    """An allocation (`ballast`) leaves memory for a few rows, but not for eight."""
    import torch

    requests = various(BATCH, max_tokens=32)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    await send_together(backend, requests)
    needed = torch.cuda.max_memory_allocated() - before
    backend.batches.clear()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(free - needed * 6 // 10, dtype=torch.uint8, device="cuda")
    try:
        answers = await send_together(backend, requests)
    finally:
        del ballast
        torch.cuda.empty_cache()
    assert len(answers) == BATCH
    assert backend._engine.max_batch < BATCH
    assert max(backend.batches[-2:]) <= BATCH // 2


async def test_a_batch_leaves_no_memory_behind(backend):
    import torch

    await send_together(backend, various(BATCH))
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        await send_together(backend, various(BATCH))
    assert torch.cuda.memory_allocated() <= before


async def test_a_caller_that_hangs_up_stops_its_generation(backend):
    request = asyncio.create_task(ask(backend, chat(max_tokens=3000)))
    while not backend.batches:  # noqa: ASYNC110 - another thread sets it
        await asyncio.sleep(0.001)
    loop = asyncio.get_running_loop()
    request.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await request
    began = loop.time()
    await ask(backend, chat(max_tokens=1))
    assert loop.time() - began < 2


async def test_a_failed_device_ends_the_engine_and_readiness_reports_it(backend, monkeypatch):
    """A failed kernel breaks the CUDA context of the whole process, which then cannot use the GPU any more.

    So this is the last check. The engine cannot be started again in this process. Readiness must stay false, with this
    reason, so that an orchestrator restarts the process.
    """
    import torch

    model = backend._engine._model

    def fail(*_):
        torch.ones(1, device="cuda")[torch.tensor([7], device="cuda")].sum().item()

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(Unreachable, match="engine died"):
        await ask(backend, chat())
    assert backend.unready_reason() is not None
