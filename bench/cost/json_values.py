"""What parsing JSON of many values costs, and what counting them before costs: `python -m bench.cost.json_values`."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from functools import partial

import orjson

from backends.json_values import MAX_VALUES, has_too_many_values

_MEGABYTE = 1 << 20


def milliseconds(work: Callable[[], object]) -> float:
    """Return the shortest of three times."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return 1000 * min(times)


def main() -> None:
    """Print two tables."""
    print(f"parsing {MAX_VALUES} equal values with orjson")
    for value in (b"{}", b'{"a":1}', b"[]", b"1.5", b'"ab"'):
        text = b"[" + b",".join([value] * MAX_VALUES) + b"]"
        tracemalloc.start()
        orjson.loads(text)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        print(f"  {value.decode():8} {milliseconds(partial(orjson.loads, text)):6.1f} ms {peak / 1e6:6.1f} MB")
    print("counting the values of 10 MB, in ms for each MB")
    for name, piece in (
        ("prose in one string", b"a fox, a lazy dog; "),
        ("JSON escaped in one string", b'{\\"a\\":[1,2]},'),
        ("objects", b'{},'),
        ("short strings", b'"",'),
    ):  # fmt: skip
        text = piece * (10 * _MEGABYTE // len(piece))
        text = b'["' + text + b'"]' if b"\\" in piece or b" " in piece else b"[" + text + b"0]"
        print(f"  {name:27} {milliseconds(partial(has_too_many_values, text)) / 10:5.2f}")


if __name__ == "__main__":
    main()
