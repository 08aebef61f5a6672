"""Faults of the running engine: the memory runs out, a row breaks its batch, the engine dies."""
# ruff: noqa: PLC0415 - torch and PIL are imported only where they are installed

from __future__ import annotations

import asyncio
import threading

import pytest
from local_calls import ask, chat, until, various

from backends.base import Rejected, ServerFailed, Unreachable
from backends.local import backend as backend_module


def out_of_memory(allocator: str) -> BaseException:
    import torch

    if allocator == "cuda":
        return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if allocator == "mps":
        return RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)")
    if allocator == "cpu":
        return RuntimeError("[enforce fail at alloc_cpu.cpp:116] DefaultCPUAllocator: can't allocate memory")
    return MemoryError()


async def gather_behind(backend, tap, requests):
    """Send `requests` so that they wait together. Returns their answers or errors."""
    await tap.hold()
    first = asyncio.create_task(ask(backend, chat(max_tokens=1)))
    await until(lambda: tap.running)
    rest = [asyncio.create_task(ask(backend, request)) for request in requests]
    await until(lambda: len(backend._rows) == len(requests) + 1)
    backend.batches.clear()
    tap.allow(10**6)
    await first
    return await asyncio.gather(*rest, return_exceptions=True)


@pytest.mark.parametrize("allocator", ["cuda", "mps", "cpu", "python"])
async def test_out_of_memory_halves_the_batch_and_every_row_is_answered(serve, tap, allocator):
    backend = await serve()
    requests = various(8)
    alone = [(await ask(backend, request)).text for request in requests]
    tap.fault = lambda seeds, _: out_of_memory(allocator) if len(seeds) > 4 else None
    answers = await gather_behind(backend, tap, requests)
    assert [answer.text for answer in answers] == alone
    assert backend.batches == [8, 4, 4]


async def test_the_smaller_batch_is_remembered(serve, tap):
    backend = await serve()
    tap.fault = lambda seeds, _: out_of_memory("cuda") if len(seeds) > 4 else None
    await gather_behind(backend, tap, various(8))
    await gather_behind(backend, tap, various(8))
    assert backend.batches == [4, 4]


async def test_an_answer_continues_where_it_was_when_the_memory_ran_out(serve, tap):
    backend = await serve()
    requests = various(4, max_tokens=30, stream=True, temperature=0)
    alone = [(await ask(backend, request)).text for request in requests]
    tap.fault = lambda seeds, step: out_of_memory("cuda") if len(seeds) > 2 and step == 15 else None
    answers = await gather_behind(backend, tap, requests)
    assert [answer.text for answer in answers] == alone
    assert {answer.usage.output_tokens for answer in answers} == {30}


async def test_a_sampled_answer_continues_where_it_was_when_the_memory_ran_out(serve, tap):
    backend = await serve()
    requests = [chat(max_tokens=30, stream=True, temperature=1, seed=seed) for seed in range(4)]
    alone = [(await ask(backend, request)).text for request in requests]
    tap.fault = lambda seeds, step: out_of_memory("cuda") if len(seeds) > 2 and step == 15 else None
    answers = await gather_behind(backend, tap, requests)
    assert [answer.text for answer in answers] == alone


async def test_permanently_exhausted_memory_is_reported_and_the_engine_survives(serve, tap):
    backend = await serve()
    tap.fault = lambda *_: out_of_memory("cuda")
    with pytest.raises(ServerFailed, match="ran out of memory") as caught:
        await ask(backend, chat())
    assert (caught.value.status, caught.value.code) == (503, "out_of_memory")
    tap.fault = lambda *_: None
    assert (await ask(backend, chat())).text
    assert backend.batches == [1, 1, 1]  # it was tried twice


async def test_a_row_that_is_too_large_alone_fails_alone_and_does_not_shrink_the_batches(serve, tap):
    backend = await serve(max_batch=4)
    tap.fault = lambda seeds, _: out_of_memory("cuda") if 2 in seeds else None
    outcomes = await gather_behind(backend, tap, [chat(seed=seed) for seed in range(4)])
    assert [getattr(outcome, "code", None) for outcome in outcomes] == [None, None, "out_of_memory", None]
    assert backend.batches == [4, 2, 2, 1, 1]
    await gather_behind(backend, tap, [chat(seed=seed) for seed in (4, 5, 6, 7)])
    assert backend.batches == [4]


async def test_rows_that_ended_before_the_memory_ran_out_count_towards_the_batch_size(serve, tap):
    backend = await serve()
    tap.fault = lambda seeds, step: out_of_memory("cuda") if len(seeds) == 8 and step == 6 else None
    outcomes = await gather_behind(backend, tap, [chat(max_tokens=tokens) for tokens in (3, 3, 3, 3, 3, 3, 9, 9)])
    assert [outcome.usage.output_tokens for outcome in outcomes] == [3] * 6 + [9, 9]
    assert backend.batches == [8, 1, 1]
    await gather_behind(backend, tap, [chat() for _ in range(8)])
    assert backend.batches == [4, 4]


