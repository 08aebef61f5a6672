"""Batching: which requests share a batch, and that an answer does not depend on the other rows of its batch."""
# ruff: noqa: PLC0415 - torch and PIL are imported only where they are installed

from __future__ import annotations

import asyncio

import pytest
from local_calls import BOUND, ask, chat, data_url, picture, until, various

from backends.base import Timings


async def ask_together(backend, tap, requests):
    """Let all requests wait together: another request occupies the engine until they have arrived."""
    await tap.hold()
    first = asyncio.create_task(ask(backend, chat(max_tokens=2)))
    await until(lambda: tap.running)
    rest = [asyncio.create_task(ask(backend, request)) for request in requests]
    await until(lambda: len(backend._rows) == len(requests) + 1)
    tap.allow(10**6)
    await first
    return await asyncio.gather(*rest)


async def test_batched_greedy_answers_equal_those_given_one_by_one(serve, tap, family):
    backend = await serve(family)
    requests = various(8, max_tokens=24)
    alone = [await ask(backend, request) for request in requests]
    backend.batches.clear()
    together = await ask_together(backend, tap, requests)
    assert backend.batches == [1, 8]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert [answer.usage for answer in together] == [answer.usage for answer in alone]
    assert len({answer.text for answer in alone}) > 4  # equal answers would make the comparison useless


async def test_a_batch_has_at_most_max_batch_rows(serve, tap):
    backend = await serve(max_batch=4)
    await ask_together(backend, tap, various(10))
    assert backend.batches == [1, 4, 4, 2]


async def test_rows_with_different_numbers_of_images_do_not_share_a_batch(serve, tap, family):
    backend = await serve(family)
    image = data_url(picture())
    requests = [chat(images=[image] * count, max_tokens=6) for count in (0, 1, 0, 2, 1, 0)]
    alone = [await ask(backend, request) for request in requests]
    backend.batches.clear()
    together = await ask_together(backend, tap, requests)
    assert backend.batches == [1, 3, 2, 1]
    assert [answer.text for answer in together] == [answer.text for answer in alone]


async def test_each_row_ends_at_its_own_limit(serve, tap):
    backend = await serve()
    answers = await ask_together(backend, tap, [chat(max_tokens=limit) for limit in (1, 5, 20)])
    assert [answer.usage.output_tokens for answer in answers] == [1, 5, 20]
    assert {answer.finish_reason for answer in answers} == {"length"}


async def test_a_short_answer_is_returned_while_its_batch_continues(serve, tap):
    backend = await serve()
    await tap.hold()
    first = asyncio.create_task(ask(backend, chat(max_tokens=1)))
    await until(lambda: tap.running)
    short, long = (asyncio.create_task(ask(backend, chat(max_tokens=limit))) for limit in (2, 500))
    await until(lambda: len(backend._rows) == 3)
    tap.allow(1 + 2)
    await first
    await asyncio.wait_for(short, BOUND)
    assert not long.done()
    assert tap.running
    tap.allow(10**6)
    await long


async def test_rows_of_different_temperatures_share_a_batch_and_use_their_own_seeds(serve, tap):
    backend = await serve()
    requests = [
        chat(temperature=1.5, seed=1, max_tokens=20),
        chat(temperature=0, max_tokens=20),
        chat(temperature=1.5, seed=2, max_tokens=20),
        chat(temperature=0.7, top_p=0.5, seed=1, max_tokens=20),
    ]
    alone = [await ask(backend, request) for request in requests]
    backend.batches.clear()
    together = await ask_together(backend, tap, requests)
    assert backend.batches == [1, 4]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert len({answer.text for answer in alone}) == 4


async def test_a_top_p_of_zero_allows_only_the_most_likely_token(serve):
    backend = await serve()
    greedy = await ask(backend, chat(temperature=0))
    assert (await ask(backend, chat(temperature=2, top_p=0, seed=3))).text == greedy.text


async def test_unseeded_samples_differ(serve):
    backend = await serve()
    answers = [await ask(backend, chat(temperature=1)) for _ in range(4)]
    assert len({answer.text for answer in answers}) > 1


async def test_sampling_follows_the_models_probabilities(serve):
    """Draw a token 3000 times: the frequency of each token is close to the softmax of its score."""
    import torch

    from backends.local.model import _nucleus
    from backends.local.rows import Draw

    model = (await serve())._engine._model
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0])
    counts = torch.zeros(4)
    sample = model._sampler([Draw(temperature=0.5, top_p=1.0, seed=7)])
    for _ in range(3000):
        counts[sample(None, scores[None].clone())[0].argmax()] += 1
    # 3000 draws have a standard error below 0.01.
    assert torch.allclose(counts / 3000, torch.softmax(scores / 0.5, dim=0), atol=0.04)
    kept = _nucleus(scores, 0.8)
    assert kept.tolist()[:2] == [2.0, 1.0]
    assert kept.isinf().tolist() == [False, False, True, True]


async def test_the_engine_waits_for_a_batch_to_fill_while_more_requests_are_queued(serve):
    backend = await serve(max_batch=2, batch_wait_seconds=BOUND, queued=lambda: 1)
    first = asyncio.create_task(ask(backend, chat()))
    await asyncio.sleep(0.05)  # long enough to notice an engine that starts without the second request
    assert not first.done()
    await ask(backend, chat())
    await first
    assert backend.batches == [2]


async def test_the_engine_does_not_wait_when_no_requests_are_queued(serve):
    backend = await serve(max_batch=2, batch_wait_seconds=10 * BOUND, queued=lambda: 0)
    await ask(backend, chat())
    assert backend.batches == [1]


async def test_the_wait_for_a_batch_ends_after_batch_wait_seconds(serve):
    backend = await serve(max_batch=2, batch_wait_seconds=0.01, queued=lambda: 1)
    await ask(backend, chat())
    assert backend.batches == [1]


async def test_ten_simultaneous_requests_with_batches_of_one_have_increasing_lock_waits(serve):
    backend = await serve(max_batch=1)
    loop = asyncio.get_running_loop()
    all_timings = [Timings() for _ in range(10)]
    sent = loop.time()
    await asyncio.gather(*(backend.send(chat(), timings) for timings in all_timings))
    started = [timings.work_started for timings in all_timings]
    ended = [timings.first_byte for timings in all_timings]
    assert sent <= started[0]
    assert started == sorted(started)
    # Each request starts when the one before it ends. Both events may reach the loop together.
    assert all(end <= start for end, start in zip(ended[:-2], started[2:], strict=True))
    assert backend.batches == [1] * 10


@pytest.mark.parametrize("options", [{}, {"max_batch": 3}])
async def test_slots_include_the_next_batch(options, model_of, serve):
    backend = await serve(**options)
    assert backend.slots == 2 * options.get("max_batch", 8)
