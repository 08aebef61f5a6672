"""Count the steps of a call: a measure of its cost that is the same on every machine."""

import sys


def count_lines(call):
    """Return the number of lines of Python that a call runs."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count