async def test_a_row_that_breaks_its_batch_fails_alone_and_the_others_are_answered(serve, tap):
    backend = await serve()
    requests = [chat(f"Camera {at}", seed=at) for at in range(8)]
    alone = [(await ask(backend, request)).text for request in requests]
    tap.fault = lambda seeds, _: RuntimeError("the prompt 'Camera 5' is poison") if 5 in seeds else None
    outcomes = await gather_behind(backend, tap, requests)
    poisoned = outcomes[5]
    assert isinstance(poisoned, ServerFailed)
    assert poisoned.code == "local_model_failed"
    assert "Camera" not in poisoned.message  # an error message of the model's code may quote a prompt
    assert [answer.text for at, answer in enumerate(outcomes) if at != 5] == alone[:5] + alone[6:]
    assert backend.batches == [8, 4, 4, 2, 1, 1, 2]
    assert backend.unready_reason() is None


async def test_a_row_that_the_processor_refuses_is_rejected_and_the_others_are_answered(serve, tap, monkeypatch):
    backend = await serve()
    kind = type(backend._engine._model._processor)
    real = kind.__call__

    def picky(self, *, text, **rest):
        if any("Camera 2" in each for each in text):
            raise ValueError(f"cannot take {text}")
        return real(self, text=text, **rest)

    monkeypatch.setattr(kind, "__call__", picky)
    outcomes = await gather_behind(backend, tap, [chat(f"Camera {at}") for at in range(4)])
    assert [getattr(outcome, "status", 200) for outcome in outcomes] == [200, 200, 400, 200]
    assert isinstance(outcomes[2], Rejected)
    assert "Camera" not in outcomes[2].message
    assert backend.batches == [4, 2, 2, 1, 1]


async def test_a_prompt_that_breaks_the_model_is_not_logged(serve, tap, caplog):
    backend = await serve()
    tap.fault = lambda *_: ValueError("cannot process 'a secret prompt'")
    with caplog.at_level("DEBUG"), pytest.raises(ServerFailed):
        await ask(backend, chat("a secret prompt"))
    assert "ValueError at local_calls.py" in caplog.text
    assert "secret" not in caplog.text


async def test_a_dead_engine_is_restarted_at_once(serve, tap):
    backend = await serve()
    expected = (await ask(backend, chat())).text
    tap.fault = lambda seeds, _: SystemExit(3) if len(seeds) == 3 else None
    outcomes = await gather_behind(backend, tap, [chat() for _ in range(3)])
    assert [type(outcome) for outcome in outcomes] == [Unreachable] * 3
    assert "engine died: SystemExit" in outcomes[0].message
    assert backend.unready_reason()
    with pytest.raises(Unreachable, match="cannot answer"):
        await ask(backend, chat())
    await until(lambda: backend.unready_reason() is None)
    assert (await ask(backend, chat())).text == expected


async def test_a_started_stream_ends_with_the_error_when_the_engine_dies(serve, tap):
    backend = await serve()
    tap.fault = lambda _, step: SystemExit() if step == 12 else None
    answer = await ask(backend, chat(stream=True, max_tokens=50))
    assert answer.text
    assert isinstance(answer.failure, Unreachable)
    assert answer.usage is None


async def test_a_failed_device_ends_the_engine(serve, tap):
    import torch

    backend = await serve()
    tap.fault = lambda *_: torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(Unreachable, match="AcceleratorError"):
        await ask(backend, chat())
    tap.fault = lambda *_: None
    await until(lambda: backend.unready_reason() is None)


async def test_an_engine_that_dies_twice_in_a_minute_waits_and_readiness_says_so(serve, tap, monkeypatch):
    backend = await serve()
    for _ in range(2):
        await until(lambda: backend.unready_reason() is None)
        tap.fault = lambda *_: SystemExit()
        with pytest.raises(Unreachable):
            await ask(backend, chat())
        tap.fault = lambda *_: None
    assert "SystemExit" in backend.unready_reason()
    seconds = int(backend.unready_reason().split()[-2])
    assert backend_module.RESTART_INTERVAL_SECONDS / 2 < seconds <= backend_module.RESTART_INTERVAL_SECONDS


async def test_an_engine_that_cannot_be_restarted_is_tried_until_it_starts(serve, tap, monkeypatch):
    monkeypatch.setattr(backend_module, "RESTART_INTERVAL_SECONDS", 0.01)
    backend = await serve()
    tap.fault = lambda *_: SystemExit()
    with pytest.raises(Unreachable):
        await ask(backend, chat())
    tap.fault = lambda *_: ValueError("still broken")  # also breaks the warm-up of every new engine
    await until(lambda: "cannot answer: ValueError" in (backend.unready_reason() or ""))
    tap.fault = lambda *_: None
    await until(lambda: backend.unready_reason() is None)


async def test_the_thread_of_a_closed_backend_has_ended(serve):
    backend = await serve()
    await ask(backend, chat())
    before = {thread for thread in threading.enumerate() if thread.name == "local-engine"}
    assert len(before) == 1
    await backend.close()
    await until(lambda: not any(thread.is_alive() for thread in before))
    assert backend.unready_reason() == "closed"


async def test_close_ends_a_batch_at_its_next_step(serve, tap):
    backend = await serve()
    await tap.hold()
    asking = asyncio.create_task(ask(backend, chat(max_tokens=10**6)))
    await until(lambda: tap.running)
    closing = asyncio.create_task(backend.close())
    await until(lambda: backend.unready_reason() == "closed")
    tap.allow(2)
    await closing
    await asyncio.wait([asking])
    assert isinstance(asking.exception(), Unreachable)
