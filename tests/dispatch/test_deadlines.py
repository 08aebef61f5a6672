"""`Deadlines` ends each block at its own deadline with one timer, exactly like one `asyncio.timeout_at` per block."""

import asyncio
import contextlib
import gc
import weakref
from math import inf

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from bench.sim import clock
from sidecar.dispatch.deadlines import Deadlines

SECONDS = st.integers(1, 20).map(lambda tenths: tenths / 10)


@pytest.mark.parametrize(("answers", "ends"), [([3.0, 4.5, 0.0], 4.5), ([inf], None), ([2.0], 2.0), ([1.5, inf], None)])
def test_a_deadline_can_move_each_time_that_it_comes(answers, ends):
    async def main():
        loop = asyncio.get_running_loop()
        deadlines = Deadlines(loop)
        asked = []
        began = loop.time()

        def later(now):
            asked.append(now - began)
            return began + answers[len(asked) - 1] if len(asked) <= len(answers) else now

        try:
            with deadlines.until(began + 1.0, later):
                with contextlib.suppress(TimeoutError), deadlines.until(began + 3.5):  # it shares the timer
                    await asyncio.sleep(3.6)
                await asyncio.sleep(20.0)
        except TimeoutError:
            assert loop.time() - began == pytest.approx(ends)
        else:
            assert ends is None
        assert asked == pytest.approx([1.0, *answers][: len(asked)])
        assert not deadlines._active

    clock.run(main())


@given(st.lists(st.tuples(SECONDS, SECONDS, SECONDS, st.none() | SECONDS), max_size=8))
def test_each_block_ends_exactly_as_with_asyncio_timeout_at(blocks):
    async def ends(until) -> list[tuple[str, float]]:
        loop = asyncio.get_running_loop()

        async def block(starts, allowed, takes):
            await asyncio.sleep(starts)
            try:
                async with until(loop.time() + allowed):
                    await asyncio.sleep(takes)
            except TimeoutError:
                return "late", loop.time()
            except asyncio.CancelledError:
                return "cancelled", loop.time()
            return "in time", loop.time()

        tasks = []
        for starts, allowed, takes, cancelled in blocks:
            # 0.01 s more, so that no block ends exactly at its deadline
            task = asyncio.ensure_future(block(starts, allowed, takes + 0.01))
            tasks.append(task)
            if cancelled is not None:
                loop.call_later(starts + cancelled + 0.02, task.cancel)
        return await asyncio.gather(*tasks)

    async def with_one_timer():
        deadlines = Deadlines(asyncio.get_running_loop())

        class Until:
            def __init__(self, when):
                self.deadline = deadlines.until(when)

            async def __aenter__(self):
                self.deadline.__enter__()

            async def __aexit__(self, *error):
                self.deadline.__exit__(*error)

        return await ends(Until)

    expected = clock.run(ends(asyncio.timeout_at))
    assert [(end, pytest.approx(at)) for end, at in expected] == clock.run(with_one_timer())


async def late(deadlines, seconds):
    with pytest.raises(TimeoutError), deadlines.until(asyncio.get_running_loop().time() + seconds):
        await asyncio.sleep(10.0)


def test_a_task_cancelled_by_other_code_at_its_deadline_ends_as_cancelled():
    async def main():
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(late(Deadlines(loop), 1.0))
        await asyncio.sleep(0)
        loop.call_at(loop.time() + 1.0, task.cancel)
        with pytest.raises(asyncio.CancelledError):
            await task

    clock.run(main())


def test_an_exception_of_the_block_passes_through():
    async def main():
        deadlines = Deadlines(asyncio.get_running_loop())
        with pytest.raises(KeyError), deadlines.until(asyncio.get_running_loop().time() + 1.0):
            raise KeyError
        await late(deadlines, 2.0)  # the deadline of the first block passes meanwhile and cancels nothing

    clock.run(main())


def test_no_reference_to_a_finished_block_remains():
    async def main():
        deadlines = Deadlines(asyncio.get_running_loop())

        async def quick():
            with deadlines.until(asyncio.get_running_loop().time() + 60.0):
                await asyncio.sleep(0)

        task = asyncio.ensure_future(quick())
        await task
        kept = weakref.ref(task)
        del task
        await asyncio.sleep(0)  # until then, the event loop holds a reference to the task
        gc.collect()
        assert kept() is None

    clock.run(main())


def test_deadlines_end_blocks_under_uvloop():
    """The clock of uvloop has a resolution of one millisecond."""

    async def main():
        deadlines = Deadlines(asyncio.get_running_loop())
        async with asyncio.timeout(10.0):
            await asyncio.gather(*(late(deadlines, number / 3000) for number in range(1, 30)))

    uvloop.run(main())
