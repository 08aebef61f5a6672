"""Streams: pieces from a batch, disconnected callers, deadlines, and stop sequences."""

from __future__ import annotations

import asyncio

from local_calls import BOUND, ask, chat, events, read_events, until, various

from backends.base import Timings


async def test_a_stream_contains_the_text_of_the_whole_answer(serve, family):
    backend = await serve(family)
    for request, streamed in zip(various(3, max_tokens=40), various(3, max_tokens=40, stream=True), strict=True):
        whole = await ask(backend, request)
        pieces = await ask(backend, streamed)
        assert pieces.text == whole.text
        assert pieces.usage == whole.usage
        assert pieces.finish_reason == whole.finish_reason
        assert len(pieces.pieces) > 3


async def test_the_events_have_openais_format_and_contain_the_usage_on_request(serve):
    backend = await serve()
    raw = {}
    for include in (False, True):
        reply = await backend.send(chat(stream=True, stream_options={"include_usage": include}), Timings())
        raw[include] = b"".join([chunk async for chunk in reply.chunks])
        await reply.aclose()
        assert reply.headers["Content-Type"] == "text/event-stream"
        assert raw[include].endswith(b"data: [DONE]\n\n")
    plain, asked = events(raw[False]), events(raw[True])
    assert plain[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert plain[-1]["choices"][0]["finish_reason"] == "length"
    assert all("usage" not in event for event in plain)
    assert all(event["usage"] is None for event in asked[:-1])
    assert asked[-1]["choices"] == []
    assert asked[-1]["usage"]["completion_tokens"] == 12
    assert {event["object"] for event in asked} == {"chat.completion.chunk"}


async def test_the_first_byte_of_a_stream_arrives_before_its_batch_ends(serve, tap):
    backend = await serve()
    await tap.hold()
    timings = Timings()
    sending = asyncio.create_task(backend.send(chat(stream=True, max_tokens=200), timings))
    await until(lambda: tap.running)
    tap.allow(8)
    reply = await asyncio.wait_for(sending, BOUND)
    first = await asyncio.wait_for(anext(reply.chunks), BOUND)
    assert tap.running
    assert tap.steps <= 8
    assert read_events(first)[0]
    assert timings.work_started <= timings.first_byte
    tap.allow(10**6)
    await reply.aclose()


async def test_a_cancelled_request_frees_its_row_within_two_steps_and_the_other_row_continues(serve, tap):
    backend = await serve()
    alone = await ask(backend, chat("Who stays?", max_tokens=30))
    await tap.hold()
    first = asyncio.create_task(ask(backend, chat(max_tokens=1)))
    await until(lambda: tap.running)
    leaver = asyncio.create_task(ask(backend, chat("Who leaves?", max_tokens=10**6)))
    stayer = asyncio.create_task(ask(backend, chat("Who stays?", max_tokens=30)))
    await until(lambda: len(backend._rows) == 3)
    tap.allow(1 + 5)
    await first
    await until(lambda: tap.steps == 6)
    leaver.cancel()
    await asyncio.wait([leaver])
    tap.allow(25)  # the other row needs 25 more steps; the batch must end with it
    assert (await stayer).text == alone.text
    await until(lambda: not tap.running)


async def test_an_abandoned_batch_ends_within_two_steps(serve, tap):
    backend = await serve()
    await tap.hold()
    first = asyncio.create_task(ask(backend, chat(max_tokens=1)))
    await until(lambda: tap.running)
    sending = [asyncio.create_task(backend.send(chat(stream=True, max_tokens=10**6), Timings())) for _ in range(3)]
    await until(lambda: len(backend._rows) == 4)
    while not all(task.done() for task in sending):
        tap.allow(1)
        await asyncio.sleep(0.01)
    await first
    assert backend.batches == [1, 3]
    for task in sending:
        await task.result().aclose()
    tap.steps = 0
    tap.allow(10**6)
    await until(lambda: not tap.running)
    assert tap.steps <= 2
    assert not backend._rows


async def test_a_row_whose_deadline_passes_ends_within_two_steps(serve, tap):
    backend = await serve()
    loop = asyncio.get_running_loop()
    await tap.hold()
    deadline = loop.time() + 0.3
    # This test does not cancel `send`: the backend itself must enforce the deadline.
    reply = asyncio.create_task(ask(backend, chat(stream=True, max_tokens=10**6, deadline=deadline)))
    await until(lambda: tap.running)
    tap.allow(3)
    await until(lambda: tap.steps == 3 and loop.time() > deadline)
    tap.allow(2)
    await until(lambda: not tap.running)
    assert tap.steps <= 5
    (outcome,) = await asyncio.gather(reply, return_exceptions=True)
    failure = getattr(outcome, "failure", outcome)
    assert (failure.status, failure.code) == (504, "deadline_exceeded")


async def test_a_stream_with_content_continues_after_its_deadline(serve, tap):
    backend = await serve()
    loop = asyncio.get_running_loop()
    await tap.hold()
    deadline = loop.time() + 0.3
    sending = asyncio.create_task(backend.send(chat(stream=True, max_tokens=60, deadline=deadline), Timings()))
    await until(lambda: tap.running)
    tap.allow(20)
    reply = await asyncio.wait_for(sending, BOUND)
    assert reply.progress.content_at <= deadline
    await until(lambda: loop.time() > deadline)
    tap.allow(10**6)
    pieces = [piece async for piece in reply.chunks]
    assert pieces[-1].endswith(b"data: [DONE]\n\n")
    assert reply.failure is None
    assert reply.progress.content_at > deadline
    assert reply.output_bytes > 0
    await reply.aclose()


async def test_abandoned_rows_are_never_started(serve, tap):
    backend = await serve(max_batch=1)
    await tap.hold()
    first = asyncio.create_task(ask(backend, chat(max_tokens=2)))
    await until(lambda: tap.running)
    waiting = [asyncio.create_task(ask(backend, chat())) for _ in range(3)]
    late = asyncio.create_task(ask(backend, chat(deadline=0.0)))
    await until(lambda: len(backend._rows) == 5)
    assert backend.batches == [1]
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)
    tap.allow(10**6)
    await first
    await asyncio.wait([late])
    assert late.exception().status == 504
    await ask(backend, chat())
    assert backend.batches == [1, 1]


async def test_a_whole_or_streamed_answer_ends_before_a_stop_sequence(serve):
    backend = await serve()
    full = (await ask(backend, chat(max_tokens=40))).text
    stop = full[20:23]
    expected = full[: full.find(stop)]
    for stream in (False, True):
        answer = await ask(backend, chat(max_tokens=40, stop=["never said", stop], stream=stream))
        assert answer.text == expected
        assert answer.finish_reason == "stop"
        assert answer.usage.output_tokens < 40


async def test_an_answer_ends_at_the_models_end_token(serve):
    backend = await serve()
    model = backend._engine._model
    seen = []
    decode = model.decode
    model.decode = lambda tokens: seen.append(list(tokens)) or decode(tokens)
    await ask(backend, chat(max_tokens=6))
    tokens = seen[-1]
    model.end_tokens = frozenset({tokens[3]})
    answer = await ask(backend, chat(max_tokens=6))
    assert answer.finish_reason == "stop"
    assert answer.usage.output_tokens == tokens.index(tokens[3]) + 1


async def test_send_may_be_cancelled_at_any_await_and_leaves_nothing_behind(serve):
    backend = await serve()
    for turns in range(30):
        task = asyncio.create_task(backend.send(chat(max_tokens=3), Timings()))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert not backend._rows
    assert (await ask(backend, chat())).text
